/**
 * The commands of `twill` on two hosts with traffic of every kind (test/stage.ts): their JSON field by field, as
 * docs/json.md has it; their tables on a terminal and in a pipe; and what they say where there is nothing to see, or
 * nothing may be seen.
 *
 * The first half is with the daemon alive; then it is killed, and the same must come out.
 */
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { exec, type Host, type Outcome, repository, until } from "../lab.ts";
import { differences } from "../schema.ts";
import { createStage, HOLD_PORT, OUTSIDE, type Stage } from "../stage.ts";
import { UDP_PORT } from "./cluster.ts";

const program = join(repository, "bin/twill");
const MAC = /^([0-9a-f]{2}:){5}[0-9a-f]{2}$/;
/** Those that show something; all take --json and --watch. */
const VIEWS = [
  "status",
  "peers",
  "endpoints",
  "connections",
  "flows",
  "routes",
  "drops",
  "programs",
] as const;

let stage: Stage;
let h1: Host;

beforeAll(async () => {
  stage = await createStage();
  h1 = stage.cluster.h1;
});
afterAll(() => stage?.close());

function run(words: readonly string[], host = h1): Promise<Outcome> {
  return host.exec([program, ...words, `--pin-path=${host.pinPath}`], { check: false });
}

/** The document of a command. */
async function json(...words: string[]): Promise<Record<string, unknown>> {
  const { stdout, stderr } = await run([...words, "--json"]);
  expect(stderr).toBe("");
  return JSON.parse(stdout) as Record<string, unknown>;
}

async function lines(...words: string[]): Promise<string[]> {
  const { stdout, stderr } = await run(words);
  expect(stderr).toBe("");
  return stdout.trimEnd().split("\n");
}

const seconds = expect.toSatisfy((value) => typeof value === "number" && value >= 0);
const count = expect.toSatisfy((value) => Number.isInteger(value) && value >= 0);
const port = expect.toSatisfy((value) => Number.isInteger(value) && value > 0 && value < 65536);

