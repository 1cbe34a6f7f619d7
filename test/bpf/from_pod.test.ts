/** What `from_pod` does with what pods send: to pods of the node, to peers by each way, and to the stack. */
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import {
  ETH_IP,
  frame,
  ip4,
  mac,
  type Packet4,
  readFrame,
  readIp4,
  readVxlan,
  VXLAN_PORT,
  vxlan4,
} from "./packets.ts";
import {
  DEVICE,
  DIRECT,
  EGRESS_POD,
  GATEWAY_MAC,
  NEIGHBOUR,
  NEXT,
  Node,
  OTHER_MAC,
  PEER_MTU,
  POD,
  POD_MTU,
  REDIRECT,
  SHOT,
  SOURCE_PORTS,
  TUNNEL,
  VTEP,
  VTEP_MAC,
} from "./programs.ts";

const packet = (changes: Partial<Packet4> = {}): Packet4 => ({
  source: POD.address,
  destination: TUNNEL.pod,
  body: { udp: [1000, 2000] },
  ...changes,
});
const sent = (changes: Partial<Packet4> = {}): Buffer => frame(GATEWAY_MAC, POD.mac, ip4(packet(changes)));
/** A UDP body that makes an IP packet of `length` bytes. */
const udpOf = (length: number): Packet4["body"] => ({ udp: [1000, 2000], data: new Uint8Array(length - 28) });

let node: Node;
beforeAll(() => {
  node = Node.load();
});
beforeEach(() => node.forgetFlows());
afterAll(() => node.close());

/** The stack gets the packet as it was. */
function expectStack(input: Buffer, verdict: string, on: Node = node): void {
  const out = on.run("from_pod", input);
  expect(out.counted).toEqual([`from_pod ${verdict} ${input.length}`]);
  expect(out.action).toBe(NEXT);
  expect(Buffer.from(out.packet)).toEqual(input);
}

