/**
 * Runs the commands of a backend that consists of them, one at a time and in this order: before the subnet is leased,
 * when there is one, then for each peer that came, changed or went. One that fails is run again after a pause of its
 * own that grows, and is listed meanwhile; others need not wait for it.
 *
 * What was added for a peer is taken away with what was known of it then: also when the network gets other commands, or
 * another backend, and when the peer went while no daemon ran.
 */
import type { BackendCommands } from "../core/backend.ts";
import { commandsFrom } from "../core/backends/extension.ts";
import type { Command } from "../core/command.ts";
import { formatCidr, type Ipv4, type Prefix } from "../core/ipv4.ts";
import { decodeAdded, encodeAdded, sameAttributes } from "../core/lease.ts";
import type { Lease } from "../core/model.ts";
import type { Ended, World } from "../core/world.ts";
import { reasonOf } from "./attempts.ts";

const RETRY_MIN_MS = 1000;
const RETRY_MAX_MS = 60_000;
/** What a peer that is gone left behind may be gone as well: then it can't be removed, however often it is tried. */
const REMOVAL_TRIES = 5;
/** Characters of JSON that a lease may hold of what a command printed; the whole record may have 4096. */
const DATA_MAX = 3072;
/** Characters of a command's output that are logged or listed. */
const SHOWN = 500;

/** What is to be run, and how it has gone so far. */
class Task {
  failures = 0;
  failure: readonly [what: string, reason: string] | undefined;
  /** Not before this time, in milliseconds of the world's clock. */
  due = 0;

  reset(): void {
    this.failures = this.due = 0;
    this.failure = undefined;
  }
}

interface Added {
  readonly lease: Lease;
  readonly commands: BackendCommands;
  /** The command succeeded; else it was tried. */
  readonly done: boolean;
}

interface Peer {
  /** A former run has added it, and the leases that are there now have not all been read. */
  unread: boolean;
  wanted: { readonly lease: Lease; readonly commands: BackendCommands } | undefined;
  added: Added | undefined;
  readonly task: Task;
}

/** What this node is to `PostStartupCommand`. */
export interface Node {
  readonly network: Prefix;
  readonly subnet: Prefix;
  readonly publicIp: Ipv4;
}

/** A command that is to be run now, and what its end means. */
interface Job {
  readonly task: Task;
  readonly what: string;
  readonly command: Command | undefined;
  /** It is about to be run. */
  begin?(): void;
  done(ended: Ended | undefined): void;
  /** It failed; whether to let it be. */
  failed?(): boolean;
}

export class Commands {
  readonly #world: Pick<World, "added" | "clock" | "log" | "observer" | "runner">;
  readonly #onData: () => void;
  /** Of the backend in force, and by which text they are known. */
  #commands: BackendCommands | undefined;
  #text = "";
  /** What the first command printed; undefined as long as it has not. */
  #prepared: { readonly data: string | undefined } | undefined;
  readonly #preparing = new Task();
  #node: Node | undefined;
  /** The node for which the second command was run. */
  #settled = "";
  readonly #settling = new Task();
  readonly #peers = new Map<string, Peer>();
  /** What is kept of them; undefined until what a former run kept has been read. */
  #kept: Map<string, string> | undefined;
  #stop: (() => void) | undefined;
  #cancel: (() => void) | undefined;
  #stopped = false;

  /** `onData` is told when the lease may be asked for, and when this node is ready. */
  constructor(world: Pick<World, "added" | "clock" | "log" | "observer" | "runner">, onData: () => void) {
    this.#world = world;
    this.#onData = onData;
  }

