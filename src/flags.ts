/**
 * twilld's command line: every flag flanneld has for etcd, with its name, default and meaning, plus our own.
 * flanneld parses with Go's flag package, so command lines in use say `-iface=eth0`, `--iface eth0`, `--ip-masq`
 * and `--ip-masq=false`, and any flag may come from the environment as FLANNELD_IP_MASQ. The text is first brought
 * into one form, `--name=value`, and commander then does the rest: left to itself it would refuse one dash, refuse
 * `=false`, and take the environment's "false" for true. Each flag is one row of the table below; its reader
 * turns text into a value or says what is allowed. Flags that mean nothing here are accepted, with a note.
 */
import { posix } from "node:path";
import { Command, CommanderError, Option } from "commander";
import { type Ipv4, type Prefix, parseCidr, parseIpv4 } from "./core/ipv4.ts";

export type AttachMode = "auto" | "tcx" | "clsact";
export type FastPath = "auto" | "always" | "off";
export type LogFormat = "text" | "json";
export type LogLevel = "info" | "debug" | "trace";

/** How to reach etcd. */
export interface EtcdSettings {
  /** URLs, all http or all https. */
  readonly endpoints: readonly string[];
  /** Absolute, without a trailing slash; the config is at `${prefix}/config`. */
  readonly prefix: string;
  readonly keyFile: string | undefined;
  readonly certFile: string | undefined;
  readonly caFile: string | undefined;
  readonly username: string | undefined;
  readonly password: string | undefined;
}

/** What the command line and the environment ask for, every default filled in. */
export interface Settings {
  readonly etcd: EtcdSettings;
  /** Names or addresses of interfaces, in the order they are to be tried. */
  readonly interfaces: readonly string[];
  readonly interfacePatterns: readonly RegExp[];
  readonly interfaceCanReach: Ipv4 | undefined;
  readonly publicIp: Ipv4 | undefined;
  readonly subnetFile: string;
  /** Minutes before the lease ends at which it is renewed. */
  readonly renewMarginMinutes: number;
  /** How long a lease lives that is not renewed. */
  readonly leaseTtlSeconds: number;
  readonly ipMasq: boolean;
  /** Source ports of masqueraded connections are chosen at random. */
  readonly masqFullyRandom: boolean;
  /** Destinations to which pods keep their address. */
  readonly masqExclude: readonly Prefix[];
  readonly masqPorts: { readonly first: number; readonly last: number };
  readonly masqMaxConnections: number;
  readonly blackholeRoute: boolean;
  /** A changed network config takes effect at once. */
  readonly followConfig: boolean;
  readonly healthzIp: string;
  /** 0 is off. */
  readonly healthzPort: number;
  readonly pinPath: string;
  readonly attach: AttachMode;
  /** Packets reach pods past the policy that Docker gives FORWARD. */
  readonly forwardRules: boolean;
  readonly fastPath: FastPath;
  readonly logFormat: LogFormat;
  readonly logLevel: LogLevel;
  readonly resyncSeconds: number;
  /** How often each peer is asked whether it answers; 0 is never. */
  readonly peerProbeSeconds: number;
  /** Peers that /metrics lists one by one; 0 for none, and then nothing is counted by peer. */
  readonly metricsPeers: number;
  /** For the log: what was given and has no effect, and why. */
  readonly notes: readonly string[];
}

/** What to do. `help` and `version` end the program with exit code 0. */
export type Invocation =
  | { readonly kind: "run"; readonly settings: Settings }
  | { readonly kind: "help"; readonly text: string }
  | { readonly kind: "version" };

/** A command line that can't be obeyed; its message names the flag, the value and what is allowed. Exit code 2. */
export class UsageError extends Error {}

/** Turns a flag's text into its value; throws UsageError with what is allowed, to which the flag is added. */
type Reader<T> = (text: string) => T;

interface Flag<T> {
  readonly name: string;
  readonly read: Reader<T>;
  /** As it would be typed. */
  readonly fallback: string;
  readonly help: string;
  /** Given alone it is true. */
  readonly boolean: boolean;
  readonly repeatable: boolean;
  /** Why giving it changes nothing; such flags are hidden from the help. */
  readonly noEffect: string | undefined;
}

