/**
 * Packets of every shape between pods of two hosts. What must come of each is written down once and expected
 * twice: with the fast lane, and with `--fast-path=off`, where the kernel alone decides; so an expectation that
 * is not the kernel's own behaviour fails too.
 */
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { frame, ip4 } from "../bpf/packets.ts";
import type { Host, Namespace, Pod } from "../lab.ts";
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

const backends = Object.keys(BACKENDS) as BackendName[];
let cluster: Cluster;
afterAll(async () => cluster?.close());

/** Sends a few pings; how many came back, and what TTL was left of them. */
async function pings(from: Namespace, to: Pod, size: number, dontFragment: boolean, more: string[] = []) {
  const options = { count: 3, size, dontFragment, arguments: more };
  const { received, output } = await from.ping(to.address, options);
  return { received, ttl: [...new Set([...output.matchAll(/ttl=(\d+)/g)].map((match) => Number(match[1])))] };
}
const answered = { received: 3, ttl: [62] };

/** The fragments of a UDP datagram for the server, in frames that the pod could have sent. */
async function fragments(from: Pod, to: Pod, size: number, piece: number, id: number): Promise<Buffer[]> {
  const datagram = ip4({
    source: from.address,
    destination: to.address,
    body: { udp: [5000, UDP_PORT], data: Buffer.alloc(size, 0x5a) },
  }).subarray(20);
  const [gateway, own] = await Promise.all([from.host.mac("docker0"), from.mac()]);
  const pieces: Buffer[] = [];
  for (let at = 0; at < datagram.length; at += piece) {
    const packet = ip4({
      source: from.address,
      destination: to.address,
      id,
      moreFragments: at + piece < datagram.length,
      fragmentOffset: at / 8,
      body: { protocol: 17, data: datagram.subarray(at, at + piece) },
    });
    pieces.push(frame(gateway, own, packet));
  }
  return pieces;
}

/** Forgets the path MTUs that the pods were told. */
async function forgetPaths() {
  for (const pod of cluster.pods) await pod.ip("route flush cache");
}

async function rpFilters(host: Host): Promise<Set<string>> {
  const { stdout } = await host.exec(["sh", "-c", "cat /proc/sys/net/ipv4/conf/*/rp_filter"]);
  return new Set(stdout.trim().split("\n"));
}

/** How often the fast lane took a packet on its way out of, or in to, a pod of this host. */
async function taken(host: Host): Promise<{ out: number; in: number }> {
  const { from_pod, from_net, from_overlay } = await cluster.counts(host);
  const sum = (...values: (number | undefined)[]) =>
    values.reduce<number>((total, value) => total + (value ?? 0), 0);
  return {
    out: sum(from_pod?.encapsulated, from_pod?.routed),
    in: sum(from_net?.decapsulated, from_net?.delivered, from_overlay?.delivered),
  };
}

const run = (from: Pod, command: string) => probe(from, command);
const FAST_PATHS = ["auto", "off"] as const;

