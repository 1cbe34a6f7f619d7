/** Logging, health and metrics, over a real socket and a real stderr. */
import { spawnSync } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { createServer, get } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, describe, expect, it } from "vitest";
import {
  type Collected,
  createTelemetry,
  type Telemetry,
  type TelemetryOptions,
} from "../../src/edge/telemetry.ts";

const HOST = "127.0.0.1";
const opened: Telemetry[] = [];

afterEach(async () => {
  for (const telemetry of opened.splice(0)) await telemetry.close();
});

function create(more: Partial<TelemetryOptions> = {}): { telemetry: Telemetry; lines: string[] } {
  const lines: string[] = [];
  const telemetry = createTelemetry({
    version: "1.2.3",
    abi: "7",
    logFormat: "text",
    logLevel: "info",
    write: (line) => lines.push(line),
    ...more,
  });
  opened.push(telemetry);
  return { telemetry, lines };
}

const traffic = (packets: number | bigint): Collected => ({
  traffic: [
    { hook: "from_pod", verdict: "encapsulated", packets, bytes: 64n },
    { hook: "from_net", verdict: "drop_forged", packets: 1, bytes: 100 },
    { hook: "from_overlay", verdict: "drop_forged", packets: 2, bytes: 100 },
  ],
  maps: [
    { map: "twill_subnets", entries: 3, capacity: 1_024 },
    { map: "twill_flows", entries: undefined, capacity: 9 },
  ],
  masquerade: {
    connections: { tcp: { opening: 1, closed: 2 }, udp: { opening: 3, closed: 0 } },
    ...{ capacity: 100, ports: 4536, furthest: 7, candidates: 128 },
  },
  programs: [{ program: "from_pod", runs: 4n, nanoseconds: 1_500_000_000n }],
  probed: { reachable: 1, unreachable: 2, unknown: 0 },
  peers: [
    { subnet: "172.7.22.0/24", peer: "10.4.7.22", reachable: true, losses: 0, smoothedMs: 2 },
    { subnet: "172.7.23.0/24", peer: "10.4.7.23", reachable: false, losses: 5, smoothedMs: undefined },
    { subnet: "172.7.24.0/24", peer: "10.4.7.24", reachable: undefined, losses: 1, smoothedMs: undefined },
  ],
});

interface Exposition {
  samples: Map<string, number>;
  types: Map<string, string>;
}

/** Reads the text format strictly: any line that it does not know fails the test, as does a sample with no type. */
function parse(body: string): Exposition {
  const samples = new Map<string, number>();
  const types = new Map<string, string>();
  const helped = new Set<string>();
  expect(body.endsWith("\n")).toBe(true);
  for (const line of body.split("\n")) {
    if (line === "") continue;
    const help = /^# HELP ([a-z][a-z0-9_]*) (.+)$/.exec(line);
    const type = /^# TYPE ([a-z][a-z0-9_]*) (counter|gauge|histogram)$/.exec(line);
    const sample = /^([a-z][a-z0-9_]*)(\{[a-z]+="[^"\\]*"(?:,[a-z]+="[^"\\]*")*\})? (\S+)$/.exec(line);
    if (help) helped.add(help[1] ?? "");
    else if (type) types.set(type[1] ?? "", type[2] ?? "");
    else if (sample) {
      const [, name = "", labels = "", value] = sample;
      const family = types.has(name) ? name : name.replace(/_(bucket|sum|count)$/, "");
      expect(types.has(family), line).toBe(true);
      expect(helped.has(family), line).toBe(true);
      expect(name, "a counter ends in _total").toMatch(types.get(family) === "counter" ? /_total$/ : /./);
      expect(name, line).toMatch(/^(twill|process|nodejs)_/);
      expect(samples.has(name + labels), `${line} comes twice`).toBe(false);
      expect(Number.isNaN(Number(value)), line).toBe(false);
      samples.set(name + labels, Number(value));
    } else throw new Error(`not the text format: ${line}`);
  }
  return { samples, types };
}

/** promtool's own opinion. */
function promtool(body: string): void {
  const run = spawnSync("promtool", ["check", "metrics"], { input: body, encoding: "utf8" });
  expect(run.stdout + run.stderr).toBe("");
  expect(run.status).toBe(0);
}

