/**
 * What a backend is: how packets between nodes travel, as one interface. Each backend is a file in
 * `src/core/backends`, which reads its options of the network config and answers these questions for them;
 * `src/core/backends.ts` lists them. One with a wire format of its own has a file in `bpf/` as well.
 */
import type { Command } from "./command.ts";
import type { Link, Path, Write } from "./host.ts";
import type { Facts, LeaseRows, ProgramConfig, RouteRow, SubnetRow } from "./image.ts";
import type { Uplink } from "./interfaces.ts";
import type { Ipv4, Prefix } from "./ipv4.ts";
import type { Lease, LeaseAttributes, Mac } from "./model.ts";

/** A backend with the options of the network config applied. */
export interface BackendKind {
  /** Bytes of a pod's largest packet, FLANNEL_MTU, on an uplink whose largest is `uplinkMtu`. */
  mtu(uplinkMtu: number): number;
  /** Whether pods are forwarded at all. */
  readonly forwards: boolean;
  /** Whether some peers may be reached without a tunnel. */
  readonly direct: boolean;
  /** The device that stands for the network on this node; undefined for backends without one. */
  readonly device: DeviceKind | undefined;
  /** Why it can't work with this uplink, if it can't. */
  objection?(uplink: Uplink): string | undefined;
  /** Programs that are run for it, if any are. */
  readonly commands?: BackendCommands;
  /** What our lease says; `mac` is that of the device, `data` what the first of the commands printed. */
  attributes(node: {
    publicIp: Ipv4;
    uplink: Ipv4;
    mac: Mac | undefined;
    data?: string | undefined;
  }): LeaseAttributes;
  /** Why a peer with this lease can't be reached with this backend; undefined if it can. */
  refuses(lease: Lease): string | undefined;
  /**
   * The rows of a peer's lease that is not refused. `path` is the kernel's answer to how its public address is
   * reached, undefined if it has none.
   */
  rows(lease: Lease, path: Path | undefined, facts: Facts): LeaseRows;
  /** Routes that there are whoever the peers are. */
  routes?(facts: Facts): readonly RouteRow[];
  /** What the programs must know of the tunnel. */
  readonly programs: Pick<ProgramConfig, "vni" | "tunnel_port" | "tunnel" | "encapsulate" | "decapsulate">;
}

/** Programs that stand for what a backend does. Each is undefined if there is none; `inherited` is the daemon's environment. */
export interface BackendCommands {
  /** The options they come from, as JSON of a network config: the same text, the same commands. */
  readonly text: string;
  /** Before a subnet is leased. What it prints is the data of our lease. */
  preStartup(inherited: Environment): Command | undefined;
  /** When this node has a subnet. */
  postStartup(
    node: { network: Prefix; subnet: Prefix; publicIp: Ipv4 },
    inherited: Environment,
  ): Command | undefined;
  subnetAdd(peer: Lease, inherited: Environment): Command | undefined;
  subnetRemove(peer: Lease, inherited: Environment): Command | undefined;
}

export type Environment = Readonly<Record<string, string>>;

/** A device as the backend makes it, and how it knows one of its own. */
export interface DeviceKind {
  readonly name: string;
  /** The outer source address: that of the uplink, or the public one if this node has it. */
  readonly source: "uplink" | "public";
  /** It sends nothing without a neighbour entry and an FDB entry. */
  readonly asksForNeighbours: boolean;
  /** The writes that make it, of which the first that the kernel can do is enough. */
  create(spec: { parentIndex: number; localIp: Ipv4; mtu: number; mac: Mac }): readonly Write[];
  /** Whether a link is such a device; its MTU and MAC can be changed in place. */
  fits(link: Link, parentIndex: number, localIp: Ipv4): boolean;
}

export const NO_MAC: Mac = "00:00:00:00:00:00";

/** Rows of a lease that carries no traffic. */
export const NO_ROWS: LeaseRows = {
  subnet: undefined,
  peer: undefined,
  route: undefined,
  neighbour: undefined,
  fdb: undefined,
};

/** What the programs are told by backends without a tunnel. */
export const NO_TUNNEL: BackendKind["programs"] = {
  vni: 0,
  tunnel_port: 0,
  tunnel: "TUNNEL_NONE",
  encapsulate: 0,
  decapsulate: 0,
};

