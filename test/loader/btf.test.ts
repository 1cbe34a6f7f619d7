import { execFileSync } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { type Btf, BtfError, readBtf, type StructLayout } from "../../loader/btf.ts";
import { objectOf } from "./program.ts";

const STRUCTS = `
enum colour { RED = 1, GREEN = 5, GREEN_ALIAS = 5 };
enum __attribute__((packed)) small { SMALL_A, SMALL_B };
typedef struct { __u32 x; __u32 y; } point_t;
struct inner { __be32 address; __be16 port; __u16 plain; };
struct outer {
  __u64 wide;
  __s64 offset;
  struct inner one;
  struct inner many[3];
  __u8 mac[6];
  __u16 half;
  char label[5];
  enum small small;
  __u8 pad[2];
  enum colour colour;
  __u8 pad1[4];
  __be64 network;
  _Bool yes;
  __s8 tiny;
  __s16 less;
  __s32 less_still;
  __u32 matrix[2][2];
  point_t point;
};
struct __attribute__((packed)) odd { __u8 a; __u32 b; __be16 c; };
`;

const PROGRAM = `${STRUCTS}
struct { __uint(type, BPF_MAP_TYPE_LPM_TRIE); __uint(map_flags, BPF_F_NO_PREALLOC); __uint(max_entries, 77);
         __type(key, struct inner); __type(value, struct outer); __uint(pinning, LIBBPF_PIN_BY_NAME); } table SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 2); __type(key, enum colour);
         __type(value, struct odd); } array SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 4096); } ring SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(key_size, 6); __uint(value_size, 12); } sizes SEC(".maps");
struct slot { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 3); __type(key, __u8[6]); __type(value, __u64); };
struct { __uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS); __uint(max_entries, 9); __type(key, __u32);
         __array(values, struct slot); } nested SEC(".maps");
const volatile __u8 first = 1;
const volatile struct inner second = {};
const volatile __be16 third = 0;
static const volatile __u64 own = 5;
__u32 written = 3;
__u64 zeroed[4];
struct event { __u64 at; enum { KIND_A = 3, KIND_B } kind; __u32 length; };
const struct event *unused_event;
SEC("tc") int program(struct __sk_buff *skb) { bpf_printk("%d", first); return third + own + written + zeroed[1]; }
char _license[] SEC("license") = "GPL";
`;

/** What the host's C compiler says about the same structs: name of the field to offset, and `sizeof`. */
function offsetsByHost(struct: string, fields: readonly string[]): { [field: string]: number } {
  const dir = mkdtempSync(join(tmpdir(), "libbpf-ts-host-"));
  try {
    const prints = fields.map((field) => `printf("\\"${field}\\": %zu,", offsetof(${struct}, ${field}));`);
    writeFileSync(
      join(dir, "offsets.c"),
      `#include <stdio.h>\n#include <stddef.h>\n#include <linux/types.h>\n${STRUCTS}
      int main(void) { printf("{"); ${prints.join("\n")} printf("\\"sizeof\\": %zu}", sizeof(${struct})); }`,
    );
    execFileSync("cc", ["-o", join(dir, "offsets"), join(dir, "offsets.c")]);
    return JSON.parse(execFileSync(join(dir, "offsets"), { encoding: "utf8" }));
  } finally {
    rmSync(dir, { recursive: true, force: true });
  }
}

function offsetsOf(layout: StructLayout | undefined): { [field: string]: number } {
  const fields = layout?.fields.map(({ name, offset }) => [name, offset] as const) ?? [];
  return { ...Object.fromEntries(fields), sizeof: layout?.size ?? -1 };
}

