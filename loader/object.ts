// A compiled BPF object on its way into the kernel: open, set constants and sizes, reuse pinned maps, load.
//
// Before `load()` an object is a plan that can be changed; after it, its programs and maps exist in the kernel
// and nothing can be. The verifier's verdict comes as an error whose message holds the lines that matter and
// whose `log` holds all of them.
import { closeSync } from "node:fs";
import { basename } from "node:path";
import { type Btf, BtfError, type Field, type Layout, type MapLayout, readBtf } from "./btf.ts";
import { codec } from "./codec.ts";
import { convert } from "./convert.ts";
import { cString, errno, readCString, readMemory, writeMemory } from "./ffi.ts";
import {
  bpf,
  check,
  failure,
  isListening,
  LibbpfError,
  onThread,
  openPin,
  options,
  readInfo,
  readObject,
  recording,
  silently,
  writePointer,
} from "./libbpf.ts";
import { BpfMap, mapInfo, mapTypeName } from "./map.ts";
import { Program } from "./program.ts";

/** What `setRodata` can store: an integer or boolean for a scalar, or the exact bytes. */
export type RodataValue = number | bigint | boolean | Uint8Array;

/** The verifier refused a program. */
export class VerifierError extends LibbpfError {
  override name = "VerifierError";
  readonly program: string;
  /** All that the verifier said about the program. */
  readonly log: string;

  constructor(program: string, log: string, number: number) {
    const reason = lastWords(log);
    super(
      "bpf_object__load",
      number,
      `The verifier refused program ${program}:\n${reason.map((line) => `  ${line}`).join("\n")}`,
    );
    this.program = program;
    this.log = log;
  }
}

/** A pinned map is not of the layout that the object wants. */
export class LayoutMismatch extends Error {
  override readonly name = "LayoutMismatch";
  readonly map: string;
  readonly path: string;
  /** One line for each difference, such as `value size: 8 pinned, 12 wanted`. */
  readonly differences: readonly string[];

  constructor(map: string, path: string, differences: readonly string[]) {
    super(
      `The map pinned at ${path} cannot serve as ${map}: ${differences.join("; ")}. ` +
        `Unpin it to start with an empty map, or pin the new layout at another path.`,
    );
    this.map = map;
    this.path = path;
    this.differences = differences;
  }
}

// The summary that ends a log is not why the program failed.
const SUMMARY = /^(processed \d+ insns|verification time|stack depth|max_states|peak_states|mark_read|\s*$)/;
const LAST_WORDS = 4;

function lastWords(log: string): string[] {
  const lines = log.split("\n").filter((line) => !SUMMARY.test(line));
  return lines.length === 0 ? ["(it gave no reason)"] : lines.slice(-LAST_WORDS);
}

const RINGBUF = 27;
const OPEN_OPTIONS_SIZE = 80;

/**
 * Opens a compiled object, from a file or from its bytes. Nothing is in the kernel yet.
 * `name` (by default the file's name) begins the kernel's names of the object's data sections.
 */
export function openObject(source: string | Uint8Array, options: { name?: string } = {}): BpfObject {
  const bytes = readObject(source);
  const name = options.name ?? (typeof source === "string" ? basename(source).replace(/\.o$/, "") : "object");
  return new BpfObject(bytes, name);
}

/** An opened object. `close()` it when its programs are attached and its maps pinned, or not needed. */
export class BpfObject {
  readonly name: string;
  /** Names of all programs, in order of the file. */
  readonly programs: readonly string[];
  /** Names of the maps that the C source declares; data sections are not among them. */
  readonly maps: readonly string[];
  readonly #bytes: Uint8Array;
  #btf: Btf | undefined;
  #layouts: readonly MapLayout[] | undefined;
  /** Layouts of pinned maps by the id of their BTF, which maps of one object have in common. */
  readonly #pinned = new Map<number, readonly MapLayout[]>();
  readonly #programs = new Map<string, number>();
  readonly #maps = new Map<string, number>();
  readonly #handed = new Map<string, { close(): void }>();
  #handle: number;
  #state: "open" | "loading" | "loaded" | "closed" = "open";
  /** `close()` was called while a thread was loading. */
  #closing = false;
  #log = "";