describe("HTTP", () => {
  it("answers health always, and readiness when it is reached", async () => {
    const { telemetry } = create();
    const port = await telemetry.listen(HOST, 0);
    const ask = async (path: string) => {
      const response = await fetch(`http://${HOST}:${port}${path}`);
      return [response.status, await response.text()];
    };
    expect(await ask("/healthz")).toEqual([200, "twilld is running\n"]);
    expect(await ask("/readyz")).toEqual([503, "twilld is not ready yet\n"]);
    expect((await ask("/else"))[0]).toBe(404);
    telemetry.setReady(true);
    expect(await ask("/readyz?verbose")).toEqual([200, "twilld is ready\n"]);
    telemetry.setReady(false);
    expect((await ask("/readyz"))[0]).toBe(503);
    expect((await ask("/healthz"))[0]).toBe(200);
  });

  it("is scraped", async () => {
    const { telemetry } = create();
    const { metrics } = telemetry;
    const port = await telemetry.listen(HOST, 0);
    metrics.storeConnected.set(1);
    metrics.desiredRevision.set(42);
    metrics.appliedRevision.set(41);
    metrics.peers.set(2);
    metrics.endpoints.set(5);
    metrics.recordsRejected.set(1);
    metrics.reconcileDuration.observe(0.003);
    metrics.reconciles.inc({ result: "applied" });
    metrics.driftRepaired.inc({ table: "route" }, 2);
    metrics.operationsFailed.inc({ table: "neighbour" });
    metrics.leaseExpiry.set(1_800_000_000);
    metrics.leaseEvents.inc({ event: "moved" });
    telemetry.setReady(true);
    let seen = traffic(2n ** 40n);
    telemetry.collect(() => Promise.resolve(seen));

    const scrape = async () => {
      const response = await fetch(`http://${HOST}:${port}/metrics`);
      expect(response.status).toBe(200);
      expect(response.headers.get("content-type")).toBe("text/plain; version=0.0.4; charset=utf-8");
      const body = await response.text();
      promtool(body);
      return parse(body);
    };
    const { samples, types } = await scrape();
    expect(Object.fromEntries(types)).toEqual({
      twill_build_info: "gauge",
      twill_ready: "gauge",
      twill_store_disconnections_total: "counter",
      twill_records_ignored: "gauge",
      twill_operations_failing: "gauge",
      twill_fast_path_suspended: "gauge",
      twill_probes_total: "counter",
      twill_probe_duration_seconds: "histogram",
      twill_lease_events_total: "counter",
      twill_lease_ttl_seconds: "gauge",
      twill_lease_renew_margin_seconds: "gauge",
      twill_dropped_packets_total: "counter",
      twill_connections: "gauge",
      twill_connections_capacity: "gauge",
      twill_masquerade_ports: "gauge",
      twill_masquerade_port_candidates_used: "gauge",
      twill_masquerade_port_candidates: "gauge",
      twill_program_runs_total: "counter",
      twill_program_run_seconds_total: "counter",
      twill_probed_peers: "gauge",
      twill_peer_reachable: "gauge",
      twill_peer_probe_losses: "gauge",
      twill_peer_round_trip_seconds: "gauge",
      twill_peer_packets_total: "counter",
      twill_peer_bytes_total: "counter",
      twill_scrape_duration_seconds: "gauge",
      process_cpu_seconds_total: "counter",
      process_resident_memory_bytes: "gauge",
      process_start_time_seconds: "gauge",
      process_open_fds: "gauge",
      process_max_fds: "gauge",
      nodejs_heap_size_used_bytes: "gauge",
      twill_store_connected: "gauge",
      twill_desired_revision: "gauge",
      twill_applied_revision: "gauge",
      twill_peers: "gauge",
      twill_endpoints: "gauge",
      twill_records_rejected: "gauge",
      twill_reconcile_duration_seconds: "histogram",
      twill_reconciles_total: "counter",
      twill_drift_repaired_total: "counter",
      twill_operations_failed_total: "counter",
      twill_lease_expiry_timestamp_seconds: "gauge",
      twill_packets_total: "counter",
      twill_bytes_total: "counter",
      twill_map_entries: "gauge",
      twill_map_capacity: "gauge",
      twill_scrape_failures_total: "counter",
    });
    expect(Object.fromEntries([...samples].filter(([name]) => !name.includes("_bucket")))).toMatchObject({
      'twill_build_info{version="1.2.3",abi="7"}': 1,
      twill_ready: 1,
      twill_store_connected: 1,
      'twill_lease_events_total{event="moved"}': 1,
      twill_desired_revision: 42,
      twill_applied_revision: 41,
      twill_peers: 2,
      twill_endpoints: 5,
      twill_records_rejected: 1,
      twill_reconcile_duration_seconds_count: 1,
      'twill_reconciles_total{result="applied"}': 1,
      'twill_drift_repaired_total{table="route"}': 2,
      'twill_operations_failed_total{table="neighbour"}': 1,
      twill_lease_expiry_timestamp_seconds: 1_800_000_000,
      'twill_packets_total{hook="from_pod",verdict="encapsulated"}': 2 ** 40,
      'twill_bytes_total{hook="from_pod",verdict="encapsulated"}': 64,
      'twill_packets_total{hook="from_net",verdict="drop_forged"}': 1,
      'twill_dropped_packets_total{reason="forged"}': 3,
      'twill_connections{protocol="tcp",state="closed"}': 2,
      twill_connections_capacity: 100,
      twill_masquerade_ports: 4536,
      twill_masquerade_port_candidates_used: 7,
      twill_masquerade_port_candidates: 128,
      'twill_program_runs_total{program="from_pod"}': 4,
      'twill_program_run_seconds_total{program="from_pod"}': 1.5,
      'twill_probed_peers{state="unreachable"}': 2,
      'twill_peer_reachable{subnet="172.7.22.0/24",peer="10.4.7.22"}': 1,
      'twill_peer_reachable{subnet="172.7.23.0/24",peer="10.4.7.23"}': 0,
      'twill_peer_probe_losses{subnet="172.7.24.0/24",peer="10.4.7.24"}': 1,
      'twill_peer_round_trip_seconds{subnet="172.7.22.0/24",peer="10.4.7.22"}': 0.002,
      'twill_reconciles_total{result="failure"}': 0,
      'twill_operations_failed_total{table="routes"}': 0,
      'twill_drift_repaired_total{table="pins"}': 0,
      'twill_probes_total{result="lost"}': 0,
      'twill_map_entries{map="twill_subnets"}': 3,
      'twill_map_capacity{map="twill_subnets"}': 1_024,
    });

    // Absolute values replace the former ones, and what is gone is gone.
    seen = { traffic: [], maps: [{ map: "twill_subnets", entries: 4, capacity: 1_024 }] };
    const second = await scrape();
    expect(second.samples.get('twill_map_entries{map="twill_subnets"}')).toBe(4);
    expect([...second.samples.keys()].filter((name) => name.startsWith("twill_packets_total{"))).toEqual([]);
    expect(second.samples.has("twill_connections_capacity")).toBe(false);
    expect([...second.samples.keys()].filter((name) => name.startsWith("twill_peer_"))).toEqual([]);
    expect(samples.has('twill_map_entries{map="twill_flows"}')).toBe(false);
    expect(samples.has('twill_peer_reachable{subnet="172.7.24.0/24",peer="10.4.7.24"}')).toBe(false);
    expect(samples.get("process_open_fds")).toBeGreaterThan(2);
    expect(samples.get("process_cpu_seconds_total")).toBeGreaterThan(0);
  });

  it("answers a scrape although the kernel's counters cannot be read", async () => {
    const { telemetry, lines } = create();
    const port = await telemetry.listen(HOST, 0);
    telemetry.collect(() => {
      throw new Error("the map twill_stats is gone");
    });
    const body = await (await fetch(`http://${HOST}:${port}/metrics`)).text();
    expect(parse(body).samples.get("twill_scrape_failures_total")).toBe(1);
    expect(lines.join("")).toMatch(
      /warn {2}the kernel's counters cannot be read error="the map twill_stats is gone"/,
    );
  });

  it("names the flags when the address is taken", async () => {
    const other = createServer().listen(0, HOST);
    await once(other, "listening");
    try {
      const address = other.address();
      const port = typeof address === "object" && address ? address.port : 0;
      const { telemetry } = create();
      await expect(telemetry.listen(HOST, port)).rejects.toThrow(
        new RegExp(
          `cannot be served on ${HOST} port ${port} .*EADDRINUSE.*: choose others with --healthz-ip`,
        ),
      );
    } finally {
      other.close();
    }
  });

  it("closes at once although a client keeps its connection", async () => {
    const { telemetry } = create();
    const port = await telemetry.listen(HOST, 0);
    const request = get({ host: HOST, port, path: "/healthz", headers: { connection: "keep-alive" } });
    const [response] = await once(request, "response");
    response.resume();
    await once(response, "end");
    await telemetry.close();
    await expect(fetch(`http://${HOST}:${port}/healthz`)).rejects.toThrow();
    await telemetry.close();
  });
});

