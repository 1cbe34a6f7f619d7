/**
 * One cluster of Twill and flannel: what a host with Twill puts on the wire is, byte for byte, what the kernel's
 * own device would have put there, and a host can be taken over from flanneld and given back under full traffic.
 *
 * The other side is a kernel set up as flanneld does it (bench/baseline.ts). Packets are read from a capture in
 * the network between the hosts, by a parser of this file that trusts nothing: every checksum is computed anew.
 */
import { existsSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, describe, expect, test } from "vitest";
import { addVxlan, addVxlanPeer } from "../../bench/baseline.ts";
import { createLab, type Etcd, type Frame, type Host, type Lab, type Namespace, type Pod } from "../lab.ts";
import { echo, Streams } from "../streams.ts";
import { Capture } from "../traffic.ts";
import { startTwilld, type Twilld, twill } from "../twilld.ts";

const PREFIX = "/coreos.com/network";
const UDP = 17;
const TCP = 6;
const ICMP = 1;

let lab: Lab | undefined;

afterEach(async () => {
  await lab?.close();
  lab = undefined;
});

/** A host of the cluster with one pod; its subnet is 172.7.<number>.0/24 and its address 10.4.7.<number>. */
interface Node {
  readonly host: Host;
  readonly pod: Pod;
  readonly subnet: string;
  readonly key: string;
}

async function cluster(numbers: readonly number[]): Promise<{ lab: Lab; etcd: Etcd; nodes: Node[] }> {
  lab = await createLab();
  const etcd = await lab.etcd({ addresses: ["10.4.7.11/24"] });
  await etcd.put(`${PREFIX}/config`, '{"Network": "172.7.0.0/16", "Backend": {"Type": "vxlan"}}');
  const nodes: Node[] = [];
  for (const number of numbers) {
    const host = await lab.host(`h${number}`, { address: `10.4.7.${number}/24` });
    await host.bridge("docker0", `172.7.${number}.1/24`, { mtu: 1450 });
    const pod = await host.pod("a", `172.7.${number}.2/24`, { mtu: 1450 });
    writeFileSync(join(host.directory, "subnet.env"), `FLANNEL_SUBNET=172.7.${number}.1/24\n`);
    nodes.push({ host, pod, subnet: `172.7.${number}.0/24`, key: `${PREFIX}/subnets/172.7.${number}.0-24` });
  }
  return { lab, etcd, nodes };
}

/** What flanneld does with its lease: the record, byte for byte, under an etcd lease of a day. */
async function putFlannelLease(etcd: Etcd, node: Node, mac: string): Promise<void> {
  const [, lease = ""] = /lease ([0-9a-f]+) granted/.exec(await etcd.ctl("lease", "grant", "86400")) ?? [];
  const record = `{"PublicIP":"${node.host.address}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"${mac}"}}`;
  await etcd.ctl("put", `--lease=${lease}`, node.key, record);
}

/** A node as flanneld leaves it: its device, and its lease in etcd. */
async function flannelNode(etcd: Etcd, node: Node): Promise<string> {
  const { mac } = await addVxlan(node.host, { subnet: node.subnet });
  await putFlannelLease(etcd, node, mac);
  return mac;
}

/** What flanneld on `node` adds for the lease of `peer` as it is in etcd. */
async function learnPeer(etcd: Etcd, node: Node, peer: Node): Promise<void> {
  const record = (await etcd.list(peer.key)).get(peer.key);
  const { PublicIP, BackendData } = JSON.parse(record ?? "{}") as {
    PublicIP: string;
    BackendData: { VtepMAC: string };
  };
  await addVxlanPeer(node.host, { subnet: peer.subnet, publicIp: PublicIP, vtepMac: BackendData.VtepMAC });
}

const two = <T>([a, b]: readonly T[]): [T, T] => {
  if (a === undefined || b === undefined) throw new Error("two are needed");
  return [a, b];
};

// --- packets -------------------------------------------------------------------------------------------------

const dotted = (bytes: Buffer) => [...bytes].join(".");
const colons = (bytes: Buffer) => bytes.toString("hex").replace(/..(?=.)/g, "$&:");
const octets = (address: string) => Buffer.from(address.split(".").map(Number));
const hex = (mac: string) => Buffer.from(mac.replaceAll(":", ""), "hex");

