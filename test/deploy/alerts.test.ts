/** The alert rules, each with a case in which it fires and one in which it must not; promtool is the judge. */
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { repository } from "../process.ts";

const rules = join(repository, "deploy/prometheus/twill.rules.yml");
const text = readFileSync(rules, "utf8");
const alerts = [...text.matchAll(/- alert: (\w+)/g)].map(([, name]) => name ?? "");

/** Series by selector without job and instance; values in promtool's notation, one for each step. */
type Series = Readonly<Record<string, string>>;
interface Case {
  readonly fires: Series;
  readonly quiet: Series;
  /** Minutes after which it is looked at. */
  readonly at: number;
  /** Minutes after which it must not fire yet. */
  readonly notBefore?: number;
  /** Minutes between two evaluations; 1 unless it takes a day. */
  readonly step?: number;
}

const always = (value: number): string => `${value}x70`;
const dropped = (reason: string) => `twill_dropped_packets_total{reason="${reason}"}`;
const rising = (perMinute: number): string => `0+${perMinute}x70`;
const DAY = 86_400;
const lease = (ends: number, margin: number, ttl: number): Series => ({
  twill_lease_expiry_timestamp_seconds: always(ends),
  twill_lease_renew_margin_seconds: always(margin),
  twill_lease_ttl_seconds: always(ttl),
});
const probed = (reachable: number, unreachable: number): Series => ({
  'twill_probed_peers{state="reachable"}': always(reachable),
  'twill_probed_peers{state="unreachable"}': always(unreachable),
});
const room = (map: string, entries: number, capacity: number): Series => ({
  [`twill_map_entries{map="${map}"}`]: always(entries),
  [`twill_map_capacity{map="${map}"}`]: always(capacity),
});
const revisions = (desired: number, applied: number): Series => ({
  twill_desired_revision: always(desired),
  twill_applied_revision: always(applied),
});

const CASES: Readonly<Record<string, readonly Case[]>> = {
  TwillPeerUnreachable: [{ fires: probed(5, 1), quiet: probed(5, 0), at: 3, notBefore: 1 }],
  TwillNodeIsolated: [
    { fires: probed(0, 3), quiet: probed(1, 3), at: 2, notBefore: 0 },
    // Of two nodes, nobody knows which one is cut off.
    { fires: probed(0, 2), quiet: probed(0, 1), at: 2 },
  ],
  TwillDown: [{ fires: { up: always(0) }, quiet: { up: always(1) }, at: 6, notBefore: 4 }],
  TwillNotReady: [
    { fires: { twill_ready: always(0) }, quiet: { twill_ready: always(1) }, at: 6, notBefore: 4 },
  ],
  TwillRestarting: [
    {
      fires: { process_start_time_seconds: "100x9 200x9 300x9 400x9 500x20" },
      quiet: { process_start_time_seconds: "100x9 200x60" },
      at: 50,
    },
  ],
  TwillStoreDisconnected: [
    {
      fires: { twill_store_connected: always(0) },
      quiet: { twill_store_connected: "0x5 1x60" },
      at: 11,
      notBefore: 9,
    },
  ],
  TwillStoreFlapping: [
    {
      fires: { twill_store_disconnections_total: "0+1x60" },
      quiet: { twill_store_disconnections_total: "0x30 1x30" },
      at: 60,
    },
  ],
  TwillReconcileFailing: [
    {
      fires: { twill_operations_failing: always(2) },
      quiet: { twill_operations_failing: "2x3 0x60" },
      at: 6,
      notBefore: 4,
    },
  ],
  TwillAppliedBehind: [{ fires: revisions(12, 10), quiet: revisions(12, 12), at: 11, notBefore: 9 }],
  TwillForgedPackets: [
    ...["forged", "unknown_peer", "pod_tunnel"].map((reason) => ({
      ...{ fires: { [dropped(reason)]: rising(120) }, quiet: { [dropped(reason)]: rising(30) }, at: 15 },
    })),
    {
      fires: { [dropped("forged")]: rising(120) },
      quiet: { [dropped("ecn")]: rising(120) },
      at: 15,
      notBefore: 4,
    },
  ],
  TwillDroppingPackets: [
    ...["malformed", "ecn", "failed"].map((reason) => ({
      ...{ fires: { [dropped(reason)]: rising(120) }, quiet: { [dropped(reason)]: "100x60" }, at: 15 },
    })),
  ],
  TwillConnectionsNearlyFull: [
    { fires: room("connections4", 90, 100), quiet: room("connections4", 80, 100), at: 6, notBefore: 4 },
  ],
  TwillPortsNearlyUsedUp: [
    {
      fires: {
        twill_masquerade_port_candidates_used: always(100),
        twill_masquerade_port_candidates: always(128),
      },
      quiet: {
        twill_masquerade_port_candidates_used: always(90),
        twill_masquerade_port_candidates: always(128),
      },
      at: 6,
    },
  ],
  TwillConnectionsRefused: ["masq_full", "masq_ports"].map((reason) => ({
    ...{ fires: { [dropped(reason)]: "0x5 7x60" }, quiet: { [dropped(reason)]: "7x60" }, at: 7 },
  })),
  TwillMapNearlyFull: [
    { fires: room("peers4", 60_000, 65_536), quiet: room("flows4", 65_000, 65_536), at: 6, notBefore: 4 },
    { fires: room("endpoints4", 60_000, 65_536), quiet: room("endpoints4", 1000, 65_536), at: 6 },
  ],
  TwillLeaseNearEnd: [
    // At minute 10, that is second 600.
    { fires: lease(600 + 1700, 3600, DAY), quiet: lease(600 + 1900, 3600, DAY), at: 10 },
    // A lease shorter than twice the margin is renewed half-way.
    { fires: lease(600 + 80, 3600, 600), quiet: lease(600 + 200, 3600, 600), at: 10 },
    // A reservation has no end.
    { fires: lease(300, 3600, DAY), quiet: lease(0, 3600, DAY), at: 10 },
  ],
  TwillSubnetMoved: [
    {
      fires: { 'twill_lease_events_total{event="moved"}': "0x5 1x60" },
      quiet: { 'twill_lease_events_total{event="renewed"}': "0x5 1x60" },
      at: 10,
    },
    {
      fires: { 'twill_lease_events_total{event="moved"}': "1x20 2x50" },
      quiet: { 'twill_lease_events_total{event="moved"}': "1x70" },
      at: 30,
    },
  ],
  TwillRecordsRejected: [
    {
      fires: { twill_records_rejected: always(1) },
      quiet: { twill_records_rejected: always(0) },
      at: 16,
      notBefore: 14,
    },
  ],
  TwillDriftRepaired: [
    {
      fires: { 'twill_drift_repaired_total{table="routes"}': "0+1x60" },
      quiet: { 'twill_drift_repaired_total{table="routes"}': "0x10 3x50" },
      at: 40,
    },
  ],
  TwillFastPathSuspended: [
    {
      fires: { twill_fast_path_suspended: always(1) },
      quiet: { twill_fast_path_suspended: always(0) },
      at: 61,
      notBefore: 59,
    },
  ],
  TwillVersionsDiffer: [
    {
      fires: { 'twill_build_info{version="1"}': "1x50", 'twill_build_info{version="2"}': "1x50" },
      quiet: { 'twill_build_info{version="1"}': "1x50" },
      ...{ at: 1470, notBefore: 1410, step: 30 },
    },
  ],
  TwillScrapeFailing: [
    {
      fires: { twill_scrape_failures_total: "0x5 1x10" },
      quiet: { twill_scrape_failures_total: always(3) },
      at: 10,
    },
  ],
};

