// libbpf.so.1 as a table of prepared calls, and the few things every file above it shares: the typed error,
// the log, pins, ids and info structs.
//
// Bindings follow libbpf 1.1 (Debian 12); what it lacks (the links of a TCX query) goes through bpf(2) itself.
// Structs are written by hand at the offsets of <bpf/libbpf.h>, <bpf/bpf.h> and <linux/bpf.h>, 64-bit
// little-endian; each begins with its own size, so an older or newer library reads only what it knows.
import { closeSync, mkdirSync, readFileSync, rmSync, statfsSync } from "node:fs";
import { constants } from "node:os";
import { dirname } from "node:path";
import { isMainThread } from "node:worker_threads";
import { addressOf, callback, errno, openLibrary, readCString } from "./ffi.ts";

// libbpf prints through one callback for the whole process, and C must not call JS from another thread.
if (!isMainThread) throw new Error("libbpf-ts works on the main thread only; import it there.");

export const libc = openLibrary("libc.so.6");
const library = openLibrary("libbpf.so.1");

/** Prepared calls. Functions returning `int` return a negative errno; those returning a pointer set errno. */
export const bpf = {
  objectOpen: library.prepare("bpf_object__open_mem", "pointer", ["pointer", "size", "pointer"]),
  objectLoad: library.prepare("bpf_object__load", "int", ["pointer"]),
  objectLoadOnThread: library.prepareOnThread("bpf_object__load", "int", ["pointer"]),
  objectClose: library.prepare("bpf_object__close", "void", ["pointer"]),
  objectNextMap: library.prepare("bpf_object__next_map", "pointer", ["pointer", "pointer"]),
  objectNextProgram: library.prepare("bpf_object__next_program", "pointer", ["pointer", "pointer"]),
  objectFindMap: library.prepare("bpf_object__find_map_by_name", "pointer", ["pointer", "string"]),

  mapName: library.prepare("bpf_map__name", "pointer", ["pointer"]),
  mapFd: library.prepare("bpf_map__fd", "int", ["pointer"]),
  mapType: library.prepare("bpf_map__type", "int", ["pointer"]),
  mapKeySize: library.prepare("bpf_map__key_size", "uint", ["pointer"]),
  mapValueSize: library.prepare("bpf_map__value_size", "uint", ["pointer"]),
  mapMaxEntries: library.prepare("bpf_map__max_entries", "uint", ["pointer"]),
  mapFlags: library.prepare("bpf_map__map_flags", "uint", ["pointer"]),
  mapSetMaxEntries: library.prepare("bpf_map__set_max_entries", "int", ["pointer", "uint"]),
  mapReuseFd: library.prepare("bpf_map__reuse_fd", "int", ["pointer", "int"]),
  mapInitialValue: library.prepare("bpf_map__initial_value", "pointer", ["pointer", "pointer"]),
  mapTypeName: library.prepare("libbpf_bpf_map_type_str", "pointer", ["int"]),

  programName: library.prepare("bpf_program__name", "pointer", ["pointer"]),
  programInsns: library.prepare("bpf_program__insns", "pointer", ["pointer"]),
  programInsnCnt: library.prepare("bpf_program__insn_cnt", "uint", ["pointer"]),
  programFd: library.prepare("bpf_program__fd", "int", ["pointer"]),
  programSetAutoload: library.prepare("bpf_program__set_autoload", "int", ["pointer", "int"]),
  programSetLogLevel: library.prepare("bpf_program__set_log_level", "int", ["pointer", "uint"]),
  programTypeName: library.prepare("libbpf_bpf_prog_type_str", "pointer", ["int"]),
  programLoad: library.prepare("bpf_prog_load", "int", [
    "int",
    "string",
    "string",
    "pointer",
    "size",
    "pointer",
  ]),
  programTestRun: library.prepare("bpf_prog_test_run_opts", "int", ["int", "pointer"]),

  enableStats: library.prepare("bpf_enable_stats", "int", ["int"]),

  lookup: library.prepare("bpf_map_lookup_elem", "int", ["int", "pointer", "pointer"]),
  update: library.prepare("bpf_map_update_elem", "int", ["int", "pointer", "pointer", "u64"]),
  delete: library.prepare("bpf_map_delete_elem", "int", ["int", "pointer"]),
  nextKey: library.prepare("bpf_map_get_next_key", "int", ["int", "pointer", "pointer"]),
  lookupBatch: library.prepare("bpf_map_lookup_batch", "int", [
    "int",
    "pointer",
    "pointer",
    "pointer",
    "pointer",
    "pointer",
    "pointer",
  ]),
  updateBatch: library.prepare("bpf_map_update_batch", "int", [
    "int",
    "pointer",
    "pointer",
    "pointer",
    "pointer",
  ]),
  deleteBatch: library.prepare("bpf_map_delete_batch", "int", ["int", "pointer", "pointer", "pointer"]),

  pin: library.prepare("bpf_obj_pin", "int", ["int", "string"]),
  openPin: library.prepare("bpf_obj_get", "int", ["string"]),
  info: library.prepare("bpf_obj_get_info_by_fd", "int", ["int", "pointer", "pointer"]),
  nextId: {
    program: library.prepare("bpf_prog_get_next_id", "int", ["uint", "pointer"]),
    map: library.prepare("bpf_map_get_next_id", "int", ["uint", "pointer"]),
    link: library.prepare("bpf_link_get_next_id", "int", ["uint", "pointer"]),
  },
  fdById: {
    program: library.prepare("bpf_prog_get_fd_by_id", "int", ["uint"]),
    map: library.prepare("bpf_map_get_fd_by_id", "int", ["uint"]),
    link: library.prepare("bpf_link_get_fd_by_id", "int", ["uint"]),
    btf: library.prepare("bpf_btf_get_fd_by_id", "int", ["uint"]),
  },

  linkCreate: library.prepare("bpf_link_create", "int", ["int", "int", "int", "pointer"]),
  linkUpdate: library.prepare("bpf_link_update", "int", ["int", "int", "pointer"]),
  linkDetach: library.prepare("bpf_link_detach", "int", ["int"]),
  tcHookCreate: library.prepare("bpf_tc_hook_create", "int", ["pointer"]),
  tcHookDestroy: library.prepare("bpf_tc_hook_destroy", "int", ["pointer"]),
  tcAttach: library.prepare("bpf_tc_attach", "int", ["pointer", "pointer"]),
  tcDetach: library.prepare("bpf_tc_detach", "int", ["pointer", "pointer"]),
  xdpAttach: library.prepare("bpf_xdp_attach", "int", ["int", "int", "uint", "pointer"]),
  xdpDetach: library.prepare("bpf_xdp_detach", "int", ["int", "uint", "pointer"]),
  xdpQuery: library.prepare("bpf_xdp_query", "int", ["int", "int", "pointer"]),

  possibleCpus: library.prepare("libbpf_num_possible_cpus", "int", []),
  probeHelper: library.prepare("libbpf_probe_bpf_helper", "int", ["int", "int", "pointer"]),
  probeMapType: library.prepare("libbpf_probe_bpf_map_type", "int", ["int", "pointer"]),
  setPrint: library.prepare("libbpf_set_print", "pointer", ["pointer"]),
};

