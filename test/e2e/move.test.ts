/**
 * A live cluster of three nodes moves from one backend to another, with pods that talk all the while: node by node, as
 * docs/backends.md says, and all at once; and then without a tunnel on its own network and back. No packet is lost,
 * though every kernel takes packets only from the side to which it would send (rp_filter=1).
 */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import { createLab, type Etcd, type Host, type Lab, type Ping, type Pod, until } from "../lab.ts";
import { spawnTwilld, type Twilld, twill, twilldFlags } from "../twilld.ts";
import { probe, serve, TCP_PORT } from "./cluster.ts";

const CONFIG = "/coreos.com/network/config";
const NUMBERS = [21, 22, 23] as const;
const MTU = 1450;
type Type = "udp" | "vxlan" | "host-gw" | "ipip";
const STEPS: readonly Type[] = ["vxlan", "host-gw", "vxlan", "udp", "ipip"];

interface Node {
  readonly host: Host;
  readonly pod: Pod;
  twilld: Twilld;
}

let lab: Lab;
let etcd: Etcd;
let nodes: Node[];

const configure = (type: Type, more = {}) =>
  etcd.put(CONFIG, JSON.stringify({ Network: "172.7.0.0/16", Backend: { Type: type, ...more } }));
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

/** Waits until these nodes reach each other by the tunnel, or, with `plain`, without one. */
async function reached(moved: readonly Node[], plain: boolean): Promise<void> {
  const way = plain ? "direct" : "tunnel";
  for (const { host } of moved) {
    const others = moved.filter((node) => node.host !== host).map(({ pod }) => subnetOf(pod));
    // All in one question: it takes seconds beside so many pings.
    await until(`${host.name} to reach ${others.join(" and ")} by ${way}`, async () => {
      const answer = await twill(host, "peers", "--json", `--pin-path=${host.pinPath}`);
      const { peers } = JSON.parse(answer) as { peers: { subnet: string; reach: string }[] };
      return others.every((other) => peers.some(({ subnet, reach }) => subnet === other && reach === way));
    });
  }
}

const subnetOf = (pod: Pod): string => pod.address.replace(/\d+$/, "0/24");

/** A ping between each two pods, both ways, a hundred to two hundred a second. */
async function talk(): Promise<Ping[]> {
  const pings: Promise<Ping>[] = [];
  for (const from of nodes)
    for (const to of nodes)
      if (from !== to) pings.push(from.pod.startPing(to.pod.address, { interval: 0.005 }));
  const all = await Promise.all(pings);
  for (const ping of all) await ping.replies(5);
  return all;
}

/** Ends them; what each has lost. */
async function lossOf(pings: readonly Ping[]): Promise<string[]> {
  for (const ping of pings) await ping.replies(20);
  const ended = await Promise.all(pings.map((ping) => ping.stop()));
  return ended.flatMap(({ lost, sent }, index) =>
    lost.length === 0
      ? []
      : [`pair ${index + 1}: ${lost.length} of ${sent} (${lost.slice(0, 20).join(" ")})`],
  );
}

beforeAll(async () => {
  lab = await createLab({ rpFilter: 1 });
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
    await node.twilld.stop();
    node.twilld = start(node.host, ["--follow-config=false"]);
    await settled(node, type, NUMBERS.length - 1 - index);
    await reached(nodes.slice(0, index + 1), type === "host-gw");
    expect(await lossOf(pings), `node ${index + 1}`).toEqual([]);
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

test.each(["host-gw", "vxlan", "udp", "ipip"] as const)(
  "all at once to %s, without a restart",
  async (type) => {
    for (const node of nodes) {
      await node.twilld.stop();
      node.twilld = start(node.host);
    }
    for (const { twilld } of nodes)
      await twilld.statusWhere("ready", ({ ready, peers }) => ready && peers === 2);
    const pings = await talk();
    await configure(type);
    for (const node of nodes) await settled(node, type);
    await reached(nodes, type === "host-gw");
    expect(await lossOf(pings)).toEqual([]);
  },
  120_000,
);

test.each(["vxlan", "ipip"] as const)(
  "DirectRouting of %s on and off, again and again, without a restart",
  async (type) => {
    await configure(type);
    for (const node of nodes) await settled(node, type);
    await reached(nodes, false);
    const pings = await talk();
    for (const directRouting of [true, false, true, false]) {
      await configure(type, { DirectRouting: directRouting });
      await reached(nodes, directRouting);
    }
    expect(await lossOf(pings)).toEqual([]);
  },
  120_000,
);
