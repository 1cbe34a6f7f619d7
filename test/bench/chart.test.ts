/** What the charts and tables of docs/bench.md show of a report. */
import { describe, expect, test } from "vitest";
import { chartsOf, draw, filled, section } from "../../bench/chart.ts";
import { type Report, resultOf, tables } from "../../bench/figures.ts";

const KERNEL = "kernel <vxlan>";

const report: Report = {
  suite: "forwarding",
  rounds: 3,
  environment: { commit: "abc1234", object: "sha256 00ff", kernel: "6.1 x64" },
  metrics: [
    { key: "stream", title: "TCP stream, Gbit/s", digits: 1, better: "higher" },
    { key: "trip", title: "round trip, µs", digits: 0, better: "lower", goal: 60 },
    { key: "size", title: "instructions", digits: 0, better: "lower", charted: false },
  ],
  results: [
    resultOf({
      row: KERNEL,
      against: [],
      values: { stream: [4, 5, 3], trip: [80, 100, 90], size: [7, 7, 7] },
    }),
    resultOf({
      row: "Twill vxlan",
      against: [KERNEL],
      values: { stream: [8, 9, 7.5], trip: [40, 50, 60], size: [9, 9, 9] },
    }),
  ],
};

/** Attributes of all elements of a kind and class. */
function elements(svg: string, kind: string, className: string): Record<string, string>[] {
  const found = svg.matchAll(new RegExp(`<${kind} class="${className}"([^>]*)>`, "g"));
  return [...found].map(([, text = ""]) =>
    Object.fromEntries(
      [...text.matchAll(/([a-z]+)="([^"]*)"/g)].map(([, key = "", value = ""]) => [key, value]),
    ),
  );
}

const numbers = (path: string | undefined): number[] => [...(path ?? "").matchAll(/[\d.]+/g)].map(Number);

describe("a chart", () => {
  const stream = chartsOf(report).get("forwarding-stream.svg") ?? "";
  const [own] = elements(stream, "rect", "own");
  const [other] = elements(stream, "rect", "other");

  test("has bars as long as the medians, from 0 on, ours apart from others", () => {
    expect(elements(stream, "rect", "own")).toHaveLength(1);
    expect(Number(own?.width) / Number(other?.width)).toBeCloseTo(8 / 4, 2);
    expect(own?.x).toBe(other?.x);
  });

  test("has whiskers from the least to the most of the rounds", () => {
    const [, whisker] = elements(stream, "path", "whisker");
    const [least = 0, , most = 0] = numbers(whisker?.d);
    const start = Number(own?.x);
    const unit = Number(own?.width) / 8;
    expect((least - start) / unit).toBeCloseTo(7.5, 1);
    expect((most - start) / unit).toBeCloseTo(9, 1);
  });

  test("says the figures, and which way they count", () => {
    expect(stream).toContain('8.0<tspan class="quiet" dx="5">(7.5 to 9.0)</tspan>');
    expect(stream).not.toContain("less is better");
    expect(chartsOf(report).get("forwarding-trip.svg")).toContain("round trip, µs (less is better)");
  });

  test("escapes what rows are called", () => {
    expect(stream).toContain("kernel &lt;vxlan&gt;");
    expect(stream).not.toContain(KERNEL);
  });

  test("has a line at the goal, to the scale of the bars", () => {
    const trip = chartsOf(report).get("forwarding-trip.svg") ?? "";
    const [bar] = elements(trip, "rect", "own");
    const [goal] = elements(trip, "path", "goal");
    const [at = 0] = numbers(goal?.d);
    expect((at - Number(bar?.x)) / Number(bar?.width)).toBeCloseTo(60 / 50, 2);
    expect(elements(stream, "path", "goal")).toEqual([]);
  });

  test("follows the reader's theme", () => {
    const [light = "", dark = ""] = stream.split("@media (prefers-color-scheme: dark)");
    for (const name of ["text", ".own", ".other", ".whisker"]) {
      const color = new RegExp(`^${name.replace(".", "\\.")} \\{.*#[0-9a-f]{6}`, "m");
      expect(color.exec(light)?.[0], name).toBeDefined();
      expect(color.exec(dark)?.[0], name).not.toBe(color.exec(light)?.[0]);
      expect(color.exec(dark)?.[0], name).toBeDefined();
    }
  });

  test("of one round has no whiskers and claims no range", () => {
    const bars = [{ name: "a", summary: { median: 1, min: 1, max: 1 }, own: true }];
    const svg = draw({ title: "one", digits: 0, rounds: 1, bars });
    expect(elements(svg, "path", "whisker")).toEqual([]);
    expect(svg).not.toContain(" to ");
  });

  test("does not show what was not measured", () => {
    const bars = [{ name: "a", summary: { median: Number.NaN, min: 1, max: 2 }, own: true }];
    expect(() => draw({ title: "none", digits: 0, rounds: 2, bars })).toThrow(/a is 1 to NaN to 2/);
    const lacking = { ...report, metrics: [{ ...report.metrics[0], key: "absent" }] } as Report;
    expect(() => chartsOf(lacking)).toThrow(/nothing was measured of kernel/);
  });
});

