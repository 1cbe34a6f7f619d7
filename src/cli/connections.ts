/** `twill connections`: what is open under an address of this node: pods' towards the outside, and towards pods elsewhere. */
import { Command, Option } from "commander";
import { formatIpv4, type Ipv4, type Prefix } from "../core/ipv4.ts";
import { type ConnectionRow, mapCapacity, mapUse, readConnections } from "../edge/dataplane.ts";
import { interfaceNames, requireConfig } from "./common.ts";
import { addresses, countOption, isIn, portOption, protocolName, protocolOption } from "./filters.ts";
import { type Column, duration, type Tone, table } from "./table.ts";
import { showing, type ViewOptions } from "./view.ts";

/** One end; the port is null where the protocol has none. */
interface End {
  readonly address: string;
  readonly port: number | null;
}

interface Connection {
  readonly protocol: string;
  readonly state: string;
  readonly pod: End;
  readonly public: End;
  readonly remote: End;
  readonly interface: string;
  readonly replied: boolean;
  readonly onStack: boolean;
  readonly ageSeconds: number;
  readonly idleSeconds: number;
}

interface Options extends ViewOptions {
  readonly pod?: Prefix;
  readonly remote?: Prefix;
  readonly protocol?: number;
  readonly port?: number;
  readonly state?: string;
  readonly count?: true;
}

interface Document {
  readonly masquerade: boolean;
  readonly count: number;
  readonly capacity: number;
  readonly connections?: readonly Connection[];
}

const STATES: Readonly<Record<ConnectionRow["state"], string>> = {
  CONNECTION_NEW: "new",
  CONNECTION_ESTABLISHED: "established",
  CONNECTION_CLOSING: "closing",
  CONNECTION_CLOSED: "closed",
  CONNECTION_GONE: "gone",
};
const TONES: Readonly<Record<string, Tone>> = { established: "good", new: "notice" };

const end = ({ address, port }: End): string => (port === null ? address : `${address}:${port}`);

const COLUMNS: readonly Column<Connection>[] = [
  { head: "PROTO", value: ({ protocol }) => protocol, key: true },
  { head: "STATE", value: ({ state }) => state, tone: ({ state }) => TONES[state] },
  { head: "POD", value: ({ pod }) => end(pod), key: true },
  { head: "AS", value: (connection) => end(connection.public) },
  { head: "REMOTE", value: ({ remote }) => end(remote), key: true },
  { head: "BY", value: (connection) => connection.interface },
  { head: "WAY", value: ({ onStack }) => (onStack ? "stack" : "fast") },
  { head: "AGE", value: ({ ageSeconds }) => duration(ageSeconds) },
  { head: "IDLE", value: ({ idleSeconds }) => duration(idleSeconds) },
];

function accepts(options: Options): (row: ConnectionRow) => boolean {
  const { pod, remote, protocol, port, state } = options;
  return (row) =>
    (protocol === undefined || row.protocol === protocol) &&
    (state === undefined || STATES[row.state] === state) &&
    (port === undefined || row.podPort === port || row.port === port || row.remotePort === port) &&
    isIn(pod, row.pod) &&
    isIn(remote, row.remote);
}

/** Rows as people read them: a pod's together, then by where they go. */
function order(a: ConnectionRow, b: ConnectionRow): number {
  return (
    a.pod - b.pod ||
    a.protocol - b.protocol ||
    a.remote - b.remote ||
    a.remotePort - b.remotePort ||
    a.podPort - b.podPort ||
    a.port - b.port
  );
}

function gather(options: Options): Document {
  const { pinPath, pod, remote, protocol, port, state } = options;
  const masquerade = requireConfig(pinPath).masquerade !== 0;
  if (options.count && [pod, remote, protocol, port, state].every((filter) => filter === undefined)) {
    const { entries, capacity } = mapUse(pinPath, "connections4");
    return { masquerade, count: entries, capacity };
  }
  const isWanted = accepts(options);
  const rows: ConnectionRow[] = [];
  for (const row of readConnections(pinPath)) if (isWanted(row)) rows.push(row);
  const capacity = mapCapacity(pinPath, "connections4");
  if (options.count) return { masquerade, count: rows.length, capacity };
  const { nameOf } = interfaceNames();
  // The kernel stamps rows with the clock that this is.
  const now = Number(process.hrtime.bigint());
  const since = (ns: number): number => Math.max(0, Math.round((now - ns) / 1e6) / 1000);
  // Many rows, few addresses.
  const texts = new Map<Ipv4, string>();
  const textOf = (address: Ipv4): string => {
    let text = texts.get(address);
    if (text === undefined) {
      text = formatIpv4(address);
      texts.set(address, text);
    }
    return text;
  };
  const of = (address: Ipv4, port: number): End => ({
    address: textOf(address),
    port: port === 0 ? null : port,
  });
  const connections = rows.sort(order).map((row): Connection => {
    return {
      protocol: protocolName(row.protocol),
      state: STATES[row.state],
      pod: of(row.pod, row.podPort),
      public: of(row.address, row.port),
      remote: of(row.remote, row.remotePort),
      interface: nameOf(row.ifindex),
      replied: row.replied,
      onStack: row.onStack,
      ageSeconds: since(row.sinceNs),
      idleSeconds: since(row.seenNs),
    };
  });
  return { masquerade, count: connections.length, capacity, connections };
}

export function command(): Command {
  const made = new Command("connections")
    .description(
      "The masqueraded connections: a pod, the address and port of this node it has outside, and whom it speaks to. Filters add up.",
    )
    .addOption(
      new Option("--pod <address>", "only of this pod, or of pods in this network").argParser(addresses),
    )
    .addOption(
      new Option("--remote <address>", "only with this one, or with this network").argParser(addresses),
    )
    .addOption(protocolOption())
    .addOption(portOption("only with this port: the pod's, the remote's or ours outside"))
    .addOption(new Option("--state <state>", "only in this one").choices(Object.values(STATES)))
    .addOption(countOption());
  return showing<Options, Document>(made, {
    gather,
    render({ masquerade, count, connections }, screen) {
      const note = masquerade ? "" : "masquerade is off: twilld was not started with --ip-masq\n";
      return `${connections === undefined ? count : `${note}${table(COLUMNS, connections, screen)}`}\n`;
    },
  });
}
