/**
 * The kernel's links, addresses, routes, neighbours and FDB entries, over AF_NETLINK sockets of our own.
 *
 * Requests are synchronous: rtnetlink answers inside the system call, so a dump or a batch is a few
 * microseconds per row with no state in between. Changes arrive on a second socket, on the event loop. The
 * sockets belong to the network namespace of the thread that opened them.
 *
 * Writes go out many to a datagram. The kernel always reports a failed one and is asked to confirm only the
 * last, so a batch of thousands costs a handful of calls and each write still has its own verdict.
 */
import { constants } from "node:os";
import { getSystemErrorMap } from "node:util";
import { addressOf, errno, openLibrary, type Watch, watchFd } from "../../loader/ffi.ts";
import type {
  Address,
  FdbEntry,
  HostRows,
  HostTable,
  Link,
  Neighbour,
  NetlinkEvent,
  Route,
  RouteSpec,
  VxlanSpec,
  Write,
} from "../core/host.ts";
import type { Ipv4, Prefix } from "../core/ipv4.ts";
import { formatIpv4 } from "../core/ipv4.ts";
import type { Mac } from "../core/model.ts";
import {
  type Ack,
  decodeAck,
  decodeAddress,
  decodeEvent,
  decodeFdb,
  decodeLink,
  decodeNeighbour,
  decodeNexthop,
  decodeRoute,
  MalformedMessage,
  type Message,
  messages,
  type NexthopObject,
  NLM_F,
  NLMSG_DONE,
  NLMSG_ERROR,
} from "./netlink-codec.ts";
import {
  describeWrite,
  encodeDump,
  encodeGetLink,
  encodeRouteTo,
  encodeWrite,
  type RouteQuery,
  type Table,
  Writer,
} from "./netlink-request.ts";

/** The kernel refused a request. */
export class NetlinkError extends Error {
  override readonly name = "NetlinkError";
  /** What was asked, in words: "write route 10.1.2.0/24 via 10.1.2.0 on interface 7". */
  readonly operation: string;
  /** Positive errno. */
  readonly errno: number;
  /** Its name: "EEXIST". */
  readonly code: string;
  /** The kernel's own words (ext-ack); empty if it gave none. */
  readonly detail: string;

  constructor(operation: string, number: number, detail = "") {
    const code = ERRNO_NAMES.get(number) ?? `errno ${number}`;
    const meaning = detail || getSystemErrorMap().get(-number)?.[1];
    const advice = ADVICE[code];
    super(`cannot ${operation}: ${code}${meaning ? ` (${meaning})` : ""}${advice ? `; ${advice}` : ""}`);
    this.operation = operation;
    this.errno = number;
    this.code = code;
    this.detail = detail;
  }
}

/** The route the kernel takes to an address. */
export interface RouteTo {
  readonly outIndex: number | undefined;
  /** Undefined if the destination is on the link (or the next hop is an IPv6 address, see `viaIpv6`). */
  readonly gateway: Ipv4 | undefined;
  readonly viaIpv6: boolean;
  /** Address the kernel would send from. */
  readonly source: Ipv4 | undefined;
  /** A route's own MTU, if it has one; the interface's limits as well. */
  readonly mtu: number | undefined;
  /** RTN: 1 unicast, 2 local, 3 broadcast, 5 multicast. */
  readonly type: number;
  /** The address is one of this host's. */
  readonly local: boolean;
}

/** Who is told of changes. */
export interface Listener {
  onEvent(event: NetlinkEvent): void;
  /** Changes were lost. Nothing older follows: what is dumped from now on plus later events is the whole truth. */
  onOverrun(): void;
}

/**
 * An open connection to the kernel's tables. Every method throws NetlinkError when the kernel refuses.
 * A `delete` of what is already gone is not an error: it returns false.
 */
