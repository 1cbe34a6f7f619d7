/**
 * The flow gate: what the stack translates goes through it in both directions, and what it does not translate
 * stays on the fast lane. A packet's way through the stack is played here: a program passes it on, the test changes
 * it as a NAT would, and the next program gets it with the metadata that the first one left.
 */
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { type Body, frame, ip4, type Packet4, vxlan4 } from "./packets.ts";
import {
  DIRECT,
  EGRESS_POD,
  GATEWAY_MAC,
  type HookName,
  LO_MAC,
  NEIGHBOUR,
  NEXT,
  Node,
  OTHER_MAC,
  POD,
  SHOT,
  TUNNEL,
  VTEP,
  VTEP_MAC,
} from "./programs.ts";

const SERVICE = "10.96.0.10";
const fromPod = (packet: Packet4): Buffer => frame(GATEWAY_MAC, POD.mac, ip4(packet));
const fromNet = (packet: Packet4, peer = TUNNEL): Buffer =>
  frame(LO_MAC, OTHER_MAC, vxlan4({ source: peer.address, destination: VTEP, frame: fromStack(packet) }));
const fromStack = (packet: Packet4): Buffer => frame(VTEP_MAC, OTHER_MAC, ip4(packet));
const opened = (packet: Packet4): Buffer => frame(LO_MAC, OTHER_MAC, ip4(packet));
const ends = (source: string, destination: string, body: Body): Packet4 => ({ source, destination, body });

const BODIES: ReadonlyArray<readonly [string, Body, Body]> = [
  ["TCP", { tcp: [1000, 80] }, { tcp: [80, 1000] }],
  ["UDP", { udp: [1000, 53] }, { udp: [53, 1000] }],
  ["ICMP echo", { echo: 9 }, { echo: 9, reply: true }],
  [
    "a protocol without ports",
    { protocol: 47, data: Buffer.alloc(8) },
    { protocol: 47, data: Buffer.alloc(8) },
  ],
];

let node: Node;
beforeAll(() => {
  node = Node.load();
});
beforeEach(() => node.forgetFlows());
afterAll(() => node.close());

/** Lets `body` run with another pod behind the interface at hand than POD. */
function fromNeighbour(body: () => void): void {
  node.endpoint({ ...POD, ifindex: NEIGHBOUR.ifindex }, "DELIVERY_PEER");
  node.endpoint({ ...NEIGHBOUR, ifindex: POD.ifindex }, "DELIVERY_PEER");
  try {
    body();
  } finally {
    node.endpoint(POD, "DELIVERY_PEER");
    node.endpoint(NEIGHBOUR, "DELIVERY_PEER");
  }
}

/** The stack changes what a pod sent, and it leaves by `hook`. */
function translated(hook: HookName, before: Packet4, after: Packet4): void {
  const entered = node.run("from_pod", fromPod(before));
  expect(entered.action).toBe(NEXT);
  node.run(hook, fromStack(after), { tcIndex: entered.tcIndex });
}

