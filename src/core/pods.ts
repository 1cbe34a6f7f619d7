/**
 * Finds this node's pods in the kernel's own tables.
 *
 *   - A bridge that holds an address of our subnet (docker0, cni0): its ports lead to pods. Which pod is behind
 *     which port, the bridge's forwarding table says; which address it has, the bridge's neighbours.
 *   - An interface with a /32 route to an address of our subnet: one pod.
 *
 * A pod that is not known yet is no matter: the first packet to it makes the kernel ask for its MAC, and so it is.
 * Since the fast lane passes the bridge by, the bridge forgets where a quiet pod is; a known pod stays known
 * while its neighbour entry lives and its port is still a port of the bridge.
 */
import { type Host, isEthernet, type Link } from "./host.ts";
import { contains, type Ipv4, type Prefix } from "./ipv4.ts";
import type { Mac } from "./model.ts";

/** A pod of this node. */
export interface Endpoint {
  readonly address: Ipv4;
  /** Host's interface behind which it is. */
  readonly ifindex: number;
  /** Straight into the pod's namespace, or out of the host's interface. */
  readonly delivery: "DELIVERY_PEER" | "DELIVERY_EGRESS";
  readonly mac: Mac;
  /** What the pod's packets for elsewhere are addressed to. */
  readonly gatewayMac: Mac;
  /** Bytes, of the smallest link on the way. */
  readonly mtu: number;
}

/** An interface behind which pods are, or the bridge they are on. */
export interface PodInterface {
  readonly ifindex: number;
  readonly gatewayMac: Mac;
  /** What comes in here has passed a port before. */
  readonly bridge: boolean;
  /** The stack's packets for pods leave here: the bridge, or a point-to-point interface. */
  readonly leadsToPods: boolean;
}

export interface Pods {
  readonly endpoints: ReadonlyMap<Ipv4, Endpoint>;
  readonly interfaces: ReadonlyMap<number, PodInterface>;
}

export const NO_PODS: Pods = { endpoints: new Map(), interfaces: new Map() };

const NUD_USABLE = 2 | 4 | 8 | 16 | 64 | 128; // reachable, stale, delay, probe, noarp, permanent
const TABLE_MAIN = 254;
const UNICAST = 1;

/** `not` are the interfaces that cannot lead to pods: the uplink and the tunnel device. */
export function findPods(host: Host, subnet: Prefix, not: ReadonlySet<number>, before: Pods): Pods {
  const endpoints = new Map<Ipv4, Endpoint>();
  const interfaces = new Map<number, PodInterface>();

  const bridges = new Map<number, Link & { mac: Mac }>();
  for (const address of host.addresses.values()) {
    const link = host.links.get(address.index);
    if (link?.kind !== "bridge" || link.mac === undefined || not.has(link.index)) continue;
    if (contains(subnet, address.address)) bridges.set(link.index, { ...link, mac: link.mac });
  }
  const portsOf = new Map<number, Map<Mac, number>>();
  for (const [index, bridge] of bridges) {
    interfaces.set(index, { ifindex: index, gatewayMac: bridge.mac, bridge: true, leadsToPods: true });
    portsOf.set(index, new Map());
  }
  for (const link of host.links.values()) {
    const bridge = link.masterIndex === undefined ? undefined : bridges.get(link.masterIndex);
    if (bridge === undefined || not.has(link.index) || !isEthernet(link)) continue;
    interfaces.set(link.index, {
      ifindex: link.index,
      gatewayMac: bridge.mac,
      bridge: false,
      leadsToPods: false,
    });
  }
  for (const { ifindex } of interfaces.values()) {
    for (const entry of host.fdb.of(ifindex)) {
      // A permanent entry is the port's own MAC.
      if (entry.masterIndex === undefined || entry.permanent) continue;
      portsOf.get(entry.masterIndex)?.set(entry.mac, entry.index);
    }
  }

  const pointToPoint = new Map<Ipv4, Link & { mac: Mac }>();
  for (const link of host.links.values()) {
    const { mac } = link;
    if (mac === undefined || !isEthernet(link) || not.has(link.index) || bridges.has(link.index)) continue;
    for (const route of host.routes.of(link.index)) {
      if (route.table !== TABLE_MAIN || route.type !== UNICAST || route.destination.length !== 32) continue;
      if (route.gateway !== undefined || !contains(subnet, route.destination.address)) continue;
      pointToPoint.set(route.destination.address, { ...link, mac });
      interfaces.set(link.index, { ifindex: link.index, gatewayMac: mac, bridge: false, leadsToPods: true });
    }
  }

  for (const index of interfaces.keys()) {
    for (const { address, mac, state } of host.neighbours.of(index)) {
      if (mac === undefined || (state & NUD_USABLE) === 0 || !contains(subnet, address)) continue;
      const bridge = bridges.get(index);
      const direct = pointToPoint.get(address);
      if (bridge !== undefined) {
        const port = portOf(host, bridge, mac, portsOf.get(index), before.endpoints.get(address));
        if (port === undefined) continue;
        const mtu = Math.min(bridge.mtu, port.mtu);
        endpoints.set(address, endpoint(address, port, mac, bridge.mac, mtu));
      } else if (direct?.index === index) {
        endpoints.set(address, endpoint(address, direct, mac, direct.mac, direct.mtu));
      }
    }
  }
  return { endpoints, interfaces };
}

function portOf(
  host: Host,
  bridge: Link,
  mac: Mac,
  ports: ReadonlyMap<Mac, number> | undefined,
  before: Endpoint | undefined,
): Link | undefined {
  const index = ports?.get(mac) ?? (before?.mac === mac ? before.ifindex : undefined);
  const port = index === undefined ? undefined : host.links.get(index);
  return port?.masterIndex === bridge.index ? port : undefined;
}

function endpoint(address: Ipv4, link: Link, mac: Mac, gatewayMac: Mac, mtu: number): Endpoint {
  // Only a veth whose other end is in another namespace can be entered from behind.
  const enter = link.kind === "veth" && link.linkNetnsId !== undefined;
  return {
    address,
    ifindex: link.index,
    delivery: enter ? "DELIVERY_PEER" : "DELIVERY_EGRESS",
    mac,
    gatewayMac,
    mtu,
  };
}
