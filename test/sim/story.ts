/**
 * Stories: a world of two nodes with agents and six scripted peers, and the lines that happen to it. The same
 * language is written by hand in scenarios/*.txt and drawn at random by the simulator, so that a history that went
 * wrong can be kept as a file. One line is one event; `#` begins a comment. Nodes are n1 and n2, peers 101 to 106.
 *
 *   config vxlan|direct|host-gw|mtu|other        the operator puts another network config
 *   peer 101 [moves|gone|renews]                 a peer comes, changes MAC and address, goes, writes itself again
 *   garbage                                      a record that nobody can read
 *   wipe | save | restore | compact              of etcd; peers and the operator then put back what is missing
 *   pass 1500 | suspend 3600                     milliseconds; seconds that pass for etcd but not for the nodes
 *   n1 start | kill | cut 2 | join | overrun     cut: so many of the events on their way still arrive
 *   n1 hold store|netlink | release              what is on its way does not arrive for now
 *   n1 loses request|answer                      of its next write to etcd
 *   n1 deleted | revoked | overwritten           its key is deleted, or its etcd lease revoked, or another node writes it
 *   n1 drift <what> [101] | silently <what>      somebody changes the kernel; silently: the notification is lost
 *   n1 amid drift|silently <what> [101]          the same, while the node is reading the kernel's tables or maps
 *   n1 uplink down|up|moves                      moves: gets another address
 *   n1 pod 5 [gone]                              a pod on the bridge
 *   n1 fails <what> | heals                      writes, dump, load, activate, rows, put, remove, attachments, ...
 *   calm                                         all is healed, and within a while all must be as it ought to be
 */
import { nexthopIdOf } from "../../src/core/host.ts";
import type { Network } from "../../src/core/model.ts";
import { parseNetwork } from "../../src/core/network.ts";
import { cidr, config, type DataplaneCall, ip, type Node, record, World } from "./fakes.ts";
import { Invariants } from "./invariants.ts";

/** Few enough subnets that nodes meet. */
const RANGE = { SubnetMin: "10.3.10.0", SubnetMax: "10.3.30.0" };
const OTHER_RANGE = { SubnetMin: "10.3.50.0", SubnetMax: "10.3.70.0" };
const CONFIGS: Readonly<Record<string, string>> = {
  vxlan: config({ Type: "vxlan" }, "10.3.0.0/16", RANGE),
  direct: config({ Type: "vxlan", DirectRouting: true }, "10.3.0.0/16", RANGE),
  mtu: config({ Type: "vxlan", MTU: 1400 }, "10.3.0.0/16", RANGE),
  "host-gw": config({ Type: "host-gw" }, "10.3.0.0/16", RANGE),
  other: config({ Type: "vxlan" }, "10.3.0.0/17", OTHER_RANGE),
};
const NETWORKS = new Map(
  Object.entries(CONFIGS).map(([name, text]): [string, Network] => {
    const parsed = parseNetwork(text);
    if ("error" in parsed) throw new Error(parsed.error);
    return [name, parsed.network];
  }),
);
/** Peers and the operator notice within so long that etcd lost what they had put there. */
const NOTICE_MS = 8000;

export const RESYNC_MS = 60_000;
/** So many rows are handed to a reader before something happens behind its back, at most. */
const READS_PASSED_OVER = 12;

/** A peer that a story tells of, as it believes itself to be. */
interface Peer {
  /** Counts its changes of MAC and address. */
  version: number;
}

export class Story {
  readonly world: World;
  readonly peers = new Map<number, Peer>();
  readonly invariants: Invariants;
  configName = "vxlan";
  readonly strays = new Set<number>();
  private saved: ReturnType<World["etcd"]["save"]> | undefined;
  private readonly faults = new Map<Node, Set<string>>();

  constructor(seed: number) {
    this.world = new World(seed);
    for (let n = 0; n < 2; n++) {
      const node = this.world.addNode({ resyncMs: RESYNC_MS });
      this.faults.set(node, new Set());
      this.obey(node);
    }
    this.invariants = new Invariants(this);
  }

  get network(): Network {
    const network = NETWORKS.get(this.configName);
    if (network === undefined) throw new Error(`there is no config ${this.configName}`);
    return network;
  }

