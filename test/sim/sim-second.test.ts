/** Half of the random histories; sim.test.ts has the others. */
import { test } from "vitest";
import { seedsFrom, tellHistories } from "./histories.ts";

test("random histories keep the invariants", { timeout: 600_000 }, () => tellHistories(seedsFrom(2)));
