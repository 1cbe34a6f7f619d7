/**
 * The daemon: reads the command line, opens the outside world, wires it to the agent, and ends.
 *
 * Ending leaves everything in the kernel as it is; only `twill uninstall` takes it away. Exit codes: 0 a clean
 * end, 1 a failure, 2 a command line that can't be obeyed.
 */
import { createHash, randomInt } from "node:crypto";
import { existsSync, readFileSync } from "node:fs";
import { uptime } from "node:os";
import { dirname, join, resolve } from "node:path";
import { setImmediate as nextTurn } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { CompileError, compile } from "../loader/index.ts";
import { ABI_DIGEST, type HookCounts, type VerdictCounts } from "./abi/twill.gen.ts";
import { Agent, type AgentStatus } from "./agent.ts";
import { claimOf } from "./core/claim.ts";
import { isUnanswered } from "./core/host.ts";
import type { FastPath } from "./core/image.ts";
import { formatCidr, formatIpv4, type Ipv4 } from "./core/ipv4.ts";
import { LEASE_REPORTS } from "./core/leaselife.ts";
import { type Masquerade, timeoutsOf } from "./core/masquerade.ts";
import { reservePorts } from "./core/ports.ts";
import type { PeerHealth } from "./core/probes.ts";
import { readSubnetFile } from "./core/subnetfile.ts";
import { openRunner } from "./edge/command.ts";
import { translatedTuples } from "./edge/conntrack.ts";
import {
  type Census,
  countEntries,
  Dataplane,
  mapCapacity,
  NO_TRAFFIC,
  type PeerTraffic,
  readCensus,
  readCounters,
  readPrograms,
  readTraffic,
} from "./edge/dataplane.ts";
import { openStore, type StoreState } from "./edge/etcd.ts";
import { openFirewall } from "./edge/firewall.ts";
import {
  bootId,
  defaultTtl,
  localPortRange,
  RESERVED_PORTS,
  readCapabilities,
  readSysctl,
  touchFile,
  writeFileAtomically,
  writeSysctl,
} from "./edge/host.ts";
import { giveBackMemory } from "./edge/memory.ts";
import { openNetlink } from "./edge/netlink.ts";
import { openNotifier } from "./edge/notify.ts";
import { openProber } from "./edge/probe.ts";
import {
  claim,
  enterRundir,
  leaveRundir,
  type PeerNote,
  type PeersNote,
  peersPathOf,
  readAdded,
  readMasqueradeNote,
  readTrialNote,
  removeAdded,
  statusPathOf,
  writeAdded,
  writeMasqueradeNote,
  writeTrialNote,
} from "./edge/rundir.ts";
import { type Collected, createTelemetry, type Telemetry } from "./edge/telemetry.ts";
import { parseFlags, type Settings, UsageError } from "./flags.ts";

/** The folder of the installation: what is built lies in its dist/. */
const ROOT = join(dirname(fileURLToPath(import.meta.url)), "..", "..");
const OBJECT = join(ROOT, "dist", "bpf", "twill.bpf.o");
const SOURCE = join(ROOT, "bpf", "twill.bpf.c");
const CACHE = "/var/cache/twill";
/** What ends by itself after a signal has so long; then the process ends without it. */
const STOP_MS = 10_000;
const STATUS_MS = 500;
/** After how long a start and the first looks at all that it wrote are over, in two steps, see `giveBackMemory`. */
const SETTLED_MS = [15_000, 17_000];
/** After how long a service manager that did not take a message is told again. */
const NOTIFY_AGAIN_MS = 500;
/** How long changes of the status are gathered before the log tells of them. */
const TELL_MS = 50;
/** How old what is written of each peer may be, unless they are many; that one ceased to answer is written at once. */
const PEERS_MS = 5000;
/** For each peer, between two times: with 10,000, each of which is asked every few minutes, two minutes. */
const PEER_PAUSE_MS = 12;
/** Peers that are made text in one go, in a millisecond or two. */
const PEERS_PER_GO = 250;
/** Peers that are written. */
const PEERS_LISTED = 10_000;
/** How often the flows that stay on the stack are counted at most, and the pause between two steps of a count. */
const FLOWS_MS = 10_000;
const FLOWS_STEP_MS = 20;
/**
 * How often to look for what the kernel tells nobody of: tunnel packets dropped as no peer's, programs detached. That has
 * to be mended within a second, and sooner where no packet gets by without a program. Waking up costs a millisecond
 * or two of processor time, whatever is looked at then.
 */
