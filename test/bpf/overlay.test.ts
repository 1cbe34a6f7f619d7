/** The hooks of the kernel's tunnel device: what the stack sends through it, and what it opened. */
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { frame, ip4, type Packet4, readFrame, readIp4, readVxlan } from "./packets.ts";
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

let node: Node;
beforeAll(() => {
  node = Node.load();
});
beforeEach(() => node.forgetFlows());
afterAll(() => node.close());

describe("to_overlay", () => {
  const sent = (changes: Partial<Packet4> = {}, to = TUNNEL.mac): Buffer =>
    frame(
      to,
      VTEP_MAC,
      ip4({ source: "172.7.21.0", destination: TUNNEL.pod, body: { tcp: [1000, 2000] }, ...changes }),
    );

  function expectNext(input: Buffer, verdict: string, on: Node = node): void {
    const out = on.run("to_overlay", input, { tcIndex: 5 });
    expect(out.counted).toEqual([`to_overlay ${verdict} ${input.length}`]);
    expect(out).toMatchObject({ action: NEXT, tcIndex: 0 });
    expect(Buffer.from(out.packet)).toEqual(input);
  }

  test.each<[string, Partial<Packet4>]>([
    ["from the node", {}],
    ["with options", { options: Uint8Array.of(1, 1, 1, 1) }],
    ["of a fragment", { moreFragments: true }],
    ["at its last hop, which the stack has counted", { ttl: 1 }],
    ["from an outside client", { source: "192.0.2.7" }],
  ])("encapsulates and counts no hop: %s", (_, changes) => {
    const input = sent(changes);
    const out = node.run("to_overlay", input, { tcIndex: 5 });
    expect(out.counted).toEqual([`to_overlay ENCAPSULATED ${input.length}`]);
    expect(out).toMatchObject({ action: REDIRECT, tcIndex: 0 });
    const outer = readIp4(readFrame(out.packet).payload);
    expect(outer).toMatchObject({ source: VTEP, destination: TUNNEL.address, ttl: 64, intact: true });
    const tunnel = readVxlan(outer.body);
    expect(tunnel.frame).toMatchObject({ to: TUNNEL.mac, from: VTEP_MAC });
    expect(tunnel.frame.payload).toEqual(input.subarray(14));
  });

  test("leaves the rest to the device, unchanged", () => {
    expectNext(frame(TUNNEL.mac, VTEP_MAC, Buffer.alloc(46), 0x0806), "UNRELATED");
    expectNext(sent({ destination: "172.7.99.1" }), "STACK_NO_PEER");
    expectNext(sent({ destination: DEVICE.pod }, DEVICE.mac), "DEVICE");
    expectNext(sent({ destination: DIRECT.pod }, DIRECT.mac), "DEVICE");
    expectNext(sent({}, OTHER_MAC), "DEVICE");
    const longer = sent();
    longer.writeUInt16BE(200, 16);
    expectNext(longer, "STACK_MALFORMED");
    const kernel = Node.load({ encapsulate: 0 });
    try {
      expectNext(sent(), "DEVICE", kernel);
    } finally {
      kernel.close();
    }
  });

  test("leaves an aggregate that cannot be encapsulated as it was", () => {
    const input = sent({ body: { udp: [1, 2], data: new Uint8Array(600) } });
    const out = node.run("to_overlay", input, { gsoSize: 500 });
    expect(out).toMatchObject({ action: NEXT, verdict: "DEVICE" });
    expect(Buffer.from(out.packet)).toEqual(input);
  });
});

describe("from_overlay", () => {
  // The loopback interface stands for the tunnel device, so that the frame is for this host.
  const opened = (changes: Partial<Packet4> = {}, to = LO_MAC): Buffer =>
    frame(
      to,
      TUNNEL.mac,
      ip4({ source: TUNNEL.pod, destination: POD.address, body: { tcp: [1000, 2000] }, ...changes }),
    );

  test.each([POD, EGRESS_POD])("hands it to the pod: %o", (pod) => {
    for (const source of [TUNNEL.pod, DIRECT.pod]) {
      const input = opened({ destination: pod.address, source });
      const out = node.run("from_overlay", input);
      expect(out.counted).toEqual([`from_overlay DELIVERED ${input.length}`]);
      expect(out.action).toBe(REDIRECT);
      expect(readFrame(out.packet)).toMatchObject({ to: pod.mac, from: GATEWAY_MAC });
      const read = readIp4(readFrame(out.packet).payload);
      expect(read).toMatchObject({ ttl: 63, intact: true, bodyIntact: true });
    }
  });

  test.each<[string, string, Partial<Packet4>]>([
    ["for no pod", "STACK_LOCAL", { destination: "172.7.21.99" }],
    ["for the node", "STACK_LOCAL", { destination: "172.7.21.0" }],
    [
      "from a node's own address, as pods' packets to that go by the stack",
      "STACK_FLOW",
      { source: TUNNEL.address },
    ],
    ["with options", "STACK_OPTIONS", { options: Uint8Array.of(1, 1, 1, 1) }],
    ["at its last hop", "STACK_TTL", { ttl: 1 }],
    ["too big", "STACK_TOO_BIG", { body: { udp: [1, 2], data: new Uint8Array(POD_MTU - 27) } }],
  ])("leaves to the stack what is %s", (_, verdict, changes) => {
    const input = opened(changes);
    const out = node.run("from_overlay", input);
    expect(out.counted).toEqual([`from_overlay ${verdict} ${input.length}`]);
    expect(out.action).toBe(NEXT);
    expect(Buffer.from(out.packet)).toEqual(input);
  });

  test("leaves to the stack what is no IPv4, not right, or for another MAC", () => {
    const arp = frame(LO_MAC, TUNNEL.mac, Buffer.alloc(46), 0x0806);
    expect(node.run("from_overlay", arp)).toMatchObject({ action: NEXT, verdict: "UNRELATED" });
    const longer = opened();
    longer.writeUInt16BE(200, 16);
    expect(node.run("from_overlay", longer)).toMatchObject({ action: NEXT, verdict: "STACK_MALFORMED" });
    expect(node.run("from_overlay", opened({}, OTHER_MAC))).toMatchObject({
      action: NEXT,
      verdict: "STACK_LOCAL",
    });
    const off = Node.load({ fast_path: "FAST_PATH_OFF" });
    try {
      expect(off.run("from_overlay", opened())).toMatchObject({ action: NEXT, verdict: "STACK_OFF" });
    } finally {
      off.close();
    }
  });

  test("drops what no peer may have sent", () => {
    for (const source of [POD.address, "172.7.99.1", "8.8.8.8", VTEP]) {
      const input = opened({ source });
      const out = node.run("from_overlay", input);
      expect(out.counted).toEqual([`from_overlay DROP_FORGED ${input.length}`]);
      expect(out.action).toBe(SHOT);
    }
  });

  test("takes no class that a filter gave the packet for a mark of ours", () => {
    for (const tcIndex of [0, 1, 2, 5, 0xffff]) {
      expect(node.run("from_overlay", opened(), { tcIndex }).verdict).toBe("DELIVERED");
    }
  });
});
