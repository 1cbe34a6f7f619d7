/**
 * What masquerading needs to know: by which interfaces pods reach the outside and under which address, where they
 * keep their own, and how long a connection lives without a packet.
 *
 * Not only the interface to other nodes counts: pods' packets leave by whatever the routes say, and each such
 * interface lends them its own first address, as the kernel's MASQUERADE does. An address that changes is kept
 * as the former one, under which connections go on until they end, or until the interface has it no more.
 *
 * The tunnel device has a row too, with the address that it has: for what comes from outside the network and goes on to
 * a pod of another node.
 */
import { type Address, isEthernet, type Link } from "./host.ts";
import { formatCidr, formatIpv4, type Ipv4, networkOf, type Prefix } from "./ipv4.ts";

/** Seconds without a packet after which a connection is forgotten; the fields of `struct timeouts`. */
export interface Timeouts {
  readonly tcp_new: number;
  readonly tcp_established: number;
  readonly tcp_closing: number;
  readonly tcp_closed: number;
  readonly tcp_time_wait: number;
  readonly udp_new: number;
  readonly udp_established: number;
  readonly icmp: number;
  readonly other: number;
}

export interface Masquerade {
  /** Ports that connections get outside. */
  readonly ports: { readonly first: number; readonly last: number };
  /** Destinations to which pods keep their address. */
  readonly excluded: readonly Prefix[];
  readonly timeouts: Timeouts;
  /** Of the hash by which ports are chosen; stays for as long as connections live. */
  readonly seed: number;
  /** That there can be at a time. */
  readonly connections: number;
}

/** Row of the map `uplinks4`: an interface by which pods reach the outside, or the outside reaches pods of peers. */
export interface UplinkRow {
  readonly ifindex: number;
  readonly address: Ipv4;
  /** The address before this one; 0 if there was none, or the interface does not have it any more. */
  readonly former: Ipv4;
}

/** Row of the map `excluded4`. */
export type ExcludedRow = Prefix;

export const uplinkKey = (row: { ifindex: number }): string => `${row.ifindex}`;
export const excludedKey = (row: ExcludedRow): string => formatCidr(row);

/** Where a timeout is among the kernel's (net.netfilter.<name>), and what it is where connections are not tracked. */
const SOURCES: { readonly [Name in keyof Timeouts]: readonly [sysctl: string, seconds: number] } = {
  tcp_new: ["nf_conntrack_tcp_timeout_syn_sent", 120],
  tcp_established: ["nf_conntrack_tcp_timeout_established", 432000],
  tcp_closing: ["nf_conntrack_tcp_timeout_fin_wait", 120],
  tcp_closed: ["nf_conntrack_tcp_timeout_close", 10],
  tcp_time_wait: ["nf_conntrack_tcp_timeout_time_wait", 120],
  udp_new: ["nf_conntrack_udp_timeout", 30],
  udp_established: ["nf_conntrack_udp_timeout_stream", 120],
  icmp: ["nf_conntrack_icmp_timeout", 30],
  other: ["nf_conntrack_generic_timeout", 600],
};

/** The timeouts of this host; `read` gives the text of a sysctl of net.netfilter, or undefined. */
export function timeoutsOf(read: (name: string) => string | undefined): Timeouts {
  const entries = Object.entries(SOURCES).map(([field, [name, seconds]]) => {
    const value = Number(read(name));
    return [field, Number.isInteger(value) && value > 0 ? value : seconds] as const;
  });
  return Object.fromEntries(entries) as unknown as Timeouts;
}

/**
 * The interfaces by which pods may reach the outside: all of Ethernet with an address of global scope, but those of
 * `inside` (pods' own, the tunnel device). `chosen` is the uplink with the address that was chosen for it, and
 * `before` says what a row was, as far as known. `overlay` is the tunnel device and its address, for a row of its own.
 */
export function uplinksOf(
  host: { readonly links: Iterable<Link>; readonly addresses: Iterable<Address> },
  inside: (ifindex: number) => boolean,
  chosen: { readonly index: number; readonly address: Ipv4 },
  overlay: { readonly index: number; readonly address: Ipv4 } | undefined,
  before: (key: string) => UplinkRow | undefined,
): Map<string, UplinkRow> {
  const first = new Map<number, Ipv4>();
  for (const row of host.addresses) {
    if (row.scope !== 0 || row.secondary || first.has(row.index)) continue;
    first.set(row.index, row.address);
  }
  if (first.has(chosen.index)) first.set(chosen.index, chosen.address);
  const lent = new Map<number, Ipv4>();
  for (const link of host.links) {
    const { index, loopback } = link;
    const address = first.get(index);
    if (address === undefined || !isEthernet(link) || loopback || inside(index)) continue;
    lent.set(index, address);
  }
  if (overlay !== undefined) lent.set(overlay.index, overlay.address);
  const rows = new Map<string, UplinkRow>();
  for (const [index, address] of lent) {
    const key = uplinkKey({ ifindex: index });
    const former = before(key);
    rows.set(key, {
      ifindex: index,
      address,
      former: former === undefined ? 0 : former.address === address ? former.former : former.address,
    });
  }
  return rows;
}

/** How long a former address counts that its interface has lost: whoever renumbers a node may put it back at once. */
export const FORMER_HOLD_MS = 2_000;

/**
 * The rows with such former addresses as their interfaces have. To another one no answer comes: what has begun under it
 * is to begin anew, which a remote answers with a reset where it must. `lost` are those that an interface lacks, and until
 * when they count; it is kept from one call to the next.
 */
export function withFormersOnHost(
  rows: ReadonlyMap<string, UplinkRow>,
  addresses: Iterable<Address>,
  lost: Map<string, number>,
  now: number,
): Map<string, UplinkRow> {
  const present = new Set([...addresses].map(({ index, address }) => formerKey(index, address)));
  const missed = new Map<string, number>();
  const kept = new Map<string, UplinkRow>();
  for (const [key, row] of rows) {
    const name = formerKey(row.ifindex, row.former);
    const isMissed = row.former !== 0 && !present.has(name);
    const until = lost.get(name) ?? now + FORMER_HOLD_MS;
    if (isMissed) missed.set(name, until);
    kept.set(key, isMissed && until <= now ? { ...row, former: 0 } : row);
  }
  lost.clear();
  for (const [name, until] of missed) lost.set(name, until);
  return kept;
}

const formerKey = (ifindex: number, address: Ipv4): string => `${ifindex} ${formatIpv4(address)}`;

/** The rows of `excluded4`. */
export function excludedOf(excluded: readonly Prefix[]): Map<string, ExcludedRow> {
  const rows = excluded.map(({ address, length }) => ({ address: networkOf(address, length), length }));
  return new Map(rows.map((row) => [excludedKey(row), row]));
}
