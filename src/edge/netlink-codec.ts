/**
 * The bytes of rtnetlink that the kernel sends, read into rows; `netlink-request.ts` is the other direction and
 * `netlink.ts` owns the sockets. No IO happens here.
 *
 * Layouts are those of linux/netlink.h, rtnetlink.h, if_link.h, if_addr.h, neighbour.h and nexthop.h. A datagram holds
 * messages, a message a fixed header (`ifinfomsg`, `rtmsg`, ...) and attributes, each padded to four bytes.
 * Integers are in host order, which is little-endian on every machine that runs Twill; addresses and ports
 * are in network order. Nothing that arrives is trusted: a length that reaches past its container throws
 * `MalformedMessage`; an attribute we do not know is skipped, as newer kernels add them freely.
 */
import type {
  Address,
  FdbEntry,
  FilterPlace,
  Link,
  Neighbour,
  NetlinkEvent,
  Nexthop,
  Route,
  VxlanDevice,
} from "../core/host.ts";
import type { Ipv4 } from "../core/ipv4.ts";
import type { Mac } from "../core/model.ts";

/** Bytes that are no rtnetlink message; the kernel never sends such, so it means a bug or a foreign sender. */
export class MalformedMessage extends Error {
  override readonly name = "MalformedMessage";
}

/** One message of a datagram: header fields and where its payload lies. */
export interface Message {
  readonly type: number;
  readonly flags: number;
  readonly sequence: number;
  readonly start: number;
  readonly end: number;
}

/** The verdict in an NLMSG_ERROR or NLMSG_DONE message. */
export interface Ack {
  /** Positive errno, 0 for success. */
  readonly errno: number;
  /** The kernel's own words (ext-ack), empty if it gave none. */
  readonly detail: string;
}

/** Address families. */
export const AF = { INET: 2, BRIDGE: 7 } as const;
/** Header flags; a bit's meaning depends on the kind of message. */
export const NLM_F = {
  REQUEST: 0x1,
  ACK: 0x4,
  DUMP_INTR: 0x10,
  CAPPED: 0x100,
  REPLACE: 0x100,
  EXCL: 0x200,
  ACK_TLVS: 0x200,
  DUMP: 0x300,
  CREATE: 0x400,
} as const;
export const NLMSG_ERROR = 2;
export const NLMSG_DONE = 3;
const NLMSGERR_ATTR_MSG = 1;
const NLA_TYPE_MASK = 0x3fff;
const HEADER = 16;
/** Message types. */
export const RTM = {
  ...{ NEWLINK: 16, DELLINK: 17, GETLINK: 18, SETLINK: 19 },
  ...{ NEWADDR: 20, DELADDR: 21, GETADDR: 22 },
  ...{ NEWROUTE: 24, DELROUTE: 25, GETROUTE: 26 },
  ...{ NEWNEIGH: 28, DELNEIGH: 29, GETNEIGH: 30 },
  ...{ NEWQDISC: 36, DELQDISC: 37, NEWTFILTER: 44, DELTFILTER: 45 },
  ...{ NEWNEXTHOP: 104, DELNEXTHOP: 105, GETNEXTHOP: 106 },
} as const;

// Attribute types, one object per container.
export const IFLA = {
  ...{ ADDRESS: 1, IFNAME: 3, MTU: 4, LINK: 5, MASTER: 10, TXQLEN: 13 },
  ...{ LINKINFO: 18, EXT_MASK: 29, LINK_NETNSID: 37 },
} as const;
export const INFO = { KIND: 1, DATA: 2, SLAVE_KIND: 4 } as const;
export const VXLAN = {
  ...{ ID: 1, GROUP: 2, LINK: 3, LOCAL: 4, TTL: 5, TOS: 6, LEARNING: 7, AGEING: 8, PROXY: 11, RSC: 12 },
  ...{ L2MISS: 13, L3MISS: 14, PORT: 15, GBP: 23, COLLECT_METADATA: 25 },
} as const;
export const IFA = { ADDRESS: 1, LOCAL: 2, LABEL: 3, FLAGS: 8 } as const;
export const RTA = {
  ...{ DST: 1, SRC: 2, OIF: 4, GATEWAY: 5, PRIORITY: 6, PREFSRC: 7, METRICS: 8 },
  ...{ MULTIPATH: 9, TABLE: 15, MARK: 16, VIA: 18, NH_ID: 30 },
} as const;
export const NHA = { ID: 1, OIF: 5, GATEWAY: 6 } as const;
export const RTAX_MTU = 2;
export const NDA = { DST: 1, LLADDR: 2, VLAN: 5, MASTER: 9 } as const;

