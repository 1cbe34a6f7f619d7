/** Where results are written, and on what machine they were measured. */
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { arch, cpus, release, totalmem } from "node:os";
import { dirname, join } from "node:path";
import { setTimeout } from "node:timers/promises";
import { exec, repository } from "../test/process.ts";

/** Writes `PREFIX.md` and `PREFIX.json`, and prints the former. */
export function publish(prefix: string, markdown: string, json: unknown): void {
  mkdirSync(dirname(prefix), { recursive: true });
  writeFileSync(`${prefix}.md`, markdown);
  writeFileSync(`${prefix}.json`, `${JSON.stringify(json, undefined, 2)}\n`);
  process.stdout.write(`\n${markdown}\nwritten to ${prefix}.md and ${prefix}.json\n`);
}

/** What was measured, and where. */
export async function describeMachine(): Promise<Record<"commit" | "object" | "kernel" | "machine", string>> {
  const commit = await exec(["git", "-C", repository, "describe", "--always", "--dirty"], { check: false });
  const object = join(repository, "dist/bpf/twill.bpf.o");
  const [first] = cpus();
  const memory = Math.round(totalmem() / 2 ** 30);
  return {
    commit: commit.stdout.trim() || "unknown: not a git checkout",
    object: existsSync(object)
      ? `sha256 ${createHash("sha256").update(readFileSync(object)).digest("hex")}`
      : "not built",
    kernel: `${release()} ${arch()}`,
    machine: `${cpus().length} × ${first?.model.trim() ?? "unknown CPU"}, ${memory} GiB`,
  };
}

/** Share of the processors' time that somebody used during some milliseconds, 0 to 1. */
export async function processorUse(milliseconds: number): Promise<number> {
  const sample = () => {
    const times = cpus().map((cpu) => cpu.times);
    const idle = times.reduce((sum, time) => sum + time.idle, 0);
    const all = times.reduce((sum, time) => sum + time.idle + time.user + time.nice + time.sys + time.irq, 0);
    return { idle, all };
  };
  const before = sample();
  await setTimeout(milliseconds);
  const after = sample();
  return 1 - (after.idle - before.idle) / Math.max(1, after.all - before.all);
}

/**
 * Waits until nobody needs the processors any more, as the kernel does for a while after a namespace with many routes has
 * gone; for two minutes at most. Returns their use at the end, as `processorUse`.
 */
export async function awaitQuiet(): Promise<number> {
  let use = 1;
  for (let second = 0; second < 120 && use > 0.05; second++) use = await processorUse(1000);
  return use;
}
