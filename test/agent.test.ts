import { describe, expect, test } from "vitest";
import { nexthopIdOf } from "../src/core/host.ts";
import { FORMER_HOLD_MS, timeoutsOf } from "../src/core/masquerade.ts";
import { cidr, cidrText, config, ip, ipText, type Node, record, World } from "./sim/fakes.ts";

const VXLAN = { Type: "vxlan" };
/** How long a peer that was reached without a tunnel still is. */
const HOLD_MS = 5_000;
const MAC = (n: number): string => `0e:00:00:00:00:${n.toString(16).padStart(2, "0")}`;

/** A node that forwards, with peers that hold 10.3.101.0/24, 10.3.102.0/24 and so on. */
async function forwarding(peers = 2, backend: object = VXLAN, options = {}): Promise<[World, Node]> {
  const world = new World();
  world.etcd.put("config", config(backend));
  for (let n = 1; n <= peers; n++) addPeer(world, n, backend);
  const node = world.addNode(options);
  node.start();
  await world.settle();
  forget(node);
  return [world, node];
}

function addPeer(world: World, n: number, backend: object = VXLAN): void {
  const isVxlan = "Type" in backend && backend.Type === "vxlan";
  world.etcd.put(
    `subnets/10.3.${100 + n}.0-24`,
    record(`192.168.0.${100 + n}`, isVxlan ? MAC(n) : undefined),
    world.etcd.grant(86400),
  );
}

/** What is asked from here on counts alone. */
function forget(node: Node): void {
  node.kernel.writes.length = 0;
  node.dataplane.writes.length = 0;
  node.logged.length = 0;
  node.kernel.surveys = node.kernel.lookups = 0;
}

/** Routes to peers, as text. */
function routes(node: Node): string[] {
  return [...node.kernel.routes.values()]
    .filter(
      ({ destination, table }) =>
        table === 254 && destination.length > 16 && destination.address >>> 24 === 10,
    )
    .map(({ destination, gateway, outIndex }) => {
      const device = node.kernel.links.get(outIndex ?? 0)?.name;
      return `${cidrText(destination)} via ${gateway === undefined ? "none" : ipText(gateway)} dev ${device}`;
    })
    .sort();
}
const neighbours = (node: Node): string[] =>
  [...node.kernel.neighbours.values()]
    .filter(({ index }) => index === node.device?.index)
    .map(({ address, mac }) => `${ipText(address)} ${mac}`)
    .sort();
const fdb = (node: Node): string[] =>
  [...node.kernel.fdb.values()]
    .filter(({ index }) => index === node.device?.index)
    .map(({ mac, dst }) => `${mac} ${ipText(dst ?? 0)}`)
    .sort();
const keys = (rows: ReadonlyMap<string, unknown>): string[] => [...rows.keys()].sort();
const hooks = (node: Node): string[] => keys(node.dataplane.attached);

/** All that makes forwarding to peers, to compare before and after. */
function picture(node: Node): unknown {
  const { maps } = node.dataplane;
  return {
    routes: routes(node),
    neighbours: neighbours(node),
    fdb: fdb(node),
    subnets: keys(maps.subnets4).map((key) => maps.subnets4.get(key)),
    peers: keys(maps.peers4),
    hooks: hooks(node),
  };
}

describe("start", () => {
  test("nothing is written before the first full snapshot", async () => {
    const world = new World();
    world.etcd.put("config", config(VXLAN));
    addPeer(world, 1);
    const node = world.addNode();
    node.start();
    const synced = node.client.events.pop();
    await world.settle();
    expect(node.status().phase).toBe("waiting for etcd");
    expect(node.kernel.writes).toEqual([]);
    expect(node.dataplane.writes).toEqual([]);
    if (synced !== undefined) node.client.events.push(synced);
    await world.settle();
    expect(node.status().phase).toBe("forwarding");
    expect(node.isReady).toBe(true);
    expect(node.file).toContain("FLANNEL_MTU=1450");
  });

  test("each peer has its row in every table", async () => {
    const [, node] = await forwarding(2);
    expect(routes(node)).toEqual([
      "10.3.101.0/24 via 10.3.101.0 dev flannel.1",
      "10.3.102.0/24 via 10.3.102.0 dev flannel.1",
    ]);
    expect(neighbours(node)).toEqual([`10.3.101.0 ${MAC(1)}`, `10.3.102.0 ${MAC(2)}`]);
    expect(fdb(node)).toEqual([`${MAC(1)} 192.168.0.101`, `${MAC(2)} 192.168.0.102`]);
    expect(keys(node.dataplane.maps.subnets4)).toEqual(["10.3.101.0/24", "10.3.102.0/24"]);
    expect(keys(node.dataplane.maps.peers4)).toEqual(["192.168.0.101", "192.168.0.102"]);
    expect(node.status().failures).toEqual([]);
  });

  test("a row comes after what it refers to and goes before it", async () => {
    const [world, node] = await forwarding(1);
    addPeer(world, 2);
    await world.settle();
    const order = node.kernel.writes.map(({ write }) => write.write);
    expect(order).toEqual(["replaceNeighbour", "replaceFdb", "replaceNexthop", "replaceRoute"]);
    expect(node.dataplane.writes.map(({ map }) => map)).toEqual(["peers4", "subnets4"]);
    forget(node);
    world.etcd.delete("subnets/10.3.102.0-24");
    await world.settle();
    expect(node.kernel.writes.map(({ write }) => write.write)).toEqual([
      // By its nexthop, or a plain one as flanneld makes it.
      "deleteRoute",
      "deleteRoute",
      "deleteNexthop",
      "deleteFdb",
      "deleteNeighbour",
    ]);
    expect(node.dataplane.writes.map(({ map }) => map)).toEqual(["subnets4", "peers4"]);
  });

  test("each route through a tunnel has a nexthop of its own, which goes with it", async () => {
    const [world, node] = await forwarding(2);
    const id = (destination: string) => nexthopIdOf(cidr(destination)) ?? 0;
    const [first, second] = [id("10.3.101.0/24"), id("10.3.102.0/24")];
    expect(first).toBe(ip("10.3.101.24"));
    const nexthop = { gateway: ip("10.3.101.0"), outIndex: node.device?.index };
    expect([...node.kernel.nexthops.keys()].sort()).toEqual([first, second]);
    expect(node.kernel.nexthops.get(first)).toEqual(nexthop);
    world.etcd.delete("subnets/10.3.102.0-24");
    await world.settle();
    expect([...node.kernel.nexthops.keys()]).toEqual([first]);
    // Reached without a tunnel from now on.
    world.etcd.put("config", config({ ...VXLAN, DirectRouting: true }));
    await world.pass(10_000);
    expect(routes(node)).toEqual(["10.3.101.0/24 via 192.168.0.101 dev eth0"]);
    expect(node.kernel.nexthops.size).toBe(0);
  });

  test("routes are plain where the kernel does not show what is behind a nexthop, and those of flanneld stay so", async () => {
    const world = new World();
    world.etcd.put("config", config(VXLAN));
    addPeer(world, 1);
    const node = world.addNode();
    node.kernel.showsNexthops = false;
    node.start();
    await world.settle();
    expect(routes(node)).toEqual(["10.3.101.0/24 via 10.3.101.0 dev flannel.1"]);
    expect(node.kernel.nexthops.size).toBe(0);
    // As with routes of flanneld, there is nothing to be done about it.
    node.kernel.showsNexthops = true;
    forget(node);
    await world.pass(2 * node.options.resyncMs);
    expect(node.kernel.writes).toEqual([]);
    addPeer(world, 2);
    await world.settle();
    expect(node.kernel.nexthops.size).toBe(1);
    expect(routes(node)).toHaveLength(2);
  });
});

