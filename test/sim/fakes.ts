/**
 * A world in memory for the agent: a clock, an etcd, and hosts with a kernel, BPF maps and programs each.
 *
 * The fakes do what the real parts were seen to do, the unkind things included: routes vanish without a word when
 * their interface goes down, a deleted neighbour is reported without its MAC, a batch of map writes fails half
 * done, a transaction takes place and its answer is lost. Nothing happens by itself: `World.settle` delivers what
 * is under way, `World.pass` lets time go by, and a story can hold either back. All is deterministic.
 */
import { Agent, type AgentOptions, type AgentStatus } from "../../src/agent.ts";
import type { Command } from "../../src/core/command.ts";
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
  Write,
} from "../../src/core/host.ts";
import type { AttachmentRow, EndpointRow, InterfaceRow, PeerRow, SubnetRow } from "../../src/core/image.ts";
import { contains, type Ipv4, networkOf, type Prefix, parseCidr, parseIpv4 } from "../../src/core/ipv4.ts";
import type { ExcludedRow, UplinkRow } from "../../src/core/masquerade.ts";
import type { Mac, StoreEvent } from "../../src/core/model.ts";
import type { World as AgentWorld, Ended } from "../../src/core/world.ts";

/** Texts that were read before: stories say the same few over and over. */
const ADDRESSES = new Map<string, Ipv4>();
const PREFIXES = new Map<string, Prefix>();

/** An address from text. */
export function ip(text: string): Ipv4 {
  const address = ADDRESSES.get(text) ?? parseIpv4(text);
  if (address === undefined) throw new Error(`not an address: ${text}`);
  ADDRESSES.set(text, address);
  return address;
}

/** A block from text. */
export function cidr(text: string): Prefix {
  const prefix = PREFIXES.get(text) ?? parseCidr(text);
  if (prefix === undefined) throw new Error(`not a block: ${text}`);
  PREFIXES.set(text, prefix);
  return prefix;
}

