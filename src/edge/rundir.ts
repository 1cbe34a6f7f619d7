/**
 * The daemon's folder below /run/twill, one for each pin path: who runs, and how it is.
 *
 * `daemon` holds the process id and its start time, so that a second daemon on the same pins is refused and a
 * process id that was given out again is not taken for ours; `monitor` is the same for the one reader of events.
 * `status.json` is what the daemon last knew; it stays when the daemon ends. `peers.json` says which peers answer its
 * probes. `masquerade.json` is what the next one must know to go on with connections, `trial` which programs it need
 * not try. `added/` has a file for each peer for which commands of the network were run, with what to take it away by.
 * `claim.json` is what the daemon needs for itself: daemons of one network namespace look at each other's,
 * one at a time.
 */
import {
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  renameSync,
  rmdirSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { openLibrary } from "../../loader/ffi.ts";
import { type Claim, conflictOf } from "../core/claim.ts";

const ROOT = "/run/twill";
const LOCK_EX = 2;

/** The folder that belongs to a pin path. */
export function rundirOf(pinPath: string): string {
  return join(ROOT, pinPath.replace(/^\/+|\/+$/g, "").replaceAll("/", "-"));
}

/** Start time of a process in clock ticks since boot, as text; undefined if there is none, or only its remains. */
function startOf(pid: number): string | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
    // The command's name may hold blanks and brackets; fields count from behind it. proc(5): starttime is 22nd.
    const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
    return fields[0] === "Z" || fields[0] === "X" ? undefined : fields[19];
  } catch (error) {
    if (error instanceof Error && "code" in error && (error.code === "ENOENT" || error.code === "ESRCH")) {
      return undefined;
    }
    throw error;
  }
}

/** Whether a process is stopped by a signal, and does nothing until it gets SIGCONT. */
export function isStopped(pid: number): boolean {
  const stat = readIfThere(`/proc/${pid}/stat`) ?? "";
  return /^[Tt]$/.test(stat.slice(stat.lastIndexOf(")") + 2).split(" ")[0] ?? "");
}

/** What only one process at a time may be, on one pin path. */
type Role = "daemon" | "monitor";

/** Process id of the daemon that runs on a pin path, if one does. */
export function runningDaemon(pinPath: string): number | undefined {
  return running(rundirOf(pinPath), "daemon");
}

function running(directory: string, role: Role): number | undefined {
  const text = readIfThere(join(directory, role));
  const [pid, start] = text?.trim().split(" ") ?? [];
  return pid !== undefined && start !== undefined && startOf(Number(pid)) === start ? Number(pid) : undefined;
}

/** Enters this process in the folder of a pin path. Undefined, or the process that holds the role already. */
function enter(pinPath: string, role: Role): number | undefined {
  const directory = rundirOf(pinPath);
  mkdirSync(directory, { recursive: true, mode: 0o755 });
  const path = join(directory, role);
  const entry = `${process.pid} ${startOf(process.pid)}\n`;
  for (;;) {
    try {
      writeFileSync(path, entry, { flag: "wx", mode: 0o644 });
      return undefined;
    } catch (error) {
      if (!(error instanceof Error && "code" in error && error.code === "EEXIST")) throw error;
    }
    const other = running(rundirOf(pinPath), role);
    if (other !== undefined) return other;
    rmSync(path, { force: true });
  }
}

/** Enters this process as the daemon of a pin path, for the network at `prefix`. Throws if another runs. */
export function enterRundir(pinPath: string, prefix: string): void {
  const other = enter(pinPath, "daemon");
  if (other === undefined) return;
  const network = readClaim(rundirOf(pinPath))?.prefix ?? "a network it does not know yet";
  throw new Error(
    `twilld runs already on ${pinPath} for ${network} (process ${other}): stop it first, or give the one for ${prefix} another --pin-path and --subnet-file`,
  );
}

/**
 * Claims for the daemon of a pin path what no two of this network namespace can share, in place of what it had claimed
 * before. Undefined, or why not; then the former claim stays. Claims of daemons that have died go.
 */