const strerror = libc.prepare("strerror", "pointer", ["int"]);

export const ENOENT = 2;
export const EINTR = 4;
export const EBUSY = 16;
export const EEXIST = 17;
export const ENODEV = 19;
export const EINVAL = 22;
export const ENOSPC = 28;
export const EOPNOTSUPP = 95;
/** The kernel's own ENOTSUPP, which has no number in userspace. */
export const ENOTSUPP = 524;

const errorNames = new Map(Object.entries(constants.errno).map(([name, number]) => [number as number, name]));
errorNames.set(EOPNOTSUPP, "EOPNOTSUPP");
errorNames.set(ENOTSUPP, "ENOTSUPP");

/** A failed call of libbpf or the kernel. The message says what failed, to what, and why. */
export class LibbpfError extends Error {
  override name = "LibbpfError";
  /** The C function that failed, such as `bpf_map_update_elem`. */
  readonly operation: string;
  /** Positive errno; 0 if the failure is not the kernel's. */
  readonly errno: number;
  /** The errno's name, such as `EPERM`; empty if `errno` is 0. */
  readonly code: string;

  constructor(operation: string, number: number, message: string) {
    super(message);
    this.operation = operation;
    this.errno = number;
    this.code = nameOf(number);
  }
}

function nameOf(number: number): string {
  return number === 0 ? "" : (errorNames.get(number) ?? `errno ${number}`);
}

