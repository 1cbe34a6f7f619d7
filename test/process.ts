/**
 * Starting programs, waiting for what they say, and ending them.
 *
 * Every process the tests, the demo or the benchmark start goes through here, for one reason: what was started
 * must be found again, also when we ourselves were killed. So each one leads a process group of its own and is
 * written, with its start time, to the pid file of the run, from which `test/sweep` can tell it from a later
 * process that happens to have the same number.
 *
 * Waiting is for events: a line, a file, an exit. Only `until` without a wake-up source looks again and again;
 * it is for states that nobody announces.
 */
import { type ChildProcessByStdio, execFileSync, type SpawnOptions, spawn } from "node:child_process";
import { appendFileSync, existsSync, mkdirSync, readdirSync, readFileSync, rmSync, watch } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import type { Readable } from "node:stream";
import { fileURLToPath } from "node:url";

/** Default deadline of every wait, in milliseconds: generous, as the machine may be busy. */
export const patience = 15_000;

/** The run all leftovers are named after: `TWILL_TEST_RUN`, else the number of this process. */
export const runId = process.env.TWILL_TEST_RUN ?? String(process.pid);

/** Where the run keeps its files, its pid file first of all. */
export const runDirectory = process.env.TWILL_TEST_DIRECTORY ?? join(tmpdir(), `twill-${runId}`);

/** The directory that holds package.json, from the sources as well as from `dist`. */
export const repository = (() => {
  let directory = dirname(fileURLToPath(import.meta.url));
  while (!existsSync(join(directory, "package.json"))) {
    if (directory === "/")
      throw new Error("no package.json above test/process.ts: run from a checkout of Twill");
    directory = dirname(directory);
  }
  return directory;
})();

export interface RunOptions {
  readonly cwd?: string;
  /** Added to the environment; undefined removes a variable. */
  readonly env?: Readonly<Record<string, string | undefined>>;
  /** Milliseconds. */
  readonly timeout?: number;
}

export interface ExecOptions extends RunOptions {
  readonly input?: string;
  /** A non-zero exit throws, unless this is false. */
  readonly check?: boolean;
}

export interface Exit {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
}

export interface Outcome extends Exit {
  readonly stdout: string;
  readonly stderr: string;
}

export interface Line {
  readonly stream: "stdout" | "stderr";
  readonly text: string;
}

/** Runs a program to its end. Throws with its last words when it fails (unless `check` is false) or takes too long. */
export async function exec(argv: readonly string[], options: ExecOptions = {}): Promise<Outcome> {
  const child = new Process(argv, options, options.input);
  const timeout = options.timeout ?? 2 * patience;
  const exit = await within(timeout, child.exited, () => `'${argv.join(" ")}' to end`).catch(
    async (error) => {
      if (child.running) await child.stop("SIGKILL");
      throw error;
    },
  );
  const outcome = { ...exit, stdout: child.text("stdout"), stderr: child.text("stderr") };
  if (options.check !== false && exit.code !== 0) {
    const how = exit.signal === null ? `exit code ${exit.code}` : exit.signal;
    throw new Error(`'${argv.join(" ")}' failed (${how}): ${(outcome.stderr || outcome.stdout).trim()}`);
  }
  return outcome;
}

/** A program that runs while we do other things. Its output is kept, by line. */
export class Process {
  readonly argv: readonly string[];
  readonly pid: number;
  readonly exited: Promise<Exit>;
  readonly lines: Line[] = [];
  #reaped = false;
  #stopping = false;
  #ended = false;
  readonly #listeners = new Set<() => void>();
  readonly #chunks: { stdout: string; stderr: string } = { stdout: "", stderr: "" };

