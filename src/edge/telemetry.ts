/**
 * What the daemon says of itself: log lines, health over HTTP, and metrics.
 *
 * Lines are written synchronously to stderr, so that the last words before an exit arrive. The text form is one
 * line a person can read and a program can split; the JSON form is pino's own.
 *
 * The HTTP server answers as flanneld's does: /healthz is 200 as long as the process runs, /readyz is 503 until
 * the node forwards. Numbers that the kernel counts are not kept here: the caller's `collect` reads them while
 * a scrape waits, and a scrape whose `collect` fails still gets all the others.
 */
import { once } from "node:events";
import { readdirSync, readFileSync, writeSync } from "node:fs";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import { type DestinationStream, type Logger, pino } from "pino";
import prom, { type Counter, type Gauge, type Histogram, type Registry } from "prom-client";

export type LogFormat = "text" | "json";
export type LogLevel = "trace" | "debug" | "info" | "warn" | "error" | "fatal";

export interface TelemetryOptions {
  /** Version of Twill, and of the layout shared with the BPF programs, for `twill_build_info`. */
  readonly version: string;
  readonly abi: string;
  readonly logFormat: LogFormat;
  readonly logLevel: LogLevel;
  /** Where complete lines go; stderr unless given. */
  readonly write?: (line: string) => void;
}

/** What the kernel knows at the moment of a scrape; absolute values, not increments. */
export interface Collected {
  /** One row per hook and verdict: packets and bytes since the maps were made. */
  readonly traffic: readonly {
    readonly hook: string;
    readonly verdict: string;
    readonly packets: number | bigint;
    readonly bytes: number | bigint;
  }[];
  /** `entries` is undefined where it is not known yet. */
  readonly maps: readonly {
    readonly map: string;
    readonly entries: number | undefined;
    readonly capacity: number;
  }[];
  /** Masqueraded connections; undefined without masquerade, or before they were counted. */
  readonly masquerade?:
    | {
        readonly connections: Readonly<Record<string, Readonly<Record<string, number>>>>;
        readonly capacity: number;
        readonly ports: number;
        /** Candidate ports that a connection had to try at most, and how many there are. */
        readonly furthest: number;
        readonly candidates: number;
      }
    | undefined;
  /** Those that the kernel has counted. */
  readonly programs?: readonly {
    readonly program: string;
    readonly runs: bigint;
    readonly nanoseconds: bigint;
  }[];
  /** Probed peers by state. */
  readonly probed?: Readonly<Record<string, number>> | undefined;
  /** Peers one by one, as far as asked for. */
  readonly peers?: readonly {
    readonly subnet: string;
    readonly peer: string;
    /** What probes say; undefined where they say nothing. */
    readonly reachable: boolean | undefined;
    readonly losses: number | undefined;
    readonly smoothedMs: number | undefined;
    /** Since they are counted; undefined where they are not. */
    readonly traffic?: Readonly<Record<"sent" | "received", { packets: number; bytes: number }>> | undefined;
  }[];
}

/** Every metric that the daemon sets itself, with the prefix `twill_` and the names in snake case. */
export interface Metrics {
  /** 1 while the watch of etcd stands. */
  readonly storeConnected: Gauge;
  readonly storeDisconnections: Counter;
  /** Store revision of the desired state, and of the last one applied without a failure. */
  readonly desiredRevision: Gauge;
  readonly appliedRevision: Gauge;
  readonly peers: Gauge;
  readonly endpoints: Gauge;
  /** Records refused at present. */
  readonly recordsRejected: Gauge;
  readonly recordsIgnored: Gauge;
  readonly reconcileDuration: Histogram;
  readonly reconciles: Counter<"result">;
  readonly driftRepaired: Counter<"table">;
  readonly operationsFailed: Counter<"table">;
  readonly operationsFailing: Gauge;
  /** 1 while the host's packet filter has pods' packets take the stack. */
  readonly fastPathSuspended: Gauge;
  readonly probes: Counter<"result">;
  readonly probeDuration: Histogram;
  /** Seconds since the epoch at which our lease ends; 0 for none or for a reservation. */
  readonly leaseExpiry: Gauge;
  readonly leaseEvents: Counter<"event">;
  /** As the flags have them. */
  readonly leaseTtl: Gauge;
  readonly leaseRenewMargin: Gauge;
}

