/** Stories of scenarios/*.txt: histories that once went wrong. The first line says what one shows. */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "vitest";
import { tellStory } from "./story.ts";

const SCENARIOS = join(import.meta.dirname, "scenarios");

for (const name of readdirSync(SCENARIOS).sort()) {
  const text = readFileSync(join(SCENARIOS, name), "utf8");
  test(`${name}: ${text.split("\n")[0]?.replace(/^# */, "")}`, async () => {
    const seed = Number(/^# *seed (\d+)/m.exec(text)?.[1] ?? 1);
    await tellStory(seed, text.split("\n"));
  });
}
