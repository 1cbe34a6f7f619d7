/**
 * `udp` next to a node whose packets a process carries, as flanneld does: h1 runs twilld, h2 that process and no program
 * of ours. Either way, and with the oddities of that backend.
 */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { createLab, type Etcd, type Host, type Lab, type Pod, type Process, until } from "../lab.ts";
import { startTwilld, type Twilld } from "../twilld.ts";
import { startUdpPeer } from "../udppeer.ts";
import { probe, serve, TCP_PORT, UDP_PORT } from "./cluster.ts";

const NETWORK = "172.7.0.0/16";
const MTU = 1472;

let lab: Lab;
let etcd: Etcd;
let h1: Host;
let h2: Host;
let a: Pod;
let b: Pod;
let twilld: Twilld;
let peer: Process;

beforeAll(async () => {
  lab = await createLab({ rpFilter: 1 });
  etcd = await lab.etcd({ addresses: ["10.4.7.11/24"] });
  await etcd.put(
    "/coreos.com/network/config",
    JSON.stringify({ Network: NETWORK, Backend: { Type: "udp" } }),
  );
  await etcd.put("/coreos.com/network/subnets/172.7.22.0-24", '{"PublicIP":"10.4.7.22","PublicIPv6":null}');
  h1 = await lab.host("h1", { address: "10.4.7.21/24" });
  h2 = await lab.host("h2", { address: "10.4.7.22/24" });
  await h1.bridge("docker0", "172.7.21.1/24", { mtu: MTU });
  await h2.bridge("docker0", "172.7.22.1/24", { mtu: MTU });
  a = await h1.pod("a", "172.7.21.2/24", { mtu: MTU });
  b = await h2.pod("b", "172.7.22.2/24", { mtu: MTU });
  await serve(a);
  await serve(b);
  writeFileSync(join(h1.directory, "subnet.env"), "FLANNEL_SUBNET=172.7.21.1/24\n");
  peer = await startUdpPeer(h2, {
    subnet: "172.7.22.0/24",
    network: NETWORK,
    peers: { "172.7.21.0/24": "10.4.7.21" },
    directory: h2.directory,
  });
  // A network card takes aggregates apart and fills in checksums; a cable within one kernel does neither, and the
  // process's socket would get the packets so.
  await h1.offloads(false);
  twilld = await startTwilld(h1, { etcd });
  await until("the way to the peer", async () => (await h1.ping(b.address, { count: 1 })).received === 1);
  await until("the way back", async () => (await b.ping(a.address, { count: 1 })).received === 1);
});
afterAll(() => lab?.close());

const ways = (): readonly [string, Pod, Pod][] => [
  ["to the process", a, b],
  ["from the process", b, a],
];

describe.each([0, 1])("way %i", (way) => {
  const ends = (): [Pod, Pod] => {
    const [, from, to] = ways()[way] ?? expect.fail();
    return [from, to];
  };

  test("pings of any size, TCP and UDP arrive whole, with their addresses", async () => {
    const [from, to] = ends();
    const arrived = { intact: true, seen: from.address, peer: to.address };
    for (const size of [0, 56, MTU - 28]) {
      expect((await from.ping(to.address, { count: 3, size, dontFragment: true })).lost).toEqual([]);
    }
    for (const size of [MTU - 27, 9000, 20_000])
      expect((await from.ping(to.address, { count: 2, size })).lost).toEqual([]);
    expect(await probe(from, `tcp ${to.address} ${TCP_PORT} 8000000 8000000`)).toEqual(arrived);
    for (const mss of [100, MTU - 40])
      expect(await probe(from, `tcp ${to.address} ${TCP_PORT} 200000 200000 --mss ${mss}`)).toEqual(arrived);
    for (const size of [1, MTU - 28, MTU - 27, 20_000])
      expect(await probe(from, `udp ${to.address} ${UDP_PORT} ${size}`)).toMatchObject(arrived);
  });

  test("four hops, each of which may be the last", async () => {
    const [from, to] = ends();
    const hops = async (ttl: number) => {
      const { output, received } = await from.ping(to.address, {
        count: 1,
        arguments: ["-t", `${ttl}`, "-W", "1"],
      });
      return received === 1 ? "answered" : /Time to live exceeded/.test(output) ? "said so" : "lost";
    };
    // The sender's node, its daemon and the receiver's, which drop without a word, and the receiver's node.
    expect([await hops(1), await hops(2), await hops(3), await hops(4), await hops(5)]).toEqual([
      "said so",
      "lost",
      "lost",
      "said so",
      "answered",
    ]);
    expect((await from.ping(to.address, { count: 1 })).output).toContain("ttl=60");
  });

  test("a host with the other's pod, and with the other host by its pods' address", async () => {
    const [from, to] = ends();
    const gateway = to.address.replace(/\.2$/, ".1");
    expect((await from.host.ping(to.address, { count: 3 })).lost).toEqual([]);
    expect((await from.host.ping(gateway, { count: 3, size: 3000 })).lost).toEqual([]);
    expect((await from.ping(gateway, { count: 3 })).lost).toEqual([]);
  });
});