  /** Use `openObject()`. */
  constructor(bytes: Uint8Array, name: string) {
    this.name = name;
    this.#bytes = bytes;
    const opts = options(OPEN_OPTIONS_SIZE);
    const objectName = cString(name);
    writePointer(opts, 8, objectName);
    const open = (): number => bpf.objectOpen(bytes, bytes.byteLength, opts);
    // One that can't be opened is opened again, to hear why.
    this.#handle = silently(open) || this.#record(open);
    if (this.#handle === 0) {
      throw failure("bpf_object__open_mem", errno(), `open object ${name}`, "Is it an ELF file for BPF?");
    }
    for (let at = 0; ; ) {
      at = bpf.objectNextProgram(this.#handle, at);
      if (at === 0) break;
      this.#programs.set(readCString(bpf.programName(at)) ?? "", at);
    }
    for (let at = 0; ; ) {
      at = bpf.objectNextMap(this.#handle, at);
      if (at === 0) break;
      const mapName = readCString(bpf.mapName(at)) ?? "";
      // Data sections are maps to libbpf, named <object>.rodata and so on; a C name has no dot.
      if (!mapName.includes(".")) this.#maps.set(mapName, at);
    }
    this.programs = [...this.#programs.keys()];
    this.maps = [...this.#maps.keys()];
  }

  /** What libbpf, and the verifier if it refused or was asked to be verbose, said while opening and loading. */
  get log(): string {
    return this.#log;
  }

  /**
   * Sets `const volatile` globals, by name, before the load: the verifier then knows them and removes the code
   * they make unreachable. Integers are checked against the variable's size.
   */
  setRodata(values: Readonly<Record<string, RodataValue>>): void {
    this.#require("open");
    const btf = this.#readBtf();
    const variables = new Map<string, { section: string; field: Field }>();
    for (const section of btf.sections()) {
      if (section !== ".rodata" && !section.startsWith(".rodata.")) continue;
      for (const field of btf.variables(section)) variables.set(field.name, { section, field });
    }
    const writes = Object.entries(values).map(([name, value]) => {
      const variable = variables.get(name);
      if (variable === undefined) {
        const known = [...variables.keys()].join(", ") || "none";
        throw new LibbpfError(
          "bpf_map__initial_value",
          0,
          `Object ${this.name} has no constant ${name} in .rodata. It has: ${known}.`,
        );
      }
      return { ...variable, bytes: scalarBytes(name, value, variable.field.layout.size) };
    });
    for (const { section, field, bytes } of writes) {
      const size = Buffer.alloc(8);
      const map = bpf.objectFindMap(this.#handle, section);
      const start = map === 0 ? 0 : bpf.mapInitialValue(map, size);
      if (start === 0 || Number(size.readBigUInt64LE()) < field.offset + bytes.byteLength) {
        throw new LibbpfError(
          "bpf_map__initial_value",
          0,
          `Cannot set ${field.name}: object ${this.name} has no data for section ${section}.`,
        );
      }
      writeMemory(start + field.offset, bytes);
    }
  }

  /** Overrides how many elements a map may hold. */
  setMaxEntries(map: string, count: number): void {
    this.#require("open");
    const result = bpf.mapSetMaxEntries(this.#find(this.#maps, "map", map), count);
    check(result, "bpf_map__set_max_entries", `set the size of map ${map} to ${count}`);
  }

  /** Whether `load()` loads a program; all are by default. For programs that need a newer kernel. */
  setAutoload(program: string, autoload: boolean): void {
    this.#require("open");
    const handle = this.#find(this.#programs, "program", program);
    check(bpf.programSetAutoload(handle, autoload ? 1 : 0), "bpf_program__set_autoload", `set up ${program}`);
  }

  /**
   * Lets a map of the object be the one pinned at `path`, contents and all, instead of a new one. False if
   * nothing is pinned there.
   * @throws LayoutMismatch if type, sizes, flags or (where both have BTF) fields of key or value differ.
   */
  reuseMap(map: string, path: string): boolean {
    this.#require("open");
    const handle = this.#find(this.#maps, "map", map);
    const fd = openPin(path, "map");
    if (fd === undefined) return false;
    try {
      const differences = this.#compare(map, handle, fd);
      if (differences.length > 0) throw new LayoutMismatch(map, path, differences);
      check(bpf.mapReuseFd(handle, fd), "bpf_map__reuse_fd", `reuse the map pinned at ${path} as ${map}`);
      return true;
    } finally {
      closeSync(fd);
    }
  }

  /** Lets a map of the object be that of another object, contents and all. Their layouts must be the same. */
  shareMap(map: string, other: BpfMap): void {
    this.#require("open");
    const handle = this.#find(this.#maps, "map", map);
    check(bpf.mapReuseFd(handle, other.fd), "bpf_map__reuse_fd", `share the map ${map}`);
  }

  /** Whether `reuseMap` would find a map at `path` and take it. */
  fitsMap(map: string, path: string): boolean {
    this.#require("open");
    const handle = this.#find(this.#maps, "map", map);
    const fd = openPin(path, "map");
    if (fd === undefined) return false;
    try {
      return this.#compare(map, handle, fd).length === 0;
    } finally {
      closeSync(fd);
    }
  }

  /**
   * Creates the maps and loads the programs. `verbose` puts the verifier's account of every program in `log`.
   * Blocks while the verifier works: milliseconds to a second for big programs.
   * @throws VerifierError if the verifier refuses a program.
   */
  load(options: { verbose?: boolean } = {}): void {
    this.#require("open");
    if (options.verbose) for (const handle of this.#programs.values()) bpf.programSetLogLevel(handle, 1 | 4);
    const result = this.#record(() => bpf.objectLoad(this.#handle), options.verbose);
    if (result < 0) {
      const refused = /prog '([^']*)': -- BEGIN PROG LOAD LOG --\n([\s\S]*?)-- END PROG LOAD LOG --/g;
      const last = [...this.#log.matchAll(refused)].at(-1);
      const error =
        last === undefined
          ? failure("bpf_object__load", -result, `load object ${this.name}`)
          : new VerifierError(last[1] ?? "", last[2] ?? "", -result);
      // libbpf has unloaded it; what was opened cannot be loaded again.
      this.close();
      throw error;
    }
    this.#state = "loaded";
  }

  /**
   * As `load()`, on another thread, while the event loop goes on. Until it is done only `close()` may be called, which then
   * waits for it. Nobody hears what libbpf says meanwhile, so that the error has the errno alone: whoever wants the reasons
   * opens the object again and calls `load()`. If somebody listens to libbpf, it is loaded at once.
   * @throws LibbpfError also if it was closed meanwhile.
   */
  async loadOnThread(): Promise<void> {
    this.#require("open");
    if (isListening()) {
      this.load();
      return;
    }
    this.#state = "loading";
    let result: number;
    try {
      result = await onThread(() => bpf.objectLoadOnThread(this.#handle));
    } finally {
      this.#state = "loaded";
    }
    if (result >= 0 && !this.#closing) return;
    this.close();
    if (result < 0) throw failure("bpf_object__load", -result, `load object ${this.name}`);
    this.#require("loaded");
  }

  /**
   * Copies what the map pinned at `path` holds into a map of the loaded object, field by field by name: for a
   * map that `reuseMap` refused. Elements that are there already stay. Returns how many were copied; 0 if
   * nothing is pinned there, or if one of the two has no BTF, or values that differ by processor.
   */
  migrateMap(map: string, path: string): number {
    this.#require("loaded");
    const fd = openPin(path, "map");
    if (fd === undefined) return 0;
    const source = new BpfMap(fd, map, true);
    try {
      const target = this.map(map);
      const { btfId } = mapInfo({ fd });
      const have = pinnedLayout(btfId, map);
      const want = this.#mapLayout(map);
      if (source.perCpu || target.perCpu || source.id === target.id) return 0;
      if (!have?.key || !have.value || !want?.key || !want.value) return 0;
      const [oldKey, oldValue] = [codec(have.key), codec(have.value)];
      const [newKey, newValue] = [codec(want.key), codec(want.value)];
      let copied = 0;
      for (const [keyBytes, valueBytes] of source.entries()) {
        const key = newKey.encode(convert(want.key, oldKey.decode(keyBytes)) as never);
        if (target.lookup(key) !== undefined) continue;
        target.update(key, newValue.encode(convert(want.value, oldValue.decode(valueBytes)) as never));
        copied += 1;
      }
      return copied;
    } finally {
      source.close();
    }
  }

  /** A loaded program. It ends with the object. */
  program(name: string): Program {
    this.#require("loaded");
    const handle = this.#find(this.#programs, "program", name);
    const fd = bpf.programFd(handle);
    check(fd, "bpf_program__fd", `use program ${name}`, "It was not loaded: setAutoload() turned it off.");
    return this.#hand(`program ${name}`, () => new Program(fd, name, false));
  }

  /**
   * The instructions of a program as the kernel was given them, 8 bytes each (`struct bpf_insn`), with the functions that
   * it calls behind it.
   */
  instructions(name: string): Buffer {
    this.#require("loaded");
    const handle = this.#find(this.#programs, "program", name);
    return readMemory(bpf.programInsns(handle), 8 * bpf.programInsnCnt(handle));
  }

  /** A created map. It ends with the object. */
  map(name: string): BpfMap {
    this.#require("loaded");
    const fd = check(bpf.mapFd(this.#find(this.#maps, "map", name)), "bpf_map__fd", `use map ${name}`);
    return this.#hand(`map ${name}`, () => new BpfMap(fd, name, false));
  }

  /**
   * Lets go of everything, if a thread is loading it when that is done. Programs that are attached and maps that are pinned
   * stay in the kernel.
   */
  close(): void {
    if (this.#state === "closed") return;
    if (this.#state === "loading") {
      this.#closing = true;
      return;
    }
    this.#state = "closed";
    for (const handed of this.#handed.values()) handed.close();
    bpf.objectClose(this.#handle);
    this.#handle = 0;
  }

  #hand<T extends { close(): void }>(key: string, make: () => T): T {
    const before = this.#handed.get(key) as T | undefined;
    if (before !== undefined) return before;
    const made = make();
    this.#handed.set(key, made);
    return made;
  }

  #require(state: "open" | "loaded"): void {
    if (this.#state === state) return;
    const why = {
      open: `Object ${this.name} is not loaded yet; call load() first.`,
      loading: `Object ${this.name} is being loaded; wait for that.`,
      loaded: `Object ${this.name} is loaded already; this must be set before load().`,
      closed: `Object ${this.name} is closed; open it again.`,
    };
    throw new LibbpfError("bpf_object", 0, why[this.#state]);
  }

  #find(handles: ReadonlyMap<string, number>, kind: "map" | "program", name: string): number {
    const handle = handles.get(name);
    if (handle !== undefined) return handle;
    const known = [...handles.keys()].join(", ") || "none";
    throw new LibbpfError(
      `bpf_object__find_${kind}_by_name`,
      0,
      `Object ${this.name} has no ${kind} ${name}. It has: ${known}.`,
    );
  }

  #record<T>(body: () => T, verbose = false): T {
    return recording((level, message) => {
      if (level !== "debug" || (verbose && message.includes("PROG LOAD LOG"))) this.#log += `${message}\n`;
    }, body);
  }

  /** The object's own types, which are read once: it is asked for them map by map. */
  #readBtf(): Btf {
    this.#btf ??= readBtf(this.#bytes);
    return this.#btf;
  }

  #mapLayout(map: string): MapLayout | undefined {
    this.#layouts ??= layoutsOf(() => this.#readBtf());
    return this.#layouts.find(({ name }) => name === map);
  }

  #pinnedLayouts(btfId: number): readonly MapLayout[] {
    let layouts = this.#pinned.get(btfId);
    if (layouts === undefined) {
      layouts = pinnedLayouts(btfId);
      this.#pinned.set(btfId, layouts);
    }
    return layouts;
  }

  #compare(map: string, handle: number, fd: number): string[] {
    const pinned = mapInfo({ fd });
    const differences: string[] = [];
    const differ = (what: string, have: unknown, want: unknown): void => {
      if (have !== want) differences.push(`${what}: ${have} pinned, ${want} wanted`);
    };
    const type = bpf.mapType(handle);
    differ("type", pinned.type, mapTypeName(type));
    differ("key size", pinned.keySize, bpf.mapKeySize(handle));
    differ("value size", pinned.valueSize, bpf.mapValueSize(handle));
    // libbpf rounds a ring buffer up to whole pages, a power of two of them, only when it creates it.
    const entries = bpf.mapMaxEntries(handle);
    differ("max_entries", pinned.maxEntries, type === RINGBUF ? ringSize(entries) : entries);
    differ("flags", pinned.flags, bpf.mapFlags(handle));
    if (differences.length > 0) return differences;
    const have = this.#pinnedLayouts(pinned.btfId).find(({ name }) => name === map);
    const want = this.#mapLayout(map);
    if (have !== undefined && want !== undefined) {
      compareLayouts("key", have.key, want.key, differences);
      compareLayouts("value", have.value, want.value, differences);
    }
    return differences;
  }
}

function scalarBytes(name: string, value: RodataValue, size: number): Uint8Array {
  if (value instanceof Uint8Array) {
    if (value.byteLength === size) return value;
    throw new RangeError(`Constant ${name} has ${size} bytes, not ${value.byteLength}.`);
  }
  if (size !== 1 && size !== 2 && size !== 4 && size !== 8) {
    throw new TypeError(`Constant ${name} has ${size} bytes and is no integer; give its bytes.`);
  }
  const wide = BigInt(value);
  const bits = size * 8;
  if (wide !== BigInt.asUintN(bits, wide) && wide !== BigInt.asIntN(bits, wide)) {
    throw new RangeError(`${value} does not fit constant ${name}, which has ${bits} bits.`);
  }
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt.asUintN(64, wide));
  return bytes.subarray(0, size);
}

const PAGE = 4096;

function ringSize(bytes: number): number {
  let size = PAGE;
  while (size < bytes) size *= 2;
  return size;
}

const BTF_INFO_SIZE = 32;

function kernelBtf(id: number): Uint8Array {
  const fd = check(bpf.fdById.btf(id), "bpf_btf_get_fd_by_id", `open BTF ${id}`);
  try {
    const size = readInfo(fd, BTF_INFO_SIZE, `BTF ${id}`).readUInt32LE(8);
    const bytes = Buffer.alloc(size);
    readInfo(fd, BTF_INFO_SIZE, `BTF ${id}`, (request) => {
      writePointer(request, 0, bytes);
      request.writeUInt32LE(size, 8);
    });
    return bytes;
  } finally {
    closeSync(fd);
  }
}

// Layouts are a second opinion after the sizes: BTF that this reader cannot follow is no reason to refuse.
function layoutsOf(read: () => Btf): readonly MapLayout[] {
  try {
    return read().maps();
  } catch (error) {
    if (error instanceof BtfError) return [];
    throw error;
  }
}

function pinnedLayouts(btfId: number): readonly MapLayout[] {
  return btfId === 0 ? [] : layoutsOf(() => readBtf(kernelBtf(btfId)));
}

function pinnedLayout(btfId: number, map: string): MapLayout | undefined {
  return pinnedLayouts(btfId).find(({ name }) => name === map);
}

/** The layout of a map in the kernel by its own BTF; undefined if it has none. `name` is the full one, of the source. */
export function layoutOfMap(map: BpfMap, name: string): MapLayout | undefined {
  const { btfId } = mapInfo({ fd: map.fd });
  return pinnedLayout(btfId, name);
}

function compareLayouts(
  path: string,
  have: Layout | undefined,
  want: Layout | undefined,
  out: string[],
): void {
  if (have === undefined || want === undefined) return;
  if (have.kind === "struct" && want.kind === "struct") {
    const length = Math.max(have.fields.length, want.fields.length);
    for (let i = 0; i < length; i++) {
      const a = have.fields[i];
      const b = want.fields[i];
      if (a === undefined || b === undefined || a.name !== b.name || a.offset !== b.offset) {
        const say = (field: Field | undefined) =>
          field === undefined ? "nothing" : `${field.name} at byte ${field.offset}`;
        out.push(`${path}: ${say(a)} pinned, ${say(b)} wanted`);
        return;
      }
      compareLayouts(`${path}.${a.name}`, a.layout, b.layout, out);
    }
    return;
  }
  if (have.kind === "array" && want.kind === "array" && have.count === want.count) {
    compareLayouts(`${path}[]`, have.element, want.element, out);
    return;
  }
  if (have.kind !== want.kind || have.size !== want.size) {
    out.push(`${path}: ${have.kind} of ${have.size} bytes pinned, ${want.kind} of ${want.size} bytes wanted`);
  }
}
