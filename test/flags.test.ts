import { describe, expect, test } from "vitest";
import { parseIpv4 } from "../src/core/ipv4.ts";
import { parseFlags, type Settings, UsageError } from "../src/flags.ts";

function settings(argv: string[] | string, env: Record<string, string> = {}): Settings {
  const words = typeof argv === "string" ? argv.split(" ").filter((word) => word !== "") : argv;
  const invocation = parseFlags(words, env);
  if (invocation.kind !== "run") throw new Error(`would not run: ${invocation.kind}`);
  return invocation.settings;
}

function refusal(argv: string, env: Record<string, string> = {}): string {
  try {
    return `accepted: ${JSON.stringify(settings(argv, env))}`;
  } catch (error) {
    if (error instanceof UsageError) return error.message;
    throw error;
  }
}

test("the defaults are flanneld's", () => {
  expect(settings("")).toEqual({
    etcd: {
      endpoints: ["http://127.0.0.1:4001", "http://127.0.0.1:2379"],
      prefix: "/coreos.com/network",
      keyFile: undefined,
      certFile: undefined,
      caFile: undefined,
      username: undefined,
      password: undefined,
    },
    interfaces: [],
    interfacePatterns: [],
    interfaceCanReach: undefined,
    publicIp: undefined,
    subnetFile: "/run/flannel/subnet.env",
    renewMarginMinutes: 60,
    leaseTtlSeconds: 86400,
    ipMasq: false,
    masqFullyRandom: true,
    masqExclude: [],
    masqPorts: { first: 61000, last: 65535 },
    masqMaxConnections: 262144,
    blackholeRoute: false,
    followConfig: true,
    healthzIp: "0.0.0.0",
    healthzPort: 0,
    pinPath: "/sys/fs/bpf/twill",
    attach: "auto",
    forwardRules: true,
    fastPath: "auto",
    logFormat: "text",
    logLevel: "info",
    resyncSeconds: 10,
    peerProbeSeconds: 10,
    metricsPeers: 0,
    notes: [],
  });
});

test("a command line as it is in use", () => {
  const read = settings(
    "--public-ip=10.4.7.21 --etcd-endpoints=https://10.4.7.12:2379,https://10.4.7.21:2379,https://10.4.7.22:2379 " +
      "--etcd-keyfile=./certs/client-key.pem --etcd-certfile=./certs/client.pem --etcd-cafile=./certs/ca.pem " +
      "--iface=eth0 --subnet-file=./subnet.env --healthz-port=2401",
  );
  expect(read).toMatchObject({
    publicIp: parseIpv4("10.4.7.21"),
    interfaces: ["eth0"],
    subnetFile: "./subnet.env",
    healthzPort: 2401,
    notes: [],
    etcd: {
      endpoints: ["https://10.4.7.12:2379", "https://10.4.7.21:2379", "https://10.4.7.22:2379"],
      keyFile: "./certs/client-key.pem",
      certFile: "./certs/client.pem",
      caFile: "./certs/ca.pem",
    },
  });
});

