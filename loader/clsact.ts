// Classic tc attachment for kernels without TCX: BPF filters on the clsact qdisc.
//
// A filter is named by its priority and handle, so replacing one is exact and atomic. The qdisc may have other
// users: it is made only if missing, and removed only on request and only when no filter is left in it. libbpf
// cannot list filters, so that part speaks rtnetlink (<linux/rtnetlink.h>, <linux/pkt_cls.h>).
import { closeSync } from "node:fs";
import type { Direction } from "./attach.ts";
import { errno } from "./ffi.ts";
import { bpf, check, EBUSY, EEXIST, failure, LibbpfError, libc, options } from "./libbpf.ts";
import type { Program } from "./program.ts";

/** The place of a filter: lower priorities run first; both are 1 or more. */
export interface FilterPlace {
  /** 1 to 65535. */
  readonly priority: number;
  readonly handle: number;
}

/** A filter on a clsact qdisc, ours or not. */
export interface ClsactFilter extends FilterPlace {
  /** `bpf`, or another classifier such as `u32`. */
  readonly kind: string;
  /** 0 for other kinds. */
  readonly programId: number;
  /** What `tc filter show` prints, such as `from_pod:[17]`; empty for other kinds. */
  readonly name: string;
}

const POINT: Record<Direction, number> = { ingress: 1, egress: 2 };
const PARENT: Record<Direction, number> = { ingress: 0xfffffff2, egress: 0xfffffff3 };
const BPF_TC_F_REPLACE = 1;

function hook(ifindex: number, point: number): Buffer {
  const struct = options(24);
  struct.writeInt32LE(ifindex, 8);
  struct.writeInt32LE(point, 12);
  return struct;
}

function filter(place: FilterPlace, program?: Program): Buffer {
  const struct = options(32);
  if (program !== undefined) {
    struct.writeInt32LE(program.fd, 8);
    struct.writeUInt32LE(BPF_TC_F_REPLACE, 12);
  }
  struct.writeUInt32LE(place.handle, 20);
  struct.writeUInt32LE(place.priority, 24);
  return struct;
}

/**
 * Attaches a `sched_cls` program as a filter, in direct-action mode, in place of any at the same priority and
 * handle: no packet passes in between. Makes the qdisc if the interface has none, and says whether it did.
 */
export function attachClsact(
  program: Program,
  ifindex: number,
  direction: Direction,
  place: FilterPlace,
): { readonly createdQdisc: boolean } {
  const where = `${direction} of interface ${ifindex}`;
  const at = hook(ifindex, POINT[direction]);
  const made = bpf.tcHookCreate(at);
  if (made !== -EEXIST) check(made, "bpf_tc_hook_create", `make the clsact qdisc of interface ${ifindex}`);
  // An old-style ingress qdisc sits in the same place. It would take an egress filter, and run it on ingress.
  else if (direction === "egress" && !hasClsact(ifindex)) {
    const message = `Cannot attach program ${program.name} to ${where}: it has an old-style ingress qdisc, which excludes clsact. Remove that qdisc first.`;
    throw new LibbpfError("bpf_tc_hook_create", EEXIST, message);
  }
  const result = bpf.tcAttach(at, filter(place, program));
  check(result, "bpf_tc_attach", `attach program ${program.name} to ${where}`);
  return { createdQdisc: made !== -EEXIST };
}

/** Removes the filter at a place, and nothing else. False if there was none. */
export function detachClsact(ifindex: number, direction: Direction, place: FilterPlace): boolean {
  const here = ({ priority, handle }: FilterPlace) => priority === place.priority && handle === place.handle;
  if (!queryClsact(ifindex, direction).some(here)) return false;
  const result = bpf.tcDetach(hook(ifindex, POINT[direction]), filter(place));
  const what = `remove filter ${place.priority}:${place.handle} from ${direction} of interface ${ifindex}`;
  check(result, "bpf_tc_detach", what);
  return true;
}

/** All filters of one direction, in the order packets meet them. Empty if there is no clsact qdisc. */
export function queryClsact(ifindex: number, direction: Direction): ClsactFilter[] {
  const filters: ClsactFilter[] = [];
  // An old-style ingress qdisc would answer for egress too, with its ingress filters.
  if (direction === "egress" && !hasClsact(ifindex)) return filters;
  for (const message of dump(RTM_GETTFILTER, ifindex, PARENT[direction])) {
    const handle = message.readUInt32LE(HEADER + 8);
    // The kernel also announces each classifier as a whole, without a handle.
    if (handle === 0) continue;
    const attributes = readAttributes(message, HEADER + TCMSG);
    const kind = readText(attributes.get(TCA_KIND));
    // Option numbers mean something else in each kind.
    const nested = kind === "bpf" ? attributes.get(TCA_OPTIONS) : undefined;
    const bpfOptions = readAttributes(nested ?? Buffer.alloc(0), 0);
    filters.push({
      priority: message.readUInt32LE(HEADER + 16) >>> 16,
      handle,
      kind,
      programId: bpfOptions.get(TCA_BPF_ID)?.readUInt32LE() ?? 0,
      name: readText(bpfOptions.get(TCA_BPF_NAME)),
    });
  }
  return filters;
}