/** The Internet checksum (RFC 1071); 0 over data that holds its own right checksum. */
function checksum(...parts: readonly Buffer[]): number {
  const joined = Buffer.concat(parts);
  const data = joined.length % 2 === 0 ? joined : Buffer.concat([joined, Buffer.alloc(1)]);
  let sum = 0;
  for (let at = 0; at < data.length; at += 2) sum += data.readUInt16BE(at);
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  return ~sum & 0xffff;
}

interface Ip {
  readonly tos: number;
  readonly id: number;
  readonly flags: number;
  readonly ttl: number;
  readonly protocol: number;
  readonly source: string;
  readonly destination: string;
  readonly payload: Buffer;
  /** The sum over the header is right, and its length fits. */
  readonly sound: boolean;
  /** Of TCP, UDP and ICMP that is not a fragment; a UDP checksum of 0 counts. */
  readonly payloadSound: boolean;
}

function parseIp(bytes: Buffer): Ip {
  const header = (bytes.readUInt8(0) & 15) * 4;
  const length = bytes.readUInt16BE(2);
  const flags = bytes.readUInt16BE(6);
  const protocol = bytes.readUInt8(9);
  const payload = bytes.subarray(header, length);
  const isFragment = (flags & 0x3fff) !== 0;
  const pseudo = Buffer.concat([bytes.subarray(12, 20), Buffer.from([0, protocol, 0, 0])]);
  pseudo.writeUInt16BE(payload.length, 10);
  const right =
    protocol === ICMP
      ? checksum(payload) === 0
      : protocol === TCP
        ? checksum(pseudo, payload) === 0
        : protocol === UDP
          ? payload.readUInt16BE(6) === 0 || checksum(pseudo, payload) === 0
          : true;
  return {
    tos: bytes.readUInt8(1),
    id: bytes.readUInt16BE(4),
    flags,
    ttl: bytes.readUInt8(8),
    protocol,
    source: dotted(bytes.subarray(12, 16)),
    destination: dotted(bytes.subarray(16, 20)),
    payload,
    sound:
      bytes.readUInt8(0) >> 4 === 4 && length === bytes.length && checksum(bytes.subarray(0, header)) === 0,
    payloadSound: isFragment || right,
  };
}

interface TunnelPacket {
  readonly bytes: Buffer;
  readonly outer: Ip;
  readonly sourcePort: number;
  readonly destinationPort: number;
  readonly udpLength: number;
  readonly flags: number;
  readonly vni: number;
  readonly to: string;
  readonly from: string;
  readonly etherType: number;
  readonly inner: Ip;
}

function parseTunnel({ bytes }: Frame): TunnelPacket {
  const outer = parseIp(bytes.subarray(14));
  const udp = outer.payload;
  return {
    bytes,
    outer,
    sourcePort: udp.readUInt16BE(0),
    destinationPort: udp.readUInt16BE(2),
    udpLength: udp.readUInt16BE(4),
    flags: udp.readUInt32BE(8),
    vni: udp.readUInt32BE(12) >>> 8,
    to: colons(udp.subarray(16, 22)),
    from: colons(udp.subarray(22, 28)),
    etherType: udp.readUInt16BE(28),
    inner: parseIp(udp.subarray(30)),
  };
}

/** The flow a packet belongs to, by what every part of it shows. */
function flowOf({ inner }: TunnelPacket): string {
  // The ports, or the identifier of an echo.
  const rest = inner.payload.toString("hex", ...(inner.protocol === ICMP ? [4, 6] : [0, 4]));
  return [inner.source, inner.destination, inner.protocol, rest].join(" ");
}

interface Draft {
  readonly source: string;
  readonly destination: string;
  readonly protocol: number;
  readonly payload: Buffer;
  readonly id: number;
  readonly tos?: number;
  readonly ttl?: number;
  /** DF 0x4000, MF 0x2000, offset in units of 8 bytes. */
  readonly flags?: number;
  /** A multiple of 4 bytes. */
  readonly options?: Buffer;
}

function ip(draft: Draft): Buffer {
  const { options = Buffer.alloc(0), payload } = draft;
  const header = Buffer.alloc(20 + options.length);
  header.writeUInt8(0x40 + header.length / 4, 0);
  header.writeUInt8(draft.tos ?? 0, 1);
  header.writeUInt16BE(header.length + payload.length, 2);
  header.writeUInt16BE(draft.id, 4);
  header.writeUInt16BE(draft.flags ?? 0x4000, 6);
  header.writeUInt8(draft.ttl ?? 64, 8);
  header.writeUInt8(draft.protocol, 9);
  octets(draft.source).copy(header, 12);
  octets(draft.destination).copy(header, 16);
  options.copy(header, 20);
  header.writeUInt16BE(checksum(header), 10);
  return Buffer.concat([header, payload]);
}