export function claim(pinPath: string, wanted: Claim): string | undefined {
  return alone(() => {
    for (const { directory, pid } of foldersBeside(pinPath)) {
      const other = readClaim(directory);
      if (other === undefined) continue;
      if (pid === undefined) {
        rmSync(join(directory, "claim.json"), { force: true });
        continue;
      }
      const conflict = conflictOf(wanted, other);
      if (conflict !== undefined)
        return `${wanted.prefix} cannot be served beside ${other.prefix} (process ${pid}, pins below ${other.pinPath}): ${conflict}`;
    }
    writeWhole(join(rundirOf(pinPath), "claim.json"), { ...wanted, pinPath });
    return undefined;
  });
}

/** A claim as it is written down. */
type Written = Claim & { readonly pinPath: string };

function readClaim(directory: string): Written | undefined {
  const text = readIfThere(join(directory, "claim.json"));
  return text === undefined ? undefined : (JSON.parse(text) as Written);
}

/** Does what only one process at a time may do; the kernel lets the next one in, also if this one dies. */
function alone<Result>(work: () => Result): Result {
  mkdirSync(ROOT, { recursive: true, mode: 0o755 });
  const path = join(ROOT, "lock");
  const fd = openSync(path, "w", 0o600);
  try {
    const libc = openLibrary("libc.so.6");
    const flock = libc.prepare("flock", "int", ["int", "int"]);
    if (flock(fd, LOCK_EX) < 0) throw new Error(`cannot lock ${path}`);
    return work();
  } finally {
    closeSync(fd);
  }
}

/** Enters this process as the one that reads the events of a pin path. Undefined, or the process that does already. */
export function enterMonitor(pinPath: string): number | undefined {
  return enter(pinPath, "monitor");
}

/** Takes the entry back at the end; the status stays, and without one the folder goes. */
export function leaveRundir(pinPath: string, role: Role = "daemon"): void {
  const directory = rundirOf(pinPath);
  rmSync(join(directory, role), { force: true });
  if (role === "daemon") rmSync(join(directory, "claim.json"), { force: true });
  if (existsSync(directory) && readdirSync(directory).length === 0) rmdirSync(directory);
}

/** Where the status is written. */
export function statusPathOf(pinPath: string): string {
  return join(rundirOf(pinPath), "status.json");
}

/** The last status, as JSON text; undefined if there is none. */
export function readStatus(pinPath: string): string | undefined {
  return readIfThere(statusPathOf(pinPath));
}

/** How one peer answered the daemon's probes. */
export interface PeerNote {
  readonly subnet: string;
  readonly publicIp: string;
  /** Address that is asked. */
  readonly target: string;
  /** "reachable", "unreachable" after several answers that were missing in a row, or else "unknown". */
  readonly state: string;
  /** Answers missing in a row, and why the last one was. */
  readonly losses: number;
  readonly reason?: string | undefined;
  /** Milliseconds of the last round trip, and smoothed. */
  readonly rttMs?: number | undefined;
  readonly smoothedMs?: number | undefined;
  readonly answeredAt?: string | undefined;
}

/** What the daemon last knew of its peers; it may be some seconds old. */
export interface PeersNote {
  readonly pid: number;
  readonly at: string;
  readonly peers: readonly PeerNote[];
  /** Peers that are not listed, as there are too many; those that do not answer are listed first. */
  readonly leftOut: number;
}

export function peersPathOf(pinPath: string): string {
  return join(rundirOf(pinPath), "peers.json");
}

/** Undefined if no daemon has probed peers yet. */
export function readPeersNote(pinPath: string): PeersNote | undefined {
  const text = readIfThere(peersPathOf(pinPath));
  return text === undefined ? undefined : (JSON.parse(text) as PeersNote);
}

/** Milliseconds since the epoch at which the status was written; undefined if there is none. */
export function statusWrittenAt(pinPath: string): number | undefined {
  return statSync(statusPathOf(pinPath), { throwIfNoEntry: false })?.mtimeMs;
}

/** What the daemons of other pin paths last said of themselves, as JSON texts: those that run in this network namespace. */
export function daemonsBeside(pinPath: string): string[] {
  const running = [...foldersBeside(pinPath)].filter(({ pid }) => pid !== undefined);
  return running.flatMap(({ directory }) => readIfThere(join(directory, "status.json")) ?? []);
}