describe("peers", () => {
  test("a peer that moves to another subnet keeps its entry in the tables that know it by address or MAC", async () => {
    const [world, node] = await forwarding(1);
    world.etcd.put("subnets/10.3.50.0-24", record("192.168.0.101", MAC(1)));
    await world.settle();
    world.etcd.delete("subnets/10.3.101.0-24");
    await world.settle();
    expect(routes(node)).toEqual(["10.3.50.0/24 via 10.3.50.0 dev flannel.1"]);
    expect(fdb(node)).toEqual([`${MAC(1)} 192.168.0.101`]);
    expect(keys(node.dataplane.maps.peers4)).toEqual(["192.168.0.101"]);
  });

  test("a peer's new MAC and address replace the old ones", async () => {
    const [world, node] = await forwarding(2);
    world.etcd.put("subnets/10.3.101.0-24", record("192.168.0.201", MAC(77)));
    await world.settle();
    expect(neighbours(node)).toEqual([`10.3.101.0 ${MAC(77)}`, `10.3.102.0 ${MAC(2)}`]);
    expect(fdb(node)).toEqual([`${MAC(2)} 192.168.0.102`, `${MAC(77)} 192.168.0.201`]);
    expect(keys(node.dataplane.maps.peers4)).toEqual(["192.168.0.102", "192.168.0.201"]);
  });

  test("a bad record harms no other, and the last good one stays", async () => {
    const [world, node] = await forwarding(2);
    const before = picture(node);
    world.etcd.put("subnets/10.3.101.0-24", "garbage");
    world.etcd.put("subnets/nonsense", "{}");
    await world.settle();
    expect(picture(node)).toEqual(before);
    expect(node.status().rejections.map(({ key }) => key)).toEqual(["10.3.101.0-24", "nonsense"]);
  });
});

describe("drift", () => {
  const acts: [string, (node: Node, index: number) => void][] = [
    ["a route deleted", ({ kernel }) => kernel.deleteRoute({ destination: cidr("10.3.101.0/24") })],
    [
      "a nexthop deleted, with the route by it",
      ({ kernel }) => kernel.deleteNexthop(nexthopIdOf(cidr("10.3.101.0/24")) ?? 0),
    ],
    [
      "a route made plain",
      ({ kernel }, outIndex) => {
        const [destination, gateway] = [cidr("10.3.101.0/24"), ip("10.3.101.0")];
        kernel.replaceRoute({ destination, gateway, outIndex, onlink: true });
      },
    ],
    [
      "a route replaced by another hand",
      ({ kernel }) =>
        kernel.replaceRoute({
          destination: cidr("10.3.101.0/24"),
          gateway: ip("192.168.0.9"),
          outIndex: 2,
          protocol: 4,
        }),
    ],
    ["a neighbour deleted", ({ kernel }, index) => kernel.deleteNeighbour(index, ip("10.3.101.0"))],
    [
      "a neighbour with another MAC",
      ({ kernel }, index) =>
        kernel.replaceNeighbour({ index, address: ip("10.3.101.0"), mac: MAC(9), permanent: true }),
    ],
    [
      "a neighbour that may age",
      ({ kernel }, index) =>
        kernel.replaceNeighbour({ index, address: ip("10.3.101.0"), mac: MAC(1), permanent: false }),
    ],
    ["an FDB entry deleted", ({ kernel }, index) => kernel.deleteFdb({ index, mac: MAC(1) })],
    [
      "an FDB entry redirected",
      ({ kernel }, index) => kernel.replaceFdb({ index, mac: MAC(1), dst: ip("9.9.9.9") }),
    ],
    ["the device down", ({ kernel }, index) => kernel.setLink(index, { up: false })],
    ["the device with another MAC", ({ kernel }, index) => kernel.setLink(index, { mac: MAC(99) })],
    ["the device with another MTU", ({ kernel }, index) => kernel.setLink(index, { mtu: 900 })],
    [
      "the device without its address",
      (node, index) => node.kernel.deleteAddress(index, { address: subnetOf(node), length: 32 }),
    ],
  ];

  function subnetOf(node: Node): number {
    return cidr(node.status().subnet ?? "").address;
  }

  test.each(acts)("%s is put right as soon as it is told", async (_, act) => {
    const [world, node] = await forwarding(2);
    const before = picture(node);
    const device = node.device;
    act(node, device?.index ?? 0);
    await world.settle();
    expect(picture(node)).toEqual(before);
    expect(node.device).toEqual(device);
    expect(node.status().failures).toEqual([]);
  });

  test.each(acts)("%s is put right within the resync period if nothing tells", async (_, act) => {
    const [world, node] = await forwarding(2);
    const before = picture(node);
    const device = node.device;
    act(node, device?.index ?? 0);
    node.kernel.events.length = 0;
    await world.pass(node.options.resyncMs);
    expect(picture(node)).toEqual(before);
    expect(node.device).toEqual(device);
  });

  test("a device deleted comes back with its MAC and everything on it", async () => {
    const [world, node] = await forwarding(2);
    const before = picture(node) as { hooks: string[] };
    const device = node.device;
    node.kernel.deleteLink(device?.index ?? 0);
    await world.settle();
    expect(node.device?.mac).toBe(device?.mac);
    expect({ ...(picture(node) as object), hooks: [] }).toEqual({ ...before, hooks: [] });
    expect(hooks(node)).toHaveLength(before.hooks.length);
  });

  test("rows of maps and attached programs are put right within the resync period", async () => {
    const [world, node] = await forwarding(2);
    const before = picture(node);
    node.dataplane.maps.subnets4.delete("10.3.101.0/24");
    node.dataplane.maps.peers4.clear();
    node.dataplane.attached.clear();
    await world.pass(node.options.resyncMs);
    expect(picture(node)).toEqual(before);
  });
});

describe("drift that no notification tells of", () => {
  test("of the peers' maps is mended as soon as packets are refused, and else they are read ever more rarely", async () => {
    const [world, node] = await forwarding(2);
    const before = picture(node);
    const { maps } = node.dataplane;
    maps.subnets4.clear();
    maps.peers4.clear();
    node.agent?.onRefused();
    await world.settle();
    expect(picture(node)).toEqual(before);
    // Nothing is wrong any more: somebody sends forged packets, all the time.
    let reads = 0;
    node.dataplane.onRead = (name) => {
      if (name === "peers4") reads += 1;
    };
    for (let ms = 0; ms < node.options.resyncMs - 1_000; ms += 250) {
      await world.pass(250);
      node.agent?.onRefused();
      await world.settle();
    }
    expect(reads).toBeGreaterThan(1);
    expect(reads).toBeLessThan(6);
    maps.peers4.clear();
    await world.pass(node.options.resyncMs);
    expect(picture(node)).toEqual(before);
  });

  test.each([
    ["large maps of vxlan is mended more rarely", VXLAN, 3],
    ["large maps without a kernel's tunnel beneath is mended within the resync period", { Type: "ipip" }, 1],
  ])("of %s", async (_, backend, periods) => {
    const [world, node] = await forwarding(2, backend);
    await world.pass(node.options.resyncMs);
    const before = picture(node);
    let reads = 0;
    node.dataplane.onRead = (name) => {
      if (name !== "peers4") return;
      reads += 1;
      // As much of it takes as long.
      world.clock.moveTo(world.clock.now() + 25);
    };
    await world.pass(node.options.resyncMs);
    expect(reads).toBe(1);
    node.dataplane.maps.peers4.clear();
    const link = [...node.dataplane.attached.keys()][0] ?? "";
    node.dataplane.attached.delete(link);
    for (let period = 1; period < periods; period++) {
      await world.pass(node.options.resyncMs);
      expect([reads, node.dataplane.maps.peers4.size]).toEqual([1, 0]);
      // Pins and hooks are looked at all the same.
      expect(node.dataplane.attached.has(link)).toBe(true);
    }
    await world.pass(node.options.resyncMs);
    expect(picture(node)).toEqual(before);
    expect(reads).toBe(2);
  });

  test("of programs without which packets do not get by is mended when they are looked at", async () => {
    const [world, node] = await forwarding(2);
    const before = picture(node);
    for (const [key, { row }] of node.dataplane.attached)
      if (row.hook !== "from_pod" && row.hook !== "to_pod") node.dataplane.attached.delete(key);
    expect(picture(node)).not.toEqual(before);
    node.agent?.checkAttachments();
    await world.settle();
    expect(picture(node)).toEqual(before);
    expect(node.repaired).toContain("attachments");
    // Of those that the stack can do without, one each time.
    for (const [key, { row }] of [...node.dataplane.attached]) {
      if (row.hook === "from_pod" || row.hook === "to_pod") continue;
      node.dataplane.attached.delete(key);
      for (let looks = 0; looks < 4; looks++) node.agent?.checkAttachments();
      await world.settle();
      expect(picture(node)).toEqual(before);
    }
    // What cannot be looked at is taken to be as it was, and what is as it was makes no round.
    const { rounds } = node;
    node.agent?.checkAttachments();
    node.dataplane.refuse = (call) => call === "attachments";
    node.agent?.checkAttachments();
    await world.settle();
    expect([node.rounds, node.status().failures]).toEqual([rounds, []]);
  });

  test("of sysctls is mended within the resync period", async () => {
    const [world, node] = await forwarding(1);
    expect([...node.kernel.quietened]).toEqual(["flannel.1"]);
    node.kernel.quietened.clear();
    await world.pass(node.options.resyncMs);
    expect([...node.kernel.quietened]).toEqual(["flannel.1"]);
  });
});

