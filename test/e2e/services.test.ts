/**
 * Flows that the stack translates, beside a fast lane that must not get in their way: services (DNAT from an
 * address that nobody has), published ports, Docker's own rules. Every expectation holds with the kernel alone
 * too, where it is tested second.
 */
import { beforeAll, describe, expect, test } from "vitest";
import type { Host, Namespace } from "../lab.ts";
import {
  type Cluster,
  createCluster,
  NETWORK,
  nodeAddressOf,
  probe,
  serve,
  TCP_PORT,
  TESTED_BACKENDS,
  UDP_PORT,
} from "./cluster.ts";

const SERVICE = "10.96.0.10";
/** Answers at the pod on the other host, and at a pod of the same host. */
const FAR = 80;
const NEAR = 81;
/** Nothing listens there in the pod. */
const CLOSED = 82;
const PUBLISHED = 8080;
/** As kube-proxy does it for node ports and with --masquerade-all: the source is translated too. */
const MASQUERADED = 8081;
const OUTSIDE = "10.4.7.66";

let cluster: Cluster;
/** A machine that is none of the cluster's. */
let outside: Host;

async function nat(host: Host, rules: readonly string[]): Promise<void> {
  await host.exec(["iptables-restore", "--noflush"], {
    input: ["*nat", ...rules, "COMMIT", ""].join("\n"),
  });
}

/** Rules that lead `from`:`port` to `to`, for both protocols. */
function leads(
  chain: string,
  match: string,
  port: number,
  to: string,
  inner = { tcp: TCP_PORT, udp: UDP_PORT },
) {
  return (["tcp", "udp"] as const).map(
    (protocol) =>
      `-A ${chain} ${match} -p ${protocol} --dport ${port} -j DNAT --to-destination ${to}:${inner[protocol]}`,
  );
}

/** A short and a long TCP flow, a short and a long UDP one, and one in fragments; all that the ends saw. */
async function flows(from: Namespace, address: string, port: number, more = "") {
  const udp = port === TCP_PORT ? UDP_PORT : port;
  const findings = [];
  for (const command of [
    `tcp ${address} ${port} 10 10`,
    `tcp ${address} ${port} 3000000 3000000 --turns 3`,
    `udp ${address} ${udp} 100`,
    `udp ${address} ${udp} 1000 --count 50`,
    `udp ${address} ${udp} 20000 --segment 1000 --count 5`,
    `udp ${address} ${udp} 6000 --count 3`,
  ]) {
    const { tries: _, ...finding } = await probe(from, `${command} ${more}`.trim());
    findings.push(finding);
  }
  return findings;
}

const all = (seen: string, peer: string) => Array.from({ length: 6 }, () => ({ intact: true, seen, peer }));

