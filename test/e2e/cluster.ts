/**
 * Two hosts that twilld runs, with pods, and the probes that tests of their traffic share.
 *
 * The hosts are h1 (10.4.7.21, pods 172.7.21.x) and h2 (10.4.7.22, pods 172.7.22.x). Their subnets are given by
 * the subnet.env of an earlier run, so that addresses can be written down in tests. A server answers in every pod
 * on ports 7000 (TCP) and 7001 (UDP); `probe` runs one of the clients of probe.py.
 *
 * `restart` runs the same hosts with other flags: with `--fast-path=off` every packet takes the kernel's path,
 * and a probe that must come out as there is simply run twice.
 */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  createLab,
  type Etcd,
  exec,
  type Host,
  type Lab,
  type LabOptions,
  type Namespace,
  type Pod,
  type Process,
  repository,
  until,
} from "../lab.ts";
import { startTwilld, type Twilld } from "../twilld.ts";

export const NETWORK = "172.7.0.0/16";
export const TCP_PORT = 7000;
export const UDP_PORT = 7001;

/** The backends that treat packets differently, as they are written in the network's configuration. */
export const BACKENDS = {
  vxlan: { Type: "vxlan" },
  "vxlan with DirectRouting": { Type: "vxlan", DirectRouting: true },
  "host-gw": { Type: "host-gw" },
} as const;
/** Those whose tunnel the programs alone open and close. */
export const PLAIN_BACKENDS = { ipip: { Type: "ipip" }, udp: { Type: "udp" } } as const;
export const ALL_BACKENDS = {
  ...BACKENDS,
  ...PLAIN_BACKENDS,
  "ipip with DirectRouting": { Type: "ipip", DirectRouting: true },
} as const;
/** Those whose nodes speak to pods of others from their device's address. */
const OVERLAYS: ReadonlySet<string> = new Set(["vxlan", "ipip", "udp"]);
export type BackendName = keyof typeof ALL_BACKENDS;
const everyBackend = process.env.TWILL_BACKENDS === "all";
/** Those that the longer tests are run with: all of them if TWILL_BACKENDS=all, else one with a tunnel and one without. */
export const TESTED_BACKENDS = (
  everyBackend ? Object.keys(ALL_BACKENDS) : ["vxlan", "host-gw"]
) as readonly BackendName[];
/** Of these, those that the kernel alone can forward for as well, as it does beside flanneld. */
export const TESTED_KERNEL_BACKENDS = TESTED_BACKENDS.filter((name) => name in BACKENDS);

/** FLANNEL_MTU on an uplink of 1500. */
export function mtuOf(backend: BackendName): number {
  const mtus = { "host-gw": 1500, ipip: 1480, "ipip with DirectRouting": 1480, udp: 1472 };
  return (mtus as Record<string, number>)[backend] ?? 1450;
}

/** The address by which a host speaks to pods of others. */
export function nodeAddressOf(host: Host, backend: BackendName): string {
  return OVERLAYS.has(backend) ? `${host.address.replace("10.4.7.", "172.7.")}.0` : host.address;
}

/** Packets by hook and verdict. */
export type Counts = Readonly<Record<string, Readonly<Record<string, number>>>>;

/** What a probe found; the fields depend on which. */
export interface Finding {
  readonly intact: boolean;
  /** Client's address, as the server saw it. */
  readonly seen?: string;
  /** Server's address, as the client saw it. */
  readonly peer?: string;
  readonly type?: number;
  readonly code?: number;
  readonly mtu?: number;
  readonly from?: string;
  readonly error?: string;
  readonly tries?: number;
}

const probePy = join(repository, "test/e2e/probe.py");

/** Runs a client of probe.py; what it finds wrong is in its answer. */
export async function probe(
  from: Namespace,
  command: string,
  options: { input?: string; timeout?: number } = {},
): Promise<Finding> {
  const argv = ["/usr/bin/python3", probePy, ...command.split(" ")];
  const { stdout, stderr } = await from.exec(argv, { check: false, ...options });
  const last = stdout.trim().split("\n").pop() ?? "";
  if (!last.startsWith("{")) throw new Error(`probe ${command} in ${from.name} said: ${stdout}${stderr}`);
  return JSON.parse(last) as Finding;
}