export interface Telemetry {
  readonly log: Logger;
  readonly metrics: Metrics;
  /** Names who reads the kernel's counters at each scrape. */
  collect(read: () => Collected | Promise<Collected>): void;
  /** What /readyz and `twill_ready` answer; false at first. */
  setReady(ready: boolean): void;
  /**
   * Serves HTTP on an address and port and returns the port, which differs from the given one if that is 0.
   * Rejects with an `Error` that names the flags if it cannot.
   */
  listen(ip: string, port: number): Promise<number>;
  /** Stops serving; requests under way get 3 s, as flannel gives them. */
  close(): Promise<void>;
}

const CLOSE_MS = 3_000;
const RESULTS = ["success", "failure"];
const PROBE_RESULTS = ["answered", "lost"];
/** What is reconciled, and what may be found changed. */
const TABLES = [
  "subnets4",
  "peers4",
  "endpoints4",
  "interfaces",
  "uplinks4",
  "excluded4",
  "routes",
  "neighbours",
  "fdb",
  "attachments",
];
const DRIFTING = ["routes", "neighbours", "fdb", "attachments", "maps", "pins"];

/** Prepares logging and metrics; nothing is served before `listen`. */
export function createTelemetry(options: TelemetryOptions): Telemetry {
  const log = createLog(options);
  const registry = new prom.Registry();
  const gauge = (name: string, help: string) => new prom.Gauge({ name, help, registers: [registry] });

  new prom.Gauge({
    name: "twill_build_info",
    help: "Version of Twill and of its BPF layout; always 1.",
    labelNames: ["version", "abi"],
    registers: [registry],
  }).set({ version: options.version, abi: options.abi }, 1);
  const readiness = gauge("twill_ready", "1 once the node forwards and subnet.env is written.");
  const metrics: Metrics = {
    storeConnected: gauge("twill_store_connected", "1 while the watch of etcd stands."),
    storeDisconnections: new prom.Counter({
      name: "twill_store_disconnections_total",
      help: "Times that the watch of etcd broke.",
      registers: [registry],
    }),
    desiredRevision: gauge("twill_desired_revision", "Store revision of the desired state."),
    appliedRevision: gauge("twill_applied_revision", "Store revision last applied without a failure."),
    peers: gauge("twill_peers", "Nodes that this one forwards to."),
    endpoints: gauge("twill_endpoints", "Pods of this node that packets are delivered to."),
    recordsRejected: gauge("twill_records_rejected", "Records of the store that are refused at present."),
    recordsIgnored: gauge(
      "twill_records_ignored",
      "Leases of the store that are in order, and are none that this node can forward to.",
    ),
    reconcileDuration: new prom.Histogram({
      name: "twill_reconcile_duration_seconds",
      help: "Time from a change to the kernel in step with it.",
      buckets: [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5],
      registers: [registry],
    }),
    reconciles: counter(registry, "twill_reconciles_total", "Runs of the loop, by result.", "result"),
    driftRepaired: counter(
      registry,
      "twill_drift_repaired_total",
      "Entries put right that another had changed, by table.",
      "table",
    ),
    operationsFailed: counter(
      registry,
      "twill_operations_failed_total",
      "Operations that the kernel refused, by table.",
      "table",
    ),
    operationsFailing: gauge("twill_operations_failing", "Operations that failed and are tried again."),
    fastPathSuspended: gauge(
      "twill_fast_path_suspended",
      "1 while pods' packets take the stack because of the host's packet filter.",
    ),
    probes: counter(registry, "twill_probes_total", "Probes of peers, by result.", "result"),
    probeDuration: new prom.Histogram({
      name: "twill_probe_duration_seconds",
      help: "Round trips of probes of peers that were answered.",
      buckets: [0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1],
      registers: [registry],
    }),
    leaseExpiry: gauge(
      "twill_lease_expiry_timestamp_seconds",
      "When the lease of the own subnet ends; 0 for never.",
    ),
    leaseEvents: counter(
      registry,
      "twill_lease_events_total",
      "What became of the lease of the own subnet, by event.",
      "event",
    ),
    leaseTtl: gauge("twill_lease_ttl_seconds", "How long the lease lives from each renewal."),
    leaseRenewMargin: gauge(
      "twill_lease_renew_margin_seconds",
      "How long before its end the lease is to be renewed.",
    ),
  };
  // A series that begins with its first increment hides it from rate() and increase().
  for (const result of RESULTS) metrics.reconciles.inc({ result }, 0);
  for (const table of TABLES) metrics.operationsFailed.inc({ table }, 0);
  for (const table of DRIFTING) metrics.driftRepaired.inc({ table }, 0);
  for (const result of PROBE_RESULTS) metrics.probes.inc({ result }, 0);
  processMetrics(registry);
  const scrape = kernelMetrics(registry);

  let ready = false;
  let read: (() => Collected | Promise<Collected>) | undefined;
  let server: Server | undefined;

  async function answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const path = (request.url ?? "/").replace(/\?.*/s, "");
    const say = (code: number, body: string, type = "text/plain; charset=utf-8") => {
      response.writeHead(code, { "content-type": type, "content-length": Buffer.byteLength(body) });
      response.end(request.method === "HEAD" ? undefined : body);
    };
    if (path === "/healthz") return say(200, "twilld is running\n");
    if (path === "/readyz") return say(ready ? 200 : 503, `twilld is ${ready ? "ready" : "not ready yet"}\n`);
    if (path !== "/metrics") return say(404, "there is /healthz, /readyz and /metrics\n");
    const started = performance.now();
    try {
      if (read) scrape.set(await read());
    } catch (error) {
      scrape.fail();
      log.warn(
        { error: error instanceof Error ? error.message : String(error) },
        "the kernel's counters cannot be read",
      );
    }
    scrape.took((performance.now() - started) / 1000);
    return say(200, await registry.metrics(), registry.contentType);
  }

  return {
    log,
    metrics,
    collect(reader) {
      read = reader;
    },
    setReady(value) {
      ready = value;
      readiness.set(value ? 1 : 0);
    },
    async listen(ip, port) {
      const candidate = createServer((request, response) => {
        answer(request, response).catch((error: unknown) => {
          log.error({ error: String(error), url: request.url }, "an HTTP request cannot be answered");
          response.destroy();
        });
      });
      candidate.listen(port, ip);
      try {
        await once(candidate, "listening");
      } catch (error) {
        const reason = error instanceof Error ? error.message : String(error);
        throw new Error(
          `health and metrics cannot be served on ${ip} port ${port} (${reason}): choose others with --healthz-ip and --healthz-port`,
          { cause: error },
        );
      }
      server = candidate;
      const address = candidate.address();
      return address !== null && typeof address === "object" ? address.port : port;
    },
    async close() {
      const serving = server;
      server = undefined;
      if (!serving) return;
      const closed = once(serving, "close");
      serving.close();
      serving.closeIdleConnections();
      const timer = setTimeout(() => serving.closeAllConnections(), CLOSE_MS);
      await closed;
      clearTimeout(timer);
    },
  };
}

