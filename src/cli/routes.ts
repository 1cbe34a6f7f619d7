/**
 * `twill routes`: the kernel's own way to each peer. Take the programs away, and packets go by it; so it must be
 * complete: a route, and through the tunnel a neighbour for its gateway and an FDB entry for that one's MAC.
 */
import { Argument, Command } from "commander";
import type { FdbEntry, Neighbour, Route } from "../core/host.ts";
import { ROUTE_PROTOCOL, type SubnetRow } from "../core/image.ts";
import { contains, formatCidr, formatIpv4, type Prefix } from "../core/ipv4.ts";
import { readRows } from "../edge/dataplane.ts";
import { requireConfig, withNetlink } from "./common.ts";
import { addresses } from "./filters.ts";
import { type Column, table } from "./table.ts";
import { showing, type ViewOptions } from "./view.ts";

interface PeerRoute {
  readonly destination: string;
  readonly interface: string | null;
  readonly gateway: string | null;
  /** Whose it is: `twill`, `kernel`, `static`, or the number of its protocol. Null without a route. */
  readonly origin: string | null;
  readonly peer: string | null;
  /** Of the tunnel: the gateway's MAC, and the remote behind it. Null where there is none. */
  readonly neighbour: string | null;
  readonly fdb: string | null;
  /** What is wrong; null if nothing is. */
  readonly problem: string | null;
}

interface Document {
  readonly problems: number;
  readonly routes: readonly PeerRoute[];
}

const MAIN = 254;
const ORIGINS: Readonly<Record<number, string>> = {
  2: "kernel",
  3: "boot",
  4: "static",
  [ROUTE_PROTOCOL]: "twill",
};
const BLACKHOLE = 6;

const COLUMNS: readonly Column<PeerRoute>[] = [
  { head: "DESTINATION", value: ({ destination }) => destination, key: true },
  { head: "VIA", value: ({ gateway }) => gateway ?? "-" },
  { head: "INTERFACE", value: (route) => route.interface ?? "-" },
  { head: "FROM", value: ({ origin }) => origin ?? "-" },
  { head: "PEER", value: ({ peer }) => peer ?? "-" },
  { head: "NEIGHBOUR", value: ({ neighbour }) => neighbour ?? "-" },
  { head: "FDB", value: ({ fdb }) => fdb ?? "-" },
  {
    head: "STATE",
    value: ({ problem }) => problem ?? "ok",
    tone: ({ problem }) => (problem === null ? "good" : "bad"),
  },
];

interface Kernel {
  /** By destination, the one the kernel prefers. */
  readonly routes: ReadonlyMap<string, Route>;
  readonly neighbours: ReadonlyMap<number, Neighbour>;
  readonly fdb: ReadonlyMap<string, FdbEntry>;
  readonly nameOf: (ifindex: number) => string;
  /** The tunnel device; 0 without one. */
  readonly overlay: number;
}

/** What the kernel has in the network's range, and for the tunnel. */
function readKernel(network: Prefix, overlay: number): Kernel {
  return withNetlink((netlink) => {
    const names = new Map(netlink.links().map(({ index, name }) => [index, name] as const));
    const routes = new Map<string, Route>();
    for (const route of netlink.routes({ table: MAIN })) {
      if (!contains(network, route.destination.address) || route.destination.length < network.length)
        continue;
      const key = formatCidr(route.destination);
      const other = routes.get(key);
      if (other === undefined || route.metric < other.metric) routes.set(key, route);
    }
    const of = <T extends { readonly index: number }>(rows: readonly T[]): T[] =>
      overlay === 0 ? [] : rows.filter(({ index }) => index === overlay);
    return {
      routes,
      overlay,
      neighbours: new Map(of(netlink.neighbours()).map((row) => [row.address, row] as const)),
      fdb: new Map(of(netlink.fdb()).map((row) => [row.mac, row] as const)),
      nameOf: (ifindex) => names.get(ifindex) ?? `#${ifindex}`,
    };
  });
}