/** `refuses` of backends whose leases name them. */
export function refusesOthers(type: string): (lease: Lease) => string | undefined {
  return ({ backendType }) =>
    backendType === type ? undefined : `its backend is ${backendType || "not named"}, ours is ${type}`;
}

/** Whether the peer is on a network that we share with it. */
export function isOnLink(path: Path | undefined): path is Path {
  return path !== undefined && path.gateway === undefined;
}

/** Where packets for a peer leave; without a path, the guess that its address is on the uplink's network. */
export function wayTo(
  lease: Lease,
  path: Path | undefined,
  facts: Facts,
): Pick<SubnetRow, "subnet" | "prefixLength" | "publicIp" | "nextHop" | "ifindex"> {
  return {
    subnet: lease.subnet.address,
    prefixLength: lease.subnet.length,
    publicIp: lease.publicIp,
    nextHop: path?.gateway ?? lease.publicIp,
    ifindex: path?.outIndex ?? facts.uplink.index,
  };
}

/**
 * The device of a tunnel that the programs alone open and close: Ethernet without ARP, which sends nothing itself.
 * Both drivers are such, and kernels have one of them at least.
 */
export function plainDevice(name: string): DeviceKind {
  const kinds = ["ifb", "dummy"];
  return {
    name,
    source: "uplink",
    asksForNeighbours: false,
    create: ({ mtu, mac }) => kinds.map((kind) => ({ write: "createPlain", name, kind, mtu, mac })),
    fits: ({ kind }) => kind !== undefined && kinds.includes(kind),
  };
}

/** The rows of a peer that is reached through such a device, by a tunnel that adds `overhead` bytes. */
export function plainRows(lease: Lease, path: Path | undefined, facts: Facts, overhead: number): LeaseRows {
  const { overlay } = facts;
  if (overlay === undefined) return NO_ROWS;
  const way = wayTo(lease, path, facts);
  const { subnet, prefixLength, publicIp } = way;
  const reach = path?.ethernet === true ? "REACH_TUNNEL" : "REACH_DEVICE";
  // No device fragments on the way: what is too large for it, the stack has to say.
  const mtu = Math.min(facts.mtu, (path?.mtu ?? facts.uplink.mtu) - overhead);
  return {
    ...NO_ROWS,
    subnet: { ...way, reach, mtu, vtepMac: NO_MAC },
    peer: { publicIp, subnet, prefixLength },
    route: {
      destination: subnet,
      prefixLength,
      gateway: publicIp,
      outIndex: overlay.index,
      onlink: true,
      ...(mtu < facts.mtu ? { mtu } : {}),
    },
  };
}

/**
 * The backends whose packets are what pods sent, once they are opened. While a cluster moves from one to another, two
 * nodes of different ones reach each other as they are, if they share a network. A record without a type is of udp.
 */
const OPEN: ReadonlySet<string> = new Set(["", "udp", "vxlan", "host-gw", "ipip"]);

/** The rows of a peer of another backend than `type`, with which this node forwards. */
export function rowsOfOther(type: string, lease: Lease, path: Path | undefined, facts: Facts): LeaseRows {
  if (!OPEN.has(type) || !OPEN.has(lease.backendType) || type === lease.backendType) return NO_ROWS;
  return isOnLink(path) && path.ethernet ? directRows(lease, path, facts) : NO_ROWS;
}

/** The rows of a peer that is reached by a plain route. */
export function directRows(lease: Lease, path: Path | undefined, facts: Facts): LeaseRows {
  const way = wayTo(lease, path, facts);
  const { subnet, prefixLength, publicIp } = way;
  const usable = isOnLink(path) && path.ethernet;
  const mtu = Math.min(facts.mtu, path?.mtu ?? facts.uplink.mtu);
  // Without an address of its network on a link, the gateway is none the kernel would take; it says so.
  return {
    ...NO_ROWS,
    subnet: usable ? { ...way, reach: "REACH_DIRECT", mtu, vtepMac: lease.vtepMac ?? NO_MAC } : undefined,
    peer: { publicIp, subnet, prefixLength },
    route: { destination: subnet, prefixLength, gateway: publicIp, outIndex: way.ifindex, onlink: false },
  };
}
