/**
 * One question to a peer and its round trip: ICMP echo (RFC 792), which every node answers, flanneld's as well,
 * as nothing of ours need run there.
 *
 * The socket is bound to the address that asks. With a tunnel that is the tunnel device's own (172.7.21.0), and the
 * peer's device (172.7.22.0) is asked: question and answer then go the way of pods' packets, through the tunnel or
 * directly, and prove that the peer's kernel has taken them out of it. Without a tunnel (host-gw) the peer's public
 * address is asked, which proves that the node is there, and not that it forwards.
 *
 * A raw socket needs CAP_NET_RAW. Without it, the kernel's ping sockets do where net.ipv4.ping_group_range lets us.
 * Nothing here waits: packets are sent and read only as far as the kernel takes and has them at once. An answer
 * counts if its source, identifier, sequence number and 16 random bytes are those of a question that is open;
 * whatever else comes is passed over.
 */
import { randomBytes, randomInt } from "node:crypto";
import { constants } from "node:os";
import { getSystemErrorMap } from "node:util";
import { addressOf, errno, openLibrary, watchFd } from "../../loader/ffi.ts";
import { formatIpv4, type Ipv4 } from "../core/ipv4.ts";
import type { Answer, Prober } from "../core/world.ts";

/** No socket for probes could be opened; the message says what to do. */
export class ProbeError extends Error {
  override readonly name = "ProbeError";
}

const AF_INET = 2;
const SOCK_DGRAM = 2;
const SOCK_RAW = 3;
const SOCK_NONBLOCK = 0o4000;
const SOCK_CLOEXEC = 0o2000000;
const IPPROTO_ICMP = 1;
const SOL_SOCKET = 1;
const SO_ATTACH_FILTER = 26;
const SIOCGSTAMPNS = 0x8907;
const MSG_DONTWAIT = 0x40;
const CLOCK_REALTIME = 0;
const { EAGAIN, EINTR, EPERM, EACCES } = constants.errno;

const ECHO_REPLY = 0;
const ECHO = 8;
const ICMP_HEADER = 8;
const COOKIE = 16;
const SOCKADDR_IN = 16;
/** Longest IP header and what we sent; what is longer is no answer of ours. */
const RECEIVE_BYTES = 60 + ICMP_HEADER + COOKIE;
/** Packets read before other work of the event loop gets its turn. */
const PACKETS_PER_TURN = 256;

const libc = openLibrary("libc.so.6");
const call = {
  socket: libc.prepare("socket", "int", ["int", "int", "int"]),
  setsockopt: libc.prepare("setsockopt", "int", ["int", "int", "int", "pointer", "uint"]),
  bind: libc.prepare("bind", "int", ["int", "pointer", "uint"]),
  sendto: libc.prepare("sendto", "ssize", ["int", "pointer", "size", "int", "pointer", "uint"]),
  recvfrom: libc.prepare("recvfrom", "ssize", ["int", "pointer", "size", "int", "pointer", "pointer"]),
  ioctl: libc.prepare("ioctl", "int", ["int", "u64", "pointer"]),
  clock: libc.prepare("clock_gettime", "int", ["int", "pointer"]),
  close: libc.prepare("close", "int", ["int"]),
};

interface Question {
  readonly target: Ipv4;
  readonly cookie: Buffer;
  /** When it was sent, by a clock that does not jump, and by the kernel's, which stamps what comes. */
  readonly sentAt: number;
  readonly stamp: number;
  readonly timer: NodeJS.Timeout;
  resolve(answer: Answer): void;
}

/**
 * Opens a socket that asks from one of this host's addresses, in the network namespace of the calling thread. Throws
 * ProbeError if we may not, or if the host does not have the address (yet).
 */