describe.each(BODIES)("a translated flow of %s", (_, request, reply) => {
  test("to a peer's pod through the tunnel stays on the stack, both ways", () => {
    translated("to_overlay", ends(POD.address, SERVICE, request), ends(POD.address, TUNNEL.pod, request));
    const back = ends(TUNNEL.pod, POD.address, reply);
    expect(node.run("from_net", fromNet(back))).toMatchObject({ action: NEXT, verdict: "STACK_TUNNEL" });
    expect(node.run("from_overlay", opened(back))).toMatchObject({ action: NEXT, verdict: "STACK_FLOW" });
    const forth = ends(POD.address, TUNNEL.pod, request);
    expect(node.run("from_pod", fromPod(forth))).toMatchObject({ action: NEXT, verdict: "STACK_FLOW" });
  });

  test("to a peer's pod over the shared network stays on the stack, both ways", () => {
    translated("to_net", ends(POD.address, SERVICE, request), ends(POD.address, DIRECT.pod, request));
    const back = frame(LO_MAC, OTHER_MAC, ip4(ends(DIRECT.pod, POD.address, reply)));
    expect(node.run("from_net", back)).toMatchObject({ action: NEXT, verdict: "STACK_FLOW" });
    const forth = ends(POD.address, DIRECT.pod, request);
    expect(node.run("from_pod", fromPod(forth))).toMatchObject({ action: NEXT, verdict: "STACK_FLOW" });
  });

  test("to a pod of the node stays on the stack, both ways", () => {
    translated("to_pod", ends(POD.address, SERVICE, request), ends(POD.address, NEIGHBOUR.address, request));
    const forth = ends(POD.address, NEIGHBOUR.address, request);
    expect(node.run("from_pod", fromPod(forth))).toMatchObject({ action: NEXT, verdict: "STACK_FLOW" });
    fromNeighbour(() => {
      const back = ends(NEIGHBOUR.address, POD.address, reply);
      expect(node.run("from_pod", fromPod(back))).toMatchObject({ action: NEXT, verdict: "STACK_FLOW" });
    });
  });

  test("from a peer's pod to a published port stays on the stack", () => {
    // The node's own address is no pod's, so the packet went up the stack, and came down for a pod.
    const entered = node.run("from_overlay", opened(ends(TUNNEL.pod, "172.7.21.0", request)));
    expect(entered.action).toBe(NEXT);
    node.run("to_pod", fromStack(ends(TUNNEL.pod, NEIGHBOUR.address, request)), {
      tcIndex: entered.tcIndex,
    });
    fromNeighbour(() => {
      const back = ends(NEIGHBOUR.address, TUNNEL.pod, reply);
      expect(node.run("from_pod", fromPod(back))).toMatchObject({ action: NEXT, verdict: "STACK_FLOW" });
    });
  });

  test("takes its ICMP errors and its fragments along", () => {
    const forth = ends(POD.address, TUNNEL.pod, request);
    translated("to_overlay", ends(POD.address, SERVICE, request), forth);
    const error = ends(TUNNEL.pod, POD.address, { error: [3, 4], about: ip4(forth) });
    expect(node.run("from_net", fromNet(error))).toMatchObject({ action: NEXT, verdict: "STACK_TUNNEL" });
    expect(node.run("from_overlay", opened(error))).toMatchObject({ verdict: "STACK_FLOW" });
    const other = ends(TUNNEL.pod, POD.address, {
      error: [3, 4],
      about: ip4(ends(POD.address, TUNNEL.pod, { udp: [7777, 7778] })),
    });
    expect(node.run("from_overlay", opened(other)).verdict).toBe("DELIVERED");
    const protocol = ip4(forth)[9] ?? 0;
    const first = { ...forth, moreFragments: true };
    const later = { ...forth, body: { protocol, data: Buffer.alloc(16) }, fragmentOffset: 4 };
    for (const fragment of [first, later]) {
      expect(node.run("from_pod", fromPod(fragment))).toMatchObject({ action: NEXT, verdict: "STACK_FLOW" });
    }
  });

  test("is known by its first fragment", () => {
    // Reassembled by the stack to be translated, it leaves in fragments again.
    const entered = node.run("from_pod", fromPod(ends(POD.address, SERVICE, request)));
    const after = { ...ends(POD.address, TUNNEL.pod, request), moreFragments: true };
    node.run("to_overlay", fromStack(after), { tcIndex: entered.tcIndex });
    const back = ends(TUNNEL.pod, POD.address, reply);
    expect(node.run("from_overlay", opened(back))).toMatchObject({ action: NEXT, verdict: "STACK_FLOW" });
  });

  test("is known with IP options", () => {
    const options = Uint8Array.of(1, 1, 1, 1);
    const entered = node.run("from_pod", fromPod(ends(POD.address, SERVICE, request)));
    node.run("to_overlay", fromStack({ ...ends(POD.address, TUNNEL.pod, request), options }), {
      tcIndex: entered.tcIndex,
    });
    const back = ends(TUNNEL.pod, POD.address, reply);
    expect(node.run("from_overlay", opened(back))).toMatchObject({ action: NEXT, verdict: "STACK_FLOW" });
  });

  test("does not hold its neighbours", () => {
    translated("to_overlay", ends(POD.address, SERVICE, request), ends(POD.address, TUNNEL.pod, request));
    const other = ends(POD.address, "172.7.22.3", request);
    expect(node.run("from_pod", fromPod(other)).verdict).toBe("ENCAPSULATED");
    if (!("protocol" in request)) {
      const beside = ends(POD.address, TUNNEL.pod, { udp: [4444, 4445] });
      expect(node.run("from_pod", fromPod(beside)).verdict).toBe("ENCAPSULATED");
    }
  });
});

