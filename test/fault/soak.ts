/**
 * Churn for ten minutes: leases come and go, pods come and go, etcd is killed and comes back. What the daemon
 * holds at the end is compared with what it held after two minutes: descriptors, maps, programs, and heap after a
 * collection. `SOAK_MINUTES` makes it shorter; the base line is taken after a fifth of it.
 */
import { readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { exec, until } from "../lab.ts";
import { Twilld, twilldFlags, twilldProgram } from "../twilld.ts";
import { SUBNETS, World } from "./world.ts";

const MINUTES = Number(process.env.SOAK_MINUTES ?? 10);
/** What a round of churn may leave in caches for a while, in bytes of heap. */
const HEAP_SLACK = 2 << 20;

interface Holding {
  readonly descriptors: number;
  readonly maps: number;
  readonly programs: number;
  readonly heap: number;
}

let world: World | undefined;
afterAll(() => world?.close());

/** What the daemon holds once nothing is under way. */
async function holding(twilld: Twilld): Promise<Holding> {
  const after = twilld.process.lines.length;
  twilld.process.kill("SIGUSR2");
  const [, heap] = await twilld.says(/^heap (\d+)$/, { after });
  const { pid } = twilld.process;
  const { stdout } = await exec(["sh", "-c", `cat /proc/${pid}/fdinfo/*`]);
  const held = (kind: "map" | "prog") => new Set(stdout.match(new RegExp(`^${kind}_id:.*`, "gm"))).size;
  return {
    descriptors: readdirSync(`/proc/${pid}/fd`).length,
    maps: held("map"),
    programs: held("prog"),
    heap: Number(heap),
  };
}

test("after churn the daemon holds what it held before", { timeout: (MINUTES + 3) * 60_000 }, async () => {
  world = await World.create();
  const { host } = world.touched;
  const probe = join(host.directory, "heap.mjs");
  // Twice, as what a finalizer lets go of is collected by the next.
  writeFileSync(
    probe,
    `process.on("SIGUSR2", () => {
  gc();
  setImmediate(() => { gc(); console.log("heap " + process.memoryUsage().heapUsed); });
});
`,
  );
  await world.touched.twilld.stop();
  const flags = twilldFlags(host, world.etcd);
  const argv = [process.execPath, "--expose-gc", `--import=${probe}`, twilldProgram, ...flags];
  const twilld = new Twilld(host, host.spawn(argv, { cwd: host.directory }), flags);
  world.touched.twilld = twilld;
  await twilld.ready();
  await world.settled();

  const began = Date.now();
  let round = 0;
  const churn = async (now: World) => {
    round += 1;
    const puts = Array.from({ length: 60 }, (_, i) => {
      const value = {
        PublicIP: `10.4.7.${100 + (i % 100)}`,
        BackendType: "vxlan",
        BackendData: {
          VNI: 1,
          VtepMAC: `02:00:00:00:${(round % 256).toString(16).padStart(2, "0")}:${i.toString(16).padStart(2, "0")}`,
        },
      };
      return `put ${SUBNETS}/172.7.${100 + i}.0-24 ${JSON.stringify(JSON.stringify(value))}`;
    });
    const txn = (lines: readonly string[]) =>
      now.etcd.host.exec(["etcdctl", `--endpoints=${now.etcd.endpoints.join(",")}`, "txn"], {
        env: { ETCDCTL_API: "3" },
        input: `\n${lines.join("\n")}\n\n\n`,
      });
    await txn(puts);
    await until("the last peer to be routed to", () => now.hasRoute(now.touched, 159));
    const pods = [];
    for (let i = 0; i < 5; i++) pods.push(await host.pod(`s${i}`, `172.7.21.${20 + i}/24`, { mtu: 1450 }));
    for (const pod of pods) await pod.ping(now.nodes[1].pod.address, { count: 1 });
    for (const pod of pods) await pod.remove();
    await host.ip("route del 172.7.22.0/24");
    await until("the route to be back", () => now.hasRoute(now.touched, 22));
    await txn(Array.from({ length: 60 }, (_, i) => `del ${SUBNETS}/172.7.${100 + i}.0-24`));
    await until("the last peer to be gone", async () => !(await now.hasRoute(now.touched, 159)));
    if (round % 5 === 0) {
      await now.etcd.stopMember(0);
      await now.etcd.startMember(0);
      await now.settled();
    }
  };

  while (Date.now() - began < (MINUTES * 60_000) / 5) await churn(world);
  await world.settled();
  const before = await holding(twilld);
  const rounds = round;
  while (Date.now() - began < MINUTES * 60_000) await churn(world);
  await world.settled();
  const after = await holding(twilld);
  console.log(`soak: ${rounds} rounds, then ${round - rounds} more`, JSON.stringify({ before, after }));
  expect({ ...after, heap: 0 }).toEqual({ ...before, heap: 0 });
  expect(after.heap - before.heap).toBeLessThan(HEAP_SLACK);
});
