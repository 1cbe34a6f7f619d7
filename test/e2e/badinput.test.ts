/**
 * What twilld does with input that is wrong: it says in one line what is wrong and how to mend it, ends with the
 * exit code that belongs to it or waits, and leaves nothing half-made. All with the built program.
 */
import { cpSync, existsSync, mkdirSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, test } from "vitest";
import { rundirOf, runningDaemon } from "../../src/edge/rundir.ts";
import { createLab, type Etcd, exec, type Host, type Lab, type Pod, repository, within } from "../lab.ts";
import { spawnTwilld, startTwilld, type Twilld, twilldFlags, twilldProgram } from "../twilld.ts";

const PREFIX = "/coreos.com/network";
const VXLAN = '{"Network": "172.7.0.0/16", "Backend": {"Type": "vxlan"}}';
const LOG_LINE = /^\d{4}-\d\d-\d\dT\S+Z (?:trace|debug|info|warn|error)\s/;

let lab: Lab;
let etcd: Etcd;
let h1: Host;

beforeAll(async () => {
  lab = await createLab();
  etcd = await lab.etcd({ addresses: ["10.4.7.11/24"] });
  h1 = await lab.host("h1", { address: "10.4.7.21/24" });
});

afterAll(() => lab?.close());

/** Everything of ours that may be on a host. */
async function leftOn(host: Host): Promise<object> {
  const links = await host.ipJson<{ ifname: string }>("link show");
  const { stdout } = await host.exec(["bpftool", "-j", "net", "show"]);
  const [{ xdp, tc }] = JSON.parse(stdout) as [{ xdp: unknown[]; tc: unknown[] }];
  return {
    devices: links.map((link) => link.ifname),
    routes: (await host.ip("route show")).trim().split("\n").length,
    programs: [...xdp, ...tc].length,
    pins: existsSync(host.pinPath),
    daemon: runningDaemon(host.pinPath),
    subnetFile: existsSync(join(host.directory, "subnet.env")),
    leases: [...(await etcd.list("/")).keys()].filter((key) => key.includes("/subnets/")),
  };
}

const NOTHING = {
  devices: ["lo", "eth0"],
  routes: 2,
  programs: 0,
  pins: false,
  daemon: undefined,
  subnetFile: false,
  leases: [],
};

/** Takes away what a test, or a twilld that should have ended, has left, so that the next one is judged alone. */
async function cleanHost(): Promise<void> {
  await etcd.ctl("del", "/", "--prefix");
  const links = await h1.ipJson<{ ifname: string }>("link show");
  if (links.some((link) => link.ifname === "flannel.1")) await h1.ip("link delete flannel.1");
  rmSync(h1.pinPath, { recursive: true, force: true });
  rmSync(join(h1.directory, "subnet.env"), { force: true });
}

/** Runs a twilld that must end by itself with exit code 1 after one complaint; nothing may be left. */
async function complaint(argv: readonly string[], env: Record<string, string> = {}): Promise<string> {
  const child = h1.spawn(argv, { cwd: h1.directory, env });
  const exit = await within(15_000, child.exited, () => `twilld to end; so far:\n${child.text()}`).catch(
    async (error) => {
      await child.stop();
      throw error;
    },
  );
  expect(exit, child.text()).toEqual({ code: 1, signal: null });
  expect(child.text("stdout")).toBe("");
  const lines = child.lines.map(({ text }) => text);
  for (const line of lines) expect(line).toMatch(LOG_LINE);
  const complaints = lines.filter((line) => !/ info /.test(line));
  expect(complaints, child.text()).toHaveLength(1);
  expect(await leftOn(h1)).toEqual(NOTHING);
  return (complaints[0] ?? "").replace(LOG_LINE, "");
}

const twilld = (...flags: string[]): string[] => [twilldProgram, ...twilldFlags(h1, etcd), ...flags];

