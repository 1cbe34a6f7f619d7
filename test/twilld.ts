/**
 * twilld on a host of the lab, started as its users start it: the built `bin/twilld` with flags.
 *
 * `startTwilld` gives it the usual flags and waits until it is ready. `spawnTwilld` gives it exactly the flags it
 * is told, and waits for nothing. Either way the answer says how to see into it: its log lines, its status file,
 * subnet.env, the counters of its programs, its HTTP server.
 */
import { existsSync, mkdirSync, readFileSync, watch } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { type Counters, readCounters } from "../src/edge/dataplane.ts";
import { statusPathOf } from "../src/edge/rundir.ts";
import type { Etcd } from "./etcd.ts";
import type { Host } from "./lab.ts";
import { type Exit, fileAppears, type Process, type RunOptions, repository, until } from "./process.ts";

export interface TwilldOptions {
  readonly etcd: Etcd;
  /** More flags, behind our own, so that they win. */
  readonly flags?: readonly string[];
  readonly env?: Readonly<Record<string, string | undefined>>;
  /** Milliseconds until it must be ready; 0 does not wait for it. */
  readonly timeout?: number;
}

/** What status.json says; fields that no test looks at are left out. */
export interface Status {
  readonly pid: number;
  readonly phase: string;
  readonly ready: boolean;
  readonly network?: { readonly backend: { readonly type: string; readonly directRouting?: boolean } };
  readonly subnet?: string;
  readonly device?: string;
  readonly mtu?: number;
  readonly uplink?: { readonly name: string; readonly address: string; readonly publicIp: string };
  readonly leaseEndsAt?: string;
  readonly peers: number;
  readonly endpoints: number;
  readonly attach: "tcx" | "clsact";
  readonly rejections: readonly { readonly key: string; readonly reason: string }[];
  readonly ignored: readonly { readonly key: string; readonly reason: string }[];
  readonly warnings: readonly string[];
  readonly firewall?: {
    readonly needsStack: boolean;
    readonly reasons: readonly string[];
    readonly letsIn: boolean;
    readonly outside: readonly string[];
  };
  readonly failures: readonly { readonly what: string; readonly reason: string }[];
  readonly probes?: {
    readonly source?: string;
    readonly reachable: number;
    readonly unreachable: number;
    readonly unknown: number;
    readonly problem?: string;
  };
  readonly store: { readonly connected: boolean; readonly endpoint?: string; readonly error?: string };
}

/** A running twilld. */
export class Twilld {
  readonly host: Host;
  readonly process: Process;
  readonly subnetFile: string;
  readonly pinPath: string;
  /** Base URL of /healthz, /readyz and /metrics, in the host's namespace. */
  readonly url: string;

  constructor(host: Host, process: Process, flags: readonly string[]) {
    const flag = (name: string, fallback: string) =>
      flags.findLast((text) => text.startsWith(`--${name}=`))?.slice(name.length + 3) ?? fallback;
    this.host = host;
    this.process = process;
    // Relative to where it was started.
    this.subnetFile = resolve(host.directory, flag("subnet-file", "subnet.env"));
    this.pinPath = flag("pin-path", host.pinPath);
    this.url = `http://127.0.0.1:${flag("healthz-port", "2401")}`;
  }

  /** The variables of subnet.env. */
  get subnetEnv(): Record<string, string> {
    return Object.fromEntries(
      readFileSync(this.subnetFile, "utf8")
        .trim()
        .split("\n")
        .map((line) => [line.slice(0, line.indexOf("=")), line.slice(line.indexOf("=") + 1)]),
    );
  }

  /** What it last said of itself in its status file; undefined if it has said nothing yet. */
  get status(): Status | undefined {
    const path = statusPathOf(this.pinPath);
    if (!existsSync(path)) return undefined;
    const status = JSON.parse(readFileSync(path, "utf8")) as Status;
    return status.pid === this.process.pid ? status : undefined;
  }

