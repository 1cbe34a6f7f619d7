// BPF maps from userspace: single elements, whole tables in batches, per-CPU values, pins.
//
// Keys and values are bytes, exactly as long as the map says; codecs belong to the caller. Single operations
// copy through buffers the map owns, so they allocate nothing that native code could see moving. Whole tables
// go by batch system calls, with a walk key by key where the kernel has none for that type of map.
import { closeSync } from "node:fs";
import { readCString } from "./ffi.ts";
import {
  bpf,
  check,
  EINTR,
  EINVAL,
  ENOENT,
  ENOSPC,
  ENOTSUPP,
  EOPNOTSUPP,
  failure,
  type Handle,
  ids,
  LibbpfError,
  noPin,
  openById,
  openPin,
  pinFd,
  possibleCpus,
  readInfo,
  readName,
  withFd,
} from "./libbpf.ts";

/** Update flags of <linux/bpf.h>: create or replace; create only (`EEXIST`); replace only (`ENOENT`). */
export const BPF_ANY = 0;
export const BPF_NOEXIST = 1;
export const BPF_EXIST = 2;

/** One element of a map. */
export type Entry = readonly [key: Uint8Array, value: Uint8Array];

/** Elements as the kernel hands them over: `count` keys behind one another, and as many values. */
export interface Block {
  readonly keys: Uint8Array;
  readonly values: Uint8Array;
  readonly count: number;
}

/** A batch stopped before its end. */
export class BatchError extends LibbpfError {
  override name = "BatchError";
  /** How many of the elements given, from the first, were dealt with. The one after them is at fault. */
  readonly done: number;

  constructor(cause: LibbpfError, done: number) {
    super(cause.operation, cause.errno, cause.message);
    this.done = done;
  }
}

/** What the kernel says about a map. */
export interface MapInfo {
  readonly id: number;
  /** At most 15 characters; longer names are cut by the kernel. */
  readonly name: string;
  /** In words, such as `lpm_trie`. */
  readonly type: string;
  /** `enum bpf_map_type`. */
  readonly typeNumber: number;
  /** Bytes. */
  readonly keySize: number;
  /** Bytes; of one CPU's value in a per-CPU map. */
  readonly valueSize: number;
  readonly maxEntries: number;
  /** `BPF_F_*` of map creation. */
  readonly flags: number;
  /** BTF object that describes key and value; 0 if there is none. */
  readonly btfId: number;
}

const INFO_SIZE = 88;
const NAME_SIZE = 16;
const PER_CPU_TYPES = new Set([5, 6, 10, 21]);
const DEFAULT_CHUNK = 1024;

/** A map type in words, such as `hash`. */
export function mapTypeName(type: number): string {
  return readCString(bpf.mapTypeName(type)) ?? `type_${type}`;
}

/** Reads what the kernel knows about a map, by descriptor or id. */
export function mapInfo(handle: Handle): MapInfo {
  return withFd("map", handle, (fd) => {
    const info = readInfo(fd, INFO_SIZE, "a map");
    const type = info.readUInt32LE(0);
    return {
      id: info.readUInt32LE(4),
      name: readName(info, 24, NAME_SIZE),
      type: mapTypeName(type),
      typeNumber: type,
      keySize: info.readUInt32LE(8),
      valueSize: info.readUInt32LE(12),
      maxEntries: info.readUInt32LE(16),
      flags: info.readUInt32LE(20),
      btfId: info.readUInt32LE(64),
    };
  });
}

/** The ids of all maps of the machine. */
export function mapIds(): Generator<number> {
  return ids("map");
}

/** Opens a pinned map. It owns its descriptor: `close()` it. */
export function openPinnedMap(path: string): BpfMap {
  const fd = openPin(path, "map");
  if (fd === undefined) throw noPin(path, "map");
  return adopt(fd);
}

/** Opens a map by id. It owns its descriptor: `close()` it. */
export function openMapById(id: number): BpfMap {
  return adopt(openById("map", id));
}

function adopt(fd: number): BpfMap {
  try {
    return new BpfMap(fd, mapInfo({ fd }).name, true);
  } catch (error) {
    closeSync(fd);
    throw error;
  }
}

// The kernel has batch operations only for some types of map, more with every release.
function isUnsupported(result: number): boolean {
  return result === -EINVAL || result === -ENOTSUPP || result === -EOPNOTSUPP;
}

