/**
 * `make demo`: two hosts, one etcd, two pods on each host, in network namespaces; twilld on both hosts.
 *
 * Shows what there is to see, in the order in which it happens: the config in etcd, the command line, the
 * leases, both subnet.env, pings and HTTP between pods, which way the packets took, and the map they took it
 * by. Then it removes everything, or with --keep stays until `make demo-end`.
 *
 * test/demo starts this and sweeps behind it, whatever happens.
 */
import { join } from "node:path";
import { readCounters } from "../src/edge/dataplane.ts";
import { createLab, type Host, type Lab, type Pod, repository, until } from "./lab.ts";
import { startTwilld, type Twilld, twilldFlags } from "./twilld.ts";

const begin = performance.now();
const keep = process.argv.includes("--keep");

function title(text: string): void {
  const seconds = ((performance.now() - begin) / 1000).toFixed(1).padStart(5);
  process.stdout.write(`\n[${seconds} s] ${text}\n`);
}

function show(text: string): void {
  for (const line of text.trimEnd().split("\n")) process.stdout.write(`          ${line}\n`);
}

async function main(lab: Lab): Promise<void> {
  title("an etcd at 10.4.7.11 and two hosts, 10.4.7.21 and 10.4.7.22, on one switch");
  const [etcd, h1, h2] = await Promise.all([
    lab.etcd({ addresses: ["10.4.7.11/24"] }),
    lab.host("host1", { address: "10.4.7.21/24" }),
    lab.host("host2", { address: "10.4.7.22/24" }),
  ]);
  const config = '{"Network": "172.7.0.0/16", "Backend": {"Type": "VxLAN"}}';
  show(`etcdctl put /coreos.com/network/config '${config}'`);
  await etcd.put("/coreos.com/network/config", config);

  title("twilld on both hosts, with flanneld's flags");
  show(`twilld ${twilldFlags(h1, etcd).join(" \\\n       ")}`);
  const twillds = await Promise.all(
    [h1, h2].map((host) => startTwilld(host, { etcd, env: { FLANNELD_PEER_PROBES: undefined } })),
  );

  title("the leases in etcd");
  for (const [key, value] of await etcd.list("/coreos.com/network/subnets/")) show(`${key}\n  ${value}`);

  title("subnet.env on both hosts");
  for (const twilld of twillds) {
    const variables = Object.entries(twilld.subnetEnv).map(([name, value]) => `${name}=${value}`);
    show(`${twilld.host.name}: ${variables.join("  ")}`);
  }

  title("on each host a bridge with FLANNEL_SUBNET and FLANNEL_MTU, as Docker makes it, and two pods");
  const pods = (await Promise.all(twillds.map(makePods))).flat();
  for (const pod of pods) show(`${pod.name}  ${pod.address}`);

  title("pings between all pods, 100 each, 100 a second");
  const [a] = pods;
  const b = pods[2];
  const [first, second] = twillds;
  if (a === undefined || b === undefined || first === undefined || second === undefined)
    throw new Error("no pods");
  // twilld hears of new interfaces by itself; the first packets may be quicker and go through the stack.
  await until("the pods' packets to take the fast path", async () => {
    await a.ping(b.address, { count: 2 });
    return readCounters(first.host.pinPath).from_pod.encapsulated.packets > 0n;
  });
  const pairs = pods.flatMap((from) => pods.filter((to) => to !== from).map((to) => ({ from, to })));
  const results = await Promise.all(
    pairs.map(async ({ from, to }) => ({ from, to, ping: await from.ping(to.address, { count: 100 }) })),
  );
  for (const { from, to, ping } of results) {
    const [, rtt] = /= [\d.]+\/([\d.]+)\//.exec(ping.output) ?? [];
    const where = from.host === to.host ? "same host " : "other host";
    const outcome =
      ping.lost.length === 0 ? `${ping.received} of ${ping.sent} answered` : `LOST ${ping.lost.length}`;
    show(`${from.name} -> ${to.name}  ${where}  ${outcome}, mean ${rtt ?? "?"} ms`);
  }
  if (results.some(({ ping }) => ping.lost.length > 0)) throw new Error("packets were lost between pods");

  title("HTTP between hosts, and the client's address as the server saw it");
  for (const [from, to] of [
    [a, b],
    [b, a],
  ] as const) {
    const server = await to.httpServer({ program: "nginx" });
    const body = await from.httpGet(`http://${to.address}/large`);
    const { source } = await server.request(0);
    show(`${from.name} (${from.address}) got ${body.length} bytes from ${to.name}, which saw ${source}`);
    if (source !== from.address) throw new Error(`${to.name} saw ${source} instead of ${from.address}`);
    if (!keep) await server.stop();
  }

  for (const { host } of twillds) {
    title(`twill status on ${host.name}: what runs where, and which way the packets took`);
    show((await host.exec(["bin/twill", "status", "--pin-path", host.pinPath], { cwd: repository })).stdout);
  }

  const map = join(h1.pinPath, "subnets4");
  title(`bpftool map dump pinned ${map}`);
  show((await h1.exec(["bpftool", "map", "dump", "pinned", map])).stdout);

  if (keep) await stay(h1, a, b);
}

/** The bridge and two pods, with the values a container engine would take from subnet.env. */
async function makePods({ host, subnetEnv }: Twilld): Promise<Pod[]> {
  const { FLANNEL_SUBNET: subnet, FLANNEL_MTU: mtu } = subnetEnv;
  if (subnet === undefined || mtu === undefined) throw new Error(`subnet.env of ${host.name} is incomplete`);
  const [gateway = "", length] = subnet.split("/");
  await host.bridge("docker0", subnet, { mtu: Number(mtu) });
  const address = (last: number) => `${gateway.replace(/\d+$/, String(last))}/${length}`;
  const pods = [];
  for (const last of [2, 3]) pods.push(await host.pod(`pod${last - 1}`, address(last), { mtu: Number(mtu) }));
  return pods;
}

/** Says how to look around, and keeps the hosts until test/sweep ends this process. */
function stay(host: Host, a: Pod, b: Pod): Promise<never> {
  title("left running; to look around");
  show(`enter a pod:    nsenter --net=${a.path} bash`);
  show(`                ping ${b.address}; curl http://${b.address}/`);
  show(`enter a host:   nsenter --net=${host.path} bash`);
  show(`watch packets:  nsenter --net=${host.path} tcpdump -ni eth0 udp port 8472`);
  show(
    `its state:      nsenter --net=${host.path} ${repository}/bin/twill status --pin-path ${host.pinPath}`,
  );
  show(`peers:          bpftool map dump pinned ${join(host.pinPath, "subnets4")}`);
  process.stdout.write("\nTo end it: make demo-end\n");
  const forever = setInterval(() => undefined, 2 ** 30);
  return new Promise(() => forever);
}

const lab = await createLab({ id: "demo" });
try {
  await main(lab);
  title("removing everything");
  await lab.close();
  title("done");
} catch (error) {
  process.stderr.write(`demo: ${error instanceof Error ? error.message : error}\n`);
  process.exitCode = 1;
  await lab.close();
}