/** Starts the server of probe.py; at all addresses, or at one, from which it then answers as well. */
export async function serve(
  inside: Namespace,
  ports: readonly [number, number] = [TCP_PORT, UDP_PORT],
  address = "0.0.0.0",
) {
  const argv = ["serve", ...ports.map(String), `--address=${address}`];
  const server = inside.spawn(["/usr/bin/python3", probePy, ...argv]);
  await server.line(/^ready$/);
  return server;
}

/** Sends frames, bytes from the Ethernet header on, out of a device. */
export async function inject(from: Namespace, device: string, frames: readonly Uint8Array[]): Promise<void> {
  const input = frames.map((bytes) => `${Buffer.from(bytes).toString("hex")}\n`).join("");
  const finding = await probe(from, `inject ${device}`, { input });
  if (!finding.intact)
    throw new Error(`cannot send frames out of ${device} in ${from.name}: ${finding.error}`);
}

/** Frames that go out of a device one by one. */
export class Injector {
  readonly #process: Process;
  #sent = 0;

  private constructor(process: Process) {
    this.#process = process;
  }

  /** `file` is where the frames may be written. */
  static async start(
    from: Namespace,
    device: string,
    frames: readonly Uint8Array[],
    file: string,
  ): Promise<Injector> {
    writeFileSync(file, frames.map((bytes) => `${Buffer.from(bytes).toString("hex")}\n`).join(""));
    const process = from.spawn(["/usr/bin/python3", probePy, "inject", device, `--step=${file}`]);
    await process.line(/^ready$/);
    return new Injector(process);
  }

  /** Sends the next one. */
  async send(): Promise<void> {
    this.#process.kill("SIGUSR1");
    await this.#process.line(new RegExp(`^sent ${this.#sent}$`), { after: this.#sent });
    this.#sent += 1;
  }
}

export interface ClusterOptions extends LabOptions {
  readonly backend?: BackendName;
  readonly flags?: readonly string[];
  /** Of the pods' links and bridges; default: that of subnet.env. */
  readonly podMtu?: number;
}

export class Cluster {
  readonly lab: Lab;
  readonly etcd: Etcd;
  readonly h1: Host;
  readonly h2: Host;
  /** On h1. */
  readonly a: Pod;
  /** On h1 too. */
  readonly c: Pod;
  /** On h2. */
  readonly b: Pod;
  readonly #twillds = new Map<Host, Twilld>();
  readonly #servers = new Map<Namespace, Process>();

  constructor(lab: Lab, etcd: Etcd, hosts: readonly [Host, Host], pods: readonly [Pod, Pod, Pod]) {
    this.lab = lab;
    this.etcd = etcd;
    [this.h1, this.h2] = hosts;
    [this.a, this.b, this.c] = pods;
  }

  get hosts(): readonly [Host, Host] {
    return [this.h1, this.h2];
  }

  get pods(): readonly Pod[] {
    return [this.a, this.b, this.c];
  }