// Bits and values of the fixed headers.
export const IFF = { UP: 0x1, LOOPBACK: 0x8, RUNNING: 0x40, NOARP: 0x80 } as const;
const IFA_F = { SECONDARY: 0x01, DEPRECATED: 0x20, PERMANENT: 0x80 } as const;
export const RTNH_F = { DEAD: 1, ONLINK: 4, LINKDOWN: 16 } as const;
export const NUD = { REACHABLE: 0x02, PERMANENT: 0x80 } as const;
/** Parents in a `tcmsg`: the clsact qdisc's, and those of the filters at its two hooks (linux/pkt_sched.h). */
export const TC_H = { CLSACT: 0xfffffff1, INGRESS: 0xfffffff2, EGRESS: 0xfffffff3 } as const;
export const NTF = { USE: 0x01, SELF: 0x02, MASTER: 0x04, EXT_LEARNED: 0x10 } as const;

function align(length: number): number {
  return (length + 3) & ~3;
}

const HEX = Array.from({ length: 256 }, (_, byte) => byte.toString(16).padStart(2, "0"));

function macAt(buffer: Buffer, at: number): Mac {
  let text = HEX[buffer.readUInt8(at)] ?? "";
  for (let i = 1; i < 6; i++) text += `:${HEX[buffer.readUInt8(at + i)]}`;
  return text;
}

/** Walks the attributes of one container; each read checks the size of the attribute it is on. */
class Attributes {
  type = 0;
  private at = 0;
  private size = 0;
  private readonly buffer: Buffer;
  private next: number;
  private readonly end: number;

  constructor(buffer: Buffer, start: number, end: number) {
    this.buffer = buffer;
    this.next = start;
    this.end = end;
  }

  /** Moves to the next attribute; false at the end of the container. */
  advance(): boolean {
    if (this.next >= this.end) return false;
    const room = this.end - this.next;
    if (room < 4) throw new MalformedMessage(`${room} stray bytes follow the last attribute`);
    const length = this.buffer.readUInt16LE(this.next);
    if (length < 4 || length > room) {
      throw new MalformedMessage(`an attribute claims ${length} bytes where ${room} are left`);
    }
    this.type = this.buffer.readUInt16LE(this.next + 2) & NLA_TYPE_MASK;
    this.at = this.next + 4;
    this.size = length - 4;
    this.next += align(length);
    return true;
  }

  private need(bytes: number): number {
    if (this.size < bytes) {
      throw new MalformedMessage(`attribute ${this.type} has ${this.size} bytes, ${bytes} are needed`);
    }
    return this.at;
  }

  u8(): number {
    return this.buffer.readUInt8(this.need(1));
  }

  u16(): number {
    return this.buffer.readUInt16LE(this.need(2));
  }

  u16be(): number {
    return this.buffer.readUInt16BE(this.need(2));
  }

  u32(): number {
    return this.buffer.readUInt32LE(this.need(4));
  }

  i32(): number {
    return this.buffer.readInt32LE(this.need(4));
  }

  /** An IPv4 address; undefined if the attribute holds another family's. */
  ipv4(): Ipv4 | undefined {
    return this.size === 4 ? this.buffer.readUInt32BE(this.at) : undefined;
  }

  /** A MAC; undefined if the attribute holds another kind of hardware address. */
  mac(): Mac | undefined {
    return this.size === 6 ? macAt(this.buffer, this.at) : undefined;
  }