/**
 * Builds the error of a failed call: `Cannot <what>: <errno in words> (CODE). <advice>`, followed by what libbpf
 * itself said about it.
 */
export function failure(operation: string, number: number, what: string, advice = ""): LibbpfError {
  const words = number === ENOTSUPP ? "Operation not supported" : readCString(strerror(number));
  const code = nameOf(number);
  const said = warnings.splice(0).join(" ");
  const permission =
    advice === "" && code === "EPERM"
      ? "This needs root, or the capabilities CAP_SYS_ADMIN and CAP_NET_ADMIN."
      : advice;
  const parts = [`Cannot ${what}: ${words} (${code}).`, permission, said === "" ? "" : `libbpf: ${said}`];
  return new LibbpfError(operation, number, parts.filter((part) => part !== "").join(" "));
}

/** Returns a non-negative result; throws the error of a negative one. */
export function check(result: number, operation: string, what: string, advice?: string): number {
  if (result < 0) throw failure(operation, -result, what, advice);
  return result;
}

/** How serious libbpf holds a message to be. */
export type LogLevel = "warn" | "info" | "debug";
const levels: readonly LogLevel[] = ["warn", "info", "debug"];

let listener: ((level: LogLevel, message: string) => void) | undefined;
let recorder: ((level: LogLevel, message: string) => void) | undefined;
// The latest warnings, to be told with the error they explain.
const warnings: string[] = [];
const WARNINGS_KEPT = 4;

const vasprintf = libc.prepare("vasprintf", "int", ["pointer", "pointer", "pointer"]);
const free = libc.prepare("free", "void", ["pointer"]);
const formatted = Buffer.alloc(8);

// libbpf hands over a C va_list, which only C can read.
const print = callback("int", ["int", "pointer", "pointer"], (level = 0, format = 0, list = 0) => {
  const name = levels[level] ?? "debug";
  if (name === "debug" && listener === undefined && recorder === undefined) return 0;
  if (vasprintf(formatted, format, list) < 0) return 0;
  const address = Number(formatted.readBigUInt64LE());
  const message = (readCString(address) ?? "").trimEnd().replace(/^libbpf: /, "");
  free(address);
  if (name === "warn" && !message.includes("\n")) {
    warnings.push(message.endsWith(".") ? message : `${message}.`);
    if (warnings.length > WARNINGS_KEPT) warnings.shift();
  }
  recorder?.(name, message);
  listener?.(name, message);
  return 0;
});
bpf.setPrint(print);

/** Sends everything libbpf prints to `listener`; `undefined` makes it silent again, which is how it starts. */
export function setLibbpfLog(to: ((level: LogLevel, message: string) => void) | undefined): void {
  listener = to;
}

/** Runs `body`, giving each message libbpf prints meanwhile to `record`. */
export function recording<T>(record: (level: LogLevel, message: string) => void, body: () => T): T {
  const before = recorder;
  recorder = record;
  warnings.length = 0;
  try {
    return body();
  } finally {
    recorder = before;
  }
}