function input(series: Series): { series: string; values: string }[] {
  return Object.entries(series).map(([name, values]) => {
    const [metric, labels] = name.split(/[{}]/);
    return {
      series: `${metric}{job="twill",instance="n1"${labels === undefined ? "" : `,${labels}`}}`,
      values,
    };
  });
}

/** How many of an alert fire at a minute. */
function expectation(alert: string, minute: number, firing: number) {
  return {
    expr: `count(ALERTS{alertname="${alert}",alertstate="firing"}) or vector(0)`,
    eval_time: `${minute}m`,
    exp_samples: [{ labels: "{}", value: firing }],
  };
}

function testsOf(alert: string, { fires, quiet, at, notBefore }: Case, step: number) {
  const early = notBefore === undefined ? [] : [expectation(alert, notBefore, 0)];
  return [
    {
      interval: `${step}m`,
      input_series: input(fires),
      promql_expr_test: [...early, expectation(alert, at, 1)],
    },
    {
      interval: `${step}m`,
      input_series: input(quiet),
      promql_expr_test: [expectation(alert, at, 0)],
    },
  ];
}

test("each alert fires when it should, not before, and not when it should not", () => {
  expect(Object.keys(CASES).sort()).toEqual([...alerts].sort());
  const directory = mkdtempSync(join(tmpdir(), "twill-alerts-"));
  try {
    for (const step of [1, 30]) {
      const tests = Object.entries(CASES).flatMap(([alert, cases]) =>
        cases.filter((each) => (each.step ?? 1) === step).flatMap((each) => testsOf(alert, each, step)),
      );
      expect(tests.length).toBeGreaterThan(0);
      // promtool reads YAML, of which JSON is a part.
      const file = join(directory, `${step}.test.yml`);
      writeFileSync(file, JSON.stringify({ rule_files: [rules], evaluation_interval: `${step}m`, tests }));
      const run = spawnSync("promtool", ["test", "rules", file], { encoding: "utf8" });
      expect(run.stdout + run.stderr).toMatch(/SUCCESS/);
      expect(run.status).toBe(0);
    }
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
});

test("promtool finds nothing wrong, and every alert says what is to be done", () => {
  const run = spawnSync("promtool", ["check", "rules", rules], { encoding: "utf8" });
  expect(run.stdout + run.stderr).toMatch(new RegExp(`SUCCESS: ${alerts.length} rules found`));
  expect(run.status).toBe(0);
  const page = readFileSync(join(repository, "docs/metrics.md"), "utf8");
  for (const part of text.split(/^ {6}- alert: /m).slice(1)) {
    const [name = ""] = part.split("\n");
    for (const field of ["summary", "description", "action"]) {
      expect(part, `${name} has a ${field}`).toMatch(new RegExp(`^ {10}${field}: ".{20,}"$`, "m"));
    }
    expect(part).toMatch(/^ {10}severity: (critical|warning|info)$/m);
    expect(part).toContain(`runbook: docs/metrics.md#${name.toLowerCase()}\n`);
    expect(page, `docs/metrics.md has a part on ${name}`).toContain(`\n### ${name}\n`);
  }
});
