/**
 * Reads BTF, the type information that clang leaves in a BPF object and the kernel publishes for itself, and
 * turns the types that cross the kernel border into layouts: plain data that says where each byte of a struct
 * is and what it means. The codec compiles layouts into closures, the generator prints them as TypeScript.
 *
 * What crosses the border must mean the same on both sides without a compiler in between. So the reader refuses,
 * with the path of the field, what does not: implicit padding, bitfields, pointers, unions, floats. Two kinds of
 * bytes are allowed and carry nothing: fields called `pad` (`pad1`, `_pad`, `padding`), and structs that the kernel
 * keeps for itself inside map values (`bpf_timer`, `bpf_spin_lock`).
 *
 * Format sources: the System V gABI for ELF, Documentation/bpf/btf.rst of the kernel for BTF. Layouts are computed
 * when asked for, so the kernel's own BTF with its 100,000 types costs one pass over the headers. No IO.
 */

/** Integers in the byte order their kind says: `be16` is big-endian, `u16` the order of the object (little). */
export type ScalarKind =
  | "u8"
  | "u16"
  | "u32"
  | "u64"
  | "i8"
  | "i16"
  | "i32"
  | "i64"
  | "be16"
  | "be32"
  | "be64"
  | "bool";

export interface ScalarLayout {
  readonly kind: ScalarKind;
  /** Bytes. */
  readonly size: number;
}

/** `__u8[N]` or `char[N]`. */
export interface BytesLayout {
  readonly kind: "bytes";
  readonly size: number;
}

/** Bytes that carry nothing for user space: padding, or a struct that only the kernel touches. */
export interface OpaqueLayout {
  readonly kind: "opaque";
  readonly size: number;
}

export interface ArrayLayout {
  readonly kind: "array";
  readonly size: number;
  readonly count: number;
  readonly element: Layout;
}

export interface EnumLayout {
  readonly kind: "enum";
  readonly size: number;
  /** C tag, or the typedef's name for an untagged enum; empty if it has neither. */
  readonly name: string;
  /** In order of declaration. */
  readonly values: { readonly [name: string]: number };
}

export interface Field {
  readonly name: string;
  /** Bytes from the start of the struct, or of the section for a variable. */
  readonly offset: number;
  readonly layout: Layout;
}

export interface StructLayout {
  readonly kind: "struct";
  readonly size: number;
  /** C tag; the typedef's name for an untagged struct. */
  readonly name: string;
  readonly fields: readonly Field[];
}

export type Layout = ScalarLayout | BytesLayout | OpaqueLayout | ArrayLayout | EnumLayout | StructLayout;

/** A map as the object declares it in `.maps`. */
export interface MapLayout {
  readonly name: string;
  /** `enum bpf_map_type` of the kernel. */
  readonly type: number;
  /** The same in words: `hash`, `lpm_trie`, `ringbuf`; `type_99` when this reader does not know it. */
  readonly typeName: string;
  /** Absent when the map has no key (ring buffer), or the object gives only its size. */
  readonly key?: Layout;
  readonly value?: Layout;
  /** Bytes; 0 when the map has none. */
  readonly keySize: number;
  readonly valueSize: number;
  /** 0 when left to the loader. */
  readonly maxEntries: number;
  /** `BPF_F_*` flags of map creation. */
  readonly flags: number;
  /** True for `LIBBPF_PIN_BY_NAME`. */
  readonly pinned: boolean;
  /** The template of a map of maps. */
  readonly inner?: MapLayout;
}

/** Answers about one object or blob. Every method throws `BtfError` for a type that must not cross the border. */
export interface Btf {
  /** Layout of `struct name` (or of a typedef of an untagged struct); undefined if there is none. */
  struct(name: string): StructLayout | undefined;
  /** Layout of `enum name`; undefined if there is none. */
  enum(name: string): EnumLayout | undefined;
  /** All enums in order of appearance, also anonymous ones. */
  enums(): readonly EnumLayout[];
  /** The value of an enumerator of any enum, such as a kernel's `BPF_FUNC_redirect_peer`; undefined if absent. */
  constant(name: string): bigint | undefined;
  /** Maps of the `.maps` section, by name. */
  maps(): readonly MapLayout[];
  /** Names of the data sections, in order of appearance: `.rodata`, `.bss`, `license`. */
  sections(): readonly string[];
  /** Bytes of a data section; undefined if the object has none of that name. */
  sectionSize(section: string): number | undefined;
  /** Global variables of a data section by offset; empty if there is no such section. Pointers are `exports`. */
  variables(section: string): readonly Field[];
  /**
   * Types that global pointer variables point at. `const struct event *unused_event;` is how a program keeps a type
   * in its BTF that no map and no variable uses, such as a ring buffer record.
   */
  exports(): readonly Layout[];
}

