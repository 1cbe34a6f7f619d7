/**
 * `make bench-charts`: puts results that a benchmark has written (JSON) into docs/bench.md, and their charts beside it.
 *
 *   node dist/bench/charts.js FILE...
 *
 * A report goes where the page has `<!-- bench SUITE: written by make bench-charts -->`; nobody edits what is there by
 * hand. Charts of a suite that it no longer has are removed.
 */
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { repository } from "../test/lab.ts";
import { chartsOf, filled, section } from "./chart.ts";
import type { Report } from "./figures.ts";

const PAGE = join(repository, "docs/bench.md");
const FOLDER = "bench";

/** The reports of a file, if that is what it holds. */
function reportsIn(file: string): readonly Report[] {
  const content = JSON.parse(readFileSync(file, "utf8")) as Partial<Report>[];
  const isReport = ({ suite, rounds, metrics, results, environment }: Partial<Report>): boolean =>
    suite !== undefined &&
    rounds !== undefined &&
    metrics !== undefined &&
    environment?.object !== undefined &&
    results?.every(({ summary }) => summary !== undefined) === true;
  if (!Array.isArray(content) || !content.every(isReport)) {
    throw new Error(
      `${file} holds no results of this version that go to docs/bench.md: measure again (docs/bench.md says how)`,
    );
  }
  return content as Report[];
}

function show(report: Report): void {
  const place = `bench ${report.suite}`;
  const page = filled(readFileSync(PAGE, "utf8"), place, section(report, FOLDER));
  if (page === undefined)
    throw new Error(`docs/bench.md has no place '${place}': add one for ${report.suite}`);
  const folder = join(repository, "docs", FOLDER);
  mkdirSync(folder, { recursive: true });
  for (const name of readdirSync(folder)) {
    if (name.startsWith(`${report.suite}-`)) rmSync(join(folder, name));
  }
  for (const [name, svg] of chartsOf(report)) writeFileSync(join(folder, name), svg);
  writeFileSync(PAGE, page);
  process.stdout.write(
    `docs/bench.md: ${report.suite}, ${report.rounds} rounds at ${report.environment.commit}\n`,
  );
}

try {
  const files = process.argv.slice(2);
  if (files.length === 0) throw new Error("no results are named: give FILE=dist/bench/result.json");
  for (const report of files.flatMap(reportsIn)) show(report);
} catch (error) {
  process.stderr.write(`bench-charts: ${error instanceof Error ? error.message : error}\n`);
  process.exitCode = 1;
}