export interface Netlink {
  links(): Link[];
  /** One interface by name; undefined if there is none. */
  link(name: string): Link | undefined;
  /** IPv4 addresses of all interfaces. */
  addresses(): Address[];
  /** IPv4 routes: of one routing table (254 is main), or of all. */
  routes(query?: { readonly table?: number }): Route[];
  /** IPv4 neighbours of all interfaces; proxy entries are not listed. */
  neighbours(): Neighbour[];
  /** Entries of all bridges and VXLAN devices. */
  fdb(): FdbEntry[];
  /** The nexthop objects of whoever made them. */
  nexthops(): NexthopObject[];
  /**
   * The rows of a table a datagram's worth at a time, which takes about a millisecond: a table of many thousands need not be
   * listed in one go. Each row is as it was when the ones before it were taken, or later. Of rows that stay, the kernel may
   * pass over some if others come or go meanwhile. To be ended by `return` if it is given up.
   */
  read<Name extends HostTable>(table: Name): Generator<readonly HostRows[Name][]>;
  /** The route to an address; undefined if there is none or it is a prohibiting one. */
  routeTo(address: Ipv4, query?: RouteQuery): RouteTo | undefined;
  /** The routes to many addresses, in their order, at a fraction of the cost of asking for each. */
  routesTo(addresses: readonly Ipv4[]): (RouteTo | undefined)[];

  /** Creates the device, down, and returns its index. */
  createVxlan(spec: VxlanSpec): number;
  /** Changes the given properties; the MAC before the flags, as one request. */
  setLink(
    index: number,
    change: {
      readonly up?: boolean | undefined;
      readonly mtu?: number | undefined;
      readonly mac?: Mac | undefined;
    },
  ): void;
  deleteLink(index: number): boolean;
  addAddress(index: number, address: Prefix): void;
  deleteAddress(index: number, address: Prefix): boolean;
  /** Adds the route, or puts it in the place of the one with its destination and metric. */
  replaceRoute(route: RouteSpec): void;
  deleteRoute(route: RouteSpec): boolean;
  deleteNexthop(id: number): boolean;
  replaceNeighbour(neighbour: {
    readonly index: number;
    readonly address: Ipv4;
    readonly mac: Mac;
    readonly permanent: boolean;
  }): void;
  deleteNeighbour(neighbour: { readonly index: number; readonly address: Ipv4 }): boolean;
  /** A permanent entry in a VXLAN device's own table: frames for `mac` go to the remote `dst`. */
  replaceFdb(entry: { readonly index: number; readonly mac: Mac; readonly dst: Ipv4 }): void;
  /** If the MAC is behind another remote than `dst`, the entry stays, though the kernel reports success. */
  deleteFdb(entry: { readonly index: number; readonly mac: Mac; readonly dst: Ipv4 }): boolean;

  /**
   * Does all writes in order, also those after a failed one. Result i is the error of write i, or undefined;
   * deleting what is gone counts as done. Throws only if the socket itself fails.
   */
  apply(writes: readonly Write[]): (NetlinkError | undefined)[];

  close(): void;
}

const AF_NETLINK = 16;
const SOCK_RAW_CLOEXEC = 3 | 0o2000000;
const NETLINK_ROUTE = 0;
const MSG_TRUNC = 0x20;
const MSG_DONTWAIT = 0x40;
const MSG_WAITFORONE = 0x10000;
const SOL_SOCKET = 1;
const SO_SNDBUF = 7;
const SO_RCVBUF = 8;
const SO_RCVTIMEO = 20;
const SO_SNDBUFFORCE = 32;
const SO_RCVBUFFORCE = 33;
const SOL_NETLINK = 270;
const NETLINK_ADD_MEMBERSHIP = 1;
const NETLINK_CAP_ACK = 10;
const NETLINK_EXT_ACK = 11;
const NETLINK_GET_STRICT_CHK = 12;
/** RTNLGRP numbers: link, neighbour (also FDB), traffic control, IPv4 address, IPv4 route, nexthop. */
const GROUPS = [1, 3, 4, 5, 7, 32];
const RTN_LOCAL = 2;

const { EINTR, EAGAIN, ENOBUFS, EBADMSG, EINVAL, ENETUNREACH, EHOSTUNREACH, EACCES } = constants.errno;
const { ENODEV, ENOENT, ESRCH, EADDRNOTAVAIL, ENXIO } = constants.errno;
/** How the kernel says that a row to delete, or the device it was on, does not exist. */
const GONE: ReadonlySet<number> = new Set([ENODEV, ENOENT, ESRCH, EADDRNOTAVAIL, ENXIO]);

