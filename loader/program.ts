// BPF programs in the kernel: running one on a packet of ours, pins, and the list of all that are loaded.
import { closeSync } from "node:fs";
import { readCString } from "./ffi.ts";
import {
  bpf,
  check,
  ENOSPC,
  failure,
  type Handle,
  ids,
  LibbpfError,
  noPin,
  openById,
  openPin,
  options,
  pinFd,
  readInfo,
  readName,
  withFd,
  writePointer,
} from "./libbpf.ts";

/** What the kernel says about a program. */
export interface ProgramInfo {
  readonly id: number;
  /** At most 15 characters; longer names are cut by the kernel. */
  readonly name: string;
  /** In words, such as `sched_cls`. */
  readonly type: string;
  /** Hash of the instructions, 16 hex digits: equal tags mean equal code. */
  readonly tag: string;
  /** Ids of the maps it uses. */
  readonly mapIds: readonly number[];
  /** When it was loaded, in nanoseconds since boot. */
  readonly loadTimeNs: bigint;
  /** Time spent in it; counted only while `enableStats` holds, or the sysctl kernel.bpf_stats_enabled is on. */
  readonly runTimeNs: bigint;
  readonly runCount: bigint;
  /** As the kernel runs it, after the verifier has taken out what can't be reached. */
  readonly instructions: number;
  /** Bytes of machine code; 0 if the kernel interprets it. */
  readonly machineBytes: number;
  /** Instructions the verifier walked through to accept it (kernel 5.16 on, else 0). */
  readonly verifiedInstructions: number;
}

/** Input of `Program.testRun`. */
export interface TestRun {
  /** The packet, from its Ethernet header; at least 14 bytes for tc and XDP. Absent for syscall programs. */
  readonly data?: Uint8Array;
  /** The context struct, such as `struct __sk_buff`, for the fields the program type lets a test set. */
  readonly ctx?: Uint8Array;
  /** Runs this many times and reports the mean duration. */
  readonly repeat?: number;
  /** `BPF_F_TEST_*`. */
  readonly flags?: number;
  /** Room for the packet afterwards; 512 bytes more than `data` unless given. 0 asks for no packet. */
  readonly dataOutSize?: number;
}

/** Outcome of `Program.testRun`. */
export interface TestResult {
  /** What the program returned, as a C `int`. */
  readonly retval: number;
  /** The packet afterwards. */
  readonly data: Uint8Array;
  /** The context afterwards; empty if none was given. */
  readonly ctx: Uint8Array;
  /** Mean time of one run. */
  readonly durationNs: number;
}

const INFO_SIZE = 232;
const NAME_SIZE = 16;
const TEST_RUN_SIZE = 80;
const HEADROOM = 512;

/** Reads what the kernel knows about a program, by descriptor or id. */
export function programInfo(handle: Handle): ProgramInfo {
  return withFd("program", handle, (fd) => {
    const first = readInfo(fd, INFO_SIZE, "a program");
    // The list of maps needs room of ours, and its length is known only now.
    const mapCount = first.readUInt32LE(52);
    const maps = Buffer.alloc(mapCount * 4);
    const info =
      mapCount === 0
        ? first
        : readInfo(fd, INFO_SIZE, "a program", (request) => {
            request.writeUInt32LE(mapCount, 52);
            writePointer(request, 56, maps);
          });
    const type = info.readUInt32LE(0);
    return {
      id: info.readUInt32LE(4),
      name: readName(info, 64, NAME_SIZE),
      type: readCString(bpf.programTypeName(type)) ?? `type_${type}`,
      tag: info.toString("hex", 8, 16),
      mapIds: Array.from({ length: Math.min(mapCount, info.readUInt32LE(52)) }, (_, i) =>
        maps.readUInt32LE(i * 4),
      ),
      loadTimeNs: info.readBigUInt64LE(40),
      runTimeNs: info.readBigUInt64LE(192),
      runCount: info.readBigUInt64LE(200),
      instructions: info.readUInt32LE(20) / 8,
      machineBytes: info.readUInt32LE(16),
      verifiedInstructions: info.readUInt32LE(216),
    };
  });
}

/** The ids of all programs of the machine. */
export function programIds(): Generator<number> {
  return ids("program");
}

const BPF_STATS_RUN_TIME = 0;

/**
 * Has the kernel count runs and run time of every program until `close()`, or the end of this process (Linux 5.8 on).
 * That costs each run some tens of nanoseconds.
 */
