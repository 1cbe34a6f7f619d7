/**
 * What is let in from outside the network: which packets of which flows, and what a pod opens itself. That the kernel
 * has a way back for it is for test/e2e/services.test.ts; here a flow is let in by its row.
 */
import fc from "fast-check";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { codec } from "../../loader/codec.ts";
import { type Flow4, flow4Layout, inboundLayout } from "../../src/abi/twill.gen.ts";
import { Outside, packetOf, tcp } from "./outside.ts";
import { address, type Body, frame, ip4, type Packet4, readFrame, readIp4 } from "./packets.ts";
import { EGRESS_POD, LO, LO_MAC, NEXT, OTHER_MAC, POD, POD_MTU, REDIRECT, SHOT } from "./programs.ts";

/** skb->tc_index of what from_net has found in order. */
const CHECKED = 0x7492;

const CLIENT = "10.4.7.99";
const ASKS: Packet4 = { source: CLIENT, destination: POD.address, body: { udp: [5000, 53] } };
const keys = codec(flow4Layout);
const values = codec(inboundLayout);

let outside: Outside;
beforeEach(() => {
  outside = new Outside();
});
afterEach(() => outside.close());

/** Lets the flow of CLIENT with a pod in. */
function letIn(clientPort: number, podPort: number, protocol: number, pod = POD.address): void {
  const ends: Pick<Flow4, "a" | "b" | "port_a" | "port_b"> = {
    a: address(CLIENT),
    b: address(pod),
    port_a: clientPort,
    port_b: podPort,
  };
  const row = values.encode({ since_ns: 0n, ifindex: LO });
  outside.node.object.map("inbound4").update(keys.encode({ ...ends, protocol }), row);
}

describe("a flow from outside", () => {
  test.each<[string, Body, number, number]>([
    ["TCP", { tcp: [5000, 80] }, 80, 6],
    ["UDP", { udp: [5000, 53] }, 53, 17],
  ])("of %s is handed to its pod once it was let in, and not before", (_, body, port, protocol) => {
    const asks = ip4({ ...ASKS, body });
    expect(outside.arrive(asks)).toMatchObject({ action: NEXT, verdict: "UNRELATED" });
    letIn(5000, port, protocol);
    const delivered = outside.arrive(asks);
    expect([delivered.action, delivered.verdict]).toEqual([REDIRECT, "DELIVERED"]);
    expect(readIp4(packetOf(delivered))).toMatchObject({ source: CLIENT, ttl: 63, bodyIntact: true });
  });

  test("is the stack's where it is switched off", () => {
    for (const changes of [{ let_in: 0 }, { fast_path: "FAST_PATH_STACK" }] as const) {
      outside.close();
      outside = new Outside(changes);
      letIn(5000, 53, 17);
      expect(outside.arrive(ip4(ASKS)).action).toBe(NEXT);
    }
  });

  test("is the stack's if it came in by another interface", () => {
    letIn(5000, 53, 17);
    const { node } = outside;
    const other = node.run("from_net", frame("00:00:00:00:00:00", POD.mac, ip4(ASKS)), {
      ifindex: node.spareIfindex,
    });
    expect(other.action).toBe(NEXT);
  });

  test("brings errors about it along, but no others", () => {
    const about = ip4({ source: POD.address, destination: CLIENT, body: { udp: [53, 5000] } });
    const error = ip4({ source: "10.4.7.1", destination: POD.address, body: { error: [3, 1], about } });
    expect(outside.arrive(error).action).toBe(NEXT);
    letIn(5000, 53, 17);
    expect(outside.arrive(error)).toMatchObject({ action: REDIRECT, verdict: "DELIVERED" });
  });

  test("that is larger than the pod's link goes there whole, unless it must not be in pieces", () => {
    const body: Body = { udp: [5000, 53], data: new Uint8Array(POD_MTU) };
    letIn(5000, 53, 17);
    letIn(5000, 53, 17, EGRESS_POD.address);
    expect(outside.arrive(ip4({ ...ASKS, body })).verdict).toBe("DELIVERED");
    for (const changes of [{ dontFragment: true }, { destination: EGRESS_POD.address }])
      expect(outside.arrive(ip4({ ...ASKS, body, ...changes })).verdict).toBe("STACK_TOO_BIG");
  });
});

