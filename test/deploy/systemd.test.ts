/**
 * deploy/twilld.service under a running systemd: the real one, as the first process of a machine of its own that
 * shares this one's root through an overlay. It reads no unit but ours and the targets that ours hangs on, so that
 * nothing of this machine is started a second time or set up anew.
 *
 * The unit is as it ships. A drop-in only sends its log to a file, and FLANNELD_* come from /etc/default/twilld, as
 * they do for its users.
 */
import { copyFileSync, existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, expect, it } from "vitest";
import { childrenOf, removeCgroups } from "../docker.ts";
import {
  createLab,
  type Etcd,
  type Host,
  type Lab,
  type Outcome,
  type Pod,
  type Process,
  repository,
  runId,
  until,
} from "../lab.ts";
import { startTwilld, type Twilld } from "../twilld.ts";

/** What twilld.service, and systemd with it, refer to. */
const TARGETS = ["sysinit", "basic", "shutdown", "network-online"];
const MAIN = "0000000000203000"; // CAP_NET_ADMIN, CAP_NET_RAW and CAP_SYS_ADMIN

/**
 * Runs first in the new namespaces, and becomes systemd. /sys is read-only, as in other containers, so that systemd
 * keeps its hands off this machine's devices; what it needs of it is the machine's own.
 */
const BOOT = `
machine=$1 repository=$2 node=$3
mount -t tmpfs none "$machine/disk"
mkdir "$machine"/disk/{root,upper,work}
root=$machine/disk/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$machine/disk/upper,workdir=$machine/disk/work" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs none "$root/sys/fs/cgroup"
mount -t cgroup2 none "$root/sys/fs/cgroup"
mount -t bpf bpf "$root/sys/fs/bpf"
mount -t tmpfs none "$root/run"
mount -t tmpfs none "$root/dev"
for name in null zero full random urandom; do
  touch "$root/dev/$name"
  mount --bind "/dev/$name" "$root/dev/$name"
done
mkdir -p "$root/$repository" "$root/usr/local/bin" "$root/etc/default" "$root/former"
mount --bind "$repository" "$root/$repository"
ln -sf "$repository/bin/twilld" "$repository/bin/twill" "$root/usr/local/bin/"
[ -e "$root/usr/local/bin/node" ] || ln -s "$node" "$root/usr/local/bin/node"
cp -r "$machine/units" "$root/units"
cp "$machine/environment" "$root/etc/default/twilld"
cd "$root"
pivot_root . former
umount -l /former
exec env -i container=lab PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_UNIT_PATH=/units \\
  /lib/systemd/systemd --system --unit=basic.target --log-target=console --show-status=no \\
  systemd.unified_cgroup_hierarchy=1
`;

let lab: Lab;
let etcd: Etcd;
let host: Host;
let pod: Pod;
let remote: string;
let other: Twilld;
let machine: Process;
const cgroup = (): string => `twill-${runId}-${lab.id}-systemd`;

/** The first process of the machine, systemd itself. */
function init(): number {
  const [pid] = childrenOf(machine.pid);
  if (pid === undefined) throw new Error(`systemd has ended:\n${machine.text()}`);
  return pid;
}

/** Runs a program on the machine. */
function inside(argv: readonly string[]): Promise<Outcome> {
  const machineOf = ["--mount", "--pid", "--net", "--cgroup"];
  return host.exec(["nsenter", `--target=${init()}`, ...machineOf, "--", ...argv], { check: false });
}

/** A file of the machine. */
const file = (path: string): string => `/proc/${init()}/root${path}`;
const log = (): string => (existsSync(file("/run/log")) ? readFileSync(file("/run/log"), "utf8") : "");

async function systemctl(...argv: string[]): Promise<string> {
  const { code, stdout, stderr } = await inside(["systemctl", ...argv]);
  if (code !== 0) throw new Error(`systemctl ${argv.join(" ")}: ${stderr}\n${log()}\n${machine.text()}`);
  return stdout.trim();
}

/** Properties of the service. */
async function properties(): Promise<Record<string, string>> {
  const names = ["ActiveState", "SubState", "MainPID", "NRestarts", "Result", "ExecMainStatus"];
  const text = await systemctl("show", "twilld", ...names.map((name) => `--property=${name}`));
  return Object.fromEntries(text.split("\n").map((line) => line.split("=") as [string, string]));
}