// Where two names share a number the later entry wins: EAGAIN over EWOULDBLOCK, EOPNOTSUPP over ENOTSUP.
const ERRNO_NAMES: ReadonlyMap<number, string> = new Map(
  Object.entries(constants.errno)
    .map(([name, number]): [number, string] => [number, name])
    .sort(([, a], [, b]) => Number(isAlias(b)) - Number(isAlias(a))),
);

function isAlias(name: string): boolean {
  return name === "EWOULDBLOCK" || name === "ENOTSUP";
}

const ADVICE: Readonly<Record<string, string>> = {
  EPERM: "run as root or grant CAP_NET_ADMIN",
  EOPNOTSUPP: "the kernel lacks the feature, check that its module (vxlan, bridge, ifb, dummy) can be loaded",
  ENODEV: "the interface is gone, list the interfaces again",
  ENOBUFS: "raise net.core.rmem_max or grant CAP_NET_ADMIN",
  EINTR: "the table changed during each of several dumps, try again",
};

/** One datagram never holds more than 32 KiB when the kernel dumps; a batch of acks is far smaller. */
const RECEIVE_BYTES = 128 * 1024;
/** Datagrams that are taken in one call, where many short ones are to be expected: the call takes longer than its work. */
const DATAGRAMS_PER_CALL = 16;
/** `struct mmsghdr`, `struct sockaddr_nl` and `struct iovec`, and where their fields are. */
const MMSGHDR = { bytes: 64, name: 0, nameLength: 8, iov: 16, iovLength: 24, length: 56 };
const SOCKADDR_NL = { bytes: 12, pid: 4 };
const IOVEC = { bytes: 16, base: 0, length: 8 };
/** Where those of all datagrams are in their memory. */
const NAMES = DATAGRAMS_PER_CALL * MMSGHDR.bytes;
const VECTORS = NAMES + DATAGRAMS_PER_CALL * SOCKADDR_NL.bytes;
const HEADERS_BYTES = VECTORS + DATAGRAMS_PER_CALL * IOVEC.bytes;
const SEND_BYTES = 64 * 1024;
/** Longest request; see `Writer.room`. */
const REQUEST_BYTES = 512;
/** A socket charges about this much for one queued answer, however short. */
const ANSWER_CHARGE = 2048;
const REQUEST_RECEIVE_BUFFER = 4 * 1024 * 1024;
/** Room for a full cluster's worth of changes made in one go: ten thousand routes take about 10 MB. */
const EVENT_RECEIVE_BUFFER = 32 * 1024 * 1024;
/** The kernel answers within the call; waiting longer means that an answer was lost. */
const ANSWER_TIMEOUT_SECONDS = 10;
const DUMP_ATTEMPTS = 10;
/** Datagrams read before other work of the event loop gets its turn. */
const EVENTS_PER_TURN = 512;

const libc = openLibrary("libc.so.6");
const call = {
  socket: libc.prepare("socket", "int", ["int", "int", "int"]),
  setsockopt: libc.prepare("setsockopt", "int", ["int", "int", "int", "pointer", "uint"]),
  getsockopt: libc.prepare("getsockopt", "int", ["int", "int", "int", "pointer", "pointer"]),
  bind: libc.prepare("bind", "int", ["int", "pointer", "uint"]),
  send: libc.prepare("send", "ssize", ["int", "pointer", "size", "int"]),
  recvmmsg: libc.prepare("recvmmsg", "int", ["int", "pointer", "uint", "int", "pointer"]),
  close: libc.prepare("close", "int", ["int"]),
};

/** A bound rtnetlink socket. */
class Socket {
  readonly fd: number;
  /** The datagram that was received last. */
  buffer: Buffer;
  private readonly buffers: readonly Buffer[];
  /** The kernel's headers of them, and what these point to. */
  private readonly headers = Buffer.alloc(HEADERS_BYTES);
  /** Of those taken from the kernel, how many there are, and which is to be passed on next. */
  private taken = 0;
  private next = 0;

