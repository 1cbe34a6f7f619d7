/**
 * What people do behind a pod's link, and beside the cluster's packets on the same bridge: tunnels of their own,
 * pods that route for others, several bridges, IPv6, ARP, VLAN tags, broadcast. The fast lane must carry what is
 * its own and keep its hands off the rest.
 */
import { beforeAll, describe, expect, test } from "vitest";
import { frame, ip4 } from "../bpf/packets.ts";
import { Namespace, type Pod } from "../lab.ts";
import {
  BACKENDS,
  type BackendName,
  type Cluster,
  createCluster,
  inject,
  probe,
  TCP_PORT,
  UDP_PORT,
} from "./cluster.ts";

let cluster: Cluster;

/** A namespace behind a pod, linked to it by a veth; the pod forwards. */
async function behind(pod: Pod, network: string): Promise<Namespace> {
  const inner = new Namespace(pod.lab, `${pod.name}-in`);
  await pod.lab.addNamespace(inner);
  await pod.sysctl({ "net.ipv4.ip_forward": 1 });
  await pod.ipBatch([
    `link add inside type veth peer name eth0 netns ${inner.netns}`,
    `address add ${network}.1/24 dev inside`,
    "link set inside up",
  ]);
  await inner.ipBatch([
    `address add ${network}.2/24 dev eth0`,
    "link set eth0 up",
    `route add default via ${network}.1`,
  ]);
  return inner;
}

