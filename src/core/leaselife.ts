/**
 * The life of our own lease: how a node comes by a subnet, keeps it, and what it does when it is taken away.
 *
 *      start                    decide()                  create / renew
 *     -------> listing -------------------------> writing ---------------> held
 *                 ^   \ exhausted, unreachable       | conflict, failed      | due: renew, expecting our revision
 *                 |    `--> waiting --.              |                       | deleted, expired, overwritten,
 *                 `------------------------------------------------------------ missing in a snapshot, network changed
 *
 * A state machine without IO: `step` takes an event and answers with the next state and with actions, plain data
 * that an edge carries out and answers with one `listed`, `done`, `conflict` or `failed` each. One operation is
 * under way at a time. Whatever looks wrong leads to the one place where all is decided afresh: the list.
 * Every write compares: a new key must be absent, an old one at the revision we know, so that two nodes can't
 * both own a subnet. Losing the lease does not stop forwarding: `subnet` stays in use until another is ours.
 * A key that was deleted, ran out or was lost by the store is taken again. But if somebody revoked the etcd lease
 * beneath it before its time, the subnet is given up for another: that is how an operator takes it from a node.
 * One that was left because the config named another network is taken again when the config comes back to it: pods may
 * still have its addresses.
 * Time is milliseconds of any clock that does not jump, and that does not stop while the host sleeps.
 */
import { formatCidr, formatIpv4, type Ipv4, networkOf, type Prefix, sizeOf } from "./ipv4.ts";
import { decodeLease, encodeAttributes, formatLeaseKey, parseLeaseKey } from "./lease.ts";
import type { LeaseAttributes, Network, StoreEvent } from "./model.ts";

/** flannel's: a lease lives a day. */
export const LEASE_TTL_SECONDS = 86400;
/** Collisions with other nodes in a row before we wait. */
export const COLLISIONS_MAX = 10;

/** Until a failed renewal is tried again; also the pace at which two nodes with one address overwrite each other. */
const RENEW_RETRY_MS = 60_000;
const ACQUIRE_RETRY_MS = 1_000;
/** The same for a node that has a subnet in use; the store's return cuts it short. */
const REACQUIRE_RETRY_MS = 10_000;
const EXHAUSTED_RETRY_MS = 10_000;

/** A record below `<prefix>/subnets/`, as listed. */
export interface StoredRecord {
  /** Last part of the key. */
  readonly key: string;
  readonly value: string;
  /** mod_revision of the key. */
  readonly revision: bigint;
  /** etcd lease, decimal; "0" for a reservation. */
  readonly leaseId: string;
}

/** What a list leads to. */
export type Decision =
  | { readonly kind: "adopt"; readonly subnet: Prefix; readonly record: StoredRecord }
  | { readonly kind: "delete"; readonly record: StoredRecord }
  | { readonly kind: "create"; readonly subnet: Prefix }
  | { readonly kind: "exhausted" };

/**
 * What the edge has to do. Keys are the last part. `ttlSeconds` 0 means without an etcd lease; otherwise a new
 * etcd lease of that time is granted for the write. `wait`, `use` and `report` get no answer.
 */
export type LeaseAction =
  /** Read all records, and then whether an etcd lease is gone if one is in doubt; answer `listed`. */
  | { readonly kind: "list"; readonly doubted: string | undefined }
  /** Write if the key is absent; answer `done`, or `conflict` if it is there. */
  | { readonly kind: "create"; readonly key: string; readonly value: string; readonly ttlSeconds: number }
  /** Write if the key is at that mod_revision; answer `done`, or `conflict` if it is not. */
  | {
      readonly kind: "renew";
      readonly key: string;
      readonly value: string;
      readonly ttlSeconds: number;
      readonly expect: bigint;
    }
  /** Delete if the key is at that mod_revision; answer `done` or `conflict`. */
  | { readonly kind: "delete"; readonly key: string; readonly expect: bigint }
  /** Send `tick` at that time or later; replaces any earlier wait. */
  | { readonly kind: "wait"; readonly until: number }
  /** The subnet is ours from now on: the device, the routes and subnet.env are to follow. */
  | { readonly kind: "use"; readonly subnet: Prefix; readonly former: Prefix | undefined }
  /** For the log and the counters. */
  | { readonly kind: "report"; readonly what: LeaseReport; readonly message: string };

