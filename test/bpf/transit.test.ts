/**
 * With masquerade, what comes from outside the network and goes on to a pod of another node: it leaves with this node's
 * address, what comes back has the sender's again, and nothing else about a packet changes. The device at hand stands
 * for the tunnel device, and for the uplink where a peer is reached without a tunnel.
 */
import fc from "fast-check";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { answer, NODE, Outside, packetOf, portsOf, tcp } from "./outside.ts";
import { type Body, frame, ip4, type Packet4, readFrame, readIp4, readVxlan } from "./packets.ts";
import {
  DEVICE,
  DIRECT,
  LO_MAC,
  type Metadata,
  NEXT,
  OTHER_MAC,
  type Outcome,
  POD,
  REDIRECT,
  SHOT,
  TUNNEL,
} from "./programs.ts";

const SENDER = "172.17.0.2";
const TUNNEL_ADDRESS = "172.7.21.0";
/** skb->tc_index of what was given back its own address. */
const GIVEN_BACK = 0x7494;
const SYN = 2;

let outside: Outside;
beforeEach(() => {
  outside = new Outside();
  outside.uplink(TUNNEL_ADDRESS);
});
afterEach(() => outside.close());

/** What the stack sends by the tunnel device. That for a pod of DEVICE is left to the device as it is then. */
function depart(packet: Packet4 | Uint8Array, to = DEVICE.mac): Outcome {
  const bytes = packet instanceof Uint8Array ? packet : ip4(packet);
  return outside.node.run("to_overlay", frame(to, LO_MAC, bytes));
}

/** What the tunnel device opened. */
const comeBack = (bytes: Uint8Array, metadata: Metadata = {}): Outcome =>
  outside.node.run("from_overlay", frame(LO_MAC, OTHER_MAC, bytes), metadata);

const sent = (changes: Partial<Packet4> = {}): Packet4 => ({
  source: SENDER,
  destination: DEVICE.pod,
  body: { udp: [1000, 53] },
  ...changes,
});

describe("from outside the network to a pod of another node", () => {
  test.each<[string, Uint8Array]>([
    ["TCP", tcp(sent({ body: { tcp: [40000, 443] } }), SYN)],
    ["UDP", ip4(sent({ body: { udp: [40000, 53] } }))],
    ["echo", ip4(sent({ body: { echo: 77 } }))],
    ["GRE", ip4(sent({ body: { protocol: 47, data: Buffer.from("some tunnel") } }))],
  ])("%s leaves with the address of the tunnel device, and its answer finds back", (_, bytes) => {
    const out = depart(bytes);
    expect([out.action, out.verdict]).toEqual([NEXT, "DEVICE"]);
    const left = packetOf(out);
    expect(readIp4(left)).toMatchObject({ source: TUNNEL_ADDRESS, destination: DEVICE.pod, intact: true });
    expect(packetOf(depart(bytes))).toEqual(left);
    const back = comeBack(answer(left));
    expect(back).toMatchObject({ action: NEXT, verdict: "MASQUERADED", tcIndex: GIVEN_BACK });
    expect(packetOf(back)).toEqual(answer(bytes));
  });

  test("goes into the tunnel under that address", () => {
    const out = depart(sent({ destination: TUNNEL.pod }), TUNNEL.mac);
    expect([out.action, out.verdict]).toEqual([REDIRECT, "ENCAPSULATED"]);
    const inner = readVxlan(readIp4(readFrame(out.packet).payload).body).frame.payload;
    expect(readIp4(inner)).toMatchObject({ source: TUNNEL_ADDRESS, intact: true, bodyIntact: true });
  });

  test("leaves with the uplink's address where there is no tunnel", () => {
    outside.uplink(NODE);
    const bytes = ip4(sent({ destination: DIRECT.pod }));
    const out = outside.leave(bytes);
    expect([out.action, out.verdict]).toEqual([NEXT, "MASQUERADED"]);
    expect(readIp4(packetOf(out))).toMatchObject({ source: NODE, intact: true, bodyIntact: true });
    const back = outside.arrive(answer(packetOf(out)));
    expect(back).toMatchObject({ action: NEXT, verdict: "MASQUERADED", tcIndex: GIVEN_BACK });
    expect(packetOf(back)).toEqual(answer(bytes));
  });

  test.each<[string, Packet4, Metadata]>([
    ["the node's own, by the tunnel device", sent({ source: TUNNEL_ADDRESS }), {}],
    ["what kube-proxy masquerades", sent(), { mark: 0x4000 }],
    ["an answer to an echo", sent({ body: { echo: 5, reply: true } }), {}],
  ])("but not %s", (_, packet, metadata) => {
    const out = outside.node.run("to_overlay", frame(DEVICE.mac, LO_MAC, ip4(packet)), metadata);
    expect(packetOf(out)).toEqual(ip4(packet));
    expect(outside.connections()).toEqual([]);
  });

  test("TCP that did not begin here is left as it is", () => {
    for (const flags of [16, 18, 24, 4, 20]) {
      const bytes = tcp(sent({ body: { tcp: [40000, 443] } }), flags);
      expect(packetOf(depart(bytes))).toEqual(bytes);
    }
    expect(outside.connections()).toEqual([]);
    const syn = tcp(sent({ body: { tcp: [40000, 443] } }), SYN);
    const left = packetOf(depart(syn));
    expect(readIp4(left).source).toBe(TUNNEL_ADDRESS);
    // From then on all of it goes under that name.
    const next = packetOf(depart(tcp(sent({ body: { tcp: [40000, 443] } }), 16)));
    expect(portsOf(next)).toEqual(portsOf(left));
  });

  test("a full table refuses what is new", () => {
    outside.close();
    outside = new Outside({}, 16);
    outside.uplink(TUNNEL_ADDRESS);
    const outcomes = Array.from({ length: 40 }, (_, i) => depart(sent({ body: { udp: [1000 + i, 53] } })));
    expect(outcomes.at(-1)).toMatchObject({ action: SHOT, verdict: "DROP_MASQ_FULL" });
  });

  test("without masquerade nothing is changed", () => {
    outside.close();
    outside = new Outside({ masquerade: 0 });
    expect(packetOf(depart(sent()))).toEqual(ip4(sent()));
    expect(packetOf(outside.leave(sent({ destination: DIRECT.pod })))).toEqual(
      ip4(sent({ destination: DIRECT.pod })),
    );
  });
});