/** A map in the kernel. Every failed operation throws `LibbpfError`; a wrong length throws `RangeError`. */
export class BpfMap {
  readonly name: string;
  readonly id: number;
  /** In words, such as `hash`. */
  readonly type: string;
  readonly keySize: number;
  /** Bytes of one value (of one CPU's value in a per-CPU map). */
  readonly valueSize: number;
  readonly maxEntries: number;
  readonly flags: number;
  readonly perCpu: boolean;
  #fd: number;
  readonly #owned: boolean;
  /** Bytes that the kernel copies for one element. */
  readonly #window: number;
  readonly #key: Buffer;
  readonly #value: Buffer;

  /** Wraps a descriptor; with `owned`, `close()` closes it. */
  constructor(fd: number, name: string, owned: boolean) {
    const info = mapInfo({ fd });
    this.name = name;
    this.id = info.id;
    this.type = info.type;
    this.keySize = info.keySize;
    this.valueSize = info.valueSize;
    this.maxEntries = info.maxEntries;
    this.flags = info.flags;
    this.perCpu = PER_CPU_TYPES.has(info.typeNumber);
    this.#fd = fd;
    this.#owned = owned;
    this.#window = this.perCpu ? this.#stride() * possibleCpus() : info.valueSize;
    this.#key = Buffer.alloc(Math.max(1, info.keySize));
    this.#value = Buffer.alloc(Math.max(1, this.#window));
  }

