/**
 * `twill monitor`: what happens, as it happens.
 *
 * Packets that the programs drop, and flows that they leave to the stack, come from the ring of events; peers, programs
 * on interfaces and the node's own lease are looked at once a second and told where they differ. A ring has one
 * reader: a second monitor of the same pin path is refused.
 */
import { setPriority } from "node:os";
import { Command, InvalidArgumentError, Option } from "commander";
import { type Change, changesOf } from "../core/changes.ts";
import {
  contains,
  formatCidr,
  formatIpv4,
  type Ipv4,
  type Prefix,
  parseCidr,
  parseIpv4,
} from "../core/ipv4.ts";
import {
  type Packet,
  type PacketLine,
  packetLine,
  readFrame,
  readInner,
  readPacket,
  type Tunnel,
} from "../core/packet.ts";
import { findAttachments, readRows } from "../edge/dataplane.ts";
import { EVENT_VERDICTS, EventStream, HOOKS, type PacketEvent } from "../edge/events.ts";
import { PcapFile } from "../edge/pcapng.ts";
import { enterMonitor, leaveRundir, runningDaemon } from "../edge/rundir.ts";
import {
  interfaceNames,
  pinPathOption,
  Refusal,
  readDaemon,
  requireConfig,
  requirePrivilege,
} from "./common.ts";
import { printable, type Screen, type Tone, toned } from "./table.ts";
import { SCHEMA, screenOf } from "./view.ts";

/** Milliseconds between two looks at what is no packet. */
const LOOK_EVERY = 1000;
/** Niceness. */
const LEAST_PRIORITY = 19;
/** Bytes that may wait for a slow reader of our output; beyond them lines are left out, and counted. */
const BACKLOG = 1 << 20;
/** Of a packet that an event has; see EVENT_BYTES of bpf/abi.h. */
const SNAPSHOT = 256;
const KINDS = ["drop", "flow", "lease", "attachment", "node"] as const;
type Kind = (typeof KINDS)[number];

/** One line of `--json`; docs/json.md has the schema. */
type Line =
  | {
      readonly event: "drop" | "flow";
      readonly hook: string;
      readonly verdict: string;
      readonly interface: string;
      readonly length: number;
      readonly packet: PacketLine | null;
      readonly inner: PacketLine | null;
    }
  | {
      readonly event: "lease";
      readonly change: Change;
      readonly subnet: string;
      readonly publicIp: string;
      readonly reach: string;
    }
  | {
      readonly event: "attachment";
      readonly change: Change;
      readonly interface: string;
      readonly hook: string;
    }
  | {
      readonly event: "node";
      readonly running: boolean;
      readonly phase: string | null;
      readonly ready: boolean;
      readonly subnet: string | null;
    }
  | { readonly event: "missed"; readonly suppressed: number; readonly lost: number };

interface Options {
  readonly pinPath: string;
  readonly json?: boolean;
  readonly pcap?: string;
  readonly count?: number;
  readonly event?: readonly Kind[];
  readonly verdict?: readonly string[];
  readonly hook?: readonly string[];
  readonly address?: Prefix;
  readonly port?: number;
}

/** A packet of an event, and where it is a tunnel packet what is in it. */
interface Seen {
  readonly packet: Packet | undefined;
  readonly inner: Packet | undefined;
}

function see(event: PacketEvent, kind: Tunnel): Seen {
  const frame = readFrame(event.bytes);
  if (frame === undefined) return { packet: undefined, inner: undefined };
  const tunnel = readInner(frame.ip, kind);
  const within = tunnel === undefined ? undefined : readFrame(tunnel);
  return { packet: readPacket(frame.ip), inner: within && readPacket(within.ip) };
}

/** Whether a packet's event is asked for. An address or port is that of either end, also within a tunnel. */
function wants(options: Options, event: PacketEvent, { packet, inner }: Seen): boolean {
  const { verdict, hook, address, port } = options;
  const packets = [packet, inner].filter((each) => each !== undefined);
  const has = (accept: (packet: Packet) => boolean): boolean => packets.some(accept);
  const at = (ip: Ipv4): boolean => address !== undefined && contains(address, ip);
  return (
    (verdict === undefined || verdict.includes(event.verdict)) &&
    (hook === undefined || hook.includes(event.hook)) &&
    (address === undefined || has(({ source, destination }) => at(source) || at(destination))) &&
    (port === undefined ||
      has(({ sourcePort, destinationPort }) => sourcePort === port || destinationPort === port))
  );
}

function packetText(packet: PacketLine): string {
  const { source, destination, protocol, sourcePort, destinationPort, length } = packet;
  const end = (address: string, port: number | null): string =>
    port === null ? address : `${address}:${port}`;
  return `${protocol} ${end(source, sourcePort)} > ${end(destination, destinationPort)}, ${length} bytes`;
}