  /** Sees to the commands of the backend in force. Returns the data of our lease as soon as it may be asked for. */
  prepare(commands: BackendCommands | undefined): { readonly data: string | undefined } | undefined {
    if (this.#kept === undefined) this.#recall();
    if (commands === undefined) {
      this.#commands = this.#node = this.#prepared = undefined;
      this.#text = this.#settled = "";
      return { data: undefined };
    }
    if (commands.text !== this.#text) {
      this.#text = commands.text;
      this.#commands = commands;
      this.#prepared = this.#node = undefined;
      this.#settled = "";
      this.#preparing.reset();
      this.#settling.reset();
      this.#wake();
    }
    return this.#prepared;
  }

  /** This node has a subnet; returns whether the command for that has succeeded. */
  settle(node: Node): boolean {
    if (this.#commands === undefined) return true;
    const text = JSON.stringify(node);
    if (JSON.stringify(this.#node) !== text) {
      this.#node = node;
      this.#settling.reset();
      this.#wake();
    }
    return this.#settled === text;
  }

  /** A peer, or undefined if there is none any more or it is not for these commands. */
  want(key: string, lease: Lease | undefined): void {
    const commands = this.#commands;
    const wanted = lease && commands && { lease, commands };
    const peer = this.#peers.get(key);
    if (peer === undefined) {
      if (wanted === undefined) return;
      this.#peers.set(key, { unread: false, wanted, added: undefined, task: new Task() });
    } else {
      if (!peer.unread && isFor(peer.wanted, wanted)) return;
      peer.unread = false;
      peer.wanted = wanted;
      peer.task.reset();
    }
    this.#wake();
  }

  /** All leases that there are have been read: a peer that a former run added, and that is not among them, is gone. */
  wantNoOthers(): void {
    for (const [key, { unread }] of this.#peers) if (unread) this.want(key, undefined);
  }

  /** Reads what a former run has left. */
  #recall(): void {
    const { added, log } = this.#world;
    this.#kept = new Map();
    try {
      for (const [key, text] of added.all()) {
        const found = decodeAdded(key, text);
        try {
          if ("reason" in found) throw new Error(found.reason);
          const past = { lease: found.lease, commands: commandsFrom(found.commands), done: false };
          this.#kept.set(key, text);
          this.#peers.set(key, { unread: true, wanted: undefined, added: past, task: new Task() });
        } catch (error) {
          log.warn({ reason: reasonOf(error) }, `what a former run kept of the peer ${key} can't be read`);
          added.remove(key);
        }
      }
    } catch (error) {
      log.warn({ reason: reasonOf(error) }, "what a former run kept of its peers can't be read");
    }
  }

  /** Keeps with what a peer is to be taken away, before it is added. It is added even if that fails. */
  #keep(key: string, { lease, commands }: NonNullable<Peer["wanted"]>): void {
    const text = encodeAdded(lease, commands.text);
    if (this.#kept?.get(key) === text) return;
    try {
      this.#world.added.put(key, text);
      this.#kept?.set(key, text);
    } catch (error) {
      this.#world.log.warn(
        { reason: reasonOf(error) },
        `can't write down what is added for the peer ${key}: if it goes while twilld does not run, no SubnetRemoveCommand is run for it`,
      );
    }
  }

  /** Nothing is there of a peer any more. */
  #drop(key: string): void {
    try {
      this.#world.added.remove(key);
      this.#kept?.delete(key);
    } catch (error) {
      this.#world.log.warn(
        { reason: reasonOf(error) },
        `can't remove what is kept of the peer ${key}: the next start will run its SubnetRemoveCommand once more`,
      );
    }
  }

  /** What failed, and why, until it succeeds. */
  failures(): (readonly [what: string, reason: string])[] {
    const peers = [...this.#peers.values()].map(({ task }) => task);
    return [this.#preparing, this.#settling, ...peers].flatMap(({ failure }) =>
      failure === undefined ? [] : [failure],
    );
  }

  stop(): void {
    this.#stopped = true;
    this.#cancel?.();
    this.#stop?.();
  }

  #wake(ms = 0): void {
    this.#cancel?.();
    this.#cancel = undefined;
    if (this.#stopped || this.#stop !== undefined) return;
    this.#cancel = this.#world.clock.after(ms, () => this.#next());
  }

  /** Runs what is due, or waits for what will be next. */
  #next(): void {
    this.#cancel = undefined;
    const now = this.#world.clock.now();
    let soonest = Number.POSITIVE_INFINITY;
    for (const job of this.#jobs()) {
      const { task, command } = job;
      if (command === undefined) {
        // The config has no such command: nothing to do is done at once.
        task.reset();
        job.begin?.();
        job.done(undefined);
      } else if (task.due > now) {
        soonest = Math.min(soonest, task.due);
      } else {
        this.#run(job, command);
        return;
      }
    }
    if (soonest < Number.POSITIVE_INFINITY) this.#wake(soonest - now);
  }