describe("Go's forms", () => {
  test.each<[string[], Partial<Settings>]>([
    [["-iface=eth0"], { interfaces: ["eth0"] }],
    [["--iface", "eth0"], { interfaces: ["eth0"] }],
    [["-iface", "eth0", "--iface=10.4.7.21"], { interfaces: ["eth0", "10.4.7.21"] }],
    [["--iface="], { interfaces: [] }],
    [["--subnet-file", "--odd"], { subnetFile: "--odd" }],
    [["--subnet-file=/a=b"], { subnetFile: "/a=b" }],
    [["--ip-masq"], { ipMasq: true }],
    [["-ip-masq"], { ipMasq: true }],
    [["--ip-masq=true"], { ipMasq: true }],
    [["--ip-masq=T"], { ipMasq: true }],
    [["--ip-masq=1"], { ipMasq: true }],
    [["--ip-masq=false"], { ipMasq: false }],
    [["--ip-masq=0"], { ipMasq: false }],
    [["--ip-masq", "--ip-masq=F"], { ipMasq: false }],
    [["--ip-masq-fully-random-disable"], { masqFullyRandom: false }],
    [["--healthz-port=1", "--healthz-port=2"], { healthzPort: 2 }],
    [["-v=1"], { logLevel: "debug" }],
    [["-v", "10"], { logLevel: "trace" }],
    [["--v=0"], { logLevel: "info" }],
    [["--public-ip="], { publicIp: undefined }],
    [["--"], { notes: [] }],
    [["--iface-can-reach=8.8.8.8"], { interfaceCanReach: 0x08080808 }],
    [
      ["--attach=tcx", "--fast-path=off", "--log-format=json"],
      { attach: "tcx", fastPath: "off", logFormat: "json" },
    ],
    [["--peer-probes=0", "--metrics-peers=50"], { peerProbeSeconds: 0, metricsPeers: 50 }],
    [["--resync=1", "--pin-path=/sys/fs/bpf/b"], { resyncSeconds: 1, pinPath: "/sys/fs/bpf/b" }],
  ])("%j", (argv, expected) => {
    expect(settings(argv)).toMatchObject(expected);
  });

  test("parsing ends at the first argument that is no flag, with a note", () => {
    const read = settings("--ip-masq false --iface=eth0");
    expect(read).toMatchObject({ ipMasq: true, interfaces: [] });
    expect(read.notes).toEqual(['ignored from "false" on, which is no flag: false --iface=eth0']);
  });

  test("patterns are Go's: unanchored, with flags in front", () => {
    const [first, second] = settings(["--iface-regex=^10\\.4\\.", "--iface-regex=(?i)ETH"]).interfacePatterns;
    expect(first?.test("10.4.7.21")).toBe(true);
    expect(second?.test("veth0")).toBe(true);
  });
});

describe("etcd", () => {
  test.each([
    ["--etcd-prefix=/a/b/", "/a/b"],
    ["--etcd-prefix=//a//b", "/a/b"],
    ["--etcd-prefix=/", ""],
  ])("%s", (argv, prefix) => {
    expect(settings(argv).etcd.prefix).toBe(prefix);
  });

  test.each([
    ["--etcd-endpoints=10.0.0.1:2379,,10.0.0.2:2379", ["http://10.0.0.1:2379", "http://10.0.0.2:2379"]],
    ["--etcd-endpoints=10.0.0.1:2379 --etcd-cafile=ca.pem", ["https://10.0.0.1:2379"]],
    ["--etcd-endpoints=http://[::1]:2379", ["http://[::1]:2379"]],
  ])("%s", (argv, endpoints) => {
    expect(settings(argv).etcd.endpoints).toEqual(endpoints);
  });

  test("certificates with http are noted", () => {
    expect(settings("--etcd-endpoints=http://a:1 --etcd-cafile=ca.pem").notes).toEqual([
      "the certificates of etcd have no effect: --etcd-endpoints are http",
    ]);
  });
});

describe("the environment", () => {
  test.each<[Record<string, string>, string, Partial<Settings>]>([
    [{ FLANNELD_IP_MASQ: "true" }, "", { ipMasq: true }],
    [{ FLANNELD_IP_MASQ: "false" }, "", { ipMasq: false }],
    [{ FLANNELD_IP_MASQ: "" }, "", { ipMasq: false }],
    [{ FLANNELD_IP_MASQ: "true" }, "--ip-masq=false", { ipMasq: false }],
    [{ FLANNELD_IFACE: "eth0,eth1" }, "", { interfaces: ["eth0,eth1"] }],
    [{ FLANNELD_IFACE: "eth0" }, "--iface=eth1", { interfaces: ["eth1"] }],
    [{ FLANNELD_SUBNET_LEASE_RENEW_MARGIN: "30" }, "", { renewMarginMinutes: 30 }],
    [{ FLANNELD_PIN_PATH: "/p", FLANNELD_V: "5" }, "", { pinPath: "/p", logLevel: "trace" }],
    [{ FLANNELD_VERSION: "v0.20.2", FLANNELD_SERVICE_HOST: "10.0.0.1" }, "", { notes: [] }],
  ])("%j with %j", (env, argv, expected) => {
    expect(settings(argv, env)).toMatchObject(expected);
  });

  test("a bad value names the variable", () => {
    expect(refusal("", { FLANNELD_IP_MASQ: "yes" })).toBe(
      'FLANNELD_IP_MASQ must be true or false: it is "yes"',
    );
  });
});

