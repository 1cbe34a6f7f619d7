// Sums over the rows of a map: the same in any order, and another one if anything about a row is.
import fc from "fast-check";
import { expect, it } from "vitest";
import { MapSum } from "../../src/core/mapsum.ts";

type Row = readonly [Uint8Array, Uint8Array];

const [KEY, VALUE] = [8, 28];
const bytes = (size: number) => fc.uint8Array({ minLength: size, maxLength: size });
const rows = fc.uniqueArray(fc.tuple(bytes(KEY), bytes(VALUE)), {
  minLength: 1,
  maxLength: 40,
  selector: ([key]) => key.join(),
});

function sumOf(all: readonly Row[]): MapSum {
  const sum = new MapSum();
  for (const [key, value] of all) sum.add(key, value);
  return sum;
}

const joined = (parts: readonly Uint8Array[]): Uint8Array => new Uint8Array(Buffer.concat(parts));

it("is that of the rows, however they are listed and whatever was there before", () => {
  fc.assert(
    fc.property(rows, rows, fc.nat(), (all, others, seed) => {
      const sum = sumOf(all);
      const shuffled = all.toSorted(
        ([a], [b]) => ((a[0] ?? 0) ^ (seed & 255)) - ((b[0] ?? 0) ^ (seed & 255)),
      );
      const listed = new MapSum();
      const half = seed % shuffled.length;
      for (const part of [shuffled.slice(0, half), shuffled.slice(half)])
        listed.addAll(joined(part.map(([key]) => key)), joined(part.map(([, value]) => value)), KEY, VALUE);
      expect(listed.equals(sum)).toBe(true);
      for (const [key, value] of others) listed.add(key, value);
      expect(listed.equals(sum)).toBe(false);
      for (const [key, value] of others.toReversed()) listed.remove(key, value);
      expect(listed.equals(sum)).toBe(true);
    }),
  );
});

it("is another one with a row less, a row twice, a bit changed, or two values exchanged", () => {
  fc.assert(
    fc.property(rows, fc.nat(), fc.nat(), fc.integer({ min: 0, max: 7 }), (all, which, at, bit) => {
      const sum = sumOf(all);
      const row = all[which % all.length] ?? [new Uint8Array(KEY), new Uint8Array(VALUE)];
      const rest = all.filter((each) => each !== row);
      expect(sumOf(rest).equals(sum)).toBe(false);
      expect(sumOf([...all, row]).equals(sum)).toBe(false);
      const changed: Row = [Uint8Array.from(row[0]), Uint8Array.from(row[1])];
      const part = at % (KEY + VALUE);
      const [bytesOf, index] = part < KEY ? [changed[0], part] : [changed[1], part - KEY];
      bytesOf[index] = (bytesOf[index] ?? 0) ^ (1 << bit);
      expect(sumOf([...rest, changed]).equals(sum)).toBe(false);
      const [first, second] = all;
      if (first === undefined || second === undefined || first[1].join() === second[1].join()) return;
      const exchanged: Row[] = [[first[0], second[1]], [second[0], first[1]], ...all.slice(2)];
      expect(sumOf(exchanged).equals(sum)).toBe(false);
    }),
  );
});
