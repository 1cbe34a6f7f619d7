/**
 * `make bench`: Twill next to the kernel set up as flanneld does it, in one run: `forwarding` between pods, and next to
 * the wire itself; `masquerade` from pods to the outside; `streams` of TCP for both, `offloads`, the same with those of
 * the uplinks off; `subnets` with one peer and with 50,000; `monitor` with `twill monitor` watching a flood of drops.
 *
 * Each row of a table has a pair of hosts of its own, joined by a cable, all at once. A round takes one load
 * after the other and measures all rows with it, in an order that rotates from round to round, so that a slow
 * phase of the machine falls on all alike. Reported are medians with minimum and maximum, of the figures and of
 * the ratios within each round. How busy the machine was otherwise is noted with them.
 *
 *   node dist/bench/run.js [--only NAME] [--rounds N] [--seconds N] [--rows REGEXP] [--out PREFIX]
 *
 * QUICK=1 in the environment is for a first look: one round of short loads, without the suites that take long, of the rows
 * that matter most.
 */
import { join } from "node:path";
import { parseArgs } from "node:util";
import { createLab, type Lab, repository } from "../test/lab.ts";
import { likeACard } from "./cable.ts";
import { median, type Report, type Result, resultOf, tables } from "./figures.ts";
import { forwarding } from "./forwarding.ts";
import { describeMachine, processorUse, publish } from "./machine.ts";
import { masquerade } from "./masquerade.ts";
import { monitor } from "./monitor.ts";
import { offloads, streams } from "./streams.ts";
import { manySubnets } from "./subnets.ts";
import type { Path, Row, Suite } from "./suite.ts";
import { checkPrograms } from "./workloads.ts";

const suites: readonly Suite[] = [forwarding, masquerade, streams, offloads, manySubnets, monitor];

/** Without these in a first look. */
const LONG: readonly Suite[] = [offloads, manySubnets];

/** What was asked of a run. */
interface Order {
  readonly rounds: number;
  readonly seconds: number;
  readonly rows: RegExp;
}

async function main(): Promise<void> {
  const quick = process.env.QUICK === "1";
  const { values: options } = parseArgs({
    options: {
      only: { type: "string", default: "" },
      rounds: { type: "string", default: quick ? "1" : "5" },
      seconds: { type: "string", default: quick ? "1" : "2" },
      rows: { type: "string", default: quick ? "vxlan|host-gw|host to host|10 live\\)|flood" : "." },
      out: { type: "string", default: join(repository, "dist/bench/result") },
    },
  });
  const order = {
    rounds: Number(options.rounds),
    seconds: Number(options.seconds),
    rows: new RegExp(options.rows, "i"),
  };
  const all = quick ? suites.filter((suite) => !LONG.includes(suite)) : suites;
  const wanted = options.only === "" ? all : suites.filter(({ name }) => options.only === name);
  if (wanted.length === 0) {
    throw new Error(
      `there is no ${options.only} to measure: there are ${suites.map(({ name }) => name).join(" and ")}`,
    );
  }
  const some = wanted.some(({ rows }) => rows.some(({ name }) => order.rows.test(name)));
  if (!(order.rounds >= 1 && order.seconds > 0 && some)) {
    throw new Error(
      `nothing to measure: ${options.rounds} rounds of ${options.seconds} s, rows /${options.rows}/`,
    );
  }
  checkPrograms();
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => process.exit(130));

  const reports: Report[] = [];
  for (const suite of wanted) {
    const report = await measure(suite, order);
    if (report !== undefined) reports.push(report);
  }
  const markdown = reports.map((report) => `## ${report.suite}\n\n${tables(report)}`).join("\n");
  publish(options.out, markdown, reports);
}

/** Sets the rows up, and measures them in turns; undefined if no row was asked for. */
async function measure(suite: Suite, { rounds, seconds, rows }: Order): Promise<Report | undefined> {
  const wanted = suite.rows.filter(({ name }) => rows.test(name));
  if (wanted.length === 0) return undefined;
  const metrics = suite.workloads.flatMap((workload) => workload.metrics);
  const labs: Lab[] = [];
  try {
    const paths: { row: Row; path: Path; values: Record<string, number[]> }[] = [];
    for (const row of wanted) {
      say(`setting up ${row.name}`);
      const lab = await createLab();
      labs.push(lab);
      const hosts = await lab.cabled(
        { name: "h1", address: "10.4.7.21/24" },
        { name: "h2", address: "10.4.7.22/24" },
      );
      if (suite.card) for (const [cpu, host] of hosts.entries()) await likeACard(host, cpu);
      const path = await row.build(lab, hosts);
      const ping = await path.from.ping(path.address, { count: 10 });
      if (ping.lost.length > 0)
        throw new Error(`${row.name}: ${path.address} does not answer:\n${ping.output}`);
      await checked(row, path);
      const values = Object.fromEntries(metrics.map((metric) => [metric.key, []]));
      paths.push({ row, path, values });
    }
    const width = Math.max(...wanted.map(({ name }) => name.length));
    const busy: number[] = [];
    for (let round = 0; round < rounds; round++) {
      for (const workload of suite.workloads) {
        for (let turn = 0; turn < paths.length; turn++) {
          const place = paths[(turn + round) % paths.length];
          if (place === undefined) continue;
          const { row, path, values } = place;
          busy.push(await processorUse(100));
          const measured = await workload.run(path.from, path.to, path.address, seconds, path.beside);
          const seen = workload.metrics.map((metric, index) => {
            const value = measured[index] ?? Number.NaN;
            values[metric.key]?.push(value);
            return `${metric.title} ${value.toFixed(metric.digits)}`;
          });
          say(`round ${round + 1}/${rounds}  ${row.name.padEnd(width)}  ${seen.join(", ")}`);
        }
      }
    }
    const results: Result[] = [];
    for (const { row, path, values } of paths) {
      const note = await checked(row, path);
      const result = { row: row.name, against: row.against, values };
      results.push(resultOf(note === undefined ? result : { ...result, note }));
    }
    const environment = await describeEnvironment(suite, rounds, seconds, busy);
    return { suite: suite.name, rounds, environment, metrics, results };
  } finally {
    for (const lab of labs) await lab.close();
  }
}

async function checked(row: Row, path: Path): Promise<string | undefined> {
  try {
    return await path.check?.();
  } catch (error) {
    throw new Error(`${row.name}: ${error instanceof Error ? error.message : error}`);
  }
}

async function describeEnvironment(
  suite: Suite,
  rounds: number,
  seconds: number,
  busy: readonly number[],
): Promise<Record<string, string>> {
  return {
    ...(await describeMachine()),
    load: `${rounds} rounds, ${seconds} s per load; client on CPU 0, server on CPU 1; order of the rows rotated`,
    others: `before the loads, ${percent(median(busy))} of the processors was in use (at most ${percent(Math.max(...busy))})`,
    network: [
      "hosts are network namespaces joined by a veth pair, MTU 1500",
      suite.offloads ?? "the veth's default offloads (TSO, GSO on)",
      ...(suite.card ? ["each end as a card's (bench/cable.ts), served by the processor of its host"] : []),
    ].join(", "),
    kernelRows: suite.kernel,
  };
}

function percent(share: number): string {
  return `${Math.round(share * 100)} %`;
}

function say(line: string): void {
  process.stdout.write(`${line}\n`);
}

await main().catch((error: unknown) => {
  process.stderr.write(`bench: ${error instanceof Error ? error.message : error}\n`);
  process.exitCode = 1;
});
