/**
 * From leases and facts to the exact rows of every table: what each peer, each pod and the node itself put into
 * BPF maps, routes, neighbours and FDB. Pure and canonical: equal input gives equal rows.
 *
 * For each peer the kernel's own entries are complete: detach every program and the routes here still forward.
 */
import { NO_MAC, rowsOfOther } from "./backend.ts";
import { kindOf } from "./backends.ts";
import type { Path } from "./host.ts";
import { contains, formatCidr, formatIpv4, type Ipv4, maskOf, type Prefix } from "./ipv4.ts";
import type { Masquerade, Timeouts } from "./masquerade.ts";
import type { Lease, Mac, Network } from "./model.ts";
import type { Pods } from "./pods.ts";

export type Reach = "REACH_TUNNEL" | "REACH_DIRECT" | "REACH_DEVICE";
export type FastPath = "FAST_PATH_OFF" | "FAST_PATH_AUTO" | "FAST_PATH_ALWAYS" | "FAST_PATH_STACK";

/** Row of the map `subnets4`: who holds a subnet and how to get there. */
export interface SubnetRow {
  readonly subnet: Ipv4;
  readonly prefixLength: number;
  readonly publicIp: Ipv4;
  readonly nextHop: Ipv4;
  readonly ifindex: number;
  readonly reach: Reach;
  readonly mtu: number;
  readonly vtepMac: Mac;
}

/** Row of the map `peers4`: an outer source address that may send to us. */
export interface PeerRow {
  readonly publicIp: Ipv4;
  readonly subnet: Ipv4;
  readonly prefixLength: number;
}

/** Row of the map `endpoints4`: a pod of this node. */
export interface EndpointRow {
  readonly address: Ipv4;
  readonly ifindex: number;
  readonly delivery: "DELIVERY_PEER" | "DELIVERY_EGRESS";
  readonly mac: Mac;
  readonly gatewayMac: Mac;
  readonly mtu: number;
}

/** Row of the map `interfaces`. */
export interface InterfaceRow {
  readonly ifindex: number;
  readonly gatewayMac: Mac;
  /** What comes in here has passed a port before. */
  readonly bridge: boolean;
}

/** A route of ours. */
export interface RouteRow {
  readonly destination: Ipv4;
  readonly prefixLength: number;
  readonly gateway: Ipv4 | undefined;
  readonly outIndex: number;
  readonly onlink: boolean;
  /** Bytes of the largest packet; undefined for that of the interface. */
  readonly mtu?: number | undefined;
}

/** A permanent neighbour on the tunnel device: the peer's device, by the address of its subnet. */
export interface NeighbourRow {
  readonly index: number;
  readonly address: Ipv4;
  readonly mac: Mac;
}

/** Where the tunnel device sends frames for a peer's MAC. */
export interface FdbRow {
  readonly index: number;
  readonly mac: Mac;
  readonly dst: Ipv4;
}

/** A program on an interface. */
export interface AttachmentRow {
  readonly ifindex: number;
  readonly hook: Hook;
}

export type Hook = "from_pod" | "to_pod" | "to_overlay" | "from_overlay" | "from_net" | "to_net";

/** Which way each hook's program faces. */
export const DIRECTIONS: Readonly<Record<Hook, "ingress" | "egress">> = {
  from_pod: "ingress",
  to_pod: "egress",
  to_overlay: "egress",
  from_overlay: "ingress",
  from_net: "ingress",
  to_net: "egress",
};

/** RTPROT of our routes, `proto 84` in `ip route`, by which they are told from all others. */
export const ROUTE_PROTOCOL = 84;

/** What is true of this node while it runs; a change of any of it makes every row anew. */
export interface Facts {
  readonly network: Network;
  readonly subnet: Prefix;
  /** Uplink: the interface that carries traffic between nodes. */
  readonly uplink: { readonly index: number; readonly mtu: number; readonly address: Ipv4 };
  /** The tunnel device; undefined for backends without one. */
  readonly overlay: { readonly index: number; readonly mac: Mac; readonly localIp: Ipv4 } | undefined;
  /** Bytes of a pod's largest packet: FLANNEL_MTU. */
  readonly mtu: number;
  readonly fastPath: FastPath;
  /** What comes from outside the network to pods goes there past the stack, and its answers too. */
  readonly letIn: boolean;
  /** What goes to each peer and comes from it is counted. */
  readonly countPeers: boolean;
  /** Range of source ports, and hop limit, of the outer header. */
  readonly sourcePorts: { readonly min: number; readonly max: number };
  readonly ttl: number;
  /** Undefined without --ip-masq. */
  readonly masquerade?: Masquerade | undefined;
}

/** Every row that one peer's lease gives; absent ones are undefined. */
export interface LeaseRows {
  readonly subnet: SubnetRow | undefined;
  readonly peer: PeerRow | undefined;
  readonly route: RouteRow | undefined;
  readonly neighbour: NeighbourRow | undefined;
  readonly fdb: FdbRow | undefined;
}

const NO_TIMEOUTS: Timeouts = {
  tcp_new: 0,
  tcp_established: 0,
  tcp_closing: 0,
  tcp_closed: 0,
  tcp_time_wait: 0,
  udp_new: 0,
  udp_established: 0,
  icmp: 0,
  other: 0,
};
/** The rows of a peer's lease; `path` is the kernel's answer to how its public address is reached, if it has one. */
export function rowsOf(lease: Lease, path: Path | undefined, facts: Facts): LeaseRows {
  const { backend } = facts.network;
  const kind = kindOf(backend);
  return kind.refuses(lease) === undefined
    ? kind.rows(lease, path, facts)
    : rowsOfOther(backend.type, lease, path, facts);
}

