/**
 * Beside kube-proxy, Docker and policy engines: services in both forms of kube-proxy's rules, where each end must
 * see the addresses that the kernel alone shows with the same rules; and rules that must see what pods send,
 * which are obeyed from when they are there, while connections that they do not concern go on.
 */
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { addForwardRules, addMasqueradeRules, pairVxlan } from "../../bench/baseline.ts";
import { iptablesRules, nftRules, type Service } from "../kubeproxy.ts";
import { createLab, type Host, type Lab, type Namespace, type Pod, type Process } from "../lab.ts";
import { Streams } from "../streams.ts";
import { twill } from "../twilld.ts";
import { type Cluster, createCluster, NETWORK, probe, serve, TCP_PORT, UDP_PORT } from "./cluster.ts";

const STREAM_PORT = 5001;
const A = "172.7.21.2";
const B = "172.7.22.2";
const C = "172.7.21.3";

interface Side {
  readonly h1: Host;
  readonly h2: Host;
  readonly a: Pod;
  readonly b: Pod;
  readonly c: Pod;
  readonly outside: Host;
  readonly servers: ReadonlyMap<Pod, Process>;
}

/** The services as the node with these pods sees them. */
function servicesFor(local: string): Service[] {
  const endpoint = (address: string, port: number) => ({
    address,
    port,
    local: address.startsWith(local),
  });
  const tcp = (name: string, number: number, addresses: readonly string[], more: Partial<Service> = {}) => ({
    name,
    protocol: "tcp" as const,
    clusterIp: `10.96.0.${number}`,
    port: 80,
    endpoints: addresses.map((address) => endpoint(address, TCP_PORT)),
    ...more,
  });
  return [
    tcp("on-a", 1, [A]),
    tcp("on-b", 2, [B], { nodePort: 30002 }),
    tcp("on-c", 3, [C], { nodePort: 30003 }),
    tcp("all", 4, [A, B, C]),
    tcp("sticky", 5, [A, B, C], { affinity: 600 }),
    tcp("near-b", 6, [B], { nodePort: 30006, externalTrafficPolicy: "Local" }),
    tcp("nobody", 7, []),
    tcp("stream", 8, [B], { endpoints: [endpoint(B, STREAM_PORT)] }),
    {
      name: "dns",
      protocol: "udp",
      clusterIp: "10.96.0.9",
      port: 53,
      nodePort: 30009,
      endpoints: [endpoint(B, UDP_PORT)],
    },
    { name: "dns-c", protocol: "udp", clusterIp: "10.96.0.10", port: 53, endpoints: [endpoint(C, UDP_PORT)] },
  ];
}

const FORMS = {
  iptables: {
    load: (host: Host, services: readonly Service[]) =>
      host.exec(["iptables-restore", "--noflush"], { input: iptablesRules(services, NETWORK) }),
    clear: (host: Host) =>
      host.exec(["iptables-restore"], {
        input: "*nat\nCOMMIT\n*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n",
      }),
  },
  nftables: {
    load: (host: Host, services: readonly Service[]) =>
      host.exec(["nft", "-f", "-"], { input: nftRules(services, NETWORK) }),
    clear: (host: Host) => host.exec(["nft", "delete", "table", "ip", "kube-proxy"]),
  },
} as const;

async function load(side: Side, form: keyof typeof FORMS): Promise<void> {
  await FORMS[form].load(side.h1, servicesFor("172.7.21."));
  await FORMS[form].load(side.h2, servicesFor("172.7.22."));
}

async function clear(side: Side, form: keyof typeof FORMS): Promise<void> {
  for (const host of [side.h1, side.h2]) await FORMS[form].clear(host);
}

/** Lines about clients that the servers have printed so far. */
function served(side: Side): number[] {
  return [...side.servers.values()].map(
    (server) => server.lines.filter(({ text }) => /^(tcp|udp) /.test(text)).length,
  );
}