  /** Two nodes that forward to each other and to three peers. */
  async begin(): Promise<void> {
    this.world.etcd.put("config", CONFIGS[this.configName] ?? "");
    for (const n of [101, 102, 103]) this.putPeer(n, { version: 0 });
    for (const node of this.world.nodes) {
      this.invariants.plant(node);
      node.start();
    }
    await this.world.settle();
    const wrong = this.invariants.divergence();
    if (wrong !== undefined) throw new Error(`I8: ${wrong}`);
  }

  /** Runs one line and what follows from it at that moment. Throws if an invariant is broken. */
  async tell(line: string): Promise<void> {
    const words = (line.split("#")[0] ?? "").trim().split(/\s+/).filter(Boolean);
    if (words.length === 0) return;
    const node = this.world.nodes.find(({ name }) => name === words[0]);
    if (node !== undefined) this.happen(node, words.slice(1), line);
    else await this.befall(words, line);
    await this.world.settle();
    this.invariants.afterStep();
  }

  private async befall([verb, a = "", b = ""]: string[], line: string): Promise<void> {
    const { etcd } = this.world;
    switch (verb) {
      case "config":
        this.configName = a;
        this.invariants.allTouched();
        etcd.put("config", CONFIGS[a] ?? "");
        for (const [n, peer] of this.peers) this.putPeer(n, peer);
        return;
      case "peer": {
        const n = Number(a);
        const peer = this.peers.get(n);
        if (b !== "renews") this.invariants.touched(n);
        if (b === "gone") {
          this.peers.delete(n);
          etcd.delete(keyOf(n));
        } else if (b === "moves" && peer !== undefined) this.putPeer(n, { version: peer.version + 1 });
        else this.putPeer(n, peer ?? { version: 0 });
        return;
      }
      case "garbage":
        etcd.put("subnets/10.3.77.0-24", "{");
        return;
      case "wipe":
        this.invariants.storeLost();
        etcd.wipe();
        this.putBack();
        return;
      case "save":
        this.saved = etcd.save();
        return;
      case "restore":
        if (this.saved === undefined) return;
        this.invariants.storeLost();
        this.invariants.restored(this.saved.keys);
        etcd.restore(this.saved);
        this.putBack();
        return;
      case "compact":
        etcd.compact();
        return;
      case "pass":
        await this.world.pass(Number(a));
        return;
      case "suspend":
        etcd.age(Number(a) * 1000);
        return;
      case "calm":
        await this.calm();
        return;
      default:
        throw new Error(`nobody knows what this means: ${line}`);
    }
  }

  private happen(node: Node, [verb, ...rest]: string[], line: string): void {
    const { client, kernel } = node;
    const [a = "", b = ""] = rest;
    switch (verb) {
      case "start":
        // Without an uplink it ends, and whoever keeps it running starts it again.
        if (!kernel.links.get(2)?.up) return;
        this.invariants.started(node);
        if (node.agent === undefined) node.start();
        return;
      case "kill":
        node.kill();
        this.invariants.killed(node);
        this.noteStray(node);
        return;
      case "cut":
        client.disconnect(Number(a));
        return;
      case "join":
        if (node.agent !== undefined) client.connect();
        return;
      case "overrun":
        node.overrun();
        return;
      case "hold":
        if (a === "store") node.holdStore = true;
        else node.holdNetlink = true;
        return;
      case "release":
        node.holdStore = node.holdNetlink = false;
        return;
      case "loses":
        client.mishaps.push(a === "request" ? "request lost" : "answer lost");
        return;
      case "deleted":
      case "revoked":
      case "overwritten": {
        const key = this.invariants.keyOf(node);
        if (key === undefined) return;
        const { etcd } = this.world;
        this.invariants.nodeTouched(node);
        if (verb === "deleted") etcd.delete(key);
        else if (verb === "overwritten") etcd.put(key, this.recordOf(250, { version: 0 }));
        else {
          this.invariants.revoked(node, key);
          etcd.revoke(etcd.keys.get(key)?.leaseId ?? "0");
        }
        return;
      }
      case "amid": {
        this.invariants.nodeDrifted(node);
        // Not always at the first that is read.
        const passedOver = Math.floor(this.world.random() * READS_PASSED_OVER);
        for (let read = 0; read < passedOver; read++) kernel.amid.push(() => undefined);
        kernel.amid.push(() => this.happen(node, rest, line));
        return;
      }
      case "drift":
      case "silently": {
        const before = kernel.events.length;
        this.invariants.nodeDrifted(node);
        this.drift(node, a, Number(b));
        if (node.agent === undefined) this.noteStray(node);
        if (verb === "silently") kernel.events.length = before;
        return;
      }
      case "uplink":
        this.invariants.nodeTouched(node);
        if (a === "moves") {
          if (!kernel.links.get(2)?.up) return;
          const [row] = [...kernel.addresses.values()].filter(({ index }) => index === 2);
          const address = (row?.address ?? 0) + 20;
          if (row === undefined || (address & 255) > 90) return;
          kernel.deleteAddress(2, { address: row.address, length: 24 });
          kernel.addAddress(2, { address, length: 24 });
        } else if (a === "down") {
          kernel.setLink(2, { up: false });
        } else {
          this.raise(node);
        }
        return;
      case "pod":
        this.pod(node, Number(a), b !== "gone");
        return;
      case "fails":
        this.faults.get(node)?.add(a);
        return;
      case "heals":
        this.heal(node);
        return;
      default:
        throw new Error(`nobody knows what this means: ${line}`);
    }
  }