export function openProber(source: Ipv4): Prober {
  const { fd, raw } = openSocket();
  const identifier = randomInt(1, 0x10000);
  try {
    if (raw) attachFilter(fd, identifier);
    if (call.bind(fd, sockaddr(source), SOCKADDR_IN) < 0) {
      throw new ProbeError(`cannot send from ${formatIpv4(source)}: ${reasonOf(errno())}`);
    }
  } catch (error) {
    call.close(fd);
    throw error;
  }

  const questions = new Map<number, Question>();
  const received = Buffer.allocUnsafeSlow(RECEIVE_BYTES);
  const sender = Buffer.alloc(SOCKADDR_IN);
  const senderLength = Buffer.alloc(4);
  const timespec = Buffer.alloc(16);
  let sequence = randomInt(0x10000);
  let open = true;
  // Asked for once, the kernel stamps what comes from now on.
  call.ioctl(fd, SIOCGSTAMPNS, timespec);

  const settle = (number: number, question: Question, answer: Answer): void => {
    questions.delete(number);
    clearTimeout(question.timer);
    question.resolve(answer);
  };

  /** Takes one packet that was received; anything but an answer to an open question is nothing to us. */
  const take = (length: number): void => {
    const at = raw ? ((received[0] ?? 0) & 0x0f) * 4 : 0;
    if (length !== at + ICMP_HEADER + COOKIE || received[at] !== ECHO_REPLY || received[at + 1] !== 0) return;
    if (raw && received.readUInt16BE(at + 4) !== identifier) return;
    const number = received.readUInt16BE(at + 6);
    const question = questions.get(number);
    if (question === undefined || sender.readUInt32BE(4) !== question.target) return;
    if (!received.subarray(at + ICMP_HEADER, length).equals(question.cookie)) return;
    const elapsed = performance.now() - question.sentAt;
    // The kernel's stamp leaves out how long the packet waited for us; but its clock may be set meanwhile.
    const stamped =
      call.ioctl(fd, SIOCGSTAMPNS, timespec) === 0 ? milliseconds(timespec) - question.stamp : -1;
    settle(number, question, { rttMs: stamped > 0 && stamped < elapsed ? stamped : elapsed });
  };

  const read = (): void => {
    for (let turn = 0; open && turn < PACKETS_PER_TURN; turn++) {
      senderLength.writeUInt32LE(SOCKADDR_IN);
      const length = call.recvfrom(fd, received, RECEIVE_BYTES, MSG_DONTWAIT, sender, senderLength);
      if (length >= 0) take(length);
      else if (errno() !== EINTR) return;
    }
  };
  const watch = watchFd(fd, read, { keepAlive: false });

  return {
    probe: (target, deadlineMs) =>
      new Promise((resolve) => {
        if (!open) {
          resolve({ lost: "the probe was ended" });
          return;
        }
        sequence = (sequence + 1) & 0xffff;
        const number = sequence;
        const former = questions.get(number);
        if (former !== undefined) settle(number, former, { lost: "no answer" });
        const cookie = randomBytes(COOKIE);
        const expire = (): void => {
          // What came in time while this thread was busy counts.
          read();
          const question = questions.get(number);
          if (question?.cookie === cookie)
            settle(number, question, { lost: `no answer within ${deadlineMs} ms` });
        };
        call.clock(CLOCK_REALTIME, timespec);
        const question: Question = {
          ...{ target, cookie, resolve, sentAt: performance.now(), stamp: milliseconds(timespec) },
          timer: setTimeout(expire, deadlineMs),
        };
        question.timer.unref();
        questions.set(number, question);
        const packet = echo(identifier, number, cookie);
        const sent = call.sendto(fd, packet, packet.length, MSG_DONTWAIT, sockaddr(target), SOCKADDR_IN);
        if (sent < 0) {
          const reason = errno() === EAGAIN ? "the send queue is full" : reasonOf(errno());
          settle(number, question, { lost: `cannot be sent: ${reason}` });
        }
      }),
    close: () => {
      if (!open) return;
      open = false;
      watch.close();
      call.close(fd);
      for (const [number, question] of [...questions])
        settle(number, question, { lost: "the probe was ended" });
    },
  };
}

