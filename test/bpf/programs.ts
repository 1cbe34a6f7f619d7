/**
 * The programs, loaded into the kernel on a node that exists only in their maps, and run on one packet at a time.
 *
 * The node is 10.4.7.21 with the pods of 172.7.21.0/24; its peers are reached through the tunnel (22), directly (23)
 * and through the kernel's device (24). BPF_PROG_TEST_RUN puts a packet on the loopback interface, whose index is 1
 * and whose MAC is all zeros, so that is what "the interface at hand" is here.
 *
 * The kernel lets a test set few fields of a packet's metadata. `cb` is one, and no program of ours uses it: each
 * program is loaded a second time behind an entry that moves cb into the fields that matter and back.
 */
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { codec } from "../../loader/codec.ts";
import { compile } from "../../loader/compile.ts";
import { type BpfObject, openObject } from "../../loader/object.ts";
import * as abi from "../../src/abi/twill.gen.ts";
import { parseIpv4 } from "../../src/core/ipv4.ts";
import { repository } from "../lab.ts";
import { address, mac, VXLAN_PORT } from "./packets.ts";

export const REDIRECT = 7;
export const SHOT = 2;
export const NEXT = -1;

export const LO = 1;
export const LO_MAC = "00:00:00:00:00:00";
export const OVERLAY = 99;
export const VTEP = "10.4.7.21";
export const VTEP_MAC = "02:07:15:00:00:01";
export const OTHER_MAC = "02:ee:ee:00:00:01";
export const GATEWAY_MAC = "02:42:07:15:00:01";

/** A pod of the node whose packets the tests send: it is behind the loopback interface. */
export const POD = { address: "172.7.21.2", mac: "02:42:07:15:00:02", ifindex: LO };
/** Other pods of the node. */
export const NEIGHBOUR = { address: "172.7.21.3", mac: "02:42:07:15:00:03", ifindex: 70 };
export const EGRESS_POD = { address: "172.7.21.4", mac: "02:42:07:15:00:04", ifindex: 71 };
/** A peer and one of its pods. */
export const TUNNEL = {
  address: "10.4.7.22",
  pod: "172.7.22.2",
  mac: "02:07:16:00:00:01",
  net: "172.7.22.0",
};
export const DIRECT = {
  address: "10.4.7.23",
  pod: "172.7.23.2",
  mac: "02:07:17:00:00:01",
  net: "172.7.23.0",
};
export const DEVICE = {
  address: "10.4.7.24",
  pod: "172.7.24.2",
  mac: "02:07:18:00:00:01",
  net: "172.7.24.0",
};
export const PEER_MTU = 1450;
export const POD_MTU = 1400;
export const SOURCE_PORTS = { min: 32768, max: 60999 };

const ip = (text: string): number => parseIpv4(text) ?? 0;

/** Seconds that a masqueraded connection lives. */
export const TIMEOUTS: abi.Timeouts = {
  tcp_new: 120,
  tcp_established: 432000,
  tcp_closing: 120,
  tcp_closed: 10,
  tcp_time_wait: 120,
  udp_new: 30,
  udp_established: 120,
  icmp: 30,
  other: 600,
};

const CONFIG: abi.Config = {
  network4: ip("172.7.0.0"),
  network4_mask: ip("255.255.0.0"),
  subnet4: ip("172.7.21.0"),
  subnet4_mask: ip("255.255.255.0"),
  vtep4: ip(VTEP),
  overlay_ifindex: OVERLAY,
  vni: 1,
  tunnel_port: VXLAN_PORT,
  source_port_min: SOURCE_PORTS.min,
  source_port_max: SOURCE_PORTS.max,
  vtep_mac: mac(VTEP_MAC),
  subnet_lengths: [24, 0, 0, 0],
  fast_path: "FAST_PATH_AUTO",
  ttl: 64,
  tunnel: "TUNNEL_VXLAN",
  encapsulate: 1,
  decapsulate: 1,
  direct: 1,
  masquerade: 0,
  let_in: 1,
  count_peers: 0,
  masq_port_min: 61000,
  masq_port_max: 65535,
  masq_seed: 77,
  masq_connections: 1024,
  timeouts: TIMEOUTS,
};

