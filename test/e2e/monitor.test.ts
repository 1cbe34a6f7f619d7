/**
 * `twill monitor` on two hosts: what is dropped, put on the slow path, and what comes and goes, while it happens; also
 * with the daemon dead. Lines are compared with what was sent.
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import { frame, ip4, vxlan4 } from "../bpf/packets.ts";
import { exec, type Process, repository, until } from "../lab.ts";
import { type Cluster, createCluster, inject, probe } from "./cluster.ts";

let cluster: Cluster;
beforeAll(async () => {
  cluster = await createCluster();
});
afterAll(() => cluster?.close());

const program = join(repository, "bin/twill");
type Line = Readonly<Record<string, unknown>> & { readonly event: string };

async function monitor(...flags: string[]): Promise<Process> {
  const { h1 } = cluster;
  const running = h1.spawn([program, "monitor", `--pin-path=${h1.pinPath}`, ...flags], { cwd: h1.directory });
  await running.line(/^watching /);
  return running;
}
const lines = (running: Process): Line[] =>
  running
    .text("stdout")
    .split("\n")
    .slice(0, -1)
    .map((text) => JSON.parse(text) as Line);
const line = (running: Process, what: string, accept: (line: Line) => boolean): Promise<Line> =>
  until(what, () => lines(running).find(accept), { wake: (ring) => running.onOutput(ring) });

/** A tunnel packet from h2 whose inner source is no pod of h2. */
async function forged(port: number): Promise<Buffer> {
  const { h1, h2, a } = cluster;
  const inner = ip4({ source: "172.7.99.1", destination: a.address, body: { udp: [port, 53] } });
  const [to, from] = [await h1.mac("flannel.1"), await h2.mac("flannel.1")];
  const outer = vxlan4({ source: h2.address, destination: h1.address, frame: frame(to, from, inner) });
  return frame(await h1.mac(), await h2.mac(), outer);
}