/** Asks once; for those that need no more. Throws ProbeError as `openProber` does. */
export async function probeOnce(source: Ipv4, target: Ipv4, deadlineMs: number): Promise<Answer> {
  const prober = openProber(source);
  // The socket alone does not keep a short-lived process running.
  const alive = setTimeout(() => undefined, deadlineMs + 1000);
  try {
    return await prober.probe(target, deadlineMs);
  } finally {
    clearTimeout(alive);
    prober.close();
  }
}

function openSocket(): { fd: number; raw: boolean } {
  const flags = SOCK_NONBLOCK | SOCK_CLOEXEC;
  let fd = call.socket(AF_INET, SOCK_RAW | flags, IPPROTO_ICMP);
  if (fd >= 0) return { fd, raw: true };
  const refusal = errno();
  if (refusal === EPERM || refusal === EACCES) {
    fd = call.socket(AF_INET, SOCK_DGRAM | flags, IPPROTO_ICMP);
    if (fd >= 0) return { fd, raw: false };
    throw new ProbeError(
      "this process may not send ICMP: grant it CAP_NET_RAW (systemd: CapabilityBoundingSet=, container: securityContext.capabilities.add), or open net.ipv4.ping_group_range to its group",
    );
  }
  throw new ProbeError(`cannot open an ICMP socket: ${reasonOf(refusal)}`);
}

/**
 * Lets in echo replies with our identifier alone: a raw socket is otherwise given all ICMP of the host. Classic BPF
 * over the packet from its IP header on; struct sock_fprog and sock_filter of linux/filter.h.
 */
function attachFilter(fd: number, identifier: number): void {
  const program = [
    [0xb1, 0, 0, 0], // X = length of the IP header
    [0x48, 0, 0, 0], // A = ICMP type and code
    [0x15, 0, 3, ECHO_REPLY << 8],
    [0x48, 0, 0, 4], // A = identifier
    [0x15, 0, 1, identifier],
    [0x06, 0, 0, 0xffff],
    [0x06, 0, 0, 0],
  ] as const;
  const code = Buffer.alloc(program.length * 8);
  for (const [index, [operation, yes, no, k]] of program.entries()) {
    code.writeUInt16LE(operation, index * 8);
    code.writeUInt8(yes, index * 8 + 2);
    code.writeUInt8(no, index * 8 + 3);
    code.writeUInt32LE(k, index * 8 + 4);
  }
  const fprog = Buffer.alloc(16);
  fprog.writeUInt16LE(program.length, 0);
  fprog.writeBigUInt64LE(BigInt(addressOf(code)), 8);
  if (call.setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, fprog, fprog.length) < 0) {
    throw new ProbeError(`cannot filter what an ICMP socket receives: ${reasonOf(errno())}`);
  }
  // The kernel has read it; until here it must not be moved or freed.
  void code.length;
}

/** struct sockaddr_in. */
function sockaddr(address: Ipv4): Buffer {
  const bytes = Buffer.alloc(SOCKADDR_IN);
  bytes.writeUInt16LE(AF_INET, 0);
  bytes.writeUInt32BE(address, 4);
  return bytes;
}

function echo(identifier: number, sequence: number, cookie: Uint8Array): Buffer {
  const packet = Buffer.alloc(ICMP_HEADER + COOKIE);
  packet[0] = ECHO;
  packet.writeUInt16BE(identifier, 4);
  packet.writeUInt16BE(sequence, 6);
  packet.set(cookie, ICMP_HEADER);
  let sum = 0;
  for (let at = 0; at < packet.length; at += 2) sum += packet.readUInt16BE(at);
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  packet.writeUInt16BE(~sum & 0xffff, 2);
  return packet;
}

function milliseconds(timespec: Buffer): number {
  return Number(timespec.readBigInt64LE(0)) * 1000 + Number(timespec.readBigInt64LE(8)) / 1e6;
}

function reasonOf(number: number): string {
  const [name, meaning] = getSystemErrorMap().get(-number) ?? [];
  return name === undefined ? `errno ${number}` : `${meaning} (${name})`;
}