export type HookName = "from_pod" | "to_pod" | "to_overlay" | "from_overlay" | "from_net" | "to_net";
export const HOOKS: readonly HookName[] = [
  "from_pod",
  "to_pod",
  "to_overlay",
  "from_overlay",
  "from_net",
  "to_net",
];
const VERDICTS = Object.keys(abi.Verdict)
  .slice(0, abi.Verdict.VERDICT_COUNT)
  .map((name) => name.slice("VERDICT_".length));

/** Metadata of a packet that a test may set. */
export interface Metadata {
  readonly ifindex?: number;
  readonly gsoSize?: number;
  readonly mark?: number;
  /** skb->tc_index as an earlier program left it. */
  readonly tcIndex?: number;
  /** The tag that the network card took off: 0x1000 and the VLAN. */
  readonly vlan?: number;
}

/** What a program did with a packet. */
export interface Outcome {
  /** `REDIRECT`, `SHOT`, `NEXT`, or what else it returned. */
  readonly action: number;
  readonly packet: Uint8Array;
  /** `HOOK VERDICT bytes` for each counter that went up, such as `from_pod DELIVERED 60`. */
  readonly counted: readonly string[];
  /** Only the verdict, if there is exactly one. */
  readonly verdict: string | undefined;
  readonly tcIndex: number;
  readonly durationNs: number;
}

const SOURCE = join(repository, "bpf");

/** Each program again as `test_<name>`, with the metadata in and out through cb. */
function entries(source: string): string {
  const hooks = new RegExp(`^SEC\\("tc"\\)\nint (?=(${HOOKS.join("|")})\\()`, "gm");
  const inlined = source.replaceAll(hooks, "static __always_inline int ");
  const wrapped = HOOKS.map(
    (name) => `
SEC("tc")
int test_${name}(struct __sk_buff *skb)
{
	__u32 vlan = skb->cb[1];
	int action;

	if (vlan)
		bpf_skb_vlan_push(skb, bpf_htons(ETH_P_8021Q), vlan & 0xfff);
	skb->tc_index = skb->cb[0];
	action = ${name}(skb);
	skb->cb[0] = skb->tc_index;
	return action;
}`,
  );
  return [inlined, ...wrapped].join("\n");
}

function build(source: string): Uint8Array {
  const dir = mkdtempSync(join(tmpdir(), "twill-bpf-"));
  try {
    const path = join(dir, "twill.bpf.c");
    writeFileSync(path, source);
    return readFileSync(compile({ source: path, includeDirs: [SOURCE], cacheDir: dir }).path);
  } finally {
    rmSync(dir, { recursive: true, force: true });
  }
}

const built = new Map<string, Uint8Array>();

/** The object as it ships, or with the tests' entries. */
export function objectBytes(kind: "shipped" | "entries"): Uint8Array {
  const before = built.get(kind);
  if (before !== undefined) return before;
  const source = readFileSync(join(SOURCE, "twill.bpf.c"), "utf8");
  const bytes = build(kind === "shipped" ? source : entries(source));
  built.set(kind, bytes);
  return bytes;
}

/** The bytes of the constant `config`. */
export function configBytes(changes: Partial<abi.Config> = {}): Uint8Array {
  return codec(abi.configLayout).encode({ ...CONFIG, ...changes });
}

const CODECS = {
  subnet: codec(abi.subnet4Layout),
  peer: codec(abi.peer4Layout),
  address: codec(abi.address4Layout),
  endpoint: codec(abi.endpoint4Layout),
  interface: codec(abi.interfaceLayout),
  flow: codec(abi.flow4Layout),
  flowValue: codec(abi.flowLayout),
};
function flowName(flow: abi.Flow4): string {
  return `${flow.a.join(".")}:${flow.port_a} ${flow.b.join(".")}:${flow.port_b} ${flow.protocol}`;
}

