/**
 * Three nodes that run twilld, a pod on each, one etcd; traffic that counts what it loses; and the measuring of
 * one fault under that traffic.
 *
 * A fault is done to node h1, or to etcd. The way between the pods of h2 and h3 is the untouched one, that
 * between the pods of h1 and h2 the touched one. Each has a ping of at least 100 packets a second, and they share fifty
 * TCP connections. When a packet was lost, the way was back with the first reply after the last loss.
 */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { removeRundir } from "../../src/edge/rundir.ts";
import {
  createLab,
  type Etcd,
  type Host,
  type Lab,
  type Ping,
  type Pod,
  type Process,
  until,
} from "../lab.ts";
import { spawnTwilld, Twilld, twilldFlags, twilldProgram } from "../twilld.ts";
import { Transfers } from "./transfers.ts";

const configOf = (backend: string): string =>
  JSON.stringify({ Network: "172.7.0.0/16", Backend: { Type: backend } });
export const CONFIG = configOf("vxlan");
export const CONFIG_KEY = "/coreos.com/network/config";
export const SUBNETS = "/coreos.com/network/subnets";
/** TCP connections in all. */
export const CONNECTIONS = 50;

export interface Node {
  readonly host: Host;
  readonly pod: Pod;
  readonly number: number;
  twilld: Twilld;
}

export interface WorldOptions {
  /** Default: vxlan. */
  readonly backend?: "vxlan" | "ipip" | "udp";
  /** Members of etcd. */
  readonly members?: 1 | 3;
  /** Further flags of the twilld on h1. */
  readonly flags?: readonly string[];
  /** Further flags of every twilld. */
  readonly common?: readonly string[];
  /** What the twilld on h1 is started by, around its own command line. */
  readonly launcher?: (argv: readonly string[]) => string[];
}

/** The nodes h1, h2 and h3 at 10.4.7.21 to .23, with pods 172.7.21.2 to 172.7.23.2. */
export class World {
  readonly lab: Lab;
  readonly etcd: Etcd;
  readonly nodes: readonly [Node, Node, Node];

  private constructor(lab: Lab, etcd: Etcd, nodes: readonly [Node, Node, Node]) {
    this.lab = lab;
    this.etcd = etcd;
    this.nodes = nodes;
  }

  static async create(options: WorldOptions = {}): Promise<World> {
    const lab = await createLab();
    try {
      const addresses = ["10.4.7.11/24", "10.4.7.12/24", "10.4.7.13/24"].slice(0, options.members ?? 1);
      const etcd = await lab.etcd({ addresses });
      const { backend = "vxlan" } = options;
      await etcd.put(CONFIG_KEY, configOf(backend));
      const common = options.common ?? [];
      const node = async (number: number): Promise<Node> => {
        const host = await lab.host(`h${number}`, { address: `10.4.7.2${number}/24` });
        const subnet = `172.7.2${number}`;
        await host.bridge("docker0", `${subnet}.1/24`, { mtu: 1450 });
        writeFileSync(join(host.directory, "subnet.env"), `FLANNEL_SUBNET=${subnet}.1/24\n`);
        const pod = await host.pod("a", `${subnet}.2/24`, { mtu: 1450 });
        const flags = [...twilldFlags(host, etcd), ...common, ...((number === 1 && options.flags) || [])];
        const { launcher } = options;
        if (number !== 1 || launcher === undefined)
          return { host, pod, number, twilld: spawnTwilld(host, flags) };
        const child = host.spawn(launcher([twilldProgram, ...flags]), { cwd: host.directory });
        return { host, pod, number, twilld: new Twilld(host, child, flags) };
      };
      const world = new World(lab, etcd, [await node(1), await node(2), await node(3)]);
      await Promise.all(world.nodes.map(({ twilld }) => twilld.ready()));
      await world.settled();
      return world;
    } catch (error) {
      await lab.close();
      throw error;
    }
  }

  get touched(): Node {
    return this.nodes[0];
  }

  /** Starts twilld on a node with the usual flags and these, in place of the one before, which has ended. */
  start(node: Node, flags: readonly string[] = []): Twilld {
    node.twilld = spawnTwilld(node.host, [...twilldFlags(node.host, this.etcd), ...flags]);
    return node.twilld;
  }

  /** Waits until every node knows both others and every pod reaches every other. */
  async settled(): Promise<void> {
    for (const { twilld } of this.nodes) {
      await twilld.statusWhere("two peers and no failure", (status) => {
        return status.peers === 2 && status.failures.length === 0 && status.store.connected;
      });
    }
    for (const from of this.nodes) {
      for (const to of this.nodes) {
        if (from === to) continue;
        const isThere = async () => (await from.pod.ping(to.pod.address, { count: 1 })).received === 1;
        await until(`${from.pod.name} to reach ${to.pod.name}`, isThere);
      }
    }
  }

