/**
 * The lab: hosts, pods and the networks between them, as network namespaces of this machine.
 *
 * Every host has an `eth0` that is plugged into a switch (a bridge per network, all in one namespace of their
 * own), so several hosts can meet without anything appearing in the machine's own namespace. Two networks are
 * joined by a router. A host has bridges, and pods behind them or behind a point-to-point veth, laid out as
 * Docker, the bridge CNI plugin, the ptp plugin and Calico do.
 *
 * Names carry the run (`twl<run>-<lab>-<host>`), so that `test/sweep` finds what a killed test left. `close`
 * removes everything in the opposite order and may be called at any time, as often as one likes.
 *
 * Programs run through `nsenter --net`; `ip netns exec` would mount a new /sys and hide the BPF file system.
 */
import { existsSync, mkdirSync, readdirSync, rmdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { removeRundir } from "../src/edge/rundir.ts";
import { Etcd, type EtcdOptions } from "./etcd.ts";
import {
  type ExecOptions,
  exec,
  type Outcome,
  Process,
  type RunOptions,
  runDirectory,
  runId,
  tidy,
  until,
} from "./process.ts";
import { Capture, HttpServer, Ping, type PingOptions, type PingResult } from "./traffic.ts";

export { Etcd } from "./etcd.ts";
export {
  exec,
  fileAppears,
  type Outcome,
  Process,
  patience,
  repository,
  runId,
  until,
  within,
} from "./process.ts";
export { Capture, type Frame, HttpServer, Ping, type PingResult } from "./traffic.ts";

/** Traffic counters of one device since it was made. */
export interface DeviceCounters {
  readonly rxPackets: number;
  readonly rxBytes: number;
  readonly rxErrors: number;
  readonly rxDropped: number;
  readonly txPackets: number;
  readonly txBytes: number;
  readonly txErrors: number;
  readonly txDropped: number;
}

/** One network namespace, and what can be done in it. */
export class Namespace {
  readonly lab: Lab;
  readonly name: string;
  /** Name under /run/netns. */
  readonly netns: string;

  constructor(lab: Lab, name: string) {
    this.lab = lab;
    this.name = name;
    this.netns = `${lab.prefix}${name}`;
  }

  /** Path of the namespace, for nsenter and setns. */
  get path(): string {
    return `/run/netns/${this.netns}`;
  }

  /** Runs a program here to its end; see `exec` of process.ts. */
  exec(argv: readonly string[], options: ExecOptions = {}): Promise<Outcome> {
    return exec(["nsenter", `--net=${this.path}`, "--", ...argv], options);
  }

  /** Starts a program here. It ends with the lab at the latest. */
  spawn(argv: readonly string[], options: RunOptions = {}): Process {
    return this.lab.keep(new Process(["nsenter", `--net=${this.path}`, "--", ...argv], options));
  }

  /** `ip` with the words of `command`, here; returns what it printed. */
  async ip(command: string): Promise<string> {
    return (await exec(["ip", "-n", this.netns, ...words(command)])).stdout;
  }

  /** Several `ip` commands at the price of one process; the first that fails ends it. */
  async ipBatch(commands: readonly string[]): Promise<void> {
    await exec(["ip", "-n", this.netns, "-batch", "-"], { input: `${commands.join("\n")}\n` });
  }

  /** `ip -json` with the words of `command`, parsed. */
  async ipJson<T = Record<string, unknown>>(command: string): Promise<T[]> {
    const { stdout } = await exec(["ip", "-n", this.netns, "-details", "-json", ...words(command)]);
    const entries = stdout.trim() === "" ? [] : (JSON.parse(stdout) as T[]);
    // `ip -json` prints an empty object for each entry that its filter left out.
    return entries.filter((entry) => Object.keys(entry as object).length > 0);
  }

  /** Writes sysctls, named as under /proc/sys with dots. */
  async sysctl(values: Readonly<Record<string, string | number>>): Promise<void> {
    const lines = Object.entries(values).map(
      ([key, value]) => `echo ${value} > /proc/sys/${key.replaceAll(".", "/")}`,
    );
    await this.exec(["sh", "-ec", lines.join("\n")]);
  }

  /** MAC of a device, lower case with colons. */
  async mac(device = "eth0"): Promise<string> {
    const [link] = await this.ipJson<{ address: string }>(`link show dev ${device}`);
    if (link === undefined) throw new Error(`${this.name} has no device ${device}`);
    return link.address;
  }

  async counters(device = "eth0"): Promise<DeviceCounters> {
    type Stats = { packets: number; bytes: number; errors: number; dropped: number };
    const [link] = await this.ipJson<{ stats64: { rx: Stats; tx: Stats } }>(
      `-statistics link show dev ${device}`,
    );
    if (link === undefined) throw new Error(`${this.name} has no device ${device}`);
    const { rx, tx } = link.stats64;
    return {
      rxPackets: rx.packets,
      rxBytes: rx.bytes,
      rxErrors: rx.errors,
      rxDropped: rx.dropped,
      txPackets: tx.packets,
      txBytes: tx.bytes,
      txErrors: tx.errors,
      txDropped: tx.dropped,
    };
  }

  /** Segmentation and aggregation offloads of a device, as a NIC without them would have it when `on` is false. */
  async offloads(on: boolean, device = "eth0"): Promise<void> {
    const state = on ? "on" : "off";
    await this.exec([
      "ethtool",
      "-K",
      device,
      ...["tso", "gso", "gro", "tx", "rx"].flatMap((name) => [name, state]),
    ]);
  }

  /**
   * Waits until `check` holds, looking again after each change of the given kinds that the kernel announces
   * here.
   */
  async until<T>(
    what: string,
    check: () => Promise<T | undefined | false> | T | undefined | false,
    options: { timeout?: number; objects?: readonly ("link" | "address" | "route" | "neigh")[] } = {},
  ): Promise<T> {
    const monitor = this.spawn([
      "ip",
      "monitor",
      ...(options.objects ?? ["link", "address", "route", "neigh"]),
    ]);
    try {
      // The monitor says nothing when it has subscribed; the kernel's list of sockets shows it.
      await until(`ip monitor in ${this.name} to listen`, async () => {
        const { stdout } = await this.exec(["cat", "/proc/net/netlink"]);
        return stdout.split("\n").some((line) => {
          const [, protocol, port, groups] = line.trim().split(/\s+/);
          return protocol === "0" && port === String(monitor.pid) && groups !== "00000000";
        });
      });
      const timeout = options.timeout === undefined ? {} : { timeout: options.timeout };
      return await until(`${what} (${this.name})`, check, {
        ...timeout,
        wake: (ring) => monitor.onOutput(ring),
      });
    } finally {
      await monitor.stop();
    }
  }

  /** Waits until a device that has its carrier is in use: before that, the kernel drops what is to be sent by it. */
  async inUse(device: string): Promise<void> {
    const check = async () => {
      const [link] = await this.ipJson<{ operstate: string }>(`link show dev ${device}`);
      return link?.operstate === "UP";
    };
    if (!(await check())) await this.until(`${device} to be in use`, check, { objects: ["link"] });
  }

  /** Pings an address, 100 times a second, and reports the loss; a loss does not throw. */
  async ping(address: string, options: PingOptions & { count?: number } = {}): Promise<PingResult> {
    return new Ping(this, address, { count: 5, ...options }).finished();
  }

  /** Starts pinging at 100/s and returns after the first reply. */
  async startPing(address: string, options: PingOptions = {}): Promise<Ping> {
    const ping = new Ping(this, address, options);
    await ping.firstReply();
    return ping;
  }

  /** Starts capturing on a device; resolves once packets are really being taken. */
  capture(device: string, filter = ""): Promise<Capture> {
    return Capture.start(this, device, filter);
  }

  /** Starts a web server that answers with the address it saw the client at, and remembers it. */
  httpServer(options: { port?: number; program?: "node" | "nginx" } = {}): Promise<HttpServer> {
    return HttpServer.start(this, options);
  }

  /** Body of a GET request; throws unless the answer is 2xx. */
  async httpGet(url: string, options: { timeout?: number; source?: string } = {}): Promise<string> {
    const seconds = String((options.timeout ?? 5000) / 1000);
    const source = options.source === undefined ? [] : ["--interface", options.source];
    const { stdout } = await this.exec([
      "curl",
      "-gsSf",
      "--noproxy",
      "*",
      "--max-time",
      seconds,
      ...source,
      url,
    ]);
    return stdout;
  }

  /** Asks a URL until it answers with this status. */
  httpStatus(url: string, status: number, options: { timeout?: number } = {}): Promise<true> {
    const request = [
      "curl",
      "-gs",
      "--noproxy",
      "*",
      "--max-time",
      "2",
      "-o",
      "/dev/null",
      "-w",
      "%{http_code}",
      url,
    ];
    const check = async () => (await this.exec(request, { check: false })).stdout === String(status);
    return until(`${url} to answer ${status}`, check, options) as Promise<true>;
  }
}

export interface HostOptions {
  /** Address of eth0 with its prefix length. Hosts of the same network share a switch. */
  readonly address: string;
  /**
   * Next hop of the default route, whether or not anybody has that address; default: the first address of the
   * network. Undefined for a host without a default route.
   */
  readonly gateway?: string | undefined;
  readonly mtu?: number;
}

export interface PodOptions {
  readonly mtu?: number;
  /** Which of the host's bridges; default: the last one made. */
  readonly bridge?: Bridge;
  /** Default: the bridge's address. */
  readonly gateway?: string;
}

export interface Bridge {
  readonly name: string;
  /** Its address without the prefix length: the gateway of its pods. */
  readonly address: string;
}

/** A machine of the lab. */
export class Host extends Namespace {
  /** Address of eth0, without the prefix length. */
  readonly address: string;
  /** A directory of this host, for subnet.env and the like. */
  readonly directory: string;
  /** Where this host's agent may pin; the directory does not exist yet. */
  readonly pinPath: string;
  #bridge: Bridge | undefined;

  constructor(lab: Lab, name: string, address: string) {
    super(lab, name);
    this.address = address;
    this.directory = join(runDirectory, lab.id, name);
    this.pinPath = `/sys/fs/bpf/twill-${runId}/${lab.id}-${name}`;
  }

  /** Makes a bridge with an address, such as `docker0` with `172.7.21.1/24`. Like Docker's, its MAC stays as it is. */
  async bridge(name: string, address: string, options: { mtu?: number } = {}): Promise<Bridge> {
    const [ip] = split(address);
    const mac = ["02", "42", ...ip.split(".").map((byte) => Number(byte).toString(16).padStart(2, "0"))].join(
      ":",
    );
    await this.ipBatch([
      `link add ${name} address ${mac} type bridge`,
      ...(options.mtu === undefined ? [] : [`link set ${name} mtu ${options.mtu}`]),
      `address add ${address} dev ${name}`,
      `link set ${name} up`,
    ]);
    this.#bridge = { name, address: ip };
    return this.#bridge;
  }

  /** Makes a pod with `eth0` in a bridge of this host. Its other end here is named `veth<name>`. */
  async pod(name: string, address: string, options: PodOptions = {}): Promise<Pod> {
    const bridge = options.bridge ?? this.#bridge;
    if (bridge === undefined)
      throw new Error(`${this.name} has no bridge for pod ${name}: make one with bridge()`);
    const pod = new Pod(this, name, address);
    await this.lab.addNamespace(pod);
    const mtu = options.mtu === undefined ? "" : `mtu ${options.mtu} `;
    await this.ipBatch([
      `link add ${pod.port} ${mtu}type veth peer name eth0 ${mtu}netns ${pod.netns}`,
      `link set ${pod.port} master ${bridge.name} up`,
    ]);
    await pod.ipBatch([
      `address add ${address} dev eth0`,
      "link set eth0 up",
      `route add default via ${options.gateway ?? bridge.address}`,
    ]);
    await Promise.all([pod.inUse("eth0"), this.inUse(bridge.name)]);
    return pod;
  }

  /**
   * Makes a pod at the end of a veth that is in no bridge; the host has a /32 route to it. `style` says how the
   * pod finds its gateway: `calico` asks for 169.254.1.1 and gets proxy ARP, `ptp` has the gateway's address on
   * the host's end (`gateway`, needed for this style).
   */
  async pointToPointPod(
    name: string,
    address: string,
    options: { mtu?: number; style?: "calico" | "ptp"; gateway?: string } = {},
  ): Promise<Pod> {
    const pod = new Pod(this, name, address);
    await this.lab.addNamespace(pod);
    const mtu = options.mtu === undefined ? "" : `mtu ${options.mtu} `;
    await this.ip(`link add ${pod.port} ${mtu}type veth peer name eth0 ${mtu}netns ${pod.netns}`);
    await this.ip(`link set ${pod.port} up`);
    await pod.ip("link set eth0 up");
    if ((options.style ?? "calico") === "calico") {
      await this.sysctl({
        [`net.ipv4.conf.${pod.port}.proxy_arp`]: 1,
        [`net.ipv4.neigh.${pod.port}.proxy_delay`]: 0,
      });
      await pod.ipBatch([
        `address add ${pod.address}/32 dev eth0`,
        "route add 169.254.1.1 dev eth0 scope link",
        "route add default via 169.254.1.1 dev eth0",
      ]);
      await this.ip(`route add ${pod.address}/32 dev ${pod.port} scope link`);
    } else {
      const { gateway } = options;
      if (gateway === undefined) throw new Error(`pod ${name}: the style ptp needs the gateway's address`);
      await pod.ipBatch([
        `address add ${pod.address}/32 dev eth0`,
        `route add ${gateway} dev eth0 scope link`,
        `route add default via ${gateway} dev eth0`,
      ]);
      await this.ip(`address add ${gateway}/32 dev ${pod.port}`);
      await this.ip(`route add ${pod.address}/32 dev ${pod.port} scope host`);
    }
    return pod;
  }

  /** Pulls the plug of eth0 at the switch, or puts it back. */
  async plug(connected: boolean): Promise<void> {
    await this.lab.switch.ip(`link set ${this.name} ${connected ? "up" : "down"}`);
  }
}

/** A pod of the lab. Its name in the lab is `<host>-<pod>`. */
export class Pod extends Namespace {
  readonly host: Host;
  /** Address of eth0, without the prefix length. */
  readonly address: string;
  /** Name of the host's end of the veth. */
  readonly port: string;

  constructor(host: Host, name: string, address: string) {
    super(host.lab, `${host.name}-${name}`);
    this.host = host;
    this.address = split(address)[0];
    this.port = `veth${name}`;
    if (this.port.length > 15)
      throw new Error(`pod ${name}: at most 11 characters, as ${this.port} names its veth`);
  }

  /** Removes the pod, its veth with it. */
  remove(): Promise<void> {
    return this.lab.removeNamespace(this);
  }
}

export interface LabOptions {
  /** Part of all names; default: unique in the run. */
  readonly id?: string;
  /** `net.ipv4.conf.*.rp_filter` in every namespace: 0 off (default), 1 strict, 2 loose. */
  readonly rpFilter?: 0 | 1 | 2;
  /** IPv6 in every namespace; off by default, which keeps captures free of neighbour discovery. */
  readonly ipv6?: boolean;
}

/** A set of hosts and networks that comes and goes as one. Make it with `createLab`. */
export class Lab {
  readonly id: string;
  /** What the names of all its namespaces begin with. */
  readonly prefix: string;
  readonly switch: Namespace;
  readonly #options: LabOptions;
  readonly #networks = new Map<string, string>();
  readonly #namespaces: Namespace[] = [];
  readonly #processes = new Set<Process>();
  readonly #hosts: Host[] = [];

  constructor(options: LabOptions) {
    this.id = options.id ?? `${process.pid.toString(36)}${(made++).toString(36)}`;
    this.prefix = `twl${runId}-${this.id}-`;
    this.#options = options;
    this.switch = new Namespace(this, "switch");
  }

  /** Adds a machine with `eth0`. Forwarding is on, as flanneld expects of its host. */
  async host(name: string, options: HostOptions): Promise<Host> {
    const host = await this.#emptyHost(name, options.address);
    await this.#plugIn(host, "eth0", name, options.address, options.mtu);
    const gateway = "gateway" in options ? options.gateway : firstAddress(options.address);
    if (gateway !== undefined && gateway !== host.address) await host.ip(`route add default via ${gateway}`);
    return host;
  }

  /**
   * Adds two machines with a cable between them instead of the switch: no bridge is on the way whose cost would
   * be measured too.
   */
  async cabled(
    left: { name: string; address: string },
    right: { name: string; address: string },
  ): Promise<[Host, Host]> {
    const a = await this.#emptyHost(left.name, left.address);
    const b = await this.#emptyHost(right.name, right.address);
    await a.ip(`link add eth0 type veth peer name eth0 netns ${b.netns}`);
    for (const [host, { address }] of [[a, left] as const, [b, right] as const]) {
      await host.ipBatch([
        `address add ${address} dev eth0`,
        "link set eth0 up",
        `route add default via ${firstAddress(address)}`,
      ]);
    }
    return [a, b];
  }

  /** Adds a router with one interface for each address: `eth0`, `eth1` and so on. */
  async router(name: string, addresses: readonly string[]): Promise<Namespace> {
    const router = new Namespace(this, name);
    await this.addNamespace(router);
    await router.sysctl({ "net.ipv4.ip_forward": 1 });
    for (const [index, address] of addresses.entries()) {
      await this.#plugIn(router, `eth${index}`, `${name}.${index}`, address, undefined);
    }
    return router;
  }

  /** Starts an etcd of the lab's own on a host of its own; see `EtcdOptions`. */
  async etcd(options: EtcdOptions): Promise<Etcd> {
    const [first, ...others] = options.addresses;
    if (first === undefined) throw new Error("etcd needs at least one address");
    const host = await this.host("etcd", { address: first });
    for (const address of others) await host.ip(`address add ${address} dev eth0`);
    return Etcd.start(host, options);
  }

  /** Starts an etcd of one member, in plain HTTP, on a host that is there already. */
  etcdOn(host: Host): Promise<Etcd> {
    return Etcd.start(host, { addresses: [host.address] });
  }

  /** Ends with the lab. */
  keep(child: Process): Process {
    this.#processes.add(child);
    const forget = () => this.#processes.delete(child);
    child.exited.then(forget, forget);
    return child;
  }

  /** Makes the namespace itself, with loopback up. */
  async addNamespace(namespace: Namespace): Promise<void> {
    await exec(["ip", "netns", "add", namespace.netns]);
    this.#namespaces.push(namespace);
    const rpFilter = this.#options.rpFilter ?? 0;
    const noIpv6 = this.#options.ipv6 === true ? 0 : 1;
    await namespace.sysctl({
      "net.ipv4.conf.all.rp_filter": rpFilter,
      "net.ipv4.conf.default.rp_filter": rpFilter,
      "net.ipv4.conf.lo.rp_filter": rpFilter,
      "net.ipv6.conf.all.disable_ipv6": noIpv6,
      "net.ipv6.conf.default.disable_ipv6": noIpv6,
      // Tests may ask for an ICMP error sooner than the one a second that a host has for another by default.
      "net.ipv4.icmp_ratelimit": 0,
    });
    await namespace.ip("link set lo up");
  }

  async removeNamespace(namespace: Namespace): Promise<void> {
    const index = this.#namespaces.indexOf(namespace);
    if (index < 0) return;
    await exec(["ip", "netns", "delete", namespace.netns]);
    this.#namespaces.splice(index, 1);
  }

  /** Ends all processes and removes all namespaces, pins and files. */
  async close(): Promise<void> {
    await Promise.all([...this.#processes].map((child) => child.stop().catch(() => undefined)));
    for (const namespace of [...this.#namespaces].reverse()) await this.removeNamespace(namespace);
    for (const host of this.#hosts) {
      rmSync(host.pinPath, { recursive: true, force: true });
      removeRundir(host.pinPath);
    }
    const pins = `/sys/fs/bpf/twill-${runId}`;
    if (existsSync(pins) && readdirSync(pins).length === 0) rmdirSync(pins);
    rmSync(join(runDirectory, this.id), { recursive: true, force: true });
    labs.delete(this);
    if (labs.size === 0) tidy();
  }

  async #emptyHost(name: string, address: string): Promise<Host> {
    const host = new Host(this, name, split(address)[0]);
    await this.addNamespace(host);
    this.#hosts.push(host);
    mkdirSync(host.directory, { recursive: true });
    await host.sysctl({ "net.ipv4.ip_forward": 1 });
    return host;
  }

  async #plugIn(
    to: Namespace,
    device: string,
    port: string,
    address: string,
    mtu: number | undefined,
  ): Promise<void> {
    const network = `${networkOf(address)}/${split(address)[1]}`;
    let bridge = this.#networks.get(network);
    if (bridge === undefined) {
      bridge = `net${this.#networks.size}`;
      this.#networks.set(network, bridge);
      await this.switch.ipBatch([`link add ${bridge} type bridge`, `link set ${bridge} up`]);
      // A switch has no netfilter. The setting exists only where the kernel has br_netfilter.
      const setting = "/proc/sys/net/bridge/bridge-nf-call-iptables";
      await this.switch.exec(["sh", "-c", `[ ! -e ${setting} ] || echo 0 > ${setting}`]);
    }
    const size = mtu === undefined ? "" : `mtu ${mtu} `;
    await this.switch.ipBatch([
      `link add ${port} ${size}type veth peer name ${device} ${size}netns ${to.netns}`,
      `link set ${port} master ${bridge} up`,
    ]);
    await to.ipBatch([`address add ${address} dev ${device}`, `link set ${device} up`]);
  }
}

const labs = new Set<Lab>();
let made = 0;

/** Makes an empty lab: a switch without hosts. Whoever makes one closes it. */
export async function createLab(options: LabOptions = {}): Promise<Lab> {
  const lab = new Lab(options);
  labs.add(lab);
  try {
    await lab.addNamespace(lab.switch);
  } catch (error) {
    await lab.close();
    const hint = "the lab needs root and Debian's iproute2 and util-linux";
    throw new Error(
      `cannot make a network namespace (${hint}): ${error instanceof Error ? error.message : error}`,
    );
  }
  return lab;
}

function words(command: string): string[] {
  return command.trim().split(/\s+/);
}

function split(address: string): [ip: string, length: string] {
  const [ip, length] = address.split("/");
  return [ip ?? address, length ?? "32"];
}

/** The network an address with prefix length lies in, as a number of that length. */
function networkOf(address: string): number {
  const [ip, length] = split(address);
  const number = ip.split(".").reduce((sum, byte) => sum * 256 + Number(byte), 0);
  return Math.floor(number / 2 ** (32 - Number(length)));
}

function firstAddress(address: string): string {
  const length = Number(split(address)[1]);
  const number = networkOf(address) * 2 ** (32 - length) + 1;
  return [24, 16, 8, 0].map((shift) => Math.floor(number / 2 ** shift) % 256).join(".");
}
