/** What docs/scale.md reckons from a run of the fleet. */
import { expect, test } from "vitest";
import {
  costOf,
  costTable,
  type FleetReport,
  fleetTable,
  type Phase,
  unitOf,
} from "../../bench/reckoning.ts";

const none = { p50: Number.NaN, p99: Number.NaN, count: 0 };

function phase(
  name: Phase["phase"],
  count: number,
  seconds: number,
  etcdSeconds: number,
  sentBytes: number,
  agentSeconds = 0,
): Phase {
  return {
    phase: name,
    count,
    seconds,
    etcd: {
      processorSeconds: etcdSeconds,
      residentMb: 130,
      requests: 3 * count,
      messages: 7,
      sentBytes,
      receivedBytes: 0,
    },
    nodes: { processorSeconds: 1, residentMb: 1, events: 5, desired: { p50: 1.25, p99: 9, count: 5 } },
    agent: { processorSeconds: agentSeconds, residentMb: 80, desired: none, kernel: none },
  };
}

/** 1,000 nodes; idle, etcd takes 0.1 s in 10 s, and the agent 0.05 s. */
const report: FleetReport = {
  suite: "fleet",
  nodes: 1000,
  folding: 1000,
  connections: 1000,
  environment: { commit: "abc1234" },
  emptyResidentMb: 30,
  phases: [
    phase("boot", 1000, 40, 20, 200e6),
    phase("idle", 0, 10, 0.1, 0, 0.05),
    phase("renewals", 100, 10, 1.1, 30e6),
    phase("changes", 10, 60, 1, 3e6),
    phase("burst", 100, 20, 1, 30e6, 0.3),
    phase("rereads", 200, 5, 0.45, 24e6),
    phase("restarts", 100, 5, 1, 30e6),
  ],
};

test("one pair's cost is what a phase took beyond idling, by its pairs", () => {
  const unit = unitOf(report);
  expect(unit.tellSeconds).toBeCloseTo(1 / (100 * 1000), 12);
  expect(unit.tellBytes).toBe(300);
  // Half as long as the idle phase, so half of its cost is taken off.
  expect(unit.readSeconds).toBeCloseTo(0.4 / (200 * 1000), 12);
  expect(unit.readBytes).toBe(120);
  expect(unit.bootSeconds).toBeCloseTo(20e-6, 12);
  expect(unit.bootBytes).toBe(200);
  expect(unit.residentMb).toBeCloseTo(0.1, 12);
  // Twice as long.
  expect(unit.agentSeconds).toBeCloseTo(0.2 / 100, 12);
});

test("a run that was cut short is refused", () => {
  const cut = { ...report, phases: report.phases.filter(({ phase }) => phase !== "rereads") };
  expect(() => unitOf(cut)).toThrow(/no rereads/);
});

test("what all nodes do grows with the square, what one does with the nodes", () => {
  const unit = unitOf(report);
  const [small, large] = [costOf(unit, 1000), costOf(unit, 100_000)];
  for (const key of [
    "bootSeconds",
    "bootBytes",
    "rereadSeconds",
    "changingProcessors",
    "renewalProcessors",
  ] as const)
    expect(large[key] / small[key], key).toBeCloseTo(10_000, 3);
  for (const key of ["restartSeconds", "residentMb", "changesEachSecond", "agentShare"] as const)
    expect(large[key] / small[key], key).toBeCloseTo(100, 6);
  // The size that was measured costs what was measured.
  expect(small.bootSeconds).toBeCloseTo(20, 9);
  // 1,000 changes a minute, each told to 100,000 nodes at 10 µs.
  expect(large.changingProcessors).toBeCloseTo((1000 / 60) * 100_000 * 10e-6, 6);
});

test("the tables say what was measured and what is reckoned", () => {
  const measured = fleetTable(report);
  expect(measured).toContain("| | boot | idle | renewals | changes | burst | rereads | restarts |");
  expect(measured).toContain("| etcd: processor, s | 20.00 | 0.10 | 1.10 | 1.00 | 1.00 | 0.45 | 1.00 |");
  expect(measured).toContain("| all nodes: to desired p50 / p99, ms | 1.3 / 9.0 |");
  // Nothing was timed there.
  expect(measured).toContain("| one agent: to desired p50 / p99, ms | - | - |");
  expect(measured).toContain("- commit: abc1234\n");
  const reckoned = costTable(report, [1000, 100_000]);
  expect(reckoned).toContain("Reckoned from the run with 1,000 nodes");
  expect(reckoned).toContain("10.00 µs of etcd's processor, 300 B");
  expect(reckoned).toContain("| nodes | 1,000 | 100,000 |");
  expect(reckoned).toContain("| all start at once: etcd's processor | 20 s | 56 h |");
  expect(reckoned).toContain("| all start at once: etcd sends | 200 MB | 2,000 GB |");
});
