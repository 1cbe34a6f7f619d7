/**
 * deploy/mk-docker-opts.sh by what flannel's script of that name writes for the same subnet file, and what it
 * does when the file, the options or the routes are not as they should be. Run by dash, the strictest shell.
 */
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { createLab, exec, type Host, type Lab, type Outcome, repository } from "../lab.ts";

const script = join(repository, "deploy/mk-docker-opts.sh");
const SUBNET_FILE =
  "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n";
const BIP = 'DOCKER_OPT_BIP="--bip=10.1.74.1/24"\n';
const IPMASQ = 'DOCKER_OPT_IPMASQ="--ip-masq=true"\n';
const MTU = 'DOCKER_OPT_MTU="--mtu=1472"\n';

let directory: string;
let subnetFile: string;
let dockerFile: string;

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "twill-docker-opts-"));
  subnetFile = join(directory, "subnet.env");
  dockerFile = join(directory, "docker_opts.env");
  writeFileSync(subnetFile, SUBNET_FILE);
});
afterEach(() => rmSync(directory, { recursive: true }));

async function run(
  flags: readonly string[] = [],
  options: { env?: Record<string, string>; host?: Host } = {},
): Promise<Outcome & { written: string | undefined }> {
  const argv = ["dash", script, "-f", subnetFile, "-d", dockerFile, ...flags];
  const { host, env = {} } = options;
  const settings = { check: false, env };
  const outcome = await (host === undefined ? exec(argv, settings) : host.exec(argv, settings));
  // No draft is ever left beside the file.
  expect(
    readdirSync(directory).filter((name) => name !== "subnet.env" && name !== "docker_opts.env"),
  ).toEqual([]);
  return { ...outcome, written: existsSync(dockerFile) ? readFileSync(dockerFile, "utf8") : undefined };
}

describe("what is written", () => {
  const all = "--bip=10.1.74.1/24 --ip-masq=true --mtu=1472";
  it.each([
    ["by default", [], `${BIP}${IPMASQ}${MTU}DOCKER_OPTS=" ${all}"\n`],
    ["with -i", ["-i"], BIP + IPMASQ + MTU],
    ["with -c", ["-c"], `DOCKER_OPTS=" ${all}"\n`],
    ["with -i -c", ["-i", "-c"], `${BIP}${IPMASQ}${MTU}DOCKER_OPTS=" ${all}"\n`],
    ["with -k", ["-k", "CUSTOM_KEY"], `${BIP}${IPMASQ}${MTU}CUSTOM_KEY=" ${all}"\n`],
    ["with -m", ["-m"], `${BIP}${MTU}DOCKER_OPTS=" --bip=10.1.74.1/24 --mtu=1472"\n`],
    ["with -m -c -k", ["-m", "-c", "-k", "K"], 'K=" --bip=10.1.74.1/24 --mtu=1472"\n'],
  ])("%s", async (_, flags, expected) => {
    const { code, written, stderr } = await run(flags);
    expect({ code, written, stderr }).toEqual({ code: 0, written: expected, stderr: "" });
  });

  it("leaves masquerading to one of the two", async () => {
    writeFileSync(subnetFile, SUBNET_FILE.replace("IPMASQ=false", "IPMASQ=true"));
    expect((await run(["-i"])).written).toBe(`${BIP}${IPMASQ.replace("true", "false")}${MTU}`);
  });

  it("says nothing of what the subnet file does not say", async () => {
    // Also without the line's end.
    writeFileSync(subnetFile, "FLANNEL_SUBNET=10.1.74.1/24");
    expect((await run()).written).toBe(`${BIP}DOCKER_OPTS=" --bip=10.1.74.1/24"\n`);
  });

  it("takes options from the environment along", async () => {
    const env = { DOCKER_OPT_DEBUG: "--debug", DOCKER_OPT_BIP: "--bip=1.2.3.4/8", DOCKER_OPTS: "-H fd://" };
    expect((await run([], { env })).written).toBe(
      `${BIP}DOCKER_OPT_DEBUG="--debug"\n${IPMASQ}${MTU}DOCKER_OPTS="-H fd:// --bip=10.1.74.1/24 --debug --ip-masq=true --mtu=1472"\n`,
    );
  });

  it("can be read by a shell", async () => {
    await run();
    const { stdout } = await exec(["dash", "-c", `. ${dockerFile}; printf '[%s]' $DOCKER_OPTS`]);
    expect(stdout).toBe("[--bip=10.1.74.1/24][--ip-masq=true][--mtu=1472]");
  });

  it("replaces what was there", async () => {
    writeFileSync(dockerFile, "DOCKER_OPT_OLD=1\n".repeat(50));
    expect((await run(["-i"])).written).toBe(BIP + IPMASQ + MTU);
  });
});

describe("what is refused, with what was there left as it is", () => {
  const former = 'DOCKER_OPTS="--former"\n';
  beforeEach(() => writeFileSync(dockerFile, former));

  async function refusal(flags: readonly string[] = [], host?: Host): Promise<string> {
    const { code, written, stdout, stderr } = await run(flags, host === undefined ? {} : { host });
    expect({ code, written, stdout }).toEqual({ code: 1, written: former, stdout: "" });
    return stderr;
  }

  it.each(["yes", "TRUE", "1", "true "])("FLANNEL_IPMASQ=%s", async (value) => {
    writeFileSync(subnetFile, SUBNET_FILE.replace("IPMASQ=false", `IPMASQ=${value}`));
    expect(await refusal()).toBe(
      `mk-docker-opts.sh: FLANNEL_IPMASQ in ${subnetFile} is "${value}": it must be true or false\n`,
    );
  });

  it("a subnet file that is not there", async () => {
    rmSync(subnetFile);
    expect(await refusal()).toMatch(/^mk-docker-opts.sh: cannot read the subnet file .*: start twilld first/);
  });

  it("a file that names no subnet", async () => {
    writeFileSync(subnetFile, "FLANNEL_MTU=1472\n");
    expect(await refusal()).toContain(`${subnetFile} holds no FLANNEL_SUBNET`);
  });

  it.each([["-x"], ["-k"], ["stray"]])("the command line %s", async (...flags) => {
    expect(await refusal(flags)).toMatch(/^usage: mk-docker-opts.sh|\nusage: mk-docker-opts.sh/);
  });

  it.each(["A B", "1A", "A;B", ""])("-k '%s'", async (key) => {
    expect(await refusal(["-k", key])).toContain("can't be the name of a variable");
  });

  describe("by the routes", () => {
    let lab: Lab;
    let host: Host;
    beforeEach(async () => {
      lab = await createLab();
      host = await lab.host("node", { address: "192.168.5.1/24" });
    });
    afterEach(() => lab.close());

    it("a subnet that a route says another node has", async () => {
      await host.ip("route add 10.1.74.0/24 via 192.168.5.2");
      expect(await refusal([], host)).toMatch(/10\.1\.74\.1\/24 belongs to another node.*via 192\.168\.5\.2/);
    });

    it("but neither the bridge's own route nor those of other subnets", async () => {
      await host.bridge("docker0", "10.1.74.1/24");
      await host.ip("route add 10.1.7.0/24 via 192.168.5.2");
      await host.ip("route add 10.1.0.0/16 via 192.168.5.2");
      const { code, written } = await run(["-i"], { host });
      expect({ code, written }).toEqual({ code: 0, written: BIP + IPMASQ + MTU });
    });
  });
});