/** How a peer's pods would be reached by the kernel alone, and what stands in the way of it. */
function wayTo(row: SubnetRow, kernel: Kernel): PeerRoute {
  const destination = formatCidr({ address: row.subnet, length: row.prefixLength });
  const route = kernel.routes.get(destination);
  const isTunnel = row.reach !== "REACH_DIRECT";
  const neighbour = isTunnel ? kernel.neighbours.get(row.subnet) : undefined;
  const fdb = isTunnel ? kernel.fdb.get(row.vtepMac) : undefined;
  const outIndex = isTunnel ? kernel.overlay : row.ifindex;
  const gateway = isTunnel ? row.subnet : row.publicIp;
  const problem = ((): string | null => {
    if (route === undefined) return "no route";
    if (route.outIndex !== outIndex)
      return `the route leaves by ${route.outIndex === undefined ? "no interface" : kernel.nameOf(route.outIndex)}`;
    if (route.gateway !== gateway) return "the route has another gateway";
    if (route.linkDown) return "the interface is down";
    if (!isTunnel) return null;
    if (neighbour?.mac === undefined) return "no neighbour";
    if (neighbour.mac !== row.vtepMac) return "the neighbour has another MAC";
    if (fdb?.dst === undefined) return "no FDB entry";
    return fdb.dst === row.publicIp ? null : "the FDB entry leads elsewhere";
  })();
  return {
    ...shown(destination, route, kernel),
    peer: formatIpv4(row.publicIp),
    neighbour: neighbour?.mac ?? null,
    fdb: fdb?.dst === undefined ? null : formatIpv4(fdb.dst),
    problem,
  };
}

function shown(destination: string, route: Route | undefined, kernel: Kernel): PeerRoute {
  const isBlackhole = route?.type === BLACKHOLE;
  return {
    destination,
    interface: isBlackhole
      ? "blackhole"
      : route?.outIndex === undefined
        ? null
        : kernel.nameOf(route.outIndex),
    gateway: route?.gateway === undefined ? null : formatIpv4(route.gateway),
    origin: route === undefined ? null : (ORIGINS[route.protocol] ?? `${route.protocol}`),
    peer: null,
    neighbour: null,
    fdb: null,
    problem: null,
  };
}

function gather(pinPath: string, wanted: Prefix | undefined): Document {
  const config = requireConfig(pinPath);
  const network = { address: config.network4, length: 32 - Math.log2(0x100000000 - config.network4_mask) };
  const kernel = readKernel(network, config.overlay_ifindex);
  const peers = readRows(pinPath, "subnets4").sort((a, b) => a.subnet - b.subnet);
  const known = new Set(peers.map((row) => formatCidr({ address: row.subnet, length: row.prefixLength })));
  const own = [...kernel.routes]
    .filter(([destination]) => !known.has(destination))
    .sort(([, a], [, b]) => a.destination.address - b.destination.address)
    .map(([destination, route]) => ({ at: route.destination, row: shown(destination, route, kernel) }));
  const ways = peers.map((row) => ({
    at: { address: row.subnet, length: row.prefixLength },
    row: wayTo(row, kernel),
  }));
  const routes = [...own, ...ways]
    .filter(({ at }) => wanted === undefined || contains(at, wanted.address) || contains(wanted, at.address))
    .map(({ row }) => row);
  return { problems: routes.filter(({ problem }) => problem !== null).length, routes };
}

export function command(): Command {
  const made = new Command("routes")
    .description(
      "The kernel's own way to each peer, by which packets go when no program takes them, and what else it has in the network's range. Exit code 1 if a way is not complete.",
    )
    .addArgument(
      new Argument("[address]", "only where it leads to, or what is in this network").argParser(addresses),
    );
  return showing<ViewOptions, Document>(made, {
    gather: ({ pinPath }) => gather(pinPath, made.processedArgs[0] as Prefix | undefined),
    render: ({ routes }, screen) => `${table(COLUMNS, routes, screen)}\n`,
    exitCode: ({ problems }) => (problems === 0 ? 0 : 1),
  });
}
