/** How figures are summed up and shown, and on what machine they were measured. */
import { arch, cpus, release, totalmem } from "node:os";
import { exec, repository } from "../test/lab.ts";

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length / 2;
  const [low, high] = [sorted[Math.ceil(middle) - 1] ?? Number.NaN, sorted[Math.floor(middle)] ?? Number.NaN];
  return (low + high) / 2;
}

/** A cell of a table: the median, and the range if there was more than one round. */
export function spread(values: readonly number[], digits: number): string {
  const [low, middle, high] = [Math.min(...values), median(values), Math.max(...values)].map((v) =>
    v.toFixed(digits),
  );
  return values.length > 1 ? ` ${middle} (${low} to ${high}) |` : ` ${middle} |`;
}

/** What was measured, and where. */
export async function describeMachine(): Promise<Record<"commit" | "kernel" | "machine", string>> {
  const commit = await exec(["git", "-C", repository, "describe", "--always", "--dirty"], { check: false });
  const [first] = cpus();
  const memory = Math.round(totalmem() / 2 ** 30);
  return {
    commit: commit.stdout.trim() || "unknown: not a git checkout",
    kernel: `${release()} ${arch()}`,
    machine: `${cpus().length} × ${first?.model.trim() ?? "unknown CPU"}, ${memory} GiB`,
  };
}
