/** From pod to pod of another host, and from host to host as the limit. */
import { dirname } from "node:path";
import type { Host } from "../test/lab.ts";
import { startUdpPeer } from "../test/udppeer.ts";
import { addForwardRules, pairHostGw, pairVxlan } from "./baseline.ts";
import {
  hostToHost,
  limit,
  network,
  type Path,
  type Row,
  type Suite,
  startTwillds,
  subnets,
} from "./suite.ts";
import { connections, load, roundTrips, udpCost, udpPackets, udpPolled } from "./workloads.ts";

const rows: readonly Row[] = [
  {
    name: "kernel vxlan (as flanneld)",
    against: [],
    async build(_, hosts) {
      await pairVxlan(nodes(hosts));
      for (const host of hosts) await addForwardRules(host, network);
      return pods(hosts, 1450);
    },
  },
  {
    name: "Twill vxlan",
    against: ["kernel vxlan (as flanneld)", limit],
    build: twill({ Type: "vxlan" }, 1450),
  },
  {
    name: "kernel host-gw (as flanneld)",
    against: [],
    async build(_, hosts) {
      await pairHostGw(nodes(hosts));
      for (const host of hosts) await addForwardRules(host, network);
      return pods(hosts, 1500);
    },
  },
  {
    name: "Twill host-gw",
    against: ["kernel host-gw (as flanneld)", limit],
    build: twill({ Type: "host-gw" }, 1500),
  },
  {
    name: "Twill ipip",
    against: ["Twill vxlan"],
    build: twill({ Type: "ipip" }, 1480),
  },
  {
    name: "udp by a process (as flanneld)",
    against: [],
    async build(_, hosts) {
      for (const [index, host] of hosts.entries()) {
        const [subnet, other] = index === 0 ? subnets : [subnets[1], subnets[0]];
        const peers = { [other]: hosts[1 - index]?.address ?? "" };
        await startUdpPeer(host, { subnet, network, peers, directory: dirname(load) });
        await addForwardRules(host, network);
      }
      return pods(hosts, 1472);
    },
  },
  {
    name: "Twill udp",
    against: ["Twill vxlan", "udp by a process (as flanneld)"],
    build: twill({ Type: "udp" }, 1472),
  },
  hostToHost(),
];

export const forwarding: Suite = {
  name: "forwarding",
  rows,
  workloads: [udpPackets, udpPolled, udpCost, roundTrips, connections],
  kernel:
    "iproute2 and iptables as flanneld sets them up, with its default FORWARD rules; bridge netfilter as the kernel has it",
};

function nodes(hosts: [Host, Host]): [Host, string][] {
  return [
    [hosts[0], subnets[0]],
    [hosts[1], subnets[1]],
  ];
}

/** A bridge and a pod on each host, as Docker makes them from subnet.env. */
async function pods([a, b]: [Host, Host], mtu: number): Promise<Path> {
  await a.bridge("docker0", "172.7.21.1/24", { mtu });
  await b.bridge("docker0", "172.7.22.1/24", { mtu });
  const from = await a.pod("a", "172.7.21.2/24", { mtu });
  const to = await b.pod("a", "172.7.22.2/24", { mtu });
  return { from, to, address: to.address };
}

function twill(backend: object, mtu: number): Row["build"] {
  return async (lab, hosts) => {
    await startTwillds(lab, nodes(hosts), backend);
    return pods(hosts, mtu);
  };
}