/** What each command must say of this stage, whether the daemon lives or not. */
const DOCUMENTS: Readonly<Record<Exclude<(typeof VIEWS)[number], "status">, object>> = {
  peers: {
    schema: 1,
    command: "peers",
    count: 1,
    peers: [
      {
        subnet: "172.7.22.0/24",
        publicIp: "10.4.7.22",
        reach: "tunnel",
        interface: "eth0",
        nextHop: "10.4.7.22",
        mtu: 1450,
        vtepMac: expect.stringMatching(MAC),
        // What the daemon has found out of its peers changes, and ends with it.
        state: expect.toSatisfy((value) => [null, "reachable", "unknown"].includes(value)),
        rttMs: expect.toSatisfy((value) => value === null || value > 0),
        answeredAt: expect.toSatisfy((value) => value === null || !Number.isNaN(Date.parse(value))),
        // Counted only with --metrics-peers; test/e2e/metrics.test.ts has it.
        sent: null,
        received: null,
      },
    ],
  },
  endpoints: {
    schema: 1,
    command: "endpoints",
    count: 2,
    endpoints: [
      ["172.7.21.2", "vetha"],
      ["172.7.21.3", "vethc"],
    ].map(([address, name]) => ({
      address,
      interface: name,
      delivery: "peer",
      mac: expect.stringMatching(MAC),
      gatewayMac: "02:42:ac:07:15:01",
      mtu: 1450,
    })),
  },
  connections: {
    schema: 1,
    command: "connections",
    masquerade: true,
    count: 3,
    capacity: 262144,
    connections: [
      ["icmp", "established", null],
      ["tcp", "established", HOLD_PORT],
      ["udp", "established", UDP_PORT],
    ].map(([protocol, state, remotePort]) => ({
      protocol,
      state,
      pod: { address: "172.7.21.2", port },
      public: { address: "10.4.7.21", port },
      remote: { address: OUTSIDE, port: remotePort },
      interface: "eth0",
      replied: true,
      onStack: false,
      ageSeconds: seconds,
      idleSeconds: seconds,
    })),
  },
  flows: {
    schema: 1,
    command: "flows",
    count: 2,
    // The row without ports is for fragments.
    flows: [
      { portA: null, portB: null },
      { portA: port, portB: HOLD_PORT },
    ].map((ports) => ({ protocol: "tcp", a: "172.7.21.2", b: "172.7.22.2", ageSeconds: seconds, ...ports })),
  },
  routes: {
    schema: 1,
    command: "routes",
    problems: 0,
    routes: [
      {
        destination: "172.7.21.0/24",
        interface: "docker0",
        gateway: null,
        origin: "kernel",
        peer: null,
        neighbour: null,
        fdb: null,
        problem: null,
      },
      {
        destination: "172.7.22.0/24",
        interface: "flannel.1",
        gateway: "172.7.22.0",
        origin: "twill",
        peer: "10.4.7.22",
        neighbour: expect.stringMatching(MAC),
        fdb: "10.4.7.22",
        problem: null,
      },
    ],
  },
  drops: {
    schema: 1,
    command: "drops",
    packets: 5,
    drops: [
      ["from_pod", "drop_pod_tunnel", 2],
      ["from_net", "drop_unknown_peer", 3],
    ].map(([at, reason, packets]) => ({
      program: at,
      reason,
      packets,
      bytes: Number(packets) * 84,
      packetsPerSecond: null,
      meaning: expect.stringMatching(/\w+ \w+/),
    })),
  },
  programs: {
    schema: 1,
    command: "programs",
    programs: [
      ["from_pod", "docker0", "vetha", "vethc"],
      ["to_pod", "docker0"],
      ["to_overlay", "flannel.1"],
      ["from_overlay", "flannel.1"],
      ["from_net", "eth0"],
      ["to_net", "eth0"],
    ].map(([name, ...interfaces]) => ({
      program: name,
      id: count,
      tag: expect.stringMatching(/^[0-9a-f]{16}$/),
      loadedAt: expect.stringMatching(/^\d{4}-\d\d-\d\dT[\d:.]+Z$/),
      verifiedInstructions: count,
      attachments: interfaces.map((each) => ({ interface: each, mode: "tcx" })),
      measured: null,
    })),
  },
};

/** Without `connections`, of which some end by themselves. */
async function expectDocuments(): Promise<void> {
  const { connections: _, ...others } = DOCUMENTS;
  expect(await Promise.all(Object.keys(others).map((name) => json(name)))).toEqual(Object.values(others));
}

