/**
 * Whether it matters how many subnets a cluster has: the same packets from pod to pod with one peer and with 50,000, alone
 * and beside connections of other pods.
 */
import type { Host, Lab } from "../test/lab.ts";
import { startTwilld, type Twilld } from "../test/twilld.ts";
import { fillLeases, hadBefore, type Path, type Row, type Suite } from "./suite.ts";
import { besideConnections, udpPackets } from "./workloads.ts";

const MANY = 50_000;
/** The first octet of the network; those of the nodes are others. */
const OCTET = 11;
const NETWORK = `${OCTET}.0.0.0/8`;
const subnets = [`${OCTET}.0.1.0/24`, `${OCTET}.0.2.0/24`] as const;
const PATIENCE = 240_000;

async function build(lab: Lab, hosts: [Host, Host], others: number): Promise<Path> {
  const etcd = await lab.etcdOn(hosts[0]);
  await etcd.put(
    "/coreos.com/network/config",
    JSON.stringify({ Network: NETWORK, SubnetLen: 24, Backend: { Type: "vxlan" } }),
  );
  await fillLeases(hosts[0], etcd, others, OCTET);
  const twillds: Twilld[] = [];
  for (const [index, host] of hosts.entries()) {
    // Where the imaginary nodes would be.
    await host.ip("route add 192.168.0.0/16 dev eth0");
    const subnet = subnets[index] ?? "";
    hadBefore(host, NETWORK, subnet);
    const twilld = await startTwilld(host, { etcd, timeout: 0 });
    await twilld.says(/ready: pods are forwarded/, { timeout: PATIENCE });
    twillds.push(twilld);
    await host.bridge("docker0", subnet.replace(".0/", ".1/"), { mtu: 1450 });
  }
  const pod = (index: 0 | 1, last: number) =>
    hosts[index].pod(`p${last}`, subnets[index].replace(".0/", `.${last}/`), { mtu: 1450 });
  const [from, to] = [await pod(0, 2), await pod(1, 2)];
  const beside = { from: await pod(0, 3), to: await pod(1, 3) };
  return {
    from,
    to,
    address: to.address,
    beside: { ...beside, address: beside.to.address },
    check: async () => {
      for (const twilld of twillds)
        await twilld.statusWhere(`${others + 1} peers`, ({ peers }) => peers === others + 1);
      return undefined;
    },
  };
}

const few = "Twill vxlan, 2 subnets";
const rows: readonly Row[] = [
  { name: few, against: [], build: (lab, hosts) => build(lab, hosts, 0) },
  {
    name: `Twill vxlan, ${MANY.toLocaleString("en")} subnets`,
    against: [few],
    build: (lab, hosts) => build(lab, hosts, MANY),
  },
];

export const manySubnets: Suite = {
  name: "subnets",
  rows,
  workloads: [udpPackets, besideConnections],
  kernel: "none: both rows are Twill's",
};
