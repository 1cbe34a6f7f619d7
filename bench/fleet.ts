/**
 * `make bench-fleet`: what a cluster costs its etcd, and each agent. A real etcd of one member; the nodes are simulated, all
 * in one process (`bench/fleet-nodes.ts`), and one whole agent with a kernel in memory has a process of its own
 * (`bench/fleet-agent.ts`).
 *
 *   boot      all nodes start, so many at a time; each reads a snapshot, takes a subnet, and hears of those after it
 *   idle      nothing happens
 *   renewals  some nodes renew their leases, as each does once in 23 hours: all nodes are told, and nothing changes
 *   changes   1 % of the nodes in a minute get another MAC
 *   burst     some nodes do so within some seconds
 *   rereads   some nodes lose the connection, and read everything again
 *   restarts  some nodes end and start again, with their subnet
 *
 * etcd's processor time and memory are from /proc, its requests and bytes from its own /metrics. Nodes have connections of
 * their own, up to `--connections`; more nodes share these. bench/fleet runs it, in namespaces of its own:
 *
 *   bench/fleet [--nodes N] [--connections N] [--at-once N] [--page] [--out PREFIX]
 *
 * With --page, what it measured goes to docs/scale.md, where that has a place for so many nodes. With QUICK=1 in the
 * environment the phases are too short to be quoted.
 */
import { type ChildProcess, spawn } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";
import { openStore, type Store } from "../src/edge/etcd.ts";
import { repository } from "../test/process.ts";
import { filled } from "./chart.ts";
import { percentile } from "./figures.ts";
import { describeMachine, publish } from "./machine.ts";
import {
  costTable,
  type Delay,
  type FleetReport,
  fleetTable,
  type Phase,
  type PhaseName,
} from "./reckoning.ts";
import { Worker } from "./worker.ts";

const ENDPOINT = "http://127.0.0.1:2379";
/** etcd answers at all addresses of its namespace's loopback interface, see `FIRST_ENDPOINT` of the nodes. */
const LISTEN = "http://0.0.0.0:2379";
const PREFIX = "/coreos.com/network";
const CONFIG = { Network: "10.0.0.0/8", SubnetLen: 24, Backend: { Type: "vxlan" } };
/** For a first look: whether all of it works. */
const quick = process.env.QUICK === "1";
const CHANGES_SECONDS = quick ? 3 : 60;
const IDLE_SECONDS = quick ? 1 : 15;
const BURST_SECONDS = quick ? 2 : 10;
/** How often nodes are told of something in a phase that lasts some seconds: their processes must keep up. */
const TOLD_MAX = 100_000;
/**
 * Nodes that share a process. With thousands of them, V8 would stop for so long to collect their garbage that etcd's pings are
 * not answered in time.
 */
const NODES_PER_PROCESS = 1250;
/** Nodes of 1,000 that start, or read again, at a time; of more nodes, in proportion fewer. */
const AT_ONCE_MAX = 25;
/** Clusters that the page reckons for. */
const SIZES = [1000, 5000, 10_000, 50_000, 100_000];

export type NodesOrder =
  | { do: "boot"; first: number; count: number; ofAll: number; connections: number; atOnce: number }
  | { do: "restart" | "reread"; count: number; atOnce: number }
  /** Spread over so many seconds; the first one so much of the pause between two later. */
  | { do: "change" | "renew"; count: number; seconds: number; offset: number }
  | { do: "catch up"; revision: string }
  | { do: "read" };

/** Since the start, but for the delays and the writes, which are those since the last reading. */
export interface NodesReading {
  readonly processorSeconds: number;
  readonly events: number;
  /** Leases that were lost, contested or could not be written. */
  readonly failures: number;
  /** Connections that were lost. */
  readonly interruptions: number;
  readonly folding: number;
  /** How many milliseconds it took from asking for a write until another node of the process had it, and how often. */
  readonly delays: readonly (readonly [ms: number, times: number])[];
  /** When the write of each key was asked for. */
  readonly asked: readonly (readonly [key: string, at: number])[];
}

export type AgentOrder =
  | { do: "boot"; endpoint: string }
  | { do: "catch up"; revision: string }
  | { do: "read" };

export interface AgentReading {
  readonly processorSeconds: number;
  readonly peers: number;
  /** When each key was in its desired state, and in its kernel, since the last reading. */
  readonly desired: readonly (readonly [key: string, at: number])[];
  readonly written: readonly (readonly [key: string, at: number])[];
}