describe("log", () => {
  it("writes one readable line", () => {
    const { telemetry, lines } = create();
    telemetry.log.info(
      { peer: "10.4.7.22", subnet: "172.7.22.0/24", packets: 3, map: { used: 1 } },
      "peer joined",
    );
    telemetry.log.debug("not at this level");
    expect(lines).toHaveLength(1);
    expect(lines[0]).toMatch(
      /^\d{4}-\d\d-\d\dT[\d:.]+Z info {2}peer joined peer=10\.4\.7\.22 subnet=172\.7\.22\.0\/24 packets=3 map="\{\\"used\\":1\}"\n$/,
    );
  });

  it("quotes what would break the line or drive a terminal", () => {
    const { telemetry, lines } = create();
    telemetry.log.warn(
      { key: "subnets/a b", value: "x\n2026 error forged", escape: "\u001b[2J\u009b" },
      "bad\nrecord",
    );
    expect(lines).toHaveLength(1);
    const [line = ""] = lines;
    expect(line.slice(0, -1)).not.toMatch(/\p{Cc}/u);
    expect(line).toContain('bad\\u000arecord key="subnets/a b" value="x\\n2026 error forged"');
  });

  it("tells an error by its message and cause", () => {
    const { telemetry, lines } = create();
    telemetry.log.error({ error: new Error("no route", { cause: new Error("ENETUNREACH") }) }, "failed");
    telemetry.log.error(new Error("alone"));
    expect(lines[0]).toContain('error failed error="no route (ENETUNREACH)"\n');
    expect(lines[1]).toContain("error alone err=alone\n");
  });

  it("writes JSON", () => {
    const { telemetry, lines } = create({ logFormat: "json", logLevel: "debug" });
    telemetry.log.child({ part: "store" }).debug({ revision: 7 }, "synced");
    expect(JSON.parse(lines[0] ?? "")).toEqual({
      level: "debug",
      time: expect.stringMatching(/^\d{4}-/),
      part: "store",
      revision: 7,
      msg: "synced",
    });
  });

  it("has written its last words to stderr when the process exits", () => {
    const top = join(import.meta.dirname, "../..");
    const dir = mkdtempSync(join(tmpdir(), "twill-telemetry-"));
    try {
      const compiled = spawnSync(
        join(top, "node_modules/.bin/tsc"),
        [
          ...[
            "--ignoreConfig",
            "--module",
            "nodenext",
            "--target",
            "es2023",
            "--types",
            "node",
            "--skipLibCheck",
          ],
          ...["--typeRoots", join(top, "node_modules/@types"), "--outDir", join(dir, "dist")],
          join(top, "src/edge/telemetry.ts"),
        ],
        { encoding: "utf8" },
      );
      expect(compiled.stdout + compiled.stderr).toBe("");
      writeFileSync(join(dir, "package.json"), '{"type":"module"}');
      symlinkSync(join(top, "node_modules"), join(dir, "node_modules"));
      writeFileSync(
        join(dir, "main.js"),
        `import { createTelemetry } from "./dist/telemetry.js";
         const { log } = createTelemetry({ version: "1", abi: "1", logFormat: "text", logLevel: "info" });
         for (let i = 0; i < 200; i += 1) log.info({ i }, "line");
         log.fatal("last words");
         process.exit(3);`,
      );
      const run = spawnSync(process.execPath, [join(dir, "main.js")], { encoding: "utf8" });
      expect(run.status).toBe(3);
      expect(run.stdout).toBe("");
      const lines = run.stderr.trimEnd().split("\n");
      expect(lines).toHaveLength(201);
      expect(lines.at(-1)).toMatch(/Z fatal last words$/);
    } finally {
      rmSync(dir, { recursive: true, force: true });
    }
  });
});
