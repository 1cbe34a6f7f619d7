/**
 * One whole node of a fleet in a process of its own: `bench/fleet.ts` starts it and tells it what to do.
 *
 * It is the agent of twilld with the real store, on a kernel and programs in memory (`test/sim/fakes.ts`): what it
 * costs beside the kernel's part, and how soon it has what etcd tells, undisturbed by the other nodes of the fleet but for
 * the processor that they share.
 */
import { Agent } from "../src/agent.ts";
import { openStore, type Store } from "../src/edge/etcd.ts";
import { cidr, FakeDataplane, FakeKernel, ip } from "../test/sim/fakes.ts";
import type { AgentOrder, AgentReading } from "./fleet.ts";
import { serve } from "./worker.ts";

const PREFIX = "/coreos.com/network";
const quiet = {
  debug: () => undefined,
  info: () => undefined,
  warn: () => undefined,
  error: () => undefined,
};

/** Milliseconds of the clock that all processes of the machine share. */
const now = (): number => Number(process.hrtime.bigint()) / 1e6;

/** When each key was in the desired state, and when a round had brought it to the kernel. */
const desired: [key: string, at: number][] = [];
const written: [key: string, at: number][] = [];
/** Told by etcd, but not yet by a round brought to the kernel. */
const waiting: string[] = [];
/** A round is to come: what was told has changed something. */
let isRoundDue = false;
let revision = 0n;
let agent: Agent | undefined;

function makeHost(): FakeKernel {
  const kernel = new FakeKernel();
  kernel.addLink("lo", { index: 1, loopback: true, type: 772, mac: undefined, mtu: 65536 });
  kernel.addLink("eth0", { index: 2 });
  kernel.addAddress(1, cidr("127.0.0.1/8"));
  kernel.addAddress(2, { address: ip("172.31.255.1"), length: 12 });
  kernel.events.length = 0;
  return kernel;
}

function start(store: Store): Agent {
  const kernel = makeHost();
  const dataplane = new FakeDataplane(kernel);
  let isDelivering = false;
  /** What the kernel announces, and programs, come a little later; and the fakes' diaries are nobody's to read here. */
  const deliver = (): void => {
    kernel.writes.length = dataplane.writes.length = 0;
    if (isDelivering || kernel.events.length + dataplane.loads.length === 0) return;
    isDelivering = true;
    setImmediate(() => {
      isDelivering = false;
      for (const load of dataplane.loads.splice(0)) load();
      for (const event of kernel.events.splice(0)) agent?.onNetlink(event);
    });
  };
  return new Agent(
    {
      wish: {
        interfaces: ["eth0"],
        interfacePatterns: [],
        interfaceCanReach: undefined,
        publicIp: undefined,
      },
      renewMarginMs: 3_600_000,
      previous: undefined,
      fastPath: "FAST_PATH_AUTO",
      ipMasq: false,
      blackholeRoute: false,
      resyncMs: 10_000,
      sourcePorts: { min: 32768, max: 60999 },
      ttl: 64,
    },
    {
      kernel: kernel.port,
      dataplane: dataplane.open(),
      store,
      clock: {
        now,
        uptime: now,
        after: (ms, callback) => {
          if (ms > 0) {
            // A timer cuts fractions off, and would fire before its time.
            const timer = setTimeout(callback, Math.ceil(ms));
            return () => clearTimeout(timer);
          }
          isRoundDue = true;
          const soon = setImmediate(() => {
            isRoundDue = false;
            callback();
          });
          return () => clearImmediate(soon);
        },
      },
      random: Math.random,
      writeSubnetFile: () => undefined,
      log: quiet,
      observer: {
        reconciled: () => {
          const at = now();
          if (agent?.isUpToDate === true) for (const key of waiting.splice(0)) written.push([key, at]);
          deliver();
        },
        repaired: () => undefined,
        failed: () => undefined,
        lease: () => undefined,
        changed: () => undefined,
        ready: () => undefined,
      },
      claim: () => undefined,
      runner: {
        environment: {},
        run: () => {
          throw new Error("the fleet's network has no commands");
        },
      },
      added: { all: () => new Map(), put: () => undefined, remove: () => undefined },
    },
    (error) => {
      process.stderr.write(`fleet-agent: ${error.message}\n`);
      process.exit(1);
    },
  );
}

async function follow(store: Store): Promise<void> {
  for await (const event of store.watch(new AbortController().signal)) {
    agent?.onStore(event);
    if (event.kind === "reset") continue;
    revision = event.revision;
    if (event.kind !== "put") continue;
    desired.push([event.key, now()]);
    if (isRoundDue) waiting.push(event.key);
  }
}

async function obey(order: AgentOrder): Promise<AgentReading | undefined> {
  switch (order.do) {
    case "boot": {
      const store = await openStore({ endpoints: [order.endpoint], prefix: PREFIX, log: quiet });
      agent = start(store);
      agent.start();
      void follow(store);
      return until(() => agent?.isUpToDate === true && agent.status().ready);
    }
    case "catch up":
      return until(() => revision >= BigInt(order.revision) && waiting.length === 0);
    case "read": {
      const { user, system } = process.cpuUsage();
      const { peers = 0, failures = [] } = agent?.status() ?? {};
      const [problem] = failures;
      if (problem !== undefined) throw new Error(`the agent fails at ${problem.what}: ${problem.reason}`);
      return {
        processorSeconds: (user + system) / 1e6,
        peers,
        desired: desired.splice(0),
        written: written.splice(0),
      };
    }
  }
}

/** Looks now and then: to be told of every event would cost what is measured. */
async function until(condition: () => boolean): Promise<undefined> {
  while (!condition()) await new Promise((resolve) => setTimeout(resolve, 20));
  return undefined;
}

serve(obey);
