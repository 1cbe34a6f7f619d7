/**
 * What the daemon, its programs and their hooks may go through while traffic runs: programs taken off, the daemon
 * killed, the way of attaching changed, other software on the same hooks, a second daemon on the same host. No
 * packet of a 100/s ping and no TCP connection may be lost on the way, and nothing may be left twice.
 *
 * Hooks are read in the host's namespace by the loader itself, since bpftool 7.1 does not know TCX. Which programs
 * and maps are a daemon's is told by the pinned map of counters, which each of its programs uses.
 */
import { existsSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, describe, expect, test } from "vitest";
import { compile } from "../../loader/index.ts";
import { readTrialNote, removeRundir, writeTrialNote } from "../../src/edge/rundir.ts";
import { createLab, type Etcd, type Host, type Lab, type Ping, type Pod, repository, until } from "../lab.ts";
import { Streams } from "../streams.ts";
import { spawnTwilld, startTwilld, type Twilld, twill, twilldFlags } from "../twilld.ts";

const MODES = ["tcx", "clsact"] as const;
type Mode = (typeof MODES)[number];

let lab: Lab | undefined;
/** Pin paths besides those of the lab's hosts. */
let pins: string[] = [];

afterEach(async () => {
  await lab?.close();
  lab = undefined;
  for (const path of pins) {
    rmSync(path, { recursive: true, force: true });
    removeRundir(path);
  }
  pins = [];
});

interface Node {
  readonly host: Host;
  readonly pod: Pod;
}

/** Two hosts 10.4.7.21 and .22, with a pod each in 172.7.21.0/24 and 172.7.22.0/24. */
async function cluster(): Promise<{ etcd: Etcd; a: Node; b: Node }> {
  lab = await createLab();
  const etcd = await lab.etcd({ addresses: ["10.4.7.11/24"] });
  await etcd.put("/coreos.com/network/config", '{"Network": "172.7.0.0/16", "Backend": {"Type": "vxlan"}}');
  const node = async (lab: Lab, number: number): Promise<Node> => {
    const host = await lab.host(`h${number}`, { address: `10.4.7.${number}/24` });
    await host.bridge("docker0", `172.7.${number}.1/24`, { mtu: 1450 });
    writeFileSync(join(host.directory, "subnet.env"), `FLANNEL_SUBNET=172.7.${number}.1/24\n`);
    return { host, pod: await host.pod("a", `172.7.${number}.2/24`, { mtu: 1450 }) };
  };
  return { etcd, a: await node(lab, 21), b: await node(lab, 22) };
}

/** Traffic both ways that must not notice anything. */
class Traffic {
  readonly #pings: readonly Ping[];
  readonly #streams: readonly Streams[];

  private constructor(pings: readonly Ping[], streams: readonly Streams[]) {
    this.#pings = pings;
    this.#streams = streams;
  }

  static async start(a: Pod, b: Pod, connections: number): Promise<Traffic> {
    const pings = [await a.startPing(b.address), await b.startPing(a.address)];
    const streams = [await Streams.start(a, b, connections), await Streams.start(b, a, connections)];
    return new Traffic(pings, streams);
  }