/** The bytes are not BTF, or a type in them must not cross the kernel border; `path` names the field. */
export class BtfError extends Error {
  override readonly name = "BtfError";
  /** Such as `map peers: value: struct peer.mac`; empty if the fault is in the file itself. */
  readonly path: string;

  constructor(path: string, reason: string) {
    super(path === "" ? reason : `${path}: ${reason}`);
    this.path = path;
  }
}

/** Reads an ELF object compiled by clang for BPF, or a raw BTF blob such as /sys/kernel/btf/vmlinux. */
export function readBtf(bytes: Uint8Array): Btf {
  const elf = bytes[0] === 0x7f && bytes[1] === 0x45 ? readElf(bytes) : undefined;
  if (elf === undefined) return new Reader(bytes, new Map(), new Map());
  const btf = elf.sections.get(".BTF");
  if (btf === undefined) {
    throw new BtfError("", "the object has no .BTF section; compile it with clang -g -target bpf");
  }
  const sizes = new Map([...elf.sections].map(([name, section]) => [name, section.size]));
  return new Reader(bytes.subarray(btf.offset, btf.offset + btf.size), elf.symbols, sizes);
}

// --- ELF ---------------------------------------------------------------------------------------------------------

interface Elf {
  readonly sections: ReadonlyMap<string, { readonly offset: number; readonly size: number }>;
  /** `section/symbol` to offset within the section. */
  readonly symbols: ReadonlyMap<string, number>;
}

function readElf(bytes: Uint8Array): Elf {
  const [magic, kind, order] = [
    bytes[1] === 0x45 && bytes[2] === 0x4c && bytes[3] === 0x46,
    bytes[4],
    bytes[5],
  ];
  if (!magic || bytes.length < 64) throw new BtfError("", "the file is neither an ELF object nor BTF");
  if (kind !== 2 || order !== 1) throw new BtfError("", "the ELF object is not 64-bit little-endian");
  return bounded("the ELF object", () => {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const table = Number(view.getBigUint64(0x28, true));
    const width = view.getUint16(0x3a, true);
    const headers = Array.from({ length: view.getUint16(0x3c, true) }, (_, index) => {
      const at = table + index * width;
      return {
        name: view.getUint32(at, true),
        type: view.getUint32(at + 4, true),
        offset: Number(view.getBigUint64(at + 24, true)),
        size: Number(view.getBigUint64(at + 32, true)),
        link: view.getUint32(at + 40, true),
      };
    });
    const names = headers[view.getUint16(0x3e, true)]?.offset ?? 0;
    const nameOf = (index: number): string => text(bytes, names + (headers[index]?.name ?? 0));
    const sections = new Map(headers.map((header, index) => [nameOf(index), header]));
    const symbols = new Map<string, number>();
    for (const header of headers.filter(({ type }) => type === 2)) {
      const strings = headers[header.link]?.offset ?? 0;
      for (let at = header.offset; at < header.offset + header.size; at += 24) {
        const section = nameOf(view.getUint16(at + 6, true));
        const symbol = text(bytes, strings + view.getUint32(at, true));
        symbols.set(`${section}/${symbol}`, Number(view.getBigUint64(at + 8, true)));
      }
    }
    return { sections, symbols };
  });
}

/** Runs a reader of untrusted bytes; a read past their end becomes a BtfError. */
function bounded<T>(what: string, read: () => T): T {
  try {
    return read();
  } catch (error) {
    if (error instanceof RangeError) throw new BtfError("", `${what} is cut short or damaged`);
    throw error;
  }
}

const decoder = new TextDecoder();

function text(bytes: Uint8Array, at: number): string {
  const end = bytes.indexOf(0, at);
  if (at >= bytes.length || end < 0)
    throw new BtfError("", "a name lies outside the file; it is cut short or damaged");
  return decoder.decode(bytes.subarray(at, end));
}

// --- BTF ---------------------------------------------------------------------------------------------------------

