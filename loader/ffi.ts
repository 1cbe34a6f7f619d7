// The border to native code: about ten primitives over ffi-napi, and the only file that imports it.
//
// Everything above (libbpf, netlink, systemd) asks here for a library, prepares the symbols it needs once,
// and then calls them like functions. A prepared call owns its call descriptor and its argument block, so a
// call costs about a microsecond and makes no garbage. Nothing here knows what it calls.
//
// Rules that keep native code honest: memory handed to C stays referenced until C is done with it; a callback
// lives until it is released; C never calls back from another thread, whichever thread a call runs on; errno is
// taken in the same breath as the call that set it. Layouts are those of 64-bit little-endian Linux (x86-64, arm64).
import { createRequire } from "node:module";
import { isMainThread } from "node:worker_threads";
import type Ffi from "ffi-napi";
import type Ref from "ref-napi";

/** Scalar kinds a C function can take. `string` is a JS string passed as a NUL-terminated UTF-8 `char *`. */
export type ArgumentKind = "int" | "uint" | "i64" | "u64" | "size" | "pointer" | "string";
/** Kinds a C function can return. `size` and `ssize` come back as numbers, `i64` and `u64` as bigint. */
export type ResultKind = "void" | "int" | "uint" | "i64" | "u64" | "size" | "ssize" | "pointer";
/** What a pointer argument accepts: memory, an address, a callback, or null. */
export type Pointer = Uint8Array | number | bigint | Callback | null;

interface ArgumentValues {
  int: number;
  uint: number;
  i64: number | bigint;
  u64: number | bigint;
  size: number;
  pointer: Pointer;
  string: string | null;
}
interface ResultValues {
  void: undefined;
  int: number;
  uint: number;
  i64: bigint;
  u64: bigint;
  size: number;
  ssize: number;
  pointer: number;
}

/** A prepared C function: positional arguments by kind. Not to be used from two threads at once. */
export type Call<A extends readonly ArgumentKind[], R extends ResultKind> = (
  ...args: { [K in keyof A]: ArgumentValues[A[K]] }
) => ResultValues[R];

/** A prepared C function that runs on a thread of libuv's pool, while the event loop goes on. */
export type ThreadCall<A extends readonly ArgumentKind[], R extends ResultKind> = (
  ...args: { [K in keyof A]: ArgumentValues[A[K]] }
) => Promise<ResultValues[R]>;

/** A JS function that C may call, on the main thread only, until `release()`. */
export interface Callback {
  readonly address: number;
  release(): void;
}

/** A watch on a file descriptor. `close()` it before closing the descriptor itself. */
export interface Watch {
  close(): void;
}

// Imported, Node would read each file of these packages twice, the first time for the names that it exports.
const require = createRequire(import.meta.url);
const ffi = require("ffi-napi") as typeof Ffi;
const ref = require("ref-napi") as typeof Ref;

// The internal binding behind every ffi-napi call. Versions are pinned exactly and test/loader/ffi.test.ts
// holds this door open.
const bindings: {
  ffi_call(cif: Buffer, fn: Buffer, result: Buffer, args: Buffer): void;
  ffi_call_async(
    cif: Buffer,
    fn: Buffer,
    result: Buffer,
    args: Buffer,
    done: (error: string | null) => void,
  ): void;
} = require("ffi-napi/lib/bindings");

const WORD = 8;
const TWO32 = 0x1_0000_0000;

const argumentTypes: Record<ArgumentKind, Ref.Type> = {
  int: ref.types.int32,
  uint: ref.types.uint32,
  i64: ref.types.int64,
  u64: ref.types.uint64,
  size: ref.types.uint64,
  pointer: ref.types.uint64,
  string: ref.types.uint64,
};
const resultTypes: Record<ResultKind, Ref.Type> = {
  void: ref.types.void,
  int: ref.types.int32,
  uint: ref.types.uint32,
  i64: ref.types.int64,
  u64: ref.types.uint64,
  size: ref.types.uint64,
  ssize: ref.types.int64,
  pointer: ref.types.uint64,
};

// Asking the addon for an address registers the memory in its pointer table; a buffer that is used again
// should pay that once.
const addresses = new WeakMap<Uint8Array, number>();

/** The address of a buffer's first byte; 0 for an empty one. Valid as long as the buffer is referenced. */
export function addressOf(memory: Uint8Array): number {
  if (memory.byteLength === 0) return 0;
  let address = addresses.get(memory);
  if (address === undefined) {
    address = ref.address(memory as Buffer);
    addresses.set(memory, address);
  }
  return address;
}