  constructor(receiveBuffer: number) {
    // Of these only the pages are ever used that a datagram comes to lie on.
    const memory = Buffer.allocUnsafeSlow(DATAGRAMS_PER_CALL * RECEIVE_BYTES);
    const { headers } = this;
    const pointTo = (at: number, address: number): number => headers.writeBigUInt64LE(BigInt(address), at);
    this.buffers = Array.from({ length: DATAGRAMS_PER_CALL }, (_, i) => {
      const header = i * MMSGHDR.bytes;
      const vector = VECTORS + i * IOVEC.bytes;
      const bytes = i * RECEIVE_BYTES;
      pointTo(header + MMSGHDR.name, addressOf(headers) + NAMES + i * SOCKADDR_NL.bytes);
      pointTo(header + MMSGHDR.iov, addressOf(headers) + vector);
      headers.writeUInt32LE(1, header + MMSGHDR.iovLength);
      pointTo(vector + IOVEC.base, addressOf(memory) + bytes);
      headers.writeUInt32LE(RECEIVE_BYTES, vector + IOVEC.length);
      return memory.subarray(bytes, bytes + RECEIVE_BYTES);
    });
    this.buffer = memory;
    this.fd = call.socket(AF_NETLINK, SOCK_RAW_CLOEXEC, NETLINK_ROUTE);
    if (this.fd < 0) throw new NetlinkError("open a netlink socket", errno());
    try {
      // The forced sizes need CAP_NET_ADMIN; without it the limits of net.core apply.
      if (!this.set(SOL_SOCKET, SO_RCVBUFFORCE, receiveBuffer))
        this.set(SOL_SOCKET, SO_RCVBUF, receiveBuffer);
      if (!this.set(SOL_SOCKET, SO_SNDBUFFORCE, 4 * SEND_BYTES))
        this.set(SOL_SOCKET, SO_SNDBUF, 4 * SEND_BYTES);
      this.require(SOL_NETLINK, NETLINK_EXT_ACK, 1);
      this.require(SOL_NETLINK, NETLINK_CAP_ACK, 1);
      this.require(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1);
      const address = Buffer.alloc(12);
      address.writeUInt16LE(AF_NETLINK, 0);
      if (call.bind(this.fd, address, 12) < 0) throw new NetlinkError("bind a netlink socket", errno());
    } catch (error) {
      this.close();
      throw error;
    }
  }

  private set(level: number, option: number, value: number): boolean {
    const bytes = Buffer.alloc(4);
    bytes.writeInt32LE(value);
    return call.setsockopt(this.fd, level, option, bytes, 4) === 0;
  }

  private require(level: number, option: number, value: number): void {
    if (!this.set(level, option, value)) {
      throw new NetlinkError(`set netlink socket option ${option} to ${value}`, errno());
    }
  }

  join(group: number): void {
    this.require(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group);
  }

  /** Limits how long `receive` waits. */
  limitWait(seconds: number): void {
    const timeval = Buffer.alloc(16);
    timeval.writeBigInt64LE(BigInt(seconds));
    if (call.setsockopt(this.fd, SOL_SOCKET, SO_RCVTIMEO, timeval, 16) < 0) {
      throw new NetlinkError("limit the wait on a netlink socket", errno());
    }
  }

  /** Bytes the kernel may queue for us, as it counts them. */
  receiveLimit(): number {
    const value = Buffer.alloc(4);
    const length = Buffer.alloc(4);
    length.writeUInt32LE(4);
    if (call.getsockopt(this.fd, SOL_SOCKET, SO_RCVBUF, value, length) < 0) {
      throw new NetlinkError("read the buffer size of a netlink socket", errno());
    }
    return value.readInt32LE();
  }

  send(bytes: Buffer, length: number, operation: string): void {
    while (call.send(this.fd, bytes, length, 0) < 0) {
      if (errno() !== EINTR) throw new NetlinkError(operation, errno());
    }
  }

  /** Whether the next datagram is here already. */
  get hasNext(): boolean {
    return this.next < this.taken;
  }