const INT = 1;
const PTR = 2;
const ARRAY = 3;
const STRUCT = 4;
const UNION = 5;
const ENUM = 6;
const FWD = 7;
const TYPEDEF = 8;
const VOLATILE = 9;
const CONST = 10;
const RESTRICT = 11;
const VAR = 14;
const DATASEC = 15;
const FLOAT = 16;
const TYPE_TAG = 18;
const ENUM64 = 19;

/** Bytes by kind after the 12 that each type begins with: fixed ones, and ones per member (`vlen`). */
const TAIL_FIXED = [0, 4, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 4, 0, 0];
const TAIL_EACH = [0, 0, 0, 0, 12, 12, 8, 0, 0, 0, 0, 0, 0, 8, 0, 12, 0, 0, 0, 12];

/** `enum bpf_map_type` of linux/bpf.h, in order. */
const MAP_TYPES =
  "unspec hash array prog_array perf_event_array percpu_hash percpu_array stack_trace cgroup_array lru_hash " +
  "lru_percpu_hash lpm_trie array_of_maps hash_of_maps devmap sockmap cpumap xskmap sockhash cgroup_storage " +
  "reuseport_sockarray percpu_cgroup_storage queue stack sk_storage devmap_hash struct_ops ringbuf inode_storage " +
  "task_storage bloom_filter user_ringbuf cgrp_storage arena";
const mapTypes = MAP_TYPES.split(" ");

const PAD = /^_*pad(ding)?_?\d*$/;
/** Kernel-owned structs with named members; those without members need no list. */
const KERNEL_OWNED = new Set(["bpf_spin_lock"]);
const ENUMERATOR_SIGN_LOST =
  "is negative or above 2^31, and the BTF does not say which; keep enum values between 0 and 2^31";

interface Type {
  readonly id: number;
  readonly kind: number;
  readonly name: string;
  /** Members, enumerators or variables. */
  readonly vlen: number;
  /** Bit 31 of `info`: bitfield struct, signed enum. */
  readonly flag: boolean;
  /** Bytes for sized kinds, the id referred to for the others. */
  readonly size: number;
  /** Offset in the blob of what follows the 12 common bytes. */
  readonly tail: number;
}

class Reader implements Btf {
  readonly #bytes: Uint8Array;
  readonly #view: DataView;
  readonly #strings: number;
  /** Offset of each type by id; type 0 is void. */
  readonly #types: number[] = [0];
  readonly #symbols: ReadonlyMap<string, number>;
  readonly #sizes: ReadonlyMap<string, number>;
  readonly #layouts = new Map<number, Layout>();
  /** Types whose layout is being computed. */
  readonly #open = new Set<number>();

  constructor(bytes: Uint8Array, symbols: ReadonlyMap<string, number>, sizes: ReadonlyMap<string, number>) {
    this.#bytes = bytes;
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.#symbols = symbols;
    this.#sizes = sizes;
    this.#strings = bounded("the BTF", () => this.#index());
  }