describe("many leases at once", () => {
  const PEERS = 1200;
  /** What one turn of the event loop may write, so that it is over within milliseconds. */
  const MOST = 2500;

  const addMany = (world: World): void => {
    for (let n = 0; n < PEERS; n++) {
      const [x, y] = [(n >> 8) + 1, n & 255];
      const mac = `0e:00:00:00:${x.toString(16).padStart(2, "0")}:${y.toString(16).padStart(2, "0")}`;
      world.etcd.put(`subnets/10.${x}.${y}.0-24`, record(`172.16.${x}.${y}`, mac));
    }
  };

  /** Counts what each round of a node writes. */
  const countWrites = (node: Node): number[] => {
    const writes: number[] = [];
    const count = (): void => {
      writes[node.rounds] = (writes[node.rounds] ?? 0) + 1;
    };
    node.kernel.onWrite = node.dataplane.onWrite = count;
    return writes;
  };

  test("are taken some at a time, and the node is ready once it has all", async () => {
    const world = new World();
    world.etcd.put("config", config(VXLAN, "10.0.0.0/8", { SubnetLen: 24, SubnetMin: "10.200.0.0" }));
    addMany(world);
    const node = world.addNode();
    const writes = countWrites(node);
    const late: string[] = [];
    const count = node.dataplane.onWrite;
    node.dataplane.onWrite = (map, key, gone) => {
      count(map, key, gone);
      if (node.isReady) late.push(`${map} ${key}`);
    };
    node.start();
    await world.settle();
    expect(node.isReady).toBe(true);
    expect(late).toEqual([]);
    expect(node.dataplane.maps.subnets4.size).toBe(PEERS);
    expect(node.dataplane.maps.peers4.size).toBe(PEERS);
    expect(routes(node)).toHaveLength(PEERS);
    expect(neighbours(node)).toHaveLength(PEERS);
    expect(fdb(node)).toHaveLength(PEERS);
    expect(Math.max(...writes.filter(Number.isFinite))).toBeLessThan(MOST);
  });

  test("hold nobody else up, however long the kernel takes for each", async () => {
    const world = new World();
    world.etcd.put("config", config(VXLAN, "10.0.0.0/8", { SubnetLen: 24, SubnetMin: "10.200.0.0" }));
    addMany(world);
    const node = world.addNode();
    const { clock } = world;
    const takes = (ms: number) => () => clock.moveTo(clock.now() + ms);
    node.kernel.onWrite = takes(0.04);
    node.dataplane.onWrite = (map) => takes(map === "programs" ? 14 : 0.04)();
    const spans: number[] = [];
    const fire = clock.fire.bind(clock);
    clock.fire = () => {
      const began = clock.now();
      const fired = fire();
      spans.push(clock.now() - began);
      return fired;
    };
    node.start();
    await world.settle();
    expect(node.isReady).toBe(true);
    expect(routes(node)).toHaveLength(PEERS);
    const { address } = cidr(node.status().subnet ?? "");
    const bridge = node.addBridge({ address: address + 1, length: 24 });
    for (let pod = 2; pod < 6; pod++) node.addPod(bridge, address + pod, `veth${pod}`);
    await world.settle();
    expect(hooks(node).filter((hook) => hook.startsWith("from_pod-"))).toHaveLength(5);
    expect(Math.max(...spans)).toBeLessThan(20);
  });

  test("remove nothing of a peer that moves before its new lease is read", async () => {
    const world = new World();
    world.etcd.put("config", config(VXLAN, "10.0.0.0/8", { SubnetLen: 24, SubnetMin: "10.200.0.0" }));
    world.etcd.put("subnets/10.250.1.0-24", record("172.16.250.1", MAC(1)));
    const node = world.addNode();
    node.start();
    await world.settle();
    const gone: string[] = [];
    node.dataplane.onWrite = (map, key, isGone) => {
      if (isGone) gone.push(`${map} ${key}`);
    };
    world.etcd.delete("subnets/10.250.1.0-24");
    addMany(world);
    world.etcd.put("subnets/10.250.2.0-24", record("172.16.250.1", MAC(1)));
    await world.settle();
    expect(gone).toEqual(["subnets4 10.250.1.0/24"]);
    expect(node.dataplane.maps.peers4.size).toBe(PEERS + 1);
  });
});

test("a link that has its carrier back has silent neighbours asked, and the store tried, at once", async () => {
  const [world, node] = await forwarding(1);
  const { kernel } = node;
  kernel.changeLink(2, { running: false });
  await world.settle();
  expect(kernel.resolved).toEqual([]);
  kernel.changeLink(2, { running: true });
  await world.settle();
  expect(kernel.resolved).toEqual([2]);
  expect(node.client.reconnects).toBe(1);
});

describe("a filter that is removed by another hand", () => {
  test("comes back at once, and others' filters are no reason to look", async () => {
    const [world, node] = await forwarding(1);
    const before = hooks(node);
    const [lost] = node.dataplane.attached.values();
    if (lost === undefined) throw new Error("nothing is attached");
    const removed = (index: number) => ({ kind: "filter", change: "delete", row: { index } }) as const;
    node.dataplane.attached.delete(before.find((key) => key.endsWith(`-${lost.row.ifindex}`)) ?? "");
    node.kernel.events.push(removed(999));
    await world.settle();
    expect(hooks(node)).toHaveLength(before.length - 1);
    node.kernel.events.push(removed(lost.row.ifindex));
    await world.settle();
    expect(hooks(node)).toEqual(before);
  });
});

