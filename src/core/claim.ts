/**
 * What each daemon of a host must have for itself: several networks are served side by side, each by a daemon of its
 * own, if they differ in all of it.
 */
import { kindOf } from "./backends.ts";
import { formatCidr, overlaps, type Prefix } from "./ipv4.ts";
import type { Network } from "./model.ts";

/** Plain data, as it is written down for the others. */
export interface Claim {
  /** Where the network is in etcd, by which people know it. */
  readonly prefix: string;
  readonly network: Prefix;
  readonly tunnel: "TUNNEL_NONE" | "TUNNEL_VXLAN" | "TUNNEL_IPIP" | "TUNNEL_UDP";
  readonly device?: string | undefined;
  /** UDP port of the tunnel. */
  readonly port?: number | undefined;
  /** With vxlan: its packets carry marks. The kernel has one kind of them on a port. */
  readonly gbp?: boolean | undefined;
  /** Absolute path. */
  readonly subnetFile: string;
  /** Undefined without --ip-masq. */
  readonly masqPorts?: { readonly first: number; readonly last: number } | undefined;
}

/** The claim of a network; what is not of its config is given. */
export function claimOf(network: Network, more: Pick<Claim, "prefix" | "subnetFile" | "masqPorts">): Claim {
  const { backend } = network;
  const { device, programs } = kindOf(backend);
  return {
    ...more,
    network: network.network,
    tunnel: programs.tunnel,
    device: device?.name,
    ...(programs.tunnel_port === 0 ? {} : { port: programs.tunnel_port }),
    ...(backend.type === "vxlan" ? { gbp: backend.gbp } : {}),
  };
}

const REMEDIES: Readonly<Record<Claim["tunnel"], string>> = {
  TUNNEL_NONE: "choose another Backend.Type for one of them",
  TUNNEL_IPIP: "a host has one network of this type: choose another Backend.Type for one of them",
  TUNNEL_VXLAN: "give one of them another Backend.VNI",
  TUNNEL_UDP: "give one of them another Backend.Port",
};

/** What both claim, in words, and what to change; undefined if they can be served side by side. */
export function conflictOf(mine: Claim, other: Claim): string | undefined {
  if (overlaps(mine.network, other.network)) {
    return `Network ${formatCidr(mine.network)} overlaps ${formatCidr(other.network)}; give one of them another Network`;
  }
  if (mine.device !== undefined && mine.device === other.device)
    return `both have the device ${mine.device}; ${REMEDIES[mine.tunnel]}`;
  if (mine.port !== undefined && mine.port === other.port) {
    const isShared = mine.tunnel === "TUNNEL_VXLAN" && other.tunnel === mine.tunnel;
    if (!isShared) return `both have UDP port ${mine.port}; give one of them another Backend.Port`;
    if (mine.gbp !== other.gbp)
      return `both have UDP port ${mine.port}, and only one has GBP; give one of them another Backend.Port`;
  }
  if (mine.subnetFile === other.subnetFile)
    return `both write ${mine.subnetFile}; give one of them another --subnet-file`;
  const [ours, theirs] = [mine.masqPorts, other.masqPorts];
  if (ours && theirs && ours.first <= theirs.last && theirs.first <= ours.last) {
    const text = `${ours.first}-${ours.last}`;
    return `both masquerade with ports of ${text}; give them --masq-ports that do not overlap`;
  }
  return undefined;
}
