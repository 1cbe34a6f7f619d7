/**
 * Writes packets into a file that tcpdump, tshark and Wireshark read: pcapng
 * (draft-ietf-opsawg-pcapng), which can name the interface of each packet and hold a comment on it.
 */
import { closeSync, openSync, writeSync } from "node:fs";

const SECTION_HEADER = 0x0a0d0d0a;
const BYTE_ORDER = 0x1a2b3c4d;
const INTERFACE = 1;
const ENHANCED_PACKET = 6;
const LINKTYPE_ETHERNET = 1;
const OPT_COMMENT = 1;
const IF_NAME = 2;
const IF_TSRESOL = 9;
const NANOSECONDS = 9;

export class PcapFile {
  readonly #fd: number;
  readonly #snapshot: number;
  readonly #interfaces = new Map<string, number>();

  /** Begins the file anew. `snapshot` is the most that is kept of a packet. Throws what opening it throws. */
  constructor(path: string, snapshot: number) {
    this.#fd = openSync(path, "w", 0o600);
    this.#snapshot = snapshot;
    const body = Buffer.alloc(16);
    body.writeUInt32LE(BYTE_ORDER, 0);
    body.writeUInt16LE(1, 4);
    // The length of the section is not known yet.
    body.writeBigInt64LE(-1n, 8);
    this.#block(SECTION_HEADER, body);
  }

  /** `time` is in nanoseconds since 1970, `length` that of the packet of which `bytes` is the beginning. */
  write(packet: { name: string; time: bigint; length: number; bytes: Uint8Array; comment: string }): void {
    const head = Buffer.alloc(20);
    head.writeUInt32LE(this.#interface(packet.name), 0);
    head.writeUInt32LE(Number(packet.time >> 32n), 4);
    head.writeUInt32LE(Number(packet.time & 0xffffffffn), 8);
    head.writeUInt32LE(packet.bytes.length, 12);
    head.writeUInt32LE(packet.length, 16);
    this.#block(
      ENHANCED_PACKET,
      Buffer.concat([head, padded(packet.bytes), option(OPT_COMMENT, Buffer.from(packet.comment)), END]),
    );
  }

  close(): void {
    closeSync(this.#fd);
  }

  #interface(name: string): number {
    const known = this.#interfaces.get(name);
    if (known !== undefined) return known;
    const number = this.#interfaces.size;
    this.#interfaces.set(name, number);
    const head = Buffer.alloc(8);
    head.writeUInt16LE(LINKTYPE_ETHERNET, 0);
    head.writeUInt32LE(this.#snapshot, 4);
    const options = [option(IF_NAME, Buffer.from(name)), option(IF_TSRESOL, Buffer.of(NANOSECONDS)), END];
    this.#block(INTERFACE, Buffer.concat([head, ...options]));
    return number;
  }

  #block(type: number, body: Uint8Array): void {
    const block = Buffer.alloc(body.length + 12);
    block.writeUInt32LE(type, 0);
    block.writeUInt32LE(block.length, 4);
    block.set(body, 8);
    block.writeUInt32LE(block.length, block.length - 4);
    writeSync(this.#fd, block);
  }
}

const END = Buffer.alloc(4);

function padded(bytes: Uint8Array): Buffer {
  return Buffer.concat([bytes, Buffer.alloc((4 - (bytes.length % 4)) % 4)]);
}

function option(code: number, value: Buffer): Buffer {
  const head = Buffer.alloc(4);
  head.writeUInt16LE(code, 0);
  head.writeUInt16LE(value.length, 2);
  return Buffer.concat([head, padded(value)]);
}