const UNTOLD_MS = 850;
const UNTOLD_VITAL_MS = 250;

const FAST_PATHS: Readonly<Record<Settings["fastPath"], FastPath>> = {
  off: "FAST_PATH_OFF",
  auto: "FAST_PATH_AUTO",
  always: "FAST_PATH_ALWAYS",
};

let versionRead: string | undefined;
const version = (): string => {
  versionRead ??= (JSON.parse(readFileSync(join(ROOT, "package.json"), "utf8")) as { version: string })
    .version;
  return versionRead;
};

/** The compiled programs: as installed, or compiled now from the sources beside them. */
function findObject(): string {
  if (existsSync(OBJECT)) return OBJECT;
  const missing = `the programs are missing (${OBJECT})`;
  if (!existsSync(SOURCE)) throw new Error(`${missing}, and so are their sources: install Twill again`);
  try {
    return compile({ source: SOURCE, includeDirs: [dirname(SOURCE)], cacheDir: CACHE }).path;
  } catch (error) {
    if (!(error instanceof CompileError)) throw error;
    throw new Error(`${missing} and could not be compiled: ${error.message}`);
  }
}

function previousSubnet(path: string): ReturnType<typeof readSubnetFile>["subnet"] {
  return existsSync(path) ? readSubnetFile(readFileSync(path, "utf8")).subnet : undefined;
}

async function main(): Promise<number> {
  let settings: Settings;
  try {
    const invocation = parseFlags(process.argv.slice(2), process.env);
    if (invocation.kind === "help") {
      process.stdout.write(invocation.text);
      return 0;
    }
    if (invocation.kind === "version") {
      process.stderr.write(`${version()}\n`);
      return 0;
    }
    settings = invocation.settings;
  } catch (error) {
    if (!(error instanceof UsageError)) throw error;
    process.stderr.write(`twilld: ${error.message}\n`);
    return 2;
  }
  const telemetry = createTelemetry({
    version: version(),
    abi: ABI_DIGEST.slice(0, 12),
    logFormat: settings.logFormat,
    logLevel: settings.logLevel,
  });
  try {
    return await run(settings, telemetry);
  } catch (error) {
    telemetry.log.error(error instanceof Error ? error.message : String(error));
    return 1;
  } finally {
    await telemetry.close();
  }
}

/** What sets each sysctl of ours that is otherwise, and returns how many were. */
function sysctlKeeper(settings: Settings): (device: string | undefined) => number {
  let ports: string | undefined;
  return (device) => {
    let changed = 0;
    const quiet = device === undefined ? undefined : ["ipv6", "conf", device, "accept_ra"];
    const before = quiet && readSysctl(quiet);
    if (quiet !== undefined && before !== undefined && before !== "0") {
      writeSysctl(quiet, "0");
      changed += 1;
    }
    const note =
      settings.ipMasq && readSysctl(RESERVED_PORTS) !== ports && readMasqueradeNote(settings.pinPath);
    if (note && reserveMasqueradePorts(settings, note)) changed += 1;
    if (note) ports = readSysctl(RESERVED_PORTS);
    return changed;
  };
}

/**
 * Reserves the ports of masqueraded connections, or gives back those of an earlier run, and notes what is ours; whether
 * there was anything to do.
 */
function reserveMasqueradePorts(
  { pinPath, ipMasq, masqPorts }: Settings,
  note: { readonly seed: number; readonly reserved: string },
): boolean {
  const before = readSysctl(RESERVED_PORTS) ?? "";
  const wanted = ipMasq ? `${masqPorts.first}-${masqPorts.last}` : "";
  const { reserved, ours } = reservePorts(before, note.reserved, wanted);
  if (ours !== note.reserved) writeMasqueradeNote(pinPath, { seed: note.seed, reserved: ours });
  if (reserved === before) return false;
  writeSysctl(RESERVED_PORTS, `${reserved}\n`);
  return true;
}

/** Sees to the ports of masqueraded connections, and gathers what the programs must know. */
function prepareMasquerade(settings: Settings): Masquerade | undefined {
  const { pinPath, masqPorts, masqExclude } = settings;
  const note = readMasqueradeNote(pinPath);
  if (note === undefined && !settings.ipMasq) return undefined;
  const seed = note?.seed ?? randomInt(2 ** 32);
  if (note === undefined) writeMasqueradeNote(pinPath, { seed, reserved: "" });
  reserveMasqueradePorts(settings, note ?? { seed, reserved: "" });
  if (!settings.ipMasq) return undefined;
  const timeouts = timeoutsOf((name) => readSysctl(["netfilter", name]));
  const connections = settings.masqMaxConnections;
  return { ports: masqPorts, excluded: masqExclude, timeouts, seed, connections };
}

