/**
 * The kernel's network tables as plain rows, what may be written to them, and a mirror of them that follows the
 * kernel's own notifications. The mirror is filled by surveys (at start, after lost notifications, at resyncs) and kept
 * by events in between, so that nothing is polled.
 */
import type { Ipv4, Prefix } from "./ipv4.ts";
import type { Mac } from "./model.ts";

/** VXLAN options of a device; undefined fields were not reported. */
export interface VxlanDevice {
  readonly vni: number;
  readonly localIp: Ipv4 | undefined;
  /** Multicast group or default remote; a flannel device has none. */
  readonly group: Ipv4 | undefined;
  /** UDP destination port, host order. */
  readonly dstPort: number;
  /** Interface that carries the tunnel. */
  readonly parentIndex: number | undefined;
  readonly learning: boolean;
  readonly gbp: boolean;
  readonly l2miss: boolean;
  readonly l3miss: boolean;
  /** Set for "external" devices, whose tunnel keys come from metadata. */
  readonly collectMetadata: boolean;
  /** Seconds a learned entry lives. */
  readonly ageing: number;
}

/** One network interface. */
export interface Link {
  readonly index: number;
  readonly name: string;
  /** Driver kind ("veth", "bridge", "vxlan"); undefined for hardware and loopback. */
  readonly kind: string | undefined;
  /** Undefined where the hardware address is not six bytes. */
  readonly mac: Mac | undefined;
  readonly mtu: number;
  /** Administratively up. */
  readonly up: boolean;
  /** Up and with carrier. */
  readonly running: boolean;
  readonly loopback: boolean;
  readonly noarp: boolean;
  /** ARPHRD type: 1 Ethernet, 772 loopback. */
  readonly type: number;
  /** Bridge or bond this is a port of. */
  readonly masterIndex: number | undefined;
  /** Kind of that master ("bridge", "bond"). */
  readonly slaveKind: string | undefined;
  /** A veth's peer, or the interface below this one; counted in the namespace of `linkNetnsId` if that is set. */
  readonly linkIndex: number | undefined;
  /** Set if and only if `linkIndex` is in another network namespace. */
  readonly linkNetnsId: number | undefined;
  /** The interface below this one in this namespace; undefined for pairs such as veth. */
  readonly parentIndex: number | undefined;
  readonly vxlan: VxlanDevice | undefined;
}

/** One IPv4 address of an interface. */
export interface Address {
  readonly index: number;
  readonly address: Ipv4;
  readonly prefixLength: number;
  /** RT_SCOPE: 0 global, 253 link, 254 host. */
  readonly scope: number;
  readonly permanent: boolean;
  readonly deprecated: boolean;
  readonly secondary: boolean;
  readonly label: string | undefined;
}

/** One path of a multipath route. */
export interface Nexthop {
  readonly outIndex: number;
  readonly gateway: Ipv4 | undefined;
  readonly onlink: boolean;
}

/** One IPv4 route. */
export interface Route {
  readonly destination: Prefix;
  readonly gateway: Ipv4 | undefined;
  /** The gateway is an IPv6 address; `gateway` is then undefined though the route is not direct. */
  readonly viaIpv6: boolean;
  readonly outIndex: number | undefined;
  /** 254 is main, 255 local. */
  readonly table: number;
  /** RTPROT: 2 kernel, 3 boot, 4 static. */
  readonly protocol: number;
  /** RT_SCOPE: 0 global, 253 link, 254 host. */
  readonly scope: number;
  /** RTN: 1 unicast, 2 local, 3 broadcast, 6 blackhole. */
  readonly type: number;
  readonly tos: number;
  readonly onlink: boolean;
  /** The kernel does not use it for now: its interface is down or has no carrier. */
  readonly linkDown: boolean;
  readonly metric: number;
  readonly mtu: number | undefined;
  /** Preferred source address. */
  readonly source: Ipv4 | undefined;
  /** The paths of a multipath route; empty for any other. */
  readonly nexthops: readonly Nexthop[];
  /** The nexthop object that it leads by, if it does; gateway and interface are that one's. */
  readonly nexthopId: number | undefined;
}

/** One IPv4 neighbour (ARP) entry. */
export interface Neighbour {
  readonly index: number;
  readonly address: Ipv4;
  readonly mac: Mac | undefined;
  /** NUD bits: 1 incomplete, 2 reachable, 4 stale, 8 delay, 16 probe, 32 failed, 64 noarp, 128 permanent. */
  readonly state: number;
  /** NTF bits: 8 proxy, 16 externally learned, 128 router. */
  readonly flags: number;
  readonly permanent: boolean;
}