  /** NUL-terminated text. */
  text(): string {
    const text = this.buffer.toString("utf8", this.at, this.at + this.size);
    const nul = text.indexOf("\0");
    return nul < 0 ? text : text.slice(0, nul);
  }

  nested(): Attributes {
    return new Attributes(this.buffer, this.at, this.at + this.size);
  }

  range(): { start: number; end: number } {
    return { start: this.at, end: this.at + this.size };
  }
}

/**
 * Splits a datagram of `length` bytes into its messages.
 * Throws MalformedMessage, possibly after some messages, if a header does not fit.
 */
export function* messages(buffer: Buffer, length: number): Generator<Message> {
  if (length > buffer.length) {
    throw new MalformedMessage(`a datagram of ${length} bytes was cut to ${buffer.length}`);
  }
  for (let at = 0; at < length; ) {
    const room = length - at;
    const size = room < HEADER ? 0 : buffer.readUInt32LE(at);
    if (size < HEADER || size > room) {
      throw new MalformedMessage(`a message claims ${size} bytes where ${room} are left`);
    }
    yield {
      type: buffer.readUInt16LE(at + 4),
      flags: buffer.readUInt16LE(at + 6),
      sequence: buffer.readUInt32LE(at + 8),
      start: at + HEADER,
      end: at + size,
    };
    at += align(size);
  }
}

function fixed(message: Message, bytes: number): number {
  if (message.end - message.start < bytes) {
    throw new MalformedMessage(`message type ${message.type} is shorter than its ${bytes}-byte header`);
  }
  return message.start;
}

/** Reads an NLMSG_ERROR or NLMSG_DONE message, with the kernel's text if it sent one. */
export function decodeAck(buffer: Buffer, message: Message): Ack {
  const start = fixed(message, 4);
  // DONE carries only the number before its attributes; ERROR also our header, and our payload unless capped.
  let at = start + 4;
  if (message.type === NLMSG_ERROR) {
    fixed(message, 4 + HEADER);
    at = start + 4 + (message.flags & NLM_F.CAPPED ? HEADER : align(buffer.readUInt32LE(start + 4)));
  }
  let detail = "";
  if (message.flags & NLM_F.ACK_TLVS) {
    const attributes = new Attributes(buffer, at, message.end);
    while (attributes.advance()) if (attributes.type === NLMSGERR_ATTR_MSG) detail = attributes.text();
  }
  return { errno: 0 - buffer.readInt32LE(start), detail };
}

function decodeVxlan(data: Attributes): VxlanDevice {
  let [vni, dstPort, ageing] = [0, 0, 0];
  let [learning, gbp, l2miss, l3miss, collectMetadata] = [false, false, false, false, false];
  let localIp: Ipv4 | undefined;
  let group: Ipv4 | undefined;
  let parentIndex: number | undefined;
  while (data.advance()) {
    if (data.type === VXLAN.ID) vni = data.u32();
    else if (data.type === VXLAN.GROUP) group = data.ipv4();
    else if (data.type === VXLAN.LOCAL) localIp = data.ipv4();
    else if (data.type === VXLAN.LINK) parentIndex = data.u32() || undefined;
    else if (data.type === VXLAN.PORT) dstPort = data.u16be();
    else if (data.type === VXLAN.AGEING) ageing = data.u32();
    else if (data.type === VXLAN.LEARNING) learning = data.u8() !== 0;
    else if (data.type === VXLAN.L2MISS) l2miss = data.u8() !== 0;
    else if (data.type === VXLAN.L3MISS) l3miss = data.u8() !== 0;
    else if (data.type === VXLAN.COLLECT_METADATA) collectMetadata = data.u8() !== 0;
    else if (data.type === VXLAN.GBP) gbp = true;
  }
  return {
    vni,
    localIp,
    group: group || undefined,
    dstPort,
    parentIndex,
    learning,
    gbp,
    l2miss,
    l3miss,
    collectMetadata,
    ageing,
  };
}