async function run(settings: Settings, telemetry: Telemetry): Promise<number> {
  const { log } = telemetry;
  const { pinPath } = settings;
  log.info({ version: version() }, "twilld starts");
  for (const note of settings.notes) log.warn(note);

  const { problem } = readCapabilities();
  if (problem !== undefined) throw new Error(problem);
  if (settings.healthzPort !== 0) await telemetry.listen(settings.healthzIp, settings.healthzPort);
  const object = findObject();
  const trial = trialOf(object, settings);
  enterRundir(pinPath, settings.etcd.prefix);
  let dataplane: Dataplane | undefined;
  try {
    const tried = trial !== undefined && readTrialNote(pinPath) === trial;
    log.debug({ tried }, tried ? "this kernel has taken the programs before" : "trying the programs");
    dataplane = Dataplane.open({
      pinPath,
      attach: settings.attach,
      object,
      connections: settings.ipMasq ? settings.masqMaxConnections : 0,
      translated: () => {
        try {
          return translatedTuples();
        } catch (error) {
          // A kernel without this translates nothing, or cannot tell.
          log.warn({ reason: String(error) }, "connections that the host translates are not known");
          return [];
        }
      },
    });
    const prepared = dataplane.prepare(tried);
    prepared.catch(() => undefined); // Whoever waits for it tells.
    // Ports are reserved, or given back, before all else.
    if (settings.ipMasq || readMasqueradeNote(pinPath) !== undefined) await prepared;
    return await serve(settings, telemetry, dataplane, prepared, () => {
      if (trial === undefined || tried) return;
      try {
        writeTrialNote(pinPath, trial);
      } catch (error) {
        log.debug({ reason: String(error) }, "the next start will try the programs again");
      }
    });
  } finally {
    dataplane?.close();
    leaveRundir(pinPath);
  }
}

/**
 * Names the programs, what they are loaded for, and the kernel as it runs now. Trying them takes the verifier as long as
 * loading them, and a restart need not wait for it: what this kernel took, it takes again.
 */
function trialOf(object: string, { ipMasq }: Settings): string | undefined {
  const boot = bootId();
  if (boot === undefined) return undefined;
  const digest = createHash("sha256").update(readFileSync(object)).digest("hex");
  return `${boot} ${digest} ${ipMasq ? "masquerade" : "plain"}`;
}

/**
 * Runs the agent until a signal or its failure ends it; nothing is made before the dataplane is `prepared`. `onReady` is
 * told once that all is in force.
 */
