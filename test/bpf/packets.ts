/**
 * Builds packets byte by byte and takes them apart again, for tests that say what goes in and what must come out.
 *
 * What is built is right in every length and checksum unless the test says otherwise, and what is read back says
 * whether its checksums hold, so that a program that breaks one is found by every test. Addresses and MACs are text;
 * ports and numbers are plain numbers. Formats: RFC 791, 768, 9293, 792 and 7348.
 */

export const TCP = 6;
export const UDP = 17;
export const ICMP = 1;
export const ETH_IP = 0x0800;
export const VXLAN_PORT = 8472;

/** What an IP packet carries. */
export type Body =
  | { readonly udp: readonly [source: number, destination: number]; readonly data?: Uint8Array }
  | { readonly tcp: readonly [source: number, destination: number]; readonly data?: Uint8Array }
  | { readonly echo: number; readonly reply?: boolean; readonly data?: Uint8Array }
  | { readonly error: readonly [type: number, code: number]; readonly about: Uint8Array }
  | { readonly protocol: number; readonly data: Uint8Array };

/** An IPv4 packet; all but addresses and body have the usual values unless given. */
export interface Packet4 {
  readonly source: string;
  readonly destination: string;
  readonly body: Body;
  readonly ttl?: number;
  readonly tos?: number;
  readonly id?: number;
  readonly dontFragment?: boolean;
  readonly moreFragments?: boolean;
  /** Of this fragment, in units of 8 bytes. */
  readonly fragmentOffset?: number;
  /** A multiple of 4 bytes. */
  readonly options?: Uint8Array;
}

/** A tunnel packet: outer addresses, and the Ethernet frame within. */
export interface Tunnel4 {
  readonly source: string;
  readonly destination: string;
  readonly frame: Uint8Array;
  readonly vni?: number;
  /** The first word of the VXLAN header; 0x08000000 says that there is a VNI. */
  readonly flags?: number;
  readonly sourcePort?: number;
  readonly port?: number;
  readonly ttl?: number;
  readonly tos?: number;
  readonly options?: Uint8Array;
  readonly moreFragments?: boolean;
}

/** Six bytes from `02:00:00:00:00:01`. */
export function mac(text: string): Uint8Array {
  return Uint8Array.from(text.split(":"), (byte) => Number.parseInt(byte, 16));
}

/** Four bytes from `10.4.7.21`. */
export function address(text: string): Uint8Array {
  return Uint8Array.from(text.split("."), Number);
}

/** The Internet checksum of the bytes (RFC 1071); 0 over a header whose checksum field is right. */
export function checksum(...parts: readonly Uint8Array[]): number {
  const bytes = Buffer.concat(parts);
  let sum = 0;
  for (let at = 0; at < bytes.length; at += 2) sum += ((bytes[at] ?? 0) << 8) | (bytes[at + 1] ?? 0);
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  return ~sum & 0xffff;
}

/** An Ethernet frame. */
export function frame(to: string, from: string, payload: Uint8Array, type = ETH_IP): Buffer {
  return Buffer.concat([mac(to), mac(from), Buffer.from([type >> 8, type & 255]), payload]);
}

/** The bytes of an IPv4 packet. */
export function ip4(packet: Packet4): Buffer {
  const { protocol, bytes } = transport(packet);
  const options = packet.options ?? new Uint8Array();
  const header = Buffer.alloc(20 + options.length);
  header[0] = 0x40 | (header.length / 4);
  header[1] = packet.tos ?? 0;
  header.writeUInt16BE(header.length + bytes.length, 2);
  header.writeUInt16BE(packet.id ?? 0x1234, 4);
  const flags = (packet.dontFragment ? 0x4000 : 0) | (packet.moreFragments ? 0x2000 : 0);
  header.writeUInt16BE(flags | (packet.fragmentOffset ?? 0), 6);
  header[8] = packet.ttl ?? 64;
  header[9] = protocol;
  header.set(address(packet.source), 12);
  header.set(address(packet.destination), 16);
  header.set(options, 20);
  header.writeUInt16BE(checksum(header), 10);
  return Buffer.concat([header, bytes]);
}

