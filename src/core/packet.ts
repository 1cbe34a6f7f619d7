/**
 * IPv4 packets as bytes and as what people say of them: for commands that show packets, and that make one to see what
 * becomes of it. Formats: RFC 791, 768, 9293, 792, 2003, 7348.
 *
 * What is read may be cut short, or not what it says it is: what is not there is undefined.
 */
import { formatIpv4, type Ipv4 } from "./ipv4.ts";
import type { Mac } from "./model.ts";

export const ETHERNET_HEADER = 14;
const ETH_IP = 0x0800;
const MORE_FRAGMENTS = 0x2000;
const DONT_FRAGMENT = 0x4000;
const UDP_HEADER = 8;
const ICMP_ECHO = 8;
const ICMP_ECHO_REPLY = 0;
/** First word of a VXLAN header: there is a VNI. */
const VXLAN_FLAG = 0x08000000;

/** Of an Ethernet address that is not known, or of a packet that came without one. */
export const NO_MAC: Mac = "00:00:00:00:00:00";

/** By name, those that the programs tell apart; others go by number. */
export const PROTOCOLS: Readonly<Record<string, number>> = {
  icmp: 1,
  tcp: 6,
  udp: 17,
  dccp: 33,
  sctp: 132,
  udplite: 136,
  ipip: 4,
};
const WITH_PORTS: ReadonlySet<number> = new Set([6, 17, 33, 132, 136]);
const PROTOCOL_NAMES: ReadonlyMap<number, string> = new Map(
  Object.entries(PROTOCOLS).map(([name, number]) => [number, name]),
);

/** In the type of service (RFC 3168). */
const ECN_MASK = 3;
const ECN_ECT1 = 1;
export const ECN_CE = 3;

/** `tcp`, or the number where there is no name. */
export function protocolName(protocol: number): string {
  return PROTOCOL_NAMES.get(protocol) ?? `${protocol}`;
}

/** What an IPv4 packet says of itself. */
export interface Packet {
  readonly source: Ipv4;
  readonly destination: Ipv4;
  readonly protocol: number;
  /** Of TCP, UDP, SCTP, UDP-Lite and DCCP; the identifier of an ICMP echo, in both. None in later fragments. */
  readonly sourcePort: number | undefined;
  readonly destinationPort: number | undefined;
  /** Of ICMP, where it is there. */
  readonly icmp: { readonly type: number; readonly code: number } | undefined;
  /** Bytes, from the IP header on, as the header says. */
  readonly length: number;
  readonly ttl: number;
  readonly tos: number;
  readonly id: number;
  readonly dontFragment: boolean;
  readonly moreFragments: boolean;
  /** Of this fragment, in bytes. */
  readonly fragmentOffset: number;
  /** Bytes of the IP header: 20, and its options. */
  readonly header: number;
}

const view = (bytes: Uint8Array): DataView => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);

/** Reads the IPv4 packet that the bytes begin with; undefined if they do not. */
export function readPacket(bytes: Uint8Array): Packet | undefined {
  if (bytes.length < 20) return undefined;
  const at = view(bytes);
  const header = (at.getUint8(0) & 15) * 4;
  if (at.getUint8(0) >>> 4 !== 4 || header < 20) return undefined;
  const flags = at.getUint16(6);
  const fragmentOffset = (flags & 0x1fff) * 8;
  const protocol = at.getUint8(9);
  const has = (count: number): boolean => fragmentOffset === 0 && bytes.length >= header + count;
  const type = protocol === PROTOCOLS.icmp && has(2) ? at.getUint8(header) : undefined;
  const echo = (type === ICMP_ECHO || type === ICMP_ECHO_REPLY) && has(6);
  const ports = WITH_PORTS.has(protocol) && has(4);
  return {
    source: at.getUint32(12),
    destination: at.getUint32(16),
    protocol,
    sourcePort: ports ? at.getUint16(header) : echo ? at.getUint16(header + 4) : undefined,
    destinationPort: ports ? at.getUint16(header + 2) : echo ? at.getUint16(header + 4) : undefined,
    icmp: type === undefined ? undefined : { type, code: at.getUint8(header + 1) },
    length: at.getUint16(2),
    ttl: at.getUint8(8),
    tos: at.getUint8(1),
    id: at.getUint16(4),
    dontFragment: (flags & DONT_FRAGMENT) !== 0,
    moreFragments: (flags & MORE_FRAGMENTS) !== 0,
    fragmentOffset,
    header,
  };
}

