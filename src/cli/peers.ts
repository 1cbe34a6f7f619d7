/** `twill peers`: the nodes this one forwards to, their subnets, and how they are reached. */
import { Argument, Command, Option } from "commander";
import type { Reach } from "../core/image.ts";
import { contains, formatCidr, formatIpv4, type Prefix } from "../core/ipv4.ts";
import { decodeAdded } from "../core/lease.ts";
import { NO_TRAFFIC, type PeerTraffic, readConfig, readRows, readTraffic } from "../edge/dataplane.ts";
import { type PeerNote, readAdded, readPeersNote, runningDaemon } from "../edge/rundir.ts";
import { interfaceNames, requireConfig } from "./common.ts";
import { addresses, countOption } from "./filters.ts";
import { type Column, size, type Tone, table } from "./table.ts";
import { showing, type ViewOptions } from "./view.ts";

/** As the JSON of `twill status` and `twill peers` says it. */
export interface Peer {
  readonly subnet: string;
  readonly publicIp: string;
  /** `tunnel`, `direct` or `device`; `commands` if those of the network config have set up the way, whichever it is. */
  readonly reach: string;
  /** These four are null with `commands`. */
  readonly interface: string | null;
  readonly nextHop: string | null;
  readonly mtu: number | null;
  readonly vtepMac: string | null;
  /** What the running daemon's probes say: `reachable`, `unreachable` or `unknown`; null without them. */
  readonly state: string | null;
  /** Milliseconds of a round trip, smoothed. */
  readonly rttMs: number | null;
  /** When the last probe was answered. */
  readonly answeredAt: string | null;
  /** Packets, and bytes without the tunnel's headers; null unless twilld was told to count them. */
  readonly sent: PeerTraffic["sent"] | null;
  readonly received: PeerTraffic["received"] | null;
}

interface Options extends ViewOptions {
  readonly reach?: string;
  readonly state?: string;
  readonly count?: true;
}

interface Document {
  readonly count: number;
  readonly peers?: readonly Peer[];
}

export const REACHES: Readonly<Record<Reach, string>> = {
  REACH_TUNNEL: "tunnel",
  REACH_DIRECT: "direct",
  REACH_DEVICE: "device",
};

const BY_COMMANDS = "commands";

const STATES = ["reachable", "unreachable", "unknown"] as const;
const TONES: Readonly<Record<string, Tone>> = { reachable: "good", unreachable: "bad", unknown: "notice" };

/** Columns of a table of these peers: what probes say, and what is counted, is left out where there is none. */
export function peerColumns(peers: readonly Peer[]): Column<Peer>[] {
  const probed: Column<Peer>[] = [
    {
      head: "STATE",
      value: ({ state }) => state ?? "-",
      tone: ({ state }) => TONES[state ?? ""],
    },
    { head: "RTT", value: ({ rttMs }) => (rttMs === null ? "-" : `${rttMs.toFixed(2)} ms`) },
  ];
  const counted: Column<Peer>[] = [
    { head: "SENT", value: ({ sent }) => volume(sent) },
    { head: "RECEIVED", value: ({ received }) => volume(received) },
  ];
  return [
    { head: "SUBNET", value: ({ subnet }) => subnet, key: true },
    { head: "PUBLIC IP", value: ({ publicIp }) => publicIp, key: true },
    { head: "REACH", value: ({ reach }) => reach },
    { head: "INTERFACE", value: (peer) => peer.interface ?? "-" },
    { head: "NEXT HOP", value: ({ nextHop }) => nextHop ?? "-" },
    { head: "MTU", value: ({ mtu }) => mtu ?? "-" },
    ...(peers.some(({ state }) => state !== null) ? probed : []),
    ...(peers.some(({ sent }) => sent !== null) ? counted : []),
    { head: "VTEP MAC", value: ({ vtepMac }) => vtepMac ?? "-" },
  ];
}