describe.each(TESTED_BACKENDS)("%s, services", (backend) => {
  beforeAll(async () => {
    cluster = await createCluster({ backend });
    const { h1, a, b, c } = cluster;
    const rules = (chain: string) => [
      ...leads(chain, `-d ${SERVICE}`, FAR, b.address),
      ...leads(chain, `-d ${SERVICE}`, NEAR, c.address),
      ...leads(chain, `-d ${SERVICE}`, CLOSED, b.address, { tcp: 9, udp: 9 }),
      ...leads(chain, `-d ${h1.address}`, PUBLISHED, a.address),
    ];
    const masqueraded = [SERVICE, h1.address].flatMap((address) => [
      ...leads("PREROUTING", `-d ${address}`, MASQUERADED, b.address),
      `-A POSTROUTING -m conntrack --ctorigdst ${address} --ctorigdstport ${MASQUERADED} -j MASQUERADE`,
    ]);
    await nat(h1, [...rules("PREROUTING"), ...rules("OUTPUT"), ...masqueraded]);
    outside = await cluster.lab.host("h9", { address: `${OUTSIDE}/24` });
    // A pod that reaches a service on its own bridge would be answered past the host otherwise.
    await h1.sysctl({ "net.bridge.bridge-nf-call-iptables": 1 });
    return () => cluster.close();
  });

  describe.each(["auto", "off"])("--fast-path=%s", (fastPath) => {
    beforeAll(async () => {
      if (fastPath === "off") await cluster.restart(["--fast-path=off"]);
    });

    test("a service at a pod of the other host", async () => {
      const { a } = cluster;
      expect(await flows(a, SERVICE, FAR)).toEqual(all(a.address, SERVICE));
    });

    test("a service at a pod of the same host", async () => {
      const { a } = cluster;
      expect(await flows(a, SERVICE, NEAR)).toEqual(all(a.address, SERVICE));
    });

    test("the same pods at their own addresses, before and after", async () => {
      const { a, b, c } = cluster;
      for (const to of [b, c]) {
        expect(await probe(a, `tcp ${to.address} ${TCP_PORT} 1000000 1000000`)).toMatchObject({
          seen: a.address,
        });
        expect(await probe(a, `udp ${to.address} ${UDP_PORT} 1000 --count 20`)).toMatchObject({
          seen: a.address,
        });
      }
    });

    test("a service from the host itself", async () => {
      const { h1, b } = cluster;
      const far = nodeAddressOf(h1, backend);
      expect(await probe(h1, `tcp ${SERVICE} ${NEAR} 1000000 1000000`)).toMatchObject({ intact: true });
      const addresses = await h1.ip(`route get ${b.address}`);
      expect(addresses).toContain(far);
    });

    test("ICMP errors of a translated flow speak of the service", async () => {
      const { a } = cluster;
      expect(await probe(a, `error ${SERVICE} ${CLOSED} 100`)).toMatchObject({
        type: 3,
        code: 3,
        from: SERVICE,
      });
      const refused = await probe(a, `tcp ${SERVICE} ${CLOSED} 1 1`);
      expect(refused).toEqual({ intact: false, error: "Connection refused" });
      // Whoever sends it, the kernel writes the address that the flow was begun with.
      // With udp two of the hops between the nodes are nobody's who says a word.
      for (const ttl of backend === "udp" ? [1, 4] : [1, 2])
        expect(await probe(a, `error ${SERVICE} ${FAR} 100 --ttl ${ttl}`)).toMatchObject({
          type: 11,
          code: 0,
          from: SERVICE,
        });
    });

    test("a published port, from a pod of the other host and from that host", async () => {
      const { h1, h2, b } = cluster;
      // Nobody translates the source: the pod's own address goes out to the host's, and back to it.
      expect(await flows(b, h1.address, PUBLISHED)).toEqual(all(b.address, h1.address));
      expect(await flows(h2, h1.address, PUBLISHED)).toEqual(all(h2.address, h1.address));
    });

    test("with the source translated too: from a pod, and from outside to a pod of another host", async () => {
      const { a, h1 } = cluster;
      const seen = nodeAddressOf(h1, backend);
      expect(await flows(a, SERVICE, MASQUERADED)).toEqual(all(seen, SERVICE));
      expect(await flows(outside, h1.address, MASQUERADED)).toEqual(all(seen, h1.address));
    });

    test("a connection that is open while others come and go", async () => {
      const { a } = cluster;
      const [long, ...others] = await Promise.all([
        probe(a, `tcp ${SERVICE} ${FAR} 1000000 1000000 --turns 10`),
        flows(a, SERVICE, NEAR),
        flows(cluster.b, cluster.h1.address, PUBLISHED),
      ]);
      expect(long).toMatchObject({ intact: true, seen: a.address });
      expect(others.flat().every((finding) => finding.intact)).toBe(true);
    });
  });
});

