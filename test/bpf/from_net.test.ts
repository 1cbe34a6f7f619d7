/** What `from_net` does with what arrives at the uplink: tunnel packets, directly routed ones, and the rest. */
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { Limit } from "../../src/abi/twill.gen.ts";
import { tcp } from "./outside.ts";
import {
  checksum,
  ETH_IP,
  frame,
  ip4,
  type Packet4,
  readFrame,
  readIp4,
  TCP,
  type Tunnel4,
  vxlan4,
} from "./packets.ts";
import {
  DEVICE,
  DIRECT,
  EGRESS_POD,
  GATEWAY_MAC,
  LO_MAC,
  NEXT,
  Node,
  OTHER_MAC,
  POD,
  POD_MTU,
  REDIRECT,
  SHOT,
  TUNNEL,
  VTEP,
  VTEP_MAC,
} from "./programs.ts";

const inner = (changes: Partial<Packet4> = {}): Packet4 => ({
  source: TUNNEL.pod,
  destination: POD.address,
  body: { udp: [1000, 2000] },
  ...changes,
});
const innerFrame = (changes: Partial<Packet4> = {}): Buffer =>
  frame(VTEP_MAC, TUNNEL.mac, ip4(inner(changes)));
const opened = (bytes: Uint8Array): Buffer =>
  frame(
    LO_MAC,
    OTHER_MAC,
    vxlan4({ source: TUNNEL.address, destination: VTEP, frame: frame(VTEP_MAC, TUNNEL.mac, bytes) }),
  );
const arrived = (changes: Partial<Packet4> = {}, tunnel: Partial<Tunnel4> = {}): Buffer =>
  frame(
    LO_MAC,
    OTHER_MAC,
    vxlan4({ source: TUNNEL.address, destination: VTEP, frame: innerFrame(changes), ...tunnel }),
  );
const direct = (changes: Partial<Packet4> = {}): Buffer =>
  frame(LO_MAC, OTHER_MAC, ip4(inner({ source: DIRECT.pod, ...changes })));
const udpOf = (length: number): Packet4["body"] => ({ udp: [1, 2], data: new Uint8Array(length - 28) });

let node: Node;
beforeAll(() => {
  node = Node.load();
});
beforeEach(() => node.forgetFlows());
afterAll(() => node.close());

function expectNext(input: Buffer, verdict: string, on: Node = node): void {
  const out = on.run("from_net", input);
  expect(out.counted).toEqual([`from_net ${verdict} ${input.length}`]);
  expect(out.action).toBe(NEXT);
  expect(Buffer.from(out.packet)).toEqual(input);
}

function expectDropped(input: Buffer, verdict: string, on: Node = node): void {
  const out = on.run("from_net", input);
  expect(out.counted).toEqual([`from_net ${verdict} ${input.length}`]);
  expect(out.action).toBe(SHOT);
}