/** An Ethernet frame's addresses, and the IPv4 packet in it; undefined if it carries something else. */
export function readFrame(
  bytes: Uint8Array,
): { readonly to: Mac; readonly from: Mac; readonly ip: Uint8Array } | undefined {
  if (bytes.length < ETHERNET_HEADER || view(bytes).getUint16(12) !== ETH_IP) return undefined;
  return { to: macText(bytes, 0), from: macText(bytes, 6), ip: bytes.subarray(ETHERNET_HEADER) };
}

/** Which tunnel packets are, as `struct config` says it: its kind, and the UDP port where it has one. */
export interface Tunnel {
  readonly tunnel: "TUNNEL_NONE" | "TUNNEL_VXLAN" | "TUNNEL_IPIP" | "TUNNEL_UDP";
  readonly tunnel_port: number;
}

/**
 * The frame in a tunnel packet of any kind; undefined if the IP packet is none. What carries bare IP packets gives a
 * frame whose MACs are zeros.
 */
export function readInner(ip: Uint8Array, { tunnel, tunnel_port: port }: Tunnel): Uint8Array | undefined {
  if (tunnel === "TUNNEL_VXLAN") return readTunnel(ip, port)?.frame;
  const packet = readPacket(ip);
  if (packet === undefined || packet.fragmentOffset > 0) return undefined;
  const isOne =
    tunnel === "TUNNEL_IPIP"
      ? packet.protocol === PROTOCOLS.ipip
      : tunnel === "TUNNEL_UDP" && packet.protocol === PROTOCOLS.udp && packet.destinationPort === port;
  const inner = ip.subarray(packet.header + (tunnel === "TUNNEL_UDP" ? UDP_HEADER : 0));
  return isOne && readPacket(inner) !== undefined ? buildFrame(NO_MAC, NO_MAC, inner) : undefined;
}

/** What is in a tunnel packet: its VNI and the frame; undefined if the IP packet is none for this UDP port. */
export function readTunnel(
  ip: Uint8Array,
  port: number,
): { readonly vni: number; readonly frame: Uint8Array } | undefined {
  const packet = readPacket(ip);
  if (packet === undefined || packet.protocol !== PROTOCOLS.udp || packet.destinationPort !== port)
    return undefined;
  const start = packet.header + UDP_HEADER;
  if (ip.length < start + 8) return undefined;
  return { vni: view(ip).getUint32(start + 4) >>> 8, frame: ip.subarray(start + 8) };
}

/** A packet to be made. */
export interface PacketSpec {
  readonly source: Ipv4;
  readonly destination: Ipv4;
  readonly protocol: number;
  /** Of protocols that have ports; the source port is also the identifier of an ICMP echo. */
  readonly sourcePort: number;
  readonly destinationPort: number;
  /** Bytes from the IP header on; more if the headers need more. */
  readonly length: number;
  readonly ttl: number;
  readonly tos: number;
  readonly id: number;
  readonly dontFragment: boolean;
  readonly moreFragments: boolean;
  /** In bytes, a multiple of 8. */
  readonly fragmentOffset: number;
  /** IP options: a multiple of 4 bytes, 40 at most. */
  readonly options: Uint8Array;
  /** FIN 1, SYN 2, RST 4, ACK 16. */
  readonly tcpFlags: number;
  /** An ICMP echo reply rather than a request. */
  readonly reply: boolean;
}

/** Makes the packet, right in every length and checksum. What it carries beyond its headers is zeros. */
export function buildPacket(spec: PacketSpec): Uint8Array {
  const header = 20 + spec.options.length;
  const isFirst = spec.fragmentOffset === 0;
  const least = isFirst ? transportHeader(spec.protocol) : 0;
  const length = Math.max(spec.length, header + least);
  const bytes = new Uint8Array(length);
  const at = view(bytes);
  at.setUint8(0, 0x40 | (header / 4));
  at.setUint8(1, spec.tos);
  at.setUint16(2, length);
  at.setUint16(4, spec.id);
  const flags = (spec.dontFragment ? DONT_FRAGMENT : 0) | (spec.moreFragments ? MORE_FRAGMENTS : 0);
  at.setUint16(6, flags | (spec.fragmentOffset / 8));
  at.setUint8(8, spec.ttl);
  at.setUint8(9, spec.protocol);
  at.setUint32(12, spec.source);
  at.setUint32(16, spec.destination);
  bytes.set(spec.options, 20);
  at.setUint16(10, checksum(bytes.subarray(0, header)));
  if (isFirst) writeTransport(spec, bytes.subarray(header));
  return bytes;
}

