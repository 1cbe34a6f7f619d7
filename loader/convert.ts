// Values of one layout as values of another: what a table holds when the struct behind it has changed.
//
// Fields go by name. What the new layout does not have is dropped, and what the old one did not have is zero, as
// is a name that an enum no longer knows and a number that no longer fits.
import type { Layout } from "./btf.ts";

/** A value, as a codec of an older layout read it, made fit for a codec of `layout`. */
export function convert(layout: Layout, value: unknown): unknown {
  switch (layout.kind) {
    case "opaque":
      return undefined;
    case "bool":
      return value === true;
    case "bytes": {
      const bytes = new Uint8Array(layout.size);
      if (value instanceof Uint8Array) bytes.set(value.subarray(0, layout.size));
      return bytes;
    }
    case "array":
      return Array.from({ length: layout.count }, (_, index) =>
        convert(layout.element, Array.isArray(value) ? value[index] : undefined),
      );
    case "enum": {
      if (typeof value === "string" && value in layout.values) return value;
      const names = Object.keys(layout.values);
      return names.find((name) => layout.values[name] === 0) ?? names[0];
    }
    case "struct":
      return Object.fromEntries(
        layout.fields
          .filter(({ layout: { kind } }) => kind !== "opaque")
          .map(({ name, layout: inner }) => [name, convert(inner, fieldOf(value, name))]),
      );
    default:
      return scalar(layout.kind, layout.size, value);
  }
}

function fieldOf(value: unknown, name: string): unknown {
  return typeof value === "object" && value !== null ? (value as Record<string, unknown>)[name] : undefined;
}

function scalar(kind: string, size: number, value: unknown): number | bigint {
  const wide = typeof value === "number" || typeof value === "bigint" ? BigInt(value) : 0n;
  const fits = kind.startsWith("i") ? BigInt.asIntN(size * 8, wide) : BigInt.asUintN(size * 8, wide);
  const kept = fits === wide ? wide : 0n;
  return size === 8 ? kept : Number(kept);
}
