// The bytes of rtnetlink without a kernel: nothing that arrives, however cut or garbled, may be read past its
// end or end in anything but a row, nothing, or MalformedMessage.
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import type { Write } from "../../src/core/host.ts";
import {
  decodeAck,
  decodeEvent,
  MalformedMessage,
  messages,
  NLM_F,
  NLMSG_DONE,
  NLMSG_ERROR,
  RTM,
} from "../../src/edge/netlink-codec.ts";
import { describeWrite, encodeDump, encodeWrite, Writer } from "../../src/edge/netlink-request.ts";

const ipv4 = fc.integer({ min: 0, max: 0xffffffff });
const index = fc.integer({ min: 1, max: 0x7fffffff });
const mac = fc
  .array(fc.integer({ min: 0, max: 255 }), { minLength: 6, maxLength: 6 })
  .map((bytes) => bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(":"));

function encoded(...writes: Write[]): Buffer {
  const bytes = Buffer.alloc(4096);
  const writer = new Writer(bytes);
  for (const [i, write] of writes.entries()) encodeWrite(writer, i + 1, write);
  return bytes.subarray(0, writer.length);
}

/** What a datagram decodes to; undefined if it was rejected as malformed. */
function decoded(bytes: Buffer): unknown[] | undefined {
  try {
    return [...messages(bytes, bytes.length)].map((message) =>
      message.type === NLMSG_ERROR || message.type === NLMSG_DONE
        ? decodeAck(bytes, message)
        : decodeEvent(bytes, message),
    );
  } catch (error) {
    if (error instanceof MalformedMessage) return undefined;
    throw error;
  }
}

/** One message of each kind, as it would come back from the kernel. */
function samples(): Buffer {
  return encoded(
    {
      write: "createVxlan",
      name: "flannel.1",
      vni: 1,
      parentIndex: 2,
      localIp: 0xc0000201,
      port: 8472,
      learning: false,
      gbp: true,
      mac: "0a:00:00:00:00:01",
      mtu: 1450,
    },
    { write: "addAddress", index: 3, address: { address: 0x0a050000, length: 32 } },
    {
      write: "replaceRoute",
      destination: { address: 0x0a050100, length: 24 },
      gateway: 0x0a050100,
      outIndex: 3,
      onlink: true,
      mtu: 1400,
      table: 1000,
    },
    { write: "replaceRoute", destination: { address: 0x0a050200, length: 24 }, nexthopId: 0x0a050218 },
    // Of one that is made we want to know nothing.
    { write: "replaceNexthop", id: 0x0a050218, gateway: 0x0a050200, outIndex: 3, protocol: 84 },
    { write: "deleteNexthop", id: 0x0a050218 },
    { write: "replaceNeighbour", index: 3, address: 1, mac: "0a:00:00:00:00:02", permanent: true },

    { write: "replaceFdb", index: 3, mac: "0a:00:00:00:00:02", dst: 0xc0000202 },
  );
}