function transport(source: string, destination: string, protocol: number, bytes: Buffer, at: number): Buffer {
  const pseudo = Buffer.concat([octets(source), octets(destination), Buffer.from([0, protocol, 0, 0])]);
  pseudo.writeUInt16BE(bytes.length, 10);
  bytes.writeUInt16BE(checksum(pseudo, bytes), at);
  return bytes;
}

function udpPayload(source: string, destination: string, port: number, size: number): Buffer {
  const bytes = Buffer.alloc(8 + size, 0x75);
  bytes.writeUInt16BE(port, 0);
  bytes.writeUInt16BE(9, 2);
  bytes.writeUInt16BE(bytes.length, 4);
  bytes.writeUInt16BE(0, 6);
  return transport(source, destination, UDP, bytes, 6);
}

function tcpPayload(source: string, destination: string, port: number, size: number): Buffer {
  const bytes = Buffer.alloc(20 + size, 0x74);
  bytes.fill(0, 0, 20);
  bytes.writeUInt16BE(port, 0);
  bytes.writeUInt16BE(9, 2);
  bytes.writeUInt32BE(4711, 4);
  bytes.writeUInt8(0x50, 12);
  bytes.writeUInt8(0x10, 13);
  return transport(source, destination, TCP, bytes, 16);
}

/** An echo reply, which nobody answers. */
function icmpPayload(id: number, size: number): Buffer {
  const bytes = Buffer.alloc(8 + size, 0x69);
  bytes.fill(0, 0, 8);
  bytes.writeUInt16BE(id, 4);
  bytes.writeUInt16BE(checksum(bytes), 2);
  return bytes;
}

const rawSender = `
import socket, sys
out = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
for line in sys.stdin:
    to, packet = line.split()
    out.sendto(bytes.fromhex(packet), (to, 0))
`;

/** Sends IP packets exactly as they are. */
async function send(from: Namespace, packets: readonly Buffer[]): Promise<void> {
  const input = packets
    .map((packet) => `${dotted(packet.subarray(16, 20))} ${packet.toString("hex")}\n`)
    .join("");
  await from.exec(["python3", "-c", rawSender], { input });
}

/** What crosses the switch to and from a host while `action` runs; no frame is longer than a cable's. */
async function capturing(
  lab: Lab,
  host: Host,
  filter: string,
  action: () => Promise<void>,
): Promise<TunnelPacket[]> {
  const capture = await Capture.start(lab.switch, host.name, filter, 2048);
  await action();
  await capture.stop();
  return capture.frames().map(parseTunnel);
}

/** What every tunnel packet between two nodes must look like; `macs` by public address. */
function expectFlannel(packet: TunnelPacket, macs: Readonly<Record<string, string>>): void {
  const { outer, inner } = packet;
  const seen = {
    destinationPort: packet.destinationPort,
    flags: packet.flags,
    vni: packet.vni,
    reserved: packet.bytes.readUInt8(14 + 20 + 15),
    from: packet.from,
    to: packet.to,
    etherType: packet.etherType,
    ttl: outer.ttl,
    fragment: outer.flags,
    dscp: outer.tos >> 2,
    ecn: outer.tos & 3,
    outerSound: outer.sound,
    udpSound: outer.payloadSound,
    udpLength: packet.udpLength,
    innerSound: inner.sound,
    innerPayloadSound: inner.payloadSound,
    innerTtl: inner.ttl,
  };
  expect(seen).toEqual({
    destinationPort: 8472,
    flags: 0x08000000,
    vni: 1,
    reserved: 0,
    from: macs[outer.source],
    to: macs[outer.destination],
    etherType: 0x0800,
    ttl: 64,
    fragment: 0,
    dscp: 0,
    // RFC 6040, normal mode as Linux has it: CE becomes ECT(0), everything else is copied.
    ecn: (inner.tos & 3) === 3 ? 2 : inner.tos & 3,
    outerSound: true,
    udpSound: true,
    udpLength: outer.payload.length,
    innerSound: true,
    innerPayloadSound: true,
    innerTtl: 63,
  });
}