/** A NUL-terminated UTF-8 copy of `text`. A NUL inside it would silently cut it short in C, so it is refused. */
export function cString(text: string): Buffer {
  if (text.includes("\0")) {
    throw new TypeError(`The string ${JSON.stringify(text)} contains a NUL character; C would cut it there.`);
  }
  return Buffer.from(`${text}\0`, "utf8");
}

let lastErrno = 0;
// Holds what the latest call was given. Storing it after the call is a use that the optimizer must respect, so
// the garbage collector cannot free an argument while C still reads it.
const held: unknown[] = [];

// A throw inside a callback cannot pass through C frames. It waits here and is thrown by the call that was
// running; outside of any call (a watch fired by the event loop) it becomes an uncaught exception.
let depth = 0;
let thrown: { error: unknown } | undefined;

function settle(): void {
  if (thrown !== undefined && depth === 0) {
    const { error } = thrown;
    thrown = undefined;
    throw error;
  }
}

/** errno as the most recent prepared call left it. Meaningful only if that call reported failure. */
export function errno(): number {
  return lastErrno;
}

function errnoCell(): Int32Array {
  const location = ffi.ForeignFunction(
    ffi.DynamicLibrary("libc.so.6").get("__errno_location"),
    ref.refType(ref.types.void),
    [],
  );
  const cell = ref.reinterpret(location() as Buffer, 4, 0);
  return new Int32Array(cell.buffer, cell.byteOffset, 1);
}
// This thread's errno, read as plain memory: no call in between that could overwrite it.
const errnoAt = errnoCell();

function splitInto(words: Uint32Array, slot: number, value: number): void {
  if (!Number.isSafeInteger(value)) throw new TypeError(`${value} is not a 64-bit integer; pass a bigint.`);
  words[slot] = value >>> 0;
  words[slot + 1] = Math.floor(value / TWO32) >>> 0;
}

function addressIn(value: Pointer): number | bigint {
  if (value === null) return 0;
  if (typeof value === "number" || typeof value === "bigint") return value;
  return value instanceof Uint8Array ? addressOf(value) : value.address;
}

/** What one call at a time is described by: where its arguments and its result are. */
interface Frame {
  readonly cif: Buffer;
  readonly block: Buffer;
  readonly result: Buffer;
  /** Stores arguments. What they point to must be kept: in `args`, strings are replaced by the memory they are in. */
  fill(args: unknown[]): void;
  read(): unknown;
}

function frameOf(symbol: string, returns: ResultKind, kinds: readonly ArgumentKind[]): Frame {
  const cif = ffi.CIF(
    resultTypes[returns],
    kinds.map((kind) => argumentTypes[kind]),
  );
  const count = kinds.length;
  // Buffers of their own (never from the shared pool), so the typed views below line up.
  const slots = Buffer.alloc(Math.max(1, count) * WORD);
  const block = Buffer.alloc(Math.max(1, count) * WORD);
  const result = Buffer.alloc(WORD);
  const base = ref.address(slots);
  const words = new Uint32Array(slots.buffer, slots.byteOffset, slots.length / 4);
  const wide = new BigInt64Array(slots.buffer, slots.byteOffset, slots.length / WORD);
  for (let i = 0; i < count; i++) block.writeBigUInt64LE(BigInt(base + i * WORD), i * WORD);
  const resultInt = new Int32Array(result.buffer, result.byteOffset, 2);
  const resultWord = new Uint32Array(result.buffer, result.byteOffset, 2);
  const resultWide = new BigInt64Array(result.buffer, result.byteOffset, 1);
  const low = (): number => resultWord[0] ?? 0;

  const store = (i: number, kind: ArgumentKind, value: unknown, args: unknown[]): void => {
    let word = value;
    if (kind === "pointer") word = addressIn(value as Pointer);
    else if (kind === "string" && value !== null) {
      const text = cString(value as string);
      args[i] = text;
      word = addressOf(text);
    } else if (kind === "string") word = 0;
    if (typeof word === "number") {
      if (kind === "int" || kind === "uint") words[i * 2] = word;
      else splitInto(words, i * 2, word);
    } else if (typeof word === "bigint" && kind !== "int" && kind !== "uint")
      wide[i] = BigInt.asIntN(64, word);
    else throw new TypeError(`${symbol}(): argument ${i + 1} must be ${kind}, not ${typeof value}.`);
  };

  const read: Record<ResultKind, () => unknown> = {
    void: () => undefined,
    int: () => resultInt[0],
    uint: low,
    i64: () => resultWide[0],
    u64: () => BigInt.asUintN(64, resultWide[0] ?? 0n),
    size: () => (resultWord[1] ?? 0) * TWO32 + low(),
    ssize: () => (resultInt[1] ?? 0) * TWO32 + low(),
    pointer: () => (resultWord[1] ?? 0) * TWO32 + low(),
  };
  const readResult = read[returns];

  const fill = (args: unknown[]): void => {
    if (args.length !== count) {
      throw new TypeError(`${symbol}() takes ${count} arguments, not ${args.length}.`);
    }
    for (let i = 0; i < count; i++) store(i, kinds[i] as ArgumentKind, args[i], args);
  };
  // The slots are written by address: whoever has the frame has them as well.
  return { cif, block, result, fill, read: readResult };
}