describe.each(backends)("%s, rp_filter=1 everywhere, pods with the MTU of subnet.env", (backend) => {
  const mtu = backend === "host-gw" ? 1500 : 1450;
  beforeAll(async () => {
    cluster = await createCluster({ backend, rpFilter: 1 });
    return () => cluster.close();
  });

  describe.each(FAST_PATHS)("--fast-path=%s", (fastPath) => {
    let a: Pod;
    let b: Pod;
    beforeAll(async () => {
      if (fastPath === "off") await cluster.restart(["--fast-path=off"]);
      ({ a, b } = cluster);
    });
    const arrived = (from: Pod, to: Pod) => ({ intact: true, seen: from.address, peer: to.address });

    test("rp_filter is 1 on all interfaces", async () => {
      for (const host of cluster.hosts) expect(await rpFilters(host)).toEqual(new Set(["1"]));
    });

    test("TCP in large aggregates, both directions", async () => {
      const before = await taken(cluster.h1);
      expect(await run(a, `tcp ${b.address} ${TCP_PORT} 16000000 16000000`)).toEqual(arrived(a, b));
      expect(await run(b, `tcp ${a.address} ${TCP_PORT} 16000000 16000000`)).toEqual(arrived(b, a));
      const after = await taken(cluster.h1);
      // What the whole file rests on: one of the two runs took the fast lane, and the other did not.
      expect([after.out > before.out, after.in > before.in]).toEqual(Array(2).fill(fastPath === "auto"));
    });

    test.each([100, 536, mtu - 53, mtu - 52, mtu - 51, mtu - 40])("TCP with an MSS of %d", async (mss) => {
      expect(await run(a, `tcp ${b.address} ${TCP_PORT} 300000 300000 --mss ${mss}`)).toEqual(arrived(a, b));
    });

    test.each([1, 200, mtu - 28 - 50, mtu - 28])(
      "UDP aggregates (UDP_SEGMENT) of %d bytes",
      async (segment) => {
        const size = Math.min(60_000, segment * 64);
        const command = (to: Pod) => `udp ${to.address} ${UDP_PORT} ${size} --segment ${segment} --count 3`;
        expect(await run(a, command(b))).toMatchObject(arrived(a, b));
        expect(await run(b, command(a))).toMatchObject(arrived(b, a));
      },
    );

    test.each([-50, -1, 0])("IP packets of the MTU %d bytes arrive, also with DF", async (difference) => {
      const size = mtu - 28 + difference;
      expect(await pings(a, b, size, true)).toEqual(answered);
      expect(await pings(a, b, size, false)).toEqual(answered);
      const datagram = `udp ${b.address} ${UDP_PORT} ${size} --pmtu do`;
      expect(await run(a, datagram)).toMatchObject(arrived(a, b));
    });

    test.each([1, 2, 50, 20_000 - 1422])(
      "what exceeds the MTU by %d is fragmented and arrives",
      async (more) => {
        const size = mtu - 28 + more;
        expect(await pings(a, b, size, false)).toEqual(answered);
        expect(await run(a, `udp ${b.address} ${UDP_PORT} ${size} --count 3`)).toMatchObject(arrived(a, b));
        expect(await run(b, `udp ${a.address} ${UDP_PORT} ${size}`)).toMatchObject(arrived(b, a));
      },
    );

    test("fragments in order, backwards, doubled and overtaken arrive as one", async () => {
      const server = cluster.server(b);
      const orders: ((pieces: Buffer[]) => (Buffer | undefined)[])[] = [
        (pieces) => pieces,
        (pieces) => [...pieces].reverse(),
        (pieces) => pieces.flatMap((piece) => [piece, piece]).slice(0, -1),
        ([first, ...others]) => [...others, first],
      ];
      for (const [index, order] of orders.entries()) {
        const after = server.lines.length;
        const size = 4000 + index;
        const pieces = order(await fragments(a, b, size, 800, (fastPath === "off" ? 100 : 0) + index));
        await inject(
          a,
          "eth0",
          pieces.filter((piece) => piece !== undefined),
        );
        await server.line(new RegExp(`^udp ${a.address} ${size}$`), { after });
      }
    });

    test("IP options arrive: the recorded route is the kernel's", async () => {
      const { received, output } = await a.ping(b.address, { count: 2, arguments: ["-R"] });
      expect(received).toBe(2);
      const route = output
        .split("\n")
        .flatMap((line) => /^(?:RR:)?\s+(\d+\.\d+\.\d+\.\d+)$/.exec(line)?.[1] ?? []);
      const inside = (number: number) => (backend === "vxlan" ? `172.7.${number}.0` : `10.4.7.${number}`);
      expect(route).toEqual([
        a.address,
        inside(21),
        "172.7.22.1",
        b.address,
        b.address,
        inside(22),
        "172.7.21.1",
        a.address,
      ]);
      expect((await a.ping(b.address, { count: 2, arguments: ["-T", "tsonly"] })).received).toBe(2);
    });

    test("the hop limit ends where it does in the kernel, and ICMP says so", async () => {
      const far = backend === "vxlan" ? "172.7.22.0" : "10.4.7.22";
      const command = (ttl: number) => `error ${b.address} 9 100 --ttl ${ttl}`;
      expect(await run(a, command(1))).toMatchObject({ type: 11, code: 0, from: "172.7.21.1" });
      expect(await run(a, command(2))).toMatchObject({ type: 11, code: 0, from: far });
      expect(await run(a, command(3))).toMatchObject({ type: 3, code: 3, from: b.address });
    });

    test("between pods of one host too, where the bridge alone switches", async () => {
      const { c } = cluster;
      expect(await pings(a, c, 56, false)).toEqual({ received: 3, ttl: [64] });
      expect(await run(a, `tcp ${c.address} ${TCP_PORT} 1000000 1000000`)).toEqual(arrived(a, c));
      expect(await run(a, `error ${c.address} 9 100`)).toMatchObject({ type: 3, from: c.address });
    });

    test("ICMP errors come back: port, host", async () => {
      expect(await run(a, `error ${b.address} 9 100`)).toMatchObject({ type: 3, code: 3, from: b.address });
      expect(await run(b, `error ${a.address} 9 1000`)).toMatchObject({ type: 3, code: 3, from: a.address });
      await cluster.h2.sysctl({ "net.ipv4.neigh.docker0.retrans_time_ms": 30 });
      expect(await run(a, "error 172.7.22.99 9 100")).toMatchObject({ type: 3, code: 1 });
    });

    test("the first packet arrives though nobody knows the next hop's MAC yet", async () => {
      const { h1, h2 } = cluster;
      for (const [from, size] of [
        [a, 56] as const,
        [h1, 56] as const,
        [a, 5000] as const,
        [h1, 5000] as const,
      ]) {
        for (const host of [h1, h2]) await host.ip("neigh flush dev eth0");
        expect((await from.ping(b.address, { count: 3, size, dontFragment: false })).lost).toEqual([]);
      }
    });

    test("marks of congestion and of service arrive", async () => {
      const capture = await b.capture("eth0", "icmp[icmptype] == icmp-echo");
      const tos = [0x00, 0x01, 0x02, 0x03, 0xb8, 0xba];
      for (const value of tos) await a.ping(b.address, { count: 1, arguments: ["-Q", String(value)] });
      await capture.stop();
      expect(capture.frames().map(({ bytes }) => bytes[15])).toEqual(tos);
      expect(new Set(capture.frames().map(({ bytes }) => bytes[22]))).toEqual(new Set([62]));
    });

    test("to the pods' hosts, and from a host to the other's pods", async () => {
      const { h1, h2 } = cluster;
      // A pod's packet for the other host's own address goes there without the tunnel, and rp_filter expects it by
      // the tunnel.
      const others = backend === "vxlan" ? [] : [h2.address];
      for (const address of ["172.7.21.1", "172.7.22.1", h1.address, ...others])
        expect((await a.ping(address, { count: 2 })).received).toBe(2);
      const seen = backend === "vxlan" ? "172.7.21.0" : h1.address;
      const finding = await probe(h1, `tcp ${b.address} ${TCP_PORT} 1000000 1000000`);
      expect(finding).toEqual({ intact: true, seen, peer: b.address });
      expect(await probe(h1, `udp ${b.address} ${UDP_PORT} 5000`)).toMatchObject({ seen });
    });

    test("none of this was taken for a flow that the stack translates", async () => {
      for (const host of cluster.hosts) expect(await cluster.heldFlows(host)).toBe(0);
    });
  });
});

