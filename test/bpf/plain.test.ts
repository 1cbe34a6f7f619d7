/**
 * Tunnels that carry the IP packet itself, byte by byte: ipip as RFC 2003 and the kernel's module have it, udp as
 * flannel's daemons send it. What comes back is written by hand, as a peer of another make would send it.
 */
import { afterEach, describe, expect, test } from "vitest";
import { frame, ip4, type Packet4, readFrame, readIp4 } from "./packets.ts";
import {
  DEVICE,
  GATEWAY_MAC,
  LO_MAC,
  NEIGHBOUR,
  Node,
  OTHER_MAC,
  POD,
  REDIRECT,
  SHOT,
  TUNNEL,
  VTEP,
  VTEP_MAC,
} from "./programs.ts";

const PORT = 8285;
const IPIP = 4;
let node: Node | undefined;
afterEach(() => node?.close());

const KINDS = {
  ipip: { tunnel: "TUNNEL_IPIP", tunnel_port: 0, overhead: 20, protocol: IPIP, ownHops: 0 },
  udp: { tunnel: "TUNNEL_UDP", tunnel_port: PORT, overhead: 28, protocol: 17, ownHops: 1 },
} as const;
type Kind = keyof typeof KINDS;

function load(kind: Kind): Node {
  const { tunnel, tunnel_port } = KINDS[kind];
  node = Node.load({ tunnel, tunnel_port, vni: 0 });
  return node;
}

const inner = (changes: Partial<Packet4> = {}): Buffer =>
  ip4({ source: POD.address, destination: TUNNEL.pod, body: { udp: [1234, 5678] }, ...changes });
const sent = (changes: Partial<Packet4> = {}): Buffer => frame(GATEWAY_MAC, POD.mac, inner(changes));

/** A tunnel packet as a peer sends it. */
function arrived(kind: Kind, packet: Buffer, outer: Partial<Packet4> = {}): Buffer {
  const addresses = { source: TUNNEL.address, destination: VTEP, ...outer };
  const body =
    kind === "udp"
      ? { udp: [PORT, PORT] as [number, number], data: packet }
      : { protocol: IPIP, data: packet };
  return frame(LO_MAC, OTHER_MAC, ip4({ ...addresses, body: outer.body ?? body }));
}
const forPod = (changes: Partial<Packet4> = {}): Buffer =>
  inner({ source: TUNNEL.pod, destination: NEIGHBOUR.address, ...changes });

