/**
 * Random histories against the invariants. A failing history is made smaller and printed as a story, with its seed;
 * kept as scenarios/<what it shows>.txt it is told again with every run. SIM_SEED runs one seed alone and
 * SIM_HISTORIES sets how many are run.
 */
import { expect } from "vitest";
import { randomFrom } from "./fakes.ts";
import { tellStory } from "./story.ts";

const STEPS_MAX = 24;

/** Lines and how often each kind comes, with $n for a node, $p for a peer. */
const LINES: readonly (readonly [weight: number, ...lines: readonly string[]])[] = [
  [6, "pass 10", "pass 150", "pass 1000", "pass 12000"],
  [1, "pass 45000", "suspend 90000", "suspend 3600"],
  // A day, in which leases are renewed, takes as long as a hundred histories.
  [0.02, "pass 90000000"],
  [8, "peer $p", "peer $p moves", "peer $p gone", "peer $p renews"],
  [2, "config vxlan", "config direct", "config mtu", "config host-gw", "config other"],
  [1, "garbage"],
  [2, "wipe", "save", "restore", "compact"],
  [4, "$n kill", "$n start"],
  [4, "$n cut 0", "$n cut 2", "$n join"],
  [3, "$n hold store", "$n hold netlink", "$n release", "$n overrun"],
  [2, "$n loses request", "$n loses answer"],
  [3, "$n deleted", "$n revoked", "$n overwritten"],
  [
    4,
    "$n $d route $p",
    "$n $d nexthop $p",
    "$n $d foreign $p",
    "$n $d neighbour $p",
    "$n $d mac $p",
    "$n $d fdb",
    "$n $d stale",
  ],
  [
    2,
    "$n amid $d route $p",
    "$n amid $d neighbour $p",
    "$n amid $d fdb",
    "$n amid $d mac $p",
    "$n amid $d stale",
  ],
  [1, "$n amid $d gone", "$n amid $d down", "$n amid $d rows", "$n amid $d address"],
  [2, "$n overrun"],
  [3, "$n $d rows", "$n $d programs", "$n $d gone", "$n $d down", "$n $d device", "$n $d address"],
  [2, "$n uplink down", "$n uplink up", "$n uplink moves"],
  [3, "$n pod 5", "$n pod 6", "$n pod 5 gone"],
  [
    3,
    "$n fails writes",
    "$n fails writes",
    "$n fails dump",
    "$n fails load",
    "$n fails activate",
    "$n fails rows",
  ],
  [
    1,
    "$n fails put",
    "$n fails remove",
    "$n fails attachments",
    "$n fails attach",
    "$n fails detach",
    "$n fails disk",
  ],
  [3, "$n heals"],
  [1, "calm"],
];
const TOTAL = LINES.reduce((sum, [weight]) => sum + weight, 0);

function history(seed: number): string[] {
  const random = randomFrom(seed);
  const below = (n: number): number => Math.floor(random() * n);
  const lines: string[] = [];
  for (let left = 4 + below(STEPS_MAX - 4); left > 0; left--) {
    let at = random() * TOTAL;
    const kind = LINES.find(([weight]) => {
      at -= weight;
      return at < 0;
    });
    if (kind === undefined) continue;
    const line = String(kind[1 + below(kind.length - 1)]);
    lines.push(
      line
        .replace("$n", `n${1 + below(2)}`)
        .replace("$p", String(101 + below(6)))
        .replace("$d", below(3) === 0 ? "silently" : "drift"),
    );
  }
  return lines;
}

async function outcome(seed: number, lines: readonly string[]): Promise<string | undefined> {
  try {
    await tellStory(seed, lines);
    return undefined;
  } catch (error) {
    return error instanceof Error ? (error.stack ?? error.message) : String(error);
  }
}

/** Leaves lines out, many at a time at first, as long as something still goes wrong in the same way. */
async function shrink(seed: number, lines: readonly string[], what: string): Promise<string[]> {
  let kept = [...lines];
  const kind = what.slice(0, 10);
  for (let size = Math.ceil(kept.length / 2); size >= 1; size = size === 1 ? 0 : Math.ceil(size / 2)) {
    for (let at = 0; at < kept.length; ) {
      const fewer = [...kept.slice(0, at), ...kept.slice(at + size)];
      if ((await outcome(seed, fewer))?.slice(0, 10) === kind) kept = fewer;
      else at += size;
    }
  }
  return kept;
}

/** Runs the histories of these seeds. Fails with the first that breaks an invariant, made smaller, as a story. */
export async function tellHistories(seeds: Iterable<number>): Promise<void> {
  for (const seed of seeds) {
    const lines = history(seed);
    const what = await outcome(seed, lines);
    if (what === undefined) continue;
    const fewer = await shrink(seed, lines, what);
    expect.fail(`# ${(await outcome(seed, fewer)) ?? what}\n# seed ${seed}\n${fewer.join("\n")}`);
  }
}

/** Every second seed, from `first` on: two files share the histories, so that they run side by side. */
export function seedsFrom(first: 1 | 2): number[] {
  const only = process.env.SIM_SEED;
  if (only !== undefined) return Number(only) % 2 === first % 2 ? [Number(only)] : [];
  const count = Number(process.env.SIM_HISTORIES ?? 10_000);
  return Array.from({ length: Math.ceil(count / 2) }, (_, n) => first + 2 * n);
}