  /** The descriptor. Throws once the map (or the object it belongs to) is closed. */
  get fd(): number {
    if (this.#fd < 0)
      throw new LibbpfError("close", 0, `Map ${this.name} is closed; open it again to use it.`);
    return this.#fd;
  }

  /** The value under `key`, or `undefined`. */
  lookup(key: Uint8Array): Uint8Array | undefined {
    this.#refusePerCpu("lookupPerCpu");
    return this.#read(key) ? new Uint8Array(this.#value) : undefined;
  }

  /** Sets the value under `key`. `flags` is `BPF_ANY` (default), `BPF_NOEXIST` or `BPF_EXIST`. */
  update(key: Uint8Array, value: Uint8Array, flags: number = BPF_ANY): void {
    this.#refusePerCpu("updatePerCpu");
    this.#expect("value", value, this.valueSize);
    this.#value.set(value);
    this.#write(key, flags);
  }

  /** Removes `key`; false if it was not there. Elements of arrays cannot be removed (`EINVAL`). */
  delete(key: Uint8Array): boolean {
    this.#takeKey(key);
    const result = bpf.delete(this.fd, this.#key);
    if (result === -ENOENT) return false;
    check(result, "bpf_map_delete_elem", `delete a key from map ${this.name}`);
    return true;
  }

  /** One value per possible CPU, or `undefined`. */
  lookupPerCpu(key: Uint8Array): Uint8Array[] | undefined {
    this.#requirePerCpu();
    return this.#read(key) ? this.#split(this.#value) : undefined;
  }

  /** Sets the values of all possible CPUs under `key`. */
  updatePerCpu(key: Uint8Array, values: readonly Uint8Array[], flags: number = BPF_ANY): void {
    this.#requirePerCpu();
    if (values.length !== possibleCpus()) {
      throw new RangeError(
        `Map ${this.name} needs one value for each of ${possibleCpus()} CPUs, not ${values.length}.`,
      );
    }
    this.#value.fill(0);
    values.forEach((value, cpu) => {
      this.#expect("value", value, this.valueSize);
      this.#value.set(value, cpu * this.#stride());
    });
    this.#write(key, flags);
  }

  /** All elements, read in batches. While others write, each element is as it was at some moment of the read. */
  entries(): Entry[] {
    return [...this.batches()].flat();
  }

  /** All elements of a per-CPU map, each with one value per possible CPU. */
  entriesPerCpu(): Array<readonly [key: Uint8Array, values: Uint8Array[]]> {
    this.#requirePerCpu();
    return [...this.#batches(DEFAULT_CHUNK)].flat().map(([key, window]) => [key, this.#split(window)]);
  }

  /** All elements, a batch at a time, so that the reader of a big table can let others run in between. */
  batches(chunk: number = DEFAULT_CHUNK): Generator<Entry[]> {
    this.#refusePerCpu("entriesPerCpu");
    return this.#batches(chunk);
  }

  /** As `batches`, without two objects for each element: for counting, or reading a few fields of very many. */
  blocks(chunk: number = DEFAULT_CHUNK): Generator<Block> {
    this.#refusePerCpu("entriesPerCpu");
    return this.#blocks(chunk);
  }

  /** As `blocks`, of a per-CPU map: each value is one behind another for all possible CPUs, at multiples of 8 bytes. */
  blocksPerCpu(chunk: number = DEFAULT_CHUNK): Generator<Block> {
    this.#requirePerCpu();
    return this.#blocks(chunk);
  }

  /**
   * Sets many elements, `chunk` in each system call. Not a transaction: what was set before a failure stays.
   * @throws BatchError that says how many elements were set.
   */
  updateBatch(entries: Iterable<Entry>, chunk: number = DEFAULT_CHUNK, flags: number = BPF_ANY): void {
    this.#refusePerCpu("updatePerCpu");
    const all = [...entries];
    const keys = Buffer.alloc(Math.min(chunk, all.length) * this.keySize);
    const values = Buffer.alloc(Math.min(chunk, all.length) * this.valueSize);
    const count = Buffer.alloc(4);
    const opts = Buffer.alloc(24);
    opts.writeBigUInt64LE(24n, 0);
    opts.writeBigUInt64LE(BigInt(flags), 8);
    for (let start = 0; start < all.length; start += chunk) {
      const part = all.slice(start, start + chunk);
      part.forEach(([key, value], i) => {
        this.#expect("key", key, this.keySize);
        this.#expect("value", value, this.valueSize);
        keys.set(key, i * this.keySize);
        values.set(value, i * this.valueSize);
      });
      count.writeUInt32LE(part.length);
      const result = bpf.updateBatch(this.fd, keys, values, count, opts);
      if (result >= 0) continue;
      const done = progress(count, part.length);
      if (!isUnsupported(result))
        throw this.#batchFailure("bpf_map_update_batch", -result, "update", start + done);
      // One by one either works, on a kernel without the batch, or says which element is at fault.
      part.slice(done).forEach(([key, value], i) => {
        this.#takeKey(key);
        this.#value.set(value);
        const single = bpf.update(this.fd, this.#key, this.#value, flags);
        if (single < 0) throw this.#batchFailure("bpf_map_update_elem", -single, "update", start + done + i);
      });
    }
  }

  /**
   * Removes many keys; those that are not there are fine. Returns how many were.
   * @throws BatchError that says how many keys were dealt with.
   */
  deleteBatch(keys: Iterable<Uint8Array>, chunk: number = DEFAULT_CHUNK): number {
    const all = [...keys];
    const block = Buffer.alloc(Math.min(chunk, all.length) * this.keySize);
    const count = Buffer.alloc(4);
    let removed = 0;
    for (let start = 0; start < all.length; ) {
      const part = all.slice(start, start + chunk);
      part.forEach((key, i) => {
        this.#expect("key", key, this.keySize);
        block.set(key, i * this.keySize);
      });
      count.writeUInt32LE(part.length);
      const result = bpf.deleteBatch(this.fd, block, count, null);
      const done = result >= 0 ? part.length : progress(count, part.length);
      removed += done;
      start += done;
      if (result >= 0) continue;
      if (result === -ENOENT) {
        // The batch stops at a key that is not there: step over it.
        start++;
        continue;
      }
      if (!isUnsupported(result)) {
        throw this.#batchFailure("bpf_map_delete_batch", -result, "delete from", start);
      }
      for (const key of part.slice(done)) {
        this.#takeKey(key);
        const single = bpf.delete(this.fd, this.#key);
        if (single < 0 && single !== -ENOENT) {
          throw this.#batchFailure("bpf_map_delete_elem", -single, "delete from", start);
        }
        if (single === 0) removed++;
        start++;
      }
    }
    return removed;
  }

  /** Pins the map at a path in a BPF file system, so that it outlives this process. */
  pin(path: string): void {
    pinFd(this.fd, path, `map ${this.name}`);
  }

  /** Forgets the map; the kernel frees it when nothing else (program, pin, process) refers to it. */
  close(): void {
    if (this.#fd >= 0 && this.#owned) closeSync(this.#fd);
    this.#fd = -1;
  }

  #stride(): number {
    return Math.ceil(this.valueSize / 8) * 8;
  }

  #split(window: Uint8Array): Uint8Array[] {
    return Array.from({ length: possibleCpus() }, (_, cpu) => {
      const start = cpu * this.#stride();
      return new Uint8Array(window.subarray(start, start + this.valueSize));
    });
  }

  #expect(part: "key" | "value", bytes: Uint8Array, size: number): void {
    if (bytes.byteLength !== size) {
      throw new RangeError(`A ${part} of map ${this.name} has ${size} bytes, not ${bytes.byteLength}.`);
    }
  }

  #refusePerCpu(instead: string): void {
    if (this.perCpu) throw new TypeError(`Map ${this.name} keeps a value for each CPU; use ${instead}().`);
  }

  #requirePerCpu(): void {
    if (!this.perCpu) throw new TypeError(`Map ${this.name} is of type ${this.type}, which is not per CPU.`);
  }

  #takeKey(key: Uint8Array): void {
    this.#expect("key", key, this.keySize);
    this.#key.set(key);
  }

