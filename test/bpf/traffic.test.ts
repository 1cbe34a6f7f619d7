/**
 * Packets by peer: each once, whichever of the programs it meets, both ways, through every tunnel and without one; and
 * nothing at all unless it is asked for.
 */
import { afterEach, describe, expect, test } from "vitest";
import { codec } from "../../loader/codec.ts";
import * as abi from "../../src/abi/twill.gen.ts";
import { frame, ip4, type Packet4, vxlan4 } from "./packets.ts";
import {
  DEVICE,
  DIRECT,
  GATEWAY_MAC,
  LO_MAC,
  NEIGHBOUR,
  Node,
  OTHER_MAC,
  POD,
  TUNNEL,
  VTEP,
  VTEP_MAC,
} from "./programs.ts";

const UDP_PORT = 8285;
const IPIP = 4;
const traffic = codec(abi.trafficLayout);

let node: Node | undefined;
afterEach(() => node?.close());
function load(changes: Partial<abi.Config>): Node {
  node = Node.load({ count_peers: 1, ...changes });
  return node;
}

/** What is counted by now: packets and bytes of each direction, by peer. */
function counted(on: Node): Record<string, Record<"sent" | "received", readonly [number, number]>> {
  return Object.fromEntries(
    on.object
      .map("traffic4")
      .entriesPerCpu()
      .map(([key, values]) => {
        const sum = (way: "sent" | "received") => {
          const each = values.map((value) => traffic.decode(value)[way]);
          const total = (field: "packets" | "bytes") =>
            each.reduce((all, count) => all + Number(count[field]), 0);
          return [total("packets"), total("bytes")] as const;
        };
        return [[...key].join("."), { sent: sum("sent"), received: sum("received") }];
      }),
  );
}
const NONE = [0, 0] as const;

const inner = (changes: Partial<Packet4> = {}): Buffer =>
  ip4({ source: POD.address, destination: TUNNEL.pod, body: { udp: [1234, 5678] }, ...changes });
const fromPod = (changes: Partial<Packet4> = {}): Buffer => frame(GATEWAY_MAC, POD.mac, inner(changes));
const forPod = (source: string = TUNNEL.pod, changes: Partial<Packet4> = {}): Buffer =>
  inner({ source, destination: NEIGHBOUR.address, ...changes });
const SIZE = fromPod().length;

describe.each([
  ["vxlan", { tunnel: "TUNNEL_VXLAN" }],
  ["ipip", { tunnel: "TUNNEL_IPIP", tunnel_port: 0, vni: 0 }],
  ["udp", { tunnel: "TUNNEL_UDP", tunnel_port: UDP_PORT, vni: 0 }],
] as const)("%s", (kind, config) => {
  const arrived = (packet: Buffer, source: string = TUNNEL.address): Buffer => {
    const ends = { source, destination: VTEP };
    const outer =
      kind === "vxlan"
        ? vxlan4({ ...ends, frame: frame(VTEP_MAC, OTHER_MAC, packet) })
        : kind === "ipip"
          ? ip4({ ...ends, body: { protocol: IPIP, data: packet } })
          : ip4({ ...ends, body: { udp: [UDP_PORT, UDP_PORT], data: packet } });
    return frame(LO_MAC, OTHER_MAC, outer);
  };

  test("what pods and the stack send, and what comes for either, without the tunnel's bytes", () => {
    const on = load(config);
    expect(on.run("from_pod", fromPod()).verdict).toBe("ENCAPSULATED");
    expect(on.run("to_overlay", frame(VTEP_MAC, VTEP_MAC, inner())).verdict).toMatch(
      /^(ENCAPSULATED|DEVICE)$/,
    );
    // One that the programs open, one for the stack, one of TCP.
    for (const packet of [
      forPod(),
      forPod(TUNNEL.pod, { destination: "172.7.21.1" }),
      forPod(TUNNEL.pod, { body: { tcp: [1, 2], data: Buffer.alloc(0) } }),
    ])
      on.run("from_net", arrived(packet));
    // Passed on by the kernel's device, it is no packet more.
    on.run("from_overlay", frame(VTEP_MAC, OTHER_MAC, forPod()));
    const bytes =
      2 * forPod().length + forPod(TUNNEL.pod, { body: { tcp: [1, 2], data: Buffer.alloc(0) } }).length;
    expect(counted(on)).toEqual({
      [TUNNEL.address]: { sent: [2, 2 * SIZE], received: [3, bytes + 3 * 14] },
    });
  });

  test("not what is dropped, passed on to the stack, or a stranger's", () => {
    const on = load(config);
    expect(on.run("from_pod", fromPod({ ttl: 1 })).verdict).toBe("STACK_TTL");
    expect(on.run("from_net", arrived(forPod("172.7.99.9"))).verdict).toBe("DROP_FORGED");
    expect(on.run("from_net", arrived(forPod(), "10.4.7.99")).verdict).toMatch(/^DROP_/);
    expect(counted(on)).toEqual({});
  });

  test("no row of the table is made unless it is asked for", () => {
    const on = load({ ...config, count_peers: 0 });
    on.run("from_pod", fromPod());
    on.run("to_overlay", frame(VTEP_MAC, VTEP_MAC, inner()));
    on.run("from_net", arrived(forPod()));
    expect(counted(on)).toEqual({});
  });
});

test("what the kernel's device sends is counted where it comes by, also when from_pod has left it to that", () => {
  const on = load({});
  const packet = fromPod({ destination: DEVICE.pod });
  expect(on.run("from_pod", packet).verdict).toBe("DEVICE");
  expect(counted(on)).toEqual({});
  expect(on.run("to_overlay", frame(DEVICE.mac, VTEP_MAC, inner({ destination: DEVICE.pod }))).verdict).toBe(
    "DEVICE",
  );
  expect(counted(on)).toEqual({ [DEVICE.address]: { sent: [1, SIZE], received: NONE } });
});

test("without a tunnel, at the uplink alone, whoever of this node speaks", () => {
  const on = load({});
  const packet = inner({ destination: DIRECT.pod });
  expect(on.run("from_pod", frame(GATEWAY_MAC, POD.mac, packet)).verdict).toBe("ROUTED");
  expect(counted(on)).toEqual({});
  for (const source of [POD.address, VTEP])
    on.run("to_net", frame(OTHER_MAC, LO_MAC, inner({ source, destination: DIRECT.pod })));
  for (const destination of [NEIGHBOUR.address, VTEP])
    on.run("from_net", frame(LO_MAC, OTHER_MAC, inner({ source: DIRECT.pod, destination })));
  // With a peer that has a tunnel as well, while the way changes. Not by another interface than the peer's.
  on.run("from_net", frame(LO_MAC, OTHER_MAC, inner({ source: TUNNEL.pod, destination: NEIGHBOUR.address })));
  on.run("to_net", frame(OTHER_MAC, LO_MAC, packet), { ifindex: on.spareIfindex });
  expect(counted(on)).toEqual({
    [DIRECT.address]: { sent: [2, 2 * SIZE], received: [2, 2 * SIZE] },
    [TUNNEL.address]: { sent: [0, 0], received: [1, SIZE] },
  });
});
