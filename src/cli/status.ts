/** `twill status`: the node, its subnet, its peers, its programs, and what became of packets. */
import { Command } from "commander";
import { formatCidr } from "../core/ipv4.ts";
import { findAttachments, mapUse, readConfig, readCounters } from "../edge/dataplane.ts";
import { runningDaemon } from "../edge/rundir.ts";
import { compare, type DaemonStatus, interfaceNames, nothingAt, Refusal, readDaemon } from "./common.ts";
import { type Peer, peerColumns, peersOf } from "./peers.ts";
import { type Column, printable, type Screen, table, toned } from "./table.ts";
import { showing } from "./view.ts";

interface Attachment {
  readonly interface: string;
  readonly hook: string;
  readonly mode: string;
}

/** Everything `twill status` shows. */
interface Status {
  readonly running: boolean;
  readonly pid: number | null;
  readonly daemon: DaemonStatus | null;
  readonly peers: readonly Peer[];
  readonly attachments: readonly Attachment[];
  readonly endpoints: number;
  readonly maps: readonly { readonly map: string; readonly entries: number; readonly capacity: number }[];
  readonly packets: Readonly<Record<string, Readonly<Record<string, number>>>>;
}

const MAPS = ["subnets4", "peers4", "endpoints4", "interfaces", "flows4", "connections4"] as const;

function gather(pinPath: string): Status {
  const daemon = readDaemon(pinPath) ?? null;
  const pid = runningDaemon(pinPath) ?? null;
  const config = readConfig(pinPath);
  if (daemon === null && config === undefined) {
    throw new Refusal(nothingAt(pinPath));
  }
  const { indexes, nameOf } = interfaceNames();
  const attachments = findAttachments(pinPath, indexes).map(({ ifindex, hook, mode }) => ({
    interface: nameOf(ifindex),
    hook,
    mode,
  }));
  attachments.sort((a, b) => compare(a.interface, b.interface) || compare(a.hook, b.hook));
  const common = { running: pid !== null, pid, daemon, attachments };
  if (config === undefined) return { ...common, peers: [], endpoints: 0, maps: [], packets: {} };
  return {
    ...common,
    peers: peersOf(pinPath, nameOf),
    endpoints: mapUse(pinPath, "endpoints4").entries,
    maps: MAPS.map((map) => ({ map, ...mapUse(pinPath, map) })),
    packets: packetsOf(pinPath),
  };
}

/** Packets by hook and verdict, without the zeros. */
function packetsOf(pinPath: string): Record<string, Record<string, number>> {
  const packets: Record<string, Record<string, number>> = {};
  for (const [hook, verdicts] of Object.entries(readCounters(pinPath))) {
    const seen = Object.entries(verdicts as Record<string, { packets: bigint }>).filter(
      ([, count]) => count.packets > 0n,
    );
    if (seen.length > 0) {
      packets[hook] = Object.fromEntries(seen.map(([verdict, count]) => [verdict, Number(count.packets)]));
    }
  }
  return packets;
}

/** Of a long list, the first; `twill peers` has them all. */
const PEERS_SHOWN = 20;

/** Columns of rows that are lists of cells; the first cell is the key. */
function plain(...heads: string[]): Column<readonly (string | number)[]>[] {
  return heads.map((head, index) => ({ head, value: (row) => row[index] ?? "", key: index === 0 }));
}

function render(status: Status, screen: Screen): string {
  const { daemon } = status;
  const parts = [factsOf(status, screen)];
  const { peers } = status;
  const more = peers.length > PEERS_SHOWN ? `\n(${peers.length - PEERS_SHOWN} more: twill peers)` : "";
  parts.push(
    `peers (${peers.length})\n${table(peerColumns(peers), peers.slice(0, PEERS_SHOWN), screen)}${more}`,
  );
  const programs = status.attachments.map((row) => [row.interface, row.hook, row.mode]);
  parts.push(`programs\n${table(plain("INTERFACE", "PROGRAM", "BY"), programs, screen)}`);
  const packets = Object.entries(status.packets).flatMap(([hook, verdicts]) =>
    Object.entries(verdicts).map(([verdict, count]) => [hook, verdict, count]),
  );
  if (packets.length > 0)
    parts.push(`packets\n${table(plain("PROGRAM", "VERDICT", "PACKETS"), packets, screen)}`);
  if (daemon !== null) {
    const aside = [...daemon.rejections, ...daemon.ignored].map(({ key, reason }) => [key, reason]);
    if (aside.length > 0)
      parts.push(`records set aside (${aside.length})\n${table(plain("KEY", "REASON"), aside, screen)}`);
    const failures = daemon.failures.map(({ what, reason }) => [what, reason]);
    if (failures.length > 0)
      parts.push(`failing, tried again\n${table(plain("WHAT", "REASON"), failures, screen)}`);
    for (const reason of daemon.firewall?.reasons ?? [])
      parts.push(`pods' packets take the stack: ${reason}`);
    for (const reason of daemon.firewall?.outside ?? [])
      parts.push(`packets from outside the network take the stack: ${reason}`);
    for (const warning of daemon.warnings) parts.push(`note: ${warning}`);
  }
  return `${parts.join("\n\n")}\n`;
}

