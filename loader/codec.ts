/**
 * Turns values into the bytes of a layout and back. Each layout is compiled once into a tree of closures, so that
 * coding a map entry walks no descriptors; keep the codec, not the layout, where many entries pass.
 *
 * The mapping: integers up to 32 bits are numbers and 64-bit ones bigints, in the byte order of their kind; enums are
 * the C names of their values; `__u8[N]` is a Uint8Array of exactly N bytes; structs are objects. Opaque fields have
 * no counterpart: they are written as zeros, so that equal keys are equal bytes, and skipped when read.
 *
 * A codec refuses what would not survive the journey (a number that does not fit, a missing field, a name the enum
 * does not have) and says which field it was. TypeScript sees most of this first: `Value` derives the type of the
 * values from the type of the layout.
 */
import type { EnumLayout, Layout, ScalarKind, StructLayout } from "./btf.ts";

/** The TypeScript type of the values of a layout that was written `as const`. */
export type Value<L> = L extends { readonly kind: "bool" }
  ? boolean
  : L extends { readonly kind: "u64" | "i64" | "be64" }
    ? bigint
    : L extends { readonly kind: ScalarKind }
      ? number
      : L extends { readonly kind: "bytes" }
        ? Uint8Array
        : L extends { readonly kind: "array"; readonly element: infer E }
          ? readonly Value<E>[]
          : L extends { readonly kind: "enum"; readonly values: infer V }
            ? keyof V & string
            : L extends { readonly kind: "struct"; readonly fields: readonly (infer F)[] }
              ? {
                  readonly [M in F as M extends {
                    name: infer N extends string;
                    layout: { kind: Exclude<Layout["kind"], "opaque"> };
                  }
                    ? N
                    : never]: M extends { layout: infer T } ? Value<T> : never;
                }
              : undefined;

export interface Codec<T> {
  /** Bytes of an encoded value. */
  readonly size: number;
  /**
   * Writes `value` at `offset` of `target`, or into a new array of `size` bytes; returns the array written to.
   * Throws CodecError; the bytes already written then stay.
   */
  encode(value: T, target?: Uint8Array, offset?: number): Uint8Array;
  /** Reads a value at `offset`; what it returns shares no memory with `source`. Throws CodecError. */
  decode(source: Uint8Array, offset?: number): T;
}

/** A value does not fit its layout, or bytes hold nothing that the layout can name; `path` is the field. */
export class CodecError extends Error {
  override readonly name = "CodecError";
  /** Such as `peer4.vtep_mac` or `config.ports[2]`. */
  readonly path: string;

  constructor(path: string, reason: string) {
    super(`${path}: ${reason}`);
    this.path = path;
  }
}

/** Compiles a layout. With a layout written `as const` the type of the values follows from it. */
export function codec<const L extends Layout>(layout: L): Codec<Value<L>> {
  const name = "name" in layout && layout.name !== "" ? layout.name : layout.kind;
  const { write, read } = compile(layout, name);
  const { size } = layout;
  const room = (bytes: Uint8Array, offset: number): void => {
    if (offset < 0 || offset + size > bytes.length) {
      const have = `offset ${offset} of ${bytes.length} bytes`;
      throw new CodecError(name, `takes ${size} bytes, more than there are at ${have}`);
    }
  };
  return {
    size,
    encode(value, target = new Uint8Array(size), offset = 0) {
      room(target, offset);
      write(target, offset, value);
      return target;
    },
    decode(source, offset = 0) {
      room(source, offset);
      return read(source, offset) as Value<L>;
    },
  };
}

interface Closures {
  readonly write: (bytes: Uint8Array, at: number, value: unknown) => void;
  readonly read: (bytes: Uint8Array, at: number) => unknown;
}

function compile(layout: Layout, path: string): Closures {
  switch (layout.kind) {
    case "struct":
      return struct(layout, path);
    case "array": {
      const { count, element } = layout;
      const each = Array.from({ length: count }, (_, index) => compile(element, `${path}[${index}]`));
      return {
        write(bytes, at, value) {
          if (!Array.isArray(value) || value.length !== count)
            throw wrong(path, `an array of ${count}`, value);
          for (const [index, { write }] of each.entries())
            write(bytes, at + index * element.size, value[index]);
        },
        read: (bytes, at) => each.map(({ read }, index) => read(bytes, at + index * element.size)),
      };
    }
    case "bytes": {
      const { size } = layout;
      return {
        write(bytes, at, value) {
          if (!(value instanceof Uint8Array) || value.length !== size)
            throw wrong(path, `${size} bytes`, value);
          bytes.set(value, at);
        },
        read: (bytes, at) => new Uint8Array(bytes.subarray(at, at + size)),
      };
    }
    case "opaque":
      return {
        write: (bytes, at) => bytes.fill(0, at, at + layout.size),
        read: () => undefined,
      };
    case "enum":
      return enumeration(layout, path);
    case "bool":
      return {
        write(bytes, at, value) {
          if (typeof value !== "boolean") throw wrong(path, "true or false", value);
          bytes.fill(0, at, at + layout.size);
          bytes[at] = value ? 1 : 0;
        },
        read: (bytes, at) => bytes.subarray(at, at + layout.size).some((byte) => byte !== 0),
      };
    default:
      return layout.size === 8 ? wide(layout.kind, path) : integer(layout.kind, layout.size, path);
  }
}

