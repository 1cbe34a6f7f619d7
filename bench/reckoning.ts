/**
 * What a cluster of any size costs its etcd, reckoned from what was measured on one size. Pure.
 *
 * Every node watches every lease, so all that matters grows with nodes times events or nodes times leases. What one such
 * pair costs is measured; the rest is multiplication, and each line of the page shows it. What is assumed: that a pair costs
 * the same in a larger cluster, and that etcd uses as many processors as it is given. Neither was measured.
 */

/** The phases of a run, in their order. */
export const PHASES = ["boot", "idle", "renewals", "changes", "burst", "rereads", "restarts"] as const;
export type PhaseName = (typeof PHASES)[number];

/** Median and 99th percentile, in milliseconds, of so many. */
export interface Delay {
  readonly p50: number;
  readonly p99: number;
  readonly count: number;
}

/** What one phase came to. */
export interface Phase {
  readonly phase: PhaseName;
  /** Nodes that did something of their own. */
  readonly count: number;
  readonly seconds: number;
  readonly etcd: {
    readonly processorSeconds: number;
    /** At the end of the phase. */
    readonly residentMb: number;
    /** Requests that are answered once: reads, transactions, grants. */
    readonly requests: number;
    /** Messages to watchers. */
    readonly messages: number;
    readonly sentBytes: number;
    readonly receivedBytes: number;
  };
  /** All nodes together. */
  readonly nodes: {
    readonly processorSeconds: number;
    readonly residentMb: number;
    /** Events that their watches told. */
    readonly events: number;
    /** From asking for a write until the desired state of a node had it. */
    readonly desired: Delay;
  };
  /** The one in a process of its own. */
  readonly agent: {
    readonly processorSeconds: number;
    readonly residentMb: number;
    readonly desired: Delay;
    /** The same until its round had written it to its kernel, which is in memory. */
    readonly kernel: Delay;
  };
}

/** A run, as it stands in the JSON. */
export interface FleetReport {
  readonly suite: "fleet";
  readonly nodes: number;
  /** Nodes that keep all leases. */
  readonly folding: number;
  readonly connections: number;
  readonly environment: Readonly<Record<string, string>>;
  /** etcd's memory before there were nodes, in MB. */
  readonly emptyResidentMb: number;
  readonly phases: readonly Phase[];
}

/** What one pair costs. */
export interface Unit {
  /** Seconds of etcd's processor time to tell one node of one event, the write's share included. */
  readonly tellSeconds: number;
  readonly tellBytes: number;
  /** To give one lease of a snapshot to one node. */
  readonly readSeconds: number;
  readonly readBytes: number;
  /** For each node and lease, when all nodes start. */
  readonly bootSeconds: number;
  readonly bootBytes: number;
  /** Of etcd's memory, for a node that watches. */
  readonly residentMb: number;
  /** Of the agent's processor time, for one change of a peer, without the kernel's part. */
  readonly agentSeconds: number;
}

/** How often a node renews its lease: an hour before the end of its day. */
const RENEWAL_SECONDS = 82_800;
/** Share of the nodes that change in a second. */
const CHANGING = 0.01 / 60;

/** Throws if the run lacks a phase. */
export function unitOf({ nodes, emptyResidentMb, phases }: FleetReport): Unit {
  const of = (name: PhaseName): Phase => {
    const found = phases.find(({ phase }) => phase === name);
    if (found === undefined) throw new Error(`the run has no ${name}: run it whole`);
    return found;
  };
  const [boot, idle, renewals, burst, rereads] = [
    of("boot"),
    of("idle"),
    of("renewals"),
    of("burst"),
    of("rereads"),
  ];
  /** Less what it costs to have nodes that do nothing. */
  const above = (phase: Phase, who: "etcd" | "agent"): number =>
    Math.max(0, phase[who].processorSeconds - (idle[who].processorSeconds * phase.seconds) / idle.seconds);
  const told = renewals.count * nodes;
  const read = rereads.count * nodes;
  return {
    tellSeconds: above(renewals, "etcd") / told,
    tellBytes: renewals.etcd.sentBytes / told,
    readSeconds: above(rereads, "etcd") / read,
    readBytes: rereads.etcd.sentBytes / read,
    bootSeconds: boot.etcd.processorSeconds / nodes ** 2,
    bootBytes: boot.etcd.sentBytes / nodes ** 2,
    residentMb: Math.max(0, boot.etcd.residentMb - emptyResidentMb) / nodes,
    agentSeconds: above(burst, "agent") / burst.count,
  };
}