  constructor(argv: readonly string[], options: RunOptions = {}, input?: string) {
    const [command, ...rest] = argv;
    if (command === undefined) throw new Error("nothing to run: the command line is empty");
    this.argv = argv;
    const env = { ...process.env, ...options.env };
    const settings: SpawnOptions = {
      env,
      detached: true,
      stdio: [input === undefined ? "ignore" : "pipe", "pipe", "pipe"],
    };
    if (options.cwd !== undefined) settings.cwd = options.cwd;
    const child = spawn(command, rest, settings) as ChildProcessByStdio<null, Readable, Readable>;
    this.exited = new Promise((resolve, reject) => {
      child.once("error", (error) => {
        this.#ended = true;
        reject(new Error(`cannot run '${command}': ${error.message}`));
        this.#wake();
      });
      child.once("exit", () => {
        this.#reaped = true;
        // What it started may hold the pipes open; when it is to stop, so are they.
        if (this.#stopping) signalTo(-this.pid, "SIGKILL");
      });
      // `close`, not `exit`: by then all that the program wrote has been read.
      child.once("close", (code, signal) => {
        this.#ended = true;
        resolve({ code, signal });
        this.#wake();
      });
    });
    // Whoever needs the outcome awaits it; nobody has to.
    this.exited.catch(() => undefined);
    this.pid = child.pid ?? -1;
    if (child.pid !== undefined) {
      record(child.pid);
      living++;
      child.once("close", () => {
        living--;
        tidy();
      });
    }
    this.#read("stdout", child.stdout);
    this.#read("stderr", child.stderr);
    if (input !== undefined) {
      const stdin = (child as unknown as { stdin: NodeJS.WritableStream }).stdin;
      // A program may end without reading all of its input; its exit code tells what matters.
      stdin.on("error", () => undefined);
      stdin.end(input);
    }
  }

  get running(): boolean {
    return !this.#ended;
  }

  /** All that was written to one stream, or to both in the order of arrival. */
  text(stream?: "stdout" | "stderr"): string {
    if (stream !== undefined) return this.#chunks[stream];
    return this.lines.map((line) => line.text).join("\n");
  }

  /**
   * Waits for a line that matches, on either stream. Lines from before the call count from index `after` of
   * `lines` on (default: all of them).
   */
  async line(pattern: RegExp, options: { timeout?: number; after?: number } = {}): Promise<RegExpExecArray> {
    let next = options.after ?? 0;
    const scan = (): RegExpExecArray | undefined => {
      for (; next < this.lines.length; next++) {
        const match = pattern.exec(this.lines[next]?.text ?? "");
        if (match !== null) return match;
      }
      if (this.#ended)
        throw new Error(`'${this.argv.join(" ")}' ended before it wrote ${pattern}:\n${this.#tail()}`);
      return undefined;
    };
    const found = new Promise<RegExpExecArray>((resolve, reject) => {
      const look = () => {
        try {
          const match = scan();
          if (match === undefined) return;
          resolve(match);
        } catch (error) {
          reject(error);
        }
        this.#listeners.delete(look);
      };
      this.#listeners.add(look);
      look();
    });
    return within(
      options.timeout ?? patience,
      found,
      () => `'${this.argv.join(" ")}' to write ${pattern}; so far:\n${this.#tail()}`,
    );
  }

  /** Calls back after each new line and at the end. Returns the way to stop that. */
  onOutput(listener: () => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** Sends a signal to the program alone, not to what it started. */
  kill(signal: NodeJS.Signals): void {
    if (!this.#reaped && this.pid > 0) signalTo(this.pid, signal);
  }

  /** Ends the program, by SIGKILL if it does not heed the signal in time, and what is left of its process group. */
  async stop(signal: NodeJS.Signals = "SIGTERM", timeout = patience): Promise<Exit> {
    this.#stopping = true;
    if (this.#reaped) signalTo(-this.pid, "SIGKILL");
    this.kill(signal);
    const timer = setTimeout(() => this.pid > 0 && signalTo(-this.pid, "SIGKILL"), timeout);
    try {
      return await this.exited;
    } finally {
      clearTimeout(timer);
    }
  }

  #read(stream: "stdout" | "stderr", readable: Readable): void {
    let rest = "";
    readable.setEncoding("utf8");
    readable.on("data", (chunk: string) => {
      this.#chunks[stream] += chunk;
      const parts = (rest + chunk).split("\n");
      rest = parts.pop() ?? "";
      for (const text of parts) this.lines.push({ stream, text });
      this.#wake();
    });
    readable.on("end", () => {
      if (rest !== "") this.lines.push({ stream, text: rest });
    });
  }

  #wake(): void {
    for (const listener of [...this.#listeners]) listener();
  }

  #tail(): string {
    return this.lines
      .slice(-15)
      .map((line) => `  ${line.text}`)
      .join("\n");
  }
}

/**
 * Waits until `check` returns something (neither undefined nor false) and hands it back. It is called at once,
 * then at each wake-up; without a source of wake-ups every 50 ms. An error of `check` ends the wait.
 */
export async function until<T>(
  what: string,
  check: () => Promise<T | undefined | false> | T | undefined | false,
  options: { timeout?: number; wake?: (listener: () => void) => () => void } = {},
): Promise<T> {
  const { timeout = patience, wake = everySoOften } = options;
  let woken = true;
  let ring: () => void = () => undefined;
  const unsubscribe = wake(() => {
    woken = true;
    ring();
  });
  let over = false;
  const attempt = (async () => {
    while (!over) {
      woken = false;
      const result = await check();
      if (result !== undefined && result !== false) return result;
      if (woken || over) continue;
      await new Promise<void>((resolve) => {
        ring = resolve;
      });
    }
    throw new Error("unreachable: the deadline was reported first");
  })();
  attempt.catch(() => undefined);
  try {
    return await within(timeout, attempt, () => what);
  } finally {
    over = true;
    unsubscribe();
    ring();
  }
}

/** Waits until the file exists and its content satisfies `accept`; returns the content. Its directory must exist. */
export async function fileAppears(
  path: string,
  accept: (content: string) => boolean = () => true,
  options: { timeout?: number } = {},
): Promise<string> {
  const read = () => {
    if (!existsSync(path)) return undefined;
    const content = readFileSync(path, "utf8");
    // An empty file is a result too, so it is wrapped.
    return accept(content) ? { content } : undefined;
  };
  const wake = (listener: () => void) => {
    const watcher = watch(dirname(path), listener);
    return () => watcher.close();
  };
  return (await until(`${path} to appear`, read, { ...options, wake })).content;
}

/** The value of a promise, or an error that says what was waited for once the time is up. */
export async function within<T>(timeout: number, promise: Promise<T>, what: () => string): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const expired = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`waited ${timeout} ms in vain for ${what()}`)), timeout);
  });
  try {
    return await Promise.race([promise, expired]);
  } finally {
    clearTimeout(timer);
  }
}