/** One forwarding entry of a bridge port or a VXLAN device. */
export interface FdbEntry {
  /** The port or VXLAN device. */
  readonly index: number;
  readonly mac: Mac;
  /** The bridge the entry belongs to; undefined for the device's own table. */
  readonly masterIndex: number | undefined;
  /** VXLAN only: the remote the MAC is behind. */
  readonly dst: Ipv4 | undefined;
  readonly vlan: number | undefined;
  /** NUD bits, see `Neighbour`. */
  readonly state: number;
  readonly permanent: boolean;
  /** The entry is in the device's own table, not in the bridge's. */
  readonly self: boolean;
  readonly master: boolean;
  readonly externLearned: boolean;
}

/** Where filters are: the clsact qdisc of an interface, and what hangs on it. */
export interface FilterPlace {
  readonly index: number;
}

/** A change the kernel reported. A row with change "new" was added or changed. */
export type NetlinkEvent =
  | { readonly kind: "link"; readonly change: Change; readonly row: Link }
  | { readonly kind: "address"; readonly change: Change; readonly row: Address }
  | { readonly kind: "route"; readonly change: Change; readonly row: Route }
  | { readonly kind: "neighbour"; readonly change: Change; readonly row: Neighbour }
  | { readonly kind: "fdb"; readonly change: Change; readonly row: FdbEntry }
  /** Of nexthop objects, only that they went is told. With one go the routes by it, of which the kernel says nothing. */
  | { readonly kind: "nexthop"; readonly change: "delete"; readonly row: { readonly id: number } }
  /** A filter at a clsact hook, or that qdisc itself. There is no mirror of these. */
  | { readonly kind: "filter"; readonly change: Change; readonly row: FilterPlace };

/** A change of the mirror, or of what has none. */
export type HostEvent = Exclude<NetlinkEvent, { readonly kind: "nexthop" }>;

type Change = "new" | "delete";

/** A VXLAN device as flanneld makes it. */
export interface VxlanSpec {
  readonly name: string;
  readonly vni: number;
  readonly parentIndex: number;
  readonly localIp: Ipv4;
  /** UDP destination port; 0 leaves the choice to the kernel (8472). */
  readonly port: number;
  readonly learning: boolean;
  readonly gbp: boolean;
  /** The kernel draws a random one if this is undefined. */
  readonly mac?: Mac | undefined;
  readonly mtu: number;
}

/** A device of a driver without options. */
export interface PlainSpec {
  readonly name: string;
  readonly kind: string;
  readonly mac?: Mac | undefined;
  readonly mtu: number;
}

/** A route to write, or the part of one that names the route to delete (absent fields match any). */
export interface RouteSpec {
  readonly destination: Prefix;
  readonly gateway?: Ipv4 | undefined;
  readonly outIndex?: number | undefined;
  /** The gateway counts as on the link though no address of the interface covers it. */
  readonly onlink?: boolean | undefined;
  /** RTPROT; boot (3) by default, as flanneld writes it. */
  readonly protocol?: number | undefined;
  /** RT_SCOPE; global with a gateway, link (253) without, by default. */
  readonly scope?: number | undefined;
  readonly source?: Ipv4 | undefined;
  readonly mtu?: number | undefined;
  readonly metric?: number | undefined;
  /** RTN; unicast (1) by default. 6 is a blackhole, which has neither gateway nor interface. */
  readonly type?: number | undefined;
  /** 254, main, by default. */
  readonly table?: number | undefined;
  /** It leads by this nexthop object, which has the gateway and the interface. */
  readonly nexthopId?: number | undefined;
}

/** The longest prefix whose own bits leave room for its length. */
const NEXTHOP_LENGTH_MAX = 27;

/**
 * The number of the nexthop object that our route to a destination leads by: its address, and in the bits that are zero
 * there its length, so that no two routes share one. Undefined if there is no room for that.
 */
export function nexthopIdOf({ address, length }: Prefix): number | undefined {
  return length <= NEXTHOP_LENGTH_MAX ? address + length : undefined;
}

/** What `nexthopIdOf` gave that number. */
export function destinationOf(nexthopId: number): Prefix {
  const length = nexthopId % 32;
  return { address: nexthopId - length, length };
}

