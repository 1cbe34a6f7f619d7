/**
 * Debian's Docker on hosts of the lab: on each a dockerd of its own, with its own containers, images and sockets.
 *
 * A dockerd lives in a process and a mount namespace of its own, whose first process does nothing but reap. When
 * that one ends, however it ends, the kernel ends dockerd, containerd, every shim and every container with it, and
 * all their mounts go; dockerd alone can be restarted while its containers run. The host's network namespace is
 * the lab's. Of what Docker makes, only its control groups have names of the machine: `twill-<run>-<host>`.
 *
 * How it is started is what deploy/ says: options out of mk-docker-opts.sh, in the command line of the drop-in.
 */
import {
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmdirSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { dirname, join } from "node:path";
import {
  exec,
  type Host,
  type Lab,
  Namespace,
  type Outcome,
  type Process,
  repository,
  runId,
  until,
} from "./lab.ts";
import { type ExecOptions, patience } from "./process.ts";

/** The image of every container: busybox, curl, ping, and an nginx that answers with its client's address. */
export const IMAGE = "lab";

const NGINX = `
daemon off;
master_process off;
user root;
error_log stderr notice;
pid /run/nginx.pid;
events {}
http {
  log_format seen "$remote_addr $request_uri";
  access_log /dev/stdout seen;
  default_type text/plain;
  server {
    listen 80;
    location / { return 200 "$remote_addr\\n"; }
    location = /large { root /srv; }
  }
}
`;

/** Makes the root of the image in a directory, out of programs of this machine. */
export async function makeImage(directory: string): Promise<string> {
  const root = join(directory, "image");
  for (const name of ["bin", "etc", "run", "tmp", "srv", "var/lib/nginx", "var/log/nginx"]) {
    mkdirSync(join(root, name), { recursive: true });
  }
  cpSync("/bin/busybox", join(root, "bin/busybox"));
  for (const name of ["sh", "ip", "sleep"]) {
    symlinkSync("busybox", join(root, "bin", name));
  }
  const programs = ["/usr/sbin/nginx", "/usr/bin/curl", "/usr/bin/ping"];
  const { stdout } = await exec(["ldd", ...programs]);
  const libraries = [...stdout.matchAll(/(\/\S+) \(0x/g)].map(([, path]) => path ?? "");
  for (const path of [...programs, ...libraries]) {
    mkdirSync(join(root, dirname(path)), { recursive: true });
    cpSync(path, join(root, path), { dereference: true });
  }
  writeFileSync(join(root, "etc/passwd"), "root:x:0:0::/:/bin/sh\n");
  writeFileSync(join(root, "etc/group"), "root:x:0:\n");
  writeFileSync(join(root, "etc/nginx.conf"), NGINX);
  writeFileSync(join(root, "srv/large"), Buffer.alloc(4 << 20));
  const tar = join(directory, "image.tar");
  await exec(["tar", "-C", root, "-cf", tar, "."]);
  return tar;
}

/** The variables of a file of NAME="value" lines. */
function readEnvironment(path: string): Record<string, string> {
  const lines = readFileSync(path, "utf8").trim().split("\n");
  return Object.fromEntries(
    lines.map((line) => {
      const [, name = "", value = ""] = /^(\w+)="(.*)"$/.exec(line) ?? [];
      return [name, value];
    }),
  );
}

/** The options that a unit's ExecStart= gives to dockerd, with variables put in as systemd does. */
export function optionsOf(unit: string, variables: Readonly<Record<string, string>>): string[] {
  const command = /^ExecStart=\/usr\/sbin\/dockerd (.+)$/m.exec(unit)?.[1] ?? "";
  return command
    .split(" ")
    .flatMap((word) => (word.startsWith("$") ? (variables[word.slice(1)] ?? "").split(" ") : [word]))
    .filter((word) => word !== "");
}

/** A container that runs. */
export interface Container {
  readonly name: string;
  readonly address: string;
}

export class Docker {
  readonly host: Host;
  readonly #directory: string;
  readonly #cgroup: string;
  readonly #init: Process;
  #dockerd: Process | undefined;

  private constructor(host: Host, init: Process) {
    this.host = host;
    this.#directory = join(host.directory, "docker");
    this.#cgroup = `twill-${runId}-${host.lab.id}-${host.name}`;
    this.#init = init;
    mkdirSync(this.#directory, { recursive: true });
  }

  /** Starts Docker on a host whose subnet file is written; `flags` come behind those of deploy/. */
  static async start(host: Host, flags: readonly string[] = []): Promise<Docker> {
    const namespaces = ["--mount", "--pid", "--fork", "--mount-proc", "--kill-child"];
    const init = host.spawn([
      "unshare",
      ...namespaces,
      "/usr/bin/tini",
      "--",
      "sh",
      "-c",
      "echo up; exec sleep infinity",
    ]);
    await init.line(/^up$/);
    const docker = new Docker(host, init);
    await docker.up(flags);
    return docker;
  }

  /** Starts dockerd. */
  async up(flags: readonly string[] = []): Promise<void> {
    const environment = join(this.#directory, "docker_opts.env");
    const script = join(repository, "deploy/mk-docker-opts.sh");
    await this.host.exec([script, "-i", "-f", join(this.host.directory, "subnet.env"), "-d", environment]);
    const dropIn = readFileSync(join(repository, "deploy/docker-drop-in.conf"), "utf8");
    const given = optionsOf(dropIn, readEnvironment(environment)).filter(
      // The lab's Docker has a socket and a containerd of its own.
      (option) => !["-H", "fd://"].includes(option) && !option.startsWith("--containerd="),
    );
    const path = (name: string) => join(this.#directory, name);
    const own = [`--data-root=${path("data")}`, `--exec-root=${path("exec")}`, `--pidfile=${path("pid")}`];
    own.push(
      `--host=unix://${path("socket")}`,
      "--storage-driver=vfs",
      `--config-file=${path("daemon.json")}`,
    );
    own.push("--exec-opt=native.cgroupdriver=cgroupfs", `--cgroup-parent=/${this.#cgroup}`);
    writeFileSync(path("daemon.json"), "{}\n");
    const inside = ["nsenter", `--target=${this.#firstProcess}`, "--mount", "--pid", "--"];
    this.#dockerd = this.host.spawn([...inside, "/usr/sbin/dockerd", ...own, ...given, ...flags]);
    await this.#dockerd.line(/API listen on/, { timeout: 2 * patience });
  }

  /** Ends dockerd as systemd does. Containers end with it unless it runs with --live-restore. */
  async down(): Promise<void> {
    const dockerd = this.#dockerd;
    if (dockerd === undefined) return;
    const [pid] = childrenOf(dockerd.pid);
    if (pid !== undefined) process.kill(pid, "SIGTERM");
    await dockerd.exited;
    this.#dockerd = undefined;
  }

  /** Runs the `docker` command; returns what it printed. */
  async run(...argv: string[]): Promise<string> {
    return (await this.try(argv)).stdout.trim();
  }

  /** Runs the `docker` command, which may fail if `check` is false. */
  try(argv: readonly string[], options: ExecOptions = {}): Promise<Outcome> {
    return exec(["/usr/bin/docker", "-H", `unix://${join(this.#directory, "socket")}`, ...argv], options);
  }

  async import(tar: string): Promise<void> {
    await this.run("import", tar, IMAGE);
  }

  /** Starts a container in the background. */
  async container(
    name: string,
    argv: readonly string[],
    options: readonly string[] = [],
  ): Promise<Container> {
    await this.run("run", "--detach", "--name", name, "--stop-signal=SIGKILL", ...options, IMAGE, ...argv);
    return this.inspect(name);
  }

  /** Starts an nginx; see `requests`. */
  async nginx(name: string, options: readonly string[] = []): Promise<Container> {
    return this.container(name, ["/usr/sbin/nginx", "-e", "stderr", "-c", "/etc/nginx.conf"], options);
  }

  async inspect(name: string): Promise<Container> {
    const address = await this.run("inspect", "--format={{.NetworkSettings.IPAddress}}", name);
    if (address !== "") return { name, address };
    const { stdout, stderr } = await this.try(["logs", name]);
    throw new Error(`container ${name} on ${this.host.name} has no address; it said:\n${stdout}${stderr}`);
  }

  /** A container once it has an address (again); an nginx, once it serves. */
  async running(name: string): Promise<Container> {
    const address = await until(`container ${name} to run`, async () => {
      const format = "--format={{.State.Running}} {{.NetworkSettings.IPAddress}}";
      const [runs, found] = (await this.run("inspect", format, name)).split(" ");
      return runs === "true" && found !== "" && found;
    });
    return { name, address };
  }

  /** The network of a container, for as long as it runs; dockerd may come and go meanwhile. */
  async inside(name: string): Promise<Namespace> {
    const inner = await this.run("inspect", "--format={{.State.Pid}}", name);
    // Docker's processes have other numbers here than among themselves.
    const pid = readdirSync("/proc").find((entry) => {
      if (!/^\d+$/.test(entry)) return false;
      const [, , number] = /^NSpid:\t(\d+)\t(\d+)/m.exec(readIfThere(`/proc/${entry}/status`)) ?? [];
      return number === inner && readIfThere(`/proc/${entry}/cgroup`).includes(this.#cgroup);
    });
    if (pid === undefined) throw new Error(`container ${name} on ${this.host.name} does not run`);
    return new Inside(this.host.lab, `${this.host.name}-${name}`, pid);
  }

  /** Starts a container that runs a command to its end, and returns what it printed. */
  async once(script: string): Promise<string> {
    return this.run("run", "--rm", IMAGE, "/bin/sh", "-c", script);
  }

  /** Addresses of an nginx's clients, by its access log, once it has at least so many. */
  async requests(name: string, count: number): Promise<string[]> {
    return until(`${name} to log ${count} requests`, async () => {
      const lines = (await this.run("logs", name)).split("\n").filter((line) => /^\d\S* \//.test(line));
      return lines.length >= count ? lines.map((line) => line.split(" ")[0] ?? "") : undefined;
    });
  }

  /** Packets that Docker's MASQUERADE rule has counted; undefined if there is no such rule. */
  async masqueraded(): Promise<number | undefined> {
    const { stdout } = await this.host.exec(["iptables", "-t", "nat", "-vxnL", "POSTROUTING"]);
    const line = stdout.split("\n").find((text) => /MASQUERADE\s+\w+\s+--\s+\*\s+!docker0/.test(text));
    return line === undefined ? undefined : Number(line.trim().split(/\s+/)[0]);
  }

  /** Ends everything of this Docker and waits for it. The lab ends it too, but does not wait for containers. */
  async close(): Promise<void> {
    if (this.#init.running) process.kill(this.#firstProcess, "SIGKILL");
    await this.#init.exited;
    await this.#dockerd?.exited;
    removeCgroups(this.#cgroup);
  }

  /** The process that the others end with, by its number in the lab. */
  get #firstProcess(): number {
    const [pid] = childrenOf(this.#init.pid);
    if (pid === undefined) throw new Error(`Docker on ${this.host.name} has ended`);
    return pid;
  }
}

class Inside extends Namespace {
  readonly #pid: string;

  constructor(lab: Lab, name: string, pid: string) {
    super(lab, name);
    this.#pid = pid;
  }

  override get path(): string {
    return `/proc/${this.#pid}/ns/net`;
  }
}

/** The content of a file of /proc; empty if its process has gone. */
function readIfThere(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    if (["ENOENT", "ESRCH"].includes((error as NodeJS.ErrnoException).code ?? "")) return "";
    throw error;
  }
}

export function childrenOf(pid: number): number[] {
  const path = `/proc/${pid}/task/${pid}/children`;
  if (!existsSync(path)) return [];
  return readFileSync(path, "utf8").trim().split(" ").filter(Boolean).map(Number);
}

/** Removes the control groups of a name, in whatever hierarchies there are. */
export function removeCgroups(name: string): void {
  const root = "/sys/fs/cgroup";
  const remove = (directory: string) => {
    for (const entry of readdirSync(directory, { withFileTypes: true })) {
      if (entry.isDirectory()) remove(join(directory, entry.name));
    }
    rmdirSync(directory);
  };
  for (const directory of [root, ...readdirSync(root).map((entry) => join(root, entry))]) {
    if (existsSync(join(directory, name))) remove(join(directory, name));
  }
}
