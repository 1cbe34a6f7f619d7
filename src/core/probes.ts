/**
 * Which peers answer: whose turn it is to be asked, and what came of it. Who asks, and when, is not decided here.
 *
 * Every peer is asked once in a period, and never are more than PROBES_PER_SECOND asked in a second, however many
 * there are: with 10,000 of them and a period of 10 s, each is asked every 200 s. Those that did not answer the last
 * time have every other turn, so that a peer that is gone is known sooner, and one that is back as well. A peer that
 * is asked and has neither answered nor let its time pass is not asked again. Where turns would follow one another fast,
 * several peers have theirs together: waking up costs more than a question.
 */
import { kindOf } from "./backends.ts";
import type { Facts } from "./image.ts";
import type { Ipv4, Prefix } from "./ipv4.ts";
import type { Lease } from "./model.ts";

/** Over all peers. An echo and its answer in the tunnel are some 300 bytes on the wire: 15 kB/s at most. */
export const PROBES_PER_SECOND = 50;
/** Turns that would come within this time are taken together. */
const TOGETHER_MS = 200;
/** An answer that comes later is none. */
export const PROBE_DEADLINE_MS = 1000;
/** Answers that must be missing in a row. */
export const UNREACHABLE_AFTER = 3;
/** Share of a new round trip in the smoothed one, as TCP has it (RFC 6298). */
const SMOOTHING = 1 / 8;

/** `unknown`: neither an answer nor enough missing ones since this daemon knows the peer. */
export type Reachability = "unknown" | "reachable" | "unreachable";
export const REACHABILITIES: readonly Reachability[] = ["reachable", "unreachable", "unknown"];

/** How one peer is. Times are milliseconds of the caller's clock. */
export interface PeerHealth {
  readonly key: string;
  readonly subnet: Prefix;
  readonly publicIp: Ipv4;
  /** Address that is asked. */
  readonly target: Ipv4;
  readonly state: Reachability;
  /** Answers missing in a row. */
  readonly losses: number;
  /** Why the last answer was missing. */
  readonly reason: string | undefined;
  /** Round trip of the last answer, and smoothed, in milliseconds. */
  readonly rttMs: number | undefined;
  readonly smoothedMs: number | undefined;
  readonly answeredAt: number | undefined;
}

/**
 * What is asked of a peer: its address within the overlay, which takes the tunnel, or else the node's own. A peer of
 * another backend may have no other.
 */
export function probeTargetOf(lease: Lease, facts: Facts): Ipv4 {
  const isOther = kindOf(facts.network.backend).refuses(lease) !== undefined;
  return facts.overlay === undefined || isOther ? lease.publicIp : lease.subnet.address;
}

/** The address that asks, to which the answer comes back the same way. */
export function probeSourceOf(facts: Facts): Ipv4 {
  return facts.overlay === undefined ? facts.uplink.address : facts.subnet.address;
}

/** Goes round a set that may change meanwhile. */
class Ring<T> {
  readonly members = new Set<T>();
  #at = this.members.values();

  next(): T | undefined {
    let step = this.#at.next();
    if (step.done === true) {
      this.#at = this.members.values();
      step = this.#at.next();
    }
    return step.done === true ? undefined : step.value;
  }
}

type Entry = { -readonly [K in keyof PeerHealth]: PeerHealth[K] } & { asked: boolean };

/** The peers to be asked, and how they are. Each call costs the same however many peers there are. */
export class PeerProbes {
  readonly #periodMs: number;
  readonly #entries = new Map<string, Entry>();
  readonly #all = new Ring<Entry>();
  /** Those whose last answer was missing. */
  readonly #missing = new Ring<Entry>();
  readonly #counts: Record<Reachability, number> = { reachable: 0, unreachable: 0, unknown: 0 };
  #missingNext = false;

  /** Each peer is asked once in `periodMs`, unless there are too many. */
  constructor(periodMs: number) {
    this.#periodMs = periodMs;
  }

  get size(): number {
    return this.#entries.size;
  }

  get counts(): Readonly<Record<Reachability, number>> {
    return this.#counts;
  }

  peers(): Iterable<PeerHealth> {
    return this.#entries.values();
  }

  /** A peer is to be asked. What is known of it stays known unless its address is another. */
  want(key: string, peer: Pick<PeerHealth, "subnet" | "publicIp" | "target">): void {
    const { subnet, publicIp, target } = peer;
    const before = this.#entries.get(key);
    if (before !== undefined && before.target === target && before.publicIp === publicIp) return;
    this.unwant(key);
    const entry: Entry = {
      ...{ key, subnet, publicIp, target, state: "unknown", losses: 0, asked: false },
      ...{ reason: undefined, rttMs: undefined, smoothedMs: undefined, answeredAt: undefined },
    };
    this.#entries.set(key, entry);
    this.#all.members.add(entry);
    this.#counts.unknown += 1;
  }

  unwant(key: string): void {
    const entry = this.#entries.get(key);
    if (entry === undefined) return;
    this.#entries.delete(key);
    this.#all.members.delete(entry);
    this.#missing.members.delete(entry);
    this.#counts[entry.state] -= 1;
  }

  /** How many turns are to be taken together. */
  get together(): number {
    return Math.max(1, Math.floor(TOGETHER_MS / this.#evenMs));
  }

  /**
   * Milliseconds until `together` turns are to be taken again; `random`, in [0, 1), keeps nodes that started together from
   * asking together.
   */
  pauseMs(random: number): number {
    return this.#evenMs * this.together * (0.5 + random);
  }

  /** Between two turns, if they were taken one by one and evenly. */
  get #evenMs(): number {
    const turns = this.#all.members.size + this.#missing.members.size;
    return Math.max(this.#periodMs / Math.max(1, turns), 1000 / PROBES_PER_SECOND);
  }

  /** Whom to ask now; undefined if nobody. Each is to be followed by `answered` or `lost` of the same peer. */
  next(): PeerHealth | undefined {
    this.#missingNext = !this.#missingNext;
    const entry = (this.#missingNext ? this.#missing.next() : undefined) ?? this.#all.next();
    if (entry === undefined || entry.asked) return undefined;
    entry.asked = true;
    return entry;
  }

  /** Returns whether the peer's state is another now. */
  answered(peer: PeerHealth, rttMs: number, now: number): boolean {
    const entry = this.#inForce(peer);
    if (entry === undefined) return false;
    entry.losses = 0;
    entry.reason = undefined;
    entry.rttMs = rttMs;
    entry.smoothedMs =
      entry.smoothedMs === undefined ? rttMs : entry.smoothedMs + SMOOTHING * (rttMs - entry.smoothedMs);
    entry.answeredAt = now;
    this.#missing.members.delete(entry);
    return this.#become(entry, "reachable");
  }

  /** Returns whether the peer's state is another now. */
  lost(peer: PeerHealth, reason: string): boolean {
    const entry = this.#inForce(peer);
    if (entry === undefined) return false;
    entry.losses += 1;
    entry.reason = reason;
    this.#missing.members.add(entry);
    return entry.losses >= UNREACHABLE_AFTER && this.#become(entry, "unreachable");
  }

  /** Undefined for a peer that went, or came anew, while it was asked. */
  #inForce(peer: PeerHealth): Entry | undefined {
    const entry = this.#entries.get(peer.key);
    if (entry === undefined || entry !== peer) return undefined;
    entry.asked = false;
    return entry;
  }

  #become(entry: Entry, state: Reachability): boolean {
    if (entry.state === state) return false;
    this.#counts[entry.state] -= 1;
    this.#counts[state] += 1;
    entry.state = state;
    return true;
  }
}
