/**
 * What holds whatever happens. The stories and the simulator check it after every step, the last two once the
 * world has been calm for a while.
 *
 * I1  Nothing is written to the kernel before the first full snapshot of the store.
 * I2  Silence is not deletion: no row that carries traffic to a peer is removed, unless the store told of a change
 *     of that peer, or the node's own network config, lease or uplink changed. Losing the store, a watch or the
 *     agent changes nothing. (An agent that starts on a store that has lost leases can't know of them.)
 * I3  What is not ours stays as it is: foreign routes, neighbours, FDB entries and devices.
 * I4  One subnet, one node: a subnet's key is written only where it was absent or our own, and no two nodes that
 *     know the store's present state use the same subnet.
 * I5  Make before break: a route through the tunnel device is written only where its neighbour and FDB entry are.
 * I6  The agent goes on: no failure of the store, the kernel, the programs or the disk ends it.
 * I7  The world comes to rest: what follows from one event ends by itself.
 * I8  After a calm while everything is as the store and the host say: each table holds exactly its rows, each hook
 *     exactly one program, the one loaded last, and subnet.env and the store name the subnet that is forwarded.
 * I9  What is right is left alone: reading everything back then writes nothing.
 * I12 A subnet is kept, or given up: a node takes another subnet only if its own is taken or no longer of the network,
 *     and, where the etcd lease was revoked before its time and the node was told, only another one.
 */

import type { Write } from "../../src/core/host.ts";
import { decodeLease, parseLeaseKey } from "../../src/core/lease.ts";
import { isCompatible } from "../../src/core/leaselife.ts";
import type { Lease } from "../../src/core/model.ts";
import { cidr, cidrText, ip, ipText, type KeyWrite, type Node, within } from "./fakes.ts";
import { keyOf, RESYNC_MS, type Story } from "./story.ts";

export class Broken extends Error {}

export class Invariants {
  private readonly story: Story;
  /** Peers of which the store told something since the last calm; all of them after a new config. */
  private readonly peersTouched = new Set<number>();
  private all = false;
  private hasLost = false;
  /** Nodes whose lease or uplink changed, and nodes whose kernel somebody changed, since then. */
  private readonly nodesTouched = new Set<Node>();
  private readonly nodesDrifted = new Set<Node>();
  /** The keys whose etcd leases were revoked: those that their nodes may, and those that they must leave. */
  private readonly mayLeave = new Map<Node, string>();
  private readonly mustLeave = new Map<Node, string>();
  private readonly addressesOf = new Map<string, Set<string>>();
  private broken: string | undefined;

  constructor(story: Story) {
    this.story = story;
    for (const node of story.world.nodes) {
      this.addressesOf.set(node.name, new Set());
      node.kernel.onWrite = (write) => this.onKernelWrite(node, write);
      node.dataplane.onWrite = (map, key, gone) => this.onMapWrite(node, map, key, gone);
    }
    story.world.etcd.onWrite = (write) => {
      const node = story.world.nodes.find(({ name }) => name === write.by);
      if (node !== undefined) this.onKeyWrite(node, write);
    };
  }

  touched(n: number): void {
    this.peersTouched.add(n);
  }
  allTouched(): void {
    this.all = true;
  }
  nodeTouched(node: Node): void {
    this.nodesTouched.add(node);
  }
  nodeDrifted(node: Node): void {
    this.nodesDrifted.add(node);
  }

  /** A node's etcd lease is about to be revoked, long before its time or not. */
  revoked(node: Node, key: string): void {
    const { etcd } = this.story.world;
    const { client } = node;
    const record = etcd.keys.get(key);
    if (record === undefined || record.leaseId === "0" || !this.names(node, record.value)) return;
    this.mayLeave.set(node, key);
    const isTold = client.connected && !node.holdStore && client.events.length === 0;
    const left = etcd.timeToLive(record.leaseId) ?? 0;
    const isEarly = left > node.options.renewMarginMs / 1000;
    if (isTold && isEarly && client.granted.has(record.leaseId)) this.mustLeave.set(node, key);
  }
  /** An agent that starts again knows nothing of it. */
  killed(node: Node): void {
    this.mayLeave.delete(node);
    this.mustLeave.delete(node);
  }