  /** Nobody can tell that a device without its address was a former agent's. */
  private noteStray({ device, kernel }: Node): void {
    if (device === undefined) return;
    for (const row of kernel.addresses.values()) if (row.index === device.index) return;
    this.strays.add(device.index);
  }

  private raise(node: Node): void {
    const { kernel } = node;
    if (kernel.links.get(2)?.up) return;
    kernel.setLink(2, { up: true });
    kernel.replaceRoute({
      destination: cidr("0.0.0.0/0"),
      gateway: ip("192.168.0.254"),
      outIndex: 2,
      protocol: 4,
    });
    this.invariants.plantOnUplink(node);
  }

  private drift(node: Node, what: string, n: number): void {
    const { kernel, dataplane } = node;
    const address = ip(`10.3.${n || 101}.0`);
    const index = node.device?.index ?? -1;
    const quietly = (act: () => void): void => {
      try {
        act();
      } catch (error) {
        // There was nothing to change.
        if (!(error instanceof Error) || !/^E[A-Z]+$/.test(error.message)) throw error;
      }
    };
    const acts: Record<string, () => void> = {
      route: () => kernel.deleteRoute({ destination: { address, length: 24 } }),
      nexthop: () => kernel.deleteNexthop(nexthopIdOf({ address, length: 24 }) ?? 0),
      foreign: () =>
        kernel.replaceRoute({
          destination: { address, length: 24 },
          gateway: ip("192.168.0.99"),
          outIndex: 2,
          protocol: 4,
        }),
      neighbour: () => kernel.deleteNeighbour(index, address),
      mac: () => kernel.replaceNeighbour({ index, address, mac: "0e:ff:00:00:00:01", permanent: true }),
      fdb: () => {
        for (const row of [...kernel.fdb.values()])
          if (row.index === index) kernel.deleteFdb({ index, mac: row.mac });
      },
      stale: () => {
        kernel.replaceNeighbour({
          index,
          address: ip("10.3.99.0"),
          mac: "0e:ff:00:00:00:02",
          permanent: true,
        });
        kernel.replaceFdb({ index, mac: "0e:ff:00:00:00:02", dst: ip("192.168.0.98") });
        kernel.replaceRoute({
          destination: cidr("10.3.99.0/24"),
          gateway: ip("10.3.99.0"),
          outIndex: index,
          onlink: true,
        });
      },
      rows: () => {
        dataplane.maps.subnets4.clear();
        dataplane.maps.peers4.clear();
      },
      programs: () => dataplane.attached.clear(),
      gone: () => kernel.deleteLink(index),
      down: () => kernel.setLink(index, { up: false }),
      device: () => kernel.setLink(index, { mac: "0e:ff:00:00:00:03", mtu: 1300 }),
      address: () => {
        for (const row of [...kernel.addresses.values()]) {
          if (row.index === index)
            kernel.deleteAddress(index, { address: row.address, length: row.prefixLength });
        }
      },
    };
    const act = acts[what];
    if (act === undefined) throw new Error(`nobody knows how to drift ${what}`);
    quietly(act);
  }