function transport(packet: Packet4): { protocol: number; bytes: Buffer } {
  const { body } = packet;
  if ("protocol" in body) return { protocol: body.protocol, bytes: Buffer.from(body.data) };
  if ("error" in body) {
    const bytes = Buffer.concat([Buffer.from([...body.error, 0, 0, 0, 0, 0, 0]), body.about]);
    bytes.writeUInt16BE(checksum(bytes), 2);
    return { protocol: ICMP, bytes };
  }
  const data = body.data ?? Buffer.from("twill");
  if ("echo" in body) {
    const bytes = Buffer.concat([Buffer.from([body.reply ? 0 : 8, 0, 0, 0, 0, 0, 0, 1]), data]);
    bytes.writeUInt16BE(body.echo, 4);
    bytes.writeUInt16BE(checksum(bytes), 2);
    return { protocol: ICMP, bytes };
  }
  const [ports, protocol, header] = "udp" in body ? [body.udp, UDP, 8] : [body.tcp, TCP, 20];
  const bytes = Buffer.concat([Buffer.alloc(header), data]);
  bytes.writeUInt16BE(ports[0], 0);
  bytes.writeUInt16BE(ports[1], 2);
  if (protocol === UDP) bytes.writeUInt16BE(bytes.length, 4);
  else bytes.writeUInt16BE(0x5010, 12); // five words of header; ACK
  const at = protocol === UDP ? 6 : 16;
  bytes.writeUInt16BE(checksum(pseudo(packet.source, packet.destination, protocol, bytes.length), bytes), at);
  return { protocol, bytes };
}

function pseudo(source: string, destination: string, protocol: number, length: number): Uint8Array {
  return Buffer.from([...address(source), ...address(destination), 0, protocol, length >> 8, length & 255]);
}

/** The outer IP packet of a tunnel packet. */
export function vxlan4(tunnel: Tunnel4): Buffer {
  const header = Buffer.alloc(8);
  header.writeUInt32BE(tunnel.flags ?? 0x08000000, 0);
  header.writeUInt32BE(((tunnel.vni ?? 1) << 8) >>> 0, 4);
  return ip4({
    ...tunnel,
    body: {
      udp: [tunnel.sourcePort ?? 40000, tunnel.port ?? VXLAN_PORT],
      data: Buffer.concat([header, tunnel.frame]),
    },
  });
}

const text = (bytes: Uint8Array): string => [...bytes].join(".");
const macText = (bytes: Uint8Array): string =>
  [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join(":");

/** What is in a frame. */
export interface Frame {
  readonly to: string;
  readonly from: string;
  readonly type: number;
  readonly payload: Buffer;
}

export function readFrame(bytes: Uint8Array): Frame {
  const all = Buffer.from(bytes);
  return {
    to: macText(all.subarray(0, 6)),
    from: macText(all.subarray(6, 12)),
    type: all.readUInt16BE(12),
    payload: all.subarray(14),
  };
}

/** What is in an IPv4 packet. */
export interface Read4 {
  readonly source: string;
  readonly destination: string;
  readonly protocol: number;
  readonly ttl: number;
  readonly tos: number;
  readonly id: number;
  readonly length: number;
  readonly dontFragment: boolean;
  /** The header's checksum is right. */
  readonly intact: boolean;
  /** The checksum of TCP, UDP or ICMP is right (or absent, in UDP). */
  readonly bodyIntact: boolean;
  readonly body: Buffer;
}

export function readIp4(bytes: Uint8Array): Read4 {
  const all = Buffer.from(bytes);
  const header = (all.readUInt8(0) & 15) * 4;
  const length = all.readUInt16BE(2);
  const body = all.subarray(header, length);
  const source = text(all.subarray(12, 16));
  const destination = text(all.subarray(16, 20));
  const protocol = all.readUInt8(9);
  const absent = protocol === UDP && body.length >= 8 && body.readUInt16BE(6) === 0;
  const prefix =
    protocol === ICMP ? new Uint8Array() : pseudo(source, destination, protocol, length - header);
  return {
    source,
    destination,
    protocol,
    ttl: all.readUInt8(8),
    tos: all.readUInt8(1),
    id: all.readUInt16BE(4),
    length,
    dontFragment: (all.readUInt8(6) & 0x40) !== 0,
    intact: checksum(all.subarray(0, header)) === 0,
    bodyIntact: absent || checksum(prefix, body) === 0,
    body,
  };
}

/** What is in the UDP body of a tunnel packet. */
export interface ReadVxlan {
  readonly sourcePort: number;
  readonly port: number;
  readonly length: number;
  readonly checksum: number;
  readonly flags: number;
  readonly vni: number;
  readonly frame: Frame;
}

export function readVxlan(body: Buffer): ReadVxlan {
  return {
    sourcePort: body.readUInt16BE(0),
    port: body.readUInt16BE(2),
    length: body.readUInt16BE(4),
    checksum: body.readUInt16BE(6),
    flags: body.readUInt32BE(8),
    vni: body.readUInt32BE(12) >>> 8,
    frame: readFrame(body.subarray(16)),
  };
}
