/**
 * What the store says ought to be: the network config and the leases of all other nodes, folded from store
 * events one at a time.
 *
 * Between `reset` and `synced` the old set stays in force, and at `synced` the new one replaces it, lease by lease in the
 * order in which they were written, but for one thing: silence is not deletion. A lease that a snapshot lacks is missing; it was not seen to go, and where a store
 * was wiped its node will put it back as soon as it notices. It stays in force until a delete or `forget`, and gives
 * way to any other that overlaps it. A record that can't be used becomes a Rejection, and the last good one of its key
 * stays; only a delete takes it away. Where records contradict each other (two blocks overlap, or one lies in
 * our own subnet) the outcome depends on the records alone and not on the order they came in, so that every
 * node decides alike. Keys elsewhere under the prefix are none of ours.
 *
 * The maps are changed in place, so that an event costs what it changes and not what there is. `fold` returns
 * the very same object if nothing that matters changed, which a renewal does not, and a new one otherwise; the
 * one given to it must not be used any more.
 */
import { contains, formatCidr, formatIpv4, type Ipv4, networkOf, overlaps, type Prefix } from "./ipv4.ts";
import { decodeLease, sameAttributes } from "./lease.ts";
import type { Lease, Network, Rejection, StoreEvent } from "./model.ts";
import { type NetworkResult, parseNetwork } from "./network.ts";

/** Most leases that are kept; also the most rejections that are listed. */
export const LEASES_MAX = 65536;

const SUBNETS = "subnets/";
/** Leases of a snapshot that one step puts in force, in a millisecond or a few. */
const STEP = 1000;

/** The subnet this node holds; no other lease may touch it, and it is not among `leases`. */
export interface Own {
  readonly subnet: Prefix;
  readonly publicIp: Ipv4;
}

/** The state to strive for. Lease keys are the last part of the etcd key: `10.5.1.0-24`. */
export interface Desired {
  /** A full snapshot has been seen; before it, nothing may be written anywhere. */
  readonly synced: boolean;
  /** Store revision up to which all is folded in. */
  readonly revision: bigint;
  /** The last good config, undefined until there was one. */
  readonly network: Network | undefined;
  /** Why the only config there is can't be served by this version, whatever happens; undefined otherwise. */
  readonly unknownBackend: string | undefined;
  /** What in that config was set aside. */
  readonly warnings: readonly string[];
  /** The other nodes' leases in force. A lease that did not change is the same object as before. */
  readonly leases: ReadonlyMap<string, Lease>;
  /** Records refused, by lease key, or `config`. */
  readonly rejections: ReadonlyMap<string, Rejection>;
  /** Keys of leases that the last snapshot lacked, see the head of this file. */
  readonly missing: ReadonlySet<string>;
}

/** Nothing known yet. Unless it `follows`, the first good config stays in force, and a changed one is a warning. */
export function emptyDesired(follows = true): Desired {
  return new View(new State(follows));
}

/** Folds one event in; see the head of this file for what is returned. */
export function fold(desired: Desired, event: StoreEvent): Desired {
  const steps = foldInSteps(desired, event);
  for (;;) {
    const { value, done } = steps.next();
    if (done === true) return value;
  }
}

/**
 * As `fold`, but puts a large snapshot in force some leases at a time. What each step returns takes the place of the one
 * before; the first snapshot of all counts as synced with the last. Until that, no other event may be folded in.
 */
export function* foldInSteps(desired: Desired, event: StoreEvent): Generator<Desired, Desired> {
  const state = stateOf(desired);
  const steps = state.apply(event);
  for (let folded = desired; ; ) {
    const { value, done } = steps.next();
    if (value) folded = new View(state);
    if (done === true) return folded;
    yield folded;
  }
}

/** Says which subnet is ours, or that none is; returns as `fold` does. Costs a pass over all leases. */
export function claim(desired: Desired, own: Own | undefined): Desired {
  const state = stateOf(desired);
  return state.claim(own) ? new View(state) : desired;
}

/** The keys of leases that came, went or changed since the last call. */
export function takeTouched(desired: Desired): ReadonlySet<string> {
  return stateOf(desired).takeTouched();
}

/** Lets go of the leases that are missing, but for those of these keys; returns as `fold` does. */
export function forget(desired: Desired, present: ReadonlySet<string>): Desired {
  const state = stateOf(desired);
  return state.forget(present) ? new View(state) : desired;
}