function counter<L extends string>(registry: Registry, name: string, help: string, label: L): Counter<L> {
  return new prom.Counter({ name, help, labelNames: [label], registers: [registry] });
}

/** What is read at each scrape, set anew by it so that rows that are gone disappear. */
function kernelMetrics(registry: Registry): {
  set(collected: Collected): void;
  fail(): void;
  took(seconds: number): void;
} {
  const counts = (name: string, help: string, ...labelNames: string[]) =>
    new prom.Counter({ name, help, labelNames, registers: [registry] });
  const sizes = (name: string, help: string, ...labelNames: string[]) =>
    new prom.Gauge({ name, help, labelNames, registers: [registry] });
  const packets = counts("twill_packets_total", "Packets by hook and verdict.", "hook", "verdict");
  const bytes = counts("twill_bytes_total", "Bytes by hook and verdict.", "hook", "verdict");
  const drops = counts("twill_dropped_packets_total", "Packets that were dropped, by reason.", "reason");
  const entries = sizes("twill_map_entries", "Entries in a BPF map.", "map");
  const capacity = sizes("twill_map_capacity", "Entries that a BPF map can hold.", "map");
  const connections = sizes(
    "twill_connections",
    "Masqueraded connections, by protocol and state, when they were last counted.",
    "protocol",
    "state",
  );
  const room = sizes("twill_connections_capacity", "Masqueraded connections that there can be.");
  const ports = sizes("twill_masquerade_ports", "Ports for masqueraded connections, towards each remote.");
  const furthest = sizes(
    "twill_masquerade_port_candidates_used",
    "Ports that a connection had to try at most; with all candidates used, new ones are refused.",
  );
  const candidates = sizes("twill_masquerade_port_candidates", "Ports that a new connection may try.");
  const runs = counts("twill_program_runs_total", "Runs of a BPF program, while counted.", "program");
  const runTime = counts(
    "twill_program_run_seconds_total",
    "Time spent in a BPF program, while counted.",
    "program",
  );
  const probed = sizes("twill_probed_peers", "Peers by whether they answer probes.", "state");
  const reachable = sizes(
    "twill_peer_reachable",
    "1 if the peer answers, 0 if it ceased to; with --metrics-peers.",
    "subnet",
    "peer",
  );
  const losses = sizes(
    "twill_peer_probe_losses",
    "Answers of the peer that are missing in a row; with --metrics-peers.",
    "subnet",
    "peer",
  );
  const roundTrip = sizes(
    "twill_peer_round_trip_seconds",
    "Smoothed round trip to the peer; with --metrics-peers.",
    "subnet",
    "peer",
  );
  const peerPackets = counts(
    "twill_peer_packets_total",
    "Packets to the peer and from it; with --metrics-peers.",
    "subnet",
    "peer",
    "direction",
  );
  const peerBytes = counts(
    "twill_peer_bytes_total",
    "Bytes to the peer and from it, without the tunnel's headers; with --metrics-peers.",
    "subnet",
    "peer",
    "direction",
  );
  const failures = new prom.Counter({
    name: "twill_scrape_failures_total",
    help: "Scrapes in which the kernel's counters could not be read.",
    registers: [registry],
  });
  const duration = sizes("twill_scrape_duration_seconds", "Time that this scrape took to read them.");
  const all = [
    ...[packets, bytes, drops, entries, capacity, connections, room, ports, furthest, candidates],
    ...[runs, runTime, probed, reachable, losses, roundTrip, peerPackets, peerBytes],
  ];
  // One without labels would stay as a zero that says nothing true.
  const reset = () => {
    for (const metric of all) metric.reset();
    for (const metric of [room, ports, furthest, candidates]) metric.remove();
  };
  reset();

  const setTraffic = (traffic: Collected["traffic"]): void => {
    for (const { hook, verdict, packets: count, bytes: volume } of traffic) {
      packets.inc({ hook, verdict }, Number(count));
      bytes.inc({ hook, verdict }, Number(volume));
      const reason = /^drop_(.+)$/.exec(verdict)?.[1];
      if (reason !== undefined) drops.inc({ reason }, Number(count));
    }
  };
  const setMasquerade = (masquerade: NonNullable<Collected["masquerade"]>): void => {
    for (const [protocol, states] of Object.entries(masquerade.connections)) {
      for (const [state, count] of Object.entries(states)) connections.set({ protocol, state }, count);
    }
    room.set(masquerade.capacity);
    ports.set(masquerade.ports);
    furthest.set(masquerade.furthest);
    candidates.set(masquerade.candidates);
  };
  const setPeers = (peers: NonNullable<Collected["peers"]>): void => {
    for (const { subnet, peer, reachable: answers, losses: missing, smoothedMs, traffic } of peers) {
      for (const direction of ["sent", "received"] as const) {
        if (traffic === undefined) break;
        peerPackets.inc({ subnet, peer, direction }, traffic[direction].packets);
        peerBytes.inc({ subnet, peer, direction }, traffic[direction].bytes);
      }
      if (answers !== undefined) reachable.set({ subnet, peer }, answers ? 1 : 0);
      if (missing !== undefined) losses.set({ subnet, peer }, missing);
      if (smoothedMs !== undefined) roundTrip.set({ subnet, peer }, smoothedMs / 1000);
    }
  };
  return {
    set(collected) {
      reset();
      setTraffic(collected.traffic);
      for (const { map, entries: used, capacity: most } of collected.maps) {
        if (used !== undefined) entries.set({ map }, used);
        capacity.set({ map }, most);
      }
      if (collected.masquerade !== undefined) setMasquerade(collected.masquerade);
      for (const { program, runs: count, nanoseconds } of collected.programs ?? []) {
        runs.inc({ program }, Number(count));
        runTime.inc({ program }, Number(nanoseconds) / 1e9);
      }
      for (const [state, count] of Object.entries(collected.probed ?? {})) probed.set({ state }, count);
      setPeers(collected.peers ?? []);
    },
    fail() {
      reset();
      failures.inc();
    },
    took: (seconds) => duration.set(seconds),
  };
}

