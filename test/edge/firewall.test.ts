/**
 * Reading a namespace's real rules: each ruleset is loaded with its own tool, read over nfnetlink (and, where it is
 * iptables', also out of what iptables-save prints), and judged.
 */
import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import {
  type Firewall,
  judgeInput,
  type PodTraffic,
  parseIptablesSave,
  reasonsForStack,
} from "../../src/core/firewall.ts";
import type { FirewallReading } from "../../src/edge/firewall.ts";
import { iptablesRules, nftRules } from "../kubeproxy.ts";
import { createLab, type Host, type Lab, type Process, repository, until } from "../lab.ts";

const TRAFFIC: PodTraffic = {
  network: { address: 0xac070000, length: 16 },
  interfaces: ["docker0", "vetha", "flannel.1"],
  underlay: ["eth0"],
};
const SERVICES = [
  {
    name: "web",
    protocol: "tcp" as const,
    clusterIp: "10.96.0.1",
    port: 80,
    nodePort: 30001,
    affinity: 10,
    endpoints: [{ address: "172.7.21.2", port: 80, local: true }],
  },
  {
    name: "none",
    protocol: "udp" as const,
    clusterIp: "10.96.0.2",
    port: 53,
    nodePort: 30002,
    endpoints: [],
  },
];

let lab: Lab;
let host: Host;
beforeEach(async () => {
  lab = await createLab();
  host = await lab.host("fw", { address: "10.4.7.21/24" });
});
afterEach(() => lab.close());

/** A watch runs in a process of its own, as a socket belongs to the namespace that it was opened in. */
const program = `
import { openFirewall } from "${repository}/dist/src/edge/firewall.js";
await openFirewall({ checkMs: Number(process.argv[1]), onRules: (rules) => console.log(JSON.stringify(rules)) });
setInterval(() => undefined, 1 << 30);
`;

function watch(checkMs: number): Process {
  return host.spawn([process.execPath, "--input-type=module", "-e", program, String(checkMs)]);
}

/** What the watch has told last; undefined if nothing yet. */
function latest(watching: Process): Firewall | undefined {
  const text = watching.lines.findLast(({ text }) => text.startsWith("{"))?.text;
  return text === undefined ? undefined : (JSON.parse(text) as Firewall);
}

function untilJudged(watching: Process, accept: (reasons: readonly string[]) => boolean) {
  const check = () => {
    const rules = latest(watching);
    if (!watching.running) throw new Error(watching.text());
    const reasons = rules && reasonsForStack(rules, TRAFFIC);
    return reasons !== undefined && accept(reasons) ? reasons : undefined;
  };
  return until("the rules to be judged so", check, { wake: (ring) => watching.onOutput(ring) });
}

/** The namespace's rules, judged now. */
async function judge(): Promise<readonly string[]> {
  const watching = watch(60_000);
  const reasons = await untilJudged(watching, () => true);
  await watching.stop();
  return reasons;
}

const nft = (text: string) => host.exec(["nft", "-f", "-"], { input: text });
const forward = (...rules: string[]) =>
  nft(`table inet engine { chain forward { type filter hook forward priority 0; ${rules.join("; ")}; }; }`);

/** Rules of iptables, judged by both readers. */
async function iptables(...rules: string[]): Promise<readonly string[]> {
  for (const rule of rules) await host.exec(["sh", "-c", `iptables ${rule}`]);
  const reasons = await judge();
  const { stdout } = await host.exec(["iptables-save"]);
  expect(reasonsForStack({ chains: parseIptablesSave(stdout), unreadable: [] }, TRAFFIC)).toEqual(reasons);
  return reasons;
}

const DROP = "chain FORWARD of table ip filter may apply DROP to packets of pods";

