/** Random and hostile packets into every program, and what must hold of all packets. */
import fc from "fast-check";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type Body, frame, ip4, readFrame, readIp4, readVxlan, vxlan4 } from "./packets.ts";
import {
  DEVICE,
  DIRECT,
  GATEWAY_MAC,
  HOOKS,
  type HookName,
  LO_MAC,
  NEIGHBOUR,
  NEXT,
  Node,
  OTHER_MAC,
  POD,
  REDIRECT,
  SHOT,
  SOURCE_PORTS,
  TUNNEL,
  VTEP,
  VTEP_MAC,
} from "./programs.ts";

// Two nodes that are each other's peer, so that one can open what the other has closed.
let node: Node;
let other: Node;
beforeAll(() => {
  node = Node.load();
  other = Node.load({
    subnet4: 0xac071600,
    vtep4: 0x0a040716,
    vtep_mac: Uint8Array.of(2, 7, 0x16, 0, 0, 1),
  });
  other.peer({ address: VTEP, mac: VTEP_MAC, net: "172.7.21.0" }, "REACH_TUNNEL");
  other.endpoint({ address: TUNNEL.pod, mac: OTHER_MAC, ifindex: 70 }, "DELIVERY_PEER");
});
afterAll(() => {
  node.close();
  other.close();
});

const port = fc.integer({ min: 0, max: 65535 });
const data = fc.uint8Array({ maxLength: 200 });
const body: fc.Arbitrary<Body> = fc.oneof(
  fc.record({
    udp: fc.tuple(
      port,
      port.filter((each) => each !== 8472),
    ),
    data,
  }),
  fc.record({ echo: port, reply: fc.boolean(), data }),
  fc.record({ protocol: fc.constantFrom(47, 50, 89, 253), data }),
);
const anyBody: fc.Arbitrary<Body> = fc.oneof(body, fc.record({ tcp: fc.tuple(port, port), data }));
const header = fc.record({
  ttl: fc.integer({ min: 3, max: 255 }),
  tos: fc.integer({ min: 0, max: 255 }),
  id: port,
  dontFragment: fc.boolean(),
});

describe("properties", () => {
  test("what one node encapsulates the other opens to the same packet, two hops later", () => {
    fc.assert(
      fc.property(body, header, (each, fields) => {
        const packet = { source: POD.address, destination: TUNNEL.pod, body: each, ...fields };
        const input = frame(GATEWAY_MAC, POD.mac, ip4(packet));
        const wire = node.run("from_pod", input);
        expect(wire).toMatchObject({ action: REDIRECT, verdict: "ENCAPSULATED", tcIndex: 0 });
        // The kernel puts the next hop's MAC there.
        const arrived = frame(LO_MAC, OTHER_MAC, wire.packet.subarray(14));
        const out = other.run("from_net", arrived);
        expect(out).toMatchObject({ action: REDIRECT, verdict: "DECAPSULATED" });
        expect(readFrame(out.packet)).toMatchObject({ to: OTHER_MAC, from: GATEWAY_MAC });
        expect(readFrame(out.packet).payload).toEqual(ip4({ ...packet, ttl: fields.ttl - 2 }));
      }),
      { numRuns: 500 },
    );
  });

  test("every header that leaves has a right checksum, and every tunnel packet a port in range", () => {
    const ways = fc.constantFrom(TUNNEL.pod, DIRECT.pod, DEVICE.pod, NEIGHBOUR.address);
    fc.assert(
      fc.property(anyBody, header, ways, (each, fields, destination) => {
        const packet = { source: POD.address, destination, body: each, ...fields };
        const out = node.run("from_pod", frame(GATEWAY_MAC, POD.mac, ip4(packet)));
        expect(out.action).toBe(REDIRECT);
        const first = readIp4(readFrame(out.packet).payload);
        expect(first.intact).toBe(true);
        if (out.verdict !== "ENCAPSULATED") {
          expect(first.ttl).toBe(fields.ttl - 1);
          return;
        }
        const tunnel = readVxlan(first.body);
        expect(tunnel.sourcePort).toBeGreaterThanOrEqual(SOURCE_PORTS.min);
        expect(tunnel.sourcePort).toBeLessThanOrEqual(SOURCE_PORTS.max);
        const inner = readIp4(tunnel.frame.payload);
        expect(inner).toMatchObject({ intact: true, ttl: fields.ttl - 1, tos: fields.tos });
      }),
      { numRuns: 500 },
    );
  });

  test("a range of one source port is used as it is", () => {
    const narrow = Node.load({ source_port_min: 65535, source_port_max: 65535 });
    const all = Node.load({ source_port_min: 0, source_port_max: 65535 });
    try {
      for (let i = 0; i < 50; i++) {
        const packet = { source: POD.address, destination: TUNNEL.pod, body: { udp: [i, 2] } } as const;
        const input = frame(GATEWAY_MAC, POD.mac, ip4(packet));
        const out = narrow.run("from_pod", input);
        expect(readVxlan(readIp4(readFrame(out.packet).payload).body).sourcePort).toBe(65535);
        expect(all.run("from_pod", input).verdict).toBe("ENCAPSULATED");
      }
    } finally {
      narrow.close();
      all.close();
    }
  });
});