const CB_AT = 48;
const SKB_SIZE = 192;
const IFINDEX_AT = 40;
const MARK_AT = 8;
const GSO_SIZE_AT = 176;

/** The node of the tests: load with `Node.load()`, end with `close()`. */
export class Node {
  readonly #object: BpfObject;

  private constructor(object: BpfObject) {
    this.#object = object;
  }

  /** Loads the programs with these changes to `config`. Those as shipped can be pinned, the others be run. */
  static load(
    changes: Partial<abi.Config> = {},
    kind: "shipped" | "entries" = "entries",
    connections = 1024,
  ): Node {
    const object = openObject(objectBytes(kind), { name: "twill" });
    object.setRodata({ config: configBytes({ masq_connections: connections, ...changes }) });
    object.setMaxEntries("connections4", connections);
    object.setMaxEntries("expiring4", connections + 64);
    object.load();
    const node = new Node(object);
    node.peer(TUNNEL, "REACH_TUNNEL");
    node.peer(DIRECT, "REACH_DIRECT");
    node.peer(DEVICE, "REACH_DEVICE");
    node.endpoint(POD, "DELIVERY_PEER");
    node.endpoint(NEIGHBOUR, "DELIVERY_PEER");
    node.endpoint(EGRESS_POD, "DELIVERY_EGRESS");
    node.interface(LO, GATEWAY_MAC);
    return node;
  }

  /** The object itself, for what only masquerade has. */
  get object(): BpfObject {
    return this.#object;
  }

  /** Pins a program, for `tc`. */
  pin(hook: HookName, path: string): void {
    this.#object.program(hook).pin(path);
  }

  /** An interface with pods behind it, and the MAC of their gateway. */
  interface(ifindex: number, gatewayMac: string, bridge = 0): void {
    const key = Buffer.alloc(4);
    key.writeUInt32LE(ifindex);
    this.#object
      .map("interfaces")
      .update(key, CODECS.interface.encode({ gateway_mac: mac(gatewayMac), bridge }));
  }

  /** An interface of the machine with no pods behind it. */
  get spareIfindex(): number {
    const indexes = readdirSync("/sys/class/net")
      .filter((name) => existsSync(`/sys/class/net/${name}/ifindex`))
      .map((name) => Number(readFileSync(`/sys/class/net/${name}/ifindex`, "utf8")));
    const spare = indexes.find((index) => index !== LO);
    if (spare === undefined) throw new Error("The machine has only a loopback interface; add a dummy one.");
    return spare;
  }

  close(): void {
    this.#object.close();
  }

  /** Adds or replaces a peer and the subnet it holds. */
  peer(
    peer: { address: string; mac: string; net: string },
    reach: abi.Reach,
    {
      prefixLength = 24,
      ifindex = LO,
      nextHop = peer.address,
    }: { prefixLength?: number; ifindex?: number; nextHop?: string } = {},
  ): void {
    const subnet = CODECS.subnet.encode({ address: address(peer.net), prefix_length: prefixLength });
    const value = CODECS.peer.encode({
      public_ip: address(peer.address),
      next_hop: address(nextHop),
      ifindex,
      reach,
      mtu: PEER_MTU,
      vtep_mac: mac(peer.mac),
    });
    this.#object.map("subnets4").update(subnet, value);
    this.#object.map("peers4").update(address(peer.address), subnet);
  }

  endpoint(
    pod: { address: string; mac: string; ifindex: number },
    delivery: abi.Delivery,
    gatewayMac: string = GATEWAY_MAC,
  ): void {
    const value = CODECS.endpoint.encode({
      ifindex: pod.ifindex,
      delivery,
      mac: mac(pod.mac),
      gateway_mac: mac(gatewayMac),
      mtu: POD_MTU,
    });
    this.#object.map("endpoints4").update(address(pod.address), value);
  }