function fail(error: unknown): void {
  process.stderr.write(`fleet: ${error instanceof Error ? error.message : error}\n`);
  process.exit(1);
}

async function startEtcd(directory: string): Promise<ChildProcess> {
  const peers = "http://127.0.0.1:2380";
  const etcd = spawn(
    "etcd",
    [
      ["--logger=zap", "--log-level=info", "--name=fleet", `--data-dir=${join(directory, "etcd")}`],
      ["--unsafe-no-fsync", `--listen-client-urls=${LISTEN}`, `--advertise-client-urls=${ENDPOINT}`],
      [
        `--listen-peer-urls=${peers}`,
        `--initial-advertise-peer-urls=${peers}`,
        `--initial-cluster=fleet=${peers}`,
      ],
    ].flat(),
    { stdio: ["ignore", "ignore", "pipe"] },
  );
  etcd.once("error", (error) => fail(new Error(`cannot run etcd: ${error.message}`)));
  const lines = createInterface({ input: etcd.stderr });
  await new Promise<void>((resolve, reject) => {
    const said: string[] = [];
    lines.on("line", (line) => {
      if (/ready to serve client requests|serving client traffic/.test(line)) resolve();
      if (said.length < 20) said.push(line);
    });
    etcd.once("exit", () => reject(new Error(`etcd ended:\n${said.join("\n")}`)));
  });
  return etcd;
}

/** Of a process: its time so far, in steps of a clock tick (10 ms), and its memory. */
function processOf(pid: number): { processorSeconds: number; residentMb: number } {
  const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
  const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  const [, kilobytes] = /^VmRSS:\s+(\d+)/m.exec(readFileSync(`/proc/${pid}/status`, "utf8")) ?? [];
  return {
    processorSeconds: (Number(fields[11]) + Number(fields[12])) / 100,
    residentMb: Number(kilobytes) / 1024,
  };
}

type EtcdReading = Phase["etcd"];

async function readEtcd(pid: number): Promise<EtcdReading> {
  // etcd counts this one too, but not among the requests of gRPC.
  const text = await (await fetch(`${ENDPOINT}/metrics`)).text();
  const sum = (pattern: RegExp): number =>
    [...text.matchAll(pattern)].reduce((total, [, value]) => total + Number(value), 0);
  return {
    ...processOf(pid),
    requests: sum(/^grpc_server_handled_total\{[^}]*grpc_type="unary"[^}]*\} (\S+)$/gm),
    messages: sum(/^grpc_server_msg_sent_total\{[^}]*grpc_method="Watch"[^}]*\} (\S+)$/gm),
    sentBytes: sum(/^etcd_network_client_grpc_sent_bytes_total (\S+)$/gm),
    receivedBytes: sum(/^etcd_network_client_grpc_received_bytes_total (\S+)$/gm),
  };
}

/** How long after it was asked for each write was seen. */
function delayOf(
  asked: ReadonlyMap<string, number>,
  seen: readonly (readonly [key: string, at: number])[],
): Delay {
  const delays = seen.flatMap(([key, at]) => {
    const from = asked.get(key);
    return from === undefined ? [] : [at - from];
  });
  return { p50: percentile(delays, 0.5), p99: percentile(delays, 0.99), count: delays.length };
}

/** Of delays that were counted. */
function summaryOf(delays: readonly (readonly [ms: number, times: number])[]): Delay {
  const sorted = [...delays].sort(([a], [b]) => a - b);
  const count = sorted.reduce((sum, [, times]) => sum + times, 0);
  const at = (part: number): number => {
    let before = 0;
    for (const [ms, times] of sorted) {
      before += times;
      if (before >= part * count) return ms;
    }
    return Number.NaN;
  };
  return { p50: at(0.5), p99: at(0.99), count };
}

/** Which part of all nodes a process has. */
interface Part {
  /** Its share of a number. */
  share(total: number): number;
  /** What those before it have of a number. */
  before(total: number): number;
  /** How much of the whole those before it are. */
  readonly offset: number;
}

/** All nodes, whichever process they are in. */
class Nodes {
  readonly #count: number;
  readonly #workers: readonly Worker<NodesOrder, NodesReading>[];