/** Everything there is to see of the services, from everywhere. */
async function survey(side: Side): Promise<Record<string, unknown>> {
  const { a, b, c, h1, outside } = side;
  const tcp = (from: Namespace, to: string, port = 80) => probe(from, `tcp ${to} ${port} 20000 300000`);
  const udp = (from: Namespace, to: string, port = 53) => probe(from, `udp ${to} ${port} 900 --count 5`);
  const seen: Record<string, unknown> = {
    "cluster IP, pod on the other host": await tcp(a, "10.96.0.2"),
    "cluster IP, pod on the same host": await tcp(a, "10.96.0.3"),
    "cluster IP, from the other host": await tcp(b, "10.96.0.3"),
    "cluster IP, itself": await tcp(a, "10.96.0.1"),
    "cluster IP, nobody there": await tcp(a, "10.96.0.7"),
    "cluster IP, from the host itself": await tcp(h1, "10.96.0.2"),
    "cluster IP by UDP, pod on the other host": await udp(a, "10.96.0.9"),
    "cluster IP by UDP, pod on the same host": await udp(a, "10.96.0.10"),
    "node port, from outside, pod on the other host": await tcp(outside, "10.4.7.21", 30002),
    "node port, from outside, pod on that host": await tcp(outside, "10.4.7.22", 30002),
    "node port, from a pod of that host, pod on the other": await tcp(a, "10.4.7.21", 30002),
    "node port, from a pod of that host, pod on that host": await tcp(a, "10.4.7.21", 30003),
    "node port, from a pod of the other host": await tcp(b, "10.4.7.21", 30003),
    "node port, from a pod of the other host, back to it": await tcp(b, "10.4.7.21", 30002),
    "node port by UDP, from outside, pod on the other host": await udp(outside, "10.4.7.21", 30009),
    "traffic policy Local, from outside": await tcp(outside, "10.4.7.22", 30006),
    "traffic policy Local, from a pod": await tcp(a, "10.4.7.21", 30006),
    "pod to pod, beside all that": await tcp(c, B, TCP_PORT),
    "pod to pod by UDP, beside all that": await udp(c, B, UDP_PORT),
  };
  const before = served(side);
  for (let i = 0; i < 6; i++) expect(await tcp(c, "10.96.0.5")).toMatchObject({ intact: true });
  const after = served(side);
  seen["session affinity"] = after.map((count, index) => count - (before[index] ?? 0)).sort();
  const many = await Promise.all(Array.from({ length: 40 }, () => probe(a, "tcp 10.96.0.4 80 100 100")));
  seen["many short ones"] = many.filter(({ intact }) => intact).length;
  // From here on the same ports may be taken by others; nothing of a flow may be left over from the first ones.
  seen.again = await tcp(a, "10.96.0.2");
  return seen;
}

let cluster: Cluster;
let kernelLab: Lab;
let ours: Side;
let kernels: Side;

beforeAll(async () => {
  cluster = await createCluster();
  const { h1, h2, a, b, c, lab } = cluster;
  const servers = new Map(cluster.pods.map((pod) => [pod, cluster.server(pod)]));
  ours = { h1, h2, a, b, c, servers, outside: await lab.host("out", { address: "10.4.7.200/24" }) };
  kernelLab = await createLab();
  kernels = await kernelSide(kernelLab);
  // What the kubelet calls hairpin-veth: a port may send back what came from it.
  for (const { a, b, c } of [ours, kernels]) {
    for (const { host, port } of [a, b, c])
      await host.exec(["bridge", "link", "set", "dev", port, "hairpin", "on"]);
  }
}, 120_000);
afterAll(async () => {
  await cluster?.close();
  await kernelLab?.close();
});

/** The same hosts and pods, as flanneld sets them up. */
async function kernelSide(lab: Lab): Promise<Side> {
  const hosts = [];
  for (const number of [21, 22]) {
    const host = await lab.host(`h${number - 20}`, { address: `10.4.7.${number}/24` });
    await host.bridge("docker0", `172.7.${number}.1/24`, { mtu: 1450 });
    await addForwardRules(host, NETWORK);
    hosts.push(host);
  }
  const [h1, h2] = hosts as [Host, Host];
  await pairVxlan([
    [h1, "172.7.21.0/24"],
    [h2, "172.7.22.0/24"],
  ]);
  const a = await h1.pod("a", `${A}/24`, { mtu: 1450 });
  const b = await h2.pod("b", `${B}/24`, { mtu: 1450 });
  const c = await h1.pod("c", `${C}/24`, { mtu: 1450 });
  const servers = new Map<Pod, Process>();
  for (const pod of [a, b, c]) servers.set(pod, await serve(pod));
  return { h1, h2, a, b, c, servers, outside: await lab.host("out", { address: "10.4.7.200/24" }) };
}

/** Waits until the status of a host says whether pods' packets take the stack; returns why. */
async function untilStack(host: Host, needsStack: boolean): Promise<readonly string[]> {
  const { firewall } = await cluster
    .twilld(host)
    .statusWhere(
      `packets of pods ${needsStack ? "" : "do not "}take the stack`,
      (status) => status.firewall?.needsStack === needsStack,
    );
  return firewall?.reasons ?? [];
}

