/**
 * The kernel set up as flanneld does it, without any program of ours: that the lab carries flannel's traffic is
 * what every comparison with it rests on.
 */
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import {
  addForwardRules,
  addMasqueradeRules,
  addNftRules,
  pairHostGw,
  pairVxlan,
  removeVxlanPeer,
} from "../../bench/baseline.ts";
import { createLab, type Host, type Lab, type Pod } from "../lab.ts";

const network = "172.7.0.0/16";
let lab: Lab;
let hosts: [Host, Host];
let pods: [Pod, Pod];

beforeEach(async () => {
  lab = await createLab();
  const h1 = await lab.host("h1", { address: "10.4.7.21/24" });
  const h2 = await lab.host("h2", { address: "10.4.7.22/24" });
  hosts = [h1, h2];
  await h1.bridge("docker0", "172.7.21.1/24");
  await h2.bridge("docker0", "172.7.22.1/24");
  pods = [
    await h1.pod("a", "172.7.21.2/24", { mtu: 1450 }),
    await h2.pod("a", "172.7.22.2/24", { mtu: 1450 }),
  ];
  // As on a host with Docker, whose policy makes flanneld's rules necessary.
  for (const host of hosts) await host.exec(["iptables", "-P", "FORWARD", "DROP"]);
});

afterEach(() => lab.close());

const subnets = (): [Host, string][] => [
  [hosts[0], "172.7.21.0/24"],
  [hosts[1], "172.7.22.0/24"],
];

async function expectTraffic() {
  const [a, b] = pods;
  expect((await a.ping(b.address, { count: 20 })).lost).toEqual([]);
  expect((await b.ping(a.address, { count: 20 })).lost).toEqual([]);
  const fragments = await a.ping(b.address, { count: 3, size: 4000 });
  expect(fragments.lost).toEqual([]);
  const server = await b.httpServer({ program: "nginx" });
  expect(await a.httpGet(`http://${b.address}/`)).toBe("172.7.21.2\n");
  expect((await a.httpGet(`http://${b.address}/large`)).length).toBe(4 * 1024 * 1024);
  expect(server.requests.map((request) => request.source)).toEqual(["172.7.21.2", "172.7.21.2"]);
}

describe("the kernel as flanneld sets it up", () => {
  test("vxlan: ping, HTTP and fragments between pods; the device and the wire are flannel's", async () => {
    const nodes = await pairVxlan(subnets());
    expect((await pods[0].ping("172.7.22.2", { count: 1 })).received).toBe(0);
    for (const host of hosts) await addForwardRules(host, network);
    const capture = await hosts[1].capture("eth0", "udp port 8472");
    await expectTraffic();
    await capture.stop();

    const description = await hosts[0].ip("-d link show dev flannel.1");
    expect(description).toMatch(
      /mtu 1450 .*vxlan id 1 local 10\.4\.7\.21 dev eth0 srcport 0 0 dstport 8472 nolearning .*udpcsum noudp6zerocsumtx/s,
    );
    const names = ["ip.src", "ip.dst", "vxlan.vni", "eth.src", "eth.dst"] as const;
    const [ping] = await capture.fields(names, "icmp.type == 8");
    expect(ping?.["ip.src"]).toBe("10.4.7.21,172.7.21.2");
    expect(ping?.["ip.dst"]).toBe("10.4.7.22,172.7.22.2");
    expect(ping?.["vxlan.vni"]).toBe("1");
    expect(ping?.["eth.src"]?.split(",")[1]).toBe(nodes[0]?.mac);
    expect(ping?.["eth.dst"]?.split(",")[1]).toBe(nodes[1]?.mac);

    const peer = { subnet: "172.7.22.0/24", publicIp: "10.4.7.22", vtepMac: nodes[1]?.mac ?? "" };
    await removeVxlanPeer(hosts[0], peer);
    expect(await hosts[0].ip("neigh show dev flannel.1")).toBe("");
    expect((await hosts[0].exec(["bridge", "fdb", "show", "dev", "flannel.1"])).stdout).toBe("");
    expect(await hosts[0].ip("route show dev flannel.1")).toBe("");
  });

  test("host-gw: ping, HTTP and fragments between pods; nothing is encapsulated", async () => {
    await pairHostGw(subnets());
    for (const host of hosts) await addForwardRules(host, network);
    const capture = await hosts[1].capture("eth0", "udp port 8472");
    await expectTraffic();
    await capture.stop();
    expect(capture.frames()).toEqual([]);
  });

  test.each(["iptables", "nftables"])(
    "--ip-masq by %s hides pods from strangers, but not from each other",
    async (form) => {
      const stranger = await lab.host("h8", { address: "10.4.7.98/24" });
      await pairVxlan(subnets());
      for (const [host, subnet] of subnets()) {
        if (form === "iptables") {
          await addForwardRules(host, network);
          await addMasqueradeRules(host, network, subnet);
        } else {
          // What one table accepts, another may still drop.
          await host.exec(["iptables", "-P", "FORWARD", "ACCEPT"]);
          await addNftRules(host, network, subnet);
        }
      }
      const outside = await stranger.httpServer();
      expect(await pods[0].httpGet(`http://${stranger.address}/`)).toBe("10.4.7.21\n");
      expect(outside.requests).toEqual([{ source: "10.4.7.21", path: "/" }]);
      await expectTraffic();
    },
  );
});