// Whether libbpf is to be silent, and how many threads run it: it must not print through us from one of them.
let silent = false;
let threads = 0;

function choosePrint(): void {
  bpf.setPrint(silent || threads > 0 ? null : print);
}

/**
 * Runs `body` with libbpf silent, unless somebody listens: it has hundreds of lines to say for nobody, and each comes by
 * a callback, which costs more than what it tells of.
 */
export function silently<T>(body: () => T): T {
  if (listener !== undefined) return body();
  silent = true;
  choosePrint();
  try {
    return body();
  } finally {
    silent = false;
    choosePrint();
  }
}

/** Whether somebody listens to what libbpf prints. */
export function isListening(): boolean {
  return listener !== undefined;
}

/** Waits for libbpf on another thread. What it prints meanwhile, there or here, nobody hears. */
export async function onThread<T>(call: () => Promise<T>): Promise<T> {
  threads += 1;
  choosePrint();
  try {
    return await call();
  } finally {
    threads -= 1;
    choosePrint();
  }
}

/** A buffer for an `_opts` struct: zeroes, with its own size in the first field. */
export function options(size: number): Buffer {
  const struct = Buffer.alloc(size);
  struct.writeBigUInt64LE(BigInt(size));
  return struct;
}

// What a struct points at lives as long as the struct does, or until the field points elsewhere.
const pointees = new WeakMap<Buffer, Map<number, Uint8Array>>();

/** Writes a pointer field, and keeps `memory` from being collected while `struct` is in use. */
export function writePointer(struct: Buffer, offset: number, memory: Uint8Array): void {
  let fields = pointees.get(struct);
  if (fields === undefined) {
    fields = new Map();
    pointees.set(struct, fields);
  }
  fields.set(offset, memory);
  struct.writeBigUInt64LE(BigInt(addressOf(memory)), offset);
}

/** Reads a kernel info struct (`bpf_map_info` and the like). Fields this kernel does not know stay zero. */
export function readInfo(fd: number, size: number, what: string, prefill?: (info: Buffer) => void): Buffer {
  const info = Buffer.alloc(size);
  prefill?.(info);
  const length = Buffer.alloc(4);
  length.writeUInt32LE(size);
  check(bpf.info(fd, info, length), "bpf_obj_get_info_by_fd", `read the info of ${what}`);
  return info;
}

/** A fixed-size, NUL-padded name inside a kernel struct. */
export function readName(struct: Buffer, offset: number, size: number): string {
  const bytes = struct.subarray(offset, offset + size);
  const end = bytes.indexOf(0);
  return bytes.toString("utf8", 0, end < 0 ? size : end);
}

/** What an object in the kernel is addressed by. */
export type Handle = { readonly fd: number } | { readonly id: number };

/** Runs `body` with a descriptor for `handle`; one opened for the purpose is closed again. */
export function withFd<T>(kind: "program" | "map" | "link", handle: Handle, body: (fd: number) => T): T {
  if ("fd" in handle) return body(handle.fd);
  const fd = openById(kind, handle.id);
  try {
    return body(fd);
  } finally {
    closeSync(fd);
  }
}

/** Opens the object of an id. The error is `ENOENT` if it is gone, which it may be at any time. */
export function openById(kind: "program" | "map" | "link", id: number): number {
  const operation = `bpf_${kind === "program" ? "prog" : kind}_get_fd_by_id`;
  return check(bpf.fdById[kind](id), operation, `open ${kind} ${id}`);
}

/** The ids of all programs, maps or links in the kernel, ascending; what comes and goes meanwhile may be missed. */
export function* ids(kind: "program" | "map" | "link"): Generator<number> {
  const next = Buffer.alloc(4);
  for (let id = 0; ; ) {
    const result = bpf.nextId[kind](id, next);
    if (result === -ENOENT) return;
    check(
      result,
      `bpf_${kind === "program" ? "prog" : kind}_get_next_id`,
      `list the ${kind}s of this machine`,
    );
    id = next.readUInt32LE();
    yield id;
  }
}