describe("iptables", () => {
  test("what does not concern pods", async () => {
    expect(
      await iptables(
        "-A INPUT -j DROP",
        "-A FORWARD -m conntrack --ctstate INVALID -j DROP",
        "-A FORWARD -m addrtype --dst-type LOCAL -p tcp --dport 80 -j REJECT",
        "-A FORWARD -o virbr0 -j REJECT",
        "-A FORWARD -i wg+ -j DROP",
        "-A FORWARD -s 10.0.0.0/8 -j REJECT",
        "-A FORWARD -s 172.6.7.128/25 -d 172.7.1.0/24 -j DROP",
        "-A FORWARD ! -s 172.0.0.0/8 -j DROP",
        "-A FORWARD -d 172.7.0.0/16 -m comment --comment 'pods \"in\" it' -j ACCEPT",
        "-A FORWARD -j DROP",
        "-t mangle -A FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu",
        "-t nat -A PREROUTING -p tcp --dport 80 -j DNAT --to-destination 172.7.21.2",
        "-t nat -A POSTROUTING -s 172.7.21.0/24 ! -o docker0 -j MASQUERADE",
      ),
    ).toEqual([]);
  });

  test.each([
    ["DROP", "-A FORWARD -s 172.7.21.2 -j DROP", DROP],
    ["DROP of a neighbouring block's half", "-A FORWARD -s 172.0.0.0/9 -j DROP", DROP],
    ["not from", "-A FORWARD ! -s 172.7.21.0/24 -j DROP", DROP],
    ["by a known interface", "-A FORWARD -i veth+ -j DROP", DROP],
    ["not by an interface", "-A FORWARD ! -i eth9 -j DROP", DROP],
    [
      "a condition that is not understood",
      "-A FORWARD -m statistic --mode nth --every 9 --packet 0 -j DROP",
      DROP,
    ],
    ["states with INVALID among them", "-A FORWARD -m conntrack --ctstate INVALID,NEW -j DROP", DROP],
    ["all but INVALID", "-A FORWARD -m conntrack ! --ctstate INVALID -j DROP", DROP],
    ["between containers", "-A FORWARD -i docker0 -o docker0 -j DROP", DROP],
    ["REJECT", "-A FORWARD -j REJECT", DROP.replace("DROP", "REJECT")],
    ["a queue", "-A FORWARD -j NFQUEUE --queue-num 1", DROP.replace("DROP", "NFQUEUE")],
    [
      "the policy",
      "-P FORWARD DROP",
      "chain FORWARD of table ip filter drops what none of its rules accepts",
    ],
    [
      "in PREROUTING",
      "-t raw -A PREROUTING -s 172.7.0.0/16 -j DROP",
      "chain PREROUTING of table ip raw may apply DROP to packets of pods",
    ],
    [
      "no tracking",
      "-t raw -A PREROUTING -j CT --notrack",
      "chain PREROUTING of table ip raw may apply CT to packets of pods",
    ],
    [
      "in table mangle",
      "-t mangle -A POSTROUTING -j DROP",
      "chain POSTROUTING of table ip mangle may apply DROP to packets of pods",
    ],
    [
      "marks before routing",
      "-t mangle -A PREROUTING -j MARK --set-mark 7",
      "chain PREROUTING of table ip mangle may mark packets of pods",
    ],
  ])("what does: %s", async (_, rule, reason) => {
    expect(await iptables(rule)).toEqual([reason]);
  });

  test("a rule behind one that accepts all is never come to, and behind any other it is", async () => {
    expect(
      await iptables(
        "-N MINE",
        "-A MINE -s 172.7.0.0/16 -j ACCEPT",
        "-A FORWARD -j MINE",
        "-A FORWARD -j DROP",
      ),
    ).toEqual([]);
    expect(await iptables("-I MINE -p tcp -j RETURN", "-I MINE -s 172.7.0.0/16 -j RETURN")).toEqual([DROP]);
  });

  test("policy engines: the way to what they do", async () => {
    const reasons = await iptables(
      "-N cali-FORWARD",
      "-N cali-from-wl-dispatch",
      "-N cali-fw-a",
      "-A FORWARD -j cali-FORWARD",
      "-A cali-FORWARD -i veth+ -j cali-from-wl-dispatch",
      "-A cali-from-wl-dispatch -i vetha -g cali-fw-a",
      "-A cali-from-wl-dispatch -j DROP",
      "-A cali-fw-a -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
      "-A cali-fw-a -m comment --comment 'no policy' -j DROP",
    );
    expect(reasons).toEqual([
      "chain FORWARD of table ip filter leads to cali-FORWARD, cali-from-wl-dispatch, cali-fw-a, which may apply DROP to packets of pods",
    ]);
  });

  test("Docker's and kube-proxy's own rules are no reason; what stands in DOCKER-USER is", async () => {
    await host.exec(["iptables-restore", "--noflush"], { input: iptablesRules(SERVICES, "172.7.0.0/16") });
    const docker = [
      "-P FORWARD DROP",
      "-N DOCKER",
      "-N DOCKER-USER",
      "-N DOCKER-ISOLATION-STAGE-1",
      "-A DOCKER ! -i docker0 -o docker0 -j DROP",
      "-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DROP",
      "-A FORWARD -j DOCKER-USER",
      "-A FORWARD -j DOCKER-ISOLATION-STAGE-1",
      "-A FORWARD -o docker0 -j DOCKER",
      "-A FORWARD -i docker0 ! -o docker0 -j ACCEPT",
      "-A DOCKER-USER -j RETURN",
      "-t raw -A PREROUTING -d 172.7.21.2 ! -i docker0 -j DROP",
    ];
    expect(await iptables(...docker)).toEqual([]);
    expect(await iptables("-I DOCKER-USER -s 172.7.22.2 -j DROP")).toEqual([
      "chain FORWARD of table ip filter leads to DOCKER-USER, which may apply DROP to packets of pods",
    ]);
  });
});