describe("a command line that cannot be obeyed: exit code 2", () => {
  test.each<[string, string[], Record<string, string>, RegExp]>([
    ["an unknown flag", ["--nonsense=1"], {}, /unknown option '--nonsense.*twilld --help lists the flags/],
    [
      "a bad number",
      ["--healthz-port=http"],
      {},
      /--healthz-port must be a whole number from 0 to 65535: it is "http"/,
    ],
    ["a margin of a day", ["--subnet-lease-renew-margin=1440"], {}, /from 1 to 1439: it is "1440"/],
    ["a bad choice", ["-attach=xdp"], {}, /--attach must be one of auto, tcx, clsact: it is "xdp"/],
    [
      "a bad address",
      ["--public-ip=10.4.7"],
      {},
      /--public-ip must be an IPv4 address such as .*: it is "10\.4\.7"/,
    ],
    ["a bad pattern", ["--iface-regex=eth("], {}, /--iface-regex must be a regular expression/],
    ["a flag without its value", ["--iface"], {}, /--iface needs a value/],
    ["a certificate without its key", ["--etcd-certfile=/x"], {}, /--etcd-certfile needs --etcd-keyfile/],
    [
      "Kubernetes' leases",
      ["--kube-subnet-mgr"],
      {},
      /--kube-subnet-mgr is not available.*give --etcd-endpoints/,
    ],
    [
      "the environment",
      [],
      { FLANNELD_IP_MASQ: "perhaps" },
      /FLANNELD_IP_MASQ must be true or false: it is "perhaps"/,
    ],
  ])("%s", async (_, flags, env, message) => {
    const { code, stdout, stderr } = await exec([twilldProgram, ...flags], { check: false, env });
    expect({ code, stdout }).toEqual({ code: 2, stdout: "" });
    expect(stderr).toMatch(message);
    expect(stderr).toMatch(/^twilld: [^\n]+\n$/);
  });

  test("help and version are no failure", async () => {
    const help = await exec([twilldProgram, "-help"]);
    expect(help.stdout).toContain("--etcd-endpoints");
    const version = await exec([twilldProgram, "--version"]);
    expect(version).toMatchObject({
      code: 0,
      stdout: "",
      stderr: expect.stringMatching(/^\d+\.\d+\.\d+\n$/),
    });
  });
});

describe("a host that cannot do it: exit code 1, and nothing is left", () => {
  afterEach(cleanHost);

  test("an unknown backend", async () => {
    await etcd.put(`${PREFIX}/config`, '{"Network": "172.7.0.0/16", "Backend": {"Type": "carrier-pigeon"}}');
    expect(await complaint(twilld())).toMatch(
      /unknown backend type: carrier-pigeon; set Backend\.Type to [a-z, -]+ or [a-z-]+$/m,
    );
    await etcd.put(`${PREFIX}/config`, '{"Network": "172.7.0.0/16", "Backend": {"Type": "wireguard"}}');
    expect(await complaint(twilld())).toMatch(/backend type wireguard is not there yet, .*set Backend\.Type/);
  });

  test("no usable interface", async () => {
    await etcd.put(`${PREFIX}/config`, VXLAN);
    const others = twilld().filter((flag) => flag !== "--iface=eth0");
    expect(await complaint([...others, "--iface=eth9", "--iface=10.4.7.99"])).toMatch(
      /Failed to find interface .*\(--iface=eth9: there is no interface of that name; --iface=10\.4\.7\.99: no interface has that address\)/,
    );
  });

  test("host-gw behind a NAT", async () => {
    await etcd.put(`${PREFIX}/config`, '{"Network": "172.7.0.0/16", "Backend": {"Type": "host-gw"}}');
    expect(await complaint(twilld("--public-ip=192.0.2.1"))).toMatch(
      /PublicIP is 192\.0\.2\.1, eth0 has 10\.4\.7\.21; remove --public-ip or use vxlan/,
    );
  });

  test.each([
    [
      "no root",
      ["setpriv", "--reuid=65534", "--clear-groups"],
      /lacks CAP_NET_ADMIN and CAP_SYS_ADMIN: run it as root, or grant them/,
    ],
    [
      "no CAP_NET_ADMIN",
      ["setpriv", "--bounding-set=-net_admin"],
      /lacks CAP_NET_ADMIN: run it as root, or grant/,
    ],
    [
      "no CAP_SYS_ADMIN",
      ["setpriv", "--bounding-set=-bpf,-sys_admin"],
      /lacks CAP_SYS_ADMIN: run it as root, or grant/,
    ],
  ])("%s", async (_, without, message) => {
    expect(await complaint([...without, ...twilld()])).toMatch(message);
  });

  test("a pin path that is on no BPF file system", async () => {
    const path = join(h1.directory, "pins");
    expect(await complaint(twilld(`--pin-path=${path}`))).toMatch(
      /Cannot pin maps at .*\/pins: .* is not on a BPF file system\. Give a --pin-path below \/sys\/fs\/bpf/,
    );
    expect(existsSync(path)).toBe(false);
    expect(existsSync(rundirOf(path))).toBe(false);
  });

  test("a BPF file system that is not mounted, and no privilege to do it", async () => {
    // In a mount namespace of its own, without the privilege to mount.
    const script = 'umount /sys/fs/bpf && exec setpriv --bounding-set=-sys_admin "$@"';
    const argv = ["unshare", "--mount", "--propagation=private", "sh", "-c", script, "sh"];
    expect(await complaint([...argv, ...twilld()])).toMatch(/lacks CAP_SYS_ADMIN: run it as root, or grant/);
  });

  test("a BPF file system that is not mounted yet, but can be", async () => {
    await etcd.put(`${PREFIX}/config`, '{"Network": "172.7.0.0/16", "Backend": {"Type": "alloc"}}');
    const script = 'umount /sys/fs/bpf && exec "$@"';
    const argv = ["unshare", "--mount", "--propagation=private", "sh", "-c", script, "sh", ...twilld()];
    const child = h1.spawn(argv, { cwd: h1.directory });
    await child.line(/info {2}ready: /);
    expect(await child.stop()).toEqual({ code: 0, signal: null });
    // It was mounted and pinned to in the mount namespace that ended with it.
    expect(existsSync(h1.pinPath)).toBe(false);
  });

  describe("a kernel that lacks something", () => {
    const [EPERM, ENODEV, EINVAL, ENOSYS] = [1, 19, 22, 38];
    const [MAP_CREATE, PROG_LOAD, BTF_LOAD] = [0, 5, 18];
    const program = (): string => join(h1.directory, "oldkernel");
    const lacking = (...faults: string[]): string[] => [program(), ...faults, "--", ...twilld("--ip-masq")];
    const unmounted = (folder: string, argv: readonly string[]): string[] => {
      const script = `${folder} && exec "$@"`;
      return ["unshare", "--mount", "--propagation=private", "sh", "-c", script, "sh", ...argv];
    };

    beforeAll(async () => {
      const source = join(repository, "test/e2e/oldkernel.c");
      await exec(["gcc", "-O2", "-Wall", "-o", program(), source]);
    });
    afterAll(() => rmSync(program(), { force: true }));

    test.each([
      ["BPF at all", `bpf=${ENOSYS}`, /ENOSYS/],
      ["the programs' helpers", `bpf:${PROG_LOAD}=${EINVAL}`, /EINVAL/],
      ["the maps' types", `bpf:${MAP_CREATE}=${EINVAL}`, /EINVAL/],
      ["BTF", `bpf:${BTF_LOAD}=${EINVAL}`, /map .\w+. has to have BTF/],
    ])("%s", async (_, fault, reason) => {
      await etcd.put(`${PREFIX}/config`, VXLAN);
      const said = await complaint(lacking(fault));
      expect(said).toMatch(
        /^This kernel \(Linux \S+\) cannot run Twill's programs: .*\. Use Linux 5\.10 or newer, 5\.15 or newer for --ip-masq, with CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_BPF\.$/,
      );
      expect(said).toMatch(reason);
    });

    test.each([
      ["the BPF file system", ENODEV, /No such device \(ENODEV\)/],
      ["the permission to mount it", EPERM, /Operation not permitted \(EPERM\)/],
    ])("%s", async (_, error, reason) => {
      const said = await complaint(unmounted("umount /sys/fs/bpf", lacking(`mount=${error}`)));
      expect(said).toMatch(
        /^Cannot mount the BPF file system at \/sys\/fs\/bpf: .*Mount it from outside: mount -t bpf bpf \/sys\/fs\/bpf$/,
      );
      expect(said).toMatch(reason);
    });

    test("TCX, which was asked for", async () => {
      const LINK_CREATE = 28;
      const argv = [program(), `bpf:${LINK_CREATE}=${EINVAL}`, "--", ...twilld("--attach=tcx")];
      expect(await complaint(argv)).toMatch(
        /^This kernel has no TCX \(Linux 6\.6 on\)\. Use --attach=auto or --attach=clsact\.$/,
      );
    });

    test("types of its own, which Twill does not need", async () => {
      await etcd.put(`${PREFIX}/config`, VXLAN);
      const child = h1.spawn(unmounted("mount -t tmpfs none /sys/kernel/btf", twilld("--ip-masq")), {
        cwd: h1.directory,
      });
      await child.line(/info {2}ready: /);
      expect(await child.stop()).toEqual({ code: 0, signal: null });
      await h1.exec([join(repository, "bin/twill"), "uninstall", `--pin-path=${h1.pinPath}`]);
    });
  });

  test("neither the compiled programs nor clang", async () => {
    const copy = join(h1.directory, "copy");
    mkdirSync(copy);
    for (const name of ["bin", "bpf", "dist/bundle", "dist/proto", "package.json"])
      cpSync(join(repository, name), join(copy, name), { recursive: true });
    symlinkSync(join(repository, "node_modules"), join(copy, "node_modules"));
    const argv = [process.execPath, join(copy, "bin/twilld"), ...twilldFlags(h1, etcd)];
    const env = { PATH: "/nowhere", CLANG: "" };
    const program = ["/usr/bin/env", ...Object.entries(env).map(([name, value]) => `${name}=${value}`)];
    try {
      expect(await complaint([...program, ...argv])).toMatch(
        /the programs are missing \(.*twill\.bpf\.o\) and could not be compiled: .*clang.*install/i,
      );
      rmSync(join(copy, "bpf"), { recursive: true });
      expect(await complaint([...program, ...argv])).toMatch(
        /the programs are missing .*and so are their sources: install Twill again/,
      );
    } finally {
      rmSync(copy, { recursive: true });
    }
  });

  test("a subnet file that cannot be written is tried again, and readiness waits for it", async () => {
    await etcd.put(`${PREFIX}/config`, '{"Network": "172.7.0.0/16", "Backend": {"Type": "alloc"}}');
    const parent = join(h1.directory, "occupied");
    writeFileSync(parent, "");
    const running = spawnTwilld(h1, [...twilldFlags(h1, etcd), `--subnet-file=${parent}/subnet.env`]);
    await running.says(
      /could not be done; trying again.*cannot write .*occupied\/subnet\.env.*check that its directory/,
    );
    await h1.httpStatus(`${running.url}/readyz`, 503);
    rmSync(parent);
    mkdirSync(parent);
    await running.ready();
    expect(await running.stop()).toEqual({ code: 0, signal: null });
    rmSync(parent, { recursive: true });
  });
});

describe("next to a daemon that runs", () => {
  let running: Twilld;
  let before: object;

  beforeAll(async () => {
    // It waits for a config: the moment at which a second one could do the most harm.
    running = await startTwilld(h1, { etcd, timeout: 0 });
    await running.says(/waiting for a network config/);
    before = await leftOn(h1);
  });
  afterAll(async () => {
    await running.stop();
    expect(await leftOn(h1)).toEqual(NOTHING);
  });

  test.each([
    [
      "a port that is in use",
      ["--pin-path=/sys/fs/bpf/twill-other"],
      /health and metrics cannot be served on 127\.0\.0\.1 port 2401 \(.*EADDRINUSE.*\): choose others with --healthz-ip and --healthz-port/,
    ],
    [
      "a pin path that is in use",
      ["--healthz-port=2402"],
      /twilld runs already on .* \(process \d+\): stop it first, or give the one for \/coreos\.com\/network another --pin-path and --subnet-file/,
    ],
  ])("%s", async (_, flags, message) => {
    const child = h1.spawn(twilld(...flags));
    expect(await child.exited).toEqual({ code: 1, signal: null });
    const complaints = child.lines.filter(({ text }) => !/ info /.test(text));
    expect(complaints, child.text()).toHaveLength(1);
    expect(complaints[0]?.text).toMatch(message);
    expect(existsSync("/sys/fs/bpf/twill-other")).toBe(false);
    expect(await leftOn(h1)).toEqual(before);
    await h1.httpStatus(`${running.url}/healthz`, 200);
  });
});

describe("a network config that breaks a rule", () => {
  afterEach(cleanHost);

  test("it waits and says which, each time another; a mended one is taken; a bad one later changes nothing", async () => {
    await etcd.put(`${PREFIX}/config`, "{");
    const running = await startTwilld(h1, { etcd, timeout: 0 });
    const said = /warn {2}waiting for a network config at \/coreos\.com\/network\/config: (.*)/;
    expect((await running.says(said))[1]).toMatch(/JSON/);
    for (const [config, rule] of [
      [
        '{"Backend": {"Type": "vxlan"}}',
        "please define a correct Network parameter in the flannel config: there is none",
      ],
      [
        '{"Network": "172.7.0.0", "Backend": {"Type": "vxlan"}}',
        'Network: invalid IPv4 CIDR format: "172.7.0.0"',
      ],
      [
        '{"Network": "172.7.0.0/16", "SubnetLen": 31, "Backend": {"Type": "vxlan"}}',
        "SubnetLen must be less than /31: it is 31",
      ],
      [
        '{"Network": "172.7.0.0/16", "SubnetMin": "10.0.0.0", "Backend": {"Type": "vxlan"}}',
        "SubnetMin is not in the range of the Network: 10.0.0.0 is not in 172.7.0.0/16",
      ],
      [
        '{"Network": "172.7.0.0/16", "Backend": {"Type": "vxlan", "VNI": 16777216}}',
        "Backend.VNI must be 0 to 16777215 (24 bits): it is 16777216",
      ],
    ] as const) {
      const after = running.process.lines.length;
      await etcd.put(`${PREFIX}/config`, config);
      expect((await running.says(said, { after }))[1]).toBe(rule);
      const status = await running.statusWhere(
        "the rule",
        ({ rejections }) => rejections[0]?.reason === rule,
      );
      expect(status).toMatchObject({ phase: "waiting for the network config", ready: false });
      await h1.httpStatus(`${running.url}/readyz`, 503);
      await h1.httpStatus(`${running.url}/healthz`, 200);
    }
    expect(await leftOn(h1)).toMatchObject({
      devices: ["lo", "eth0"],
      programs: 0,
      leases: [],
      subnetFile: false,
    });
    await etcd.put(`${PREFIX}/config`, VXLAN);
    await running.ready();

    await etcd.put(`${PREFIX}/config`, '{"Network": "172.7.0.0/16", "Backend": {"Type": "pigeon"}}');
    await running.says(
      /the network config cannot be used: unknown backend type: pigeon.*the last good one stays in force/,
    );
    await h1.httpStatus(`${running.url}/readyz`, 200);
    expect((await h1.ipJson("link show dev flannel.1")).length).toBe(1);
    expect(await running.stop()).toEqual({ code: 0, signal: null });
  });
});

describe("etcd's certificates", () => {
  let secure: Lab;
  let tls: Etcd;
  let host: Host;
  let directory: string;

  const file = (name: string): string => join(directory, name);
  const start = (...flags: string[]) => spawnTwilld(host, [...twilldFlags(host, tls), ...flags]);

  beforeAll(async () => {
    secure = await createLab();
    tls = await secure.etcd({ addresses: ["10.4.7.11/24"], tls: true });
    host = await secure.host("h1", { address: "10.4.7.21/24" });
    directory = join(tls.host.directory, "tls");
    const authority = ["-CA", file("ca.pem"), "-CAkey", file("ca-key.pem"), "-CAcreateserial"];
    const request = ["-in", file("client.csr"), "-out", file("expired.pem")];
    await exec(["openssl", "x509", "-req", ...authority, ...request, "-days", "-1"]);
    const self = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"];
    const files = ["-keyout", file("strange-key.pem"), "-out", file("strange.pem")];
    await exec(["openssl", "req", "-x509", ...self, "-subj", "/CN=another ca", ...files]);
    writeFileSync(file("garbage.pem"), "-----BEGIN CERTIFICATE-----\nnonsense\n");
  });

  afterAll(() => secure?.close());

  test.each<[string, Record<string, string>, RegExp]>([
    [
      "a file that is not there",
      { certfile: "none.pem" },
      /the etcd certificate \S+\/none\.pem cannot be read \(ENOENT.*\): check the path/,
    ],
    [
      "a file that is none",
      { certfile: "garbage.pem" },
      /\/garbage\.pem holds no PEM certificate that can be read/,
    ],
    [
      "a CA that is none",
      { cafile: "garbage.pem" },
      /\/garbage\.pem holds no PEM certificate that can be read/,
    ],
    [
      "an expired certificate",
      { certfile: "expired.pem" },
      /the client certificate \S+\/expired\.pem expired on .*: renew it/,
    ],
    [
      "the key of another",
      { keyfile: "strange-key.pem" },
      /the key \S+\/strange-key\.pem does not belong to the certificate \S+\/client\.pem/,
    ],
  ])("%s: exit code 1, the file and the reason", async (_, files, message) => {
    const running = start(...Object.entries(files).map(([name, path]) => `--etcd-${name}=${file(path)}`));
    expect(await within(15_000, running.process.exited, () => "twilld to end")).toEqual({
      code: 1,
      signal: null,
    });
    const complaints = running.process.lines.filter(({ text }) => !/ info /.test(text));
    expect(complaints, running.process.text()).toHaveLength(1);
    expect(complaints[0]?.text).toMatch(message);
    expect(existsSync(host.pinPath)).toBe(false);
    expect(runningDaemon(host.pinPath)).toBeUndefined();
  });

  test("the wrong CA, and a certificate that etcd does not trust: it waits, and names file and reason once", async () => {
    const wrong = start(`--etcd-cafile=${file("strange.pem")}`);
    await wrong.says(
      /no connection to etcd, trying again: etcd at https:\/\/10\.4\.7\.11:2379 shows a certificate that \S+\/strange\.pem did not sign \(.*\): name the CA that signed it with --etcd-cafile/,
    );
    await host.httpStatus(`${wrong.url}/healthz`, 200);
    await host.httpStatus(`${wrong.url}/readyz`, 503);
    await wrong.stop();
    expect(wrong.process.lines.filter(({ text }) => / warn /.test(text))).toHaveLength(1);

    const strange = start(
      `--etcd-certfile=${file("strange.pem")}`,
      `--etcd-keyfile=${file("strange-key.pem")}`,
    );
    await strange.says(
      /does not accept the client certificate \S+\/strange\.pem \(.*\): have it signed by the CA that etcd trusts/,
    );
    expect(await strange.stop()).toEqual({ code: 0, signal: null });
    expect(existsSync(host.pinPath)).toBe(false);
  });
});

describe("records under subnets/ that are none", () => {
  const subnets = `${PREFIX}/subnets/`;
  const lease = (publicIp: string, mac: string) =>
    `{"PublicIP":"${publicIp}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"${mac}"}}`;
  const good = lease("10.4.7.30", "02:00:00:00:00:30");

  /** etcdctl takes up to 128 operations at once. */
  async function putAll(records: readonly (readonly [string, string])[]): Promise<void> {
    for (let at = 0; at < records.length; at += 120) {
      const puts = records
        .slice(at, at + 120)
        .map(([key, value]) => `put ${JSON.stringify(key)} ${JSON.stringify(value)}`);
      const argv = ["etcdctl", `--endpoints=${etcd.endpoints.join(",")}`, "txn"];
      await etcd.host.exec(argv, { env: { ETCDCTL_API: "3" }, input: `\n${puts.join("\n")}\n\n\n` });
    }
  }

  test("1,000 of them are refused one by one, counted and named; nobody else's packets are lost", async () => {
    const h2 = await lab.host("h2", { address: "10.4.7.22/24" });
    await etcd.put(`${PREFIX}/config`, VXLAN);
    const pods: Pod[] = [];
    for (const [host, third] of [
      [h1, 21],
      [h2, 22],
    ] as const) {
      writeFileSync(join(host.directory, "subnet.env"), `FLANNEL_SUBNET=172.7.${third}.1/24\n`);
      await host.bridge("docker0", `172.7.${third}.1/24`);
      pods.push(await host.pod("a", `172.7.${third}.2/24`, { mtu: 1450 }));
    }
    const [a, b] = pods as [Pod, Pod];
    const t1 = await startTwilld(h1, { etcd });
    const t2 = await startTwilld(h2, { etcd });
    await t1.statusWhere("the peer is known", ({ peers }) => peers === 1);
    await t2.statusWhere("the peer is known", ({ peers }) => peers === 1);
    const pings = [await a.startPing(b.address), await b.startPing(a.address)];

    const bad: [key: string, value: string, reason: RegExp][] = [
      ["172.7.40.0-24", "no JSON", /JSON/],
      ["172.7.41.0-24", "", /JSON|empty/],
      ["172.7.42.0-24", "[]", /object/],
      ["172.7.43.0-24", "{}", /PublicIP is missing/],
      ["172.7.44.0-24", lease("10.4.7", "02:00:00:00:00:44"), /PublicIP is not an IPv4 address: "10\.4\.7"/],
      ["172.7.45.0-24", lease("224.0.0.1", "02:00:00:00:00:45"), /PublicIP is not an address of a host/],
      ["172.7.46.0-24", lease("10.4.7.46", "02:00:00:00:46"), /VtepMAC is not a MAC address of 6 bytes/],
      [
        "172.7.47.0-24",
        lease("10.4.7.47", "01:00:5e:00:00:47"),
        /VtepMAC is not the address of a single device/,
      ],
      [
        "172.7.48.0-24",
        `{"PublicIP":"10.4.7.48","BackendType":"vxlan","BackendData":"${"x".repeat(5000)}"}`,
        /too long/,
      ],
      ["172.7.49.1-24", good, /the key is not a subnet/],
      ["172.7.50.0-33", good, /the key is not a subnet/],
      ["172.7.51.0", good, /the key is not a subnet/],
      ["172.7.52.0-24-old", good, /the key is not a subnet/],
      ["172.7.53.0-24\\u001b[2J", good, /the key is not a subnet/],
      // Inside the subnet that h1 holds, and inside that of its peer.
      ["172.7.21.128-25", lease("10.4.7.31", "02:00:00:00:00:31"), /own|overlap|ours/],
      ["172.7.22.128-25", lease("10.4.7.32", "02:00:00:00:00:32"), /overlap/],
    ];
    const many = Array.from({ length: 1000 - bad.length }, (_, n): [string, string] => [
      `node-${n}`,
      `{"n":${n}`,
    ]);
    await putAll(
      [...bad.map(([key, value]) => [key, value] as const), ...many].map(([key, value]) => [
        subnets + key,
        value,
      ]),
    );
    await etcd.put(`${subnets}172.7.30.0-24`, good);
    for (const twilld of [t1, t2]) {
      const { rejections } = await twilld.statusWhere(
        "all bad records and the good one are known",
        (status) => status.rejections.length === 1000 && status.peers === 2,
      );
      expect(new Set(rejections.map(({ key }) => key)).size).toBe(1000);
      if (twilld === t1)
        for (const [key, , reason] of bad)
          expect(rejections.find((one) => one.key === key)?.reason, key).toMatch(reason);
      expect(await twilld.metrics()).toMatch(/^twill_records_rejected 1000$/m);
    }
    await t1.says(/warn {2}record set aside: the key is not a subnet.*key=\S*\/subnets\/172\.7\.49\.1-24/);
    expect(t1.process.lines.filter(({ text }) => /record set aside/.test(text))).toHaveLength(1000);

    // A record that was good: the last good one stays.
    const held = (await etcd.list(subnets)).get(`${subnets}172.7.22.0-24`) ?? "";
    await etcd.put(`${subnets}172.7.30.0-24`, "spoilt");
    await t1.statusWhere(
      "the spoilt one is named",
      ({ rejections, peers }) => rejections.length === 1001 && peers === 2,
    );
    // Even the record of the peer that is spoken to. Its owner sees it, and mends it within a minute if nobody does.
    await etcd.put(`${subnets}172.7.22.0-24`, "spoilt");
    await t2.says(/warn {2}our lease 172\.7\.22\.0-24 was rewritten by another hand: spoilt/);
    await t1.statusWhere(
      "the peer's is named too",
      ({ rejections, peers }) => rejections.length === 1002 && peers === 2,
    );
    await Promise.all(pings.map((ping) => ping.replies(20)));
    await etcd.put(`${subnets}172.7.22.0-24`, held);

    await etcd.ctl("del", `${subnets}172.7.30.0-24`);
    await etcd.ctl("del", `${subnets}node-`, "--prefix");
    for (const [key] of bad) await etcd.ctl("del", subnets + key);
    for (const twilld of [t1, t2]) {
      await twilld.statusWhere(
        "all is well again",
        ({ rejections, peers }) => rejections.length === 0 && peers === 1,
      );
    }
    await Promise.all(pings.map((ping) => ping.replies(20)));
    for (const ping of pings) expect(await ping.stop()).toMatchObject({ lost: [], duplicates: 0 });
    expect((await etcd.list(subnets)).get(`${subnets}172.7.22.0-24`)).toBe(held);
    await t1.stop();
    await t2.stop();
  });
});