  /** Starts twilld on both hosts, ending those that run, and returns when both know each other and every pod. */
  async restart(flags: readonly string[] = []): Promise<void> {
    for (const twilld of this.#twillds.values()) await twilld.stop();
    await Promise.all(
      this.hosts.map(async (host) =>
        this.#twillds.set(host, await startTwilld(host, { etcd: this.etcd, flags })),
      ),
    );
    await this.settle();
  }

  /** The twilld that runs on a host. */
  twilld(host: Host): Twilld {
    const twilld = this.#twillds.get(host);
    if (twilld === undefined) throw new Error(`no twilld runs on ${host.name}`);
    return twilld;
  }

  /** Waits until the programs know the other host and the pods: all that a packet needs for the fast lane. */
  async settle(pods: readonly Pod[] = this.pods): Promise<void> {
    for (const host of this.hosts) {
      await until(`${host.name} to know its peer`, async () => (await entries(host, "subnets4")) > 0);
    }
    for (const pod of pods) {
      // The kernel gets to know a pod when it delivers to it, or hears its ARP.
      await pod.host.ping(pod.address, { count: 1 });
      await until(`${pod.host.name} to know ${pod.address}`, () => knows(pod.host, pod.address));
    }
  }

  /** The server of probe.py in a pod, which prints a line for each client. */
  server(pod: Namespace): Process {
    const server = this.#servers.get(pod);
    if (server === undefined) throw new Error(`no server runs in ${pod.name}`);
    return server;
  }

  /** Starts the server of probe.py in a pod. */
  async serve(pod: Namespace): Promise<void> {
    this.#servers.set(pod, await serve(pod));
  }

  /** What became of packets at each hook of a host since its programs' maps were made. */
  async counts(host: Host): Promise<Counts> {
    const dump = await mapDump(host, "counters");
    const [row] = dump as { formatted: { values: { value: Record<string, Record<string, Count>> }[] } }[];
    const sums: Record<string, Record<string, number>> = {};
    for (const { value } of row?.formatted.values ?? []) {
      for (const [hook, verdicts] of Object.entries(value)) {
        sums[hook] ??= {};
        const sum = sums[hook];
        for (const [verdict, count] of Object.entries(verdicts))
          sum[verdict] = (sum[verdict] ?? 0) + Number(count.packets);
      }
    }
    return sums;
  }

  /** Packets counted while `work` ran. */
  async counted(host: Host, work: () => Promise<unknown>): Promise<Counts> {
    const before = await this.counts(host);
    await work();
    const after = await this.counts(host);
    return Object.fromEntries(
      Object.entries(after).map(([hook, verdicts]) => [
        hook,
        Object.fromEntries(
          Object.entries(verdicts)
            .map(([verdict, packets]) => [verdict, packets - (before[hook]?.[verdict] ?? 0)] as const)
            .filter(([, packets]) => packets !== 0),
        ),
      ]),
    );
  }

  /**
   * How many flows between pods a host holds on the stack because it has seen them translated. What a pod sends to
   * nodes and to the outside under its own address is held as well, and is not counted.
   */
  async heldFlows(host: Host): Promise<number> {
    type Row = { formatted: { key: { a: number[]; b: number[] } } };
    const rows = (await mapDump(host, "flows4")) as Row[];
    const isPod = (address: number[]) => address[0] === 172 && address[1] === 7;
    return rows.filter(({ formatted: { key } }) => isPod(key.a) && isPod(key.b)).length;
  }

  /** Ends all, and removes what twilld left on purpose. */
  close(): Promise<void> {
    return this.lab.close();
  }
}

interface Count {
  readonly packets: number;
}

/** Makes the two hosts, their bridges and pods, starts everything and waits until it has settled. */
export async function createCluster(options: ClusterOptions = {}): Promise<Cluster> {
  const { backend = "vxlan", flags = [], podMtu, ...labOptions } = options;
  const lab = await createLab(labOptions);
  try {
    const etcd = await lab.etcd({ addresses: ["10.4.7.11/24"] });
    await etcd.put(
      "/coreos.com/network/config",
      JSON.stringify({ Network: NETWORK, Backend: ALL_BACKENDS[backend] }),
    );
    const mtu = podMtu ?? mtuOf(backend);
    const [h1, h2] = await Promise.all(
      [21, 22].map(async (number) => {
        const host = await lab.host(`h${number - 20}`, { address: `10.4.7.${number}/24` });
        const subnet = `FLANNEL_NETWORK=${NETWORK}\nFLANNEL_SUBNET=172.7.${number}.1/24\n`;
        writeFileSync(join(host.directory, "subnet.env"), subnet);
        await host.bridge("docker0", `172.7.${number}.1/24`, { mtu });
        // No network card puts together what is for this port, as a cable within one kernel would.
        if (backend === "udp") await host.exec(["ethtool", "-K", "eth0", "tx-udp_tnl-segmentation", "off"]);
        return host;
      }),
    );
    if (h1 === undefined || h2 === undefined) throw new Error("unreachable");
    const pods = [
      await h1.pod("a", "172.7.21.2/24", { mtu }),
      await h2.pod("b", "172.7.22.2/24", { mtu }),
      await h1.pod("c", "172.7.21.3/24", { mtu }),
    ] as const;
    const cluster = new Cluster(lab, etcd, [h1, h2], pods);
    await cluster.restart(flags);
    await Promise.all(cluster.pods.map((pod) => cluster.serve(pod)));
    return cluster;
  } catch (error) {
    await lab.close();
    throw error;
  }
}

async function mapDump(host: Host, map: string): Promise<unknown[]> {
  const { stdout } = await exec(["bpftool", "-j", "map", "dump", "pinned", join(host.pinPath, map)]);
  return JSON.parse(stdout) as unknown[];
}

async function entries(host: Host, map: string): Promise<number> {
  return (await mapDump(host, map)).length;
}

async function knows(host: Host, address: string): Promise<boolean> {
  type Row = { formatted: { key: { address: number[] } } };
  const rows = (await mapDump(host, "endpoints4")) as Row[];
  return rows.some((row) => row.formatted.key.address.join(".") === address);
}