describe("others' entries", () => {
  test("are never touched", async () => {
    const [world, node] = await forwarding(2);
    const { kernel } = node;
    const vxlan = kernel.addVxlan(
      {
        write: "createVxlan",
        name: "vx9",
        vni: 9,
        parentIndex: 2,
        localIp: ip("192.168.0.1"),
        port: 4789,
        learning: false,
        gbp: false,
        mtu: 1450,
      },
      true,
    );
    await world.settle();
    kernel.replaceNeighbour({ index: 2, address: ip("192.168.0.77"), mac: MAC(50), permanent: true });
    kernel.replaceNeighbour({ index: vxlan, address: ip("10.3.201.0"), mac: MAC(51), permanent: true });
    kernel.replaceFdb({ index: vxlan, mac: MAC(51), dst: ip("192.168.0.77") });
    kernel.replaceRoute({
      destination: cidr("10.99.0.0/16"),
      gateway: ip("192.168.0.77"),
      outIndex: 2,
      protocol: 4,
    });
    kernel.replaceRoute({
      destination: cidr("10.3.200.0/24"),
      gateway: ip("192.168.0.77"),
      outIndex: 2,
      protocol: 4,
    });
    await world.settle();
    await world.pass(60_000);
    expect(kernel.writes).toEqual([]);
  });

  test("those of flanneld that no lease stands for go", async () => {
    const world = new World();
    world.etcd.put("config", config(VXLAN));
    addPeer(world, 1);
    const node = world.addNode();
    const index = node.kernel.addVxlan(
      {
        write: "createVxlan",
        name: "flannel.1",
        vni: 1,
        parentIndex: 2,
        localIp: ip("192.168.0.1"),
        port: 8472,
        learning: false,
        gbp: false,
        mtu: 1450,
      },
      true,
    );
    const mac = node.device?.mac;
    for (const n of [1, 2]) {
      const address = ip(`10.3.10${n}.0`);
      node.kernel.replaceNeighbour({ index, address, mac: MAC(n), permanent: true });
      node.kernel.replaceFdb({ index, mac: MAC(n), dst: ip(`192.168.0.10${n}`) });
      node.kernel.replaceRoute({
        destination: { address, length: 24 },
        gateway: address,
        outIndex: index,
        onlink: true,
      });
    }
    node.start();
    await world.settle();
    expect(node.device).toMatchObject({ index, mac });
    expect(routes(node)).toEqual(["10.3.101.0/24 via 10.3.101.0 dev flannel.1"]);
    expect(neighbours(node)).toEqual([`10.3.101.0 ${MAC(1)}`]);
    expect(fdb(node)).toEqual([`${MAC(1)} 192.168.0.101`]);
  });
});

describe("cost", () => {
  test("a lease event with 5,000 peers touches that peer's rows alone", async () => {
    const world = new World();
    world.etcd.put("config", config(VXLAN, "10.0.0.0/8"));
    for (let n = 0; n < 5000; n++) {
      const [a, b] = [1 + (n >> 8), n & 255];
      const mac = `0e:00:00:00:${a.toString(16).padStart(2, "0")}:${b.toString(16).padStart(2, "0")}`;
      world.etcd.put(
        `subnets/10.${a}.${b}.0-24`,
        record(`172.16.${a}.${b + (b === 0 ? 256 : 0) - (b === 0 ? 1 : 0)}`, mac),
      );
    }
    const node = world.addNode();
    node.start();
    await world.settle();
    expect(node.status().peers).toBeGreaterThan(4900);
    forget(node);
    world.etcd.put("subnets/10.200.7.0-24", record("172.20.0.7", MAC(7)));
    await world.settle();
    expect(node.kernel.writes).toHaveLength(4);
    expect(node.dataplane.writes).toHaveLength(2);
    expect(node.kernel.surveys).toBe(0);
    expect(node.kernel.lookups).toBe(1);
  });

  test("a pod that comes and goes makes nothing be read again", async () => {
    const [world, node] = await forwarding(3);
    const subnet = cidr(node.status().subnet ?? "").address;
    const bridge = node.addBridge({ address: subnet + 1, length: 24 });
    await world.settle();
    forget(node);
    const port = node.addPod(bridge, subnet + 5, "veth5");
    await world.settle();
    expect(keys(node.dataplane.maps.endpoints4)).toEqual([ipText(subnet + 5)]);
    expect(hooks(node)).toContain(`from_pod-${port}`);
    node.kernel.setLink(port, { up: false });
    node.kernel.deleteLink(port);
    await world.settle();
    expect(keys(node.dataplane.maps.endpoints4)).toEqual([]);
    expect(hooks(node)).not.toContain(`from_pod-${port}`);
    expect([node.kernel.surveys, node.kernel.lookups]).toEqual([0, 0]);
  });
});

describe("failures", () => {
  test("a write that fails is tried again with pauses, listed, and holds nothing else up", async () => {
    const [world, node] = await forwarding(1);
    node.kernel.refuse = (write) =>
      write.write === "replaceFdb" && write.dst === ip("192.168.0.102") ? "ENOMEM" : undefined;
    addPeer(world, 2);
    addPeer(world, 3);
    await world.settle();
    expect(routes(node)).toContain("10.3.103.0/24 via 10.3.103.0 dev flannel.1");
    expect(node.status().failures).toEqual([
      { what: expect.stringContaining("fdb"), reason: expect.stringContaining("ENOMEM") },
    ]);
    await world.pass(60_000);
    const tries = node.kernel.writes.filter(({ error }) => error !== undefined).length;
    expect(tries).toBeGreaterThan(4);
    expect(tries).toBeLessThan(16);
    expect(node.logged.filter(({ level }) => level === "warn")).toHaveLength(1);
    // Other events don't make it be tried more often.
    forget(node);
    for (let n = 4; n < 24; n++) {
      addPeer(world, n);
      await world.settle();
    }
    expect(node.kernel.writes.filter(({ error }) => error !== undefined)).toEqual([]);
    node.kernel.refuse = () => undefined;
    await world.pass(30_000);
    expect(node.status().failures).toEqual([]);
    expect(fdb(node)).toContain(`${MAC(2)} 192.168.0.102`);
  });

  test.each(["load", "activate", "rows", "put", "remove", "attachments", "attach", "detach"] as const)(
    "a dataplane that fails to %s for a while is no end",
    async (call) => {
      const world = new World();
      world.etcd.put("config", config(VXLAN));
      addPeer(world, 1);
      const node = world.addNode();
      node.dataplane.refuse = (asked) => asked === call;
      node.start();
      await world.settle();
      await world.pass(5000);
      world.etcd.put("config", config({ Type: "vxlan", DirectRouting: true }));
      world.etcd.delete("subnets/10.3.101.0-24");
      addPeer(world, 2);
      await world.pass(5000);
      expect(node.ended).toBeUndefined();
      node.dataplane.refuse = () => false;
      await world.pass(60_000);
      expect(node.status().failures).toEqual([]);
      expect(keys(node.dataplane.maps.subnets4)).toEqual(["10.3.102.0/24"]);
      expect(hooks(node).length).toBeGreaterThan(2);
      for (const { config } of node.dataplane.attached.values()) expect(config).toContain('"direct":1');
    },
  );

  test("a full disk is no end", async () => {
    const world = new World();
    world.etcd.put("config", config(VXLAN));
    const node = world.addNode();
    node.diskFull = true;
    node.start();
    await world.pass(5000);
    expect(node.status().failures).toEqual([
      { what: "subnet file", reason: expect.stringContaining("ENOSPC") },
    ]);
    expect(node.isReady).toBe(false);
    node.diskFull = false;
    await world.pass(30_000);
    expect(node.file).toContain("FLANNEL_NETWORK=10.3.0.0/16");
    expect(node.isReady).toBe(true);
  });

  test("tables that can't be read for a while are no end", async () => {
    const [world, node] = await forwarding(1);
    node.kernel.unreadable = true;
    addPeer(world, 2);
    node.kernel.deleteLink(node.device?.index ?? 0);
    await world.pass(30_000);
    expect(node.ended).toBeUndefined();
    node.kernel.unreadable = false;
    await world.pass(60_000);
    expect(routes(node)).toHaveLength(2);
    expect(node.status().failures).toEqual([]);
  });
});