test("on the wire both look alike: the same ports, the same outer lengths, the same packet inside", async () => {
  const capture = await h2.capture("eth0", "udp port 8285");
  expect((await a.ping(b.address, { count: 3 })).lost).toEqual([]);
  await capture.stop();
  const frames = capture.frames().map(({ bytes }) => bytes.subarray(14));
  expect(frames).toHaveLength(6);
  for (const outer of frames) {
    const inner = outer.subarray(28);
    expect([outer.readUInt16BE(20), outer.readUInt16BE(22)]).toEqual([8285, 8285]);
    expect(outer.readUInt16BE(2)).toBe(inner.readUInt16BE(2) + 28);
    expect(outer.readUInt16BE(24)).toBe(inner.readUInt16BE(2) + 8);
    // From either side two hops are gone: of the node, and of what carries it.
    expect(inner[8]).toBe(62);
    expect(headerSum(inner)).toBe(0);
  }
});

test("a peer behind a translator, from whatever port, is a peer; who is none is not", async () => {
  const inner = echo("172.7.22.2", "172.7.21.2", 9);
  const send = (from: Host | Pod, hex: string) =>
    from.exec([
      "/usr/bin/python3",
      "-c",
      "import socket,sys; socket.socket(socket.AF_INET,socket.SOCK_DGRAM).sendto(bytes.fromhex(sys.argv[1]),('10.4.7.21',8285))",
      hex,
    ]);
  const [opened, forged] = [
    twilld.packets("from_net", "decapsulated"),
    twilld.packets("from_net", "drop_forged"),
  ];
  await send(h2, inner.toString("hex"));
  await until("it to be opened", () => twilld.packets("from_net", "decapsulated") === opened + 1);
  await send(h2, echo("172.7.23.2", "172.7.21.2", 9).toString("hex"));
  await until("it to be refused", () => twilld.packets("from_net", "drop_forged") === forged + 1);
});

test("a daemon that is started anew loses nothing on the way to the process", async () => {
  const ping = await a.startPing(b.address);
  await ping.replies(10);
  await twilld.stop("SIGKILL");
  await ping.replies(10);
  twilld = await startTwilld(h1, { etcd });
  await ping.replies(20);
  expect((await ping.stop()).lost).toEqual([]);
  expect(peer.running).toBe(true);
});

/** An ICMP echo request as IP packet, with so many hops left. */
function echo(source: string, destination: string, ttl: number): Buffer {
  const packet = Buffer.alloc(28);
  packet.set([0x45, 0, 0, 28, 0, 0, 0, 0, ttl, 1]);
  packet.set(source.split(".").map(Number), 12);
  packet.set(destination.split(".").map(Number), 16);
  packet.writeUInt16BE(headerSum(packet), 10);
  packet[20] = 8;
  packet.writeUInt16BE(0xf7ff, 22);
  return packet;
}

/** Internet checksum of an IPv4 header without options. */
function headerSum(packet: Buffer): number {
  let sum = 0;
  for (let at = 0; at < 20; at += 2) sum += packet.readUInt16BE(at);
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >> 16);
  return ~sum & 0xffff;
}
