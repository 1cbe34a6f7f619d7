// Records from a BPF program to a JS function, through the event loop.
import { afterAll, beforeAll, expect, it } from "vitest";
import { type BpfObject, openObject, RingBuffer } from "../../loader/index.ts";
import { build, frame } from "./lab.ts";

const SOURCE = `
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 65536); } events SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1);
  __type(key, __u32); __type(value, __u32); } sent SEC(".maps");
SEC("tc") int tell(struct __sk_buff *skb) {
  __u32 zero = 0, *count = bpf_map_lookup_elem(&sent, &zero);
  if (!count) return 0;
  __u32 record[3] = { *count, skb->len, 0xfeed };
  if (bpf_ringbuf_output(&events, record, sizeof(record), 0)) return 1;
  *count += 1;
  return 0;
}
`;

let object: BpfObject;

beforeAll(() => {
  object = openObject(build("ring", SOURCE));
  object.load();
});

afterAll(() => object.close());

const numberOf = (record: Uint8Array) => Buffer.from(record).readUInt32LE();
const tell = (times: number) => object.program("tell").testRun({ data: frame(80), repeat: times });
const sent = () => numberOf(object.map("sent").entries()[0]?.[1] ?? new Uint8Array(4));

it("delivers records in order, a bounded number in each turn of the loop", async () => {
  const records: Uint8Array[] = [];
  let turns = 0;
  const last = sent() + 1000;
  const all = new Promise<void>((resolve) => {
    let inTurn = 0;
    const ring = new RingBuffer(object.map("events"), (record) => {
      if (inTurn++ === 0) {
        turns++;
        // Microtasks run when the turn is over, setImmediate after it.
        setImmediate(() => {
          inTurn = 0;
        });
      }
      records.push(record);
      if (records.length === 1000) {
        ring.close();
        resolve();
      }
    });
  });
  tell(1000);
  expect(records).toHaveLength(0);
  await all;
  expect(sent()).toBe(last);
  expect(records.map(numberOf)).toEqual(Array.from({ length: 1000 }, (_, i) => last - 1000 + i));
  expect([...new Uint32Array(Uint8Array.from(records[0] ?? []).buffer)].slice(1)).toEqual([80, 0xfeed]);
  expect(turns).toBeGreaterThanOrEqual(4);
});

it("stops at once when closed from within, leaving the rest in the ring", async () => {
  const first = sent();
  tell(10);
  const seen: number[] = [];
  await new Promise<void>((resolve) => {
    const ring = new RingBuffer(object.map("events"), (record) => {
      seen.push(numberOf(record));
      if (seen.length === 3) {
        ring.close();
        ring.close();
        resolve();
      }
    });
  });
  expect(seen).toEqual([first, first + 1, first + 2]);
  await new Promise<void>((resolve) => {
    const ring = new RingBuffer(object.map("events"), (record) => {
      seen.push(numberOf(record));
      if (seen.length === 10) {
        ring.close();
        resolve();
      }
    });
  });
  expect(seen).toEqual(Array.from({ length: 10 }, (_, i) => first + i));
});

it("survives a full ring: the program is told, and what fitted arrives", async () => {
  const first = sent();
  // 65536 bytes hold 2730 records of 12 bytes with headers of 8, rounded to 24.
  expect(tell(5000).retval).toBe(1);
  const fitted = sent() - first;
  expect(fitted).toBeGreaterThan(2000);
  expect(fitted).toBeLessThan(5000);
  let count = 0;
  await new Promise<void>((resolve) => {
    const ring = new RingBuffer(object.map("events"), () => {
      count++;
      if (count === fitted) {
        ring.close();
        resolve();
      }
    });
  });
  expect(count).toBe(fitted);
});

it("refuses a map of another type", () => {
  expect(() => new RingBuffer(object.map("sent"), () => undefined)).toThrow(
    /Cannot read ring buffer sent: .*EINVAL/,
  );
});
