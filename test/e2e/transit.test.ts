/**
 * With --ip-masq, what comes from outside the network to one node and goes on to a pod of another gets the first
 * node's address: a container of another bridge, a machine that has its routes by the node, the node's own processes
 * under an outside address, a port that is led to a pod elsewhere.
 *
 * Each node is Twill or flannel, the kernel's own means with flanneld's rules; whichever they are, both ends of
 * everything must see what they see between two nodes of flannel.
 */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import {
  addForwardRules,
  addMasqueradeRules,
  addRoutePeer,
  addVxlan,
  addVxlanPeer,
} from "../../bench/baseline.ts";
import { createLab, type Etcd, type Host, type Lab, type Namespace, type Pod, until } from "../lab.ts";
import { Streams } from "../streams.ts";
import { startTwilld, type Twilld } from "../twilld.ts";
import {
  ALL_BACKENDS,
  type BackendName,
  type Finding,
  NETWORK,
  PLAIN_BACKENDS,
  probe,
  serve,
  TCP_PORT,
  TESTED_BACKENDS,
  TESTED_KERNEL_BACKENDS,
  UDP_PORT,
} from "./cluster.ts";

vi.setConfig({ testTimeout: 180_000 });

const PREFIX = "/coreos.com/network";
/** On both nodes' network, with its routes to pods by the first node. */
const STRANGER = "10.4.7.66";
/** A container of the first node's other bridge. */
const OTHER = "172.17.0.2";
const PUBLISHED = 8081;
const CLOSED = 9;

type Kind = "twill" | "flannel";
interface Node {
  readonly host: Host;
  readonly kind: Kind;
  readonly subnet: string;
  readonly masquerades: boolean;
}

interface Side {
  readonly lab: Lab;
  readonly nodes: readonly [Node, Node];
  readonly twillds: ReadonlyMap<Host, Twilld>;
  readonly etcd: Etcd;
  /** On the second node. */
  readonly b: Pod;
  readonly other: Pod;
  readonly stranger: Host;
}

const isDirect = (backend: BackendName): boolean => backend === "host-gw" || backend.includes("Direct");

/** What flanneld does for its own lease, and for the one of its peer. */
async function asFlannel(etcd: Etcd, backend: BackendName, node: Node): Promise<void> {
  await addForwardRules(node.host, NETWORK);
  if (node.masquerades) await addMasqueradeRules(node.host, NETWORK, node.subnet);
  const isTunnel = backend !== "host-gw";
  const mac = isTunnel ? (await addVxlan(node.host, { subnet: node.subnet })).mac : undefined;
  await etcd.put(
    `${PREFIX}/subnets/${node.subnet.replace("/", "-")}`,
    JSON.stringify({
      PublicIP: node.host.address,
      PublicIPv6: null,
      BackendType: isTunnel ? "vxlan" : "host-gw",
      ...(isTunnel ? { BackendData: { VNI: 1, VtepMAC: mac } } : {}),
    }),
  );
}

async function learnPeer(etcd: Etcd, backend: BackendName, node: Node, peer: Node): Promise<void> {
  const { subnet } = peer;
  const publicIp = peer.host.address;
  if (isDirect(backend)) return addRoutePeer(node.host, { subnet, publicIp });
  const key = `${PREFIX}/subnets/${subnet.replace("/", "-")}`;
  const record = await until("the lease of the peer", async () => (await etcd.list(key)).get(key));
  const { BackendData } = JSON.parse(record) as { BackendData: { VtepMAC: string } };
  await addVxlanPeer(node.host, { subnet, publicIp, vtepMac: BackendData.VtepMAC });
}

const flagsOf = ({ masquerades }: Node): string[] => (masquerades ? ["--ip-masq"] : []);

