/** What all commands for people share: what they read beside the pinned maps, and how they refuse. */
import { Option } from "commander";
import type { Prefix } from "../core/ipv4.ts";
import { readConfig } from "../edge/dataplane.ts";
import { readCapabilities } from "../edge/host.ts";
import { type Netlink, openNetlink } from "../edge/netlink.ts";
import { readStatus } from "../edge/rundir.ts";

/** What can't be done; the message is for the person who asked. */
export class Refusal extends Error {}

/** The parts of the daemon's status file that are shown. */
export interface DaemonStatus {
  readonly version: string;
  readonly pid: number;
  readonly startedAt: string;
  readonly phase: string;
  readonly ready: boolean;
  readonly network?: { readonly backend: { readonly type: string }; readonly network: Prefix };
  readonly uplink?: { readonly name: string; readonly address: string; readonly publicIp: string };
  readonly device?: string;
  readonly subnet?: string;
  readonly mtu?: number;
  readonly leaseEndsAt?: string;
  readonly revision: string;
  readonly ignored: readonly { readonly key: string; readonly reason: string }[];
  readonly rejections: readonly { readonly key: string; readonly reason: string }[];
  readonly warnings: readonly string[];
  readonly failures: readonly { readonly what: string; readonly reason: string }[];
  readonly fastPath: string;
  readonly firewall?: {
    readonly needsStack: boolean;
    readonly reasons: readonly string[];
    readonly letsIn: boolean;
    readonly outside: readonly string[];
  };
  readonly attach: string;
  readonly probes?: {
    readonly everySeconds: number;
    readonly source?: string;
    readonly reachable: number;
    readonly unreachable: number;
    readonly unknown: number;
    readonly problem?: string;
  };
  readonly subnetFile: string;
  readonly etcd: {
    readonly endpoints: readonly string[];
    readonly prefix: string;
    readonly keyFile?: string;
    readonly certFile?: string;
    readonly caFile?: string;
    readonly username?: string;
  };
  readonly ipMasq: boolean;
  readonly resyncSeconds: number;
  readonly renewMarginMinutes: number;
  readonly leaseTtlSeconds: number;
  readonly store: {
    readonly connected: boolean;
    readonly since?: string;
    readonly endpoint?: string;
    readonly error?: string;
  };
}

/** What the daemon last wrote of itself, also one that is dead; undefined if none ever ran on this pin path. */
export function readDaemon(pinPath: string): DaemonStatus | undefined {
  const text = readStatus(pinPath);
  return text === undefined ? undefined : (JSON.parse(text) as DaemonStatus);
}

export function requirePrivilege(): void {
  const { problem } = readCapabilities();
  if (problem !== undefined) throw new Refusal(problem);
}

export function withNetlink<T>(body: (netlink: Netlink) => T): T {
  const netlink = openNetlink();
  try {
    return body(netlink);
  } finally {
    netlink.close();
  }
}

export function compare(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}

/** Names of interfaces by index, as the kernel has them now; `#7` for one that is gone. */
export function interfaceNames(): { readonly indexes: readonly number[]; nameOf(ifindex: number): string } {
  const names = new Map(
    withNetlink((netlink) => netlink.links()).map((link) => [link.index, link.name] as const),
  );
  return { indexes: [...names.keys()], nameOf: (ifindex) => names.get(ifindex) ?? `#${ifindex}` };
}

/** The facts that the programs in force were loaded with. Throws Refusal if there are none. */
export function requireConfig(pinPath: string): NonNullable<ReturnType<typeof readConfig>> {
  const config = readConfig(pinPath);
  if (config !== undefined) return config;
  throw new Refusal(
    readDaemon(pinPath) === undefined
      ? nothingAt(pinPath)
      : `no programs are loaded at ${pinPath}: 'twill status' and the log of twilld say what it waits for`,
  );
}

export function nothingAt(pinPath: string): string {
  return `nothing of Twill is at ${pinPath}: start twilld, or give the --pin-path it was started with`;
}

/** `--pin-path`, which every command has. */
export function pinPathOption(): Option {
  return new Option("--pin-path <path>", "where the daemon pins its maps")
    .default("/sys/fs/bpf/twill")
    .env("FLANNELD_PIN_PATH");
}