describe("a tunnel packet of a peer", () => {
  test.each([
    { udp: [1000, 2000] } as const,
    { echo: 7 } as const,
    { echo: 7, reply: true } as const,
    { protocol: 47, data: Buffer.from("gre") } as const,
  ])("is opened and handed to the pod: %o", (body) => {
    for (const pod of [POD, EGRESS_POD]) {
      const input = arrived({ body, tos: 0xb9, id: 77, destination: pod.address });
      const out = node.run("from_net", input);
      expect(out.counted).toEqual([`from_net DECAPSULATED ${input.length}`]);
      expect(out.action).toBe(REDIRECT);
      const ethernet = readFrame(out.packet);
      expect(ethernet).toMatchObject({ to: pod.mac, from: GATEWAY_MAC, type: ETH_IP });
      const read = readIp4(ethernet.payload);
      expect(read).toMatchObject({
        source: TUNNEL.pod,
        destination: pod.address,
        ttl: 63,
        tos: 0xb9,
        id: 77,
      });
      expect(read.intact).toBe(true);
      // All after the IP header is as it was, and nothing else follows.
      expect(ethernet.payload.subarray(20)).toEqual(input.subarray(64 + 20));
    }
  });

  const [FIN, SYN, RST, PSH, ACK, URG, ECE, CWR] = [1, 2, 4, 8, 16, 32, 64, 128] as const;
  /** A segment with these flags and as much data; with a timestamp option, if that is asked for. */
  const segment = (flags: number, data = 0, time?: number): Buffer =>
    opened(
      tcp(inner({ body: { tcp: [1, 2], data: new Uint8Array() } }), flags, {
        data: new Uint8Array(data),
        ...(time === undefined ? {} : { time }),
      }),
    );

  /** When packets of the tests' outer port were last left to the device, in ticks of the kernel's clock. */
  const PORT = 40_000;
  const tickKey = Buffer.alloc(4);
  tickKey.writeUInt32LE(PORT % Limit.IN_DEVICE_MAX);
  const lastTick = (): number =>
    Buffer.from(node.object.map("in_device4").lookup(tickKey) ?? Buffer.alloc(4)).readUInt32LE();
  const setLastTick = (tick: number): void => {
    const value = Buffer.alloc(4);
    value.writeUInt32LE(tick >>> 0);
    node.object.map("in_device4").update(tickKey, value);
  };
  /** The tick that runs, for what a program asks next. */
  const now = (): number => {
    setLastTick(0);
    node.run("from_net", segment(ACK, 1));
    return lastTick();
  };
  /** Far more than a test can take. */
  const MANY = 100_000;

  test("is left to the kernel's device if it is TCP that may become part of an aggregate, or is one", () => {
    for (const tick of [now() - MANY, now() + MANY]) {
      for (const [flags, data, time] of [
        [ACK, 1],
        [ACK, 1200],
        [ACK, 1, 12],
        [ACK | CWR, 0],
        [ACK | PSH | URG, 1],
        [0, 0],
      ] as const) {
        setLastTick(tick);
        expectNext(segment(flags, data, time), "STACK_TUNNEL");
      }
    }
    // A segment in pieces, of which only the first has its flags.
    setLastTick(now() - MANY);
    const whole = tcp(inner({ body: { tcp: [1, 2], data: new Uint8Array() } }), PSH | ACK, {
      data: new Uint8Array(64).fill(0xff),
    });
    for (const field of [0x2000, 0x0003]) {
      const piece = Buffer.from(whole);
      piece.writeUInt16BE(field, 6);
      piece.writeUInt16BE(0, 10);
      piece.writeUInt16BE(checksum(piece.subarray(0, 20)), 10);
      expectNext(opened(piece), "STACK_TUNNEL");
    }
    const out = node.run("from_net", arrived({ body: udpOf(1000) }), { gsoSize: 500 });
    expect(out).toMatchObject({ action: NEXT, verdict: "STACK_TUNNEL" });
  });

  test.each([
    ["begins", SYN, 0],
    ["begins, and answers", SYN | ACK, 0],
    ["ends", FIN | ACK, 0],
    ["ends with data", FIN | PSH | ACK, 100],
    ["breaks off", RST, 0],
    ["ends what was to be said", PSH | ACK, 1],
    ["ends a lot that was to be said", PSH | ACK, 1300],
    ["ends what was to be said, and slows down", PSH | ACK | ECE | CWR, 1],
  ])("is opened if it is TCP that %s, and nothing of the flow is in the device", (_, flags, data) => {
    const input = segment(flags, data);
    setLastTick(now() - MANY);
    const out = node.run("from_net", input);
    expect(out.counted).toEqual([`from_net DECAPSULATED ${input.length}`]);
    expect(readFrame(out.packet).payload.subarray(20)).toEqual(input.subarray(64 + 20));

    setLastTick(now() + MANY);
    expectNext(input, "STACK_TUNNEL");
  });

  test.each<[string, () => void]>([
    ["data", () => expectNext(segment(ACK, 1), "STACK_TUNNEL")],
    ["an aggregate", () => void node.run("from_net", segment(PSH | ACK, 1000), { gsoSize: 500 })],
    [
      "what is not for a known pod",
      () => expectNext(arrived({ destination: "172.7.21.99" }), "STACK_TUNNEL"),
    ],
    [
      "a wrong length",
      () => {
        const input = arrived();
        input.writeUInt16BE(input.readUInt16BE(38) - 4, 38);
        expectNext(input, "STACK_TUNNEL");
      },
    ],
  ])("notes for those that come behind it that it left %s to the device", (_, leave) => {
    setLastTick(0);
    leave();
    const tick = lastTick();
    expect(tick).not.toBe(0);
    // Once a tick: it is shared among processors.
    setLastTick(tick + MANY);
    expectNext(segment(PSH | ACK, 1), "STACK_TUNNEL");
    expect((lastTick() - tick) >>> 0).toBeLessThan(MANY);
  });

  test("waits for the tick after the one that began since a segment was left to the device", () => {
    const pushed = segment(PSH | ACK, 1);
    const end = performance.now() + 10_000;
    // Until no tick begins while it is looked at.
    for (;;) {
      const tick = now();
      const verdicts = [0, 1, 2].map((ago) => {
        setLastTick(tick - ago);
        return node.run("from_net", pushed).verdict;
      });
      if (now() !== tick && performance.now() < end) continue;
      expect(verdicts).toEqual(["STACK_TUNNEL", "STACK_TUNNEL", "DECAPSULATED"]);
      break;
    }
  });

  test("is opened if it is TCP that only acknowledges", () => {
    for (const flags of [ACK, ACK | ECE]) {
      for (const time of [undefined, 5]) {
        const input = segment(flags, 0, time);
        const out = node.run("from_net", input);
        expect(out.counted).toEqual([`from_net DECAPSULATED ${input.length}`]);
        expect(readFrame(out.packet).payload.subarray(20)).toEqual(input.subarray(64 + 20));
      }
    }
    // Whatever is in the device: it says nothing new if it comes late.
    setLastTick(now());
    expect(node.run("from_net", segment(ACK)).verdict).toBe("DECAPSULATED");
    // Cut short where its flags would be.
    const short = ip4(inner({ body: { protocol: TCP, data: new Uint8Array(12) } }));
    expectNext(opened(short), "STACK_TUNNEL");
  });

  test.each<[string, Partial<Packet4>]>([
    ["for no pod", { destination: "172.7.21.99" }],
    ["for the node", { destination: "172.7.21.0" }],
    ["with options", { options: Uint8Array.of(1, 1, 1, 1) }],
    ["at its last hop", { ttl: 1 }],
    ["too big for the pod", { body: udpOf(POD_MTU + 1) }],
  ])("is left to the kernel's device if it is %s", (_, changes) => {
    expectNext(arrived(changes), "STACK_TUNNEL");
  });

  test.each<[string, Partial<Tunnel4>]>([
    ["options", { options: Uint8Array.of(1, 1, 1, 1) }],
    ["more fragments to come", { moreFragments: true }],
    ["options and fragments", { moreFragments: true, options: Buffer.alloc(40, 1) }],
    ["a bit that means nothing to us", { flags: 0x88000000 }],
    ["a reserved bit", { flags: 0x08000001 }],
    ["no VNI", { flags: 0 }],
    ["another node's device as its goal", { frame: frame(OTHER_MAC, TUNNEL.mac, ip4(inner())) }],
    ["ARP", { frame: frame(VTEP_MAC, TUNNEL.mac, Buffer.alloc(46), 0x0806) }],
    ["IPv6", { frame: frame(VTEP_MAC, TUNNEL.mac, Buffer.alloc(46), 0x86dd) }],
  ])("is left to the kernel's device with %s", (_, tunnel) => {
    expectNext(arrived({}, tunnel), "STACK_TUNNEL");
  });

  test("is left to the kernel where its outer headers are wrong", () => {
    const checksum = arrived();
    checksum.writeUInt16BE(checksum.readUInt16BE(24) ^ 0x100, 24);
    expectNext(checksum, "STACK_TUNNEL");
    const length = arrived();
    length.writeUInt16BE(length.readUInt16BE(38) - 4, 38);
    expectNext(length, "STACK_TUNNEL");
  });

  test("may come from the peer itself, and up to the pod's MTU", () => {
    expectNext(arrived({ source: TUNNEL.address }), "STACK_TUNNEL");
    expect(node.run("from_net", arrived({ body: udpOf(POD_MTU) })).verdict).toBe("DECAPSULATED");
    for (const peer of [DIRECT, DEVICE]) {
      const input = arrived({ source: peer.pod }, { source: peer.address });
      expect(node.run("from_net", input).verdict).toBe("DECAPSULATED");
    }
  });

  test("keeps what pads the frame out of the packet's length", () => {
    const input = Buffer.concat([
      arrived({ body: { udp: [1, 2], data: new Uint8Array() } }),
      Buffer.alloc(9),
    ]);
    const out = node.run("from_net", input);
    expect(out.verdict).toBe("DECAPSULATED");
    expect(readIp4(readFrame(out.packet).payload)).toMatchObject({ length: 28, bodyIntact: true });
  });

  test("is opened without a tag, and not at all in a VLAN", () => {
    const tagless = node.run("from_net", arrived(), { vlan: 0x1000 });
    expect(tagless).toMatchObject({ action: REDIRECT, verdict: "DECAPSULATED" });
    expect(readFrame(tagless.packet).type).toBe(ETH_IP);
    const out = node.run("from_net", arrived(), { vlan: 0x1005 });
    expect(out).toMatchObject({ action: NEXT, verdict: "UNRELATED" });
  });

  test("is never opened when that is off", () => {
    for (const off of [{ decapsulate: 0 }, { fast_path: "FAST_PATH_OFF" }] as const) {
      const other = Node.load(off);
      try {
        expectNext(arrived(), "STACK_TUNNEL", other);
        expectDropped(arrived({}, { source: "10.4.7.99" }), "DROP_UNKNOWN_PEER", other);
      } finally {
        other.close();
      }
    }
  });
});