async function createSide(
  backend: BackendName,
  kinds: readonly [Kind, Kind],
  masquerades: readonly [boolean, boolean] = [true, true],
): Promise<Side> {
  const lab = await createLab();
  try {
    const etcd = await lab.etcd({ addresses: ["10.4.7.11/24"] });
    const config = ALL_BACKENDS[backend];
    await etcd.put(`${PREFIX}/config`, JSON.stringify({ Network: NETWORK, Backend: config }));
    const make = async (index: 0 | 1): Promise<Node> => {
      const number = 21 + index;
      const host = await lab.host(`h${index + 1}`, { address: `10.4.7.${number}/24` });
      await host.bridge("docker0", `172.7.${number}.1/24`, { mtu: 1450 });
      const subnet = `172.7.${number}.0/24`;
      writeFileSync(
        join(host.directory, "subnet.env"),
        `FLANNEL_NETWORK=${NETWORK}\nFLANNEL_SUBNET=172.7.${number}.1/24\n`,
      );
      // A host that is told of a shorter way would no longer go by this node.
      await host.sysctl({ "net.ipv4.conf.all.send_redirects": 0, "net.ipv4.conf.eth0.send_redirects": 0 });
      return { host, kind: kinds[index], subnet, masquerades: masquerades[index] };
    };
    const nodes = [await make(0), await make(1)] as const;
    const [first, second] = nodes;
    const b = await second.host.pod("b", "172.7.22.2/24", { mtu: 1450 });
    const bridge = await first.host.bridge("br1", "172.17.0.1/16");
    const other = await first.host.pod("other", `${OTHER}/16`, { bridge });
    const stranger = await lab.host("stranger", { address: `${STRANGER}/24` });
    await stranger.ip(`route add ${NETWORK} via ${first.host.address}`);
    await second.host.ip(`route add 172.17.0.0/16 via ${first.host.address}`);
    await first.host.exec(["iptables-restore", "--noflush"], {
      input: `*nat\n${["tcp", "udp"]
        .map(
          (protocol) =>
            `-A PREROUTING -d ${first.host.address} -p ${protocol} --dport ${PUBLISHED} -j DNAT ` +
            `--to-destination ${b.address}:${protocol === "tcp" ? TCP_PORT : UDP_PORT}`,
        )
        .join("\n")}\nCOMMIT\n`,
    });
    for (const node of nodes) if (node.kind === "flannel") await asFlannel(etcd, backend, node);
    const twillds = new Map<Host, Twilld>();
    for (const node of nodes)
      if (node.kind === "twill")
        twillds.set(node.host, await startTwilld(node.host, { etcd, flags: flagsOf(node) }));
    for (const node of nodes)
      if (node.kind === "flannel") await learnPeer(etcd, backend, node, node === first ? second : first);
    for (const each of [b, other]) await serve(each);
    await serve(first.host, [TCP_PORT, UDP_PORT], first.host.address);
    await until("the first node to reach the pod", async () => {
      return (await first.host.ping(b.address, { count: 1 })).received === 1;
    });
    return { lab, nodes, twillds, etcd, b, other, stranger };
  } catch (error) {
    await lab.close();
    throw error;
  }
}

/** Everything there is to see of what goes through the first node to the pod of the second. */
async function survey({ nodes: [first], b, other, stranger }: Side): Promise<Record<string, unknown>> {
  const h1 = first.host;
  const seen: Record<string, unknown> = {};
  const ask = async (name: string, from: Namespace, command: string): Promise<void> => {
    const { tries: _, ...finding } = await probe(from, command);
    seen[name] = finding;
  };
  const clients: [string, Namespace, string][] = [
    ["container of another bridge", other, ""],
    ["stranger", stranger, ""],
    ["node, by its own choice", h1, ""],
    ["node, under its outside address", h1, ` --source ${h1.address}`],
  ];
  for (const [name, from, more] of clients) {
    await ask(`${name}: TCP`, from, `tcp ${b.address} ${TCP_PORT} 20000 300000${more}`);
    await ask(`${name}: UDP`, from, `udp ${b.address} ${UDP_PORT} 900 --count 5${more}`);
    await ask(`${name}: UDP in pieces`, from, `udp ${b.address} ${UDP_PORT} 6000 --count 3${more}`);
    if (more === "") await ask(`${name}: error`, from, `error ${b.address} ${CLOSED} 100`);
    const source = more === "" ? [] : ["-I", h1.address];
    for (const size of ["56", "5000"]) {
      const argv = ["ping", "-n", "-c", "3", "-i", "0.05", "-W", "3", "-s", size, ...source, b.address];
      const { stdout } = await from.exec(argv, { check: false });
      seen[`${name}: ping of ${size}`] = / 0% packet loss/.test(stdout);
    }
  }
  await ask("published, from a stranger: TCP", stranger, `tcp ${h1.address} ${PUBLISHED} 20000 300000`);
  await ask("published, from a stranger: UDP", stranger, `udp ${h1.address} ${PUBLISHED} 900 --count 5`);
  return seen;
}

/** What the pod sees of those who come through the first node. */
const addressesIn = (seen: Record<string, unknown>): Record<string, unknown> =>
  Object.fromEntries(
    Object.entries(seen).flatMap(([name, finding]) => {
      const { seen: address } = finding as Finding;
      return address === undefined ? [] : [[name, address]];
    }),
  );