/** Whether an interface has a clsact qdisc. */
export function hasClsact(ifindex: number): boolean {
  return dump(RTM_GETQDISC, ifindex, 0).some(
    (message) =>
      message.readInt32LE(HEADER + 4) === ifindex &&
      readText(readAttributes(message, HEADER + TCMSG).get(TCA_KIND)) === "clsact",
  );
}

/**
 * Removes the clsact qdisc of an interface. Only for one that the caller made: see `createdQdisc`. False if there
 * is none. Throws `EBUSY` if any filter, of whomever, is left in it.
 */
export function destroyClsact(ifindex: number): boolean {
  if (!hasClsact(ifindex)) return false;
  const left = [...queryClsact(ifindex, "ingress"), ...queryClsact(ifindex, "egress")];
  if (left.length > 0) {
    const names = left.map(({ kind, name, priority }) => `${name || kind} (priority ${priority})`).join(", ");
    const message = `Will not remove the clsact qdisc of interface ${ifindex}: it still has filters: ${names}.`;
    throw new LibbpfError("bpf_tc_hook_destroy", EBUSY, message);
  }
  const result = bpf.tcHookDestroy(hook(ifindex, POINT.ingress | POINT.egress));
  check(result, "bpf_tc_hook_destroy", `remove the clsact qdisc of interface ${ifindex}`);
  return true;
}

const socket = libc.prepare("socket", "int", ["int", "int", "int"]);
const send = libc.prepare("send", "ssize", ["int", "pointer", "size", "int"]);
const recv = libc.prepare("recv", "ssize", ["int", "pointer", "size", "int"]);

const AF_NETLINK = 16;
const SOCK_RAW_CLOEXEC = 3 | 0o2000000;
const NLM_F_REQUEST_DUMP = 0x301;
const NLMSG_ERROR = 2;
const NLMSG_DONE = 3;
const RTM_GETQDISC = 38;
const RTM_GETTFILTER = 46;
const HEADER = 16;
const TCMSG = 20;
const TCA_KIND = 1;
const TCA_OPTIONS = 2;
const TCA_BPF_NAME = 7;
const TCA_BPF_ID = 11;

// One question, all answers. The kernel has them ready when send() returns, so nothing here waits.
function dump(type: number, ifindex: number, parent: number): Buffer[] {
  const what = `read the tc setup of interface ${ifindex}`;
  const fd = socket(AF_NETLINK, SOCK_RAW_CLOEXEC, 0);
  if (fd < 0) throw failure("socket", errno(), what);
  try {
    const request = Buffer.alloc(HEADER + TCMSG);
    request.writeUInt32LE(request.length, 0);
    request.writeUInt16LE(type, 4);
    request.writeUInt16LE(NLM_F_REQUEST_DUMP, 6);
    request.writeInt32LE(ifindex, HEADER + 4);
    request.writeUInt32LE(parent, HEADER + 12);
    if (send(fd, request, request.length, 0) < 0) throw failure("send", errno(), what);
    const answers: Buffer[] = [];
    for (const buffer = Buffer.alloc(65536); ; ) {
      const length = recv(fd, buffer, buffer.length, 0);
      if (length < 0) throw failure("recv", errno(), what);
      for (let at = 0; at + HEADER <= length; ) {
        const size = buffer.readUInt32LE(at);
        const kind = buffer.readUInt16LE(at + 4);
        if (kind === NLMSG_DONE) return answers;
        if (kind === NLMSG_ERROR) throw failure("recv", -buffer.readInt32LE(at + HEADER), what);
        answers.push(Buffer.from(buffer.subarray(at, at + size)));
        at += (size + 3) & ~3;
      }
    }
  } finally {
    closeSync(fd);
  }
}

function readAttributes(bytes: Buffer, start: number): Map<number, Buffer> {
  const attributes = new Map<number, Buffer>();
  for (let at = start; at + 4 <= bytes.length; ) {
    const size = bytes.readUInt16LE(at);
    if (size < 4) break;
    attributes.set(bytes.readUInt16LE(at + 2) & 0x3fff, bytes.subarray(at + 4, at + size));
    at += (size + 3) & ~3;
  }
  return attributes;
}

function readText(bytes: Buffer | undefined): string {
  return bytes === undefined ? "" : bytes.toString("utf8").replace(/\0+$/, "");
}
