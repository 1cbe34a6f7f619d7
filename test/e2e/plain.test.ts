/**
 * The backends whose tunnel the programs alone open and close: what flannel's users see of them, packets of every
 * shape between pods and hosts, and what is left when the daemon or its device goes.
 */
import { beforeAll, describe, expect, test } from "vitest";
import { type Pod, until } from "../lab.ts";
import { twill } from "../twilld.ts";
import { type Cluster, createCluster, mtuOf, PLAIN_BACKENDS, probe, TCP_PORT, UDP_PORT } from "./cluster.ts";

const DEVICES = { ipip: "flannel.ipip", udp: "flannel0" } as const;
const OUTER = { ipip: "ip proto 4", udp: "udp port 8285 and udp src port 8285" } as const;

describe.each(Object.keys(PLAIN_BACKENDS) as (keyof typeof PLAIN_BACKENDS)[])("%s", (backend) => {
  const device = DEVICES[backend];
  const mtu = mtuOf(backend);
  let cluster: Cluster;
  let a: Pod;
  let b: Pod;
  beforeAll(async () => {
    cluster = await createCluster({ backend, rpFilter: 1 });
    ({ a, b } = cluster);
    return () => cluster.close();
  });
  const arrived = (from: Pod, to: Pod) => ({ intact: true, seen: from.address, peer: to.address });

  test("the lease, subnet.env, device and routes are flannel's", async () => {
    const { h1, etcd } = cluster;
    const key = "/coreos.com/network/subnets/172.7.21.0-24";
    const value = (await etcd.ctl("get", "--print-value-only", key)).trim();
    const type = backend === "udp" ? "" : `,"BackendType":"${backend}"`;
    expect(value).toBe(`{"PublicIP":"10.4.7.21","PublicIPv6":null${type}}`);
    expect(cluster.twilld(h1).subnetEnv).toEqual({
      FLANNEL_NETWORK: "172.7.0.0/16",
      FLANNEL_SUBNET: "172.7.21.1/24",
      FLANNEL_MTU: `${mtu}`,
      FLANNEL_IPMASQ: "false",
    });
    expect(await h1.ip(`-4 address show dev ${device}`)).toMatch(
      new RegExp(`mtu ${mtu} [^]*inet 172\\.7\\.21\\.0/32`),
    );
    const routes = await h1.ip(`route show dev ${device}`);
    if (backend === "udp") expect(routes.trim()).toBe("172.7.0.0/16 proto 84 scope link");
    else expect(routes.trim()).toMatch(/^172\.7\.22\.0\/24 nhid \d+ via 10\.4\.7\.22 proto 84 onlink$/);
  });

  describe.each(["auto", "off"])("--fast-path=%s", (fastPath) => {
    beforeAll(async () => {
      if (fastPath === "off") await cluster.restart(["--fast-path=off"]);
    });

    test("TCP in aggregates, with any MSS, UDP and pings of any size arrive whole, with their addresses", async () => {
      expect(await probe(a, `tcp ${b.address} ${TCP_PORT} 16000000 16000000`)).toEqual(arrived(a, b));
      expect(await probe(b, `tcp ${a.address} ${TCP_PORT} 16000000 16000000`)).toEqual(arrived(b, a));
      for (const mss of [100, mtu - 52, mtu - 40]) {
        const command = `tcp ${b.address} ${TCP_PORT} 300000 300000 --mss ${mss}`;
        expect(await probe(a, command)).toEqual(arrived(a, b));
      }
      for (const segment of [1, 200, mtu - 28]) {
        const command = `udp ${b.address} ${UDP_PORT} ${Math.min(60_000, segment * 64)} --segment ${segment}`;
        expect(await probe(a, command)).toMatchObject(arrived(a, b));
      }
      for (const size of [mtu - 29, mtu - 28]) {
        expect((await a.ping(b.address, { count: 2, size, dontFragment: true })).received).toBe(2);
      }
      for (const size of [mtu - 27, mtu, 9000, 20_000]) {
        expect((await a.ping(b.address, { count: 2, size })).received).toBe(2);
        expect(await probe(b, `udp ${a.address} ${UDP_PORT} ${size}`)).toMatchObject(arrived(b, a));
      }
    });

    test("a host with pods of the other, and hosts by their pods' addresses", async () => {
      const { h1, h2 } = cluster;
      expect((await h1.ping(b.address, { count: 3 })).lost).toEqual([]);
      expect((await h1.ping("172.7.22.1", { count: 3, size: 3000 })).lost).toEqual([]);
      expect(await probe(h1, `tcp ${b.address} ${TCP_PORT} 8000000 8000000`)).toMatchObject({
        intact: true,
        seen: "172.7.21.0",
      });
      // The next hop's MAC has to be asked for first, by a packet that the stack has routed.
      await h1.ip("neigh flush dev eth0");
      expect((await h1.ping(b.address, { count: 2 })).lost).toEqual([]);
      expect((await h2.ping("172.7.21.0", { count: 2 })).lost).toEqual([]);
    });
  });

  test("what is too large is said by ICMP, and hops are counted as flannel counts them", async () => {
    await cluster.restart();
    for (const [, port] of (await cluster.h1.ip("-o link show master docker0")).matchAll(/^\d+: ([^@:]+)/gm))
      await cluster.h1.ip(`link set ${port} mtu 1500`);
    await cluster.h1.ip("link set docker0 mtu 1500");
    await a.ip("link set eth0 mtu 1500");
    const { type, code, mtu: told } = await probe(a, `error ${b.address} ${UDP_PORT} ${1500 - 28} --pmtu do`);
    expect({ type, code, told }).toEqual({ type: 3, code: 4, told: mtu });
    const { output } = await a.ping(b.address, { count: 1 });
    expect(output).toContain(backend === "udp" ? "ttl=60" : "ttl=62");
  });

  test("on the wire it is flannel's", async () => {
    const capture = await cluster.h2.capture("eth0", OUTER[backend]);
    expect((await a.ping(b.address, { count: 2 })).lost).toEqual([]);
    await capture.stop();
    expect(capture.frames()).toHaveLength(4);
    const at = 14 + (backend === "udp" ? 28 : 20);
    for (const { bytes } of capture.frames()) {
      const outer = bytes.subarray(14);
      expect(outer.readUInt16BE(2)).toBe(bytes.readUInt16BE(at + 2) + at - 14);
      expect(outer[8]).toBe(64);
      expect([bytes[at + 9], bytes[at + 12], bytes[at + 13]]).toEqual([1, 172, 7]);
      // Do not fragment: as inside with ipip, never with udp.
      expect(outer.readUInt16BE(6) & 0x4000).toBe(
        backend === "ipip" ? bytes.readUInt16BE(at + 6) & 0x4000 : 0,
      );
    }
  });

  test("a daemon that is started anew loses nothing, and its device is mended; both outlive it until the uninstall", async () => {
    const { h1 } = cluster;
    const ping = await a.startPing(b.address);
    await ping.replies(10);
    // Killed, it leaves the programs, which forward alone meanwhile.
    await cluster.twilld(h1).stop("SIGKILL");
    await ping.replies(20);
    await cluster.restart();
    await ping.replies(20);
    expect((await ping.stop()).lost).toEqual([]);
    await h1.ip(`link delete ${device}`);
    await until("the device to be made anew", async () => {
      return (await h1.ping(b.address, { count: 1, arguments: ["-W", "1"] })).received === 1;
    });
    expect(await probe(a, `tcp ${b.address} ${TCP_PORT} 1000000 1000000`)).toEqual(arrived(a, b));
    // test/e2e/trace.test.ts compares it with what happens.
    const traced = await twill(h1, "trace", a.address, b.address, `--pin-path=${h1.pinPath}`);
    expect(traced).toMatch(/^ {2}from_pod on .* encapsulated: /m);
    expect(traced).toMatch(/\nleaves eth0 for 10\.4\.7\.22\n$/);
    // Nothing but our own uninstall takes it away.
    await cluster.twilld(h1).stop();
    expect((await a.ping(b.address, { count: 3 })).lost).toEqual([]);
    const removed = await twill(h1, "uninstall", `--pin-path=${h1.pinPath}`);
    expect(removed).toContain(`removed device ${device}`);
    expect((await a.ping(b.address, { count: 1, arguments: ["-W", "1"] })).received).toBe(0);
  });
});
