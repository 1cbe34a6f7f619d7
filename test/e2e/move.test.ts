/**
 * A live cluster of three nodes moves from one backend to another, with pods that talk all the while: node by node, as
 * docs/backends.md says, and all at once. What is lost on the way is counted.
 */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import { createLab, type Etcd, type Host, type Lab, type Ping, type Pod, until } from "../lab.ts";
import { spawnTwilld, type Twilld, twilldFlags } from "../twilld.ts";
import { probe, serve, TCP_PORT } from "./cluster.ts";

const CONFIG = "/coreos.com/network/config";
const NUMBERS = [21, 22, 23] as const;
const MTU = 1450;
type Type = "udp" | "vxlan" | "host-gw" | "ipip";
const STEPS: readonly Type[] = ["vxlan", "host-gw", "vxlan", "udp", "ipip"];
/**
 * Packets of a hundred a second that a pair of pods may lose while a node moves, on a machine that others use as well.
 * With vxlan the kernel opens what comes before the programs are there. With ipip and udp only they do: what a node that
 * has moved sends to one that has said so and is loading them is lost.
 */
const NODE_LOSS: Readonly<Record<Type, number>> = { vxlan: 20, "host-gw": 20, ipip: 400, udp: 400 };
/** And while all move at once: as long as one node takes longer than the other to have its programs loaded. */
const ALL_LOSS = 500;

interface Node {
  readonly host: Host;
  readonly pod: Pod;
  twilld: Twilld;
}

let lab: Lab;
let etcd: Etcd;
let nodes: Node[];

const configure = (type: Type) =>
  etcd.put(CONFIG, JSON.stringify({ Network: "172.7.0.0/16", Backend: { Type: type } }));
const start = (host: Host, more: readonly string[] = []): Twilld =>
  spawnTwilld(host, [...twilldFlags(host, etcd), ...more]);

/** Waits until a node has this backend and knows both others. */
const settled = (node: Node, type: Type, strangers = 0) =>
  node.twilld.statusWhere(
    `${type}, and its peers`,
    (status) =>
      status.ready &&
      status.network?.backend.type === type &&
      status.peers === 2 &&
      status.ignored.length === strangers &&
      status.failures.length === 0,
    60_000,
  );

/** A ping between each two pods, both ways. */
async function talk(): Promise<Ping[]> {
  const pings: Promise<Ping>[] = [];
  for (const from of nodes)
    for (const to of nodes) if (from !== to) pings.push(from.pod.startPing(to.pod.address));
  return Promise.all(pings);
}

/** Ends them; how many each has lost. */
async function lossOf(pings: readonly Ping[]): Promise<number[]> {
  for (const ping of pings) await ping.replies(10);
  return Promise.all(pings.map(async (ping) => (await ping.stop()).lost.length));
}

beforeAll(async () => {
  lab = await createLab();
  etcd = await lab.etcd({ addresses: ["10.4.7.11/24"] });
  await configure("udp");
  nodes = [];
  for (const number of NUMBERS) {
    const host = await lab.host(`h${number - 20}`, { address: `10.4.7.${number}/24` });
    writeFileSync(join(host.directory, "subnet.env"), `FLANNEL_SUBNET=172.7.${number}.1/24\n`);
    await host.bridge("docker0", `172.7.${number}.1/24`, { mtu: MTU });
    const pod = await host.pod("a", `172.7.${number}.2/24`, { mtu: MTU });
    await serve(pod);
    nodes.push({ host, pod, twilld: start(host, ["--follow-config=false"]) });
  }
  for (const node of nodes) await settled(node, "udp");
  for (const from of nodes)
    for (const to of nodes)
      if (from !== to)
        await until(`${from.pod.name} to reach ${to.pod.name}`, async () => {
          return (await from.pod.ping(to.pod.address, { count: 1 })).received === 1;
        });
});
afterAll(() => lab?.close());

test.each(STEPS)("node by node to %s: every pod reaches every other all the while", async (type) => {
  await configure(type);
  for (const [index, node] of nodes.entries()) {
    const pings = await talk();
    for (const ping of pings) await ping.replies(5);
    await node.twilld.stop();
    node.twilld = start(node.host, ["--follow-config=false"]);
    await settled(node, type, NUMBERS.length - 1 - index);
    const losses = await lossOf(pings);
    console.log(`to ${type}, node ${index + 1}: lost of each pair ${losses.join(", ")}`);
    for (const lost of losses) expect(lost).toBeLessThan(NODE_LOSS[type]);
    // A moved node with one that has not moved yet, and with one that has.
    for (const other of nodes) {
      if (other === node) continue;
      const command = `tcp ${other.pod.address} ${TCP_PORT} 300000 300000`;
      expect(await probe(node.pod, command)).toEqual({
        intact: true,
        seen: node.pod.address,
        peer: other.pod.address,
      });
    }
  }
  for (const node of nodes) await settled(node, type);
});

test.each(["host-gw", "vxlan"] as const)("all at once to %s, without a restart", async (type) => {
  for (const node of nodes) {
    await node.twilld.stop();
    node.twilld = start(node.host);
  }
  for (const { twilld } of nodes)
    await twilld.statusWhere("ready", ({ ready, peers }) => ready && peers === 2);
  const pings = await talk();
  for (const ping of pings) await ping.replies(5);
  await configure(type);
  for (const node of nodes) await settled(node, type);
  const losses = await lossOf(pings);
  console.log(`all at once to ${type}: lost of each pair ${losses.join(", ")}`);
  for (const lost of losses) expect(lost).toBeLessThan(ALL_LOSS);
});