describe("the store", () => {
  test("gone for hours, it changes nothing", async () => {
    const [world, node] = await forwarding(2);
    const before = picture(node);
    node.client.disconnect();
    await world.pass(30 * 3_600_000);
    expect(picture(node)).toEqual(before);
    expect(node.kernel.writes).toEqual([]);
    expect(node.ended).toBeUndefined();
    // Retries for hours are one line in the log.
    expect(node.logged.filter(({ level }) => level !== "debug")).toHaveLength(1);
  });

  test("our own key deleted is taken again, and forwarding goes on", async () => {
    const [world, node] = await forwarding(2);
    const { subnet } = node.status();
    const key = `subnets/${subnet?.replace("/", "-")}`;
    world.etcd.delete(key);
    await world.settle();
    expect(node.status().subnet).toBe(subnet);
    expect(world.etcd.keys.get(key)?.value).toContain("192.168.0.1");
    expect(node.kernel.writes).toEqual([]);
    expect(node.leaseEvents).toEqual(["acquired", "lost", "renewed"]);
  });

  test("our own etcd lease revoked: another subnet is taken, and the one before is left to others", async () => {
    const [world, node] = await forwarding(2);
    const { subnet = "" } = node.status();
    const key = `subnets/${subnet.replace("/", "-")}`;
    const leaseId = world.etcd.keys.get(key)?.leaseId ?? "";
    // It sleeps for less than the lease lives.
    world.etcd.age(3_600_000);
    world.etcd.revoke(leaseId);
    await world.settle();
    const { subnet: now = "" } = node.status();
    expect(now).not.toBe(subnet);
    expect([world.etcd.keys.has(key), node.isReady, node.ended]).toEqual([false, true, undefined]);
    expect(node.file).toContain(`FLANNEL_SUBNET=${now.replace(".0/", ".1/")}`);
    expect(node.leaseEvents).toEqual(["acquired", "revoked", "moved"]);
    expect(node.logged.filter(({ level }) => level === "warn").map(({ message }) => message)).toEqual([
      `our lease of ${subnet} was revoked by hand: taking another subnet if one is free`,
      `${now} is ours, in place of ${subnet}`,
    ]);
    await world.pass(48 * 3_600_000);
    expect(node.status().subnet).toBe(now);
  });

  test("our own lease ran out while the host slept: the same subnet is taken again", async () => {
    const [world, node] = await forwarding(2);
    const { subnet = "" } = node.status();
    world.etcd.age(25 * 3_600_000);
    await world.settle();
    expect(node.status().subnet).toBe(subnet);
    expect(world.etcd.keys.get(`subnets/${subnet.replace("/", "-")}`)?.value).toContain("192.168.0.1");
    expect(node.leaseEvents).toEqual(["acquired", "lost", "renewed"]);
  });

  test("our own key overwritten by another node: another subnet is taken", async () => {
    const [world, node] = await forwarding(2);
    const { subnet = "" } = node.status();
    world.etcd.put(`subnets/${subnet.replace("/", "-")}`, record("192.168.0.250", MAC(250)));
    await world.settle();
    const { subnet: now = "" } = node.status();
    expect(now).not.toBe(subnet);
    expect(node.file).toContain(`FLANNEL_SUBNET=${now.replace(".0/", ".1/")}`);
    expect(routes(node)).toContain(`${subnet} via ${subnet.replace("/24", "")} dev flannel.1`);
    const addresses = [...node.kernel.addresses.values()].filter(({ index }) => index === node.device?.index);
    expect(addresses.map(({ address }) => ipText(address))).toEqual([now.replace("/24", "")]);
  });

  test("pods leave under a new address at once, however long programs take to load; the former counts while it is there", async () => {
    const masquerade = {
      ports: { first: 61000, last: 65535 },
      excluded: [],
      timeouts: timeoutsOf(() => undefined),
      seed: 1,
      connections: 1000,
    };
    const [world, node] = await forwarding(1, VXLAN, { ipMasq: true, masquerade });
    const uplink = () => node.dataplane.maps.uplinks4.get("2");
    const [first, second] = [ip("192.168.0.1"), ip("192.168.0.50")];
    expect(uplink()).toMatchObject({ address: first, former: 0 });
    node.dataplane.refuse = (call) => call === "load";
    node.kernel.addAddress(2, cidr("192.168.0.50/24"));
    node.kernel.deleteAddress(2, cidr("192.168.0.1/24"));
    await world.settle();
    expect(node.status().failures.map(({ what }) => what)).toContain("programs");
    expect(uplink()).toMatchObject({ address: second, former: first });
    node.dataplane.refuse = () => false;
    await world.pass(FORMER_HOLD_MS / 2);
    // Whoever renumbers a node keeps the former address so.
    node.kernel.addAddress(2, cidr("192.168.0.1/32"));
    await world.pass(2 * FORMER_HOLD_MS);
    expect(uplink()).toMatchObject({ address: second, former: first });
    node.kernel.deleteAddress(2, cidr("192.168.0.1/32"));
    await world.settle();
    expect(uplink()).toMatchObject({ address: second, former: first });
    await world.pass(FORMER_HOLD_MS);
    expect(uplink()).toMatchObject({ address: second, former: 0 });
    expect(node.status().failures).toEqual([]);
  });

  test("a public address that changed is published, and the device follows", async () => {
    const [world, node] = await forwarding(2);
    const { subnet = "" } = node.status();
    node.kernel.deleteAddress(2, cidr("192.168.0.1/24"));
    node.kernel.addAddress(2, cidr("192.168.0.50/24"));
    await world.settle();
    await world.pass(1000);
    expect(world.etcd.keys.get(`subnets/${subnet.replace("/", "-")}`)?.value).toContain("192.168.0.50");
    expect(node.device?.vxlan?.localIp).toBe(ip("192.168.0.50"));
    expect(node.status()).toMatchObject({ subnet, failures: [], rejections: [] });
    expect(routes(node)).toHaveLength(2);
  });
});

describe("the network config", () => {
  test("another MTU", async () => {
    const [world, node] = await forwarding(1);
    world.etcd.put("config", config({ Type: "vxlan", MTU: 1400 }));
    await world.settle();
    expect(node.device?.mtu).toBe(1350);
    expect(node.file).toContain("FLANNEL_MTU=1350");
    expect(routes(node)).toHaveLength(1);
  });

  test("DirectRouting on and off", async () => {
    const [world, node] = await forwarding(1);
    const before = picture(node);
    world.etcd.put("config", config({ Type: "vxlan", DirectRouting: true }));
    await world.settle();
    expect(routes(node)).toEqual(["10.3.101.0/24 via 192.168.0.101 dev eth0"]);
    expect([neighbours(node), fdb(node)]).toEqual([[], []]);
    world.etcd.put("config", config(VXLAN));
    await world.pass(HOLD_MS);
    expect(picture(node)).toEqual(before);
  });

  test("DirectRouting on and off loads no programs, and what peers send without a tunnel is taken all the while", async () => {
    const [world, node] = await forwarding(1, VXLAN, { fastPath: "FAST_PATH_ALWAYS" });
    const { active } = node.dataplane;
    expect(JSON.parse(active).direct).toBe(1);
    for (const backend of [{ Type: "vxlan", DirectRouting: true }, VXLAN]) {
      world.etcd.put("config", config(backend));
      await world.pass(HOLD_MS);
      expect(node.dataplane.active).toBe(active);
    }
  });

  test("a peer that was reached without a tunnel is so a while longer, once for each way there", async () => {
    const [world, node] = await forwarding(2, { Type: "vxlan", DirectRouting: true });
    const direct = routes(node);
    world.etcd.put("config", config(VXLAN));
    await world.pass(HOLD_MS / 2);
    // Another start knows it by the kernel's routes.
    node.kill();
    node.start();
    await world.pass(HOLD_MS - 1);
    expect(routes(node)).toEqual(direct);
    // A peer that says where it is once more is held no longer for it; one with another address not at all.
    addPeer(world, 1);
    world.etcd.put("subnets/10.3.102.0-24", record("192.168.0.202", MAC(2)));
    await world.settle();
    const tunnel = (n: number) => `10.3.10${n}.0/24 via 10.3.10${n}.0 dev flannel.1`;
    expect(routes(node)).toEqual([direct[0], tunnel(2)]);
    await world.pass(1);
    expect(routes(node)).toEqual([tunnel(1), tunnel(2)]);
    expect(node.status().failures).toEqual([]);
  });

  test("from vxlan to host-gw and back", async () => {
    const [world, node] = await forwarding(1);
    const { subnet } = node.status();
    world.etcd.put("config", config({ Type: "host-gw" }));
    world.etcd.put("subnets/10.3.101.0-24", record("192.168.0.101"));
    await world.settle();
    expect(routes(node)).toEqual(["10.3.101.0/24 via 192.168.0.101 dev eth0"]);
    expect(node.device).toBeUndefined();
    expect(node.status()).toMatchObject({ subnet, failures: [] });
    expect(hooks(node)).toEqual(["from_net-2", "to_net-2"]);
    world.etcd.put("config", config(VXLAN));
    world.etcd.put("subnets/10.3.101.0-24", record("192.168.0.101", MAC(1)));
    await world.pass(HOLD_MS);
    expect(routes(node)).toEqual(["10.3.101.0/24 via 10.3.101.0 dev flannel.1"]);
    expect(node.status()).toMatchObject({ subnet, failures: [] });
  });

  test("another Network: another subnet, and nothing of the old one stays", async () => {
    const [world, node] = await forwarding(1);
    world.etcd.put("config", config(VXLAN, "10.9.0.0/16"));
    await world.settle();
    expect(node.status().subnet).toMatch(/^10\.9\./);
    expect(routes(node)).toEqual([]);
    expect([neighbours(node), fdb(node)]).toEqual([[], []]);
    expect(keys(node.dataplane.maps.subnets4)).toEqual([]);
    const addresses = [...node.kernel.addresses.values()].filter(({ index }) => index === node.device?.index);
    expect(addresses.map(({ address }) => ipText(address))).toEqual([
      node.status().subnet?.replace("/24", ""),
    ]);
    expect([...world.etcd.keys.keys()].filter((key) => key.startsWith("subnets/10.3."))).toEqual([
      "subnets/10.3.101.0-24",
    ]);
  });
});