describe("on the bridge, behind the port", () => {
  const packet = ends(POD.address, TUNNEL.pod, { udp: [1000, 53] });
  const onBridge = (input: Buffer, tcIndex: number): ReturnType<Node["run"]> => {
    // The pod's own interface is another one now, and the one at hand the bridge.
    node.endpoint({ ...POD, ifindex: NEIGHBOUR.ifindex }, "DELIVERY_PEER");
    try {
      return node.run("from_pod", input, { tcIndex });
    } finally {
      node.endpoint(POD, "DELIVERY_PEER");
    }
  };

  test("what br_netfilter translated on the way is the stack's, and kept there", () => {
    const port = node.run("from_pod", fromPod(ends(POD.address, SERVICE, packet.body)));
    const bridge = onBridge(fromPod(packet), port.tcIndex);
    expect(bridge).toMatchObject({ action: NEXT, verdict: "STACK_LOCAL" });
    node.run("to_overlay", fromStack(packet), { tcIndex: bridge.tcIndex });
    expect(node.flows()).toHaveLength(2);
  });

  test("what it did not translate keeps its stamp, and is not kept", () => {
    const port = node.run("from_pod", fromPod({ ...packet, ttl: 1 }));
    const bridge = onBridge(fromPod({ ...packet, ttl: 1 }), port.tcIndex);
    expect(bridge).toMatchObject({ action: NEXT, verdict: "STACK_LOCAL" });
    node.run("to_overlay", fromStack(packet), { tcIndex: bridge.tcIndex });
    expect(node.flows()).toEqual([]);
  });

  test("what no port's program has seen counts as translated", () => {
    const bridge = onBridge(fromPod(packet), 0);
    expect(bridge).toMatchObject({ action: NEXT, verdict: "STACK_LOCAL" });
    node.run("to_overlay", fromStack(packet), { tcIndex: bridge.tcIndex });
    expect(node.flows()).toHaveLength(2);
  });

  test("what might be a tunnel packet keeps no stamp, whoever gave it one", () => {
    const forged = ends(POD.address, "172.7.21.1", { udp: [1000, 8472] });
    const clean = onBridge(fromPod(forged), 1).tcIndex;
    expect(
      node.run("from_overlay", opened(ends(TUNNEL.pod, POD.address, { udp: [1, 2] })), { tcIndex: clean }),
    ).toMatchObject({
      action: SHOT,
      verdict: "DROP_FORGED",
    });
  });
});

