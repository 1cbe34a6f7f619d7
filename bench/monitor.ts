/**
 * From pod to pod of another host, while a second pod floods the sender's host with packets that are dropped: with
 * `twill monitor` watching and without. The flood is a pod's UDP to the tunnel port of a node, as fast as one
 * process can send; how many were dropped, and how many of them the monitor was told, is noted.
 */
import { join } from "node:path";
import type { Host } from "../test/lab.ts";
import { type Process, repository } from "../test/lab.ts";
import type { Twilld } from "../test/twilld.ts";
import { type Path, type Row, type Suite, startTwillds, subnets } from "./suite.ts";
import { load, udpPackets, type Workload } from "./workloads.ts";

const quiet = "a flood of drops, nobody watches";
const FLOOD = "flood";

const rows: readonly Row[] = [row(quiet, []), row("a flood of drops, twill monitor watches", [quiet])];

export const monitor: Suite = {
  name: "monitor",
  rows,
  workloads: [flooded(udpPackets)],
  kernel: "none",
};

function row(name: string, against: readonly string[]): Row {
  return {
    name,
    against,
    async build(lab, [h1, h2]) {
      const [twilld] = await startTwillds(lab, [nodeOf(h1, 0), nodeOf(h2, 1)], { Type: "vxlan" });
      if (twilld === undefined) throw new Error("no twilld was started");
      await h1.bridge("docker0", "172.7.21.1/24", { mtu: 1450 });
      await h2.bridge("docker0", "172.7.22.1/24", { mtu: 1450 });
      const from = await h1.pod("a", "172.7.21.2/24", { mtu: 1450 });
      const flood = await h1.pod(FLOOD, "172.7.21.3/24", { mtu: 1450 });
      const to = await h2.pod("a", "172.7.22.2/24", { mtu: 1450 });
      floods.set(from.netns, () => flood.spawn([load, "blast", h2.address, "8472", "3600", "64"]));
      if (against.length > 0) {
        const command = `exec ${join(repository, "bin/twill")} monitor --json --pin-path=${h1.pinPath} | wc -l`;
        await h1.spawn(["sh", "-c", command]).line(/^watching /);
      }
      return { from, to, address: to.address, check: () => Promise.resolve(noteOf(twilld)) } satisfies Path;
    },
  };
}

/** How the pods of a lab are flooded, by the sender. */
const floods = new Map<string, () => Process>();

function flooded(workload: Workload): Workload {
  return {
    metrics: workload.metrics,
    async run(from, to, address, seconds) {
      const flood = floods.get(from.netns)?.();
      try {
        return await workload.run(from, to, address, seconds);
      } finally {
        await flood?.stop("SIGKILL");
      }
    },
  };
}

function nodeOf(host: Host, index: 0 | 1): readonly [Host, string] {
  return [host, subnets[index]];
}

function noteOf(twilld: Twilld): string | undefined {
  const dropped = twilld.packets("from_pod", "drop_pod_tunnel");
  return dropped === 0 ? undefined : `${dropped} packets dropped in all`;
}
