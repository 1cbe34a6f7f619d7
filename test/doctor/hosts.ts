/**
 * `twill doctor` on hosts that are really broken, one fault at a time: it names that fault (and the daemon, where that
 * had to be stopped for it), the commands that it prints mend it where it prints some, and it finds nothing on a host
 * that is sound.
 *
 * All faults share one lab: two hosts with VXLAN and masquerade, and an etcd of three members with TLS. The daemon of
 * the broken host compares the kernel once an hour only, so that what it does not hear of stays broken.
 */
import { execFileSync } from "node:child_process";
import { cpSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { codec, openPinnedMap } from "../../loader/index.ts";
import { maps } from "../../src/abi/twill.gen.ts";
import type { Finding } from "../../src/core/doctor.ts";
import { statusPathOf } from "../../src/edge/rundir.ts";
import { createCluster } from "../e2e/cluster.ts";
import { createLab, type Etcd, type Host, type Lab, repository, until } from "../lab.ts";
import { objectOf } from "../loader/program.ts";
import { startTwilld, type Twilld } from "../twilld.ts";

const NETWORK = "172.7.0.0/16";
const SUBNETS = "/coreos.com/network/subnets";

interface Verdict {
  readonly code: number | null;
  readonly findings: readonly Finding[];
  readonly unchecked: readonly { readonly id: string; readonly reason: string }[];
  readonly text: string;
}

interface DoctorOptions {
  readonly flags?: readonly string[];
  readonly env?: Readonly<Record<string, string>>;
  /** What the command line begins with. */
  readonly within?: readonly string[];
}

async function doctor(host: Host, options: DoctorOptions = {}): Promise<Verdict> {
  const { flags = [], env = {}, within = [] } = options;
  const argv = [
    join(repository, "bin/twill"),
    "doctor",
    "--json",
    "--timeout=6",
    `--pin-path=${host.pinPath}`,
  ];
  const outcome = await host.exec([...within, ...argv, ...flags], { env, check: false, timeout: 60_000 });
  const text = `${outcome.stdout}${outcome.stderr}`;
  if (!outcome.stdout.startsWith("{")) throw new Error(`twill doctor said no JSON: ${text}`);
  return { code: outcome.code, text, ...JSON.parse(outcome.stdout) };
}

/** The findings that no other explains, each once. */
const roots = ({ findings }: Verdict): string[] => [
  ...new Set(findings.filter(({ follows }) => follows.length === 0).map(({ id }) => id as string)),
];

/** Asks again until the findings are these: the daemon and the kernel may need a moment for what was done. */
async function finds(host: Host, wanted: readonly string[], options: DoctorOptions = {}): Promise<Verdict> {
  let last: Verdict | undefined;
  try {
    return await until(
      `twill doctor to find ${wanted.join(", ") || "nothing"}`,
      async () => {
        last = await doctor(host, options);
        return JSON.stringify(roots(last)) === JSON.stringify(wanted) ? last : undefined;
      },
      { timeout: 40_000 },
    );
  } catch (error) {
    throw new Error(`${error instanceof Error ? error.message : error}; it last said ${last?.text}`);
  }
}

let lab: Lab;
let etcd: Etcd;
let h1: Host;
let h2: Host;
let twilld: Twilld;

const start = async (): Promise<void> => {
  twilld = await startTwilld(h1, {
    etcd,
    flags: ["--ip-masq", "--resync=3600", "--masq-max-connections=1024"],
  });
};

/** A `sched_cls` program of somebody else's, on eth0 of h1 before Twill's. */
async function attachForeign(): Promise<void> {
  const object = join(h1.directory, "foreign.o");
  writeFileSync(
    object,
    objectOf(
      `SEC("tc") int foreign(struct __sk_buff *skb) { return -1; } char _license[] SEC("license") = "GPL";`,
    ),
  );
  const script = `
    import { attachTcx, openObject } from "${repository}/dist/loader/index.js";
    import { readFileSync } from "node:fs";
    const object = openObject("${object}", { name: "foreign" });
    object.load();
    const ifindex = Number(readFileSync("/proc/thread-self/net/dev_mcast", "utf8").match(/^(\\d+)\\s+eth0\\s/m)[1]);
    attachTcx(object.program("foreign"), ifindex, "ingress").pin("${foreignPin()}");
  `;
  await h1.exec([process.execPath, "--input-type=module", "-e", script]);
}
const foreignPin = (): string => `${h1.pinPath}-foreign`;

beforeAll(async () => {
  lab = await createLab();
  etcd = await lab.etcd({ addresses: ["10.4.7.11/24", "10.4.7.12/24", "10.4.7.13/24"], tls: true });
  await etcd.put(
    "/coreos.com/network/config",
    JSON.stringify({ Network: NETWORK, Backend: { Type: "vxlan" } }),
  );
  [h1, h2] = (await Promise.all(
    [21, 22].map(async (number) => {
      const host = await lab.host(`h${number - 20}`, { address: `10.4.7.${number}/24` });
      writeFileSync(
        join(host.directory, "subnet.env"),
        `FLANNEL_NETWORK=${NETWORK}\nFLANNEL_SUBNET=172.7.${number}.1/24\n`,
      );
      await host.bridge("docker0", `172.7.${number}.1/24`, { mtu: 1450 });
      await host.pod("a", `172.7.${number}.2/24`, { mtu: 1450 });
      return host;
    }),
  )) as [Host, Host];
  await attachForeign();
  await Promise.all([start(), startTwilld(h2, { etcd, flags: ["--ip-masq"] })]);
  await h1.ping("172.7.21.2", { count: 1 });
});
afterAll(async () => {
  // Pins below the run's folder go with the lab's hosts; this one is nobody's.
  if (h1 !== undefined) rmSync(foreignPin(), { force: true });
  await lab?.close();
});

/** Does what a person would who pastes the command; services of the lab have no systemd. */
async function obey(command: string): Promise<void> {
  const [program, ...words] = command.split(" ");
  if (command === "systemctl restart twilld") {
    await twilld.stop();
    await start();
  } else if (command === "systemctl start twilld") {
    await start();
  } else if (command === "systemctl restart docker") {
    await h1.ipBatch(["address flush dev docker0", "address add 172.7.21.1/24 dev docker0"]);
  } else if (program === "etcdctl") {
    await etcd.ctl(...words);
  } else if (program !== "timedatectl") {
    await h1.exec(["sh", "-c", command]);
  }
}

interface Fault {
  readonly name: string;
  readonly do: () => Promise<unknown> | unknown;
  /** What is found, in the order of the checks; what only follows from it is not counted. */
  readonly finds: readonly string[];
  /** Found as well, as something that follows. */
  readonly follow?: readonly string[];
  /** How doctor is started. A fault that lies in this alone is gone with it. */
  readonly options?: () => DoctorOptions;
  /** What is to be done beside the commands, or where there are none. */
  readonly undo?: () => Promise<unknown> | unknown;
}

/** A client certificate and a CA of other days: valid from and to, in days from now. */
function certificate(name: string, from: number, to: number, options: { readonly ca?: true } = {}): string {
  const directory = join(etcd.host.directory, "tls");
  const date = (days: number): string =>
    new Date(Date.now() + days * 86_400_000)
      .toISOString()
      .replace(/[-:T]|\.\d+/g, "")
      .slice(2);
  const place = join(h1.directory, name);
  const settings = `${place}.cnf`;
  writeFileSync(`${place}.index`, "");
  writeFileSync(
    settings,
    `[ca]\ndefault_ca = it\n[it]\ndatabase = ${place}.index\nnew_certs_dir = ${h1.directory}\nrand_serial = yes\n` +
      `default_md = sha256\npolicy = any\nunique_subject = no\n[any]\ncommonName = supplied\n` +
      `[client]\nextendedKeyUsage = clientAuth\n` +
      `[server]\nextendedKeyUsage = serverAuth,clientAuth\nsubjectAltName = IP:10.4.7.11,IP:10.4.7.12,IP:10.4.7.13\n` +
      `[authority]\nbasicConstraints = critical,CA:true\n`,
  );
  const openssl = (...argv: string[]): void => {
    execFileSync("openssl", argv, { stdio: "pipe" });
  };
  const key =
    name === "server" || options.ca
      ? join(directory, options.ca ? "ca-key.pem" : "server-key.pem")
      : `${place}-key.pem`;
  if (key.startsWith(place))
    openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", key);
  const subject = options.ca ? "/CN=lab ca" : `/CN=${name}`;
  openssl("req", "-new", "-key", key, "-subj", subject, "-out", `${place}.csr`);
  openssl(
    ...["ca", "-batch", "-notext", "-config", settings, "-in", `${place}.csr`, "-out", `${place}.pem`],
    ...["-startdate", `${date(from)}Z`.replace("ZZ", "Z"), "-enddate", `${date(to)}Z`.replace("ZZ", "Z")],
    ...["-keyfile", join(directory, "ca-key.pem")],
    ...(options.ca
      ? ["-selfsign", "-extensions", "authority"]
      : ["-cert", join(directory, "ca.pem"), "-extensions", name]),
  );
  return `${place}.pem`;
}

/** Entries of masqueraded connections that nobody has: as many as make the table nearly full. */
function connections(put: boolean): void {
  const map = openPinnedMap(join(h1.pinPath, "connections4"));
  try {
    const keys = codec(maps.connections4.key);
    const values = codec(maps.connections4.value);
    const value = values.encode(values.decode(new Uint8Array(values.size)));
    const empty = keys.decode(new Uint8Array(keys.size)) as object;
    const rows = Array.from({ length: 1000 }, (_, port) =>
      keys.encode({ ...empty, port: 1000 + port } as never),
    );
    if (put) map.updateBatch(rows.map((key) => [key, value] as const));
    else map.deleteBatch(rows);
  } finally {
    map.close();
  }
}

const ip = (...commands: string[]) => h1.ipBatch(commands);
const status = () => JSON.parse(readFileSync(statusPathOf(h1.pinPath), "utf8")) as object;
const signal = (name: NodeJS.Signals) => twilld.process.kill(name);
const sh = (command: string) => h1.exec(["sh", "-ec", command]);
/** Makes a fault that a daemon which runs would mend, or write over, before anybody looks. */
const stopped = (make: () => Promise<unknown> | unknown) => async (): Promise<void> => {
  signal("SIGSTOP");
  await make();
};
let serverCertificate = "";

const FAULTS: readonly Fault[] = [
  {
    name: "another's program runs before ours",
    do: () => undefined,
    finds: ["foreign-programs"],
  },
  {
    name: "forwarding is off",
    do: stopped(() => h1.sysctl({ "net.ipv4.ip_forward": 0 })),
    finds: ["daemon-status", "ip-forward"],
  },
  {
    name: "the bridge does not forward",
    do: stopped(() => h1.sysctl({ "net.ipv4.conf.docker0.forwarding": 0 })),
    finds: ["daemon-status", "interface-forwarding"],
  },
  {
    name: "a strict reverse path filter, and a way back by another interface",
    do: async () => {
      await lab.switch.ip(`link add h1second type veth peer name eth1 netns ${h1.netns}`);
      await lab.switch.ip("link set h1second master net0 up");
      // The peer goes on sending to eth0.
      await h1.sysctl({
        "net.ipv4.conf.eth1.arp_ignore": 1,
        "net.ipv4.conf.eth1.arp_announce": 2,
        "net.ipv4.conf.eth0.rp_filter": 1,
      });
      await ip("address add 10.4.7.31/32 dev eth1", "link set eth1 up");
      await ip("route add 10.4.7.22/32 dev eth1 src 10.4.7.21");
    },
    finds: ["rp-filter"],
    follow: ["peers"],
    undo: () => ip("link del eth1"),
  },
  {
    name: "pods larger than the network",
    do: () => ip("link set docker0 mtu 1500"),
    finds: ["mtu-pods"],
  },
  {
    name: "a narrow way to a peer",
    do: () => ip("route add 10.4.7.22/32 dev eth0 mtu 1400"),
    finds: ["mtu-path"],
    undo: () => ip("route del 10.4.7.22/32 dev eth0"),
  },
  {
    name: "a route into a peer's subnet",
    do: () => ip("route add blackhole 172.7.22.128/25"),
    finds: ["route-clash"],
  },
  {
    name: "an interface of the host in the network",
    do: () => ip("link add alien type bridge", "link set alien up", "address add 172.7.99.1/24 dev alien"),
    finds: ["route-clash"],
    undo: () => ip("link del alien"),
  },
  {
    name: "flanneld runs",
    do: async () => {
      const program = join(h1.directory, "flanneld");
      cpSync("/bin/sleep", program);
      h1.spawn([program, "3600"]);
      await until("flanneld to run", async () =>
        (await h1.exec(["pgrep", "-x", "flanneld"], { check: false })).stdout.trim(),
      );
    },
    finds: ["flanneld-running"],
  },
  {
    name: "flanneld's masquerade rules",
    do: () =>
      sh(`iptables -t nat -N FLANNEL-POSTRTG
        iptables -t nat -A FLANNEL-POSTRTG -s ${NETWORK} ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
        iptables -t nat -A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG`),
    finds: ["flanneld-rules"],
  },
  {
    name: "flanneld's forward rules",
    do: () =>
      sh(`iptables -N FLANNEL-FWD
        iptables -A FLANNEL-FWD -s ${NETWORK} -m comment --comment "flanneld forward" -j ACCEPT
        iptables -A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD`),
    finds: ["flanneld-rules"],
  },
  {
    name: "flanneld's nftables",
    do: () => sh("nft add table ip flannel-ipv4"),
    finds: ["flanneld-rules"],
  },
  {
    name: "a tunnel device of a former config",
    do: () =>
      ip("link add flannel.7 type vxlan id 7 dev eth0 dstport 8472 nolearning", "link set flannel.7 up"),
    finds: ["flanneld-device"],
  },
  {
    name: "another device has the tunnel's VNI and port",
    do: async () => {
      signal("SIGSTOP");
      await ip(
        "link del flannel.1",
        "link add vxlan0 type vxlan id 1 dev eth0 dstport 8472",
        "link set vxlan0 up",
      );
      signal("SIGCONT");
      await twilld.statusWhere("the device fails", ({ failures }) => failures.length > 0);
    },
    finds: ["tunnel-taken"],
    follow: ["daemon-failing", "tunnel-device"],
  },
  {
    name: "a firewall rule against pods",
    do: () => sh("iptables -A FORWARD -s 172.7.22.0/24 -j DROP"),
    finds: ["firewall-pods"],
    undo: () => sh("iptables -F FORWARD"),
  },
  {
    name: "a firewall against the tunnel",
    do: () => sh("iptables -A INPUT -p udp -m udp --dport 8472 -j DROP"),
    finds: ["firewall-tunnel"],
    follow: ["peers"],
  },
  {
    name: "a firewall that is open by name only",
    do: () =>
      sh(
        "nft 'table inet fw { chain input { type filter hook input priority 0; policy drop; udp dport 4789 accept; tcp sport 2379 accept; }; }'",
      ),
    finds: ["firewall-tunnel"],
    undo: () => sh("nft delete table inet fw; iptables -F INPUT"),
  },
  {
    name: "a peer is cut off",
    do: () => h2.plug(false),
    finds: ["peers"],
    undo: () => h2.plug(true),
  },
  {
    name: "a daemon that is stopped, and its lease is lost meanwhile",
    do: async () => {
      signal("SIGSTOP");
      await etcd.ctl("del", `${SUBNETS}/172.7.21.0-24`);
    },
    finds: ["daemon-status"],
    follow: ["lease"],
  },
  {
    name: "ports of masquerade are not reserved",
    do: () => h1.sysctl({ "net.ipv4.ip_local_reserved_ports": "8080" }),
    finds: ["masquerade-ports"],
  },
  {
    name: "the table of connections is nearly full",
    do: () => connections(true),
    finds: ["table-full"],
    undo: () => connections(false),
  },
  {
    name: "a member of etcd is down",
    do: () => etcd.stopMember(2),
    finds: ["etcd-endpoint"],
    undo: () => etcd.startMember(2),
  },
  {
    name: "the clock is wrong",
    do: () =>
      writeFileSync(
        join(h1.directory, "clock.mjs"),
        `const Real = Date;
        globalThis.Date = class extends Real {
          constructor(...values) { values.length === 0 ? super(Real.now() + 3_600_000) : super(...values); }
          static now() { return Real.now() + 3_600_000; }
        };`,
      ),
    options: () => ({ env: { NODE_OPTIONS: `--import=${join(h1.directory, "clock.mjs")}` } }),
    finds: ["clock"],
  },
  {
    name: "the client certificate has expired",
    do: () => certificate("client", -10, -1),
    options: () => ({
      flags: [
        `--etcd-certfile=${join(h1.directory, "client.pem")}`,
        `--etcd-keyfile=${join(h1.directory, "client-key.pem")}`,
      ],
    }),
    finds: ["certificate-client"],
    follow: ["etcd-endpoint"],
  },
  {
    name: "the client certificate is about to expire",
    do: () => certificate("client", -80, 5),
    options: () => ({
      flags: [
        `--etcd-certfile=${join(h1.directory, "client.pem")}`,
        `--etcd-keyfile=${join(h1.directory, "client-key.pem")}`,
      ],
    }),
    finds: ["certificate-client"],
  },
  {
    name: "etcd's CA has expired",
    do: () => certificate("authority", -800, -1, { ca: true }),
    options: () => ({ flags: [`--etcd-cafile=${join(h1.directory, "authority.pem")}`] }),
    finds: ["certificate-ca"],
  },
  {
    name: "etcd's own certificate is about to expire",
    do: () => {
      // etcd reads it anew for each connection.
      const path = join(etcd.host.directory, "tls", "server.pem");
      serverCertificate = readFileSync(path, "utf8");
      writeFileSync(path, readFileSync(certificate("server", -360, 4)));
    },
    finds: ["certificate-server"],
    undo: () => writeFileSync(join(etcd.host.directory, "tls", "server.pem"), serverCertificate),
  },
  {
    name: "a second lease for a peer's address",
    do: () =>
      etcd.put(
        `${SUBNETS}/172.7.77.0-24`,
        JSON.stringify({
          PublicIP: "10.4.7.22",
          PublicIPv6: null,
          BackendType: "vxlan",
          BackendData: { VNI: 1, VtepMAC: "0a:00:00:00:00:77" },
        }),
      ),
    finds: ["lease-duplicate"],
  },
  {
    name: "the uplink is down",
    do: () => ip("link set eth0 down"),
    finds: ["uplink"],
    follow: ["etcd-endpoint"],
    undo: () => ip("route add default via 10.4.7.1"),
  },
  {
    name: "the uplink has lost its address",
    do: () => ip("address del 10.4.7.21/24 dev eth0"),
    finds: ["uplink"],
    follow: ["etcd-endpoint"],
    undo: () => ip("address add 10.4.7.21/24 dev eth0", "route add default via 10.4.7.1"),
  },
  {
    name: "Docker's bridge is in another network",
    do: () => ip("address flush dev docker0", "address add 172.17.0.1/16 dev docker0"),
    finds: ["bridge-address"],
  },
  {
    name: "subnet.env is gone",
    do: () => rmSync(twilld.subnetFile),
    finds: ["subnet-file"],
  },
  {
    name: "subnet.env says another subnet",
    do: () =>
      writeFileSync(
        twilld.subnetFile,
        readFileSync(twilld.subnetFile, "utf8").replace("172.7.21.1", "172.7.66.1"),
      ),
    finds: ["subnet-file"],
    // What the next start takes for a wish.
    undo: () => undefined,
  },
  {
    name: "a pin is gone",
    do: () => rmSync(join(h1.pinPath, "counters")),
    finds: ["pins"],
  },
  {
    name: "a program was detached",
    do: stopped(async () => {
      const [{ ifindex }] = (await h1.ipJson<{ ifindex: number }>("link show dev eth0")) as [
        { ifindex: number },
      ];
      rmSync(join(h1.pinPath, "links", `from_net-${ifindex}`));
    }),
    finds: ["daemon-status", "programs"],
  },
  {
    name: "a daemon of another version",
    do: stopped(() =>
      writeFileSync(statusPathOf(h1.pinPath), JSON.stringify({ ...status(), version: "0.0.1" })),
    ),
    finds: ["daemon-status", "daemon-version"],
  },
  {
    name: "the daemon is dead",
    do: () => twilld.stop("SIGKILL"),
    finds: ["daemon-running"],
  },
];

describe("a broken host", () => {
  test("is there twenty times and more", () => {
    expect(FAULTS.length).toBeGreaterThan(30);
    expect(new Set(FAULTS.flatMap(({ finds }) => finds)).size).toBeGreaterThanOrEqual(20);
  });

  test.each(FAULTS)("$name", async (fault) => {
    await fault.do();
    let found: Verdict;
    try {
      found = await finds(h1, fault.finds, fault.options?.() ?? {});
    } catch (error) {
      // The faults that come next begin with a host that is as sound as it can be made.
      await fault.undo?.();
      throw error;
    }
    const ids = found.findings.map(({ id }) => id);
    for (const id of fault.follow ?? []) expect(ids, found.text).toContain(id);
    const severe = found.findings.some(({ severity }) => severity === "problem");
    expect(found.code, found.text).toBe(severe ? 1 : 0);
    const commands = found.findings
      .filter(({ follows }) => follows.length === 0)
      .flatMap((finding) => finding.commands);
    for (const command of new Set(commands)) await obey(command);
    if (commands.length === 0 || fault.undo !== undefined) await fault.undo?.();
    await finds(h1, []);
  });
});

describe("a sound host", () => {
  test("with VXLAN, masquerade and TLS: one line, on both sides", async () => {
    for (const host of [h1, h2]) {
      const argv = [join(repository, "bin/twill"), "doctor", `--pin-path=${host.pinPath}`, "--timeout=10"];
      const { stdout } = await host.exec(argv);
      expect(stdout).toMatch(/^0 problems, 0 warnings; \d+ checks found nothing\n$/);
      expect((await host.exec([...argv, "--verbose"])).stdout).toContain("ok  peers: each peer answers");
    }
  });

  test("with host-gw and plain HTTP", async () => {
    const cluster = await createCluster({ backend: "host-gw" });
    try {
      for (const host of cluster.hosts) expect((await finds(host, [])).unchecked).toEqual([]);
    } finally {
      await cluster.close();
    }
  });
});

test("without a BPF file system, without a daemon that ever ran, without permission, with a wrong flag", async () => {
  const bare = ["unshare", "--mount", "sh", "-c", 'umount -l /sys/fs/bpf && exec "$@"', "sh"];
  const found = await doctor(h1, { within: bare });
  expect(roots(found), found.text).toEqual(["bpffs"]);
  expect(found.findings.map(({ id }) => id)).toContain("pins");
  // The command that it prints.
  const [{ commands = [] } = {}] = found.findings;
  const mended = [
    "unshare",
    "--mount",
    "sh",
    "-c",
    `umount -l /sys/fs/bpf && ${commands[0]} && exec "$@"`,
    "sh",
  ];
  expect(roots(await doctor(h1, { within: mended }))).not.toContain("bpffs");

  const nothing = await doctor(h1, { flags: [`--pin-path=${h1.pinPath}-none`] });
  expect(roots(nothing)).toContain("daemon-running");
  expect(nothing.code).toBe(1);

  const argv = [join(repository, "bin/twill"), "doctor", `--pin-path=${h1.pinPath}`];
  const refused = await h1.exec(["setpriv", "--bounding-set=-net_admin", "--", ...argv], { check: false });
  expect(refused.code).toBe(1);
  expect(refused.stderr.trim().split("\n")).toHaveLength(1);
  expect(refused.stderr).toContain("CAP_NET_ADMIN");
  expect(refused.stdout).toBe("");

  for (const flag of ["--etcd-endpoints=ftp://x", "--timeout=soon"]) {
    const wrong = await h1.exec([...argv, flag], { check: false });
    expect(wrong.code).toBe(2);
    expect(wrong.stderr).toContain(flag.slice(0, flag.indexOf("=")));
  }
});