export const LEASE_REPORTS = [
  "acquired",
  "renewed",
  "lost",
  "revoked",
  "moved",
  "collision",
  "contested",
  "exhausted",
  "failed",
] as const;
export type LeaseReport = (typeof LEASE_REPORTS)[number];

export type LeaseEvent =
  /** Begin; also after a stop. */
  | { readonly kind: "start" }
  /**
   * `random` is uniform in [0, 1) and drawn anew for each list. `isGone` says of the etcd lease in doubt that there is no
   * such lease; if that can't be found out it counts as there.
   */
  | {
      readonly kind: "listed";
      readonly records: readonly StoredRecord[];
      readonly random: number;
      readonly isGone?: boolean;
    }
  /** A write or delete took place; `leaseId` as granted, "0" for none. */
  | { readonly kind: "done"; readonly revision: bigint; readonly leaseId: string }
  | { readonly kind: "conflict" }
  /** The operation may or may not have taken place. */
  | { readonly kind: "failed"; readonly reason: string }
  | { readonly kind: "tick" }
  /** What we publish changed: another public address, MAC or backend. */
  | { readonly kind: "attributes"; readonly attributes: LeaseAttributes }
  | { readonly kind: "network"; readonly network: Network }
  /** Every event of the store's watch; only those of our own key count. */
  | StoreEvent;

type Phase =
  | { readonly kind: "idle" }
  | { readonly kind: "listing" }
  | { readonly kind: "writing"; readonly subnet: Prefix; readonly record: Written; readonly since: number }
  | { readonly kind: "deleting" }
  | { readonly kind: "held"; readonly due: number }
  | { readonly kind: "waiting"; readonly until: number };

interface Written {
  readonly key: string;
  readonly value: string;
}

/** Own-key news that came while an operation was under way, to be looked at after it. */
type News = Extract<StoreEvent, { kind: "put" | "delete" }>;

export interface LeaseLife {
  readonly network: Network;
  readonly attributes: LeaseAttributes;
  /** The subnet in use, or before the first lease the one of a former run. */
  readonly subnet: Prefix | undefined;
  /** Whether `subnet` was ever ours in this run. */
  readonly inUse: boolean;
  /** Our record, while we believe it to be in etcd. */
  readonly held: StoredRecord | undefined;
  /** The address our last record named, by which we know it again after ours has changed. */
  readonly publishedIp: Ipv4 | undefined;
  /** When the etcd lease ends if it is not renewed; undefined for a reservation. */
  readonly expires: number | undefined;
  /** The etcd lease that ends then; `held` may by now be bound to one that another hand made. */
  readonly granted: string | undefined;
  /** The etcd lease of our key, which was deleted long before its time: it may have been revoked by hand. */
  readonly doubted: string | undefined;
  /** `subnet` was revoked by hand: it is ours again only if no other is free. */
  readonly isRevoked: boolean;
  /** The subnets that were ours in this run and did not fit a later config, the latest first. */
  readonly left: readonly Prefix[];
  readonly phase: Phase;
  readonly collisions: number;
  readonly news: News | undefined;
  /** Between `reset` and `synced`: whether our key came by. */
  readonly snapshot: "none" | "missing" | "seen";
  readonly ttlMs: number;
  readonly marginMs: number;
}

/** What a life begins with. */
export interface LeaseTerms {
  readonly network: Network;
  readonly attributes: LeaseAttributes;
  /** From subnet.env of a former run. */
  readonly previous: Prefix | undefined;
  /** How long before its end a lease is renewed; at most half the ttl counts. */
  readonly marginMs: number;
  /** LEASE_TTL_SECONDS, or less in a test. */
  readonly ttlSeconds?: number;
}