describe("the daemon runs", () => {
  test("every document has the fields that docs/json.md says", async () => {
    const [connections, status] = await Promise.all([json("connections"), json("status"), expectDocuments()]);
    expect(connections).toEqual(DOCUMENTS.connections);
    expect(status).toMatchObject({
      schema: 1,
      command: "status",
      running: true,
      pid: stage.cluster.twilld(h1).process.pid,
      daemon: { ready: true, subnet: "172.7.21.0/24", mtu: 1450, device: "flannel.1" },
      endpoints: 2,
      packets: { from_pod: { drop_pod_tunnel: 2 }, from_net: { drop_unknown_peer: 3 } },
    });
    // The daemon writes what probes say every five seconds.
    await until("the peer to be called reachable", async () => {
      const { peers } = (await json("peers", "--state=reachable")) as { peers: { rttMs: number | null }[] };
      return peers.length === 1 && typeof peers[0]?.rttMs === "number";
    });
    expect((await lines("peers"))[1]).toMatch(/^172\.7\.22\.0\/24 .* reachable +\d+\.\d\d ms +\S+$/);
    expect(status.peers).toEqual((DOCUMENTS.peers as { peers: unknown[] }).peers);
    expect(status.attachments).toContainEqual({ interface: "vetha", hook: "from_pod", mode: "tcx" });
    expect(status.maps).toContainEqual({ map: "connections4", entries: 3, capacity: 262144 });
  });

  test("every document is as docs/json.md says, field by field", async () => {
    const commands: Record<string, readonly string[]> = Object.fromEntries(VIEWS.map((name) => [name, []]));
    commands.programs = ["--measure=0.1"];
    commands.drops = ["--all"];
    commands.trace = ["172.7.21.2", "172.7.22.2", "--proto=tcp"];
    const found = await Promise.all(
      Object.entries(commands).map(async ([name, words]) => [
        name,
        differences(name, await json(name, ...words)),
      ]),
    );
    expect(Object.fromEntries(found)).toEqual(
      Object.fromEntries(Object.keys(commands).map((name) => [name, []])),
    );
    // Of what is wrong, so that there is something to compare.
    await h1.sysctl({ "net.ipv4.ip_forward": 0 });
    const broken = await run(["doctor", "--json"]);
    await h1.sysctl({ "net.ipv4.ip_forward": 1 });
    const document = JSON.parse(broken.stdout) as { findings: unknown[]; sound: unknown[] };
    expect([document.findings.length > 0, document.sound.length > 0]).toEqual([true, true]);
    expect(differences("doctor", document)).toEqual([]);
    // And what is not so is found.
    expect(differences("peers", { schema: 1, command: "peers", count: 0.5, peers: [{ subnet: 7 }] })).toEqual(
      [
        "count is 0.5, not number",
        expect.stringMatching(/^peers\[\] lacks publicIp,/),
        "peers[].subnet is 7, not string",
      ],
    );
  });

  test("filters narrow down, and add up", async () => {
    const counts: Record<string, number> = {
      "connections --protocol udp": 1,
      "connections --pod 172.7.21.0/24": 3,
      "connections --pod 172.7.21.3": 0,
      "connections --remote 10.4.8.0/24 --state established --protocol tcp": 1,
      "connections --state new": 0,
      [`connections --port ${UDP_PORT}`]: 1,
      connections: 3,
      "flows --protocol tcp --address 172.7.22.2": 2,
      [`flows --port ${HOLD_PORT}`]: 1,
      "flows --address 172.7.21.3": 0,
      "peers 172.7.22.2": 1,
      "peers 10.4.7.0/24": 1,
      "peers 172.7.23.2": 0,
      "peers --reach direct": 0,
      "endpoints 172.7.21.3": 1,
      "endpoints --interface vetha": 1,
    };
    const found = Object.keys(counts).map(async (words) => {
      const { stdout, code } = await run([...words.split(" "), "--count"]);
      return [words, code === 0 ? Number(stdout) : code];
    });
    expect(Object.fromEntries(await Promise.all(found))).toEqual(counts);
    expect(await json("peers", "--count")).toEqual({ schema: 1, command: "peers", count: 1 });
    expect(((await json("drops", "--all")).drops as unknown[]).length).toBeGreaterThan(40);
    expect((await json("routes", "172.7.22.9")).routes).toHaveLength(1);
  });

  test("a table has a row for each entry, and its key", async () => {
    const tables = ["connections", "flows", "routes", "drops", "programs", "endpoints"];
    const [connections, flows, routes, drops, programs, endpoints] = await Promise.all(
      tables.map((name) => lines(name)),
    );
    expect(connections).toEqual([
      expect.stringMatching(/^PROTO {2}STATE +POD +AS +REMOTE +BY +WAY +AGE +IDLE$/),
      expect.stringMatching(
        /^icmp +established +172\.7\.21\.2:\d+ +10\.4\.7\.21:\d+ +10\.4\.8\.99 +eth0 +fast/,
      ),
      expect.stringMatching(/^tcp +established +172\.7\.21\.2:\d+ +10\.4\.7\.21:\d+ +10\.4\.8\.99:7100 /),
      expect.stringMatching(/^udp +established +172\.7\.21\.2:\d+ +10\.4\.7\.21:\d+ +10\.4\.8\.99:7001 /),
    ]);
    expect(flows).toHaveLength(3);
    expect(routes?.at(-1)).toMatch(/^172\.7\.22\.0\/24 .* ok$/);
    expect(drops?.[1]).toMatch(/^from_pod +drop_pod_tunnel +2 +168 +pods that speak/);
    expect(programs?.[1]).toMatch(/^from_pod .* tcx +docker0 vetha vethc$/);
    expect(endpoints?.[1]).toMatch(/^172\.7\.21\.2 +vetha +peer /);
  });

  test("runs are counted while they are measured", async () => {
    const ping = await h1.startPing(stage.cluster.b.address);
    const { programs } = (await json("programs", "--measure=0.5")) as {
      programs: { program: string; measured: Record<string, number> }[];
    };
    await ping.stop();
    expect(programs.find((each) => each.program === "to_overlay")?.measured).toEqual({
      seconds: expect.toSatisfy((value) => value >= 0.5),
      runs: expect.toSatisfy((value) => value > 0),
      nanosecondsPerRun: expect.toSatisfy((value) => value > 0),
    });
  });

  test("--watch says it again, until Ctrl-C", async () => {
    const watching = h1.spawn([program, "drops", "--json", "--watch=0.1", `--pin-path=${h1.pinPath}`]);
    await watching.line(/"packetsPerSecond":0/);
    const exit = await watching.stop("SIGINT");
    expect(exit).toEqual({ code: 0, signal: null });
    const all = watching.text("stdout").trim().split("\n");
    expect(all.length).toBeGreaterThan(1);
    for (const line of all)
      expect(JSON.parse(line)).toMatchObject({ schema: 1, command: "drops", packets: 5 });
    // A reader that has enough is no failure.
    const script = `set -o pipefail; "$1" connections --watch=0.1 "$2" | head -n 2`;
    const { stdout, stderr } = await h1.exec([
      "bash",
      "-c",
      script,
      "-",
      program,
      `--pin-path=${h1.pinPath}`,
    ]);
    expect(stdout).toMatch(/^PROTO.*\nicmp .*\n$/);
    expect(stderr).toBe("");
  });
});