describe("to a peer's pod", () => {
  test.each([
    { udp: [1000, 2000] } as const,
    { tcp: [1000, 2000] } as const,
    { echo: 7 } as const,
    { protocol: 47, data: Buffer.from("gre") } as const,
  ])("is encapsulated: %o", (body) => {
    const input = sent({ body, tos: 0xb8, id: 77 });
    const out = node.run("from_pod", input);
    expect(out.action).toBe(REDIRECT);
    expect(out.counted).toEqual([`from_pod ENCAPSULATED ${input.length}`]);
    expect(out.packet.length).toBe(input.length + 50);

    expect(readFrame(out.packet).type).toBe(ETH_IP);
    const outer = readIp4(readFrame(out.packet).payload);
    expect(outer).toMatchObject({ source: VTEP, destination: TUNNEL.address, protocol: 17, ttl: 64, tos: 0 });
    expect(outer).toMatchObject({ intact: true, dontFragment: false, length: input.length - 14 + 50 });
    const tunnel = readVxlan(outer.body);
    expect(tunnel).toMatchObject({ port: 8472, checksum: 0, flags: 0x08000000, vni: 1 });
    expect(tunnel.length).toBe(outer.length - 20);
    expect(tunnel.sourcePort).toBeGreaterThanOrEqual(SOURCE_PORTS.min);
    expect(tunnel.sourcePort).toBeLessThanOrEqual(SOURCE_PORTS.max);
    expect(tunnel.frame).toMatchObject({ to: TUNNEL.mac, from: VTEP_MAC, type: ETH_IP });
    const inner = readIp4(tunnel.frame.payload);
    expect(inner).toMatchObject({ ttl: 63, tos: 0xb8, id: 77, intact: true });
    expect(inner.body).toEqual(readIp4(input.subarray(14)).body);
    // A veth takes the packet to the next host as it is, and what it finds there must be its own.
    expect(out.tcIndex).toBe(0);
  });

  test("leaves by one source port a flow, and by many for many flows", () => {
    const port = (changes: Partial<Packet4>): number =>
      readVxlan(readIp4(readFrame(node.run("from_pod", sent(changes)).packet).payload).body).sourcePort;
    const ports = Array.from({ length: 64 }, (_, i) => port({ body: { udp: [1000 + i, 2000] } }));
    expect(new Set(ports).size).toBeGreaterThan(32);
    for (const each of ports) {
      expect(each).toBeGreaterThanOrEqual(SOURCE_PORTS.min);
      expect(each).toBeLessThanOrEqual(SOURCE_PORTS.max);
    }
    const again = port({
      body: { udp: [1000, 2000], data: Buffer.from("longer than before") },
      id: 9,
      tos: 2,
    });
    expect(again).toBe(ports[0]);
    // A datagram's fragments keep together, whatever the first one shows of its ports.
    const first = port({ moreFragments: true });
    const later = port({ fragmentOffset: 2, body: { protocol: 17, data: Buffer.from("the rest") } });
    expect(first).toBe(later);
  });

  test("gives each outer packet its own id", () => {
    const ids = Array.from(
      { length: 16 },
      () => readIp4(readFrame(node.run("from_pod", sent()).packet).payload).id,
    );
    expect(new Set(ids).size).toBeGreaterThan(8);
  });

  test.each([
    [0, 0],
    [1, 1],
    [2, 2],
    // As the kernel's tunnels do: what was congested before the tunnel stays marked inside, and the outer
    // header starts without.
    [3, 2],
  ])("copies the ECN field %i to the outer header as %i, and not the DSCP", (inner, outer) => {
    const out = node.run("from_pod", sent({ tos: 0xb8 | inner }));
    const header = readIp4(readFrame(out.packet).payload);
    expect(header.tos).toBe(outer);
    expect(readIp4(readVxlan(header.body).frame.payload).tos).toBe(0xb8 | inner);
  });

  test("goes to the peer itself when the network is shared", () => {
    const input = sent({ destination: DIRECT.pod });
    const out = node.run("from_pod", input);
    expect(out.action).toBe(REDIRECT);
    expect(out.counted).toEqual([`from_pod ROUTED ${input.length}`]);
    expect(readIp4(readFrame(out.packet).payload)).toMatchObject({ ttl: 63, intact: true, bodyIntact: true });
    expect(out.packet.subarray(26)).toEqual(new Uint8Array(input.subarray(26)));
  });

  test.each(["by the peer's row", "because a program may not", "because an aggregate cannot be"])(
    "goes to the kernel's device: %s",
    (why) => {
      const on = why === "because a program may not" ? Node.load({ encapsulate: 0 }) : node;
      try {
        const peer = why === "by the peer's row" ? DEVICE : TUNNEL;
        const input = sent({ destination: peer.pod, body: udpOf(600) });
        // The kernel takes no UDP aggregate without a type, which is what this makes.
        const gso = why === "because an aggregate cannot be" ? { gsoSize: 500 } : {};
        const out = on.run("from_pod", input, gso);
        expect(out.action).toBe(REDIRECT);
        expect(out.counted).toEqual([`from_pod DEVICE ${input.length}`]);
        expect(readFrame(out.packet)).toMatchObject({ to: peer.mac, from: VTEP_MAC });
        expect(readIp4(readFrame(out.packet).payload)).toMatchObject({
          ttl: 63,
          intact: true,
          bodyIntact: true,
        });
        expect(out.packet.length).toBe(input.length);
      } finally {
        if (on !== node) on.close();
      }
    },
  );

  test("is sent up to the MTU, beyond which the stack answers", () => {
    expect(node.run("from_pod", sent({ body: udpOf(PEER_MTU) })).verdict).toBe("ENCAPSULATED");
    expectStack(sent({ body: udpOf(PEER_MTU + 1) }), "STACK_TOO_BIG");
  });

  test("is measured by its segments when it is an aggregate", () => {
    const input = sent({ body: { tcp: [1, 2], data: new Uint8Array(2800) } });
    expect(node.run("from_pod", input, { gsoSize: PEER_MTU - 40 }).verdict).toBe("DEVICE");
    expect(node.run("from_pod", input, { gsoSize: PEER_MTU - 39 }).verdict).toBe("STACK_TOO_BIG");
    const datagrams = sent({ body: udpOf(2800) });
    expect(node.run("from_pod", datagrams, { gsoSize: PEER_MTU - 28 }).verdict).toBe("DEVICE");
    expect(node.run("from_pod", datagrams, { gsoSize: PEER_MTU - 27 }).verdict).toBe("STACK_TOO_BIG");
  });
});