/** One change to the kernel's tables. */
export type Write =
  | ({ readonly write: "createVxlan" } & VxlanSpec)
  | ({ readonly write: "createPlain" } & PlainSpec)
  | { readonly write: "deleteLink"; readonly index: number }
  | {
      readonly write: "setLink";
      readonly index: number;
      readonly up?: boolean | undefined;
      readonly mtu?: number | undefined;
      readonly mac?: Mac | undefined;
    }
  | { readonly write: "addAddress" | "deleteAddress"; readonly index: number; readonly address: Prefix }
  | ({ readonly write: "replaceRoute" | "deleteRoute" } & RouteSpec)
  /** A gateway on an interface, on which it counts as on the link. `protocol` is that of a route. */
  | {
      readonly write: "replaceNexthop";
      readonly id: number;
      readonly gateway: Ipv4;
      readonly outIndex: number;
      readonly protocol: number;
    }
  /** With it go the routes by it that are left. */
  | { readonly write: "deleteNexthop"; readonly id: number }
  | {
      readonly write: "replaceNeighbour";
      readonly index: number;
      readonly address: Ipv4;
      readonly mac: Mac;
      readonly permanent: boolean;
    }
  | { readonly write: "deleteNeighbour"; readonly index: number; readonly address: Ipv4 }
  /** A neighbour that does not answer is given up, or asked at once, rather than when the kernel's timer is due. */
  | {
      readonly write: "dropResolution" | "resolveNeighbour";
      readonly index: number;
      readonly address: Ipv4;
    }
  | {
      readonly write: "replaceFdb" | "deleteFdb";
      readonly index: number;
      readonly mac: Mac;
      readonly dst: Ipv4;
    };

/** The kernel's answer to "how is this address reached". */
export interface Path {
  readonly outIndex: number;
  /** Undefined if the address is on the interface's own network. */
  readonly gateway: Ipv4 | undefined;
  /** Address that the kernel would send from. */
  readonly source: Ipv4 | undefined;
  /** Bytes of the largest IP packet on the way, as far as the route and the interface tell. */
  readonly mtu: number;
  /** The interface has Ethernet headers, which our programs can send through. */
  readonly ethernet: boolean;
}

const RT_TABLE_MAIN = 254;
const RTN_LOCAL = 2;
const NUD_INCOMPLETE = 0x01;
const NUD_FAILED = 0x20;

/** Whether a neighbour in this state was asked for and has not answered. */
export function isUnanswered(state: number): boolean {
  return (state & (NUD_INCOMPLETE | NUD_FAILED)) !== 0;
}

/** ARPHRD type. */
const ETHERNET = 1;

export function isEthernet({ type }: Link): boolean {
  return type === ETHERNET;
}

/** The tables that are mirrored, and what a row of each is. */
export interface HostRows {
  readonly link: Link;
  readonly address: Address;
  readonly route: Route;
  readonly neighbour: Neighbour;
  readonly fdb: FdbEntry;
}

export type HostTable = keyof HostRows;

// Keys of rows on one interface. There may be one of each for every peer, so what the row has already serves as far as it does.
const addressKey = (row: Address): string => `${row.address}/${row.prefixLength}`;
const routeKey = (row: Pick<Route, "destination" | "table" | "metric" | "tos">): string =>
  `${row.table} ${row.destination.address}/${row.destination.length} ${row.metric} ${row.tos}`;
const neighbourKey = (row: Neighbour): number => row.address;
const fdbKey = ({ mac, masterIndex, vlan }: FdbEntry): string =>
  masterIndex === undefined && vlan === undefined ? mac : `${mac} ${masterIndex ?? 0} ${vlan ?? 0}`;

/** Rows by the interface they are on, so that what concerns one interface costs what is on it. */
class Rows<Row> {
  private readonly byIndex = new Map<number | undefined, Map<string | number, Row>>();
  private readonly keyOf: (row: Row) => string | number;
  private readonly indexOf: (row: Row) => number | undefined;
  private readonly isUnique: boolean;

  /** `unique`: there is one row of a key, and it may move from interface to interface. */
  constructor(
    keyOf: (row: Row) => string | number,
    indexOf: (row: Row) => number | undefined,
    { unique = false } = {},
  ) {
    this.keyOf = keyOf;
    this.indexOf = indexOf;
    this.isUnique = unique;
  }

