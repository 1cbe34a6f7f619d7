/**
 * The host as files: sysctls of the network, what we are privileged to do, and files that others read.
 *
 * Sysctl names come with the interface as a separate part, since interface names may contain dots ("eth0.5"),
 * and no part can leave its directory. `/proc/sys/net` shows the network namespace of the thread that looks.
 */
import {
  chmodSync,
  closeSync,
  fchmodSync,
  fsyncSync,
  mkdirSync,
  openSync,
  readFileSync,
  renameSync,
  rmSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { basename, dirname, join, resolve } from "node:path";

/** Names a sysctl: path parts under /proc/sys/net, e.g. ["ipv4", "conf", "eth0.5", "rp_filter"]. */
export type SysctlName = readonly string[];

function sysctlPath(name: SysctlName): string {
  for (const part of name) {
    // Interface names may hold nearly anything, but never these.
    if (part === "" || part === "." || part === ".." || /[/\s\0]/.test(part)) {
      throw new RangeError(`"${part}" cannot be part of a sysctl's name (${JSON.stringify(name)})`);
    }
  }
  if (name.length < 2) throw new RangeError(`${JSON.stringify(name)} names no sysctl under /proc/sys/net`);
  return join("/proc/sys/net", ...name);
}

function isMissing(error: unknown): boolean {
  return error instanceof Error && "code" in error && (error.code === "ENOENT" || error.code === "ENODEV");
}

/** The text of a sysctl without its line break; undefined if this kernel or interface has none. */
export function readSysctl(name: SysctlName): string | undefined {
  try {
    return readFileSync(sysctlPath(name), "utf8").trim();
  } catch (error) {
    if (isMissing(error)) return undefined;
    throw error;
  }
}

/** Writes a sysctl and returns what it was before. Throws if there is none, or if the kernel refuses the value. */
export function writeSysctl(name: SysctlName, value: string): string {
  const path = sysctlPath(name);
  try {
    const before = readFileSync(path, "utf8").trim();
    if (before !== value) writeFileSync(path, value);
    return before;
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new Error(
      `cannot set ${path} to "${value}": ${reason}; it needs CAP_NET_ADMIN and a writable /proc/sys`,
      { cause },
    );
  }
}

/** Names the time since the kernel started; undefined if this kernel does not tell. */
export function bootId(): string | undefined {
  try {
    return readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim();
  } catch {
    return undefined;
  }
}

/** Ports that the kernel hands out only to sockets that ask for exactly them. */
export const RESERVED_PORTS: SysctlName = ["ipv4", "ip_local_reserved_ports"];

/** First and last port the kernel hands out to sockets that ask for any; Linux's default if unreadable. */
export function localPortRange(): { readonly first: number; readonly last: number } {
  const [first, last] = (readSysctl(["ipv4", "ip_local_port_range"]) ?? "").split(/\s+/).map(Number);
  return first && last ? { first, last } : { first: 32768, last: 60999 };
}

/** TTL of packets this host originates; Linux's default if unreadable. */
export function defaultTtl(): number {
  return Number(readSysctl(["ipv4", "ip_default_ttl"])) || 64;
}

/** What the process may do. */
export interface Capabilities {
  /** Change links, routes, neighbours, and attach programs to interfaces. */
  readonly netAdmin: boolean;
  /**
   * Load programs, and open the maps and types of those in the kernel by their numbers, which a restart and `twill`
   * need. For the latter CAP_BPF with CAP_PERFMON is not enough.
   */
  readonly sysAdmin: boolean;
  /** One line that says what is missing and what to do about it; undefined if nothing is. */
  readonly problem: string | undefined;
}

const CAP_NET_ADMIN = 12n;
const CAP_SYS_ADMIN = 21n;

/** Reads the effective capabilities out of the text of /proc/PID/status. */
export function readCapabilities(
  status: string = readFileSync("/proc/thread-self/status", "utf8"),
): Capabilities {
  const [, hex] = /^CapEff:\s*([0-9a-fA-F]+)$/m.exec(status) ?? [];
  const bits = BigInt(`0x${hex ?? "0"}`);
  const has = (bit: bigint): boolean => ((bits >> bit) & 1n) === 1n;
  const netAdmin = has(CAP_NET_ADMIN);
  const sysAdmin = has(CAP_SYS_ADMIN);
  const missing = [...(netAdmin ? [] : ["CAP_NET_ADMIN"]), ...(sysAdmin ? [] : ["CAP_SYS_ADMIN"])];
  const problem =
    missing.length === 0
      ? undefined
      : `this process lacks ${missing.join(" and ")}: run it as root, or grant them (systemd: AmbientCapabilities=, container: securityContext.capabilities.add)`;
  return { netAdmin, sysAdmin, problem };
}

/**
 * Puts a file in place so that readers see the old content or the new, never less, also across a power cut.
 * Mode 0644 whatever the umask; missing directories are made with 0755.
 */
export function writeFileAtomically(path: string, content: string): void {
  const directory = dirname(resolve(path));
  const draft = join(directory, `.${basename(path)}.${process.pid}.tmp`);
  try {
    makeDirectory(directory);
    const fd = openSync(draft, "w", 0o644);
    try {
      try {
        fchmodSync(fd, 0o644);
        writeFileSync(fd, content);
        fsyncSync(fd);
      } finally {
        closeSync(fd);
      }
      renameSync(draft, path);
    } catch (error) {
      rmSync(draft, { force: true });
      throw error;
    }
    syncDirectory(directory);
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new Error(`cannot write ${path}: ${reason}; check that its directory is writable and has room`, {
      cause,
    });
  }
}

/** Has a file say that it was written now. False if there is none. */
export function touchFile(path: string): boolean {
  const now = new Date();
  try {
    utimesSync(path, now, now);
    return true;
  } catch (error) {
    if (isMissing(error)) return false;
    throw error;
  }
}

/** A rename is on the disk once its directory is. */
function syncDirectory(directory: string): void {
  const fd = openSync(directory, "r");
  try {
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}

/** Makes a directory and its parents with mode 0755 whatever the umask; those that exist keep their mode. */
function makeDirectory(directory: string): void {
  const first = mkdirSync(directory, { recursive: true });
  if (first === undefined) return;
  for (let made = directory; made.length >= first.length; made = dirname(made)) chmodSync(made, 0o755);
}