test("ratios are taken within each round, and turned so that more is better", () => {
  // 8/4, 9/5, 7.5/3, and the other way round 80/40, 100/50, 90/60.
  const streams = chartsOf(report).get("forwarding-stream-ratios.svg") ?? "";
  const trips = chartsOf(report).get("forwarding-trip-ratios.svg") ?? "";
  expect(streams).toContain('2.00<tspan class="quiet" dx="5">(1.80 to 2.50)</tspan>');
  expect(trips).toContain('2.00<tspan class="quiet" dx="5">(1.50 to 2.00)</tspan>');
  expect(elements(streams, "rect", "own")).toHaveLength(1);
  expect(elements(streams, "path", "goal")).toHaveLength(1);
});

test("there is a chart for each metric that says something as one", () => {
  const names = ["stream", "stream-ratios", "trip", "trip-ratios"].map((name) => `forwarding-${name}.svg`);
  expect([...chartsOf(report).keys()]).toEqual(names);
  const alone = { ...report, results: report.results.map((result) => ({ ...result, against: [] })) };
  expect([...chartsOf(alone).keys()]).toEqual([names[0], names[2]]);
});

test("tables show medians with their spread, and where the figures come from", () => {
  const text = tables(report);
  expect(text).toContain("Median (minimum to maximum) of 3 rounds");
  expect(text).toContain("| Twill vxlan | 8.0 (7.5 to 9.0) | 50 (40 to 60) | 9 (9 to 9) |");
  expect(text).toContain(`| Twill vxlan / ${KERNEL} | 2.00 (1.80 to 2.50) | 0.50 (0.50 to 0.67) |`);
  expect(text).toContain("- commit: abc1234\n- object: sha256 00ff\n- kernel: 6.1 x64\n");
});

test("a section has the charts and the tables", () => {
  const text = section(report, "bench");
  expect(text).toContain("![forwarding: TCP stream, Gbit/s](bench/forwarding-stream.svg)");
  expect(text).toContain("![forwarding: TCP stream, Gbit/s, ratios](bench/forwarding-stream-ratios.svg)");
  expect(text).toContain(tables(report));
});

describe("a place of a page", () => {
  const page = "before\n<!-- bench a: written by make x -->\nold\n<!-- bench a: end -->\nafter\n";

  test("is filled, and filled again, without a change around it", () => {
    const once = filled(page, "bench a", "new\n") ?? "";
    expect(once).toBe("before\n<!-- bench a: written by make x -->\n\nnew\n\n<!-- bench a: end -->\nafter\n");
    expect(filled(once, "bench a", "new")).toBe(once);
  });

  test("that is not there is told from one without an end", () => {
    expect(filled(page, "bench b", "new")).toBeUndefined();
    expect(() => filled(page.replace("a: end", "b: end"), "bench a", "new")).toThrow(/has no end/);
  });
});
