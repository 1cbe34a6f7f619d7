/**
 * `make bench-scale`: what twilld costs with many peers. One host with a real etcd and a real kernel; the other nodes are
 * leases alone.
 *
 *   start     from exec to the line "ready", when the last lease is in the kernel (counted afterwards)
 *   event     from etcd's answer to a put of one lease to its row in the map, one after the other
 *   memory    resident, some time after the start and the events
 *   idle      processor time of all threads in a minute without any event, from then on
 *   loop      when the program of another host's daemon has been read and run, and the longest time for which the event
 *             loop was held up from then to the end of its start, and in a minute of that one without any event: to watch
 *             it takes memory and processor time
 *
 *   node dist/bench/scale.js [--leases N,N,...] [--rounds N] [--idle SECONDS] [--out PREFIX]
 */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout } from "node:timers/promises";
import { parseArgs } from "node:util";
import { createLab, type Host, repository } from "../test/lab.ts";
import { spawnTwilld, type Twilld, twilldFlags } from "../test/twilld.ts";
import { type Metric, median, percentile, type Report, resultOf, tables } from "./figures.ts";
import { awaitQuiet, describeMachine, publish } from "./machine.ts";
import { FIRST_LEASE, fillLeases } from "./suite.ts";

const EVENTS = 200;
const PATIENCE = 120_000;
/** After which a start and what follows from it are over: V8 goes on compiling what ran often for a while. */
const SETTLED_MS = 60_000;

interface Figures {
  readonly startMs: number;
  readonly beganMs: number;
  readonly loopAtStartMs: number;
  readonly eventMs: readonly number[];
  readonly residentMb: number;
  readonly idlePercent: number;
  readonly loopIdleMs: number;
}

async function measure(leases: number, idleSeconds: number): Promise<Figures> {
  const lab = await createLab();
  try {
    const host = await lab.host("h1", { address: "192.168.0.21/16" });
    const etcd = await lab.etcdOn(host);
    await etcd.put(
      "/coreos.com/network/config",
      JSON.stringify({
        Network: "10.0.0.0/8",
        SubnetLen: 24,
        SubnetMax: "10.0.255.0",
        Backend: { Type: "vxlan" },
      }),
    );
    const [endpoint = ""] = etcd.endpoints;
    const program = join(repository, "dist/bench/leases.js");
    await fillLeases(host, etcd, leases, 10);
    await host.bridge("docker0", "10.0.1.1/24");

    const began = performance.now();
    const twilld = spawnTwilld(host, twilldFlags(host, etcd));
    await twilld.says(/ready: pods are forwarded/, { timeout: PATIENCE });
    const startMs = performance.now() - began;
    await verify(host, twilld, leases);

    const from = `${FIRST_LEASE + leases}`;
    const { stdout } = await host.exec(
      ["node", program, "time", endpoint, twilld.pinPath, from, `${EVENTS}`],
      { timeout: PATIENCE },
    );
    const { answered } = JSON.parse(stdout) as { answered: number[] };
    await setTimeout(SETTLED_MS);
    const residentMb = resident(twilld.process.pid);
    const before = processorMs(twilld.process.pid);
    await setTimeout(idleSeconds * 1000);
    const idlePercent = (processorMs(twilld.process.pid) - before) / (idleSeconds * 10);
    await twilld.stop();

    const other = await lab.host("h2", { address: "192.168.0.22/16" });
    await other.bridge("docker0", "10.0.2.1/24");
    const watched = spawnTwilld(other, twilldFlags(other, etcd), {
      env: { NODE_OPTIONS: `--import=${join(repository, "bench/lag.mjs")}` },
    });
    await watched.says(/ready: pods are forwarded/, { timeout: PATIENCE });
    const atStart = await heldUp(watched);
    await setTimeout(SETTLED_MS);
    await watchLoop(watched);
    await setTimeout(idleSeconds * 1000);
    const idle = await heldUp(watched);
    await watched.stop();
    return {
      startMs,
      beganMs: atStart.fromMs,
      loopAtStartMs: atStart.mostMs,
      eventMs: answered,
      residentMb,
      idlePercent,
      loopIdleMs: idle.mostMs,
    };
  } finally {
    await lab.close();
  }
}

/** Every lease has its route, so that the time measured is that of all. */
async function verify(host: Host, twilld: Twilld, leases: number): Promise<void> {
  const { stdout } = await host.exec(["ip", "-4", "route", "show", "dev", "flannel.1", "proto", "84"]);
  const routes = stdout.split("\n").filter((line) => line !== "").length;
  const { status } = twilld;
  const failures = status?.failures ?? [];
  if (routes !== leases || failures.length > 0) {
    throw new Error(`${routes} routes of ${leases}; failures: ${JSON.stringify(failures.slice(0, 3))}`);
  }
}

