/**
 * The one loop. Whatever happens (a lease, a route that was deleted, a container that started, time) only marks
 * what is to be looked at; then one round makes the kernel as it ought to be:
 *
 *   store events -> desired -> rows wanted  \
 *                                            > differences -> kernel -> rows observed
 *   netlink      -> host    -> rows observed /
 *
 * A round adds before it removes: whoever holds a row finds what it refers to. What fails stays different, is
 * tried again with growing pauses, and is listed in the status; nothing else waits for it. Nothing is written
 * before the first full snapshot, and silence of the store changes nothing.
 */
import { Attempts, RoundFailure, reasonOf } from "./agent/attempts.ts";
import { Chore, type Steps } from "./agent/chore.ts";
import { Commands } from "./agent/commands.ts";
import { type Overlay, TunnelDevice } from "./agent/device.ts";
import { type Judgement, Judging } from "./agent/judging.ts";
import { LeaseKeeper } from "./agent/lease.ts";
import { Paths } from "./agent/paths.ts";
import { type ProbeStatus, Probing } from "./agent/probing.ts";
import { survey, type View, viewOf } from "./agent/survey.ts";
import { FDB, NEIGHBOURS, type RowWrites, routeWrites, Writer } from "./agent/writer.ts";
import { directRows, NO_ROWS } from "./core/backend.ts";
import { kindOf } from "./core/backends.ts";
import { claim, type Desired, emptyDesired, foldInSteps, forget, takeTouched } from "./core/desired.ts";
import type { Firewall } from "./core/firewall.ts";
import {
  type FdbEntry,
  Host,
  type HostEvent,
  type HostRows,
  type HostTable,
  isEthernet,
  type Link,
  type Neighbour,
  type NetlinkEvent,
  type Route,
} from "./core/host.ts";
import {
  type AttachmentRow,
  attachmentKey,
  attachmentsOf,
  configOf,
  DIRECTIONS,
  type EndpointRow,
  endpointKey,
  type Facts,
  type FastPath,
  type FdbRow,
  fdbKey,
  type Hook,
  type InterfaceRow,
  interfaceKey,
  type LeaseRows,
  type NeighbourRow,
  neighbourKey,
  type PeerRow,
  type ProgramConfig,
  peerKey,
  ROUTE_PROTOCOL,
  type RouteRow,
  routeKey,
  rowsOf,
  type SubnetRow,
  subnetKey,
} from "./core/image.ts";
import { chooseUplink, type Uplink, type UplinkWish } from "./core/interfaces.ts";
import { contains, formatCidr, formatIpv4, type Ipv4, type Prefix } from "./core/ipv4.ts";
import {
  type ExcludedRow,
  excludedOf,
  type Masquerade,
  type UplinkRow,
  uplinkKey,
  uplinksOf,
  withFormersOnHost,
} from "./core/masquerade.ts";
import type { Lease, Mac, Network, StoreEvent } from "./core/model.ts";
import { findPods, NO_PODS, type Pods } from "./core/pods.ts";
import { type PeerHealth, probeSourceOf, probeTargetOf } from "./core/probes.ts";
import { formatSubnetFile } from "./core/subnetfile.ts";
import { Table } from "./core/table.ts";
import type { MapRows, World } from "./core/world.ts";

export interface AgentOptions {
  readonly wish: UplinkWish;
  /** How long before its end a lease is renewed. */
  readonly renewMarginMs: number;
  /** Default: a day. */
  readonly leaseTtlSeconds?: number;
  /** The subnet of a former run. */
  readonly previous: Prefix | undefined;
  readonly fastPath: FastPath;
  /** What comes from outside the network is let in to pods past the policy that Docker sets. */
  readonly forwardRules?: boolean;
  readonly ipMasq: boolean;
  /** Undefined without --ip-masq. */
  readonly masquerade?: Masquerade | undefined;
  readonly blackholeRoute: boolean;
  /** A changed network config takes effect at once; default true. */
  readonly followConfig?: boolean;
  readonly resyncMs: number;
  readonly sourcePorts: { readonly min: number; readonly max: number };
  readonly ttl: number;
  /** How often each peer is asked whether it answers; undefined for never. */
  readonly probeMs?: number | undefined;
  /** What goes to each peer and comes from it is counted. */
  readonly countPeers?: boolean;
}

/** Why the agent can't go on; the process ends with exit code 1, forwarding left as it is. */
export class FatalError extends Error {
  override readonly name = "FatalError";
}

/** What `twill status` and the metrics show. */
export interface AgentStatus {
  readonly phase:
    | "waiting for etcd"
    | "waiting for the network config"
    | "waiting for a subnet"
    | "forwarding";
  readonly ready: boolean;
  readonly network: Network | undefined;
  readonly uplink: { readonly name: string; readonly address: string; readonly publicIp: string } | undefined;
  readonly device: string | undefined;
  readonly subnet: string | undefined;
  readonly mtu: number | undefined;
  /** Milliseconds from now until the lease ends; undefined for a reservation. */
  readonly leaseEndsInMs: number | undefined;
  readonly revision: bigint;
  readonly peers: number;
  readonly ignored: readonly { readonly key: string; readonly reason: string }[];
  readonly endpoints: number;
  readonly rejections: readonly { readonly key: string; readonly reason: string }[];
  readonly warnings: readonly string[];
  /** What `--fast-path=auto` has come to; undefined with another setting, and before there is a subnet. */
  readonly firewall: Judgement | undefined;
  readonly failures: readonly { readonly what: string; readonly reason: string }[];
  /** How many peers answer; undefined if they are not asked. */
  readonly probes: ProbeStatus | undefined;
}

const RETRY_MIN_MS = 100;
const RETRY_MAX_MS = 30_000;
/** How long a lease that a snapshot lacks stays in force; nodes notice within some seconds that theirs is gone. */
const FORGET_MS = 30_000;
/**
 * How much later than it could a peer that was reached without a tunnel is sent to through one. A node that moves says so
 * in its lease before its programs and its device are there to open what comes; without a tunnel it takes packets all
 * the while. That is a second, on a machine that has other things to do as well.
 */
const HOLD_MS = 5_000;
/** The shortest time between two reads of the peers' maps because packets were refused. */
const REFUSED_MS = 500;
/**
 * A resync reads the kernel's tables, of whose changes we are told anyway, only as often as that takes no more than this
 * share of the time: with a few peers every other time, with some ten thousand as rarely as at all, every ten minutes. The
 * maps it reads back each time while they are small. Where the stack does without a row, they take no more than their own
 * share: with some ten thousand peers every other time.
 */
const SURVEY_SHARE = 1 / 4000;
const SURVEY_AT_LEAST_MS = 600_000;
/** What it takes at least for each lease, also of rows that were not there yet the last time: who has just written them all
 * need not read them all. */
const SURVEY_LEASE_MS = 0.03;
const MAPS_SHARE = 1 / 1000;
/** What the rest builds on, and what there may be as many rows of as peers, which matters only once facts are known. */
const BASE_TABLES: readonly HostTable[] = ["link", "address", "route"];
const ALL_TABLES: readonly HostTable[] = [...BASE_TABLES, "neighbour", "fdb"];
/**
 * Leases that one round turns into rows, and for how long it goes on to the next few; if that took as long, they are
 * written by another. Then others have their turn: probes, the watchdog, an answer of etcd. Code that has just begun to
 * run takes many times as long for each.
 */
const LEASES_PER_ROUND = 200;
const LEASES_AT_A_TIME = 40;
const LEASES_MS = 5;
/** For how long a round goes on to write the rows of the next table. */
const PUT_MS = 5;
const TABLE_MAIN = 254;
const UNICAST = 1;
const BLACKHOLE = 6;
const PERMANENT = 128;
/** RTPROT_BOOT: what flanneld leaves behind. */
const ROUTE_PROTOCOL_BOOT = 3;
/** Owner of routes that no lease gives; no key of a lease looks so. */
const COMMON = "network";
const HOOKS = Object.keys(DIRECTIONS) as Hook[];
/** Without the programs at these, packets take the stack, which brings them where they would get with them. */
const SPARED_HOOKS: readonly Hook[] = ["from_pod", "to_pod"];

