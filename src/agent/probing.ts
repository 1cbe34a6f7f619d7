/**
 * Asks peers whether they answer, one after the other, and tells when one ceases to and when it is back. Nothing
 * else depends on it: a node that may not ask goes on without.
 */
import { formatCidr, formatIpv4, type Ipv4 } from "../core/ipv4.ts";
import { type PeerHealth, PeerProbes, PROBE_DEADLINE_MS } from "../core/probes.ts";
import type { Prober, World } from "../core/world.ts";

/** What `twill status` shows of probes. */
export interface ProbeStatus {
  readonly everySeconds: number;
  /** Address that asks. */
  readonly source: string | undefined;
  readonly reachable: number;
  readonly unreachable: number;
  readonly unknown: number;
  /** Why nobody is asked; undefined while all is well. */
  readonly problem: string | undefined;
}

/** After a socket could not be opened. */
const REOPEN_MS = 10_000;
/** More peers than that are not named one by one in the log: what is unreachable then is this node. */
const NAMED_PEERS = 10;

export class Probing {
  readonly peers: PeerProbes;
  readonly #world: World;
  readonly #open: NonNullable<World["openProber"]>;
  readonly #periodMs: number;
  #source: Ipv4 | undefined;
  #prober: Prober | undefined;
  #problem: string | undefined;
  #cancel: (() => void) | undefined;
  #stopped = false;

  constructor(world: World, open: NonNullable<World["openProber"]>, periodMs: number) {
    this.#world = world;
    this.#open = open;
    this.#periodMs = periodMs;
    this.peers = new PeerProbes(periodMs);
  }

  /** Asks from this address from now on. */
  aim(source: Ipv4): void {
    if (source !== this.#source) {
      this.#prober?.close();
      this.#prober = undefined;
      this.#source = source;
    }
    if (this.#cancel === undefined) this.#schedule(this.peers.pauseMs(this.#world.random()));
  }

  stop(): void {
    this.#stopped = true;
    this.#cancel?.();
    this.#prober?.close();
  }

  status(): ProbeStatus {
    return {
      everySeconds: this.#periodMs / 1000,
      source: this.#source === undefined ? undefined : formatIpv4(this.#source),
      ...this.peers.counts,
      problem: this.#problem,
    };
  }

  #schedule(ms: number): void {
    this.#cancel = this.#world.clock.after(ms, () => this.#turn());
  }

  #turn(): void {
    if (this.#stopped || this.#source === undefined) return;
    this.#prober ??= this.#tryOpen(this.#source);
    const prober = this.#prober;
    this.#schedule(prober === undefined ? REOPEN_MS : this.peers.pauseMs(this.#world.random()));
    if (prober === undefined) return;
    for (let left = this.peers.together; left > 0; left -= 1) {
      const peer = this.peers.next();
      if (peer !== undefined) void this.#ask(prober, peer);
    }
  }

  #tryOpen(source: Ipv4): Prober | undefined {
    const { log, observer } = this.#world;
    let problem: string | undefined;
    try {
      return this.#open(source);
    } catch (error) {
      problem = error instanceof Error ? error.message : String(error);
      return undefined;
    } finally {
      if (problem !== this.#problem) {
        if (problem !== undefined) log.warn({}, `peers are not probed: ${problem}`);
        this.#problem = problem;
        observer.changed();
      }
    }
  }

  async #ask(prober: Prober, peer: PeerHealth): Promise<void> {
    const { clock, observer, log } = this.#world;
    const answer = await prober.probe(peer.target, PROBE_DEADLINE_MS);
    if (this.#stopped) return;
    const answered = "rttMs" in answer;
    observer.probed?.(answered ? answer.rttMs / 1000 : undefined);
    const isNews = answered
      ? this.peers.answered(peer, answer.rttMs, clock.now())
      : this.peers.lost(peer, answer.lost);
    if (!isNews) return;
    observer.changed();
    const fields = { subnet: formatCidr(peer.subnet), peer: formatIpv4(peer.publicIp) };
    const named = this.peers.counts.unreachable <= NAMED_PEERS;
    if (answered) log[named ? "info" : "debug"](fields, "the peer answers");
    else log[named ? "warn" : "debug"]({ ...fields, reason: answer.lost }, "the peer does not answer");
  }
}