describe("to a pod of the node", () => {
  test.each([NEIGHBOUR, EGRESS_POD])("is delivered: %o", (pod) => {
    const input = sent({ destination: pod.address });
    const out = node.run("from_pod", input);
    expect(out.action).toBe(REDIRECT);
    expect(out.counted).toEqual([`from_pod DELIVERED ${input.length}`]);
    expect(readFrame(out.packet)).toMatchObject({ to: pod.mac, from: GATEWAY_MAC });
    expect(readIp4(readFrame(out.packet).payload)).toMatchObject({ ttl: 63, intact: true, bodyIntact: true });
    expect(out.packet.length).toBe(input.length);
  });

  test("keeps the checksum right for every hop limit and id", () => {
    for (let i = 0; i < 512; i++) {
      const input = sent({ destination: NEIGHBOUR.address, ttl: 2 + (i % 254), id: (i * 40503) & 0xffff });
      const out = node.run("from_pod", input);
      expect(readIp4(out.packet.subarray(14))).toMatchObject({ ttl: 1 + (i % 254), intact: true });
    }
  });

  test("is the stack's when there is no such pod, or it is the sender", () => {
    expectStack(sent({ destination: "172.7.21.200" }), "STACK_LOCAL");
    expectStack(sent({ destination: "172.7.21.255" }), "STACK_LOCAL");
    expectStack(sent({ destination: POD.address }), "STACK_LOCAL");
    expectStack(sent({ destination: "172.7.21.1" }), "STACK_LOCAL");
    expectStack(sent({ destination: NEIGHBOUR.address, body: udpOf(POD_MTU + 1) }), "STACK_TOO_BIG");
  });
});

describe("is left to the stack, unchanged", () => {
  test("what is not of the cluster network, or not for the gateway", () => {
    expectStack(frame(GATEWAY_MAC, POD.mac, Buffer.alloc(46), 0x0806), "UNRELATED");
    expectStack(frame(GATEWAY_MAC, POD.mac, Buffer.alloc(46), 0x86dd), "UNRELATED");
    expectStack(sent({ destination: "8.8.8.8" }), "UNRELATED");
    expectStack(sent({ source: "192.168.0.9" }), "UNRELATED");
    expectStack(sent({ source: "172.7.22.9" }), "UNRELATED");
    expectStack(sent({ source: "172.7.21.1" }), "UNRELATED");
    expectStack(frame(NEIGHBOUR.mac, POD.mac, ip4(packet())), "UNRELATED");
  });

  test("what comes from an interface with no pods behind it", () => {
    const input = sent();
    const out = node.run("from_pod", input, { ifindex: node.spareIfindex });
    expect(out.counted).toEqual([`from_pod UNRELATED ${input.length}`]);
  });

  test("what comes with the address of another pod", () => {
    expectStack(sent({ source: NEIGHBOUR.address }), "STACK_LOCAL");
    expectStack(sent({ source: NEIGHBOUR.address, destination: EGRESS_POD.address }), "STACK_LOCAL");
  });

  test("on the bridge, what comes from a pod that is not known", () => {
    node.interface(1, GATEWAY_MAC, 1);
    try {
      expectStack(sent({ source: "172.7.21.99" }), "STACK_LOCAL");
    } finally {
      node.interface(1, GATEWAY_MAC);
    }
    // At its port it is a pod that just started, whose first packet a masquerade rule must not see.
    expect(node.run("from_pod", sent({ source: "172.7.21.99" })).verdict).toBe("ENCAPSULATED");
  });

  test("what carries a VLAN's tag", () => {
    for (const vlan of [0x1000, 0x1005]) {
      const out = node.run("from_pod", sent(), { vlan });
      expect(out).toMatchObject({ action: NEXT, verdict: "UNRELATED" });
    }
  });

  test("what the fast lane cannot take", () => {
    expectStack(sent({ destination: "172.7.99.9" }), "STACK_NO_PEER");
    expectStack(sent({ options: Uint8Array.of(1, 1, 1, 1) }), "STACK_OPTIONS");
    expectStack(sent({ ttl: 1 }), "STACK_TTL");
    expectStack(sent({ ttl: 0, destination: NEIGHBOUR.address }), "STACK_TTL");
    const longer = sent();
    longer.writeUInt16BE(200, 16);
    expectStack(longer, "STACK_MALFORMED");
    const version = sent();
    version[14] = 0x65;
    expectStack(version, "STACK_MALFORMED");
    const header = sent();
    header[14] = 0x44;
    expectStack(header, "STACK_MALFORMED");
    expectStack(sent().subarray(0, 36), "STACK_MALFORMED");
  });

  test("all of it when the fast path is off", () => {
    const off = Node.load({ fast_path: "FAST_PATH_OFF" });
    try {
      expectStack(sent(), "STACK_OFF", off);
      expectStack(sent({ destination: NEIGHBOUR.address }), "STACK_OFF", off);
      expectStack(sent({ destination: DIRECT.pod }), "STACK_OFF", off);
    } finally {
      off.close();
    }
  });

  test("what its peer's row says while the loaded program does not know the way", () => {
    const direct = Node.load({ tunnel: "TUNNEL_NONE" });
    const tunnel = Node.load({ direct: 0 });
    try {
      expectStack(sent(), "STACK_OFF", direct);
      expectStack(sent({ destination: DEVICE.pod }), "STACK_OFF", direct);
      expectStack(sent({ destination: DIRECT.pod }), "STACK_OFF", tunnel);
    } finally {
      direct.close();
      tunnel.close();
    }
  });
});

