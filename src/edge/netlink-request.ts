/**
 * The bytes of rtnetlink that we send: dumps, lookups and writes, packed one after another into a datagram.
 * `netlink-codec.ts` names the layouts and reads the answers.
 *
 * A write is plain data (`Write`), so that a batch is an array. "replace" adds or overwrites, which makes
 * repeating it harmless; "delete" names the row by its key. Values that flanneld writes are the defaults, so
 * that the routes, neighbours and devices of either daemon are the same to the other.
 */
import type { PlainSpec, RouteSpec, VxlanSpec, Write } from "../core/host.ts";
import { formatCidr, formatIpv4, type Ipv4, networkOf } from "../core/ipv4.ts";
import type { Mac } from "../core/model.ts";
import {
  AF,
  IFA,
  IFF,
  IFLA,
  INFO,
  NDA,
  NHA,
  NLM_F,
  NTF,
  NUD,
  RTA,
  RTAX_MTU,
  RTM,
  RTNH_F,
  VXLAN,
} from "./netlink-codec.ts";

/** The tables that can be listed. */
export type Table = "links" | "addresses" | "routes" | "neighbours" | "fdb" | "nexthops";

/** What to ask the kernel's route lookup besides the destination. */
export interface RouteQuery {
  readonly source?: Ipv4 | undefined;
  readonly outIndex?: number | undefined;
  /** Firewall mark, for policy rules. */
  readonly mark?: number | undefined;
}

const NLA_F_NESTED = 0x8000;
const RTEXT_FILTER_SKIP_STATS = 8;
const RT_TABLE_MAIN = 254;
const RTPROT_BOOT = 3;
const RT_SCOPE_UNIVERSE = 0;
const RT_SCOPE_LINK = 253;
const RT_SCOPE_NOWHERE = 255;
const RTN_UNICAST = 1;
const RTN_BLACKHOLE = 6;

/** Builds messages one after another in a buffer that is reused. */
export class Writer {
  length = 0;
  private message = 0;
  private readonly buffer: Buffer;

  constructor(buffer: Buffer) {
    this.buffer = buffer;
  }

  /** Bytes left; no single request of this file is longer than 512. */
  get room(): number {
    return this.buffer.length - this.length;
  }

  reset(): void {
    this.length = 0;
  }

  begin(type: number, flags: number, sequence: number, header: readonly number[]): void {
    this.message = this.length;
    this.u32(0);
    this.u16(type);
    this.u16(flags | NLM_F.REQUEST);
    this.u32(sequence);
    this.u32(0);
    for (const byte of header) this.u8(byte);
  }

  end(): void {
    this.buffer.writeUInt32LE(this.length - this.message, this.message);
  }

  /** Asks for an answer to the latest message also if it succeeds. */
  requestAck(): void {
    this.buffer.writeUInt16LE(this.buffer.readUInt16LE(this.message + 6) | NLM_F.ACK, this.message + 6);
  }

  u8(value: number): void {
    this.length = this.buffer.writeUInt8(value, this.length);
  }

  u16(value: number): void {
    this.length = this.buffer.writeUInt16LE(value, this.length);
  }

  u32(value: number): void {
    this.length = this.buffer.writeUInt32LE(value, this.length);
  }

  private header(type: number, size: number): void {
    this.u16(size + 4);
    this.u16(type);
  }

  flag(type: number): void {
    this.header(type, 0);
  }

  attribute8(type: number, value: number): void {
    this.header(type, 1);
    this.u8(value);
    this.pad();
  }

  attribute16be(type: number, value: number): void {
    this.header(type, 2);
    this.length = this.buffer.writeUInt16BE(value, this.length);
    this.pad();
  }

  attribute32(type: number, value: number): void {
    this.header(type, 4);
    this.u32(value);
  }

  ipv4(type: number, address: Ipv4): void {
    this.header(type, 4);
    this.length = this.buffer.writeUInt32BE(address, this.length);
  }

  mac(type: number, mac: Mac): void {
    if (!/^[0-9a-f]{2}(:[0-9a-f]{2}){5}$/i.test(mac)) throw new RangeError(`"${mac}" is not a MAC address`);
    this.header(type, 6);
    for (let i = 0; i < 6; i++) this.u8(Number.parseInt(mac.slice(3 * i, 3 * i + 2), 16));
    this.pad();
  }

  text(type: number, text: string): void {
    const size = Buffer.byteLength(text);
    if (size === 0 || size > 255 || text.includes("\0")) throw new RangeError(`"${text}" is not a name`);
    this.header(type, size + 1);
    this.length += this.buffer.write(text, this.length);
    this.u8(0);
    this.pad();
  }

