/**
 * `subnet.env`: what a node tells Docker and the CNI plugin about its subnet, and what it remembers of it over a
 * restart. Written exactly as flannel does (its order, no quotes, the gateway's address in FLANNEL_SUBNET),
 * because shell scripts source it and other programs split it at the first `=`. Read as leniently as flannel's
 * reader, which takes shell-like quoting and comma lists: what can't be read counts as absent, since the file is
 * only a wish for the subnet we had before.
 */
import { formatCidr, networkOf, type Prefix, parseCidr } from "./ipv4.ts";

/** What `subnet.env` says. */
export interface SubnetFile {
  readonly network: Prefix;
  readonly subnet: Prefix;
  /** Bytes a pod may send in one packet. */
  readonly mtu: number;
  readonly ipMasq: boolean;
}

/** What is worth knowing of a former run's file; host bits are cleared. */
export interface FormerSubnet {
  readonly network: Prefix | undefined;
  readonly subnet: Prefix | undefined;
}

/** The file's text. */
export function formatSubnetFile(file: SubnetFile): string {
  const gateway = { address: file.subnet.address + 1, length: file.subnet.length };
  return [
    `FLANNEL_NETWORK=${formatCidr(file.network)}`,
    `FLANNEL_SUBNET=${formatCidr(gateway)}`,
    `FLANNEL_MTU=${file.mtu}`,
    `FLANNEL_IPMASQ=${file.ipMasq}`,
    "",
  ].join("\n");
}

/** Reads a file that anyone may have written. Never throws. */
export function readSubnetFile(text: string): FormerSubnet {
  const values = new Map<string, string>();
  for (const line of text.split(/\r?\n/)) {
    const match = /^\s*(?:export\s+)?(\w+)\s*[=:]\s*(?:"([^"]*)"|'([^']*)'|([^#]*))/.exec(line);
    if (match !== null) values.set(match[1] ?? "", match[2] ?? match[3] ?? match[4] ?? "");
  }
  return {
    network: onlyPrefix(values.get("FLANNEL_NETWORK")),
    subnet: onlyPrefix(values.get("FLANNEL_SUBNET")),
  };
}

/** The one good entry of a comma list; of several, none is the one. */
function onlyPrefix(list: string | undefined): Prefix | undefined {
  const prefixes = (list ?? "").split(",").flatMap((entry) => parseCidr(entry.trim()) ?? []);
  const [prefix] = prefixes;
  if (prefix === undefined || prefixes.length > 1) return undefined;
  return { address: networkOf(prefix.address, prefix.length), length: prefix.length };
}