/** Reads an `ifinfomsg`; undefined for the bridge's per-port reports, which are not about the interface. */
export function decodeLink(buffer: Buffer, message: Message): Link | undefined {
  const at = fixed(message, 16);
  if (buffer.readUInt8(at) !== 0) return undefined;
  const flags = buffer.readUInt32LE(at + 8);
  let name = "";
  let mtu = 0;
  let mac: Mac | undefined;
  let [kind, slaveKind]: (string | undefined)[] = [];
  let [masterIndex, linkIndex, linkNetnsId]: (number | undefined)[] = [];
  let data: Attributes | undefined;
  const attributes = new Attributes(buffer, at + 16, message.end);
  while (attributes.advance()) {
    if (attributes.type === IFLA.IFNAME) name = attributes.text();
    else if (attributes.type === IFLA.MTU) mtu = attributes.u32();
    else if (attributes.type === IFLA.ADDRESS) mac = attributes.mac();
    else if (attributes.type === IFLA.MASTER) masterIndex = attributes.u32() || undefined;
    else if (attributes.type === IFLA.LINK) linkIndex = attributes.u32() || undefined;
    else if (attributes.type === IFLA.LINK_NETNSID) linkNetnsId = attributes.i32();
    else if (attributes.type === IFLA.LINKINFO) {
      const info = attributes.nested();
      while (info.advance()) {
        if (info.type === INFO.KIND) kind = info.text();
        else if (info.type === INFO.SLAVE_KIND) slaveKind = info.text();
        else if (info.type === INFO.DATA) data = info.nested();
      }
    }
  }
  const vxlan = kind === "vxlan" && data ? decodeVxlan(data) : undefined;
  const paired = kind === "veth" || kind === "netkit" || linkNetnsId !== undefined;
  return {
    index: buffer.readInt32LE(at + 4),
    name,
    kind,
    mac,
    mtu,
    up: (flags & IFF.UP) !== 0,
    running: (flags & IFF.RUNNING) !== 0,
    loopback: (flags & IFF.LOOPBACK) !== 0,
    noarp: (flags & IFF.NOARP) !== 0,
    type: buffer.readUInt16LE(at + 2),
    masterIndex,
    slaveKind,
    linkIndex,
    linkNetnsId,
    parentIndex: vxlan?.parentIndex ?? (paired ? undefined : linkIndex),
    vxlan,
  };
}

/** Reads an `ifaddrmsg`; undefined for families other than IPv4. */
export function decodeAddress(buffer: Buffer, message: Message): Address | undefined {
  const at = fixed(message, 8);
  if (buffer.readUInt8(at) !== AF.INET) return undefined;
  let flags = buffer.readUInt8(at + 2);
  let [local, remote]: (Ipv4 | undefined)[] = [];
  let label: string | undefined;
  const attributes = new Attributes(buffer, at + 8, message.end);
  while (attributes.advance()) {
    if (attributes.type === IFA.LOCAL) local = attributes.ipv4();
    else if (attributes.type === IFA.ADDRESS) remote = attributes.ipv4();
    else if (attributes.type === IFA.LABEL) label = attributes.text();
    else if (attributes.type === IFA.FLAGS) flags = attributes.u32();
  }
  const address = local ?? remote;
  if (address === undefined) throw new MalformedMessage("an address message names no address");
  return {
    index: buffer.readUInt32LE(at + 4),
    address,
    prefixLength: prefixLength(buffer.readUInt8(at + 1)),
    scope: buffer.readUInt8(at + 3),
    permanent: (flags & IFA_F.PERMANENT) !== 0,
    deprecated: (flags & IFA_F.DEPRECATED) !== 0,
    secondary: (flags & IFA_F.SECONDARY) !== 0,
    label,
  };
}

function prefixLength(length: number): number {
  if (length > 32) throw new MalformedMessage(`an IPv4 prefix length of ${length}`);
  return length;
}

function decodeMtu(metrics: Attributes): number | undefined {
  let mtu: number | undefined;
  while (metrics.advance()) if (metrics.type === RTAX_MTU) mtu = metrics.u32();
  return mtu;
}

