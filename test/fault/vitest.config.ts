// All faults, which `make test` has no time for; see run.
import { defineConfig } from "vitest/config";

export default defineConfig({
  test: {
    pool: "forks",
    // `make soak` names its file; without a name only the faults are run.
    include: process.argv.some((word) => word.endsWith("soak.ts"))
      ? ["test/fault/soak.ts"]
      : ["test/fault/*.fault.ts"],
    fileParallelism: false,
    testTimeout: 180_000,
    hookTimeout: 120_000,
  },
});