describe("congestion (RFC 6040, figure 4)", () => {
  const NOT_ECT = 0;
  const ECT1 = 1;
  const ECT0 = 2;
  const CE = 3;
  const inners = [NOT_ECT, ECT0, ECT1, CE];
  const table: ReadonlyArray<readonly [outer: number, results: ReadonlyArray<number | "drop">]> = [
    [NOT_ECT, [NOT_ECT, ECT0, ECT1, CE]],
    [ECT0, [NOT_ECT, ECT0, ECT1, CE]],
    [ECT1, [NOT_ECT, ECT1, ECT1, CE]],
    [CE, ["drop", CE, CE, CE]],
  ];
  const cases = table.flatMap(([outer, results]) =>
    inners.map((inside, i) => [outer, inside, results[i] ?? "drop"] as const),
  );

  test.each(cases)("outer %i and inner %i become %s", (outer, inside, result) => {
    for (const dscp of [0, 0xb8, 0xfc]) {
      for (let id = 0; id < 65536; id += 4099) {
        const input = arrived({ tos: dscp | inside, id }, { tos: 0x28 | outer });
        if (result === "drop") {
          expectDropped(input, "DROP_ECN");
          continue;
        }
        const read = readIp4(readFrame(node.run("from_net", input).packet).payload);
        expect(read).toMatchObject({ tos: dscp | result, intact: true, bodyIntact: true, ttl: 63 });
      }
    }
  });
});