const BOOLEANS: Readonly<Record<string, boolean>> = {
  "1": true,
  t: true,
  true: true,
  "0": false,
  f: false,
  false: false,
};

const text: Reader<string> = (value) => value;

const optional: Reader<string | undefined> = (value) => (value === "" ? undefined : value);

const boolean: Reader<boolean> = (value) => {
  const parsed = BOOLEANS[value.toLowerCase()];
  if (parsed === undefined) throw new UsageError("must be true or false");
  return parsed;
};

function path(value: string): string {
  if (value === "") throw new UsageError("must be a path");
  return value;
}

function integer(min: number, max: number, unit = ""): Reader<number> {
  return (value) => {
    const number = Number(value);
    if (!/^\d+$/.test(value) || number < min || number > max) {
      throw new UsageError(`must be a whole number${unit} from ${min} to ${max}`);
    }
    return number;
  };
}

function oneOf<T extends string>(...choices: T[]): Reader<T> {
  return (value) => {
    const choice = choices.find((candidate) => candidate === value);
    if (choice === undefined) throw new UsageError(`must be one of ${choices.join(", ")}`);
    return choice;
  };
}

const ipv4: Reader<Ipv4 | undefined> = (value) => {
  if (value === "") return undefined;
  const address = parseIpv4(value);
  if (address === undefined) throw new UsageError("must be an IPv4 address such as 10.4.7.21");
  return address;
};

const cidr: Reader<Prefix> = (value) => {
  const prefix = parseCidr(value);
  if (prefix === undefined) throw new UsageError("must be an IPv4 network such as 192.168.0.0/16");
  return prefix;
};

const portRange: Reader<{ first: number; last: number }> = (value) => {
  const [first, last] = /^(\d{1,5})-(\d{1,5})$/.exec(value)?.slice(1).map(Number) ?? [];
  if (first === undefined || last === undefined || first < 1024 || last > 65535 || first > last) {
    throw new UsageError("must be a range of ports from 1024 to 65535 such as 61000-65535");
  }
  return { first, last };
};