  /** Waits until the status file says what `accept` looks for; it is written up to half a second late. */
  async statusWhere(what: string, accept: (status: Status) => boolean, timeout?: number): Promise<Status> {
    const directory = dirname(statusPathOf(this.pinPath));
    mkdirSync(directory, { recursive: true });
    const wake = (ring: () => void) => {
      const watcher = watch(directory, ring);
      return () => watcher.close();
    };
    const check = () => {
      const { status } = this;
      if (status !== undefined && accept(status)) return status;
      if (this.process.running) return undefined;
      throw new Error(`twilld on ${this.host.name} ended before ${what}:\n${this.process.text()}`);
    };
    const options = timeout === undefined ? { wake } : { wake, timeout };
    try {
      return await until(`the status of twilld on ${this.host.name} to say: ${what}`, check, options);
    } catch (error) {
      const said = `${JSON.stringify(this.status, null, 2)}\ntwilld said:\n${this.process.text()}`;
      throw new Error(`${error instanceof Error ? error.message : error}\nthe last status: ${said}`);
    }
  }

  /** The counters of its programs, by hook and verdict: `counters().from_pod.encapsulated.packets`. */
  counters(): Counters {
    return readCounters(this.pinPath);
  }

  /** Packets at a hook with a verdict so far. */
  packets(hook: keyof Counters, verdict: keyof Counters[keyof Counters]): number {
    return Number(this.counters()[hook][verdict].packets);
  }

  /** What /metrics answers. */
  metrics(): Promise<string> {
    return this.host.httpGet(`${this.url}/metrics`);
  }

  /** Waits for a line of its log; see `Process.line`. */
  says(pattern: RegExp, options: { timeout?: number; after?: number } = {}): Promise<RegExpExecArray> {
    return this.process.line(pattern, options);
  }

  /** Waits until it is ready: subnet.env is written and /readyz answers 200. Throws with its log if it ends. */
  async ready(timeout = 30_000): Promise<void> {
    const died = this.process.exited.then(({ code, signal }) => {
      const how = signal ?? `exit code ${code}`;
      throw new Error(`twilld on ${this.host.name} ended (${how}):\n${this.process.text()}`);
    });
    const ready = (async () => {
      await fileAppears(this.subnetFile, (content) => content.includes("FLANNEL_IPMASQ="), { timeout });
      await this.host.httpStatus(`${this.url}/readyz`, 200, { timeout });
    })();
    try {
      await Promise.race([ready, died]);
    } catch (error) {
      // The wait goes on for a moment in the background; its end is of no interest any more.
      ready.catch(() => undefined);
      const said = `${error instanceof Error ? error.message : error}\ntwilld said:\n${this.process.text()}`;
      await this.process.stop();
      throw new Error(said);
    } finally {
      died.catch(() => undefined);
    }
  }

  /** Ends it as an init system does. What it set up stays. */
  async stop(signal: NodeJS.Signals = "SIGTERM"): Promise<Exit> {
    return this.process.stop(signal);
  }
}

/** The flags `startTwilld` gives to twilld on this host. */
export function twilldFlags(host: Host, etcd: Etcd): string[] {
  return [
    `--public-ip=${host.address}`,
    ...etcd.flags,
    "--iface=eth0",
    `--subnet-file=${join(host.directory, "subnet.env")}`,
    "--healthz-ip=127.0.0.1",
    "--healthz-port=2401",
    `--pin-path=${host.pinPath}`,
  ];
}

/** The built program, for those who run it in a way of their own. */
export const twilldProgram = join(repository, "bin/twilld");

/**
 * Starts twilld with these flags and no others, in the host's directory, and waits for nothing. The flags should
 * hold `--pin-path=`, as hosts of a lab share one BPF file system. Peers are not probed unless a flag says so, as
 * tests count packets.
 */
export function spawnTwilld(host: Host, flags: readonly string[], options: RunOptions = {}): Twilld {
  const env = { FLANNELD_PEER_PROBES: "0", ...options.env };
  const child = host.spawn([twilldProgram, ...flags], { cwd: host.directory, ...options, env });
  return new Twilld(host, child, flags);
}

/** Starts twilld; resolves when it has written subnet.env and says that it is ready. */
export async function startTwilld(host: Host, options: TwilldOptions): Promise<Twilld> {
  const { etcd, flags = [], env, timeout = 30_000 } = options;
  const twilld = spawnTwilld(host, [...twilldFlags(host, etcd), ...flags], env === undefined ? {} : { env });
  if (timeout > 0) await twilld.ready(timeout);
  return twilld;
}

/** Runs `twill` on a host. */
export async function twill(host: Host, ...argv: string[]): Promise<string> {
  return (await host.exec([join(repository, "bin/twill"), ...argv])).stdout;
}