async function serve(
  settings: Settings,
  telemetry: Telemetry,
  dataplane: Dataplane,
  prepared: Promise<void>,
  onReady: () => void,
): Promise<number> {
  const { log, metrics } = telemetry;
  const notifier = openNotifier();
  const stopping = new AbortController();
  let outcome = 0;
  /** A manager that has other things to do may have no room for it now, and would end us if it never heard it. */
  const tellReady = (attempt = 1): void => {
    const reason = notifier.ready();
    if (reason === undefined || stopping.signal.aborted) return;
    if (attempt === 1)
      log.warn({ reason }, "the service manager was not told that we are ready; trying again");
    setTimeout(() => tellReady(attempt + 1), NOTIFY_AGAIN_MS).unref();
  };
  const stop = (code: number): void => {
    if (stopping.signal.aborted) process.exit(code === 0 ? 1 : code);
    outcome = code;
    notifier.stopping();
    stopping.abort();
    setTimeout(() => process.exit(code), STOP_MS).unref();
  };
  for (const signal of ["SIGTERM", "SIGINT", "SIGQUIT"] as const) {
    process.on(signal, () => {
      log.info({ signal }, "stopping; forwarding stays as it is");
      stop(0);
    });
  }

  const isPrepared = prepared.catch((error: unknown) => {
    log.error(error instanceof Error ? error.message : String(error));
    stop(1);
  });

  const status = new StatusKeeper(settings, telemetry, dataplane.mode);
  const store = await openStore({
    ...settings.etcd,
    log,
    onState: (state) => status.onStore(state),
  });
  const netlink = openNetlink({
    onEvent: (event) => agent.onNetlink(event),
    onOverrun: () => agent.onOverrun(),
  });
  const { first, last } = localPortRange();
  const agent = new Agent(
    {
      wish: settings,
      renewMarginMs: settings.renewMarginMinutes * 60_000,
      leaseTtlSeconds: settings.leaseTtlSeconds,
      previous: previousSubnet(settings.subnetFile),
      fastPath: FAST_PATHS[settings.fastPath],
      forwardRules: settings.forwardRules,
      ipMasq: settings.ipMasq,
      masquerade: prepareMasquerade(settings),
      blackholeRoute: settings.blackholeRoute,
      followConfig: settings.followConfig,
      resyncMs: settings.resyncSeconds * 1000,
      sourcePorts: { min: first, max: last },
      ttl: defaultTtl(),
      probeMs: settings.peerProbeSeconds === 0 ? undefined : settings.peerProbeSeconds * 1000,
      countPeers: settings.metricsPeers > 0,
    },
    {
      kernel: {
        read: (table) => netlink.read(table),
        routesTo: (addresses) =>
          netlink.routesTo(addresses).map((route) => {
            if (route?.outIndex === undefined || route.local || route.viaIpv6) return undefined;
            return { ...route, outIndex: route.outIndex };
          }),
        apply: (writes) => netlink.apply(writes),
        resolveNeighbours: (index) => {
          const unanswered = netlink
            .neighbours()
            .filter((row) => row.index === index && isUnanswered(row.state));
          for (const write of ["dropResolution", "resolveNeighbour"] as const)
            netlink.apply(unanswered.map(({ address }) => ({ write, index, address })));
        },
        keepSysctls: sysctlKeeper(settings),
        showsNexthops: () => readSysctl(["ipv4", "nexthop_compat_mode"]) === "1",
      },
      dataplane,
      store,
      clock: {
        now: () => performance.now(),
        uptime: () => uptime() * 1000,
        after: (ms, callback) => {
          // Longer than a timer can be (24.8 days) never happens: a lease lives a day.
          // A timer cuts fractions off, and would fire before its time.
          const timer = ms === 0 ? setImmediate(callback) : setTimeout(callback, Math.ceil(ms));
          return () =>
            ms === 0 ? clearImmediate(timer as NodeJS.Immediate) : clearTimeout(timer as NodeJS.Timeout);
        },
      },
      random: Math.random,
      openProber,
      claim: (network) =>
        claim(
          settings.pinPath,
          claimOf(network, {
            prefix: settings.etcd.prefix,
            subnetFile: resolve(settings.subnetFile),
            masqPorts: settings.ipMasq ? settings.masqPorts : undefined,
          }),
        ),
      runner: openRunner(),
      added: {
        all: () => readAdded(settings.pinPath),
        put: (key, text) => writeAdded(settings.pinPath, key, text),
        remove: (key) => removeAdded(settings.pinPath, key),
      },
      writeSubnetFile: (text) => writeFileAtomically(settings.subnetFile, text),
      log,
      observer: {
        reconciled: (result, seconds) => {
          metrics.reconciles.inc({ result });
          metrics.reconcileDuration.observe(seconds);
        },
        repaired: (table, rows) => metrics.driftRepaired.inc({ table }, rows),
        failed: (table) => metrics.operationsFailed.inc({ table }),
        probed: (seconds) => {
          metrics.probes.inc({ result: seconds === undefined ? "lost" : "answered" });
          if (seconds !== undefined) metrics.probeDuration.observe(seconds);
        },
        lease: (event) => metrics.leaseEvents.inc({ event }),
        changed: () => status.changed(),
        ready: () => {
          // Whoever is told that we are ready may ask what we are ready with.
          status.write();
          telemetry.setReady(true);
          onReady();
          tellReady();
          for (const ms of SETTLED_MS) setTimeout(giveBackMemory, ms).unref();
          log.info("ready: pods are forwarded and the subnet file is written");
        },
      },
    },
    (error) => {
      log.error(error.message);
      stop(1);
    },
  );
  // Of one that can't run here, no file is left.
  void prepared.then(
    () => {
      status.read = () => agent.status();
      status.readPeers = () => agent.peers();
    },
    () => undefined,
  );
  // A series that begins with its first increment hides it from rate() and increase().
  for (const event of LEASE_REPORTS) metrics.leaseEvents.inc({ event }, 0);
  metrics.leaseTtl.set(settings.leaseTtlSeconds);
  metrics.leaseRenewMargin.set(settings.renewMarginMinutes * 60);
  const flows = new FlowCount(settings.pinPath);
  telemetry.collect(() => collect(settings, agent, flows, telemetry));
  if (notifier.watchdogMilliseconds !== undefined) {
    setInterval(() => notifier.watchdog(), notifier.watchdogMilliseconds).unref();
  }

  const firewall =
    settings.fastPath === "auto"
      ? await openFirewall({
          checkMs: settings.resyncSeconds * 1000,
          onRules: (rules) => agent.onFirewall(rules),
        })
      : undefined;
  agent.start();
  const unwatch = watchUntold(dataplane, agent);
  for await (const event of store.watch(stopping.signal)) {
    // With this one, the agent begins to make what it needs.
    if (event.kind === "synced") await isPrepared;
    if (stopping.signal.aborted) break;
    for (const _ of agent.takeStore(event)) await nextTurn();
  }

  unwatch();
  agent.stop();
  flows.stop();
  status.stop();
  store.close();
  firewall?.close();
  netlink.close();
  return outcome;
}

