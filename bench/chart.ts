/**
 * Reports as pictures and as parts of a page. Pure: `bench/charts.ts` reads and writes the files.
 *
 * A chart has a bar for each row, as long as the median, and a whisker from the least to the most of the rounds. It is
 * plain SVG without a background, whose colours follow the reader's light or dark theme. All bars of a chart share one
 * scale, which begins at 0: a bar that is twice as long is twice as much.
 */
import {
  type Metric,
  type Ratio,
  type Report,
  ratiosOf,
  type Summary,
  summarize,
  tables,
} from "./figures.ts";

/** One bar. */
export interface Bar {
  readonly name: string;
  readonly summary: Summary;
  /** Stands out: what the chart is about, and not what it is compared with. */
  readonly own: boolean;
}

export interface Chart {
  readonly title: string;
  readonly digits: number;
  /** Rounds behind each bar; of one, there is no whisker. */
  readonly rounds: number;
  readonly bars: readonly Bar[];
  readonly goal?: { readonly at: number; readonly says: string } | undefined;
}

// Pixels.
const WIDTH = 760;
const ROW = 26;
/** With the name above its bar, as long names are. */
const TALL_ROW = 40;
const BAR = 14;
const TOP = 40;
const BOTTOM = 26;
/** Of a character, a little more than the widest fonts need on average. */
const LETTER = 6.6;
const NAMES_MAX = 300;
/** Kept for the text behind the longest bar. */
const FIGURES = 150;
const OWN = /twill/i;

const STYLE = `
text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 13px }
.quiet { fill: #59636e }
.own { fill: #2f7fd1 }
.other { fill: #a5afba }
.whisker { stroke: #1f2328; stroke-width: 1.2 }
.goal { stroke: #bc4c00; stroke-width: 1.2; stroke-dasharray: 4 3 }
.axis { stroke: #a5afba }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.quiet { fill: #9198a1 }
.own { fill: #4493f8 }
.other { fill: #5b6570 }
.whisker { stroke: #e6edf3 }
.goal { stroke: #f0883e }
.axis { stroke: #5b6570 }
}`;

/** A chart as SVG. Throws on a figure that was not measured, which a bar can't show. */
export function draw({ title, digits, rounds, bars, goal }: Chart): string {
  for (const { name, summary } of bars) {
    const { min, median, max } = summary;
    if (!(Number.isFinite(max - min) && min <= median && median <= max))
      throw new RangeError(`${title}: ${name} is ${min} to ${median} to ${max}, which is no measurement`);
  }
  const longest = Math.max(...bars.map(({ name }) => name.length)) * LETTER + 12;
  const isTall = longest > NAMES_MAX;
  const names = isTall ? 8 : longest;
  const row = isTall ? TALL_ROW : ROW;
  const most = Math.max(...bars.map(({ summary }) => summary.max), goal?.at ?? 0);
  // A difference of two figures may come out a little below 0.
  const x = (value: number): string =>
    (names + (most > 0 ? Math.max(0, value) / most : 0) * (WIDTH - names - FIGURES)).toFixed(1);
  const bottom = TOP + bars.length * row;
  const height = bottom + (goal === undefined ? 8 : BOTTOM);
  const lines = bars.flatMap(({ name, summary, own }, index) => {
    const { min, median, max } = summary;
    const middle = TOP + (index + 1) * row - ROW / 2;
    const [top, end] = [middle - BAR / 2, middle + BAR / 2];
    const length = (Number(x(median)) - names).toFixed(1);
    const range = rounds > 1 ? `(${min.toFixed(digits)} to ${max.toFixed(digits)})` : "";
    const bar = `<rect class="${own ? "own" : "other"}" x="${names}" y="${top}" width="${length}" height="${BAR}"/>`;
    const whisker = `<path class="whisker" d="M${x(min)} ${middle}H${x(max)}M${x(min)} ${middle - 4}v8M${x(max)} ${middle - 4}v8"/>`;
    return [
      isTall
        ? `<text x="${names}" y="${top - 5}">${escaped(name)}</text>`
        : `<text x="${names - 8}" y="${end - 3}" text-anchor="end">${escaped(name)}</text>`,
      bar,
      ...(rounds > 1 ? [whisker] : []),
      `<text x="${Number(x(max)) + 8}" y="${end - 3}">${median.toFixed(digits)}<tspan class="quiet" dx="5">${range}</tspan></text>`,
    ];
  });
  if (goal !== undefined) {
    const at = x(goal.at);
    lines.push(`<path class="goal" d="M${at} ${TOP - 4}V${bottom + 4}"/>`);
    // On the side of the line where there is room for it.
    const side = Number(at) > WIDTH / 2 ? "end" : "start";
    lines.push(
      `<text class="quiet" x="${at}" y="${bottom + 18}" text-anchor="${side}">${escaped(goal.says)}</text>`,
    );
  }
  const head = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${height}" width="${WIDTH}" height="${height}" role="img">`;
  return [
    head,
    `<title>${escaped(title)}</title>`,
    `<style>${STYLE}\n</style>`,
    `<text class="title" x="8" y="20">${escaped(title)}</text>`,
    `<path class="axis" d="M${names} ${TOP - 4}V${bottom + 4}"/>`,
    ...lines,
    "</svg>\n",
  ].join("\n");
}

