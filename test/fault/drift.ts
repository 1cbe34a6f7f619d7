/**
 * What may happen to a node's own state in the kernel: each thing of ours removed or changed by hand, links down,
 * interfaces made anew. What the kernel announces is to be mended within 100 ms; the rest by the next check
 * (`--resync`, 10 s), or within a second where packets may be lost for it.
 */
import { existsSync, readdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { readRows } from "../../src/edge/dataplane.ts";
import { exec, repository, until } from "../lab.ts";
import { type Fault, Monitor, type Node, type Told, type World } from "./world.ts";

/** Drift with an event is mended within this, drift without one within a resync period and its round. */
export const EVENT_MS = 100;
export const RESYNC_MS = 11_000;
export const CUT_MS = 1_000;
const NO_REPAIR = "vxlan repairs no drift: gone until each peer's next renewal (up to 23 h) or a restart";

/** Removes or changes something and waits for the kernel's word that it is back as it was. */
export async function announced(
  world: World,
  spoil: string,
  pattern: RegExp,
  back = pattern,
  changed = false,
): Promise<Told> {
  const { host } = world.touched;
  const [program = "ip", ...words] = spoil.split(" ");
  const monitor = await Monitor.start(host, program === "tc" ? "filters" : "addresses");
  const ended = Date.now();
  await exec([program, "-n", host.netns, ...words]);
  // From before the command was run: its own few milliseconds count as ours.
  const { again } = await monitor.mended(pattern, back, changed);
  await monitor.stop();
  return { ended, mended: again - ended };
}

/** Empties pinned maps of a node, or takes the row of one subnet out of them. */
async function emptyMaps(node: Node, names: readonly string[], subnet?: string): Promise<void> {
  const body = `
const [paths, subnet] = values;
for (const path of paths) {
  const map = loader.openPinnedMap(path);
  const bytes = subnet && Buffer.from(subnet.split("."));
  for (const [key, value] of map.entries())
    if (!bytes || bytes.equals(Buffer.from(key).subarray(0, 4))) map.delete(key);
  map.close();
}`;
  const paths = names.map((name) => join(node.host.pinPath, name));
  await loaderScript(node, body, paths, subnet ?? null);
}

/** Does something of which nobody is told and waits until `check` finds it put right. */
async function unannounced(
  what: string,
  spoil: () => Promise<void>,
  check: () => Promise<boolean>,
): Promise<Told> {
  await spoil();
  const ended = Date.now();
  await until(what, check, { timeout: 30_000 });
  return { ended, mended: Date.now() - ended };
}

const LOADER = JSON.stringify(join(repository, "dist/loader/index.js"));

/** Runs a script, which can use the loader and its arguments, in the host's namespace; returns what it logs. */
export async function loaderScript(node: Node, body: string, ...values: readonly unknown[]): Promise<string> {
  const text = `import * as loader from ${LOADER};\nconst values = JSON.parse(process.argv[1]);\n${body}`;
  const argv = [process.execPath, "--input-type=module", "-e", text, JSON.stringify(values)];
  return (await node.host.exec(argv)).stdout.trim();
}

async function indexOf(node: Node, device: string): Promise<number> {
  const [link] = await node.host.ipJson<{ ifindex: number }>(`link show dev ${device}`);
  return link?.ifindex ?? 0;
}

/** Programs at both hooks of a device, however attached. */
async function programsOn(node: Node, device: string): Promise<number> {
  const body = `
let count = 0;
for (const direction of ["ingress", "egress"])
  count += loader.queryTcx(values[0], direction).length + loader.queryClsact(values[0], direction).length;
console.log(count);`;
  return Number(await loaderScript(node, body, await indexOf(node, device)));
}

const pinsOf = (node: Node): string[] => {
  const { pinPath } = node.host;
  if (!existsSync(pinPath)) return [];
  const links = join(pinPath, "links");
  return [...readdirSync(pinPath), ...(existsSync(links) ? readdirSync(links) : [])].sort();
};

/** Detaches `from_net` from the uplink behind the daemon's back, and waits until it is there again. */
export function detachUplink(world: World): Promise<Told> {
  const node = world.touched;
  const body = "const link = loader.openPinnedLink(values[0]); link.detach(); link.close();";
  return unannounced(
    "the program to be back",
    async () => {
      const path = join(node.host.pinPath, "links", `from_net-${await indexOf(node, "eth0")}`);
      await loaderScript(node, body, path);
    },
    async () => (await programsOn(node, "eth0")) >= 1,
  );
}

export const drift: readonly Fault[] = [
  {
    name: "a peer's route deleted",
    flanneld: `${NO_REPAIR} (#1070, #1434)`,
    quick: true,
    mend: EVENT_MS,
    run: (world) => announced(world, "ip route del 172.7.22.0/24", /172\.7\.22\.0\/24 via 172\.7\.22\.0 /),
  },
  {
    name: "a peer's neighbour entry deleted",
    flanneld: NO_REPAIR,
    quick: true,
    mend: EVENT_MS,
    run: (world) =>
      announced(
        world,
        "ip neigh del 172.7.22.0 dev flannel.1",
        /172\.7\.22\.0 dev flannel\.1/,
        /172\.7\.22\.0 dev flannel\.1 lladdr \S+ PERMANENT/,
      ),
  },
  {
    name: "a peer's FDB entry deleted",
    flanneld: NO_REPAIR,
    quick: true,
    mend: EVENT_MS,
    run: async (world) => {
      const mac = await world.nodes[1].host.mac("flannel.1");
      return announced(
        world,
        `bridge fdb del ${mac} dev flannel.1 dst 10.4.7.22`,
        new RegExp(`10\\.4\\.7\\.22 dev flannel\\.1 lladdr ${mac}`),
      );
    },
  },
  {
    name: "`flannel.1` deleted",
    flanneld:
      "before v0.27.4 never made again; since then with a new MAC and without its routes, neighbours and FDB entries (#869, #1348)",
    quick: true,
    cuts: EVENT_MS,
    mend: 1_000,
    run: async (world) => {
      const mac = await world.touched.host.mac("flannel.1");
      const told = await announced(
        world,
        "ip link del flannel.1",
        /\d+: flannel\.1: /,
        /172\.7\.22\.0\/24 via 172\.7\.22\.0 dev flannel\.1 /,
      );
      await world.settled();
      if ((await world.touched.host.mac("flannel.1")) !== mac) throw new Error("the device has another MAC");
      return told;
    },
  },
  {
    name: "the address of `flannel.1` deleted",
    flanneld: "not noticed; the node's own packets to pods then leave from another address",
    quick: true,
    mend: EVENT_MS,
    run: (world) =>
      announced(world, "ip address del 172.7.21.0/32 dev flannel.1", /flannel\.1 +inet 172\.7\.21\.0\/32/),
  },
  {
    name: "another MAC given to `flannel.1`",
    flanneld: "not noticed: peers go on sending to the MAC in its lease, and the device drops what comes",
    quick: true,
    cuts: EVENT_MS,
    mend: EVENT_MS,
    run: async (world) => {
      const mac = await world.touched.host.mac("flannel.1");
      const other = "02:00:00:00:00:77";
      return announced(
        world,
        `ip link set flannel.1 address ${other}`,
        new RegExp(`link/ether ${other}`),
        new RegExp(`link/ether ${mac}`),
        true,
      );
    },
  },
  {
    name: "`flannel.1` set down",
    flanneld: "its routes are gone until each peer's next renewal (up to 23 h) or a restart",
    quick: true,
    cuts: EVENT_MS,
    mend: EVENT_MS,
    run: (world) =>
      announced(
        world,
        "ip link set flannel.1 down",
        /flannel\.1: <BROADCAST,MULTICAST> /,
        /172\.7\.22\.0\/24 via 172\.7\.22\.0 dev flannel\.1 /,
        true,
      ),
  },
  {
    name: "a sysctl of `flannel.1` changed",
    flanneld: "not noticed",
    quick: false,
    mend: RESYNC_MS,
    run: ({ touched: { host } }) => {
      const path = "/proc/sys/net/ipv6/conf/flannel.1/accept_ra";
      return unannounced(
        "accept_ra to be 0 again",
        async () => {
          await host.exec(["sh", "-c", `echo 2 > ${path}`]);
        },
        async () => (await host.exec(["cat", path])).stdout.trim() === "0",
      );
    },
  },
  {
    name: "a TCX link detached",
    flanneld: "has no programs",
    quick: true,
    mend: CUT_MS,
    run: detachUplink,
  },
  {
    name: "the clsact qdisc deleted",
    flanneld: "has no programs",
    quick: false,
    world: { flags: ["--attach=clsact"] },
    // Making or deleting a qdisc stops the interface for an instant, whoever does it.
    cuts: EVENT_MS,
    mend: EVENT_MS,
    run: (world) =>
      announced(
        world,
        "tc qdisc del dev eth0 clsact",
        /qdisc clsact ffff: dev eth0/,
        /filter dev eth0 ingress .* from_net/,
      ),
  },
  {
    name: "a peer's map entry deleted",
    flanneld: "has no maps",
    quick: false,
    mend: RESYNC_MS,
    run: (world) => {
      const node = world.touched;
      return unannounced(
        "the peer to be back in the map",
        () => emptyMaps(node, ["subnets4"], "172.7.22.0"),
        async () => readRows(node.host.pinPath, "subnets4").length === 2,
      );
    },
  },
  {
    name: "all peers' map entries deleted",
    flanneld: "has no maps",
    quick: true,
    // Nobody is a peer then, and what comes is dropped: that is how it is noticed.
    cuts: CUT_MS,
    mend: CUT_MS,
    run: (world) => {
      const node = world.touched;
      return unannounced(
        "both peers to be back in the maps",
        () => emptyMaps(node, ["subnets4", "peers4"]),
        async () =>
          readRows(node.host.pinPath, "subnets4").length === 2 &&
          readRows(node.host.pinPath, "peers4").length === 2,
      );
    },
  },
  {
    name: "all pins deleted",
    flanneld: "has no pins",
    quick: false,
    mend: CUT_MS,
    run: async (world) => {
      const node = world.touched;
      const before = pinsOf(node);
      return unannounced(
        "the pins to be back",
        async () => rmSync(node.host.pinPath, { recursive: true }),
        async () => JSON.stringify(pinsOf(node)) === JSON.stringify(before),
      );
    },
  },
  {
    name: "uplink down and up",
    flanneld:
      "with DirectRouting or host-gw the routes are gone for good, or until a check each 10 s (#1070, #1759); vxlan recovers",
    quick: true,
    cuts: 1_000,
    run: async (world) => {
      const { host } = world.touched;
      await host.ip("link set eth0 down");
      // The kernel has dropped what it held by this interface.
      await world.touched.pod.ping(world.nodes[1].pod.address, { count: 30 });
      const ended = Date.now();
      await host.ip("link set eth0 up");
      await host.ip("route add default via 10.4.7.1");
      await world.settled();
      return { ended };
    },
  },
  {
    name: "the pods' bridge deleted and made anew",
    flanneld: "does not concern it",
    quick: true,
    cuts: 1_000,
    run: async (world) => {
      const { host, pod } = world.touched;
      const mac = await host.mac("docker0");
      await host.ip("link del docker0");
      await pod.ping(world.nodes[1].pod.address, { count: 10 });
      const ended = Date.now();
      // The port first, then up: a request of ARP that finds no port is repeated by the kernel only a second later.
      await host.ipBatch([
        `link add docker0 address ${mac} mtu 1450 type bridge`,
        `link set ${pod.port} master docker0 up`,
        "address add 172.7.21.1/24 dev docker0",
        "link set docker0 up",
      ]);
      await world.settled();
      return { ended };
    },
  },
];