/** A life before `start`. */
export function newLeaseLife(terms: LeaseTerms): LeaseLife {
  const ttlMs = (terms.ttlSeconds ?? LEASE_TTL_SECONDS) * 1000;
  return {
    network: terms.network,
    attributes: terms.attributes,
    subnet: terms.previous,
    inUse: false,
    held: undefined,
    publishedIp: undefined,
    expires: undefined,
    granted: undefined,
    doubted: undefined,
    isRevoked: false,
    left: [],
    phase: { kind: "idle" },
    collisions: 0,
    news: undefined,
    snapshot: "none",
    ttlMs,
    marginMs: Math.min(terms.marginMs, ttlMs / 2),
  };
}

/** Whether a subnet may be leased under this config. */
export function isCompatible(network: Network, subnet: Prefix): boolean {
  return (
    subnet.length === network.subnetLength &&
    subnet.address >= network.subnetMin &&
    subnet.address <= network.subnetMax &&
    networkOf(subnet.address, subnet.length) === subnet.address
  );
}

/**
 * What to do with what is there: our own record is taken over if the config still allows it (the previous
 * subnet first) and deleted if not, unless it is a reservation, which is the operator's; else the previous
 * subnet if it is free, or one that was left; else a free one, each equally likely, so that nodes starting together
 * seldom meet; and the one to be shunned only if it is the last.
 */
export function decide(
  wish: {
    readonly network: Network;
    readonly publicIp: Ipv4;
    readonly previous: Prefix | undefined;
    /** A former public address: the record of the previous subnet is ours under that as well. */
    readonly formerIp?: Ipv4 | undefined;
    readonly shunned?: Prefix | undefined;
    /** Subnets that were ours before the previous one, the latest first. */
    readonly left?: readonly Prefix[];
  },
  records: readonly StoredRecord[],
  random: number,
): Decision {
  const { network, publicIp, previous, shunned, left = [] } = wish;
  const ours = [publicIp, ...(wish.formerIp === undefined ? [] : [wish.formerIp])].map(formatIpv4);
  const own: { record: StoredRecord; subnet: Prefix }[] = [];
  for (const record of records) {
    // Nearly all are of others, and need not be read to see that.
    if (!mayName(record.value, ours)) continue;
    const subnet = parseLeaseKey(record.key);
    if (subnet === undefined) continue;
    const owner = ownerOf(record);
    const isFormer = owner === wish.formerIp && previous !== undefined && same(subnet, previous);
    if (owner !== undefined && (owner === publicIp || isFormer)) own.push({ record, subnet });
  }
  const usable = own.filter(({ subnet }) => isCompatible(network, subnet));
  const mine = usable.find(({ subnet }) => previous !== undefined && same(subnet, previous)) ?? usable[0];
  if (mine !== undefined) return { kind: "adopt", ...mine };
  const stale = own.find(({ record }) => record.leaseId !== "0");
  if (stale !== undefined) return { kind: "delete", record: stale.record };
  // A record that can't be read still occupies its key.
  const taken = records.flatMap(({ key }) => parseLeaseKey(key) ?? []);
  const free = new FreeSubnets(network, taken);
  const former = [...(previous === undefined ? [] : [previous]), ...left];
  const again = former.find((each) => isCompatible(network, each) && free.includes(each));
  if (again !== undefined)
    return { kind: "create", subnet: { address: again.address, length: again.length } };
  const others = shunned === undefined ? free : new FreeSubnets(network, [...taken, shunned]);
  const subnet = others.pick(random) ?? free.pick(random);
  return subnet === undefined ? { kind: "exhausted" } : { kind: "create", subnet };
}

/** The subnets of a network that nothing touches, as gaps between merged runs of taken ones. */
class FreeSubnets {
  readonly #network: Network;
  /** First index and count of each gap, ascending. */
  readonly #gaps: [number, number][] = [];