function prepare<const A extends readonly ArgumentKind[], R extends ResultKind>(
  fn: Buffer,
  symbol: string,
  returns: R,
  kinds: A,
): Call<A, R> {
  const { cif, block, result, fill, read } = frameOf(symbol, returns, kinds);
  const call = (...args: unknown[]): unknown => {
    fill(args);
    depth++;
    try {
      bindings.ffi_call(cif, fn, result, block);
      lastErrno = errnoAt[0] ?? 0;
    } finally {
      depth--;
      held[0] = args;
    }
    const value = read();
    if (thrown !== undefined) settle();
    return value;
  };
  return call as unknown as Call<A, R>;
}

// What threads are at work with, until they are done.
const underway = new Set<object>();

function prepareOnThread<const A extends readonly ArgumentKind[], R extends ResultKind>(
  fn: Buffer,
  symbol: string,
  returns: R,
  kinds: A,
): ThreadCall<A, R> {
  const call = (...args: unknown[]): Promise<unknown> =>
    new Promise((resolve, reject) => {
      const frame = frameOf(symbol, returns, kinds);
      frame.fill(args);
      const kept = { frame, fn, args };
      underway.add(kept);
      bindings.ffi_call_async(frame.cif, fn, frame.result, frame.block, (error) => {
        underway.delete(kept);
        if (error === null) resolve(frame.read());
        else reject(new Error(`${symbol}() could not be called: ${error}`));
      });
    });
  return call as unknown as ThreadCall<A, R>;
}

/** An open shared library. It stays loaded for the life of the process. */
export interface Library {
  readonly name: string;
  /** Whether the library exports `symbol`: how optional features of other versions are told apart. */
  has(symbol: string): boolean;
  /** The address of a function or variable. Throws if the library has no such symbol. */
  addressOf(symbol: string): number;
  /** A fast call of `symbol`. The caller vouches for the signature; a wrong one is undefined behaviour. */
  prepare<const A extends readonly ArgumentKind[], R extends ResultKind>(
    symbol: string,
    returns: R,
    args: A,
  ): Call<A, R>;
  /**
   * A call of `symbol` that runs on another thread. errno is that thread's, and lost. What C does with the memory it is
   * given must not be done from here meanwhile, and it must call nothing of ours back.
   */
  prepareOnThread<const A extends readonly ArgumentKind[], R extends ResultKind>(
    symbol: string,
    returns: R,
    args: A,
  ): ThreadCall<A, R>;
}

/** Opens a shared library by soname (`libc.so.6`), or the process itself (`null`: Node's own exports, libuv). */
export function openLibrary(name: string | null): Library {
  const label = name ?? "the process itself";
  const library = ffi.DynamicLibrary(name as string);
  const find = (symbol: string): Buffer => {
    try {
      return library.get(symbol);
    } catch (cause) {
      throw new Error(`${label} has no symbol ${symbol}; a newer version of it may be needed.`, { cause });
    }
  };
  return {
    name: label,
    has: (symbol) => {
      try {
        library.get(symbol);
        return true;
      } catch {
        return false;
      }
    },
    addressOf: (symbol) => ref.address(find(symbol)),
    prepare: (symbol, returns, args) => prepare(find(symbol), symbol, returns, args),
    prepareOnThread: (symbol, returns, args) => prepareOnThread(find(symbol), symbol, returns, args),
  };
}

const libc = openLibrary("libc.so.6");
const memcpy = libc.prepare("memcpy", "pointer", ["pointer", "pointer", "size"]);
const strlen = libc.prepare("strlen", "size", ["pointer"]);

/** A copy of `length` bytes of native memory. The address must be valid: a wrong one ends the process. */
export function readMemory(address: number, length: number): Buffer {
  const copy = Buffer.alloc(length);
  if (length > 0) memcpy(copy, address, length);
  return copy;
}

/** Copies `bytes` to native memory. The address must have room for them. */
export function writeMemory(address: number, bytes: Uint8Array): void {
  if (bytes.byteLength > 0) memcpy(address, bytes, bytes.byteLength);
}

/** The NUL-terminated UTF-8 string at an address; null for a null pointer. */
export function readCString(address: number): string | null {
  return address === 0 ? null : readMemory(address, strlen(address)).toString("utf8");
}

