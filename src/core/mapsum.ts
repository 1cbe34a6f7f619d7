/**
 * A sum over the rows of a map in whatever order they come: two 32-bit sums of hashes of their bytes, and how many there are.
 * What was written is added and what it took the place of is taken off, so that a map of many thousands can be told to be as
 * it ought to be without a row of it being read. It finds mistakes and other hands, not somebody who means to be overlooked.
 */
export class MapSum {
  private first = 0;
  private second = 0;
  private rows = 0;

  add(key: Uint8Array, value: Uint8Array): void {
    this.count(key, 0, key.length, value, 0, value.length, 1);
  }

  remove(key: Uint8Array, value: Uint8Array): void {
    this.count(key, 0, key.length, value, 0, value.length, -1);
  }

  /** Adds rows that lie one behind another. */
  addAll(keys: Uint8Array, values: Uint8Array, keySize: number, valueSize: number): void {
    for (let key = 0, value = 0; key < keys.length; key += keySize, value += valueSize)
      this.count(keys, key, key + keySize, values, value, value + valueSize, 1);
  }

  equals(other: MapSum): boolean {
    return this.first === other.first && this.second === other.second && this.rows === other.rows;
  }

  private count(
    keys: Uint8Array,
    key: number,
    keyEnd: number,
    values: Uint8Array,
    value: number,
    valueEnd: number,
    sign: 1 | -1,
  ): void {
    const a = hash(hash(0x2545f491, keys, key, keyEnd), values, value, valueEnd);
    const b = hash(hash(a, values, value, valueEnd), keys, key, keyEnd);
    this.first = (this.first + sign * a) | 0;
    this.second = (this.second + sign * b) | 0;
    this.rows += sign;
  }
}

/** Mixes bytes into a hash: each moves all bits (multiplication), and high bits come down to low ones (shift). */
function hash(seed: number, bytes: Uint8Array, from: number, to: number): number {
  let mixed = seed;
  for (let at = from; at < to; at++) {
    mixed = Math.imul(mixed ^ (bytes[at] ?? 0), 0x5bd1e995);
    mixed ^= mixed >>> 15;
  }
  return mixed;
}