  constructor(network: Network, taken: readonly Prefix[]) {
    this.#network = network;
    const { subnetMin, subnetMax, subnetLength } = network;
    const step = sizeOf(subnetLength);
    const count = (subnetMax - subnetMin) / step + 1;
    const runs = taken
      .map(({ address, length }): [number, number] => [
        Math.floor((address - subnetMin) / step),
        Math.ceil((address + sizeOf(length) - subnetMin) / step),
      ])
      .sort(([a], [b]) => a - b);
    let next = 0;
    for (const [from, to] of [...runs, [count, count] as const]) {
      const end = Math.min(from, count);
      if (end > next) this.#gaps.push([next, end - next]);
      next = Math.max(next, to);
    }
  }

  includes(subnet: Prefix): boolean {
    const index = (subnet.address - this.#network.subnetMin) / sizeOf(this.#network.subnetLength);
    return this.#gaps.some(([first, count]) => index >= first && index < first + count);
  }

  pick(random: number): Prefix | undefined {
    const total = this.#gaps.reduce((sum, [, count]) => sum + count, 0);
    let nth = Math.min(Math.floor(random * total), total - 1);
    for (const [first, count] of this.#gaps) {
      if (nth < count) {
        const { subnetMin, subnetLength } = this.#network;
        return { address: subnetMin + (first + nth) * sizeOf(subnetLength), length: subnetLength };
      }
      nth -= count;
    }
    return undefined;
  }
}

/** One step of a life. `now` in milliseconds. */
export function step(
  life: LeaseLife,
  event: LeaseEvent,
  now: number,
): { life: LeaseLife; actions: LeaseAction[] } {
  const next = new Step(life, now);
  next.take(event);
  return { life: next.life, actions: next.actions };
}

/** A step under way: the life is replaced, never changed, and actions gather. */
class Step {
  life: LeaseLife;
  readonly actions: LeaseAction[] = [];
  readonly #now: number;

  constructor(life: LeaseLife, now: number) {
    this.life = life;
    this.#now = now;
  }

  take(event: LeaseEvent): void {
    const { phase } = this.life;
    switch (event.kind) {
      case "start":
        if (phase.kind === "idle") this.#list();
        return;
      case "listed":
        if (phase.kind === "listing") this.#decide(event.records, event.random, event.isGone === true);
        return;
      case "done":
        if (phase.kind === "deleting") this.#list();
        if (phase.kind === "writing") this.#written(phase, event.revision, event.leaseId);
        return;
      case "conflict":
        this.#conflict();
        return;
      case "failed":
        this.#failed(event.reason);
        return;
      case "tick":
        this.#tick();
        return;
      case "attributes":
        this.#set({ attributes: event.attributes });
        if (phase.kind === "held") this.#settle(phase.due);
        return;
      case "network":
        this.#set({ network: event.network });
        if (phase.kind === "held") this.#settle(phase.due);
        if (phase.kind === "waiting" && this.life.held === undefined) this.#list();
        return;
      default:
        this.#store(event);
    }
  }

  #set(change: Partial<LeaseLife>): void {
    this.life = { ...this.life, ...change };
  }

