/**
 * The nodes of a fleet, many to a process: `bench/fleet.ts` starts it and tells it what to do.
 *
 * Each has what a node has towards etcd, and it is the real thing: `src/edge/etcd.ts` with a watch of its own, the lease
 * kept by `src/agent/lease.ts`, and what the store tells folded into a `Desired` of its own. There is no kernel. Where
 * that would be too many leases for one memory (nodes times leases), only some nodes fold; the others take from the watch
 * what their own lease needs.
 */
import { setTimeout as sleep } from "node:timers/promises";
import { LeaseKeeper } from "../src/agent/lease.ts";
import { kindOf } from "../src/core/backends.ts";
import { claim, type Desired, emptyDesired, fold, takeTouched } from "../src/core/desired.ts";
import { formatIpv4, type Prefix } from "../src/core/ipv4.ts";
import type { Network, StoreEvent } from "../src/core/model.ts";
import type { World } from "../src/core/world.ts";
import { openStore, type Store } from "../src/edge/etcd.ts";
import type { NodesOrder, NodesReading } from "./fleet.ts";
import { serve } from "./worker.ts";

/** Leases that all nodes together hold in memory; at some 600 bytes each. */
const FOLDED_MAX = 2_000_000;
/** The time before a lease's end at which it is renewed, as with twilld. */
const MARGIN_MS = 3_600_000;
/** The first node's address; in a network of its own, beside the pods'. */
const FIRST_ADDRESS = 0xac100001;
/**
 * Where the first connection finds etcd. Each has an address of its own there, as gRPC shares connections to one address
 * within a process, and goes through all of them to find out.
 */
const FIRST_ENDPOINT = 0x7f010001;

const PREFIX = "/coreos.com/network";
const quiet = {
  debug: () => undefined,
  info: () => undefined,
  warn: () => undefined,
  error: () => undefined,
};

/** Milliseconds of the clock that all processes of the machine share. */
const now = (): number => Number(process.hrtime.bigint()) / 1e6;

/** When the write of each key was asked for last. */
const asked = new Map<string, number>();
/** How often it took so long from asking for a write until it was in the desired state of another node, by `stepOf`. */
const delays = new Map<number, number>();
let events = 0;
let failures = 0;
let interruptions = 0;
let folding = 0;

/** A clock that can be put forward, so that a day's renewals come when they are wanted. */
class NodeClock {
  #ahead = 0;
  readonly #due = new Map<NodeJS.Timeout, { readonly at: number; readonly callback: () => void }>();

  now(): number {
    return now() + this.#ahead;
  }

  uptime(): number {
    return this.now();
  }

  after(ms: number, callback: () => void): () => void {
    const timer = setTimeout(() => {
      this.#due.delete(timer);
      callback();
    }, Math.ceil(ms));
    this.#due.set(timer, { at: this.now() + ms, callback });
    return () => {
      clearTimeout(timer);
      this.#due.delete(timer);
    };
  }

  skip(ms: number): void {
    this.#ahead += ms;
    for (const [timer, { at, callback }] of [...this.#due]) {
      if (at > this.now()) continue;
      clearTimeout(timer);
      this.#due.delete(timer);
      callback();
    }
  }
}

/** Delays that differ by less than 2 % are alike. */
const stepOf = (ms: number): number => Math.round(50 * Math.log(Math.max(0.001, ms)));
const delayOf = (step: number): number => Math.exp(step / 50);

class FleetNode {
  readonly #number: number;
  readonly #folds: boolean;
  readonly #endpoint: string;
  readonly #clock = new NodeClock();
  #macs = 0;
  #network: Network | undefined;
  #desired: Desired = emptyDesired();
  #store: Store | undefined;
  #keeper: LeaseKeeper | undefined;
  #stopping = new AbortController();
  #watching: Promise<void> = Promise.resolve();
  #synced = false;
  /** Revision up to which the watch has told. */
  revision = 0n;
  #isBooted: () => void = () => undefined;
  #isWritten: () => void = () => undefined;
  #isSynced: () => void = () => undefined;

  constructor(number: number, folds: boolean, endpoint: string) {
    this.#number = number;
    this.#folds = folds;
    this.#endpoint = endpoint;
  }