/** `12 in 1.2 kB`: packets, and their bytes. */
function volume(count: Peer["sent"]): string {
  return count === null ? "-" : `${count.packets} in ${size(count.bytes)}`;
}

/** The peers as the probes of the daemon that runs find them; empty if none runs, as old news say nothing. */
function probesOf(pinPath: string): ReadonlyMap<string, PeerNote> {
  const note = readPeersNote(pinPath);
  if (note === undefined || note.pid !== runningDaemon(pinPath)) return new Map();
  return new Map(note.peers.map((peer) => [peer.subnet, peer] as const));
}

/** All peers, or those with an address, by subnet. */
export function peersOf(
  pinPath: string,
  nameOf: (ifindex: number) => string,
  wanted?: Prefix,
  reach?: string,
): Peer[] {
  const probes = probesOf(pinPath);
  const traffic = readConfig(pinPath)?.count_peers ? readTraffic(pinPath) : undefined;
  const forwarded = readRows(pinPath, "subnets4").map((row) => ({
    subnet: { address: row.subnet, length: row.prefixLength },
    publicIp: row.publicIp,
    way: {
      reach: REACHES[row.reach],
      interface: nameOf(row.ifindex),
      nextHop: formatIpv4(row.nextHop),
      mtu: row.mtu,
      vtepMac: row.vtepMac,
    },
    counts: traffic && (traffic.get(row.publicIp) ?? NO_TRAFFIC),
  }));
  return [...forwarded, ...addedPeers(pinPath)]
    .filter(({ subnet, publicIp, way }) => {
      if (reach !== undefined && way.reach !== reach) return false;
      if (wanted === undefined || contains(wanted, publicIp)) return true;
      return contains(wanted, subnet.address) || contains(subnet, wanted.address);
    })
    .sort((a, b) => a.subnet.address - b.subnet.address)
    .map(({ subnet, publicIp, way, counts }) => {
      const text = formatCidr(subnet);
      const probe = probes.get(text);
      return {
        subnet: text,
        publicIp: formatIpv4(publicIp),
        ...way,
        state: probe?.state ?? null,
        rttMs: probe?.smoothedMs ?? null,
        answeredAt: probe?.answeredAt ?? null,
        sent: counts?.sent ?? null,
        received: counts?.received ?? null,
      };
    });
}

/** Those for which commands of the network config were run. */
function addedPeers(pinPath: string) {
  const way = { reach: BY_COMMANDS, interface: null, nextHop: null, mtu: null, vtepMac: null };
  return [...readAdded(pinPath)].flatMap(([key, text]) => {
    const kept = decodeAdded(key, text);
    if ("reason" in kept) return [];
    const { subnet, publicIp } = kept.lease;
    return [{ subnet, publicIp, way, counts: undefined }];
  });
}

export function command(): Command {
  const made = new Command("peers")
    .description(
      "The nodes that this one forwards to. An address shows the peer that has it, or whose pod has it: who holds 172.7.22.5?",
    )
    .addArgument(
      new Argument("[address]", "a public address, a pod's, or a network of them").argParser(addresses),
    )
    .addOption(
      new Option("--state <state>", "only those of which the daemon's probes say so").choices(STATES),
    )
    .addOption(
      new Option("--reach <way>", "only those reached in this way").choices([
        ...Object.values(REACHES),
        BY_COMMANDS,
      ]),
    )
    .addOption(countOption());
  return showing<Options, Document>(made, {
    gather({ pinPath, reach, state, count }) {
      requireConfig(pinPath);
      const wanted = made.processedArgs[0] as Prefix | undefined;
      const peers = peersOf(pinPath, interfaceNames().nameOf, wanted, reach).filter(
        (peer) => state === undefined || peer.state === state,
      );
      return count ? { count: peers.length } : { count: peers.length, peers };
    },
    render: ({ count, peers }, screen) =>
      `${peers === undefined ? count : table(peerColumns(peers), peers, screen)}\n`,
  });
}