describe("refused", () => {
  test.each<[string, string | RegExp]>([
    ["--no-such-flag", /^unknown option '--no-such-flag'.*twilld --help/s],
    ["--no-such-flag=1 --iface=eth0", /^unknown option '--no-such-flag=1'/],
    ["--etcd-endpoint=http://a:1", /^unknown option '--etcd-endpoint=http:\/\/a:1'/],
    ["--iface", "--iface needs a value: --iface=..."],
    ["--ip-masq=yes", '--ip-masq must be true or false: it is "yes"'],
    ["--ip-masq=", '--ip-masq must be true or false: it is ""'],
    [
      "--subnet-lease-renew-margin=0",
      /^--subnet-lease-renew-margin must be a whole number of minutes from 1 to 1439: it is "0"/,
    ],
    ["--subnet-lease-renew-margin=1440", /from 1 to 1439: it is "1440"/],
    ["--healthz-port=65536", '--healthz-port must be a whole number from 0 to 65535: it is "65536"'],
    ["--healthz-port=http", '--healthz-port must be a whole number from 0 to 65535: it is "http"'],
    ["--public-ip=10.4.7", '--public-ip must be an IPv4 address such as 10.4.7.21: it is "10.4.7"'],
    ["--iface-can-reach=host", /^--iface-can-reach must be an IPv4 address/],
    ["--iface-regex=(", /^--iface-regex must be a regular expression: /],
    ["--iface-regex=[[:alpha:]]+", /^--iface-regex must not use classes like \[\[:alpha:\]\]/],
    ["--attach=xdp", '--attach must be one of auto, tcx, clsact: it is "xdp"'],
    ["--fast-path=on", '--fast-path must be one of auto, always, off: it is "on"'],
    ["--log-format=xml", '--log-format must be one of text, json: it is "xml"'],
    ["--resync=0", '--resync must be a whole number of seconds from 1 to 3600: it is "0"'],
    ["--subnet-file=", '--subnet-file must be a path: it is ""'],
    ["--etcd-prefix=", /^--etcd-prefix must be a path in etcd/],
    ["--etcd-endpoints=,", /^--etcd-endpoints must name at least one URL/],
    [
      "--etcd-endpoints=ftp://a:1",
      /^--etcd-endpoints must be a comma list of http or https URLs, which "ftp:\/\/a:1" is not/,
    ],
    ["--etcd-endpoints=http://a:1,https://b:1", /^--etcd-endpoints must be all http or all https/],
    ["--etcd-keyfile=k.pem", "--etcd-keyfile needs --etcd-certfile beside it"],
    ["--etcd-certfile=c.pem", "--etcd-certfile needs --etcd-keyfile beside it"],
    ["--kube-subnet-mgr", /^--kube-subnet-mgr is not available/],
  ])("%s", (argv, message) => {
    if (message instanceof RegExp) expect(refusal(argv)).toMatch(message);
    else expect(refusal(argv)).toBe(message);
  });
});

describe("accepted without effect", () => {
  test.each([
    ["--iptables-resync=60", /^--iptables-resync has no effect: packets are forwarded without/],
    ["--public-ipv6=fd00::1", /^--public-ipv6 has no effect: IPv6 is not forwarded yet/],
    ["--net-config-path=/x", /^--net-config-path has no effect: it is for flannel's Kubernetes mode/],
    ["--kube-subnet-mgr=false", /^--kube-subnet-mgr has no effect/],
    ["-vmodule=a=1", /^--vmodule has no effect/],
    ["-log_backtrace_at=f:1", /^--log_backtrace_at has no effect/],
  ])("%s", (argv, note) => {
    expect(settings(argv).notes).toEqual([expect.stringMatching(note)]);
  });
});

describe("no run", () => {
  test.each(["--version", "-version", "--version=true", "--version --iface=eth0"])("%s", (argv) => {
    expect(parseFlags(argv.split(" "), {})).toEqual({ kind: "version" });
  });

  test.each(["--help", "-help", "-h", "--iface=eth0 -h"])("%s", (argv) => {
    const invocation = parseFlags(argv.split(" "), {});
    const text = invocation.kind === "help" ? invocation.text : "";
    expect(text).toContain("--etcd-endpoints <value>");
    expect(text).toContain("(default: /run/flannel/subnet.env)");
    expect(text).toContain("FLANNELD_IP_MASQ=true");
    expect(text).toContain("--ip-masq[=true|false]");
    expect(text).not.toContain("kubeconfig-file");
  });
});