/** The words of a line, without its time. */
function render(line: Line, screen: Screen): string {
  const tone: Tone = line.event === "drop" || line.event === "missed" ? "bad" : "notice";
  const head = (text: string): string => toned(text.padEnd(18), tone, screen);
  switch (line.event) {
    case "drop":
    case "flow": {
      const what = line.packet === null ? `${line.length} bytes that are no IPv4` : packetText(line.packet);
      const within = line.inner === null ? "" : `; in it ${packetText(line.inner)}`;
      const name = printable(line.interface);
      return `${head(line.verdict)} ${line.hook.padEnd(12)} ${name.padEnd(12)} ${what}${within}`;
    }
    case "lease":
      return `${head(`lease ${line.change}`)} ${line.subnet} of ${line.publicIp}, by ${line.reach}`;
    case "attachment":
      return `${head(`program ${line.change}`)} ${line.hook} on ${printable(line.interface)}`;
    case "node": {
      const subnet = line.subnet === null ? "" : `, subnet ${printable(line.subnet)}`;
      const daemon = line.running ? "twilld runs" : "twilld does not run";
      const phase = line.phase === null ? "" : `, ${printable(line.phase)}`;
      return `${head("node")} ${daemon}${phase}, ${line.ready ? "ready" : "not ready"}${subnet}`;
    }
    case "missed":
      return `${head("missed")} ${line.suppressed} events beyond what is reported in a second, ${line.lost} without room`;
  }
}

/** What is no packet, as it is now. */
interface State {
  readonly leases: ReadonlyMap<string, Line>;
  readonly attachments: ReadonlyMap<string, Line>;
  readonly node: Line;
}

function look(pinPath: string): State {
  const { indexes, nameOf } = interfaceNames();
  const leases = new Map<string, Line>();
  for (const row of readRows(pinPath, "subnets4")) {
    const subnet = formatCidr({ address: row.subnet, length: row.prefixLength });
    const reach = row.reach.slice("REACH_".length).toLowerCase();
    const publicIp = formatIpv4(row.publicIp);
    leases.set(subnet, { event: "lease", change: "added", subnet, publicIp, reach });
  }
  const attachments = new Map<string, Line>();
  for (const { hook, ifindex } of findAttachments(pinPath, indexes)) {
    const line: Line = { event: "attachment", change: "added", interface: nameOf(ifindex), hook };
    attachments.set(`${hook}-${ifindex}`, line);
  }
  const daemon = readDaemon(pinPath);
  const running = runningDaemon(pinPath) !== undefined;
  const node: Line = {
    event: "node",
    running,
    phase: daemon?.phase ?? null,
    ready: running && daemon?.ready === true,
    subnet: daemon?.subnet ?? null,
  };
  return { leases, attachments, node };
}

function differences(before: State, after: State): Line[] {
  const tell = (rows: ReturnType<typeof changesOf<Line>>): Line[] =>
    rows.map(({ change, row }) => ({ ...row, change }) as Line);
  return [
    ...tell(changesOf(before.attachments, after.attachments)),
    ...tell(changesOf(before.leases, after.leases)),
    ...changesOf(new Map([["", before.node]]), new Map([["", after.node]])).map(({ row }) => row),
  ];
}