describe("a forged tunnel packet", () => {
  const forms: ReadonlyArray<readonly [string, Partial<Tunnel4>]> = [
    ["plain", {}],
    ["with options", { options: Uint8Array.of(1, 1, 1, 1) }],
    ["fragmented", { moreFragments: true }],
    ["with more flags", { flags: 0x88000000 }],
  ];

  test.each(forms)("from an unknown node is dropped: %s", (_, form) => {
    for (const source of ["10.4.7.99", VTEP, "172.7.22.0", "0.0.0.0"]) {
      expectDropped(arrived({}, { ...form, source }), "DROP_UNKNOWN_PEER");
      expectDropped(arrived({ body: { tcp: [1, 2] } }, { ...form, source }), "DROP_UNKNOWN_PEER");
    }
  });

  test.each(forms)("with an inner source that is not the peer's is dropped: %s", (_, form) => {
    const sources = [POD.address, "172.7.21.0", VTEP, DIRECT.pod, DEVICE.pod, DIRECT.address, "8.8.8.8"];
    for (const source of [...sources, "172.7.99.1", "127.0.0.1", "0.0.0.0"]) {
      expectDropped(arrived({ source }, form), "DROP_FORGED");
      expectDropped(arrived({ source, body: { tcp: [1, 2] } }, form), "DROP_FORGED");
    }
  });

  test("does not hide behind a tag of its inner frame", () => {
    for (const type of [0x8100, 0x88a8]) {
      const tagged = frame(
        VTEP_MAC,
        TUNNEL.mac,
        Buffer.concat([Buffer.from([0, 0, 8, 0]), ip4(inner())]),
        type,
      );
      expectDropped(arrived({}, { frame: tagged }), "DROP_FORGED");
    }
  });

  test("of another network is that network's business", () => {
    expectNext(arrived({}, { vni: 2, source: "10.4.7.99" }), "UNRELATED");
    expectNext(arrived({}, { vni: 0x010001 }), "UNRELATED");
    expectNext(arrived({}, { vni: 2, frame: new Uint8Array(2) }), "UNRELATED");
    expectNext(arrived({}, { port: 4789, source: "10.4.7.99" }), "UNRELATED");
  });

  test("that another network's programs have checked stays checked, and nothing else does", () => {
    const checked = node.run("from_net", arrived({ body: { tcp: [1, 2] } })).tcIndex;
    const other = arrived({}, { port: 4789, source: "10.4.7.99" });
    const markAfter = (tcIndex: number) => node.run("from_net", other, { tcIndex }).tcIndex;
    expect(markAfter(checked)).toBe(checked);
    const unchecked = markAfter(0);
    expect(unchecked).not.toBe(checked);
    for (const tcIndex of [1, checked - 1, checked + 1, 0xffff]) expect(markAfter(tcIndex)).toBe(unchecked);
    // What is ours is looked at, whatever mark it brings.
    const forged = node.run("from_net", arrived({}, { source: "10.4.7.99" }), { tcIndex: checked });
    expect(forged).toMatchObject({ action: SHOT });
  });

  test("that goes to another address of the node is marked, and the device's hook drops it", () => {
    const inputs = [
      arrived({}, { destination: "172.7.21.0" }),
      arrived({}, { destination: "172.7.21.77", source: DIRECT.pod }),
      arrived({}, { destination: "10.99.0.1" }),
      frame(OTHER_MAC, OTHER_MAC, arrived().subarray(14)),
      frame("ff:ff:ff:ff:ff:ff", OTHER_MAC, arrived({}, { destination: "10.4.7.255" }).subarray(14)),
    ];
    for (const input of inputs) {
      const out = node.run("from_net", input);
      expect(out).toMatchObject({ action: NEXT });
      const opened = node.run("from_overlay", innerFrame(), { tcIndex: out.tcIndex });
      expect(opened).toMatchObject({ action: SHOT, verdict: "DROP_FORGED" });
    }
    // One that was checked is not.
    const out = node.run("from_net", arrived({ body: { tcp: [1, 2] } }));
    const opened = node.run("from_overlay", frame(LO_MAC, OTHER_MAC, ip4(inner())), { tcIndex: out.tcIndex });
    expect(opened).toMatchObject({ action: REDIRECT, verdict: "DELIVERED" });
  });
});