/** The process, under the names that all Prometheus clients use; read at each scrape. */
function processMetrics(registry: Registry): void {
  const start = Date.now() / 1000 - process.uptime();
  const gauge = (name: string, help: string, read: () => number) =>
    new prom.Gauge({
      ...{ name, help, registers: [registry] },
      collect() {
        this.set(read());
      },
    });
  new prom.Counter({
    name: "process_cpu_seconds_total",
    help: "Processor time, user and system.",
    registers: [registry],
    collect() {
      const { user, system } = process.cpuUsage();
      this.reset();
      this.inc((user + system) / 1e6);
    },
  });
  gauge("process_resident_memory_bytes", "Memory in use.", () => process.memoryUsage.rss());
  gauge("process_start_time_seconds", "When the process started.", () => start);
  gauge("process_open_fds", "File descriptors in use.", () => readdirSync("/proc/self/fd").length - 1);
  gauge("process_max_fds", "File descriptors that it may have.", maxFds);
  gauge("nodejs_heap_size_used_bytes", "JavaScript heap in use.", () => process.memoryUsage().heapUsed);
}

function maxFds(): number {
  const limits = readFileSync("/proc/self/limits", "utf8");
  const soft = /^Max open files\s+(\S+)/m.exec(limits)?.[1];
  return soft === "unlimited" ? Number.POSITIVE_INFINITY : Number(soft);
}