/** `rtnexthop` records: u16 length, u8 flags, u8 hops, i32 index, then attributes. */
function decodeNexthops(buffer: Buffer, start: number, end: number): Nexthop[] {
  const nexthops: Nexthop[] = [];
  for (let at = start; at < end; ) {
    const length = end - at < 8 ? 0 : buffer.readUInt16LE(at);
    if (length < 8 || length > end - at) {
      throw new MalformedMessage(`a next hop claims ${length} bytes where ${end - at} are left`);
    }
    let gateway: Ipv4 | undefined;
    const attributes = new Attributes(buffer, at + 8, at + length);
    while (attributes.advance()) if (attributes.type === RTA.GATEWAY) gateway = attributes.ipv4();
    const onlink = (buffer.readUInt8(at + 2) & RTNH_F.ONLINK) !== 0;
    nexthops.push({ outIndex: buffer.readInt32LE(at + 4), gateway, onlink });
    at += align(length);
  }
  return nexthops;
}

const NO_NEXTHOPS: readonly Nexthop[] = [];

/** Reads an `rtmsg`; undefined for families other than IPv4. */
export function decodeRoute(buffer: Buffer, message: Message): Route | undefined {
  const at = fixed(message, 12);
  if (buffer.readUInt8(at) !== AF.INET) return undefined;
  const flags = buffer.readUInt32LE(at + 8);
  let address: Ipv4 = 0;
  let [gateway, source]: (Ipv4 | undefined)[] = [];
  let [outIndex, mtu, nexthopId]: (number | undefined)[] = [];
  let table = buffer.readUInt8(at + 4);
  let metric = 0;
  let viaIpv6 = false;
  let nexthops = NO_NEXTHOPS;
  const attributes = new Attributes(buffer, at + 12, message.end);
  while (attributes.advance()) {
    if (attributes.type === RTA.DST) address = attributes.ipv4() ?? 0;
    else if (attributes.type === RTA.GATEWAY) gateway = attributes.ipv4();
    else if (attributes.type === RTA.OIF) outIndex = attributes.u32();
    else if (attributes.type === RTA.TABLE) table = attributes.u32();
    else if (attributes.type === RTA.PRIORITY) metric = attributes.u32();
    else if (attributes.type === RTA.PREFSRC) source = attributes.ipv4();
    else if (attributes.type === RTA.METRICS) mtu = decodeMtu(attributes.nested());
    else if (attributes.type === RTA.VIA) viaIpv6 = true;
    else if (attributes.type === RTA.NH_ID) nexthopId = attributes.u32();
    else if (attributes.type === RTA.MULTIPATH) {
      const { start, end } = attributes.range();
      nexthops = decodeNexthops(buffer, start, end);
    }
  }
  return {
    destination: { address, length: prefixLength(buffer.readUInt8(at + 1)) },
    gateway,
    viaIpv6,
    outIndex,
    table,
    protocol: buffer.readUInt8(at + 5),
    scope: buffer.readUInt8(at + 6),
    type: buffer.readUInt8(at + 7),
    tos: buffer.readUInt8(at + 3),
    onlink: (flags & RTNH_F.ONLINK) !== 0,
    linkDown: (flags & (RTNH_F.DEAD | RTNH_F.LINKDOWN)) !== 0,
    metric,
    mtu,
    source,
    nexthops,
    nexthopId,
  };
}

/** A nexthop object of any family. */
export interface NexthopObject {
  readonly id: number;
  /** RTPROT of who made it. */
  readonly protocol: number;
}

/** Reads an `nhmsg`. */
export function decodeNexthop(buffer: Buffer, message: Message): NexthopObject {
  const at = fixed(message, 8);
  let id: number | undefined;
  const attributes = new Attributes(buffer, at + 8, message.end);
  while (attributes.advance()) if (attributes.type === NHA.ID) id = attributes.u32();
  if (id === undefined) throw new MalformedMessage("a nexthop message names no number");
  return { id, protocol: buffer.readUInt8(at + 2) };
}