/** Runs until it is told to end, has shown `--count` events, or there is nothing left to watch. */
async function monitor(options: Options): Promise<void> {
  requirePrivilege();
  const { pinPath, json = false } = options;
  let tunnel: Tunnel = requireConfig(pinPath);
  if (!EventStream.isAt(pinPath))
    throw new Refusal(
      `the programs at ${pinPath} are of a version without events: restart twilld to replace them`,
    );
  const other = enterMonitor(pinPath);
  if (other !== undefined) {
    throw new Refusal(
      `twill monitor runs already on ${pinPath} (process ${other}), and events have one reader: use that one, or end it`,
    );
  }
  // Whoever watches a flood must not take the processor from what forwards; what we are late for is counted.
  setPriority(LEAST_PRIORITY);
  process.once("exit", () => leaveRundir(pinPath, "monitor"));
  const pcap = options.pcap === undefined ? undefined : new PcapFile(options.pcap, SNAPSHOT);

  const screen = screenOf(process.stdout);
  // The kernel's clock of events, and the one on the wall.
  const bootNs = BigInt(Date.now()) * 1_000_000n - process.hrtime.bigint();
  let left = options.count ?? Number.POSITIVE_INFINITY;
  let unwritten = 0;
  let names = interfaceNames();
  let end: (reason?: string) => void = () => undefined;
  const ended = new Promise<string | undefined>((resolve) => {
    end = resolve;
  });

  const print = (line: Line, timeNs: bigint): void => {
    if (process.stdout.writableLength > BACKLOG) {
      unwritten += 1;
      return;
    }
    const time = new Date(Number(timeNs / 1_000_000n)).toISOString();
    process.stdout.write(
      json
        ? `${JSON.stringify({ schema: SCHEMA, command: "monitor", time, ...line })}\n`
        : `${time.slice(11, 23)} ${render(line, screen)}\n`,
    );
  };
  const now = (): bigint => bootNs + process.hrtime.bigint();
  const show = (line: Line, timeNs: bigint): void => {
    if (left <= 0) return;
    print(line, timeNs);
    left -= 1;
    if (left <= 0) end();
  };

  const isFiltered = [options.verdict, options.hook, options.address, options.port].some(
    (filter) => filter !== undefined,
  );
  const shows = (kind: Kind): boolean => options.event?.includes(kind) ?? true;
  const onPacket = (event: PacketEvent): void => {
    const kind = event.verdict === "stack_flow" ? "flow" : "drop";
    const seen = see(event, tunnel);
    if (left <= 0 || !shows(kind) || !wants(options, event, seen)) return;
    const timeNs = bootNs + event.timeNs;
    const { hook, verdict, length, bytes, ifindex } = event;
    const name = names.nameOf(ifindex);
    pcap?.write({ name, time: timeNs, length, bytes, comment: `${hook} ${verdict}` });
    show(
      {
        event: kind,
        hook,
        verdict,
        interface: name,
        length,
        packet: (seen.packet && packetLine(seen.packet)) ?? null,
        inner: (seen.inner && packetLine(seen.inner)) ?? null,
      },
      timeNs,
    );
  };

  let stream = new EventStream(pinPath, onPacket);
  let before = look(pinPath);
  const tick = (): void => {
    // Programs of another layout have a ring of their own.
    if (!stream.isCurrent()) {
      stream.close();
      if (!EventStream.isAt(pinPath)) {
        end(`nothing of Twill is at ${pinPath} any more`);
        return;
      }
      stream = new EventStream(pinPath, onPacket);
      tunnel = requireConfig(pinPath);
    }
    stream.renew();
    names = interfaceNames();
    const { suppressed, lost } = stream.missed();
    if (suppressed + lost + unwritten > 0)
      print({ event: "missed", suppressed, lost: lost + unwritten }, now());
    unwritten = 0;
    const after = look(pinPath);
    for (const line of differences(before, after)) {
      if (line.event !== "missed" && !isFiltered && shows(line.event)) show(line, now());
    }
    before = after;
  };
  const timer = setInterval(() => {
    try {
      tick();
    } catch (error) {
      end(error instanceof Error ? error.message : String(error));
    }
  }, LOOK_EVERY);
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => end());
  // Not among the lines: those are for whoever reads on.
  process.stderr.write(`watching ${pinPath}; Ctrl-C ends it\n`);

  const reason = await ended;
  clearInterval(timer);
  stream.close();
  pcap?.close();
  leaveRundir(pinPath, "monitor");
  if (reason !== undefined) throw new Refusal(reason);
}

function oneOf<Name extends string>(
  names: readonly Name[],
): (text: string, before?: readonly Name[]) => Name[] {
  return (text, before = []) => {
    const chosen = text.split(",").map((part) => {
      const known = names.find((name) => name === part);
      if (known === undefined) throw new InvalidArgumentError(`It is one of ${names.join(", ")}.`);
      return known;
    });
    return [...before, ...chosen];
  };
}

function addressOrCidr(text: string): Prefix {
  const address = parseIpv4(text);
  const prefix = address === undefined ? parseCidr(text) : { address, length: 32 };
  if (prefix === undefined)
    throw new InvalidArgumentError("It is an IPv4 address, or one with a prefix length.");
  return prefix;
}

function number(least: number, most: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (!/^\d+$/.test(text) || value < least || value > most)
      throw new InvalidArgumentError(`It is a number from ${least} to ${most}.`);
    return value;
  };
}

export function command(): Command {
  const command = new Command("monitor");
  return command
    .description(
      "Shows each packet that the programs drop, each flow that is put on the slow path, and changes of peers, programs and the node, as they happen.",
    )
    .addOption(pinPathOption())
    .option("--json", "an object a line (docs/json.md has the schema)")
    .option("--pcap <file>", "packets also into this file, for tcpdump, tshark or Wireshark")
    .addOption(
      new Option("--count <n>", "end after so many events").argParser(number(1, Number.MAX_SAFE_INTEGER)),
    )
    .addOption(
      new Option("--event <kind>", `only ${KINDS.join(", ")}; with commas, or repeated`).argParser(
        oneOf(KINDS),
      ),
    )
    .addOption(
      new Option("--verdict <verdict>", "only packets with this verdict, such as drop_forged").argParser(
        oneOf(EVENT_VERDICTS),
      ),
    )
    .addOption(new Option("--hook <hook>", `only packets at ${HOOKS.join(", ")}`).argParser(oneOf(HOOKS)))
    .addOption(
      new Option(
        "--address <address>",
        "only packets from or to this address or CIDR, in a tunnel too",
      ).argParser(addressOrCidr),
    )
    .addOption(new Option("--port <port>", "only packets from or to this port").argParser(number(0, 65535)))
    .action(() => monitor(command.opts<Options>()));
}
