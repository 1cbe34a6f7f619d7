import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { describe, expect, expectTypeOf, test } from "vitest";
import { type Layout, readBtf } from "../../loader/btf.ts";
import { type Codec, codec } from "../../loader/codec.ts";
import { objectOf } from "./program.ts";

const STRUCT = `
enum reach { TUNNEL, DIRECT = 7 };
struct hop { __be32 address; __be16 port; __u16 weight; };
struct peer {
  __u64 bytes; __s64 balance; __be64 id; __u32 mtu; __s32 delta; __be32 ip; enum reach reach;
  __be16 port; __s16 low; __u8 mac[6]; __u8 on; __s8 bias; __u32 lengths[3]; struct hop hops[2];
  _Bool yes; __u8 pad[7];
};
`;

const peer = {
  bytes: 0x0102030405060708n,
  balance: -2n,
  id: 0x1122334455667788n,
  mtu: 4000000001,
  delta: -3,
  ip: 0x0a040715,
  reach: "DIRECT",
  port: 8472,
  low: -32768,
  mac: Uint8Array.of(2, 0, 0, 0xaa, 0xbb, 0xff),
  on: 255,
  bias: -128,
  lengths: [24, 16, 0],
  hops: [
    { address: 0xc0a80001, port: 53, weight: 65535 },
    { address: 1, port: 65535, weight: 256 },
  ],
  yes: true,
};

/** The same value, written by a C program. */
function bytesByHost(): Uint8Array {
  const dir = mkdtempSync(join(tmpdir(), "libbpf-ts-host-"));
  try {
    writeFileSync(
      join(dir, "peer.c"),
      `#include <stdio.h>\n#include <arpa/inet.h>\n#include <endian.h>\n#include <linux/types.h>\n${STRUCT}
      int main(void) {
        struct peer p = { .bytes = 0x0102030405060708, .balance = -2, .id = htobe64(0x1122334455667788), .mtu = 4000000001u,
          .delta = -3, .ip = htonl(0x0a040715), .reach = DIRECT, .port = htons(8472), .low = -32768,
          .mac = { 2, 0, 0, 0xaa, 0xbb, 0xff }, .on = 255, .bias = -128, .lengths = { 24, 16, 0 },
          .hops = { { htonl(0xc0a80001), htons(53), 65535 }, { htonl(1), htons(65535), 256 } }, .yes = 1 };
        return fwrite(&p, sizeof p, 1, stdout) == 1 ? 0 : 1;
      }`,
    );
    execFileSync("cc", ["-o", join(dir, "peer"), join(dir, "peer.c")]);
    return new Uint8Array(execFileSync(join(dir, "peer")));
  } finally {
    rmSync(dir, { recursive: true, force: true });
  }
}