  get #attributes() {
    if (this.#network === undefined) throw new Error("there is no network config yet");
    const publicIp = FIRST_ADDRESS + this.#number;
    const bytes = [this.#macs, this.#number >> 16, this.#number >> 8, this.#number];
    const mac = `02:54:${bytes.map((byte) => (byte & 255).toString(16).padStart(2, "0")).join(":")}`;
    return kindOf(this.#network.backend).attributes({ publicIp, uplink: publicIp, mac });
  }

  /** As a twilld that starts; resolves when it has a subnet. */
  async boot(previous?: Prefix): Promise<void> {
    const booted = new Promise<void>((resolve) => {
      this.#isBooted = resolve;
    });
    this.#stopping = new AbortController();
    this.#desired = emptyDesired();
    this.#synced = false;
    const store = await openStore({
      endpoints: [this.#endpoint],
      prefix: PREFIX,
      log: quiet,
      onState: ({ connected }) => {
        if (connected) return;
        interruptions += 1;
        // They would read everything again at once, over and over.
        if (interruptions <= nodes.length / 100) return;
        process.stderr.write(
          "fleet: the nodes lose their connections, as their process is too slow; give a smaller --at-once\n",
        );
        process.exit(1);
      },
    });
    this.#store = store;
    this.#keeper = new LeaseKeeper({ previous, renewMarginMs: MARGIN_MS }, this.#world(store), () =>
      this.#use(),
    );
    this.#watching = this.#watch(store, this.#stopping.signal);
    await booted;
  }

  /** Ends it and starts it again, with the subnet that its subnet.env names. */
  async restart(): Promise<void> {
    const previous = this.#keeper?.subnet;
    this.#keeper?.stop();
    this.#stopping.abort();
    await this.#watching;
    this.#store?.close();
    await this.boot(previous);
  }

  /** Has the watch begin anew, from a snapshot; resolves when that is read. */
  async reread(): Promise<void> {
    const synced = new Promise<void>((resolve) => {
      this.#isSynced = resolve;
    });
    this.#store?.reconnect();
    await synced;
  }

  /** Publishes another MAC, as a node does whose tunnel device was made anew; resolves when that is written. */
  async change(): Promise<void> {
    const written = this.#write();
    this.#macs += 1;
    if (this.#network !== undefined) this.#keeper?.keep(this.#network, this.#attributes);
    await written;
  }

  /** Lets the time pass until the lease is due; resolves when it is renewed. */
  async renew(): Promise<void> {
    const written = this.#write();
    this.#clock.skip(Math.max(0, (this.#keeper?.endsInMs ?? 0) - MARGIN_MS) + 1000);
    await written;
  }

  #write(): Promise<void> {
    return new Promise((resolve) => {
      this.#isWritten = resolve;
    });
  }

  async #watch(store: Store, signal: AbortSignal): Promise<void> {
    for await (const event of store.watch(signal)) this.#take(event);
  }

  #take(event: StoreEvent): void {
    if (this.#folds || event.kind === "synced" || ("key" in event && event.key === "config")) {
      this.#desired = fold(this.#desired, event);
      takeTouched(this.#desired);
    }
    if (event.kind !== "reset" && event.revision > this.revision) this.revision = event.revision;
    if (this.#synced && event.kind === "put") {
      events += 1;
      const at = this.#folds ? asked.get(event.key) : undefined;
      if (at !== undefined) {
        const step = stepOf(now() - at);
        delays.set(step, (delays.get(step) ?? 0) + 1);
      }
    }
    this.#keeper?.onStore(event);
    if (event.kind === "reset") this.#synced = false;
    if (event.kind !== "synced") return;
    this.#synced = true;
    this.#network = this.#desired.network;
    if (this.#network !== undefined) this.#keeper?.keep(this.#network, this.#attributes);
    this.#isSynced();
  }

  #use(): void {
    const subnet = this.#keeper?.subnet;
    if (subnet === undefined) return;
    this.#desired = claim(this.#desired, { subnet, publicIp: FIRST_ADDRESS + this.#number });
    this.#isBooted();
  }

  #world(store: Store): Pick<World, "store" | "clock" | "log" | "random" | "observer"> {
    return {
      store: {
        ...forwarding(store),
        create: (key, ...rest) => {
          asked.set(key, now());
          return store.create(key, ...rest);
        },
        renew: async (key, ...rest) => {
          asked.set(key, now());
          const answer = await store.renew(key, ...rest);
          if (answer.renewed) this.#isWritten();
          return answer;
        },
      },
      clock: this.#clock,
      log: quiet,
      random: Math.random,
      observer: {
        reconciled: () => undefined,
        repaired: () => undefined,
        failed: () => undefined,
        changed: () => undefined,
        ready: () => undefined,
        lease: (what) => {
          if (what !== "acquired" && what !== "renewed") failures += 1;
        },
      },
    };
  }
}

/** The calls of a store that need no look at them. */
function forwarding(store: Store): Pick<World["store"], "list" | "remove" | "timeToLive" | "reconnect"> {
  return {
    list: (prefix) => store.list(prefix),
    remove: (key, expectRevision) => store.remove(key, expectRevision),
    timeToLive: (leaseId) => store.timeToLive(leaseId),
    reconnect: () => store.reconnect(),
  };
}

const nodes: FleetNode[] = [];

/** Does it to these nodes, `atOnce` at a time. */
async function each(
  some: readonly FleetNode[],
  atOnce: number,
  what: (node: FleetNode) => Promise<void>,
): Promise<void> {
  let next = 0;
  const worker = async (): Promise<void> => {
    for (let node = some[next++]; node !== undefined; node = some[next++]) await what(node);
  };
  await Promise.all(Array.from({ length: atOnce }, worker));
}

/** Does it to these nodes, spread evenly over so many seconds; other processes do it in between. */
async function spread(
  some: readonly FleetNode[],
  { seconds, offset }: { readonly seconds: number; readonly offset: number },
  what: (node: FleetNode) => Promise<void>,
): Promise<void> {
  const began = now();
  const done: Promise<void>[] = [];
  for (const [index, node] of some.entries()) {
    await sleep(Math.max(0, began + ((index + offset) * seconds * 1000) / some.length - now()));
    done.push(what(node));
  }
  await sleep(Math.max(0, began + seconds * 1000 - now()));
  await Promise.all(done);
}

/** Waits until the watch of each node has told of this revision. Looking at every event would cost what is measured. */
async function caughtUp(revision: bigint): Promise<void> {
  while (nodes.some((node) => node.revision < revision)) await sleep(20);
}

async function obey(order: NodesOrder): Promise<NodesReading | undefined> {
  const some = (count: number): FleetNode[] => {
    const step = Math.max(1, Math.floor(nodes.length / count));
    return nodes.filter((_, index) => index % step === 0).slice(0, count);
  };
  switch (order.do) {
    case "boot": {
      const { first, count, ofAll, connections, atOnce } = order;
      const most = Math.min(ofAll, Math.floor(FOLDED_MAX / ofAll));
      for (let n = first; n < first + count; n++) {
        const folds = Math.floor((n * most) / ofAll) !== Math.floor(((n + 1) * most) / ofAll);
        if (folds) folding += 1;
        const endpoint = `http://${formatIpv4(FIRST_ENDPOINT + (n % connections))}:2379`;
        nodes.push(new FleetNode(n, folds, endpoint));
      }
      await each(nodes, atOnce, (node) => node.boot());
      return undefined;
    }
    case "restart":
      await each(some(order.count), order.atOnce, (node) => node.restart());
      return undefined;
    case "reread":
      await each(some(order.count), order.atOnce, (node) => node.reread());
      return undefined;
    case "change":
      await spread(some(order.count), order, (node) => node.change());
      return undefined;
    case "renew":
      await spread(some(order.count), order, (node) => node.renew());
      return undefined;
    case "catch up":
      await caughtUp(BigInt(order.revision));
      return undefined;
    case "read": {
      const { user, system } = process.cpuUsage();
      const reading: NodesReading = {
        processorSeconds: (user + system) / 1e6,
        events,
        failures,
        interruptions,
        folding,
        delays: [...delays].map(([step, times]) => [delayOf(step), times]),
        asked: [...asked],
      };
      delays.clear();
      asked.clear();
      return reading;
    }
  }
}

serve(obey);