describe.each(Object.keys(BACKENDS) as BackendName[])("%s", (backend) => {
  beforeAll(async () => {
    cluster = await createCluster({ backend, rpFilter: 1, ipv6: true });
    return () => cluster.close();
  });

  test("a VXLAN of the pods' own, through the cluster's", async () => {
    const { a, b } = cluster;
    const ends = [
      [a, b, "192.168.77.1"],
      [b, a, "192.168.77.2"],
    ] as const;
    const mtu = backend === "host-gw" ? 1450 : 1400;
    // At the standard port, and at the one that the hosts use: pods may have that too.
    for (const [id, port] of [
      [42, 4789],
      [1, 8472],
    ] as const) {
      for (const [from, to, address] of ends)
        await from.ipBatch([
          `link add inner0 mtu ${mtu} type vxlan id ${id} remote ${to.address} local ${from.address} dstport ${port}`,
          `address add ${address}/24 dev inner0`,
          "link set inner0 up",
        ]);
      expect((await a.ping("192.168.77.2", { count: 5 })).lost).toEqual([]);
      expect((await a.ping("192.168.77.2", { count: 2, size: mtu - 28, dontFragment: true })).lost).toEqual(
        [],
      );
      for (const [from, address] of [[a, "192.168.77.2"] as const, [b, "192.168.77.1"] as const]) {
        expect(await probe(from, `tcp ${address} ${TCP_PORT} 8000000 8000000`)).toMatchObject({
          intact: true,
        });
        const aggregate = `udp ${address} ${UDP_PORT} 50000 --segment ${mtu - 28}`;
        expect(await probe(from, aggregate)).toMatchObject({ intact: true });
      }
      for (const [from] of ends) await from.ip("link delete inner0");
    }
  });

  test("a pod that translates for a network behind it", async () => {
    const { c, b } = cluster;
    const inner = await behind(c, "192.168.88");
    await c.exec(["iptables", "-t", "nat", "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE"]);
    expect((await inner.ping(b.address, { count: 10 })).lost).toEqual([]);
    expect(await probe(inner, `tcp ${b.address} ${TCP_PORT} 4000000 4000000`)).toMatchObject({
      intact: true,
      seen: c.address,
    });
    expect(await probe(inner, `udp ${b.address} ${UDP_PORT} 40000 --segment 1000`)).toMatchObject({
      intact: true,
      seen: c.address,
    });
    expect(await probe(inner, `error ${b.address} 9 100`)).toMatchObject({
      type: 3,
      code: 3,
      from: b.address,
    });
  });

  test("a pod behind a pod, with an address of the subnet", async () => {
    const { a, b, h1, lab } = cluster;
    // 172.7.21.64/28 is behind a; its neighbours on the bridge and the host find it there.
    const inner = new Namespace(lab, "deep");
    await lab.addNamespace(inner);
    await a.sysctl({ "net.ipv4.ip_forward": 1 });
    await a.ipBatch([
      `link add deep type veth peer name eth0 netns ${inner.netns}`,
      "address add 172.7.21.65/28 dev deep",
      "link set deep up",
    ]);
    await inner.ipBatch([
      "address add 172.7.21.66/28 dev eth0",
      "link set eth0 up",
      "route add default via 172.7.21.65",
    ]);
    await h1.ip(`route add 172.7.21.64/28 via ${a.address}`);
    await cluster.serve(inner);
    expect((await inner.ping(b.address, { count: 10 })).lost).toEqual([]);
    const { received, output } = await b.ping("172.7.21.66", { count: 10 });
    expect(received).toBe(10);
    expect(output).toContain("ttl=61");
    expect(await probe(b, `tcp 172.7.21.66 ${TCP_PORT} 4000000 4000000`)).toEqual({
      intact: true,
      seen: b.address,
      peer: "172.7.21.66",
    });
    expect(await probe(inner, `tcp ${b.address} ${TCP_PORT} 4000000 4000000`)).toMatchObject({
      intact: true,
      seen: "172.7.21.66",
    });
    expect(await probe(inner, `error ${b.address} 9 100 --ttl 1`)).toMatchObject({ from: "172.7.21.65" });
    expect(await probe(inner, `error ${b.address} 9 100 --ttl 2`)).toMatchObject({ from: "172.7.21.1" });
  });

  test("a pod whose default route is another pod", async () => {
    const { a, b, c, h1 } = cluster;
    await a.sysctl({
      "net.ipv4.ip_forward": 1,
      "net.ipv4.conf.all.send_redirects": 0,
      "net.ipv4.conf.eth0.send_redirects": 0,
    });
    await c.ip(`route replace default via ${a.address}`);
    const capture = await a.capture("eth0", `src ${c.address} and dst ${b.address}`);
    const before = await cluster.counts(h1);
    expect((await c.ping(b.address, { count: 10 })).lost).toEqual([]);
    expect(await probe(c, `tcp ${b.address} ${TCP_PORT} 1000000 1000000`)).toMatchObject({
      intact: true,
      seen: c.address,
    });
    expect((await cluster.counts(h1)).from_pod?.unrelated).toBeGreaterThan(before.from_pod?.unrelated ?? 0);
    await capture.stop();
    // Each one came to a from c, and left it again.
    const echoes = capture.frames().filter(({ bytes }) => bytes[23] === 1);
    expect(echoes.map(({ bytes }) => bytes[22])).toEqual(Array(10).fill([64, 63]).flat());
    expect(await probe(c, `error ${b.address} 9 100 --ttl 1`)).toMatchObject({ type: 11, from: a.address });
    await c.ip("route replace default via 172.7.21.1");
  });

  test("IPv6 between pods of one bridge, and of the host with its pods", async () => {
    const { a, c, h1 } = cluster;
    await a.ip("address add fd00:7::2/64 dev eth0 nodad");
    await c.ip("address add fd00:7::3/64 dev eth0 nodad");
    await h1.ip("address add fd00:7::1/64 dev docker0 nodad");
    expect((await a.ping("fd00:7::3", { count: 10 })).lost).toEqual([]);
    expect((await a.ping("fd00:7::1", { count: 10 })).lost).toEqual([]);
    expect((await a.ping("fd00:7::3", { count: 2, size: 3000 })).lost).toEqual([]);
  });

  test("ARP goes its way", async () => {
    const { a, c, h1 } = cluster;
    for (const [from, to, device] of [
      [a, c.address, "eth0"],
      [a, "172.7.21.1", "eth0"],
      [h1, a.address, "docker0"],
    ] as const) {
      await from.ip(`neigh flush dev ${device}`);
      expect((await from.ping(to, { count: 2 })).lost).toEqual([]);
      expect(await from.ip(`neigh show ${to} dev ${device}`)).toContain("lladdr");
    }
  });

  test("frames with a VLAN tag pass the bridge as they are", async () => {
    const { a, c } = cluster;
    const capture = await c.capture("eth0", "vlan");
    const packet = ip4({ source: a.address, destination: c.address, body: { udp: [5000, UDP_PORT] } });
    const far = ip4({ source: a.address, destination: cluster.b.address, body: { udp: [5000, UDP_PORT] } });
    const tagged = (to: string, from: string, inside: Buffer) =>
      frame(to, from, Buffer.concat([Buffer.from([0, 7, 8, 0]), inside]), 0x8100);
    const frames = [
      tagged(await c.mac(), await a.mac(), packet),
      // Not for the gateway of the untagged network, whatever the addresses in it.
      tagged("ff:ff:ff:ff:ff:ff", await a.mac(), far),
    ];
    const own = tagged(await cluster.h1.mac("docker0"), await a.mac(), far);
    const seen = await cluster.b.capture("eth0", `udp port ${UDP_PORT}`);
    await inject(a, "eth0", [...frames, own]);
    expect((await a.ping(c.address, { count: 1 })).received).toBe(1);
    expect((await a.ping(cluster.b.address, { count: 1 })).received).toBe(1);
    await capture.stop();
    await seen.stop();
    expect(capture.frames().map(({ bytes }) => bytes.toString("hex"))).toEqual(
      frames.map((bytes) => bytes.toString("hex")),
    );
    expect(seen.frames()).toEqual([]);
  });

  test("broadcast and multicast do no harm", async () => {
    const { a, b, c } = cluster;
    const seen = await c.capture("eth0", "udp dst port 9999");
    const far = await b.capture("eth0", "udp dst port 9999");
    const own = await a.mac();
    const frames = [
      ["172.7.21.255", "ff:ff:ff:ff:ff:ff"],
      ["255.255.255.255", "ff:ff:ff:ff:ff:ff"],
      ["224.0.0.251", "01:00:5e:00:00:fb"],
      ["239.1.2.3", "01:00:5e:01:02:03"],
      // The other node's broadcast address, which only routers send on, and they do not.
      ["172.7.22.255", "ff:ff:ff:ff:ff:ff"],
    ].map(([destination = "", to = ""]) =>
      frame(to, own, ip4({ source: a.address, destination, body: { udp: [9999, 9999] } })),
    );
    const ping = await a.startPing(b.address);
    await inject(a, "eth0", frames);
    await ping.replies(3);
    expect((await ping.stop()).lost).toEqual([]);
    expect((await a.ping(c.address, { count: 1 })).received).toBe(1);
    await seen.stop();
    await far.stop();
    expect(seen.frames()).toHaveLength(frames.length);
    expect(far.frames()).toEqual([]);
    expect((await a.ping("172.7.21.255", { count: 1, arguments: ["-b"] })).sent).toBe(1);
  });
});

