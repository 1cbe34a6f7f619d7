/** Events: only while somebody watches, with the packet as it was, and no more of them than a processor may report. */
import { afterAll, beforeAll, expect, test } from "vitest";
import { codec } from "../../loader/codec.ts";
import { RingBuffer } from "../../loader/ring.ts";
import * as abi from "../../src/abi/twill.gen.ts";
import { until } from "../process.ts";
import { frame, ip4, VXLAN_PORT } from "./packets.ts";
import { GATEWAY_MAC, LO, LO_MAC, Node, OTHER_MAC, POD, TUNNEL } from "./programs.ts";

const { EVENT_BYTES } = abi.Limit;
const FIRST = new Uint8Array(4);
const watches = codec(abi.watchLayout);
const budgets = codec(abi.budgetLayout);
const events = codec(abi.eventLayout);

/** What a pod sends to the tunnel port of a node, which is always dropped. */
const dropped = (size: number) =>
  frame(
    GATEWAY_MAC,
    POD.mac,
    ip4({
      source: POD.address,
      destination: TUNNEL.address,
      body: { udp: [5, VXLAN_PORT], data: Buffer.alloc(size, 0x5a) },
    }),
  );

let node: Node;
let ring: RingBuffer;
const seen: abi.Event[] = [];
beforeAll(() => {
  node = Node.load();
  ring = new RingBuffer(node.object.map("events"), (record) => seen.push(events.decode(record)));
});
afterAll(() => {
  ring.close();
  node.close();
});

const watchUntil = (until_ns: bigint): void =>
  node.object.map("watch").update(FIRST, watches.encode({ until_ns }));
const watch = (): void => watchUntil(process.hrtime.bigint() + 3_600_000_000_000n);
const watched = (): bigint =>
  watches.decode(node.object.map("watch").lookup(FIRST) ?? new Uint8Array(8)).until_ns;
const suppressed = (): number =>
  (node.object.map("event_budget").lookupPerCpu(FIRST) ?? []).reduce(
    (sum, bytes) => sum + Number(budgets.decode(bytes).suppressed),
    0,
  );

test("nothing is told while nobody watches, and a reader that is gone is forgotten", async () => {
  node.run("from_pod", dropped(10));
  watchUntil(1n);
  node.run("from_pod", dropped(10));
  expect(watched()).toBe(0n);
  watch();
  node.run("from_pod", dropped(11));
  await until("an event", () => seen.length > 0);
  expect(seen.map(({ length }) => length)).toEqual([14 + 28 + 11]);
});

test("a drop is told with the packet, cut at what an event holds", async () => {
  watch();
  seen.length = 0;
  const packets = [dropped(0), dropped(1300)];
  for (const packet of packets) node.run("from_pod", packet);
  await until("both events", () => seen.length === 2);
  expect(seen).toMatchObject(
    packets.map((packet) => ({
      hook: "HOOK_FROM_POD",
      verdict: "VERDICT_DROP_POD_TUNNEL",
      ifindex: LO,
      length: packet.length,
      captured: Math.min(packet.length, EVENT_BYTES),
    })),
  );
  for (const [index, packet] of packets.entries()) {
    const captured = Math.min(packet.length, EVENT_BYTES);
    expect(Buffer.from(seen[index]?.bytes ?? []).subarray(0, captured)).toEqual(packet.subarray(0, captured));
  }
});

test("a flow that is put on the stack is told once", async () => {
  watch();
  seen.length = 0;
  const packet = frame(
    TUNNEL.mac,
    OTHER_MAC,
    ip4({ source: POD.address, destination: TUNNEL.pod, body: { udp: [4711, 53] } }),
  );
  for (let i = 0; i < 3; i++) node.run("to_overlay", packet);
  node.run("from_pod", dropped(1));
  await until("the events", () => seen.some(({ hook }) => hook === "HOOK_FROM_POD"));
  expect(seen.map(({ hook, verdict }) => [hook, verdict])).toEqual([
    ["HOOK_TO_OVERLAY", "VERDICT_STACK_FLOW"],
    ["HOOK_FROM_POD", "VERDICT_DROP_POD_TUNNEL"],
  ]);
});

test("packets that are forwarded, held or left alone are not told", async () => {
  watch();
  seen.length = 0;
  const to = (destination: string) => ip4({ source: POD.address, destination, body: { udp: [1, 2] } });
  for (const destination of [TUNNEL.pod, "172.7.99.1", "10.9.9.9"])
    node.run("from_pod", frame(GATEWAY_MAC, POD.mac, to(destination)));
  node.run("from_net", frame(LO_MAC, OTHER_MAC, to("10.4.7.21")));
  node.run("from_pod", dropped(2));
  await until("the last event", () => seen.length > 0);
  expect(seen.map(({ verdict }) => verdict)).toEqual(["VERDICT_DROP_POD_TUNNEL"]);
});

test("a flood is told in part, and every packet of it is accounted for", async () => {
  watch();
  seen.length = 0;
  const before = suppressed();
  const packet = dropped(3);
  const count = 20_000;
  node.object.program("test_from_pod").testRun({ data: packet, repeat: count, dataOutSize: 0 });
  await until("all of them", () => seen.length + suppressed() - before === count);
  expect(suppressed() - before).toBeGreaterThan(0);
  expect(seen.length).toBeGreaterThan(0);
});