/**
 * Looks for what the kernel tells nobody of: a row that is gone, for packets are dropped as no peer's, and a program. Until
 * the function that it returns is called.
 */
function watchUntold(dataplane: Dataplane, agent: Agent): () => void {
  let before = 0;
  let timer: NodeJS.Timeout;
  const look = (): void => {
    const isVital = agent.checkAttachments();
    try {
      const refused = dataplane.refused();
      if (refused > before) agent.onRefused();
      before = refused;
    } catch {
      // Whatever keeps the counters from being read, the next resync meets it too, and shows it.
    }
    timer = setTimeout(look, isVital ? UNTOLD_VITAL_MS : UNTOLD_MS);
  };
  timer = setTimeout(look, UNTOLD_VITAL_MS);
  return () => clearTimeout(timer);
}

/** Keeps the status file and the log in step with the agent, each change once. */
class StatusKeeper {
  read: (() => AgentStatus) | undefined;
  readPeers: (() => Iterable<PeerHealth>) | undefined;
  readonly #settings: Settings;
  readonly #telemetry: Telemetry;
  readonly #mode: string;
  readonly #startedAt = new Date().toISOString();
  #store: StoreState | undefined;
  #timer: NodeJS.Timeout | undefined;
  #telling: NodeJS.Timeout | undefined;
  readonly #peersTimer: NodeJS.Timeout | undefined;
  /** Milliseconds of the process's clock. */
  #peersDue = 0;
  /** The file of peers that is being made. */
  #peersText: Generator<undefined, string> | undefined;
  /** What is in the file, and the end of the lease that it gives. */
  #written: string | undefined;
  #leaseEndsAt = 0;
  #phase = "";
  #wasConnected = false;
  #told = new Map<string, string>();

  constructor(settings: Settings, telemetry: Telemetry, mode: string) {
    this.#settings = settings;
    this.#telemetry = telemetry;
    this.#mode = mode;
    if (settings.peerProbeSeconds !== 0)
      this.#peersTimer = setInterval(() => this.#keepPeers(), PEERS_MS).unref();
  }

