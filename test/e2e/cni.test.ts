/**
 * Beside CNI: pods that Debian's plugins make, called as a container runtime calls them, from the list in deploy/ and
 * the subnet file that twilld wrote. Debian has all of them but `flannel`, which only reads that file and hands on to
 * `bridge`; `delegated` does the same.
 *
 * The subnet file also says who masquerades. On the first host, with --ip-masq, it is twilld, and `bridge` adds no rule;
 * on the second each pod has a rule of `bridge` whose counter says how many flows it changed. That rule would change
 * those to pods of other hosts too.
 */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, expect, it } from "vitest";
import { contains, formatCidr, networkOf, type Prefix, parseCidr, parseIpv4 } from "../../src/core/ipv4.ts";
import { createLab, type Host, type HttpServer, type Lab, Namespace, repository } from "../lab.ts";
import { startTwilld, type Twilld } from "../twilld.ts";

const PLUGINS = "/usr/lib/cni";

interface Plugin {
  readonly type: string;
  readonly capabilities?: { readonly portMappings?: boolean };
  readonly delegate?: object;
}

interface PortMapping {
  readonly hostPort: number;
  readonly containerPort: number;
  readonly protocol: "tcp" | "udp";
}

/** What a plugin answers to ADD. */
interface Result {
  readonly ips: readonly { readonly address: string }[];
}

const list = JSON.parse(readFileSync(join(repository, "deploy/10-twill.conflist"), "utf8")) as {
  readonly name: string;
  readonly cniVersion: string;
  readonly plugins: readonly Plugin[];
};

function prefixOf(cidr: string | undefined): Prefix {
  const prefix = parseCidr(cidr ?? "");
  if (prefix === undefined) throw new Error(`${cidr} is no address with a prefix length`);
  return { address: networkOf(prefix.address, prefix.length), length: prefix.length };
}

/** Where the addresses given on a host are noted; by default all hosts of the lab would share one directory. */
const notesOf = (host: Host): string => join(host.directory, "cni");

/** The pods' subnet of a host. */
const subnetOf = (twilld: Twilld): Prefix => prefixOf(twilld.subnetEnv.FLANNEL_SUBNET);

/** What `flannel` hands on: the list's own fields and those that follow from the subnet file. */
function delegated({ delegate }: Plugin, twilld: Twilld): Plugin {
  const { FLANNEL_NETWORK, FLANNEL_MTU, FLANNEL_IPMASQ } = twilld.subnetEnv;
  const ranges = [[{ subnet: formatCidr(subnetOf(twilld)) }]];
  const routes = [{ dst: FLANNEL_NETWORK }];
  const fields = {
    type: "bridge",
    ipMasq: FLANNEL_IPMASQ !== "true",
    mtu: Number(FLANNEL_MTU),
    ...delegate,
    isGateway: true,
    ipam: { type: "host-local", dataDir: notesOf(twilld.host), ranges, routes },
  };
  return fields;
}

/** A pod that the plugins made. */
class CniPod extends Namespace {
  readonly #host: Host;
  readonly #configs: readonly Plugin[];
  /** Without the prefix length. */
  address = "";

  private constructor(twilld: Twilld, name: string, ports: readonly PortMapping[]) {
    super(twilld.host.lab, `${twilld.host.name}-${name}`);
    this.#host = twilld.host;
    this.#configs = list.plugins.map((plugin) => ({
      ...(plugin.type === "flannel" ? delegated(plugin, twilld) : plugin),
      ...(plugin.capabilities?.portMappings === true ? { runtimeConfig: { portMappings: ports } } : {}),
      name: list.name,
      cniVersion: list.cniVersion,
    }));
  }

  static async add(twilld: Twilld, name: string, ports: readonly PortMapping[] = []): Promise<CniPod> {
    const pod = new CniPod(twilld, name, ports);
    await pod.lab.addNamespace(pod);
    let prevResult: Result | undefined;
    for (const config of pod.#configs)
      prevResult = JSON.parse(await pod.#call("ADD", config, prevResult)) as Result;
    pod.address = prevResult?.ips[0]?.address.replace(/\/24$/, "") ?? "";
    return pod;
  }

  /** Has the plugins take away what they made, and only then the namespace. */
  async delete(): Promise<void> {
    for (const config of [...this.#configs].reverse()) await this.#call("DEL", config);
    expect(await this.ipJson("link show type veth")).toEqual([]);
    await this.lab.removeNamespace(this);
  }

  async #call(command: "ADD" | "DEL", config: Plugin, prevResult?: Result): Promise<string> {
    const env = {
      CNI_COMMAND: command,
      CNI_CONTAINERID: this.netns,
      CNI_NETNS: this.path,
      CNI_IFNAME: "eth0",
      CNI_PATH: PLUGINS,
    };
    const { stdout } = await this.#host.exec([join(PLUGINS, config.type)], {
      env,
      input: JSON.stringify({ ...config, prevResult }),
    });
    return stdout;
  }
}