beforeAll(async () => {
  lab = await createLab();
  etcd = await lab.etcd({ addresses: ["10.4.7.11/24"] });
  await etcd.put("/coreos.com/network/config", '{"Network": "172.7.0.0/16", "Backend": {"Type": "vxlan"}}');
  host = await lab.host("h1", { address: "10.4.7.21/24" });
  other = await startTwilld(await lab.host("h2", { address: "10.4.7.22/24" }), { etcd });
  remote = (other.subnetEnv.FLANNEL_SUBNET ?? "").replace(/\.1\/24$/, ".0");

  const directory = join(host.directory, "machine");
  const path = (...names: string[]) => join(directory, ...names);
  for (const name of ["disk", "units/twilld.service.d"]) mkdirSync(path(name), { recursive: true });
  copyFileSync(join(repository, "deploy/twilld.service"), path("units/twilld.service"));
  writeFileSync(path("units/twilld.service.d/log.conf"), "[Service]\nStandardOutput=append:/run/log\n");
  for (const target of TARGETS)
    copyFileSync(`/lib/systemd/system/${target}.target`, path("units", `${target}.target`));
  writeFileSync(
    path("environment"),
    `FLANNELD_IFACE=eth0\nFLANNELD_ETCD_ENDPOINTS=${etcd.endpoints.join(",")}\nFLANNELD_IP_MASQ=true\n`,
  );

  // A control group of the second hierarchy, in which systemd is the root of its own.
  const enter = `
    place=$(findmnt --first-only --noheadings --output=TARGET --types=cgroup2)
    mkdir "$place/$1"
    echo $$ >"$place/$1/cgroup.procs"
    shift
    exec "$@"`;
  const namespaces = ["--mount", "--pid", "--cgroup", "--ipc", "--uts", "--fork", "--kill-child"];
  const boot = ["bash", "-euc", BOOT, "boot", directory, repository, process.execPath];
  machine = host.spawn(["sh", "-euc", enter, "sh", cgroup(), "unshare", ...namespaces, "--", ...boot]);
  await until("systemd to have started", async () => {
    if (!machine.running) throw new Error(`the machine has ended:\n${machine.text()}`);
    // It is not there yet, or is still what it begins as.
    if (childrenOf(machine.pid).length === 0) return false;
    const { stdout } = await inside(["systemctl", "is-system-running"]);
    return stdout.trim() === "running";
  });
});

afterAll(async () => {
  // With the first process end all others.
  if (machine?.running) for (const pid of childrenOf(machine.pid)) process.kill(pid, "SIGKILL");
  await machine?.stop();
  if (lab !== undefined) removeCgroups(cgroup());
  await lab?.close();
});

it("starts it with the unit's capabilities and sandbox, and waits until it says that it is ready", async () => {
  expect(readFileSync(`/proc/${init()}/comm`, "utf8").trim()).toBe("systemd");
  await systemctl("start", "twilld");
  // The command has returned: by then the subnet is there.
  expect(readFileSync(file("/run/flannel/subnet.env"), "utf8")).toContain("FLANNEL_IPMASQ=true");
  const { MainPID = "", ...state } = await properties();
  expect(state).toMatchObject({ ActiveState: "active", SubState: "running", NRestarts: "0" });
  const { stdout: status } = await inside(["cat", `/proc/${MainPID}/status`]);
  expect(status).toContain(`CapEff:\t${MAIN}`);
  expect(status).toContain(`CapBnd:\t${MAIN}`);
  expect(status).toMatch(/^NoNewPrivs:\t1$/m);
  const { stdout: mounts } = await inside(["cat", `/proc/${MainPID}/mounts`]);
  expect(mounts).toMatch(/^overlay \/ overlay ro,/m);
  expect(mounts).toMatch(/ \/run\/flannel tmpfs rw,/);
});

it("forwards, through a SIGKILL from which systemd starts it again", async () => {
  const subnet =
    /FLANNEL_SUBNET=(\S+)/.exec(readFileSync(file("/run/flannel/subnet.env"), "utf8"))?.[1] ?? "";
  const bridge = await host.bridge("docker0", subnet);
  pod = await host.pod("a", subnet.replace(/\.1\/24$/, ".2/24"), { bridge });
  await until("the nodes to know each other", async () => {
    const { received } = await pod.ping(remote, { count: 1 });
    return received === 1;
  });
  const ping = await pod.startPing(remote);
  const { MainPID: former } = await properties();
  await systemctl("kill", "--signal=KILL", "twilld");
  await until("systemd to have started it again", async () => {
    const { ActiveState, NRestarts, MainPID } = await properties();
    return ActiveState === "active" && NRestarts === "1" && MainPID !== former;
  });
  expect((await ping.stop()).lost).toEqual([]);
  expect(log().match(/ready: pods are forwarded/g)).toHaveLength(2);
});

it("stops it cleanly, and pods are forwarded on until it is uninstalled", async () => {
  await systemctl("stop", "twilld");
  expect(await properties()).toMatchObject({
    ActiveState: "inactive",
    SubState: "dead",
    Result: "success",
    ExecMainStatus: "0",
  });
  expect((await pod.ping(remote, { count: 10 })).lost).toEqual([]);
  const { code, stdout, stderr } = await inside(["twill", "uninstall"]);
  expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
  expect(stdout).toContain("device flannel.1");
});