/** Go writes flags of a pattern in its text, `(?i)eth`, which JavaScript takes apart from it. */
const pattern: Reader<RegExp> = (value) => {
  const inline = /^\(\?([ims]+)\)/.exec(value);
  if (/\[\[:\^?\w+:\]/.test(value)) {
    throw new UsageError("must not use classes like [[:alpha:]]: write [A-Za-z]");
  }
  try {
    return new RegExp(value.slice(inline?.[0].length ?? 0), inline?.[1] ?? "");
  } catch (error) {
    throw new UsageError(`must be a regular expression: ${(error as Error).message}`);
  }
};

const endpoints: Reader<string[]> = (value) => {
  const urls = value.split(",").flatMap((entry) => entry.trim() || []);
  if (urls.length === 0) throw new UsageError("must name at least one URL such as http://127.0.0.1:2379");
  for (const url of urls) {
    const withScheme = url.includes("://") ? url : `http://${url}`;
    if (!/^https?:\/\//i.test(withScheme) || !URL.canParse(withScheme)) {
      throw new UsageError(`must be a comma list of http or https URLs, which "${url}" is not`);
    }
  }
  return urls;
};

const prefix: Reader<string> = (value) => {
  if (value === "") throw new UsageError("must be a path in etcd such as /coreos.com/network");
  return posix.join(value).replace(/\/+$/, "");
};

const table: Flag<unknown>[] = [];

/** Adds a row and answers how to look its value up among the values read. */
function flag<T>(
  name: string,
  read: Reader<T>,
  fallback: string,
  help: string,
  noEffect?: string,
): (values: Values) => T {
  const isBoolean = (read as unknown) === boolean;
  table.push({ name, read, fallback, help, boolean: isBoolean, repeatable: false, noEffect });
  return (values) => (values.get(name)?.at(-1) ?? read(fallback)) as T;
}

function repeatable<T>(name: string, read: Reader<T>, help: string): (values: Values) => T[] {
  table.push({ name, read, fallback: "", help, boolean: false, repeatable: true, noEffect: undefined });
  return (values) => (values.get(name) ?? []) as T[];
}

/** Values read, in the order given, by flag name; a flag that was not given is absent. */
type Values = ReadonlyMap<string, readonly unknown[]>;

const RENEW_MARGIN = integer(1, 1439, " of minutes");
const NO_KUBE = "it is for flannel's Kubernetes mode, and Twill keeps its leases in etcd";
const NO_IPTABLES = "packets are forwarded without iptables rules";
const NO_KLOG = "it is for flannel's logger";

const flags = {
  endpoints: flag(
    "etcd-endpoints",
    endpoints,
    "http://127.0.0.1:4001,http://127.0.0.1:2379",
    "comma list of etcd URLs",
  ),
  prefix: flag("etcd-prefix", prefix, "/coreos.com/network", "where in etcd the network is"),
  keyFile: flag("etcd-keyfile", optional, "", "client key for etcd, PEM"),
  certFile: flag("etcd-certfile", optional, "", "client certificate for etcd, PEM"),
  caFile: flag("etcd-cafile", optional, "", "certificate authority of etcd, PEM"),
  username: flag("etcd-username", optional, "", "etcd user"),
  password: flag("etcd-password", optional, "", "etcd password"),
  interfaces: repeatable(
    "iface",
    text,
    "interface (name or IP) to other hosts; may be repeated, first found wins",
  ),
  patterns: repeatable(
    "iface-regex",
    pattern,
    "pattern for an IP or name of that interface; tried after --iface",
  ),
  canReach: flag(
    "iface-can-reach",
    ipv4,
    "",
    "use the interface through which this IP is reached; tried last",
  ),
  publicIp: flag("public-ip", ipv4, "", "IP at which other nodes reach this one, if not the interface's"),
  subnetFile: flag("subnet-file", path, "/run/flannel/subnet.env", "file to write the subnet to"),
  renewMargin: flag(
    "subnet-lease-renew-margin",
    RENEW_MARGIN,
    "60",
    "minutes before its end to renew the lease",
  ),
  leaseTtl: flag(
    "lease-ttl",
    integer(5, 31_536_000, " of seconds"),
    "86400",
    "seconds that the lease lives after it was renewed last",
  ),
  ipMasq: flag("ip-masq", boolean, "false", "masquerade traffic that leaves the network"),
  notRandom: flag("ip-masq-fully-random-disable", boolean, "false", "masquerade without random source ports"),
  masqExclude: repeatable("masq-exclude", cidr, "network to which pods keep their address; may be repeated"),
  masqPorts: flag("masq-ports", portRange, "61000-65535", "ports for masqueraded connections"),
  masqMaxConnections: flag(
    "masq-max-connections",
    integer(1024, 16_777_216, " of connections"),
    "262144",
    "masqueraded connections at a time",
  ),
  blackhole: flag("ip-blackhole-route", boolean, "false", "keep a blackhole route for the own subnet"),
  followConfig: flag(
    "follow-config",
    boolean,
    "true",
    "take up a changed network config at once; false: with the next start, as flanneld does",
  ),
  healthzIp: flag("healthz-ip", text, "0.0.0.0", "IP to serve /healthz, /readyz and /metrics on"),
  healthzPort: flag("healthz-port", integer(0, 65535), "0", "port for these, 0 for none"),
  pinPath: flag("pin-path", path, "/sys/fs/bpf/twill", "bpffs directory of our maps and links"),
  attach: flag(
    "attach",
    oneOf("auto", "tcx", "clsact"),
    "auto",
    "how programs are attached: auto, tcx, clsact",
  ),
  forwardRules: flag(
    "iptables-forward-rules",
    boolean,
    "true",
    "let packets reach pods past the DROP policy that Docker gives the chain FORWARD",
  ),
  fastPath: flag(
    "fast-path",
    oneOf("auto", "always", "off"),
    "auto",
    "which flows skip the stack: auto, always, off",
  ),
  logFormat: flag("log-format", oneOf("text", "json"), "text", "text or json"),
  resync: flag(
    "resync",
    integer(1, 3600, " of seconds"),
    "10",
    "seconds between full checks of the kernel's state",
  ),
  peerProbes: flag(
    "peer-probes",
    integer(0, 3600, " of seconds"),
    "10",
    "seconds between two probes of each peer, 0 for none",
  ),
  metricsPeers: flag(
    "metrics-peers",
    integer(0, 10_000, " of peers"),
    "0",
    "peers that /metrics lists one by one, those that do not answer first; their packets are counted then",
  ),
  verbosity: flag("v", integer(0, 100), "0", "log level: 0 info, 1 to 4 debug, 5 and above trace"),
  version: flag("version", boolean, "false", "print the version and exit"),
  kubeSubnetMgr: flag("kube-subnet-mgr", boolean, "false", "", NO_KUBE),
};

for (const [name, read, fallback, why] of [
  ["public-ipv6", text, "", "IPv6 is not forwarded yet"],
  ["iptables-resync", integer(0, 2 ** 31 - 1), "5", NO_IPTABLES],
  ["kube-api-url", text, "", NO_KUBE],
  ["kubeconfig-file", text, "", NO_KUBE],
  ["kube-annotation-prefix", text, "flannel.alpha.coreos.com", NO_KUBE],
  ["net-config-path", text, "/etc/kube-flannel/net-conf.json", NO_KUBE],
  ["set-node-network-unavailable", boolean, "true", NO_KUBE],
  ["vmodule", text, "", NO_KLOG],
  ["log_backtrace_at", text, "", NO_KLOG],
] as const) {
  flag<unknown>(name, read, fallback, "", why);
}

const byName = new Map(table.map((row) => [row.name, row]));

/**
 * Reads a command line (without node and script) and the environment; the command line wins, an empty variable
 * counts as unset, and a repeatable flag takes one value from the environment. Throws UsageError.
 */
export function parseFlags(
  argv: readonly string[],
  env: Readonly<Record<string, string | undefined>>,
): Invocation {
  const notes: string[] = [];
  const given = new Map<string, unknown[]>();
  let help = "";
  const command = build((row, value, from) => {
    const values = row.repeatable ? (given.get(row.name) ?? []) : [];
    given.set(row.name, [...values, readFlag(row, value, from)]);
  });
  command.configureOutput({
    writeOut: (part) => {
      help += part;
    },
    writeErr: () => undefined,
  });
  try {
    command.parse(normalise(argv, notes), { from: "user" });
  } catch (error) {
    if (!(error instanceof CommanderError)) throw error;
    if (error.code === "commander.helpDisplayed") return { kind: "help", text: help };
    throw new UsageError(`${error.message.replace(/^error: /, "")}; twilld --help lists the flags`);
  }
  if (flags.version(given)) return { kind: "version" };
  for (const row of table) {
    const variable = `FLANNELD_${row.name.toUpperCase().replaceAll("-", "_")}`;
    const value = env[variable] ?? "";
    // FLANNELD_VERSION is what images call the version they hold, not a request to print it.
    if (value === "" || given.has(row.name) || row.name === "version") continue;
    given.set(row.name, [readFlag(row, value, variable)]);
  }
  return { kind: "run", settings: settle(given, notes) };
}

function readFlag(row: Flag<unknown>, value: string, from: string): unknown {
  try {
    return row.read(value);
  } catch (error) {
    if (error instanceof UsageError) throw new UsageError(`${from} ${error.message}: it is "${value}"`);
    throw error;
  }
}

/** The commander program; `take` gets each flag as it is met. */
function build(take: (row: Flag<unknown>, value: string, from: string) => void): Command {
  const command = new Command("twilld")
    .description("Leases a subnet for this host in etcd and forwards its pods' packets by eBPF.")
    .helpOption("-h, --help", "print this and exit")
    .exitOverride()
    .configureHelp({ optionTerm: (option) => option.flags.replace(" <true|false>", "[=true|false]") })
    .allowExcessArguments(false)
    .addHelpText(
      "after",
      "\nEach flag may also come from the environment: --ip-masq as FLANNELD_IP_MASQ=true.",
    );
  for (const row of table) {
    const syntax = row.boolean ? `--${row.name} <true|false>` : `--${row.name} <value>`;
    const help = row.fallback === "" ? row.help : `${row.help} (default: ${row.fallback})`;
    const option = new Option(syntax, help).hideHelp(row.noEffect !== undefined);
    command.addOption(option.argParser((value: string) => take(row, value, `--${row.name}`)));
  }
  return command;
}

/**
 * Go's forms as `--name=value`: one dash or two, the value behind `=` or next, booleans alone. As in Go, parsing
 * ends at the first argument that is no flag; that is worth a note, since it is mostly `--ip-masq false`.
 */
function normalise(argv: readonly string[], notes: string[]): string[] {
  const out: string[] = [];
  for (let i = 0; i < argv.length; i++) {
    const arg = argv[i] ?? "";
    const match = /^--?([^-=][^=]*)(?:=(.*))?$/s.exec(arg);
    if (match === null) {
      if (arg !== "--" || i + 1 < argv.length) {
        notes.push(`ignored from "${arg}" on, which is no flag: ${argv.slice(i).join(" ")}`);
      }
      break;
    }
    const name = match[1] ?? "";
    const row = byName.get(name);
    if (name === "h" || name === "help") out.push("--help");
    else if (match[2] !== undefined) out.push(`--${name}=${match[2]}`);
    else if (row?.boolean === true) out.push(`--${name}=true`);
    else if (row === undefined) out.push(`--${name}`);
    else if (i + 1 < argv.length) out.push(`--${name}=${argv[++i]}`);
    else throw new UsageError(`--${name} needs a value: --${name}=...`);
  }
  return out;
}

/** The rules that concern more than one flag. */
function settle(given: Values, notes: string[]): Settings {
  if (flags.kubeSubnetMgr(given)) {
    throw new UsageError(
      "--kube-subnet-mgr is not available: Twill keeps its leases in etcd; remove it and give --etcd-endpoints",
    );
  }
  for (const row of table) {
    if (row.noEffect !== undefined && given.has(row.name)) {
      notes.push(`--${row.name} has no effect: ${row.noEffect}`);
    }
  }
  const verbosity = flags.verbosity(given);
  return {
    etcd: settleEtcd(given, notes),
    interfaces: flags.interfaces(given).filter((name) => name !== ""),
    interfacePatterns: flags.patterns(given).filter((regex) => regex.source !== "(?:)"),
    interfaceCanReach: flags.canReach(given),
    publicIp: flags.publicIp(given),
    subnetFile: flags.subnetFile(given),
    renewMarginMinutes: flags.renewMargin(given),
    leaseTtlSeconds: flags.leaseTtl(given),
    ipMasq: flags.ipMasq(given),
    masqFullyRandom: !flags.notRandom(given),
    masqExclude: flags.masqExclude(given),
    masqPorts: flags.masqPorts(given),
    masqMaxConnections: flags.masqMaxConnections(given),
    blackholeRoute: flags.blackhole(given),
    followConfig: flags.followConfig(given),
    healthzIp: flags.healthzIp(given),
    healthzPort: flags.healthzPort(given),
    pinPath: flags.pinPath(given),
    attach: flags.attach(given),
    forwardRules: flags.forwardRules(given),
    fastPath: flags.fastPath(given),
    logFormat: flags.logFormat(given),
    logLevel: verbosity === 0 ? "info" : verbosity < 5 ? "debug" : "trace",
    resyncSeconds: flags.resync(given),
    peerProbeSeconds: flags.peerProbes(given),
    metricsPeers: flags.metricsPeers(given),
    notes,
  };
}

function settleEtcd(given: Values, notes: string[]): EtcdSettings {
  const [keyFile, certFile, caFile] = [flags.keyFile(given), flags.certFile(given), flags.caFile(given)];
  if ((keyFile === undefined) !== (certFile === undefined)) {
    const [has, lacks] = keyFile === undefined ? ["certfile", "keyfile"] : ["keyfile", "certfile"];
    throw new UsageError(`--etcd-${has} needs --etcd-${lacks} beside it`);
  }
  const withTls = keyFile !== undefined || caFile !== undefined;
  const urls = flags.endpoints(given).map((url) => {
    return url.includes("://") ? url : `${withTls ? "https" : "http"}://${url}`;
  });
  const secure = urls.filter((url) => /^https:/i.test(url)).length;
  if (secure > 0 && secure < urls.length) {
    throw new UsageError(`--etcd-endpoints must be all http or all https: they are "${urls.join(",")}"`);
  }
  if (withTls && secure === 0)
    notes.push("the certificates of etcd have no effect: --etcd-endpoints are http");
  return {
    endpoints: urls,
    prefix: flags.prefix(given),
    keyFile,
    certFile,
    caFile,
    username: flags.username(given),
    password: flags.password(given),
  };
}