describe.each(["vxlan", "host-gw"] as const)("%s, links of unlike size on the way", (backend) => {
  // The way between the hosts takes less than the pods believe: the tunnel's 50 bytes, or a smaller uplink.
  const mtu = 1450;
  beforeAll(async () => {
    cluster = await createCluster({ backend, podMtu: 1500 });
    if (backend === "host-gw") {
      for (const host of cluster.hosts) await host.ip(`link set eth0 mtu ${mtu}`);
      await cluster.restart();
    }
    return () => cluster.close();
  });

  describe.each(FAST_PATHS)("--fast-path=%s", (fastPath) => {
    let a: Pod;
    let b: Pod;
    beforeAll(async () => {
      if (fastPath === "off") await cluster.restart(["--fast-path=off"]);
      ({ a, b } = cluster);
    });
    const needed = { type: 3, code: 4, mtu, from: "172.7.21.1" };

    test.each([1, 2, 25, 50])(
      "what exceeds the way by %d is answered with its MTU if it has DF",
      async (more) => {
        await forgetPaths();
        const size = mtu - 28 + more;
        expect(await run(a, `error ${b.address} ${UDP_PORT} ${size} --pmtu do`)).toMatchObject(needed);
        await forgetPaths();
        const { received, output } = await a.ping(b.address, { count: 1, size, dontFragment: true });
        expect(received).toBe(0);
        expect(output).toContain(`From 172.7.21.1 icmp_seq=1 Frag needed and DF set (mtu = ${mtu})`);
      },
    );

    test.each([1, 2, 25, 50])(
      "what exceeds the way by %d is fragmented and arrives without DF",
      async (more) => {
        await forgetPaths();
        const size = mtu - 28 + more;
        expect(await pings(a, b, size, false)).toEqual(answered);
        expect(await run(a, `udp ${b.address} ${UDP_PORT} ${size}`)).toMatchObject({
          intact: true,
          tries: 1,
        });
        await forgetPaths();
        const aggregate = `udp ${b.address} ${UDP_PORT} ${size * 20} --segment ${size}`;
        expect(await run(a, aggregate)).toMatchObject({ intact: true, tries: 1 });
      },
    );

    test.each([-50, -1, 0])("what is %d bytes from the MTU of the way arrives with DF", async (less) => {
      await forgetPaths();
      const size = mtu - 28 + less;
      expect(await pings(a, b, size, true)).toEqual(answered);
      expect(await run(a, `udp ${b.address} ${UDP_PORT} ${size} --pmtu do`)).toMatchObject({ tries: 1 });
    });

    test("TCP and UDP find the MTU of the way", async () => {
      await forgetPaths();
      expect(await run(a, `tcp ${b.address} ${TCP_PORT} 4000000 4000000`)).toMatchObject({ intact: true });
      expect(await a.ip(`route get ${b.address}`)).toContain(`mtu ${mtu}`);
      await forgetPaths();
      const datagram = `udp ${b.address} ${UDP_PORT} ${mtu - 27} --count 3 --pmtu want --retry`;
      expect(await run(a, datagram)).toMatchObject({ intact: true });
    });

    test.each([mtu - 53, mtu - 52, mtu - 51, mtu - 40, mtu - 2])("TCP with an MSS of %d", async (mss) => {
      await forgetPaths();
      const command = `tcp ${b.address} ${TCP_PORT} 300000 300000 --mss ${mss}`;
      expect(await run(a, command)).toMatchObject({ intact: true });
    });

    test("none of this was taken for a flow that the stack translates", async () => {
      for (const host of cluster.hosts) expect(await cluster.heldFlows(host)).toBe(0);
    });
  });
});

