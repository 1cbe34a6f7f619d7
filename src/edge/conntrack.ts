/**
 * The connections that the host's stack translates at this moment, from its connection tracking.
 *
 * Programs note a translated flow when they see it leave the stack. On a host where something else forwarded
 * until now, flows are under way that no program saw begin, and by the fast lane they would miss their translation.
 * So before the programs come to a host for the first time, such flows are read here, once.
 *
 * One dump over nfnetlink (<linux/netfilter/nfnetlink_conntrack.h>): messages of type 0x0101 with nested
 * attributes, numbers in network order.
 */
import { errno, openLibrary } from "../../loader/ffi.ts";
import type { Ipv4 } from "../core/ipv4.ts";

/** One direction of a connection, as packets carry it. ICMP has its identifier in both ports. */
export interface Tuple {
  readonly source: Ipv4;
  readonly destination: Ipv4;
  readonly sourcePort: number;
  readonly destinationPort: number;
  readonly protocol: number;
}

const AF_NETLINK = 16;
const SOCK_RAW_CLOEXEC = 3 | 0o2000000;
const NETLINK_NETFILTER = 12;
const AF_INET = 2;
const GET_CONNECTIONS = 0x0101;
const NEW_CONNECTION = 0x0100;
const REQUEST_DUMP = 0x301;
const NLMSG_ERROR = 2;
const NLMSG_DONE = 3;
const HEADER = 16;
const NFGENMSG = 4;
const EINTR = 4;
const CTA_TUPLE_ORIG = 1;
const CTA_TUPLE_REPLY = 2;
const CTA_TUPLE_IP = 1;
const CTA_TUPLE_PROTO = 2;
const [CTA_IP_V4_SRC, CTA_IP_V4_DST] = [1, 2];
const [CTA_PROTO_NUM, CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT, CTA_PROTO_ICMP_ID] = [1, 2, 3, 4];
const TYPE_MASK = 0x3fff;
const RECEIVE_BYTES = 128 * 1024;

const libc = openLibrary("libc.so.6");
const call = {
  socket: libc.prepare("socket", "int", ["int", "int", "int"]),
  send: libc.prepare("send", "ssize", ["int", "pointer", "size", "int"]),
  recv: libc.prepare("recv", "ssize", ["int", "pointer", "size", "int"]),
  close: libc.prepare("close", "int", ["int"]),
};

/**
 * Both directions, as packets carry them, of every IPv4 connection that the stack translates. Throws if the kernel
 * cannot tell, which one without connection tracking in netlink cannot.
 */
export function translatedTuples(): Tuple[] {
  const fd = call.socket(AF_NETLINK, SOCK_RAW_CLOEXEC, NETLINK_NETFILTER);
  if (fd < 0) throw failure(errno());
  try {
    const request = Buffer.alloc(HEADER + NFGENMSG);
    request.writeUInt32LE(request.length, 0);
    request.writeUInt16LE(GET_CONNECTIONS, 4);
    request.writeUInt16LE(REQUEST_DUMP, 6);
    request.writeUInt8(AF_INET, HEADER);
    if (call.send(fd, request, request.length, 0) < 0) throw failure(errno());
    const tuples: Tuple[] = [];
    const buffer = Buffer.allocUnsafeSlow(RECEIVE_BYTES);
    for (;;) {
      const length = call.recv(fd, buffer, buffer.length, 0);
      if (length < 0 && errno() === EINTR) continue;
      if (length < 0) throw failure(errno());
      if (readDatagram(buffer.subarray(0, length), tuples)) return tuples;
    }
  } finally {
    call.close(fd);
  }
}

/** Takes the connections out of one datagram; true if it ends the dump. */
export function readDatagram(bytes: Buffer, into: Tuple[]): boolean {
  for (let at = 0; at + HEADER <= bytes.length; ) {
    const length = bytes.readUInt32LE(at);
    if (length < HEADER || at + length > bytes.length)
      throw new Error("connection tracking: a message cut short");
    const type = bytes.readUInt16LE(at + 4);
    if (type === NLMSG_DONE) return true;
    if (type === NLMSG_ERROR) throw failure(-bytes.readInt32LE(at + HEADER));
    if (type === NEW_CONNECTION) take(bytes.subarray(at + HEADER + NFGENMSG, at + length), into);
    at += (length + 3) & ~3;
  }
  return false;
}

function take(message: Buffer, into: Tuple[]): void {
  const parts = attributes(message);
  const original = tupleOf(parts.get(CTA_TUPLE_ORIG));
  const reply = tupleOf(parts.get(CTA_TUPLE_REPLY));
  if (original === undefined || reply === undefined) return;
  const isTranslated =
    original.source !== reply.destination ||
    original.destination !== reply.source ||
    original.sourcePort !== reply.destinationPort ||
    original.destinationPort !== reply.sourcePort;
  if (isTranslated) into.push(original, reply);
}

function tupleOf(bytes: Buffer | undefined): Tuple | undefined {
  if (bytes === undefined) return undefined;
  const parts = attributes(bytes);
  const ip = attributes(parts.get(CTA_TUPLE_IP));
  const proto = attributes(parts.get(CTA_TUPLE_PROTO));
  const source = ip.get(CTA_IP_V4_SRC)?.readUInt32BE(0);
  const destination = ip.get(CTA_IP_V4_DST)?.readUInt32BE(0);
  const protocol = proto.get(CTA_PROTO_NUM)?.readUInt8(0);
  if (source === undefined || destination === undefined || protocol === undefined) return undefined;
  const identifier = proto.get(CTA_PROTO_ICMP_ID)?.readUInt16BE(0);
  const port = (type: number) => identifier ?? proto.get(type)?.readUInt16BE(0) ?? 0;
  return {
    source,
    destination,
    sourcePort: port(CTA_PROTO_SRC_PORT),
    destinationPort: port(CTA_PROTO_DST_PORT),
    protocol,
  };
}

/** The attributes of a message or of another attribute, by type. */
function attributes(bytes: Buffer = Buffer.alloc(0)): Map<number, Buffer> {
  const found = new Map<number, Buffer>();
  for (let at = 0; at + 4 <= bytes.length; ) {
    const length = bytes.readUInt16LE(at);
    if (length < 4 || at + length > bytes.length) break;
    found.set(bytes.readUInt16LE(at + 2) & TYPE_MASK, bytes.subarray(at + 4, at + length));
    at += (length + 3) & ~3;
  }
  return found;
}

function failure(number: number): Error {
  return new Error(`the connections that the host translates cannot be read (errno ${number})`);
}
