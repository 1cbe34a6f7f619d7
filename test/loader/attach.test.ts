// TCX, clsact and XDP on a veth pair in a namespace of the test's own, with packets to prove that programs run.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, beforeEach, describe, expect, it } from "vitest";
import {
  attachClsact,
  attachTcx,
  attachXdp,
  type BpfObject,
  destroyClsact,
  detachClsact,
  detachXdp,
  hasClsact,
  hasHelper,
  hasMapType,
  hasTcx,
  hasTcxLink,
  type Link,
  linkIds,
  linkInfo,
  openLinkById,
  openObject,
  openPinnedLink,
  queryClsact,
  queryTcx,
  queryXdp,
  unpin,
} from "../../loader/index.ts";
import { bpffs, build, enterNamespace, sh, words } from "./lab.ts";

// Each program counts its packets under its own number, and lets them go on.
const SOURCE = `
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 4);
  __type(key, __u32); __type(value, __u32); } counts SEC(".maps");
static __always_inline void tally(__u32 number) {
  __u32 *count = bpf_map_lookup_elem(&counts, &number);
  if (count) __sync_fetch_and_add(count, 1);
}
SEC("tc") int first(struct __sk_buff *skb) { tally(0); return TC_ACT_UNSPEC; }
SEC("tc") int second(struct __sk_buff *skb) { tally(1); return TC_ACT_UNSPEC; }
SEC("xdp") int third(struct xdp_md *ctx) { tally(2); return XDP_PASS; }
SEC("xdp") int fourth(struct xdp_md *ctx) { tally(3); return XDP_PASS; }
`;

let object: BpfObject;
let pins: string;
let ifindex: number;
const GONE = 999_999;

/** Sends three packets out of the interface, each of which is answered. */
function exchange(): void {
  sh("ping -q -c 3 -i 0.01 -W 2 198.51.100.2 >/dev/null");
}

function indexOf(name: string): number {
  return JSON.parse(sh(`ip -j link show ${name}`))[0].ifindex;
}

function counts(): number[] {
  return object
    .map("counts")
    .entries()
    .map(([, value]) => Buffer.from(value).readUInt32LE());
}

beforeAll(() => {
  pins = bpffs();
  enterNamespace();
  // The far end is in a namespace that lives as long as the interface: answers must cross the wire. Without IPv6, whose
  // groups are announced for some seconds and would be counted with what is sent here.
  sh(`echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6
      ip link add near type veth peer name far
      ip netns add loader-far-${process.pid}
      ip netns exec loader-far-${process.pid} sh -c 'echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6'
      ip link set far netns loader-far-${process.pid}
      ip addr add 198.51.100.1/24 dev near
      ip link set near up
      ip -n loader-far-${process.pid} addr add 198.51.100.2/24 dev far
      ip -n loader-far-${process.pid} link set far up`);
  ifindex = indexOf("near");
  object = openObject(build("attach", SOURCE));
  object.load();
});

afterAll(() => {
  object?.close();
  sh(`ip netns del loader-far-${process.pid}`);
});

beforeEach(() => {
  object.map("counts").updateBatch([0, 1, 2, 3].map((i) => [words(i), words(0)]));
});

describe("the kernel is asked for its features", () => {
  it("helpers and types of maps, that are there and that cannot be", () => {
    expect(hasHelper(1)).toBe(true); // bpf_map_lookup_elem
    expect(hasHelper(100_000)).toBe(false);
    expect(hasMapType(1)).toBe(true); // BPF_MAP_TYPE_HASH
    // What libbpf itself does not know, it cannot ask for.
    expect(() => hasMapType(100_000)).toThrow("probe for map type 100000");
  });
});

it("TCX is there or not, and says so again", () => {
  const types = readFileSync("/sys/kernel/btf/vmlinux", "latin1");
  expect(hasTcx()).toBe(types.includes("\0tcx_link\0"));
  expect(hasTcx()).toBe(hasTcx());
});