/** Milliseconds for which the event loop was held up at most since it is watched, which it is not from then on. */
async function heldUp(twilld: Twilld): Promise<{ readonly mostMs: number; readonly fromMs: number }> {
  const [, most, from] = await signal(twilld, /event loop: at most ([\d.]+) ms, from ([\d.]+) ms on/);
  return { mostMs: Number(most), fromMs: Number(from) };
}

async function watchLoop(twilld: Twilld): Promise<void> {
  await signal(twilld, /event loop: watched/);
}

/** Has `lag.mjs` do what is next, and say this. */
async function signal(twilld: Twilld, answer: RegExp): Promise<RegExpExecArray> {
  const said = twilld.says(answer, { after: twilld.process.lines.length, timeout: PATIENCE });
  twilld.process.kill("SIGUSR2");
  return await said;
}

function resident(pid: number): number {
  const [, kilobytes] = /^VmRSS:\s+(\d+)/m.exec(readFileSync(`/proc/${pid}/status`, "utf8")) ?? [];
  return Number(kilobytes) / 1024;
}

/** What all threads of a process have run so far, in milliseconds, as the scheduler has measured it. */
function processorMs(pid: number): number {
  const directory = `/proc/${pid}/task`;
  const ran = readdirSync(directory).map((thread) => {
    const [nanoseconds] = readFileSync(`${directory}/${thread}/schedstat`, "utf8").split(" ");
    return Number(nanoseconds) / 1e6;
  });
  return ran.reduce((sum, ms) => sum + ms, 0);
}

/** What is shown of a round. */
const METRICS: readonly (Metric & { readonly of: (figures: Figures) => number })[] = [
  { key: "start", title: "start, ms", digits: 0, better: "lower", of: ({ startMs }) => startMs },
  { key: "began", title: "program run, ms", digits: 0, better: "lower", of: ({ beganMs }) => beganMs },
  {
    key: "loopAtStart",
    title: "loop held at start, ms",
    digits: 0,
    better: "lower",
    of: ({ loopAtStartMs }) => loopAtStartMs,
  },
  {
    key: "eventP50",
    title: "event p50, ms",
    digits: 1,
    better: "lower",
    of: ({ eventMs }) => median(eventMs),
  },
  {
    key: "eventP99",
    title: "event p99, ms",
    digits: 1,
    better: "lower",
    of: ({ eventMs }) => percentile(eventMs, 0.99),
  },
  { key: "resident", title: "resident, MB", digits: 0, better: "lower", of: ({ residentMb }) => residentMb },
  {
    key: "idle",
    title: "idle, % of a core",
    digits: 2,
    better: "lower",
    of: ({ idlePercent }) => idlePercent,
  },
  {
    key: "loopIdle",
    title: "loop held while idle, ms",
    digits: 0,
    better: "lower",
    of: ({ loopIdleMs }) => loopIdleMs,
  },
];

async function main(): Promise<void> {
  const { values: options } = parseArgs({
    options: {
      leases: { type: "string", default: "10,3500,10000,50000" },
      rounds: { type: "string", default: "3" },
      idle: { type: "string", default: "60" },
      out: { type: "string", default: join(repository, "dist/bench/scale") },
    },
  });
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => process.exit(130));
  const counts = options.leases.split(",").map(Number);
  const results: { leases: number; rounds: Figures[] }[] = counts.map((leases) => ({ leases, rounds: [] }));
  const busy: number[] = [];
  for (let round = 0; round < Number(options.rounds); round++) {
    for (const { leases, rounds } of results) {
      busy.push(await awaitQuiet());
      const figures = await measure(leases, Number(options.idle));
      rounds.push(figures);
      process.stdout.write(
        `round ${round + 1}/${options.rounds}  ${leases} leases: start ${figures.startMs.toFixed(0)} ms\n`,
      );
    }
  }
  const report: Report = {
    suite: "scale",
    rounds: Number(options.rounds),
    environment: {
      ...(await describeMachine()),
      load: `one twilld, the leases of imaginary nodes; ${EVENTS} events, then ${options.idle} s without any`,
      others: `before each start, at most ${(100 * Math.max(...busy)).toFixed(0)} % of the processors was in use`,
    },
    metrics: METRICS.map(({ of: _, ...metric }) => metric),
    results: results.map(({ leases, rounds }) =>
      resultOf({
        row: `${leases.toLocaleString("en")} leases`,
        against: [],
        values: Object.fromEntries(METRICS.map(({ key, of }) => [key, rounds.map(of)])),
      }),
    ),
  };
  publish(options.out, tables(report), [report]);
}

await main().catch((error: unknown) => {
  process.stderr.write(`scale: ${error instanceof Error ? error.message : error}\n`);
  process.exitCode = 1;
});
