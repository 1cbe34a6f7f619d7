/**
 * Pods speak to the outside under their node's address, and no rule of iptables or nftables is there for it.
 *
 * The outside is a server behind a router: 10.4.8.99, reached from the nodes' network 10.4.7.0/24 by 10.4.7.1. It has
 * no route to the pods, so that an answer comes back only to an address of a node.
 */
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { codec } from "../../loader/codec.ts";
import { openPinnedMap } from "../../loader/map.ts";
import { connection4Layout, connectionKey4Layout } from "../../src/abi/twill.gen.ts";
import { buildVariant } from "../fault/variant.ts";
import { exec, type Host, type Namespace, type Process, repository, until } from "../lab.ts";
import { Streams } from "../streams.ts";
import { startTwilld, Twilld, twill, twilldFlags } from "../twilld.ts";
import {
  type BackendName,
  type Cluster,
  createCluster,
  probe,
  serve,
  TCP_PORT,
  TESTED_BACKENDS,
  UDP_PORT,
} from "./cluster.ts";

const SERVER = "10.4.8.99";
const NODE = "10.4.7.21";
/** TWILL_CONNECTIONS=100000 is the whole of it. */
const SEQUENCE = Number(process.env.TWILL_CONNECTIONS ?? 20_000);
/** Speaks from one socket, some twenty times a second as every load has a bound, and says by which address the server knows it, when that changes. */
const SPEAKS = `
import socket, time
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.settimeout(0.5)
client.connect(("${SERVER}", ${UDP_PORT}))
known = None
while True:
    try:
        client.send(b"who am I?")
        seen = client.recv(200).decode().split()[1]
        if seen != known:
            print("known by", seen, flush=True)
        known = seen
    except OSError:
        pass
    time.sleep(0.05)
`;
/** Eight sockets that speak some ten times a second; once all are answered, each must go on to be. */
const EIGHT_SPEAK = `
import socket, time
clients = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(8)]
for client in clients:
    client.settimeout(1)
    client.connect(("${SERVER}", ${UDP_PORT}))
answered = set()
is_open = False
while True:
    for client in clients:
        try:
            client.send(b"still here")
            client.recv(200)
            answered.add(client)
        except TimeoutError:
            if is_open:
                raise
    if len(answered) == 8 and not is_open:
        is_open = True
        print("open", flush=True)
        for client in clients:
            client.settimeout(10)
    time.sleep(0.1)
`;
const HOLD_PORT = `
import socket, signal
held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
held.bind(("0.0.0.0", 61001))
print("bound", flush=True)
signal.pause()
`;

/** Ends each connection first, once it has sent a byte, and so remembers it for a minute. */
const ENDS_FIRST = `
import socket
listener = socket.create_server(("${SERVER}", 7200), backlog=64)
print("ready", flush=True)
while True:
    connection, _ = listener.accept()
    connection.send(b"x")
    connection.close()
`;
const MANY_SHORT = `
import socket
for i in range(500):
    with socket.create_connection(("${SERVER}", 7200), timeout=20) as connection:
        assert connection.recv(1) == b"x" and connection.recv(1) == b""
print("all")
`;

/** Answers datagrams with 4000 bytes, the last piece first. */
const BACKWARDS = `
import socket, struct
asked = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
asked.bind(("0.0.0.0", 7100))
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
print("ready", flush=True)
number = 100
while True:
    data, (address, port) = asked.recvfrom(100)
    number += 1
    body = struct.pack(">HHHH", 7100, port, 4008, 0) + data * (4000 // len(data))
    pieces = [(at, body[at : at + 1480]) for at in range(0, len(body), 1480)]
    for at, piece in reversed(pieces):
        more = 0 if at + 1480 >= len(body) else 0x2000
        header = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(piece), number, more | at // 8, 64, 17, 0,
                             socket.inet_aton("${SERVER}"), socket.inet_aton(address))
        raw.sendto(header + piece, (address, 0))
`;
const ASK = `
import socket
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.settimeout(10)
client.connect(("${SERVER}", 7100))
for i in range(20):
    client.send(b"%08d" % i)
    assert client.recv(5000) == b"%08d" % i * 500
print("intact")
`;

interface Outside {
  readonly cluster: Cluster;
  readonly router: Namespace;
  readonly server: Host;
}

