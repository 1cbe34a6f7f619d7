/**
 * What a node tells of itself and its peers, from probes to alerts: two hosts with twilld, and a third that the
 * kernel alone connects, set up as flanneld does it. One lab lives through all of it.
 */
import { readFileSync, watch, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { addVxlan, addVxlanPeer } from "../../bench/baseline.ts";
import { countRuns, NO_TRAFFIC, readTraffic } from "../../src/edge/dataplane.ts";
import { type PeerNote, peersPathOf, readPeersNote } from "../../src/edge/rundir.ts";
import { createLab, type Etcd, type Host, type Lab, repository, until } from "../lab.ts";
import { startTwilld, type Twilld, twill } from "../twilld.ts";

const CONFIG = "/coreos.com/network/config";
/** 172.7.254.0/24 is for a peer that the test makes up. */
const network = (backend: object) =>
  JSON.stringify({ Network: "172.7.0.0/16", SubnetMax: "172.7.250.0", Backend: backend });

const FLAGS = ["--peer-probes=1", "--ip-masq", "--metrics-peers=10", "--healthz-ip=0.0.0.0"];

let lab: Lab;
let etcd: Etcd;
let h1: Host;
let h2: Host;
let t1: Twilld;
let t2: Twilld;

const base = (twilld: Twilld): string => (twilld.status?.subnet ?? "").replace("/24", "");

/** What the daemon of a host says of its peers, once `accept` likes it. */
function peersWhere(twilld: Twilld, accept: (peers: Map<string, PeerNote>) => boolean) {
  const path = peersPathOf(twilld.pinPath);
  const check = () => {
    const note = readPeersNote(twilld.pinPath);
    const peers = new Map((note?.peers ?? []).map((peer) => [peer.publicIp, peer]));
    return note?.pid === twilld.process.pid && accept(peers) ? peers : undefined;
  };
  const wake = (ring: () => void) => {
    const watcher = watch(dirname(path), ring);
    return () => watcher.close();
  };
  return until(`${path} to say so`, check, { wake, timeout: 30_000 });
}

beforeAll(async () => {
  lab = await createLab({ rpFilter: 1 });
  etcd = await lab.etcd({ addresses: ["10.4.7.11/24"] });
  await etcd.put(CONFIG, network({ Type: "vxlan" }));
  [h1, h2] = await Promise.all([
    lab.host("h1", { address: "10.4.7.21/24" }),
    lab.host("h2", { address: "10.4.7.22/24" }),
  ]);
  const flags = FLAGS;
  [t1, t2] = await Promise.all([startTwilld(h1, { etcd, flags }), startTwilld(h2, { etcd, flags })]);
});

afterAll(() => lab?.close());

describe("probes", () => {
  test("take the tunnel, to a peer that runs twilld and to one that runs nothing of ours", async () => {
    const h3 = await lab.host("h3", { address: "10.4.7.23/24" });
    const { mac } = await addVxlan(h3, { subnet: "172.7.254.0/24" });
    const own = t1.subnetEnv.FLANNEL_SUBNET?.replace(".1/24", ".0/24") ?? "";
    await addVxlanPeer(h3, { subnet: own, publicIp: h1.address, vtepMac: await h1.mac("flannel.1") });
    const [tunnelled, bare] = [
      await h1.capture("eth0", "udp port 8472"),
      await h1.capture("eth0", "icmp or host 172.7.254.0"),
    ];
    const record = { PublicIP: h3.address, BackendType: "vxlan", BackendData: { VNI: 1, VtepMAC: mac } };
    await etcd.put("/coreos.com/network/subnets/172.7.254.0-24", JSON.stringify(record));
    await t1.statusWhere("two peers answer", ({ probes }) => probes?.reachable === 2);
    const peers = await peersWhere(
      t1,
      (all) => all.size === 2 && [...all.values()].every(({ rttMs }) => rttMs !== undefined),
    );
    // The other peer may have answered before the captures began; it is asked again within a second.
    await until("both to be asked and to answer", () => tunnelled.frames().length >= 4);
    await tunnelled.stop();
    await bare.stop();
    expect(bare.frames()).toEqual([]);
    expect(t1.status?.probes?.source).toBe(base(t1));
    expect(peers.get(h3.address)).toMatchObject({
      ...{ subnet: "172.7.254.0/24", target: "172.7.254.0", state: "reachable", losses: 0 },
      ...{
        rttMs: expect.any(Number),
        smoothedMs: expect.any(Number),
        answeredAt: expect.stringMatching(/Z$/),
      },
    });
    expect(peers.get(h2.address)).toMatchObject({ target: base(t2), state: "reachable" });
    expect(await twill(h1, "status", `--pin-path=${h1.pinPath}`)).toMatch(
      /^probes +2 of 2 peers answer; each asked every 1 s$/m,
    );
    const shown = () => twill(h1, "peers", h3.address, "--json", `--pin-path=${h1.pinPath}`);
    expect(JSON.parse(await shown())).toMatchObject({
      peers: [{ subnet: "172.7.254.0/24", state: "reachable", rttMs: expect.any(Number) }],
    });
    await h3.plug(false);
    await t1.statusWhere("the third peer does not answer", ({ probes }) => probes?.unreachable === 1);
    expect(
      (await peersWhere(t1, (all) => all.get(h3.address)?.state === "unreachable")).get(h2.address),
    ).toMatchObject({
      state: "reachable",
    });
    expect(JSON.parse(await shown())).toMatchObject({ peers: [{ state: "unreachable" }] });
    await t1.says(/the peer does not answer subnet=172\.7\.254\.0\/24 peer=10\.4\.7\.23/);
    await h3.plug(true);
    await t1.statusWhere("it answers again", ({ probes }) => probes?.reachable === 2);
    await etcd.ctl("del", "/coreos.com/network/subnets/172.7.254.0-24");
    await t1.statusWhere("it is gone", ({ probes }) => probes?.reachable === 1 && probes.unreachable === 0);
  });

  test("go directly where pods' packets do", async () => {
    const directly = async (filter: string) => {
      const capture = await h1.capture("eth0", `icmp and ${filter}`);
      await until(`${filter} to be asked and to answer`, () => capture.frames().length >= 4, {
        timeout: 30_000,
      });
      await capture.stop();
    };
    await etcd.put(CONFIG, network({ Type: "vxlan", DirectRouting: true }));
    await directly(`host ${base(t1)} and host ${base(t2)}`);
    await etcd.put(CONFIG, network({ Type: "host-gw" }));
    await t1.statusWhere("host-gw", (status) => status.network?.backend.type === "host-gw", 60_000);
    await directly("host 10.4.7.21 and host 10.4.7.22");
    await peersWhere(t1, (peers) => peers.get(h2.address)?.target === "10.4.7.22");
    await etcd.put(CONFIG, network({ Type: "vxlan" }));
    await t1.statusWhere(
      "the tunnel's way",
      ({ probes }) => probes?.source === base(t1) && probes.reachable === 1,
    );
  });
});

/** A metric as it is told to Prometheus. */
interface Metric {
  readonly type: string;
  readonly help: string;
  readonly labels: Set<string>;
}

function metricsIn(body: string): Map<string, Metric> {
  const metrics = new Map<string, { type: string; help: string; labels: Set<string> }>();
  for (const line of body.split("\n")) {
    const [, what, name = "", text = ""] = /^# (HELP|TYPE) (\S+) (.+)$/.exec(line) ?? [];
    if (what !== undefined) {
      const metric = metrics.get(name) ?? { type: "", help: "", labels: new Set<string>() };
      metrics.set(name, what === "HELP" ? { ...metric, help: text } : { ...metric, type: text });
      continue;
    }
    const [, series = "", labels = ""] = /^([a-z_]+)(?:\{(.*)\})? /.exec(line) ?? [];
    const family = metrics.get(series) ?? metrics.get(series.replace(/_(bucket|sum|count)$/, ""));
    for (const [, label = ""] of labels.matchAll(/([a-z]+)="/g))
      if (label !== "le") family?.labels.add(label);
  }
  return metrics;
}

describe("traffic by peer", () => {
  type Count = { packets: number; bytes: number };
  /** Of the only peer: those that went were forgotten. */
  const of = (host: Host): { sent: Count; received: Count } => {
    const [peer = NO_TRAFFIC, ...others] = readTraffic(host.pinPath).values();
    expect(others).toEqual([]);
    return peer;
  };
  const less = (a: Count, b: Count): Count => ({ packets: a.packets - b.packets, bytes: a.bytes - b.bytes });
  /** Peers ask each other once a second, so that a few packets more may come by. */
  const SOME = 40;
  const bridgeOf = (twilld: Twilld): string => base(twilld).replace(/0$/, "1");
  beforeAll(async () => {
    await h1.bridge("docker0", `${bridgeOf(t1)}/24`);
    await h2.bridge("docker0", `${bridgeOf(t2)}/24`);
  });

  test.each([
    ["host-gw", { Type: "host-gw" }],
    ["ipip", { Type: "ipip" }],
    ["vxlan", { Type: "vxlan" }],
  ])(
    "counts what pings exchange, the same at both ends, and goes on without a daemon, and with the next: %s",
    async (type, backend) => {
      await etcd.put(CONFIG, network(backend));
      await Promise.all(
        [t1, t2].map((each) =>
          each.statusWhere(
            type,
            ({ network: now, probes }) => now?.backend.type === type && probes?.reachable === 1,
            60_000,
          ),
        ),
      );
      // For some seconds more they reach each other without a tunnel, and do not end that at the same moment: what is the
      // nodes' own then comes by another way than it went, which strict filtering refuses.
      const device = type === "host-gw" ? "dev eth0" : "dev flannel.";
      for (const [host, peer] of [
        [h1, t2],
        [h2, t1],
      ] as const) {
        const isThere = async () => (await host.ip(`route show ${base(peer)}/24`)).includes(device);
        await until(`${host.name} to reach its peer by ${device}`, isThere, { timeout: 30_000 });
      }
      const PINGS = 200;
      const SIZE = 500;
      // Under an address of the subnet: without a tunnel, what a node says under its own is not of its pods.
      const ping = (count: number) =>
        h1.exec(
          ["ping", "-q", "-i", "0.005", "-c", `${count}`, "-s", `${SIZE}`, "-I", bridgeOf(t1), bridgeOf(t2)],
          { check: false },
        );
      // The status tells of the config that was read; the programs of the new backend take a moment to be loaded.
      await until(`both nodes' programs to count by ${type}`, async () => {
        const former = [of(h1), of(h2)];
        await ping(SOME);
        return [of(h1), of(h2)].every(({ sent, received }, index) =>
          [
            less(sent, former[index]?.sent ?? sent),
            less(received, former[index]?.received ?? received),
          ].every(({ packets }) => packets >= SOME),
        );
      });
      const before = [of(h1), of(h2)] as const;
      await ping(PINGS);
      const after = [of(h1), of(h2)] as const;
      const frame = 14 + 20 + 8 + SIZE;
      for (const [index, host] of [h1, h2].entries()) {
        for (const way of ["sent", "received"] as const) {
          const [now, then] = [after[index]?.[way], before[index]?.[way]];
          if (now === undefined || then === undefined) throw new Error("unreachable");
          const { packets, bytes } = less(now, then);
          expect(packets, `${host.name} ${way}`).toBeGreaterThanOrEqual(PINGS);
          expect(packets, `${host.name} ${way}`).toBeLessThan(PINGS + SOME);
          expect(bytes, `${host.name} ${way}`).toBeGreaterThanOrEqual(PINGS * frame);
          expect(bytes, `${host.name} ${way}`).toBeLessThan(PINGS * frame + SOME * 200);
        }
      }
      await t1.stop();
      expect(of(h1).sent.packets).toBeGreaterThanOrEqual(after[0].sent.packets);
      t1 = await startTwilld(h1, { etcd, flags: FLAGS });
      expect(of(h1).sent.packets).toBeGreaterThanOrEqual(after[0].sent.packets);
      expect(await twill(h1, "peers", `--pin-path=${h1.pinPath}`)).toMatch(
        / SENT +RECEIVED .*\n.* \d+ in \d\S* kB /,
      );
      const { peers } = JSON.parse(await twill(h1, "peers", "--json", `--pin-path=${h1.pinPath}`));
      expect(peers[0].sent.packets).toBeGreaterThanOrEqual(after[0].sent.packets);
    },
    180_000,
  );
});

describe("metrics", () => {
  test("docs/metrics.md lists all that there are, as they are", async () => {
    const counting = countRuns();
    let body = "";
    try {
      // The sweep counts connections once a second, and programs are counted as soon as packets come.
      await until("all metrics to have a sample", async () => {
        await h1.ping(base(t2), { count: 1 });
        body = await t1.metrics();
        return [...metricsIn(body).keys()].every((name) =>
          new RegExp(`^${name}(_bucket|_sum|_count)?[{ ]`, "m").test(body),
        );
      });
    } finally {
      counting.close();
    }
    const rows = [...metricsIn(body)].map(
      ([name, { type, help, labels }]) => `| \`${name}\` | ${type} | ${[...labels].join(", ")} | ${help} |`,
    );
    const page = readFileSync(join(repository, "docs/metrics.md"), "utf8");
    const listed = page.split("\n").filter((line) => /^\| `(twill|process|nodejs)_/.test(line));
    expect(listed.sort()).toEqual(rows.sort());
    for (const direction of ["sent", "received"]) {
      const series = `twill_peer_packets_total{subnet="${base(t2)}/24",peer="10.4.7.22",direction="${direction}"}`;
      expect(body).toMatch(new RegExp(`^${series.replace(/[{}.]/g, "\\$&")} [1-9]`, "m"));
    }
    expect(body).toContain(`twill_peer_reachable{subnet="${base(t2)}/24",peer="10.4.7.22"} 1`);
    expect(body).toMatch(/^twill_lease_ttl_seconds 86400$/m);
    const [, expiry = "0"] = /^twill_lease_expiry_timestamp_seconds (\S+)$/m.exec(body) ?? [];
    expect(Number(expiry)).toBeGreaterThan(Date.now() / 1000);
  });

  test("a Prometheus scrapes them, understands every expression, and tells of a peer that is cut off", async () => {
    const prometheus = await startPrometheus();
    const ask = async <T>(path: string): Promise<T> => {
      const { status, data } = JSON.parse(await prometheus.httpGet(`${PROMETHEUS}/api/v1/${path}`)) as {
        status: string;
        data: T;
      };
      expect(status).toBe("success");
      return data;
    };
    type Alert = { labels: Record<string, string>; annotations: Record<string, string>; state: string };
    const alerts = async (): Promise<Alert[]> => (await ask<{ alerts: Alert[] }>("alerts")).alerts;
    const firing = (name: string, from: Host) => async () =>
      (await alerts()).find(
        ({ labels, state }) =>
          labels.alertname === name && labels.instance === `${from.address}:2401` && state === "firing",
      );
    const wake = (ring: () => void) => {
      const timer = setInterval(ring, 500);
      return () => clearInterval(timer);
    };

    await until("both nodes to be scraped", async () => (await seriesOf(ask, 'up{job="twill"} == 1')) === 2, {
      wake,
    });
    await until(
      "the peers to answer",
      async () => (await seriesOf(ask, 'twill_probed_peers{state="reachable"} == 1')) === 2,
      {
        wake,
      },
    );
    expect(await firing("TwillPeerUnreachable", h1)()).toBeUndefined();

    // Every expression of the rules and the dashboard names what is there, and is understood.
    const { groups } = await ask<{
      groups: { rules: { query: string; health: string; lastError?: string }[] }[];
    }>("rules");
    const rules = groups.flatMap((group) => group.rules);
    expect(rules.length).toBeGreaterThan(15);
    expect(rules.filter(({ lastError }) => (lastError ?? "") !== "")).toEqual([]);
    const panels = expressionsOf(
      JSON.parse(readFileSync(join(repository, "deploy/grafana/twill.json"), "utf8")),
    );
    expect(panels.length).toBeGreaterThan(30);
    const known = metricsIn(await t1.metrics());
    for (const expression of [...panels, ...rules.map(({ query }) => query)]) {
      const names = expression.match(/\b(twill|process|nodejs)_[a-z_]+\b/g) ?? [];
      expect(expression === 'up{job="twill"} == 0' ? 1 : names.length, expression).toBeGreaterThan(0);
      for (const name of names) {
        const isKnown = known.has(name) || known.get(name.replace(/_bucket$/, ""))?.type === "histogram";
        expect(isKnown, `${name} of ${expression}`).toBe(true);
      }
      const query = expression
        .replaceAll("$__rate_interval", "1m")
        .replaceAll("$job", "twill")
        .replaceAll("$instance", ".*");
      await ask(`query?query=${encodeURIComponent(query)}`);
    }

    await h2.plug(false);
    const alert = await until("the alert to fire", firing("TwillPeerUnreachable", h1), {
      timeout: 60_000,
      wake,
    });
    expect(alert.annotations.summary).toBe("10.4.7.21:2401 does not reach 1 of its peers");
    expect(alert.annotations.action).toContain("'twill peers' on 10.4.7.21:2401 names them");
    expect(alert.labels.severity).toBe("warning");
    await until("twilld to be missed", firing("TwillDown", h2), { timeout: 60_000, wake });
    await h2.plug(true);
    const isClear = (name: string, from: Host) => async () => (await firing(name, from)()) === undefined;
    await until("the alert to clear", isClear("TwillPeerUnreachable", h1), { timeout: 60_000, wake });
    await until("twilld to be there again", isClear("TwillDown", h2), { timeout: 60_000, wake });
  }, 180_000);
});

const PROMETHEUS = "http://127.0.0.1:9090";

/** Debian's, on a host of its own, with the delivered rules; only what is waited for before one fires is shorter. */
async function startPrometheus(): Promise<Host> {
  const host = await lab.host("prometheus", { address: "10.4.7.31/24" });
  const delivered = readFileSync(join(repository, "deploy/prometheus/twill.rules.yml"), "utf8");
  const rules = delivered.replace(/^( +for:) \S+$/gm, "$1 1s");
  expect(rules).not.toBe(delivered);
  writeFileSync(join(host.directory, "twill.rules.yml"), rules);
  const config = {
    global: { scrape_interval: "1s", scrape_timeout: "1s", evaluation_interval: "1s" },
    rule_files: ["twill.rules.yml"],
    scrape_configs: [
      { job_name: "twill", static_configs: [{ targets: [h1, h2].map(({ address }) => `${address}:2401`) }] },
    ],
  };
  // YAML, of which JSON is a part.
  writeFileSync(join(host.directory, "prometheus.yml"), JSON.stringify(config));
  const server = host.spawn(
    [
      "prometheus",
      "--config.file=prometheus.yml",
      `--storage.tsdb.path=${join(host.directory, "data")}`,
      "--web.listen-address=127.0.0.1:9090",
    ],
    { cwd: host.directory },
  );
  await server.line(/Server is ready to receive web requests/, { timeout: 60_000 });
  return host;
}

/** How many series an expression gives. */
async function seriesOf(ask: (path: string) => Promise<unknown>, expression: string): Promise<number> {
  const { result } = (await ask(`query?query=${encodeURIComponent(expression)}`)) as { result: unknown[] };
  return result.length;
}

/** Every `expr` anywhere in a dashboard. */
function expressionsOf(part: unknown): string[] {
  if (typeof part !== "object" || part === null) return [];
  return Object.entries(part).flatMap(([name, value]) =>
    name === "expr" ? [value as string] : expressionsOf(value),
  );
}