describe("a pod whose link is smaller than the others'", () => {
  beforeAll(async () => {
    cluster = await createCluster();
    return () => cluster.close();
  });

  test.each(FAST_PATHS)("hears of no packet that is too large for it, --fast-path=%s", async (fastPath) => {
    if (fastPath === "off") await cluster.restart(["--fast-path=off"]);
    const { a, b, h2 } = cluster;
    // The bridge takes the size of its smallest port.
    await b.ip("link set eth0 mtu 1300");
    await h2.ip(`link set ${b.port} mtu 1300`);
    await h2.ip("link set docker0 mtu 1300");
    await cluster.restart(fastPath === "off" ? ["--fast-path=off"] : []);
    await forgetPaths();
    const error = await run(a, `error ${b.address} ${UDP_PORT} 1400 --pmtu do`);
    expect(error).toMatchObject({ type: 3, code: 4, mtu: 1300, from: "172.7.22.0" });
    await forgetPaths();
    expect(await pings(a, b, 1272, true)).toEqual(answered);
    expect(await pings(a, b, 1273, false)).toEqual(answered);
    expect(await run(a, `tcp ${b.address} ${TCP_PORT} 2000000 2000000`)).toMatchObject({ intact: true });
    await forgetPaths();
    expect(await run(a, `udp ${b.address} ${UDP_PORT} 28000 --segment 1400`)).toMatchObject({ intact: true });
    await forgetPaths();
  });
});