function struct(layout: StructLayout, path: string): Closures {
  const fields = layout.fields.map((field) => ({
    ...field,
    ...compile(field.layout, `${path}.${field.name}`),
    opaque: field.layout.kind === "opaque",
  }));
  return {
    write(bytes, at, value) {
      if (typeof value !== "object" || value === null) throw wrong(path, "an object", value);
      for (const field of fields) {
        field.write(bytes, at + field.offset, (value as { [name: string]: unknown })[field.name]);
      }
    },
    read(bytes, at) {
      const value: { [name: string]: unknown } = {};
      for (const field of fields) {
        if (!field.opaque) value[field.name] = field.read(bytes, at + field.offset);
      }
      return value;
    },
  };
}

/** Integers of up to four bytes. Bytes are moved one by one, which needs neither alignment nor a view per call. */
function integer(kind: string, size: number, path: string): Closures {
  const big = kind.startsWith("be");
  const signed = kind.startsWith("i");
  const top = 2 ** (8 * size);
  const [least, most] = signed ? [-top / 2, top / 2 - 1] : [0, top - 1];
  const shifts = Array.from({ length: size }, (_, index) => 8 * (big ? size - 1 - index : index));
  return {
    write(bytes, at, value) {
      if (typeof value !== "number" || !Number.isInteger(value) || value < least || value > most) {
        throw wrong(path, `an integer from ${least} to ${most}`, value);
      }
      for (let index = 0; index < size; index++) bytes[at + index] = value >>> (shifts[index] ?? 0);
    },
    read(bytes, at) {
      let value = 0;
      for (let index = 0; index < size; index++) value |= (bytes[at + index] ?? 0) << (shifts[index] ?? 0);
      const unsigned = value >>> 0;
      return signed && unsigned > most ? unsigned - top : unsigned;
    },
  };
}

/** Integers of eight bytes. */
function wide(kind: string, path: string): Closures {
  const little = !kind.startsWith("be");
  const signed = kind.startsWith("i");
  const [least, most] = signed ? [-(2n ** 63n), 2n ** 63n - 1n] : [0n, 2n ** 64n - 1n];
  const view = (bytes: Uint8Array, at: number): DataView =>
    new DataView(bytes.buffer, bytes.byteOffset + at, 8);
  return {
    write(bytes, at, value) {
      if (typeof value !== "bigint" || value < least || value > most) {
        throw wrong(path, `a bigint from ${least} to ${most}`, value);
      }
      view(bytes, at).setBigUint64(0, BigInt.asUintN(64, value), little);
    },
    read(bytes, at) {
      const value = view(bytes, at).getBigUint64(0, little);
      return signed ? BigInt.asIntN(64, value) : value;
    },
  };
}

function enumeration(layout: EnumLayout, path: string): Closures {
  const signed = Object.values(layout.values).some((value) => value < 0);
  const number = integer(signed ? "i" : "u", layout.size, path);
  const values = new Map(Object.entries(layout.values));
  // Of several names for one number the first declared is its name; the later ones are read as aliases.
  const names = new Map([...values].reverse().map(([name, value]) => [value, name]));
  return {
    write(bytes, at, name) {
      const value = values.get(name as string);
      if (value === undefined) throw wrong(path, `a name of enum ${layout.name}`, name);
      number.write(bytes, at, value);
    },
    read(bytes, at) {
      const value = number.read(bytes, at) as number;
      const name = names.get(value);
      if (name === undefined)
        throw new CodecError(path, `holds ${value}, for which enum ${layout.name} has no name`);
      return name;
    },
  };
}

function wrong(path: string, wanted: string, value: unknown): CodecError {
  return new CodecError(path, `wants ${wanted}, got ${describe(value)}`);
}

function describe(value: unknown): string {
  if (value === undefined) return "nothing";
  if (value instanceof Uint8Array) return `${value.length} bytes`;
  if (Array.isArray(value)) return `an array of ${value.length}`;
  if (typeof value === "object") return value === null ? "null" : "an object";
  return typeof value === "string" ? `"${value}"` : `${String(value)} (${typeof value})`;
}