  onStore(state: StoreState): void {
    this.#store = state;
    const { log, metrics } = this.#telemetry;
    metrics.storeConnected.set(state.connected ? 1 : 0);
    if (!state.connected && this.#wasConnected) metrics.storeDisconnections.inc();
    this.#wasConnected = state.connected;
    if (state.connected) log.info({ endpoint: state.endpoint }, "connected to etcd");
    else log.warn(`no connection to etcd, trying again: ${state.error?.message ?? "not connected yet"}`);
    this.changed();
  }

  /** Writes the log and the file soon, and once for changes that come together. */
  changed(): void {
    this.#telling ??= setTimeout(() => this.#look(), TELL_MS);
  }

  /** Tells the log, and has the file written a little later if it is another now. */
  #look(): void {
    this.#tell();
    if (this.#timer !== undefined) return;
    if (this.#isWritten()) this.#keepPeers();
    else this.#timer = setTimeout(() => this.#write(), STATUS_MS - TELL_MS);
  }

  /** Writes the file at once, and the log before. */
  write(): void {
    this.#tell();
    clearTimeout(this.#timer);
    this.#write();
  }

  /** Writes the files a last time. The log goes on with why it ends, not with what was still to be told. */
  stop(): void {
    clearInterval(this.#peersTimer);
    clearTimeout(this.#telling);
    clearTimeout(this.#timer);
    this.#beginPeers();
    while (this.#stepPeers());
    this.#write();
  }

  current(): AgentStatus | undefined {
    return this.read?.();
  }

  #tell(): void {
    clearTimeout(this.#telling);
    this.#telling = undefined;
    const status = this.current();
    if (status === undefined) return;
    const { log } = this.#telemetry;
    const { prefix } = this.#settings.etcd;
    if (status.phase !== this.#phase) {
      this.#phase = status.phase;
      log.info({ phase: status.phase }, "phase");
    }
    const told = new Map<string, string>();
    for (const { key, reason } of [...status.rejections, ...status.ignored]) {
      if (told.size >= 1000) break;
      told.set(key, reason);
      if (this.#told.get(key) === reason) continue;
      if (key !== "config") log.warn({ key: `${prefix}/subnets/${key}` }, `record set aside: ${reason}`);
      else if (status.network !== undefined) log.warn(`the network config cannot be used: ${reason}`);
      else log.warn(`waiting for a network config at ${prefix}/config: ${reason}`);
    }
    for (const warning of status.warnings) {
      told.set(warning, warning);
      if (!this.#told.has(warning)) log.warn(warning);
    }
    this.#told = told;
  }

  #write(): void {
    this.#timer = undefined;
    this.#keepPeers();
    const text = this.#text();
    if (text === undefined) return;
    try {
      this.#written = undefined;
      writeFileAtomically(statusPathOf(this.#settings.pinPath), text);
      this.#written = text;
    } catch (cause) {
      this.#telemetry.log.warn({ reason: String(cause) }, "the status file could not be written");
    }
  }

  /** Whether the file says what is to be said; it is then given a new age, which tells whether we are at work. */
  #isWritten(): boolean {
    if (this.#written === undefined || this.#text() !== this.#written) return false;
    try {
      return touchFile(statusPathOf(this.#settings.pinPath));
    } catch {
      // To write it will fail as well, and say why.
      return false;
    }
  }

  /** What is to be in the file. */
  #text(): string | undefined {
    const status = this.current();
    if (status === undefined) return undefined;
    const { connected = false, since, endpoint, error } = this.#store ?? {};
    const { keyFile, certFile, caFile, ...etcd } = this.#settings.etcd;
    const place = (path: string | undefined) => path && resolve(path);
    const content = {
      version: version(),
      pid: process.pid,
      startedAt: this.#startedAt,
      ...status,
      revision: `${status.revision}`,
      leaseEndsAt: status.leaseEndsInMs === undefined ? undefined : this.#endOfLease(status.leaseEndsInMs),
      leaseEndsInMs: undefined,
      fastPath: this.#settings.fastPath,
      attach: this.#mode,
      subnetFile: resolve(this.#settings.subnetFile),
      // What `twill doctor` asks etcd with, once we are dead; no secrets.
      etcd: {
        ...etcd,
        keyFile: place(keyFile),
        certFile: place(certFile),
        caFile: place(caFile),
        password: undefined,
      },
      ipMasq: this.#settings.ipMasq,
      resyncSeconds: this.#settings.resyncSeconds,
      renewMarginMinutes: this.#settings.renewMarginMinutes,
      leaseTtlSeconds: this.#settings.leaseTtlSeconds,
      store: {
        connected,
        since: since === undefined ? undefined : new Date(since).toISOString(),
        endpoint,
        error: error?.message,
      },
    };
    return `${JSON.stringify(content, null, 2)}\n`;
  }

  /** By the wall clock, and the same again as long as it is the same but for what the two clocks differ. */
  #endOfLease(inMs: number): string {
    const end = Date.now() + inMs;
    if (Math.abs(end - this.#leaseEndsAt) >= 1000) this.#leaseEndsAt = end;
    return new Date(this.#leaseEndsAt).toISOString();
  }

  /** The more peers, the longer the file takes to write, and the more rarely it is written. */
  #keepPeers(): void {
    if (performance.now() < this.#peersDue || this.#peersText !== undefined) return;
    this.#beginPeers();
    this.#goOnWithPeers();
  }

  /** A file of its own, as it is long where peers are many, and changes all the time. */
  #beginPeers(): void {
    if (this.#settings.peerProbeSeconds === 0 || this.readPeers === undefined) return;
    const all = [...this.readPeers()];
    this.#peersDue = performance.now() + PEER_PAUSE_MS * all.length;
    this.#peersText = textOfPeers(worstFirst(all, PEERS_LISTED), all.length);
  }

  #goOnWithPeers(): void {
    if (this.#stepPeers()) setImmediate(() => this.#goOnWithPeers());
  }

  /** Returns whether there is more to do. */
  #stepPeers(): boolean {
    const step = this.#peersText?.next();
    if (step === undefined) return false;
    if (step.done !== true) return true;
    this.#peersText = undefined;
    this.#writePeers(step.value);
    return false;
  }

  #writePeers(text: string): void {
    try {
      writeFileAtomically(peersPathOf(this.#settings.pinPath), text);
    } catch (cause) {
      this.#telemetry.log.warn({ reason: String(cause) }, "the file of peers could not be written");
    }
  }
}

/** The text of a `PeersNote`, made of some peers at a time. */
function* textOfPeers(peers: readonly PeerHealth[], known: number): Generator<undefined, string> {
  const { pid } = process;
  const head: Omit<PeersNote, "peers"> = {
    pid,
    at: new Date().toISOString(),
    leftOut: known - peers.length,
  };
  const parts: string[] = [];
  for (let from = 0; from < peers.length; from += PEERS_PER_GO) {
    if (from > 0) yield;
    const some = peers.slice(from, from + PEERS_PER_GO);
    parts.push(some.map((peer) => JSON.stringify(noteOf(peer))).join(","));
  }
  return `${JSON.stringify(head).slice(0, -1)},"peers":[${parts.join(",")}]}\n`;
}

/** Of too many peers those that do not answer. */
function worstFirst(peers: readonly PeerHealth[], most: number): readonly PeerHealth[] {
  if (peers.length <= most) return peers;
  const answers = ({ state }: PeerHealth): number => (state === "unreachable" ? 0 : 1);
  return [...peers].sort((a, b) => answers(a) - answers(b)).slice(0, most);
}

function noteOf(peer: PeerHealth): PeerNote {
  const { state, losses, reason, answeredAt } = peer;
  const rounded = (ms: number | undefined) => (ms === undefined ? undefined : Math.round(ms * 1000) / 1000);
  return {
    subnet: formatCidr(peer.subnet),
    publicIp: formatIpv4(peer.publicIp),
    target: formatIpv4(peer.target),
    ...{ state, losses, reason },
    rttMs: rounded(peer.rttMs),
    smoothedMs: rounded(peer.smoothedMs),
    answeredAt:
      answeredAt === undefined
        ? undefined
        : new Date(Date.now() - (performance.now() - answeredAt)).toISOString(),
  };
}

/**
 * How many flows stay on the stack. The kernel does not know how many entries a map has: they are counted some at a
 * time, as a scrape must not wait for it, and only for those who scrape: each time for the next one, and once before.
 */
class FlowCount {
  readonly #pinPath: string;
  #entries: number | undefined;
  #timer: NodeJS.Timeout | undefined;
  #dueAt = 0;

  constructor(pinPath: string) {
    this.#pinPath = pinPath;
    this.#wait();
  }

  /** As counted last. */
  get entries(): number | undefined {
    if (this.#timer === undefined && performance.now() >= this.#dueAt) this.#begin();
    return this.#entries;
  }

  stop(): void {
    clearTimeout(this.#timer);
  }

  /** Waits for the map to be there. */
  #wait(): void {
    this.#timer = setTimeout(() => this.#begin(), FLOWS_STEP_MS).unref();
  }

  #begin(): void {
    if (existsSync(join(this.#pinPath, "flows4"))) this.#step(countEntries(this.#pinPath, "flows4"), 0);
    else this.#wait();
  }

  #step(count: Generator<number>, so: number): void {
    let step: IteratorResult<number>;
    try {
      step = count.next();
    } catch {
      // The map is gone, or was replaced by one of another layout.
      this.#end(undefined);
      return;
    }
    if (step.done === true) this.#end(so);
    else this.#timer = setTimeout(() => this.#step(count, step.value), FLOWS_STEP_MS).unref();
  }

  #end(entries: number | undefined): void {
    this.#entries = entries;
    this.#timer = undefined;
    this.#dueAt = performance.now() + FLOWS_MS;
  }
}

/**
 * What a scrape reads. None of it walks a table, so that it costs the same however many peers and connections there
 * are: what the agent fills is counted there, and connections are by the sweep. Only peers one by one are a table.
 */
function collect(settings: Settings, agent: Agent, flows: FlowCount, { metrics }: Telemetry): Collected {
  const { pinPath, ipMasq, masqPorts } = settings;
  const now = agent.status();
  metrics.desiredRevision.set(Number(now.revision));
  if (now.failures.length === 0 && agent.isUpToDate) metrics.appliedRevision.set(Number(now.revision));
  metrics.peers.set(now.peers);
  metrics.endpoints.set(now.endpoints);
  metrics.recordsRejected.set(now.rejections.length);
  metrics.recordsIgnored.set(now.ignored.length);
  metrics.operationsFailing.set(now.failures.length);
  metrics.fastPathSuspended.set(now.firewall?.needsStack === true ? 1 : 0);
  metrics.leaseExpiry.set(now.leaseEndsInMs === undefined ? 0 : (Date.now() + now.leaseEndsInMs) / 1000);
  const { probes } = now;
  const common = {
    probed: probes && {
      reachable: probes.reachable,
      unreachable: probes.unreachable,
      unknown: probes.unknown,
    },
    peers: listed(agent, settings),
  };
  if (!existsSync(join(pinPath, "counters"))) return { ...common, traffic: [], maps: [] };
  const counters = readCounters(pinPath);
  const hooks = Object.keys(counters) as (keyof HookCounts)[];
  const census = ipMasq ? readCensus(pinPath) : undefined;
  const entries: Readonly<Record<string, number | undefined>> = {
    ...agent.entries(),
    flows4: flows.entries,
    ...(ipMasq ? { connections4: census && total(census) } : {}),
  };
  return {
    ...common,
    traffic: hooks.flatMap((hook) =>
      (Object.keys(counters[hook]) as (keyof VerdictCounts)[]).map((verdict) => ({
        hook,
        verdict,
        ...counters[hook][verdict],
      })),
    ),
    maps: (Object.keys(entries) as Parameters<typeof mapCapacity>[1][]).map((map) => ({
      map,
      entries: entries[map],
      capacity: mapCapacity(pinPath, map),
    })),
    masquerade: census && { ...census, ports: masqPorts.last - masqPorts.first + 1 },
    programs: readPrograms(pinPath)
      .map(({ hook, info }) => ({ program: hook, runs: info.runCount, nanoseconds: info.runTimeNs }))
      .filter(({ runs }) => runs > 0n),
  };
}

function total({ connections }: Census): number {
  const counts = Object.values(connections).flatMap((states) => Object.values(states));
  return counts.reduce((sum, count) => sum + count, 0);
}

/** So many peers at most, those that do not answer first; without probes, as they come. */
function listed(
  agent: Agent,
  { pinPath, metricsPeers, peerProbeSeconds }: Settings,
): NonNullable<Collected["peers"]> {
  if (metricsPeers === 0) return [];
  const traffic = existsSync(join(pinPath, "traffic4")) ? readTraffic(pinPath) : undefined;
  const trafficOf = (publicIp: Ipv4): PeerTraffic | undefined =>
    traffic && (traffic.get(publicIp) ?? NO_TRAFFIC);
  if (peerProbeSeconds === 0) {
    const nothing = { reachable: undefined, losses: undefined, smoothedMs: undefined };
    return Array.from(take(agent.forwarded(), metricsPeers), ({ subnet, prefixLength, publicIp }) => ({
      subnet: formatCidr({ address: subnet, length: prefixLength }),
      peer: formatIpv4(publicIp),
      ...nothing,
      traffic: trafficOf(publicIp),
    }));
  }
  return worstFirst([...agent.peers()], metricsPeers).map(
    ({ subnet, publicIp, state, losses, smoothedMs }) => ({
      subnet: formatCidr(subnet),
      peer: formatIpv4(publicIp),
      reachable: state === "unknown" ? undefined : state === "reachable",
      losses,
      smoothedMs,
      traffic: trafficOf(publicIp),
    }),
  );
}

function* take<T>(from: Iterable<T>, most: number): Generator<T> {
  let left = most;
  for (const each of from) {
    if (left === 0) return;
    left -= 1;
    yield each;
  }
}

// Which parts of Node a package uses is nothing that a reader of our log could change.
(process as { noDeprecation?: boolean }).noDeprecation = true;
// No top-level await: in a bundle this is a CommonJS module.
main().then((code) => {
  process.exitCode = code;
});