  /** A peer that is only a record in etcd. Its subnet is 172.7.`number`.0/24. */
  async putPeer(number: number, options: { address?: string; mac?: string } = {}): Promise<void> {
    const {
      address = `10.4.7.${number}`,
      mac = `02:00:00:00:00:${(number % 256).toString(16).padStart(2, "0")}`,
    } = options;
    const value = {
      PublicIP: address,
      PublicIPv6: null,
      BackendType: "vxlan",
      BackendData: { VNI: 1, VtepMAC: mac },
    };
    await this.etcd.put(`${SUBNETS}/172.7.${number}.0-24`, JSON.stringify(value));
  }

  async removePeer(number: number): Promise<void> {
    await this.etcd.ctl("del", `${SUBNETS}/172.7.${number}.0-24`);
  }

  /** Whether a node has a route to a peer's subnet. */
  async hasRoute(node: Node, number: number): Promise<boolean> {
    return (await node.host.ip(`route show 172.7.${number}.0/24`)).includes("flannel.1");
  }

  /** Shows that every node follows etcd: a new record gives a route, its deletion takes it. */
  async follows(): Promise<void> {
    await this.putPeer(99);
    for (const node of this.nodes)
      await until(`${node.host.name} to route to the new peer`, () => this.hasRoute(node, 99));
    await this.removePeer(99);
    for (const node of this.nodes)
      await until(`${node.host.name} to drop the new peer`, async () => !(await this.hasRoute(node, 99)));
  }

  async close(): Promise<void> {
    await this.lab.close();
    // The lab knows of its hosts' usual pin paths alone.
    for (const { twilld } of this.nodes) removeRundir(twilld.pinPath);
  }
}

/** What a fault tells about itself. */
export interface Told {
  /** When its cause ended, in milliseconds since the epoch. */
  readonly ended: number;
  /** Milliseconds from the fault, or from the end of its cause, until the kernel was as it ought to be. */
  readonly mended?: number;
  /** Words for the table. */
  readonly remark?: string;
}

export interface Fault {
  readonly name: string;
  /** What flanneld does, by its source. */
  readonly flanneld: string;
  /** It takes less than five seconds. */
  readonly quick: boolean;
  readonly world?: WorldOptions;
  /** The fault itself cuts the touched way; it must be back this many milliseconds after the cause's end. */
  readonly cuts?: number;
  /** It is done to every node: no way is untouched, and the other one may be cut as well, and for as long. */
  readonly everywhere?: boolean;
  /** Most milliseconds until mended. */
  readonly mend?: number;
  /** Afterwards the world is another: it is not used again, and the touched way may stay cut. */
  readonly spoils?: boolean;
  readonly run: (world: World) => Promise<Told>;
  /** Puts things right for the next fault, without traffic. */
  readonly after?: (world: World) => Promise<void>;
}

export interface Row {
  readonly fault: Fault;
  readonly untouched: Loss;
  readonly touched: Loss;
  /** Why connections broke. */
  readonly broken: readonly string[];
  readonly brokenUntouched: readonly string[];
  /** Milliseconds from the end of the cause until the touched way was back; undefined if it was never cut. */
  readonly back: number | undefined;
  /** The same of the other way. */
  readonly backUntouched: number | undefined;
  readonly mended: number | undefined;
  readonly remark: string | undefined;
}

export interface Loss {
  readonly lost: number;
  readonly sent: number;
}

/** Does a fault under traffic and measures. */
export async function measure(world: World, fault: Fault): Promise<Row> {
  const [h1, h2, h3] = world.nodes;
  // By the kernel's coarse timer, 10 ms between two packets become 18: asked for half of it, ping keeps above 100/s.
  const stamped = { arguments: ["-D"], interval: 0.005 };
  const [touched, untouched] = [
    await h1.pod.startPing(h2.pod.address, stamped),
    await h2.pod.startPing(h3.pod.address, stamped),
  ];
  const transfers = [
    await Transfers.start(h1.pod, h2.pod, CONNECTIONS / 2),
    await Transfers.start(h2.pod, h3.pod, CONNECTIONS / 2),
  ] as const;
  const told = await fault.run(world);
  await untouched.replies(20);
  if (fault.spoils !== true) await touched.replies(20);
  for (const each of fault.spoils === true ? transfers.slice(1) : transfers) await each.flow();
  const [broken, brokenUntouched] = [
    await transfers[0].finish(fault.spoils === true ? 1_000 : undefined),
    await transfers[1].finish(),
  ];
  const [one, other] = [await ended(touched), await ended(untouched)];
  const since = ({ lost, back }: Loss & { back: number }) =>
    lost === 0 ? undefined : Math.max(0, back - told.ended);
  return {
    fault,
    touched: one,
    untouched: other,
    broken,
    brokenUntouched,
    back: since(one),
    backUntouched: since(other),
    mended: told.mended,
    remark: told.remark,
  };
}

