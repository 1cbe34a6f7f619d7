/**
 * Whether it matters how many subnets a cluster has: the same packets from pod to pod with one peer and with 50,000, alone
 * and beside connections of other pods.
 */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { type Host, type Lab, repository } from "../test/lab.ts";
import { startTwilld, type Twilld } from "../test/twilld.ts";
import type { Path, Row, Suite } from "./suite.ts";
import { besideConnections, udpPackets } from "./workloads.ts";

const MANY = 50_000;
/** The first octet of the network; those of the nodes are others. */
const OCTET = 11;
const subnets = [`${OCTET}.0.1.0/24`, `${OCTET}.0.2.0/24`] as const;
/** The leases of imaginary nodes begin here, see `leases.ts`. */
const FIRST = 256;
const PATIENCE = 240_000;

async function build(lab: Lab, hosts: [Host, Host], others: number): Promise<Path> {
  const etcd = await lab.etcdOn(hosts[0]);
  await etcd.put(
    "/coreos.com/network/config",
    JSON.stringify({ Network: `${OCTET}.0.0.0/8`, SubnetLen: 24, Backend: { Type: "vxlan" } }),
  );
  const [endpoint = ""] = etcd.endpoints;
  const fill = ["fill", endpoint, `${FIRST}`, `${FIRST + others}`, `${OCTET}`];
  if (others > 0)
    await hosts[0].exec(["node", join(repository, "dist/bench/leases.js"), ...fill], { timeout: PATIENCE });
  const twillds: Twilld[] = [];
  for (const [index, host] of hosts.entries()) {
    // Where the imaginary nodes would be.
    await host.ip("route add 192.168.0.0/16 dev eth0");
    // The previous subnet is asked for again, so the addresses are known.
    const gateway = (subnets[index] ?? "").replace(".0/", ".1/");
    const before = `FLANNEL_NETWORK=${OCTET}.0.0.0/8\nFLANNEL_SUBNET=${gateway}\n`;
    writeFileSync(join(host.directory, "subnet.env"), before);
    const twilld = await startTwilld(host, { etcd, timeout: 0 });
    await twilld.says(/ready: pods are forwarded/, { timeout: PATIENCE });
    twillds.push(twilld);
    await host.bridge("docker0", gateway, { mtu: 1450 });
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