describe.each(TESTED_BACKENDS)("%s, beside Docker's rules", (backend) => {
  beforeAll(async () => {
    cluster = await createCluster({ backend });
    for (const [host, subnet] of [
      [cluster.h1, "172.7.21.0/24"],
      [cluster.h2, "172.7.22.0/24"],
    ] as const) {
      await host.exec(["iptables-restore", "--noflush"], {
        input: [
          "*nat",
          `-A POSTROUTING -s ${subnet} ! -o docker0 -j MASQUERADE`,
          "COMMIT",
          "*filter",
          ":FORWARD DROP",
          ":DOCKER -",
          ":DOCKER-ISOLATION-STAGE-1 -",
          ":DOCKER-ISOLATION-STAGE-2 -",
          ":DOCKER-USER -",
          "-A FORWARD -j DOCKER-USER",
          "-A FORWARD -j DOCKER-ISOLATION-STAGE-1",
          "-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
          "-A FORWARD -o docker0 -j DOCKER",
          "-A FORWARD -i docker0 ! -o docker0 -j ACCEPT",
          "-A FORWARD -i docker0 -o docker0 -j ACCEPT",
          "-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2",
          "-A DOCKER-ISOLATION-STAGE-1 -j RETURN",
          "-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP",
          "-A DOCKER-ISOLATION-STAGE-2 -j RETURN",
          "-A DOCKER-USER -j RETURN",
          "COMMIT",
          "",
        ].join("\n"),
      });
    }
    outside = await cluster.lab.host("h9", { address: `${OUTSIDE}/24` });
    return () => cluster.close();
  });

  test("pod reaches pod from the first packet, and keeps its address", async () => {
    const { a, b } = cluster;
    expect((await a.ping(b.address, { count: 50 })).lost).toEqual([]);
    expect((await b.ping(a.address, { count: 50 })).lost).toEqual([]);
    for (const [from, to] of [[a, b] as const, [b, a] as const]) {
      const own = { intact: true, seen: from.address, peer: to.address };
      expect(await probe(from, `tcp ${to.address} ${TCP_PORT} 3000000 3000000`)).toEqual(own);
      expect(await probe(from, `udp ${to.address} ${UDP_PORT} 1000 --count 20`)).toMatchObject(own);
      expect(await probe(from, `udp ${to.address} ${UDP_PORT} 20000 --segment 1000`)).toMatchObject(own);
      expect(await probe(from, `error ${to.address} 9 100`)).toMatchObject({
        type: 3,
        code: 3,
        from: to.address,
      });
    }
  });

  test("a process of the other host reaches a pod, by whatever address of its own", async () => {
    const { h1, b } = cluster;
    const usual = nodeAddressOf(h1, backend);
    expect(await flows(h1, b.address, TCP_PORT)).toEqual(all(usual, b.address));
    expect((await h1.ping(b.address, { count: 5 })).lost).toEqual([]);
    expect(await flows(h1, b.address, TCP_PORT, `--source ${h1.address}`)).toEqual(
      all(h1.address, b.address),
    );
  });

  test("whoever has a route to it reaches a pod, which answers from its own address", async () => {
    const { h2, b } = cluster;
    await outside.ip(`route add 172.7.22.0/24 via ${h2.address}`);
    const counted = await cluster.counted(h2, async () => {
      expect(await flows(outside, b.address, TCP_PORT)).toEqual(all(OUTSIDE, b.address));
      expect((await outside.ping(b.address, { count: 5 })).lost).toEqual([]);
      expect(await probe(outside, `error ${b.address} 9 100`)).toMatchObject({ code: 3, from: b.address });
    });
    expect(counted.from_pod?.answered).toBeGreaterThan(10);
    // In pieces, whichever of them comes first.
    const orders = ["0,1,2", "0,2,1", "1,0,2", "1,2,0", "2,0,1", "2,1,0"].map((order) => `--order ${order}`);
    const pieces = await cluster.counted(h2, async () => {
      const command = `pieces ${b.address} ${UDP_PORT} 4000 ${orders.join(" ")}`;
      expect(await probe(outside, command)).toEqual({ intact: true });
    });
    expect(pieces.from_net).toMatchObject({ held: 6, released: 4, delivered: 18 });
  });

  test("what a pod asks of the outside is answered as before", async () => {
    const { h2, b } = cluster;
    await serve(outside);
    // Docker's rule hides it, and without that rule the answers still come by the stack.
    expect(await flows(b, OUTSIDE, TCP_PORT)).toEqual(all(h2.address, OUTSIDE));
    await h2.exec(["iptables", "-t", "nat", "-F", "POSTROUTING"]);
    await nat(h2, leads("PREROUTING", `-d ${SERVICE}`, FAR, OUTSIDE));
    expect(await flows(b, OUTSIDE, TCP_PORT)).toEqual(all(b.address, OUTSIDE));
    expect(await flows(b, SERVICE, FAR)).toEqual(all(b.address, SERVICE));
    expect(await flows(outside, b.address, TCP_PORT)).toEqual(all(OUTSIDE, b.address));
  });

  test("a rule that is meant for the outside is obeyed, and so is the policy if asked", async () => {
    const { h2, b } = cluster;
    const refused = { intact: false };
    const twilld = cluster.twilld(h2);
    const lets = (letsIn: boolean) =>
      twilld.statusWhere(`letsIn is ${letsIn}`, ({ firewall }) => firewall?.letsIn === letsIn);
    const rule = ["DOCKER-USER", "-p", "udp", "!", "-s", NETWORK, "-j", "REJECT"];
    await h2.exec(["iptables", "-I", ...rule]);
    expect((await lets(false)).firewall?.outside.join()).toContain("REJECT");
    expect(await probe(outside, `udp ${b.address} ${UDP_PORT} 100`)).toMatchObject(refused);
    expect(await probe(cluster.a, `udp ${b.address} ${UDP_PORT} 100`)).toMatchObject({ intact: true });
    await h2.exec(["iptables", "-D", ...rule]);
    await lets(true);
    expect(await probe(outside, `udp ${b.address} ${UDP_PORT} 100`)).toMatchObject({ intact: true });

    await cluster.restart(["--iptables-forward-rules=false"]);
    const { firewall } = await cluster
      .twilld(h2)
      .statusWhere("the firewall is judged", (status) => status.firewall?.needsStack === true);
    expect(firewall?.reasons.join()).toContain("chain FORWARD of table ip filter drops");
    expect((await outside.ping(b.address, { count: 1 })).received).toBe(0);
  });
});
