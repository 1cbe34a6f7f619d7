// Where programs run: TCX links and XDP.
//
// A TCX link is a descriptor that keeps its program attached; pinned, it outlives the process, and `update`
// swaps the program without a packet seeing neither. XDP attaches to the device itself and stays until
// detached. Interface indexes mean those of the network namespace that the calling thread is in.
import { closeSync } from "node:fs";
import { errno } from "./ffi.ts";
import {
  bpf,
  check,
  EINVAL,
  ENODEV,
  ENOSPC,
  failure,
  type Handle,
  ids,
  LibbpfError,
  libc,
  noPin,
  openById,
  openPin,
  options,
  pinFd,
  readInfo,
  withFd,
  writePointer,
} from "./libbpf.ts";
import type { Program } from "./program.ts";

/** Seen from the interface: `ingress` is what it receives, `egress` what it sends. */
export type Direction = "ingress" | "egress";

/** What the kernel says about a link. */
export interface LinkInfo {
  readonly id: number;
  /** In words, such as `tcx`. */
  readonly type: string;
  readonly programId: number;
  /** For TCX and XDP links; 0 once the interface is gone. */
  readonly ifindex?: number;
  /** For TCX links. */
  readonly direction?: Direction;
}

/** One program of a TCX chain. */
export interface TcxProgram {
  readonly programId: number;
  /** 0 if the program was attached without a link. */
  readonly linkId: number;
}

const TCX: Record<Direction, number> = { ingress: 46, egress: 47 };
const LINK_TYPES = [
  "unspec",
  "raw_tracepoint",
  "tracing",
  "cgroup",
  "iter",
  "netns",
  "xdp",
  "perf_event",
  "kprobe_multi",
  "struct_ops",
  "netfilter",
  "tcx",
  "uprobe_multi",
  "netkit",
];
const LINK_INFO_SIZE = 48;

/** Reads what the kernel knows about a link, by descriptor or id. */
export function linkInfo(handle: Handle): LinkInfo {
  return withFd("link", handle, (fd) => {
    const info = readInfo(fd, LINK_INFO_SIZE, "a link");
    const number = info.readUInt32LE(0);
    const type = LINK_TYPES[number] ?? `type_${number}`;
    return {
      id: info.readUInt32LE(4),
      type,
      programId: info.readUInt32LE(8),
      ...(type === "tcx" || type === "xdp" ? { ifindex: info.readUInt32LE(16) } : {}),
      ...(type === "tcx" ? { direction: info.readUInt32LE(20) === TCX.ingress ? "ingress" : "egress" } : {}),
    };
  });
}

/** The ids of all links of the machine. */
export function linkIds(): Generator<number> {
  return ids("link");
}

/** Opens a pinned link. It owns its descriptor: `close()` it. */
export function openPinnedLink(path: string): Link {
  const fd = openPin(path, "link");
  if (fd === undefined) throw noPin(path, "link");
  return adopt(fd);
}

/** Opens a link by id. It owns its descriptor: `close()` it. */
export function openLinkById(id: number): Link {
  return adopt(openById("link", id));
}

function adopt(fd: number): Link {
  try {
    return new Link(fd);
  } catch (error) {
    closeSync(fd);
    throw error;
  }
}

/** An attachment. It ends when its last descriptor is closed and its last pin removed, or by `detach()`. */
export class Link {
  readonly id: number;
  readonly type: string;
  #fd: number;

  /** Wraps a descriptor and owns it. */
  constructor(fd: number) {
    const info = linkInfo({ fd });
    this.id = info.id;
    this.type = info.type;
    this.#fd = fd;
  }