  /** Waits until packets of all of it have come through. */
  async flow(): Promise<void> {
    for (const stream of this.#streams) await stream.flow(1);
    for (const ping of this.#pings) await ping.replies(20);
  }

  /** Ends it, and expects nothing to be lost. */
  async finish(): Promise<void> {
    for (const ping of this.#pings) {
      const { lost, sent, duplicates } = await ping.stop();
      expect({ lost, duplicates }).toEqual({ lost: [], duplicates: 0 });
      expect(sent).toBeGreaterThan(100);
    }
    for (const stream of this.#streams) expect((await stream.finish()).bytes).toBeGreaterThan(4 << 20);
  }
}

interface Hooked {
  readonly interface: string;
  readonly direction: "ingress" | "egress";
  readonly mode: Mode;
  readonly program: string;
  readonly programId: number;
  readonly linkId?: number;
  readonly priority?: number;
  readonly handle?: number;
}

interface Kernel {
  readonly hooks: readonly Hooked[];
  readonly qdiscs: readonly string[];
}

const LOADER = JSON.stringify(join(repository, "dist/loader/index.js"));

/** Runs a script, which can use the loader, in the host's namespace. */
async function script<T>(host: Host, body: string, ...values: readonly unknown[]): Promise<T> {
  const text = `import * as loader from ${LOADER};
const values = JSON.parse(process.argv[1]);
${body}`;
  const argv = [process.execPath, "--input-type=module", "-e", text, JSON.stringify(values)];
  const { stdout } = await host.exec(argv);
  return (stdout === "" ? undefined : JSON.parse(stdout)) as T;
}

/** Every program on every hook of the host, ours or not, and the interfaces that have a clsact qdisc. */
async function kernelOf(host: Host): Promise<Kernel> {
  const links = await host.ipJson<{ ifindex: number; ifname: string }>("link show");
  return script<Kernel>(
    host,
    `
const hooks = [], qdiscs = [];
for (const { ifindex, ifname } of values[0]) {
  if (loader.hasClsact(ifindex)) qdiscs.push(ifname);
  for (const direction of ["ingress", "egress"]) {
    const at = { interface: ifname, direction };
    for (const { programId, linkId } of loader.queryTcx(ifindex, direction))
      hooks.push({ ...at, mode: "tcx", program: loader.programInfo({ id: programId }).name, programId, linkId });
    for (const { programId, name, priority, handle } of loader.queryClsact(ifindex, direction))
      hooks.push({ ...at, mode: "clsact", program: name.replace(/:.*/, ""), programId, priority, handle });
  }
}
console.log(JSON.stringify({ hooks, qdiscs }));`,
    links,
  );
}

const placed = ({ hooks }: Kernel) =>
  hooks.map((hook) => `${hook.interface} ${hook.direction} ${hook.program} ${hook.mode}`).sort();

/** The hooks of a node with one bridge and one pod behind it, each exactly once. */
function hooksOf(mode: Mode): string[] {
  const hooks = [
    "docker0 egress to_pod",
    "docker0 ingress from_pod",
    "eth0 egress to_net",
    "eth0 ingress from_net",
    "flannel.1 egress to_overlay",
    "flannel.1 ingress from_overlay",
    "vetha ingress from_pod",
  ];
  return hooks.map((hook) => `${hook} ${mode}`);
}

interface Owned {
  readonly programs: readonly number[];
  readonly maps: readonly number[];
}

/** The ids of the programs that use the maps of a pin path, and of all their maps. */
function ownedBy(host: Host, pinPath = host.pinPath): Promise<Owned> {
  return script<Owned>(
    host,
    `
const counters = loader.openPinnedMap(values[0] + "/counters");
const { id } = loader.mapInfo({ fd: counters.fd });
const programs = [], maps = new Set();
for (const program of loader.programIds()) {
  let info;
  try {
    info = loader.programInfo({ id: program });
  } catch (error) {
    // Somebody else's may go at any time.
    if (error.code !== "ENOENT") throw error;
    continue;
  }
  if (!info.mapIds.includes(id)) continue;
  programs.push(program);
  for (const map of info.mapIds) maps.add(map);
}
console.log(JSON.stringify({ programs, maps: [...maps] }));`,
    pinPath,
  );
}

/** Those of the ids that are still in the kernel. */
function alive(host: Host, owned: Owned): Promise<Owned> {
  return script<Owned>(
    host,
    `
const there = (ids, info) => ids.filter((id) => {
  try { info({ id }); return true; } catch (error) {
    if (error.code !== "ENOENT") throw error;
    return false;
  }
});
const [{ programs, maps }] = values;
console.log(JSON.stringify({ programs: there(programs, loader.programInfo), maps: there(maps, loader.mapInfo) }));`,
    owned,
  );
}

/** Waits until the programs of former runs are gone: the kernel frees them a moment after the last use. */
async function expectNothingTwice(node: Node, mode: Mode): Promise<Owned> {
  const kernel = await kernelOf(node.host);
  expect(placed(kernel)).toEqual(hooksOf(mode));
  const owned = await until("only the programs of one run to be left", async () => {
    const owned = await ownedBy(node.host);
    return owned.programs.length === 6 && owned;
  });
  // The pinned ones, and one of constants that all six share; the folder holds six programs and two folders, too.
  const pinned = readdirSync(node.host.pinPath).length;
  expect(owned.maps.length).toBeLessThan(pinned);
  const hooked = kernel.hooks.map(({ programId }) => programId);
  expect(hooked.filter((id) => !owned.programs.includes(id))).toEqual([]);
  return owned;
}

/** Takes every program of ours off its hook, as an operator or another tool would. */
async function detachAll(host: Host, mode: Mode): Promise<void> {
  if (mode === "tcx") {
    await script(
      host,
      `
for (const path of values[0]) {
  const link = loader.openPinnedLink(path);
  link.detach();
  link.close();
}`,
      readdirSync(join(host.pinPath, "links")).map((name) => join(host.pinPath, "links", name)),
    );
  } else {
    for (const { interface: device, direction, priority } of (await kernelOf(host)).hooks)
      await host.exec(["tc", "filter", "del", "dev", device, direction, "prio", String(priority)]);
  }
  expect(placed(await kernelOf(host))).toEqual([]);
}

const packetsByDevice = async (host: Host) => (await host.counters("flannel.1")).txPackets;

/** Waits until daemons know each other: a host that is ready may not have heard of one that came after it. */
async function meet(...daemons: readonly Twilld[]): Promise<void> {
  for (const daemon of daemons) await daemon.statusWhere("a peer", ({ peers }) => peers === 1);
}

/** Expects new flows to be carried by the programs, or by the stack alone. */
async function expectLane(twilld: Twilld, from: Pod, to: Pod, lane: "fast" | "stack"): Promise<void> {
  const before = [twilld.packets("from_pod", "encapsulated"), await packetsByDevice(twilld.host)] as const;
  expect((await from.ping(to.address, { count: 50 })).lost).toEqual([]);
  const fast = twilld.packets("from_pod", "encapsulated") - before[0];
  const stack = (await packetsByDevice(twilld.host)) - before[1];
  if (lane === "fast") expect(fast).toBeGreaterThanOrEqual(50);
  else expect(stack).toBeGreaterThanOrEqual(50);
}

describe.each(MODES)("attached by %s", (mode) => {
  const flags = [`--attach=${mode}`];

  test("without its programs the stack carries on; a check, or a restart, brings them back", async () => {
    const { etcd, a, b } = await cluster();
    let twilld = await startTwilld(a.host, { etcd, flags: [...flags, "--resync=2"] });
    await meet(twilld, await startTwilld(b.host, { etcd, flags }));
    const traffic = await Traffic.start(a.pod, b.pod, 2);
    await traffic.flow();
    await expectLane(twilld, a.pod, b.pod, "fast");

    // Held still, so that it does not put them back before we have looked.
    twilld.process.kill("SIGSTOP");
    await detachAll(a.host, mode);
    await traffic.flow();
    await expectLane(twilld, a.pod, b.pod, "stack");
    twilld.process.kill("SIGCONT");
    await until("the programs to be back", async () => {
      const now = placed(await kernelOf(a.host));
      return now.length === hooksOf(mode).length && now;
    });
    await expectNothingTwice(a, mode);
    await traffic.flow();
    await expectLane(twilld, a.pod, b.pod, "fast");

    await twilld.stop("SIGKILL");
    await detachAll(a.host, mode);
    await traffic.flow();
    twilld = await startTwilld(a.host, { etcd, flags });
    await expectNothingTwice(a, mode);
    await traffic.flow();
    await expectLane(twilld, a.pod, b.pod, "fast");
    await traffic.finish();
  });

  test("killed and started again during TCP: no connection breaks, no packet is lost, nothing is twice", async () => {
    const { etcd, a, b } = await cluster();
    const daemons = new Map<Node, Twilld>();
    for (const node of [a, b]) daemons.set(node, await startTwilld(node.host, { etcd, flags }));
    await meet(...daemons.values());
    const first = await expectNothingTwice(a, mode);
    const traffic = await Traffic.start(a.pod, b.pod, 5);
    await traffic.flow();
    for (const node of [a, b]) {
      const before = daemons.get(node);
      await before?.stop("SIGKILL");
      // Without the daemon: still the fast lane.
      if (before !== undefined) await expectLane(before, node.pod, node === a ? b.pod : a.pod, "fast");
      await traffic.flow();
      const after = await startTwilld(node.host, { etcd, flags });
      daemons.set(node, after);
      await traffic.flow();
      await expectLane(after, node.pod, node === a ? b.pod : a.pod, "fast");
      const owned = await expectNothingTwice(node, mode);
      if (node === a) expect(owned.maps.length).toBe(first.maps.length);
    }
    // Killed while it starts, as often as it takes to hit it in different places.
    const daemon = daemons.get(a);
    await daemon?.stop("SIGKILL");
    for (const line of [/twilld starts/, /connected to etcd/, /using this interface/]) {
      const half = await startTwilld(a.host, { etcd, flags, timeout: 0 });
      await half.says(line);
      await half.stop("SIGKILL");
    }
    await startTwilld(a.host, { etcd, flags });
    await traffic.flow();
    await expectNothingTwice(a, mode);
    expect((await alive(a.host, first)).programs).toEqual([]);
    await traffic.finish();
  });

  test("two daemons on one host keep out of each other's way", async () => {
    const { etcd, a, b } = await cluster();
    const config = '{"Network": "10.9.0.0/16", "Backend": {"Type": "vxlan", "VNI": 7, "Port": 8472}}';
    await etcd.put("/second/network/config", config);
    const second = new Map<Node, { pod: Pod; pinPath: string }>();
    for (const [node, number] of [[a, 21] as const, [b, 22] as const]) {
      const bridge = await node.host.bridge("br7", `10.9.${number}.1/24`, { mtu: 1450 });
      const pod = await node.host.pod("z", `10.9.${number}.2/24`, { bridge, mtu: 1450 });
      const pinPath = `${node.host.pinPath}-second`;
      pins.push(pinPath);
      second.set(node, { pod, pinPath });
      writeFileSync(join(node.host.directory, "second.env"), `FLANNEL_SUBNET=10.9.${number}.1/24\n`);
    }
    const secondOf = (node: Node) => second.get(node) ?? { pod: node.pod, pinPath: "" };
    const firstDaemons: Twilld[] = [];
    const secondDaemons: Twilld[] = [];
    for (const node of [a, b]) {
      firstDaemons.push(await startTwilld(node.host, { etcd, flags }));
      const own = [
        "--etcd-prefix=/second/network",
        `--pin-path=${secondOf(node).pinPath}`,
        `--subnet-file=${join(node.host.directory, "second.env")}`,
        "--healthz-port=2402",
      ];
      secondDaemons.push(await startTwilld(node.host, { etcd, flags: [...flags, ...own] }));
    }
    const [one, two] = [firstDaemons[0], secondDaemons[0]];
    const [other] = secondDaemons.slice(1);
    if (one === undefined || two === undefined || other === undefined)
      throw new Error("two daemons are needed");
    await meet(...firstDaemons, ...secondDaemons);
    const [za, zb] = [secondOf(a).pod, secondOf(b).pod];
    const firstTraffic = await Traffic.start(a.pod, b.pod, 2);
    const secondTraffic = await Traffic.start(za, zb, 2);
    await firstTraffic.flow();
    await secondTraffic.flow();
    await expectLane(one, a.pod, b.pod, "fast");
    const before = two.packets("from_pod", "encapsulated");
    expect((await za.ping(zb.address, { count: 50 })).lost).toEqual([]);
    expect(two.packets("from_pod", "encapsulated") - before).toBeGreaterThanOrEqual(50);
    // From one network to the other: the stack routes it, and the peer's programs refuse the strange source.
    expect((await a.pod.ping(zb.address, { count: 3 })).received).toBe(0);
    expect((await za.ping(b.pod.address, { count: 3 })).received).toBe(0);
    expect(other.packets("from_net", "drop_forged")).toBeGreaterThanOrEqual(3);

    const ofSecond = async (node: Node) => {
      const { programs } = await ownedBy(node.host, secondOf(node).pinPath);
      return (await kernelOf(node.host)).hooks.filter(({ programId }) => programs.includes(programId));
    };
    const hooksBefore = await ofSecond(a);
    expect(hooksBefore).toHaveLength(7);
    await firstTraffic.finish();
    for (const [index, node] of [a, b].entries()) {
      await firstDaemons[index]?.stop();
      await twill(node.host, "uninstall", `--pin-path=${node.host.pinPath}`);
      await secondTraffic.flow();
    }
    expect(await ofSecond(a)).toEqual(hooksBefore);
    expect((await kernelOf(a.host)).hooks).toHaveLength(7);
    expect(await a.host.ip("route show dev flannel.7")).toMatch(/10\.9\.22\.0\/24 nhid \d+ via 10\.9\.22\.0/);
    expect((await a.host.ip("-o link show type vxlan")).match(/flannel\.\d+/g)).toEqual(["flannel.7"]);
    expect((await a.pod.ping(b.pod.address, { count: 3 })).received).toBe(0);
    await secondTraffic.flow();
    await secondTraffic.finish();

    await two.stop();
    await twill(a.host, "uninstall", `--pin-path=${secondOf(a).pinPath}`);
    expect(await kernelOf(a.host)).toEqual({ hooks: [], qdiscs: [] });
    expect(await a.host.ip("-o link show type vxlan")).toBe("");
    expect(await a.host.ip("route show proto 84")).toBe("");
    expect(await a.host.ip("nexthop show")).toBe("");
  });
});

test("programs of other software on the same hooks stay through everything", async () => {
  const { etcd, a, b } = await cluster();
  const source = join(a.host.directory, "foreign.c");
  writeFileSync(
    source,
    `#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>
SEC("tc") int foreign(struct __sk_buff *skb) { return TC_ACT_UNSPEC; }
char _license[] SEC("license") = "GPL";
`,
  );
  const { path } = compile({ source, includeDirs: [], cacheDir: a.host.directory });
  const foreignPins = `${a.host.pinPath}-foreign`;
  pins.push(foreignPins);
  const peer = await startTwilld(b.host, { etcd });
  const links = await a.host.ipJson<{ ifindex: number; ifname: string }>("link show");
  const indexOf = (name: string) => links.find(({ ifname }) => ifname === name)?.ifindex ?? 0;
  const attachForeign = (device: string) =>
    script(
      a.host,
      `
import { mkdirSync } from "node:fs";
const [path, ifindex, pins] = values;
mkdirSync(pins, { recursive: true });
const object = loader.openObject(path);
object.load();
for (const direction of ["ingress", "egress"]) {
loader.attachClsact(object.program("foreign"), ifindex, direction, { priority: 10, handle: 1 });
const link = loader.attachTcx(object.program("foreign"), ifindex, direction);
link.pin(pins + "/" + ifindex + direction);
link.close();
}
object.close();`,
      path,
      indexOf(device),
      foreignPins,
    );
  const foreign = async () => (await kernelOf(a.host)).hooks.filter(({ program }) => program === "foreign");

  // One comes before us, one after us on an interface where the qdisc may be ours.
  await attachForeign("eth0");
  let twilld = await startTwilld(a.host, { etcd, flags: ["--attach=clsact"] });
  await meet(twilld, peer);
  await attachForeign("vetha");
  const theirs = await foreign();
  expect(theirs).toHaveLength(8);
  const traffic = await Traffic.start(a.pod, b.pod, 2);
  await traffic.flow();
  await expectLane(twilld, a.pod, b.pod, "fast");
  await twilld.stop("SIGKILL");
  for (const mode of [...MODES, ...MODES]) {
    twilld = await startTwilld(a.host, { etcd, flags: [`--attach=${mode}`] });
    await traffic.flow();
    expect(await foreign()).toEqual(theirs);
    await expectLane(twilld, a.pod, b.pod, "fast");
    await twilld.stop();
  }
  // Before qdiscs are removed, which stops the queue for a moment, as making them does.
  await traffic.finish();
  const owned = await ownedBy(a.host);
  await twill(a.host, "uninstall", "--keep-routes", `--pin-path=${a.host.pinPath}`);
  expect(await foreign()).toEqual(theirs);
  const after = await kernelOf(a.host);
  expect(after.hooks).toHaveLength(8);
  expect([...after.qdiscs].sort()).toEqual(["eth0", "vetha"]);
  expect((await a.pod.ping(b.pod.address, { count: 20 })).lost).toEqual([]);
  await until("our programs and maps to be gone", async () => {
    const { programs, maps } = await alive(a.host, owned);
    return programs.length + maps.length === 0;
  });
  expect(existsSync(a.host.pinPath)).toBe(false);
});

test("programs that this kernel has taken are not tried again, neither by a restart nor after a kill; others are", async () => {
  const { etcd, a } = await cluster();
  const start = async (...more: string[]) => {
    const twilld = await startTwilld(a.host, { etcd, flags: ["--v=1", ...more] });
    const tried = twilld.process.lines.some(({ text }) => text.includes("trying the programs"));
    expect(twilld.process.lines.some(({ text }) => text.includes("has taken the programs before"))).toBe(
      !tried,
    );
    await twilld.stop("SIGKILL");
    return tried;
  };
  expect([await start(), await start(), await start("--ip-masq")]).toEqual([true, false, true]);
  writeTrialNote(a.host.pinPath, `${readTrialNote(a.host.pinPath)} of another kernel`);
  expect([await start("--ip-masq"), await start("--ip-masq")]).toEqual([true, false]);
});

test.each([/connected to etcd/, /using this interface/, /phase.*forwarding/])(
  "stopped when it says %s, while programs are loaded beside, it ends as ever, and leaves nothing in the way",
  async (moment) => {
    const { etcd, a } = await cluster();
    const flags = [...twilldFlags(a.host, etcd), "--v=1"];
    for (const signal of ["SIGTERM", "SIGKILL"] as const) {
      const twilld = spawnTwilld(a.host, flags);
      await twilld.says(moment);
      const { code } = await twilld.stop(signal);
      expect(code).toBe(signal === "SIGTERM" ? 0 : null);
    }
    await startTwilld(a.host, { etcd });
  },
);

test("the way of attaching can change between two runs, under traffic", async () => {
  const { etcd, a, b } = await cluster();
  const peer = await startTwilld(b.host, { etcd });
  // Making a clsact qdisc stops the interface's queue for a moment, whoever makes it: so it is there beforehand.
  let twilld = await startTwilld(a.host, { etcd, flags: ["--attach=clsact"] });
  await meet(peer, twilld);
  const traffic = await Traffic.start(a.pod, b.pod, 5);
  for (const mode of ["tcx", "clsact"] as const) {
    await traffic.flow();
    await twilld.stop(mode === "tcx" ? "SIGTERM" : "SIGKILL");
    twilld = await startTwilld(a.host, { etcd, flags: [`--attach=${mode}`] });
    await traffic.flow();
    await expectNothingTwice(a, mode);
    await expectLane(twilld, a.pod, b.pod, "fast");
  }
  await traffic.finish();
  await twilld.stop();
  const owned = await ownedBy(a.host);
  await twill(a.host, "uninstall", `--pin-path=${a.host.pinPath}`);
  expect(await kernelOf(a.host)).toEqual({ hooks: [], qdiscs: [] });
  await until("our programs and maps to be gone", async () => {
    const { programs, maps } = await alive(a.host, owned);
    return programs.length + maps.length === 0;
  });
});

test("new constants reach the programs on clsact hooks as well", async () => {
  const { etcd, a, b } = await cluster();
  const daemons = [];
  for (const { host } of [a, b]) daemons.push(await startTwilld(host, { etcd, flags: ["--attach=clsact"] }));
  await meet(...daemons);
  const [first] = daemons;
  const before = (await kernelOf(a.host)).hooks.map(({ programId }) => programId);
  // Other source ports: nothing else tells the new programs from the old.
  await first?.stop();
  await a.host.sysctl({ "net.ipv4.ip_local_port_range": "45000 45099" });
  await startTwilld(a.host, { etcd, flags: ["--attach=clsact"] });
  const after = (await kernelOf(a.host)).hooks.map(({ programId }) => programId);
  expect(after.filter((id) => before.includes(id))).toEqual([]);
  const capture = await b.host.capture("eth0", `udp dst port 8472 and src host ${a.host.address}`);
  expect((await a.pod.ping(b.pod.address, { count: 5 })).lost).toEqual([]);
  await capture.stop();
  const ports = (await capture.fields(["udp.srcport"])).map((packet) => Number(packet["udp.srcport"]));
  expect(ports.length).toBeGreaterThanOrEqual(5);
  expect(ports.filter((port) => port < 45000 || port > 45099)).toEqual([]);
});