describe("a pod of another node that asks under its own address", () => {
  const ask = (body: Body): Buffer => ip4({ source: DEVICE.pod, destination: NODE, body });

  test.each<[string, Body]>([
    ["UDP", { udp: [53, 1000] }],
    ["GRE", { protocol: 47, data: Buffer.from("some tunnel") }],
  ])("is answered from the one that it asked: %s", (_, body) => {
    const asked = ask(body);
    expect(packetOf(outside.arrive(asked))).toEqual(asked);
    expect(packetOf(depart(answer(asked)))).toEqual(answer(asked));
  });

  test("also in pieces", () => {
    outside.arrive(ask({ udp: [53, 1000] }));
    const reply = { source: NODE, destination: DEVICE.pod, id: 9 } as const;
    const pieces = [
      ip4({ ...reply, body: { udp: [1000, 53], data: Buffer.alloc(24) }, moreFragments: true }),
      ip4({ ...reply, body: { protocol: 17, data: Buffer.alloc(16) }, fragmentOffset: 4 }),
    ];
    for (const piece of pieces) expect(packetOf(depart(piece))).toEqual(piece);
  });
});

describe("on its way on to the outside", () => {
  const back = ip4({ source: DEVICE.pod, destination: SENDER, body: { udp: [53, 1000] } });

  test("what was given back its address is not lent ours in turn", () => {
    const out = outside.leave(back, { tcIndex: GIVEN_BACK });
    expect(packetOf(out)).toEqual(back);
    expect(outside.connections()).toEqual([]);
  });

  test("but what a pod elsewhere begins through this node is", () => {
    outside.uplink(NODE);
    expect(readIp4(packetOf(outside.leave(back))).source).toBe(NODE);
    const begins: Packet4 = { source: DEVICE.pod, destination: SENDER, body: { tcp: [443, 40000] } };
    for (const flags of [16, 18, 24]) {
      const bytes = tcp(begins, flags);
      expect(packetOf(outside.leave(bytes))).toEqual(bytes);
    }
    expect(readIp4(packetOf(outside.leave(tcp(begins, SYN)))).source).toBe(NODE);
  });
});

