/**
 * The events of the programs in force: packets that they dropped, and flows that they left to the stack.
 *
 * A ring has one reader, and whoever opens it takes what is in it: see that there is only one. Reading it is what
 * switches the events on, for as long as `renew` is called.
 */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { type BpfMap, codec, openPinnedMap, RingBuffer } from "../../loader/index.ts";
import { eventLayout, Hook, maps, Verdict } from "../abi/twill.gen.ts";

/** A packet that the programs tell of. */
export interface PacketEvent {
  /** Nanoseconds since boot. */
  readonly timeNs: bigint;
  readonly ifindex: number;
  /** As `twill status` names them: `from_net`, `drop_forged`. */
  readonly hook: string;
  readonly verdict: string;
  /** Bytes of the packet from its Ethernet header on. */
  readonly length: number;
  /** The first of them. */
  readonly bytes: Uint8Array;
}

/** Events that were not reported, since the last time of asking. */
export interface Missed {
  /** Beyond what a processor may report. */
  readonly suppressed: number;
  /** The ring was full. */
  readonly lost: number;
}

/** Seconds that the switch stays on after it was renewed last. */
const WATCH_SECONDS = 5;
const FIRST = new Uint8Array(4);

const events = codec(eventLayout);
const watches = codec(maps.watch.value);
const budgets = codec(maps.event_budget.value);

/** `HOOK_FROM_NET` is `from_net`, `VERDICT_DROP_FORGED` is `drop_forged`. */
const plain = (name: string): string => name.slice(name.indexOf("_") + 1).toLowerCase();

/** The names of all hooks, and of the verdicts that events have. */
export const HOOKS = Object.keys(Hook)
  .map(plain)
  .filter((name) => name !== "count");
export const EVENT_VERDICTS = Object.keys(Verdict)
  .map(plain)
  .filter((name) => name.startsWith("drop_") || name === "stack_flow");

/** The reading end of the events at a pin path. */
export class EventStream {
  readonly #pinPath: string;
  readonly #events: BpfMap;
  readonly #watch: BpfMap;
  readonly #budget: BpfMap;
  readonly #ring: RingBuffer;
  #closed = false;
  #missed: { suppressed: bigint; lost: bigint };

  /** Whether the programs at a pin path have events at all; those of an earlier version have not. */
  static isAt(pinPath: string): boolean {
    return existsSync(join(pinPath, "events"));
  }

  /** Switches the events on and hands each to `onEvent`; not those from before. */
  constructor(pinPath: string, onEvent: (event: PacketEvent) => void) {
    this.#pinPath = pinPath;
    this.#events = openPinnedMap(join(pinPath, "events"));
    this.#watch = openPinnedMap(join(pinPath, "watch"));
    this.#budget = openPinnedMap(join(pinPath, "event_budget"));
    const since = process.hrtime.bigint();
    this.#missed = this.#total();
    this.#ring = new RingBuffer(this.#events, (record) => {
      const { time_ns, ifindex, hook, verdict, length, captured, bytes } = events.decode(record);
      // A reader that died left something behind.
      if (time_ns < since) return;
      onEvent({
        timeNs: time_ns,
        ifindex,
        hook: plain(hook),
        verdict: plain(verdict),
        length,
        bytes: bytes.slice(0, captured),
      });
    });
    this.renew();
  }

  /** Keeps the events switched on for five seconds more. */
  renew(): void {
    const until_ns = process.hrtime.bigint() + BigInt(WATCH_SECONDS) * 1_000_000_000n;
    this.#watch.update(FIRST, watches.encode({ until_ns }));
  }

  /** Whether these are still the events of what is pinned: programs of another layout have a ring of their own. */
  isCurrent(): boolean {
    if (!EventStream.isAt(this.#pinPath)) return false;
    const pinned = openPinnedMap(join(this.#pinPath, "events"));
    try {
      return pinned.id === this.#events.id;
    } finally {
      pinned.close();
    }
  }

  missed(): Missed {
    const before = this.#missed;
    this.#missed = this.#total();
    return {
      suppressed: Number(this.#missed.suppressed - before.suppressed),
      lost: Number(this.#missed.lost - before.lost),
    };
  }

  /** Switches the events off. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#watch.update(FIRST, watches.encode({ until_ns: 0n }));
    this.#ring.close();
    for (const map of [this.#events, this.#watch, this.#budget]) map.close();
  }

  #total(): { suppressed: bigint; lost: bigint } {
    const sum = { suppressed: 0n, lost: 0n };
    for (const bytes of this.#budget.lookupPerCpu(FIRST) ?? []) {
      const { suppressed, lost } = budgets.decode(bytes);
      sum.suppressed += suppressed;
      sum.lost += lost;
    }
    return sum;
  }
}