describe("an object compiled by clang", () => {
  const btf: Btf = readBtf(objectOf(PROGRAM));
  const kinds = (layout: StructLayout | undefined) =>
    Object.fromEntries(layout?.fields.map((field) => [field.name, field.layout.kind]) ?? []);

  test.each([["outer"], ["inner"], ["odd"]])("struct %s is where the host's compiler puts it", (name) => {
    const layout = btf.struct(name);
    const fields = layout?.fields.map((field) => field.name) ?? [];
    expect(fields.length).toBeGreaterThan(2);
    expect(offsetsOf(layout)).toEqual(offsetsByHost(`struct ${name}`, fields));
  });

  test("fields keep their meaning, byte order included", () => {
    expect(kinds(btf.struct("inner"))).toEqual({ address: "be32", port: "be16", plain: "u16" });
    expect(kinds(btf.struct("outer"))).toEqual({
      wide: "u64",
      offset: "i64",
      one: "struct",
      many: "array",
      mac: "bytes",
      half: "u16",
      label: "bytes",
      small: "enum",
      pad: "opaque",
      colour: "enum",
      pad1: "opaque",
      network: "be64",
      yes: "bool",
      tiny: "i8",
      less: "i16",
      less_still: "i32",
      matrix: "array",
      point: "struct",
    });
  });

  test("nested types are whole", () => {
    const outer = btf.struct("outer");
    const layoutOf = (name: string) => outer?.fields.find((field) => field.name === name)?.layout;
    expect(layoutOf("many")).toEqual({ kind: "array", size: 24, count: 3, element: btf.struct("inner") });
    expect(layoutOf("matrix")).toEqual({
      kind: "array",
      size: 16,
      count: 2,
      element: { kind: "array", size: 8, count: 2, element: { kind: "u32", size: 4 } },
    });
    expect(layoutOf("point")).toMatchObject({ kind: "struct", name: "point_t", size: 8 });
    expect(btf.struct("point_t")).toEqual(layoutOf("point"));
    expect(layoutOf("small")).toEqual({
      kind: "enum",
      size: 1,
      name: "small",
      values: { SMALL_A: 0, SMALL_B: 1 },
    });
  });

  test("enums and enumerators", () => {
    const colour = { kind: "enum", size: 4, name: "colour", values: { RED: 1, GREEN: 5, GREEN_ALIAS: 5 } };
    expect(btf.enum("colour")).toEqual(colour);
    expect(btf.enums()).toContainEqual(colour);
    expect(btf.constant("KIND_B")).toBe(4n);
    expect(btf.constant("KIND_C")).toBeUndefined();
    expect(btf.enum("outer")).toBeUndefined();
    expect(btf.struct("colour")).toBeUndefined();
  });

  test("maps by name, with types or only sizes", () => {
    expect(btf.maps().map(({ name, typeName }) => [name, typeName])).toEqual([
      ["array", "array"],
      ["nested", "array_of_maps"],
      ["ring", "ringbuf"],
      ["sizes", "hash"],
      ["table", "lpm_trie"],
    ]);
    const [array, nested, ring, sizes, table] = btf.maps();
    expect(table).toEqual({
      name: "table",
      type: 11,
      typeName: "lpm_trie",
      key: btf.struct("inner"),
      value: btf.struct("outer"),
      keySize: 8,
      valueSize: btf.struct("outer")?.size,
      maxEntries: 77,
      flags: 1,
      pinned: true,
    });
    expect(array).toMatchObject({
      key: btf.enum("colour"),
      keySize: 4,
      valueSize: 7,
      maxEntries: 2,
      pinned: false,
    });
    expect(ring).toEqual({
      ...{ name: "ring", type: 27, typeName: "ringbuf", keySize: 0, valueSize: 0 },
      ...{ maxEntries: 4096, flags: 0, pinned: false },
    });
    expect(sizes).toMatchObject({ keySize: 6, valueSize: 12, maxEntries: 0 });
    expect(sizes).not.toHaveProperty("key");
    expect(nested?.inner).toMatchObject({ typeName: "hash", maxEntries: 3, key: { kind: "bytes", size: 6 } });
  });

  test("global variables of the data sections, where the symbol table puts them", () => {
    expect(btf.sections()).toEqual(expect.arrayContaining([".bss", ".data", ".maps", ".rodata", "license"]));
    const rodata = btf.variables(".rodata");
    expect(rodata.map(({ name, layout }) => [name, layout.kind, layout.size])).toEqual([
      ["first", "u8", 1],
      ["second", "struct", 8],
      ["third", "be16", 2],
    ]);
    const bytes = objectOf(PROGRAM.replace("third = 0", "third = 0x1234"));
    const [first, , third] = readBtf(bytes).variables(".rodata");
    const at = Buffer.from(bytes).indexOf(Buffer.from([0x34, 0x12]));
    expect(bytes[at - (third?.offset ?? 0) + (first?.offset ?? 0)]).toBe(1);
    expect(btf.variables(".data").map(({ name }) => name)).toEqual(["written"]);
    expect(btf.variables(".bss").map(({ name, layout }) => [name, layout.size])).toEqual([["zeroed", 32]]);
    expect(btf.variables("license")).toEqual([
      { name: "_license", offset: 0, layout: { kind: "bytes", size: 4 } },
    ]);
    expect(btf.variables(".none")).toEqual([]);
    expect(btf.sectionSize(".rodata")).toBeGreaterThanOrEqual((third?.offset ?? 0) + 2);
    expect(btf.sectionSize(".bss")).toBe(40);
    expect(btf.sectionSize(".none")).toBeUndefined();
  });

  test("a global pointer exports the type behind it", () => {
    expect(btf.exports()).toEqual([btf.struct("event")]);
  });

  test("reading is deterministic and leaves the bytes alone", () => {
    const bytes = objectOf(PROGRAM);
    const copy = new Uint8Array(bytes);
    const answers = () => {
      const again = readBtf(bytes);
      return JSON.stringify([again.maps(), again.variables(".rodata"), again.enums(), again.exports()]);
    };
    expect(answers()).toBe(answers());
    expect(new Uint8Array(bytes)).toEqual(copy);
  });

  test("bytes that start within a larger buffer are read the same", () => {
    const bytes = objectOf(PROGRAM);
    const shifted = new Uint8Array(bytes.length + 3);
    shifted.set(bytes, 3);
    expect(readBtf(shifted.subarray(3)).maps()).toEqual(btf.maps());
  });
});