  nest(type: number, inside: () => void): void {
    const at = this.length;
    this.header(type | NLA_F_NESTED, 0);
    inside();
    this.buffer.writeUInt16LE(this.length - at, at);
  }

  private pad(): void {
    while (this.length & 3) this.u8(0);
  }
}

function bytes32(value: number): number[] {
  if (!Number.isInteger(value) || value < 0 || value > 0xffffffff) {
    throw new RangeError(`${value} does not fit 32 bits`);
  }
  return [value & 255, (value >>> 8) & 255, (value >>> 16) & 255, value >>> 24];
}

function ifinfo(index: number, flags = 0, change = 0): number[] {
  return [0, 0, 0, 0, ...bytes32(index), ...bytes32(flags), ...bytes32(change)];
}

function ifaddr(index: number, length: number): number[] {
  return [AF.INET, length, 0, 0, ...bytes32(index)];
}

function ndmsg(family: number, index: number, state = 0, flags = 0): number[] {
  return [family, 0, 0, 0, ...bytes32(index), state, 0, flags, 0];
}

function nhmsg(family = 0, protocol = 0, flags = 0): number[] {
  return [family, 0, protocol, 0, ...bytes32(flags)];
}

/** Requests every row of a table; `routeTable` narrows routes to one routing table (0: all). */
export function encodeDump(writer: Writer, sequence: number, table: Table, routeTable = 0): void {
  if (table === "links") {
    writer.begin(RTM.GETLINK, NLM_F.DUMP, sequence, ifinfo(0));
    writer.attribute32(IFLA.EXT_MASK, RTEXT_FILTER_SKIP_STATS);
  } else if (table === "addresses") {
    writer.begin(RTM.GETADDR, NLM_F.DUMP, sequence, ifaddr(0, 0));
  } else if (table === "routes") {
    writer.begin(RTM.GETROUTE, NLM_F.DUMP, sequence, [AF.INET, 0, 0, 0, 0, 0, 0, 0, ...bytes32(0)]);
    if (routeTable !== 0) writer.attribute32(RTA.TABLE, routeTable);
  } else if (table === "nexthops") {
    writer.begin(RTM.GETNEXTHOP, NLM_F.DUMP, sequence, nhmsg());
  } else {
    const family = table === "fdb" ? AF.BRIDGE : AF.INET;
    writer.begin(RTM.GETNEIGH, NLM_F.DUMP, sequence, ndmsg(family, 0));
  }
  writer.end();
}

/** Requests one interface by name. */
export function encodeGetLink(writer: Writer, sequence: number, name: string): void {
  writer.begin(RTM.GETLINK, 0, sequence, ifinfo(0));
  writer.attribute32(IFLA.EXT_MASK, RTEXT_FILTER_SKIP_STATS);
  writer.text(IFLA.IFNAME, name);
  writer.end();
}

/** Requests the route the kernel would take to an address. */
export function encodeRouteTo(writer: Writer, sequence: number, address: Ipv4, query: RouteQuery): void {
  const sourceLength = query.source === undefined ? 0 : 32;
  writer.begin(RTM.GETROUTE, 0, sequence, [AF.INET, 32, sourceLength, 0, 0, 0, 0, 0, ...bytes32(0)]);
  writer.ipv4(RTA.DST, address);
  if (query.source !== undefined) writer.ipv4(RTA.SRC, query.source);
  if (query.outIndex !== undefined) writer.attribute32(RTA.OIF, query.outIndex);
  if (query.mark !== undefined) writer.attribute32(RTA.MARK, query.mark);
  writer.end();
}

/** Appends one write. Throws RangeError, leaving the writer as it was, if a field does not fit its wire form. */
export function encodeWrite(writer: Writer, sequence: number, write: Write): void {
  const before = writer.length;
  try {
    encode(writer, sequence, write);
    writer.end();
  } catch (error) {
    writer.length = before;
    throw error;
  }
}

