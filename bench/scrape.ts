/**
 * What a scrape of /metrics costs: a node with so many leases in etcd (10,000 unless told otherwise), asked 100 times
 * over its own loopback. Prints the processor time that the daemon spends on each (by its own
 * process_cpu_seconds_total, less what it spends in the same time anyway), which other work on the machine changes
 * little; the time that the client sees; and the size of the answer. The same node with 10 leases is what it is compared with.
 */
import { performance } from "node:perf_hooks";
import { createLab, type Etcd, type Host } from "../test/lab.ts";
import { startTwilld } from "../test/twilld.ts";

const PEERS = Number(process.argv[2] ?? 10_000);
const FEW = 10;
const SCRAPES = 100;
/** Asked before, so that the code is compiled. */
const WARM_UP = 50;
/** How long it is watched without scrapes; a multiple of its own periods of 5 s and 10 s. */
const IDLE_MS = 20_000;
const IN_ONE_TXN = 100;
const SUBNETS = "/coreos.com/network/subnets";

const hex = (number: number): string => number.toString(16).padStart(2, "0");

/** Leases of peers that are nowhere: 10.0.0.0/8 is the network, a /24 for each. */
async function putLeases(etcd: Etcd, count: number): Promise<void> {
  const puts = Array.from({ length: count }, (_, i) => {
    const [high, low] = [Math.floor(i / 250) + 1, i % 250];
    const record = {
      PublicIP: `192.168.${high}.${low + 1}`,
      BackendType: "vxlan",
      BackendData: { VNI: 1, VtepMAC: `0e:00:00:00:${hex(high)}:${hex(low)}` },
    };
    return `put ${SUBNETS}/10.${high}.${low}.0-24 ${JSON.stringify(JSON.stringify(record))}`;
  });
  for (let at = 0; at < puts.length; at += IN_ONE_TXN) {
    await etcd.host.exec(["etcdctl", `--endpoints=${etcd.endpoints.join(",")}`, "txn"], {
      env: { ETCDCTL_API: "3" },
      input: `\n${puts.slice(at, at + IN_ONE_TXN).join("\n")}\n\n\n`,
    });
  }
}

const middle = (values: readonly number[]): number =>
  [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)] ?? Number.NaN;

/** Asks within the host's namespace, from one process: starting one for each would be all that is measured. */
const CLIENT = `
const times = [];
let size = 0;
const scrape = async () => {
  const started = performance.now();
  const body = await (await fetch("http://127.0.0.1:2401/metrics")).text();
  times.push(performance.now() - started);
  size = body.length;
  return { at: performance.now(), cpu: Number(/^process_cpu_seconds_total (\\S+)$/m.exec(body)[1]) * 1000 };
};
for (let n = 0; n < ${WARM_UP}; n++) await scrape();
const before = await scrape();
await new Promise((resolve) => setTimeout(resolve, ${IDLE_MS}));
const first = await scrape();
const idle = (first.cpu - before.cpu) / (first.at - before.at);
times.length = 0;
// At a distance, so that what it does every 5 and 10 s is in it as often as it should be.
let last;
for (let n = 0; n < ${SCRAPES}; n++) {
  await new Promise((resolve) => setTimeout(resolve, ${IDLE_MS / SCRAPES}));
  last = await scrape();
}
const spent = (last.cpu - first.cpu - idle * (last.at - first.at)) / ${SCRAPES};
process.stdout.write(JSON.stringify({ times, spent, size }));
`;

async function measure(host: Host, etcd: Etcd, peers: number, flags: readonly string[]): Promise<void> {
  const twilld = await startTwilld(host, { etcd, flags: ["--ip-masq", ...flags], timeout: 300_000 });
  await twilld.statusWhere(`${peers} peers`, (status) => status.peers === peers, 300_000);
  const { stdout } = await host.exec([process.execPath, "--input-type=module", "-e", CLIENT], {
    timeout: 300_000,
  });
  const { times, spent, size } = JSON.parse(stdout) as { times: number[]; spent: number; size: number };
  const words = [
    `${peers} peers${flags.length === 0 ? "" : `, ${flags.join(" ")}`}:`,
    `${spent.toFixed(1)} ms of processor time for a scrape,`,
    `${middle(times).toFixed(1)} ms until the client has it,`,
    `${Math.round(size / 1024)} KiB`,
  ];
  process.stdout.write(`${words.join(" ")}\n`);
  await twilld.stop();
}

// Only a process that exits takes its lab away.
for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => process.exit(130));
const started = performance.now();
const lab = await createLab();
try {
  const host = await lab.host("h1", { address: "172.16.0.21/24" });
  const etcd = await lab.etcd({ addresses: ["172.16.0.11/24"] });
  await etcd.put("/coreos.com/network/config", '{"Network": "10.0.0.0/8", "Backend": {"Type": "vxlan"}}');
  await putLeases(etcd, FEW);
  await measure(host, etcd, FEW, []);
  await putLeases(etcd, PEERS);
  await measure(host, etcd, PEERS, []);
  await measure(host, etcd, PEERS, ["--metrics-peers=1000"]);
} finally {
  await lab.close();
}
process.stdout.write(
  `${SCRAPES} scrapes each, medians; ${Math.round((performance.now() - started) / 1000)} s\n`,
);