describe.skipIf(!hasTcx())("TCX, if the kernel has it (Linux 6.6 on)", () => {
  it("runs programs in order, and none after close", () => {
    const links = [
      attachTcx(object.program("first"), ifindex, "egress"),
      attachTcx(object.program("second"), ifindex, "egress"),
    ];
    expect(queryTcx(ifindex, "egress")).toEqual([
      { programId: object.program("first").id, linkId: links[0]?.id },
      { programId: object.program("second").id, linkId: links[1]?.id },
    ]);
    expect(queryTcx(ifindex, "ingress")).toEqual([]);
    exchange();
    const [first = 0, second = 0] = counts();
    expect(first).toBeGreaterThanOrEqual(3);
    expect(second).toBe(first);
    for (const link of links) link.close();
    expect(queryTcx(ifindex, "egress")).toEqual([]);
    expect(() => links[0]?.info()).toThrow(/is closed/);
  });

  it("swaps a program in place, and keeps a pinned link", () => {
    const path = join(pins, "links", "near");
    const link = attachTcx(object.program("first"), ifindex, "ingress");
    expect(link.info()).toEqual({
      id: link.id,
      type: "tcx",
      programId: object.program("first").id,
      ifindex,
      direction: "ingress",
    });
    expect([...linkIds()]).toContain(link.id);
    link.update(object.program("second"));
    exchange();
    expect(counts()[0]).toBe(0);
    expect(counts()[1]).toBeGreaterThanOrEqual(3);
    link.pin(path);
    link.close();

    const again = openPinnedLink(path);
    expect(linkInfo({ id: again.id }).programId).toBe(object.program("second").id);
    again.detach();
    expect(queryTcx(ifindex, "ingress")).toEqual([]);
    expect(again.info().ifindex).toBe(0);
    again.close();
    expect(unpin(path)).toBe(true);
    expect(() => openPinnedLink(path)).toThrow(/Nothing is pinned there/);
  });

  it("opens a link by id, as a stranger would to clean up", () => {
    const link = attachTcx(object.program("first"), ifindex, "egress");
    const stranger: Link = openLinkById(link.id);
    stranger.detach();
    stranger.close();
    expect(queryTcx(ifindex, "egress")).toEqual([]);
    link.close();
    expect(() => openLinkById(link.id)).toThrow(/ENOENT/);
  });

  it("finds a link from when it is attached until it is detached, or closed", () => {
    const first = attachTcx(object.program("first"), ifindex, "egress");
    const second = attachTcx(object.program("second"), ifindex, "egress");
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

  it("finds and lists links where they are very many", () => {
    const path = build("crowd", 'SEC("tc") int passes(struct __sk_buff *skb) { return TC_ACT_UNSPEC; }');
    // A program of its own each time: the kernel takes none twice.
    const objects = Array.from({ length: 40 }, () => openObject(path));
    const links = objects.map((each) => {
      each.load();
      return attachTcx(each.program("passes"), ifindex, "egress");
    });
    for (const { id } of links) expect(hasTcxLink(ifindex, "egress", id)).toBe(true);
    expect(hasTcxLink(ifindex, "egress", 0)).toBe(false);
    expect(queryTcx(ifindex, "egress").map(({ linkId }) => linkId)).toEqual(links.map(({ id }) => id));
    for (const each of [...links, ...objects]) each.close();
  });

  it("names what it could not attach, and where", () => {
    expect(() => attachTcx(object.program("first"), GONE, "ingress")).toThrow(
      /Cannot attach program first to ingress of interface 999999: No such device \(ENODEV\)/,
    );
    expect(() => attachTcx(object.program("third"), ifindex, "ingress")).toThrow(/EINVAL/);
    expect(() => queryTcx(GONE, "ingress")).toThrow(/ENODEV/);
    expect(() => hasTcxLink(GONE, "egress", 1)).toThrow(/ENODEV/);
  });

  it("reports a link whose interface is gone", () => {
    sh("ip link add short type veth peer name lived");
    const index = indexOf("short");
    const link = attachTcx(object.program("first"), index, "ingress");
    sh("ip link del short");
    expect(link.info().ifindex).toBe(0);
    expect(() => link.update(object.program("second"))).toThrow(/ENOLINK/);
    link.close();
  });
});

describe("clsact", () => {
  const place = { priority: 7, handle: 3 };

  it("makes the qdisc once, replaces in place, and removes only its own", () => {
    expect(hasClsact(ifindex)).toBe(false);
    expect(queryClsact(ifindex, "egress")).toEqual([]);
    expect(detachClsact(ifindex, "egress", place)).toBe(false);
    expect(attachClsact(object.program("first"), ifindex, "egress", place)).toEqual({ createdQdisc: true });
    expect(hasClsact(ifindex)).toBe(true);
    exchange();
    const before = counts();
    expect(before[0]).toBeGreaterThanOrEqual(3);

    expect(attachClsact(object.program("second"), ifindex, "egress", place)).toEqual({ createdQdisc: false });
    expect(queryClsact(ifindex, "egress")).toEqual([
      {
        ...place,
        kind: "bpf",
        programId: object.program("second").id,
        name: `second:[${object.program("second").id}]`,
      },
    ]);
    exchange();
    expect(counts()[0]).toBe(before[0]);
    expect(counts()[1]).toBeGreaterThanOrEqual(3);

    attachClsact(object.program("first"), ifindex, "egress", { priority: 7, handle: 4 });
    attachClsact(object.program("first"), ifindex, "egress", { priority: 2, handle: 1 });
    attachClsact(object.program("first"), ifindex, "ingress", place);
    sh("tc filter add dev near egress protocol ip pref 9 u32 match u32 0 0 flowid 1:1");
    const [one, two, three, ...others] = queryClsact(ifindex, "egress");
    expect([one, two, three].map((filter) => [filter?.priority, filter?.handle, filter?.kind])).toEqual([
      [2, 1, "bpf"],
      // Among equals the newest comes first.
      [7, 4, "bpf"],
      [7, 3, "bpf"],
    ]);
    expect(others.length).toBeGreaterThan(0);
    for (const other of others)
      expect(other).toMatchObject({ priority: 9, kind: "u32", programId: 0, name: "" });
    expect(() => destroyClsact(ifindex)).toThrow(/still has filters: .*first:\[\d+\] \(priority 7\).*u32/);

    expect(detachClsact(ifindex, "egress", place)).toBe(true);
    expect(detachClsact(ifindex, "egress", place)).toBe(false);
    for (const other of [
      { priority: 7, handle: 4 },
      { priority: 2, handle: 1 },
    ]) {
      expect(detachClsact(ifindex, "egress", other)).toBe(true);
    }
    expect(detachClsact(ifindex, "ingress", place)).toBe(true);
    expect(() => destroyClsact(ifindex)).toThrow(/still has filters: u32/);
    expect(hasClsact(ifindex)).toBe(true);
    sh("tc filter del dev near egress pref 9");
    expect(destroyClsact(ifindex)).toBe(true);
    expect(destroyClsact(ifindex)).toBe(false);
    expect(hasClsact(ifindex)).toBe(false);
  });

  it("does not take an ingress qdisc for its own", () => {
    sh("tc qdisc add dev near ingress");
    expect(hasClsact(ifindex)).toBe(false);
    expect(() => attachClsact(object.program("first"), ifindex, "egress", place)).toThrow(
      /Cannot attach program first to egress of interface \d+: .*old-style ingress qdisc/,
    );
    expect(attachClsact(object.program("first"), ifindex, "ingress", place)).toEqual({ createdQdisc: false });
    expect(queryClsact(ifindex, "ingress")).toHaveLength(1);
    expect(queryClsact(ifindex, "egress")).toEqual([]);
    expect(detachClsact(ifindex, "egress", place)).toBe(false);
    expect(detachClsact(ifindex, "ingress", place)).toBe(true);
    expect(destroyClsact(ifindex)).toBe(false);
    sh("tc qdisc del dev near ingress");
  });

  it("names an interface that is not there", () => {
    expect(() => attachClsact(object.program("first"), GONE, "ingress", place)).toThrow(
      /Cannot make the clsact qdisc of interface 999999: .*ENODEV/,
    );
  });
});

describe("XDP", () => {
  for (const mode of ["native", "generic"] as const) {
    it(`runs in ${mode} mode, is replaced only by who knows it, and goes`, () => {
      const third = object.program("third");
      const fourth = object.program("fourth");
      expect(queryXdp(ifindex)).toBeUndefined();
      expect(detachXdp(ifindex)).toBe(false);
      attachXdp(third, ifindex, { mode });
      expect(queryXdp(ifindex)).toEqual({ programId: third.id, mode });
      exchange();
      expect(counts()[2]).toBeGreaterThanOrEqual(3);
      expect(() => attachXdp(fourth, ifindex, { mode })).toThrow(/Cannot attach XDP program fourth.*EBUSY/);
      expect(() => attachXdp(third, ifindex, { mode, replace: fourth })).toThrow(/EEXIST/);
      attachXdp(fourth, ifindex, { mode, replace: third });
      expect(queryXdp(ifindex)).toEqual({ programId: fourth.id, mode });
      expect(() => detachXdp(ifindex, { mode, program: third })).toThrow(/EEXIST/);
      expect(detachXdp(ifindex, { mode, program: fourth })).toBe(true);
      expect(queryXdp(ifindex)).toBeUndefined();
    });
  }

  it("names an interface that is not there", () => {
    expect(() => attachXdp(object.program("third"), GONE)).toThrow(/interface 999999 \(auto\).*ENODEV/);
  });
});
