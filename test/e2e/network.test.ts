/**
 * The network's `Network` is changed in etcd while two hosts forward: each takes a subnet of the new one, writes it to
 * subnet.env, and leaves nothing of the former behind; back again, each has the subnet that it had.
 */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { createLab, type Etcd, type Host, type Lab, type Pod, until } from "../lab.ts";
import { startTwilld, type Twilld, twill } from "../twilld.ts";
import { probe, serve, TCP_PORT } from "./cluster.ts";

const PREFIX = "/coreos.com/network";
const NETWORK = "172.7.0.0/16";
const OTHER = "10.61.0.0/16";
const SUBNETS = ["172.7.21.0/24", "172.7.22.0/24"];

describe.each(["vxlan", "host-gw", "udp"])("%s", (type) => {
  let lab: Lab;
  let etcd: Etcd;
  let hosts: Host[];
  let twillds: Twilld[];
  let pods: Pod[];

  const configure = (network: string) =>
    etcd.put(`${PREFIX}/config`, JSON.stringify({ Network: network, Backend: { Type: type } }));

  /** The hosts' subnets, once both have one of this network and nothing but each other. */
  async function subnetsOf(network: string): Promise<string[]> {
    const start = network.replace("0.0/16", "");
    const all = twillds.map((twilld) =>
      twilld.statusWhere(
        `a subnet of ${network}, and the peer's`,
        ({ ready, subnet, peers, failures, rejections, ignored }) =>
          ready &&
          subnet?.startsWith(start) === true &&
          peers === 1 &&
          [...failures, ...rejections, ...ignored].length === 0,
      ),
    );
    return (await Promise.all(all)).map(({ subnet }) => subnet ?? "");
  }

  /** What is there of the two subnets is all that is there, in the end: in etcd, in subnet.env, in the kernel and in the maps. */
  async function isAllOf(network: string, subnets: readonly string[]): Promise<void> {
    const keys = (await etcd.ctl("get", "--keys-only", "--prefix", `${PREFIX}/subnets/`)).split("\n");
    expect(keys.filter((key) => key !== "").sort()).toEqual(
      subnets.map((subnet) => `${PREFIX}/subnets/${subnet.replace("/", "-")}`).sort(),
    );
    for (const [index, host] of hosts.entries()) {
      const [own = "", peer = ""] = index === 0 ? subnets : [...subnets].reverse();
      // The file comes last; what is told of the lease, with the lease.
      const isWritten = () => twillds[index]?.subnetEnv.FLANNEL_NETWORK === network;
      await until(`subnet.env of ${host.name} to be of ${network}`, isWritten);
      expect(twillds[index]?.subnetEnv).toMatchObject({
        FLANNEL_NETWORK: network,
        FLANNEL_SUBNET: own.replace(".0/", ".1/"),
      });
      const routes = (await host.ip("route show proto 84")).trim().split("\n");
      expect(routes.map((route) => route.split(" ")[0])).toEqual([type === "udp" ? network : peer]);
      if (type !== "host-gw") {
        const device = type === "udp" ? "flannel0" : "flannel.1";
        const addresses = await host.ip(`-o -4 address show dev ${device}`);
        expect([...addresses.matchAll(/ inet (\S+)/g)].map(([, address]) => address)).toEqual([
          own.replace("/24", "/32"),
        ]);
        const neighbours = (await host.ip(`neigh show dev ${device} nud permanent`)).trim();
        expect(neighbours.split(" ")[0]).toBe(type === "udp" ? "" : peer.replace("/24", ""));
      }
      const listed = await twill(host, "peers", "--json", `--pin-path=${host.pinPath}`);
      expect(JSON.parse(listed)).toMatchObject({ peers: [{ subnet: peer }] });
    }
  }

  /** Pods in the subnets, as Docker would start them with subnet.env. */
  async function populate(name: string): Promise<Pod[]> {
    const made: Pod[] = [];
    for (const [index, host] of hosts.entries()) {
      const gateway = twillds[index]?.subnetEnv.FLANNEL_SUBNET ?? "";
      const bridge = await host.bridge(`br${name}`, gateway, { mtu: 1400 });
      const pod = await host.pod(name, gateway.replace(".1/", ".2/"), { bridge, mtu: 1400 });
      await serve(pod);
      made.push(pod);
    }
    return made;
  }

  async function talk([a, b]: readonly Pod[]): Promise<void> {
    if (a === undefined || b === undefined) return expect.fail();
    expect((await a.ping(b.address, { count: 3 })).lost).toEqual([]);
    const found = await probe(b, `tcp ${a.address} ${TCP_PORT} 1000000 1000000`);
    expect(found).toEqual({ intact: true, seen: b.address, peer: a.address });
  }

  beforeAll(async () => {
    lab = await createLab({ rpFilter: 1 });
    etcd = await lab.etcd({ addresses: ["10.4.7.11/24"] });
    await configure(NETWORK);
    hosts = [];
    for (const number of [21, 22]) {
      const host = await lab.host(`h${number - 20}`, { address: `10.4.7.${number}/24` });
      writeFileSync(join(host.directory, "subnet.env"), `FLANNEL_SUBNET=172.7.${number}.1/24\n`);
      hosts.push(host);
    }
    twillds = await Promise.all(hosts.map((host) => startTwilld(host, { etcd })));
    expect(await subnetsOf(NETWORK)).toEqual(SUBNETS);
    pods = await populate("a");
    await talk(pods);
  });
  afterAll(() => lab?.close());

  test("another network: subnets of it, and nothing is left of the one before", async () => {
    await configure(OTHER);
    const subnets = await subnetsOf(OTHER);
    await isAllOf(OTHER, subnets);
    await talk(await populate("b"));
  });

  test("the first again: each host has the subnet that it had, in which its pods still are", async () => {
    await configure(NETWORK);
    expect(await subnetsOf(NETWORK)).toEqual(SUBNETS);
    await isAllOf(NETWORK, SUBNETS);
    await talk(pods);
  });
});