/** Whether packets from a pod to another take the fast lane on the sender's host. */
async function isFast(from: Pod, to: Pod): Promise<boolean> {
  const counted = await cluster.counted(from.host, async () => {
    expect((await from.ping(to.address, { count: 10 })).received).toBe(10);
  });
  return (counted.from_pod?.encapsulated ?? 0) >= 10;
}

describe.each(["iptables", "nftables"] as const)("kube-proxy's rules in the form of %s", (form) => {
  beforeAll(async () => {
    await load(ours, form);
    await load(kernels, form);
  });
  afterAll(async () => {
    await clear(ours, form);
    await clear(kernels, form);
    if (form === "iptables")
      for (const host of [kernels.h1, kernels.h2]) await addForwardRules(host, NETWORK);
  });

  test("each end of a service sees what the kernel alone shows", async () => {
    const expected = await survey(kernels);
    expect(await survey(ours)).toEqual(expected);
    // That they answer at all, and what kube-proxy is known for.
    expect(expected).toMatchObject({
      "cluster IP, pod on the other host": { intact: true, seen: A, peer: "10.96.0.2" },
      "cluster IP, itself": { intact: true, seen: "172.7.21.1", peer: "10.96.0.1" },
      "cluster IP, nobody there": { intact: false, error: "Connection refused" },
      "traffic policy Local, from outside": { intact: true, seen: "10.4.7.200" },
      "session affinity": [0, 0, 6],
      "many short ones": 40,
    });
    const failed = Object.entries(expected).filter(
      ([, value]) => (value as { intact?: boolean }).intact === false,
    );
    expect(failed.map(([name]) => name)).toEqual(["cluster IP, nobody there"]);
  });

  test("leave the fast lane on", async () => {
    for (const host of [ours.h1, ours.h2]) expect(await untilStack(host, false)).toEqual([]);
    expect(await isFast(ours.a, ours.b)).toBe(true);
    expect(await twill(ours.h1, "status", `--pin-path=${ours.h1.pinPath}`)).toContain("auto: on");
  });

  test("connections through a service live on while a policy engine comes and goes", async () => {
    const { a, b, c, h1, h2 } = ours;
    const service = { address: "10.96.0.8", port: 80 };
    const through = await Streams.start(a, b, 4, STREAM_PORT, service);
    const direct = await Streams.start(c, b, 4, STREAM_PORT + 1);
    for (let turn = 0; turn < 2; turn++) {
      for (const host of [h1, h2]) {
        await host.exec(["iptables", "-I", "FORWARD", "-s", "172.7.99.0/24", "-j", "DROP"]);
        await untilStack(host, true);
        await Promise.all([through.flow(2), direct.flow(2)]);
      }
      for (const host of [h1, h2]) {
        await host.exec(["iptables", "-D", "FORWARD", "-s", "172.7.99.0/24", "-j", "DROP"]);
        await untilStack(host, false);
        await Promise.all([through.flow(2), direct.flow(2)]);
      }
    }
    expect((await through.finish()).bytes).toBeGreaterThan(0);
    expect((await direct.finish()).bytes).toBeGreaterThan(0);
  });

  test("a connection opened while the stack had it is still translated afterwards", async () => {
    const { a, b, h1, h2 } = ours;
    for (const host of [h1, h2]) {
      await host.exec(["iptables", "-I", "FORWARD", "-s", "172.7.99.0/24", "-j", "DROP"]);
      await untilStack(host, true);
    }
    const through = await Streams.start(a, b, 8, STREAM_PORT, { address: "10.96.0.8", port: 80 });
    for (const host of [h1, h2]) {
      await host.exec(["iptables", "-D", "FORWARD", "-s", "172.7.99.0/24", "-j", "DROP"]);
      await untilStack(host, false);
    }
    await through.flow(2);
    await through.finish();
  });
});