export function enableStats(): { close(): void } {
  const advice = "The kernel counts runs from Linux 5.8 on.";
  const fd = check(bpf.enableStats(BPF_STATS_RUN_TIME), "bpf_enable_stats", "count runs of programs", advice);
  return { close: () => closeSync(fd) };
}

/** Opens a pinned program. It owns its descriptor: `close()` it. */
export function openPinnedProgram(path: string): Program {
  const fd = openPin(path, "program");
  if (fd === undefined) throw noPin(path, "program");
  return adopt(fd);
}

/** Opens a program by id. It owns its descriptor: `close()` it. */
export function openProgramById(id: number): Program {
  return adopt(openById("program", id));
}

function adopt(fd: number): Program {
  try {
    return new Program(fd, programInfo({ fd }).name, true);
  } catch (error) {
    closeSync(fd);
    throw error;
  }
}

/** A loaded program. */
export class Program {
  /** The C function's name; only its first 15 characters for a program opened by pin or id. */
  readonly name: string;
  readonly id: number;
  readonly type: string;
  readonly tag: string;
  #fd: number;
  readonly #owned: boolean;
  readonly #opts = options(TEST_RUN_SIZE);
  // Kept from run to run: native code is not shown new memory for each.
  #dataOut = Buffer.alloc(0);

  /** Wraps a descriptor; with `owned`, `close()` closes it. */
  constructor(fd: number, name: string, owned: boolean) {
    const info = programInfo({ fd });
    this.name = name;
    this.id = info.id;
    this.type = info.type;
    this.tag = info.tag;
    this.#fd = fd;
    this.#owned = owned;
  }

  /** The descriptor. Throws once the program (or the object it belongs to) is closed. */
  get fd(): number {
    if (this.#fd < 0) {
      throw new LibbpfError("close", 0, `Program ${this.name} is closed; open it again to use it.`);
    }
    return this.#fd;
  }

  /** Runs the program once (or `repeat` times) in the kernel, on a packet and context given here. */
  testRun(input: TestRun): TestResult {
    const { data, ctx } = input;
    const dataOutSize = input.dataOutSize ?? (data === undefined ? 0 : data.byteLength + HEADROOM);
    if (this.#dataOut.length < dataOutSize) this.#dataOut = Buffer.alloc(dataOutSize);
    const dataOut = this.#dataOut.subarray(0, dataOutSize);
    const ctxOut = Buffer.alloc(ctx?.byteLength ?? 0);
    const opts = this.#opts.fill(0, 8);
    if (data !== undefined) writePointer(opts, 8, data);
    if (dataOutSize > 0) writePointer(opts, 16, this.#dataOut);
    opts.writeUInt32LE(data?.byteLength ?? 0, 24);
    opts.writeUInt32LE(dataOutSize, 28);
    if (ctx !== undefined) writePointer(opts, 32, ctx);
    writePointer(opts, 40, ctxOut);
    opts.writeUInt32LE(ctx?.byteLength ?? 0, 48);
    opts.writeUInt32LE(ctxOut.length, 52);
    opts.writeUInt32LE(input.repeat ?? 0, 60);
    opts.writeUInt32LE(input.flags ?? 0, 68);
    const result = bpf.programTestRun(this.fd, opts);
    if (result < 0) {
      const needed = opts.readUInt32LE(28);
      const advice =
        result === -ENOSPC ? `The packet afterwards has ${needed} bytes; set dataOutSize to hold them.` : "";
      throw failure("bpf_prog_test_run_opts", -result, `test-run program ${this.name}`, advice);
    }
    return {
      retval: opts.readInt32LE(56),
      data: new Uint8Array(dataOut.subarray(0, opts.readUInt32LE(28))),
      ctx: new Uint8Array(ctxOut),
      durationNs: opts.readUInt32LE(64),
    };
  }

  /** Pins the program at a path in a BPF file system, so that it outlives this process. */
  pin(path: string): void {
    pinFd(this.fd, path, `program ${this.name}`);
  }

  /** Forgets the program; the kernel frees it when nothing else (link, filter, pin, process) refers to it. */
  close(): void {
    if (this.#fd >= 0 && this.#owned) closeSync(this.#fd);
    this.#fd = -1;
  }
}

const SCHED_CLS = 3;

/** Whether programs of type `sched_cls` may call a helper of this number (enum bpf_func_id). Asks the kernel. */
export function hasHelper(helper: number): boolean {
  const what = `probe for helper ${helper}`;
  return check(bpf.probeHelper(SCHED_CLS, helper, null), "libbpf_probe_bpf_helper", what) === 1;
}