describe("on the wire", () => {
  test("Twill and flannel understand each other, and every byte of both is flannel's", async () => {
    const { lab, etcd, nodes } = await cluster([21, 22]);
    const [h1, h2] = two(nodes);
    const flannelMac = await flannelNode(etcd, h2);
    // A range of its own, to see that it is read; and no offloads, so that the capture shows what a cable would.
    await h1.host.sysctl({ "net.ipv4.ip_local_port_range": "41000 41999" });
    for (const { host, pod } of nodes) {
      await host.offloads(false);
      await pod.offloads(false);
      await host.offloads(false, pod.port);
    }
    const twilld = await startTwilld(h1.host, { etcd });
    await learnPeer(etcd, h2, h1);
    const macs = { [h1.host.address]: await h1.host.mac("flannel.1"), [h2.host.address]: flannelMac };

    const packets = await capturing(lab, h2.host, "udp port 8472", async () => {
      expect((await h1.pod.ping(h2.pod.address, { count: 50 })).lost).toEqual([]);
      expect((await h2.pod.ping(h1.pod.address, { count: 50 })).lost).toEqual([]);
      const toMark = { count: 3, arguments: ["-Q", "0xba"] };
      expect((await h1.pod.ping(h2.pod.address, toMark)).lost).toEqual([]);
      for (const [from, to] of [[h1, h2] as const, [h2, h1] as const]) {
        const server = await to.pod.httpServer();
        expect(await from.pod.httpGet(`http://${to.pod.address}/`)).toBe(`${from.pod.address}\n`);
        expect((await from.pod.httpGet(`http://${to.pod.address}/large`)).length).toBe(4 << 20);
        await server.stop();
        await echo(from.pod, to.pod, [1, 2, 17, 1000, 1421, 1422]);
      }
    });

    const sent = { [h1.host.address]: 0, [h2.host.address]: 0 };
    const ports = new Map<string, Set<number>>();
    for (const packet of packets) {
      expectFlannel(packet, macs);
      sent[packet.outer.source] = (sent[packet.outer.source] ?? 0) + 1;
      if (packet.outer.source !== h1.host.address) continue;
      expect(packet.sourcePort).toBeGreaterThanOrEqual(41000);
      expect(packet.sourcePort).toBeLessThanOrEqual(41999);
      const flow = flowOf(packet);
      ports.set(flow, (ports.get(flow) ?? new Set()).add(packet.sourcePort));
    }
    expect(sent[h1.host.address]).toBeGreaterThan(3000);
    expect(sent[h2.host.address]).toBeGreaterThan(3000);
    expect([...ports.values()].filter((used) => used.size !== 1)).toEqual([]);
    expect(new Set([...ports.values()].flatMap((used) => [...used])).size).toBeGreaterThan(3);
    // The programs did it, not the kernel's device beneath them.
    expect(twilld.packets("from_pod", "encapsulated")).toBeGreaterThan(3000);
    expect(twilld.packets("from_net", "decapsulated")).toBeGreaterThan(100);
    expect(twilld.packets("from_overlay", "delivered")).toBeGreaterThan(100);
  });

  test("the tunnel device is flannel's to the last attribute", async () => {
    const { etcd, nodes } = await cluster([21, 22]);
    const [h1, h2] = two(nodes);
    await flannelNode(etcd, h2);
    await startTwilld(h1.host, { etcd });
    await learnPeer(etcd, h2, h1);
    const describeNode = async ({ host }: Node) => {
      type Row = Record<string, unknown>;
      const [link] = await host.ipJson<Row>("link show dev flannel.1");
      const [address] = await host.ipJson<{ addr_info: Row[] }>("-4 address show dev flannel.1");
      const neighbours = await host.ipJson<Row>("neigh show dev flannel.1");
      const routes = await host.ipJson<Row>("route show dev flannel.1");
      for (const route of routes) for (const field of ["nhid", "nh_info"]) delete route[field];
      const { stdout } = await host.exec(["bridge", "fdb", "show", "dev", "flannel.1"]);
      const text = JSON.stringify({ link, address, neighbours, routes, fdb: stdout });
      // What differs by nature: numbers, MACs and addresses of the two, the mark on our routes, and their nexthops.
      return text
        .replace(/"(ifindex|link_index|protocol)":("?)\w+\2,?/g, "")
        .replace(/([0-9a-f]{2}:){5}[0-9a-f]{2}/g, (mac) => (mac === "ff:ff:ff:ff:ff:ff" ? mac : "MAC"))
        .replace(/\b(172\.7|10\.4\.7)\.2[12]\b/g, "$1.N");
    };
    expect(await describeNode(h1)).toBe(await describeNode(h2));
    const read = async ({ host }: Node) =>
      (await host.exec(["cat", "/proc/sys/net/ipv6/conf/flannel.1/accept_ra"])).stdout;
    expect(await read(h1)).toBe(await read(h2));
  });

  test("for the same packet, programs and kernel send the same bytes", async () => {
    const { lab, etcd, nodes } = await cluster([21, 22]);
    const [h1, h2] = two(nodes);
    await flannelNode(etcd, h2);
    const twilld = await startTwilld(h1.host, { etcd });
    await learnPeer(etcd, h2, h1);
    const [source, destination] = [h1.pod.address, h2.pod.address];
    let id = 1;
    const common = () => ({ source, destination, id: id++ });
    const udp = (size: number, more: Partial<Draft> = {}) =>
      ip({ ...common(), protocol: UDP, payload: udpPayload(source, destination, 4000, size), ...more });
    const packets = [
      ...[0, 1, 2, 3, 0xb8, 0xba, 0xbb, 0xff].map((tos) => udp(33, { tos })),
      ...[0, 1, 2, 3].map((tos) =>
        ip({ ...common(), protocol: TCP, payload: tcpPayload(source, destination, 4001, 10), tos }),
      ),
      ...[0, 1, 1300].map((size) => ip({ ...common(), protocol: ICMP, payload: icmpPayload(77, size) })),
      ...[0, 1, 1399, 1400, 1421, 1422].map((size) => udp(size)),
      ...[0, 1422].map((size) => udp(size, { flags: 0 })),
      ...[2, 3, 255].map((ttl) => udp(5, { ttl })),
      udp(64, { flags: 0x2000 }),
      udp(64, { flags: 0x0009 }),
      udp(64, { flags: 0x2009 }),
      // A record-route option, protocols without ports, a UDP packet without checksum.
      udp(9, { options: Buffer.from("07070400000000" + "01", "hex") }),
      ip({ ...common(), protocol: 47, payload: Buffer.alloc(40, 0x47) }),
      ip({ ...common(), protocol: 132, payload: Buffer.alloc(40, 0x13) }),
      ip({ ...common(), protocol: UDP, payload: Buffer.from("0fa000090009000078", "hex") }),
    ];
    const round = async () => {
      const seen = await capturing(
        lab,
        h1.host,
        `udp port 8472 and src host ${h1.host.address}`,
        async () => {
          await send(h1.pod, packets);
          // What the pings bring back has come behind the rest.
          expect((await h1.pod.ping(destination, { count: 3 })).lost).toEqual([]);
        },
      );
      return seen.filter(({ inner }) => inner.protocol !== ICMP || inner.payload.readUInt8(0) === 0);
    };
    const before = twilld.packets("from_pod", "encapsulated");
    const fast = await round();
    expect(twilld.packets("from_pod", "encapsulated") - before).toBeGreaterThanOrEqual(packets.length - 1);
    const throughDevice = (await h1.host.counters("flannel.1")).txPackets;

    await twilld.stop();
    rmSync(h1.host.pinPath, { recursive: true });
    const kernel = await round();
    expect((await h1.host.counters("flannel.1")).txPackets - throughDevice).toBeGreaterThanOrEqual(
      packets.length,
    );

    expect(fast).toHaveLength(packets.length);
    expect(kernel).toHaveLength(packets.length);
    const fixed = ({ bytes }: TunnelPacket) => {
      const copy = Buffer.from(bytes);
      // What may differ: the outer IP identification and, with it, checksum; UDP source port and checksum.
      for (const at of [18, 24, 34, 40]) copy.writeUInt16BE(0, at);
      return copy.toString("hex");
    };
    const byId = (seen: readonly TunnelPacket[]) =>
      [...seen].sort((a, b) => a.inner.id - b.inner.id).map(fixed);
    expect(byId(fast)).toEqual(byId(kernel));
    const macs = {
      [h1.host.address]: await h1.host.mac("flannel.1"),
      [h2.host.address]: await h2.host.mac("flannel.1"),
    };
    for (const packet of fast) if (packet.inner.ttl === 63) expectFlannel(packet, macs);
    const udpPorts = fast.filter(({ inner }) => inner.protocol === UDP && (inner.flags & 0x3fff) === 0);
    expect(new Set(udpPorts.slice(0, -1).map(({ sourcePort }) => sourcePort)).size).toBe(1);
  });

  test("congestion marks of the way come out as RFC 6040 has it, opened by programs or by the kernel", async () => {
    const { etcd, nodes } = await cluster([21, 22]);
    const [h1, h2] = two(nodes);
    const flannelMac = await flannelNode(etcd, h2);
    const twilld = await startTwilld(h1.host, { etcd });
    await learnPeer(etcd, h2, h1);
    expect((await h2.pod.ping(h1.pod.address, { count: 3 })).lost).toEqual([]);
    const vtep = await h1.host.mac("flannel.1");
    const [source, destination] = [h2.pod.address, h1.pod.address];
    const wrap = (outerEcn: number, inner: Buffer) => {
      const header = Buffer.concat([
        Buffer.from("c0002118000000000800000000000100", "hex"),
        hex(vtep),
        hex(flannelMac),
        Buffer.from("0800", "hex"),
      ]);
      header.writeUInt16BE(header.length + inner.length, 4);
      const addresses = { source: h2.host.address, destination: h1.host.address };
      return ip({
        ...addresses,
        protocol: UDP,
        id: 9,
        tos: outerEcn,
        payload: Buffer.concat([header, inner]),
      });
    };
    const cases = [UDP, TCP].flatMap((protocol) =>
      [0, 1, 2, 3].flatMap((outer) => [0, 1, 2, 3].map((inner) => ({ protocol, outer, inner }))),
    );
    const packets = cases.map(({ protocol, outer, inner }, index) => {
      const make = protocol === UDP ? udpPayload : tcpPayload;
      const payload = make(source, destination, 4000, 20);
      return wrap(outer, ip({ source, destination, protocol, payload, id: 100 + index, tos: 0xb8 | inner }));
    });
    const expected = cases.flatMap(({ outer, inner }, index) => {
      if (outer === 3 && inner === 0) return [];
      const ecn = outer === 3 ? 3 : outer === 1 && inner === 2 ? 1 : inner;
      return [{ id: 100 + index, tos: 0xb8 | ecn, ttl: 63, sound: true, payloadSound: true }];
    });
    const round = async () => {
      const capture = await h1.pod.capture("eth0", `src host ${source} and (udp or tcp)`);
      await send(h2.host, packets);
      expect((await h2.pod.ping(destination, { count: 3 })).lost).toEqual([]);
      await capture.stop();
      return capture
        .frames()
        .map(({ bytes }) => parseIp(bytes.subarray(14, 14 + bytes.readUInt16BE(16))))
        .map(({ id, tos, ttl, sound, payloadSound }) => ({ id, tos, ttl, sound, payloadSound }))
        .sort((a, b) => a.id - b.id);
    };
    await twilld.statusWhere("the pod is known", ({ endpoints }) => endpoints === 1);
    const opened = twilld.packets("from_net", "decapsulated");
    expect(await round()).toEqual(expected);
    expect(twilld.packets("from_net", "decapsulated") - opened).toBeGreaterThanOrEqual(15);
    expect(twilld.packets("from_net", "drop_ecn")).toBe(1);
    await twilld.stop();
    rmSync(h1.host.pinPath, { recursive: true });
    expect(await round()).toEqual(expected);
  });
});

describe("in place of flanneld", () => {
  test("a host is taken over and given back under traffic, and nobody notices", async () => {
    const { etcd, nodes } = await cluster([21, 22]);
    const [h1, h2] = two(nodes);
    const mac = await flannelNode(etcd, h1);
    await flannelNode(etcd, h2);
    await learnPeer(etcd, h1, h2);
    await learnPeer(etcd, h2, h1);
    // A peer that left while no flanneld ran here: flannel would keep it for ever.
    const stale = { subnet: "172.7.99.0/24", publicIp: "10.4.7.99", vtepMac: "0a:00:00:00:00:99" };
    await addVxlanPeer(h1.host, stale);
    const stateOf = async (host: Host) =>
      [
        await host.ip("route show dev flannel.1"),
        await host.ip("neigh show dev flannel.1"),
        (await host.exec(["bridge", "fdb", "show", "dev", "flannel.1"])).stdout,
      ].join("");
    expect(await stateOf(h1.host)).toMatch(/172\.7\.99\.0.*0a:00:00:00:00:99.*10\.4\.7\.99/s);
    const [link] = await h1.host.ipJson<{ ifindex: number }>("link show dev flannel.1");
    const peerBefore = await stateOf(h2.host);
    const pings = [await h1.pod.startPing(h2.pod.address), await h2.pod.startPing(h1.pod.address)];
    const streams = [await Streams.start(h1.pod, h2.pod, 3), await Streams.start(h2.pod, h1.pod, 3)];
    const traffic = async () => {
      for (const stream of streams) await stream.flow(3);
      for (const ping of pings) await ping.replies(50);
    };
    const byDevice = async () => (await h1.host.counters("flannel.1")).txPackets;

    for (let turn = 0; turn < 2; turn++) {
      const twilld: Twilld = await startTwilld(h1.host, { etcd });
      await traffic();
      // Flows from before may stay with the stack, as it may have translated them; new ones take the fast lane.
      const encapsulated = twilld.packets("from_pod", "encapsulated");
      expect((await h1.pod.ping(h2.pod.address, { count: 50 })).lost).toEqual([]);
      expect(twilld.packets("from_pod", "encapsulated") - encapsulated).toBeGreaterThanOrEqual(50);
      const state = await stateOf(h1.host);
      expect(state).not.toMatch(/172\.7\.99|0a:00:00:00:00:99|10\.4\.7\.99/);
      expect(state).toContain("172.7.22.0/24 via 172.7.22.0");
      const [now] = await h1.host.ipJson<{ ifindex: number; address: string }>("link show dev flannel.1");
      expect(now).toMatchObject({ ifindex: link?.ifindex, address: mac });
      expect((await etcd.list(h1.key)).get(h1.key)).toBe(
        `{"PublicIP":"${h1.host.address}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"${mac}"}}`,
      );

      await twilld.stop();
      // flanneld finds its device as it would have made it, and replaces the rest; then our programs go.
      await learnPeer(etcd, h1, h2);
      const said = await twill(h1.host, "uninstall", "--keep-routes", `--pin-path=${h1.host.pinPath}`);
      expect(said).toContain("removed program from_pod");
      expect(existsSync(h1.host.pinPath)).toBe(false);
      const back = await byDevice();
      await traffic();
      expect((await byDevice()) - back).toBeGreaterThan(100);
      expect(await h1.host.mac("flannel.1")).toBe(mac);
      expect(await h1.host.ip("route show proto 84")).toBe("");
      expect(await h1.host.ip("nexthop show")).toBe("");
    }
    for (const ping of pings) expect((await ping.stop()).lost).toEqual([]);
    for (const stream of streams) expect((await stream.finish()).bytes).toBeGreaterThan(12 << 20);
    expect(await stateOf(h2.host)).toBe(peerBefore);
  });

  test("a cluster of both: every pod reaches every other under its own address", async () => {
    const { etcd, nodes } = await cluster([21, 22, 23]);
    const [h1, h2, h3] = nodes as [Node, Node, Node];
    await flannelNode(etcd, h2);
    const first = await startTwilld(h1.host, { etcd });
    await startTwilld(h3.host, { etcd });
    await learnPeer(etcd, h2, h1);
    await learnPeer(etcd, h2, h3);
    await first.statusWhere("two peers", ({ peers }) => peers === 2);
    for (const to of nodes) {
      const server = await to.pod.httpServer();
      for (const from of nodes) {
        if (from === to) continue;
        expect((await from.pod.ping(to.pod.address, { count: 20 })).lost).toEqual([]);
        expect(await from.pod.httpGet(`http://${to.pod.address}/`)).toBe(`${from.pod.address}\n`);
        expect((await from.pod.httpGet(`http://${to.pod.address}/large`)).length).toBe(4 << 20);
        await echo(from.pod, to.pod, [1, 1422]);
      }
      await server.stop();
    }
    // Hosts themselves reach the pods of others too, as they do with flannel.
    for (const from of nodes) {
      for (const to of nodes) {
        if (from !== to) expect((await from.host.ping(to.pod.address, { count: 5 })).lost).toEqual([]);
      }
    }
  });
});