describe("a policy engine", () => {
  test("that drops one pair in FORWARD is obeyed, and the others go on", async () => {
    const { a, b, c, h1 } = ours;
    expect(await isFast(a, b)).toBe(true);
    const others = await Streams.start(c, b, 4);
    const ping = await a.startPing(B);
    await ping.replies(20);
    await h1.exec(["iptables", "-I", "FORWARD", "-s", A, "-d", B, "-j", "DROP"]);
    const at = repliesOf(ping.process);
    const reasons = await untilStack(h1, true);
    expect(reasons).toEqual(["chain FORWARD of table ip filter may apply DROP to packets of pods"]);
    expect((await a.ping(B, { count: 3 })).received).toBe(0);
    expect((await b.ping(A, { count: 3 })).received).toBe(0);
    // A hundred a second: it took no longer than a second.
    expect(repliesOf(ping.process) - at).toBeLessThan(100);
    await ping.stop();
    expect((await c.ping(B, { count: 10 })).received).toBe(10);
    expect(await isFast(c, b)).toBe(false);
    expect((await a.ping(C, { count: 3 })).received).toBe(3);
    await others.flow(2);
    const said = await twill(h1, "status", `--pin-path=${h1.pinPath}`);
    expect(said).toContain("auto: pods' packets take the stack");
    expect(said).toContain("chain FORWARD of table ip filter may apply DROP");
    await h1.exec(["iptables", "-D", "FORWARD", "-s", A, "-d", B, "-j", "DROP"]);
    await untilStack(h1, false);
    expect(await isFast(a, b)).toBe(true);
    await others.flow(2);
    await others.finish();
  });

  test("like kube-router's, which lets in only who may and answers the rest, is obeyed", async () => {
    const { a, b, c, h2 } = ours;
    const allowed = await Streams.start(c, b, 2);
    await h2.exec(["iptables-restore", "--noflush"], {
      input: `*filter
:KUBE-ROUTER-FORWARD - [0:0]
:KUBE-POD-FW-B - [0:0]
:KUBE-NWPLCY-C - [0:0]
-I FORWARD -m comment --comment "kube-router netpol" -j KUBE-ROUTER-FORWARD
-A KUBE-ROUTER-FORWARD -d ${B} -j KUBE-POD-FW-B
-A KUBE-POD-FW-B -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A KUBE-POD-FW-B -j KUBE-NWPLCY-C
-A KUBE-POD-FW-B -m mark ! --mark 0x10000/0x10000 -j REJECT --reject-with icmp-port-unreachable
-A KUBE-NWPLCY-C -s ${C} -j MARK --set-xmark 0x10000/0x10000
-A KUBE-NWPLCY-C -s ${C} -j RETURN
COMMIT
`,
    });
    expect(await untilStack(h2, true)).toEqual([
      "chain FORWARD of table ip filter leads to KUBE-ROUTER-FORWARD, KUBE-POD-FW-B, which may apply REJECT to packets of pods",
    ]);
    expect(await probe(a, `tcp ${B} ${TCP_PORT} 10 10`)).toMatchObject({ intact: false });
    expect(await probe(c, `tcp ${B} ${TCP_PORT} 10 10`)).toMatchObject({ intact: true, seen: C });
    await allowed.flow(2);
    for (const rule of ["-D FORWARD 1", "-F KUBE-ROUTER-FORWARD", "-F KUBE-POD-FW-B", "-F KUBE-NWPLCY-C"])
      await h2.exec(["iptables", ...rule.split(" ")]);
    await untilStack(h2, false);
    expect(await probe(a, `tcp ${B} ${TCP_PORT} 10 10`)).toMatchObject({ intact: true, seen: A });
    await allowed.flow(2);
    await allowed.finish();
  });

  test("is obeyed by a twilld that starts after it, from the first packet", async () => {
    const { a, h1 } = ours;
    await h1.exec(["iptables", "-I", "FORWARD", "-s", A, "-d", B, "-j", "DROP"]);
    await untilStack(h1, true);
    await cluster.restart();
    expect(await untilStack(h1, true)).toHaveLength(1);
    expect((await a.ping(B, { count: 3 })).received).toBe(0);
    await h1.exec(["iptables", "-D", "FORWARD", "-s", A, "-d", B, "-j", "DROP"]);
    await untilStack(h1, false);
    expect((await a.ping(B, { count: 3 })).received).toBe(3);
  });
});

function repliesOf(ping: Process): number {
  return ping.lines.filter(({ text }) => text.includes("bytes from")).length;
}