  constructor(count: number) {
    this.#count = count;
    // Thousands of nodes hear of one write at once: what that makes must not outgrow the young generation.
    const flags = ["--max-old-space-size=6000", "--max-semi-space-size=64"];
    this.#workers = Array.from(
      { length: Math.ceil(count / NODES_PER_PROCESS) },
      () => new Worker<NodesOrder, NodesReading>("fleet-nodes.js", flags, fail),
    );
  }

  get processes(): string {
    return this.#workers.length === 1 ? "one process" : `${this.#workers.length} processes`;
  }

  boot(connections: number, atOnce: number): Promise<unknown> {
    const ofAll = this.#count;
    return this.#tell(({ share, before }) => {
      const some = Math.max(1, share(atOnce));
      return { do: "boot", first: before(ofAll), count: share(ofAll), ofAll, connections, atOnce: some };
    });
  }

  /** So many of them, some at a time. */
  each(what: "restart" | "reread", count: number, atOnce: number): Promise<unknown> {
    return this.#tell(({ share }) => ({ do: what, count: share(count), atOnce: Math.max(1, share(atOnce)) }));
  }

  /** So many of them, one after the other. */
  spread(what: "change" | "renew", count: number, seconds: number): Promise<unknown> {
    return this.#tell(({ share, offset }) => ({ do: what, count: share(count), seconds, offset }));
  }

  catchUp(revision: string): Promise<unknown> {
    return this.#tell(() => ({ do: "catch up", revision }));
  }

  async read(): Promise<NodesReading & { residentMb: number }> {
    const readings = await this.#tell(() => ({ do: "read" }));
    const sum = (of: (reading: NodesReading) => number): number =>
      readings.reduce((total, reading) => total + of(reading), 0);
    return {
      processorSeconds: sum(({ processorSeconds }) => processorSeconds),
      events: sum(({ events }) => events),
      failures: sum(({ failures }) => failures),
      interruptions: sum(({ interruptions }) => interruptions),
      folding: sum(({ folding }) => folding),
      delays: readings.flatMap(({ delays }) => delays),
      asked: readings.flatMap(({ asked }) => asked),
      residentMb: this.#workers.reduce((total, { pid }) => total + processOf(pid).residentMb, 0),
    };
  }

  end(): void {
    for (const worker of this.#workers) worker.end();
  }

  /** Each process has an order of its own, by its part of the whole. */
  #tell(orderOf: (part: Part) => NodesOrder): Promise<readonly NodesReading[]> {
    const { length } = this.#workers;
    return Promise.all(
      this.#workers.map((worker, i) => {
        const upTo = (total: number, end: number): number => Math.floor((total * end) / length);
        return worker.tell(
          orderOf({
            share: (total) => upTo(total, i + 1) - upTo(total, i),
            before: (total) => upTo(total, i),
            offset: i / length,
          }),
        );
      }),
    );
  }
}