/** Connections that the pods' own rules on a host masqueraded; undefined if there is no such rule. */
async function masqueraded(host: Host): Promise<number | undefined> {
  const { stdout } = await host.exec(["iptables-save", "-c", "-t", "nat"]);
  const rules = [...stdout.matchAll(/^\[(\d+):\d+\] -A CNI-[0-9a-f]+ .*-j MASQUERADE$/gm)];
  return rules.length === 0 ? undefined : rules.reduce((sum, [, packets]) => sum + Number(packets), 0);
}

let lab: Lab;
let outside: Host;
let first: Twilld;
let second: Twilld;
/** On the first host, where twilld masquerades. */
let a: CniPod;
/** On the second, where rules of `bridge` do. */
let b: CniPod;
const published: CniPod[] = [];
const servers: HttpServer[] = [];

async function serve(pod: CniPod): Promise<void> {
  servers.push(await pod.httpServer());
}

beforeAll(async () => {
  lab = await createLab();
  const etcd = await lab.etcd({ addresses: ["10.4.7.11/24"] });
  const config = { Network: "172.7.0.0/16", Backend: { Type: "vxlan" } };
  await etcd.put("/coreos.com/network/config", JSON.stringify(config));
  const h1 = await lab.host("h1", { address: "10.4.7.21/24" });
  const h2 = await lab.host("h2", { address: "10.4.7.22/24" });
  outside = await lab.host("out", { address: "10.4.7.66/24" });
  await outside.httpServer();
  [first, second] = await Promise.all([
    startTwilld(h1, { etcd, flags: ["--ip-masq"] }),
    startTwilld(h2, { etcd }),
  ]);
});
afterAll(() => lab?.close());

it("gives pods what the subnet file says, and takes their packets to each other as they are", async () => {
  a = await CniPod.add(first, "a");
  await serve(a);
  b = await CniPod.add(second, "b");
  // The first packet of all on its host, whose bridge was not there before the pod.
  expect(await b.httpGet(`http://${a.address}/`)).toBe(`${b.address}\n`);
  await serve(b);
  expect(await a.httpGet(`http://${b.address}/`)).toBe(`${a.address}\n`);
  expect(await a.httpGet(`http://${b.address}/large`)).toHaveLength(4 << 20);
  for (const [twilld, pod] of [
    [first, a],
    [second, b],
  ] as const) {
    expect(contains(subnetOf(twilld), parseIpv4(pod.address) ?? 0)).toBe(true);
    expect(await pod.ipJson("link show dev eth0")).toMatchObject([{ mtu: 1450 }]);
    const status = await twilld.statusWhere("the pod is known", ({ endpoints }) => endpoints === 1);
    expect(status.firewall).toMatchObject({ needsStack: false });
    const before = twilld.packets("from_pod", "encapsulated");
    expect((await pod.ping((pod === a ? b : a).address, { count: 10 })).lost).toEqual([]);
    expect(twilld.packets("from_pod", "encapsulated") - before).toBeGreaterThanOrEqual(10);
  }
  expect(await masqueraded(first.host)).toBeUndefined();
  expect(await masqueraded(second.host)).toBe(0);
});

it("lends pods the node's address for the outside", async () => {
  for (const [pod, { host }] of [
    [a, first],
    [b, second],
  ] as const) {
    expect(await pod.httpGet(`http://${outside.address}/`)).toBe(`${host.address}\n`);
    expect((await pod.ping(outside.address, { count: 3 })).lost).toEqual([]);
  }
  const { stdout } = await first.host.exec(["iptables-save"]);
  expect(stdout).not.toContain("MASQUERADE");
  // The request, and the echoes as one flow.
  expect(await masqueraded(second.host)).toBe(2);
});

it("reaches ports that portmap publishes, and their pods beside", async () => {
  for (const [twilld, neighbour, remote] of [
    [first, a, b],
    [second, b, a],
  ] as const) {
    const pod = await CniPod.add(twilld, "p", [{ hostPort: 8080, containerPort: 80, protocol: "tcp" }]);
    published.push(pod);
    await serve(pod);
    const url = `http://${twilld.host.address}:8080/`;
    // A node's address is outside the network.
    const node = (twilld === first ? second : first).host;
    expect(await remote.httpGet(url)).toBe(`${node.address}\n`);
    expect(await outside.httpGet(url)).toBe(`${outside.address}\n`);
    expect(await neighbour.httpGet(url)).toMatch(/^\d/);
    expect(await remote.httpGet(`http://${pod.address}/`)).toBe(`${remote.address}\n`);
  }
});

it("keeps nothing of pods that were deleted", async () => {
  for (const server of servers) await server.stop();
  const pods = [a, b, ...published];
  for (const pod of pods) await pod.delete();
  for (const twilld of [first, second]) {
    const { host } = twilld;
    await twilld.statusWhere("no pod is left", ({ endpoints }) => endpoints === 0);
    expect(await host.ipJson("link show master cni0")).toEqual([]);
    const { stdout } = await host.exec(["iptables-save"]);
    for (const pod of pods) expect(stdout).not.toContain(pod.netns);
    const noted = readdirSync(join(notesOf(host), list.name));
    expect(noted.filter((name) => parseIpv4(name) !== undefined)).toEqual([]);
  }
});
