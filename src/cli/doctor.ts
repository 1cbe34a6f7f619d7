/**
 * `twill doctor`: what is wrong with this host, what it means, and how it is mended. This file gathers the facts;
 * what they come to is src/core/doctor.ts. Nothing of it needs the daemon, and nothing waits longer than `--timeout`.
 */
import { existsSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { Command, Option } from "commander";
import { kindOf } from "../core/backends.ts";
import {
  type DataplaneFacts,
  diagnose,
  type EndpointFacts,
  type EtcdFacts,
  type Fact,
  type Facts,
  type Finding,
  type LeaseFacts,
  type Noted,
  type PeerAnswer,
  type Report,
  type StoredLease,
} from "../core/doctor.ts";
import type { SubnetRow } from "../core/image.ts";
import { type Ipv4, parseCidr, parseIpv4 } from "../core/ipv4.ts";
import { decodeLease, formatLeaseKey } from "../core/lease.ts";
import { type Greeting, greet, readCertificates } from "../edge/certificate.ts";
import {
  checkPins,
  findAttachments,
  findBpffs,
  findForeign,
  mapUse,
  missingFeatures,
  readConfig,
  readRows,
} from "../edge/dataplane.ts";
import { openStore, type Store } from "../edge/etcd.ts";
import { readFirewall } from "../edge/firewall.ts";
import { RESERVED_PORTS, readSysctl } from "../edge/host.ts";
import { openProber } from "../edge/probe.ts";
import { daemonsBeside, isStopped, processesNamed, runningDaemon, statusWrittenAt } from "../edge/rundir.ts";
import { type EtcdSettings, parseFlags, UsageError } from "../flags.ts";
import { type DaemonStatus, readDaemon, withNetlink } from "./common.ts";
import { printable, type Screen, toned } from "./table.ts";
import { showing, type ViewOptions } from "./view.ts";

const ROOT = join(dirname(fileURLToPath(import.meta.url)), "..", "..", "..");
/** Those that are full when nothing more fits: others forget the oldest. */
const MAPS = ["subnets4", "peers4", "endpoints4", "interfaces", "connections4"] as const;
const FLANNELD_PREFIX = "FLANNEL-";
const PEERS_MAX = 1024;
const PROBES = 3;
const ROUND_TRIPS = 3;
/** The flags of twilld that say how to reach etcd, and where its note has them. */
const ETCD_FLAGS = {
  "etcd-endpoints": ({ endpoints }: Etcd) => endpoints.join(","),
  "etcd-prefix": ({ prefix }: Etcd) => prefix,
  "etcd-keyfile": ({ keyFile }: Etcd) => keyFile,
  "etcd-certfile": ({ certFile }: Etcd) => certFile,
  "etcd-cafile": ({ caFile }: Etcd) => caFile,
  "etcd-username": ({ username }: Etcd) => username,
  "etcd-password": () => undefined,
} as const;
type Etcd = DaemonStatus["etcd"];

interface Options extends ViewOptions {
  readonly verbose?: true;
  readonly strict?: true;
  /** Seconds. */
  readonly timeout: number;
  /** By the flags' names in commander's spelling. */
  readonly [flag: string]: unknown;
}

/** What `--json` prints: the report, and what it comes to. */
interface Document extends Report {
  readonly problems: number;
  readonly warnings: number;
  /** Warnings count for the exit code, too. */
  readonly strict: boolean;
}

export function command(): Command {
  const made = new Command("doctor")
    .description(
      "Checks this host, and says of each thing that is wrong what it means and what mends it. Works without the daemon.",
    )
    .option("-v, --verbose", "list what is sound as well")
    .option("--strict", "exit with 1 for warnings, too")
    .addOption(
      new Option("--timeout <seconds>", "how long to wait for etcd and for peers")
        .default(3)
        .argParser((text) => {
          const value = Number(text);
          if (value > 0 && value <= 60) return value;
          return made.error(`error: --timeout is a number of seconds up to 60, which "${text}" is not`);
        }),
    );
  for (const name of Object.keys(ETCD_FLAGS)) {
    made.addOption(new Option(`--${name} <value>`, "as twilld's; without it, what the daemon noted"));
  }
  return showing<Options, Document>(made, {
    gather: async (options) => {
      const report = diagnose(await gather(options, (problem) => made.error(`error: ${problem}`)));
      const count = (severity: Finding["severity"]): number =>
        report.findings.filter((finding) => finding.severity === severity).length;
      return {
        problems: count("problem"),
        warnings: count("warning"),
        strict: options.strict === true,
        ...report,
      };
    },
    render: (document, screen, { verbose }) => render(document, screen, verbose === true),
    exitCode: ({ problems, warnings, strict }) => (problems > 0 || (strict && warnings > 0) ? 1 : 0),
  });
}

// Which parts of Node a package uses is nothing that who asks for a diagnosis could change.
(process as { noDeprecation?: boolean }).noDeprecation = true;

// --- Gathering

async function gather(options: Options, refuse: (problem: string) => never): Promise<Facts> {
  const { pinPath } = options;
  const withinMs = options.timeout * 1000;
  const noted = fact(() => readNoted(pinPath));
  const status = "value" in noted ? noted.value : undefined;
  const settings = etcdSettings(options, status, refuse);
  const dataplane = fact(() => gatherDataplane(pinPath));
  const subnets = "value" in dataplane ? dataplane.value.subnets : [];
  const firewall = await attempt(() => readFirewall(FLANNELD_PREFIX));
  const certificates = (path: string | undefined) =>
    fact(() => ({ path: path ?? "", certificates: path === undefined ? [] : readCertificates(path) }));
  const now = Date.now();
  const synchronous = {
    now,
    version: (JSON.parse(readFileSync(join(ROOT, "package.json"), "utf8")) as { version: string }).version,
    kernel: fact(() => ({ missing: missingFeatures() })),
    btf: fact(() => existsSync("/sys/kernel/btf/vmlinux")),
    bpffs: fact(() => findBpffs(pinPath)),
    noted,
    daemon: fact(() => {
      const pid = runningDaemon(pinPath);
      const stopped = pid !== undefined && isStopped(pid);
      return { pinPath, pid, stopped, writtenAt: statusWrittenAt(pinPath) };
    }),
    devicesBeside: fact(() =>
      daemonsBeside(pinPath).flatMap((text) => (JSON.parse(text) as { device?: string }).device ?? []),
    ),
    pins: fact(() => checkPins(pinPath)),
    dataplane,
    host: fact(() => gatherHost(subnets)),
    sysctls: fact(gatherSysctls),
    subnetFile: fact(() => {
      const path = status?.subnetFile;
      return path !== undefined && existsSync(path) ? readFileSync(path, "utf8") : undefined;
    }),
    flanneld: fact(() => {
      const processes = processesNamed("flanneld");
      if ("unknown" in firewall) return { processes, chains: [], tables: [] };
      const { named: chains, tables } = firewall.value;
      return { processes, chains, tables };
    }),
    firewall: "value" in firewall ? { value: firewall.value.rules } : firewall,
    clientCertificates: certificates(settings?.certFile),
    authorities: certificates(settings?.caFile),
  };
  // The network last, and all of it at once: nothing of ours is in the way of the answers then.
  const [etcd, leases, peers] = await Promise.all([
    settings === undefined ? NO_ETCD : attempt(() => gatherEtcd(settings, withinMs)),
    settings === undefined ? NO_ETCD : attempt(() => gatherLeases(settings, status?.subnet, withinMs)),
    attempt(() => askPeers(status, dataplane, withinMs)),
  ]);
  return { ...synchronous, etcd, leases, peers };
}

const NO_ETCD = {
  unknown: "no endpoints of etcd are known: give --etcd-endpoints, and its certificates as to twilld",
};

function fact<T>(gather: () => T): Fact<T> {
  try {
    return { value: gather() };
  } catch (error) {
    return { unknown: messageOf(error) };
  }
}

async function attempt<T>(gather: () => Promise<T>): Promise<Fact<T>> {
  try {
    return { value: await gather() };
  } catch (error) {
    return { unknown: messageOf(error) };
  }
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

function readNoted(pinPath: string): Noted & Pick<DaemonStatus, "etcd"> {
  const status = readDaemon(pinPath) as (Noted & DaemonStatus) | undefined;
  if (status === undefined) throw new Error(`no twilld has run with --pin-path=${pinPath}`);
  // Throws for a backend that this version does not know.
  if (status.network !== undefined && kindOf(status.network.backend) === undefined)
    throw new Error(`the backend ${status.network.backend.type} is not known`);
  return status;
}

/** The flags win over the environment, and that over what the daemon noted; undefined if none of them says anything. */
function etcdSettings(
  options: Options,
  status: { readonly etcd?: Etcd } | undefined,
  refuse: (problem: string) => never,
): EtcdSettings | undefined {
  const argv: string[] = [];
  for (const [name, read] of Object.entries(ETCD_FLAGS)) {
    const given = options[name.replace(/-(.)/g, (_, letter: string) => letter.toUpperCase())];
    const set = process.env[`FLANNELD_${name.toUpperCase().replaceAll("-", "_")}`] || undefined;
    const value = given ?? set ?? (status?.etcd === undefined ? undefined : read(status.etcd));
    if (typeof value === "string") argv.push(`--${name}=${value}`);
  }
  if (argv.length === 0) return undefined;
  try {
    const invocation = parseFlags(argv, {});
    return invocation.kind === "run" ? invocation.settings.etcd : undefined;
  } catch (error) {
    if (error instanceof UsageError) return refuse(error.message);
    throw error;
  }
}

function gatherDataplane(pinPath: string): DataplaneFacts {
  const config = readConfig(pinPath);
  if (config === undefined) throw new Error(`no programs are pinned at ${pinPath}`);
  const links = withNetlink((netlink) => netlink.links());
  const attachments = findAttachments(
    pinPath,
    links.map(({ index }) => index),
  );
  return {
    attachments,
    foreign: findForeign(attachments).map(({ ifindex, ...program }) => ({
      ...program,
      interface: links.find(({ index }) => index === ifindex)?.name ?? `#${ifindex}`,
    })),
    tables: MAPS.map((map) => ({ map, ...mapUse(pinPath, map) })),
    subnets: readRows(pinPath, "subnets4"),
    interfaces: readRows(pinPath, "interfaces"),
    masqPorts:
      config.masquerade === 0 ? undefined : { first: config.masq_port_min, last: config.masq_port_max },
  };
}

function gatherHost(subnets: readonly SubnetRow[]): Extract<Facts["host"], { value: unknown }>["value"] {
  return withNetlink((netlink) => {
    const links = netlink.links();
    const wanted = new Set(subnets.flatMap(({ publicIp, subnet }) => [publicIp, subnet]));
    const ways = [...wanted].map((address) => {
      const route = netlink.routeTo(address);
      const link = links.find(({ index }) => index === route?.outIndex);
      const mtu = link === undefined ? undefined : Math.min(route?.mtu ?? link.mtu, link.mtu);
      return { address, outIndex: route?.outIndex, mtu };
    });
    return { links, addresses: netlink.addresses(), routes: netlink.routes(), ways };
  });
}

function gatherSysctls(): Extract<Facts["sysctls"], { value: unknown }>["value"] {
  const names = withNetlink((netlink) => netlink.links()).map(({ name }) => name);
  const conf = (name: string, setting: string) => readSysctl(["ipv4", "conf", name, setting]);
  return {
    ipForward: readSysctl(["ipv4", "ip_forward"]),
    rpFilterAll: conf("all", "rp_filter"),
    byInterface: Object.fromEntries(
      names.map((name) => [
        name,
        { forwarding: conf(name, "forwarding"), rpFilter: conf(name, "rp_filter") },
      ]),
    ),
    reservedPorts: readSysctl(RESERVED_PORTS),
  };
}

async function gatherEtcd(settings: EtcdSettings, withinMs: number): Promise<EtcdFacts> {
  return {
    prefix: settings.prefix,
    endpoints: await Promise.all(
      settings.endpoints.map((endpoint) => askEndpoint(settings, endpoint, withinMs)),
    ),
  };
}

/** One endpoint, asked as the daemon asks it; and for its clock and certificate, whether or not that succeeds. */
async function askEndpoint(
  settings: EtcdSettings,
  endpoint: string,
  withinMs: number,
): Promise<EndpointFacts> {
  const [answer, greeting] = await Promise.all([
    attempt(() =>
      withStore({ ...settings, endpoints: [endpoint] }, withinMs, async (store) => {
        // The first call makes the connection.
        await store.get("config");
        let best = Number.POSITIVE_INFINITY;
        for (let turn = 0; turn < ROUND_TRIPS; turn++) {
          const begun = performance.now();
          await store.get("config");
          best = Math.min(best, performance.now() - begun);
        }
        return best;
      }),
    ),
    greet(endpoint, settings, withinMs).catch((): Greeting => ({ skewMs: undefined, certificates: [] })),
  ]);
  return {
    endpoint,
    ...("value" in answer
      ? { latencyMs: answer.value, error: undefined }
      : { latencyMs: undefined, error: answer.unknown }),
    ...greeting,
  };
}

async function gatherLeases(
  settings: EtcdSettings,
  subnet: string | undefined,
  withinMs: number,
): Promise<LeaseFacts> {
  return withStore(settings, withinMs, async (store) => {
    const { records } = await store.list("subnets/");
    const leases = records.flatMap(({ key, value, revision }): StoredLease[] => {
      const lease = decodeLease(key.replace(/^subnets\//, ""), value);
      // Those that cannot be read are in the daemon's own list.
      return "reason" in lease ? [] : [{ ...lease, revision }];
    });
    const prefix = subnet === undefined ? undefined : parseCidr(subnet);
    const ownKey = prefix === undefined ? undefined : `subnets/${formatLeaseKey(prefix)}`;
    const own = records.find(({ key }) => key === ownKey);
    return { leases, ownLeftSeconds: own === undefined ? undefined : await store.timeToLive(own.leaseId) };
  });
}

/** A connection to etcd for as long as `body` takes, and no longer than `withinMs`. */
async function withStore<T>(
  settings: EtcdSettings,
  withinMs: number,
  body: (store: Store) => Promise<T>,
): Promise<T> {
  const silent = { debug: () => undefined, warn: () => undefined };
  const store = await openStore({ ...settings, log: silent });
  let timer: NodeJS.Timeout | undefined;
  try {
    const late = new Promise<never>((_, reject) => {
      const where = settings.endpoints.join(", ");
      const problem = `etcd at ${where} gave no answer within ${withinMs / 1000} s: check the path to it and its health`;
      timer = setTimeout(() => reject(new Error(problem)), withinMs);
    });
    const answer = body(store);
    answer.catch(() => undefined);
    return await Promise.race([answer, late]);
  } finally {
    clearTimeout(timer);
    store.close();
  }
}

/** Whether peers answer: by the tunnel, or where there is none, at their public addresses. */
async function askPeers(
  status: Noted | undefined,
  dataplane: Fact<DataplaneFacts>,
  withinMs: number,
): Promise<readonly PeerAnswer[]> {
  if (status?.network === undefined || status.uplink === undefined || status.subnet === undefined)
    throw new Error("this node has no subnet yet");
  if ("unknown" in dataplane) throw new Error(dataplane.unknown);
  const { subnets } = dataplane.value;
  if (subnets.length === 0) return [];
  const hasDevice = status.device !== undefined;
  const source = hasDevice ? parseCidr(status.subnet)?.address : parseIpv4(status.uplink.address);
  if (source === undefined) throw new Error("this node's own address is not known");
  // Of very many, some that are spread over all.
  const step = Math.ceil(subnets.length / PEERS_MAX);
  const asked = subnets.filter((_, index) => index % step === 0);
  const prober = openProber(source);
  // Its questions are no reason for a process to go on; ours are.
  const alive = setInterval(() => undefined, withinMs);
  try {
    return await Promise.all(
      asked.map(async (row) => {
        const target: Ipv4 = hasDevice ? row.subnet : row.publicIp;
        let lost: string | undefined;
        // One packet may be lost for no reason.
        for (let turn = 0; turn < PROBES; turn++) {
          const answer = await prober.probe(target, withinMs / PROBES);
          lost = "lost" in answer ? answer.lost : undefined;
          if (lost === undefined) break;
        }
        const subnet = { address: row.subnet, length: row.prefixLength };
        return { subnet, publicIp: row.publicIp, lost };
      }),
    );
  } finally {
    clearInterval(alive);
    prober.close();
  }
}

// --- Showing

function render(document: Document, screen: Screen, verbose: boolean): string {
  const { findings, unchecked, sound, problems, warnings } = document;
  const parts = findings.map((finding) => describe(finding, screen));
  const reasons = new Map<string, string[]>();
  for (const { id, reason } of unchecked) reasons.set(reason, [...(reasons.get(reason) ?? []), id]);
  for (const [reason, ids] of reasons) {
    parts.push(`not checked: ${ids.join(", ")}\n  because  ${printable(reason)}\n`);
  }
  if (verbose) parts.push(sound.map(({ id, what }) => `ok  ${id}: ${what}\n`).join(""));
  const rest = unchecked.length === 0 ? "" : `, ${unchecked.length} could not be carried out`;
  parts.push(
    `${counted(problems, "problem")}, ${counted(warnings, "warning")}; ${counted(sound.length, "check")} found nothing${rest}\n`,
  );
  return parts.filter((part) => part !== "").join("\n");
}

function counted(count: number, what: string): string {
  return `${count} ${what}${count === 1 ? "" : "s"}`;
}

function describe(
  { id, severity, text, meaning, commands, advice, follows }: Finding,
  screen: Screen,
): string {
  const mend = [...commands.map((line) => `# ${line}`), ...(advice === "" ? [] : [advice])];
  const lines = [
    `${toned(severity, severity === "problem" ? "bad" : "notice", screen)}  ${id}: ${printable(text)}`,
    `  means  ${printable(meaning)}`,
    ...mend.map((line, index) => `  ${index === 0 ? "mend " : "     "}  ${printable(line)}`),
    ...(follows.length === 0 ? [] : [`  cause  perhaps ${follows.join(", ")}`]),
  ];
  return `${lines.join("\n")}\n`;
}