describe("to the tunnel's port of a node", () => {
  const forged = frame(
    VTEP_MAC,
    TUNNEL.mac,
    ip4(packet({ source: TUNNEL.pod, destination: NEIGHBOUR.address })),
  );
  const tunnel = { source: POD.address, frame: forged };
  const expectDropped = (input: Buffer, metadata = {}): void => {
    const out = node.run("from_pod", input, metadata);
    expect(out).toMatchObject({ action: SHOT, counted: [`from_pod DROP_POD_TUNNEL ${out.packet.length}`] });
  };

  test.each([VTEP, TUNNEL.address, DIRECT.address])("is dropped at %s, in every form", (destination) => {
    expectDropped(frame(GATEWAY_MAC, POD.mac, vxlan4({ ...tunnel, destination })));
    expectDropped(
      frame(GATEWAY_MAC, POD.mac, vxlan4({ ...tunnel, destination, options: Buffer.alloc(8, 1) })),
    );
    expectDropped(frame(GATEWAY_MAC, POD.mac, vxlan4({ ...tunnel, destination, moreFragments: true })));
    expectDropped(
      frame(
        GATEWAY_MAC,
        POD.mac,
        vxlan4({ ...tunnel, destination, options: Buffer.alloc(40, 1), moreFragments: true }),
      ),
    );
    // The tag of no VLAN, which the stack takes off.
    const out = node.run("from_pod", frame(GATEWAY_MAC, POD.mac, vxlan4({ ...tunnel, destination })), {
      vlan: 0x1000,
    });
    expect(out).toMatchObject({ action: SHOT, verdict: "DROP_POD_TUNNEL" });
  });

  test("is another pod's business: a tunnel between pods goes through", () => {
    const inside = vxlan4({ ...tunnel, destination: TUNNEL.pod });
    expect(node.run("from_pod", frame(GATEWAY_MAC, POD.mac, inside)).verdict).toBe("ENCAPSULATED");
    const elsewhere = ip4(packet({ destination: "192.0.2.1", body: { udp: [1, VXLAN_PORT] } }));
    expect(node.run("from_pod", frame(GATEWAY_MAC, POD.mac, elsewhere)).verdict).toBe("UNRELATED");
    const other = ip4(packet({ destination: TUNNEL.address, body: { udp: [1, 53] } }));
    expect(node.run("from_pod", frame(GATEWAY_MAC, POD.mac, other)).verdict).toBe("UNRELATED");
  });

  test("is marked whatever it is, so that the tunnel device's hook knows where it came from", () => {
    const inputs = [
      frame(GATEWAY_MAC, POD.mac, vxlan4({ ...tunnel, destination: "172.7.21.1" })),
      frame(GATEWAY_MAC, POD.mac, vxlan4({ ...tunnel, destination: "10.99.0.1" })),
      frame("ff:ff:ff:ff:ff:ff", POD.mac, vxlan4({ ...tunnel, destination: "172.7.21.255" })),
      frame("01:00:5e:00:00:01", POD.mac, vxlan4({ ...tunnel, destination: "224.0.0.1" })),
      frame(OTHER_MAC, POD.mac, vxlan4({ ...tunnel, destination: "172.7.21.0" })),
    ];
    const entered = frame(VTEP_MAC, TUNNEL.mac, forged.subarray(14));
    for (const input of inputs) {
      const out = node.run("from_pod", input);
      expect(out.action).toBe(NEXT);
      expect(out.tcIndex).not.toBe(0);
      const opened = node.run("from_overlay", entered, { tcIndex: out.tcIndex });
      expect(opened).toMatchObject({ action: SHOT, verdict: "DROP_FORGED" });
    }
  });
});

test("the frame's MACs are the only thing that says where a pod's packet goes on its bridge", () => {
  expect(mac(GATEWAY_MAC)).not.toEqual(mac(NEIGHBOUR.mac));
  for (const to of [NEIGHBOUR.mac, "ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01"]) {
    expect(node.run("from_pod", frame(to, POD.mac, ip4(packet())))).toMatchObject({
      action: NEXT,
      verdict: "UNRELATED",
    });
  }
});