describe.each(["ipip", "udp"] as const)("%s", (kind) => {
  const { overhead, protocol, ownHops } = KINDS[kind];

  test("goes out as the packet behind the tunnel's own header, byte by byte", () => {
    const on = load(kind);
    for (const changes of [
      {},
      { dontFragment: true },
      { tos: 0xb8 | 1 },
      { tos: 2 },
      { tos: 3 },
      { body: { tcp: [1, 2] as [number, number], data: Buffer.alloc(1200, 7) } },
    ] satisfies Partial<Packet4>[]) {
      const { action, packet, verdict } = on.run("from_pod", sent({ id: 99, ...changes }));
      expect([action, verdict]).toEqual([REDIRECT, "ENCAPSULATED"]);
      const whole = Buffer.from(packet);
      const original = inner({ id: 99, ttl: 64 - 1 - ownHops, ...changes });
      expect(whole.subarray(14 + overhead).toString("hex")).toBe(original.toString("hex"));
      const outer = readIp4(readFrame(whole).payload);
      const tos = changes.tos ?? 0;
      const ecn = (tos & 3) === 3 ? 2 : tos & 3;
      expect(outer).toMatchObject({
        source: VTEP,
        destination: TUNNEL.address,
        protocol,
        ttl: 64,
        // What flannel's sockets send has no ECN, and nobody would look at it at the other end.
        tos: kind === "ipip" ? ecn : 0,
        length: original.length + overhead,
        dontFragment: kind === "ipip" && changes.dontFragment === true,
        intact: true,
      });
      // Version, header length and fragment offset: no options, no fragment.
      expect([whole[14], whole.readUInt16BE(20) & 0x3fff]).toEqual([0x45, 0]);
      if (kind === "udp") {
        const ports = [PORT, PORT, original.length + 8, 0];
        expect([0, 2, 4, 6].map((at) => whole.readUInt16BE(34 + at))).toEqual(ports);
      }
    }
  });

  test("what the stack routes goes out at the device, whatever MAC it has there", () => {
    const on = load(kind);
    const packet = inner({ ttl: 10 });
    const out = on.run("to_overlay", frame(VTEP_MAC, VTEP_MAC, packet));
    expect([out.action, out.verdict]).toEqual([REDIRECT, "ENCAPSULATED"]);
    const whole = Buffer.from(out.packet).subarray(14 + overhead);
    expect(whole.toString("hex")).toBe(inner({ ttl: 10 - ownHops }).toString("hex"));
  });

  test("a peer that cannot be sent to, and hops that end, are counted", () => {
    const on = load(kind);
    const lost = on.run("to_overlay", frame(VTEP_MAC, VTEP_MAC, inner({ destination: DEVICE.pod })));
    expect([lost.action, lost.verdict]).toEqual([SHOT, "DROP_UNREACHABLE"]);
    const stranger = frame(VTEP_MAC, VTEP_MAC, inner({ destination: "172.7.99.1" }));
    expect(on.run("to_overlay", stranger).verdict).toBe("STACK_NO_PEER");
    const last = on.run("to_overlay", frame(VTEP_MAC, VTEP_MAC, inner({ ttl: 1 })));
    expect(last.verdict).toBe(kind === "udp" ? "DROP_TTL" : "ENCAPSULATED");
    expect(on.run("from_pod", sent({ ttl: 1 })).verdict).toBe("STACK_TTL");
    const large = sent({ body: { udp: [1, 2], data: Buffer.alloc(1450 - 27) } });
    expect(on.run("from_pod", large).verdict).toBe("STACK_TOO_BIG");
  });

  test("comes in opened, to the pod", () => {
    const on = load(kind);
    for (const body of [{ udp: [5, 6] }, { tcp: [5, 6] }, { echo: 7 }] satisfies Packet4["body"][]) {
      const { action, packet, verdict } = on.run("from_net", arrived(kind, forPod({ body })));
      expect([action, verdict]).toEqual([REDIRECT, "DECAPSULATED"]);
      const { to, from, payload } = readFrame(packet);
      expect([to, from]).toEqual([NEIGHBOUR.mac, GATEWAY_MAC]);
      expect(payload.toString("hex")).toBe(forPod({ body, ttl: 64 - 1 - ownHops }).toString("hex"));
    }
  });

  test("the ECN fields are put together as RFC 6040 says, with ipip", () => {
    const on = load(kind);
    for (const [outer, tos, result] of [
      [0, 0, 0],
      [3, 2, 3],
      [3, 1, 3],
      [1, 2, 1],
      [2, 1, 1],
      [0, 3, 3],
    ] as const) {
      const { packet, verdict } = on.run(
        "from_net",
        arrived(kind, forPod({ tos: 0xb8 | tos }), { tos: outer }),
      );
      expect(verdict).toBe("DECAPSULATED");
      const read = readIp4(readFrame(packet).payload);
      expect(read).toMatchObject({ tos: 0xb8 | (kind === "ipip" ? result : tos), intact: true });
    }
    const { verdict } = on.run("from_net", arrived(kind, forPod(), { tos: 3 }));
    expect(verdict).toBe(kind === "ipip" ? "DROP_ECN" : "DECAPSULATED");
  });

  test("what is for the stack is handed to it by the device, opened", () => {
    const on = load(kind);
    for (const destination of ["172.7.21.1", "172.7.21.77"]) {
      const { action, packet, verdict, tcIndex } = on.run("from_net", arrived(kind, forPod({ destination })));
      expect([action, verdict, tcIndex]).toEqual([REDIRECT, "OPENED", 0x7492]);
      const { to, payload } = readFrame(packet);
      expect(to).toBe(VTEP_MAC);
      expect(payload.toString("hex")).toBe(forPod({ destination, ttl: 64 - ownHops }).toString("hex"));
    }
    const expired = on.run("from_net", arrived(kind, forPod({ ttl: 1 })));
    expect(expired.verdict).toBe(kind === "udp" ? "DROP_TTL" : "OPENED");
  });

  test("only a peer may send, only as itself, and only whole packets", () => {
    const on = load(kind);
    const verdict = (packet: Buffer, outer: Partial<Packet4> = {}): string | undefined =>
      on.run("from_net", arrived(kind, packet, outer)).verdict;
    expect(verdict(forPod(), { source: "10.4.7.99" })).toBe("DROP_UNKNOWN_PEER");
    expect(verdict(forPod({ source: "172.7.23.2" }))).toBe("DROP_FORGED");
    expect(verdict(forPod({ source: "8.8.8.8" }))).toBe("DROP_FORGED");
    expect(verdict(forPod({ source: TUNNEL.address }))).toBe("OPENED");
    expect(verdict(forPod(), { moreFragments: true })).toBe("DROP_FRAGMENT");
    expect(verdict(forPod().subarray(0, 19))).toBe("DROP_MALFORMED");
    expect(verdict(forPod().subarray(0, 30))).toBe("DROP_MALFORMED");
    const broken = arrived(kind, forPod());
    broken[24] = (broken[24] ?? 0) ^ 1;
    expect(on.run("from_net", broken).verdict).toBe("DROP_MALFORMED");
    const later = arrived(kind, forPod(), { fragmentOffset: 100 });
    // Of a fragment of UDP nobody knows for which port it is.
    expect(on.run("from_net", later).verdict).toBe(kind === "ipip" ? "DROP_FRAGMENT" : "UNRELATED");
    expect(verdict(forPod(), { destination: "10.4.7.200" })).toBe("UNRELATED");
  });

  test("a pod may not speak to a node's tunnel", () => {
    const on = load(kind);
    const body = kind === "udp" ? { udp: [1, PORT] as [number, number] } : { protocol: IPIP, data: forPod() };
    for (const destination of [VTEP, TUNNEL.address]) {
      expect(on.run("from_pod", sent({ destination, body })).verdict).toBe("DROP_POD_TUNNEL");
    }
  });
});

test("other tunnels of this node, with ipip, are left alone", () => {
  const on = load("ipip");
  const foreign = forPod({ source: "192.168.1.1", destination: "192.168.2.2" });
  expect(on.run("from_net", arrived("ipip", foreign, { source: "10.4.7.99" })).verdict).toBe("UNRELATED");
});
