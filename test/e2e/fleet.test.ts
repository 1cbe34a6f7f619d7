/** A small fleet on a real etcd goes through all its phases: what `make bench-fleet` measures is there. */
import { mkdtempSync, readFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import type { FleetReport } from "../../bench/reckoning.ts";
import { exec, repository } from "../process.ts";

test("a hundred nodes start, renew, change, read again and start again, and a whole agent follows", async () => {
  const out = join(mkdtempSync(join(tmpdir(), "fleet-")), "fleet");
  const argv = ["env", "QUICK=1", join(repository, "bench/fleet"), "--nodes", "100", "--out", out];
  const { stdout } = await exec(argv, { timeout: 60_000 });
  const report = JSON.parse(readFileSync(`${out}.json`, "utf8")) as FleetReport;
  expect(report.environment.nodes).toMatch(/0 leases went wrong, 0 connections were lost/);
  expect(report.phases.map(({ phase, count }) => [phase, count])).toEqual([
    ["boot", 100],
    ["idle", 0],
    ["renewals", 10],
    ["changes", 1],
    ["burst", 10],
    ["rereads", 20],
    ["restarts", 10],
  ]);
  for (const { phase, agent } of report.phases)
    if (["boot", "changes", "burst"].includes(phase)) expect(agent.kernel.count).toBeGreaterThan(0);
  expect(stdout).toContain("| nodes that act | 100 |");
}, 90_000);