describe("probes of peers", () => {
  const PERIOD_MS = 1000;

  /** A node of two peers, of which those in `silent` do not answer. */
  async function probing(backend: object = VXLAN) {
    const world = new World();
    world.etcd.put("config", config(backend));
    for (const n of [1, 2]) addPeer(world, n, backend);
    const node = world.addNode({ probeMs: PERIOD_MS });
    const opened: string[] = [];
    const asked: string[] = [];
    const silent = new Set<string>();
    const state = { refusal: undefined as string | undefined, open: 0 };
    node.openProber = (source) => {
      opened.push(ipText(source));
      if (state.refusal !== undefined) throw new Error(state.refusal);
      state.open += 1;
      return {
        probe: async (target) => {
          asked.push(ipText(target));
          return silent.has(ipText(target)) ? { lost: "no answer" } : { rttMs: 2 };
        },
        close: () => {
          state.open -= 1;
        },
      };
    };
    return { world, node, opened, asked, silent, state };
  }

  test("go from our tunnel device's address to the peers', and tell of what ceases and what comes back", async () => {
    const { world, node, opened, asked, silent, state } = await probing();
    node.start();
    await world.pass(10 * PERIOD_MS);
    const own = node.status().subnet?.replace("/24", "");
    expect(opened).toEqual([own]);
    expect(new Set(asked)).toEqual(new Set(["10.3.101.0", "10.3.102.0"]));
    expect(asked.length).toBeGreaterThanOrEqual(10);
    expect(asked.length).toBeLessThanOrEqual(42);
    const counts = { reachable: 2, unreachable: 0, unknown: 0 };
    expect(node.status().probes).toEqual({ everySeconds: 1, source: own, ...counts, problem: undefined });

    node.logged.length = 0;
    silent.add("10.3.102.0");
    await world.pass(10 * PERIOD_MS);
    expect(node.status().probes).toMatchObject({ reachable: 1, unreachable: 1 });
    expect([...(node.agent?.peers() ?? [])].map(({ state, losses }) => [state, losses > 3])).toEqual([
      ["reachable", false],
      ["unreachable", true],
    ]);
    silent.clear();
    await world.pass(10 * PERIOD_MS);
    expect(node.status().probes).toMatchObject(counts);
    const fields = { subnet: "10.3.102.0/24", peer: "192.168.0.102" };
    expect(node.logged.filter(({ message }) => message.startsWith("the peer"))).toEqual([
      { level: "warn", fields: { ...fields, reason: "no answer" }, message: "the peer does not answer" },
      { level: "info", fields, message: "the peer answers" },
    ]);

    world.etcd.delete("subnets/10.3.102.0-24");
    await world.pass(PERIOD_MS);
    asked.length = 0;
    await world.pass(10 * PERIOD_MS);
    expect(new Set(asked)).toEqual(new Set(["10.3.101.0"]));
    node.kill();
    expect(state.open).toBe(0);
    await world.pass(10 * PERIOD_MS);
  });

  test("without a tunnel go to the peers' public addresses, and change with the config", async () => {
    const { world, node, opened, asked, state } = await probing({ Type: "host-gw" });
    node.start();
    await world.pass(10 * PERIOD_MS);
    expect(opened).toEqual(["192.168.0.1"]);
    expect(new Set(asked)).toEqual(new Set(["192.168.0.101", "192.168.0.102"]));
    world.etcd.put("config", config(VXLAN));
    world.etcd.put("subnets/10.3.101.0-24", record("192.168.0.101", MAC(1)));
    await world.settle();
    asked.length = 0;
    await world.pass(10 * PERIOD_MS);
    expect(opened.slice(1)).toEqual([node.status().subnet?.replace("/24", "")]);
    // The other one has not changed its backend yet, and is reached as it is.
    expect(new Set(asked)).toEqual(new Set(["10.3.101.0", "192.168.0.102"]));
    expect(state.open).toBe(1);
    node.kill();
  });

  test("a node that may not probe says so once, and is in order otherwise", async () => {
    const { world, node, opened, asked, state } = await probing();
    state.refusal = "this process may not send ICMP";
    node.start();
    await world.pass(60_000);
    expect(node.status()).toMatchObject({ ready: true, failures: [], probes: { problem: state.refusal } });
    expect(opened.length).toBeLessThan(10);
    expect(asked).toEqual([]);
    expect(node.logged.filter(({ message }) => message.startsWith("peers are not probed"))).toHaveLength(1);
    state.refusal = undefined;
    await world.pass(60_000);
    expect(node.status().probes).toMatchObject({ reachable: 2, problem: undefined });
    node.kill();
  });
});