  /**
   * Puts the next datagram of the kernel into `buffer` and returns its length, which is more than the buffer
   * holds if it was cut; a negative errno on failure. Takes so many from the socket at once, without waiting for more than
   * one. Datagrams of other processes are dropped.
   */
  receive(flags: number, most = 1): number {
    const { headers } = this;
    for (;;) {
      if (!this.hasNext) {
        for (let i = 0; i < most; i++)
          headers.writeUInt32LE(SOCKADDR_NL.bytes, i * MMSGHDR.bytes + MMSGHDR.nameLength);
        this.next = 0;
        this.taken = call.recvmmsg(this.fd, headers, most, flags | MSG_TRUNC | MSG_WAITFORONE, null);
        if (this.taken < 0 && errno() === EINTR) continue;
        if (this.taken < 0) return -errno();
      }
      const i = this.next++;
      if (headers.readUInt32LE(NAMES + i * SOCKADDR_NL.bytes + SOCKADDR_NL.pid) !== 0) continue;
      this.buffer = this.buffers[i] ?? this.buffer;
      return headers.readUInt32LE(i * MMSGHDR.bytes + MMSGHDR.length);
    }
  }

  close(): void {
    call.close(this.fd);
  }
}

function openRequestSocket(): Socket {
  const socket = new Socket(REQUEST_RECEIVE_BUFFER);
  try {
    socket.limitWait(ANSWER_TIMEOUT_SECONDS);
    return socket;
  } catch (error) {
    socket.close();
    throw error;
  }
}

const listing = (table: Table): string => `list ${table === "fdb" ? "FDB entries" : table}`;

/** Sends requests and matches answers to them by sequence number. */
class Requester {
  private socket = openRequestSocket();
  private readonly bytes = Buffer.allocUnsafeSlow(SEND_BYTES);
  private readonly writer = new Writer(this.bytes);
  private readonly batchSize: number;
  private sequence = 0;

  constructor() {
    this.batchSize = Math.max(16, Math.min(1024, Math.floor(this.socket.receiveLimit() / ANSWER_CHARGE)));
  }

  /** Takes the next `count` sequence numbers; they wrap long after any answer has come. */
  private claim(count: number): number {
    if (this.sequence + count > 0xffffffff) this.sequence = 0;
    const first = this.sequence + 1;
    this.sequence += count;
    return first;
  }

  /** Passes on each message of our own sequence numbers until `take` returns true. */
  private answers(operation: string, first: number, last: number, take: (message: Message) => boolean): void {
    while (!this.answer(operation, first, last, take, DATAGRAMS_PER_CALL));
  }

  /** The same of the next datagram alone, with which so many may be taken. Returns whether `take` returned true. */
  private answer(
    operation: string,
    first: number,
    last: number,
    take: (message: Message) => boolean,
    most = 1,
  ): boolean {
    const length = this.socket.receive(0, most);
    if (length < 0) throw new NetlinkError(operation, -length, -length === EAGAIN ? "no answer came" : "");
    try {
      for (const message of messages(this.socket.buffer, length)) {
        if (message.sequence < first || message.sequence > last) continue;
        if (take(message)) return true;
      }
      return false;
    } catch (error) {
      // The rest of this answer would block the next request; a fresh socket owes us nothing.
      this.socket.close();
      this.socket = openRequestSocket();
      if (error instanceof MalformedMessage) throw new NetlinkError(operation, EBADMSG, error.message);
      throw error;
    }
  }

  private ask(operation: string, encode: (sequence: number) => void): number {
    const sequence = this.claim(1);
    this.writer.reset();
    encode(sequence);
    this.socket.send(this.bytes, this.writer.length, operation);
    return sequence;
  }

  /** All rows of a table, as of one moment: the kernel says when a table changed under a dump. */
  dump<Row>(
    table: Table,
    decode: (buffer: Buffer, message: Message) => Row | undefined,
    routeTable?: number,
  ): Row[] {
    for (let attempt = 0; attempt < DUMP_ATTEMPTS; attempt++) {
      const rows: Row[] = [];
      const blocks = this.list(table, decode, routeTable);
      let block = blocks.next();
      for (; block.done !== true; block = blocks.next()) for (const row of block.value) rows.push(row);
      if (!block.value) return rows;
    }
    throw new NetlinkError(listing(table), EINTR);
  }