describe.each(["vxlan", "host-gw"] as const)("%s, several bridges", (backend) => {
  beforeAll(async () => {
    cluster = await createCluster({ backend, rpFilter: 1 });
    return () => cluster.close();
  });

  test("pods of each reach all others, and those of another network are left alone", async () => {
    const { h1, a, b } = cluster;
    // Half of the subnet is on another bridge; a third bridge has nothing to do with the cluster.
    const mtu = backend === "host-gw" ? 1500 : 1450;
    const second = await h1.bridge("br1", "172.7.21.129/25", { mtu });
    const third = await h1.bridge("br2", "192.168.99.1/24");
    const x = await h1.pod("x", "172.7.21.130/25", { bridge: second, mtu });
    const y = await h1.pod("y", "192.168.99.2/24", { bridge: third });
    const p = await h1.pointToPointPod("p", "172.7.21.100", { style: "calico", mtu });
    await Promise.all([x, y, p].map((pod) => cluster.serve(pod)));
    await cluster.settle([x, p]);
    const own = (from: Pod, to: Pod) => ({ intact: true, seen: from.address, peer: to.address });
    const pairs = [
      [x, b],
      [b, x],
      [p, b],
      [b, p],
      [x, p],
      [p, x],
    ] as const;
    for (const [from, to] of pairs) {
      expect((await from.ping(to.address, { count: 5 })).lost).toEqual([]);
      expect(await probe(from, `tcp ${to.address} ${TCP_PORT} 2000000 2000000`)).toEqual(own(from, to));
      expect(await probe(from, `udp ${to.address} ${UDP_PORT} 40000 --segment 1000`)).toMatchObject(
        own(from, to),
      );
    }
    // By a's own routes p is on its bridge, where it is not; the host forwards for y as for anybody.
    expect((await a.ping(p.address, { count: 3 })).received).toBe(0);
    expect((await y.ping(x.address, { count: 5 })).lost).toEqual([]);
    expect((await y.ping("192.168.99.1", { count: 2 })).lost).toEqual([]);
  });
});