/** The folders of other pin paths: of daemons that run in this network namespace, and of those that run nowhere. */
function* foldersBeside(pinPath: string): Generator<{ directory: string; pid: number | undefined }> {
  if (!existsSync(ROOT)) return;
  const own = readlinkSync("/proc/thread-self/ns/net");
  for (const entry of readdirSync(ROOT, { withFileTypes: true })) {
    const directory = join(ROOT, entry.name);
    if (!entry.isDirectory() || directory === rundirOf(pinPath)) continue;
    const pid = running(directory, "daemon");
    if (pid === undefined || netnsOf(pid) === own) yield { directory, pid };
  }
}

function netnsOf(pid: number): string | undefined {
  try {
    return readlinkSync(`/proc/${pid}/ns/net`);
  } catch {
    // Gone by now, or another's.
    return undefined;
  }
}

/** A program that runs in this network namespace. */
export interface RunningProgram {
  readonly pid: number;
  /** The systemd service it belongs to; undefined if none. */
  readonly unit: string | undefined;
}

/** The processes of this network namespace whose program has a name (its first 15 characters). */
export function processesNamed(name: string): RunningProgram[] {
  const own = readlinkSync("/proc/thread-self/ns/net");
  return readdirSync("/proc").flatMap((entry) => {
    const pid = Number(entry);
    if (!Number.isInteger(pid) || readOrNothing(`/proc/${pid}/comm`).trim() !== name) return [];
    if (netnsOf(pid) !== own) return [];
    const [, unit] = /\/([^/\n]+\.service)(?:\/|$)/m.exec(readOrNothing(`/proc/${pid}/cgroup`)) ?? [];
    return [{ pid, unit }];
  });
}

/** A process may end while it is looked at. */
function readOrNothing(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return "";
  }
}

/** What a daemon leaves to the next one, and to the end of all: it lasts as long as connections can. */
export interface MasqueradeNote {
  /** Of the hash by which ports are chosen. */
  readonly seed: number;
  /** Ports that we reserved, as net.ipv4.ip_local_reserved_ports would have them. */
  readonly reserved: string;
}

/** The note of an earlier daemon; undefined if there is none. */
export function readMasqueradeNote(pinPath: string): MasqueradeNote | undefined {
  const text = readIfThere(join(rundirOf(pinPath), "masquerade.json"));
  return text === undefined ? undefined : (JSON.parse(text) as MasqueradeNote);
}

export function writeMasqueradeNote(pinPath: string, note: MasqueradeNote): void {
  writeWhole(join(rundirOf(pinPath), "masquerade.json"), note);
}

function writeWhole(path: string, content: object): void {
  writeFileSync(`${path}.new`, `${JSON.stringify(content)}\n`, { mode: 0o644 });
  renameSync(`${path}.new`, path);
}

/** What names the programs that ran last, and the kernel that took them; undefined if none did. */
export function readTrialNote(pinPath: string): string | undefined {
  return readIfThere(join(rundirOf(pinPath), "trial"))?.trim();
}

export function writeTrialNote(pinPath: string, trial: string): void {
  writeFileSync(join(rundirOf(pinPath), "trial"), `${trial}\n`, { mode: 0o644 });
}

/** What is kept of the peers for which commands were run, by the key of their lease. */
export function readAdded(pinPath: string): ReadonlyMap<string, string> {
  const directory = join(rundirOf(pinPath), "added");
  const names = existsSync(directory) ? readdirSync(directory) : [];
  // What a daemon was about to write when it died has another ending.
  const keys = names.filter((name) => !name.endsWith(".new"));
  return new Map(
    keys.flatMap((key) => {
      const text = readIfThere(join(directory, key));
      return text === undefined ? [] : [[key, text] as const];
    }),
  );
}

export function writeAdded(pinPath: string, key: string, text: string): void {
  const directory = join(rundirOf(pinPath), "added");
  mkdirSync(directory, { recursive: true, mode: 0o755 });
  const path = join(directory, key);
  // Commands may hold what not everybody is to know.
  writeFileSync(`${path}.new`, text, { mode: 0o600 });
  renameSync(`${path}.new`, path);
}

export function removeAdded(pinPath: string, key: string): void {
  rmSync(join(rundirOf(pinPath), "added", key), { force: true });
}

export function removeRundir(pinPath: string): void {
  rmSync(rundirOf(pinPath), { recursive: true, force: true });
}

function readIfThere(path: string): string | undefined {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    if (error instanceof Error && "code" in error && error.code === "ENOENT") return undefined;
    throw error;
  }
}