  /**
   * The rows of a table as they come; returns whether it changed meanwhile. Whoever gives it up closes this: the rest would
   * block the next request.
   */
  *list<Row>(
    table: Table,
    decode: (buffer: Buffer, message: Message) => Row | undefined,
    routeTable?: number,
  ): Generator<readonly Row[], boolean> {
    const operation = listing(table);
    const sequence = this.ask(operation, (number) => encodeDump(this.writer, number, table, routeTable));
    let interrupted = false;
    for (let isAll = false; !isAll; ) {
      const rows: Row[] = [];
      let verdict: Ack = { errno: 0, detail: "" };
      isAll = this.answer(operation, sequence, sequence, (message) => {
        if (message.flags & NLM_F.DUMP_INTR) interrupted = true;
        if (message.type === NLMSG_ERROR || message.type === NLMSG_DONE) {
          verdict = decodeAck(this.socket.buffer, message);
          return true;
        }
        const row = decode(this.socket.buffer, message);
        if (row !== undefined) rows.push(row);
        return false;
      });
      if (rows.length > 0) yield rows;
      // A routing table that has never had a route does not exist.
      if (verdict.errno === ENOENT && routeTable !== undefined) return false;
      if (verdict.errno !== 0) throw new NetlinkError(operation, verdict.errno, verdict.detail);
    }
    return interrupted;
  }

  /**
   * The one row that each of `count` look-ups finds, or why there is none. As many as fit go in one datagram, which the
   * kernel answers in order.
   */
  lookup<Row>(
    count: number,
    describe: (index: number) => string,
    encode: (writer: Writer, sequence: number, index: number) => void,
    decode: (buffer: Buffer, message: Message) => Row | undefined,
  ): (Row | NetlinkError)[] {
    const found: (Row | NetlinkError)[] = [];
    while (found.length < count) {
      const from = found.length;
      const first = this.claim(Math.min(count - from, this.batchSize));
      const { writer } = this;
      let asked = 0;
      writer.reset();
      for (; asked < Math.min(count - from, this.batchSize) && writer.room >= REQUEST_BYTES; asked += 1)
        encode(writer, first + asked, from + asked);
      this.socket.send(this.bytes, writer.length, describe(from));
      this.answers(describe(from), first, first + asked - 1, (message) => {
        const operation = describe(message.sequence - first + from);
        const verdict = message.type === NLMSG_ERROR ? decodeAck(this.socket.buffer, message) : undefined;
        const row = verdict === undefined ? decode(this.socket.buffer, message) : undefined;
        if (row !== undefined) found.push(row);
        else if (verdict === undefined || verdict.errno === 0)
          found.push(new NetlinkError(operation, EBADMSG, "the answer holds no row"));
        else found.push(new NetlinkError(operation, verdict.errno, verdict.detail));
        return found.length === from + asked;
      });
    }
    return found;
  }

  /** Does the writes in order; result i is the error of write i. */
  submit(batch: readonly Write[]): (NetlinkError | undefined)[] {
    const results: (NetlinkError | undefined)[] = new Array(batch.length).fill(undefined);
    for (let next = 0; next < batch.length; ) next = this.submitSome(batch, next, results);
    return results;
  }

  /** One datagram's worth of writes from `from` on; returns where the next begins. */
  private submitSome(batch: readonly Write[], from: number, results: (NetlinkError | undefined)[]): number {
    const { writer } = this;
    const until = Math.min(batch.length, from + this.batchSize);
    const first = this.claim(until - from);
    const offset = from - first;
    let last = 0;
    let next = from;
    writer.reset();
    for (; next < until && writer.room >= REQUEST_BYTES; next++) {
      const write = batch[next];
      if (write === undefined) continue;
      try {
        encodeWrite(writer, next - offset, write);
        last = next - offset;
      } catch (error) {
        if (!(error instanceof RangeError)) throw error;
        results[next] = new NetlinkError(describeWrite(write), EINVAL, error.message);
      }
    }
    if (last === 0) return next;
    writer.requestAck();
    const operation = `make ${next - from} changes to the kernel's tables`;
    this.socket.send(this.bytes, writer.length, operation);
    this.answers(operation, first, last, (message) => {
      const write = batch[message.sequence + offset];
      if (message.type !== NLMSG_ERROR || write === undefined) return false;
      const { errno: number, detail } = decodeAck(this.socket.buffer, message);
      if (number !== 0) {
        results[message.sequence + offset] = new NetlinkError(describeWrite(write), number, detail);
      }
      return message.sequence === last;
    });
    return next;
  }