function transportHeader(protocol: number): number {
  if (protocol === PROTOCOLS.tcp) return 20;
  return protocol === PROTOCOLS.sctp ? 12 : protocol === PROTOCOLS.dccp ? 16 : 8;
}

function writeTransport(spec: PacketSpec, body: Uint8Array): void {
  const at = view(body);
  const { protocol } = spec;
  if (protocol === PROTOCOLS.icmp) {
    at.setUint8(0, spec.reply ? ICMP_ECHO_REPLY : ICMP_ECHO);
    at.setUint16(4, spec.sourcePort);
    at.setUint16(6, 1);
    at.setUint16(2, checksum(body));
    return;
  }
  if (!WITH_PORTS.has(protocol)) return;
  at.setUint16(0, spec.sourcePort);
  at.setUint16(2, spec.destinationPort);
  if (protocol === PROTOCOLS.tcp) {
    at.setUint8(12, 0x50);
    at.setUint8(13, spec.tcpFlags);
    at.setUint16(14, 0xffff);
  } else if (protocol === PROTOCOLS.udp || protocol === PROTOCOLS.udplite) {
    at.setUint16(4, body.length);
  }
  writeTransportChecksum(spec, body);
}

/** Of TCP, UDP and UDP-Lite; others have none, or one that does not cover addresses. */
function writeTransportChecksum(
  spec: Pick<PacketSpec, "source" | "destination" | "protocol">,
  body: Uint8Array,
): void {
  const { source, destination, protocol } = spec;
  const at =
    protocol === PROTOCOLS.tcp ? 16 : protocol === PROTOCOLS.udp || protocol === PROTOCOLS.udplite ? 6 : 0;
  if (at === 0) return;
  const pseudo = new Uint8Array(12);
  const before = view(pseudo);
  before.setUint32(0, source);
  before.setUint32(4, destination);
  before.setUint8(9, protocol);
  before.setUint16(10, body.length);
  view(body).setUint16(at, 0);
  const sum = checksum(pseudo, body);
  view(body).setUint16(at, protocol === PROTOCOLS.tcp ? sum : sum || 0xffff);
}

/** Both ends of a packet. An ICMP echo has its identifier as ports; 0 where a protocol has none. */
export interface Ends {
  readonly source: Ipv4;
  readonly destination: Ipv4;
  readonly sourcePort: number;
  readonly destinationPort: number;
}

/** A whole packet with other ends, its checksums right again, as address translation makes it. */
export function translate(ip: Uint8Array, ends: Ends): Uint8Array {
  const packet = readPacket(ip);
  if (packet === undefined) return ip;
  const next = ip.slice();
  const at = view(next);
  at.setUint32(12, ends.source);
  at.setUint32(16, ends.destination);
  at.setUint16(10, 0);
  at.setUint16(10, checksum(next.subarray(0, packet.header)));
  if (packet.sourcePort === undefined) return next;
  const body = next.subarray(packet.header, packet.length);
  if (packet.protocol === PROTOCOLS.icmp) {
    view(body).setUint16(4, ends.sourcePort);
    view(body).setUint16(2, 0);
    view(body).setUint16(2, checksum(body));
    return next;
  }
  view(body).setUint16(0, ends.sourcePort);
  view(body).setUint16(2, ends.destinationPort);
  writeTransportChecksum({ ...ends, protocol: packet.protocol }, body);
  return next;
}

/** An Ethernet frame around an IPv4 packet. */
export function buildFrame(to: Mac, from: Mac, ip: Uint8Array): Uint8Array {
  const frame = new Uint8Array(ETHERNET_HEADER + ip.length);
  frame.set(macBytes(to), 0);
  frame.set(macBytes(from), 6);
  view(frame).setUint16(12, ETH_IP);
  frame.set(ip, ETHERNET_HEADER);
  return frame;
}

/** The frame with other Ethernet addresses. */
export function readdress(frame: Uint8Array, to: Mac, from: Mac): Uint8Array {
  return buildFrame(to, from, frame.subarray(ETHERNET_HEADER));
}

/** What a tunnel packet is made of beside the frame in it. */
export interface TunnelSpec {
  readonly source: Ipv4;
  readonly destination: Ipv4;
  readonly sourcePort: number;
  readonly port: number;
  readonly vni: number;
  readonly ttl: number;
  readonly tos: number;
}