async function main(): Promise<void> {
  const { values: options } = parseArgs({
    options: {
      nodes: { type: "string", default: "1000" },
      connections: { type: "string", default: "5000" },
      "at-once": { type: "string" },
      directory: { type: "string" },
      page: { type: "boolean", default: false },
      out: { type: "string", default: join(repository, "dist/bench/fleet") },
    },
  });
  const count = Number(options.nodes);
  // Each tells all of them something, and their processes must keep up.
  const atOnce = Number(
    options["at-once"] ?? Math.max(1, Math.round(AT_ONCE_MAX / Math.max(1, count / 1000))),
  );
  const connections = Math.min(count, Number(options.connections));
  const { directory } = options;
  if (directory === undefined) throw new Error("no --directory for etcd's data: run it by bench/fleet");
  if (!(count >= 100 && atOnce >= 1 && connections >= 1))
    throw new Error(
      `nothing to measure: ${options.nodes} nodes (at least 100), ${options["at-once"] ?? atOnce} at once`,
    );

  const etcd = await startEtcd(directory);
  const etcdPid = etcd.pid ?? -1;
  const store = await openStore({
    endpoints: [ENDPOINT],
    prefix: PREFIX,
    log: { debug: () => undefined, warn: () => undefined },
  });
  await store.create("config", JSON.stringify(CONFIG), 86_400);
  const empty = await readEtcd(etcdPid);
  const nodes = new Nodes(count);
  // As twilld has V8 once its start is over.
  const agent = new Worker<AgentOrder, AgentReading>(
    "fleet-agent.js",
    ["--semi-space-growth-factor=1"],
    fail,
  );
  await agent.tell({ do: "boot", endpoint: ENDPOINT });

  /** What it says itself of its processor time is finer than /proc. */
  const memoryOf = (pid: number) => ({ residentMb: processOf(pid).residentMb });
  const read = async () => ({
    etcd: await readEtcd(etcdPid),
    nodes: await nodes.read(),
    agent: { ...(await agent.tell({ do: "read" })), ...memoryOf(agent.pid) },
  });
  const phases: Phase[] = [];
  let before = await read();
  const run = async (phase: PhaseName, some: number, act: () => Promise<unknown>): Promise<void> => {
    const began = performance.now();
    await act();
    const revision = String((await lastRevision(store)) ?? 0n);
    await Promise.all([nodes.catchUp(revision), agent.tell({ do: "catch up", revision })]);
    const seconds = (performance.now() - began) / 1000;
    const after = await read();
    const asked = new Map(after.nodes.asked);
    const since = <Key extends string>(key: Key, a: Record<Key, number>, b: Record<Key, number>): number =>
      a[key] - b[key];
    phases.push({
      phase,
      count: some,
      seconds,
      etcd: {
        processorSeconds: since("processorSeconds", after.etcd, before.etcd),
        residentMb: after.etcd.residentMb,
        requests: since("requests", after.etcd, before.etcd),
        messages: since("messages", after.etcd, before.etcd),
        sentBytes: since("sentBytes", after.etcd, before.etcd),
        receivedBytes: since("receivedBytes", after.etcd, before.etcd),
      },
      nodes: {
        processorSeconds: since("processorSeconds", after.nodes, before.nodes),
        residentMb: after.nodes.residentMb,
        events: since("events", after.nodes, before.nodes),
        desired: summaryOf(after.nodes.delays),
      },
      agent: {
        processorSeconds: since("processorSeconds", after.agent, before.agent),
        residentMb: after.agent.residentMb,
        desired: delayOf(asked, after.agent.desired),
        kernel: delayOf(asked, after.agent.written),
      },
    });
    before = after;
    process.stdout.write(`${phase}: ${seconds.toFixed(1)} s\n`);
  };

  const some = Math.min(Math.round(count / 10), Math.round(TOLD_MAX / count));
  const changing = Math.max(1, Math.round(count / 100));
  await run("boot", count, () => nodes.boot(connections, atOnce));
  if (before.agent.peers !== count) throw new Error(`the agent has ${before.agent.peers} peers of ${count}`);
  await run("idle", 0, () => sleep(IDLE_SECONDS * 1000));
  await run("renewals", some, () => nodes.spread("renew", some, BURST_SECONDS));
  await run("changes", changing, () => nodes.spread("change", changing, CHANGES_SECONDS));
  await run("burst", some, () => nodes.spread("change", some, BURST_SECONDS));
  await run("rereads", 2 * some, () => nodes.each("reread", 2 * some, atOnce));
  await run("restarts", some, () => nodes.each("restart", some, atOnce));

  const { failures, interruptions, folding } = before.nodes;
  const version = await versionOfEtcd();
  const report: FleetReport = {
    suite: "fleet",
    nodes: count,
    folding,
    connections,
    environment: {
      ...(await describeMachine()),
      etcd: `${version}, one member, without waiting for its disk; it shares the processors with all nodes`,
      nodes: `${count} in ${nodes.processes} over ${connections} connections, ${atOnce} start at a time; ${folding} of them keep all leases; ${failures} leases went wrong, ${interruptions} connections were lost`,
      processors: "a second of processor is of one processor, of etcd in steps of 10 ms",
    },
    emptyResidentMb: empty.residentMb,
    phases,
  };
  nodes.end();
  agent.end();
  store.close();
  etcd.removeAllListeners("exit");
  etcd.kill("SIGKILL");
  const [measured, reckoned] = [fleetTable(report), costTable(report, SIZES)];
  publish(options.out, `${measured}\n${reckoned}`, report);
  if (options.page) fillPage(report, measured, reckoned);
}

/** The store's revision: that of a list of nothing. */
async function lastRevision(store: Store): Promise<bigint> {
  return (await store.list("none/")).revision;
}

async function versionOfEtcd(): Promise<string> {
  return ((await (await fetch(`${ENDPOINT}/version`)).json()) as { etcdserver: string }).etcdserver;
}

function fillPage({ nodes }: FleetReport, measured: string, reckoned: string): void {
  const path = join(repository, "docs/scale.md");
  const once = filled(readFileSync(path, "utf8"), `fleet of ${nodes}`, measured);
  if (once === undefined) {
    process.stdout.write(`docs/scale.md has no place 'fleet of ${nodes}': it stays as it is\n`);
    return;
  }
  const page = filled(once, "fleet reckoned", reckoned);
  if (page === undefined) throw new Error("docs/scale.md has no place 'fleet reckoned'");
  writeFileSync(path, page);
  process.stdout.write("docs/scale.md is written\n");
}

await main().catch(fail);
process.exit(0);