describe.each(BODIES)("an untranslated flow of %s", (_, request) => {
  const cases: ReadonlyArray<readonly [HookName, Packet4, Partial<Packet4>]> = [
    ["to_overlay", ends(POD.address, TUNNEL.pod, request), {}],
    ["to_net", ends(POD.address, DIRECT.pod, request), {}],
    ["to_pod", ends(POD.address, NEIGHBOUR.address, request), {}],
  ];

  test.each(cases)("that the stack had to see leaves by %s and is not kept", (hook, packet) => {
    const forms: readonly Packet4[] = [
      { ...packet, options: Uint8Array.of(1, 1, 1, 1) },
      { ...packet, ttl: 1 },
      { ...packet, ttl: 1, moreFragments: true },
      {
        ...packet,
        ttl: 1,
        body: { protocol: ip4(packet)[9] ?? 0, data: Buffer.alloc(16) },
        fragmentOffset: 4,
      },
    ];
    for (const form of forms) {
      const entered = node.run("from_pod", fromPod(form));
      expect(entered.action).toBe(NEXT);
      node.run(hook, fromStack(form), { tcIndex: entered.tcIndex });
      expect(node.flows()).toEqual([]);
    }
  });

  test("that fragments on its way through the stack, or is put together, is not kept", () => {
    const packet = ends(POD.address, TUNNEL.pod, request);
    const whole = node.run("from_pod", fromPod({ ...packet, ttl: 1 }));
    const later = {
      ...packet,
      body: { protocol: ip4(packet)[9] ?? 0, data: Buffer.alloc(16) },
      fragmentOffset: 4,
    };
    node.run("to_overlay", fromStack({ ...packet, moreFragments: true }), { tcIndex: whole.tcIndex });
    node.run("to_overlay", fromStack(later), { tcIndex: whole.tcIndex });
    const first = node.run("from_pod", fromPod({ ...packet, ttl: 1, moreFragments: true }));
    node.run("to_overlay", fromStack(packet), { tcIndex: first.tcIndex });
    expect(node.flows()).toEqual([]);
  });

  test("that came from a peer by the stack is not kept", () => {
    const packet = { ...ends(TUNNEL.pod, NEIGHBOUR.address, request), ttl: 1 };
    const entered = node.run("from_overlay", opened(packet));
    expect(entered.verdict).toBe("STACK_TTL");
    node.run("to_pod", fromStack(packet), { tcIndex: entered.tcIndex });
    const direct = { ...ends(DIRECT.pod, NEIGHBOUR.address, request), ttl: 1 };
    const arrived = node.run("from_net", opened(direct));
    expect(arrived.verdict).toBe("STACK_TTL");
    node.run("to_pod", fromStack(direct), { tcIndex: arrived.tcIndex });
    expect(node.flows()).toEqual([]);
  });

  test("that the fast lane sends by way of a hook that watches is not kept", () => {
    const packets: ReadonlyArray<readonly [HookName, Buffer, HookName]> = [
      ["from_pod", fromPod(ends(POD.address, DIRECT.pod, request)), "to_net"],
      ["from_pod", fromPod(ends(POD.address, EGRESS_POD.address, request)), "to_pod"],
      ["from_overlay", opened(ends(TUNNEL.pod, EGRESS_POD.address, request)), "to_pod"],
      ["from_net", opened(ends(DIRECT.pod, EGRESS_POD.address, request)), "to_pod"],
      ["from_net", fromNet(ends(TUNNEL.pod, EGRESS_POD.address, request)), "to_pod"],
    ];
    for (const [hook, input, next] of packets) {
      const sent = node.run(hook, input);
      if (sent.verdict === "STACK_TUNNEL") continue;
      expect(sent.action).not.toBe(NEXT);
      expect(node.run(next, sent.packet, { tcIndex: sent.tcIndex }).action).toBe(NEXT);
      expect(node.flows()).toEqual([]);
    }
  });
});