describe("types that must not cross the border", () => {
  const map = (types: string, value = "struct it") => `${types}
    struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 1); __type(key, __u32); __type(value, ${value}); }
    table SEC(".maps");`;

  test.each([
    [
      "a hole between fields",
      "struct it { __u8 a; __u32 b; };",
      /^map table: value: struct it\.b: has 3 bytes.*pad\[3\]/,
    ],
    [
      "a hole at the end",
      "struct it { __u32 a; __u8 b; };",
      /^map table: value: struct it\.b: has 3 bytes.*end of/,
    ],
    ["a bitfield", "struct it { __u32 a:3; __u32 b:29; };", /^map table: value: struct it\.a: is a bitfield/],
    ["a pointer", "struct it { void *p; };", /^map table: value: struct it\.p: is a pointer/],
    [
      "a union",
      "struct it { union { __u32 a; __u8 b[4]; } u; };",
      /^map table: value: struct it\.u: is a union/,
    ],
    [
      "an unnamed member",
      "struct it { struct { __u32 a; }; };",
      /struct it\.\(unnamed member 0\): has no name/,
    ],
    ["a float", "struct it { float f; };", /^map table: value: struct it\.f: is a floating/],
    [
      "an array without a length",
      "struct it { __u32 n; __u32 rest[]; };",
      /^map table: value: struct it\.rest: is an array/,
    ],
    [
      "an integer of 16 bytes",
      "struct it { __int128 n; };",
      /^map table: value: struct it\.n: is an integer of 16 bytes/,
    ],
    [
      "a sign that got lost",
      "enum e { MINUS = -1 }; struct it { enum e e; };",
      /struct it\.e: MINUS of enum e is negative/,
    ],
    [
      "a fault deep inside",
      "struct low { __u8 a; __u16 b; }; struct it { struct low lows[2]; };",
      /^map table: value: struct it\.lows\[\]: struct low\.b: has 1 byte of/,
    ],
  ])("%s", (_, types, message) => {
    const btf = readBtf(objectOf(map(types)));
    expect(() => btf.maps()).toThrow(message);
    expect(() => btf.struct("it")).toThrow(message.source.startsWith("^") ? /^struct it/ : message);
  });

  test("in a variable the path is the variable's", () => {
    const btf = readBtf(objectOf("const volatile struct { __u8 a; __u16 b; } settings;"));
    expect(() => btf.variables(".rodata")).toThrow(
      /^\.rodata: settings\.b: has 1 byte of implicit padding before it/,
    );
  });

  test("types that do not cross are nobody's business", () => {
    const btf = readBtf(
      objectOf(`${map("", "__u64")} struct hidden { void *p; }; SEC("tc")
      int program(struct __sk_buff *skb) { struct hidden h = { skb }; return h.p != 0; }`),
    );
    expect(btf.maps()).toHaveLength(1);
  });

  test("what the kernel keeps in a value for itself is opaque", () => {
    const btf = readBtf(
      objectOf(map("struct it { struct bpf_timer timer; struct bpf_spin_lock lock; __u32 n; };")),
    );
    expect(btf.struct("it")?.fields).toEqual([
      { name: "timer", offset: 0, layout: { kind: "opaque", size: 16 } },
      { name: "lock", offset: 16, layout: { kind: "opaque", size: 4 } },
      { name: "n", offset: 20, layout: { kind: "u32", size: 4 } },
    ]);
  });
});