function encode(writer: Writer, sequence: number, write: Write): void {
  switch (write.write) {
    case "createVxlan":
      encodeVxlan(writer, sequence, write);
      break;
    case "createPlain":
      encodePlain(writer, sequence, write);
      break;
    case "deleteLink":
      writer.begin(RTM.DELLINK, 0, sequence, ifinfo(write.index));
      break;
    case "setLink":
      encodeSetLink(writer, sequence, write);
      break;
    case "addAddress":
      writer.begin(
        RTM.NEWADDR,
        NLM_F.CREATE | NLM_F.EXCL,
        sequence,
        ifaddr(write.index, write.address.length),
      );
      writer.ipv4(IFA.LOCAL, write.address.address);
      writer.ipv4(IFA.ADDRESS, write.address.address);
      break;
    case "deleteAddress":
      writer.begin(RTM.DELADDR, 0, sequence, ifaddr(write.index, write.address.length));
      writer.ipv4(IFA.LOCAL, write.address.address);
      break;
    case "replaceRoute":
    case "deleteRoute":
      encodeRoute(writer, sequence, write, write.write === "deleteRoute");
      break;
    case "replaceNexthop":
      writer.begin(
        RTM.NEWNEXTHOP,
        NLM_F.CREATE | NLM_F.REPLACE,
        sequence,
        nhmsg(AF.INET, write.protocol, RTNH_F.ONLINK),
      );
      writer.attribute32(NHA.ID, write.id);
      writer.attribute32(NHA.OIF, write.outIndex);
      writer.ipv4(NHA.GATEWAY, write.gateway);
      break;
    case "deleteNexthop":
      writer.begin(RTM.DELNEXTHOP, 0, sequence, nhmsg());
      writer.attribute32(NHA.ID, write.id);
      break;
    case "replaceNeighbour": {
      const state = write.permanent ? NUD.PERMANENT : NUD.REACHABLE;
      writer.begin(RTM.NEWNEIGH, NLM_F.CREATE | NLM_F.REPLACE, sequence, ndmsg(AF.INET, write.index, state));
      writer.ipv4(NDA.DST, write.address);
      writer.mac(NDA.LLADDR, write.mac);
      break;
    }
    case "deleteNeighbour":
      writer.begin(RTM.DELNEIGH, 0, sequence, ndmsg(AF.INET, write.index));
      writer.ipv4(NDA.DST, write.address);
      break;
    case "dropResolution":
    case "resolveNeighbour": {
      // A resolution under way is not begun anew by use: it has to be none first.
      const use = write.write === "resolveNeighbour" ? NTF.USE : 0;
      writer.begin(RTM.NEWNEIGH, NLM_F.REPLACE, sequence, ndmsg(AF.INET, write.index, 0, use));
      writer.ipv4(NDA.DST, write.address);
      break;
    }
    case "replaceFdb":
    case "deleteFdb": {
      const [type, flags] =
        write.write === "replaceFdb" ? [RTM.NEWNEIGH, NLM_F.CREATE | NLM_F.REPLACE] : [RTM.DELNEIGH, 0];
      writer.begin(type, flags, sequence, ndmsg(AF.BRIDGE, write.index, NUD.PERMANENT, NTF.SELF));
      writer.mac(NDA.LLADDR, write.mac);
      writer.ipv4(NDA.DST, write.dst);
      break;
    }
  }
}

function encodeSetLink(writer: Writer, sequence: number, write: Write & { write: "setLink" }): void {
  const change = write.up === undefined ? 0 : IFF.UP;
  writer.begin(RTM.SETLINK, 0, sequence, ifinfo(write.index, write.up ? IFF.UP : 0, change));
  if (write.mtu !== undefined) writer.attribute32(IFLA.MTU, write.mtu);
  if (write.mac !== undefined) writer.mac(IFLA.ADDRESS, write.mac);
}

function encodePlain(writer: Writer, sequence: number, spec: PlainSpec): void {
  writer.begin(RTM.NEWLINK, NLM_F.CREATE | NLM_F.EXCL, sequence, ifinfo(0));
  writer.text(IFLA.IFNAME, spec.name);
  writer.attribute32(IFLA.MTU, spec.mtu);
  if (spec.mac !== undefined) writer.mac(IFLA.ADDRESS, spec.mac);
  writer.nest(IFLA.LINKINFO, () => writer.text(INFO.KIND, spec.kind));
}

/** Attributes as flanneld's device has them, so that either daemon adopts the device of the other. */
function encodeVxlan(writer: Writer, sequence: number, spec: VxlanSpec): void {
  writer.begin(RTM.NEWLINK, NLM_F.CREATE | NLM_F.EXCL, sequence, ifinfo(0));
  writer.text(IFLA.IFNAME, spec.name);
  writer.attribute32(IFLA.MTU, spec.mtu);
  writer.attribute32(IFLA.TXQLEN, 0);
  if (spec.mac !== undefined) writer.mac(IFLA.ADDRESS, spec.mac);
  writer.nest(IFLA.LINKINFO, () => {
    writer.text(INFO.KIND, "vxlan");
    writer.nest(INFO.DATA, () => {
      writer.attribute32(VXLAN.ID, spec.vni);
      writer.attribute32(VXLAN.LINK, spec.parentIndex);
      writer.ipv4(VXLAN.LOCAL, spec.localIp);
      writer.attribute8(VXLAN.TTL, 0);
      writer.attribute8(VXLAN.TOS, 0);
      writer.attribute8(VXLAN.LEARNING, spec.learning ? 1 : 0);
      writer.attribute8(VXLAN.PROXY, 0);
      writer.attribute8(VXLAN.RSC, 0);
      writer.attribute8(VXLAN.L2MISS, 0);
      writer.attribute8(VXLAN.L3MISS, 0);
      if (spec.gbp) writer.flag(VXLAN.GBP);
      if (spec.port !== 0) writer.attribute16be(VXLAN.PORT, spec.port);
    });
  });
}

