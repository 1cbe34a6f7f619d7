/**
 * What may happen to etcd, to the way there, and to what is written in it. None of it may cost a packet, but where
 * it takes the first node's own lease away.
 */
import { rmSync, watch } from "node:fs";
import { dirname, join } from "node:path";
import { exec, until } from "../lab.ts";
import { CONFIG, CONFIG_KEY, type Fault, Monitor, SUBNETS, type Told, type World } from "./world.ts";

const dataOf = (world: World): string => join(world.etcd.host.directory, "member0");

/** Waits until each daemon has said something that it had not said before. */
function allSay(world: World, pattern: RegExp, timeout = 60_000): () => Promise<void> {
  const marks = world.nodes.map(({ twilld }) => ({ twilld, after: twilld.process.lines.length }));
  return async () => {
    await Promise.all(marks.map(({ twilld, after }) => twilld.says(pattern, { after, timeout })));
  };
}

/** Milliseconds until all nodes follow etcd again, from now on. */
async function following(world: World): Promise<Told> {
  const ended = Date.now();
  await world.follows();
  const took = Date.now() - ended;
  return { ended, remark: `a new peer is followed ${(took / 1000).toFixed(1)} s later` };
}

/** From another's taking the subnet away to the new one in subnet.env, and every peer's route to it. */
const MOVE_MS = 1_000;

/** Takes the first node's subnet away; it takes another one, for all to use. */
async function moves(world: World, cause: () => Promise<void>): Promise<Told> {
  const { host, twilld } = world.touched;
  const after = twilld.process.lines.length;
  const ended = Date.now();
  await cause();
  const [, text = ""] = await twilld.says(/(172\.7\.\d+)\.0\/24 is ours, in place of/, { after });
  const file = twilld.subnetFile;
  const wake = (ring: () => void) => {
    const watcher = watch(dirname(file), ring);
    return () => watcher.close();
  };
  const isNamed = () => twilld.subnetEnv.FLANNEL_SUBNET === `${text}.1/24`;
  await until("subnet.env to name the new subnet", isNamed, { wake });
  const number = Number(text.split(".")[2]);
  for (const node of world.nodes.slice(1))
    await until(`${node.host.name} to route to the new subnet`, () => world.hasRoute(node, number));
  const mended = Date.now() - ended;
  const bridge = await host.bridge("docker1", `${text}.1/24`, { mtu: 1450 });
  const pod = await host.pod("n", `${text}.2/24`, { bridge, mtu: 1450 });
  for (const { pod: other } of world.nodes.slice(1)) {
    await until("a pod of the new subnet to reach the others", async () => {
      return (await pod.ping(other.address, { count: 1 })).received === 1;
    });
  }
  return { ended, mended, remark: "another subnet, in subnet.env and routed to" };
}