describe("rows survive the trip through bytes", () => {
  it("links", () => {
    expect(decoded(samples())?.[0]).toMatchObject({
      kind: "link",
      change: "new",
      row: {
        name: "flannel.1",
        kind: "vxlan",
        mac: "0a:00:00:00:00:01",
        mtu: 1450,
        parentIndex: 2,
        vxlan: { vni: 1, localIp: 0xc0000201, dstPort: 8472, learning: false, gbp: true },
      },
    });
  });

  it("addresses", () => {
    fc.assert(
      fc.property(index, ipv4, fc.integer({ min: 0, max: 32 }), (on, address, length) => {
        expect(
          decoded(encoded({ write: "addAddress", index: on, address: { address, length } })),
        ).toMatchObject([{ kind: "address", row: { index: on, address, prefixLength: length } }]);
      }),
    );
  });

  it("routes, with the bits beyond the prefix cleared", () => {
    const number = fc.integer({ min: 1, max: 0xffffffff });
    const shape = fc.record({
      gateway: fc.option(ipv4, { nil: undefined }),
      outIndex: fc.option(index, { nil: undefined }),
      source: fc.option(ipv4, { nil: undefined }),
      mtu: fc.option(number, { nil: undefined }),
      table: number,
      metric: number,
      onlink: fc.boolean(),
      protocol: fc.integer({ min: 1, max: 255 }),
      scope: fc.integer({ min: 0, max: 255 }),
    });
    fc.assert(
      fc.property(shape, ipv4, (route, address) => {
        const [event] =
          decoded(encoded({ write: "replaceRoute", destination: { address, length: 24 }, ...route })) ?? [];
        expect(event).toMatchObject({
          kind: "route",
          change: "new",
          row: { ...route, destination: { address: address - (address % 256), length: 24 } },
        });
      }),
    );
  });

  it("routes by nexthops, and the end of one", () => {
    const events = decoded(samples()) ?? [];
    expect(events).toContainEqual(
      expect.objectContaining({ kind: "route", row: expect.objectContaining({ nexthopId: 0x0a050218 }) }),
    );
    expect(events).toContainEqual({ kind: "nexthop", change: "delete", row: { id: 0x0a050218 } });
  });

  it("neighbours and FDB entries", () => {
    fc.assert(
      fc.property(index, ipv4, mac, fc.boolean(), (on, address, hardware, permanent) => {
        const write = { index: on, address, mac: hardware, permanent };
        expect(
          decoded(
            encoded(
              { write: "replaceNeighbour", ...write },
              { write: "deleteNeighbour", ...write },
              { write: "replaceFdb", index: on, mac: hardware, dst: address },
              { write: "deleteFdb", index: on, mac: hardware, dst: address },
            ),
          ),
        ).toMatchObject([
          { kind: "neighbour", change: "new", row: write },
          { kind: "neighbour", change: "delete", row: { index: on, address } },
          { kind: "fdb", change: "new", row: { index: on, mac: hardware, dst: address, self: true } },
          { kind: "fdb", change: "delete", row: { index: on, mac: hardware, dst: address, self: true } },
        ]);
      }),
    );
  });
});

describe("what does not fit is refused", () => {
  it("a datagram cut anywhere but between messages", () => {
    const whole = samples();
    const ends = new Set<number>([0]);
    for (const message of messages(whole, whole.length)) ends.add((message.end + 3) & ~3);
    for (let length = 0; length < whole.length; length++) {
      const rows = decoded(Buffer.from(whole.subarray(0, length)));
      expect(rows !== undefined, `cut to ${length}`).toBe(ends.has(length));
    }
    expect(decoded(whole)?.filter((event) => event !== undefined).length).toBe(7);
  });

  it("a datagram longer than the buffer it was read into", () => {
    expect(() => [...messages(Buffer.alloc(16), 17)]).toThrow(MalformedMessage);
  });

  it("garbage of any kind", () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 300 }), (bytes) => {
        decoded(Buffer.from(bytes));
      }),
      { numRuns: 2000 },
    );
  });

  it("garbage behind a valid header", () => {
    const types = fc.constantFrom(NLMSG_ERROR, NLMSG_DONE, ...Object.values(RTM));
    fc.assert(
      fc.property(
        types,
        fc.integer({ min: 0, max: 0xffff }),
        fc.uint8Array({ maxLength: 200 }),
        (type, flags, body) => {
          const bytes = Buffer.alloc(16 + body.length);
          bytes.writeUInt32LE(bytes.length, 0);
          bytes.writeUInt16LE(type, 4);
          bytes.writeUInt16LE(flags, 6);
          bytes.set(body, 16);
          // The family decides how far the decoder goes: let it go on.
          if (body.length > 0) bytes[16] = [0, 2, 7][(body[0] ?? 0) % 3] ?? 0;
          decoded(bytes);
        },
      ),
      { numRuns: 5000 },
    );
  });

  it("valid messages with some bytes flipped", () => {
    const flips = fc.array(fc.tuple(fc.nat(), fc.integer({ min: 0, max: 255 })), {
      minLength: 1,
      maxLength: 6,
    });
    fc.assert(
      fc.property(flips, (changes) => {
        const bytes = Buffer.from(samples());
        for (const [at, value] of changes) bytes[at % bytes.length] = value;
        decoded(bytes);
      }),
      { numRuns: 5000 },
    );
  });

  it("a value that its field cannot hold, without a trace in the batch", () => {
    const bytes = Buffer.alloc(4096);
    const writer = new Writer(bytes);
    const bad: Write[] = [
      { write: "replaceFdb", index: 1, mac: "0a:00:00:00:00", dst: 1 },
      { write: "replaceFdb", index: 1, mac: "0a:00:00:00:00:01", dst: -1 },
      { write: "replaceNeighbour", index: Number.NaN, address: 1, mac: "0a:00:00:00:00:01", permanent: true },
      { write: "addAddress", index: 1.5, address: { address: 1, length: 32 } },
      { write: "replaceRoute", destination: { address: 2 ** 32, length: 24 }, gateway: 2 ** 32 },
      { write: "setLink", index: 1, mtu: -5 },
      { write: "replaceNexthop", id: 2 ** 32, gateway: 1, outIndex: 1, protocol: 84 },
      { write: "deleteNexthop", id: -1 },
    ];
    for (const write of bad) {
      expect(() => encodeWrite(writer, 1, write), describeWrite(write)).toThrow(RangeError);
      expect(writer.length).toBe(0);
    }
  });
});