/** The charts of a report, by the name of their files: for each metric one of the figures, and one of the ratios if any. */
export function chartsOf(report: Report): Map<string, string> {
  const charts = new Map<string, string>();
  const ratios = ratiosOf(report);
  for (const metric of report.metrics) {
    if (metric.charted === false) continue;
    const name = `${report.suite}-${metric.key}`;
    charts.set(`${name}.svg`, draw(chartOf(report, metric)));
    if (ratios.length > 0) charts.set(`${name}-ratios.svg`, draw(chartOfRatios(report, metric, ratios)));
  }
  return charts;
}

function chartOf({ rounds, results }: Report, metric: Metric): Chart {
  const { key, title, digits, better, goal } = metric;
  const bars = results.map(({ row, summary }) => {
    const figure = summary[key];
    if (figure === undefined) throw new RangeError(`${title}: nothing was measured of ${row}`);
    return { name: row, summary: figure, own: OWN.test(row) };
  });
  // Where no row is Twill beside others, all are.
  const isAlone = bars.every(({ own }) => !own);
  return {
    title: better === "lower" ? `${title} (less is better)` : title,
    digits,
    rounds,
    bars: isAlone ? bars.map((bar) => ({ ...bar, own: true })) : bars,
    goal: goal === undefined ? undefined : { at: goal, says: `goal: ${goal.toFixed(digits)}` },
  };
}

/** How many times better each row is than the one it is compared with, whichever way a metric counts. */
function chartOfRatios({ rounds }: Report, metric: Metric, ratios: readonly Ratio[]): Chart {
  const { key, title, better } = metric;
  const bars = ratios.map(({ row, base, values }) => {
    const times = (values[key] ?? []).map((ratio) => (better === "lower" ? 1 / ratio : ratio));
    return { name: `${row} / ${base}`, summary: summarize(times), own: true };
  });
  return {
    title: `${title}: how many times as good as what it is compared with`,
    digits: 2,
    rounds,
    bars,
    goal: { at: 1, says: "1: no difference" },
  };
}

/** What a page shows of a report: its charts, from a folder beside the page, and its tables. */
export function section(report: Report, folder: string): string {
  const charts = chartsOf(report);
  const pictures = report.metrics.flatMap(({ key, title }) =>
    ["", "-ratios"].flatMap((kind) => {
      const name = `${report.suite}-${key}${kind}.svg`;
      const text = `${report.suite}: ${title}${kind === "" ? "" : ", ratios"}`;
      return charts.has(name) ? [`![${text}](${folder}/${name})\n`] : [];
    }),
  );
  return `${pictures.join("\n")}\n${tables(report)}`;
}

/**
 * A page with another text between `<!-- NAME: written by ... -->` and `<!-- NAME: end -->`; undefined if it has no
 * such place. Throws if the place has no end.
 */
export function filled(page: string, name: string, text: string): string | undefined {
  const lines = page.split("\n");
  const begin = lines.findIndex((line) => line.startsWith(`<!-- ${name}: written by `));
  if (begin < 0) return undefined;
  const end = lines.indexOf(`<!-- ${name}: end -->`, begin);
  if (end < 0) throw new Error(`the place '${name}' of the page has no end: add '<!-- ${name}: end -->'`);
  return [...lines.slice(0, begin + 1), "", text.trim(), "", ...lines.slice(end)].join("\n");
}

function escaped(text: string): string {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}