function encodeRoute(writer: Writer, sequence: number, route: RouteSpec, remove: boolean): void {
  const { destination, table = RT_TABLE_MAIN } = route;
  // In a deletion 0 and NOWHERE are the wildcards; the route's own values narrow it.
  const protocol = route.protocol ?? (remove ? 0 : RTPROT_BOOT);
  const isDirect = route.gateway === undefined && route.nexthopId === undefined;
  const direct = isDirect ? RT_SCOPE_LINK : RT_SCOPE_UNIVERSE;
  const scope =
    route.scope ?? (remove ? RT_SCOPE_NOWHERE : route.type === RTN_BLACKHOLE ? RT_SCOPE_UNIVERSE : direct);
  const address = networkOf(destination.address, destination.length);
  const [type, flags] = remove ? [RTM.DELROUTE, 0] : [RTM.NEWROUTE, NLM_F.CREATE | NLM_F.REPLACE];
  writer.begin(type, flags, sequence, [
    ...[AF.INET, destination.length, 0, 0],
    ...[table < 256 ? table : 0, protocol, scope, route.type ?? (remove ? 0 : RTN_UNICAST)],
    ...bytes32(route.onlink ? RTNH_F.ONLINK : 0),
  ]);
  writer.ipv4(RTA.DST, address);
  if (table >= 256) writer.attribute32(RTA.TABLE, table);
  if (route.gateway !== undefined) writer.ipv4(RTA.GATEWAY, route.gateway);
  if (route.outIndex !== undefined) writer.attribute32(RTA.OIF, route.outIndex);
  if (route.nexthopId !== undefined) writer.attribute32(RTA.NH_ID, route.nexthopId);
  if (route.metric !== undefined) writer.attribute32(RTA.PRIORITY, route.metric);
  if (route.source !== undefined) writer.ipv4(RTA.PREFSRC, route.source);
  const { mtu } = route;
  if (mtu !== undefined) writer.nest(RTA.METRICS, () => writer.attribute32(RTAX_MTU, mtu));
}

/** Says in words what a write does, for error messages. */
export function describeWrite(write: Write): string {
  switch (write.write) {
    case "createVxlan":
      return `create VXLAN device ${write.name} (VNI ${write.vni}, interface ${write.parentIndex})`;
    case "createPlain":
      return `create device ${write.name} (${write.kind})`;
    case "deleteLink":
      return `delete interface ${write.index}`;
    case "setLink":
      return `change interface ${write.index}`;
    case "addAddress":
    case "deleteAddress": {
      const verb = write.write === "addAddress" ? "add" : "delete";
      return `${verb} address ${formatCidr(write.address)} on interface ${write.index}`;
    }
    case "replaceRoute":
    case "deleteRoute": {
      const verb = write.write === "replaceRoute" ? "write" : "delete";
      const via = write.gateway === undefined ? "" : ` via ${formatIpv4(write.gateway)}`;
      const by = write.nexthopId === undefined ? "" : ` by nexthop ${write.nexthopId}`;
      const on = write.outIndex === undefined ? by : ` on interface ${write.outIndex}`;
      return `${verb} route ${formatCidr(write.destination)}${via}${on}`;
    }
    case "replaceNexthop":
      return `write nexthop ${write.id} via ${formatIpv4(write.gateway)} on interface ${write.outIndex}`;
    case "deleteNexthop":
      return `delete nexthop ${write.id}`;
    case "replaceNeighbour":
      return `write neighbour ${formatIpv4(write.address)} (${write.mac}) on interface ${write.index}`;
    case "deleteNeighbour":
      return `delete neighbour ${formatIpv4(write.address)} on interface ${write.index}`;
    case "dropResolution":
    case "resolveNeighbour":
      return `resolve neighbour ${formatIpv4(write.address)} on interface ${write.index}`;
    case "replaceFdb":
    case "deleteFdb": {
      const verb = write.write === "replaceFdb" ? "write" : "delete";
      return `${verb} FDB entry ${write.mac} to ${formatIpv4(write.dst)} on interface ${write.index}`;
    }
  }
}
