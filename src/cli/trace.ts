/**
 * `twill trace`: what would become of a packet, hop by hop.
 *
 * A made packet runs through the programs in force (src/edge/rehearsal.ts says how that leaves the node as it is), and
 * between them follows the kernel's tables (src/core/walk.ts).
 */
import { dirname, join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { Command, CommanderError, InvalidArgumentError, Option } from "commander";
import { DIRECTIONS, type EndpointRow, type Hook, type SubnetRow } from "../core/image.ts";
import { contains, formatIpv4, type Ipv4, maskOf, type Prefix, parseIpv4 } from "../core/ipv4.ts";
import {
  buildFrame,
  buildPacket,
  buildPlainTunnel,
  buildTunnel,
  type Ends,
  type Packet,
  type PacketLine,
  type PacketSpec,
  PROTOCOLS,
  packetLine,
  readFrame,
  readInner,
  readPacket,
  type Tunnel,
} from "../core/packet.ts";
import { type End, macOf, type Node, peerOf, type Walk, Walker } from "../core/walk.ts";
import { type Tuple, translatedTuples } from "../edge/conntrack.ts";
import { findAttachments, readRows } from "../edge/dataplane.ts";
import { type Netlink, openNetlink } from "../edge/netlink.ts";
import { Rehearsal } from "../edge/rehearsal.ts";
import { pinPathOption, Refusal, requireConfig, requirePrivilege } from "./common.ts";
import { printable, type Screen, type Tone, toned } from "./table.ts";
import { SCHEMA, screenOf } from "./view.ts";

const OBJECT = join(dirname(fileURLToPath(import.meta.url)), "..", "..", "..", "dist", "bpf", "twill.bpf.o");
/** Of peers' frames to us where the neighbour's MAC is not known; no program looks at it. */
const SOME_MAC = "02:00:00:00:00:01";
const TCP_FLAGS: Readonly<Record<string, number>> = { fin: 1, syn: 2, rst: 4, psh: 8, ack: 16, urg: 32 };

interface Options {
  readonly pinPath: string;
  readonly json?: boolean;
  readonly batch?: boolean;
  readonly fromPeer?: boolean;
  readonly outer?: Ipv4;
  readonly outerTos: number;
  readonly proto: number;
  readonly sport: number;
  readonly dport?: number;
  readonly length: number;
  readonly ttl: number;
  readonly tos: number;
  readonly id: number;
  readonly df?: boolean;
  readonly fragment?: number;
  readonly more?: boolean;
  readonly options: Uint8Array;
  readonly tcpFlags: number;
  readonly reply?: boolean;
}

/** Headers of a packet; in a tunnel also those of what is in it. docs/json.md has the schema. */
interface Headers extends PacketLine {
  readonly tos: number;
  readonly id: number;
  readonly dontFragment: boolean;
  readonly moreFragments: boolean;
  readonly fragmentOffset: number;
  readonly macTo: string;
  readonly macFrom: string;
  readonly inner: Headers | null;
}

interface HopDocument {
  readonly at: string;
  readonly interface: string | null;
  readonly verdict: string | null;
  readonly why: string;
  readonly packet: Headers | null;
}

/** What `--json` prints. */
interface Document {
  readonly packet: Headers | null;
  readonly hops: readonly HopDocument[];
  readonly end: {
    readonly what: End["what"];
    readonly reason: string | null;
    readonly interface: string | null;
    readonly to: string | null;
    readonly packet: Headers | null;
  };
}

/** This node as it is now, and the programs to try packets on. */
class Tracer {
  readonly #rehearsal: Rehearsal;
  readonly #netlink: Netlink;
  readonly #node: Node;
  readonly #subnet: Prefix;

  constructor(pinPath: string) {
    requireConfig(pinPath);
    this.#rehearsal = Rehearsal.open(pinPath, OBJECT);
    this.#netlink = openNetlink();
    const { config } = this.#rehearsal;
    this.#subnet = {
      address: config.subnet4,
      length:
        Array.from({ length: 33 }, (_, length) => length).find(
          (length) => maskOf(length) === config.subnet4_mask,
        ) ?? 32,
    };
    const links = new Map(this.#netlink.links().map((link) => [link.index, link]));
    const attached = findAttachments(pinPath, links.keys());
    const endpoints = readRows(pinPath, "endpoints4");
    this.#node = {
      config,
      links,
      subnets: readRows(pinPath, "subnets4"),
      endpoints: new Map(endpoints.map((row): [Ipv4, EndpointRow] => [row.address, row])),
      neighbours: this.#netlink.neighbours(),
      fdb: this.#netlink.fdb(),
      hooksOf: (ifindex, direction) =>
        attached
          .filter((row) => row.ifindex === ifindex && DIRECTIONS[row.hook as Hook] === direction)
          .map(({ hook }) => hook),
      run: (hook, ifindex, frame) => this.#rehearsal.run(hook, ifindex, frame),
      routeTo: (address, source) => this.#netlink.routeTo(address, source === 0 ? {} : { source }),
      translationOf: translations(),
    };
  }

  /** Follows a packet from where it would appear. Throws Refusal if that is nowhere here. */
  trace(source: Ipv4, destination: Ipv4, options: Options): Document {
    const ip = buildPacket(specOf(source, destination, options));
    const walker = new Walker(this.#node);
    const start = options.fromPeer
      ? this.#fromPeer(source, ip, options)
      : this.#fromHere(source, destination, ip);
    const walk = start === undefined ? walker.leave(ip) : walker.arrive(start.ifindex, start.frame);
    this.#rehearsal.reset();
    return this.#document(start?.frame ?? buildFrame(SOME_MAC, SOME_MAC, ip), walk);
  }

  close(): void {
    this.#netlink.close();
    this.#rehearsal.close();
  }

  /** From a pod of this node; undefined for the node's own addresses. */
  #fromHere(
    source: Ipv4,
    destination: Ipv4,
    ip: Uint8Array,
  ): { readonly ifindex: number; readonly frame: Uint8Array } | undefined {
    const { endpoints, links } = this.#node;
    const sender = endpoints.get(source);
    if (sender === undefined) {
      if (this.#node.routeTo(source, 0)?.local === true) return undefined;
      throw new Refusal(
        contains(this.#subnet, source)
          ? `${formatIpv4(source)} is a pod that this node does not know (yet): 'twill endpoints' lists those it knows`
          : `${formatIpv4(source)} is neither a pod nor an address of this node: add --from-peer for what comes from the network`,
      );
    }
    // A pod sends to a neighbour on its bridge itself, to all others by its gateway.
    const neighbour = endpoints.get(destination);
    const bridge = links.get(sender.ifindex)?.masterIndex;
    const isBeside =
      bridge !== undefined && neighbour && links.get(neighbour.ifindex)?.masterIndex === bridge;
    const to = isBeside ? neighbour.mac : sender.gatewayMac;
    return { ifindex: sender.ifindex, frame: buildFrame(to, sender.mac, ip) };
  }

  /** From the network: in a tunnel packet where the peer uses one, else as it is. */
  #fromPeer(
    source: Ipv4,
    ip: Uint8Array,
    options: Options,
  ): { readonly ifindex: number; readonly frame: Uint8Array } {
    const { subnets, links, config } = this.#node;
    const { source_port_min: sourcePort } = this.#rehearsal.config;
    const peer: SubnetRow | undefined =
      peerOf(subnets, source) ?? subnets.find(({ publicIp }) => publicIp === source);
    const outer = options.outer ?? (peer?.reach === "REACH_DIRECT" ? undefined : peer?.publicIp);
    const from = outer ?? peer?.publicIp ?? source;
    const route = this.#node.routeTo(from, 0);
    const ifindex = peer?.publicIp === from ? peer.ifindex : route?.outIndex;
    const link = ifindex === undefined ? undefined : links.get(ifindex);
    if (link?.mac === undefined)
      throw new Refusal(
        `no Ethernet interface of this node leads to ${formatIpv4(from)}, by which it could come`,
      );
    const neighbour = macOf(this.#node, link.index, peer?.nextHop ?? route?.gateway ?? from) ?? SOME_MAC;
    if (outer === undefined) return { ifindex: link.index, frame: buildFrame(link.mac, neighbour, ip) };
    const overlay = links.get(config.overlay_ifindex);
    if (overlay?.mac === undefined) throw new Refusal("this node has no tunnel: leave out --outer");
    const { vtep4: destination, tunnel_port: port, vni, tunnel } = config;
    const spec = { source: outer, destination, port, vni, ttl: 64, tos: options.outerTos };
    const made =
      tunnel === "TUNNEL_VXLAN"
        ? buildTunnel({ ...spec, sourcePort }, buildFrame(overlay.mac, peer?.vtepMac ?? SOME_MAC, ip))
        : buildPlainTunnel({ ...spec, sourcePort: port }, tunnel === "TUNNEL_UDP", ip);
    return { ifindex: link.index, frame: buildFrame(link.mac, neighbour, made) };
  }

  #document(sent: Uint8Array, walk: Walk): Document {
    const nameOf = (ifindex: number | undefined): string | null =>
      ifindex === undefined ? null : (this.#node.links.get(ifindex)?.name ?? `#${ifindex}`);
    const headers = (frame: Uint8Array): Headers | null => headersOf(frame, this.#node.config);
    const { end } = walk;
    return {
      packet: headers(sent),
      hops: walk.hops.map(({ at, ifindex, verdict, why, frame }) => ({
        at,
        interface: nameOf(ifindex),
        verdict: verdict ?? null,
        why,
        packet: headers(frame),
      })),
      end: {
        what: end.what,
        reason: "reason" in end ? end.reason : null,
        interface: "ifindex" in end ? nameOf(end.ifindex) : null,
        to: "to" in end ? formatIpv4(end.to) : null,
        packet: headers(walk.frame),
      },
    };
  }
}

function specOf(source: Ipv4, destination: Ipv4, options: Options): PacketSpec {
  const { fragment = 0, proto: protocol } = options;
  return {
    source,
    destination,
    protocol,
    sourcePort: options.sport,
    destinationPort: options.dport ?? (protocol === PROTOCOLS.udp ? 53 : 80),
    length: options.length,
    ttl: options.ttl,
    tos: options.tos,
    id: options.id,
    dontFragment: options.df === true,
    // Only a first fragment is one by what follows it.
    moreFragments: options.more === true || options.fragment === 0,
    fragmentOffset: fragment,
    options: options.options,
    tcpFlags: options.tcpFlags,
    reply: options.reply === true,
  };
}

/** What the stack makes of connections that it translates, as connection tracking has it now. */
function translations(): Node["translationOf"] {
  const keyOf = ({ source, destination, sourcePort, destinationPort, protocol }: Tuple): string =>
    `${source} ${destination} ${sourcePort} ${destinationPort} ${protocol}`;
  const ends = new Map<string, Ends>();
  let tuples: readonly Tuple[] = [];
  try {
    tuples = translatedTuples();
  } catch {
    // A kernel without connection tracking translates nothing, and one that can't tell is as if it did not.
  }
  const mirrored = (tuple: Tuple): Ends => ({
    source: tuple.destination,
    destination: tuple.source,
    sourcePort: tuple.destinationPort,
    destinationPort: tuple.sourcePort,
  });
  // Each connection is two of them, one for each direction.
  for (let at = 0; at + 1 < tuples.length; at += 2) {
    const [original, reply] = [tuples[at] as Tuple, tuples[at + 1] as Tuple];
    ends.set(keyOf(original), mirrored(reply));
    ends.set(keyOf(reply), mirrored(original));
  }
  return ({ source, destination, sourcePort = 0, destinationPort = 0, protocol, icmp }) =>
    icmp !== undefined && sourcePort === 0
      ? undefined
      : ends.get(keyOf({ source, destination, sourcePort, destinationPort, protocol }));
}

function headersOf(frame: Uint8Array, kind: Tunnel | undefined): Headers | null {
  const ethernet = readFrame(frame);
  const packet: Packet | undefined = ethernet && readPacket(ethernet.ip);
  if (ethernet === undefined || packet === undefined) return null;
  const tunnel = kind && readInner(ethernet.ip, kind);
  return {
    ...packetLine(packet),
    tos: packet.tos,
    id: packet.id,
    dontFragment: packet.dontFragment,
    moreFragments: packet.moreFragments,
    fragmentOffset: packet.fragmentOffset,
    macTo: ethernet.to,
    macFrom: ethernet.from,
    inner: tunnel === undefined ? null : headersOf(tunnel, undefined),
  };
}

function packetText(packet: Headers | null): string {
  if (packet === null) return "no IPv4";
  const { source, destination, protocol, sourcePort, destinationPort, length, ttl, tos, inner } = packet;
  const end = (address: string, port: number | null): string =>
    port === null || protocol === "icmp" ? address : `${address}:${port}`;
  const marks = [
    `${length} bytes`,
    `ttl ${ttl}`,
    ...(tos === 0 ? [] : [`tos 0x${tos.toString(16)}`]),
    ...(packet.dontFragment ? ["df"] : []),
    ...(packet.moreFragments || packet.fragmentOffset > 0 ? [`fragment at ${packet.fragmentOffset}`] : []),
  ];
  const text = `${protocol} ${end(source, sourcePort)} > ${end(destination, destinationPort)}, ${marks.join(", ")}`;
  return inner === null ? text : `${text}; in it ${packetText(inner)}`;
}

const ANSWERS: Readonly<Record<string, string>> = {
  ttl: "the stack answers that its time is exceeded",
  too_big: "the stack answers that fragmentation is needed",
  unreachable: "the stack answers that the destination is unreachable",
};

function endText({ end }: Document): { readonly text: string; readonly tone: Tone } {
  const name = end.interface === null ? "" : printable(end.interface);
  switch (end.what) {
    case "sent":
      return { text: `leaves ${name} for ${end.to}`, tone: "good" };
    case "delivered":
      return { text: `reaches pod ${end.to} by ${name}`, tone: "good" };
    case "local":
      return { text: "is for this node itself", tone: "good" };
    case "dropped":
      return { text: "dropped", tone: "bad" };
    case "held":
      return { text: "kept until its first fragment comes", tone: "notice" };
    case "answered":
      return { text: ANSWERS[end.reason ?? ""] ?? "answered by the stack", tone: "bad" };
    case "fragmented":
      return { text: `cut into pieces by the stack, which leave by ${name}`, tone: "notice" };
    case "discarded":
      return { text: "discarded by the kernel", tone: "bad" };
  }
}

function render(document: Document, screen: Screen): string {
  const lines = [packetText(document.packet)];
  let before = JSON.stringify({ ...document.packet, macTo: "", macFrom: "" });
  for (const hop of document.hops) {
    const where = hop.interface === null ? hop.at : `${hop.at} on ${printable(hop.interface)}`;
    const verdict = hop.verdict === null ? "" : `${toned(hop.verdict, toneOf(hop.verdict), screen)}: `;
    lines.push(`  ${where.padEnd(26)} ${verdict}${printable(hop.why)}`);
    const now = JSON.stringify({ ...hop.packet, macTo: "", macFrom: "" });
    if (now !== before) lines.push(`  ${"".padEnd(26)} now ${packetText(hop.packet)}`);
    before = now;
  }
  const { text, tone } = endText(document);
  const passes = (place: string): boolean => document.hops.some(({ at }) => at === place);
  const note = !passes("stack")
    ? ""
    : passes("nat")
      ? "\n(if the stack's packet filter lets it through)"
      : "\n(if the stack's packet filter and address translation let it through as it is)";
  return `${lines.join("\n")}\n${toned(text, tone, screen)}${note}\n`;
}

function toneOf(verdict: string): Tone {
  return verdict.startsWith("drop_") ? "bad" : verdict.startsWith("stack_") ? "notice" : "good";
}

function address(text: string): Ipv4 {
  const value = parseIpv4(text);
  if (value === undefined) throw new InvalidArgumentError("It is an IPv4 address.");
  return value;
}

function number(least: number, most: number, multiple = 1): (text: string) => number {
  return (text) => {
    const value = /^0x[\da-f]+$/i.test(text) || /^\d+$/.test(text) ? Number(text) : Number.NaN;
    if (!(value >= least && value <= most) || value % multiple !== 0) {
      const of = multiple === 1 ? "a number" : `a multiple of ${multiple}`;
      throw new InvalidArgumentError(`It is ${of} from ${least} to ${most}.`);
    }
    return value;
  };
}

function protocol(text: string): number {
  return PROTOCOLS[text.toLowerCase()] ?? number(0, 255)(text);
}

function tcpFlags(text: string): number {
  return text.split(",").reduce((sum, name) => {
    const flag = TCP_FLAGS[name.toLowerCase()];
    if (flag === undefined)
      throw new InvalidArgumentError(`It is some of ${Object.keys(TCP_FLAGS).join(", ")}.`);
    return sum | flag;
  }, 0);
}

function ipOptions(text: string): Uint8Array {
  if (!/^([\da-f]{8}){0,10}$/i.test(text))
    throw new InvalidArgumentError("It is up to 40 bytes in hexadecimal, a multiple of 4.");
  return Buffer.from(text, "hex");
}

/** The options that make the packet, which a line of a batch has too. */
function withPacket(command: Command): Command {
  const option = (flags: string, text: string, parse: (text: string) => unknown, preset?: unknown): void => {
    const made = new Option(flags, text).argParser(parse);
    command.addOption(preset === undefined ? made : made.default(preset));
  };
  option("--proto <protocol>", `${Object.keys(PROTOCOLS).join(", ")} or a number`, protocol, PROTOCOLS.icmp);
  option("--sport <port>", "source port; identifier of an ICMP echo", number(0, 65535), 40000);
  option("--dport <port>", "destination port (default: 80, for UDP 53)", number(0, 65535));
  option("--length <bytes>", "of the IP packet; at least its headers", number(0, 65535), 84);
  option("--ttl <hops>", "hop limit", number(0, 255), 64);
  option("--tos <byte>", "type of service: DSCP and ECN", number(0, 255), 0);
  option("--id <number>", "IP identification", number(0, 65535), 1);
  command.option("--df", "don't fragment");
  option("--fragment <offset>", "a fragment that begins at this byte; 0 is the first", number(0, 65528, 8));
  command.option("--more", "more fragments follow");
  option("--options <hex>", "IP options", ipOptions, new Uint8Array());
  option(
    "--tcp-flags <flags>",
    `of ${Object.keys(TCP_FLAGS).join(", ")}, with commas`,
    tcpFlags,
    TCP_FLAGS.syn,
  );
  command.option("--reply", "an ICMP echo reply rather than a request");
  command.option("--from-peer", "comes from the network, in a tunnel if the peer of SRC uses one");
  option("--outer <address>", "with --from-peer: in a tunnel packet from this address", address);
  option("--outer-tos <byte>", "with --from-peer: type of service of the tunnel packet", number(0, 255), 0);
  return command;
}

function trace(pinPath: string, body: (tracer: Tracer) => void | Promise<void>): Promise<void> {
  requirePrivilege();
  const tracer = new Tracer(pinPath);
  return Promise.resolve(body(tracer)).finally(() => tracer.close());
}

/** Traces what each line of standard input says, in the words of the command line. */
async function batch(tracer: Tracer, isJson: boolean): Promise<void> {
  let count = 0;
  for await (const line of createInterface({ input: process.stdin })) {
    count += 1;
    const words = line.split(/\s+/).filter((word) => word !== "");
    if (words.length === 0) continue;
    const parser = withPacket(new Command("line"))
      .argument("<src>", "", address)
      .argument("<dst>", "", address)
      .exitOverride()
      .configureOutput({ writeErr: () => undefined });
    try {
      parser.parse(words, { from: "user" });
    } catch (error) {
      if (!(error instanceof CommanderError)) throw error;
      throw new Refusal(`line ${count} of the batch: ${error.message}`);
    }
    const [source, destination] = parser.processedArgs as [Ipv4, Ipv4];
    print(tracer.trace(source, destination, parser.opts<Options>()), isJson, true);
  }
}

function print(document: Document, isJson: boolean, isBatch: boolean): void {
  if (!isJson) process.stdout.write(render(document, screenOf(process.stdout)) + (isBatch ? "\n" : ""));
  else {
    const all = { schema: SCHEMA, command: "trace", ...document };
    process.stdout.write(`${isBatch ? JSON.stringify(all) : JSON.stringify(all, null, 2)}\n`);
  }
}

export function command(): Command {
  const command = withPacket(new Command("trace"));
  return command
    .description(
      "Says hop by hop what would become of a packet: runs the programs in force on a made one. Nothing is sent, and nothing that the node does changes.",
    )
    .argument("[src]", "a pod of this node or one of its addresses; with --from-peer any address", address)
    .argument("[dst]", "where to", address)
    .option("--batch", "trace each line of standard input: SRC DST and options")
    .addOption(pinPathOption())
    .option("--json", "as JSON (docs/json.md has the schema)")
    .action((source: Ipv4 | undefined, destination: Ipv4 | undefined) => {
      const options = command.opts<Options>();
      const { json = false } = options;
      if (options.batch === true) {
        if (source !== undefined) command.error("error: --batch takes its packets from standard input");
        return trace(options.pinPath, (tracer) => batch(tracer, json));
      }
      if (source === undefined || destination === undefined)
        return command.error("error: SRC and DST are both needed");
      return trace(options.pinPath, (tracer) =>
        print(tracer.trace(source, destination, options), json, false),
      );
    });
}