async function createOutside(backend: BackendName, flags: readonly string[] = []): Promise<Outside> {
  const cluster = await createCluster({ backend, flags: ["--ip-masq", ...flags] });
  try {
    const router = await cluster.lab.router("router", ["10.4.7.1/24", "10.4.8.1/24"]);
    const server = await cluster.lab.host("server", { address: `${SERVER}/24` });
    await serve(server);
    return { cluster, router, server };
  } catch (error) {
    await cluster.close();
    throw error;
  }
}

/** The names outside of the masqueraded connections of a host. */
function connections(
  host: Host,
): { port: number; protocol: number; remote: Uint8Array; remote_port: number }[] {
  const map = openPinnedMap(join(host.pinPath, "connections4"));
  try {
    const keys = codec(connectionKey4Layout);
    return map.entries().map(([key]) => keys.decode(key));
  } finally {
    map.close();
  }
}

/** How many TCP connections under an address have not ended. */
function live(host: Host, address: string): number {
  const map = openPinnedMap(join(host.pinPath, "connections4"));
  try {
    const [keys, values] = [codec(connectionKey4Layout), codec(connection4Layout)];
    return map.entries().filter(([key, value]) => {
      const name = keys.decode(key);
      const { state } = values.decode(value);
      return name.protocol === 6 && name.address.join(".") === address && state !== "CONNECTION_CLOSED";
    }).length;
  } finally {
    map.close();
  }
}