  *values(): Generator<Row> {
    for (const rows of this.byIndex.values()) yield* rows.values();
  }

  /** The row of a key, where there is one of each. */
  get(key: string | number): Row | undefined {
    for (const rows of this.byIndex.values()) {
      const row = rows.get(key);
      if (row !== undefined) return row;
    }
    return undefined;
  }

  /** The rows on one interface. */
  of(index: number): Iterable<Row> {
    return this.byIndex.get(index)?.values() ?? [];
  }

  set(row: Row): void {
    const key = this.keyOf(row);
    const index = this.indexOf(row);
    if (this.isUnique && this.byIndex.get(index)?.has(key) !== true) this.deleteKey(key);
    const rows = this.byIndex.get(index) ?? new Map<string | number, Row>();
    this.byIndex.set(index, rows.set(key, row));
  }

  delete(row: Row): void {
    const key = this.keyOf(row);
    if (this.isUnique) this.deleteKey(key);
    else this.deleteFrom(this.indexOf(row), key);
  }

  /** The row here that has the key and the interface of another. */
  like(row: Row): Row | undefined {
    return this.byIndex.get(this.indexOf(row))?.get(this.keyOf(row));
  }

  /** Names a row among all of them. */
  nameOf(row: Row): string {
    return this.isUnique ? `${this.keyOf(row)}` : `${this.indexOf(row)} ${this.keyOf(row)}`;
  }

  private deleteKey(key: string | number): void {
    for (const index of this.byIndex.keys()) if (this.deleteFrom(index, key)) return;
  }

  private deleteFrom(index: number | undefined, key: string | number): boolean {
    const rows = this.byIndex.get(index);
    const isGone = rows?.delete(key) === true;
    if (rows?.size === 0) this.byIndex.delete(index);
    return isGone;
  }
}

/** What the kernel has, as far as it told us. */
export class Host {
  readonly links = new Map<number, Link>();
  readonly addresses = new Rows<Address>(addressKey, (row) => row.index);
  readonly routes = new Rows<Route>(routeKey, (row) => row.outIndex, { unique: true });
  readonly neighbours = new Rows<Neighbour>(neighbourKey, (row) => row.index);
  readonly fdb = new Rows<FdbEntry>(fdbKey, (row) => row.index);
  /** The routes of length 0, of any table. */
  readonly defaultRoutes = new Rows<Route>(routeKey, (row) => row.outIndex, { unique: true });

  private readonly surveys = new Set<Survey>();

  /** Begins to compare a table with the kernel's, which is read meanwhile. To be closed. */
  survey(table: HostTable): Survey {
    const survey: Survey = new Survey(table, this.mirrorOf(table), () => this.surveys.delete(survey));
    this.surveys.add(survey);
    return survey;
  }

  private mirrorOf(table: HostTable): Mirror {
    const { links } = this;
    switch (table) {
      case "link":
        return {
          values: () => links.values(),
          like: ({ index }: Link) => links.get(index),
          nameOf: ({ index }: Link) => `${index}`,
        };
      case "address":
        return this.addresses;
      case "route":
        return this.routes;
      case "neighbour":
        return this.neighbours;
      case "fdb":
        return this.fdb;
    }
  }

  /**
   * Follows one notification. Returns all that it means: of what goes with a link that is deleted, of the routes that go
   * with one that is down, and of those that go with a nexthop object of ours, the kernel says nothing itself.
   */
  apply(event: NetlinkEvent): readonly HostEvent[] {
    const events = [...this.meaningOf(event)];
    for (const each of events) this.take(each);
    return events;
  }

  private *meaningOf(event: NetlinkEvent): Generator<HostEvent> {
    if (event.kind === "link") yield* this.implied(event.row, event.change);
    if (event.kind === "nexthop") yield* this.routesBy(event.row.id);
    else yield event;
  }

  private *routesBy(nexthopId: number): Generator<HostEvent> {
    const destination = destinationOf(nexthopId);
    const row = this.routes.get(routeKey({ destination, table: RT_TABLE_MAIN, metric: 0, tos: 0 }));
    if (row?.nexthopId === nexthopId) yield { kind: "route", change: "delete", row };
  }

  /** The link of this name, if there is one. */
  linkNamed(name: string): Link | undefined {
    for (const link of this.links.values()) if (link.name === name) return link;
    return undefined;
  }

