/**
 * Programs of the network config, run by the daemon with its own rights. Each is the leader of a process group of its own,
 * so that what it started ends with it when its time is up.
 */
import { spawn } from "node:child_process";
import type { Command } from "../core/command.ts";
import type { Ended, Runner } from "../core/world.ts";

/** Bytes of a program's output that are kept, of each stream; the rest is read and thrown away. */
const OUTPUT_MAX = 65_536;
/** What a program left running in the background may hold its output open; so long is waited for the rest of it. */
const LINGER_MS = 500;
/** For etcd; no command needs it. */
const SECRETS: ReadonlySet<string> = new Set(["FLANNELD_ETCD_PASSWORD"]);

/** What runs programs with the environment of this process, without its secrets. */
export function openRunner(inherited: NodeJS.ProcessEnv = process.env): Runner {
  const environment: Record<string, string> = {};
  for (const [name, value] of Object.entries(inherited))
    if (value !== undefined && !SECRETS.has(name)) environment[name] = value;
  return { environment, run: (command) => run(command, environment) };
}

function run(
  { argv, environment, input, timeoutMs }: Command,
  inherited: Readonly<Record<string, string>>,
): ReturnType<Runner["run"]> {
  const [program = "", ...rest] = argv;
  const child = spawn(program, rest, {
    detached: true,
    env: { ...inherited, ...environment },
    stdio: ["pipe", "pipe", "pipe"],
  });
  const texts = { stdout: "", stderr: "" };
  for (const stream of ["stdout", "stderr"] as const) {
    child[stream].setEncoding("utf8").on("data", (chunk: string) => {
      texts[stream] = (texts[stream] + chunk).slice(0, OUTPUT_MAX);
    });
  }
  // A program need not read what it is told.
  child.stdin.on("error", () => undefined).end(input);
  let isOver = false;
  const stop = (): void => {
    if (isOver || child.pid === undefined) return;
    try {
      process.kill(-child.pid, "SIGKILL");
    } catch {
      // Gone by itself.
    }
  };
  const ended = new Promise<Ended>((resolve) => {
    let late = false;
    const timer = setTimeout(() => {
      late = true;
      stop();
    }, timeoutMs);
    const finish = (problem: string | undefined): void => {
      clearTimeout(timer);
      child.stdout.destroy();
      child.stderr.destroy();
      resolve({ ...texts, problem });
    };
    child.on("error", (error: NodeJS.ErrnoException) => {
      const reason = error.code === "ENOENT" ? "there is no such program" : error.message;
      finish(`${program} cannot be run: ${reason}`);
    });
    child.on("exit", (code, signal) => {
      // What it leaves running is meant to go on.
      isOver = true;
      const problem = late
        ? `it took longer than ${timeoutMs / 1000} s and was ended`
        : signal !== null
          ? `it was ended by ${signal}`
          : code === 0
            ? undefined
            : `exit code ${code}`;
      const linger = setTimeout(() => finish(problem), LINGER_MS);
      child.on("close", () => {
        clearTimeout(linger);
        finish(problem);
      });
    });
  });
  return { ended, stop };
}
