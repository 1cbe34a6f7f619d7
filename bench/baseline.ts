/**
 * A host set up with the kernel's own means exactly as flanneld does it: what Twill is compared with, and what its
 * wire format is tested against.
 *
 * flanneld makes its VXLAN device with the attributes below, gives it the subnet's address as a /32, and for
 * each peer sets a permanent neighbour (the peer's subnet address has the MAC of the peer's device), an FDB
 * entry (that MAC is at the peer's public address) and last the route, onlink via the peer's subnet address.
 * With host-gw there is only a route via the peer. Its rules, in the form they have since v0.21.3, let forwarded
 * traffic of the network pass; those for masquerade are only there with --ip-masq.
 */
import { randomBytes } from "node:crypto";
import type { Host } from "../test/lab.ts";

export interface VxlanOptions {
  /** The host's own subnet, with prefix length: `172.7.21.0/24`. */
  readonly subnet: string;
  /** Default 1. */
  readonly vni?: number;
  /** Default 8472. */
  readonly port?: number;
  /** Of the device: the uplink's less 50. Default 1450. */
  readonly mtu?: number;
  /** MAC of the device; default random. */
  readonly mac?: string;
}

export interface VxlanPeer {
  readonly subnet: string;
  readonly publicIp: string;
  readonly vtepMac: string;
}

/** Makes `flannel.<VNI>`; returns its name and MAC. */
export async function addVxlan(host: Host, options: VxlanOptions): Promise<{ device: string; mac: string }> {
  const { vni = 1, port = 8472, mtu = 1450, mac = randomMac() } = options;
  const device = `flannel.${vni}`;
  await host.ipBatch([
    `link add ${device} address ${mac} mtu ${mtu} txqueuelen 0 type vxlan id ${vni} dev eth0 local ${host.address} dstport ${port} nolearning`,
    `address add ${base(options.subnet)}/32 dev ${device}`,
    `link set ${device} up`,
  ]);
  await host.exec(["sh", "-c", `echo 0 > /proc/sys/net/ipv6/conf/${device}/accept_ra`]);
  return { device, mac };
}

/** Adds what flanneld adds for a peer's lease. */
export async function addVxlanPeer(host: Host, peer: VxlanPeer, vni = 1): Promise<void> {
  const device = `flannel.${vni}`;
  const gateway = base(peer.subnet);
  await host.ip(`neigh replace ${gateway} lladdr ${peer.vtepMac} dev ${device} nud permanent`);
  await host.exec([
    "bridge",
    "fdb",
    "replace",
    peer.vtepMac,
    "dev",
    device,
    "dst",
    peer.publicIp,
    "self",
    "permanent",
  ]);
  await host.ip(`route replace ${peer.subnet} via ${gateway} dev ${device} onlink`);
}

/** Takes away what `addVxlanPeer` added. */
export async function removeVxlanPeer(host: Host, peer: VxlanPeer, vni = 1): Promise<void> {
  const device = `flannel.${vni}`;
  await host.ip(`neigh del ${base(peer.subnet)} dev ${device}`);
  await host.exec(["bridge", "fdb", "del", peer.vtepMac, "dev", device, "dst", peer.publicIp]);
  await host.ip(`route del ${peer.subnet}`);
}

/** Adds the route of a host-gw peer, or of a vxlan peer that is routed directly. */
export async function addRoutePeer(host: Host, peer: { subnet: string; publicIp: string }): Promise<void> {
  await host.ip(`route add ${peer.subnet} via ${peer.publicIp} dev eth0`);
}

/** The rules of --iptables-forward-rules, which is on by default. */
export async function addForwardRules(host: Host, network: string): Promise<void> {
  const comment = `-m comment --comment "flanneld forward"`;
  await restore(host, [
    "*filter",
    ":FLANNEL-FWD - [0:0]",
    `-A FORWARD ${comment} -j FLANNEL-FWD`,
    `-A FLANNEL-FWD -s ${network} ${comment} -j ACCEPT`,
    `-A FLANNEL-FWD -d ${network} ${comment} -j ACCEPT`,
    "COMMIT",
  ]);
}