describe("a table that somebody emptied", () => {
  const tcp = { tcp: [1, 2] } as const;
  const opened = (on: Node, tcIndex: number) =>
    on.run("from_overlay", frame(LO_MAC, OTHER_MAC, ip4(inner({ body: tcp }))), { tcIndex });

  test.each(["subnets4", "peers4"] as const)("costs no packet of a peer: %s", (name) => {
    const node = Node.load();
    try {
      const map = node.object.map(name);
      map.deleteBatch(map.entries().map(([key]) => key));
      expect(node.run("from_net", arrived()).verdict).toBe("DECAPSULATED");
      const out = node.run("from_net", arrived({ body: tcp }));
      expect(out).toMatchObject({ action: NEXT, verdict: "STACK_TUNNEL" });
      expect(opened(node, out.tcIndex)).toMatchObject({ action: REDIRECT, verdict: "DELIVERED" });
      // What neither table vouches for is as forged as before.
      for (const source of [POD.address, DIRECT.pod, "172.7.99.1", "8.8.8.8"])
        expect(node.run("from_net", arrived({ source })).action).toBe(SHOT);
      expectDropped(arrived({}, { source: "10.4.7.99" }), "DROP_UNKNOWN_PEER", node);
    } finally {
      node.close();
    }
  });

  test("does not let in what nobody checked", () => {
    const node = Node.load();
    try {
      for (const name of ["subnets4", "peers4"]) {
        const map = node.object.map(name);
        map.deleteBatch(map.entries().map(([key]) => key));
      }
      expectDropped(arrived(), "DROP_UNKNOWN_PEER", node);
      expect(opened(node, 0)).toMatchObject({ action: SHOT, verdict: "DROP_FORGED" });
    } finally {
      node.close();
    }
  });
});