export const store: readonly Fault[] = [
  {
    name: "etcd SIGKILLed for 30 s and back",
    flanneld: "keeps forwarding and tries again; before v0.26.4 with a whole processor (#1830)",
    quick: false,
    run: async (world) => {
      const noticed = allSay(world, /no connection to etcd/);
      await world.etcd.stopMember(0);
      await noticed();
      await new Promise((resolve) => setTimeout(resolve, 30_000));
      await world.etcd.startMember(0);
      return following(world);
    },
  },
  {
    name: "etcd's leader lost in a cluster of three",
    flanneld: "keeps forwarding and watches on at another member",
    quick: false,
    world: { members: 3 },
    run: async (world) => {
      type Endpoint = { Status: { header: { member_id: number }; leader: number } };
      const status = JSON.parse(await world.etcd.ctl("endpoint", "status", "-w", "json")) as Endpoint[];
      const leader = status.findIndex(({ Status }) => Status.header.member_id === Status.leader);
      await world.etcd.stopMember(leader);
      const killed = Date.now();
      // Whatever was under way at the old leader fails; the first write that succeeds shows the new one.
      const elected = () =>
        world.etcd
          .put("/elsewhere", "1")
          .then(() => true)
          .catch(() => false);
      await until("a new leader", elected, { timeout: 60_000 });
      const election = Date.now() - killed;
      const after = await following(world);
      const told = { ...after, remark: `a leader after ${(election / 1000).toFixed(1)} s; ${after.remark}` };
      await world.etcd.startMember(leader);
      return told;
    },
  },
  {
    name: "etcd wiped and refilled from nothing",
    flanneld:
      "its watch hangs at a revision the new store does not reach: deaf until a restart; or a fresh list deletes all peers, its own lease with them",
    quick: false,
    run: async (world) => {
      const back = allSay(world, /connected to etcd/);
      await world.etcd.stopMember(0);
      rmSync(dataOf(world), { recursive: true });
      await world.etcd.startMember(0);
      const ended = Date.now();
      await back();
      await world.etcd.put(CONFIG_KEY, CONFIG);
      await until("all leases to be in etcd again", async () => (await world.etcd.list(SUBNETS)).size === 3);
      const took = Date.now() - ended;
      await world.follows();
      return { ended, remark: `all leases are back ${(took / 1000).toFixed(1)} s later` };
    },
  },
  {
    name: "etcd restored from a snapshot with a lower revision",
    flanneld:
      "its watch hangs at a revision that comes again much later: what is written until then is missed",
    quick: false,
    run: async (world) => {
      const { host } = world.etcd;
      const snapshot = join(host.directory, "snapshot.db");
      await world.putPeer(98);
      await world.etcd.ctl("snapshot", "save", snapshot);
      // The snapshot has a peer that goes, and lacks the present lease of a living node.
      await world.removePeer(98);
      await world.etcd.ctl("del", `${SUBNETS}/172.7.21.0-24`);
      await until("h1 to take its lease again", async () => (await world.etcd.list(SUBNETS)).size === 3);
      for (let i = 0; i < 5; i++) await world.etcd.put("/elsewhere", String(i));
      const back = allSay(world, /connected to etcd/);
      await world.etcd.stopMember(0);
      rmSync(dataOf(world), { recursive: true });
      const member = ["--name=member0", "--initial-cluster=member0=http://10.4.7.11:2380"];
      const peer = ["--initial-advertise-peer-urls=http://10.4.7.11:2380", `--data-dir=${dataOf(world)}`];
      await exec(["etcdctl", "snapshot", "restore", snapshot, ...member, ...peer], {
        env: { ETCDCTL_API: "3" },
      });
      await world.etcd.startMember(0);
      await back();
      await until("h1 to see the peer of the snapshot", () => world.hasRoute(world.touched, 98));
      await world.removePeer(98);
      return following(world);
    },
    // The deletion of h1's own lease is part of the story.
    cuts: 1_000,
  },
  {
    name: "history compacted while disconnected",
    flanneld:
      "before v0.28.6 a hot loop with 7.7 GB of log a day (#2470); since then a fresh list, which misses changed records",
    quick: false,
    run: async (world) => {
      const { etcd } = world;
      const peers = world.lab.switch;
      await world.putPeer(97);
      await world.putPeer(98);
      for (const node of world.nodes)
        await until(
          "the peers to be known",
          async () => (await world.hasRoute(node, 97)) && (await world.hasRoute(node, 98)),
        );
      const lost = allSay(world, /no connection to etcd/);
      const back = allSay(world, /connected to etcd/);
      // Killed first: that is noticed at once, silence only when the keepalive has had its time.
      await etcd.stopMember(0);
      await lost();
      await peers.ip("link set etcd down");
      await etcd.startMember(0);
      await world.removePeer(97);
      await world.putPeer(98, { mac: "02:00:00:00:01:98" });
      for (let i = 0; i < 20; i++) await etcd.put("/elsewhere", String(i));
      type Answer = { header: { revision: number } };
      const { header } = JSON.parse(await etcd.ctl("get", "/elsewhere", "-w", "json")) as Answer;
      await etcd.ctl("compact", String(header.revision));
      await peers.ip("link set etcd up");
      await back();
      for (const node of world.nodes) {
        // What is missing from a list is kept for half a minute, in case that etcd lost it.
        const isGone = async () => !(await world.hasRoute(node, 97));
        await until("the peer that went to be gone", isGone, { timeout: 60_000 });
        await until("the peer that changed to have its new MAC", async () =>
          (await node.host.ip("neigh show dev flannel.1")).includes("02:00:00:00:01:98"),
        );
      }
      await world.removePeer(98);
      return following(world);
    },
  },
  {
    name: "1,000 garbage keys",
    flanneld:
      "one unreadable event counts as an empty snapshot: all peers go, until their next renewals (up to 23 h)",
    quick: true,
    run: async (world) => {
      const { host, endpoints } = world.etcd;
      const puts = Array.from({ length: 1_000 }, (_, i) => {
        const [name, value] = [
          [`172.7.${i}.0-24`, "{not json"],
          [`172.7.${i % 250}.${i % 7}-24`, "{}"],
          [`10.${i % 256}.${i >> 8}.0-16`, '{"PublicIP":"10.4.7.99","BackendType":"vxlan"}'],
          [`rubbish ${i}`, "\u0001"],
        ][i % 4] as [string, string];
        // Not over those of living nodes.
        return /^172\.7\.2[123]\./.test(name) ? `rubbish-${i}` : `${SUBNETS}/${name}\t${value}`;
      });
      const known = Array.from({ length: 1_000 / 100 }, (_, i) => puts.slice(i * 100, (i + 1) * 100));
      for (const part of known) {
        const unique = new Map(part.map((line) => line.split("\t") as [string, string | undefined]));
        const operations = [...unique].map(
          ([key, value]) => `put ${JSON.stringify(key)} ${JSON.stringify(value ?? "x")}`,
        );
        await host.exec(["etcdctl", `--endpoints=${endpoints.join(",")}`, "txn"], {
          env: { ETCDCTL_API: "3" },
          input: `\n${operations.join("\n")}\n\n\n`,
        });
      }
      const told = await following(world);
      const { twilld } = world.touched;
      await twilld.statusWhere("hundreds of records refused", ({ rejections }) => rejections.length > 400);
      return told;
    },
    after: async (world) => {
      const keys = [...(await world.etcd.list(SUBNETS)).keys()].filter(
        (key) => !/\/172\.7\.2[123]\.0-24$/.test(key),
      );
      const { host, endpoints } = world.etcd;
      for (let at = 0; at < keys.length; at += 100) {
        const operations = keys.slice(at, at + 100).map((key) => `del ${JSON.stringify(key)}`);
        await host.exec(["etcdctl", `--endpoints=${endpoints.join(",")}`, "txn"], {
          env: { ETCDCTL_API: "3" },
          input: `\n${operations.join("\n")}\n\n\n`,
        });
      }
      await world.touched.twilld.statusWhere("nothing refused", ({ rejections }) => rejections.length === 0);
    },
  },
  {
    name: "a peer's record changes its MAC and address",
    flanneld: "followed, but the old FDB entry stays; a change during an interruption of the watch is missed",
    quick: true,
    run: async (world) => {
      await world.putPeer(96, { address: "10.4.7.96", mac: "02:00:00:00:00:96" });
      for (const node of world.nodes) await until("the peer to be known", () => world.hasRoute(node, 96));
      await world.putPeer(96, { address: "10.4.7.95", mac: "02:00:00:00:01:96" });
      const ended = Date.now();
      for (const { host } of world.nodes) {
        await until("only the new entries to be there", async () => {
          const { stdout } = await host.exec(["bridge", "fdb", "show", "dev", "flannel.1"]);
          const neighbours = await host.ip("neigh show dev flannel.1");
          return (
            stdout.includes("02:00:00:00:01:96 dst 10.4.7.95") &&
            !stdout.includes("02:00:00:00:00:96") &&
            neighbours.includes("172.7.96.0 lladdr 02:00:00:00:01:96")
          );
        });
      }
      await world.removePeer(96);
      return { ended };
    },
  },
  {
    name: "a node's own key deleted",
    flanneld: "logs it and exits with 0: no restart by systemd's on-failure, its peers have dropped it",
    quick: true,
    cuts: 1_000,
    run: async (world) => {
      const monitor = await Monitor.start(world.nodes[1].host);
      const { twilld } = world.touched;
      const after = twilld.process.lines.length;
      await world.etcd.ctl("del", `${SUBNETS}/172.7.21.0-24`);
      const { gone, again } = await monitor.mended(/172\.7\.21\.0\/24 via 172\.7\.21\.0/);
      await monitor.stop();
      await twilld.says(/172\.7\.21\.0\/24 is .*ours/, { after });
      return { ended: gone, remark: `the peers lack it for ${Math.ceil(again - gone)} ms` };
    },
  },
  {
    name: "a node's own key overwritten by another node",
    flanneld: "not noticed: two nodes own the subnet, and whoever renews wins (#1289, #805)",
    quick: true,
    spoils: true,
    mend: MOVE_MS,
    run: (world) => moves(world, () => world.putPeer(21, { address: "10.4.7.99" })),
  },
  {
    name: "a node's etcd lease revoked by hand",
    flanneld: "logs it and exits with 0; its next start takes the same subnet again",
    quick: true,
    spoils: true,
    mend: MOVE_MS,
    run: async (world) => {
      const key = `${SUBNETS}/172.7.21.0-24`;
      const fields = await world.etcd.ctl("get", key, "-w", "fields");
      const id = BigInt(/^"Lease" : (\d+)$/m.exec(fields)?.[1] ?? 0);
      const told = await moves(world, async () => {
        await world.etcd.ctl("lease", "revoke", id.toString(16));
      });
      if ((await world.etcd.list(SUBNETS)).has(key)) throw new Error("the node took its subnet again");
      const { twilld } = world.touched;
      if (!twilld.process.lines.some(({ text }) => / 172\.7\.21\.0\/24 was revoked by hand: /.test(text)))
        throw new Error("it did not say that its lease was revoked");
      return told;
    },
  },
];
