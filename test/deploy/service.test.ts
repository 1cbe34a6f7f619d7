/**
 * deploy/twilld.service. systemd reads it and finds nothing wrong; and the daemon is run as the unit says, with its
 * capabilities and no others, a file system that can be written where the unit allows it, and a notify socket.
 *
 * systemd itself does not run it here: it wants to be the first process of a machine, and what it starts besides
 * (systemd-tmpfiles, udev, the journal) is the machine's, not the lab's.
 */
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { openLibrary, type Watch, watchFd } from "../../loader/ffi.ts";
import { openNotifier } from "../../src/edge/notify.ts";
import { createLab, type Etcd, exec, type Host, type Lab, type Outcome, repository, until } from "../lab.ts";
import { startTwilld, Twilld, twilldFlags, twilldProgram } from "../twilld.ts";

const unit = readFileSync(join(repository, "deploy/twilld.service"), "utf8");
const settings = new Map(
  [...unit.matchAll(/^(\w+)=(.*)$/gm)].map(([, name, value]) => [name ?? "", value ?? ""]),
);
const capabilities = (settings.get("CapabilityBoundingSet") ?? "").split(" ");

/** The unit's file in a directory of its own, with the installed paths replaced by those of this checkout. */
async function verify(name: string, files: Readonly<Record<string, string>>): Promise<string> {
  const directory = mkdtempSync(join(tmpdir(), "twill-units-"));
  try {
    for (const [path, content] of Object.entries(files)) {
      mkdirSync(join(directory, path, ".."), { recursive: true });
      writeFileSync(
        join(directory, path),
        content
          .replaceAll("/usr/local/bin/", `${repository}/bin/`)
          .replaceAll("/usr/local/lib/twill/", `${repository}/`),
      );
    }
    const { stdout, stderr, code } = await exec(["systemd-analyze", "verify", "--man=no", name], {
      env: { SYSTEMD_UNIT_PATH: `${directory}:/lib/systemd/system` },
      check: false,
    });
    const said = (stdout + stderr)
      .split("\n")
      // What Debian's own units are told is not for us.
      .filter((line) => /twill|mk-docker-opts/.test(line));
    return said.length > 0 ? said.join("\n") : code === 0 ? "" : stdout + stderr;
  } finally {
    rmSync(directory, { recursive: true });
  }
}

describe("systemd", () => {
  it("finds nothing wrong with the unit", async () => {
    expect(await verify("twilld.service", { "twilld.service": unit })).toBe("");
  });

  it("tells of a word that it does not know", async () => {
    const wrong = unit.replace("WatchdogSec=", "WatchdogSeconds=");
    expect(await verify("twilld.service", { "twilld.service": wrong })).toContain("WatchdogSeconds");
  });

  it("finds nothing wrong with Docker's unit and our drop-in", async () => {
    const dropIn = readFileSync(join(repository, "deploy/docker-drop-in.conf"), "utf8");
    const files = { "twilld.service": unit, "docker.service.d/twill.conf": dropIn };
    expect(await verify("docker.service", files)).toBe("");
  });

  it("gets Debian's command line for Docker from the drop-in, with three options more", () => {
    const command = (text: string) => /^ExecStart=(\S.*)$/m.exec(text)?.[1];
    const debian = command(readFileSync("/lib/systemd/system/docker.service", "utf8"));
    const ours = command(readFileSync(join(repository, "deploy/docker-drop-in.conf"), "utf8"));
    expect(ours).toBe(`${debian} $DOCKER_OPT_BIP $DOCKER_OPT_IPMASQ $DOCKER_OPT_MTU`);
  });
});

// A notify socket as systemd holds one. Node has no datagram sockets of this family.
const libc = openLibrary("libc.so.6");
const socket = libc.prepare("socket", "int", ["int", "int", "int"]);
const bind = libc.prepare("bind", "int", ["int", "pointer", "uint"]);
const recv = libc.prepare("recv", "ssize", ["int", "pointer", "size", "int"]);
const close = libc.prepare("close", "int", ["int"]);

