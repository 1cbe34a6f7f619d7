/**
 * What may happen to the daemon, its host and its pods: killed again and again, upgraded, out of room, out of
 * descriptors, out of time, cut off for longer than its lease, moved to another address.
 */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { exec, runId, until } from "../lab.ts";
import { type Status, spawnTwilld, Twilld, twill, twilldFlags, twilldProgram } from "../twilld.ts";
import { Transfers } from "./transfers.ts";
import { buildVariant } from "./variant.ts";
import { CONFIG_KEY, type Fault, SUBNETS, type Told, type World } from "./world.ts";

/** Ends the twilld of h1 and starts it in another way; it is ready when this resolves. */
async function restart(
  world: World,
  argv: readonly string[],
  flags: readonly string[],
  env = {},
): Promise<void> {
  const node = world.touched;
  await node.twilld.stop();
  const child = node.host.spawn([...argv, ...flags], { cwd: node.host.directory, env });
  node.twilld = new Twilld(node.host, child, flags);
  await node.twilld.ready();
}

/** Back to how the world was made. */
async function restore(world: World): Promise<void> {
  await restart(world, [twilldProgram], twilldFlags(world.touched.host, world.etcd));
}

/** Puts another network config, and waits until every node obeys it. */
async function configure(
  world: World,
  backend: object,
  isObeyed: (status: Status) => boolean,
): Promise<void> {
  await world.etcd.put(CONFIG_KEY, JSON.stringify({ Network: "172.7.0.0/16", Backend: backend }));
  for (const { twilld } of world.nodes) await twilld.statusWhere(JSON.stringify(backend), isObeyed);
  await world.settled();
}

const DOCKER_RULE = "POSTROUTING -s 172.7.21.0/24 ! -o docker0 -j MASQUERADE".split(" ");
const OTHER_RULE = "POSTROUTING -s 198.51.100.0/24 -j MASQUERADE".split(" ");
/** Named after the run, for the sweep at its end. */
const OWN_PINS = `/sys/fs/bpf/twill-${runId}/own`;
/** Pods that come and go in a minute. */
const CHURN_RATE = 200;
const MOVED = "10.4.7.121";

/** Kills the daemon every 2 s for so long, and starts it anew at once. */
export async function killOften(world: World, ms: number): Promise<Told> {
  const node = world.touched;
  const end = Date.now() + ms;
  let kills = 0;
  for (; Date.now() < end; kills++) {
    await new Promise((resolve) => setTimeout(resolve, 2_000));
    await node.twilld.stop("SIGKILL");
    world.start(node);
  }
  const ended = Date.now();
  await node.twilld.ready();
  await world.settled();
  return { ended, remark: `${kills} kills` };
}