const NEEDS_BPFFS = "Pins live in a BPF file system; names in it have no dots, and mountBpffs() mounts one.";

/** Pins a descriptor at `path`, making parent directories. The file must not exist. */
export function pinFd(fd: number, path: string, what: string): void {
  mkdirSync(dirname(path), { recursive: true });
  const result = bpf.pin(fd, path);
  const advice = result === -EEXIST ? "Something is pinned there already; unpin it first." : NEEDS_BPFFS;
  check(result, "bpf_obj_pin", `pin ${what} at ${path}`, advice);
}

/** Opens what is pinned at `path`; `undefined` if the path does not exist. */
export function openPin(path: string, what: string): number | undefined {
  const result = bpf.openPin(path);
  if (result === -ENOENT) return undefined;
  return check(result, "bpf_obj_get", `open the ${what} pinned at ${path}`, NEEDS_BPFFS);
}

/** The error of opening a pin that is not there. */
export function noPin(path: string, what: string): LibbpfError {
  return failure("bpf_obj_get", ENOENT, `open the ${what} pinned at ${path}`, "Nothing is pinned there.");
}

/** Removes a pin. The object itself lives on while anything else refers to it. False if there was none. */
export function unpin(path: string): boolean {
  try {
    rmSync(path);
    return true;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return false;
    throw error;
  }
}

const BPF_FS_MAGIC = 0xcafe4a11;

/** Whether `path` exists and lies in a BPF file system. */
export function isBpffs(path: string): boolean {
  try {
    return statfsSync(path).type === BPF_FS_MAGIC;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return false;
    throw error;
  }
}

/** Mounts a BPF file system at `path` (made if missing) unless it is one already. True if it mounted one. */
export function mountBpffs(path: string): boolean {
  if (isBpffs(path)) return false;
  mkdirSync(path, { recursive: true });
  const mount = libc.prepare("mount", "int", ["string", "string", "string", "u64", "string"]);
  if (mount("bpf", path, "bpf", 0, "mode=0700") !== 0) {
    throw failure("mount", errno(), `mount a BPF file system at ${path}`);
  }
  return true;
}

const RLIMIT_MEMLOCK = 8;

/**
 * Lifts the limit on locked memory, which kernels before 5.11 charge maps and programs to. False if the process
 * may not lift it fully (no CAP_SYS_RESOURCE); it is then as high as the hard limit allows.
 */
export function raiseMemlock(): boolean {
  const getrlimit = libc.prepare("getrlimit", "int", ["int", "pointer"]);
  const setrlimit = libc.prepare("setrlimit", "int", ["int", "pointer"]);
  // struct rlimit { u64 soft, hard }; all ones is no limit.
  const limits = Buffer.alloc(16, 0xff);
  if (setrlimit(RLIMIT_MEMLOCK, limits) === 0) return true;
  if (getrlimit(RLIMIT_MEMLOCK, limits) === 0) {
    limits.copy(limits, 0, 8, 16);
    if (setrlimit(RLIMIT_MEMLOCK, limits) === 0) return limits.readBigInt64LE(8) === -1n;
  }
  throw failure("setrlimit", errno(), "lift the limit on locked memory (RLIMIT_MEMLOCK)");
}

let cpus = 0;

/** CPUs that may ever come online: the number of values a per-CPU map holds for each key. */
export function possibleCpus(): number {
  if (cpus === 0) cpus = check(bpf.possibleCpus(), "libbpf_num_possible_cpus", "count the CPUs");
  return cpus;
}

/** The bytes of an object: those given, or those of the file. */
export function readObject(source: string | Uint8Array): Uint8Array {
  return typeof source === "string" ? readFileSync(source) : source;
}