describe("nftables", () => {
  test.each<[string, string[]]>([
    [
      "accepts, counts and invalid ones",
      ["ct state invalid drop", "counter", "ip saddr 172.7.0.0/16 accept", "policy drop"],
    ],
    ["other addresses", ["ip saddr 10.0.0.0/8 drop", "ip6 saddr fe80::/10 drop", "meta nfproto ipv6 drop"]],
    ["other interfaces", ['iifname "wg0" drop', 'oifname "virbr*" reject', 'oifname != "docker0" accept']],
    ["local destinations", ["fib daddr type local drop"]],
    ["translations", ["meta mark set 1", "accept"]],
  ])("no reason: %s", async (_, rules) => {
    await forward(...rules);
    expect(await judge()).toEqual([]);
  });

  const reason = "chain forward of table inet engine may apply DROP to packets of pods";
  test.each<[string, string[], string]>([
    ["a drop", ["drop"], reason],
    ["part of the network", ["ip saddr 172.7.21.0/24 drop"], reason],
    ["addresses in a set", ["ip saddr { 10.0.0.1, 10.0.0.2 } drop"], reason],
    ["a range", ["ip saddr 10.0.0.1-10.0.0.9 drop"], reason],
    ["over a limit", ["limit rate over 10/second drop"], reason],
    ["an interface by number", ["iif lo drop"], reason],
    [
      "the policy",
      ["policy drop"],
      reason.replace("may apply DROP to packets of pods", "drops what none of its rules accepts"),
    ],
    [
      "states of a map",
      ["ct state vmap { established : accept, new : drop }"],
      reason.replace("DROP", "a map of verdicts"),
    ],
    ["reject", ["tcp dport 80 reject"], reason.replace("DROP", "REJECT")],
    ["a log", ['log prefix "x"'], reason.replace("DROP", "log")],
    ["another DSCP", ["ip dscp set cs1"], reason.replace("DROP", "a change of the packet")],
  ])("a reason: %s", async (_, rules, expected) => {
    await forward(...rules);
    expect(await judge()).toEqual([expected]);
  });

  test("kube-proxy's table is none, however it grows", async () => {
    await nft(nftRules(SERVICES, "172.7.0.0/16"));
    expect(await judge()).toEqual([]);
  });

  test("filters of bridges and of interfaces that carry pods are", async () => {
    await host.ip("link add docker0 type bridge");
    await nft(
      "table bridge b { chain f { type filter hook forward priority 0; ip saddr 172.7.21.2 drop; }; }",
    );
    expect(await judge()).toEqual(["chain f of table bridge b may apply DROP to packets of pods"]);
    await nft("delete table bridge b");
    await nft("table netdev n { chain i { type filter hook ingress device docker0 priority 0; drop; }; }");
    expect(await judge()).toEqual(["chain i of table netdev n may apply DROP to packets of pods"]);
    await nft("delete table netdev n");
    await nft("table netdev n { chain i { type filter hook ingress device lo priority 0; drop; }; }");
    expect(await judge()).toEqual([]);
  });

  test("a dormant table is asleep", async () => {
    await nft("table ip d { flags dormant; chain f { type filter hook forward priority 0; drop; }; }");
    expect(await judge()).toEqual([]);
  });
});

