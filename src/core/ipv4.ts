/**
 * IPv4 addresses and prefixes as numbers. An address is an unsigned 32-bit integer in host order, so that
 * comparing and stepping through subnets is plain arithmetic; text and network-order bytes exist only at the rim.
 */

/** Unsigned 32-bit, host order: 10.4.7.21 is 0x0a040715. */
export type Ipv4 = number;

/** An address block. `address` has no bits set beyond `length` unless a function says otherwise. */
export interface Prefix {
  readonly address: Ipv4;
  /** 0 to 32. */
  readonly length: number;
}

/** Reads strict dotted-quad text (no leading zeros, no short forms); undefined if it is anything else. */
export function parseIpv4(text: string): Ipv4 | undefined {
  const parts = text.split(".");
  if (parts.length !== 4) return undefined;
  let address = 0;
  for (const part of parts) {
    if (!/^(0|[1-9]\d{0,2})$/.test(part)) return undefined;
    const byte = Number(part);
    if (byte > 255) return undefined;
    address = address * 256 + byte;
  }
  return address;
}

/** Dotted-quad text of an address. */
export function formatIpv4(address: Ipv4): string {
  return `${address >>> 24}.${(address >>> 16) & 255}.${(address >>> 8) & 255}.${address & 255}`;
}

/** Network mask of a prefix length (0 to 32). */
export function maskOf(length: number): Ipv4 {
  return length === 0 ? 0 : (0xffffffff << (32 - length)) >>> 0;
}

/** The address with the bits beyond `length` cleared. */
export function networkOf(address: Ipv4, length: number): Ipv4 {
  return (address & maskOf(length)) >>> 0;
}

/** Number of addresses in a block of this prefix length. */
export function sizeOf(length: number): number {
  return 2 ** (32 - length);
}

/** Reads `address/length`; host bits are kept, so that callers can tell a subnet from an address in it. */
export function parseCidr(text: string): Prefix | undefined {
  const slash = text.indexOf("/");
  if (slash < 0) return undefined;
  const address = parseIpv4(text.slice(0, slash));
  const rest = text.slice(slash + 1);
  if (address === undefined || !/^(0|[1-9]\d?)$/.test(rest)) return undefined;
  const length = Number(rest);
  return length > 32 ? undefined : { address, length };
}

/** `address/length`. */
export function formatCidr(prefix: Prefix): string {
  return `${formatIpv4(prefix.address)}/${prefix.length}`;
}

/** Whether the address lies in the block. */
export function contains(prefix: Prefix, address: Ipv4): boolean {
  return networkOf(address, prefix.length) === networkOf(prefix.address, prefix.length);
}

/** Whether two blocks share an address. */
export function overlaps(a: Prefix, b: Prefix): boolean {
  const length = Math.min(a.length, b.length);
  return networkOf(a.address, length) === networkOf(b.address, length);
}