/** Loss of a ping, and the time of the first reply after the last loss, in milliseconds since the epoch. */
async function ended(ping: Ping): Promise<Loss & { back: number }> {
  const { lost, sent, output } = await ping.stop();
  const last = lost.at(-1) ?? 0;
  let back = Number.POSITIVE_INFINITY;
  for (const [, seconds, sequence] of output.matchAll(/^\[([\d.]+)\] \d+ bytes from .* icmp_seq=(\d+)/gm)) {
    if (Number(sequence) > last) back = Math.min(back, Number(seconds) * 1000);
  }
  return { lost: lost.length, sent, back };
}

/**
 * What is wrong with a row, in words; empty if it is as it must be. Times count on a machine that has nothing else to
 * do, and only if they are `timed`.
 */
export function objections(row: Row, timed: boolean): string[] {
  const { fault, untouched, touched, broken, brokenUntouched, back, mended } = row;
  const found: string[] = [];
  if (untouched.lost > 0 && fault.everywhere !== true)
    found.push(`${untouched.lost} packets lost between untouched nodes`);
  for (const reason of brokenUntouched) found.push(`between untouched nodes: ${reason}`);
  if (fault.spoils !== true) for (const reason of broken) found.push(reason);
  if (fault.cuts === undefined && fault.spoils !== true && touched.lost > 0)
    found.push(`${touched.lost} packets lost on the touched way`);
  if (!timed) return found;
  if (fault.cuts !== undefined && fault.spoils !== true && back !== undefined && back > fault.cuts)
    found.push(`back only after ${Math.round(back)} ms`);
  if (fault.everywhere === true && (row.backUntouched ?? 0) > (fault.cuts ?? 0))
    found.push(`the other way was back only after ${Math.round(row.backUntouched ?? 0)} ms`);
  if (fault.mend !== undefined && (mended === undefined || mended > fault.mend))
    found.push(`mended only after ${mended === undefined ? "nothing" : Math.round(mended)} ms`);
  return found;
}

const ADDRESSES = ["ip", "-o", "-ts", "monitor", "link", "address", "route", "neigh"];
const FILTERS = ["tc", "-ts", "monitor"];

/** Notes what the kernel announces in a namespace, with the time of each. */
export class Monitor {
  readonly #process: Process;

  private constructor(process: Process) {
    this.#process = process;
  }

  static async start(host: Host, what: "addresses" | "filters" = "addresses"): Promise<Monitor> {
    const process = host.spawn(what === "addresses" ? ADDRESSES : FILTERS);
    await until(`the monitor in ${host.name} to listen`, async () => {
      const { stdout } = await host.exec(["cat", "/proc/net/netlink"]);
      return stdout.split("\n").some((line) => {
        const [, protocol, port, groups] = line.trim().split(/\s+/);
        if (protocol !== "0") return false;
        // tc opens its socket twice, and its process id may not be free yet as the second one's port.
        return what === "filters"
          ? groups === "00000008"
          : port === String(process.pid) && groups !== "00000000";
      });
    });
    return new Monitor(process);
  }

  /**
   * Waits until what `pattern` names was deleted, or with `changed` came by, and then came back, or with `back` until
   * that came; returns when the one and the other was, in milliseconds since the epoch.
   */
  async mended(pattern: RegExp, back = pattern, changed = false): Promise<{ gone: number; again: number }> {
    const times = () => {
      const all = this.#process.lines.flatMap(({ text }) => parseLine(text));
      const gone = all.find(({ deleted, text }) => (deleted || changed) && pattern.test(text));
      if (gone === undefined) return undefined;
      const again = all.find(({ deleted, text, at }) => !deleted && at >= gone.at && back.test(text));
      return again && { gone: gone.at, again: again.at };
    };
    const wake = (ring: () => void) => this.#process.onOutput(ring);
    return until(`${back} to be back`, times, { wake, timeout: 30_000 });
  }

  async stop(): Promise<void> {
    await this.#process.stop();
  }
}

/** `[2026-11-23T13:22:07.123456] Deleted 172.7.22.0/24 nhid 7 via ...`, in the machine's time, without the nexthop's number. */
function parseLine(line: string): { at: number; deleted: boolean; text: string }[] {
  const match = /^\[(\S+)\] (.*)$/.exec(line);
  if (match === null) return [];
  const text = (match[2] ?? "").replace(/ nhid \d+/, "");
  return [{ at: preciseTime(match[1] ?? ""), deleted: /^deleted /i.test(text), text }];
}

function preciseTime(stamp: string): number {
  const [seconds = "", fraction = "0"] = stamp.split(".");
  return Date.parse(seconds) + Number(`0.${fraction}`) * 1000;
}
