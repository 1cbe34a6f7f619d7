/**
 * From a pod to a host outside, which sees the node's address: Twill with --ip-masq beside flanneld's rules, in both
 * of its forms, with few and many live connections, and with the rules of a kube-proxy in place.
 *
 * The live connections are UDP, answered once, with timeouts that outlast the benchmark. That there are as many as a
 * row's name says is counted before and after the loads.
 */
import { join } from "node:path";
import { openPinnedMap } from "../loader/map.ts";
import { iptablesRules, nftRules, type Service } from "../test/kubeproxy.ts";
import type { Host, Namespace } from "../test/lab.ts";
import type { Twilld } from "../test/twilld.ts";
import { addForwardRules, addMasqueradeRules, addNftRules } from "./baseline.ts";
import { hostToHost, network, type Path, type Row, type Suite, startTwillds, subnets } from "./suite.ts";
import { connections, load, udpPackets } from "./workloads.ts";

const [subnet] = subnets;
/** Answers on ports from here on make the live connections; to no port of the loads. */
const ANSWER_PORT = 20000;
/** Connections towards each of those ports; far from what one remote end can have. */
const EACH = 1000;

type Form = "iptables" | "nftables";

interface Setting {
  readonly name: string;
  /** Connections that live all the time. */
  readonly live: number;
  /** Form of a kube-proxy's rules that are in place. */
  readonly services?: Form;
}

const few: Setting = { name: "10 live", live: 10 };
const many: Setting = { name: "100,000 live", live: 100_000 };

const settings: readonly Setting[] = [few, { name: "1,000 live", live: 1000 }, many];
const crowded = (form: Form): Setting => ({
  name: `10 live, 5,000 ${form} rules of kube-proxy`,
  live: 10,
  services: form,
});

const flannel = (form: Form, { name }: Setting): string => `flannel's ${form} (${name})`;
const twill = ({ name }: Setting): string => `Twill (${name})`;

const rows: readonly Row[] = [
  ...settings.flatMap((setting) => [
    flannelRow("iptables", setting),
    flannelRow("nftables", setting),
    twillRow(setting, [
      flannel("iptables", setting),
      flannel("nftables", setting),
      ...(setting === few ? [] : [twill(few)]),
    ]),
  ]),
  ...(["iptables", "nftables"] as const).flatMap((form) => [
    flannelRow(form, crowded(form)),
    twillRow(crowded(form), [flannel(form, crowded(form)), twill(few)]),
  ]),
  hostToHost(flannel("iptables", few), flannel("iptables", crowded("iptables"))),
];

export const masquerade: Suite = {
  name: "masquerade",
  rows,
  workloads: [udpPackets, connections],
  kernel:
    "flanneld's masquerade and FORWARD rules, as iptables (over nf_tables) or as nftables; bridge netfilter as the kernel has it",
};

function flannelRow(form: Form, setting: Setting): Row {
  return {
    name: flannel(form, setting),
    against: [],
    async build(_, hosts) {
      const [host] = hosts;
      await prepare(host, setting);
      if (form === "iptables") {
        await addMasqueradeRules(host, network, subnet);
        await addForwardRules(host, network);
      } else {
        await addNftRules(host, network, subnet);
      }
      const path = await populate(hosts, setting);
      const count = async () =>
        Number((await host.exec(["cat", "/proc/sys/net/netfilter/nf_conntrack_count"])).stdout);
      return { ...path, check: () => expectLive(count, setting.live) };
    },
  };
}

function twillRow(setting: Setting, against: readonly string[]): Row {
  return {
    name: twill(setting),
    against,
    async build(lab, hosts) {
      const [host] = hosts;
      await prepare(host, setting);
      const flags = ["--ip-masq"];
      const [twilld] = await startTwillds(lab, [[host, subnet]], { Type: "host-gw" }, flags);
      if (twilld === undefined) throw new Error("twilld did not start");
      const path = await populate(hosts, setting);
      await twilld.statusWhere("one pod", ({ endpoints }) => endpoints === 1);
      const before = passed(twilld);
      const check = async () => {
        const firewall = twilld.status?.firewall;
        if (firewall?.needsStack !== false)
          throw new Error(`the rules keep pods on the stack: ${firewall?.reasons.join("; ")}`);
        await expectLive(() => rowsOf(twilld), setting.live);
        const now = passed(twilld);
        const share = (direction: "out" | "back") => {
          const fast = now[direction].fast - before[direction].fast;
          const all = fast + now[direction].stack - before[direction].stack;
          return `${((100 * fast) / Math.max(1, all)).toFixed(2)} % ${direction}`;
        };
        return `past the stack went ${share("out")}, ${share("back")}`;
      };
      return { ...path, check };
    },
  };
}

/** The timeouts of connections, and the rules that are there already when flanneld or twilld starts. */
async function prepare(host: Host, setting: Setting): Promise<void> {
  await host.sysctl({
    "net.netfilter.nf_conntrack_udp_timeout": 86400,
    "net.netfilter.nf_conntrack_udp_timeout_stream": 86400,
  });
  if (setting.services === "iptables") {
    const input = iptablesRules(services(), network);
    await host.exec(["iptables-restore", "--noflush"], { input, timeout: 120_000 });
  } else if (setting.services === "nftables") {
    await host.exec(["nft", "-f", "-"], { input: nftRules(services(), network), timeout: 120_000 });
  }
}

/**
 * As many services as give 5,000 rules in the iptables form: 5 for one with a pod, and 1, which refuses, for each
 * tenth, which has none.
 */
function services(): Service[] {
  return Array.from({ length: 1087 }, (_, index) => ({
    name: `S${index}`,
    protocol: index % 2 === 0 ? "tcp" : "udp",
    clusterIp: `10.96.${index >> 8}.${index & 255}`,
    port: 80,
    endpoints:
      index % 10 === 9 ? [] : [{ address: `172.7.22.${2 + (index % 250)}`, port: 8080, local: false }],
  }));
}

/** The pod behind a bridge of the first host, and the connections that live. */
async function populate([node, outside]: [Host, Host], { live }: Setting): Promise<Path> {
  await node.bridge("docker0", "172.7.21.1/24", { mtu: 1500 });
  const pod = await node.pod("a", "172.7.21.2/24", { mtu: 1500 });
  await open(pod, outside, live);
  return { from: pod, to: outside, address: outside.address };
}

async function open(pod: Namespace, outside: Host, live: number): Promise<void> {
  const ports = String(Math.ceil(live / EACH));
  const flows = [outside.address, String(ANSWER_PORT), "60", ports];
  const answering = outside.spawn([load, "answer", ...flows]);
  await answering.line(/ready/);
  await pod.exec([load, "open", ...flows, String(live)], { timeout: 60_000 });
  await answering.stop();
}

async function expectLive(count: () => Promise<number>, live: number): Promise<undefined> {
  const found = await count();
  if (found < live) throw new Error(`${live} connections should live, but only ${found} do`);
}

async function rowsOf(twilld: Twilld): Promise<number> {
  const map = openPinnedMap(join(twilld.pinPath, "connections4"));
  try {
    let count = 0;
    for (const batch of map.batches()) count += batch.length;
    return count;
  } finally {
    map.close();
  }
}

/** Packets to and from the outside: past the stack, and by it. */
function passed(twilld: Twilld) {
  const { from_pod, to_net, from_net } = twilld.counters();
  return {
    out: { fast: Number(from_pod.repeated.packets), stack: Number(to_net.masqueraded.packets) },
    back: { fast: Number(from_net.delivered.packets), stack: Number(from_net.masqueraded.packets) },
  };
}