/** And how a pod is answered by the first node, and by what is behind it. */
async function answers({ nodes: [first], b }: Side): Promise<Record<string, unknown>> {
  const seen: Record<string, unknown> = {};
  for (const to of [first.host.address, OTHER]) {
    seen[`${to}: TCP`] = await probe(b, `tcp ${to} ${TCP_PORT} 20000 300000`);
    for (const size of [900, 6000]) {
      const { tries: _, ...finding } = await probe(b, `udp ${to} ${UDP_PORT} ${size} --count 5`);
      seen[`${to}: UDP of ${size}`] = finding;
    }
    seen[`${to}: ping`] = (await b.ping(to, { count: 3, size: 3000 })).received;
    seen[`${to}: error`] = await probe(b, `error ${to} ${CLOSED} 100`);
  }
  return seen;
}

describe.each(TESTED_KERNEL_BACKENDS)("%s", (backend) => {
  const lent = isDirect(backend) ? "10.4.7.21" : "172.7.21.0";
  let expected: Record<string, unknown>;
  let expectedAnswers: Record<string, unknown>;

  test("between two nodes of flannel", async () => {
    const side = await createSide(backend, ["flannel", "flannel"]);
    try {
      expected = await survey(side);
      expectedAnswers = await answers(side);
    } finally {
      await side.lab.close();
    }
    expect(new Set(Object.values(addressesIn(expected)))).toEqual(new Set([lent]));
    expect(Object.keys(addressesIn(expected))).toHaveLength(14);
    expect(Object.values(expected).filter((found) => found === true)).toHaveLength(8);
    expect(expected["stranger: error"]).toMatchObject({ type: 3, code: 3, from: "172.7.22.2" });
    expect(expectedAnswers["10.4.7.21: UDP of 900"]).toMatchObject({ intact: true, seen: "10.4.7.22" });
  });

  test.each<[Kind, Kind]>([
    ["twill", "twill"],
    ["twill", "flannel"],
    ["flannel", "twill"],
  ])("from %s to %s", async (...kinds) => {
    const side = await createSide(backend, kinds);
    try {
      expect(await survey(side)).toEqual(expected);
      expect(await answers(side)).toEqual(expectedAnswers);
    } finally {
      await side.lab.close();
    }
  });
});

describe.each(TESTED_BACKENDS.filter((name) => name in PLAIN_BACKENDS))("%s", (backend) => {
  test("from twill to twill", async () => {
    const side = await createSide(backend, ["twill", "twill"]);
    try {
      const seen = await survey(side);
      expect(new Set(Object.values(addressesIn(seen)))).toEqual(new Set(["172.7.21.0"]));
      expect(Object.keys(addressesIn(seen))).toHaveLength(14);
      expect(Object.values(seen).filter((found) => found === true)).toHaveLength(8);
      expect(seen["stranger: error"]).toMatchObject({ type: 3, code: 3, from: "172.7.22.2" });
    } finally {
      await side.lab.close();
    }
  });
});

describe.each(["vxlan", "host-gw"] as const)("%s, to a node that lends pods no address", (backend) => {
  let side: Side;
  let expected: Record<string, unknown>;
  beforeAll(async () => {
    const flannels = await createSide(backend, ["flannel", "flannel"], [true, false]);
    try {
      expected = await answers(flannels);
    } finally {
      await flannels.lab.close();
    }
    side = await createSide(backend, ["twill", "flannel"], [false, false]);
  });
  afterAll(() => side?.lab.close());

  test("what a pod asks of the first node, or of what is behind it, is answered from there", async () => {
    const { nodes, b, other, etcd, twillds } = side;
    const [first] = nodes;
    // A connection that was there before anybody lent it an address keeps its own.
    const before = await Streams.start(other, b, 4);
    const h1 = first.host;
    await twillds.get(h1)?.stop();
    await startTwilld(h1, { etcd, flags: ["--ip-masq"] });
    await before.flow(2);
    expect(await answers(side)).toEqual(expected);
    const asked = { intact: true, seen: b.address, peer: h1.address };
    expect(expected).toMatchObject({
      "10.4.7.21: TCP": asked,
      "10.4.7.21: UDP of 900": asked,
      "10.4.7.21: UDP of 6000": asked,
      "10.4.7.21: ping": 3,
      // What a pod of another node begins through this one to the outside is lent its address.
      [`${OTHER}: UDP of 900`]: { intact: true, seen: "172.17.0.1", peer: OTHER },
    });
    const lent = backend === "host-gw" ? h1.address : "172.7.21.0";
    expect(await probe(other, `tcp ${b.address} ${TCP_PORT} 1000 1000`)).toMatchObject({ seen: lent });
    await before.flow(2);
    expect((await before.finish()).bytes).toBeGreaterThan(0);
  });
});