describe("the commands of extension", () => {
  const EXTENSION = {
    Type: "extension",
    PreStartupCommand: "prepare",
    PostStartupCommand: "settle $SUBNET",
    SubnetAddCommand: "add $SUBNET $PUBLIC_IP",
    SubnetRemoveCommand: "remove $SUBNET $PUBLIC_IP",
  };
  const KEY = "subnets/10.3.101.0-24";
  const peer = (address: string, data?: string): string =>
    JSON.stringify({ PublicIP: address, PublicIPv6: null, BackendType: "extension", BackendData: data });
  const said = (node: Node): string[] => node.commands.splice(0).map(({ argv }) => argv.join(" "));

  async function starting(
    backend: object = EXTENSION,
    endOf: Node["endOf"] = ({ argv }) => (argv[0] === "prepare" ? { stdout: " my data\n" } : {}),
  ): Promise<[World, Node]> {
    const world = new World();
    world.etcd.put("config", config(backend));
    world.etcd.put(KEY, peer("192.168.0.101", "of peer 1"));
    const node = world.addNode({ previous: cidr("10.3.7.0/24") });
    node.endOf = endOf;
    node.start();
    await world.settle();
    return [world, node];
  }

  test("run in order: before the lease, with the subnet, for each peer that comes, changes and goes", async () => {
    const [world, node] = await starting();
    expect(said(node)).toEqual(["prepare", "settle 10.3.7.0/24", "add 10.3.101.0/24 192.168.0.101"]);
    expect(JSON.parse(world.etcd.keys.get("subnets/10.3.7.0-24")?.value ?? "")).toEqual({
      PublicIP: "192.168.0.1",
      PublicIPv6: null,
      BackendType: "extension",
      BackendData: "my data",
    });
    expect(node.file).toContain("FLANNEL_MTU=1500");
    expect(node.isReady).toBe(true);
    expect(node.status()).toMatchObject({ peers: 1, failures: [] });
    // A renewal is no news.
    world.etcd.put(KEY, peer("192.168.0.101", "of peer 1"));
    await world.settle();
    expect(node.commands).toEqual([]);
    world.etcd.put(KEY, peer("192.168.0.102", "anew"));
    await world.settle();
    expect(node.commands.map(({ input }) => input)).toEqual(["of peer 1\n", "anew\n"]);
    expect(said(node)).toEqual(["remove 10.3.101.0/24 192.168.0.101", "add 10.3.101.0/24 192.168.0.102"]);
    world.etcd.delete(KEY);
    await world.settle();
    expect(said(node)).toEqual(["remove 10.3.101.0/24 192.168.0.102"]);
    await world.pass(600_000);
    expect(said(node)).toEqual([]);
  });

  test("routes that commands made are left alone, until another backend has their place", async () => {
    const [world, node] = await starting();
    const via = "10.3.101.0/24 via 192.168.0.101 dev eth0";
    node.kernel.replaceRoute({
      destination: cidr("10.3.101.0/24"),
      gateway: ip("192.168.0.101"),
      outIndex: 2,
    });
    await world.pass(600_000);
    expect(routes(node)).toEqual([via]);
    world.etcd.put("config", config(VXLAN));
    world.etcd.put(KEY, record("192.168.0.101", MAC(1)));
    await world.pass(HOLD_MS);
    expect(routes(node)).toEqual(["10.3.101.0/24 via 10.3.101.0 dev flannel.1"]);
  });

  test("for a peer that went or changed while no daemon ran, by what it was added with", async () => {
    const [world, node] = await starting();
    for (const n of [102, 103]) world.etcd.put(`subnets/10.3.${n}.0-24`, peer(`192.168.0.${n}`, `of ${n}`));
    await world.settle();
    said(node);
    node.kill();
    world.etcd.delete(KEY);
    world.etcd.put("subnets/10.3.102.0-24", peer("192.168.0.202"));
    node.start();
    await world.settle();
    expect(node.commands.filter(({ argv }) => argv[0] === "remove").map(({ input }) => input)).toEqual([
      "of peer 1\n",
      "of 102\n",
    ]);
    expect(said(node).filter((command) => /^(add|remove)/.test(command))).toEqual([
      "remove 10.3.101.0/24 192.168.0.101",
      "remove 10.3.102.0/24 192.168.0.102",
      "add 10.3.102.0/24 192.168.0.202",
      // It may have been halfway there.
      "add 10.3.103.0/24 192.168.0.103",
    ]);
    expect(keys(node.added)).toEqual(["10.3.102.0-24", "10.3.103.0-24"]);
    // The next daemon finds another backend.
    node.kill();
    world.etcd.put("config", config(VXLAN));
    node.start();
    await world.settle();
    expect(said(node).sort()).toEqual([
      "remove 10.3.102.0/24 192.168.0.202",
      "remove 10.3.103.0/24 192.168.0.103",
    ]);
    expect(keys(node.added)).toEqual([]);
  });

  test("what a former run kept and can't be read is told of once; with no room for it, peers are added all the same", async () => {
    const [world, node] = await starting();
    said(node);
    node.kill();
    node.logged.length = 0;
    node.added.set("10.3.104.0-24", "{");
    node.added.set(
      "10.3.105.0-24",
      '{"Lease":"{\\"PublicIP\\":\\"192.168.0.105\\"}","Commands":"{\\"Timeout\\":0}"}',
    );
    node.added.set = () => {
      throw new Error("no space left on device");
    };
    world.etcd.put("subnets/10.3.102.0-24", peer("192.168.0.102"));
    node.start();
    await world.settle();
    expect(node.logged.filter(({ level }) => level === "warn").map(({ message }) => message)).toEqual([
      expect.stringContaining("10.3.104.0-24 can't be read"),
      expect.stringContaining("10.3.105.0-24 can't be read"),
      expect.stringContaining("can't write down what is added for the peer 10.3.102.0-24"),
    ]);
    expect(keys(node.added)).toEqual(["10.3.101.0-24"]);
    expect(said(node)).toContain("add 10.3.102.0/24 192.168.0.102");
    expect(node.status().failures).toEqual([]);
  });

  test("one at a time", async () => {
    const [world, node] = await starting();
    said(node);
    let held = true;
    node.endOf = () => (held ? undefined : {});
    for (const n of [102, 103]) world.etcd.put(`subnets/10.3.${n}.0-24`, peer(`192.168.0.${n}`));
    await world.settle();
    expect(said(node)).toEqual(["add 10.3.102.0/24 192.168.0.102"]);
    held = false;
    node.running.push(...node.held.splice(0));
    await world.settle();
    expect(said(node)).toEqual(["add 10.3.103.0/24 192.168.0.103"]);
  });

  test("no lease before the first has succeeded, and no subnet.env before the second; both are tried again", async () => {
    let problem: string | undefined = "exit code 1";
    let broken = "prepare";
    const [world, node] = await starting(EXTENSION, ({ argv }) =>
      argv[0] === broken ? { problem, stderr: "no device\n" } : {},
    );
    expect(world.etcd.keys.has("subnets/10.3.7.0-24")).toBe(false);
    expect(node.status().failures).toEqual([{ what: "PreStartupCommand", reason: "exit code 1: no device" }]);
    broken = "settle";
    await world.pass(1000);
    expect(node.status().failures).toEqual([
      { what: "PostStartupCommand", reason: "exit code 1: no device" },
    ]);
    expect([node.file, node.isReady]).toEqual(["", false]);
    expect(said(node)).toEqual(["prepare", "prepare", "settle 10.3.7.0/24"]);
    problem = undefined;
    await world.pass(1000);
    expect(node.status().failures).toEqual([]);
    expect([node.isReady, said(node)]).toEqual([
      true,
      ["settle 10.3.7.0/24", "add 10.3.101.0/24 192.168.0.101"],
    ]);
  });

  test("one that fails waits ever longer, is listed, is logged once, and holds up no other", async () => {
    const [world, node] = await starting();
    said(node);
    node.logged.length = 0;
    node.endOf = ({ argv }) => (argv[1] === "10.3.102.0/24" ? { problem: "exit code 2" } : {});
    world.etcd.put("subnets/10.3.102.0-24", peer("192.168.0.102"));
    world.etcd.put("subnets/10.3.103.0-24", peer("192.168.0.103"));
    await world.settle();
    expect(said(node)).toEqual(["add 10.3.102.0/24 192.168.0.102", "add 10.3.103.0/24 192.168.0.103"]);
    const failure = { what: "SubnetAddCommand for 10.3.102.0/24", reason: "exit code 2" };
    expect(node.status().failures).toEqual([failure]);
    const times: number[] = [];
    for (let second = 0; second < 200; second++) {
      await world.pass(1000);
      if (node.commands.splice(0).length > 0) times.push(second + 1);
    }
    expect(times).toEqual([1, 3, 7, 15, 31, 63, 123, 183]);
    expect(node.logged.filter(({ level }) => level === "warn")).toHaveLength(1);
    // Half of it may have been done.
    node.endOf = () => ({});
    world.etcd.delete("subnets/10.3.102.0-24");
    await world.settle();
    expect(said(node)).toEqual(["remove 10.3.102.0/24 192.168.0.102"]);
    expect(node.status().failures).toEqual([]);
  });

  test("what can't be removed is let go after some tries, and at once if something takes its place", async () => {
    const [world, node] = await starting();
    said(node);
    node.endOf = ({ argv }) => (argv[0] === "remove" ? { problem: "exit code 2" } : {});
    world.etcd.put(KEY, peer("192.168.0.102"));
    await world.settle();
    expect(said(node)).toEqual(["remove 10.3.101.0/24 192.168.0.101", "add 10.3.101.0/24 192.168.0.102"]);
    world.etcd.delete(KEY);
    await world.pass(600_000);
    expect(said(node)).toEqual(Array(5).fill("remove 10.3.101.0/24 192.168.0.102"));
    expect(node.status().failures).toEqual([]);
  });

  test("too much for a lease is a failure", async () => {
    const [world, node] = await starting(EXTENSION, () => ({ stdout: "x".repeat(3071) }));
    expect(node.status().failures).toEqual([
      {
        what: "PreStartupCommand",
        reason: expect.stringMatching(/^it printed 3073 characters, and a lease/),
      },
    ]);
    expect(world.etcd.keys.has("subnets/10.3.7.0-24")).toBe(false);
  });

  test("peers of another backend get none, and without commands nothing is run", async () => {
    const [world, node] = await starting({ Type: "extension" });
    addPeer(world, 2);
    await world.settle();
    expect(node.commands).toEqual([]);
    expect(node.isReady).toBe(true);
    expect(node.status().ignored.map(({ key }) => key)).toEqual(["10.3.102.0-24"]);
    expect(world.etcd.keys.get("subnets/10.3.7.0-24")?.value).not.toContain("BackendData");
  });

  test("with other commands, or another backend, what the former added goes by the former", async () => {
    const [world, node] = await starting();
    said(node);
    world.etcd.put("config", config({ ...EXTENSION, SubnetRemoveCommand: "other", PreStartupCommand: "" }));
    await world.settle();
    expect(said(node)).toEqual([
      "remove 10.3.101.0/24 192.168.0.101",
      "settle 10.3.7.0/24",
      "add 10.3.101.0/24 192.168.0.101",
    ]);
    world.etcd.put("config", config(VXLAN));
    await world.settle();
    expect(said(node)).toEqual(["other"]);
    expect(node.status().ignored.map(({ key }) => key)).toEqual(["10.3.101.0-24"]);
    expect(node.device?.name).toBe("flannel.1");
  });
});