export class Agent {
  readonly #world: World;
  readonly #attempts: Attempts;
  readonly #device: TunnelDevice;
  readonly #writer: Writer;
  readonly #probing: Probing | undefined;
  readonly #commands: Commands;
  readonly #paths: Paths;
  readonly #judging: Judging;
  /** Reads the kernel's tables again. */
  readonly #surveying: Chore;
  /** Reads the maps back. */
  readonly #readingBack: Chore;
  /** Keeps the pins, and has the hooks looked at. */
  readonly #keepingPins: Chore;
  /** Looks the paths to peers up again. */
  readonly #renewing: Chore;
  readonly #options: AgentOptions;
  readonly #host = new Host();

  #desired: Desired;
  /** What the rest builds on; looked at again when the host or the config changed. */
  #base: Base | undefined;
  #uplink: Uplink | undefined;
  #claimed: Network | undefined;
  #wayOut: string | undefined;
  readonly #lease: LeaseKeeper;
  #facts: Facts | undefined;
  #factsBase: Base | undefined;
  #factsText = "";
  /** Blocks that were ours under an earlier config or in a former run. */
  readonly #formerBlocks: Prefix[] = [];
  /** What the programs loaded last were loaded with. */
  #configText = "";
  /** What programs are being loaded with. */
  #loadingText: string | undefined;
  /** What could not be loaded last, and why. */
  #refused: { readonly text: string; readonly reason: string } | undefined;
  /** It is to be tried again. */
  #loadDue = false;
  #pods: Pods = NO_PODS;
  #fileText: string | undefined;
  #ready = false;

  // What the next round has to look at again. Only a resync and a new config look at everything.
  /** The mirror of the kernel's tables is complete, and has been since the facts changed. */
  #isMirrored = false;
  /** When the survey ends, what failed is to be tried again. */
  #retryDue = false;
  /** When a resync may have the kernel's tables read again, and the maps. */
  #nextSurvey = 0;
  #nextReading = 0;
  /** Programs were loaded, and what is in their maps has not been read since. */
  #mapsUnknown = false;
  #attachmentsStale = false;
  #baseStale = true;
  #tidyStale = true;
  #rowsStale = true;
  /** Paths are likely to be others now: until they are looked up again, no lease is read. */
  #pathsMoved = false;
  #podsStale = true;
  #waysStale = true;
  #uplinksStale = true;
  #addressStale = true;
  #activateStale = false;
  /** Leases were read for as long as a round may take; what they gave is to be written before more are. */
  #putsDue = false;

  readonly #rows = new Map<string, LeaseRows>();
  /** Keys of leases whose rows are to be made anew, see `LEASES_PER_ROUND`. */
  readonly #unread = new Set<string>();
  /** Keys of leases whose peers are still reached without a tunnel, and until when, see `HOLD_MS`; the first comes first. */
  readonly #held = new Map<string, number>();
  /** For so long after our own backend has changed, all peers that can be are reached without a tunnel. */
  #movingUntil = 0;
  /** Keys of the routes that no lease gives. */
  #commonRoutes: ReadonlySet<string> = new Set();
  /** Leases that give no rows, and why. */
  readonly #ignored = new Map<string, string>();
  readonly #lengths = new Map<number, number>();
  /** How many peers are reached without a tunnel. */
  #directs = 0;

  readonly #subnets = new Table<SubnetRow>("subnets4");
  readonly #peers = new Table<PeerRow>("peers4");
  readonly #endpoints = new Table<EndpointRow>("endpoints4");
  readonly #interfaces = new Table<InterfaceRow>("interfaces");
  // Where pods leave for the outside, and where they keep their address.
  readonly #uplinks = new Table<UplinkRow>("uplinks4");
  readonly #excluded = new Table<ExcludedRow>("excluded4");
  #uplinkIndexes: readonly number[] = [];
  /** The last row of each uplink, also of one that has no address for a moment. */
  readonly #lastUplinks = new Map<string, UplinkRow>();
  /** Former addresses of uplinks that are not there any more, and until when they count, see `withFormersOnHost`. */
  readonly #lostFormers = new Map<string, number>();
  readonly #routes = new Table<RouteRow>("routes");
  #routeWrites: RowWrites<RouteRow> = routeWrites(false);
  readonly #neighbours = new Table<NeighbourRow>("neighbours");
  readonly #fdb = new Table<FdbRow>("fdb");
  readonly #attachments = new Table<AttachmentRow>("attachments");
  /** Those of them without which packets do not get by. */
  #vital: readonly (readonly [key: string, row: AttachmentRow])[] = [];
  /** Which of them was looked at last, where one is at a time. */
  #turn = 0;
  /** Whether the stack can't do what they do. */
  #aloneCarry = false;
  readonly #tables: readonly Pick<Table<unknown>, "name" | "retry" | "failures">[];

  #cancelRound: (() => void) | undefined;
  #cancelRetry: (() => void) | undefined;
  #cancelResync: (() => void) | undefined;
  #cancelForget: (() => void) | undefined;
  #cancelHeld: (() => void) | undefined;
  #cancelLost: (() => void) | undefined;
  #retryMs = RETRY_MIN_MS;
  /** Until when refused packets are no reason to look, and for how long then. */
  #trustedUntil = 0;
  #trustMs = REFUSED_MS;
  #stopped = false;
  readonly #fail: (error: Error) => void;

