// Three projects, one after the other. `pure` touches nothing outside the process; `real` needs root, a kernel and
// the services of the lab. Hosts are namespaces of their own, so that two files at a time get along. `quiet` counts
// lost packets and broken connections, and shares the machine with no other test.
import { defineConfig } from "vitest/config";
import { BaseSequencer, type TestSpecification } from "vitest/node";

const real = ["test/{bpf,deploy,edge,e2e,loader}/**/*.test.ts"];
const quiet = ["test/e2e/{fault,restart,scenario,wire}.test.ts"];
// An emulated processor (test/kernel/run) takes longer.
const slowness = Number(process.env.TWILL_SLOWNESS ?? 1);
const patience = { testTimeout: slowness * 60_000, hookTimeout: slowness * 120_000 };

/** The files that take longest, which would else end alone, while the other processor waits; in the order of their length. */
const LONG = ["e2e/move", "e2e/packets", "e2e/docker", "e2e/kubeproxy", "e2e/masquerade", "e2e/services"];

class LongestFirst extends BaseSequencer {
  override async sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    const rank = ({ moduleId }: TestSpecification): number => {
      const place = LONG.findIndex((name) => moduleId.endsWith(`/test/${name}.test.ts`));
      return place < 0 ? LONG.length : place;
    };
    return (await super.sort(files)).sort((a, b) => rank(a) - rank(b));
  }
}

export default defineConfig({
  test: {
    pool: "forks",
    sequence: { sequencer: LongestFirst },
    projects: [
      {
        extends: true,
        test: {
          name: "pure",
          // Loads of random cases, on machines that have other things to do as well.
          testTimeout: 60_000,
          include: ["test/**/*.test.ts"],
          exclude: real,
          maxWorkers: 2,
          sequence: { groupOrder: 1 },
        },
      },
      {
        extends: true,
        test: {
          name: "real",
          include: real,
          exclude: quiet,
          maxWorkers: 2,
          sequence: { groupOrder: 2 },
          ...patience,
        },
      },
      {
        extends: true,
        test: { name: "quiet", include: quiet, maxWorkers: 1, sequence: { groupOrder: 3 }, ...patience },
      },
    ],
  },
});
