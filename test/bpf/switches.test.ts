/**
 * Every combination of the switches loads: the verifier sees other programs each time, since what is off is dead code
 * to it. And what the switches and tables say holds for subnets of several lengths at once.
 */
import { afterEach, describe, expect, test } from "vitest";
import { openObject } from "../../loader/object.ts";
import type * as abi from "../../src/abi/twill.gen.ts";
import { frame, ip4 } from "./packets.ts";
import { configBytes, DIRECT, GATEWAY_MAC, HOOKS, Node, objectBytes, POD, TUNNEL } from "./programs.ts";

const LENGTHS: ReadonlyArray<{ readonly subnet_lengths: readonly number[] }> = [
  { subnet_lengths: [24, 0, 0, 0] },
  { subnet_lengths: [26, 24, 0, 0] },
  { subnet_lengths: [28, 26, 24, 0] },
  { subnet_lengths: [32, 28, 24, 20] },
];

const TUNNELS = ["TUNNEL_NONE", "TUNNEL_VXLAN", "TUNNEL_IPIP", "TUNNEL_UDP"] as const;
/** Whether the programs or the kernel's device open and close the tunnel is a question of vxlan alone. */
const SWITCHES = TUNNELS.flatMap((tunnel) =>
  (tunnel === "TUNNEL_VXLAN" ? [0, 1, 2, 3] : [3]).flatMap((own) =>
    [0, 1].map((direct) => ({ tunnel, encapsulate: own & 1, decapsulate: own >> 1, direct })),
  ),
);

describe.each(["FAST_PATH_OFF", "FAST_PATH_AUTO", "FAST_PATH_ALWAYS", "FAST_PATH_STACK"] as const)(
  "%s loads",
  (fast_path) => {
    test.each(LENGTHS)("with $subnet_lengths", ({ subnet_lengths }) => {
      for (const switches of SWITCHES) {
        const object = openObject(objectBytes("shipped"), { name: "twill" });
        try {
          object.setMaxEntries("flows4", 16);
          const config = configBytes({
            fast_path,
            ...switches,
            let_in: switches.direct,
            // With each of the others once.
            count_peers: subnet_lengths[1] === 0 || subnet_lengths[2] === 0 ? 0 : 1,
            subnet_lengths,
          });
          object.setRodata({ config });
          object.load();
          expect([...object.programs].sort()).toEqual([...HOOKS, "expire", "restore"].sort());
        } finally {
          object.close();
        }
      }
    });
  },
);

describe.each(["FAST_PATH_OFF", "FAST_PATH_AUTO", "FAST_PATH_ALWAYS", "FAST_PATH_STACK"] as const)(
  "%s loads with masquerade",
  (fast_path) => {
    test.each([0, 1, 2, 3, 4, 5, 6, 7])("and direct and tunnel as %i", (bits) => {
      const object = openObject(objectBytes("shipped"), { name: "twill" });
      try {
        object.setMaxEntries("flows4", 16);
        object.setMaxEntries("connections4", 16);
        const config = configBytes({
          fast_path,
          masquerade: 1,
          tunnel: TUNNELS[bits & 3] ?? "TUNNEL_NONE",
          direct: bits >> 2,
          let_in: bits & 1,
          count_peers: bits >> 2,
        });
        object.setRodata({ config });
        object.load();
      } finally {
        object.close();
      }
    });
  },
);

describe("subnets of several lengths", () => {
  let node: Node | undefined;
  afterEach(() => node?.close());
  const verdict = (destination: string): string | undefined =>
    node?.run(
      "from_pod",
      frame(GATEWAY_MAC, POD.mac, ip4({ source: POD.address, destination, body: { udp: [1, 2] } })),
    ).verdict;
  const load = (changes: Partial<abi.Config>): Node => {
    node = Node.load(changes);
    return node;
  };

  test("are looked up longest first", () => {
    const on = load({ subnet_lengths: [32, 28, 24, 16] });
    on.peer({ ...DIRECT, net: "172.7.22.16" }, "REACH_DIRECT", { prefixLength: 28 });
    on.peer({ ...TUNNEL, net: "172.7.22.17" }, "REACH_TUNNEL", { prefixLength: 32 });
    on.peer({ ...DIRECT, net: "172.7.0.0" }, "REACH_DIRECT", { prefixLength: 16 });
    expect(verdict("172.7.22.15")).toBe("ENCAPSULATED");
    expect(verdict("172.7.22.16")).toBe("ROUTED");
    expect(verdict("172.7.22.17")).toBe("ENCAPSULATED");
    expect(verdict("172.7.22.31")).toBe("ROUTED");
    expect(verdict("172.7.22.32")).toBe("ENCAPSULATED");
    expect(verdict("172.7.99.1")).toBe("ROUTED");
  });

  test("that the list does not name are not found", () => {
    load({ subnet_lengths: [0, 0, 0, 0] });
    expect(verdict(TUNNEL.pod)).toBe("STACK_NO_PEER");
  });
});
