// Whether links are in place, as often as one likes, on an interface in a namespace of the test's own.
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { attachTcx, type BpfObject, hasTcx, type Link, openObject } from "../../loader/index.ts";
import { hasTcxLink } from "../../src/edge/tcx.ts";
import { build, enterNamespace, sh } from "../loader/lab.ts";

const GONE = 999_999;
/** More than are asked for at first. */
const MANY = 20;

describe.skipIf(!hasTcx())("links, if the kernel has TCX (Linux 6.6 on)", () => {
  const objects: BpfObject[] = [];
  let path: string;
  let ifindex: number;

  beforeAll(() => {
    enterNamespace();
    sh("ip link add near type bridge");
    ifindex = JSON.parse(sh("ip -j link show near"))[0].ifindex;
    path = build("tcx", 'SEC("tc") int passes(struct __sk_buff *skb) { return TC_ACT_UNSPEC; }');
  });

  afterAll(() => {
    for (const object of objects) object.close();
  });

  /** A program of its own each time: the kernel takes none twice. */
  const attach = (): Link => {
    const object = openObject(path);
    objects.push(object);
    object.load();
    return attachTcx(object.program("passes"), ifindex, "egress");
  };

  it("are there from when they are attached until they are detached, or closed", () => {
    const [first, second] = [attach(), attach()];
    expect(first.id).not.toBe(second.id);
    for (const { id } of [first, second]) {
      expect(hasTcxLink(ifindex, "egress", id)).toBe(true);
      expect(hasTcxLink(ifindex, "ingress", id)).toBe(false);
    }
    first.detach();
    expect(hasTcxLink(ifindex, "egress", first.id)).toBe(false);
    expect(hasTcxLink(ifindex, "egress", second.id)).toBe(true);
    second.close();
    // What was listed before does not count.
    expect(hasTcxLink(ifindex, "egress", second.id)).toBe(false);
    first.close();
  });

  it("are found among very many", () => {
    const links = Array.from({ length: MANY }, attach);
    for (const { id } of links) expect(hasTcxLink(ifindex, "egress", id)).toBe(true);
    expect(hasTcxLink(ifindex, "egress", 0)).toBe(false);
    for (const link of links) link.close();
  });

  it("of an interface that is gone cannot be looked for", () => {
    expect(() => hasTcxLink(GONE, "egress", 1)).toThrow(/ENODEV/);
  });
});
