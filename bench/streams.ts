/**
 * TCP streams between pods, and from a pod to the outside, over a cable on which segments keep their order (`cable.ts`):
 * on a bare veth pair all rows are held up by segments that overtake each other, and TCP that takes them for lost.
 */
import { forwarding } from "./forwarding.ts";
import { masquerade } from "./masquerade.ts";
import { limit, type Row, type Suite } from "./suite.ts";
import { tcpStream } from "./workloads.ts";

/** Masquerade with few connections, with and without a kube-proxy's rules. Its host to host is forwarding's. */
const masqueraded = masquerade.rows
  .filter(({ name }) => /\(10 live\b/.test(name))
  .map((row) => ({
    ...row,
    against: row.name.startsWith("Twill")
      ? [...row.against.filter((name) => name.startsWith("flannel's")), limit]
      : [],
  }));

const rows: readonly Row[] = [...forwarding.rows, ...masqueraded];

export const streams: Suite = {
  name: "streams",
  rows,
  workloads: [tcpStream],
  kernel: `${forwarding.kernel}; flanneld's masquerade rules as iptables or as nftables`,
  card: true,
};

const OFFLOADS = ["tx", "rx", "tso", "gso", "gro"];

/** The same with nothing left to the uplinks: the stack cuts aggregates and adds checksums itself, as without a good card. */
export const offloads: Suite = {
  ...streams,
  name: "offloads",
  rows: rows.map((row) => ({
    ...row,
    async build(lab, hosts) {
      const path = await row.build(lab, hosts);
      const off = OFFLOADS.flatMap((name) => [name, "off"]);
      for (const host of hosts) await host.exec(["ethtool", "-K", "eth0", ...off]);
      return path;
    },
  })),
  offloads: "all offloads of the veth off",
};