  close(): void {
    this.socket.close();
  }
}

/** Listens on the event groups; what `close` undoes. */
function listen(listener: Listener): { close(): void } {
  const socket = new Socket(EVENT_RECEIVE_BUFFER);
  let watch: Watch | undefined;
  let open = true;

  /** Throws away what is queued, so that nothing older than the coming dump is delivered after it. */
  const overrun = (): void => {
    while (open) {
      const length = socket.receive(MSG_DONTWAIT, DATAGRAMS_PER_CALL);
      if (length === -EAGAIN) break;
      if (length < 0 && length !== -ENOBUFS) throw new NetlinkError("receive changes", -length);
    }
    // libuv gives up on a descriptor that polls as failed, which is how the loss first showed.
    watch?.close();
    watch = watchFd(socket.fd, read);
    listener.onOverrun();
  };

  const read = (): void => {
    // Nobody would tell of what was taken from the socket and left.
    for (let turn = 0; open && (turn < EVENTS_PER_TURN || socket.hasNext); turn++) {
      const length = socket.receive(MSG_DONTWAIT, DATAGRAMS_PER_CALL);
      if (length === -EAGAIN) return;
      if (length === -ENOBUFS) {
        overrun();
        return;
      }
      if (length < 0) throw new NetlinkError("receive changes", -length);
      const events: NetlinkEvent[] = [];
      try {
        for (const message of messages(socket.buffer, length)) {
          const event = decodeEvent(socket.buffer, message);
          if (event !== undefined) events.push(event);
        }
      } catch (error) {
        if (!(error instanceof MalformedMessage)) throw error;
        // A change we cannot read is a change we have missed.
        overrun();
        return;
      }
      for (const event of events) if (open) listener.onEvent(event);
    }
  };

  try {
    for (const group of GROUPS) socket.join(group);
    watch = watchFd(socket.fd, read);
  } catch (error) {
    socket.close();
    throw error;
  }
  return {
    close: () => {
      if (!open) return;
      open = false;
      watch?.close();
      socket.close();
    },
  };
}

/**
 * Opens rtnetlink in the calling thread's network namespace. With a listener, changes made by anyone (also
 * through this connection) are delivered from the event loop, in order. The kernel sends no route changes
 * when an interface goes down or away, though its routes vanish with it: take the link's change as the sign.
 */
