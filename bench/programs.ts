/**
 * `make bench-programs`: what the programs cost for one packet, without the kernel around them.
 *
 * Each is run by BPF_PROG_TEST_RUN on one packet, again and again, in turns with a program that does nothing, whose time
 * is taken off: the clock and the kernel's way in and out are part of both. A run changes the packet, so that each gets a
 * fresh one. `bench/again.c` runs them; bench/programs runs this, with a network and a bpffs of its own.
 *
 *   bench/programs [--runs N] [--out PREFIX]      N runs of each in all, in five rounds
 */
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { compile } from "../loader/compile.ts";
import { type BpfObject, openObject } from "../loader/object.ts";
import { type Program, programInfo } from "../loader/program.ts";
import { address4Layout, endpoint4Layout, peer4Layout, subnet4Layout } from "../src/abi/twill.gen.ts";
import { answer, NODE, Outside, REMOTE } from "../test/bpf/outside.ts";
import { frame, ip4, type Packet4, readFrame, vxlan4 } from "../test/bpf/packets.ts";
import {
  DIRECT,
  GATEWAY_MAC,
  type HookName,
  LO_MAC,
  NEIGHBOUR,
  Node,
  OTHER_MAC,
  POD,
  TUNNEL,
  VTEP,
  VTEP_MAC,
} from "../test/bpf/programs.ts";
import { repository } from "../test/lab.ts";
import { median, type Report, resultOf, tables } from "./figures.ts";
import { describeMachine, publish } from "./machine.ts";

interface Case {
  readonly name: string;
  readonly hook: HookName;
  /** Of an IP packet, in a frame. */
  readonly packet: Buffer;
  /** What the program has to answer: the case is what its name says. */
  readonly action: number;
}

const REDIRECT = 7;
/** The program of again.c, and the processor that it runs on. */
const again = join(repository, "dist/bench/again");
const CPU = "1";
/** Runs are summed up in so many rounds, of which the spread is told. */
const ROUNDS = 5;
const body: Packet4["body"] = { udp: [1000, 2000], data: new Uint8Array(64) };

const sent = (destination: string): Buffer =>
  frame(GATEWAY_MAC, POD.mac, ip4({ source: POD.address, destination, body }));
const opened = frame(VTEP_MAC, TUNNEL.mac, ip4({ source: TUNNEL.pod, destination: POD.address, body }));
const tunnelled = frame(
  LO_MAC,
  OTHER_MAC,
  vxlan4({ source: TUNNEL.address, destination: VTEP, frame: opened }),
);
const arrived = (packet: Packet4): Buffer => frame(LO_MAC, OTHER_MAC, ip4(packet));

/**
 * The way to the outside, for the kernel to find: BPF_PROG_TEST_RUN puts packets on the loopback interface, and pods are
 * behind it; the node's uplink is another one.
 */
function makeUplink(): number {
  execFileSync("sh", [
    "-ec",
    `ip link set lo up
    ip link add up0 type veth peer name wire
    ip address add ${NODE}/24 dev up0
    ip link set up0 up; ip link set wire up
    echo 1 >/proc/sys/net/ipv4/conf/all/forwarding
    ip route add default via 10.4.7.1
    ip neighbour add 10.4.7.1 lladdr ${OTHER_MAC} dev up0 nud permanent`,
  ]);
  const [link] = JSON.parse(execFileSync("ip", ["-j", "link", "show", "up0"], { encoding: "utf8" }));
  return link.ifindex;
}

const cases: readonly Case[] = [
  { name: "from_pod, encapsulates", hook: "from_pod", packet: sent(TUNNEL.pod), action: REDIRECT },
  { name: "from_pod, routes directly", hook: "from_pod", packet: sent(DIRECT.pod), action: REDIRECT },
  { name: "from_pod, delivers here", hook: "from_pod", packet: sent(NEIGHBOUR.address), action: REDIRECT },
  {
    name: "from_net, decapsulates",
    hook: "from_net",
    packet: tunnelled,
    action: REDIRECT,
  },
  {
    name: "from_net, delivers what came directly",
    hook: "from_net",
    packet: arrived({ source: DIRECT.pod, destination: POD.address, body }),
    action: REDIRECT,
  },
  {
    name: "to_net, the tunnel's own packet",
    hook: "to_net",
    packet: arrived({ source: VTEP, destination: TUNNEL.address, body }),
    action: -1,
  },
];

/** A flow to the outside, which the stack has let through once, and the cases of its packets. */
function openConnection(outside: Outside): (Case & { readonly node: Node })[] {
  const ifindex = makeUplink();
  outside.uplink(NODE, "0.0.0.0", ifindex);
  outside.uplink(NODE);
  const { node } = outside;
  const ctx = Buffer.alloc(192);
  ctx.writeUInt32LE(ifindex, 40);
  const data = frame(OTHER_MAC, LO_MAC, ip4({ source: POD.address, destination: REMOTE, body }));
  const left = readFrame(node.object.program("to_net").testRun({ data, ctx }).data).payload;
  return [
    { name: "from_pod, masquerades", hook: "from_pod", packet: sent(REMOTE), action: REDIRECT, node },
    {
      name: "from_net, delivers an answer to a masqueraded pod",
      hook: "from_net",
      packet: frame(LO_MAC, OTHER_MAC, answer(left)),
      action: REDIRECT,
      node,
    },
  ];
}