/** The rules of --ip-masq, which is off by default. */
export async function addMasqueradeRules(host: Host, network: string, subnet: string): Promise<void> {
  const comment = `-m comment --comment "flanneld masq"`;
  await restore(host, [
    "*nat",
    ":FLANNEL-POSTRTG - [0:0]",
    `-A POSTROUTING ${comment} -j FLANNEL-POSTRTG`,
    `-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 ${comment} -j RETURN`,
    `-A FLANNEL-POSTRTG -s ${subnet} -d ${network} ${comment} -j RETURN`,
    `-A FLANNEL-POSTRTG -s ${network} -d ${subnet} ${comment} -j RETURN`,
    `-A FLANNEL-POSTRTG ! -s ${network} -d ${subnet} ${comment} -j RETURN`,
    `-A FLANNEL-POSTRTG -s ${network} ! -d 224.0.0.0/4 ${comment} -j MASQUERADE --random-fully`,
    `-A FLANNEL-POSTRTG ! -s ${network} -d ${network} ${comment} -j MASQUERADE --random-fully`,
    "COMMIT",
  ]);
}

/** Both kinds of rules in the form of EnableNFTables. */
export async function addNftRules(host: Host, network: string, subnet: string): Promise<void> {
  const rules = [
    "table ip flannel-ipv4 {",
    "chain postrtg {",
    "type nat hook postrouting priority srcnat; policy accept;",
    "meta mark 0x00004000 return",
    `ip saddr ${subnet} ip daddr ${network} return`,
    `ip saddr ${network} ip daddr ${subnet} return`,
    `ip saddr != ${subnet} ip daddr ${network} return`,
    `ip saddr ${network} ip daddr != 224.0.0.0/4 masquerade fully-random`,
    `ip saddr != ${network} ip daddr ${network} masquerade fully-random`,
    "}",
    "chain forward { type filter hook forward priority filter; policy accept;",
    `ip saddr ${network} accept`,
    `ip daddr ${network} accept`,
    "}",
    "}",
  ];
  await host.exec(["nft", "-f", "-"], { input: `${rules.join("\n")}\n` });
}

/** Both hosts of a two-node cluster, each the other's peer. */
export async function pairVxlan(
  hosts: readonly (readonly [Host, string])[],
  options: Partial<VxlanOptions> = {},
) {
  const nodes = [];
  for (const [host, subnet] of hosts)
    nodes.push({ host, subnet, ...(await addVxlan(host, { ...options, subnet })) });
  for (const node of nodes) {
    for (const { host, subnet, mac } of nodes) {
      if (host === node.host) continue;
      await addVxlanPeer(node.host, { subnet, publicIp: host.address, vtepMac: mac }, options.vni);
    }
  }
  return nodes;
}

/** The same by plain routes. */
export async function pairHostGw(hosts: readonly (readonly [Host, string])[]): Promise<void> {
  for (const [host] of hosts) {
    for (const [peer, subnet] of hosts)
      if (peer !== host) await addRoutePeer(host, { subnet, publicIp: peer.address });
  }
}

function restore(host: Host, rules: readonly string[]) {
  return host.exec(["iptables-restore", "--noflush", "--wait"], { input: `${rules.join("\n")}\n` });
}

/** Random, local, unicast, as flanneld chooses it. */
function randomMac(): string {
  const bytes = randomBytes(6);
  bytes.writeUInt8(((bytes.readUInt8(0) & 0xfe) | 0x02) & 0xff, 0);
  return bytes.toString("hex").replace(/..(?!$)/g, "$&:");
}

function base(subnet: string): string {
  return subnet.replace(/\/.*/, "");
}