describe("a peer of another backend, while a cluster moves", () => {
  const nodes = (address: string, n: number) => ({
    vxlan: record(address, MAC(n)),
    "host-gw": record(address),
    ipip: JSON.stringify({ PublicIP: address, PublicIPv6: null, BackendType: "ipip" }),
    udp: JSON.stringify({ PublicIP: address, PublicIPv6: null }),
  });
  const OTHERS = ["vxlan", "host-gw", "ipip", "udp"] as const;
  const pairs = OTHERS.flatMap((ours) =>
    OTHERS.filter((type) => type !== ours).map((type) => [ours, type] as const),
  );

  test.each(pairs)("ours is %s, its %s: by a plain route, and listed", async (ours, theirs) => {
    const world = new World();
    world.etcd.put("config", config({ Type: ours }));
    world.etcd.put("subnets/10.3.101.0-24", nodes("192.168.0.101", 1)[theirs]);
    // Not on our network: packets would be somebody else's to carry.
    world.etcd.put("subnets/10.3.102.0-24", nodes("10.99.0.2", 2)[theirs]);
    const node = world.addNode();
    node.start();
    await world.settle();
    const direct = "10.3.101.0/24 via 192.168.0.101 dev eth0";
    expect(routes(node)).toEqual([direct]);
    expect(node.dataplane.maps.subnets4.get("10.3.101.0/24")?.reach).toBe("REACH_DIRECT");
    expect(keys(node.dataplane.maps.peers4)).toEqual(["192.168.0.101"]);
    expect(JSON.parse(node.dataplane.active).direct).toBe(1);
    expect(hooks(node)).toContain("to_net-2");
    expect(node.status().ignored).toEqual([
      { key: "10.3.101.0-24", reason: expect.stringMatching(/: it is reached by a plain route$/) },
      { key: "10.3.102.0-24", reason: expect.stringMatching(/: it is not reached$/) },
    ]);
    // It has moved as well, but may still be loading what opens our packets.
    world.etcd.put("subnets/10.3.101.0-24", nodes("192.168.0.101", 1)[ours]);
    await world.pass(HOLD_MS - 1);
    expect(node.status().ignored.map(({ key }) => key)).toEqual(["10.3.102.0-24"]);
    expect(routes(node)).toEqual([direct]);
    await world.pass(1);
    expect(routes(node)).toEqual(ours === "udp" ? [] : [expect.stringMatching(/^10\.3\.101\.0/)]);
    if (ours !== "host-gw") expect(routes(node)).not.toContain(direct);
  });

  test.each(["wireguard", "ipsec", "extension"])(
    "whose packets are not what pods sent (%s): none",
    async (type) => {
      const world = new World();
      world.etcd.put("config", config(VXLAN));
      world.etcd.put(
        "subnets/10.3.101.0-24",
        JSON.stringify({ PublicIP: "192.168.0.101", PublicIPv6: null, BackendType: type }),
      );
      const node = world.addNode();
      node.start();
      await world.settle();
      expect(routes(node)).toEqual([]);
      expect(node.status().ignored).toEqual([
        { key: "10.3.101.0-24", reason: `its backend is ${type}, ours is vxlan: it is not reached` },
      ]);
    },
  );

  test.each(["ipip", "udp"] as const)(
    "that has heard of %s before us is reached without a tunnel as well, until it has its programs for sure",
    async (type) => {
      const [world, node] = await forwarding(1);
      // Its lease is news of the same moment as the config.
      world.etcd.put("config", config({ Type: type }));
      world.etcd.put("subnets/10.3.101.0-24", nodes("192.168.0.101", 1)[type]);
      const direct = "10.3.101.0/24 via 192.168.0.101 dev eth0";
      await world.pass(HOLD_MS - 1);
      expect(routes(node)).toContain(direct);
      expect(node.dataplane.maps.subnets4.get("10.3.101.0/24")?.reach).toBe("REACH_DIRECT");
      await world.pass(1);
      expect(routes(node)).not.toContain(direct);
      expect(node.dataplane.maps.subnets4.get("10.3.101.0/24")?.reach).not.toBe("REACH_DIRECT");
    },
  );

  test("its new way is in the maps before other programs are loaded", async () => {
    const [world, node] = await forwarding(1);
    const order: string[] = [];
    node.dataplane.onWrite = (map, key) => order.push(`${map} ${key}`);
    node.dataplane.refuse = (call) => {
      if (call === "load") order.push("load");
      return false;
    };
    world.etcd.put("config", config({ Type: "ipip" }));
    await world.settle();
    expect(order.slice(0, 2)).toEqual(["subnets4 10.3.101.0/24", "load"]);
  });

  test("a config that is not followed leaves the node as it is until its next start", async () => {
    const [world, node] = await forwarding(1, VXLAN, { followConfig: false });
    const before = picture(node);
    world.etcd.put("config", config({ Type: "host-gw" }));
    await world.settle();
    expect(picture(node)).toEqual(before);
    expect(node.status().warnings).toHaveLength(1);
    node.kill();
    node.start();
    await world.settle();
    expect(node.status()).toMatchObject({ warnings: [], network: { backend: { type: "host-gw" } } });
  });
});