test("bpftool shows every map by name and with types, and every link by its hook", async () => {
  const pins = readdirSync(h1.pinPath, { withFileTypes: true }).filter((entry) => !entry.isDirectory());
  const shown = await Promise.all(
    pins.map(async ({ name }) => {
      const path = join(h1.pinPath, name);
      const map = await h1.exec(["bpftool", "-j", "map", "show", "pinned", path], { check: false });
      const kind = map.code === 0 ? "map" : "prog";
      const { stdout } =
        kind === "map" ? map : await h1.exec(["bpftool", "-j", "prog", "show", "pinned", path]);
      const info = JSON.parse(stdout) as { name: string; type: string; btf_id?: number };
      return { kind, ...info, pin: name };
    }),
  );
  for (const { pin, name, type, btf_id } of shown) {
    expect(name).toBe(pin);
    // For these the kernel takes none.
    if (!["ringbuf", "queue"].includes(type)) expect([pin, btf_id]).toEqual([pin, expect.any(Number)]);
  }
  expect(shown.filter(({ kind }) => kind === "prog").map(({ name }) => name)).toContain("from_pod");
  const dump = async (map: string) => {
    const { stdout } = await h1.exec(["bpftool", "-j", "map", "dump", "pinned", join(h1.pinPath, map)]);
    return (JSON.parse(stdout) as { formatted: unknown }[]).map(({ formatted }) => formatted);
  };
  expect(await dump("subnets4")).toMatchObject([
    {
      key: { address: [172, 7, 22, 0], prefix_length: 24 },
      value: { public_ip: [10, 4, 7, 22], reach: "REACH_TUNNEL", mtu: 1450 },
    },
  ]);
  expect(await dump("endpoints4")).toContainEqual(
    expect.objectContaining({
      key: { address: [172, 7, 21, 2] },
      value: expect.objectContaining({ delivery: "DELIVERY_PEER", gateway_mac: [2, 0x42, 172, 7, 21, 1] }),
    }),
  );
  const links = readdirSync(join(h1.pinPath, "links")).map((name) => name.replace(/-\d+$/, ""));
  expect(new Set(links)).toEqual(
    new Set(["from_pod", "to_pod", "to_overlay", "from_overlay", "from_net", "to_net"]),
  );
});