/** Uniform in [0, 1), from a seed. */
export function randomFrom(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Time that passes when told to. */
export class Clock {
  private time = 1_000_000;
  private serial = 0;
  private readonly timers = new Map<number, { at: number; callback: () => void }>();

  now(): number {
    return this.time;
  }

  after(ms: number, callback: () => void): () => void {
    const id = ++this.serial;
    this.timers.set(id, { at: this.time + ms, callback });
    return () => this.timers.delete(id);
  }

  /** When the next timer is due; infinity if there is none. */
  next(): number {
    let at = Number.POSITIVE_INFINITY;
    for (const timer of this.timers.values()) if (timer.at < at) at = timer.at;
    return at;
  }

  /** Runs one timer that is due; false if none is. */
  fire(): boolean {
    let first: [number, { at: number; callback: () => void }] | undefined;
    for (const entry of this.timers) if (first === undefined || entry[1].at < first[1].at) first = entry;
    if (first === undefined || first[1].at > this.time) return false;
    this.timers.delete(first[0]);
    first[1].callback();
    return true;
  }

  moveTo(time: number): void {
    this.time = Math.max(this.time, time);
  }
}

interface StoredKey {
  readonly value: string;
  readonly revision: bigint;
  readonly leaseId: string;
}

/** A write to a subnet's key by a node, as the invariants look at it. */
export interface KeyWrite {
  readonly by: string;
  readonly key: string;
  readonly before: StoredKey | undefined;
  readonly value: string | undefined;
}

/** One etcd for all; keys are relative to the prefix. */
export class FakeEtcd {
  readonly keys = new Map<string, StoredKey>();
  readonly clients = new Set<EtcdClient>();
  revision = 1n;
  /** Told of each write that came through a client. */
  onWrite: (write: KeyWrite) => void = () => undefined;
  private readonly clock: Clock;
  private readonly leases = new Map<string, number>();
  private serial = 1;
  /** Lets its leases age without the nodes' clocks moving, as when a node was suspended. */
  private ahead = 0;

  constructor(clock: Clock) {
    this.clock = clock;
  }

  grant(ttlSeconds: number): string {
    const id = String(++this.serial);
    this.leases.set(id, this.now() + ttlSeconds * 1000);
    return id;
  }

  revoke(leaseId: string): void {
    if (!this.leases.delete(leaseId)) return;
    for (const [key, record] of this.keys) if (record.leaseId === leaseId) this.delete(key);
  }

  put(key: string, value: string, leaseId = "0"): bigint {
    const revision = ++this.revision;
    this.keys.set(key, { value, revision, leaseId });
    this.tell({ kind: "put", key, value, revision, leaseId });
    return revision;
  }

  delete(key: string): void {
    if (!this.keys.delete(key)) return;
    const revision = ++this.revision;
    this.tell({ kind: "delete", key, revision });
  }

  /** Lets what has run out go. */
  expire(): void {
    const now = this.now();
    for (const [id, ends] of this.leases) if (ends <= now) this.revoke(id);
  }

  age(ms: number): void {
    this.ahead += ms;
    this.expire();
  }

  /** The time by which leases age. */
  now(): number {
    return this.clock.now() + this.ahead;
  }

  /** Seconds that a lease has left; undefined if there is no such lease. */
  timeToLive(leaseId: string): number | undefined {
    const ends = this.leases.get(leaseId);
    return ends === undefined ? undefined : Math.floor((ends - this.now()) / 1000);
  }

  /** All data lost: a new store with nothing in it. */
  wipe(): void {
    this.keys.clear();
    this.leases.clear();
    this.revision = 1n;
    this.compact();
  }

  /** What `restore` needs. */
  save(): { keys: [string, StoredKey][]; leases: [string, number][]; revision: bigint } {
    return { keys: [...this.keys], leases: [...this.leases], revision: this.revision };
  }

  /** As of an earlier moment, its revision too. etcd gives restored leases their whole time again; here, the rest. */
  restore(saved: ReturnType<FakeEtcd["save"]>): void {
    this.keys.clear();
    this.leases.clear();
    for (const [key, record] of saved.keys) this.keys.set(key, record);
    for (const [id, ends] of saved.leases) this.leases.set(id, ends);
    this.revision = saved.revision;
    this.expire();
    this.compact();
  }

  /** Every watch has to begin again from a list. */
  compact(): void {
    for (const client of this.clients) if (client.connected) client.snapshot();
  }

  private tell(event: StoreEvent): void {
    for (const client of this.clients) if (client.connected) client.events.push(event);
  }
}

/** How a client's next write to the store goes. */
export type Mishap = "request lost" | "answer lost";

/** One node's connection to etcd. */
export class EtcdClient {
  readonly name: string;
  connected = false;
  /** Told by the watch, not yet by us to the node. */
  readonly events: StoreEvent[] = [];
  /** Leases that the node knows to be its own, since it started. */
  readonly granted = new Set<string>();
  /** Requests on their way. */
  readonly requests: (() => void)[] = [];
  readonly mishaps: Mishap[] = [];
  /** How often the node asked for connections to be made anew. */
  reconnects = 0;
  private readonly etcd: FakeEtcd;

  constructor(name: string, etcd: FakeEtcd) {
    this.name = name;
    this.etcd = etcd;
    etcd.clients.add(this);
  }

  connect(): void {
    if (this.connected) return;
    this.connected = true;
    this.snapshot();
  }

  /** The connection is lost, and with it all but the first `arrived` of what was on its way. */
  disconnect(arrived = 0): void {
    this.connected = false;
    this.events.splice(arrived);
  }

  /** The watch begins again from a list; what was on its way came before. */
  snapshot(): void {
    this.events.push({ kind: "reset" });
    for (const key of [...this.etcd.keys.keys()].sort()) {
      const record = this.etcd.keys.get(key);
      if (record !== undefined) this.events.push({ kind: "put", key, ...record });
    }
    this.events.push({ kind: "synced", revision: this.etcd.revision });
  }

  readonly port: AgentWorld["store"] = {
    list: (prefix) =>
      this.ask(() => ({
        records: [...this.etcd.keys]
          .filter(([key]) => key.startsWith(prefix))
          .map(([key, record]) => ({ key, ...record }))
          .sort((a, b) => (a.key < b.key ? -1 : 1)),
      })),
    create: (key, value, ttlSeconds) =>
      this.write(() => {
        const before = this.etcd.keys.get(key);
        if (before !== undefined) return { created: false as const };
        return { created: true as const, ...this.put(key, value, before, this.etcd.grant(ttlSeconds)) };
      }),
    renew: (key, value, term) =>
      this.write(() => {
        const before = this.etcd.keys.get(key);
        if (before?.revision !== term.expectRevision) return { renewed: false as const };
        const leaseId = "ttlSeconds" in term ? this.etcd.grant(term.ttlSeconds) : "0";
        const done = this.put(key, value, before, leaseId);
        if (before.leaseId !== "0") this.etcd.revoke(before.leaseId);
        return { renewed: true as const, ...done };
      }),
    reconnect: () => {
      this.reconnects += 1;
    },
    timeToLive: (leaseId) => this.ask(() => this.etcd.timeToLive(leaseId)),
    remove: (key, expectRevision) =>
      this.write(() => {
        const before = this.etcd.keys.get(key);
        if (before?.revision !== expectRevision) return { removed: false };
        this.etcd.onWrite({ by: this.name, key, before, value: undefined });
        this.etcd.delete(key);
        return { removed: true };
      }),
  };

  private put(key: string, value: string, before: StoredKey | undefined, leaseId: string) {
    this.etcd.onWrite({ by: this.name, key, before, value });
    return { revision: this.etcd.put(key, value, leaseId), leaseId };
  }

  private write<Answer extends object>(run: () => Answer): Promise<Answer> {
    return this.ask(() => {
      const mishap = this.mishaps.shift();
      if (mishap === "request lost") throw new Error("etcd gave no answer");
      const answer = run();
      if (mishap === "answer lost") throw new Error("it is not known whether etcd wrote it");
      if ("leaseId" in answer) this.granted.add(String(answer.leaseId));
      return answer;
    });
  }

  private ask<Answer>(run: () => Answer): Promise<Answer> {
    return new Promise((resolve, reject) => {
      this.requests.push(() => {
        try {
          if (!this.connected) throw new Error("etcd cannot be reached");
          resolve(run());
        } catch (error) {
          reject(error);
        }
      });
    });
  }
}

const MAIN = 254;
/** Rows that a reader of a table gets at a time. */
const ROWS_LISTED = 3;
const GONE: ReadonlySet<string> = new Set(["ENODEV", "ENOENT", "ESRCH", "EADDRNOTAVAIL"]);

/** Who changed the kernel last; the world's own changes count as nobody's. */
export type Refuse = (write: Write) => string | undefined;

/** One host's links, addresses, routes, neighbours and FDB. */
export class FakeKernel {
  readonly links = new Map<number, Link>();
  readonly addresses = new Map<string, Address>();
  readonly routes = new Map<string, Route>();
  readonly nexthops = new Map<number, { readonly gateway: Ipv4; readonly outIndex: number }>();
  /** As with net.ipv4.nexthop_compat_mode: what is behind a nexthop is shown with the routes by it. */
  showsNexthops = true;
  readonly neighbours = new Map<string, Neighbour>();
  readonly fdb = new Map<string, FdbEntry>();
  /** Notifications on their way. */
  readonly events: NetlinkEvent[] = [];
  /** Every write asked for since the story last looked, with the error's name of those refused. */
  readonly writes: { readonly write: Write; readonly error: string | undefined }[] = [];
  /** Interfaces whose silent neighbours were asked again. */
  readonly resolved: number[] = [];
  /** Devices whose sysctls are as they ought to be. */
  readonly quietened = new Set<string>();
  /** Names the error with which a write is refused. */
  refuse: Refuse = () => undefined;
  /** Told of each write before it takes place, once it is known to take place. */
  onWrite: (write: Write) => void = () => undefined;
  /** Told of a link that goes for good. */
  onLinkGone: (index: number) => void = () => undefined;
  unreadable = false;
  /** How often all tables were read, from the first on. */
  surveys = 0;
  /** What happens in the midst of the next reading of a table, behind its reader's back. */
  readonly amid: (() => void)[] = [];
  lookups = 0;
  private nextIndex = 10;
  private nextMac = 1;

  readonly port: AgentWorld["kernel"] = {
    read: (table) => this.read(table),
    routesTo: (addresses) => addresses.map((address) => this.routeTo(address)),
    apply: (writes) => writes.map((write) => this.take(write)),
    resolveNeighbours: (index) => this.resolved.push(index),
    keepSysctls: (device) => {
      const isNew = device !== undefined && !this.quietened.has(device);
      if (isNew) this.quietened.add(device);
      return isNew ? 1 : 0;
    },
    showsNexthops: () => this.showsNexthops,
  };

  /**
   * Some rows at a time, those that come next already listed when some are handed out. Who lists by position passes over
   * a row when one before it goes.
   */
  *read<Name extends HostTable>(name: Name): Generator<readonly HostRows[Name][]> {
    if (this.unreadable) throw new Error(`cannot list ${name}: ENOBUFS`);
    if (name === "link") this.surveys += 1;
    const tables: { readonly [Each in HostTable]: ReadonlyMap<unknown, HostRows[Each]> } = {
      link: this.links,
      address: this.addresses,
      route: this.routes,
      neighbour: this.neighbours,
      fdb: this.fdb,
    };
    const table: ReadonlyMap<unknown, HostRows[Name]> = tables[name];
    const list = (from: number): HostRows[Name][] => [...table.values()].slice(from, from + ROWS_LISTED);
    let at = 0;
    for (let rows = list(at); rows.length > 0; ) {
      at += rows.length;
      const ahead = list(at);
      this.amid.shift()?.();
      yield rows;
      if (this.unreadable) throw new Error(`cannot list ${name}: ENOBUFS`);
      rows = ahead;
    }
  }

  linkNamed(name: string): Link {
    for (const link of this.links.values()) if (link.name === name) return link;
    throw new Error(`there is no ${name}`);
  }

  hasLink(name: string): boolean {
    for (const link of this.links.values()) if (link.name === name) return true;
    return false;
  }

  addLink(name: string, more: Partial<Link> = {}): number {
    const index = more.index ?? this.nextIndex++;
    const link: Link = {
      index,
      name,
      kind: undefined,
      mac: this.freshMac(),
      mtu: 1500,
      up: true,
      running: true,
      loopback: false,
      noarp: false,
      type: 1,
      masterIndex: undefined,
      slaveKind: undefined,
      linkIndex: undefined,
      linkNetnsId: undefined,
      parentIndex: undefined,
      vxlan: undefined,
      ...more,
    };
    this.links.set(index, link);
    this.events.push({ kind: "link", change: "new", row: link });
    return index;
  }

  deleteLink(index: number): void {
    const link = this.links.get(index);
    if (link === undefined) throw new Errno("ENODEV");
    this.links.delete(index);
    for (const [key, row] of this.addresses) if (row.index === index) this.addresses.delete(key);
    for (const [key, row] of this.routes) if (row.outIndex === index) this.routes.delete(key);
    this.dropNexthops(index);
    for (const [key, row] of this.neighbours) if (row.index === index) this.neighbours.delete(key);
    for (const [key, row] of this.fdb) if (row.index === index) this.fdb.delete(key);
    this.onLinkGone(index);
    this.events.push({ kind: "link", change: "delete", row: link });
    for (const other of [...this.links.values()]) {
      // A VXLAN device goes with the interface below it, a bridge's ports are set free.
      if (other.parentIndex === index) this.deleteLink(other.index);
      else if (other.masterIndex === index) this.changeLink(other.index, { masterIndex: undefined });
    }
  }

  setLink(
    index: number,
    change: { up?: boolean | undefined; mtu?: number | undefined; mac?: Mac | undefined },
  ): void {
    const before = this.links.get(index);
    if (before === undefined) throw new Errno("ENODEV");
    const up = change.up ?? before.up;
    const after = {
      ...before,
      up,
      running: up,
      mtu: change.mtu ?? before.mtu,
      mac: change.mac ?? before.mac,
    };
    const same = after.up === before.up && after.mtu === before.mtu && after.mac === before.mac;
    if (same) return;
    this.changeLink(index, after);
    if (after.mac !== before.mac || (before.up && !up)) {
      for (const row of [...this.neighbours.values()]) if (row.index === index) this.dropNeighbour(row);
    }
    if (before.up && !up) {
      for (const [key, row] of this.routes)
        if (row.outIndex === index && row.type !== 2) this.routes.delete(key);
      this.dropNexthops(index);
    }
    if (!before.up && up) {
      for (const row of this.addresses.values()) if (row.index === index) this.connect(row);
    }
  }

  changeLink(index: number, change: Partial<Link>): void {
    const before = this.links.get(index);
    if (before === undefined) throw new Errno("ENODEV");
    const row = { ...before, ...change };
    this.links.set(index, row);
    this.events.push({ kind: "link", change: "new", row });
  }

  addAddress(index: number, address: Prefix): void {
    if (!this.links.has(index)) throw new Errno("ENODEV");
    const key = `${index} ${address.address}/${address.length}`;
    if (this.addresses.has(key)) throw new Errno("EEXIST");
    const row: Address = {
      index,
      address: address.address,
      prefixLength: address.length,
      scope: 0,
      permanent: true,
      deprecated: false,
      secondary: false,
      label: undefined,
    };
    this.addresses.set(key, row);
    this.events.push({ kind: "address", change: "new", row });
    this.connect(row);
  }

  deleteAddress(index: number, address: Prefix): void {
    const key = `${index} ${address.address}/${address.length}`;
    const row = this.addresses.get(key);
    if (row === undefined) throw new Errno("EADDRNOTAVAIL");
    this.addresses.delete(key);
    this.events.push({ kind: "address", change: "delete", row });
    const destination = { address: networkOf(address.address, address.length), length: address.length };
    const route = this.routes.get(keyOfRoute({ destination }));
    if (route?.outIndex === index && route.protocol === 2) this.dropRoute(route);
  }

  replaceNexthop(id: number, nexthop: { readonly gateway: Ipv4; readonly outIndex: number }): void {
    this.needUp(nexthop.outIndex);
    const { gateway, outIndex } = nexthop;
    this.nexthops.set(id, { gateway, outIndex });
    for (const [key, row] of this.routes)
      if (row.nexthopId === id) this.routes.set(key, { ...row, gateway, outIndex });
  }

  /** The routes by it go without a word. */
  deleteNexthop(id: number): void {
    if (!this.nexthops.delete(id)) throw new Errno("ENOENT");
    for (const [key, row] of this.routes) if (row.nexthopId === id) this.routes.delete(key);
    this.events.push({ kind: "nexthop", change: "delete", row: { id } });
  }

  private dropNexthops(outIndex: number): void {
    for (const [id, nexthop] of [...this.nexthops]) if (nexthop.outIndex === outIndex) this.deleteNexthop(id);
  }

  private needUp(index: number): void {
    const link = this.links.get(index);
    if (link === undefined) throw new Errno("ENODEV");
    if (!link.up) throw new Errno("ENETDOWN");
  }

  replaceRoute(spec: RouteSpec): void {
    const { nexthopId } = spec;
    const nexthop = nexthopId === undefined ? undefined : this.nexthops.get(nexthopId);
    if (nexthopId !== undefined && nexthop === undefined) throw new Errno("EINVAL");
    const { outIndex, gateway } = nexthop ?? spec;
    if (nexthop === undefined && outIndex !== undefined) {
      this.needUp(outIndex);
      if (gateway !== undefined && spec.onlink !== true && !this.isOnLink(outIndex, gateway)) {
        throw new Errno("ENETUNREACH");
      }
    }
    const row: Route = {
      destination: spec.destination,
      gateway,
      viaIpv6: false,
      outIndex,
      table: spec.table ?? MAIN,
      protocol: spec.protocol ?? 3,
      scope: spec.scope ?? (gateway === undefined ? 253 : 0),
      type: spec.type ?? 1,
      tos: 0,
      onlink: nexthop !== undefined || (spec.onlink ?? false),
      linkDown: false,
      metric: spec.metric ?? 0,
      mtu: spec.mtu,
      source: spec.source,
      nexthops: [],
      nexthopId,
    };
    this.routes.set(keyOfRoute(row), row);
    this.events.push({ kind: "route", change: "new", row });
  }

  deleteRoute(spec: RouteSpec): void {
    const row = this.routes.get(keyOfRoute(spec));
    const { nexthopId } = spec;
    const fits =
      row !== undefined &&
      // Of one by a nexthop object, the kernel takes that one's number alone for its name.
      (nexthopId !== undefined || spec.gateway !== undefined || spec.outIndex !== undefined
        ? row.nexthopId === nexthopId
        : true) &&
      (spec.gateway === undefined || spec.gateway === row.gateway) &&
      (spec.outIndex === undefined || spec.outIndex === row.outIndex);
    if (!fits) throw new Errno("ESRCH");
    this.dropRoute(row);
  }

  replaceNeighbour(spec: { index: number; address: Ipv4; mac: Mac; permanent: boolean }): void {
    if (!this.links.has(spec.index)) throw new Errno("ENODEV");
    const row: Neighbour = { ...spec, state: spec.permanent ? 128 : 2, flags: 0 };
    const before = this.neighbours.get(`${spec.index} ${spec.address}`);
    this.neighbours.set(`${spec.index} ${spec.address}`, row);
    if (before !== undefined && before.mac === row.mac && before.state === row.state) return;
    this.events.push({ kind: "neighbour", change: "new", row });
  }

  deleteNeighbour(index: number, address: Ipv4): void {
    if (!this.links.has(index)) throw new Errno("ENODEV");
    const row = this.neighbours.get(`${index} ${address}`);
    if (row === undefined) throw new Errno("ENOENT");
    this.dropNeighbour(row);
  }

  replaceFdb(spec: {
    index: number;
    mac: Mac;
    dst?: Ipv4 | undefined;
    masterIndex?: number | undefined;
  }): void {
    if (!this.links.has(spec.index)) throw new Errno("ENODEV");
    const isTunnel = spec.dst !== undefined;
    const row: FdbEntry = {
      index: spec.index,
      mac: spec.mac,
      masterIndex: spec.masterIndex,
      dst: spec.dst,
      vlan: undefined,
      state: isTunnel ? 128 : 2,
      permanent: isTunnel,
      self: isTunnel,
      master: !isTunnel,
      externLearned: false,
    };
    const key = keyOfFdb(row);
    const before = this.fdb.get(key);
    this.fdb.set(key, row);
    if (before !== undefined && before.dst === row.dst) return;
    this.events.push({ kind: "fdb", change: "new", row });
  }

  deleteFdb(spec: { index: number; mac: Mac; dst?: Ipv4; masterIndex?: number | undefined }): void {
    if (!this.links.has(spec.index)) throw new Errno("ENODEV");
    const key = keyOfFdb(spec);
    const row = this.fdb.get(key);
    if (row === undefined) throw new Errno("ENOENT");
    // Behind another remote: the kernel reports success and does nothing.
    if (spec.dst !== undefined && row.dst !== spec.dst) return;
    this.fdb.delete(key);
    this.events.push({ kind: "fdb", change: "delete", row });
  }

  routeTo(address: Ipv4): ReturnType<AgentWorld["kernel"]["routesTo"]>[number] {
    this.lookups += 1;
    if (this.unreadable) throw new Error("cannot look up the route: ENOBUFS");
    for (const row of this.addresses.values()) if (row.address === address) return undefined;
    for (let length = 32; length >= 0; length--) {
      const route = this.routes.get(
        keyOfRoute({ destination: { address: networkOf(address, length), length } }),
      );
      if (route?.outIndex === undefined) continue;
      if (this.links.get(route.outIndex)?.up !== true) continue;
      const { outIndex, gateway, source, mtu } = route;
      return { outIndex, gateway, source, mtu };
    }
    return undefined;
  }

  private take(write: Write): Error | undefined {
    const refused = this.refuse(write);
    let error = refused;
    if (error === undefined) {
      this.onWrite(write);
      try {
        this.run(write);
      } catch (thrown) {
        if (!(thrown instanceof Errno)) throw thrown;
        if (!write.write.startsWith("delete") || !GONE.has(thrown.message)) error = thrown.message;
      }
    }
    this.writes.push({ write, error });
    return error === undefined ? undefined : new Error(`cannot ${write.write}: ${error}`);
  }

  private run(write: Write): void {
    switch (write.write) {
      case "createVxlan": {
        if (this.hasLink(write.name)) throw new Errno("EEXIST");
        if (!this.links.has(write.parentIndex)) throw new Errno("ENODEV");
        for (const { vxlan } of this.links.values()) {
          if (vxlan?.vni === write.vni && vxlan.dstPort === write.port) throw new Errno("EEXIST");
        }
        this.addVxlan(write);
        return;
      }
      case "createPlain":
        if (this.hasLink(write.name)) throw new Errno("EEXIST");
        this.addLink(write.name, { kind: write.kind, mac: write.mac ?? this.freshMac(), mtu: write.mtu });
        return;
      case "replaceNexthop":
        this.replaceNexthop(write.id, write);
        return;
      case "deleteNexthop":
        this.deleteNexthop(write.id);
        return;
      case "deleteLink":
        this.deleteLink(write.index);
        return;
      case "setLink":
        this.setLink(write.index, write);
        return;
      case "addAddress":
        this.addAddress(write.index, write.address);
        return;
      case "deleteAddress":
        this.deleteAddress(write.index, write.address);
        return;
      case "replaceRoute":
        this.replaceRoute(write);
        return;
      case "deleteRoute":
        this.deleteRoute(write);
        return;
      case "replaceNeighbour":
        this.replaceNeighbour(write);
        return;
      case "deleteNeighbour":
        this.deleteNeighbour(write.index, write.address);
        return;
      case "dropResolution":
      case "resolveNeighbour":
        return;
      case "replaceFdb":
        this.replaceFdb(write);
        return;
      case "deleteFdb":
        this.deleteFdb(write);
        return;
    }
  }

  addVxlan(spec: Extract<Write, { write: "createVxlan" }>, up = false): number {
    return this.addLink(spec.name, {
      kind: "vxlan",
      mac: spec.mac ?? this.freshMac(),
      mtu: spec.mtu,
      up,
      running: up,
      parentIndex: spec.parentIndex,
      vxlan: {
        vni: spec.vni,
        localIp: spec.localIp,
        group: undefined,
        dstPort: spec.port,
        parentIndex: spec.parentIndex,
        learning: spec.learning,
        gbp: spec.gbp,
        l2miss: false,
        l3miss: false,
        collectMetadata: false,
        ageing: 300,
      },
    });
  }

  /** The route to an address's own network comes with it, while the interface is up. */
  private connect(row: Address): void {
    if (row.prefixLength === 32 || this.links.get(row.index)?.up !== true) return;
    this.replaceRoute({
      destination: { address: networkOf(row.address, row.prefixLength), length: row.prefixLength },
      outIndex: row.index,
      protocol: 2,
      source: row.address,
    });
  }

  private isOnLink(outIndex: number, gateway: Ipv4): boolean {
    for (let length = 32; length > 0; length--) {
      const route = this.routes.get(
        keyOfRoute({ destination: { address: networkOf(gateway, length), length } }),
      );
      if (route !== undefined) return route.outIndex === outIndex && route.gateway === undefined;
    }
    return false;
  }

  private dropRoute(row: Route): void {
    this.routes.delete(keyOfRoute(row));
    this.events.push({ kind: "route", change: "delete", row });
  }

  /** As the kernel does it: first a failed entry without a MAC, then that it is gone. */
  private dropNeighbour(row: Neighbour): void {
    this.neighbours.delete(`${row.index} ${row.address}`);
    const failed: Neighbour = { ...row, mac: undefined, state: 32, permanent: false };
    this.events.push({ kind: "neighbour", change: "new", row: failed });
    this.events.push({ kind: "neighbour", change: "delete", row: failed });
  }

  private freshMac(): Mac {
    const n = this.nextMac++;
    return `02:00:00:00:${(n >> 8).toString(16).padStart(2, "0")}:${(n & 255).toString(16).padStart(2, "0")}`;
  }
}

class Errno extends Error {}

export const keyOfRoute = (row: {
  destination: Prefix;
  table?: number | undefined;
  metric?: number | undefined;
}): string => `${row.table ?? MAIN} ${row.destination.address}/${row.destination.length} ${row.metric ?? 0}`;
const keyOfFdb = (row: { index: number; mac: Mac; masterIndex?: number | undefined }): string =>
  `${row.index} ${row.mac} ${row.masterIndex ?? 0}`;

interface MapRows {
  readonly subnets4: SubnetRow;
  readonly peers4: PeerRow;
  readonly endpoints4: EndpointRow;
  readonly interfaces: InterfaceRow;
  readonly uplinks4: UplinkRow;
  readonly excluded4: ExcludedRow;
}
type MapName = keyof MapRows;

const KEYS: { readonly [Name in MapName]: (row: MapRows[Name]) => string } = {
  subnets4: (row) => cidrText({ address: row.subnet, length: row.prefixLength }),
  peers4: (row) => ipText(row.publicIp),
  endpoints4: (row) => ipText(row.address),
  interfaces: (row) => `${row.ifindex}`,
  uplinks4: (row) => `${row.ifindex}`,
  excluded4: (row) => cidrText(row),
};

/** The key of a row of any map; maps that stories don't look into have the row itself for a key. */
function keyOfRow(map: string, row: unknown): string {
  const keyOf = (KEYS as Record<string, ((row: never) => string) | undefined>)[map];
  return keyOf === undefined ? JSON.stringify(row) : keyOf(row as never);
}

/** An address as text. */
export function ipText(address: Ipv4): string {
  return `${address >>> 24}.${(address >>> 16) & 255}.${(address >>> 8) & 255}.${address & 255}`;
}

/** A block as text. */
export function cidrText(prefix: Prefix): string {
  return `${ipText(prefix.address)}/${prefix.length}`;
}

/** What may fail of the dataplane. */
export type DataplaneCall =
  | "load"
  | "activate"
  | "rows"
  | "put"
  | "remove"
  | "attachments"
  | "attach"
  | "detach";

/** What is pinned, and so outlives the agent: maps and attached programs. `open` is what each agent has. */
export class FakeDataplane {
  readonly maps: { readonly [Name in MapName]: Map<string, MapRows[Name]> } = {
    subnets4: new Map(),
    peers4: new Map(),
    endpoints4: new Map(),
    interfaces: new Map(),
    uplinks4: new Map(),
    excluded4: new Map(),
  };
  private readonly otherMaps = new Map<string, Map<string, unknown>>();
  /** Attached programs, each with the config it was loaded with. */
  readonly attached = new Map<string, { readonly row: AttachmentRow; config: string }>();
  /** The config of the programs last put in place. */
  active = "";
  /** Rows written and removed, by map, since the story last looked. */
  readonly writes: { readonly map: string; readonly key: string; readonly gone: boolean }[] = [];
  refuse: (call: DataplaneCall) => boolean = () => false;
  /** Programs that are being loaded: what ends that. */
  readonly loads: (() => void)[] = [];
  onWrite: (map: string, key: string, gone: boolean) => void = () => undefined;
  onRead: (map: string) => void = () => undefined;
  private readonly kernel: FakeKernel;

  constructor(kernel: FakeKernel) {
    this.kernel = kernel;
    kernel.onLinkGone = (index) => {
      for (const [key, { row }] of this.attached) if (row.ifindex === index) this.attached.delete(key);
    };
  }

  // biome-ignore lint/suspicious/noExplicitAny: what the agent puts under a name is what it gets back
  private mapOf(name: string): Map<string, any> {
    const known = (this.maps as Record<string, Map<string, unknown> | undefined>)[name];
    const map = known ?? this.otherMaps.get(name) ?? new Map<string, unknown>();
    if (known === undefined) this.otherMaps.set(name, map);
    return map;
  }

  private *read<Name extends MapName>(
    name: Name,
    check: () => void,
  ): Generator<readonly (readonly [string, MapRows[Name]])[], boolean> {
    check();
    this.onRead(name);
    let rows: [string, MapRows[Name]][] = [];
    for (const row of this.mapOf(name)) {
      if (rows.push(row) < ROWS_LISTED) continue;
      yield rows;
      this.kernel.amid.shift()?.();
      check();
      rows = [];
    }
    if (rows.length > 0) yield rows;
    return true;
  }

  open(): AgentWorld["dataplane"] {
    let loaded: string | undefined;
    const check = (call: DataplaneCall): void => {
      if (this.refuse(call)) throw new Error(`bpf: ${call} failed: ENOMEM`);
      if (call !== "load" && call !== "attachments" && loaded === undefined) {
        throw new Error("No programs are loaded yet.");
      }
    };
    /** Half of a batch that fails has been done. */
    const batch = (call: "put" | "remove", rows: number): number => {
      if (loaded === undefined) throw new Error("No programs are loaded yet.");
      return this.refuse(call) ? rows >> 1 : rows;
    };
    return {
      load: (config) =>
        new Promise((resolve, reject) => {
          this.loads.push(() => {
            try {
              check("load");
              loaded = JSON.stringify(config);
              resolve();
            } catch (error) {
              reject(error);
            }
          });
        }),
      activate: () => {
        check("activate");
        this.active = loaded ?? "";
        for (const attached of this.attached.values()) attached.config = this.active;
      },
      read: (name) => this.read(name, () => check("rows")),
      put: (name, rows) => {
        const done = batch("put", rows.length);
        for (const row of rows.slice(0, done)) {
          const key = keyOfRow(name, row);
          this.onWrite(name, key, false);
          this.writes.push({ map: name, key, gone: false });
          this.mapOf(name).set(key, row);
        }
        if (done < rows.length) throw new Error(`map ${name}: ENOMEM`);
      },
      remove: (name, rows) => {
        const done = batch("remove", rows.length);
        for (const row of rows.slice(0, done)) {
          const key = keyOfRow(name, row);
          this.onWrite(name, key, true);
          this.writes.push({ map: name, key, gone: true });
          this.mapOf(name).delete(key);
        }
        if (done < rows.length) throw new Error(`map ${name}: ENOMEM`);
      },
      attachments: () => {
        check("attachments");
        return new Map([...this.attached].map(([key, { row }]) => [key, row]));
      },
      isAttached: ({ hook, ifindex }) => {
        check("attachments");
        return this.attached.has(`${hook}-${ifindex}`);
      },
      attach: (row) => {
        check("attach");
        if (!this.kernel.links.has(row.ifindex)) throw new Error("attach: ENODEV");
        const key = `${row.hook}-${row.ifindex}`;
        this.onWrite("programs", key, false);
        this.attached.set(key, { row, config: loaded ?? "" });
      },
      detach: (row) => {
        check("detach");
        this.onWrite("programs", `${row.hook}-${row.ifindex}`, true);
        this.attached.delete(`${row.hook}-${row.ifindex}`);
      },
      detachOtherMode: () => undefined,
      keepPins: () => 0,
    };
  }
}

/** A node: a host, its connection to etcd, and an agent that may be running. */
export class Node {
  readonly name: string;
  readonly kernel = new FakeKernel();
  readonly dataplane = new FakeDataplane(this.kernel);
  readonly client: EtcdClient;
  agent: Agent | undefined;
  /** subnet.env, and what is in the way of writing it. */
  file = "";
  diskFull = false;
  readonly logged: { readonly level: string; readonly fields: object; readonly message: string }[] = [];
  readonly repaired: string[] = [];
  readonly failed: string[] = [];
  /** What became of its lease, over all its agents. */
  readonly leaseEvents: string[] = [];
  /** Rounds that the agents of this node ran. */
  rounds = 0;
  isReady = false;
  ended: Error | undefined;
  /** Why another daemon of the host stands in the way. */
  objection: string | undefined;
  /** Commands that were run, in order, and what each comes to; undefined while it goes on. */
  readonly commands: Command[] = [];
  /** What is kept of the peers for which commands were run. */
  readonly added = new Map<string, string>();
  endOf: (command: Command) => Partial<Ended> | undefined = () => ({});
  /** Commands that are running. */
  readonly running: (() => void)[] = [];
  readonly held: (() => void)[] = [];
  /** Without it, no peer is probed. */
  openProber: AgentWorld["openProber"];
  /** Notifications, or news of the store, that don't arrive for now. */
  holdNetlink = false;
  holdStore = false;
  readonly options: AgentOptions;
  private readonly world: World;

  constructor(world: World, number: number, options: Partial<AgentOptions>) {
    this.world = world;
    this.name = `n${number}`;
    this.client = new EtcdClient(this.name, world.etcd);
    const { kernel } = this;
    kernel.addLink("lo", { index: 1, loopback: true, type: 772, mac: undefined, mtu: 65536 });
    kernel.addLink("eth0", { index: 2 });
    kernel.addAddress(1, cidr("127.0.0.1/8"));
    kernel.addAddress(2, { address: ip("192.168.0.0") + number, length: 24 });
    kernel.replaceRoute({
      destination: cidr("0.0.0.0/0"),
      gateway: ip("192.168.0.254"),
      outIndex: 2,
      protocol: 4,
    });
    kernel.events.length = 0;
    this.options = {
      wish: { interfaces: [], interfacePatterns: [], interfaceCanReach: undefined, publicIp: undefined },
      renewMarginMs: 3_600_000,
      previous: undefined,
      fastPath: "FAST_PATH_AUTO",
      ipMasq: false,
      blackholeRoute: false,
      resyncMs: 10_000,
      sourcePorts: { min: 32768, max: 60999 },
      ttl: 64,
      ...options,
    };
  }

  /** Starts an agent on what the last one left. */
  start(): void {
    const { kernel, world } = this;
    const log = (level: string) => (fields: object, message: string) => {
      this.logged.push({ level, fields, message });
    };
    const subnet = /FLANNEL_SUBNET=(.*)/.exec(this.file)?.[1];
    const previous = subnet === undefined ? this.options.previous : cidr(subnet);
    this.client.events.length = 0;
    this.client.requests.length = 0;
    this.client.granted.clear();
    kernel.events.length = 0;
    this.isReady = false;
    const agent: Agent = new Agent(
      {
        ...this.options,
        previous: previous && {
          address: networkOf(previous.address, previous.length),
          length: previous.length,
        },
      },
      {
        kernel: kernel.port,
        dataplane: this.dataplane.open(),
        store: this.client.port,
        clock: {
          now: () => world.clock.now(),
          // A host that sleeps wakes up with its clocks stopped, all but this one.
          uptime: () => world.etcd.now(),
          after: (ms, callback) => world.clock.after(ms, callback),
        },
        random: world.random,
        writeSubnetFile: (text) => {
          if (this.diskFull) throw new Error("ENOSPC: no space left on device");
          this.file = text;
        },
        log: { debug: log("debug"), info: log("info"), warn: log("warn"), error: log("error") },
        observer: {
          reconciled: () => {
            this.rounds += 1;
          },
          repaired: (table) => this.repaired.push(table),
          failed: (table) => this.failed.push(table),
          lease: (what) => this.leaseEvents.push(what),
          changed: () => undefined,
          ready: () => {
            this.isReady = true;
          },
        },
        claim: () => this.objection,
        runner: {
          environment: { HOME: "/root" },
          run: (command) => {
            this.commands.push(command);
            const ended = new Promise<Ended>((resolve) => {
              const tryToEnd = (): void => {
                const end = this.endOf(command);
                if (end === undefined) this.held.push(tryToEnd);
                else resolve({ stdout: "", stderr: "", problem: undefined, ...end });
              };
              this.running.push(tryToEnd);
            });
            return { ended, stop: () => undefined };
          },
        },
        added: {
          all: () => this.added,
          put: (key, text) => this.added.set(key, text),
          remove: (key) => this.added.delete(key),
        },
        ...(this.openProber === undefined ? {} : { openProber: this.openProber }),
      },
      (error) => {
        this.ended = error;
        this.agent = undefined;
      },
    );
    this.agent = agent;
    agent.start();
    this.client.connected = false;
    this.client.connect();
  }

  /** The agent is gone, at once; its host stays as it is. */
  kill(): void {
    this.agent?.stop();
    this.agent = undefined;
    this.client.disconnect();
    this.client.requests.length = 0;
  }

  status(): AgentStatus {
    if (this.agent === undefined) throw new Error(`no agent runs on ${this.name}: ${this.ended?.message}`);
    return this.agent.status();
  }

  /** Lost notifications: whatever was on its way does not arrive, and the agent is told so. */
  overrun(): void {
    this.kernel.events.length = 0;
    this.agent?.onOverrun();
  }

  /** Delivers what is under way; whether there was anything. */
  deliver(): boolean {
    const { agent, client, kernel } = this;
    let any = false;
    if (!this.holdNetlink && kernel.events.length > 0) {
      any = true;
      for (const event of kernel.events.splice(0)) agent?.onNetlink(event);
    }
    if (!this.holdStore && client.events.length > 0) {
      any = true;
      for (const event of client.events.splice(0)) this.agent?.onStore(event);
    }
    return any;
  }

  /** The tunnel device, or undefined. */
  get device(): Link | undefined {
    for (const link of this.kernel.links.values()) if (link.name.startsWith("flannel.")) return link;
    return undefined;
  }

  /** A bridge with the gateway's address, as Docker or a CNI plugin makes it. */
  addBridge(gateway: Prefix): number {
    const index = this.kernel.addLink("cni0", { kind: "bridge" });
    this.kernel.addAddress(index, gateway);
    return index;
  }

  /** A pod on the bridge that has been heard of. */
  addPod(bridge: number, address: Ipv4, name: string): number {
    const port = this.kernel.addLink(name, {
      kind: "veth",
      masterIndex: bridge,
      slaveKind: "bridge",
      linkIndex: 2,
      linkNetnsId: 5,
    });
    const mac = `0a:58:${ipText(address)
      .split(".")
      .map((part) => Number(part).toString(16).padStart(2, "0"))
      .join(":")}`;
    this.kernel.replaceFdb({ index: port, mac, masterIndex: bridge });
    this.kernel.replaceNeighbour({ index: bridge, address, mac, permanent: false });
    return port;
  }
}

/** Everything there is. */
export class World {
  readonly clock = new Clock();
  readonly etcd = new FakeEtcd(this.clock);
  readonly nodes: Node[] = [];
  readonly random: () => number;

  constructor(seed = 1) {
    this.random = randomFrom(seed);
  }

  addNode(options: Partial<AgentOptions> = {}): Node {
    const node = new Node(this, this.nodes.length + 1, options);
    this.nodes.push(node);
    return node;
  }

  /** Delivers what is under way, and what follows from it, until nothing more happens at this moment. */
  async settle(): Promise<void> {
    for (let turn = 0; turn < 4000; turn++) {
      let any = false;
      for (const node of this.nodes) any = node.deliver() || any;
      let asked = false;
      for (const { client, running, dataplane } of this.nodes) {
        const { requests } = client;
        for (const request of [...requests.splice(0), ...running.splice(0), ...dataplane.loads.splice(0)]) {
          request();
          asked = true;
        }
      }
      // The answers' promises have a few steps to go.
      if (asked) for (let step = 0; step < 4; step++) await undefined;
      // One at a time: what a round leaves for the next one, notifications come between.
      if (this.clock.fire()) any = true;
      if (!any && !asked) return;
    }
    throw new Error("the world does not come to rest");
  }

  /** Lets time go by, timer by timer. */
  async pass(ms: number): Promise<void> {
    const until = this.clock.now() + ms;
    await this.settle();
    for (let next = this.clock.next(); next <= until; next = this.clock.next()) {
      this.clock.moveTo(next);
      this.etcd.expire();
      await this.settle();
    }
    this.clock.moveTo(until);
    this.etcd.expire();
    await this.settle();
  }
}

/** A network config. */
export function config(backend: object, network = "10.3.0.0/16", more: object = {}): string {
  return JSON.stringify({ Network: network, ...more, Backend: backend });
}

/** The record of a peer as flanneld writes it. */
export function record(publicIp: string, vtepMac?: Mac, vni = 1): string {
  if (vtepMac === undefined)
    return JSON.stringify({ PublicIP: publicIp, PublicIPv6: null, BackendType: "host-gw" });
  return JSON.stringify({
    PublicIP: publicIp,
    PublicIPv6: null,
    BackendType: "vxlan",
    BackendData: { VNI: vni, VtepMAC: vtepMac },
  });
}

/** Whether an address is in a block given as text. */
export function within(block: string, address: Ipv4): boolean {
  return contains(cidr(block), address);
}