/** What a cluster of so many nodes costs etcd. Seconds are of one processor. */
export interface Cost {
  readonly nodes: number;
  readonly bootSeconds: number;
  readonly bootBytes: number;
  /** All nodes read everything again, as after a restart of etcd. */
  readonly rereadSeconds: number;
  /** One node starts again: it reads all leases, and all nodes are told of its own. */
  readonly restartSeconds: number;
  /** Processors in use while 1 % of the nodes change in a minute, and bytes a second. */
  readonly changingProcessors: number;
  readonly changingBytes: number;
  readonly changesEachSecond: number;
  readonly renewalProcessors: number;
  readonly renewalsEachSecond: number;
  readonly residentMb: number;
  /** Of one agent's processor, while 1 % of the nodes change in a minute. */
  readonly agentShare: number;
}

export function costOf(unit: Unit, nodes: number): Cost {
  const pairs = nodes ** 2;
  const [changes, renewals] = [nodes * CHANGING, nodes / RENEWAL_SECONDS];
  return {
    nodes,
    bootSeconds: unit.bootSeconds * pairs,
    bootBytes: unit.bootBytes * pairs,
    rereadSeconds: unit.readSeconds * pairs,
    restartSeconds: (unit.readSeconds + unit.tellSeconds) * nodes,
    changingProcessors: changes * nodes * unit.tellSeconds,
    changingBytes: changes * nodes * unit.tellBytes,
    changesEachSecond: changes,
    renewalProcessors: renewals * nodes * unit.tellSeconds,
    renewalsEachSecond: renewals,
    residentMb: nodes * unit.residentMb,
    agentShare: changes * unit.agentSeconds,
  };
}

/** The figures of a run, in Markdown. */
export function fleetTable(report: FleetReport): string {
  const rows: [string, (phase: Phase) => string][] = [
    ["nodes that act", ({ count }) => whole(count)],
    ["lasted, s", ({ seconds }) => seconds.toFixed(1)],
    ["etcd: processor, s", ({ etcd }) => etcd.processorSeconds.toFixed(2)],
    ["etcd: resident, MB", ({ etcd }) => etcd.residentMb.toFixed(0)],
    ["etcd: requests", ({ etcd }) => whole(etcd.requests)],
    ["etcd: messages to watchers", ({ etcd }) => whole(etcd.messages)],
    ["etcd: sent, MB", ({ etcd }) => (etcd.sentBytes / 1e6).toFixed(2)],
    ["etcd: received, MB", ({ etcd }) => (etcd.receivedBytes / 1e6).toFixed(2)],
    ["all nodes: events", ({ nodes }) => whole(nodes.events)],
    ["all nodes: processor, s", ({ nodes }) => nodes.processorSeconds.toFixed(2)],
    ["all nodes: resident, MB", ({ nodes }) => nodes.residentMb.toFixed(0)],
    ["all nodes: to desired p50 / p99, ms", ({ nodes }) => delay(nodes.desired)],
    ["one agent: processor, s", ({ agent }) => agent.processorSeconds.toFixed(2)],
    ["one agent: resident, MB", ({ agent }) => agent.residentMb.toFixed(0)],
    ["one agent: to desired p50 / p99, ms", ({ agent }) => delay(agent.desired)],
    ["one agent: to its kernel p50 / p99, ms", ({ agent }) => delay(agent.kernel)],
  ];
  const { phases, environment } = report;
  const head = `| |${phases.map(({ phase }) => ` ${phase} |`).join("")}\n|---|${"---|".repeat(phases.length)}\n`;
  const body = rows.map(
    ([title, of]) => `| ${title} |${phases.map((phase) => ` ${of(phase)} |`).join("")}\n`,
  );
  const facts = Object.entries(environment).map(([name, value]) => `- ${name}: ${value}\n`);
  return `${head}${body.join("")}\n${facts.join("")}`;
}