describe("with --ip-masq, beside flanneld's masquerade rules on the kernel's side", {
  timeout: 180_000,
}, () => {
  /** Ports of the first host that lead to a pod, and nobody translates the source: as Docker publishes. */
  const PUBLISHED = { 8080: A, 8081: B } as const;

  beforeAll(async () => {
    await cluster.restart(["--ip-masq"]);
    for (const [host, subnet] of [
      [kernels.h1, "172.7.21.0/24"],
      [kernels.h2, "172.7.22.0/24"],
    ] as const)
      await addMasqueradeRules(host, NETWORK, subnet);
    for (const { h1 } of [ours, kernels]) {
      await h1.exec(["nft", "-f", "-"], {
        input: `table ip published {
chain prerouting { type nat hook prerouting priority dstnat - 1;
${Object.entries(PUBLISHED)
  .flatMap(([port, pod]) => [
    `ip daddr 10.4.7.21 tcp dport ${port} dnat to ${pod}:${TCP_PORT}`,
    `ip daddr 10.4.7.21 udp dport ${port} dnat to ${pod}:${UDP_PORT}`,
  ])
  .join("\n")}
}
}
`,
      });
    }
  });
  afterAll(async () => {
    for (const { h1 } of [ours, kernels]) await h1.exec(["nft", "delete", "table", "ip", "published"]);
    for (const host of [kernels.h1, kernels.h2])
      for (const command of [
        "-D POSTROUTING -m comment --comment",
        "-F FLANNEL-POSTRTG",
        "-X FLANNEL-POSTRTG",
      ]) {
        const more = command.startsWith("-D") ? ["flanneld masq", "-j", "FLANNEL-POSTRTG"] : [];
        await host.exec(["iptables", "-t", "nat", ...command.split(" "), ...more]);
      }
    await cluster.restart();
  });

  /** The published ports, from everywhere. */
  async function published({ a, b, c, h2, outside }: Side): Promise<Record<string, unknown>> {
    const seen: Record<string, unknown> = {};
    const clients = { a, b, c, h2, outside };
    for (const [name, from] of Object.entries(clients)) {
      for (const port of Object.keys(PUBLISHED)) {
        // A pod that asks for itself, or for its neighbour on the bridge, would be answered past the host.
        if (port === "8080" && (name === "a" || name === "c")) continue;
        seen[`${name} to ${port} by TCP`] = await probe(from, `tcp 10.4.7.21 ${port} 20000 300000`);
        const { tries: _, ...udp } = await probe(from, `udp 10.4.7.21 ${port} 900 --count 5`);
        seen[`${name} to ${port} by UDP`] = udp;
      }
    }
    return seen;
  }

  test("a published port answers everybody, and each end sees what the kernel alone shows", async () => {
    const expected = await published(kernels);
    expect(await published(ours)).toEqual(expected);
    const intact = Object.values(expected).filter((found) => (found as { intact?: boolean }).intact);
    expect(intact).toHaveLength(16);
    expect(expected["b to 8080 by TCP"]).toMatchObject({ seen: "10.4.7.22" });
    expect(expected["outside to 8081 by TCP"]).toMatchObject({ seen: "172.7.21.0" });
  });

  test.each(["iptables", "nftables"] as const)(
    "and so does each end of a service, with rules of %s",
    async (form) => {
      await load(ours, form);
      await load(kernels, form);
      try {
        const expected = await survey(kernels);
        expect(await survey(ours)).toEqual(expected);
        const failed = Object.entries(expected).filter(
          ([, value]) => (value as { intact?: boolean }).intact === false,
        );
        expect(failed.map(([name]) => name)).toEqual(["cluster IP, nobody there"]);
      } finally {
        await clear(ours, form);
        await clear(kernels, form);
        for (const [host, subnet] of [
          [kernels.h1, "172.7.21.0/24"],
          [kernels.h2, "172.7.22.0/24"],
        ] as const) {
          if (form === "iptables") {
            await addForwardRules(host, NETWORK);
            await addMasqueradeRules(host, NETWORK, subnet);
          }
        }
      }
    },
  );
});

test("Docker's rules leave the fast lane on, also with a published port and a policy of DROP", async () => {
  const { a, b, h1 } = ours;
  await h1.exec(["iptables-restore", "--noflush"], {
    input: `*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A DOCKER -d ${A}/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.7.21.0/24 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination ${A}:${TCP_PORT}
COMMIT
`,
  });
  expect(await untilStack(h1, false)).toEqual([]);
  expect(await probe(a, `tcp ${B} ${TCP_PORT} 10 10`)).toMatchObject({ intact: true, seen: A });
  expect(await probe(b, `tcp ${A} ${TCP_PORT} 10 10`)).toMatchObject({ intact: true, seen: B });
  expect(await isFast(a, b)).toBe(true);
});