export function openNetlink(listener?: Listener): Netlink {
  const requester = new Requester();
  let events: { close(): void } | undefined;
  try {
    if (listener) events = listen(listener);
  } catch (error) {
    requester.close();
    throw error;
  }
  let open = true;

  const must = (write: Write): void => {
    const [error] = requester.submit([write]);
    if (error) throw error;
  };
  const remove = (write: Write): boolean => {
    const [error] = requester.submit([write]);
    if (error && !isGone(write, error)) throw error;
    return error === undefined;
  };
  // Between two datagrams of a listing other requests have their answers, among them another listing.
  const listers: Requester[] = [];
  function* read<Name extends HostTable>(name: Name): Generator<readonly HostRows[Name][]> {
    const [table, decode] = TABLES[name];
    const lister = listers.pop() ?? new Requester();
    let isSpent = true;
    try {
      yield* lister.list(table, decode);
      isSpent = !open;
    } finally {
      if (isSpent) lister.close();
      else listers.push(lister);
    }
  }
  const link = (name: string): Link | undefined => {
    const [found] = requester.lookup(
      1,
      () => `look up interface ${name}`,
      (writer, sequence) => encodeGetLink(writer, sequence, name),
      decodeLink,
    );
    if (!(found instanceof NetlinkError)) return found;
    if (found.errno === ENODEV) return undefined;
    throw found;
  };
  const routesTo = (addresses: readonly Ipv4[], query: RouteQuery): (RouteTo | undefined)[] =>
    requester
      .lookup(
        addresses.length,
        (index) => `look up the route to ${formatIpv4(addresses[index] ?? 0)}`,
        (writer, sequence, index) => encodeRouteTo(writer, sequence, addresses[index] ?? 0, query),
        decodeRoute,
      )
      .map((route) => {
        if (route instanceof NetlinkError) {
          if (isNoRoute(route)) return undefined;
          throw route;
        }
        const { outIndex, gateway, viaIpv6, mtu, type } = route;
        // The answer repeats no source that the question gave.
        const source = route.source ?? query.source;
        return { outIndex, gateway, viaIpv6, source, mtu, type, local: type === RTN_LOCAL };
      });

  return {
    links: () => requester.dump("links", decodeLink),
    link,
    addresses: () => requester.dump("addresses", decodeAddress),
    routes: ({ table } = {}) => requester.dump("routes", decodeRoute, table),
    neighbours: () => requester.dump("neighbours", decodeNeighbour),
    fdb: () => requester.dump("fdb", decodeFdb),
    nexthops: () => requester.dump("nexthops", decodeNexthop),
    read,
    routeTo: (address, query = {}) => routesTo([address], query)[0],
    routesTo: (addresses) => routesTo(addresses, {}),
    createVxlan: (spec) => {
      must({ write: "createVxlan", ...spec });
      const created = link(spec.name);
      if (!created) throw new NetlinkError(`find the new VXLAN device ${spec.name}`, ENODEV);
      return created.index;
    },
    setLink: (index, change) => must({ write: "setLink", index, ...change }),
    deleteLink: (index) => remove({ write: "deleteLink", index }),
    addAddress: (index, address) => must({ write: "addAddress", index, address }),
    deleteAddress: (index, address) => remove({ write: "deleteAddress", index, address }),
    replaceRoute: (route) => must({ write: "replaceRoute", ...route }),
    deleteRoute: (route) => remove({ write: "deleteRoute", ...route }),
    deleteNexthop: (id) => remove({ write: "deleteNexthop", id }),
    replaceNeighbour: (neighbour) => must({ write: "replaceNeighbour", ...neighbour }),
    deleteNeighbour: (neighbour) => remove({ write: "deleteNeighbour", ...neighbour }),
    replaceFdb: (entry) => must({ write: "replaceFdb", ...entry }),
    deleteFdb: (entry) => remove({ write: "deleteFdb", ...entry }),
    apply: (writes) =>
      requester.submit(writes).map((error, i) => {
        const write = writes[i];
        return error !== undefined && write !== undefined && isGone(write, error) ? undefined : error;
      }),
    close: () => {
      if (!open) return;
      open = false;
      events?.close();
      requester.close();
      for (const lister of listers) lister.close();
    },
  };
}

const TABLES: {
  readonly [Name in HostTable]: readonly [
    Table,
    (buffer: Buffer, message: Message) => HostRows[Name] | undefined,
  ];
} = {
  link: ["links", decodeLink],
  address: ["addresses", decodeAddress],
  route: ["routes", decodeRoute],
  neighbour: ["neighbours", decodeNeighbour],
  fdb: ["fdb", decodeFdb],
};

/** Whether it was to be deleted and is not there. Of a nexthop that does not exist, a route by it is invalid as well. */
function isGone(write: Write, { errno: number }: NetlinkError): boolean {
  if (!write.write.startsWith("delete")) return false;
  return GONE.has(number) || (number === EINVAL && "nexthopId" in write && write.nexthopId !== undefined);
}

/** A blackhole route answers a bare EINVAL; a request that is at fault comes with the kernel's words. */
function isNoRoute(error: NetlinkError): boolean {
  if (error.errno === EINVAL) return error.detail === "";
  return error.errno === ENETUNREACH || error.errno === EHOSTUNREACH || error.errno === EACCES;
}