describe("on a terminal", () => {
  /** What a terminal of so many columns gets to see. */
  async function seen(columns: number, words: string, environment = ""): Promise<string> {
    const command = `stty cols ${columns} rows 10; ${environment} ${program} ${words} --pin-path=${h1.pinPath}`;
    const { stdout } = await h1.exec(["script", "-qec", command, "/dev/null"], {
      env: { TERM: "xterm", NO_COLOR: undefined },
    });
    return stdout.replaceAll("\r\n", "\n");
  }
  // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is looked for
  const COLOUR = /\x1b\[\d+m/g;

  test("tables fit, and are cut anywhere but in the key", async () => {
    const [wide, narrow] = await Promise.all([seen(200, "connections"), seen(72, "connections")]);
    expect(wide.replaceAll(COLOUR, "").trimEnd().split("\n")).toEqual(
      (await lines("connections")).map((line) => expect.stringMatching(new RegExp(`^${line.slice(0, 70)}`))),
    );
    const cut = narrow.replaceAll(COLOUR, "").trimEnd().split("\n");
    expect(cut).toHaveLength(4);
    for (const line of cut) expect(line.length).toBeLessThanOrEqual(72);
    expect(cut[2]).toMatch(/^tcp .*… .*172\.7\.21\.2:\d+ .*10\.4\.8\.99:7100 /);
    expect(wide).not.toContain("…");
  });

  test("colour only there, never with NO_COLOR, and no word less without it", async () => {
    const [colour, plain, dumb] = await Promise.all([
      seen(200, "routes"),
      seen(200, "routes", "NO_COLOR=1"),
      seen(200, "routes", "TERM=dumb"),
    ]);
    expect(colour).toMatch(COLOUR);
    expect(plain).toBe(colour.replaceAll(COLOUR, ""));
    expect(dumb).toBe(plain);
    expect((await run(["routes"])).stdout).toBe(plain);
  });

  test("--watch draws in place, no more than fits, and gives the terminal back", async () => {
    const command = `stty cols 80 rows 10; echo "process $$"; exec ${program} status --watch=0.1 --pin-path=${h1.pinPath}`;
    const terminal = h1.spawn(["script", "-qec", command, "/dev/null"], { env: { TERM: "xterm" } });
    const [, pid] = await terminal.line(/^process (\d+)/);
    const drawn = () => terminal.text("stdout").split("\x1b[H");
    await until("two pictures", () => drawn().length > 2, { wake: (ring) => terminal.onOutput(ring) });
    process.kill(Number(pid), "SIGINT");
    expect(await terminal.exited).toEqual({ code: 0, signal: null });
    const [before = "", picture = ""] = drawn();
    expect(before).toContain("\x1b[?1049h");
    expect(picture).toMatch(/^.*twill status, every 0\.1 s, \d\d:\d\d:\d\d/);
    expect(picture.split("\n")).toHaveLength(10);
    expect(picture).toMatch(/\(\d+ more lines\)/);
    expect(terminal.text("stdout").trimEnd().endsWith("\x1b[?1049l")).toBe(true);
  });
});

describe("the daemon is dead", () => {
  beforeAll(async () => {
    expect((await stage.cluster.twilld(h1).stop("SIGKILL")).signal).toBe("SIGKILL");
  });

  test("everything is there as before", async () => {
    await expectDocuments();
    const { count, connections } = DOCUMENTS.connections as { count: number; connections: unknown[] };
    expect(await json("connections", "--protocol", "tcp")).toEqual({
      ...DOCUMENTS.connections,
      count: count - 2,
      connections: connections.slice(1, 2),
    });
    const { code, stdout } = await run(["status", "--json"]);
    expect(code).toBe(1);
    expect(JSON.parse(stdout)).toMatchObject({
      running: false,
      pid: null,
      daemon: { subnet: "172.7.21.0/24" },
      endpoints: 2,
    });
    expect((await run(["status"])).stdout).toMatch(/^daemon +not running; what is in the kernel goes on/);
  });

  test("what the daemon knew of its peers is not passed off as news", async () => {
    expect(await json("peers")).toMatchObject({ peers: [{ state: null, rttMs: null, answeredAt: null }] });
  });

  test("a way that the kernel lost shows, and is exit code 1", async () => {
    const device = "dev flannel.1";
    const [fdb] = (await h1.exec(["bridge", "fdb", "show", ...device.split(" ")])).stdout.split(" ");
    const steps: [string, string[]][] = [
      [
        "no FDB entry",
        ["bridge", "fdb", "delete", fdb ?? "", "dev", "flannel.1", "dst", "10.4.7.22", "self"],
      ],
      ["no neighbour", ["ip", "neigh", "delete", "172.7.22.0", "dev", "flannel.1"]],
      ["no route", ["ip", "route", "delete", "172.7.22.0/24"]],
    ];
    for (const [problem, argv] of steps) {
      await h1.exec(argv);
      const { code, stdout } = await run(["routes"]);
      expect({ problem, code }).toEqual({ problem, code: 1 });
      expect(stdout.trimEnd()).toMatch(new RegExp(` ${problem}$`));
    }
    expect(await json("routes")).toMatchObject({
      problems: 1,
      routes: [{}, { origin: null, problem: "no route" }],
    });
  });

  test("ten thousand peers are all shown, each view within a second of processor time", {
    timeout: 180_000,
  }, async () => {
    await stage.crowd(10_000, 1000);
    // It waits for nothing, so that this is what it takes on a machine with nothing else to do; other work slows it down
    // as it does the bare start of a command.
    const timed = `TIMEFORMAT="%U %S"; time "$@" >/dev/null 2>&1; exit 0`;
    const cost = async (words: string): Promise<number> => {
      const argv = [program, ...words.split(" ")];
      const { stderr } = await h1.exec(["bash", "-c", timed, "-", ...argv]);
      const [user = Number.NaN, system = Number.NaN] = stderr.trim().split(" ").map(Number);
      return user + system;
    };
    const start = await cost("--help");
    const trace = "trace 172.7.21.2 172.7.22.2 --proto=tcp";
    for (const words of [...VIEWS, "peers --json", "routes --json"])
      expect(await cost(`${words} --pin-path=${h1.pinPath}`), words).toBeLessThan(Math.max(1, 12 * start));
    // The verifier takes its time for the program that a trace loads, however many peers there are.
    expect(await cost(`${trace} --pin-path=${h1.pinPath}`)).toBeLessThan(Math.max(2, 24 * start));
    const [peers, connections, status] = await Promise.all([
      lines("peers"),
      lines("connections", "--port", "443"),
      run(["status"]),
    ]);
    expect(peers).toHaveLength(10_002);
    expect(connections).toHaveLength(1001);
    expect(status.stdout).toMatch(/^\(9981 more: twill peers\)$/m);
  });
});

describe("nothing to see", () => {
  test("without permission: one line, exit 1", async () => {
    const nobody = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"];
    const outcomes = VIEWS.map((name) =>
      h1.exec([...nobody, program, name, `--pin-path=${h1.pinPath}`], { check: false }),
    );
    for (const { code, stdout, stderr } of await Promise.all(outcomes)) {
      expect([code, stdout]).toEqual([1, ""]);
      expect(stderr).toMatch(/^twill: this process lacks CAP_NET_ADMIN and CAP_SYS_ADMIN: .*\n$/);
    }
  });

  test("where nothing runs: one line, exit 1", async () => {
    const path = `${h1.pinPath}-of-nobody`;
    const outcomes = VIEWS.map((name) => h1.exec([program, name, `--pin-path=${path}`], { check: false }));
    for (const { code, stdout, stderr } of await Promise.all(outcomes)) {
      expect([code, stdout]).toEqual([1, ""]);
      expect(stderr).toBe(
        `twill: nothing of Twill is at ${path}: start twilld, or give the --pin-path it was started with\n`,
      );
    }
  });

  test("a wrong command line: why, exit 2", async () => {
    const wrong: Record<string, RegExp> = {
      "connections --pod 172.7.21": /argument '172\.7\.21' is invalid\. It is an IPv4 address, or a network/,
      "connections --port 0": /It is a port from 1 to 65535/,
      "connections --protocol tpc": /It is icmp, tcp, udp/,
      "connections --state open": /Allowed choices are new, established, closing, closed, gone/,
      "peers somebody": /It is an IPv4 address/,
      "flows 10.0.0.1": /too many arguments/,
      "drops --watch=0": /It is a number of seconds/,
      "programs --measure=no": /It is a number of seconds/,
      "completion fish": /Allowed choices are bash, zsh/,
      peer: /unknown command 'peer'/,
    };
    const outcomes = Object.keys(wrong).map((words) =>
      exec([program, ...words.split(" ")], { check: false }),
    );
    const whys = Object.values(wrong);
    for (const [index, { code, stdout, stderr }] of (await Promise.all(outcomes)).entries()) {
      expect(stderr).toMatch(whys[index] ?? "?");
      expect([code, stdout]).toEqual([2, ""]);
    }
  });
});

describe("completion", () => {
  let folder: string;
  beforeAll(async () => {
    folder = mkdtempSync(join(tmpdir(), "twill-cli-"));
    for (const shell of ["bash", "zsh"]) {
      const { stdout } = await exec([program, "completion", shell]);
      writeFileSync(join(folder, shell), stdout);
    }
  });
  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  test("bash knows commands, options and values", async () => {
    const tried: [string, string][] = [
      ["twill con", "connections"],
      ["twill -", "-V --version -h --help"],
      ["twill connections --st", "--state"],
      ["twill connections --state ", "new established closing closed gone"],
      // As bash splits `--state=cl`.
      ["twill connections --state = cl", "closing closed"],
      ["twill connections --watch = ", ""],
      ["twill endpoints --interface l", "lo"],
      ["twill completion ", "bash zsh"],
      ["twill help pro", "programs"],
      ["twill programs --m", "--measure"],
    ];
    const script = `
      source "$1"
      while IFS= read -r line; do
        IFS=" " read -ra COMP_WORDS <<<"$line"
        [[ $line == *" " ]] && COMP_WORDS+=("")
        COMP_CWORD=$((\${#COMP_WORDS[@]} - 1))
        _twill
        echo "\${COMPREPLY[*]}"
      done`;
    const { stdout, stderr } = await h1.exec(["bash", "--norc", "-c", script, "-", join(folder, "bash")], {
      input: tried.map(([line]) => `${line}\n`).join(""),
    });
    expect(stderr).toBe("");
    expect(stdout.split("\n").slice(0, -1)).toEqual(tried.map(([, words]) => words));
    expect(
      await exec(["bash", "--norc", "-c", 'source "$1"; complete -p twill', "-", join(folder, "bash")]),
    ).toMatchObject({
      stdout: "complete -F _twill twill\n",
    });
  });

  test("zsh does too", async () => {
    const tried: [string, string][] = [
      ["twill conn", "twill connections"],
      ["twill connections --stat", "twill connections --state"],
      ["twill connections --state=establ", "--state=established"],
      ["twill completion ba", "twill completion bash"],
      ["twill help prog", "twill help programs"],
    ];
    // A shell within a shell, on a terminal of its own, as it completes only there. It waits for what must come.
    const script = `
      zmodload zsh/zpty
      zpty inner zsh -f -i
      zpty -w inner "PS1=; unset zle_bracketed_paste; autoload -Uz compinit; compinit -u -D; source $1; stty -echo; echo rea''dy"
      zpty -r inner out '*ready*'
      shift
      for typed expected in "$@"; do
        zpty -w -n inner "$typed"$'\\t'
        zpty -r inner out "*$expected*"
        print -r -- "$typed"
        zpty -w -n inner $'\\x15'
      done
      zpty -d inner`;
    const { stdout } = await exec(["zsh", "-f", "-c", script, "-", join(folder, "zsh"), ...tried.flat()]);
    expect(stdout.trimEnd().split("\n")).toEqual(tried.map(([typed]) => typed));
  });
});