/** The outer IP packet that carries a frame (RFC 7348), its UDP checksum left out. */
export function buildTunnel(spec: TunnelSpec, frame: Uint8Array): Uint8Array {
  const start = 20 + UDP_HEADER + 8;
  const packet = buildOuter(spec, 17, start + frame.length);
  const at = view(packet);
  at.setUint16(26, 0);
  at.setUint32(28, VXLAN_FLAG);
  at.setUint32(32, (spec.vni << 8) >>> 0);
  packet.set(frame, start);
  return packet;
}

/** The outer IP packet that carries an IP packet: with ipip (RFC 2003) behind its header, else behind UDP's as well. */
export function buildPlainTunnel(spec: TunnelSpec, isUdp: boolean, ip: Uint8Array): Uint8Array {
  const start = 20 + (isUdp ? UDP_HEADER : 0);
  const packet = buildOuter(spec, isUdp ? 17 : 4, start + ip.length);
  if (isUdp) view(packet).setUint16(26, 0);
  packet.set(ip, start);
  return packet;
}

function buildOuter(spec: TunnelSpec, protocol: number, length: number): Uint8Array {
  return buildPacket({
    ...{ ...spec, protocol, destinationPort: spec.port, length },
    ...{ id: 0, dontFragment: false, moreFragments: false, fragmentOffset: 0 },
    ...{ options: new Uint8Array(), tcpFlags: 0, reply: false },
  });
}

/** The packet with one hop less to go. */
export function oneHopLess(ip: Uint8Array): Uint8Array {
  const next = ip.slice();
  const at = view(next);
  const header = (at.getUint8(0) & 15) * 4;
  at.setUint8(8, at.getUint8(8) - 1);
  at.setUint16(10, 0);
  at.setUint16(10, checksum(next.subarray(0, header)));
  return next;
}

/**
 * The packet with the mark of congestion that it has when it leaves a tunnel whose packet had `outer` (RFC 6040, section
 * 4.2), its header checksum right again; undefined if it is lost, as it could not say what happened on the way.
 */
export function leaveTunnel(ip: Uint8Array, outer: number): Uint8Array | undefined {
  const next = Uint8Array.from(ip);
  const at = view(next);
  const tos = at.getUint8(1);
  const inner = tos & ECN_MASK;
  if (inner === 0) return (outer & ECN_MASK) === ECN_CE ? undefined : next;
  const isTold = (outer & ECN_MASK) === ECN_CE || ((outer & ECN_MASK) === ECN_ECT1 && inner !== ECN_CE);
  if (!isTold) return next;
  const header = (at.getUint8(0) & 15) * 4;
  at.setUint8(1, (tos & ~ECN_MASK) | (outer & ECN_MASK));
  at.setUint16(10, 0);
  at.setUint16(10, checksum(next.subarray(0, header)));
  return next;
}

/** The Internet checksum (RFC 1071); 0 over data that holds its own right checksum. */
export function checksum(...parts: readonly Uint8Array[]): number {
  let sum = 0;
  for (const part of parts)
    for (let at = 0; at < part.length; at += 2) sum += ((part[at] ?? 0) << 8) | (part[at + 1] ?? 0);
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  return ~sum & 0xffff;
}

function macText(bytes: Uint8Array, start: number): Mac {
  return [...bytes.subarray(start, start + 6)].map((byte) => byte.toString(16).padStart(2, "0")).join(":");
}

function macBytes(text: Mac): Uint8Array {
  return Uint8Array.from(text.split(":"), (byte) => Number.parseInt(byte, 16));
}

/** A packet as JSON tells of it; ports are null where there are none. docs/json.md has the schema. */
export interface PacketLine {
  readonly source: string;
  readonly destination: string;
  readonly protocol: string;
  readonly sourcePort: number | null;
  readonly destinationPort: number | null;
  /** Bytes, from the IP header on. */
  readonly length: number;
  readonly ttl: number;
}

export function packetLine(packet: Packet): PacketLine {
  return {
    source: formatIpv4(packet.source),
    destination: formatIpv4(packet.destination),
    protocol: protocolName(packet.protocol),
    sourcePort: packet.sourcePort ?? null,
    destinationPort: packet.destinationPort ?? null,
    length: packet.length,
    ttl: packet.ttl,
  };
}