  /** The rows of `flows4`, as `172.7.21.2:5 172.7.22.2:6 17`, sorted. */
  flows(): string[] {
    return this.#object
      .map("flows4")
      .entries()
      .map(([key]) => flowName(CODECS.flow.decode(key)))
      .sort();
  }

  /** When each flow of `flows4` was noted, in the order of `entries()`. */
  flowTimes(): bigint[] {
    return this.#object
      .map("flows4")
      .entries()
      .map(([, value]) => CODECS.flowValue.decode(value).since_ns);
  }

  forgetFlows(): void {
    const flows = this.#object.map("flows4");
    flows.deleteBatch(flows.entries().map(([key]) => key));
  }

  /** Removes one row of `flows4`, named as in `flows()`. */
  forgetFlow(name: string): void {
    const flows = this.#object.map("flows4");
    flows.deleteBatch(
      flows
        .entries()
        .map(([key]) => key)
        .filter((key) => flowName(CODECS.flow.decode(key)) === name),
    );
  }

  /** All counters that are not 0, as `from_pod DELIVERED` and the number of packets. */
  totals(): Map<string, number> {
    const counts = new Map<string, number>();
    for (const line of this.#since(this.#counters().map(() => 0n))) {
      const name = line.split(" ").slice(0, 2).join(" ");
      counts.set(name, (counts.get(name) ?? 0) + 1);
    }
    return counts;
  }

  /** Runs a program on an IP packet for its effect on the maps alone, which is faster than `run`. */
  push(hook: HookName, packet: Uint8Array): void {
    const ctx = Buffer.alloc(SKB_SIZE);
    ctx.writeUInt32LE(LO, IFINDEX_AT);
    const data = Buffer.concat([mac(OTHER_MAC), mac(LO_MAC), Buffer.from([8, 0]), packet]);
    this.#object.program(`test_${hook}`).testRun({ data, ctx, dataOutSize: 0 });
  }

  run(hook: HookName, packet: Uint8Array, metadata: Metadata = {}): Outcome {
    const ctx = Buffer.alloc(SKB_SIZE);
    ctx.writeUInt32LE(metadata.ifindex ?? LO, IFINDEX_AT);
    ctx.writeUInt32LE(metadata.mark ?? 0, MARK_AT);
    ctx.writeUInt32LE(metadata.gsoSize ?? 0, GSO_SIZE_AT);
    ctx.writeUInt32LE(metadata.tcIndex ?? 0, CB_AT);
    ctx.writeUInt32LE(metadata.vlan ?? 0, CB_AT + 4);
    const before = this.#counters();
    const result = this.#object.program(`test_${hook}`).testRun({ data: packet, ctx });
    const counted = this.#since(before);
    return {
      action: result.retval,
      packet: result.data,
      counted,
      verdict: counted.length === 1 ? counted[0]?.split(" ")[1] : undefined,
      tcIndex: Buffer.from(result.ctx).readUInt32LE(CB_AT),
      durationNs: result.durationNs,
    };
  }

  #counters(): bigint[] {
    const sums = new Array<bigint>((abi.hookCountsLayout.size / 16) * 2).fill(0n);
    for (const value of this.#object.map("counters").lookupPerCpu(new Uint8Array(4)) ?? []) {
      new BigUint64Array(value.buffer, value.byteOffset, sums.length).forEach((count, i) => {
        sums[i] = (sums[i] ?? 0n) + count;
      });
    }
    return sums;
  }

  #since(before: readonly bigint[]): string[] {
    const after = this.#counters();
    const lines: string[] = [];
    for (let cell = 0; cell < after.length / 2; cell++) {
      const packets = (after[2 * cell] ?? 0n) - (before[2 * cell] ?? 0n);
      const bytes = (after[2 * cell + 1] ?? 0n) - (before[2 * cell + 1] ?? 0n);
      const name = `${HOOKS[Math.floor(cell / VERDICTS.length)]} ${VERDICTS[cell % VERDICTS.length]}`;
      for (let i = 0n; i < packets; i++) lines.push(`${name} ${bytes / packets}`);
    }
    return lines;
  }
}