class View implements Desired {
  readonly state: State;
  constructor(state: State) {
    this.state = state;
  }
  get synced(): boolean {
    return this.state.synced;
  }
  get revision(): bigint {
    return this.state.revision;
  }
  get network(): Network | undefined {
    return this.state.network;
  }
  get unknownBackend(): string | undefined {
    return this.state.unknownBackend;
  }
  get warnings(): readonly string[] {
    return this.state.warnings;
  }
  get leases(): ReadonlyMap<string, Lease> {
    return this.state.leases;
  }
  get rejections(): ReadonlyMap<string, Rejection> {
    return this.state.rejections;
  }
  get missing(): ReadonlySet<string> {
    return this.state.missing;
  }
}

function stateOf(desired: Desired): State {
  if (desired instanceof View) return desired.state;
  throw new TypeError("a Desired is made by emptyDesired and fold alone");
}

/** A snapshot on its way in: decoded, but not in force. */
interface Snapshot {
  config: string | undefined;
  readonly records: Map<string, { readonly record: Lease | Rejection; readonly revision: number }>;
}

class State {
  synced = false;
  revision = 0n;
  network: Network | undefined;
  unknownBackend: string | undefined;
  warnings: readonly string[] = [];
  readonly leases = new Map<string, Lease>();
  readonly rejections = new Map<string, Rejection>();
  readonly missing = new Set<string>();
  readonly #follows: boolean;

  constructor(follows: boolean) {
    this.#follows = follows;
  }

  #touched = new Set<string>();
  #config: string | undefined;
  #own: Own | undefined;
  #snapshot: Snapshot | undefined;
  /** Last good record of each key, in force or not. */
  readonly #records = new Records();
  /** Keys whose present value is unusable, whatever was there before. */
  readonly #bad = new Map<string, Rejection>();

  /** Each step tells whether anything changed that a reader of Desired can see, the revision aside. */
  *apply(event: StoreEvent): Generator<boolean, boolean> {
    switch (event.kind) {
      case "reset":
        this.#snapshot = { config: undefined, records: new Map() };
        return false;
      case "synced":
        this.revision = event.revision;
        return yield* this.#sync();
      case "put":
        return this.#put(event.key, event.value, event.revision);
      case "delete":
        return this.#delete(event.key, event.revision);
    }
  }

  takeTouched(): ReadonlySet<string> {
    const touched = this.#touched;
    this.#touched = new Set();
    return touched;
  }

  forget(present: ReadonlySet<string>): boolean {
    let changed = false;
    for (const key of [...this.missing]) if (!present.has(key)) changed = this.#remove(key) || changed;
    return changed;
  }

  claim(own: Own | undefined): boolean {
    this.#own = own;
    return this.#judgeAll();
  }