describe.each(backends)("%s, offloads", (backend) => {
  beforeAll(async () => {
    cluster = await createCluster({ backend });
    return () => cluster.close();
  });

  test.each([
    ["off on the uplinks", { uplinks: false }],
    ["off on the uplinks and in the pods", { uplinks: false, pods: false }],
    ["off in the pods", { uplinks: true, pods: false }],
    ["all on, UDP aggregated on arrival", { uplinks: true, pods: true, udp: true }],
  ] as const)("%s: data and checksums are right", async (_, setting) => {
    const { a, b, hosts, pods } = cluster;
    const inPods = !("pods" in setting && !setting.pods);
    const aggregate = "udp" in setting ? "on" : "off";
    for (const host of hosts) {
      await host.offloads(setting.uplinks);
      await host.exec(["ethtool", "-K", "eth0", "rx-udp-gro-forwarding", aggregate]);
      // What is aggregated on arrival has no checksum of its own to be judged.
      if (backend !== "host-gw") await host.exec(["ethtool", "-K", "flannel.1", "gro", aggregate]);
    }
    for (const pod of pods) {
      await pod.host.offloads(inPods, pod.port);
      await pod.offloads(inPods);
      await pod.exec(["ethtool", "-K", "eth0", "gro", aggregate]);
    }

    // A checksum that a device would still have to fill in cannot be judged: only where all of them are in place.
    const judged = !setting.uplinks;
    const captures = judged
      ? await Promise.all([b.capture("eth0", `src ${a.address}`), a.capture("eth0", `src ${b.address}`)])
      : [];
    for (const [from, to] of [[a, b] as const, [b, a] as const]) {
      expect(await run(from, `tcp ${to.address} ${TCP_PORT} 1000000 1000000`)).toMatchObject({
        intact: true,
      });
      for (const options of ["1400", "60000 --segment 1400", "20000", "1"])
        expect(await run(from, `udp ${to.address} ${UDP_PORT} ${options} --count 3`)).toMatchObject({
          intact: true,
        });
      expect(await pings(from, to, 1422, true)).toEqual(answered);
      expect(await pings(from, to, 5000, false)).toEqual(answered);
      expect(await run(from, `error ${to.address} 9 100`)).toMatchObject({ type: 3, code: 3 });
      expect((await from.ping(to.address, { count: 2, arguments: ["-R"] })).received).toBe(2);
    }
    for (const capture of captures) {
      await capture.stop();
      const kinds = ["tcp", "udp", "icmp"] as const;
      const names = [
        "ip.checksum.status",
        ...kinds.map((kind) => `${kind}.checksum.status` as const),
        ...kinds.map((kind) => `${kind}.checksum` as const),
      ] as const;
      const packets = await capture.fields(names);
      expect(new Set(packets.map((packet) => packet["ip.checksum.status"].split(",")[0]))).toEqual(
        new Set(["1"]),
      );
      for (const kind of kinds) {
        // An error quotes a header, whose fields then come second.
        const found = packets
          .map((packet) => ({
            state: packet[`${kind}.checksum.status`].split(",")[0],
            value: packet[`${kind}.checksum`].split(",")[0],
          }))
          .filter(({ state }) => state !== "");
        expect(found.filter(({ state }) => state === "1").length).toBeGreaterThan(3);
        // 2 is not judged, as it is a piece of a datagram. The kernel writes a sum of 0 as 0xffff, which is the same
        // number (RFC 1071) but not to tshark.
        expect(found.filter(({ state, value }) => state === "0" && value !== "0xffff")).toEqual([]);
      }
    }
  });
});