describe("a struct of every kind", () => {
  const layout = readBtf(objectOf(`${STRUCT} const struct peer *unused_peer;`)).struct("peer");
  if (layout === undefined) throw new Error("the object has no struct peer");
  const peers = codec<Layout>(layout) as Codec<typeof peer>;
  const bytes = bytesByHost();

  test("is the bytes that a C program writes", () => {
    expect(peers.size).toBe(bytes.length);
    expect(peers.encode(peer)).toEqual(bytes);
    expect(peers.decode(bytes)).toEqual(peer);
  });

  test("is read from a Buffer into memory of its own", () => {
    const buffer = Buffer.from(bytes);
    const { mac } = peers.decode(buffer);
    buffer.fill(0);
    expect(mac).toEqual(peer.mac);
    expect(mac.constructor).toBe(Uint8Array);
  });

  test("padding is written as zeros over whatever was there, and has no field", () => {
    const dirty = new Uint8Array(bytes.length).fill(0xee);
    expect(peers.encode(peer, dirty)).toEqual(bytes);
    expect(peers.decode(bytes)).not.toHaveProperty("pad");
  });

  test.each<[string, object, RegExp]>([
    [
      "a number too large",
      { port: 65536 },
      /^peer\.port: wants an integer from 0 to 65535, got 65536 \(number\)/,
    ],
    ["a number too small", { bias: -129 }, /^peer\.bias: wants an integer from -128 to 127/],
    ["a fraction", { mtu: 1.5 }, /^peer\.mtu: wants an integer/],
    [
      "a bigint too large",
      { bytes: 2n ** 64n },
      /^peer\.bytes: wants a bigint from 0 to 18446744073709551615/,
    ],
    ["a number for 64 bits", { bytes: 1 }, /^peer\.bytes: wants a bigint .* got 1 \(number\)/],
    ["a bigint for 32 bits", { mtu: 1n }, /^peer\.mtu: wants an integer .* got 1 \(bigint\)/],
    ["bytes of another length", { mac: new Uint8Array(4) }, /^peer\.mac: wants 6 bytes, got 4 bytes/],
    ["a missing field", { mac: undefined }, /^peer\.mac: wants 6 bytes, got nothing/],
    [
      "an array of another length",
      { lengths: [1] },
      /^peer\.lengths: wants an array of 3, got an array of 1/,
    ],
    ["an element", { lengths: [1, 2, -3] }, /^peer\.lengths\[2\]: wants an integer/],
    [
      "a field deep inside",
      { hops: [peer.hops[0], { address: 1, weight: 1 }] },
      /^peer\.hops\[1\]\.port: .* got nothing/,
    ],
    ["not an object", { hops: [null, null] }, /^peer\.hops\[0\]: wants an object, got null/],
    [
      "a name the enum lacks",
      { reach: "SIDEWAYS" },
      /^peer\.reach: wants a name of enum reach, got "SIDEWAYS"/,
    ],
    ["a name every object has", { reach: "toString" }, /^peer\.reach: wants a name of enum reach/],
    ["not a boolean", { yes: 1 }, /^peer\.yes: wants true or false/],
  ])("refuses %s", (_, change, message) => {
    expect(() => peers.encode({ ...peer, ...change })).toThrow(message);
  });

  test("refuses a number for which the enum has no name", () => {
    const at = layout.fields.find(({ name }) => name === "reach")?.offset ?? 0;
    const odd = Uint8Array.from(bytes, (byte, index) => (index === at ? 9 : byte));
    expect(() => peers.decode(odd)).toThrow("peer.reach: holds 9, for which enum reach has no name");
  });

  test.each([[-1], [1], [1000]])("refuses to leave the buffer, at offset %i", (offset) => {
    expect(() => peers.decode(bytes, offset)).toThrow(
      `peer: takes ${bytes.length} bytes, more than there are`,
    );
    expect(() => peers.encode(peer, new Uint8Array(bytes.length), offset)).toThrow("peer: takes");
  });
});