describe("bytes that are not what they should be", () => {
  const object = objectOf("const volatile __u32 a = 1;");

  test("neither ELF nor BTF", () => {
    expect(() => readBtf(new Uint8Array(100))).toThrow("neither an ELF object nor BTF");
    expect(() => readBtf(new Uint8Array(0))).toThrow("cut short");
    expect(() => readBtf(Uint8Array.of(0x7f, 0x45, 0x4c, 0x46))).toThrow("neither an ELF object nor BTF");
  });

  test("an object without BTF says how to get it", () => {
    const bare = new Uint8Array(object);
    const at = Buffer.from(bare).indexOf(".BTF\0");
    expect(at).toBeGreaterThan(0);
    bare[at] = 0x5f;
    expect(() => readBtf(bare)).toThrow(/no \.BTF section; compile it with clang -g/);
  });

  test("other byte orders and word sizes are refused", () => {
    expect(() => readBtf(Uint8Array.from(object, (byte, at) => (at === 5 ? 2 : byte)))).toThrow(
      "not 64-bit little-endian",
    );
    expect(() => readBtf(Uint8Array.from({ length: 24 }, (_, at) => [0xeb, 0x9f][at] ?? 0))).toThrow(
      "big-endian",
    );
  });

  test("an object cut short anywhere is an error that says so, never another kind", () => {
    for (let length = 0; length < object.length; length += 37) {
      try {
        readBtf(object.subarray(0, length)).variables(".rodata");
      } catch (error) {
        expect((error as Error).name, `cut at ${length}`).toBe("BtfError");
      }
    }
  });
});

test("an object with any byte damaged is read or refused, never anything else", () => {
  const object = objectOf(PROGRAM);
  const start = Buffer.from(object).indexOf(Uint8Array.of(0x9f, 0xeb, 1, 0));
  fc.assert(
    fc.property(
      fc.integer({ min: start, max: start + 2500 }),
      fc.integer({ min: 0, max: 255 }),
      (at, byte) => {
        const damaged = Uint8Array.from(object);
        damaged[at] = byte;
        const questions: ((btf: Btf) => unknown)[] = [
          (btf) => btf.maps(),
          (btf) => btf.sections().map((section) => btf.variables(section)),
          (btf) => [btf.enums(), btf.exports(), btf.struct("outer"), btf.constant("KIND_B")],
        ];
        for (const ask of questions) {
          try {
            ask(readBtf(damaged));
          } catch (error) {
            expect(error).toBeInstanceOf(BtfError);
          }
        }
      },
    ),
    { numRuns: 2000 },
  );
});

test.skipIf(!existsSync("/sys/kernel/btf/vmlinux"))("the kernel's own BTF", () => {
  const btf = readBtf(readFileSync("/sys/kernel/btf/vmlinux"));
  expect(offsetsOf(btf.struct("ethhdr"))).toEqual({ h_dest: 0, h_source: 6, h_proto: 12, sizeof: 14 });
  expect(btf.struct("ethhdr")?.fields[2]?.layout.kind).toBe("be16");
  expect(btf.constant("BPF_FUNC_redirect_peer")).toBe(155n);
  expect(() => btf.struct("sk_buff")).toThrow(/^struct sk_buff/);
});