  #put(key: string, value: string, revision: bigint): boolean {
    const lease = key.startsWith(SUBNETS) ? key.slice(SUBNETS.length) : undefined;
    if (this.#snapshot !== undefined) {
      if (key === "config") this.#snapshot.config = value;
      if (lease !== undefined && this.#snapshot.records.size < 2 * LEASES_MAX) {
        this.#snapshot.records.set(lease, { record: decodeLease(lease, value), revision: Number(revision) });
      }
      return false;
    }
    this.#advance(revision);
    if (key === "config") return this.#setConfig(value);
    return lease !== undefined && this.#set(lease, decodeLease(lease, value));
  }

  #delete(key: string, revision: bigint): boolean {
    const lease = key.startsWith(SUBNETS) ? key.slice(SUBNETS.length) : undefined;
    if (this.#snapshot !== undefined) {
      if (key === "config") this.#snapshot.config = undefined;
      if (lease !== undefined) this.#snapshot.records.delete(lease);
      return false;
    }
    this.#advance(revision);
    if (key === "config") return this.#setConfig(undefined);
    return lease !== undefined && this.#remove(lease);
  }

  #advance(revision: bigint): void {
    if (revision > this.revision) this.revision = revision;
  }

  *#sync(): Generator<boolean, boolean> {
    const snapshot = this.#snapshot;
    this.#snapshot = undefined;
    let changed = false;
    if (snapshot !== undefined) {
      changed = this.#setConfig(snapshot.config);
      for (const key of [...this.#records.keys(), ...this.#bad.keys()]) {
        if (!snapshot.records.has(key)) changed = this.#miss(key) || changed;
      }
      // In the order in which they were written, as events would have told of them.
      const records = [...snapshot.records].sort(([, a], [, b]) => a.revision - b.revision);
      for (const [index, [key, { record }]] of records.entries()) {
        changed = this.#set(key, record) || changed;
        if (index % STEP !== STEP - 1) continue;
        yield changed;
        changed = false;
      }
    }
    if (this.synced) return changed;
    this.synced = true;
    return true;
  }

  #setConfig(text: string | undefined): boolean {
    if (text === this.#config && (text !== undefined || this.rejections.has("config"))) return false;
    this.#config = text;
    const kept = this.network === undefined ? "" : "; the last good one stays in force";
    const parsed: NetworkResult =
      text === undefined ? { error: "there is no network config" } : parseNetwork(text);
    this.unknownBackend = undefined;
    if ("error" in parsed) {
      if (parsed.unknownBackend && this.network === undefined) this.unknownBackend = parsed.error;
      this.rejections.set("config", { key: "config", reason: `${parsed.error}${kept}` });
      return true;
    }
    this.rejections.delete("config");
    if (!this.#follows && this.network !== undefined) {
      const isOther = JSON.stringify(parsed.network) !== JSON.stringify(this.network);
      const news = "the network config has changed, which takes effect with the next start of twilld";
      this.warnings = isOther ? [news] : parsed.warnings;
      return true;
    }
    this.network = parsed.network;
    this.warnings = parsed.warnings;
    this.#judgeAll();
    return true;
  }

  #set(key: string, record: Lease | Rejection): boolean {
    const former = this.#records.get(key);
    const isBack = this.missing.delete(key);
    if ("reason" in record) {
      const refused = this.#refuse(record);
      return (isBack && former !== undefined && this.#judgeAround(key, former)) || refused;
    }
    if (former === undefined && this.#records.size >= LEASES_MAX) {
      return this.#refuse({ key, reason: `there are more than ${LEASES_MAX} leases` });
    }
    const mended = this.#bad.delete(key);
    if (former !== undefined && sameAttributes(former, record)) {
      return isBack ? this.#judgeAround(key, former) : mended && this.#judge(key, former);
    }
    this.#records.set(key, record);
    return this.#judgeAround(key, record);
  }

  #refuse(rejection: Rejection): boolean {
    const { key } = rejection;
    if (this.#bad.get(key)?.reason === rejection.reason) return false;
    if (!this.#bad.has(key) && this.#bad.size >= LEASES_MAX) return false;
    this.#bad.set(key, rejection);
    this.rejections.set(key, rejection);
    return true;
  }

  /** A snapshot lacks a key. */
  #miss(key: string): boolean {
    const record = this.#records.get(key);
    if (record === undefined) return this.#remove(key);
    this.#bad.delete(key);
    if (this.missing.has(key)) return false;
    this.missing.add(key);
    this.#judgeAround(key, record);
    return true;
  }

  #remove(key: string): boolean {
    this.missing.delete(key);
    const wasBad = this.#bad.delete(key);
    const listed = this.rejections.delete(key);
    const record = this.#records.get(key);
    if (record === undefined) return wasBad || listed;
    this.#records.delete(key);
    this.#touched.add(key);
    const wasInForce = this.leases.delete(key);
    return this.#judgeAround(undefined, record) || wasBad || listed || wasInForce;
  }

  #judgeAll(): boolean {
    let changed = false;
    for (const key of this.#records.keys()) {
      const lease = this.#records.get(key);
      if (lease !== undefined) changed = this.#judge(key, lease) || changed;
    }
    return changed;
  }

  /** Judges what a change to one record may have touched: itself, and all that it overlaps. */
  #judgeAround(key: string | undefined, record: Lease): boolean {
    if (key !== undefined && this.#records.isAlone(key, record.subnet)) return this.#judge(key, record);
    let changed = false;
    for (const [otherKey, other] of this.#records.overlapping(record.subnet)) {
      if (otherKey !== key) changed = this.#judge(otherKey, other) || changed;
    }
    return (key !== undefined && this.#judge(key, record)) || changed;
  }

  /** Puts one record in or out of force, and lists what is wrong with its key. */
  #judge(key: string, lease: Lease): boolean {
    const objection = this.#objection(key, lease);
    const inForce = objection === undefined ? lease : undefined;
    const moved = this.leases.get(key) !== inForce;
    if (moved) this.#touched.add(key);
    if (inForce === undefined) this.leases.delete(key);
    else this.leases.set(key, inForce);
    const rejection = this.#bad.get(key) ?? (objection ? { key, reason: objection } : undefined);
    const relisted = this.rejections.get(key)?.reason !== rejection?.reason;
    if (rejection === undefined) this.rejections.delete(key);
    else if (relisted) this.rejections.set(key, rejection);
    return moved || relisted;
  }

  /** Why a record is not in force; empty for our own, which is no fault. */
  #objection(key: string, lease: Lease): string | undefined {
    const { network } = this;
    const own = this.#own;
    const text = (): string => formatCidr(lease.subnet);
    if (own !== undefined && overlaps(own.subnet, lease.subnet)) {
      if (lease.subnet.length !== own.subnet.length)
        return `${text()} overlaps our own subnet ${formatCidr(own.subnet)}`;
      if (lease.publicIp === own.publicIp) return "";
      return `our own subnet ${text()} is claimed by the node at ${formatIpv4(lease.publicIp)} as well`;
    }
    if (own !== undefined && lease.publicIp === own.publicIp) {
      return (
        `${text()} names our own address ${formatIpv4(own.publicIp)}, but our subnet is ${formatCidr(own.subnet)}: ` +
        "a lease of a former run, or another node has the same public address"
      );
    }
    if (network !== undefined && !covers(network.network, lease.subnet)) {
      return `${text()} is not in the network ${formatCidr(network.network)}`;
    }
    if (this.#records.isAlone(key, lease.subnet)) return undefined;
    let first: readonly [string, Lease] | undefined;
    for (const [otherKey, other] of this.#records.overlapping(lease.subnet)) {
      if (otherKey === key || !this.#precedes(otherKey, other, key, lease)) continue;
      if (first === undefined || otherKey < first[0]) first = [otherKey, other];
    }
    if (first === undefined) return undefined;
    const [otherKey, { publicIp }] = first;
    return `${text()} overlaps ${otherKey} of the node at ${formatIpv4(publicIp)}, which takes precedence`;
  }

  /** Of two that overlap: the one that is there, else the length the config asks for, else the smaller block, else the lesser key. */
  #precedes(aKey: string, a: Lease, bKey: string, b: Lease): boolean {
    const { network } = this;
    if (network !== undefined && !covers(network.network, a.subnet)) return false;
    if (this.missing.has(aKey) !== this.missing.has(bKey)) return this.missing.has(bKey);
    const [aLength, bLength] = [a.subnet.length, b.subnet.length];
    if (aLength === bLength) return aKey < bKey;
    if (aLength === network?.subnetLength) return true;
    return bLength !== network?.subnetLength && aLength > bLength;
  }
}