  /** `fail` is told of a FatalError or of a broken invariant; the agent has stopped then. */
  constructor(options: AgentOptions, world: World, fail: (error: Error) => void) {
    this.#options = options;
    this.#desired = emptyDesired(options.followConfig);
    this.#world = world;
    this.#fail = fail;
    this.#lease = new LeaseKeeper(options, world, () => this.#wake());
    this.#attempts = new Attempts(world);
    this.#device = new TunnelDevice(this.#host, world, this.#attempts, (what) => this.#learnLinks(what));
    this.#writer = new Writer(world, this.#attempts);
    this.#commands = new Commands(world, () => this.#wake());
    this.#paths = new Paths(this.#host, world, this.#attempts);
    this.#judging = new Judging(world.log);
    const chore = (what: string, begin: () => Steps, done: (ms: number) => void): Chore =>
      new Chore(what, world.clock, () => this.#wake(), begin, done);
    this.#surveying = chore(
      "kernel tables",
      () => this.#survey(),
      (ms) => this.#surveyed(ms),
    );
    this.#readingBack = chore(
      "maps",
      () => this.#readMaps(),
      (ms) => {
        this.#mapsUnknown = false;
        this.#nextReading = this.#world.clock.now() + ms / MAPS_SHARE;
      },
    );
    this.#keepingPins = chore(
      "pins",
      () => this.#keepPins(),
      () => undefined,
    );
    this.#renewing = chore(
      "route look-up",
      () => this.#renewPaths(),
      (ms) => {
        this.#pathsMoved = false;
        this.#waysStale = true;
        this.#putOffSurvey(this.#nextSurvey, ms);
      },
    );
    const { openProber } = world;
    const { probeMs } = options;
    if (openProber !== undefined && probeMs !== undefined)
      this.#probing = new Probing(world, openProber, probeMs);
    this.#tables = [
      this.#peers,
      this.#neighbours,
      this.#fdb,
      this.#routes,
      this.#subnets,
      this.#endpoints,
      this.#interfaces,
      this.#uplinks,
      this.#excluded,
      this.#attachments,
    ];
    if (options.previous !== undefined) this.#formerBlocks.push(options.previous);
  }

  /** Begins; events may come from now on. */
  start(): void {
    this.#surveying.ask();
    this.#scheduleResync();
    this.#wake();
  }

  /** Ends the loop. The kernel is left as it is. */
  stop(): void {
    this.#stopped = true;
    for (const each of this.#chores) each.stop();
    this.#lease.stop();
    this.#probing?.stop();
    this.#commands.stop();
    this.#cancelRound?.();
    this.#cancelRetry?.();
    this.#cancelResync?.();
    this.#cancelForget?.();
    this.#cancelHeld?.();
    this.#cancelLost?.();
  }

  onStore(event: StoreEvent): void {
    for (const _ of this.takeStore(event));
  }

  /** As `onStore`, some of a large snapshot at a time. Until the last step, no other event may be told of. */
  *takeStore(event: StoreEvent): Generator<void, void> {
    const steps = foldInSteps(this.#desired, event);
    for (let isLast = false; !isLast; ) {
      const { value, done } = steps.next();
      isLast = done === true;
      if (value !== this.#desired) this.#wake();
      this.#desired = value;
      if (!isLast) yield;
    }
    if (event.kind === "synced") this.#awaitMissing();
    this.#lease.onStore(event);
  }

  /** Gives the nodes whose leases a snapshot lacks the time to put them back. */
  #awaitMissing(): void {
    const { size } = this.#desired.missing;
    this.#cancelForget?.();
    if (size === 0) return;
    const seconds = FORGET_MS / 1000;
    this.#world.log.warn({ leases: size, seconds }, "leases are missing from etcd: kept for a while");
    this.#cancelForget = this.#world.clock.after(FORGET_MS, () => this.#forgetMissing());
  }

  /** Lets go of missing leases if the store, asked again, does not have them; if it does not answer, it stays so. */
  #forgetMissing(): void {
    const { store, clock } = this.#world;
    const forgetAll = ({ records }: Awaited<ReturnType<typeof store.list>>): void => {
      if (this.#stopped) return;
      this.#desired = forget(this.#desired, new Set(records.map(({ key }) => key.slice("subnets/".length))));
      this.#wake();
    };
    const again = (): void => {
      if (!this.#stopped) this.#cancelForget = clock.after(FORGET_MS, () => this.#forgetMissing());
    };
    store.list("subnets/").then(forgetAll, again);
  }

  onNetlink(event: NetlinkEvent): void {
    for (const each of this.#host.apply(event)) {
      this.#observeRow(each);
      this.#mark(each);
    }
    this.#wake();
  }

  /** The host's packet filter, as it is now. To be told of before `start`, or pods' packets take the stack. */
  onFirewall(firewall: Firewall): void {
    this.#judging.learn(firewall);
    this.#wake();
  }

  /** Notifications were lost: look at everything. */
  onOverrun(): void {
    this.#surveying.restart();
    this.#resync();
  }

  /**
   * The programs have dropped tunnel packets as nobody's. They may be a peer's whose rows are gone by another hand: the
   * maps are read back, ever more rarely while there is nothing wrong with them.
   */
  onRefused(): void {
    const now = this.#world.clock.now();
    if (now < this.#trustedUntil || this.#configText === "") return;
    this.#trustedUntil = now + this.#trustMs;
    this.#trustMs = Math.min(2 * this.#trustMs, Math.max(REFUSED_MS, this.#options.resyncMs));
    this.#readingBack.ask();
  }

  /** Notes what a change of the host did to the rows that are ours. */
  #observeRow({ kind, change, row }: HostEvent): void {
    const isGone = change === "delete";
    const overlay = this.#facts?.overlay?.index;
    if (kind === "route") this.#observeRoute(row, isGone);
    else if (overlay === undefined || row.index !== overlay) return;
    else if (kind === "neighbour")
      this.#observe(this.#neighbours, neighbourKey(row), isGone ? undefined : neighbourOf(row));
    else if (kind === "fdb" && row.masterIndex === undefined)
      this.#observe(this.#fdb, fdbKey(row), isGone ? undefined : fdbOf(row));
  }

  /**
   * Looks whether those programs are in place without which packets do not get by, or with a wrong address: of a TCX link
   * that was detached nobody is told. To be called often; it asks the kernel of a few links alone, and where the stack can
   * do what the programs do, of one each time. Returns whether packets wait for one that is gone: with a tunnel that the
   * programs alone carry, and with masquerade.
   */
  checkAttachments(): boolean {
    this.#turn = (this.#turn + 1) % Math.max(1, this.#vital.length);
    const looked = this.#aloneCarry ? this.#vital : this.#vital.slice(this.#turn, this.#turn + 1);
    if (looked.every(([key, row]) => this.#isInPlace(key, row))) return this.#aloneCarry;
    // With its pin gone, others may be as well.
    this.#keepingPins.ask();
    this.#readingBack.ask();
    this.#attachmentsStale = true;
    this.#wake();
    return this.#aloneCarry;
  }

  /** Marks what a change of the host may have changed for us. */
  #mark(event: HostEvent): void {
    const facts = this.#facts;
    const isGone = event.change === "delete";
    const isInSubnet = (address: Ipv4): boolean => facts === undefined || contains(facts.subnet, address);
    switch (event.kind) {
      case "link": {
        const { index } = event.row;
        this.#baseStale = this.#tidyStale = true;
        if (this.#paths.ways.has(index)) this.#movePaths();
        if (index !== facts?.overlay?.index) this.#podsStale = true;
        this.#uplinksStale = true;
        if (!isGone) return;
        this.#device.forget(index);
        // With an interface go the programs on it.
        for (const hook of HOOKS)
          this.#attachments.observe(attachmentKey({ ifindex: index, hook }), undefined);
        return;
      }
      case "address":
        this.#baseStale = this.#uplinksStale = true;
        if (isInSubnet(event.row.address)) this.#podsStale = true;
        else this.#movePaths();
        return;
      case "route": {
        const { destination, type } = event.row;
        if (type === BLACKHOLE) this.#tidyStale = true;
        if (isInSubnet(destination.address)) this.#podsStale = true;
        if (destination.length === 0) this.#baseStale = true;
        if (facts === undefined || !contains(facts.network.network, destination.address)) this.#movePaths();
        return;
      }
      case "neighbour": {
        const { index, address } = event.row;
        if (index !== facts?.overlay?.index && isInSubnet(address)) this.#podsStale = true;
        return;
      }
      case "fdb":
        if (event.row.masterIndex !== undefined) this.#podsStale = true;
        return;
      case "filter":
        if (isGone && this.#holdsAttachment(event.row.index)) this.#attachmentsStale = true;
        return;
    }
  }

  #holdsAttachment(ifindex: number): boolean {
    return HOOKS.some((hook) => this.#attachments.actualRow(attachmentKey({ ifindex, hook })) !== undefined);
  }

  /** Peers may be reached in another way now, and what could not be written may now be. */
  #movePaths(): void {
    this.#pathsMoved = true;
    this.#renewing.restart();
    for (const table of this.#tables) table.retry();
  }

  status(): AgentStatus {
    const { network, rejections, warnings, revision } = this.#desired;
    const { subnet } = this.#lease;
    const uplink = this.#uplink;
    const rejected = [...rejections.values()];
    const failures = [...this.#attempts.failures, ...this.#commands.failures()];
    for (const table of this.#tables) {
      for (const [key, reason] of table.failures()) failures.push([`${table.name} ${key}`, reason]);
    }
    return {
      phase: !this.#desired.synced
        ? "waiting for etcd"
        : network === undefined
          ? "waiting for the network config"
          : subnet === undefined
            ? "waiting for a subnet"
            : "forwarding",
      ready: this.#ready,
      network,
      uplink: uplink && {
        name: uplink.link.name,
        address: formatIpv4(uplink.address),
        publicIp: formatIpv4(uplink.publicIp),
      },
      device: network && kindOf(network.backend).device?.name,
      subnet: subnet && formatCidr(subnet),
      mtu: this.#facts?.mtu,
      leaseEndsInMs: this.#lease.endsInMs,
      revision,
      peers: this.#peers.size,
      ignored: [...this.#ignored].map(([key, reason]) => ({ key, reason })),
      endpoints: this.#endpoints.size,
      rejections: rejected,
      warnings,
      firewall: this.#judging.judgement,
      failures: failures.map(([what, reason]) => ({ what, reason })),
      probes: this.#probing?.status(),
    };
  }

  /** All that the store has told is in force, as far as the kernel took it. */
  get isUpToDate(): boolean {
    return this.#unread.size === 0 && this.#ready;
  }

  /** Entries of the maps that are filled from here, as they were seen last. */
  entries(): Readonly<Record<keyof MapRows, number>> {
    return {
      subnets4: this.#subnets.present,
      peers4: this.#peers.present,
      endpoints4: this.#endpoints.present,
      interfaces: this.#interfaces.present,
      uplinks4: this.#uplinks.present,
      excluded4: this.#excluded.present,
    };
  }

  /** How each peer is that is probed. */
  peers(): Iterable<PeerHealth> {
    return this.#probing?.peers.peers() ?? [];
  }

  /** The peers that packets are to be forwarded to, probed or not. */
  *forwarded(): Generator<SubnetRow> {
    for (const { subnet } of this.#rows.values()) if (subnet !== undefined) yield subnet;
  }

  #wake(): void {
    if (this.#stopped || this.#cancelRound !== undefined) return;
    this.#cancelRound = this.#world.clock.after(0, () => {
      this.#cancelRound = undefined;
      this.#run();
    });
  }

  #run(): void {
    const { clock, observer } = this.#world;
    const started = clock.now();
    this.#attempts.begin();
    try {
      this.#round();
    } catch (error) {
      if (!(error instanceof RoundFailure)) {
        this.stop();
        this.#fail(error instanceof Error ? error : new Error(String(error)));
        return;
      }
    }
    const failed = this.#isFailing();
    observer.reconciled(failed ? "failure" : "success", (clock.now() - started) / 1000);
    observer.changed();
    if (!failed) {
      this.#cancelRetry?.();
      this.#cancelRetry = undefined;
      this.#retryMs = RETRY_MIN_MS;
    } else if (this.#cancelRetry === undefined) {
      this.#cancelRetry = clock.after(this.#retryMs, () => this.#retry());
      this.#retryMs = Math.min(this.#retryMs * 2, RETRY_MAX_MS);
    }
  }

  #isFailing(): boolean {
    return this.#attempts.failures.size > 0 || this.#tables.some((table) => table.failures().size > 0);
  }

  #retry(): void {
    this.#cancelRetry = undefined;
    // What was refused may have been, because the kernel is not as we believe.
    this.#retryDue = this.#loadDue = true;
    this.#surveying.ask();
    for (const each of this.#chores) if (each.problem !== undefined) each.ask();
    this.#wake();
  }

  #round(): void {
    for (const { what, problem } of this.#chores)
      if (problem !== undefined) this.#attempts.note(what, problem);
    if (this.#surveying.problem !== undefined) this.#retryTables();
    const { synced, network, unknownBackend } = this.#desired;
    if (!synced) return;
    if (unknownBackend !== undefined) throw new FatalError(unknownBackend);
    if (network === undefined) return;
    if (!this.#isMirrored) return;
    this.#claim(network);
    const base = this.#prepare(network);
    const { uplink, overlay } = base;
    const kind = kindOf(network.backend);
    const prepared = this.#commands.prepare(kind.commands);
    if (prepared === undefined) return;
    const { publicIp, address } = uplink;
    this.#lease.keep(network, kind.attributes({ publicIp, uplink: address, mac: overlay?.mac, ...prepared }));
    const { subnet } = this.#lease;
    if (subnet === undefined) return;

    const facts = this.#learnFacts(base, subnet);
    // New connections to the outside need not wait for anything: they would begin under an address that may be gone.
    if (this.#configText !== "" && this.#uplinksStale) {
      this.#findUplinks(facts);
      this.#putUplinks();
    }
    if (!this.#isMirrored) return;
    if (this.#addressStale && overlay !== undefined) {
      this.#device.ensureAddress(overlay.index, subnet, (address) => this.#wasOurs(address, facts));
    }
    this.#addressStale = false;
    this.#loadAhead(facts);
    const isSettled = this.#commands.settle({ network: network.network, subnet, publicIp });
    // Each has its turn: leases that are read, and what they gave.
    if (!this.#putsDue && this.#compile(facts)) {
      this.#putsDue = true;
      this.#wake();
      return;
    }
    const isCompiled = this.#isCompiled;
    if (isCompiled) this.#commands.wantNoOthers();
    this.#probing?.aim(probeSourceOf(facts));
    // Loading programs takes the verifier a while. The stack, which forwards meanwhile, need not wait for it.
    const isPut = this.#putPeers();
    this.#putsDue = !isPut;
    if (!isPut || !(isCompiled || this.#pathsMoved)) this.#wake();
    // Nothing is removed before all is known that is wanted.
    if (!isPut || !isCompiled) return;
    this.#findPods(facts);
    if (!this.#loadPrograms(facts)) return;
    // Nothing is written that may be there already.
    if (this.#mapsUnknown && this.#readingBack.problem === undefined) return;
    if (this.#attachmentsStale) this.#attempts.attempt("attachments", () => this.#observeAttachments());
    if (this.#uplinksStale) this.#findUplinks(facts);
    this.#findPrograms(facts);

    if (!this.#putPeers()) {
      this.#wake();
      return;
    }
    this.#writer.putMap("endpoints4", this.#endpoints);
    this.#writer.putMap("interfaces", this.#interfaces);
    this.#putUplinks();
    if (!this.#putPrograms()) {
      this.#wake();
      return;
    }
    this.#writer.removeFromMap("uplinks4", this.#uplinks);
    this.#writer.removeFromMap("excluded4", this.#excluded);
    this.#writer.removeFromMap("interfaces", this.#interfaces);
    this.#writer.removeFromMap("endpoints4", this.#endpoints);
    this.#writer.removeFromMap("subnets4", this.#subnets);
    this.#writer.remove(this.#routes, this.#routeWrites);
    this.#writer.remove(this.#fdb, FDB);
    this.#writer.remove(this.#neighbours, NEIGHBOURS);
    this.#writer.removeFromMap("peers4", this.#peers);
    if (this.#tidyStale) this.#tidy(facts);
    if (isSettled) this.#finish(facts);
  }

  /** Sees to it that no other daemon of this host has what we need. Before anything is made for the network. */
  #claim(network: Network): void {
    if (this.#claimed === network) return;
    const objection = this.#attempts.must("claim", () => this.#world.claim(network));
    if (objection !== undefined) {
      if (this.#facts === undefined) throw new FatalError(objection);
      throw this.#attempts.failure("network", objection);
    }
    this.#claimed = network;
  }

  /**
   * Routes to peers, what they lead on to, and what the programs know of them; the programs may be older than that. Returns
   * false if there may be more than go at once.
   */
  #putPeers(): boolean {
    const hasMaps =
      this.#configText !== "" && (!this.#mapsUnknown || this.#readingBack.problem !== undefined);
    const { clock } = this.#world;
    const began = clock.now();
    // Where there is nothing to be put, it takes no time, so that each round gets further than the last.
    const isInTime = (): boolean => clock.now() - began < PUT_MS;
    return (
      (!hasMaps || (this.#writer.putMap("peers4", this.#peers) && isInTime())) &&
      this.#writer.put(this.#neighbours, NEIGHBOURS) &&
      isInTime() &&
      this.#writer.put(this.#fdb, FDB) &&
      isInTime() &&
      this.#writer.put(this.#routes, this.#routeWrites, (row) => this.#isRoutable(row)) &&
      (!hasMaps || (isInTime() && this.#writer.putMap("subnets4", this.#subnets)))
    );
  }

  /** Programs where they are wanted, and nowhere else. Returns false if there may be more than go at once. */
  #putPrograms(): boolean {
    if (this.#activateStale && this.#attempts.attempt("programs", () => this.#activate())) return false;
    const nameOf = (ifindex: number): string => this.#nameOf(ifindex);
    return this.#writer.attach(this.#attachments, nameOf) && this.#writer.detach(this.#attachments, nameOf);
  }

  /** The uplink and the tunnel device, as the config asks for them. */
  #prepare(network: Network): Base {
    if (this.#base === undefined || this.#baseStale || this.#base.network !== network) {
      this.#base = undefined;
      const uplink = this.#findUplink(network);
      const overlay = this.#device.ensure(network, uplink, () => this.#publishedMac(uplink.publicIp));
      const device = kindOf(network.backend).device?.name;
      this.#attempts.attempt("sysctls", () => {
        this.#routeWrites = routeWrites(this.#world.kernel.showsNexthops());
        this.#drifted({ name: "sysctls" }, this.#world.kernel.keepSysctls(device));
      });
      this.#base = { network, uplink, overlay };
      this.#baseStale = false;
      this.#addressStale = true;
    }
    return this.#base;
  }

  *#survey(): Steps {
    const tables = this.#facts === undefined ? BASE_TABLES : ALL_TABLES;
    for (const events of survey(this.#host, this.#world.kernel, tables, (table) => this.#viewOf(table))) {
      this.#learn(events);
      yield events.length > 0;
    }
  }

  #surveyed(ms: number): void {
    this.#isMirrored = true;
    this.#putOffSurvey(this.#world.clock.now(), Math.max(ms, SURVEY_LEASE_MS * this.#desired.leases.size));
    this.#baseStale = this.#tidyStale = true;
    // Of rules that choose among routing tables nobody tells.
    this.#renewing.ask();
    this.#retryTables();
  }

  /** After something that took so long, for what is to be done again with the tables. */
  #putOffSurvey(from: number, ms: number): void {
    this.#nextSurvey = Math.min(from + ms / SURVEY_SHARE, this.#world.clock.now() + SURVEY_AT_LEAST_MS);
  }

  #retryTables(): void {
    if (this.#retryDue) for (const table of this.#tables) table.retry();
    this.#retryDue = false;
  }

  /** Takes what a survey found, which has looked at our own rows itself. */
  #learn(events: readonly HostEvent[]): void {
    for (const event of events) {
      for (const each of this.#host.apply(event)) {
        if (each !== event) this.#observeRow(each);
        this.#mark(each);
      }
    }
  }

  /** What of a table of the kernel is ours, or a former run's, or flanneld's. */
  #viewOf<Name extends HostTable>(table: Name): View<HostRows[Name]> | undefined {
    const facts = this.#facts;
    if (facts === undefined) return undefined;
    const isOverlay = (index: number): boolean => index === facts.overlay?.index;
    const differed = (of: { readonly name: string }) => (rows: number) => {
      this.#drifted(of, rows);
      if (rows > 0) this.#wake();
    };
    const views: { readonly [Each in HostTable]?: () => View<HostRows[Each]> } = {
      route: () =>
        viewOf(this.#routes, (row: Route) => this.#ownRoute(row, facts), routeKey, differed(this.#routes)),
      neighbour: () =>
        viewOf(
          this.#neighbours,
          (row: Neighbour) => (isOverlay(row.index) ? neighbourOf(row) : undefined),
          neighbourKey,
          differed(this.#neighbours),
        ),
      fdb: () =>
        viewOf(
          this.#fdb,
          (row: FdbEntry) => (isOverlay(row.index) && row.masterIndex === undefined ? fdbOf(row) : undefined),
          fdbKey,
          differed(this.#fdb),
        ),
    };
    return views[table]?.();
  }

  /** The MAC under which peers know us, so that a device made anew changes nothing for them. */
  #publishedMac(publicIp: Ipv4): Mac | undefined {
    for (const lease of this.#desired.leases.values()) if (lease.publicIp === publicIp) return lease.vtepMac;
    return undefined;
  }

  #findUplink(network: Network): Uplink {
    const { wish } = this.#options;
    const chosen = chooseUplink(wish, {
      links: [...this.#host.links.values()],
      addresses: [...this.#host.addresses.values()],
      defaultRoutes: [...this.#host.defaultRoutes.values()].filter(
        (route) => route.table === TABLE_MAIN && route.type === UNICAST,
      ),
      reach:
        wish.interfaceCanReach === undefined ? undefined : this.#paths.lookUp([wish.interfaceCanReach])[0],
    });
    if ("error" in chosen) {
      // An uplink that is down for a while is no reason to let go of what still forwards.
      if (this.#uplink === undefined) throw new FatalError(chosen.error);
      return this.#uplink;
    }
    const objection = kindOf(network.backend).objection?.(chosen);
    if (objection !== undefined) {
      if (this.#facts === undefined) throw new FatalError(objection);
      throw this.#attempts.failure("uplink", objection);
    }
    if (this.#uplink?.publicIp !== chosen.publicIp || this.#uplink.link.index !== chosen.link.index) {
      const { link, address, publicIp } = chosen;
      this.#world.log.info(
        { interface: link.name, address: formatIpv4(address), publicIp: formatIpv4(publicIp), mtu: link.mtu },
        "using this interface to reach other nodes",
      );
    }
    this.#uplink = chosen;
    this.#noteWayOut(chosen);
    return chosen;
  }

  /** Connections to the store may hang for long on a way that is no more; a new way is tried at once. */
  #noteWayOut({ link, address }: Uplink): void {
    if (this.#host.links.get(link.index)?.running !== true) {
      this.#wayOut = "none";
      return;
    }
    const gateways = [...this.#host.defaultRoutes.values()].map(({ outIndex, gateway }) => [
      outIndex,
      gateway,
    ]);
    const way = JSON.stringify([link.index, address, gateways]);
    if (this.#wayOut !== undefined && this.#wayOut !== way) {
      this.#attempts.attempt("neighbours", () => this.#world.kernel.resolveNeighbours(link.index));
      this.#world.store.reconnect();
    }
    this.#wayOut = way;
  }

  /** Whether an address is in the network, or in one that was ours before. */
  #wasOurs(address: Ipv4, facts: Facts): boolean {
    return (
      contains(facts.network.network, address) || this.#formerBlocks.some((block) => contains(block, address))
    );
  }

  #learnFacts(base: Base, subnet: Prefix): Facts {
    if (this.#facts !== undefined && base === this.#factsBase && subnet === this.#facts.subnet)
      return this.#facts;
    const { network, uplink, overlay } = base;
    this.#factsBase = base;
    const facts: Facts = {
      network,
      subnet,
      uplink: { index: uplink.link.index, mtu: uplink.mtu, address: uplink.address },
      overlay,
      mtu: kindOf(network.backend).mtu(uplink.mtu),
      fastPath: this.#options.fastPath,
      letIn: this.#options.forwardRules ?? true,
      countPeers: this.#options.countPeers ?? false,
      masquerade: this.#options.masquerade,
      sourcePorts: this.#options.sourcePorts,
      ttl: this.#options.ttl,
    };
    const text = JSON.stringify(facts);
    if (this.#facts !== undefined && text === this.#factsText) return this.#facts;
    if (this.#facts !== undefined) this.#leave(this.#facts.network, network);
    this.#factsText = text;
    this.#facts = facts;
    this.#putsDue = false;
    this.#desired = claim(this.#desired, { subnet, publicIp: uplink.publicIp });
    this.#rowsStale = this.#podsStale = this.#waysStale = this.#tidyStale = true;
    // Other rows are ours now, and the mirror may not have heard yet of what we wrote ourselves.
    this.#isMirrored = false;
    this.#surveying.restart();
    this.#movePaths();
    this.#addressStale = this.#uplinksStale = true;
    return facts;
  }

  /** Notes what of a network that we had is still of use with the next one. */
  #leave(former: Network, next: Network): void {
    if (JSON.stringify(former.backend) !== JSON.stringify(next.backend))
      this.#movingUntil = this.#world.clock.now() + HOLD_MS;
    const { address, length } = next.network;
    if (former.network.address !== address || former.network.length !== length)
      this.#formerBlocks.push(former.network);
  }

  /** All leases have been turned into wanted rows. */
  get #isCompiled(): boolean {
    return !this.#pathsMoved && this.#unread.size === 0;
  }

  /**
   * Turns leases into wanted rows: all leases if the facts or paths changed, else those that changed; some of them at a
   * time. Returns whether that took so long that others should have their turn.
   */
  #compile(facts: Facts): boolean {
    // The chore wakes us when they are known.
    if (this.#pathsMoved) return false;
    // Of two leases that want one row, the one that is read later has it: their order must stay that of the store.
    for (const key of takeTouched(this.#desired)) {
      this.#unread.delete(key);
      this.#unread.add(key);
    }
    if (this.#rowsStale) {
      const { leases } = this.#desired;
      this.#unread.clear();
      for (const keys of [this.#rows, this.#ignored])
        for (const key of keys.keys()) if (!leases.has(key)) this.#unread.add(key);
      for (const key of leases.keys()) this.#unread.add(key);
      this.#wantRoutes(kindOf(facts.network.backend).routes?.(facts) ?? []);
      this.#rowsStale = false;
    }
    const { clock } = this.#world;
    const began = clock.now();
    for (let read = 0; read < LEASES_PER_ROUND && this.#unread.size > 0; read += LEASES_AT_A_TIME) {
      if (clock.now() - began > LEASES_MS) break;
      const some: string[] = [];
      for (const key of this.#unread) if (some.push(key) === LEASES_AT_A_TIME) break;
      this.#learnPaths(some);
      for (const key of some) {
        this.#want(key, this.#desired.leases.get(key), facts);
        this.#unread.delete(key);
      }
    }
    this.#awaitHeld();
    return clock.now() - began > LEASES_MS;
  }

  #learnPaths(keys: readonly string[]): void {
    const addresses = keys.flatMap((key) => this.#desired.leases.get(key)?.publicIp ?? []);
    if (this.#paths.learn(addresses)) this.#waysStale = true;
  }

  *#renewPaths(): Steps {
    const inForce = new Set<Ipv4>();
    for (const lease of this.#desired.leases.values()) inForce.add(lease.publicIp);
    for (const changed of this.#paths.renew(inForce)) {
      if (changed) this.#rowsStale = true;
      yield changed;
    }
  }

  /** The rows that a lease gives now: for a while those of the way that its peer is reached by, see `HOLD_MS`. */
  #rowsFor(key: string, lease: Lease, facts: Facts): LeaseRows {
    const rows = rowsOf(lease, this.#paths.to(lease.publicIp), facts);
    const plain = this.#plainWay(lease, rows, facts);
    const now = this.#world.clock.now();
    const until = this.#held.get(key) ?? now + HOLD_MS;
    if (plain === undefined || until <= now) {
      this.#held.delete(key);
      return rows;
    }
    this.#held.set(key, until);
    // What the tunnel's route will lead on to can be there before it.
    return { ...plain, neighbour: rows.neighbour, fdb: rows.fdb };
  }

  /**
   * The rows of a way without a tunnel, if these are of one with a tunnel, and the kernel still has the other or we have just
   * got another backend ourselves.
   */
  #plainWay(lease: Lease, { subnet }: LeaseRows, facts: Facts): LeaseRows | undefined {
    if (subnet === undefined || subnet.reach === "REACH_DIRECT") return undefined;
    const plain = directRows(lease, this.#paths.to(lease.publicIp), facts);
    if (plain.subnet === undefined || plain.route === undefined) return undefined;
    const { gateway, outIndex } = plain.route;
    // Peers that have heard of a new backend before us may say already that they have moved.
    if (this.#world.clock.now() < this.#movingUntil) return plain;
    // A former run of ours may have put it there, or flanneld.
    const actual = this.#routes.actualRow(routeKey(plain.route));
    return actual?.gateway === gateway && actual?.outIndex === outIndex ? plain : undefined;
  }

  /** Looks at leases again when they have been held for long enough. */
  #awaitHeld(): void {
    const { clock } = this.#world;
    const [first] = this.#held.values();
    if (first === undefined || this.#cancelHeld !== undefined) return;
    this.#cancelHeld = clock.after(Math.max(0, first - clock.now()), () => {
      this.#cancelHeld = undefined;
      const now = clock.now();
      for (const [key, until] of this.#held) if (until <= now) this.#unread.add(key);
      this.#wake();
    });
  }

  /** Wants the rows that a lease gives, in place of those it gave before. */
  #want(key: string, lease: Lease | undefined, facts: Facts): void {
    const before = this.#rows.get(key) ?? NO_ROWS;
    if (lease === undefined) this.#held.delete(key);
    const rows = lease === undefined ? NO_ROWS : this.#rowsFor(key, lease, facts);
    exchange(this.#subnets, key, subnetKey, before.subnet, rows.subnet);
    exchange(this.#peers, key, peerKey, before.peer, rows.peer);
    exchange(this.#routes, key, routeKey, before.route, rows.route);
    exchange(this.#neighbours, key, neighbourKey, before.neighbour, rows.neighbour);
    exchange(this.#fdb, key, fdbKey, before.fdb, rows.fdb);
    this.#countSubnet(before.subnet, -1);
    this.#countSubnet(rows.subnet, 1);
    const reason = lease === undefined ? undefined : kindOf(facts.network.backend).refuses(lease);
    if (reason === undefined) this.#ignored.delete(key);
    else if (rows.peer === undefined) this.#ignored.set(key, `${reason}: it is not reached`);
    else this.#ignored.set(key, `${reason}: it is reached by a plain route`);
    this.#commands.want(key, reason === undefined ? lease : undefined);
    if (lease === undefined) this.#rows.delete(key);
    else this.#rows.set(key, rows);
    if (lease === undefined || rows.peer === undefined) this.#probing?.peers.unwant(key);
    else this.#probing?.peers.want(key, { ...lease, target: probeTargetOf(lease, facts) });
  }

  /** Wants the routes that no lease gives, in place of those before. */
  #wantRoutes(routes: readonly RouteRow[]): void {
    const keys = new Set(routes.map(routeKey));
    for (const key of this.#commonRoutes) if (!keys.has(key)) this.#routes.unwant(key, COMMON);
    for (const route of routes) this.#routes.want(routeKey(route), route, COMMON);
    this.#commonRoutes = keys;
  }

  #countSubnet(row: SubnetRow | undefined, by: number): void {
    if (row === undefined) return;
    if (row.reach === "REACH_DIRECT") {
      this.#directs += by;
      this.#waysStale = true;
    }
    const count = (this.#lengths.get(row.prefixLength) ?? 0) + by;
    if (count === 0) this.#lengths.delete(row.prefixLength);
    else this.#lengths.set(row.prefixLength, count);
  }

  /** Whether we may send to peers without a tunnel: by the backend, or because they have another one than we, or had. */
  #mayBeDirect({ network }: Facts): boolean {
    return kindOf(network.backend).direct || this.#directs > 0;
  }

  /** What the programs may do, by the settings and the host's packet filter. */
  #judgeFirewall(facts: Facts): Pick<Facts, "fastPath" | "letIn"> & { readonly direct: boolean } {
    const { fastPath } = facts;
    if (fastPath !== "FAST_PATH_AUTO")
      return { fastPath, letIn: facts.letIn && fastPath === "FAST_PATH_ALWAYS", direct: true };
    const nameOf = (ifindex: number): string => this.#nameOf(ifindex);
    const underlay = [...this.#ethernetWays(facts)].map(nameOf);
    const interfaces = [...this.#pods.interfaces.keys()].map(nameOf);
    if (facts.overlay !== undefined) interfaces.push(nameOf(facts.overlay.index));
    if (this.#mayBeDirect(facts)) interfaces.push(...underlay);
    const obeysDocker = this.#options.forwardRules === false;
    const traffic = { network: facts.network.network, interfaces, underlay, obeysDocker };
    const { needsStack, letsIn } = this.#judging.judge(traffic, facts.letIn);
    const direct = this.#judging.mayPassPlain || this.#mayBeDirect(facts);
    return { fastPath: needsStack ? "FAST_PATH_STACK" : fastPath, letIn: letsIn, direct };
  }

  #configFor(facts: Facts, lengths: Iterable<number>): ProgramConfig {
    const { direct, ...judged } = this.#judgeFirewall(facts);
    return configOf({ ...facts, ...judged }, [...new Set([facts.network.subnetLength, ...lengths])], direct);
  }

  /**
   * Begins to load the first programs while leases are read, with what those are likely to come to. If they come to
   * something else, others are loaded after that.
   */
  #loadAhead(facts: Facts): void {
    if (this.#configText !== "" || this.#loadingText !== undefined || this.#refused !== undefined) return;
    this.#findPods(facts);
    const lengths = new Set<number>();
    for (const { subnet } of this.#desired.leases.values()) lengths.add(subnet.length);
    const config = this.#configFor(facts, lengths);
    this.#load(config, JSON.stringify(config));
  }

  /**
   * Has programs loaded if what they were loaded with changed; the maps are open from then on. Returns whether they are
   * loaded; if not, a round comes when they are.
   */
  #loadPrograms(facts: Facts): boolean {
    const config = this.#configFor(facts, this.#lengths.keys());
    const text = JSON.stringify(config);
    const isLoading = this.#loadingText !== undefined;
    if (!isLoading && text === this.#configText) return true;
    const refused = text === this.#refused?.text ? this.#refused : undefined;
    if (!isLoading && (refused === undefined || this.#loadDue)) this.#load(config, text);
    // Until it has worked, it counts as failed.
    if (refused !== undefined) throw this.#attempts.failure("programs", refused.reason);
    return false;
  }

  #load(config: ProgramConfig, text: string): void {
    this.#loadingText = text;
    this.#loadDue = false;
    const end = (settle: () => void): void => {
      if (this.#stopped) return;
      this.#loadingText = undefined;
      settle();
      this.#wake();
    };
    const loaded = (): void => {
      this.#configText = text;
      this.#refused = undefined;
      this.#mapsUnknown = this.#activateStale = true;
      this.#keepingPins.ask();
      this.#readingBack.restart();
    };
    const refused = (error: unknown): void => {
      this.#refused = { text, reason: reasonOf(error) };
    };
    this.#world.dataplane.load(config).then(
      () => end(loaded),
      (error: unknown) => end(() => refused(error)),
    );
  }

  /** Puts the programs loaded last in the place of those that run. */
  #activate(): void {
    const { dataplane } = this.#world;
    dataplane.activate(this.#host.links.keys());
    dataplane.detachOtherMode(this.#host.links.keys());
    this.#activateStale = false;
  }

  // biome-ignore lint/correctness/useYield: all of it is one step
  *#keepPins(): Steps {
    this.#drifted({ name: "pins" }, this.#world.dataplane.keepPins());
    this.#attachmentsStale = true;
  }

  *#readMaps(): Steps {
    const { observer } = this.#world;
    const differed = (rows: number): void => {
      if (rows === 0) return;
      if (this.#ready) observer.repaired("maps", rows);
      this.#trustMs = REFUSED_MS;
    };
    yield* this.#writer.readMap("peers4", this.#peers, differed);
    yield* this.#writer.readMap("subnets4", this.#subnets, differed);
    yield* this.#writer.readMap("endpoints4", this.#endpoints, differed);
    yield* this.#writer.readMap("interfaces", this.#interfaces, differed);
    yield* this.#writer.readMap("uplinks4", this.#uplinks, differed);
    yield* this.#writer.readMap("excluded4", this.#excluded, differed);
  }

  #observeAttachments(): void {
    const rows = this.#world.dataplane.attachments(this.#host.links.keys());
    this.#drifted(this.#attachments, this.#attachments.observeAll(rows));
    this.#attachmentsStale = false;
  }

  #drifted(table: { readonly name: string }, rows: number): void {
    if (this.#ready && rows > 0) this.#world.observer.repaired(table.name, rows);
  }

  #observeRoute(route: Route, gone: boolean): void {
    const facts = this.#facts;
    // A route of another metric is another route: it does not take the place of ours.
    if (facts === undefined || route.table !== TABLE_MAIN || route.metric !== 0) return;
    const { address, length } = route.destination;
    const row = this.#ownRoute(route, facts);
    if (row === undefined && gone) return;
    const key = routeKey({ destination: address, prefixLength: length });
    this.#observe(this.#routes, key, gone ? undefined : row);
  }

  /** A route to a peer's subnet: by our tunnel device, or ours or flanneld's by a gateway. */
  #ownRoute(route: Route, facts: Facts): RouteRow | undefined {
    const { destination, gateway, outIndex } = route;
    if (route.table !== TABLE_MAIN || route.type !== UNICAST || route.nexthops.length > 0) return undefined;
    if (outIndex === undefined || route.metric !== 0) return undefined;
    // Without a gateway, only what leads to a device of ours.
    if (gateway === undefined && outIndex !== facts.overlay?.index) return undefined;
    if (!this.#isOurs(route, facts)) return undefined;
    return {
      destination: destination.address,
      prefixLength: destination.length,
      gateway,
      outIndex,
      onlink: route.onlink,
      ...(route.mtu === undefined ? {} : { mtu: route.mtu }),
    };
  }

  #isOurs({ destination, gateway, outIndex, onlink, protocol }: Route, facts: Facts): boolean {
    // Of another Twill on this host, with a network of its own, nothing is ours.
    if (protocol === ROUTE_PROTOCOL) return this.#wasOurs(destination.address, facts);
    // Commands of the config make such routes, and only they know what for.
    if (kindOf(facts.network.backend).commands !== undefined) return false;
    // What flanneld makes for a peer looks like this, whatever the network.
    if (outIndex === facts.overlay?.index && onlink && gateway === destination.address) return true;
    const { network, subnetLength } = facts.network;
    if (destination.length < network.length || !contains(network, destination.address)) return false;
    if (outIndex === facts.overlay?.index) return true;
    return protocol === ROUTE_PROTOCOL_BOOT && destination.length === subnetLength;
  }

  #observe<Row>(table: Table<Row>, key: string, row: Row | undefined): void {
    if (table.observe(key, row)) this.#drifted(table, 1);
  }

  /** A route through the tunnel device waits for the entries that lead on from there. */
  #isRoutable(row: RouteRow): boolean {
    if (row.gateway === undefined || row.outIndex !== this.#facts?.overlay?.index) return true;
    if (!kindOf(this.#facts.network.backend).device?.asksForNeighbours) return true;
    const neighbour = neighbourKey({ index: row.outIndex, address: row.gateway });
    const mac = this.#neighbours.actualRow(neighbour)?.mac;
    return (
      mac !== undefined &&
      this.#neighbours.isSettled(neighbour) &&
      this.#fdb.isSettled(fdbKey({ index: row.outIndex, mac }))
    );
  }

  #findPods(facts: Facts): void {
    if (this.#podsStale) {
      this.#podsStale = false;
      const not = new Set([facts.uplink.index, facts.overlay?.index ?? 0]);
      this.#pods = findPods(this.#host, facts.subnet, not, this.#pods);
      const endpoints = new Map<string, EndpointRow>();
      for (const endpoint of this.#pods.endpoints.values()) endpoints.set(endpointKey(endpoint), endpoint);
      const interfaces = new Map<string, InterfaceRow>();
      for (const { ifindex, gatewayMac, bridge } of this.#pods.interfaces.values()) {
        interfaces.set(interfaceKey({ ifindex }), { ifindex, gatewayMac, bridge });
      }
      this.#endpoints.wantAll(endpoints);
      this.#interfaces.wantAll(interfaces);
      this.#waysStale = this.#uplinksStale = true;
    }
  }

  #findPrograms(facts: Facts): void {
    if (!this.#waysStale) return;
    this.#waysStale = false;
    const ways = this.#ethernetWays(facts);
    const direct = this.#mayBeDirect(facts);
    const rows = attachmentsOf(facts, this.#pods, ways, this.#uplinkIndexes, direct);
    this.#attachments.wantAll(rows);
    this.#vital = [...rows].filter(([, { hook }]) => !SPARED_HOOKS.includes(hook));
    const { tunnel } = kindOf(facts.network.backend).programs;
    this.#aloneCarry = facts.masquerade !== undefined || tunnel === "TUNNEL_IPIP" || tunnel === "TUNNEL_UDP";
  }

  /** By which interfaces, and under which addresses, pods are masqueraded. */
  #findUplinks(facts: Facts): void {
    this.#uplinksStale = false;
    this.#waysStale = true;
    const { masquerade, overlay, uplink } = facts;
    this.#excluded.wantAll(excludedOf(masquerade?.excluded ?? []));
    if (masquerade === undefined || !kindOf(facts.network.backend).forwards) {
      this.#uplinks.wantAll(new Map());
      this.#uplinkIndexes = [];
      return;
    }
    const rows = uplinksOf(
      { links: this.#host.links.values(), addresses: this.#host.addresses.values() },
      (index) => index === overlay?.index || this.#pods.interfaces.has(index),
      uplink,
      overlay && { index: overlay.index, address: facts.subnet.address },
      (key) => this.#lastUplinks.get(key) ?? this.#uplinks.actualRow(key),
    );
    for (const row of rows.values()) this.#lastUplinks.set(uplinkKey(row), row);
    const { clock } = this.#world;
    this.#uplinks.wantAll(
      withFormersOnHost(rows, this.#host.addresses.values(), this.#lostFormers, clock.now()),
    );
    this.#awaitLost();
    this.#uplinkIndexes = [...rows.values()]
      .map(({ ifindex }) => ifindex)
      .filter((ifindex) => ifindex !== overlay?.index);
  }

  /** Looks again when a lost address has not been put back in time. */
  #awaitLost(): void {
    const { clock } = this.#world;
    this.#cancelLost?.();
    this.#cancelLost = undefined;
    const due = [...this.#lostFormers.values()].filter((until) => until > clock.now());
    if (due.length === 0) return;
    this.#cancelLost = clock.after(Math.min(...due) - clock.now(), () => {
      this.#uplinksStale = true;
      this.#wake();
    });
  }

  #putUplinks(): void {
    this.#writer.putMap("excluded4", this.#excluded);
    this.#writer.putMap("uplinks4", this.#uplinks);
  }

  /** The Ethernet interfaces by which peers reach us. */
  #ethernetWays(facts: Facts): ReadonlySet<number> {
    const ways = [facts.uplink.index, ...this.#paths.ways];
    const isOne = (link: Link | undefined): boolean => link !== undefined && isEthernet(link);
    return new Set(ways.filter((index) => isOne(this.#host.links.get(index))));
  }

  #nameOf(ifindex: number): string {
    return this.#host.links.get(ifindex)?.name ?? `interface ${ifindex}`;
  }

  /** What is rarely to be done, and only once the rest is in order. */
  #tidy(facts: Facts): void {
    this.#blackhole(facts);
    if (this.#isFailing()) return;
    this.#device.removeFormer(facts.overlay?.index, (address) => this.#wasOurs(address, facts));
    this.#tidyStale = false;
  }

  /** With --ip-blackhole-route, what is for a pod that does not exist ends here instead of going in circles. */
  #blackhole(facts: Facts): void {
    if (!this.#options.blackholeRoute) return;
    for (const route of this.#host.routes.values()) {
      const { destination } = route;
      if (route.type !== BLACKHOLE || destination.length !== facts.subnet.length) continue;
      if (destination.address === facts.subnet.address) return;
    }
    this.#attempts.apply("blackhole route", [
      { write: "replaceRoute", destination: facts.subnet, type: BLACKHOLE },
    ]);
  }

  #finish(facts: Facts): void {
    const text = formatSubnetFile({
      network: facts.network.network,
      subnet: facts.subnet,
      mtu: facts.mtu,
      ipMasq: this.#options.ipMasq,
    });
    if (text !== this.#fileText) {
      const done = this.#attempts.attempt("subnet file", () => this.#world.writeSubnetFile(text));
      if (!done) return;
      this.#fileText = text;
    }
    if (this.#ready || this.#configText === "") return;
    this.#ready = true;
    this.#world.observer.ready();
  }

  #scheduleResync(): void {
    this.#cancelResync = this.#world.clock.after(this.#options.resyncMs, () => this.#resync());
  }

  /** Has everything read back, for what changes without a notification. */
  #resync(): void {
    this.#cancelResync?.();
    if (this.#stopped) return;
    // Sysctls change without a word.
    this.#baseStale = true;
    // Of what is just being written, there is nothing to be found out.
    if (this.#unread.size === 0) {
      const now = this.#world.clock.now();
      if (now >= this.#nextSurvey) this.#surveying.ask();
      if (this.#configText !== "") {
        this.#keepingPins.ask();
        if (this.#aloneCarry || now >= this.#nextReading) this.#readingBack.ask();
      }
    }
    this.#scheduleResync();
    this.#wake();
  }

  /** Whether a program that was in place is so still, as far as one can tell. */
  #isInPlace(key: string, row: AttachmentRow): boolean {
    if (this.#attachments.actualRow(key) === undefined) return true;
    try {
      return this.#world.dataplane.isAttached(row);
    } catch {
      // The next resync will fail as well, and say why.
      return true;
    }
  }

  get #chores(): readonly Chore[] {
    return [this.#surveying, this.#keepingPins, this.#readingBack, this.#renewing];
  }

  /** Has the mirror learn at once of interfaces and their addresses that were changed from here. */
  #learnLinks(what: string): void {
    this.#attempts.must(what, () => {
      for (const events of survey(this.#host, this.#world.kernel, ["link", "address"])) this.#learn(events);
    });
  }
}

/** What the host and the config together give. */
interface Base {
  readonly network: Network;
  readonly uplink: Uplink;
  readonly overlay: Overlay | undefined;
}

/** Replaces one row that a lease wants by another. */
function exchange<Row>(
  table: Table<Row>,
  owner: string,
  keyOf: (row: Row) => string,
  before: Row | undefined,
  after: Row | undefined,
): void {
  if (before === after) return;
  const [formerKey, key] = [before && keyOf(before), after && keyOf(after)];
  if (after !== undefined && key !== undefined) table.want(key, after, owner);
  if (formerKey !== undefined && formerKey !== key) table.unwant(formerKey, owner);
}

function neighbourOf(row: {
  index: number;
  address: Ipv4;
  mac: Mac | undefined;
  state: number;
}): NeighbourRow | undefined {
  if (row.mac === undefined || (row.state & PERMANENT) === 0) return undefined;
  return { index: row.index, address: row.address, mac: row.mac };
}

function fdbOf(row: { index: number; mac: Mac; dst: Ipv4 | undefined }): FdbRow | undefined {
  return row.dst === undefined ? undefined : { index: row.index, mac: row.mac, dst: row.dst };
}