describe("ICMP errors", () => {
  const bodies: [string, Uint8Array][] = [
    ["TCP", tcp(sent({ body: { tcp: [40000, 443] } }), SYN)],
    ["UDP", ip4(sent({ body: { udp: [40000, 53] } }))],
    ["echo", ip4(sent({ body: { echo: 77 } }))],
  ];
  const error = (source: string, destination: string, about: Uint8Array): Buffer =>
    ip4({ source, destination, body: { error: [3, 4], about } });

  test.each(bodies)("from the pod's side reach who has sent: %s", (_, bytes) => {
    const left = packetOf(depart(bytes));
    const about = left.subarray(0, 48);
    const out = comeBack(error(DEVICE.pod, TUNNEL_ADDRESS, about));
    expect(out).toMatchObject({ verdict: "MASQUERADED", tcIndex: GIVEN_BACK });
    expect(packetOf(out)).toEqual(error(DEVICE.pod, SENDER, bytes.subarray(0, 48)));
  });

  test.each(bodies)("from the sender's side speak of our address: %s", (_, bytes) => {
    const left = packetOf(depart(bytes));
    for (const from of [SENDER, "10.9.9.9", TUNNEL_ADDRESS]) {
      const out = depart(error(from, DEVICE.pod, answer(bytes).subarray(0, 48)));
      expect(packetOf(out)).toEqual(error(TUNNEL_ADDRESS, DEVICE.pod, answer(left).subarray(0, 48)));
    }
  });

  test("of pods about packets of pods are left alone", () => {
    const about = ip4({ source: DEVICE.pod, destination: POD.address, body: { udp: [5, 6] } });
    const bytes = error(POD.address, DEVICE.pod, about);
    expect(packetOf(depart(bytes))).toEqual(bytes);
  });
});

describe("in pieces", () => {
  const id = 7;
  const first = ip4(sent({ id, moreFragments: true, body: { udp: [1000, 53], data: Buffer.alloc(24, 1) } }));
  const later = ip4(sent({ id, fragmentOffset: 4, body: { protocol: 17, data: Buffer.alloc(16, 2) } }));

  test("a packet leaves under one address and one id", () => {
    const [one, two] = [first, later].map((each) => readIp4(packetOf(depart(each))));
    expect(one).toMatchObject({ source: TUNNEL_ADDRESS, intact: true });
    expect(two).toMatchObject({ source: TUNNEL_ADDRESS, intact: true, id: one?.id });
  });

  test("its answer finds back, also when the first piece comes last", () => {
    const [port] = portsOf(packetOf(depart(sent())));
    const reply = { source: DEVICE.pod, destination: TUNNEL_ADDRESS, id: 11 } as const;
    const start = ip4({
      ...reply,
      moreFragments: true,
      body: { udp: [53, port], data: Buffer.alloc(24, 1) },
    });
    const rest = ip4({ ...reply, fragmentOffset: 4, body: { protocol: 17, data: Buffer.alloc(16, 2) } });
    expect(comeBack(rest)).toMatchObject({ action: SHOT, verdict: "HELD" });
    expect(comeBack(start)).toMatchObject({ action: SHOT, verdict: "RELEASED" });
    for (const piece of [start, rest]) {
      const out = comeBack(piece);
      expect(out).toMatchObject({ action: NEXT, verdict: "MASQUERADED", tcIndex: GIVEN_BACK });
      expect(readIp4(packetOf(out))).toMatchObject({ destination: SENDER, intact: true });
    }
  });
});

describe("of all packets", () => {
  const octet = fc.integer({ min: 0, max: 255 });
  const port = fc.integer({ min: 1, max: 65535 });
  const data = fc.uint8Array({ maxLength: 200 });
  const packets: fc.Arbitrary<Packet4> = fc.record({
    source: fc.tuple(octet, octet, octet).map(([a, b, c]) => `${11 + (a % 100)}.${b}.${c}.1`),
    destination: fc.integer({ min: 2, max: 254 }).map((last) => `172.7.24.${last}`),
    body: fc.oneof(
      fc.record({ udp: fc.tuple(port, port), data }),
      fc.record({ tcp: fc.tuple(port, port), data }),
      fc.record({ echo: port, data }),
      fc.record({ protocol: fc.constantFrom(4, 47, 50), data }),
    ),
    tos: octet,
    id: fc.integer({ min: 0, max: 65535 }),
    ttl: fc.integer({ min: 2, max: 255 }),
    dontFragment: fc.boolean(),
    options: fc.constantFrom(new Uint8Array(), Uint8Array.of(1, 1, 1, 1)),
  });

  test("reverse(forward(packet)) = packet, and every checksum holds", () => {
    fc.assert(
      fc.property(packets, (each) => {
        const bytes = "tcp" in each.body ? tcp(each, SYN) : ip4(each);
        const out = depart(bytes);
        if (out.verdict === "DROP_MASQ_PORTS") return;
        const left = packetOf(out);
        expect(readIp4(left)).toMatchObject({ source: TUNNEL_ADDRESS, intact: true });
        if (!("protocol" in each.body)) expect(readIp4(left).bodyIntact).toBe(true);
        expect(packetOf(comeBack(answer(left)))).toEqual(answer(bytes));
      }),
      { numRuns: 1000 },
    );
  });
});