describe("a tunnel packet cut short", () => {
  // The kernel's test run takes no frame that says IPv4 and is shorter than its header.
  const lengths = Array.from({ length: 130 - 34 + 1 }, (_, i) => 34 + i);
  const bodies = [udpOf(80), { tcp: [1, 2], data: new Uint8Array(40) }] as const;

  test("in the frame reaches no pod and is counted once, at any length", () => {
    for (const body of bodies) {
      const whole = arrived({ body });
      for (const length of lengths.filter((each) => each < whole.length)) {
        const out = node.run("from_net", whole.subarray(0, length));
        expect(out.counted).toEqual([`from_net STACK_MALFORMED ${length}`]);
        expect(out.action).toBe(NEXT);
      }
    }
  });

  test("with outer lengths to match reaches no pod and is counted once, at any length", () => {
    for (const body of bodies) {
      const whole = arrived({ body });
      for (const length of lengths.filter((each) => each < whole.length)) {
        const cut = Buffer.from(whole.subarray(0, length));
        const header = Buffer.from(
          ip4({
            source: TUNNEL.address,
            destination: VTEP,
            body: { protocol: 17, data: cut.subarray(34) },
          }).subarray(0, 20),
        );
        header.copy(cut, 14);
        if (length >= 42) cut.writeUInt16BE(length - 34, 38);
        const out = node.run("from_net", cut);
        expect(out.counted).toHaveLength(1);
        expect(out.action, `${length} bytes`).not.toBe(REDIRECT);
        if (length < 84) expect(out.verdict).toBe(length < 38 ? "STACK_MALFORMED" : "DROP_MALFORMED");
        else expect(out.verdict).toBe("DROP_MALFORMED");
      }
    }
  });

  test("in its inner packet's own words is dropped", () => {
    const longer = innerFrame();
    longer.writeUInt16BE(longer.length - 14 + 1, 16);
    expectDropped(arrived({}, { frame: longer }), "DROP_MALFORMED");
    const padded = Buffer.concat([arrived({}, { frame: longer }), Buffer.alloc(30)]);
    expectDropped(padded, "DROP_MALFORMED");
    for (const first of [0x65, 0x44, 0x4f, 0x05]) {
      const odd = innerFrame();
      odd[14] = first;
      const out = node.run("from_net", arrived({}, { frame: odd }));
      expect(out.action).not.toBe(REDIRECT);
      expect(out.verdict).toBe("DROP_MALFORMED");
    }
  });
});