/** Kinds a callback's parameters can have; pointers arrive as addresses. */
export type ParameterKind = "int" | "uint" | "size" | "pointer";

const callbacks = new Set<object>();

/**
 * Makes a JS function callable from C. It must be called on this thread only. What it throws is thrown by
 * the prepared call under way, after C has returned (C sees `0`), or is an uncaught exception if none is.
 */
export function callback(
  returns: "void" | "int",
  parameters: readonly ParameterKind[],
  body: (...args: number[]) => number | undefined,
): Callback {
  const guarded = (...args: unknown[]): number | null => {
    try {
      const value = body(...args.map(Number));
      return returns === "void" ? null : (value ?? 0);
    } catch (error) {
      if (depth > 0) thrown ??= { error };
      else {
        // Not a tick: that would still run inside the addon's frames, which swallow it.
        setImmediate(() => {
          throw error;
        });
      }
      return returns === "void" ? null : 0;
    }
  };
  const code = ffi.Callback(
    resultTypes[returns],
    parameters.map((kind) => argumentTypes[kind]),
    guarded,
  );
  callbacks.add(code);
  return { address: ref.address(code), release: () => void callbacks.delete(code) };
}

const UV_POLL = 8;
const UV_READABLE = 1;

interface Poller {
  watch(fd: number, onReadable: () => void, keepAlive: boolean): Watch;
}
let poller: Poller | undefined;

// Node has no public way to wait for a descriptor it does not know (epoll, netlink, a raw datagram socket),
// but it exports the libuv it runs on.
function createPoller(): Poller {
  if (!isMainThread) {
    throw new Error("watchFd() works on the main thread only: worker threads run another event loop.");
  }
  const uv = openLibrary(null);
  const loop = uv.prepare("uv_default_loop", "pointer", [])();
  const size = uv.prepare("uv_handle_size", "size", ["int"])(UV_POLL);
  const init = uv.prepare("uv_poll_init", "int", ["pointer", "pointer", "int"]);
  const start = uv.prepare("uv_poll_start", "int", ["pointer", "int", "pointer"]);
  const close = uv.prepare("uv_close", "void", ["pointer", "pointer"]);
  const unref = uv.prepare("uv_unref", "void", ["pointer"]);
  const describe = uv.prepare("uv_strerror", "pointer", ["int"]);
  const calloc = libc.prepare("calloc", "pointer", ["size", "size"]);
  const release = libc.prepare("free", "void", ["pointer"]);
  const free = libc.addressOf("free");
  const open = new Map<number, () => void>();
  // One native callback for all watches, found by handle: no closure is ever freed under libuv's feet.
  const onPoll = callback("void", ["pointer", "int", "int"], (handle = 0) => {
    open.get(handle)?.();
    return undefined;
  });
  // libuv owns a closing handle until its close callback runs, which is `free` itself: no memory of ours, and
  // no JS, is needed by then.
  const shut = (handle: number): void => {
    if (open.delete(handle)) close(handle, free);
  };
  process.once("exit", () => {
    for (const handle of [...open.keys()]) shut(handle);
  });
  const fail = (fd: number, code: number): Error =>
    new Error(`Cannot watch file descriptor ${fd}: ${readCString(describe(code))}. Is it open and pollable?`);
  return {
    watch(fd, onReadable, keepAlive) {
      const handle = calloc(1, size);
      if (handle === 0) throw new Error(`Cannot watch file descriptor ${fd}: out of memory.`);
      const made = init(loop, handle, fd);
      if (made < 0) {
        release(handle);
        throw fail(fd, made);
      }
      // The reader runs right after libuv's turn, as an immediate: inside it, what a reader or a tick it queued
      // throws would be lost between the addon's frames.
      let pending: NodeJS.Immediate | undefined;
      open.set(handle, () => {
        pending ??= setImmediate(() => {
          pending = undefined;
          onReadable();
        });
      });
      const started = start(handle, UV_READABLE, onPoll);
      if (started < 0) {
        shut(handle);
        throw fail(fd, started);
      }
      if (!keepAlive) unref(handle);
      let closed = false;
      return {
        close: () => {
          if (closed) return;
          closed = true;
          clearImmediate(pending);
          shut(handle);
        },
      };
    },
  };
}

/**
 * Calls `onReadable` on the main loop whenever `fd` can be read (or has an error or hang-up pending), again
 * and again until it is drained. Makes `fd` non-blocking. One watch per descriptor; close the watch before
 * the descriptor. With `keepAlive: false` the watch alone does not keep the process running.
 */
export function watchFd(fd: number, onReadable: () => void, options: { keepAlive?: boolean } = {}): Watch {
  poller ??= createPoller();
  return poller.watch(fd, onReadable, options.keepAlive ?? true);
}