/** Removes the run's directory if only the pid file is in it and nobody else shares the run. */
export function tidy(): void {
  if (shared || living > 0 || !existsSync(runDirectory)) return;
  const left = readdirSync(runDirectory).filter((name) => name !== "pids");
  if (left.length === 0) rmSync(runDirectory, { recursive: true });
}

/** Start time of a process in clock ticks since boot (field 22 of /proc/PID/stat), or undefined when it is gone. */
export function startTime(pid: number): string | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
    // The second field is the command in parentheses and may itself hold both blanks and parentheses.
    return stat.slice(stat.lastIndexOf(")") + 2).split(" ")[19];
  } catch {
    return undefined;
  }
}

// Whoever set the run's id began it and sweeps it at its end.
const shared = process.env.TWILL_TEST_RUN !== undefined;
let sweeping = false;
let living = 0;

function record(pid: number): void {
  const start = startTime(pid);
  if (start === undefined) return;
  // A process that ends early, by an error nobody caught or by process.exit, still leaves nothing behind.
  if (!sweeping && !shared) process.once("exit", sweepNow);
  sweeping = true;
  mkdirSync(runDirectory, { recursive: true });
  appendFileSync(join(runDirectory, "pids"), `${pid} ${start}\n`);
}

function sweepNow(): void {
  execFileSync(join(repository, "test/sweep"), [runId], { stdio: "inherit" });
}

function signalTo(target: number, signal: NodeJS.Signals): void {
  try {
    process.kill(target, signal);
  } catch (error) {
    // Already gone is what we wanted.
    if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error;
  }
}

function everySoOften(listener: () => void): () => void {
  const timer = setInterval(listener, 50);
  return () => clearInterval(timer);
}