/** What the programs are made of, and a program that does nothing; `times` the same in one run. */
const steps = [
  { name: "step: find an address, as in endpoints4 and peers4", program: "address", times: 8 },
  { name: "step: find a subnet, as in subnets4", program: "subnet", times: 8 },
  { name: "step: find no flow, as in flows4", program: "flow", times: 8 },
  { name: "step: make room for the tunnel's headers", program: "grow", times: 1 },
  { name: "step: take them away", program: "shrink", times: 1 },
  { name: "step: send to a neighbour", program: "redirect", times: 1 },
] as const;

function loadSteps(): BpfObject {
  const directory = mkdtempSync(join(tmpdir(), "twill-bench-"));
  try {
    const source = join(repository, "bench/steps.bpf.c");
    const { path } = compile({ source, includeDirs: [join(repository, "bpf")], cacheDir: directory });
    const object = openObject(readFileSync(path), { name: "steps" });
    object.load();
    // What is asked for is all zeros.
    object.map("addresses").update(Buffer.alloc(address4Layout.size), Buffer.alloc(endpoint4Layout.size));
    object.map("subnets").update(Buffer.alloc(subnet4Layout.size), Buffer.alloc(peer4Layout.size));
    return object;
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

/** Pins a program where a process of another program finds it; the mount is this process's. */
function pinned(program: Program, name: string): string {
  const path = join("/sys/fs/bpf", name);
  program.pin(path);
  return path;
}

async function main(): Promise<void> {
  const { values: options } = parseArgs({
    options: {
      runs: { type: "string", default: process.env.QUICK === "1" ? "2000" : "20000" },
      out: { type: "string", default: join(repository, "dist/bench/programs") },
    },
  });
  const runs = Number(options.runs);
  if (!(runs >= ROUNDS)) throw new Error(`${options.runs} runs are too few: give at least ${ROUNDS}`);
  const node = Node.load({}, "shipped");
  const outside = new Outside({ fast_path: "FAST_PATH_ALWAYS" }, 1024, "shipped");
  const parts = loadSteps();
  try {
    const ctx = Buffer.alloc(192);
    ctx.writeUInt32LE(1, 40); // ifindex of the loopback interface
    const masqueraded = openConnection(outside);
    const all = [...cases.map((each) => ({ ...each, node })), ...masqueraded];
    const programs = [
      ...all.map(({ hook, node, ...rest }) => ({ ...rest, program: node.object.program(hook), per: 1 })),
      ...steps.map(({ name, program, times }) => ({
        ...{ name, packet: tunnelled, action: -1 },
        ...{ program: parts.program(program), per: times },
      })),
    ];
    const nothing = pinned(parts.program("empty"), "empty");
    const measured = programs.map(({ name, packet, action, program, per }, index) => {
      const { retval } = program.testRun({ data: packet, ctx });
      if (retval !== action) throw new Error(`${name}: the program answers ${retval} in place of ${action}`);
      return { name, packet, program, per, path: pinned(program, `p${index}`), ns: [] as number[] };
    });
    const bare: number[] = [];
    for (let round = 0; round < ROUNDS; round++) {
      for (let turn = 0; turn < measured.length; turn++) {
        const at = measured[(turn + round) % measured.length];
        if (at === undefined) continue;
        const argv = ["-c", CPU, again, at.path, nothing, String(Math.floor(runs / ROUNDS))];
        const said = execFileSync("taskset", argv, { input: at.packet, encoding: "utf8" });
        const [time = Number.NaN, without = Number.NaN] = said.split(" ").map(Number);
        at.ns.push((time - without) / at.per);
        bare.push(without);
      }
    }
    const report: Report = {
      suite: "programs",
      rounds: ROUNDS,
      environment: {
        ...(await describeMachine()),
        load: `${runs} single runs of each in ${ROUNDS} rounds; taken off is a program that does nothing, ${median(bare).toFixed(0)} ns`,
      },
      metrics: [
        { key: "ns", title: "one packet, ns", digits: 0, better: "lower" },
        {
          key: "instructions",
          title: "instructions of the program",
          digits: 0,
          better: "lower",
          charted: false,
        },
      ],
      results: measured.map(({ name, program, ns }) => {
        const { instructions } = programInfo(program);
        const values = { ns, instructions: ns.map(() => instructions) };
        return resultOf({ row: name, against: [], values });
      }),
    };
    publish(options.out, tables(report), [report]);
  } finally {
    parts.close();
    outside.close();
    node.close();
  }
}

await main().catch((error: unknown) => {
  process.stderr.write(`bench-programs: ${error instanceof Error ? error.message : error}\n`);
  process.exitCode = 1;
});