test("shows drops, flows on the slow path, peers, programs and the node, and writes them for tshark", async () => {
  const { h1, h2, a, etcd } = cluster;
  const file = join(h1.directory, "events.pcapng");
  const running = await monitor("--json", `--pcap=${file}`);

  const other = await h1.exec([program, "monitor", `--pin-path=${h1.pinPath}`], { check: false });
  expect(other).toMatchObject({ code: 1, stdout: "" });
  expect(other.stderr).toMatch(/^twill: twill monitor runs already on .*\(process \d+\).*\n$/);

  const packet = await forged(4711);
  await inject(h2, "eth0", [packet]);
  expect(await line(running, "the forged packet", ({ verdict }) => verdict === "drop_forged")).toMatchObject({
    event: "drop",
    hook: "from_net",
    interface: "eth0",
    length: packet.length,
    packet: { source: h2.address, destination: h1.address, protocol: "udp", destinationPort: 8472 },
    inner: {
      source: "172.7.99.1",
      destination: a.address,
      protocol: "udp",
      sourcePort: 4711,
      destinationPort: 53,
    },
  });

  await probe(a, `udp ${h2.address} 8472 100 --retry`, { timeout: 60_000 }).catch(() => undefined);
  expect(
    await line(running, "the pod's packet", ({ verdict }) => verdict === "drop_pod_tunnel"),
  ).toMatchObject({
    hook: "from_pod",
    interface: a.port,
    packet: { source: a.address, destination: h2.address, destinationPort: 8472 },
  });

  const rule = ["PREROUTING", "-d", "10.96.0.1", "-p", "tcp", "--dport", "80"];
  await h1.exec([
    "iptables",
    "-t",
    "nat",
    "-A",
    ...rule,
    "-j",
    "DNAT",
    "--to-destination",
    "172.7.22.2:7000",
  ]);
  expect(await probe(a, "tcp 10.96.0.1 80 1000 1000")).toMatchObject({ intact: true });
  expect(await line(running, "the service's flow", ({ event }) => event === "flow")).toMatchObject({
    hook: "to_overlay",
    verdict: "stack_flow",
    packet: { source: a.address, destination: "172.7.22.2", protocol: "tcp", destinationPort: 7000 },
  });

  const key = "/coreos.com/network/subnets/172.7.99.0-24";
  const data = `{"VNI":1,"VtepMAC":"02:07:99:00:00:01"}`;
  await etcd.put(key, `{"PublicIP":"10.4.7.99","BackendType":"vxlan","BackendData":${data}}`);
  const lease = (change: string) => (each: Line) => each.event === "lease" && each.change === change;
  expect(await line(running, "the new peer", lease("added"))).toMatchObject({
    subnet: "172.7.99.0/24",
    publicIp: "10.4.7.99",
    reach: "tunnel",
  });
  await etcd.ctl("del", key);
  await line(running, "the peer to go", lease("removed"));

  const pod = await h1.pod("d", "172.7.21.4/24", { mtu: 1450 });
  const attached = await line(running, "its program", ({ event }) => event === "attachment");
  expect(attached).toMatchObject({ change: "added", hook: "from_pod", interface: pod.port });

  await cluster.twilld(h1).stop("SIGKILL");
  await line(running, "the end of the daemon", ({ event, running }) => event === "node" && running === false);
  await inject(h2, "eth0", [await forged(4712)]);
  const ofDead = ({ inner }: Line) => (inner as { sourcePort?: number } | null)?.sourcePort === 4712;
  await line(running, "a drop without a daemon", ofDead);

  // More than may be reported: each one is told of or counted.
  const before = lines(running).filter(({ verdict }) => verdict === "drop_forged").length;
  const flood = new Array<Buffer>(4000).fill(await forged(4713));
  await inject(h2, "eth0", flood);
  await until("all to be accounted for", () => {
    const all = lines(running);
    const missed = all.filter(({ event }) => event === "missed");
    const told = all.filter(({ verdict }) => verdict === "drop_forged").length - before;
    return (
      told + missed.reduce((sum, each) => sum + Number(each.suppressed) + Number(each.lost), 0) ===
      flood.length
    );
  });

  expect(await running.stop("SIGINT")).toMatchObject({ code: 0 });
  const packets = lines(running).filter(({ event }) => event === "drop" || event === "flow");
  const columns = ["frame.interface_name", "frame.comment", "ip.src", "frame.len"].flatMap((name) => [
    "-e",
    name,
  ]);
  const { stdout } = await exec([
    "tshark",
    "-n",
    "-r",
    file,
    "-d",
    "udp.port==8472,vxlan",
    "-T",
    "fields",
    ...columns,
  ]);
  expect(stdout.trimEnd().split("\n")).toEqual(
    packets.map(({ interface: name, hook, verdict, length, packet, inner }) => {
      const sources = [packet, inner].map((each) => (each as { source: string } | null)?.source);
      return [name, `${hook} ${verdict}`, sources.filter(Boolean).join(","), length].join("\t");
    }),
  );
  expect(readFileSync(file).length).toBeGreaterThan(1000);
});

test("shows what its filters let through, and ends after --count", async () => {
  const { h2 } = cluster;
  const running = await monitor(
    "--verdict=drop_forged",
    "--address=172.7.99.0/24",
    "--port=4721",
    "--count=1",
  );
  await inject(h2, "eth0", [await forged(4720), await forged(4721)]);
  expect(await running.exited).toMatchObject({ code: 0 });
  expect(running.text("stdout")).toMatch(
    /^[\d:.]+ drop_forged +from_net +eth0 +udp 10\.4\.7\.22:40000 > 10\.4\.7\.21:8472, \d+ bytes; in it udp 172\.7\.99\.1:4721 > 172\.7\.21\.2:53, \d+ bytes\n$/,
  );
});

test("refuses in one line", async () => {
  const { h1 } = cluster;
  const run = (...argv: string[]) => h1.exec(argv, { check: false });
  const nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
  for (const argv of [
    [...nobody, program, "monitor", `--pin-path=${h1.pinPath}`],
    [program, "monitor", "--pin-path=/sys/fs/bpf/none"],
    [program, "monitor", `--pin-path=${h1.pinPath}`, `--pcap=${h1.directory}/none/file`],
  ]) {
    const { code, stdout, stderr } = await run(...argv);
    expect({ code, stdout, stderr }).toEqual({
      code: 1,
      stdout: "",
      stderr: expect.stringMatching(/^twill: [^\n]+\n$/),
    });
  }
  for (const flag of [
    "--verdict=nonsense",
    "--address=1.2.3",
    "--port=65536",
    "--hook=eth0",
    "--count=0",
    "--nonsense",
  ])
    expect(await run(program, "monitor", flag)).toMatchObject({ code: 2, stdout: "" });
});
