/**
 * The node of programs.ts with masquerade: its uplink is the loopback interface, where it has the address 10.4.7.21.
 * `leave` and `arrive` are the two ways of a packet through it, `answer` makes of what left what comes back.
 */
import { codec } from "../../loader/codec.ts";
import * as abi from "../../src/abi/twill.gen.ts";
import {
  address,
  checksum,
  frame,
  ICMP,
  ip4,
  type Packet4,
  readFrame,
  readIp4,
  TCP,
  UDP,
} from "./packets.ts";
import { GATEWAY_MAC, LO, LO_MAC, type Metadata, Node, OTHER_MAC, type Outcome, POD } from "./programs.ts";

export const NODE = "10.4.7.21";
export const REMOTE = "93.184.216.34";
export const PORTS = { first: 61000, last: 65535 };

const keys = codec(abi.connectionKey4Layout);
const values = codec(abi.connection4Layout);
const uplinks = codec(abi.uplink4Layout);
const exclusions = codec(abi.excluded4Layout);

/** A row of `connections4`. */
export interface Connection {
  readonly address: string;
  readonly remote: string;
  readonly port: number;
  readonly remotePort: number;
  readonly protocol: number;
  readonly pod: string;
  readonly podPort: number;
  readonly state: abi.ConnectionState;
  readonly onStack: boolean;
}

const text = (bytes: Uint8Array): string => bytes.join(".");

export class Outside {
  readonly node: Node;

  /** `connections` is the room in the table; only with `entries` can single packets be run here. */
  constructor(
    changes: Partial<abi.Config> = {},
    connections = 4096,
    kind: "shipped" | "entries" = "entries",
  ) {
    this.node = Node.load({ masquerade: 1, ...changes }, kind, connections);
    this.uplink(NODE);
  }

  close(): void {
    this.node.close();
  }

  /** The address of the uplink, and the one it had before. */
  uplink(now: string, former = "0.0.0.0", ifindex = LO): void {
    const key = Buffer.alloc(4);
    key.writeUInt32LE(ifindex);
    const row = uplinks.encode({ address: address(now), former: address(former) });
    this.node.object.map("uplinks4").update(key, row);
  }

  exclude(network: string, length: number): void {
    const key = exclusions.encode({ prefix_length: length, address: address(network) });
    this.node.object.map("excluded4").update(key, Buffer.from([1, 0, 0, 0]));
  }

  connections(): Connection[] {
    return this.node.object
      .map("connections4")
      .entries()
      .map(([key, value]) => {
        const name = keys.decode(key);
        const row = values.decode(value);
        return {
          address: text(name.address),
          remote: text(name.remote),
          port: name.port,
          remotePort: name.remote_port,
          protocol: name.protocol,
          pod: text(row.pod),
          podPort: row.pod_port,
          state: row.state,
          onStack: row.on_stack !== 0,
        };
      });
  }

  /** Begins the sweep; 0 is success. */
  expire(): number {
    return this.node.object.program("expire").testRun({ data: new Uint8Array(64) }).retval;
  }

  /** A packet that the stack sends out by the uplink. Without `tcIndex` it counts as one the stack translated. */
  leave(packet: Packet4 | Uint8Array, metadata: Metadata = {}): Outcome {
    const bytes = packet instanceof Uint8Array ? packet : ip4(packet);
    return this.node.run("to_net", frame(OTHER_MAC, LO_MAC, bytes), metadata);
  }

  /** The same for one that came from the pod this way, so that the fast lane may have the rest. */
  leaveUntouched(packet: Packet4): Outcome {
    return this.leave(packet, { tcIndex: this.fromPod(packet).tcIndex });
  }

  /** What the pod sends. */
  fromPod(packet: Packet4 | Uint8Array, metadata: Metadata = {}): Outcome {
    const bytes = packet instanceof Uint8Array ? packet : ip4(packet);
    return this.node.run("from_pod", frame(GATEWAY_MAC, POD.mac, bytes), metadata);
  }

  /** A packet that arrives at the uplink. */
  arrive(bytes: Uint8Array, metadata: Metadata = {}): Outcome {
    return this.node.run("from_net", frame(LO_MAC, OTHER_MAC, bytes), metadata);
  }
}

/** The IP packet in a frame that a program left behind. */
export const packetOf = (outcome: Outcome): Buffer => readFrame(outcome.packet).payload;

/** What the other end would send back: the same packet with its ends exchanged, and an echo answered. */
export function answer(packet: Uint8Array): Buffer {
  const bytes = Buffer.from(packet);
  const header = ((bytes[0] ?? 0) & 15) * 4;
  bytes.set(packet.subarray(16, 20), 12);
  bytes.set(packet.subarray(12, 16), 16);
  const protocol = bytes[9];
  const isLater = (bytes.readUInt16BE(6) & 0x1fff) !== 0;
  if (isLater) return bytes;
  if (protocol === TCP || protocol === UDP || protocol === 132) {
    bytes.set(packet.subarray(header + 2, header + 4), header);
    bytes.set(packet.subarray(header, header + 2), header + 2);
  } else if (protocol === ICMP) {
    const isEcho = bytes[header] === 8;
    if (isEcho) bytes[header] = 0;
    // One word less by 0x0800, one more. Of the two zeros the one that a sum over the whole would have (RFC 1624).
    const sum = bytes.readUInt16BE(header + 2) + (isEcho ? 0x0800 : 0);
    bytes.writeUInt16BE(((sum & 0xffff) + (sum >>> 16)) % 0xffff, header + 2);
  }
  return bytes;
}

/** The ports of a TCP, UDP or SCTP packet; of an echo its identifier. */
export function portsOf(packet: Uint8Array): readonly [source: number, destination: number] {
  const { protocol, body } = readIp4(packet);
  return protocol === ICMP ? [body.readUInt16BE(4), 0] : [body.readUInt16BE(0), body.readUInt16BE(2)];
}

/** Where in its stream a TCP packet is. */
export interface Moment {
  readonly sequence?: number;
  /** Of the timestamp option (RFC 7323); without it there is none. */
  readonly time?: number;
  /** What comes behind the header. */
  readonly data?: Uint8Array;
}

/** A TCP packet with these flags; 2 SYN, 16 ACK, 1 FIN, 4 RST. */
export function tcp(packet: Packet4, flags: number, { sequence = 0, time, data }: Moment = {}): Buffer {
  const option = Buffer.from([1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0]);
  if (time !== undefined) option.writeUInt32BE(time, 4);
  const behind = Buffer.concat([time === undefined ? Buffer.alloc(0) : option, data ?? Buffer.alloc(0)]);
  const body = "tcp" in packet.body && behind.length > 0 ? { ...packet.body, data: behind } : packet.body;
  const bytes = ip4({ ...packet, body });
  const at = 20 + (packet.options?.length ?? 0);
  bytes.writeUInt32BE(sequence, at + 4);
  if (time !== undefined) bytes[at + 12] = 8 << 4;
  bytes[at + 13] = flags;
  bytes.writeUInt16BE(0, at + 16);
  const segment = bytes.subarray(at);
  const pseudo = Buffer.from([...bytes.subarray(12, 20), 0, TCP, segment.length >> 8, segment.length & 255]);
  bytes.writeUInt16BE(checksum(pseudo, segment), at + 16);
  return bytes;
}