  /** The descriptor. Throws once the link is closed. */
  get fd(): number {
    if (this.#fd < 0)
      throw new LibbpfError("close", 0, `Link ${this.id} is closed; open it again to use it.`);
    return this.#fd;
  }

  /** What the link holds now. */
  info(): LinkInfo {
    return linkInfo({ fd: this.fd });
  }

  /** Swaps the program: each packet meets the old one or the new one. `ENOLINK` if the interface is gone. */
  update(program: Program): void {
    const what = `put program ${program.name} in link ${this.id}`;
    check(bpf.linkUpdate(this.fd, program.fd, null), "bpf_link_update", what);
  }

  /** Pins the link at a path in a BPF file system, so that the program stays when this process ends. */
  pin(path: string): void {
    pinFd(this.fd, path, `link ${this.id}`);
  }

  /** Detaches the program now, pinned or not. The link stays, with nothing in it. */
  detach(): void {
    check(bpf.linkDetach(this.fd), "bpf_link_detach", `detach link ${this.id}`);
  }

  /** Closes the descriptor; an unpinned link detaches with it. */
  close(): void {
    if (this.#fd >= 0) closeSync(this.#fd);
    this.#fd = -1;
  }
}

let tcxWorks: boolean | undefined;

/** Whether this kernel has TCX (6.6 on). Asks the kernel, once, with a program that does nothing. */
export function hasTcx(): boolean {
  tcxWorks ??= probeTcx();
  return tcxWorks;
}

const SCHED_CLS = 3;
const NO_SUCH_INTERFACE = 0x7fffffff;

function probeTcx(): boolean {
  // r0 = 0; exit
  const instructions = Buffer.from("b7000000000000009500000000000000", "hex");
  const loaded = bpf.programLoad(SCHED_CLS, "tcx_probe", "GPL", instructions, 2, null);
  const fd = check(loaded, "bpf_prog_load", "load a program to probe for TCX");
  try {
    // A kernel with TCX gets as far as looking for the interface.
    const result = bpf.linkCreate(fd, NO_SUCH_INTERFACE, TCX.ingress, null);
    if (result === -ENODEV) return true;
    if (result === -EINVAL) return false;
    throw failure("bpf_link_create", result < 0 ? -result : 0, "probe for TCX");
  } finally {
    closeSync(fd);
  }
}

/** Appends a `sched_cls` program to the TCX chain of an interface. Close or pin the link it returns. */
export function attachTcx(program: Program, ifindex: number, direction: Direction): Link {
  const fd = bpf.linkCreate(program.fd, ifindex, TCX[direction], null);
  check(fd, "bpf_link_create", `attach program ${program.name} to ${direction} of interface ${ifindex}`);
  return adopt(fd);
}

const syscall = libc.prepare("syscall", "ssize", ["i64", "int", "pointer", "uint"]);
const SYS_BPF: Readonly<Record<string, number>> = { x64: 321, arm64: 280 };
const BPF_PROG_QUERY = 16;
const QUERY_SIZE = 64;

/** Memory for a question about a chain; layout of `attr`: union bpf_attr, query. */
interface ChainQuery {
  readonly room: number;
  readonly attr: Buffer;
  /** `attr` before it is asked: the kernel writes to it. */
  readonly blank: Buffer;
  readonly programs: Buffer;
  readonly links: Buffer;
}

// Kept, as to make it takes ten times as long as to ask.
let chain: ChainQuery | undefined;

function chainQuery(room: number): ChainQuery {
  const [programs, links] = [Buffer.alloc(room * 4), Buffer.alloc(room * 4)];
  const blank = Buffer.alloc(QUERY_SIZE);
  writePointer(blank, 16, programs);
  blank.writeUInt32LE(room, 24);
  writePointer(blank, 40, links);
  return { room, attr: Buffer.alloc(QUERY_SIZE), blank, programs, links };
}

/** Asks for the TCX chain of an interface: how long it is, and where it is until the next question. */
function askForChain(ifindex: number, direction: Direction): ChainQuery & { readonly count: number } {
  // libbpf 1.1 does not return link ids, so this asks bpf(2) itself.
  const number = SYS_BPF[process.arch];
  if (number === undefined) {
    throw new LibbpfError("bpf", 0, `TCX chains: the number of bpf(2) on ${process.arch} is not known.`);
  }
  for (;;) {
    chain ??= chainQuery(16);
    const { attr } = chain;
    attr.set(chain.blank);
    attr.writeUInt32LE(ifindex, 0);
    attr.writeUInt32LE(TCX[direction], 4);
    if (syscall(number, BPF_PROG_QUERY, attr, QUERY_SIZE) >= 0)
      return { ...chain, count: attr.readUInt32LE(24) };
    if (errno() !== ENOSPC)
      throw failure("bpf", errno(), `list the programs at ${direction} of interface ${ifindex}`);
    chain = chainQuery(chain.room * 2);
  }
}

/** The TCX chain of an interface, in the order packets meet it. Needs a kernel with TCX. */
export function queryTcx(ifindex: number, direction: Direction): TcxProgram[] {
  const { count, programs, links } = askForChain(ifindex, direction);
  return Array.from({ length: count }, (_, i) => ({
    programId: programs.readUInt32LE(i * 4),
    linkId: links.readUInt32LE(i * 4),
  }));
}

/**
 * Whether a link is in the TCX chain of an interface, for who asks again and again. Needs a kernel with TCX. Throws
 * LibbpfError, as when there is no such interface.
 */
export function hasTcxLink(ifindex: number, direction: Direction, linkId: number): boolean {
  const { count, links } = askForChain(ifindex, direction);
  for (let i = 0; i < count; i++) if (links.readUInt32LE(i * 4) === linkId) return true;
  return false;
}

/** `native` runs in the driver, `generic` in the stack after it, `auto` in the driver if it can. */
export type XdpMode = "auto" | "native" | "generic" | "offload";

/** The XDP program of an interface. */
export interface XdpProgram {
  readonly programId: number;
  readonly mode: Exclude<XdpMode, "auto"> | "multiple";
}

const XDP_FLAGS: Record<XdpMode, number> = { auto: 0, generic: 2, native: 4, offload: 8 };
const XDP_IF_NONE = 1;
const XDP_MODES = ["none", "native", "generic", "offload", "multiple"] as const;

function expecting(program: Program | undefined): Buffer | null {
  if (program === undefined) return null;
  const opts = options(16);
  opts.writeInt32LE(program.fd, 8);
  return opts;
}

/**
 * Attaches an XDP program to an interface that has none, or puts it in place of exactly `replace`, in one step.
 * It stays until detached, also when this process ends. `EBUSY` or `EEXIST` if another program is there.
 */
export function attachXdp(
  program: Program,
  ifindex: number,
  options: { mode?: XdpMode; replace?: Program } = {},
): void {
  const { mode = "auto", replace } = options;
  const flags = XDP_FLAGS[mode] | (replace === undefined ? XDP_IF_NONE : 0);
  const result = bpf.xdpAttach(ifindex, program.fd, flags, expecting(replace));
  check(result, "bpf_xdp_attach", `attach XDP program ${program.name} to interface ${ifindex} (${mode})`);
}

/** Detaches the XDP program, if `program` is given only that one. False if there was none. */
export function detachXdp(ifindex: number, options: { mode?: XdpMode; program?: Program } = {}): boolean {
  if (queryXdp(ifindex) === undefined) return false;
  const result = bpf.xdpDetach(ifindex, XDP_FLAGS[options.mode ?? "auto"], expecting(options.program));
  check(result, "bpf_xdp_detach", `detach the XDP program of interface ${ifindex}`);
  return true;
}

/** The XDP program of an interface, or `undefined`. */
export function queryXdp(ifindex: number): XdpProgram | undefined {
  const opts = options(32);
  check(bpf.xdpQuery(ifindex, 0, opts), "bpf_xdp_query", `ask for the XDP program of interface ${ifindex}`);
  const mode = XDP_MODES[opts.readUInt8(24)] ?? "multiple";
  return mode === "none" ? undefined : { programId: opts.readUInt32LE(8), mode };
}