  private *implied({ index, up }: Link, change: Change): Generator<HostEvent> {
    if (change === "new" && up) return;
    const isGone = change === "delete";
    for (const row of this.routes.of(index)) {
      // A route to an address of our own stays with the address.
      if (isGone || row.type !== RTN_LOCAL) yield { kind: "route", change: "delete", row };
    }
    if (!isGone) return;
    for (const row of this.addresses.of(index)) yield { kind: "address", change: "delete", row };
    for (const row of this.neighbours.of(index)) yield { kind: "neighbour", change: "delete", row };
    for (const row of this.fdb.of(index)) yield { kind: "fdb", change: "delete", row };
  }

  private take(event: HostEvent): void {
    for (const survey of this.surveys) survey.heard(event);
    switch (event.kind) {
      case "link":
        if (event.change === "new") this.links.set(event.row.index, event.row);
        else this.links.delete(event.row.index);
        return;
      case "address":
        change(this.addresses, event);
        return;
      case "route":
        change(this.routes, event);
        if (isDefault(event.row)) change(this.defaultRoutes, event);
        return;
      case "neighbour":
        change(this.neighbours, event);
        return;
      case "fdb":
        change(this.fdb, event);
        return;
      case "filter":
        return;
    }
  }
}

function isDefault(route: Route): boolean {
  return route.destination.length === 0;
}

function change<Row>(rows: Rows<Row>, event: { readonly change: Change; readonly row: Row }): void {
  if (event.change === "new") rows.set(event.row);
  else rows.delete(event.row);
}

type Row = HostRows[HostTable];

/** As much of `Rows` as a survey needs, of rows of any table. */
interface Mirror {
  values(): Iterable<Row>;
  like(row: Row): Row | undefined;
  nameOf(row: Row): string;
}

/**
 * Compares a table of the mirror with the kernel's, which is read a few rows at a time while notifications go on: what they
 * tell is newer than what is read, and stays. A row is gone if it was come upon in none of two readings, as the kernel may
 * pass over rows when others come or go while it lists them.
 */
export class Survey {
  private readonly table: HostTable;
  private readonly mirror: Mirror;
  private readonly unseen: Set<Row>;
  /** Rows that the mirror has not, or has otherwise. */
  private readonly found = new Map<string, Row>();
  /** What there were notifications of: rows, and interfaces that went down or away. */
  private readonly newer = new Set<string>();
  private readonly down = new Set<number | undefined>();
  readonly close: () => void;

  constructor(table: HostTable, mirror: Mirror, close: () => void) {
    this.table = table;
    this.mirror = mirror;
    this.unseen = new Set(mirror.values());
    this.close = close;
  }

  /** The kernel has this row. */
  saw(row: Row): void {
    const mine = this.mirror.like(row);
    if (mine !== undefined) this.unseen.delete(mine);
    if (mine === undefined || !isEqual(mine, row)) this.found.set(this.mirror.nameOf(row), row);
    // The mirror holds the last of several rows that it can't tell apart.
    else if (this.found.size > 0) this.found.delete(this.mirror.nameOf(row));
  }

  /** There was a notification. */
  heard({ kind, change, row }: HostEvent): void {
    if (kind === "link" && (change === "delete" || !row.up)) this.down.add(row.index);
    if (kind === this.table) this.newer.add(this.mirror.nameOf(row));
  }

  /** Whether each row of the mirror was come upon. */
  get isComplete(): boolean {
    for (const row of this.unseen) if (this.mirror.like(row) !== row) this.unseen.delete(row);
    return this.unseen.size === 0;
  }

  /** The changes that make the mirror as the kernel is, each as of the moment it is taken. */
  *changes(): Generator<HostEvent> {
    for (const [name, row] of this.found) {
      if (!this.newer.has(name) && !this.down.has("outIndex" in row ? row.outIndex : row.index))
        yield { kind: this.table, change: "new", row } as HostEvent;
    }
    for (const row of this.unseen) {
      if (this.mirror.like(row) === row) yield { kind: this.table, change: "delete", row } as HostEvent;
    }
  }
}

function isEqual(a: unknown, b: unknown): boolean {
  if (a === b) return true;
  if (typeof a !== "object" || typeof b !== "object" || a === null || b === null) return false;
  const [left, right] = [a as Record<string, unknown>, b as Record<string, unknown>];
  for (const field in left) if (!isEqual(left[field], right[field])) return false;
  for (const field in right) if (!(field in left)) return false;
  return true;
}
