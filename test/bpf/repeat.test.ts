/**
 * A pod's packets for the outside past the stack: the kernel says where they go, and for some milliseconds a flow goes
 * there without asking again. The routes are those of a network namespace of this file's own, which the programs ask.
 */
import { isDeepStrictEqual } from "node:util";
import { afterEach, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { codec } from "../../loader/codec.ts";
import * as abi from "../../src/abi/twill.gen.ts";
import { enterNamespace, sh } from "../loader/lab.ts";
import { NODE, Outside, packetOf, REMOTE, tcp } from "./outside.ts";
import { ip4, type Packet4, readIp4 } from "./packets.ts";
import { NEXT, type Outcome, POD, REDIRECT } from "./programs.ts";

const SYN = 2;
const ACK = 16;
const UPLINK_MTU = 1400;
const packet: Packet4 = { source: POD.address, destination: REMOTE, body: { udp: [5000, 53] } };
const ways = codec(abi.way4Layout);

let outside: Outside;
let uplink: number;

beforeAll(() => {
  enterNamespace();
  sh(`ip link set lo up
    ip link add up0 mtu ${UPLINK_MTU} type veth peer name wire
    ip address add ${NODE}/24 dev up0
    ip link set up0 up; ip link set wire up
    echo 1 >/proc/sys/net/ipv4/conf/all/forwarding
    ip route add default via 10.4.7.1
    ip neighbour add 10.4.7.1 lladdr 02:00:00:00:00:01 dev up0 nud permanent
    ip neighbour add 10.4.7.2 lladdr 02:00:00:00:00:02 dev up0 nud permanent`);
  uplink = JSON.parse(sh("ip -j link show up0"))[0].ifindex;
});

beforeEach(() => {
  outside = new Outside();
  outside.uplink(NODE, "0.0.0.0", uplink);
});

afterEach(() => {
  outside.close();
  sh("ip route replace default via 10.4.7.1");
});

/** The stack lets the flow through, as it does with each one's first packet. */
const open = (first: Packet4 | Uint8Array): Outcome => {
  const { tcIndex } = outside.fromPod(first);
  return outside.leave(first, { tcIndex, ifindex: uplink });
};
const repeated = { action: REDIRECT, verdict: "REPEATED" };

/** What the processors remember in a row of `ways4`. */
const waysAt = (index: number) => {
  const key = Buffer.alloc(4);
  key.writeUInt32LE(index);
  const values = outside.node.object.map("ways4").lookupPerCpu(key) ?? [];
  return values.map((value) => ways.decode(value)).filter(({ at_ns }) => at_ns !== 0n);
};

/** All rows in which they remember something. */
const remembered = () =>
  Array.from({ length: abi.Limit.WAYS_MAX }, (_, index) => ({ index, ways: waysAt(index) })).filter(
    (row) => row.ways.length > 0,
  );

/** Runs the packet again and again until the program does something else with it than before. */
function until(wanted: (outcome: Outcome) => boolean): Outcome {
  const end = performance.now() + 2000;
  for (;;) {
    const outcome = outside.fromPod(packet);
    if (wanted(outcome) || performance.now() > end) return outcome;
  }
}

describe("a flow that the stack has let through", () => {
  test("goes out under its name, by the way that the kernel says", () => {
    const first = open(packet);
    expect(first).toMatchObject({ action: NEXT, verdict: "MASQUERADED" });
    const out = outside.fromPod(packet);
    expect(out).toMatchObject(repeated);
    expect(readIp4(packetOf(out))).toMatchObject({ source: NODE, destination: REMOTE, ttl: 63 });
    expect(readIp4(packetOf(out)).body).toEqual(readIp4(packetOf(first)).body);
    const way = remembered()[0]?.ways[0];
    expect(way).toMatchObject({ ifindex: uplink, mtu: UPLINK_MTU, protocol: 17 });
    expect(way?.next_hop.join(".")).toBe("10.4.7.1");
  });

  test("goes the same way without asking again, and no other flow with it", () => {
    open(packet);
    expect(outside.fromPod(packet)).toMatchObject(repeated);
    const index = remembered()[0]?.index ?? -1;
    // Two that follow each other at once; not always, should the test be interrupted between them.
    const again = Array.from({ length: 50 }, () => {
      expect(outside.fromPod(packet)).toMatchObject(repeated);
      const asked = waysAt(index);
      expect(outside.fromPod(packet)).toMatchObject(repeated);
      return isDeepStrictEqual(waysAt(index), asked);
    });
    expect(again).toContain(true);
    const other = { ...packet, body: { udp: [5001, 53] } } as const;
    expect(outside.fromPod(other)).toMatchObject({ action: NEXT });
    open(other);
    expect(outside.fromPod(other)).toMatchObject(repeated);
    expect(remembered()).toHaveLength(2);
  });

  test("follows a route that changes", () => {
    open(packet);
    expect(outside.fromPod(packet)).toMatchObject(repeated);
    const index = remembered()[0]?.index ?? -1;
    sh("ip route replace default via 10.4.7.2");
    const end = performance.now() + 2000;
    let hop: string | undefined;
    while (hop !== "10.4.7.2" && performance.now() < end) {
      expect(outside.fromPod(packet)).toMatchObject(repeated);
      const [latest] = waysAt(index).sort((a, b) => Number(b.at_ns - a.at_ns));
      hop = latest?.next_hop.join(".");
    }
    expect(hop).toBe("10.4.7.2");
    sh("ip route del default");
    expect(until(({ action }) => action === NEXT)).toMatchObject({ action: NEXT });
  });

  test("is the stack's at once when its connection is gone, or translated there", () => {
    open(packet);
    const map = outside.node.object.map("connections4");
    const [[key, row] = []] = map.entries();
    if (!key || !row) throw new Error("no connection was opened");
    expect(outside.fromPod(packet)).toMatchObject(repeated);
    const rows = codec(abi.connection4Layout);
    map.update(key, rows.encode({ ...rows.decode(row), on_stack: 1 }));
    expect(outside.fromPod(packet)).toMatchObject({ action: NEXT, verdict: "STACK_FLOW" });
    map.update(key, row);
    expect(outside.fromPod(packet)).toMatchObject(repeated);
    // Another pod's now: the name was given away.
    map.update(key, rows.encode({ ...rows.decode(row), pod: Uint8Array.of(172, 7, 21, 3) }));
    expect(outside.fromPod(packet)).toMatchObject({ action: NEXT, verdict: "UNRELATED" });
    map.update(key, row);
    expect(outside.fromPod(packet)).toMatchObject(repeated);
    map.delete(key);
    expect(outside.fromPod(packet)).toMatchObject({ action: NEXT, verdict: "UNRELATED" });
  });

  test("that sends a packet too large for the way leaves it to the stack, which answers", () => {
    const sized = (bytes: number) => ({
      ...packet,
      body: { udp: [5000, 53], data: new Uint8Array(bytes - 28) } as const,
    });
    open(packet);
    expect(outside.fromPod(sized(UPLINK_MTU))).toMatchObject(repeated);
    expect(outside.fromPod(sized(UPLINK_MTU + 1))).toMatchObject({ action: NEXT });
    expect(outside.fromPod(sized(UPLINK_MTU))).toMatchObject(repeated);
  });

  test("begins on the stack, also under ports that are known", () => {
    const flow: Packet4 = { ...packet, body: { tcp: [6000, 80] } };
    open(tcp(flow, SYN));
    expect(outside.fromPod(tcp(flow, ACK))).toMatchObject(repeated);
    expect(outside.fromPod(tcp(flow, SYN))).toMatchObject({ action: NEXT });
  });

  test("asks for a way of its own for another type of service", () => {
    open(packet);
    expect(outside.fromPod(packet)).toMatchObject(repeated);
    sh("ip rule add tos 0x10 blackhole");
    try {
      expect(outside.fromPod(ip4({ ...packet, tos: 0x10 }))).toMatchObject({ action: NEXT });
    } finally {
      sh("ip rule del tos 0x10 blackhole");
    }
  });
});