/** Reads an `ndmsg` of family IPv4; undefined for any other. */
export function decodeNeighbour(buffer: Buffer, message: Message): Neighbour | undefined {
  const at = fixed(message, 12);
  if (buffer.readUInt8(at) !== AF.INET) return undefined;
  const state = buffer.readUInt16LE(at + 8);
  let address: Ipv4 | undefined;
  let mac: Mac | undefined;
  const attributes = new Attributes(buffer, at + 12, message.end);
  while (attributes.advance()) {
    if (attributes.type === NDA.DST) address = attributes.ipv4();
    else if (attributes.type === NDA.LLADDR) mac = attributes.mac();
  }
  if (address === undefined) throw new MalformedMessage("a neighbour message names no address");
  return {
    index: buffer.readInt32LE(at + 4),
    address,
    mac,
    state,
    flags: buffer.readUInt8(at + 10),
    permanent: (state & NUD.PERMANENT) !== 0,
  };
}

/** Reads an `ndmsg` of the bridge family; undefined for any other, and for entries without an Ethernet MAC. */
export function decodeFdb(buffer: Buffer, message: Message): FdbEntry | undefined {
  const at = fixed(message, 12);
  if (buffer.readUInt8(at) !== AF.BRIDGE) return undefined;
  const state = buffer.readUInt16LE(at + 8);
  const flags = buffer.readUInt8(at + 10);
  let mac: Mac | undefined;
  let dst: Ipv4 | undefined;
  let [masterIndex, vlan]: (number | undefined)[] = [];
  const attributes = new Attributes(buffer, at + 12, message.end);
  while (attributes.advance()) {
    if (attributes.type === NDA.LLADDR) mac = attributes.mac();
    else if (attributes.type === NDA.DST) dst = attributes.ipv4();
    else if (attributes.type === NDA.MASTER) masterIndex = attributes.u32();
    else if (attributes.type === NDA.VLAN) vlan = attributes.u16();
  }
  if (mac === undefined) return undefined;
  return {
    index: buffer.readInt32LE(at + 4),
    mac,
    masterIndex,
    dst,
    vlan,
    state,
    permanent: (state & NUD.PERMANENT) !== 0,
    self: (flags & NTF.SELF) !== 0,
    master: (flags & NTF.MASTER) !== 0,
    externLearned: (flags & NTF.EXT_LEARNED) !== 0,
  };
}

/** Reads a `tcmsg`; undefined for what is not at a clsact hook. */
export function decodeFilterPlace(buffer: Buffer, message: Message): FilterPlace | undefined {
  const at = fixed(message, 20);
  const parent = buffer.readUInt32LE(at + 12);
  const isClsact = parent === TC_H.CLSACT || parent === TC_H.INGRESS || parent === TC_H.EGRESS;
  return isClsact ? { index: buffer.readInt32LE(at + 4) } : undefined;
}

/** Reads any message of the event groups; undefined for what is not about a table that we follow. */
export function decodeEvent(buffer: Buffer, message: Message): NetlinkEvent | undefined {
  const change = (message.type & 3) === 1 ? "delete" : "new";
  switch (message.type) {
    case RTM.NEWLINK:
    case RTM.DELLINK: {
      const row = decodeLink(buffer, message);
      return row && { kind: "link", change, row };
    }
    case RTM.NEWADDR:
    case RTM.DELADDR: {
      const row = decodeAddress(buffer, message);
      return row && { kind: "address", change, row };
    }
    case RTM.NEWROUTE:
    case RTM.DELROUTE: {
      const row = decodeRoute(buffer, message);
      return row && { kind: "route", change, row };
    }
    case RTM.DELNEXTHOP:
      return { kind: "nexthop", change: "delete", row: { id: decodeNexthop(buffer, message).id } };
    case RTM.NEWNEIGH:
    case RTM.DELNEIGH: {
      const entry = decodeFdb(buffer, message);
      if (entry) return { kind: "fdb", change, row: entry };
      const row = decodeNeighbour(buffer, message);
      return row && { kind: "neighbour", change, row };
    }
    case RTM.NEWQDISC:
    case RTM.DELQDISC:
    case RTM.NEWTFILTER:
    case RTM.DELTFILTER: {
      const row = decodeFilterPlace(buffer, message);
      return row && { kind: "filter", change, row };
    }
    default:
      return undefined;
  }
}