/**
 * The programs that belong on interfaces: those of the pods, the tunnel device, and the `ways`, the Ethernet
 * interfaces by which peers reach us, and the `uplinks`, by which pods reach the outside. `direct` is whether a peer may
 * be reached without a tunnel.
 */
export function attachmentsOf(
  facts: Facts,
  pods: Pods,
  ways: ReadonlySet<number>,
  uplinks: Iterable<number>,
  direct = kindOf(facts.network.backend).direct,
): ReadonlyMap<string, AttachmentRow> {
  const rows = new Map<string, AttachmentRow>();
  const add = (ifindex: number, hook: Hook): void => {
    rows.set(attachmentKey({ ifindex, hook }), { ifindex, hook });
  };
  const kind = kindOf(facts.network.backend);
  if (!kind.forwards) return rows;
  const watch = facts.fastPath === "FAST_PATH_AUTO";
  if (facts.overlay !== undefined) {
    add(facts.overlay.index, "to_overlay");
    add(facts.overlay.index, "from_overlay");
  }
  for (const ifindex of ways) {
    add(ifindex, "from_net");
    if ((watch && (facts.letIn || direct)) || (facts.countPeers && direct)) add(ifindex, "to_net");
  }
  for (const ifindex of uplinks) {
    add(ifindex, "from_net");
    add(ifindex, "to_net");
  }
  for (const pod of pods.interfaces.values()) {
    add(pod.ifindex, "from_pod");
    if (watch && pod.leadsToPods) add(pod.ifindex, "to_pod");
  }
  return rows;
}

/** The facts that are fixed when the programs are loaded; the fields of `struct config`. */
export interface ProgramConfig {
  readonly network4: Ipv4;
  readonly network4_mask: Ipv4;
  readonly subnet4: Ipv4;
  readonly subnet4_mask: Ipv4;
  readonly vtep4: Ipv4;
  readonly overlay_ifindex: number;
  readonly vni: number;
  readonly tunnel_port: number;
  readonly source_port_min: number;
  readonly source_port_max: number;
  readonly vtep_mac: Mac;
  readonly subnet_lengths: readonly number[];
  readonly fast_path: FastPath;
  readonly ttl: number;
  readonly tunnel: "TUNNEL_NONE" | "TUNNEL_VXLAN" | "TUNNEL_IPIP" | "TUNNEL_UDP";
  readonly encapsulate: number;
  readonly decapsulate: number;
  readonly direct: number;
  readonly masquerade: number;
  readonly let_in: number;
  readonly count_peers: number;
  readonly masq_port_min: number;
  readonly masq_port_max: number;
  readonly masq_seed: number;
  readonly masq_connections: number;
  readonly timeouts: Timeouts;
}

/**
 * `lengths` are the prefix lengths of the subnets in force. `direct` is whether the programs take what peers send without a
 * tunnel, and send so themselves, where a peer's row says it.
 */
export function configOf(facts: Facts, lengths: readonly number[], direct: boolean): ProgramConfig {
  const { network, subnet, overlay } = facts;
  const kind = kindOf(network.backend);
  return {
    network4: network.network.address,
    network4_mask: maskOf(network.network.length),
    subnet4: subnet.address,
    subnet4_mask: maskOf(subnet.length),
    vtep4: overlay?.localIp ?? 0,
    overlay_ifindex: overlay?.index ?? 0,
    ...kind.programs,
    source_port_min: facts.sourcePorts.min,
    source_port_max: facts.sourcePorts.max,
    vtep_mac: overlay?.mac ?? NO_MAC,
    subnet_lengths: [...lengths].sort((a, b) => b - a),
    fast_path: facts.fastPath,
    ttl: facts.ttl,
    direct: direct ? 1 : 0,
    masquerade: facts.masquerade === undefined ? 0 : 1,
    let_in: facts.letIn ? 1 : 0,
    count_peers: facts.countPeers ? 1 : 0,
    masq_port_min: facts.masquerade?.ports.first ?? 0,
    masq_port_max: facts.masquerade?.ports.last ?? 0,
    masq_seed: facts.masquerade?.seed ?? 0,
    masq_connections: facts.masquerade?.connections ?? 0,
    timeouts: facts.masquerade?.timeouts ?? NO_TIMEOUTS,
  };
}

export const subnetKey = (row: { subnet: Ipv4; prefixLength: number }): string =>
  formatCidr({ address: row.subnet, length: row.prefixLength });
export const peerKey = (row: { publicIp: Ipv4 }): string => formatIpv4(row.publicIp);
export const endpointKey = (row: { address: Ipv4 }): string => formatIpv4(row.address);
export const interfaceKey = (row: { ifindex: number }): string => `${row.ifindex}`;
export const routeKey = (row: { destination: Ipv4; prefixLength: number }): string =>
  formatCidr({ address: row.destination, length: row.prefixLength });
export const neighbourKey = (row: { index: number; address: Ipv4 }): string =>
  `${row.index} ${formatIpv4(row.address)}`;
export const fdbKey = (row: { index: number; mac: Mac }): string => `${row.index} ${row.mac}`;
export const attachmentKey = (row: AttachmentRow): string => `${row.hook}-${row.ifindex}`;

/** Whether a lease's subnet belongs to the network at all. */
export function isInNetwork(lease: Lease, network: Network): boolean {
  return lease.subnet.length >= network.network.length && contains(network.network, lease.subnet.address);
}