const STDERR = 2;

function createLog(options: TelemetryOptions): Logger {
  const write = options.write ?? writeStderr;
  const destination: DestinationStream = {
    write: options.logFormat === "json" ? write : (line) => write(textLine(line)),
  };
  return pino(
    {
      level: options.logLevel,
      // Host name and process id are on every line of a journal already.
      base: null,
      timestamp: pino.stdTimeFunctions.isoTime,
      formatters: { level: (label) => ({ level: label }) },
      serializers: {
        err: options.logFormat === "json" ? pino.stdSerializers.err : describe,
        error: describe,
      },
    },
    destination,
  );
}

/** Writes all of a line before it returns; a reader that went away must not end the daemon. */
function writeStderr(line: string): void {
  let rest = Buffer.from(line);
  while (rest.length > 0) {
    try {
      rest = rest.subarray(writeSync(STDERR, rest));
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      // A full pipe: the reader is slow, and the daemon has better to do than to wait for it.
      if (code === "EAGAIN" || code === "EPIPE") return;
      if (code !== "EINTR") throw error;
    }
  }
}

/** An error as its message, and what caused it; a stack says nothing to the reader of a log. */
function describe(value: unknown): unknown {
  if (!(value instanceof Error)) return value;
  return value.cause instanceof Error && !value.message.includes(value.cause.message)
    ? `${value.message} (${value.cause.message})`
    : value.message;
}

/** One line of JSON from pino as `time level message key=value`. */
function textLine(json: string): string {
  const { time, level, msg, ...fields } = JSON.parse(json) as Record<string, unknown>;
  const words = [String(time), String(level).padEnd(5), oneLine(String(msg ?? ""))];
  for (const [key, value] of Object.entries(fields)) words.push(`${key}=${quote(value)}`);
  return `${words.join(" ")}\n`;
}

/** Control characters of foreign data (a key, a peer's value) must not forge a line or drive a terminal. */
function oneLine(text: string): string {
  return text.replace(
    /[\p{Cc}\u2028\u2029]/gu,
    (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

function quote(value: unknown): string {
  const text = typeof value === "string" ? value : JSON.stringify(value);
  return /^[^\s"=\p{Cc}]+$/u.test(text) ? text : oneLine(JSON.stringify(text));
}
