/**
 * Keeps our own lease: carries out in the store what `src/core/leaselife.ts` decides, and feeds it with what comes
 * of it.
 */
import type { Prefix } from "../core/ipv4.ts";
import { sameAttributes } from "../core/lease.ts";
import {
  type LeaseAction,
  type LeaseEvent,
  type LeaseLife,
  type LeaseReport,
  newLeaseLife,
  type StoredRecord,
  step,
} from "../core/leaselife.ts";
import type { LeaseAttributes, Network, StoreEvent } from "../core/model.ts";
import type { World } from "../core/world.ts";

/** Reports that each retry makes anew. */
const REPEATED: ReadonlySet<LeaseReport> = new Set(["failed", "exhausted"]);
const SUBNETS = "subnets/";

/** What a keeper begins with. */
export interface LeaseWish {
  /** The subnet of a former run. */
  readonly previous: Prefix | undefined;
  /** How long before its end a lease is renewed. */
  readonly renewMarginMs: number;
  /** How long a lease lives that is not renewed; default: a day. */
  readonly leaseTtlSeconds?: number;
}

type LeaseWorld = Pick<World, "store" | "clock" | "log" | "random" | "observer">;

export class LeaseKeeper {
  readonly #wish: LeaseWish;
  readonly #world: LeaseWorld;
  readonly #onUse: () => void;
  #life: LeaseLife | undefined;
  #report: LeaseReport | undefined;
  #cancelTick: (() => void) | undefined;
  #stopped = false;
  /**
   * What the store told before there was a lease to keep: the first look at it is this, as it was read a moment ago. That it
   * may be older does no harm, as each write compares.
   */
  #told: Map<string, StoredRecord> | undefined = new Map();
  #toldAll = false;

  /** `onUse` is told when another subnet is ours. */
  constructor(wish: LeaseWish, world: LeaseWorld, onUse: () => void) {
    this.#wish = wish;
    this.#world = world;
    this.#onUse = onUse;
  }

  /** The subnet in use; it stays in use while its lease is lost, until another is ours. */
  get subnet(): Prefix | undefined {
    return this.#life?.inUse === true ? this.#life.subnet : undefined;
  }

  /** Milliseconds until the lease ends if it is not renewed; undefined for a reservation. */
  get endsInMs(): number | undefined {
    const expires = this.#life?.expires;
    return expires === undefined ? undefined : expires - this.#world.clock.uptime();
  }

  /** Sees to it that we hold a subnet of this network, with these attributes. Costs nothing if nothing changed. */
  keep(network: Network, attributes: LeaseAttributes): void {
    if (this.#life === undefined) {
      const { previous, renewMarginMs: marginMs, leaseTtlSeconds: ttlSeconds } = this.#wish;
      const terms = { network, attributes, previous, marginMs };
      this.#life = newLeaseLife(ttlSeconds === undefined ? terms : { ...terms, ttlSeconds });
      this.#take({ kind: "start" });
      return;
    }
    if (this.#life.network !== network) this.#take({ kind: "network", network });
    if (!sameAttributes(this.#life.attributes, attributes)) this.#take({ kind: "attributes", attributes });
  }

  /** To be told of every event of the store. */
  onStore(event: StoreEvent): void {
    this.#note(event);
    this.#take(event);
  }

  #note(event: StoreEvent): void {
    if (this.#told === undefined) return;
    if (event.kind === "reset") this.#told.clear();
    if (event.kind === "reset" || event.kind === "synced") this.#toldAll = event.kind === "synced";
    if (event.kind !== "put" && event.kind !== "delete") return;
    if (!event.key.startsWith(SUBNETS)) return;
    const key = event.key.slice(SUBNETS.length);
    if (event.kind === "delete") this.#told.delete(key);
    else this.#told.set(key, { key, value: event.value, revision: event.revision, leaseId: event.leaseId });
  }

  stop(): void {
    this.#stopped = true;
    this.#cancelTick?.();
  }

  #take(event: LeaseEvent): void {
    if (this.#life === undefined || this.#stopped) return;
    const { life, actions } = step(this.#life, event, this.#world.clock.uptime());
    this.#life = life;
    for (const action of actions) this.#act(action);
  }

  #act(action: LeaseAction): void {
    const { store, clock, log, random, observer } = this.#world;
    switch (action.kind) {
      case "wait":
        this.#cancelTick?.();
        this.#cancelTick = clock.after(Math.max(0, action.until - clock.uptime()), () =>
          this.#take({ kind: "tick" }),
        );
        return;
      case "use":
        this.#onUse();
        return;
      case "report": {
        // An outage of hours is one line.
        const isRepeated = action.what === this.#report && REPEATED.has(action.what);
        const usual = action.what === "acquired" || action.what === "renewed" ? "info" : "warn";
        log[isRepeated ? "debug" : usual]({ lease: action.what }, action.message);
        this.#report = action.what;
        observer.lease(action.what);
        return;
      }
      case "list": {
        const told = this.#told;
        this.#told = undefined;
        if (told !== undefined && this.#toldAll && action.doubted === undefined) {
          this.#take({ kind: "listed", records: [...told.values()], random: random(), isGone: false });
          return;
        }
        this.#answer(
          store.list(SUBNETS).then(async ({ records }) => ({
            kind: "listed",
            records: records.map((record) => ({ ...record, key: record.key.slice(SUBNETS.length) })),
            random: random(),
            isGone: action.doubted !== undefined && (await this.#isGone(action.doubted)),
          })),
        );
        return;
      }
      case "create":
        this.#answer(
          store
            .create(`${SUBNETS}${action.key}`, action.value, action.ttlSeconds)
            .then((result) => (result.created ? { kind: "done", ...result } : { kind: "conflict" })),
        );
        return;
      case "renew": {
        const term =
          action.ttlSeconds === 0 ? { reservation: true as const } : { ttlSeconds: action.ttlSeconds };
        this.#answer(
          store
            .renew(`${SUBNETS}${action.key}`, action.value, { expectRevision: action.expect, ...term })
            .then((result) => (result.renewed ? { kind: "done", ...result } : { kind: "conflict" })),
        );
        return;
      }
      case "delete":
        this.#answer(
          store
            .remove(`${SUBNETS}${action.key}`, action.expect)
            .then((result) =>
              result.removed ? { kind: "done", revision: 0n, leaseId: "0" } : { kind: "conflict" },
            ),
        );
        return;
    }
  }

  /** Whether etcd knows of no such lease. A subnet is not given up because etcd did not answer. */
  #isGone(leaseId: string): Promise<boolean> {
    return this.#world.store.timeToLive(leaseId).then(
      (seconds) => seconds === undefined,
      () => false,
    );
  }

  #answer(answer: Promise<LeaseEvent>): void {
    answer.then(
      (event) => this.#take(event),
      (error: unknown) =>
        this.#take({ kind: "failed", reason: error instanceof Error ? error.message : String(error) }),
    );
  }
}