  /** What is to be done, in order. */
  *#jobs(): Generator<Job> {
    const commands = this.#commands;
    const { environment } = this.#world.runner;
    for (const [key, peer] of this.#peers) {
      if (peer.unread) continue;
      if (peer.added !== undefined && !isFor(peer.wanted, peer.added))
        yield this.#removal(key, peer, peer.added);
      else if (peer.wanted === undefined && peer.added === undefined) this.#peers.delete(key);
    }
    if (commands === undefined) return;
    if (this.#prepared === undefined) {
      yield this.#preparation(commands);
      return;
    }
    const node = this.#node;
    if (node === undefined) return;
    if (this.#settled !== JSON.stringify(node)) {
      yield {
        task: this.#settling,
        what: "PostStartupCommand",
        command: commands.postStartup(node, environment),
        done: () => {
          if (this.#node !== node) return;
          this.#settled = JSON.stringify(node);
          this.#onData();
        },
      };
    }
    if (this.#settled === "") return;
    for (const [key, peer] of this.#peers) {
      const { wanted, added } = peer;
      if (wanted !== undefined && !(added?.done === true && isFor(wanted, added)))
        yield this.#addition(key, peer, wanted);
    }
  }

  #preparation(commands: BackendCommands): Job {
    return {
      task: this.#preparing,
      what: "PreStartupCommand",
      command: commands.preStartup(this.#world.runner.environment),
      done: (ended) => {
        if (this.#commands !== commands) return;
        this.#prepared = { data: ended?.stdout.trim() };
        this.#onData();
      },
    };
  }

  #addition(key: string, peer: Peer, wanted: NonNullable<Peer["wanted"]>): Job {
    const { lease, commands } = wanted;
    // If it fails halfway, it has to be taken away nevertheless.
    const added = (done: boolean): void => {
      peer.added = { lease, commands, done };
    };
    const command = commands.subnetAdd(lease, this.#world.runner.environment);
    return {
      task: peer.task,
      what: `SubnetAddCommand for ${formatCidr(lease.subnet)}`,
      command,
      begin: () => this.#keep(key, wanted),
      done: () => added(true),
      failed: () => {
        added(false);
        return false;
      },
    };
  }

  #removal(key: string, peer: Peer, { lease, commands }: Added): Job {
    return {
      task: peer.task,
      what: `SubnetRemoveCommand for ${formatCidr(lease.subnet)}`,
      command: commands.subnetRemove(lease, this.#world.runner.environment),
      done: () => {
        peer.added = undefined;
        this.#drop(key);
        if (peer.wanted === undefined) this.#peers.delete(key);
      },
      // What is wanted in its place should not wait.
      failed: () => peer.wanted !== undefined || peer.task.failures >= REMOVAL_TRIES,
    };
  }

  #run(job: Job, command: Command): void {
    const { log, runner } = this.#world;
    const { task, what } = job;
    job.begin?.();
    log.debug({ argv: command.argv, environment: command.environment }, `running ${what}`);
    const { ended, stop } = runner.run(command);
    this.#stop = stop;
    ended.then((end) => {
      this.#stop = undefined;
      if (this.#stopped) return;
      const problem = end.problem ?? (task === this.#preparing ? tooLong(end.stdout) : undefined);
      const output = shown(end);
      if (problem === undefined) {
        log.info({ ...(output === "" ? {} : { output }) }, `${what}: done`);
        task.reset();
        job.done(end);
      } else {
        this.#fail(job, output === "" ? problem : `${problem}: ${output}`);
      }
      this.#world.observer.changed();
      this.#wake();
    });
  }

  #fail({ task, what, done, failed }: Job, reason: string): void {
    const { log, clock, observer } = this.#world;
    observer.failed("commands");
    task.failures += 1;
    if (failed?.() === true) {
      log.warn({ reason }, `${what} failed, and is not tried again`);
      task.reset();
      done(undefined);
      return;
    }
    if (task.failure?.[1] !== reason) log.warn({ reason }, `${what} failed; trying again`);
    task.failure = [what, reason];
    task.due = clock.now() + Math.min(RETRY_MAX_MS, RETRY_MIN_MS * 2 ** (task.failures - 1));
  }
}

function isFor(a: Peer["wanted"], b: Peer["wanted"]): boolean {
  if (a === undefined || b === undefined) return a === b;
  return a.commands.text === b.commands.text && sameAttributes(a.lease, b.lease);
}

function tooLong(stdout: string): string | undefined {
  const { length } = JSON.stringify(stdout.trim());
  return length <= DATA_MAX
    ? undefined
    : `it printed ${length} characters, and a lease has room for ${DATA_MAX}`;
}

/** What a command said, on one line. */
function shown({ stdout, stderr }: Ended): string {
  const text = [stderr, stdout]
    .map((part) => part.trim().replace(/\s*\n\s*/g, "; "))
    .filter((part) => part !== "")
    .join("; ");
  return text.length > SHOWN ? `${text.slice(0, SHOWN)}...` : text;
}