  #read(key: Uint8Array): boolean {
    this.#takeKey(key);
    const result = bpf.lookup(this.fd, this.#key, this.#value);
    if (result === -ENOENT) return false;
    check(result, "bpf_map_lookup_elem", `look up a key in map ${this.name}`);
    return true;
  }

  #write(key: Uint8Array, flags: number): void {
    this.#takeKey(key);
    const result = bpf.update(this.fd, this.#key, this.#value, flags);
    if (result < 0)
      throw failure("bpf_map_update_elem", -result, `update map ${this.name}`, this.#advice(-result));
  }

  #advice(number: number): string {
    const E2BIG = 7;
    const full = number === E2BIG || number === ENOSPC;
    return full ? `The map may be full: it holds at most ${this.maxEntries} elements.` : "";
  }

  #batchFailure(operation: string, number: number, verb: string, done: number): BatchError {
    const what = `${verb} map ${this.name} (stopped after ${done} elements)`;
    return new BatchError(failure(operation, number, what, this.#advice(number)), done);
  }

  *#batches(chunk: number): Generator<Entry[]> {
    for (const { keys, values, count } of this.#blocks(chunk)) {
      yield Array.from({ length: count }, (_, i) => [
        keys.subarray(i * this.keySize, (i + 1) * this.keySize),
        values.subarray(i * this.#window, (i + 1) * this.#window),
      ]);
    }
  }

  *#blocks(chunk: number): Generator<Block> {
    let size = Math.max(1, Math.min(chunk, this.maxEntries));
    // The cursor is the kernel's: a bucket number for hashes, a key for other types.
    let from = Buffer.alloc(Math.max(8, this.keySize));
    let to = Buffer.alloc(from.length);
    const count = Buffer.alloc(4);
    for (let first = true; ; ) {
      const keys = Buffer.alloc(size * this.keySize);
      const values = Buffer.alloc(size * this.#window);
      count.writeUInt32LE(size);
      const result = bpf.lookupBatch(this.fd, first ? null : from, to, keys, values, count, null);
      if (result === -ENOSPC) {
        // One hash bucket holds more elements than fit.
        size *= 2;
        continue;
      }
      if (first && isUnsupported(result)) {
        for (const part of this.#walk(size)) {
          const keys = new Uint8Array(Buffer.concat(part.map(([key]) => key)));
          const values = new Uint8Array(Buffer.concat(part.map(([, value]) => value)));
          yield { keys, values, count: part.length };
        }
        return;
      }
      if (result < 0 && result !== -ENOENT && result !== -EINTR) {
        throw failure("bpf_map_lookup_batch", -result, `read map ${this.name}`);
      }
      const got = count.readUInt32LE();
      // A copy each, cut to what is used: what is kept of a last, short batch is short.
      if (got > 0) {
        yield {
          keys: new Uint8Array(keys.subarray(0, got * this.keySize)),
          values: new Uint8Array(values.subarray(0, got * this.#window)),
          count: got,
        };
      }
      if (result === -ENOENT) return;
      if (got === 0) {
        if (result >= 0) return;
        // Older kernels give up on a key that is deleted under them; the cursor moves only with elements read.
        continue;
      }
      [from, to] = [to, from];
      first = false;
    }
  }

  // Key by key. If the key at hand is deleted meanwhile, the kernel starts over: a key seen twice ends the walk.
  *#walk(chunk: number): Generator<Entry[]> {
    const seen = new Set<string>();
    const at = Buffer.alloc(this.keySize);
    const next = Buffer.alloc(this.keySize);
    let part: Entry[] = [];
    for (let first = true; ; first = false) {
      const result = bpf.nextKey(this.fd, first ? null : at, next);
      if (result === -ENOENT) break;
      check(result, "bpf_map_get_next_key", `read map ${this.name}`);
      const name = next.toString("latin1");
      if (seen.has(name)) break;
      seen.add(name);
      at.set(next);
      if (this.#read(at)) part.push([new Uint8Array(at), new Uint8Array(this.#value)]);
      if (part.length === chunk) {
        yield part;
        part = [];
      }
    }
    if (part.length > 0) yield part;
  }
}

// How far a failed batch came. The kernel leaves the count as it was if it did not even begin.
function progress(count: Buffer, asked: number): number {
  const done = count.readUInt32LE();
  return done < asked ? done : 0;
}

/** Whether this kernel has maps of a type (enum bpf_map_type). Asks the kernel. */
export function hasMapType(type: number): boolean {
  return check(bpf.probeMapType(type, null), "libbpf_probe_bpf_map_type", `probe for map type ${type}`) === 1;
}
