/**
 * The uplink: which interface leads to the other hosts, by which address it is known to them, and which of its
 * addresses the tunnel uses. The rules and their order are flanneld's: each `--iface` in turn, then each
 * `--iface-regex` (a match on an address beats one on a name), then `--iface-can-reach`, and without any of them
 * the interface of the default route. Two of flannel's traps are not kept. A `--public-ip` that no interface has
 * (behind NAT) does not fail, it is published as it was in v0.11; and one that the chosen interface has beside
 * others is the address used, so that host-gw works there. All is decided on plain data read beforehand.
 */
import { formatIpv4, type Ipv4, parseIpv4 } from "./ipv4.ts";

/** A network interface of this host. */
export interface UplinkLink {
  readonly index: number;
  readonly name: string;
  readonly mtu: number;
}

/** An IPv4 address on the interface of that index. */
export interface UplinkAddress {
  readonly index: number;
  readonly address: Ipv4;
  readonly permanent: boolean;
  readonly deprecated: boolean;
}

/** A route, as far as it tells where packets leave; `outIndex` is undefined if there are several paths. */
export interface UplinkRoute {
  readonly outIndex: number | undefined;
  readonly metric: number;
}

/** What the host has. */
export interface HostFacts {
  readonly links: readonly UplinkLink[];
  readonly addresses: readonly UplinkAddress[];
  /** IPv4 default routes of the main table. */
  readonly defaultRoutes: readonly UplinkRoute[];
  /** The kernel's answer for the address of `canReach`; undefined if it has no route. */
  readonly reach: { readonly outIndex: number | undefined; readonly source: Ipv4 | undefined } | undefined;
}

/** What the operator asked for. */
export interface UplinkWish {
  /** Names or addresses, in order. */
  readonly interfaces: readonly string[];
  readonly interfacePatterns: readonly RegExp[];
  readonly interfaceCanReach: Ipv4 | undefined;
  readonly publicIp: Ipv4 | undefined;
}

/** The interface to other hosts. */
export interface Uplink {
  readonly link: UplinkLink;
  /** Our address on it. */
  readonly address: Ipv4;
  /** Bytes of the largest packet it takes. */
  readonly mtu: number;
  /** The address other nodes send to, published in the lease. */
  readonly publicIp: Ipv4;
}

/** One attempt: an interface with an address, or why not. */
type Found = { readonly link: UplinkLink; readonly address: Ipv4; readonly fixed: boolean } | string;

/** Chooses the uplink; the error says what was tried and what came of it. */
export function chooseUplink(wish: UplinkWish, host: HostFacts): Uplink | { readonly error: string } {
  const tried: string[] = [];
  for (const [what, attempt] of attempts(wish, host)) {
    const found = attempt();
    if (typeof found === "string") {
      tried.push(`${what}: ${found}`);
      continue;
    }
    const { link } = found;
    if (link.mtu === 0) return { error: `interface ${link.name} has an MTU of 0: set its MTU` };
    const { publicIp = found.address } = wish;
    const isOnLink = host.addresses.some((other) => other.index === link.index && other.address === publicIp);
    const address = isOnLink && !found.fixed ? publicIp : found.address;
    return { link, address, mtu: link.mtu, publicIp };
  }
  const error = "Failed to find interface to use that matches the interfaces and/or regexes provided";
  return { error: `${error} (${tried.join("; ")})` };
}

function* attempts(wish: UplinkWish, host: HostFacts): Generator<[string, () => Found]> {
  const { interfaces, interfacePatterns, interfaceCanReach, publicIp } = wish;
  for (const name of interfaces) yield [`--iface=${name}`, () => byText(name, host)];
  for (const pattern of interfacePatterns) {
    yield [`--iface-regex=${pattern.source}`, () => byPattern(pattern, host)];
  }
  if (interfaceCanReach !== undefined) {
    const target = formatIpv4(interfaceCanReach);
    yield [`--iface-can-reach=${target}`, () => byReach(target, host)];
  }
  if (interfaces.length > 0 || interfacePatterns.length > 0 || interfaceCanReach !== undefined) return;
  if (publicIp !== undefined) yield [`--public-ip=${formatIpv4(publicIp)}`, () => byAddress(publicIp, host)];
  yield ["default route", () => byDefaultRoute(host)];
}

function byText(text: string, host: HostFacts): Found {
  const address = parseIpv4(text);
  if (address !== undefined) return byAddress(address, host);
  const link = host.links.find((candidate) => candidate.name === text);
  return link === undefined ? "there is no interface of that name" : withAddress(link, host);
}

function byAddress(address: Ipv4, host: HostFacts): Found {
  const index = host.addresses.find((candidate) => candidate.address === address)?.index;
  const link = host.links.find((candidate) => candidate.index === index);
  return link === undefined ? "no interface has that address" : { link, address, fixed: true };
}

function byPattern(pattern: RegExp, host: HostFacts): Found {
  for (const link of host.links) {
    const address = usable(link, host).find((candidate) => pattern.test(formatIpv4(candidate)));
    if (address !== undefined) return { link, address, fixed: true };
  }
  const named = host.links.filter((link) => pattern.test(link.name));
  const found = named.map((link) => withAddress(link, host));
  return (
    found.find((candidate) => typeof candidate !== "string") ??
    found[0] ??
    "it matches neither an address nor a name of an interface"
  );
}

function byReach(target: string, host: HostFacts): Found {
  const link = host.links.find((candidate) => candidate.index === host.reach?.outIndex);
  if (link === undefined) return `there is no route to ${target}`;
  const source = host.reach?.source;
  return source === undefined ? withAddress(link, host) : { link, address: source, fixed: true };
}

function byDefaultRoute(host: HostFacts): Found {
  const [route] = [...host.defaultRoutes].sort((a, b) => a.metric - b.metric);
  if (route === undefined) return "there is none: name the interface with --iface";
  const link = host.links.find((candidate) => candidate.index === route.outIndex);
  if (link === undefined) return "it has several paths or no interface: name the interface with --iface";
  return withAddress(link, host);
}

function withAddress(link: UplinkLink, host: HostFacts): Found {
  const [address] = usable(link, host);
  return address === undefined ? `${link.name} has no usable IPv4 address` : { link, address, fixed: false };
}

/** Addresses to be known by, best first: global before link-local, permanent before leased. */
function usable(link: UplinkLink, host: HostFacts): Ipv4[] {
  const rank = (one: UplinkAddress): number => (isLinkLocal(one.address) ? 2 : 0) + (one.permanent ? 0 : 1);
  return host.addresses
    .filter((one) => one.index === link.index && !one.deprecated && isUnicast(one.address))
    .sort((a, b) => rank(a) - rank(b))
    .map((one) => one.address);
}

function isUnicast(address: Ipv4): boolean {
  const first = address >>> 24;
  return first !== 0 && first !== 127 && first < 224;
}

function isLinkLocal(address: Ipv4): boolean {
  return address >>> 16 === 0xa9fe;
}
