/**
 * Which TCX links an interface has, for who asks again and again: the memory that the kernel reads and fills stays the same,
 * as making it for each question takes ten times as long as the question.
 */
import { constants } from "node:os";
import { addressOf, errno, openLibrary } from "../../loader/ffi.ts";
import { type Direction, queryTcx } from "../../loader/index.ts";

const SYS_BPF: Readonly<Record<string, number>> = { x64: 321, arm64: 280 };
const BPF_PROG_QUERY = 16;
/** Of enum bpf_attach_type. */
const TCX: Readonly<Record<Direction, number>> = { ingress: 46, egress: 47 };
/** Links at one place that are asked for; of more, `queryTcx` knows. */
const ROOM = 16;
const U32 = 4;

/** union bpf_attr of <linux/bpf.h>, query; offsets in words of 4 bytes. */
const IFINDEX = 0;
const ATTACH_TYPE = 1;
const PROGRAM_IDS = 4;
const COUNT = 6;
const LINK_IDS = 10;
const ATTR_WORDS = 16;

const libc = openLibrary("libc.so.6");
const syscall = libc.prepare("syscall", "ssize", ["i64", "int", "pointer", "uint"]);
const attrBytes = Buffer.alloc(ATTR_WORDS * U32);
const attr = new Uint32Array(attrBytes.buffer, attrBytes.byteOffset, ATTR_WORDS);
const programBytes = Buffer.alloc(ROOM * U32);
const linkBytes = Buffer.alloc(ROOM * U32);
const links = new Uint32Array(linkBytes.buffer, linkBytes.byteOffset, ROOM);

/** Whether a link is at this place. Needs a kernel with TCX. Throws LibbpfError, as when there is no such interface. */
export function hasTcxLink(ifindex: number, direction: Direction, linkId: number): boolean {
  const number = SYS_BPF[process.arch];
  if (number === undefined) return listed(ifindex, direction, linkId);
  attr.fill(0);
  attr[IFINDEX] = ifindex;
  attr[ATTACH_TYPE] = TCX[direction];
  point(PROGRAM_IDS, programBytes);
  attr[COUNT] = ROOM;
  point(LINK_IDS, linkBytes);
  if (syscall(number, BPF_PROG_QUERY, attrBytes, attrBytes.length) < 0) {
    if (errno() === constants.errno.EINTR) return hasTcxLink(ifindex, direction, linkId);
    return listed(ifindex, direction, linkId);
  }
  const count = attr[COUNT] ?? 0;
  for (let at = 0; at < count; at += 1) if (links[at] === linkId) return true;
  return false;
}

function point(word: number, memory: Buffer): void {
  const address = addressOf(memory);
  attr[word] = address >>> 0;
  attr[word + 1] = Math.floor(address / 2 ** 32);
}

function listed(ifindex: number, direction: Direction, linkId: number): boolean {
  return queryTcx(ifindex, direction).some((program) => program.linkId === linkId);
}
