// The wire format of etcd's messages, by bytes written down from the specification of Protocol Buffers.
import fc from "fast-check";
import { expect, test } from "vitest";
import {
  COMPARE_TARGET,
  decodeMessage,
  encodeMessage,
  LEASE_REQUEST,
  NOTHING,
  RANGE_RESPONSE,
  type RangeResponse,
  TXN_REQUEST,
  WATCH_RESPONSE,
  type WatchResponse,
} from "../../src/edge/etcd-codec.ts";

const bytes = (hex: string): Buffer => Buffer.from(hex.replaceAll(" ", ""), "hex");

test.each([
  [0n, "08 00"],
  [150n, "08 96 01"],
  [2n ** 49n - 1n, "08 ff ff ff ff ff ff 7f"],
  [2n ** 49n, "08 80 80 80 80 80 80 80 01"],
  [2n ** 63n - 1n, "08 ff ff ff ff ff ff ff ff 7f"],
  [-1n, "08 ff ff ff ff ff ff ff ff ff 01"],
])("%d is written as %s", (ID, hex) => {
  expect(encodeMessage(LEASE_REQUEST, { ID })).toEqual(bytes(hex));
  expect(decodeMessage(LEASE_REQUEST, bytes(hex))).toEqual({ ID });
});

test("every 64-bit integer comes back", () => {
  fc.assert(
    fc.property(fc.bigInt({ min: -(2n ** 63n), max: 2n ** 63n - 1n }), (ID) => {
      expect(decodeMessage(LEASE_REQUEST, encodeMessage(LEASE_REQUEST, { ID }))).toEqual({ ID });
    }),
  );
});

test("a transaction has its parts in order, and what is not given is left out", () => {
  const key = Buffer.from("k");
  const request = {
    compare: [{ target: COMPARE_TARGET.version, key, version: 0n }],
    success: [{ request_put: { key, value: Buffer.from("v"), lease: 5n, prev_kv: true } }],
    failure: [{ request_range: { key } }],
  };
  expect(encodeMessage(TXN_REQUEST, request)).toEqual(
    bytes("0a 07 10 00 1a 01 6b 20 00  12 0c 12 0a 0a 01 6b 12 01 76 18 05 20 01  1a 05 0a 03 0a 01 6b"),
  );
});

test("what does not come is empty, and what is not known is skipped", () => {
  const empty = decodeMessage<RangeResponse>(RANGE_RESPONSE, bytes(""));
  expect(empty).toEqual({ header: undefined, kvs: [], more: false });
  // header { member_id 1 as a varint, revision 7 }, an unknown fixed64, fixed32 and string, count 3
  const some = bytes(
    "0a 04 10 01 18 07  39 00 00 00 00 00 00 00 00  3d 00 00 00 00  3a 03 ff ff ff  20 03  12 03 0a 01 6b  12 00",
  );
  expect(decodeMessage<RangeResponse>(RANGE_RESPONSE, some)).toEqual({
    header: { cluster_id: 0n, revision: 7n },
    kvs: [
      { key: Buffer.from("k"), mod_revision: 0n, value: Buffer.alloc(0), lease: 0n },
      { key: Buffer.alloc(0), mod_revision: 0n, value: Buffer.alloc(0), lease: 0n },
    ],
    more: false,
  });
  expect(decodeMessage(NOTHING, some)).toEqual({});
});

test("a deletion as a watch tells of it", () => {
  const message = bytes("0a 02 18 09  5a 09 08 01 12 05 0a 01 6b 18 09");
  const { events, canceled, header } = decodeMessage<WatchResponse>(WATCH_RESPONSE, message);
  expect([header.revision, canceled]).toEqual([9n, false]);
  expect(events).toEqual([
    { type: 1n, kv: { key: Buffer.from("k"), mod_revision: 9n, value: Buffer.alloc(0), lease: 0n } },
  ]);
});

test("bytes that are no message are refused, however they are cut or changed", () => {
  const whole = bytes("0a 04 10 01 18 07  12 0a 0a 01 6b 18 09 2a 01 76 30 05  18 01");
  expect(decodeMessage<RangeResponse>(RANGE_RESPONSE, whole).kvs).toHaveLength(1);
  for (const hex of [
    "0a",
    "0a 05 10 01 18 07",
    "12 02 0a 05",
    "08",
    "0a ff ff ff ff 0f",
    "08 01",
    "0b",
    "1a 00",
  ])
    expect(() => decodeMessage(RANGE_RESPONSE, bytes(hex)), hex).toThrow(RangeError);
  expect(() => decodeMessage(LEASE_REQUEST, bytes(`08 ${"ff ".repeat(10)}01`))).toThrow("too long");
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 60 }), (noise) => {
      try {
        decodeMessage(RANGE_RESPONSE, Buffer.from(noise));
      } catch (error) {
        expect(error).toBeInstanceOf(RangeError);
      }
    }),
  );
});