  /** The store has lost what a node that starts now would have had to see. */
  storeLost(): void {
    this.hasLost = true;
    for (const node of this.story.world.nodes) if (node.agent === undefined) this.nodesTouched.add(node);
  }
  started(node: Node): void {
    if (this.hasLost) this.nodesTouched.add(node);
  }

  /** The store goes back to these records: what they say otherwise than now is a change. */
  restored(keys: readonly [string, { readonly value: string }][]): void {
    const { etcd } = this.story.world;
    for (const [key, { value }] of keys) {
      if (etcd.keys.get(key)?.value === value) continue;
      const n = Number(/^subnets\/10\.3\.(10\d)\.0-24$/.exec(key)?.[1] ?? 0);
      if (n === 0) this.all = true;
      this.peersTouched.add(n);
    }
  }

  /** Entries that are nobody's business but their owner's. */
  plant(node: Node): void {
    const { kernel } = node;
    const index = kernel.addVxlan(
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
    kernel.replaceNeighbour({ index, address: ip("10.3.201.0"), mac: "0a:00:00:00:00:01", permanent: true });
    kernel.replaceFdb({ index, mac: "0a:00:00:00:00:01", dst: ip("192.168.0.99") });
    kernel.replaceRoute({ destination: cidr("10.3.201.0/24"), outIndex: index, protocol: 4 });
    this.plantOnUplink(node);
  }

  /** Those of them that go when the uplink goes down, which their owner puts back. */
  plantOnUplink({ kernel }: Node): void {
    kernel.replaceNeighbour({
      index: 2,
      address: ip("192.168.0.99"),
      mac: "0a:00:00:00:00:02",
      permanent: true,
    });
    kernel.replaceRoute({
      destination: cidr("10.3.200.0/24"),
      gateway: ip("192.168.0.99"),
      outIndex: 2,
      protocol: 4,
    });
    kernel.replaceRoute({
      destination: cidr("10.99.0.0/16"),
      gateway: ip("192.168.0.99"),
      outIndex: 2,
      protocol: 4,
    });
  }

  /** The key that a node holds in the store, by its own account. */
  keyOf(node: Node): string | undefined {
    const subnet = node.agent?.status().subnet;
    return subnet === undefined ? undefined : `subnets/${subnet.replace("/", "-")}`;
  }

  afterStep(): void {
    const { nodes } = this.story.world;
    for (const node of nodes) {
      if (node.ended !== undefined) this.say(`I6: the agent of ${node.name} ended: ${node.ended.message}`);
      this.checkForeign(node);
      this.learnAddresses(node);
    }
    const informed = nodes.filter(
      ({ agent, client, holdStore }) =>
        agent !== undefined && client.connected && !holdStore && client.events.length === 0,
    );
    const used = informed.flatMap((node) => {
      const key = this.keyOf(node);
      // In use until another one is found, though the store says that it is lost.
      const record = key === undefined ? undefined : this.story.world.etcd.keys.get(key);
      return record === undefined || !this.names(node, record.value) ? [] : [key];
    });
    if (new Set(used).size < used.length) this.say(`I4: two nodes use ${used[0]}`);
    if (this.broken !== undefined) throw new Broken(this.broken);
  }

  async afterCalm(): Promise<void> {
    const { world } = this.story;
    for (const { kernel, dataplane } of world.nodes) kernel.writes.length = dataplane.writes.length = 0;
    const { revision } = world.etcd;
    await world.pass(RESYNC_MS);
    for (const { name, kernel, dataplane } of world.etcd.revision === revision ? world.nodes : []) {
      if (kernel.writes.length > 0) this.say(`I9: ${name} wrote ${JSON.stringify(kernel.writes[0])}`);
      if (dataplane.writes.length > 0) this.say(`I9: ${name} wrote ${JSON.stringify(dataplane.writes[0])}`);
    }
    this.peersTouched.clear();
    this.nodesTouched.clear();
    this.nodesDrifted.clear();
    this.all = this.hasLost = false;
    this.afterStep();
  }

  /** The first thing that is not as it ought to be. */
  divergence(): string | undefined {
    for (const node of this.story.world.nodes) {
      const wrong = this.divergenceOf(node);
      if (wrong !== undefined) return `${node.name}: ${wrong}`;
    }
    return undefined;
  }

  /** A node is known by every address its uplink ever had. */
  private learnAddresses(node: Node): void {
    for (const row of node.kernel.addresses.values()) {
      if (row.index === 2) this.addressesOf.get(node.name)?.add(ipText(row.address));
    }
  }

  private say(what: string): void {
    this.broken ??= what;
  }

  private names(node: Node, value: string): boolean {
    this.learnAddresses(node);
    const address = /"PublicIP":"([^"]*)"/.exec(value)?.[1];
    return address !== undefined && this.addressesOf.get(node.name)?.has(address) === true;
  }

  private onKeyWrite(node: Node, { key, before, value }: KeyWrite): void {
    if (before !== undefined) {
      if (!this.names(node, before.value))
        this.say(`I4: ${node.name} wrote ${key}, which held ${before.value}`);
      return;
    }
    const own = this.keyOf(node);
    if (value === undefined || own === undefined) return;
    // It has left it by now.
    if (this.mayLeave.get(node) !== own) this.killed(node);
    if (this.mustLeave.get(node) === own && own === key) this.say(`I12: ${node.name} took ${key} again`);
    const subnet = parseLeaseKey(own.slice("subnets/".length));
    const network = node.agent?.status().network;
    const couldStay =
      subnet !== undefined &&
      network !== undefined &&
      isCompatible(network, subnet) &&
      !this.story.world.etcd.keys.has(own);
    if (own !== key && couldStay && this.mayLeave.get(node) !== own)
      this.say(`I12: ${node.name} took ${key}, though nobody had taken ${own}`);
    if (own === key) this.mayLeave.delete(node);
  }

  private onKernelWrite(node: Node, write: Write): void {
    this.onAnyWrite(node);
    switch (write.write) {
      case "deleteRoute":
        this.onRemoval(node, `route ${cidrText(write.destination)}`, peerOf(write.destination.address));
        return;
      case "deleteNeighbour":
        this.onRemoval(node, `neighbour ${ipText(write.address)}`, peerOf(write.address));
        return;
      case "deleteFdb":
        this.onRemoval(node, `FDB entry ${write.mac}`, peerOfMac(write.mac));
        return;
      case "replaceRoute": {
        const nexthop = write.nexthopId === undefined ? undefined : node.kernel.nexthops.get(write.nexthopId);
        const { gateway, outIndex } = nexthop ?? write;
        const isOnlink = nexthop !== undefined || write.onlink === true;
        if (!isOnlink || gateway === undefined || this.nodesDrifted.has(node)) return;
        const mac = node.kernel.neighbours.get(`${outIndex} ${gateway}`)?.mac;
        if (mac === undefined || !node.kernel.fdb.has(`${outIndex} ${mac} 0`)) {
          this.say(`I5: ${node.name} wrote the route to ${cidrText(write.destination)} too early`);
        }
        return;
      }
    }
  }

  private onMapWrite(node: Node, map: string, key: string, gone: boolean): void {
    this.onAnyWrite(node);
    if (!gone || (map !== "subnets4" && map !== "peers4")) return;
    const n = map === "subnets4" ? peerOf(cidr(key).address) : ip(key) & 255;
    this.onRemoval(node, `${map} ${key}`, n);
  }

  private onAnyWrite(node: Node): void {
    if (node.agent === undefined || node.agent.status().phase === "waiting for etcd") {
      this.say(`I1: ${node.name} wrote before it knew the store`);
    }
  }

  private onRemoval(node: Node, what: string, n: number): void {
    const isPeer = this.story.peers.has(n) && !this.peersTouched.has(n);
    if (!isPeer || this.all || this.nodesTouched.has(node) || this.nodesDrifted.has(node)) return;
    this.say(`I2: ${node.name} removed ${what}, though peer ${n} is where it was`);
  }

  private checkForeign({ name, kernel }: Node): void {
    const index = kernel.hasLink("vx9") ? kernel.linkNamed("vx9").index : -1;
    const rows: [string, boolean][] = [
      ["device vx9", index !== -1],
      ["neighbour on vx9", kernel.neighbours.has(`${index} ${ip("10.3.201.0")}`)],
      ["FDB entry of vx9", kernel.fdb.has(`${index} 0a:00:00:00:00:01 0`)],
      ["route through vx9", kernel.routes.get(`254 ${ip("10.3.201.0")}/24 0`)?.outIndex === index],
    ];
    if (kernel.links.get(2)?.up) {
      rows.push(
        ["neighbour on eth0", kernel.neighbours.get(`2 ${ip("192.168.0.99")}`)?.permanent === true],
        ["route in the network", kernel.routes.get(`254 ${ip("10.3.200.0")}/24 0`)?.protocol === 4],
        ["route elsewhere", kernel.routes.has(`254 ${ip("10.99.0.0")}/16 0`)],
      );
    }
    for (const [what, there] of rows) if (!there) this.say(`I3: the foreign ${what} of ${name} is gone`);
  }

  private divergenceOf(node: Node): string | undefined {
    const { kernel, dataplane } = node;
    const { network, world } = this.story;
    const { backend } = network;
    const status = node.status();
    if (status.failures.length > 0) return `failures ${JSON.stringify(status.failures)}`;
    const key = this.keyOf(node);
    const own = key === undefined ? undefined : world.etcd.keys.get(key);
    if (status.subnet === undefined || own === undefined)
      return `no lease (${status.phase}, ${status.subnet})`;
    if (!this.names(node, own.value)) return `its subnet ${status.subnet} is held by ${own.value}`;
    const subnet = cidr(status.subnet);
    if (!node.file.includes(`FLANNEL_SUBNET=${ipText(subnet.address + 1)}/${subnet.length}\n`))
      return `subnet.env ${node.file}`;
    const link = kernel.hasLink("flannel.1") ? kernel.linkNamed("flannel.1") : undefined;
    const isStray = link !== undefined && backend.type !== "vxlan" && this.story.strays.has(link.index);
    const device = isStray ? undefined : link;
    const [uplink] = [...kernel.addresses.values()].filter(({ index }) => index === 2);
    const address = ipText(uplink?.address ?? 0);
    if (!own.value.includes(`"${address}"`)) return `publishes ${own.value} instead of ${address}`;
    if (backend.type === "vxlan") {
      const mtu = (backend.mtu ?? 1500) - 50;
      if (device === undefined) return "there is no device";
      if (!device.up || device.mtu !== mtu) return `device ${JSON.stringify(device)}`;
      if (!own.value.includes(`"${device.mac}"`)) return `publishes ${own.value}, its MAC is ${device.mac}`;
      const addresses = [...kernel.addresses.values()].filter(({ index }) => index === device.index);
      const texts = addresses.map((row) => `${ipText(row.address)}/${row.prefixLength}`);
      if (texts.join() !== `${ipText(subnet.address)}/32`) return `device addresses ${texts.join()}`;
    } else if (device !== undefined) {
      return "the device is still there";
    }

    const want: Record<string, string[]> = { routes: [], neighbours: [], fdb: [], subnets4: [], peers4: [] };
    // Of two leases with one MAC, the later one tells where it is.
    const records = [...world.etcd.keys].sort(([, a], [, b]) => Number(a.revision - b.revision));
    for (const [leaseKey, { value }] of records) {
      if (!leaseKey.startsWith("subnets/") || leaseKey === key) continue;
      const lease = decodeLease(leaseKey.slice("subnets/".length), value);
      if ("reason" in lease) continue;
      if (!within(cidrText(network.network), lease.subnet.address)) continue;
      if (lease.backendType !== backend.type && !within("192.168.0.0/24", lease.publicIp)) continue;
      this.expectLease(lease, device?.index ?? -1, want);
    }
    const have: Record<string, string[]> = {
      routes: [...kernel.routes.values()]
        .filter((row) => row.protocol === 84 || (device !== undefined && row.outIndex === device.index))
        .map((row) => `${cidrText(row.destination)} ${ipText(row.gateway ?? 0)} ${row.outIndex}`),
      neighbours: [...kernel.neighbours.values()]
        .filter((row) => row.index === device?.index)
        .map((row) => `${ipText(row.address)} ${row.mac} ${row.permanent}`),
      fdb: [...kernel.fdb.values()]
        .filter((row) => row.index === device?.index)
        .map((row) => `${row.mac} ${ipText(row.dst ?? 0)}`),
      subnets4: [...dataplane.maps.subnets4.values()].map(
        (row) => `${ipText(row.subnet)} ${ipText(row.publicIp)} ${row.reach} ${row.vtepMac}`,
      ),
      peers4: [...dataplane.maps.peers4.keys()],
    };
    for (const [table, rows] of Object.entries(want)) {
      const [wanted, there] = [[...new Set(rows)].sort().join(", "), have[table]?.sort().join(", ")];
      if (wanted !== there) return `${table} are [${there}], not [${wanted}]`;
    }
    return this.divergenceOfPrograms(node, device?.index);
  }

  private expectLease(
    { subnet, publicIp, vtepMac, backendType }: Lease,
    device: number,
    want: Record<string, string[]>,
  ): void {
    const { backend } = this.story.network;
    const onLink = within("192.168.0.0/24", publicIp);
    // Of another backend, from which or to which the cluster moves: as it is.
    const direct =
      backendType !== backend.type ||
      backend.type === "host-gw" ||
      (backend.type === "vxlan" && backend.directRouting && onLink);
    const [block, address, node] = [cidrText(subnet), ipText(subnet.address), ipText(publicIp)];
    want.peers4?.push(node);
    want.routes?.push(direct ? `${block} ${node} 2` : `${block} ${address} ${device}`);
    const reach = direct ? "REACH_DIRECT" : "REACH_TUNNEL";
    want.subnets4?.push(`${address} ${node} ${reach} ${vtepMac ?? "00:00:00:00:00:00"}`);
    if (direct) return;
    want.neighbours?.push(`${address} ${vtepMac} true`);
    const before = want.fdb?.findIndex((row) => row.startsWith(`${vtepMac} `)) ?? -1;
    if (before !== -1) want.fdb?.splice(before, 1);
    want.fdb?.push(`${vtepMac} ${node}`);
  }

  private divergenceOfPrograms(node: Node, device: number | undefined): string | undefined {
    const { kernel, dataplane } = node;
    const hooks = device === undefined ? [] : [`to_overlay-${device}`, `from_overlay-${device}`];
    hooks.push("from_net-2", "to_net-2");
    const subnet = cidr(node.status().subnet ?? "0.0.0.0/32");
    const endpoints: string[] = [];
    for (const bridge of kernel.links.values()) {
      if (bridge.kind !== "bridge") continue;
      const rows = [...kernel.addresses.values()].filter(({ index }) => index === bridge.index);
      if (!rows.some((row) => within(cidrText(subnet), row.address))) continue;
      hooks.push(`from_pod-${bridge.index}`, `to_pod-${bridge.index}`);
      const ports = [...kernel.links.values()].filter(({ masterIndex }) => masterIndex === bridge.index);
      for (const port of ports) {
        hooks.push(`from_pod-${port.index}`);
        const [entry] = [...kernel.fdb.values()].filter(({ index }) => index === port.index);
        for (const row of kernel.neighbours.values()) {
          if (row.index === bridge.index && row.mac === entry?.mac) endpoints.push(ipText(row.address));
        }
      }
    }
    const attached = [...dataplane.attached.keys()].sort().join();
    if (attached !== hooks.sort().join()) return `programs at ${attached}, not at ${hooks.join()}`;
    for (const [key, { config }] of dataplane.attached) {
      if (config !== dataplane.active) return `program ${key} is a former one`;
    }
    if (!dataplane.active.includes(`"subnet4":${subnet.address},`)) return `programs of a former subnet`;
    const known = [...dataplane.maps.endpoints4.keys()].sort().join();
    return known === endpoints.sort().join() ? undefined : `endpoints ${known}, not ${endpoints.join()}`;
  }
}

/** The number of the peer whose device has a MAC, 0 if it is none of the story's. */
function peerOfMac(mac: string): number {
  return mac.startsWith("0e:00:00:00:") ? Number.parseInt(mac.slice(-2), 16) : 0;
}

/** The number of the peer that holds a subnet, 0 if it is none of the story's. */
function peerOf(address: number): number {
  const n = (address >>> 8) & 255;
  return within("10.3.0.0/16", address) && keyOf(n) === `subnets/10.3.${n}.0-24` ? n : 0;
}