  /** Notes where each type begins; returns where the strings do. */
  #index(): number {
    const view = this.#view;
    const magic = view.getUint16(0, true);
    if (magic === 0x9feb)
      throw new BtfError("", "the BTF is big-endian; only little-endian targets are supported");
    if (magic !== 0xeb9f) throw new BtfError("", "the file is neither an ELF object nor BTF");
    const base = view.getUint32(4, true);
    const start = base + view.getUint32(8, true);
    const end = start + view.getUint32(12, true);
    for (let at = start; at < end; ) {
      const info = view.getUint32(at + 4, true);
      const kind = (info >>> 24) & 0x1f;
      const [fixed, each] = [TAIL_FIXED[kind], TAIL_EACH[kind]];
      if (kind === 0 || fixed === undefined || each === undefined) {
        throw new BtfError("", `BTF type ${this.#types.length} is of kind ${kind}, which is unknown`);
      }
      this.#types.push(at);
      at += 12 + fixed + each * (info & 0xffff);
    }
    const strings = base + view.getUint32(16, true);
    if (end > this.#bytes.length || strings + view.getUint32(20, true) > this.#bytes.length) {
      throw new RangeError("sections outside the blob");
    }
    return strings;
  }

  #type(id: number): Type {
    if (id === 0) return { id, kind: 0, name: "void", vlen: 0, flag: false, size: 0, tail: 0 };
    const at = this.#types[id];
    if (at === undefined) throw new BtfError("", `the BTF refers to type ${id}, which it does not have`);
    const info = this.#view.getUint32(at + 4, true);
    return {
      id,
      kind: (info >>> 24) & 0x1f,
      name: text(this.#bytes, this.#strings + this.#u32(at)),
      vlen: info & 0xffff,
      flag: info >>> 31 === 1,
      size: this.#u32(at + 8),
      tail: at + 12,
    };
  }

  #u32(at: number): number {
    return this.#view.getUint32(at, true);
  }

  #string(at: number): string {
    return text(this.#bytes, this.#strings + this.#u32(at));
  }

  *#all(...kinds: readonly number[]): Generator<Type> {
    for (let id = 1; id < this.#types.length; id++) {
      if (kinds.includes((this.#u32((this.#types[id] ?? 0) + 4) >>> 24) & 0x1f)) yield this.#type(id);
    }
  }

  /** Follows typedefs and qualifiers; reports the typedef names met on the way, outermost first. */
  #resolve(id: number): { readonly type: Type; readonly aliases: readonly string[] } {
    const aliases: string[] = [];
    let type = this.#type(id);
    for (let steps = 0; steps < 64; steps++) {
      if (type.kind === TYPEDEF) aliases.push(type.name);
      else if (![VOLATILE, CONST, RESTRICT, TYPE_TAG].includes(type.kind)) return { type, aliases };
      type = this.#type(type.size);
    }
    throw new BtfError("", `BTF type ${id} is a chain of typedefs without an end`);
  }

  // --- layouts

  #layout(id: number, path: string): Layout {
    const known = this.#layouts.get(id);
    if (known !== undefined) return known;
    if (this.#open.has(id)) throw new BtfError(path, "contains itself; the BTF is damaged");
    this.#open.add(id);
    try {
      const layout = this.#compute(id, path);
      this.#layouts.set(id, layout);
      return layout;
    } finally {
      this.#open.delete(id);
    }
  }

  #compute(id: number, path: string): Layout {
    const { type, aliases } = this.#resolve(id);
    switch (type.kind) {
      case INT:
        return this.#int(type, aliases, path);
      case ENUM:
        return this.#enum(type, aliases, path);
      case ARRAY:
        return this.#array(type, path);
      case STRUCT:
        return this.#struct(type, aliases, path);
      case PTR:
        throw new BtfError(path, "is a pointer, which means nothing on the other side of the kernel border");
      case UNION:
        throw new BtfError(path, "is a union, whose meaning its bytes do not tell; use separate fields");
      case ENUM64:
        throw new BtfError(
          path,
          `enum ${type.name} has values beyond 32 bits; use #define and a __u64 field`,
        );
      case FLOAT:
        throw new BtfError(path, "is a floating point number, which BPF programs can't use");
      case FWD:
        throw new BtfError(path, `struct ${type.name} is declared but not defined`);
      default:
        throw new BtfError(path, "is not data (a function or void)");
    }
  }

  #int(type: Type, aliases: readonly string[], path: string): ScalarLayout {
    const encoding = this.#u32(type.tail);
    const [bits, start] = [encoding & 0xff, (encoding >>> 16) & 0xff];
    if (bits !== type.size * 8 || start !== 0) throw new BtfError(path, BITFIELD);
    if (![1, 2, 4, 8].includes(type.size)) throw new BtfError(path, `is an integer of ${type.size} bytes`);
    const width = type.size * 8;
    if ((encoding >>> 24) & 4) return { kind: "bool", size: type.size };
    const big = aliases.includes(`__be${width}`);
    const sign = (encoding >>> 24) & 1 ? "i" : "u";
    return { kind: `${big ? "be" : sign}${width}` as ScalarKind, size: type.size };
  }

  #enum(type: Type, aliases: readonly string[], path: string): EnumLayout {
    const values: { [name: string]: number } = {};
    if (type.size > 4) throw new BtfError(path, `enum ${type.name} has values beyond 32 bits; use #define`);
    for (let index = 0; index < type.vlen; index++) {
      const at = type.tail + index * 8;
      const [name, value] = [this.#string(at), this.#view.getInt32(at + 4, true)];
      if (value < 0 && !type.flag)
        throw new BtfError(path, `${name} of enum ${type.name} ${ENUMERATOR_SIGN_LOST}`);
      values[name] = value;
    }
    return { kind: "enum", size: type.size, name: type.name || (aliases[0] ?? ""), values };
  }

  #array(type: Type, path: string): Layout {
    const count = this.#u32(type.tail + 8);
    if (count === 0) throw new BtfError(path, "is an array without a length");
    const elementId = this.#u32(type.tail);
    const element = this.#layout(elementId, `${path}[]`);
    if (element.kind === "u8" || (element.kind === "i8" && this.#resolve(elementId).type.name === "char")) {
      return { kind: "bytes", size: count };
    }
    return { kind: "array", size: count * element.size, count, element };
  }

  #struct(type: Type, aliases: readonly string[], path: string): StructLayout | OpaqueLayout {
    if ((type.vlen === 0 && type.size > 0) || KERNEL_OWNED.has(type.name)) {
      return { kind: "opaque", size: type.size };
    }
    const name = type.name || (aliases[0] ?? "");
    const here = name === "" ? path : `${path === "" ? "" : `${path}: `}struct ${name}`;
    const fields: Field[] = [];
    let end = 0;
    for (let index = 0; index < type.vlen; index++) {
      const at = type.tail + index * 12;
      const field = this.#string(at);
      const bits = this.#u32(at + 8);
      const fieldPath = `${here}.${field || `(unnamed member ${index})`}`;
      if (field === "") throw new BtfError(fieldPath, "has no name; name it, so that its fields have a path");
      if ((type.flag && bits >>> 24 !== 0) || bits % 8 !== 0) throw new BtfError(fieldPath, BITFIELD);
      const offset = (type.flag ? bits & 0xffffff : bits) / 8;
      if (offset > end) throw new BtfError(fieldPath, hole(offset - end, "before it"));
      const layout = this.#layout(this.#u32(at + 4), fieldPath);
      fields.push({
        name: field,
        offset,
        layout: PAD.test(field) ? { kind: "opaque", size: layout.size } : layout,
      });
      end = offset + layout.size;
    }
    if (type.size > end) {
      throw new BtfError(
        `${here}.${fields.at(-1)?.name}`,
        hole(type.size - end, "after it, at the end of the struct"),
      );
    }
    return { kind: "struct", size: type.size, name, fields };
  }

  // --- questions

  struct(name: string): StructLayout | undefined {
    for (const type of this.#all(STRUCT, TYPEDEF)) {
      if (type.name !== name || this.#resolve(type.id).type.kind !== STRUCT) continue;
      const layout = this.#layout(type.id, "");
      if (layout.kind === "struct") return layout;
    }
    return undefined;
  }

  enum(name: string): EnumLayout | undefined {
    for (const type of this.#all(ENUM, ENUM64)) {
      if (type.name === name) return this.#layout(type.id, `enum ${name}`) as EnumLayout;
    }
    return undefined;
  }

  enums(): readonly EnumLayout[] {
    return [...this.#all(ENUM, ENUM64)].map(
      (type) => this.#layout(type.id, `enum ${type.name}`) as EnumLayout,
    );
  }

  constant(name: string): bigint | undefined {
    for (const type of this.#all(ENUM, ENUM64)) {
      for (let index = 0; index < type.vlen; index++) {
        const at = type.tail + index * (type.kind === ENUM ? 8 : 12);
        if (this.#string(at) !== name) continue;
        if (type.kind === ENUM)
          return BigInt(type.flag ? this.#view.getInt32(at + 4, true) : this.#u32(at + 4));
        const value = (BigInt(this.#u32(at + 8)) << 32n) | BigInt(this.#u32(at + 4));
        return type.flag ? BigInt.asIntN(64, value) : value;
      }
    }
    return undefined;
  }

  sections(): readonly string[] {
    return [...this.#all(DATASEC)].map(({ name }) => name);
  }

  sectionSize(section: string): number | undefined {
    const type = this.#datasec(section);
    return type === undefined ? undefined : (this.#sizes.get(section) ?? type.size);
  }

  variables(section: string): readonly Field[] {
    if (section === ".maps") return [];
    return this.#globals(section)
      .filter(({ typeId }) => this.#resolve(typeId).type.kind !== PTR)
      .map(({ name, offset, typeId }) => ({
        name,
        offset,
        layout: this.#layout(typeId, `${section}: ${name}`),
      }))
      .sort((a, b) => a.offset - b.offset);
  }

  exports(): readonly Layout[] {
    return this.sections()
      .filter((section) => section !== ".maps")
      .flatMap((section) => this.#globals(section))
      .map(({ name, typeId }) => ({ name, type: this.#resolve(typeId).type }))
      .filter(({ type }) => type.kind === PTR)
      .map(({ name, type }) => this.#layout(type.size, `${name}, as exported`));
  }

  maps(): readonly MapLayout[] {
    return this.#globals(".maps")
      .map(({ name, typeId }) => this.#map(name, this.#resolve(typeId).type))
      .sort((a, b) => (a.name < b.name ? -1 : 1));
  }

  #datasec(section: string): Type | undefined {
    for (const type of this.#all(DATASEC)) if (type.name === section) return type;
    return undefined;
  }

  /** Global variables of a section. Clang leaves their offsets to the symbol table; static ones are nobody's business. */
  #globals(section: string): { readonly name: string; readonly offset: number; readonly typeId: number }[] {
    const datasec = this.#datasec(section);
    return Array.from({ length: datasec?.vlen ?? 0 }, (_, index) => {
      const at = (datasec?.tail ?? 0) + index * 12;
      const variable = this.#type(this.#u32(at));
      if (variable.kind !== VAR)
        throw new BtfError(section, `lists ${variable.name}, which is not a variable`);
      const offset = this.#symbols.get(`${section}/${variable.name}`) ?? this.#u32(at + 4);
      return { name: variable.name, offset, typeId: variable.size, linkage: this.#u32(variable.tail) };
    }).filter(({ linkage }) => linkage !== 0 || section === ".maps");
  }

  /**
   * A map definition is a struct of which nothing is ever stored: each attribute is a pointer, whose target is the
   * type meant (`__type`) or an array with as many elements as the number meant (`__uint`).
   */
  #map(name: string, definition: Type, template = false): MapLayout {
    const path = `map ${name}`;
    if (definition.kind !== STRUCT)
      throw new BtfError(path, "is not defined as a struct of __uint and __type");
    const members = new Map(
      Array.from({ length: definition.vlen }, (_, index) => {
        const at = definition.tail + index * 12;
        return [this.#string(at), this.#u32(at + 4)] as const;
      }),
    );
    const target = (member: string): Type | undefined => {
      const id = members.get(member);
      if (id === undefined) return undefined;
      const pointer = this.#resolve(id).type;
      if (pointer.kind !== PTR)
        throw new BtfError(`${path}: ${member}`, "is not written with __uint or __type");
      return this.#type(pointer.size);
    };
    const number = (member: string): number => {
      const array = target(member);
      if (array === undefined) return 0;
      if (array.kind !== ARRAY) throw new BtfError(`${path}: ${member}`, "is not written with __uint");
      return this.#u32(array.tail + 8);
    };
    const of = (member: string): Layout | undefined => {
      const type = target(member);
      return type === undefined ? undefined : this.#layout(type.id, `${path}: ${member}`);
    };
    const [key, value, type] = [of("key"), of("value"), number("type")];
    // The kernel nests maps one level deep.
    const inner = template ? undefined : this.#inner(members.get("values"));
    return {
      name,
      type,
      typeName: mapTypes[type] ?? `type_${type}`,
      ...(key === undefined ? {} : { key }),
      ...(value === undefined ? {} : { value }),
      keySize: key?.size ?? number("key_size"),
      valueSize: value?.size ?? number("value_size"),
      maxEntries: number("max_entries"),
      flags: number("map_flags"),
      pinned: number("pinning") === 1,
      ...(inner === undefined ? {} : { inner: this.#map(`${name}.values`, inner, true) }),
    };
  }

  /** `__array(values, struct inner)` is an array of pointers to the inner definition; to functions for a prog array. */
  #inner(values: number | undefined): Type | undefined {
    if (values === undefined) return undefined;
    const array = this.#resolve(values).type;
    if (array.kind !== ARRAY) return undefined;
    const pointer = this.#resolve(this.#u32(array.tail)).type;
    if (pointer.kind !== PTR) return undefined;
    const inner = this.#resolve(pointer.size).type;
    return inner.kind === STRUCT ? inner : undefined;
  }
}

const BITFIELD = "is a bitfield, whose place in the word is the compiler's choice; use a __u8 and masks";

function hole(bytes: number, where: string): string {
  const noun = bytes === 1 ? "byte" : "bytes";
  return `has ${bytes} ${noun} of implicit padding ${where}; write it as a field, __u8 pad[${bytes}]`;
}