describe("in pieces", () => {
  const first = ip4({ ...ASKS, moreFragments: true });
  const later = ip4({ ...ASKS, body: { protocol: 17, data: Buffer.alloc(64) }, fragmentOffset: 100 });

  test("the first one decides for all", () => {
    expect(outside.arrive(first).action).toBe(NEXT);
    expect(outside.arrive(later).action).toBe(NEXT);
    letIn(5000, 53, 17);
    expect(outside.arrive(first).verdict).toBe("DELIVERED");
    expect(outside.arrive(later).verdict).toBe("DELIVERED");
  });

  describe.each(["from_net", "from_overlay"] as const)("at %s", (hook) => {
    const arrive = (bytes: Uint8Array) =>
      outside.node.run(hook, frame(LO_MAC, OTHER_MAC, bytes), { tcIndex: CHECKED });

    test("they may come in any order, whether they are let in or not", () => {
      const orders = fc
        .integer({ min: 2, max: 12 })
        .chain((count) => fc.shuffledSubarray([...Array(count).keys()], { minLength: count }));
      let id = 0;
      letIn(5000, 53, 17);
      fc.assert(
        fc.property(orders, fc.boolean(), (order, mayEnter) => {
          id++;
          const pieces = order.map((_, index) => {
            const body: Body =
              index === 0
                ? { udp: [mayEnter ? 5000 : 5001, 53], data: Buffer.alloc(24, 1) }
                : { protocol: 17, data: Buffer.alloc(32, index) };
            const moreFragments = index < order.length - 1;
            return ip4({ ...ASKS, id, body, fragmentOffset: 4 * index, moreFragments });
          });
          const whole = (bytes: Uint8Array) => {
            const { action, verdict, packet } = arrive(bytes);
            const { payload } = readFrame(packet);
            expect([action, verdict === "DELIVERED"]).toEqual([mayEnter ? REDIRECT : NEXT, mayEnter]);
            expect(readIp4(payload)).toMatchObject({ body: readIp4(bytes).body, intact: true });
          };
          const begins = order.indexOf(0);
          order.forEach((index, place) => {
            const piece = pieces[index] ?? first;
            if (place > begins || (place === 0 && index === 0)) whole(piece);
            else if (index !== 0) expect(arrive(piece)).toMatchObject({ action: SHOT, verdict: "HELD" });
            else expect(arrive(piece)).toMatchObject({ action: SHOT, verdict: "RELEASED" });
          });
          expect(outside.node.object.map("held4").entries()).toEqual([]);
          // What was released comes in again, the first one first.
          if (begins > 0) for (const index of [0, ...order.slice(0, begins)]) whole(pieces[index] ?? first);
        }),
        { numRuns: 200 },
      );
    });
  });

  test("a pod's answer keeps its address from its first piece to its last", () => {
    outside.arrive(ip4(ASKS));
    const answer = { source: POD.address, destination: CLIENT } as const;
    const pieces = [
      ip4({ ...answer, body: { udp: [53, 5000] }, moreFragments: true }),
      ip4({ ...answer, body: { protocol: 17, data: Buffer.alloc(64) }, fragmentOffset: 100 }),
    ];
    for (const piece of pieces) expect(packetOf(outside.leave(piece))).toEqual(piece);
  });
});

describe("a flow that a pod opens under its own address", () => {
  const asks: Packet4 = { source: POD.address, destination: CLIENT, body: { udp: [53, 5000] } };

  test("is kept on the stack", () => {
    outside.close();
    outside = new Outside({ masquerade: 0 });
    outside.leave(asks);
    expect(outside.node.flows()).toEqual(["10.4.7.99:5000 172.7.21.2:53 17"]);
    letIn(5000, 53, 17);
    expect(outside.arrive(ip4(ASKS))).toMatchObject({ action: NEXT, verdict: "STACK_FLOW" });
  });

  test("is not what answers a flow that was let in, nor what is masqueraded", () => {
    outside.leave({ ...asks, body: { udp: [54, 5000] } });
    letIn(5000, 53, 17);
    outside.arrive(ip4(ASKS));
    outside.leave(asks);
    expect(outside.node.flows()).toEqual([]);
    expect(outside.connections().map(({ podPort }) => podPort)).toContain(54);
  });

  test("is not begun by its answer", () => {
    const handshake = tcp({ source: CLIENT, destination: POD.address, body: { tcp: [80, 5000] } }, 18);
    expect(outside.arrive(handshake).action).toBe(NEXT);
    expect(outside.node.object.map("inbound4").entries()).toEqual([]);
  });
});