describe("verdicts", () => {
  function verdict(type: number, flags: number, payload: Buffer): ReturnType<typeof decodeAck> {
    const bytes = Buffer.alloc(16 + payload.length);
    bytes.writeUInt32LE(bytes.length, 0);
    bytes.writeUInt16LE(type, 4);
    bytes.writeUInt16LE(flags, 6);
    payload.copy(bytes, 16);
    const [message] = [...messages(bytes, bytes.length)];
    if (!message) throw new Error("no message");
    return decodeAck(bytes, message);
  }
  const text = Buffer.from("\x0c\0\x01\0because\0");
  const status = (errno: number) => {
    const bytes = Buffer.alloc(4);
    bytes.writeInt32LE(-errno);
    return bytes;
  };

  it("finds the kernel's words behind a capped, a full and a DONE answer", () => {
    const header = Buffer.alloc(16);
    header.writeUInt32LE(28);
    const full = Buffer.concat([status(17), header, Buffer.alloc(12), text]);
    const capped = Buffer.concat([status(17), header, text]);
    const done = Buffer.concat([status(17), text]);
    const expected = { errno: 17, detail: "because" };
    expect(verdict(NLMSG_ERROR, NLM_F.ACK_TLVS, full)).toEqual(expected);
    expect(verdict(NLMSG_ERROR, NLM_F.ACK_TLVS | NLM_F.CAPPED, capped)).toEqual(expected);
    expect(verdict(NLMSG_DONE, NLM_F.ACK_TLVS, done)).toEqual(expected);
    expect(verdict(NLMSG_ERROR, 0, full)).toEqual({ errno: 17, detail: "" });
    expect(verdict(NLMSG_DONE, 0, status(0)).errno).toBe(0);
  });
});

it("a route without a gateway whose next hop is IPv6 is not taken for a direct one", () => {
  const bytes = Buffer.alloc(16 + 12 + 20);
  bytes.writeUInt32LE(bytes.length, 0);
  bytes.writeUInt16LE(RTM.NEWROUTE, 4);
  bytes[16] = 2;
  bytes.writeUInt16LE(20, 28);
  bytes.writeUInt16LE(18, 30);
  expect(decoded(bytes)).toMatchObject([{ row: { gateway: undefined, viaIpv6: true } }]);
});

it("dump requests are single well-formed messages", () => {
  for (const table of ["links", "addresses", "routes", "neighbours", "fdb"] as const) {
    const bytes = Buffer.alloc(512);
    const writer = new Writer(bytes);
    encodeDump(writer, 7, table, 254);
    const [message, ...more] = [...messages(bytes, writer.length)];
    expect(more).toEqual([]);
    expect(message).toMatchObject({ sequence: 7, flags: NLM_F.DUMP | NLM_F.REQUEST, end: writer.length });
  }
});