describe("changes", () => {
  test("are told of when they happen: a rule that comes and goes, and a table", async () => {
    const watching = watch(600_000);
    await untilJudged(watching, (reasons) => reasons.length === 0);
    for (let turn = 0; turn < 3; turn++) {
      await host.exec(["iptables", "-A", "FORWARD", "-j", "DROP"]);
      await untilJudged(watching, (reasons) => reasons.length === 1);
      await host.exec(["iptables", "-D", "FORWARD", "-j", "DROP"]);
      await untilJudged(watching, (reasons) => reasons.length === 0);
    }
    await forward("drop");
    await untilJudged(watching, (reasons) => reasons.length === 1);
    await nft("delete table inet engine");
    await untilJudged(watching, (reasons) => reasons.length === 0);
  });

  test("in any number lead to the last state", async () => {
    const watching = watch(600_000);
    await untilJudged(watching, () => true);
    const lines = Array.from({ length: 3000 }, (_, i) => `-A FORWARD -s 10.0.${i >> 8}.${i & 255} -j DROP`);
    await host.exec(["iptables-restore", "--noflush"], {
      input: ["*filter", ...lines, "-A FORWARD -j DROP", "COMMIT", ""].join("\n"),
    });
    await untilJudged(watching, (reasons) => reasons.length === 1);
    await host.exec(["iptables", "-F", "FORWARD"]);
    await untilJudged(watching, (reasons) => reasons.length === 0);
  });
});

describe("one reading", () => {
  const once = `
import { readFirewall } from "${repository}/dist/src/edge/firewall.js";
console.log(JSON.stringify(await readFirewall("FLANNEL-")));
`;
  const read = async () => {
    const { stdout } = await host.exec([process.execPath, "--input-type=module", "-e", once]);
    return JSON.parse(stdout) as FirewallReading;
  };
  const tunnel = { input: "eth0", source: 0x0a040716, destination: 0x0a040715, protocol: 17, port: 8472 };

  test("tells what becomes of a port, by native rules and by those of iptables", async () => {
    const verdict = async () => judgeInput((await read()).rules, tunnel).verdict;
    expect(await verdict()).toBe("accept");
    await host.exec(["iptables", "-A", "INPUT", "-p", "udp", "--dport", "8472", "-j", "DROP"]);
    expect(await verdict()).toBe("drop");
    await host.exec(["iptables", "-I", "INPUT", "-p", "udp", "--dport", "8000:9000", "-j", "ACCEPT"]);
    expect(await verdict()).toBe("accept");
    await nft(
      "table inet own { chain in { type filter hook input priority 0; policy drop; udp dport 8473 accept; ip protocol tcp accept; }; }",
    );
    expect(await verdict()).toBe("drop");
    await nft("insert rule inet own in ip saddr 10.4.7.0/24 udp dport 8472 accept");
    expect(await verdict()).toBe("accept");
  });

  test("finds chains by the beginning of their names, in all tables, and whether they are used", async () => {
    await host.exec(["iptables", "-t", "nat", "-N", "FLANNEL-POSTRTG"]);
    await host.exec(["iptables", "-N", "FLANNEL-FWD"]);
    await host.exec(["iptables", "-A", "FORWARD", "-j", "FLANNEL-FWD"]);
    await nft("table ip flannel-ipv4 {}");
    const { named, tables } = await read();
    expect(named).toHaveLength(2);
    expect(named).toContainEqual({ table: "ip nat", name: "FLANNEL-POSTRTG", isUsed: false });
    expect(named).toContainEqual({ table: "ip filter", name: "FLANNEL-FWD", isUsed: true });
    expect(tables).toContain("ip flannel-ipv4");
  });
});

describe.runIf(hasLegacy())("the older iptables", () => {
  test("is read at each check, in both directions", async () => {
    const watching = watch(50);
    await untilJudged(watching, (reasons) => reasons.length === 0);
    await host.exec(["iptables-legacy", "-A", "FORWARD", "-s", "172.7.21.2", "-j", "DROP"]);
    expect(await untilJudged(watching, (reasons) => reasons.length === 1)).toEqual([
      "chain FORWARD of table ip filter (legacy) may apply DROP to packets of pods",
    ]);
    await host.exec(["iptables-legacy", "-F", "FORWARD"]);
    await untilJudged(watching, (reasons) => reasons.length === 0);
  });
});

function hasLegacy(): boolean {
  try {
    execFileSync("iptables-legacy", ["-S"], { stdio: "ignore" });
    return readFileSync("/proc/net/ip_tables_names", "utf8") !== "";
  } catch {
    return false;
  }
}