  #report(what: LeaseReport, message: string): void {
    this.actions.push({ kind: "report", what, message });
  }

  #list(): void {
    const { doubted } = this.life;
    this.#set({
      phase: { kind: "listing" },
      held: undefined,
      expires: undefined,
      granted: undefined,
      news: undefined,
    });
    this.actions.push({ kind: "list", doubted });
  }

  #wait(ms: number): void {
    const until = this.#now + ms;
    this.#set({ phase: { kind: "waiting", until } });
    this.actions.push({ kind: "wait", until });
  }

  #lose(why: string): void {
    const { subnet } = this.life;
    if (subnet !== undefined)
      this.#report("lost", `our lease of ${formatCidr(subnet)} ${why}: taking one again`);
    this.#list();
  }

  #decide(records: readonly StoredRecord[], random: number, isGone: boolean): void {
    this.#resolve(isGone);
    const { network, attributes, subnet, publishedIp: formerIp, isRevoked, left } = this.life;
    const { publicIp } = attributes;
    const wish = isRevoked
      ? { network, publicIp, previous: undefined, shunned: subnet }
      : { network, publicIp, previous: subnet, formerIp, left };
    const decision = decide(wish, records, random);
    switch (decision.kind) {
      case "adopt": {
        const { record, subnet } = decision;
        this.#set({ held: record });
        const isSettled = record.leaseId === "0" && record.value === encodeAttributes(attributes);
        if (isSettled) this.#own(subnet, undefined);
        else this.#renew(subnet, record);
        return;
      }
      case "delete":
        this.#set({ phase: { kind: "deleting" } });
        this.actions.push({ kind: "delete", key: decision.record.key, expect: decision.record.revision });
        this.#report("lost", `our lease ${decision.record.key} does not fit the network config: deleting it`);
        return;
      case "create": {
        const record = { key: formatLeaseKey(decision.subnet), value: encodeAttributes(attributes) };
        this.#set({ phase: { kind: "writing", subnet: decision.subnet, record, since: this.#now } });
        this.actions.push({ kind: "create", ...record, ttlSeconds: this.life.ttlMs / 1000 });
        return;
      }
      case "exhausted":
        this.#report(
          "exhausted",
          `out of subnets: none is free of ${describeRange(network)}; enlarge the network`,
        );
        this.#wait(EXHAUSTED_RETRY_MS);
    }
  }

  /** Says why our key was deleted, where that was in doubt. */
  #resolve(isGone: boolean): void {
    const { doubted, subnet } = this.life;
    if (doubted === undefined || subnet === undefined) return;
    this.#set({ doubted: undefined, isRevoked: isGone });
    const text = `our lease of ${formatCidr(subnet)}`;
    if (isGone) this.#report("revoked", `${text} was revoked by hand: taking another subnet if one is free`);
    else this.#report("lost", `${text} was deleted, though its etcd lease lives: taking it again`);
  }

  /** Writes our record again where it is; a reservation stays one. */
  #renew(subnet: Prefix, held: StoredRecord): void {
    const record = { key: held.key, value: encodeAttributes(this.life.attributes) };
    const ttlSeconds = held.leaseId === "0" ? 0 : this.life.ttlMs / 1000;
    this.#set({ phase: { kind: "writing", subnet, record, since: this.#now } });
    this.actions.push({ kind: "renew", ...record, ttlSeconds, expect: held.revision });
  }

  #written(phase: Extract<Phase, { kind: "writing" }>, revision: bigint, leaseId: string): void {
    const { news } = this.life;
    this.#set({
      held: { ...phase.record, revision, leaseId },
      granted: leaseId,
      doubted: undefined,
      news: undefined,
    });
    this.#own(phase.subnet, leaseId === "0" ? undefined : phase.since + this.life.ttlMs);
    // The watch may have told of our write's end before the write's own answer came.
    if (news !== undefined && news.revision > revision && this.life.phase.kind === "held") this.#ownKey(news);
  }

  /** The subnet is ours: says so if that is news, and looks ahead. */
  #own(subnet: Prefix, expires: number | undefined): void {
    const { network, inUse, subnet: former, held, isRevoked, left } = this.life;
    const publishedIp = held === undefined ? undefined : ownerOf(held);
    const isNew = !inUse || former === undefined || !same(former, subnet);
    if (inUse && former !== undefined && !isRevoked && !isCompatible(network, former))
      this.#set({ left: [former, ...left.filter((each) => !same(each, subnet))] });
    this.#set({ subnet, expires, publishedIp, collisions: 0, isRevoked: false });
    if (!isCompatible(network, subnet)) {
      this.#unfit(subnet);
      return;
    }
    this.#set({ inUse: true });
    const text = `${formatCidr(subnet)} is ${isNew ? "" : "still "}ours${expires === undefined ? ", reserved" : ""}`;
    if (isNew) {
      const from = inUse ? former : undefined;
      if (from === undefined) this.#report("acquired", text);
      else this.#report("moved", `${text}, in place of ${formatCidr(from)}`);
      this.actions.push({ kind: "use", subnet, former: from });
    } else {
      this.#report("renewed", text);
    }
    this.#settle(expires === undefined ? Number.POSITIVE_INFINITY : expires - this.life.marginMs);
  }

  #unfit(subnet: Prefix): void {
    const { network } = this.life;
    this.#report(
      "lost",
      `our subnet ${formatCidr(subnet)} does not fit the network config: not of ${describeRange(network)}`,
    );
    this.#list();
  }

  /** Holds until `due`, unless the config or what we publish is another by now. */
  #settle(due: number): void {
    const { held, subnet, network, attributes } = this.life;
    if (held === undefined || subnet === undefined) {
      this.#list();
      return;
    }
    if (!isCompatible(network, subnet)) {
      this.#unfit(subnet);
      return;
    }
    if (held.value !== encodeAttributes(attributes)) {
      this.#renew(subnet, held);
      return;
    }
    this.#hold(due);
  }

  #hold(due: number): void {
    this.#set({ phase: { kind: "held", due } });
    if (due !== Number.POSITIVE_INFINITY) this.actions.push({ kind: "wait", until: due });
  }

  #conflict(): void {
    const { phase } = this.life;
    if (phase.kind === "deleting") {
      this.#list();
      return;
    }
    if (phase.kind !== "writing") return;
    const collisions = this.life.collisions + 1;
    this.#report("collision", `another write to ${phase.record.key} came first: looking again`);
    this.#set({ collisions });
    if (collisions < COLLISIONS_MAX) {
      this.#list();
      return;
    }
    this.#report("failed", `no lease after ${COLLISIONS_MAX} tries, each of which another write forestalled`);
    this.#set({ collisions: 0, held: undefined });
    this.#wait(ACQUIRE_RETRY_MS);
  }

  #failed(reason: string): void {
    const { phase, inUse } = this.life;
    if (phase.kind !== "listing" && phase.kind !== "deleting" && phase.kind !== "writing") return;
    const what = phase.kind === "writing" ? `writing our lease ${phase.record.key}` : `${phase.kind} leases`;
    this.#report("failed", `${what} failed: ${reason}; trying again${inUse ? ", forwarding goes on" : ""}`);
    const retry = inUse ? REACQUIRE_RETRY_MS : ACQUIRE_RETRY_MS;
    this.#wait(phase.kind === "writing" && inUse ? this.#renewRetryMs() : retry);
  }

  #renewRetryMs(): number {
    return Math.min(RENEW_RETRY_MS, this.life.ttlMs / 10);
  }

  #tick(): void {
    const { phase, subnet, held } = this.life;
    const due = phase.kind === "held" ? phase.due : phase.kind === "waiting" ? phase.until : undefined;
    if (due === undefined || due === Number.POSITIVE_INFINITY) return;
    // A timer may fire a moment early; without another one, nothing would ever happen again.
    if (this.#now < due) this.actions.push({ kind: "wait", until: due });
    else if (phase.kind === "held" && subnet !== undefined && held !== undefined) this.#renew(subnet, held);
    // A write that failed may have taken place all the same: only the list tells.
    else this.#list();
  }

  #store(event: StoreEvent): void {
    if (event.kind === "reset") {
      // What the store says of an etcd lease counts only if it has not been another store since.
      this.#set({ snapshot: "missing", doubted: undefined });
      return;
    }
    if (event.kind === "synced") {
      this.#synced(event.revision);
      return;
    }
    const { phase, held } = this.life;
    const key = phase.kind === "writing" ? phase.record.key : held?.key;
    if (key === undefined || event.key !== `subnets/${key}`) return;
    if (this.life.snapshot !== "none") this.#set({ snapshot: event.kind === "put" ? "seen" : "missing" });
    else if (event.kind === "delete") this.#doubt(event.revision);
    if (phase.kind === "writing") this.#set({ news: event });
    if (phase.kind === "waiting" && held !== undefined && event.revision > held.revision) this.#list();
    if (phase.kind === "held" && this.life.snapshot !== "missing") this.#ownKey(event);
  }

  #synced(revision: bigint): void {
    const { phase, snapshot, inUse, held } = this.life;
    this.#set({ snapshot: "none" });
    if (snapshot === "missing" && phase.kind === "held") {
      // A snapshot older than our write says nothing of it, unless the store went back in time: look.
      if (held !== undefined && revision < held.revision) this.#list();
      else this.#lose("is not in the store any more");
    }
    if (snapshot === "missing" && phase.kind === "writing") {
      // Absent at this revision: if our write was not later than that, it is gone again.
      const key = `subnets/${phase.record.key}`;
      this.#set({ news: { kind: "delete", key, revision: revision + 1n } });
    }
    if (phase.kind === "waiting" && inUse) this.#list();
  }

  /**
   * Our key was deleted. If it was bound to the etcd lease that we were granted, and not even its renewal is due, that
   * lease can't have run out: either only the key was deleted, or the lease was revoked.
   */
  #doubt(revision: bigint): void {
    const { held, granted, expires, marginMs } = this.life;
    if (held === undefined || expires === undefined || held.leaseId !== granted) return;
    if (revision > held.revision && this.#now < expires - marginMs) this.#set({ doubted: granted });
  }

  /** Our key was written or deleted, while we hold it, by someone; or it is our own write come back. */
  #ownKey(event: News): void {
    const { held, phase, snapshot } = this.life;
    if (held === undefined || phase.kind !== "held") return;
    // In a snapshot a lower revision is news too: the store may have been restored to an earlier state.
    // The same revision with other content is one of another store, which has only just counted up to there.
    if (snapshot === "none" && event.revision < held.revision) return;
    if (event.kind === "put" && event.revision === held.revision && event.value === held.value) return;
    if (event.kind === "delete") {
      if (this.life.doubted === undefined) this.#lose("was deleted or ran out");
      else this.#list();
      return;
    }
    const record = { key: held.key, value: event.value, revision: event.revision, leaseId: event.leaseId };
    const owner = ownerOf(record);
    if (owner !== undefined && owner !== this.life.attributes.publicIp) {
      this.#lose(`was taken by the node at ${formatIpv4(owner)}`);
      return;
    }
    // Still ours, by another hand. What is to be put right waits a while: if it is a node with our address, the
    // two of us would else overwrite each other as fast as the store can take it.
    this.#set({ held: record });
    if (record.value !== held.value) {
      this.#report(
        "contested",
        `our lease ${held.key} was rewritten by another hand: ${record.value.slice(0, 200)}`,
      );
    } else if (record.leaseId === "0") {
      this.#set({ expires: undefined });
      this.#hold(Number.POSITIVE_INFINITY);
      return;
    }
    this.#hold(Math.min(phase.due, this.#now + this.#renewRetryMs()));
  }
}

function same(a: Prefix, b: Prefix): boolean {
  return a.address === b.address && a.length === b.length;
}

/** Whether a record can name one of these addresses: JSON may spell any text in escapes. */
function mayName(value: string, addresses: readonly string[]): boolean {
  return value.includes("\\") || addresses.some((address) => value.includes(address));
}

/** The public address in a record, undefined if it can't be read. */
function ownerOf(record: Pick<StoredRecord, "key" | "value">): Ipv4 | undefined {
  const lease = decodeLease(record.key, record.value);
  return "reason" in lease ? undefined : lease.publicIp;
}

function describeRange(network: Network): string {
  const { network: block, subnetLength, subnetMin, subnetMax } = network;
  return `the /${subnetLength} from ${formatIpv4(subnetMin)} to ${formatIpv4(subnetMax)} in ${formatCidr(block)}`;
}
