/** What a benchmark writes down, and how its figures are summed up and shown. Pure. */

export interface Metric {
  readonly key: string;
  /** With its unit. */
  readonly title: string;
  /** Digits after the point in tables. */
  readonly digits: number;
  readonly better: "higher" | "lower";
  /** What it ought to reach, in its unit; a line in the chart. */
  readonly goal?: number;
  /** False for a figure that says nothing as a bar. */
  readonly charted?: boolean;
}

/** Several rounds of one figure. */
export interface Summary {
  readonly median: number;
  readonly min: number;
  readonly max: number;
}

/** What one row of a table came to. */
export interface Result {
  readonly row: string;
  /** The rows its ratios are taken to. */
  readonly against: readonly string[];
  /** Each metric in all rounds, by key. */
  readonly values: Readonly<Record<string, readonly number[]>>;
  /** The same summed up. */
  readonly summary: Readonly<Record<string, Summary>>;
  /** What else there is to say of it. */
  readonly note?: string;
}

/** One comparison, as it stands in the JSON: all that is needed to show it, and to judge it. */
export interface Report {
  readonly suite: string;
  readonly rounds: number;
  /** Commit, object, kernel and machine first; then how it was measured. */
  readonly environment: Readonly<Record<string, string>>;
  readonly metrics: readonly Metric[];
  readonly results: readonly Result[];
}

/** One row divided by another, round by round, as both were measured close to each other. */
export interface Ratio {
  readonly row: string;
  readonly base: string;
  readonly values: Readonly<Record<string, readonly number[]>>;
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length / 2;
  const [low, high] = [sorted[Math.ceil(middle) - 1] ?? Number.NaN, sorted[Math.floor(middle)] ?? Number.NaN];
  return (low + high) / 2;
}

/** The value below which this share (0 to 1) of the values lies; NaN of none. */
export function percentile(values: readonly number[], share: number): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] ?? Number.NaN;
}

export function summarize(values: readonly number[]): Summary {
  return { median: median(values), min: Math.min(...values), max: Math.max(...values) };
}

/** A row with its summary. */
export function resultOf(row: Omit<Result, "summary">): Result {
  const summary = Object.fromEntries(Object.entries(row.values).map(([key, each]) => [key, summarize(each)]));
  return { ...row, summary };
}

export function ratiosOf({ metrics, results }: Pick<Report, "metrics" | "results">): Ratio[] {
  return results.flatMap(({ row, against, values }) =>
    results
      .filter((result) => against.includes(result.row))
      .map((base) => {
        const ratio = metrics.map(({ key }) => {
          const each = (values[key] ?? []).map((value, n) => value / (base.values[key]?.[n] ?? Number.NaN));
          return [key, each] as const;
        });
        return { row, base: base.row, values: Object.fromEntries(ratio) };
      }),
  );
}

/** The tables of a report and where it comes from, in Markdown. */
export function tables(report: Report): string {
  const { metrics, results, environment, rounds } = report;
  const head = `| |${metrics.map(({ title }) => ` ${title} |`).join("")}\n|---|${"---|".repeat(metrics.length)}\n`;
  const figures = results.map(({ row, summary }) => {
    const cells = metrics.map(({ key, digits }) => cell(summary[key], digits, rounds));
    return `| ${row} |${cells.join("")}\n`;
  });
  const ratios = ratiosOf(report).map(({ row, base, values }) => {
    const cells = metrics.map(({ key }) => cell(summarize(values[key] ?? []), 2, rounds));
    return `| ${row} / ${base} |${cells.join("")}\n`;
  });
  const notes = results.flatMap(({ row, note }) => (note === undefined ? [] : [`- ${row}: ${note}\n`]));
  const facts = Object.entries(environment).map(([name, value]) => `- ${name}: ${value}\n`);
  const less = metrics.filter(({ better }) => better === "lower").map(({ title }) => title);
  const remark = less.length === 0 ? "" : ` (${less.join("; ")}: less is better)`;
  const compared =
    ratios.length === 0 ? "" : `\nRatios within a round, likewise${remark}:\n\n${head}${ratios.join("")}`;
  const noted = notes.length === 0 ? "" : `\n${notes.join("")}`;
  const what =
    rounds > 1
      ? `Median (minimum to maximum) of ${rounds} rounds`
      : "One round, so nothing is said of spread";
  return `${what}:\n\n${head}${figures.join("")}${compared}${noted}\n${facts.join("")}`;
}

/** The median, and the range if there was more than one round. */
function cell(summary: Summary | undefined, digits: number, rounds: number): string {
  if (summary === undefined || Number.isNaN(summary.median)) return " - |";
  const { median, min, max } = summary;
  const range = rounds > 1 ? ` (${min.toFixed(digits)} to ${max.toFixed(digits)})` : "";
  return ` ${median.toFixed(digits)}${range} |`;
}