/** What is reckoned from a run, for clusters of these sizes, in Markdown. */
export function costTable(report: FleetReport, sizes: readonly number[]): string {
  const unit = unitOf(report);
  const micro = (seconds: number): string => `${(seconds * 1e6).toFixed(2)} µs`;
  const bytes = (count: number): string => `${count.toFixed(0)} B`;
  const units = [
    `- to tell one node of one event: ${micro(unit.tellSeconds)} of etcd's processor, ${bytes(unit.tellBytes)}`,
    `- to give one node one lease of a snapshot: ${micro(unit.readSeconds)}, ${bytes(unit.readBytes)}`,
    `- for each node and lease when all start: ${micro(unit.bootSeconds)}, ${bytes(unit.bootBytes)}`,
    `- of etcd's memory for a node: ${unit.residentMb.toFixed(2)} MB`,
    `- of one agent's processor for a change of a peer, its kernel's part not included: ${micro(unit.agentSeconds)}`,
  ];
  const rows: [string, (cost: Cost) => string][] = [
    ["all start at once: etcd's processor", ({ bootSeconds }) => time(bootSeconds)],
    ["all start at once: etcd sends", ({ bootBytes }) => size(bootBytes)],
    ["all read again: etcd's processor", ({ rereadSeconds }) => time(rereadSeconds)],
    ["one node starts again: etcd's processor", ({ restartSeconds }) => time(restartSeconds)],
    ["1 % change in a minute: changes a second", ({ changesEachSecond }) => short(changesEachSecond)],
    ["1 % change in a minute: etcd's processors", ({ changingProcessors }) => short(changingProcessors)],
    ["1 % change in a minute: etcd sends, a second", ({ changingBytes }) => size(changingBytes)],
    ["1 % change in a minute: of one agent's processor", ({ agentShare }) => `${short(agentShare * 100)} %`],
    ["renewals a second", ({ renewalsEachSecond }) => short(renewalsEachSecond)],
    ["renewals: etcd's processors", ({ renewalProcessors }) => short(renewalProcessors)],
    ["etcd's memory for its watchers", ({ residentMb }) => size(residentMb * 1e6)],
  ];
  const costs = sizes.map((nodes) => costOf(unit, nodes));
  const head = `| nodes |${sizes.map((nodes) => ` ${whole(nodes)} |`).join("")}\n|---|${"---|".repeat(sizes.length)}\n`;
  const body = rows.map(([title, of]) => `| ${title} |${costs.map((cost) => ` ${of(cost)} |`).join("")}\n`);
  const from = `Reckoned from the run with ${whole(report.nodes)} nodes, where it costs:`;
  return `${from}\n\n${units.join("\n")}\n\n${head}${body.join("")}`;
}

function delay({ p50, p99, count }: Delay): string {
  return count === 0 ? "-" : `${p50.toFixed(1)} / ${p99.toFixed(1)}`;
}

function whole(count: number): string {
  return count.toLocaleString("en");
}

/** Two digits that count. */
function short(value: number): string {
  return value >= 100 ? whole(Math.round(value)) : value === 0 ? "0" : `${Number(value.toPrecision(2))}`;
}

function time(seconds: number): string {
  if (seconds < 1) return `${short(seconds * 1000)} ms`;
  if (seconds < 300) return `${short(seconds)} s`;
  return seconds < 3 * 3600 ? `${short(seconds / 60)} min` : `${short(seconds / 3600)} h`;
}

function size(bytes: number): string {
  if (bytes < 1e6) return `${short(bytes / 1e3)} kB`;
  return bytes < 1e9 ? `${short(bytes / 1e6)} MB` : `${short(bytes / 1e9)} GB`;
}