describe("random bytes", () => {
  // The kernel's test run takes no frame that is shorter than the IP header it says it has.
  const noise = fc.uint8Array({ minLength: 40, maxLength: 300 });
  const macs = fc.constantFrom(LO_MAC, GATEWAY_MAC, TUNNEL.mac, "ff:ff:ff:ff:ff:ff");
  const types = fc.constantFrom(0x0800, 0x0800, 0x0800, 0x86dd, 0x0806, 0x8100, 0);

  test.each(HOOKS)("in frames to %s are counted once and end in a known way", (hook) => {
    fc.assert(
      fc.property(noise, macs, types, (bytes, to, type) => {
        const out = node.run(hook, frame(to, OTHER_MAC, bytes, type));
        expect(out.counted).toHaveLength(1);
        expect([NEXT, SHOT, REDIRECT]).toContain(out.action);
        // Noise is nobody's packet.
        if (hook === "from_net") expect(out.action).toBe(NEXT);
      }),
      { numRuns: 400 },
    );
  });

  /** A right packet for each hook, so that a few changed bytes get past the first checks. */
  const seeds = (hook: HookName): Buffer[] => {
    const udp: Body = { udp: [1000, 2000], data: new Uint8Array(20) };
    const inner = ip4({ source: TUNNEL.pod, destination: POD.address, body: udp });
    const about = ip4({ source: POD.address, destination: TUNNEL.pod, body: udp });
    const error = ip4({ source: TUNNEL.pod, destination: POD.address, body: { error: [3, 4], about } });
    const closed = (payload: Uint8Array): Buffer =>
      vxlan4({ source: TUNNEL.address, destination: VTEP, frame: frame(VTEP_MAC, TUNNEL.mac, payload) });
    switch (hook) {
      case "from_net":
        return [
          closed(inner),
          closed(error),
          ip4({ source: DIRECT.pod, destination: POD.address, body: udp }),
        ].map((each) => frame(LO_MAC, OTHER_MAC, each));
      case "from_overlay":
        return [inner, error].map((each) => frame(LO_MAC, OTHER_MAC, each));
      case "to_overlay":
        return [frame(TUNNEL.mac, VTEP_MAC, about)];
      default:
        return [about, error, inner].map((each) => frame(GATEWAY_MAC, POD.mac, each));
    }
  };

  test.each(HOOKS)("in otherwise right packets to %s are counted once and end in a known way", (hook) => {
    const changes = fc.array(fc.tuple(fc.nat(), fc.integer({ min: 0, max: 255 })), { maxLength: 4 });
    fc.assert(
      fc.property(fc.constantFrom(...seeds(hook)), changes, fc.nat(), (seed, writes, cut) => {
        const packet = Buffer.from(seed);
        for (const [at, value] of writes) packet[14 + (at % (packet.length - 14))] = value;
        const out = node.run(
          hook,
          packet.subarray(0, cut % 3 === 0 ? 34 + (cut % (packet.length - 34)) : undefined),
        );
        expect(out.counted).toHaveLength(1);
        expect([NEXT, SHOT, REDIRECT]).toContain(out.action);
      }),
      { numRuns: 600 },
    );
  });
});

describe("a tunnel packet from an unknown node", () => {
  const unknown = fc
    .tuple(fc.nat(255), fc.nat(255), fc.nat(255), fc.nat(255))
    .map((bytes) => bytes.join("."))
    .filter((source) => ![TUNNEL, DIRECT, DEVICE].some((peer) => peer.address === source));
  const inside = fc.oneof(
    fc.uint8Array({ maxLength: 120 }),
    fc
      .tuple(fc.constantFrom(TUNNEL.pod, DIRECT.pod, POD.address, "8.8.8.8"), anyBody)
      .map(([source, each]) =>
        frame(VTEP_MAC, TUNNEL.mac, ip4({ source, destination: POD.address, body: each })),
      ),
  );
  const form = fc.record({
    options: fc.constantFrom(new Uint8Array(), new Uint8Array(4).fill(1), new Uint8Array(40).fill(1)),
    moreFragments: fc.boolean(),
    flags: fc.constantFrom(0x08000000, 0x88000000, 0, 0xffffffff),
  });

  test("is dropped whatever is in it, or not this network's", () => {
    fc.assert(
      fc.property(unknown, inside, form, fc.constantFrom(1, 1, 2), (source, bytes, fields, vni) => {
        const packet = vxlan4({ source, destination: VTEP, frame: bytes, vni, ...fields });
        const out = node.run("from_net", frame(LO_MAC, OTHER_MAC, packet));
        expect(out.action).toBe(vni === 1 ? SHOT : NEXT);
      }),
      { numRuns: 1000 },
    );
  });
});

describe("a tunnel packet from a peer", () => {
  test("reaches a pod only from that peer's addresses", () => {
    const source = fc.oneof(
      fc.constantFrom(TUNNEL.pod, TUNNEL.address, DIRECT.pod, POD.address, VTEP),
      fc
        .tuple(fc.constant("172.7"), fc.integer({ min: 20, max: 26 }), fc.nat(255))
        .map((parts) => parts.join(".")),
    );
    fc.assert(
      fc.property(source, anyBody, (from, each) => {
        const packet = ip4({ source: from, destination: POD.address, body: each });
        const tunnel = {
          source: TUNNEL.address,
          destination: VTEP,
          frame: frame(VTEP_MAC, TUNNEL.mac, packet),
        };
        const out = node.run("from_net", frame(LO_MAC, OTHER_MAC, vxlan4(tunnel)));
        const own = from === TUNNEL.address || from.startsWith("172.7.22.");
        if (!own) expect(out).toMatchObject({ action: SHOT, verdict: "DROP_FORGED" });
        else expect(["DECAPSULATED", "STACK_TUNNEL", "DROP_ECN"]).toContain(out.verdict);
      }),
      { numRuns: 500 },
    );
  });
});