function listOf(keys: string | readonly string[]): readonly string[] {
  return typeof keys === "string" ? [keys] : keys;
}

function covers(outer: Prefix, inner: Prefix): boolean {
  return inner.length >= outer.length && contains(outer, inner.address);
}

/**
 * Records by key, and by block to find what overlaps a block: a look-up for each length in use that is not
 * longer, and for each longer one at most as many as there are such blocks. All lengths are one in a sane store.
 */
class Records {
  readonly #byKey = new Map<string, Lease>();
  /** Hardly ever is there more than one key of a block (that of a dual-stack lease), so a list is made only then. */
  readonly #byLength = new Map<number, Map<Ipv4, string | readonly string[]>>();

  get size(): number {
    return this.#byKey.size;
  }

  get(key: string): Lease | undefined {
    return this.#byKey.get(key);
  }

  keys(): IterableIterator<string> {
    return this.#byKey.keys();
  }

  set(key: string, lease: Lease): void {
    if (!this.#byKey.has(key)) {
      const { address, length } = lease.subnet;
      const blocks = this.#byLength.get(length) ?? new Map<Ipv4, string | readonly string[]>();
      const others = blocks.get(address);
      this.#byLength.set(length, blocks.set(address, others === undefined ? key : [...listOf(others), key]));
    }
    this.#byKey.set(key, lease);
  }

  delete(key: string): void {
    const lease = this.#byKey.get(key);
    if (lease === undefined) return;
    this.#byKey.delete(key);
    const { address, length } = lease.subnet;
    const blocks = this.#byLength.get(length);
    const rest = listOf(blocks?.get(address) ?? []).filter((other) => other !== key);
    const [first] = rest;
    if (first === undefined) blocks?.delete(address);
    else blocks?.set(address, rest.length === 1 ? first : rest);
    if (blocks?.size === 0) this.#byLength.delete(length);
  }

  /** Whether no other record than that of a key overlaps its block, as far as that can be told at once. */
  isAlone(key: string, { address, length }: Prefix): boolean {
    return this.#byLength.size === 1 && this.#byLength.get(length)?.get(address) === key;
  }

  *overlapping(block: Prefix): Generator<[string, Lease]> {
    for (const [length, blocks] of this.#byLength) {
      for (const keys of this.#within(block, length, blocks)) {
        for (const key of listOf(keys)) {
          const lease = this.#byKey.get(key);
          if (lease !== undefined) yield [key, lease];
        }
      }
    }
  }

  *#within(
    block: Prefix,
    length: number,
    blocks: ReadonlyMap<Ipv4, string | readonly string[]>,
  ): Generator<string | readonly string[]> {
    const step = 2 ** (32 - length);
    const count = length <= block.length ? 1 : 2 ** (length - block.length);
    if (count <= blocks.size) {
      const first = networkOf(block.address, Math.min(length, block.length));
      for (let i = 0; i < count; i++) {
        const keys = blocks.get(first + i * step);
        if (keys !== undefined) yield keys;
      }
      return;
    }
    for (const [address, keys] of blocks) {
      if (contains(block, address)) yield keys;
    }
  }
}