export const life: readonly Fault[] = [
  {
    name: "a node cut off for longer than its lease lives (6 s), and back",
    flanneld:
      "its peers drop it; it sees its own key gone and exits with 0; the new start takes the subnet again if it is free",
    quick: false,
    world: { common: ["--lease-ttl=6"] },
    cuts: 1_000,
    run: async (world) => {
      const { host } = world.touched;
      await host.plug(false);
      await until("the lease to run out", async () => (await world.etcd.list(SUBNETS)).size === 2, {
        timeout: 60_000,
      });
      await until("h2 to drop the node", async () => !(await world.hasRoute(world.nodes[1], 21)));
      // Long enough for its connection to etcd to be given up.
      await world.touched.twilld.statusWhere("no connection", ({ store }) => !store.connected, 60_000);
      const ended = Date.now();
      await host.plug(true);
      await until("the lease to be back", async () => (await world.etcd.list(SUBNETS)).size === 3);
      const took = Date.now() - ended;
      await world.settled();
      return { ended, remark: `its lease is back after ${took} ms` };
    },
  },
  {
    name: "uplink address changed",
    flanneld: "not noticed: peers go on sending to the old address (#408, #1052, #760)",
    quick: false,
    world: { flags: ["--public-ip="] },
    cuts: 1_000,
    run: async (world) => {
      const { host } = world.touched;
      await host.ip("address del 10.4.7.21/24 dev eth0");
      const ended = Date.now();
      await host.ipBatch([`address add ${MOVED}/24 dev eth0`, "route add default via 10.4.7.1"]);
      await until("h2 to know the new address", async () => {
        const { stdout } = await world.nodes[1].host.exec(["bridge", "fdb", "show", "dev", "flannel.1"]);
        return stdout.includes(`dst ${MOVED}`) && !stdout.includes("dst 10.4.7.21 ");
      });
      await world.settled();
      return { ended };
    },
    after: async ({ touched: { host } }) => {
      await host.ip(`address del ${MOVED}/24 dev eth0`);
      await host.ipBatch(["address add 10.4.7.21/24 dev eth0", "route add default via 10.4.7.1"]);
    },
  },
  {
    name: "a peer whose MAC and address change",
    flanneld: "followed, but the old FDB entry stays; a change during an interruption of the watch is missed",
    quick: false,
    cuts: 1_000,
    world: { flags: ["--public-ip="] },
    run: async (world) => {
      const node = world.touched;
      const { host } = node;
      const mac = await host.mac("flannel.1");
      // The node is reinstalled: its device is gone, its lease has been taken back, and DHCP gives another address.
      await node.twilld.stop();
      await host.ip("link del flannel.1");
      await host.ip("address del 10.4.7.21/24 dev eth0");
      await world.etcd.ctl("del", `${SUBNETS}/172.7.21.0-24`);
      for (const { host: other } of world.nodes.slice(1))
        await until("the peer to be gone", async () => !(await other.ip("route")).includes("172.7.21.0/24"));
      await host.ipBatch([`address add ${MOVED}/24 dev eth0`, "route add default via 10.4.7.1"]);
      const started = Date.now();
      await world.start(node, ["--public-ip="]).ready();
      // The node is away until its daemon says that it is there.
      const ended = Date.now();
      const now = await host.mac("flannel.1");
      if (now === mac) throw new Error("the device has the MAC of before");
      for (const { host: other } of world.nodes.slice(1)) {
        await until("only the new entries to be there", async () => {
          const fdb = (await other.exec(["bridge", "fdb", "show", "dev", "flannel.1"])).stdout;
          const neighbours = await other.ip("neigh show dev flannel.1");
          const all = fdb + neighbours;
          return (
            fdb.includes(`${now} dst ${MOVED}`) &&
            neighbours.includes(`172.7.21.0 lladdr ${now}`) &&
            !all.includes(mac) &&
            !all.includes("dst 10.4.7.21 ")
          );
        });
      }
      await world.settled();
      return { ended, remark: `ready ${ended - started} ms after its start; another MAC and address` };
    },
    after: async ({ touched: { host } }) => {
      await host.ip(`address del ${MOVED}/24 dev eth0`);
      await host.ipBatch(["address add 10.4.7.21/24 dev eth0", "route add default via 10.4.7.1"]);
    },
  },
  {
    name: "pod churn, 200 pods a minute",
    flanneld: "does not concern it",
    quick: false,
    run: async (world) => {
      const { host } = world.touched;
      const other = world.nodes[1].pod.address;
      const began = Date.now();
      const count = 40;
      let lost = 0;
      for (let i = 0; i < count; i++) {
        const pod = await host.pod(`c${i}`, `172.7.21.${10 + (i % 100)}/24`, { mtu: 1450 });
        lost += (await pod.ping(other, { count: 2 })).lost.length;
        await pod.remove();
        const due = began + ((i + 1) * 60_000) / CHURN_RATE;
        await new Promise((resolve) => setTimeout(resolve, Math.max(0, due - Date.now())));
      }
      const rate = Math.round((count * 60_000) / (Date.now() - began));
      if (lost > 0) throw new Error(`${lost} of the first packets of new pods were lost`);
      if (rate < CHURN_RATE * 0.95) throw new Error(`only ${rate} pods came and went a minute`);
      return { ended: Date.now(), remark: `${count} pods at ${rate} a minute; no first packet lost` };
    },
  },
  {
    name: "`twilld` SIGKILLed every 2 s for a minute",
    flanneld: "keeps forwarding; what changes meanwhile is seen by the next run, what went stays (#2554)",
    quick: false,
    run: (world) => killOften(world, 60_000),
  },
  {
    name: "the backend changes to host-gw, and back",
    flanneld: "read at the start alone; nodes with the one backend have no way to those with the other",
    quick: false,
    // Each node's lease names the new backend only when that node has heard of it.
    everywhere: true,
    cuts: 1_000,
    run: async (world) => {
      await configure(world, { Type: "host-gw" }, ({ network, mtu }) => {
        return network?.backend.type === "host-gw" && mtu === 1500;
      });
      const ended = Date.now();
      await configure(world, { Type: "vxlan" }, ({ network }) => network?.backend.type === "vxlan");
      return { ended };
    },
  },
  {
    name: "the network config changes: another MTU, DirectRouting, and back",
    flanneld: "read at the start alone: nothing changes until each node is started anew",
    quick: false,
    run: async (world) => {
      const peers = ["172.7.21.0/24", "172.7.22.0/24", "172.7.23.0/24"];
      // Of two nodes one is always first, and their programs take both ways meanwhile.
      const routed = async (way: "via 10.4.7." | "dev flannel.1") => {
        for (const { host } of world.nodes)
          await until(`${host.name} to have its routes ${way}`, async () => {
            const lines = (await host.ip("route")).split("\n");
            const isToPeer = (line: string) =>
              peers.some((peer) => line.startsWith(peer)) && line.includes(" via ");
            const found = lines.filter(isToPeer);
            return found.length === 2 && found.every((line) => line.includes(way));
          });
      };
      await configure(world, { Type: "vxlan", MTU: 1400 }, ({ mtu }) => mtu === 1350);
      await configure(world, { Type: "vxlan", MTU: 1400, DirectRouting: true }, ({ network }) => {
        return network?.backend.directRouting === true;
      });
      await routed("via 10.4.7.");
      await configure(world, { Type: "vxlan" }, ({ mtu, network }) => {
        return mtu === 1450 && network?.backend.directRouting === false;
      });
      const ended = Date.now();
      await routed("dev flannel.1");
      return { ended };
    },
  },
  {
    name: "an upgrade to other programs and another map layout",
    flanneld: "has no programs",
    quick: false,
    run: async (world) => {
      const { host } = world.touched;
      const variant = await buildVariant(host.directory);
      await restart(world, [variant], twilldFlags(host, world.etcd));
      await world.settled();
      const { stdout } = await exec([
        "bpftool",
        "-j",
        "map",
        "show",
        "pinned",
        join(host.pinPath, "subnets4"),
      ]);
      const size = (JSON.parse(stdout) as { bytes_value: number }).bytes_value;
      await restore(world);
      await world.settled();
      return { ended: Date.now(), remark: `there (rows of ${size} bytes) and back` };
    },
  },
  {
    name: "the clock stepped by an hour, both ways",
    flanneld: "renews late or early: its lease ends by the wall clock",
    quick: false,
    run: async (world) => {
      const { host } = world.touched;
      const shift = join(host.directory, "clock.mjs");
      // CLOCK_REALTIME has no namespace: the daemon is given another Date instead. The other clocks do not step.
      writeFileSync(
        shift,
        `let offset = 0;
const Real = Date;
globalThis.Date = class extends Real {
  constructor(...values) { values.length === 0 ? super(Real.now() + offset) : super(...values); }
  static now() { return Real.now() + offset; }
};
const steps = [3_600_000, -3_600_000, 0];
process.on("SIGUSR2", () => { offset = steps.shift() ?? 0; console.error("stepped", offset); });
`,
      );
      const flags = twilldFlags(host, world.etcd);
      await restart(world, [twilldProgram], flags, { NODE_OPTIONS: `--import=${shift}` });
      const { twilld } = world.touched;
      const before = await world.etcd.list(SUBNETS);
      for (const step of ["3600000", "-3600000", "0"]) {
        const after = twilld.process.lines.length;
        twilld.process.kill("SIGUSR2");
        await twilld.says(new RegExp(`stepped ${step}`), { after });
        await world.follows();
      }
      const same = JSON.stringify([...before]) === JSON.stringify([...(await world.etcd.list(SUBNETS))]);
      if (!same) throw new Error("the leases are other ones");
      return { ended: Date.now(), remark: "`Date` replaced in the daemon" };
    },
    after: restore,
  },
  {
    name: "disk full when `subnet.env` is written",
    flanneld: "exits with 1, or goes on with half a file",
    quick: true,
    run: async (world) => {
      const { host, twilld } = world.touched;
      const small = join(host.directory, "small");
      await twilld.stop();
      const file = join(small, "subnet.env");
      const flags = [...twilldFlags(host, world.etcd), `--subnet-file=${file}`];
      const script = `mkdir -p ${small} && mount -t tmpfs -o size=16k tmpfs ${small} &&
        { dd if=/dev/zero of=${small}/filler bs=1k count=64 status=none || :; } && exec "$@"`;
      const argv = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        script,
        "sh",
        twilldProgram,
      ];
      const child = host.spawn([...argv, ...flags], { cwd: host.directory });
      world.touched.twilld = new Twilld(host, child, flags);
      const now = world.touched.twilld;
      const full = await now.statusWhere("no room", ({ failures }) =>
        failures.some(({ reason }) => /ENOSPC|room|space/.test(reason)),
      );
      if (full.ready) throw new Error("it says that it is ready without its file");
      const inside = `/proc/${child.pid}/root${small}`;
      const ended = Date.now();
      await exec(["rm", `${inside}/filler`]);
      await until("subnet.env to be whole", async () => {
        const { stdout } = await exec(["cat", `${inside}/subnet.env`], { check: false });
        return stdout.includes("FLANNEL_IPMASQ=");
      });
      return { ended, remark: `written ${Date.now() - ended} ms after there is room` };
    },
    after: restore,
  },
  {
    name: "out of file descriptors",
    flanneld: "not known",
    quick: false,
    run: async (world) => {
      const { host, twilld } = world.touched;
      const pid = String(twilld.process.pid);
      const { stdout } = await exec(["sh", "-c", `ls /proc/${pid}/fd | wc -l`]);
      await exec(["prlimit", "--pid", pid, `--nofile=${Number(stdout)}:4096`]);
      // Each of these asks for descriptors: programs for a pod, a connection to etcd, a route.
      const pod = await host.pod("f", "172.7.21.50/24", { mtu: 1450 });
      await world.etcd.stopMember(0);
      await world.etcd.startMember(0);
      await host.ip("route del 172.7.22.0/24");
      await until("the route to be back", () => world.hasRoute(world.touched, 22));
      const arrived = await pod.ping(world.nodes[1].pod.address, { count: 3 });
      if (arrived.lost.length > 0) throw new Error("the new pod's packets were lost");
      const ended = Date.now();
      await exec(["prlimit", "--pid", pid, "--nofile=4096:4096"]);
      await world.settled();
      const took = Date.now() - ended;
      await pod.remove();
      return { ended, remark: `all in order ${(took / 1000).toFixed(1)} s after there are some` };
    },
  },
  {
    name: "taking over while connections are masqueraded by Docker's rule",
    flanneld: "does not concern it",
    quick: true,
    run: async (world) => {
      const node = world.touched;
      const { host } = node;
      await node.twilld.stop();
      await twill(host, "uninstall", "--keep-routes", `--pin-path=${host.pinPath}`);
      // A first rule wakes connection tracking; what is under way becomes known to it before the real rule is there.
      await host.exec(["iptables", "-t", "nat", "-A", ...OTHER_RULE]);
      await node.pod.ping(world.nodes[1].pod.address, { count: 50 });
      await host.exec(["iptables", "-t", "nat", "-A", ...DOCKER_RULE]);
      const translated = await Transfers.start(node.pod, world.nodes[2].pod, 10, 5006);
      const began = Date.now();
      await world.start(node).ready();
      await world.settled();
      await translated.flow();
      const broken = await translated.finish();
      if (broken.length > 0) throw new Error(`masqueraded: ${broken[0]}`);
      return { ended: began, remark: "10 masqueraded connections whole" };
    },
    after: async ({ touched: { host } }) => {
      for (const rule of [DOCKER_RULE, OTHER_RULE]) await host.exec(["iptables", "-t", "nat", "-D", ...rule]);
    },
  },
  {
    name: "ten more nodes start at once",
    flanneld: 'a collision is not tried again: "subnet already exists", exit 1 (#1145)',
    quick: false,
    spoils: true,
    run: async (world) => {
      const hosts = [];
      for (let i = 0; i < 10; i++)
        hosts.push(await world.lab.host(`n${i}`, { address: `10.4.7.${50 + i}/24` }));
      // They meet in a network with room for twelve.
      await world.etcd.put(
        "/small/config",
        '{"Network":"10.9.0.0/20","SubnetLen":24,"SubnetMin":"10.9.1.0","SubnetMax":"10.9.12.0","Backend":{"Type":"vxlan"}}',
      );
      const began = Date.now();
      const daemons = hosts.map((host) =>
        spawnTwilld(host, [...twilldFlags(host, world.etcd), "--etcd-prefix=/small"]),
      );
      await Promise.all(daemons.map((daemon) => daemon.ready(120_000)));
      const took = Date.now() - began;
      const subnets = new Set(daemons.map(({ subnetEnv }) => subnetEnv.FLANNEL_SUBNET));
      const keys = await world.etcd.list("/small/subnets/");
      for (const daemon of daemons)
        await daemon.statusWhere("nine peers", ({ peers }) => peers === 9, 60_000);
      const ended = Date.now();
      await Promise.all(daemons.map((daemon) => daemon.stop()));
      if (subnets.size !== 10 || keys.size !== 10)
        throw new Error(`${subnets.size} subnets, ${keys.size} keys`);
      return { ended, remark: `ten subnets of twelve in ${(took / 1000).toFixed(1)} s` };
    },
  },
  {
    name: "bpffs unmounted",
    flanneld: "does not concern it",
    quick: false,
    world: { flags: [`--pin-path=${OWN_PINS}`], launcher: privateBpffs },
    mend: 11_000,
    run: async (world) => {
      const { twilld } = world.touched;
      const inside = ["nsenter", "-t", String(twilld.process.pid), "-m", "--"];
      await exec([...inside, "umount", "-l", "/sys/fs/bpf"]);
      const ended = Date.now();
      await until(
        "the pins to be back",
        async () => (await exec([...inside, "ls", join(OWN_PINS, "counters")], { check: false })).code === 0,
        { timeout: 30_000 },
      );
      const mended = Date.now() - ended;
      await world.settled();
      return { ended, mended };
    },
  },
];

/** The daemon in a mount namespace of its own, with a BPF file system of its own. */
function privateBpffs(argv: readonly string[]): string[] {
  const script = 'umount -l /sys/fs/bpf; mount -t bpf bpf /sys/fs/bpf && exec "$@"';
  return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", ...argv];
}