/** One line for each fact: what it is of, then what it says. */
function factsOf(status: Status, screen: Screen): string {
  const { daemon } = status;
  const lines: string[] = [];
  const fact = (name: string, value: string | undefined): void => {
    if (value !== undefined) lines.push(`${name.padEnd(9)}  ${value}`);
  };
  const isWell = status.running && daemon?.ready === true;
  fact(
    "daemon",
    toned(
      status.running
        ? `running (process ${status.pid}), ${isWell ? "ready" : `not ready: ${daemon?.phase ?? "starting"}`}`
        : "not running; what is in the kernel goes on forwarding",
      isWell ? "good" : "bad",
      screen,
    ),
  );
  if (daemon !== null) {
    const { uplink, network } = daemon;
    fact("node", uplink && `${uplink.publicIp} by ${uplink.name} (${uplink.address})`);
    fact("network", network && `${formatCidr(network.network)}, backend ${backendText(network.backend)}`);
    fact("subnet", daemon.subnet && `${daemon.subnet}, MTU ${daemon.mtu}`);
    fact(
      "lease",
      daemon.subnet && (daemon.leaseEndsAt ? `until ${daemon.leaseEndsAt}` : "a reservation, without end"),
    );
    fact("device", daemon.device);
    fact("etcd", status.running ? storeText(daemon, screen) : "not known: the daemon does not run");
    fact("fast path", `${fastPathText(daemon)}, attached by ${daemon.attach}`);
  }
  fact("pods", `${status.endpoints}`);
  if (daemon?.probes !== undefined) fact("probes", probesText(daemon.probes));
  return lines.join("\n");
}

function probesText(probes: NonNullable<DaemonStatus["probes"]>): string {
  const { everySeconds, reachable, unreachable, unknown, problem } = probes;
  if (problem !== undefined) return `none: ${problem}`;
  const counts = [`${reachable} of ${reachable + unreachable + unknown} peers answer`];
  if (unreachable > 0) counts.push(`${unreachable} do not`);
  if (unknown > 0) counts.push(`${unknown} not known yet`);
  return `${counts.join(", ")}; each asked every ${everySeconds} s`;
}

function storeText({ store, revision }: DaemonStatus, screen: Screen): string {
  const since = store.since === undefined ? "" : ` since ${store.since}`;
  if (store.connected) return `connected to ${store.endpoint}${since}, revision ${revision}`;
  const reason = store.error === undefined ? "" : `: ${printable(store.error)}`;
  return toned(`not connected${since}${reason}`, "bad", screen);
}

/** The setting, and what it has come to. */
function fastPathText({ fastPath, firewall }: DaemonStatus): string {
  if (firewall === undefined) return fastPath;
  return `${fastPath}: ${firewall.needsStack ? "pods' packets take the stack" : "on"}`;
}

function backendText(backend: object & { readonly type: string }): string {
  const { type, ...rest } = backend;
  // Commands are too long for this, and are in etcd.
  const isShown = (value: unknown): boolean =>
    !["undefined", "object"].includes(typeof value) && value !== false;
  const options = Object.entries(rest).filter(([, value]) => isShown(value));
  return [type, ...options.map(([name, value]) => (value === true ? name : `${name} ${value}`))].join(", ");
}

export function command(): Command {
  return showing(
    new Command("status").description(
      "The node, its subnet, its peers, its programs and what became of packets. Exit code 1 if the daemon does not run or is not ready.",
    ),
    {
      gather: ({ pinPath }) => gather(pinPath),
      render,
      exitCode: (status) => (status.running && status.daemon?.ready === true ? 0 : 1),
    },
  );
}