describe("a directly routed packet", () => {
  test("is handed to its pod", () => {
    for (const body of [{ udp: [1, 2] }, { tcp: [1, 2] }, { echo: 3 }] as const) {
      const input = direct({ body });
      const out = node.run("from_net", input);
      expect(out.counted).toEqual([`from_net DELIVERED ${input.length}`]);
      expect(out.action).toBe(REDIRECT);
      expect(readFrame(out.packet)).toMatchObject({ to: POD.mac, from: GATEWAY_MAC });
      const read = readIp4(readFrame(out.packet).payload);
      expect(read).toMatchObject({ ttl: 63, intact: true, bodyIntact: true, source: DIRECT.pod });
    }
  });

  test("is taken from a peer to which we send by the tunnel, and so is what comes by the tunnel from the other", () => {
    expect(node.run("from_net", direct({ source: TUNNEL.pod }))).toMatchObject({
      action: REDIRECT,
      verdict: "DELIVERED",
    });
    const opened = node.run("from_net", arrived({ source: DIRECT.pod }, { source: DIRECT.address }));
    expect(opened).toMatchObject({ action: REDIRECT, verdict: "DECAPSULATED" });
  });

  test("is the stack's if it is no peer's, for no pod, or of no kind for the fast lane", () => {
    expectNext(direct({ source: "172.7.99.2" }), "UNRELATED");
    expectNext(direct({ source: "10.4.7.99" }), "UNRELATED");
    expectNext(direct({ destination: "172.7.21.0" }), "UNRELATED");
    expectNext(direct({ destination: "10.4.7.21" }), "UNRELATED");
    expectNext(direct({ destination: "172.7.21.99" }), "STACK_LOCAL");
    expectNext(direct({ ttl: 1 }), "STACK_TTL");
    expectNext(direct({ options: Uint8Array.of(1, 1, 1, 1) }), "STACK_OPTIONS");
    expectNext(direct({ body: udpOf(POD_MTU + 1) }), "STACK_TOO_BIG");
    expectNext(frame(OTHER_MAC, OTHER_MAC, direct().subarray(14)), "UNRELATED");
    expectNext(frame(LO_MAC, OTHER_MAC, Buffer.alloc(46), 0x0806), "UNRELATED");
    expectNext(direct().subarray(0, 40), "STACK_MALFORMED");
  });

  test("is the stack's if it comes from another side than its peer is on, or the peer is behind a router", () => {
    for (const reach of ["REACH_DIRECT", "REACH_TUNNEL"] as const) {
      for (const other of [{ ifindex: node.spareIfindex }, { nextHop: "10.4.7.254" }]) {
        node.peer(DIRECT, reach, other);
        try {
          expectNext(direct(), "UNRELATED");
        } finally {
          node.peer(DIRECT, "REACH_DIRECT");
        }
      }
    }
  });

  test("is the stack's when the switches say so", () => {
    for (const [changes, verdict] of [
      [{ direct: 0 }, "UNRELATED"],
      [{ fast_path: "FAST_PATH_OFF" }, "STACK_OFF"],
    ] as const) {
      const other = Node.load(changes);
      try {
        expectNext(direct(), verdict, other);
      } finally {
        other.close();
      }
    }
  });
});

test("host-gw has no tunnel: its port is like any other", () => {
  const gateway = Node.load({
    tunnel: "TUNNEL_NONE",
    encapsulate: 0,
    decapsulate: 0,
    vtep4: 0,
    vni: 0,
    tunnel_port: 0,
    overlay_ifindex: 0,
  });
  try {
    expectNext(arrived(), "UNRELATED", gateway);
    expect(gateway.run("from_net", direct()).verdict).toBe("DELIVERED");
    const nested = vxlan4({ source: POD.address, destination: DIRECT.pod, frame: innerFrame() });
    expect(gateway.run("from_pod", frame(GATEWAY_MAC, POD.mac, nested)).verdict).toBe("ROUTED");
    const toNode = vxlan4({ source: POD.address, destination: DIRECT.address, frame: innerFrame() });
    expect(gateway.run("from_pod", frame(GATEWAY_MAC, POD.mac, toNode)).verdict).toBe("UNRELATED");
  } finally {
    gateway.close();
  }
});
