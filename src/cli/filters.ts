/** What commands take to narrow down what they show. Messages are for the command line. */
import { InvalidArgumentError, Option } from "commander";
import { contains, type Ipv4, type Prefix, parseCidr, parseIpv4 } from "../core/ipv4.ts";

const PROTOCOLS: Readonly<Record<string, number>> = { icmp: 1, tcp: 6, udp: 17, gre: 47, esp: 50, sctp: 132 };
const NAMES = new Map(Object.entries(PROTOCOLS).map(([name, number]) => [number, name]));

/** A protocol by name, or by number where it has none here. */
export function protocolName(protocol: number): string {
  return NAMES.get(protocol) ?? `${protocol}`;
}

/** An address, or a network of them. */
export function addresses(text: string): Prefix {
  const address = parseIpv4(text);
  const prefix = address === undefined ? parseCidr(text) : { address, length: 32 };
  if (prefix === undefined)
    throw new InvalidArgumentError("It is an IPv4 address, or a network such as 172.7.21.0/24.");
  return prefix;
}

export function port(text: string): number {
  const value = Number(text);
  if (!/^\d+$/.test(text) || value < 1 || value > 65535)
    throw new InvalidArgumentError("It is a port from 1 to 65535.");
  return value;
}

function protocol(text: string): number {
  const value = PROTOCOLS[text.toLowerCase()] ?? (/^\d+$/.test(text) ? Number(text) : Number.NaN);
  if (!(value >= 0 && value <= 255)) {
    const names = Object.keys(PROTOCOLS).join(", ");
    throw new InvalidArgumentError(`It is ${names}, or a number from 0 to 255.`);
  }
  return value;
}

export function protocolOption(): Option {
  return new Option("--protocol <protocol>", "only of this one: tcp, udp, icmp or a number").argParser(
    protocol,
  );
}

export function portOption(what: string): Option {
  return new Option("--port <port>", what).argParser(port);
}

/** Whether there is no such filter, or one of the addresses is in it. */
export function isIn(filter: Prefix | undefined, ...found: readonly Ipv4[]): boolean {
  return filter === undefined || found.some((address) => contains(filter, address));
}

/** The option by which a command prints how many there are, and nothing else. */
export function countOption(): Option {
  return new Option("--count", "only how many there are");
}
