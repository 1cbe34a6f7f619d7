/**
 * `make docs`: runs the commands that the pages name on a live lab, and puts what they print into the pages. Nobody
 * edits output by hand.
 *
 * A section is a comment that says where and what, and the block that is rewritten:
 *
 *     <!-- h1: twill peers -->
 *     ```console
 *     # twill peers
 *     ...
 *     ```
 *
 * The command runs on that host (h1 or h2) in bash, with bin/ on its path and the host's own pin path in place of
 * /sys/fs/bpf/twill; a block that is missing is made. `h1 (exit 1): COMMAND` is for a command that must end so; any
 * other exit code than the one expected ends the run and leaves the page as it was. `<!-- do: STEP -->` changes the
 * lab: STEPS below has them all. Each page begins with a lab of its own.
 *
 * The lab, the same as in the tests: h1 (10.4.7.21, pods 172.7.21.x) and h2 (10.4.7.22, pods 172.7.22.x) over VXLAN
 * with masquerade, and what test/stage.ts sets on it.
 */
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { basename, join } from "node:path";
import type { Host } from "../test/lab.ts";
import { exec, repository } from "../test/lab.ts";
import { createStage, type Stage } from "../test/stage.ts";
import { startTwilld } from "../test/twilld.ts";

/** What a page may do to the lab. */
const STEPS: Readonly<Record<string, (stage: Stage) => Promise<unknown>>> = {
  "twilld on h1 is killed": ({ cluster }) => cluster.twilld(cluster.h1).stop("SIGKILL"),
  "forwarding on h1 is switched off": ({ cluster }) => cluster.h1.sysctl({ "net.ipv4.ip_forward": 0 }),
  "forwarding on h1 is switched on": ({ cluster }) => cluster.h1.sysctl({ "net.ipv4.ip_forward": 1 }),
  "a stranger forges tunnel packets": (stage) => stage.forge(),
  "h2 attaches by clsact": async ({ cluster }) => {
    const { h2, etcd } = cluster;
    await cluster.twilld(h2).stop();
    await startTwilld(h2, { etcd, flags: ["--ip-masq", "--attach=clsact"] });
  },
  "a stranger goes on forging tunnel packets": async (stage) => {
    // For as long as the next command may take to look; a lab that has ended is no matter.
    const timer = setInterval(() => stage.forge().catch(() => undefined), 1000).unref();
    setTimeout(() => clearInterval(timer), 30_000).unref();
  },
  "packets are counted by peer": async ({ cluster }) => {
    await cluster.restart(["--ip-masq", "--peer-probes=10", "--metrics-peers=100"]);
    await cluster.a.ping(cluster.b.address, { count: 5 });
  },
  "10,000 peers and 100,000 connections": (stage) => stage.crowd(10_000, 100_000),
};

const STANDARD = "/sys/fs/bpf/twill";

/** A command on a host, in what its operator would see: no name that only this lab has. */
async function run(stage: Stage, where: string, expected: number, command: string): Promise<string> {
  const host = { h1: stage.cluster.h1, h2: stage.cluster.h2 }[where];
  if (host === undefined) throw new Error(`there is no host ${where}; it is h1 or h2`);
  const argv = ["bash", "-c", command.replaceAll(STANDARD, host.pinPath)];
  const env = {
    PATH: `${join(repository, "bin")}:${process.env.PATH}`,
    FLANNELD_PIN_PATH: host.pinPath,
    NO_COLOR: "1",
  };
  const { code, signal, stdout, stderr } = await host.exec(argv, {
    env,
    cwd: host.directory,
    check: false,
    timeout: 60_000,
  });
  if (code !== expected)
    throw new Error(`'${command}' on ${where} ended with ${code ?? signal}: ${stderr}${stdout}`);
  return neutral(stage, host, `${stdout}${stderr}`);
}

function neutral(stage: Stage, host: Host, text: string): string {
  return text
    .replaceAll(host.pinPath, STANDARD)
    .replaceAll(host.directory, "/run/flannel")
    .replaceAll(repository, "/usr/local/lib/twill")
    .replaceAll(stage.cluster.lab.prefix, "")
    .replace(/[ \t]+$/gm, "");
}

const MARKER = /^<!-- (?:do: (?<step>.+)|(?<where>h\d)(?: \(exit (?<code>\d+)\))?: (?<command>.+)) -->$/;

/** The page with fresh output. */
async function refreshed(stage: Stage, page: string): Promise<string> {
  const lines = page.split("\n");
  const written: string[] = [];
  for (let at = 0; at < lines.length; at += 1) {
    const line = lines[at] ?? "";
    written.push(line);
    const { step, where, code, command } = MARKER.exec(line)?.groups ?? {};
    if (step !== undefined) {
      const doIt = STEPS[step];
      if (doIt === undefined)
        throw new Error(`there is no step '${step}'; docs/write.ts has those there are`);
      await doIt(stage);
    }
    if (where === undefined || command === undefined) continue;
    process.stdout.write(`  ${where}: ${command}\n`);
    const output = await run(stage, where, Number(code ?? 0), command);
    written.push("```console", `# ${command}`, ...output.trimEnd().split("\n"), "```");
    if (lines[at + 1]?.startsWith("```") === true) {
      const end = lines.indexOf("```", at + 2);
      if (end < 0) throw new Error(`the block behind '${line}' has no end`);
      at = end;
    }
  }
  return written.join("\n");
}

const folder = join(repository, "docs");
const wanted = process.argv.slice(2).map((path) => basename(path));
const pages = readdirSync(folder).filter(
  (name) => name.endsWith(".md") && (wanted.length === 0 || wanted.includes(name)),
);
for (const name of pages) {
  const path = join(folder, name);
  const page = readFileSync(path, "utf8");
  if (!page.split("\n").some((line) => MARKER.test(line))) continue;
  process.stdout.write(`${name}\n`);
  const stage = await createStage();
  try {
    writeFileSync(path, await refreshed(stage, page));
  } finally {
    await stage.close();
  }
}
// What the shell did not tell of a failed command is in the error; the pages before it are written.
await exec(["git", "-C", repository, "diff", "--stat", "--", "docs"], { check: false }).then(({ stdout }) =>
  process.stdout.write(stdout),
);