/** Reads all the time, as systemd does: with ten messages unread the socket is full, and loses what comes. */
class Manager {
  readonly path: string;
  readonly messages: string[] = [];
  readonly #fd: number;
  #watch: Watch | undefined;
  #ring: () => void = () => undefined;

  constructor(path: string, options: { readonly listens?: boolean } = {}) {
    this.path = path;
    this.#fd = socket(1, 2, 0);
    const address = Buffer.from(`\x01\0${path}\0`, "latin1");
    if (bind(this.#fd, address, address.length) !== 0) throw new Error(`cannot bind ${path}`);
    if (options.listens !== false) this.listen();
  }

  listen(): void {
    this.#watch = watchFd(this.#fd, () => this.#read(), { keepAlive: false });
  }

  #read(): void {
    const bytes = Buffer.alloc(4096);
    for (let length = 1; length > 0; ) {
      length = recv(this.#fd, bytes, bytes.length, 0x40);
      if (length > 0) this.messages.push(bytes.toString("utf8", 0, length));
    }
    this.#ring();
  }

  /** Waits until a message came so many times. */
  async hears(message: string, times = 1): Promise<void> {
    const wake = (ring: () => void) => {
      this.#ring = ring;
      return () => undefined;
    };
    const count = () => this.messages.filter((text) => text === message).length;
    await until(`${message} at ${this.path}, not only ${this.messages}`, () => count() >= times, { wake });
  }

  close(): void {
    this.#watch?.close();
    close(this.#fd);
  }
}

describe("the daemon", () => {
  let lab: Lab;
  let etcd: Etcd;
  let host: Host;
  let other: Twilld;
  let managers = 0;

  beforeAll(async () => {
    lab = await createLab();
    etcd = await lab.etcd({ addresses: ["10.4.7.11/24"] });
    await etcd.put("/coreos.com/network/config", '{"Network": "172.7.0.0/16", "Backend": {"Type": "vxlan"}}');
    host = await lab.host("h1", { address: "10.4.7.21/24" });
    other = await startTwilld(await lab.host("h2", { address: "10.4.7.22/24" }), { etcd });
  });
  afterAll(() => lab?.close());

  /** A command as the unit runs it, with these capabilities. */
  function asUnit(argv: readonly string[], allowed: readonly string[]): string[] {
    const bounding = ["-all", ...allowed.map((name) => `+${name.replace("CAP_", "").toLowerCase()}`)];
    // ProtectSystem=strict: all is read-only but /dev, /proc, /sys and the two folders of RuntimeDirectory=.
    const prepare = [
      "mkdir -p /run/twill",
      "mount --bind /run/twill /run/twill",
      `mount --bind ${host.directory} ${host.directory}`,
      "mount -o remount,bind,ro /",
      `exec setpriv --inh-caps=-all --bounding-set=${bounding.join(",")} --no-new-privs -- "$@"`,
    ];
    return ["unshare", "--mount", "--", "sh", "-ec", prepare.join("\n"), "sh", ...argv];
  }

  async function start(
    allowed: readonly string[],
    flags: readonly string[] = [],
    manager = new Manager(join(host.directory, `notify${managers++}`)),
  ): Promise<{ twilld: Twilld; manager: Manager }> {
    const all = [...twilldFlags(host, etcd), ...flags];
    const env = { NOTIFY_SOCKET: manager.path, WATCHDOG_USEC: "400000", WATCHDOG_PID: undefined };
    const child = host.spawn(asUnit([twilldProgram, ...all], allowed), { cwd: host.directory, env });
    return { twilld: new Twilld(host, child, all), manager };
  }

  const twill = (argv: readonly string[], allowed: readonly string[] = capabilities): Promise<Outcome> =>
    host.exec(asUnit([join(repository, "bin/twill"), ...argv, `--pin-path=${host.pinPath}`], allowed), {
      check: false,
    });

  describe.each(["tcx", "clsact"])("with the unit's capabilities and --attach=%s", (attach) => {
    it("does all it is for, tells that it is ready and alive, and is taken away", async () => {
      const { twilld, manager } = await start(capabilities, [`--attach=${attach}`]);
      try {
        await twilld.ready(8000);
        await manager.hears("READY=1");
        await manager.hears("WATCHDOG=1", 3);
        const own = readFileSync(`/proc/${twilld.process.pid}/status`, "utf8");
        expect(/^CapEff:\t(\w+)$/m.exec(own)?.[1]).toBe("0000000000203000");
        const subnet = twilld.subnetEnv.FLANNEL_SUBNET ?? "";
        const bridge = await host.bridge("docker0", subnet);
        const pod = await host.pod("a", subnet.replace(/\.1\/24$/, ".2/24"), { bridge });
        const remote = (other.subnetEnv.FLANNEL_SUBNET ?? "").replace(/\.1\/24$/, ".0");
        await twilld.statusWhere("one peer", ({ peers }) => peers === 1);
        await until("the other host to know this one", () => other.status?.peers === 1);
        expect((await pod.ping(remote, { count: 20 })).lost).toEqual([]);
        await twilld.statusWhere("nothing fails, and the pod is known", (status) => {
          return status.failures.length === 0 && status.endpoints === 1;
        });
        expect(twilld.packets("from_pod", "encapsulated")).toBeGreaterThan(0);
        const said = await twill(["status", "--json"]);
        expect({ code: said.code, stderr: said.stderr }).toEqual({ code: 0, stderr: "" });
        expect(await twilld.stop("SIGTERM")).toEqual({ code: 0, signal: null });
        await manager.hears("STOPPING=1");
        expect((await pod.ping(remote, { count: 5 })).lost).toEqual([]);
        const gone = await twill(["uninstall"]);
        expect(gone).toMatchObject({ code: 0, stderr: "" });
        expect(gone.stdout).toContain("device flannel.1");
        expect(await host.ipJson("link show type vxlan")).toEqual([]);
        await pod.remove();
        await host.ip("link delete docker0");
      } finally {
        manager.close();
        if (twilld.process.running) await twilld.stop();
      }
    });
  });

  it("tells again that it is ready if the manager had no room for it", async () => {
    const deaf = new Manager(join(host.directory, `notify${managers++}`), { listens: false });
    const notifier = openNotifier({ NOTIFY_SOCKET: deaf.path });
    for (let i = 0; notifier.status("busy") === undefined; i++) expect(i).toBeLessThan(10_000);
    const { twilld } = await start(capabilities, [], deaf);
    try {
      await twilld.says(/the service manager was not told that we are ready; trying again.*EAGAIN/);
      deaf.listen();
      await deaf.hears("READY=1");
    } finally {
      deaf.close();
      await twilld.stop();
    }
  });

  it("goes on without CAP_NET_RAW, probes nobody, and says so once", async () => {
    const { twilld, manager } = await start(
      capabilities.filter((name) => name !== "CAP_NET_RAW"),
      ["--peer-probes=1"],
    );
    try {
      await twilld.ready();
      const { probes } = await twilld.statusWhere("why peers are not probed", (status) => {
        return status.probes?.problem !== undefined;
      });
      expect(probes).toMatchObject({
        reachable: 0,
        unreachable: 0,
        problem: expect.stringMatching(/CAP_NET_RAW/),
      });
      const said = twilld.process.lines.filter(({ text }) => text.includes("peers are not probed"));
      expect(said).toHaveLength(1);
      expect((await twill(["status"])).stdout).toMatch(/^probes +none: .*CAP_NET_RAW/m);
    } finally {
      manager.close();
      await twilld.stop();
    }
  });

  it.each(["CAP_NET_ADMIN", "CAP_SYS_ADMIN"])("needs %s, and says so in a line", async (missing) => {
    const rest = capabilities.filter((name) => name !== missing);
    const { twilld, manager } = await start(rest);
    expect((await twilld.process.exited).code).toBe(1);
    manager.close();
    const words = twilld.process.lines.filter(({ text }) => !text.includes("twilld starts"));
    expect(words).toHaveLength(1);
    expect(words[0]?.text).toMatch(new RegExp(`lacks ${missing}\\b.*AmbientCapabilities=`));
    const { code, stdout, stderr } = await twill(["uninstall"], rest);
    expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
    expect(stderr).toMatch(new RegExp(`^twill: .* lacks ${missing}\\b.*\\n$`));
  });
});