describe("what is kept", () => {
  const after = ends(POD.address, TUNNEL.pod, { udp: [1000, 53] });
  const rows = ["172.7.21.2:0 172.7.22.2:0 17", "172.7.21.2:1000 172.7.22.2:53 17"];

  test("is one row for both directions, and one for the fragments", () => {
    node.run("to_overlay", fromStack(after));
    expect(node.flows()).toEqual(rows);
    node.run("to_pod", fromStack(ends(TUNNEL.pod, POD.address, { udp: [53, 1000] })));
    expect(node.flows()).toEqual(rows);
  });

  test("is written once, and made whole again if one of the rows was lost", () => {
    node.run("to_overlay", fromStack(after));
    const times = node.flowTimes();
    node.run("to_overlay", fromStack(after));
    expect(node.flowTimes()).toEqual(times);
    node.forgetFlow(rows[0] ?? "");
    expect(node.flows()).toEqual(rows.slice(1));
    node.run("to_overlay", fromStack(after));
    expect(node.flows()).toEqual(rows);
  });

  test("is known also of the time when everything took the stack", () => {
    const stack = Node.load({ fast_path: "FAST_PATH_STACK" });
    try {
      const packet = ends(POD.address, EGRESS_POD.address, { udp: [1000, 53] });
      const passed = stack.run("from_pod", fromPod(packet));
      expect(passed).toMatchObject({ action: NEXT, verdict: "STACK_OFF" });
      stack.run("to_pod", fromStack(packet), { tcIndex: passed.tcIndex });
      expect(stack.flows()).toEqual([]);
      stack.run("to_overlay", fromStack(after));
      expect(stack.flows()).toEqual(rows);
    } finally {
      stack.close();
    }
  });

  test("has equal ends and ports in an order, too", () => {
    node.run("to_pod", fromStack(ends(POD.address, POD.address, { udp: [9, 5] })));
    node.run("to_pod", fromStack(ends(POD.address, POD.address, { udp: [5, 9] })));
    expect(node.flows()).toEqual(["172.7.21.2:0 172.7.21.2:0 17", "172.7.21.2:5 172.7.21.2:9 17"]);
  });

  test("is nothing of the node's own, of outsiders, of errors, or unless the mode asks for it", () => {
    node.run("to_overlay", fromStack(ends("172.7.21.0", TUNNEL.pod, { tcp: [1, 2] })));
    node.run("to_overlay", fromStack(ends("192.0.2.1", TUNNEL.pod, { tcp: [1, 2] })));
    node.run("to_pod", fromStack(ends("172.7.21.1", POD.address, { tcp: [1, 2] })));
    node.run("to_pod", fromStack(ends("192.0.2.1", POD.address, { tcp: [1, 2] })));
    node.run("to_net", fromStack(ends(VTEP, "10.4.7.1", { tcp: [1, 2] })));
    node.run("to_pod", fromStack(ends(TUNNEL.pod, POD.address, { error: [3, 1], about: ip4(after) })));
    expect(node.flows()).toEqual([]);
    for (const mode of ["FAST_PATH_ALWAYS", "FAST_PATH_OFF"] as const) {
      const other = Node.load({ fast_path: mode });
      try {
        other.run("to_overlay", fromStack(after));
        other.run("to_pod", fromStack(ends(TUNNEL.pod, POD.address, { tcp: [1, 2] })));
        other.run("to_net", fromStack(ends(POD.address, DIRECT.pod, { tcp: [1, 2] })));
        expect(other.flows()).toEqual([]);
      } finally {
        other.close();
      }
    }
  });
});

test("an ICMP error that cannot be read is the stack's", () => {
  const abouts = [
    Buffer.alloc(0),
    Buffer.alloc(19),
    Buffer.alloc(28, 0x65),
    ip4({ ...ends(POD.address, TUNNEL.pod, { udp: [1, 2] }), options: Buffer.alloc(4, 1) }),
  ];
  for (const about of [...abouts, ip4(ends(POD.address, TUNNEL.pod, { udp: [1, 2] })).subarray(0, 22)]) {
    const error = ends(TUNNEL.pod, POD.address, { error: [3, 4], about });
    expect(node.run("from_overlay", opened(error))).toMatchObject({ action: NEXT, verdict: "STACK_FLOW" });
  }
});

test("to_pod and to_net let everything pass, count it, and change nothing", () => {
  const inputs = [
    fromStack(ends(TUNNEL.pod, POD.address, { udp: [1, 2] })),
    fromStack(ends(POD.address, DIRECT.pod, { tcp: [1, 2] })),
    frame(OTHER_MAC, OTHER_MAC, Buffer.alloc(46), 0x0806),
    frame(OTHER_MAC, OTHER_MAC, Buffer.alloc(20, 0x45)),
  ];
  for (const hook of ["to_pod", "to_net"] as const) {
    for (const input of inputs) {
      const out = node.run(hook, input);
      expect(out.counted).toEqual([`${hook} UNRELATED ${input.length}`]);
      expect(out.action).not.toBe(SHOT);
      expect(Buffer.from(out.packet)).toEqual(input);
    }
  }
});