async function rules(host: Host): Promise<string> {
  const saved = await host.exec(["iptables-save"]);
  const listed = await host.exec(["nft", "list", "ruleset"], { check: false });
  // Counters and comments with the time are no rules.
  return `${saved.stdout}${listed.stdout}`.replaceAll(/^#.*$|\[\d+:\d+\]/gm, "");
}

describe.each(TESTED_BACKENDS)("%s", (backend) => {
  let outside: Outside;
  beforeAll(async () => {
    outside = await createOutside(backend);
  });
  afterAll(() => outside?.cluster.close());

  test("TCP reaches an outside server, which sees the node's address", async () => {
    const { cluster } = outside;
    const counted = await cluster.counted(cluster.h1, async () => {
      expect(await probe(cluster.a, `tcp ${SERVER} ${TCP_PORT} 3000000 3000000`)).toMatchObject({
        intact: true,
        seen: NODE,
        peer: SERVER,
      });
    });
    // The first packet takes the stack, the others do not.
    expect(counted.to_net?.masqueraded).toBe(1);
    expect(counted.from_pod?.repeated).toBeGreaterThan(10);
    expect(counted.from_net?.delivered).toBeGreaterThan(10);
  });

  test("UDP and ping reach it", async () => {
    const { cluster } = outside;
    expect(await probe(cluster.a, `udp ${SERVER} ${UDP_PORT} 500 --count 20`)).toMatchObject({
      intact: true,
      seen: NODE,
    });
    expect(await cluster.a.ping(SERVER, { count: 10 })).toMatchObject({ received: 10 });
  });

  test("two pods that use the same port both get their own answers", async () => {
    const { cluster } = outside;
    const pods = [cluster.a, cluster.c];
    const found = await Promise.all(
      pods.map((pod) => probe(pod, `udp ${SERVER} ${UDP_PORT} 100 --count 20`)),
    );
    for (const each of found) expect(each).toMatchObject({ intact: true, seen: NODE });
  });

  test("a node's own traffic is not touched", async () => {
    const { cluster } = outside;
    const counted = await cluster.counted(cluster.h1, async () => {
      const found = await probe(cluster.h1, `tcp ${SERVER} ${TCP_PORT} 100000 100000`);
      expect(found).toMatchObject({ intact: true, seen: NODE });
    });
    expect(counted.to_net?.masqueraded).toBeUndefined();
    expect(counted.from_net?.masqueraded).toBeUndefined();
  });

  test("between pods the source address stays", async () => {
    const { cluster } = outside;
    expect(await probe(cluster.a, `tcp ${cluster.b.address} ${TCP_PORT} 1000 1000`)).toMatchObject({
      intact: true,
      seen: cluster.a.address,
    });
  });
});

describe("errors, sizes and pieces", () => {
  let outside: Outside;
  beforeAll(async () => {
    outside = await createOutside("vxlan");
  });
  afterAll(() => outside?.cluster.close());

  test("an ICMP error from the server, and one from on the way, reach the pod", async () => {
    const { a } = outside.cluster;
    expect(await probe(a, `error ${SERVER} 9 100`)).toMatchObject({ type: 3, code: 3, from: SERVER });
    expect(await probe(a, `error ${SERVER} ${UDP_PORT} 100 --ttl 2`)).toMatchObject({
      type: 11,
      from: "10.4.7.1",
    });
    expect(await probe(a, `error ${SERVER} ${UDP_PORT} 100 --ttl 1`)).toMatchObject({
      type: 11,
      from: "172.7.21.1",
    });
  });

  test("a smaller MTU on the way becomes known to the pod", async () => {
    const { cluster, router, server } = outside;
    await router.ip("link set eth1 mtu 1300");
    const told = await probe(cluster.a, `error ${SERVER} ${UDP_PORT} 1350 --pmtu do`);
    expect(told).toMatchObject({ type: 3, code: 4, mtu: 1300 });
    expect(await probe(cluster.c, `tcp ${SERVER} ${TCP_PORT} 2000000 10`)).toMatchObject({
      intact: true,
      seen: NODE,
    });
    await router.ip("link set eth1 mtu 1500");
    expect(server.address).toBe(SERVER);
  });

  test("datagrams in pieces go both ways", async () => {
    const { a } = outside.cluster;
    expect(await probe(a, `udp ${SERVER} ${UDP_PORT} 9000 --count 5`)).toMatchObject({
      intact: true,
      seen: NODE,
    });
    const { stdout } = await a.exec(["ping", "-c", "10", "-i", "0.01", "-s", "9000", SERVER]);
    expect(stdout).toContain(" 0% packet loss");
  });

  test("pieces of an answer that come before the first one wait for it, and the node's own are not lost", async () => {
    const { cluster, server } = outside;
    const backwards = server.spawn(["/usr/bin/python3", "-c", BACKWARDS]);
    await backwards.line(/^ready$/);
    const counted = await cluster.counted(cluster.h1, async () => {
      for (const from of [cluster.a, cluster.h1]) {
        const { stdout } = await from.exec(["/usr/bin/python3", "-c", ASK]);
        expect(stdout.trim()).toBe("intact");
      }
    });
    expect(counted.from_net).toMatchObject({ held: 2 * 20 * 2, released: 2 * 20 });
  });

  test("big transfers arrive as they were sent, with offloads and without", async () => {
    const { cluster, server } = outside;
    const bytes = 20_000_000;
    const segments = bytes / 1448;
    for (const on of [true, false]) {
      if (!on) await Promise.all([cluster.h1, cluster.a, server].map((each) => each.offloads(false)));
      const counted = await cluster.counted(cluster.h1, async () => {
        const found = await probe(cluster.a, `tcp ${SERVER} ${TCP_PORT} ${bytes} ${bytes}`);
        expect(found).toMatchObject({ intact: true, seen: NODE });
      });
      // In aggregates, whose checksums nobody has filled in yet; then segment by segment, each with its own.
      const repeated = counted.from_pod?.repeated ?? 0;
      if (on) expect(repeated).toBeLessThan(segments / 2);
      else expect(repeated).toBeGreaterThan(segments);
    }
  });
});

const directory = mkdtempSync(join(tmpdir(), "twill-connections-"));
const program = join(directory, "connections");
const PORT = 9000;
beforeAll(() => exec(["gcc", "-O2", "-Wall", "-o", program, join(repository, "test/e2e/connections.c")]));
afterAll(() => rmSync(directory, { recursive: true, force: true }));

/** Serves what `connections hold` and `sequence` open, on 16 ports. */
async function serveConnections(server: Host): Promise<void> {
  await server.spawn([program, "serve", SERVER, `${PORT}`, "16"]).line(/^ready$/);
}

/** What `connections` said when it ended. */
function outcome(process: Process): unknown {
  return JSON.parse(process.lines.findLast(({ text }) => text.startsWith("{"))?.text ?? "{}");
}

/** Whether all that are held still answer. */
async function alive(holder: Process): Promise<string> {
  const after = holder.lines.length;
  holder.kill("SIGUSR1");
  const [said] = await holder.line(/^alive \d+$/, { after, timeout: 60_000 });
  return said;
}

describe("many connections", () => {
  let outside: Outside;
  let before: string;

  beforeAll(async () => {
    outside = await createOutside("vxlan");
    before = await rules(outside.cluster.h1);
    await serveConnections(outside.server);
  });
  afterAll(() => outside?.cluster.close());

  test("10,000 at a time, through a killed agent, a restart and a change of the table's size", async () => {
    const { cluster } = outside;
    const { h1 } = cluster;
    const holder = cluster.a.spawn([program, "hold", SERVER, `${PORT}`, "16", "10000"]);
    await holder.line(/^open$/, { timeout: 60_000 });
    expect(connections(h1)).toHaveLength(10_000);
    expect(await alive(holder)).toBe("alive 0");
    await cluster.twilld(h1).stop("SIGKILL");
    expect(await alive(holder)).toBe("alive 0");
    const flags = ["--ip-masq"];
    let again = await startTwilld(h1, { etcd: cluster.etcd, flags });
    expect(await alive(holder)).toBe("alive 0");
    await again.stop();
    again = await startTwilld(h1, { etcd: cluster.etcd, flags: [...flags, "--masq-max-connections=50000"] });
    expect(connections(h1).length).toBeGreaterThanOrEqual(10_000);
    expect(await alive(holder)).toBe("alive 0");
    expect(await twill(h1, "status", `--pin-path=${h1.pinPath}`, "--json")).toContain('"capacity":50000');
    await holder.stop();
    expect(outcome(holder)).toEqual({ made: 10_000, failed: 0 });
  }, 180_000);

  test("thousands one after the other, many times more than there are ports", async () => {
    const { cluster } = outside;
    // The pod has 28,000 ports itself, and would keep each for a minute.
    await cluster.a.sysctl({ "net.ipv4.ip_local_port_range": "1024 65535", "net.ipv4.tcp_tw_reuse": 1 });
    const argv = [program, "sequence", SERVER, `${PORT}`, "2", `${SEQUENCE}`];
    const { stdout } = await cluster.a.exec(argv, { timeout: 590_000 });
    expect(JSON.parse(stdout)).toEqual({ made: SEQUENCE, failed: 0 });
  }, 600_000);

  test("without a rule of ours", async () => {
    expect(await rules(outside.cluster.h1)).toBe(before);
    expect(before).not.toMatch(/twill|172\.7\./i);
  });
});

describe("another address for the node", () => {
  const OTHER = "10.4.7.121";
  const HELD = 20;
  let outside: Outside;
  beforeAll(async () => {
    // The address is read off the interface, and few ports keep the table small.
    outside = await createOutside("vxlan", ["--public-ip=", "--masq-ports=61000-61255"]);
    await serveConnections(outside.server);
    await outside.cluster.h1.sysctl({
      "net.ipv4.conf.all.promote_secondaries": 1,
      "net.ipv4.conf.eth0.promote_secondaries": 1,
    });
  });
  afterAll(() => outside?.cluster.close());

  /** Gives h1 the next address in the place of the former one, which `stays` beside it or goes. */
  async function renumber(next: string, former: string, stays: boolean): Promise<void> {
    const steps = [
      `address add ${next}/24 dev eth0`,
      `address del ${former}/24 dev eth0`,
      ...(stays ? [`address add ${former}/32 dev eth0`] : []),
      "route replace default via 10.4.7.1",
    ];
    await outside.cluster.h1.exec(["ip", "-batch", "-"], { input: `${steps.join("\n")}\n` });
  }

  test("again and again: new connections have it, those there end under the former one, and none fails", async () => {
    const { cluster } = outside;
    const { h1, a, c } = cluster;
    const opening = a.spawn([program, "sequence", SERVER, `${PORT}`, "16", "1000000"]);
    for (let change = 0; change < 6; change++) {
      const [next, former] = change % 2 === 0 ? [OTHER, NODE] : [NODE, OTHER];
      const holder = c.spawn([program, "hold", SERVER, `${PORT}`, "16", `${HELD}`]);
      await holder.line(/^open$/);
      expect(live(h1, former)).toBeGreaterThanOrEqual(HELD);
      await renumber(next, former, true);
      await until(`new connections to have ${next}`, async () => {
        const { seen } = await probe(c, `udp ${SERVER} ${UDP_PORT} 100`);
        return seen === next;
      });
      expect(await probe(c, `tcp ${SERVER} ${TCP_PORT} 100000 100000`)).toMatchObject({ seen: next });
      expect(await alive(holder)).toBe("alive 0");
      expect(live(h1, former)).toBeGreaterThanOrEqual(HELD);
      await holder.stop();
      expect(outcome(holder)).toEqual({ made: HELD, failed: 0 });
      await until(`connections under ${former} to end`, () => live(h1, former) === 0, { timeout: 60_000 });
      await h1.ip(`address del ${former}/32 dev eth0`);
    }
    opening.kill("SIGTERM");
    await opening.exited;
    expect(outcome(opening), opening.text()).toMatchObject({ failed: 0 });
    expect((outcome(opening) as { made: number }).made).toBeGreaterThan(200);
  }, 240_000);

  test("once the former one is gone, datagrams go on under the new one, and the remote resets TCP connections", async () => {
    const { cluster } = outside;
    const { a, c } = cluster;
    const speaker = a.spawn(["/usr/bin/python3", "-u", "-c", SPEAKS]);
    await speaker.line(/^known by 10\.4\.7\.21$/);
    const holder = c.spawn([program, "hold", SERVER, `${PORT}`, "16", `${HELD}`]);
    await holder.line(/^open$/);
    await renumber(OTHER, NODE, false);
    await speaker.line(/^known by 10\.4\.7\.121$/);
    expect(await probe(c, `tcp ${SERVER} ${TCP_PORT} 100000 100000`)).toMatchObject({ seen: OTHER });
    expect(await alive(holder)).toBe(`alive ${HELD}`);
    expect(holder.text()).toMatch(/^connection 0: Connection reset by peer$/m);
    await holder.stop();
    await speaker.stop();
  }, 60_000);
});

describe("through what happens to a node", () => {
  const CAPACITY = 1024;
  let outside: Outside;
  let last: Twilld | undefined;
  beforeAll(async () => {
    outside = await createOutside("vxlan");
    await serveConnections(outside.server);
  });
  afterAll(() => outside?.cluster.close());

  test("transfers go on when the agent is killed, and through an upgrade to another layout and back", async () => {
    const { cluster, server } = outside;
    const { h1, a, etcd } = cluster;
    const streams = await Streams.start(a, server, 20, 7300);
    await cluster.twilld(h1).stop("SIGKILL");
    await streams.flow(4);
    const again = await startTwilld(h1, { etcd, flags: ["--ip-masq"] });
    await streams.flow(4);
    const variant = await buildVariant(h1.directory);
    await again.stop();
    const flags = [...twilldFlags(h1, etcd), "--ip-masq"];
    const env = { FLANNELD_PEER_PROBES: "0" };
    const later = new Twilld(h1, h1.spawn([variant, ...flags], { cwd: h1.directory, env }), flags);
    await later.ready();
    await streams.flow(4);
    await later.stop();
    last = await startTwilld(h1, { etcd, flags: ["--ip-masq"] });
    await streams.flow(4);
    const { bytes } = await streams.finish();
    expect(bytes).toBeGreaterThan(16 << 20);
  }, 180_000);

  test("a full table refuses new connections and counts them; those there are go on", async () => {
    const { cluster } = outside;
    const { h1, a, c, etcd } = cluster;
    await (last ?? cluster.twilld(h1)).stop();
    await startTwilld(h1, { etcd, flags: ["--ip-masq", `--masq-max-connections=${CAPACITY}`] });
    // Those that have ended make room for them.
    const holder = a.spawn([program, "hold", SERVER, `${PORT}`, "16", `${CAPACITY}`]);
    await holder.line(/^open$/, { timeout: 60_000 });
    expect(connections(h1)).toHaveLength(CAPACITY);
    const counted = await cluster.counted(h1, async () => {
      const refused = await c.exec(["curl", "-sS", "-m", "3", `http://${SERVER}:${PORT}/`], { check: false });
      expect(refused.stderr).toMatch(/timed out|refused|unreachable/i);
    });
    expect(counted.to_net?.drop_masq_full).toBeGreaterThan(0);
    expect(await alive(holder)).toBe("alive 0");
    await holder.stop();
    expect(outcome(holder)).toEqual({ made: CAPACITY, failed: 0 });
    await until("the table to have room", () => connections(h1).length < CAPACITY);
    expect(await probe(c, `udp ${SERVER} ${UDP_PORT} 100`)).toMatchObject({ intact: true, seen: NODE });
  }, 120_000);
});

describe("all ports towards a remote are used", () => {
  const FLAGS = ["--masq-ports=61000-61007"];
  const ELSEWHERE = "10.4.8.98";
  let outside: Outside;
  let twilld: Twilld;
  beforeAll(async () => {
    outside = await createOutside("vxlan", FLAGS);
    const { cluster, server } = outside;
    await serveConnections(server);
    await server.ip(`address add ${ELSEWHERE}/24 dev eth0`);
    await server.spawn([program, "serve", ELSEWHERE, `${PORT}`, "1"]).line(/^ready$/);
    await cluster.twilld(cluster.h1).stop();
    await cluster.h1.sysctl({
      "net.netfilter.nf_conntrack_udp_timeout": 8,
      "net.netfilter.nf_conntrack_udp_timeout_stream": 8,
    });
    twilld = await startTwilld(cluster.h1, { etcd: cluster.etcd, flags: ["--ip-masq", ...FLAGS] });
  });
  afterAll(() => outside?.cluster.close());

  const refusals = async (): Promise<number> => {
    const { to_net } = await outside.cluster.counts(outside.cluster.h1);
    return to_net?.drop_masq_ports ?? 0;
  };
  const hold = (pod: Namespace, remote: string, count: number): Process =>
    pod.spawn([program, "hold", remote, `${PORT}`, "1", `${count}`]);

  test("a new connection there waits, and is counted, until one has ended; all others go on", async () => {
    const { h1, a, c } = outside.cluster;
    const [seven, one] = [hold(a, SERVER, 7), hold(c, SERVER, 1)];
    for (const holder of [seven, one]) await holder.line(/^open$/);
    const before = await refusals();
    const late = hold(c, SERVER, 1);
    await until("the late one to be refused", async () => (await refusals()) > before);
    expect(late.lines).toEqual([]);
    for (const holder of [seven, one]) expect(await alive(holder)).toBe("alive 0");
    // Another remote, another port of this one, and another protocol.
    const other = hold(c, ELSEWHERE, 1);
    await other.line(/^open$/);
    expect(await probe(c, `tcp ${SERVER} ${TCP_PORT} 1000 1000`)).toMatchObject({ intact: true, seen: NODE });
    expect(await probe(c, `udp ${SERVER} ${UDP_PORT} 100`)).toMatchObject({ intact: true, seen: NODE });

    expect(await twilld.metrics()).toMatch(/^twill_dropped_packets_total\{.*reason="masq_ports".*\} [1-9]/m);
    const drops = await twill(h1, "drops", `--pin-path=${h1.pinPath}`);
    expect(drops).toMatch(/to_net +drop_masq_ports +[1-9].*--masq-ports/);
    await until("the sweep to have counted the candidates", async () => {
      const used = /^twill_masquerade_port_candidates_used (\d+)$/m.exec(await twilld.metrics());
      return Number(used?.[1]) > 1;
    });
    expect(late.lines).toEqual([]);

    await one.stop();
    await late.line(/^open$/);
    const there = connections(h1).filter(
      (row) => row.remote_port === PORT && row.remote.join(".") === SERVER,
    );
    expect(there.map(({ port }) => port).sort()).toEqual(Array.from({ length: 8 }, (_, i) => 61000 + i));
    for (const holder of [seven, late, other]) {
      expect(await alive(holder)).toBe("alive 0");
      await holder.stop();
      expect(outcome(holder)).toMatchObject({ failed: 0 });
    }
  }, 120_000);

  test("a flow without an end gives its port back when it has been silent for long enough", async () => {
    const { a, c } = outside.cluster;
    const speaking = a.spawn(["/usr/bin/python3", "-u", "-c", EIGHT_SPEAK]);
    await speaking.line(/^open$/);
    const before = await refusals();
    const late = c.spawn(["/usr/bin/python3", "-u", "-c", SPEAKS]);
    await until("the late one to be refused", async () => (await refusals()) > before);
    expect(late.lines).toEqual([]);
    expect(speaking.running, speaking.text()).toBe(true);
    await speaking.stop();
    await late.line(/^known by 10\.4\.7\.21$/);
    await late.stop();
  }, 120_000);
});

test("a server that ends connections first takes the next ones under the same ports at once", async () => {
  const PORTS = 100;
  const { cluster, server } = await createOutside("host-gw", [`--masq-ports=61000-${61000 + PORTS - 1}`]);
  try {
    const listening = server.spawn(["/usr/bin/python3", "-c", ENDS_FIRST]);
    await listening.line(/^ready$/);
    const count = async (name: string): Promise<number> => {
      const { stdout } = await server.exec(["nstat", "-asz", name]);
      return Number(/^\S+ +(\d+)/m.exec(stdout.replace(/^#.*\n/, ""))?.[1]);
    };
    const refused = await count("TcpExtPAWSTimewait");
    const counted = await cluster.counted(cluster.h1, async () => {
      for (const pod of [cluster.a, cluster.c]) {
        const { stdout } = await pod.exec(["/usr/bin/python3", "-c", MANY_SHORT], { timeout: 120_000 });
        expect(stdout.trim()).toBe("all");
      }
    });
    expect(connections(cluster.h1).filter(({ protocol }) => protocol === 6)).toHaveLength(PORTS);
    // All but the first packets, the FIN among them, went past the stack.
    expect(counted.from_pod?.repeated).toBeGreaterThan(2 * 1000);
    // An old port's name is asked for with a number that the server takes for a new connection.
    expect((await count("TcpExtPAWSTimewait")) - refused).toBeLessThan(5);
  } finally {
    await cluster.close();
  }
}, 300_000);

describe("beside others", () => {
  let outside: Outside | undefined;
  afterAll(() => outside?.cluster.close());

  test("Docker's masquerade rule and its FORWARD policy, and a port that a process of the host has", async () => {
    outside = await createOutside("vxlan", ["--masq-ports=61000-61003"]);
    const { cluster } = outside;
    const { h1, a } = cluster;
    // A process of the host listens where pods' connections would be.
    const holder = h1.spawn(["/usr/bin/python3", "-c", HOLD_PORT]);
    await holder.line(/^bound$/);
    const found = [];
    for (let i = 0; i < 3; i++) found.push(await probe(a, `udp ${SERVER} ${UDP_PORT} 100`));
    expect(found.every(({ intact }) => intact)).toBe(true);
    const rows = connections(h1).filter(({ protocol }) => protocol === 17);
    expect(rows.map(({ port }) => port).sort()).toEqual([61000, 61002, 61003]);
    expect(await probe(h1, `tcp ${SERVER} ${TCP_PORT} 100000 100000`)).toMatchObject({
      intact: true,
      seen: NODE,
    });
    expect((await h1.exec(["cat", "/proc/sys/net/ipv4/ip_local_reserved_ports"])).stdout.trim()).toBe(
      "61000-61003",
    );

    for (const rule of [
      "-t nat -A POSTROUTING -s 172.7.21.0/24 ! -o docker0 -j MASQUERADE",
      "-P FORWARD DROP",
      "-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
      "-A FORWARD -i docker0 ! -o docker0 -j ACCEPT",
      "-A FORWARD -i docker0 -o docker0 -j ACCEPT",
    ]) {
      await h1.exec(["iptables", ...rule.split(" ")]);
    }
    expect(await probe(a, `tcp ${SERVER} ${TCP_PORT} 100000 100000`)).toMatchObject({
      intact: true,
      seen: NODE,
    });
    expect(await probe(a, `udp ${SERVER} ${UDP_PORT} 3000 --count 5`)).toMatchObject({
      intact: true,
      seen: NODE,
    });
    expect(await a.ping(SERVER, { count: 5 })).toMatchObject({ received: 5 });
  });

  test("a connection ends when its time has come, with the agent dead, and uninstall gives the ports back", async () => {
    if (outside === undefined) throw new Error("the test before this one made the lab");
    const { cluster } = outside;
    const { h1 } = cluster;
    await h1.exec(["iptables", "-t", "nat", "-F"]);
    await cluster.twilld(h1).stop();
    await h1.sysctl({
      "net.netfilter.nf_conntrack_udp_timeout": 1,
      "net.netfilter.nf_conntrack_udp_timeout_stream": 1,
    });
    const last = await startTwilld(h1, {
      etcd: cluster.etcd,
      flags: ["--ip-masq", "--masq-ports=62000-62099"],
    });
    await last.stop("SIGKILL");
    expect(await probe(cluster.a, `udp ${SERVER} ${UDP_PORT} 100 --count 3`)).toMatchObject({ intact: true });
    const udp = () => connections(h1).filter(({ protocol }) => protocol === 17).length;
    await until("the connections to expire", () => udp() === 0);
    await twill(h1, "uninstall", `--pin-path=${h1.pinPath}`);
    expect((await h1.exec(["cat", "/proc/sys/net/ipv4/ip_local_reserved_ports"])).stdout.trim()).toBe("");
    expect(existsSync(h1.pinPath)).toBe(false);
  });
});
