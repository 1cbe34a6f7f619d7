/**
 * deploy/twilld.ini under Debian's supervisord, with a configuration and a socket of its own. The file is read as it
 * is, but for the paths of the installation and of the machine's logs, and the flags that are the lab's.
 */
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, expect, it } from "vitest";
import { parseFlags } from "../../src/flags.ts";
import {
  createLab,
  type Etcd,
  type Host,
  type Lab,
  type Pod,
  type Process,
  repository,
  until,
} from "../lab.ts";
import { startTwilld, type Twilld, twilldFlags, twilldProgram } from "../twilld.ts";

let lab: Lab;
let etcd: Etcd;
let host: Host;
let pod: Pod;
let remote: string;
let other: Twilld;
let supervisord: Process;
let configuration: string;
let logs: string;

beforeAll(async () => {
  lab = await createLab();
  etcd = await lab.etcd({ addresses: ["10.4.7.11/24"] });
  await etcd.put("/coreos.com/network/config", '{"Network": "172.7.0.0/16", "Backend": {"Type": "vxlan"}}');
  host = await lab.host("h1", { address: "10.4.7.21/24" });
  const far = await lab.host("h2", { address: "10.4.7.22/24" });
  // Each node asks for its own subnet: one drawn at random could be the other's.
  for (const [node, number] of [
    [host, 21],
    [far, 22],
  ] as const) {
    const former = `FLANNEL_NETWORK=172.7.0.0/16\nFLANNEL_SUBNET=172.7.${number}.1/24\n`;
    writeFileSync(join(node.directory, "subnet.env"), former);
  }
  other = await startTwilld(far, { etcd });
  const bridge = await host.bridge("docker0", "172.7.21.1/24");
  pod = await host.pod("a", "172.7.21.2/24", { bridge });
  remote = (other.subnetEnv.FLANNEL_SUBNET ?? "").replace(/\.1\/24$/, ".0");

  logs = join(host.directory, "log");
  mkdirSync(logs);
  const program = readFileSync(join(repository, "deploy/twilld.ini"), "utf8")
    .replace(/^command=.*$/m, `command=${[twilldProgram, ...twilldFlags(host, etcd)].join(" ")}`)
    .replaceAll("/var/log/", `${logs}/`);
  const path = (name: string) => join(host.directory, name);
  writeFileSync(path("twilld.ini"), program);
  configuration = path("supervisord.conf");
  writeFileSync(
    configuration,
    `[unix_http_server]
file=${path("supervisor.sock")}
[supervisord]
nodaemon=true
user=root
logfile=${path("supervisord.log")}
pidfile=${path("supervisord.pid")}
childlogdir=${logs}
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://${path("supervisor.sock")}
[include]
files=${path("twilld.ini")}
`,
  );
  supervisord = host.spawn(["/usr/bin/supervisord", "-c", configuration]);
  await state("RUNNING");
  await host.httpStatus("http://127.0.0.1:2401/readyz", 200, { timeout: 30_000 });
  await until("the other host to know this one", () => other.status?.peers === 1);
  await until(
    "the pod to reach the other host",
    async () => (await pod.ping(remote, { count: 1 })).received === 1,
  );
  expect((await pod.ping(remote)).lost).toEqual([]);
});

afterAll(async () => {
  await supervisord?.stop();
  await lab?.close();
});

async function control(...argv: string[]): Promise<string> {
  const { stdout } = await host.exec(["/usr/bin/supervisorctl", "-c", configuration, ...argv], {
    check: false,
  });
  return stdout.trim();
}

/** Waits until supervisord says this of the program, and returns the process's number. */
function state(wanted: string): Promise<number> {
  return until(
    `twilld to be ${wanted}`,
    async () => {
      const said = await control("status", "twilld");
      return said.split(/\s+/)[1] === wanted && (Number(/pid (\d+)/.exec(said)?.[1]) || 0) + 1;
    },
    { timeout: 30_000 },
  ).then((number) => number - 1);
}

const log = (stream: "stdout" | "stderr") => readFileSync(join(logs, `twilld.${stream}.log`), "utf8");

it("starts it, and keeps what it says", async () => {
  const pid = await state("RUNNING");
  expect(readFileSync(`/proc/${pid}/cmdline`, "utf8")).toContain("bin/twilld");
  expect(log("stderr")).toContain("ready: pods are forwarded");
  expect(log("stdout")).toBe("");
});

it("starts it again after SIGKILL, and no packet is lost", async () => {
  const before = await state("RUNNING");
  const ping = await pod.startPing(remote);
  process.kill(before, "SIGKILL");
  const after = await until("another twilld to run", async () => {
    const pid = await state("RUNNING");
    return pid !== before && pid;
  });
  await host.httpStatus("http://127.0.0.1:2401/readyz", 200, { timeout: 30_000 });
  expect(after).not.toBe(before);
  expect((await ping.stop()).lost).toEqual([]);
});

it("stops it by SIGQUIT, which it takes for a clean end, and no packet is lost", async () => {
  const pid = await state("RUNNING");
  const ping = await pod.startPing(remote);
  expect(await control("stop", "twilld")).toBe("twilld: stopped");
  await state("STOPPED");
  await ping.replies(20);
  expect(() => process.kill(pid, 0)).toThrow("ESRCH");
  const said = readFileSync(join(host.directory, "supervisord.log"), "utf8");
  expect(said).toMatch(/stopped: twilld \(exit status 0\)/);
  expect(log("stderr")).toMatch(/stopping; forwarding stays as it is.*SIGQUIT/);
  expect(await control("start", "twilld")).toBe("twilld: started");
  await host.httpStatus("http://127.0.0.1:2401/readyz", 200, { timeout: 30_000 });
  await ping.replies(20);
  expect((await ping.stop()).lost).toEqual([]);
});

it("has a program file whose command line twilld obeys", () => {
  const text = readFileSync(join(repository, "deploy/twilld.ini"), "utf8");
  const [, flags = ""] = /^command=\/usr\/local\/bin\/twilld (.*)$/m.exec(text) ?? [];
  expect(text).toContain("\nstopsignal=QUIT\n");
  expect(text).toContain("\nautorestart=true\n");
  const { kind } = parseFlags(flags.split(" "), {});
  expect(kind).toBe("run");
});