  private pod(node: Node, n: number, comes: boolean): void {
    const { kernel } = node;
    const subnet = /FLANNEL_SUBNET=(.*)\n/.exec(node.file)?.[1];
    if (subnet === undefined) return;
    const gateway = cidr(subnet);
    const name = `veth${n}`;
    if (kernel.hasLink(name)) {
      if (!comes) kernel.deleteLink(kernel.linkNamed(name).index);
      return;
    }
    if (!comes) return;
    if (!kernel.hasLink("cni0")) node.addBridge(gateway);
    const { index } = kernel.linkNamed("cni0");
    const has = [...kernel.addresses.values()].some(
      (row) => row.index === index && row.address === gateway.address,
    );
    // A bridge of a former subnet is its maker's to change.
    if (has) node.addPod(index, gateway.address + n, name);
  }

  private obey(node: Node): void {
    const faults = this.faults.get(node) ?? new Set<string>();
    const { random } = this.world;
    node.kernel.refuse = () => (faults.has("writes") && random() < 0.5 ? "ENOBUFS" : undefined);
    node.dataplane.refuse = (call: DataplaneCall) => faults.has(call);
    Object.defineProperty(node, "diskFull", { get: () => faults.has("disk") });
    Object.defineProperty(node.kernel, "unreadable", { get: () => faults.has("dump") });
  }

  private heal(node: Node): void {
    this.faults.get(node)?.clear();
    node.client.mishaps.length = 0;
  }

  /** All that is wrong ends, and what ought to be must come about within some three minutes. */
  private async calm(): Promise<void> {
    for (const node of this.world.nodes) {
      this.heal(node);
      node.holdNetlink = node.holdStore = false;
      node.kernel.amid.length = 0;
      this.raise(node);
      if (node.agent === undefined) {
        this.invariants.started(node);
        node.start();
      }
      node.client.connect();
    }
    await this.world.pass(NOTICE_MS + 1000);
    let wrong = this.invariants.divergence();
    for (let turn = 0; turn < 20 && wrong !== undefined; turn++) {
      await this.world.pass(10_000);
      wrong = this.invariants.divergence();
    }
    if (wrong !== undefined) throw new Error(`I8: ${wrong}`);
    await this.invariants.afterCalm();
  }

  /** What etcd lost, those who had put it there put again as they notice. */
  private putBack(): void {
    const { clock, random, etcd } = this.world;
    clock.after(1000 * random(), () => {
      const text = CONFIGS[this.configName] ?? "";
      if (etcd.keys.get("config")?.value !== text) etcd.put("config", text);
    });
    for (let n = 101; n <= 106; n++) {
      clock.after(NOTICE_MS * random(), () => {
        const peer = this.peers.get(n);
        if (peer !== undefined && etcd.keys.get(keyOf(n))?.value !== this.recordOf(n, peer))
          this.putPeer(n, peer);
      });
    }
  }

  private putPeer(n: number, peer: Peer): void {
    this.peers.set(n, peer);
    this.world.etcd.put(keyOf(n), this.recordOf(n, peer));
  }

  /** On the same link in even versions; with host-gw always. */
  recordOf(n: number, { version }: Peer): string {
    const isHostGw = this.configName === "host-gw";
    const publicIp =
      version % 2 === 0 || isHostGw ? `192.168.0.${n + (version % 4 === 2 ? 50 : 0)}` : `172.16.0.${n}`;
    const mac = `0e:00:00:00:${version.toString(16).padStart(2, "0")}:${n.toString(16).padStart(2, "0")}`;
    return record(publicIp, isHostGw ? undefined : mac);
  }
}

export function keyOf(n: number): string {
  return `subnets/10.3.${n}.0-24`;
}

/** Runs a story from its beginning to a calm end. Throws what went wrong. */
export async function tellStory(seed: number, lines: readonly string[]): Promise<void> {
  const story = new Story(seed);
  await story.begin();
  for (const line of lines) await story.tell(line);
  await story.tell("calm");
}