describe("layouts in general", () => {
  const bits = { u8: 8, u16: 16, u32: 32, i8: 8, i16: 16, i32: 32, be16: 16, be32: 32 } as const;
  const wide = { u64: 64, i64: 64, be64: 64 } as const;

  interface Case {
    readonly layout: Layout;
    readonly value: fc.Arbitrary<unknown>;
  }

  const scalar: fc.Arbitrary<Case> = fc.oneof(
    fc.constantFrom(...(Object.keys(bits) as (keyof typeof bits)[])).map((kind) => {
      const [signed, top] = [kind.startsWith("i"), 2 ** bits[kind]];
      const value = signed
        ? fc.integer({ min: -top / 2, max: top / 2 - 1 })
        : fc.integer({ min: 0, max: top - 1 });
      return { layout: { kind, size: bits[kind] / 8 }, value };
    }),
    fc.constantFrom(...(Object.keys(wide) as (keyof typeof wide)[])).map((kind) => {
      const [least, most] = kind === "i64" ? [-(2n ** 63n), 2n ** 63n - 1n] : [0n, 2n ** 64n - 1n];
      return { layout: { kind, size: 8 }, value: fc.bigInt(least, most) };
    }),
    fc.constant<Case>({ layout: { kind: "bool", size: 1 }, value: fc.boolean() }),
    fc.integer({ min: 1, max: 20 }).map((size): Case => {
      return { layout: { kind: "bytes", size }, value: fc.uint8Array({ minLength: size, maxLength: size }) };
    }),
    fc.constantFrom(1, 2, 4).chain((size) =>
      fc
        .uniqueArray(fc.integer({ min: 0, max: 127 }), { minLength: 1, maxLength: 8 })
        .map((numbers): Case => {
          const values = Object.fromEntries(numbers.map((number) => [`NAME_${number}`, number]));
          const value = fc.constantFrom(...Object.keys(values));
          return { layout: { kind: "enum", size, name: "e", values }, value };
        }),
    ),
  );

  const { tree } = fc.letrec<{ tree: Case; array: Case; struct: Case }>((tie) => ({
    tree: fc.oneof({ depthSize: "small", withCrossShrink: true }, scalar, tie("array"), tie("struct")),
    array: fc.tuple(tie("tree"), fc.integer({ min: 1, max: 4 })).map(([{ layout, value }, count]): Case => {
      const size = layout.size * count;
      return {
        layout: { kind: "array", size, count, element: layout },
        value: fc.array(value, { minLength: count, maxLength: count }),
      };
    }),
    struct: fc.array(tie("tree"), { minLength: 1, maxLength: 5 }).map((members): Case => {
      let size = 0;
      const fields = members.map(({ layout }, index) => {
        const offset = size;
        size += layout.size;
        return { name: `f${index}`, offset, layout };
      });
      const value = fc.record(
        Object.fromEntries(members.map((member, index) => [`f${index}`, member.value])),
      );
      return {
        layout: { kind: "struct", size, name: "s", fields },
        value: value.map((record) => ({ ...record })),
      };
    }),
  }));

  const cases = tree.chain(({ layout, value }) => fc.tuple(fc.constant(layout), value));

  test("decode gives back what encode took, at any offset, and nothing around it changes", () => {
    fc.assert(
      fc.property(cases, fc.nat(9), fc.nat(9), ([layout, value], before, after) => {
        const { encode, decode, size } = codec<Layout>(layout) as Codec<unknown>;
        const target = new Uint8Array(before + size + after).fill(0xa5);
        expect(encode(value, target, before)).toBe(target);
        expect(decode(target, before)).toEqual(value);
        expect(target.subarray(before, before + size)).toEqual(encode(value));
        expect([...target.subarray(0, before), ...target.subarray(before + size)]).toEqual(
          new Array(before + after).fill(0xa5),
        );
      }),
    );
  });

  test("equal values are equal bytes, and different values are not", () => {
    const pairs = tree.chain(({ layout, value }) => fc.tuple(fc.constant(layout), value, value));
    fc.assert(
      fc.property(pairs, ([layout, one, other]) => {
        const { encode, decode } = codec<Layout>(layout) as Codec<unknown>;
        const same = Buffer.compare(encode(one), encode(other)) === 0;
        expect(same).toBe(
          JSON.stringify(decode(encode(one)), text) === JSON.stringify(decode(encode(other)), text),
        );
      }),
    );
  });

  const text = (_: string, value: unknown) => (typeof value === "bigint" ? `${value}n` : value);
});

test("of two names for a number the first declared is read, and both are written", () => {
  const { encode, decode } = codec({ kind: "enum", size: 4, name: "e", values: { A: 1, LAST: 1 } });
  expect(decode(encode("LAST"))).toBe("A");
  expect(encode("LAST")).toEqual(encode("A"));
});

test("negative enumerators", () => {
  const { encode, decode } = codec({ kind: "enum", size: 4, name: "e", values: { MINUS: -1, ONE: 1 } });
  expect(encode("MINUS")).toEqual(Uint8Array.of(255, 255, 255, 255));
  expect(decode(encode("MINUS"))).toBe("MINUS");
});

test("the type of the values follows from a literal layout", () => {
  const literal = codec({
    kind: "struct",
    size: 24,
    name: "s",
    fields: [
      { name: "n", offset: 0, layout: { kind: "be32", size: 4 } },
      { name: "pad", offset: 4, layout: { kind: "opaque", size: 4 } },
      { name: "big", offset: 8, layout: { kind: "u64", size: 8 } },
      { name: "e", offset: 16, layout: { kind: "enum", size: 4, name: "e", values: { A: 0, B: 1 } } },
      {
        name: "mac",
        offset: 20,
        layout: { kind: "array", size: 4, count: 2, element: { kind: "bytes", size: 2 } },
      },
    ],
  });
  type Expected = {
    readonly n: number;
    readonly big: bigint;
    readonly e: "A" | "B";
    readonly mac: readonly Uint8Array[];
  };
  expectTypeOf(literal.decode).returns.toEqualTypeOf<Expected>();
  const value: Expected = { n: 1, big: 2n, e: "B", mac: [Uint8Array.of(1, 2), Uint8Array.of(3, 4)] };
  expect([...literal.encode(value)]).toEqual([
    0, 0, 0, 1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 2, 3, 4,
  ]);
});
