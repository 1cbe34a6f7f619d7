/**
 * Masquerade, packet by packet: what leaves has the node's address, what comes back has the pod's again, and nothing
 * else about a packet changes.
 */
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { isDeepStrictEqual } from "node:util";
import fc from "fast-check";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { codec } from "../../loader/index.ts";
import { Limit, maps } from "../../src/abi/twill.gen.ts";
import { Process, repository, until } from "../process.ts";
import { answer, type Moment, NODE, Outside, PORTS, packetOf, portsOf, REMOTE, tcp } from "./outside.ts";
import { type Body, frame, ip4, type Packet4, readIp4 } from "./packets.ts";
import { LO_MAC, NEIGHBOUR, NEXT, OTHER_MAC, POD, REDIRECT, SHOT, TIMEOUTS, TUNNEL } from "./programs.ts";

const [FIN, SYN, RST, ACK] = [1, 2, 4, 16];

let outside: Outside;
beforeEach(() => {
  outside = new Outside();
});
afterEach(() => outside.close());

const packet = (changes: Partial<Packet4> = {}): Packet4 => ({
  source: POD.address,
  destination: REMOTE,
  body: { udp: [1000, 53] },
  ...changes,
});

describe("a flow to the outside", () => {
  test.each<[string, Body]>([
    ["TCP", { tcp: [40000, 443] }],
    ["UDP", { udp: [40000, 53] }],
    ["echo", { echo: 77 }],
  ])("%s gets the node's address and a port of the range, and its answer finds back", (_, body) => {
    const sent = ip4(packet({ body, tos: 0xb8, id: 7, ttl: 63 }));
    const out = outside.leave(sent);
    expect([out.action, out.verdict]).toEqual([NEXT, "MASQUERADED"]);
    const left = readIp4(packetOf(out));
    expect(left).toMatchObject({ source: NODE, destination: REMOTE, intact: true, bodyIntact: true });
    expect(left).toMatchObject({ id: 7, ttl: 63, tos: 0xb8, length: sent.length });
    const [port] = portsOf(packetOf(out));
    expect(port).toBeGreaterThanOrEqual(PORTS.first);
    expect(port).toBeLessThanOrEqual(PORTS.last);

    const back = outside.arrive(answer(packetOf(out)));
    expect([back.action, back.verdict]).toEqual([NEXT, "MASQUERADED"]);
    expect(packetOf(back)).toEqual(answer(sent));
  });

  test.each<[string, Body]>([
    ["GRE", { protocol: 47, data: Buffer.from("some tunnel") }],
    ["ESP", { protocol: 50, data: Buffer.from("some secret") }],
    ["SCTP", { protocol: 132, data: Buffer.from([0x10, 0, 0x20, 0, 1, 2, 3, 4, 5, 6, 7, 8]) }],
  ])("%s changes its address only", (_, body) => {
    const sent = ip4(packet({ body }));
    const out = outside.leave(sent);
    expect(readIp4(packetOf(out))).toMatchObject({ source: NODE, intact: true, body: readIp4(sent).body });
    expect(packetOf(outside.arrive(answer(packetOf(out))))).toEqual(answer(sent));
  });

  test("a second pod with the same protocol without ports is refused, and the first goes on", () => {
    const gre: Body = { protocol: 47, data: Buffer.from("some tunnel") };
    expect(outside.leave(packet({ body: gre })).verdict).toBe("MASQUERADED");
    const second = outside.leave(packet({ body: gre, source: NEIGHBOUR.address }));
    expect([second.action, second.verdict]).toEqual([SHOT, "DROP_MASQ_PORTS"]);
    expect(outside.leave(packet({ body: gre })).verdict).toBe("MASQUERADED");
  });

  test("keeps a port that lies in the range", () => {
    const out = outside.leave(packet({ body: { udp: [61234, 53] } }));
    expect(portsOf(packetOf(out))).toEqual([61234, 53]);
  });

  test("has one row, whatever it sends", () => {
    for (let i = 0; i < 5; i++) outside.leave(packet());
    expect(outside.connections()).toMatchObject([
      { address: NODE, remote: REMOTE, remotePort: 53, pod: POD.address, podPort: 1000 },
    ]);
  });

  test.each([
    ["to a pod elsewhere", packet({ destination: TUNNEL.pod }), {}],
    ["to a multicast group", packet({ destination: "239.1.2.3" }), {}],
    ["that kube-proxy masquerades", packet(), { mark: 0x4000 }],
    ["of the node itself", packet({ source: NODE }), {}],
    ["that answers an echo", packet({ body: { echo: 5, reply: true } }), {}],
  ] as const)("a packet %s stays as it is", (_, sent, metadata) => {
    const out = outside.leave(sent, metadata);
    expect(out.action).toBe(NEXT);
    expect(packetOf(out)).toEqual(ip4(sent));
    expect(outside.connections()).toEqual([]);
  });

  test("an excluded destination is left alone, but not under a flow that has begun", () => {
    outside.leave(packet());
    outside.exclude("93.184.0.0", 16);
    expect(readIp4(packetOf(outside.leave(packet()))).source).toBe(NODE);
    const other = packet({ body: { udp: [1001, 53] } });
    expect(packetOf(outside.leave(other))).toEqual(ip4(other));
  });

  test("a UDP packet without a checksum stays without", () => {
    const bytes = ip4(packet());
    bytes.writeUInt16BE(0, 26);
    const left = packetOf(outside.leave(bytes));
    expect(left.readUInt16BE(26)).toBe(0);
    expect(packetOf(outside.arrive(answer(left)))).toEqual(answer(bytes));
  });

  test("what nobody asked for is the node's own", () => {
    const stray = ip4({ source: REMOTE, destination: NODE, body: { udp: [53, 61000] } });
    const out = outside.arrive(stray);
    expect([out.action, out.verdict]).toEqual([NEXT, "UNRELATED"]);
    expect(packetOf(out)).toEqual(stray);
  });
});

describe("a flow from the outside to a pod's own address", () => {
  test.each<[string, Body, Body]>([
    ["TCP", { tcp: [5000, 80] }, { tcp: [80, 5000] }],
    ["UDP", { udp: [5000, 80] }, { udp: [80, 5000] }],
    ["echo", { echo: 9 }, { echo: 9, reply: true }],
  ])("%s is answered from there", (_, asked, answered) => {
    outside.arrive(ip4({ source: REMOTE, destination: POD.address, body: asked }));
    const reply = packet({ body: answered });
    const out = outside.leave(reply);
    expect(out.action).toBe(NEXT);
    expect(packetOf(out)).toEqual(ip4(reply));
  });
});

describe("the fast lane", () => {
  const sent = packet({ body: { tcp: [40000, 443] } });

  test("has nothing of a flow that the stack has not let through", () => {
    expect(outside.fromPod(sent)).toMatchObject({ action: NEXT, verdict: "UNRELATED" });
    expect(packetOf(outside.fromPod(sent))).toEqual(ip4(sent));
  });

  test("takes answers straight to the pod", () => {
    const left = packetOf(outside.leaveUntouched(sent));
    const back = outside.arrive(answer(left));
    expect([back.action, back.verdict]).toEqual([REDIRECT, "DELIVERED"]);
    expect(readIp4(packetOf(back))).toMatchObject({ destination: POD.address, ttl: 63, bodyIntact: true });
  });

  test("leaves a flow that the stack translates to it, both ways, and for good", () => {
    const left = packetOf(outside.leave(sent));
    outside.leaveUntouched(sent);
    expect(outside.connections()).toMatchObject([{ onStack: true }]);
    expect(outside.arrive(answer(left))).toMatchObject({ action: NEXT, verdict: "MASQUERADED" });
  });
});

describe("TCP", () => {
  const sent = packet({ body: { tcp: [40000, 443] } });
  const state = () => outside.connections()[0]?.state;
  const pod = (flags: number) => packetOf(outside.leave(tcp(sent, flags)));
  const remote = (flags: number) => {
    const port = outside.connections()[0]?.port ?? 0;
    outside.arrive(tcp({ source: REMOTE, destination: NODE, body: { tcp: [443, port] } }, flags));
  };

  test("goes through its states", () => {
    pod(SYN);
    expect(state()).toBe("CONNECTION_NEW");
    remote(SYN | ACK);
    pod(ACK);
    expect(state()).toBe("CONNECTION_ESTABLISHED");
    pod(FIN | ACK);
    expect(state()).toBe("CONNECTION_CLOSING");
    remote(FIN | ACK);
    expect(state()).toBe("CONNECTION_CLOSED");
    pod(ACK);
    expect(state()).toBe("CONNECTION_CLOSED");
  });

  test("begins anew with the ports of one that has ended", () => {
    const [port] = portsOf(pod(SYN));
    remote(RST | ACK);
    expect(state()).toBe("CONNECTION_CLOSED");
    expect(portsOf(pod(SYN))[0]).toBe(port);
    expect(state()).toBe("CONNECTION_NEW");
    expect(outside.connections()).toHaveLength(1);
  });

  test("a reset that the pod does not believe ends nothing", () => {
    pod(SYN);
    remote(SYN | ACK);
    pod(ACK);
    remote(RST);
    pod(ACK);
    expect(state()).toBe("CONNECTION_ESTABLISHED");
  });
});

describe("when room is scarce", () => {
  test("a full table refuses new flows and keeps those it has", () => {
    outside.close();
    outside = new Outside({}, 64);
    const flows = Array.from({ length: 80 }, (_, i) => packet({ body: { udp: [1000 + i, 53] } }));
    const first = flows.map((flow) => outside.leave(flow));
    const kept = first.flatMap((out, i) => (out.verdict === "MASQUERADED" ? [i] : []));
    expect(kept).toHaveLength(64);
    expect(first[79]).toMatchObject({ action: SHOT, verdict: "DROP_MASQ_FULL" });
    for (const i of kept) {
      const again = outside.leave(flows[i] ?? packet());
      expect(portsOf(packetOf(again))).toEqual(portsOf(packetOf(first[i] ?? again)));
    }
  });

  test("all ports towards one remote can be used, then new flows there are refused", () => {
    outside.close();
    outside = new Outside({ masq_port_min: 61000, masq_port_max: 61015 });
    const outcomes = Array.from({ length: 17 }, (_, i) =>
      outside.leave(packet({ body: { udp: [1000 + i, 53] } })),
    );
    expect(outcomes.map((out) => out.verdict)).toEqual([...Array(16).fill("MASQUERADED"), "DROP_MASQ_PORTS"]);
    expect(new Set(outside.connections().map(({ port }) => port)).size).toBe(16);
    expect(outside.leave(packet({ body: { udp: [1000, 54] } })).verdict).toBe("MASQUERADED");
    // Those that are there are found, however far their search went.
    for (let i = 0; i < 16; i++) {
      const again = outside.leave(packet({ body: { udp: [1000 + i, 53] } }));
      expect(portsOf(packetOf(again))).toEqual(portsOf(packetOf(outcomes[i] ?? again)));
    }
  });

  test("a connection that has ended gives its port to a new one, the oldest first", () => {
    outside.close();
    outside = new Outside({ masq_port_min: 61000, masq_port_max: 61003 });
    const flow = (i: number) => packet({ body: { tcp: [2000 + i, 80] } });
    const ports = Array.from({ length: 4 }, (_, i) => portsOf(packetOf(outside.leave(tcp(flow(i), 2))))[0]);
    for (const i of [2, 0, 1, 3]) outside.leave(tcp(flow(i), 4));
    expect(portsOf(packetOf(outside.leave(tcp(flow(10), 2))))[0]).toBe(ports[2]);
    expect(portsOf(packetOf(outside.leave(tcp(flow(11), 2))))[0]).toBe(ports[0]);
    // Who gave it away gets another.
    expect(portsOf(packetOf(outside.leave(tcp(flow(2), 2))))[0]).toBe(ports[1]);
    expect(outside.connections()).toHaveLength(4);
  });
});

describe("a remote that closed first and remembers it", () => {
  const flow = (i: number) => packet({ body: { tcp: [2000 + i, 80] } });
  const open = (i: number, at: Moment) => portsOf(packetOf(outside.leave(tcp(flow(i), SYN, at))))[0];
  /** Both sides of the flow end; the pod's FIN is at this moment. */
  const end = (i: number, port: number, at: Moment) => {
    outside.arrive(tcp({ source: REMOTE, destination: NODE, body: { tcp: [80, port] } }, FIN | ACK));
    outside.leave(tcp(flow(i), FIN | ACK, at));
  };
  const openFour = (): number[] => {
    outside.close();
    outside = new Outside({ masq_port_min: 61000, masq_port_max: 61003 });
    return Array.from({ length: 4 }, (_, i) => open(i, {}));
  };

  test("gets a later sequence number under each name; if there is none, under the name that ended first", () => {
    const ports = openFour();
    const sequences = [1000, 2000, 3000, 4000];
    for (const i of [3, 1, 0, 2]) end(i, ports[i] ?? 0, { sequence: sequences[i] ?? 0 });
    expect(open(10, { sequence: 2500 })).toBe(ports[1]);
    // The flow that got it has not ended.
    expect(open(11, { sequence: 2500 })).toBe(ports[0]);
    expect(open(12, { sequence: 2500 })).toBe(ports[3]);
    expect(open(13, { sequence: 3002 })).toBe(ports[2]);
  });

  test("counts what the pod's last packet carried, and the numbers go round", () => {
    const ports = openFour();
    end(3, ports[3] ?? 0, { sequence: 5000 });
    end(0, ports[0] ?? 0, { sequence: 2 ** 32 - 6, data: Buffer.alloc(10) });
    // The remote expects number 5 there.
    expect(open(10, { sequence: 5 })).toBe(ports[3]);
    end(10, ports[3] ?? 0, { sequence: 5000 });
    expect(open(11, { sequence: 6 })).toBe(ports[0]);
  });

  test("gets a later time, where both have one, whatever the sequence number", () => {
    const ports = openFour();
    const times = [1000, 2000, 3000, 2 ** 32 - 5];
    for (const i of [2, 1, 3, 0])
      end(i, ports[i] ?? 0, { sequence: 9000, time: times[i] ?? 0, data: Buffer.alloc(3) });
    expect(open(10, { sequence: 1, time: 2001 })).toBe(ports[1]);
    expect(open(11, { sequence: 9999, time: 5 })).toBe(ports[3]);
    expect(open(12, { sequence: 1, time: 5 })).toBe(ports[2]);
    // Without a time the number decides.
    expect(open(13, { sequence: 9005 })).toBe(ports[0]);
  });
});

describe("a new address of the node", () => {
  test("is for new flows, the former one for those there are", () => {
    const old = packetOf(outside.leave(packet()));
    outside.uplink("10.4.7.99", NODE);
    const again = packetOf(outside.leave(packet()));
    expect(again).toEqual(old);
    const fresh = packetOf(outside.leave(packet({ body: { udp: [1001, 53] } })));
    expect(readIp4(fresh).source).toBe("10.4.7.99");
    expect(readIp4(packetOf(outside.arrive(answer(old)))).destination).toBe(POD.address);
    expect(readIp4(packetOf(outside.arrive(answer(fresh)))).destination).toBe(POD.address);
  });

  test("is for all flows once the former one is gone, and a reset for what began there reaches the pod", () => {
    const flows = [ip4(packet()), tcp(packet({ body: { tcp: [1000, 80] } }), ACK)];
    for (const flow of flows) outside.leave(flow);
    outside.uplink("10.4.7.99");
    const [, anew = flows[0]] = flows.map((flow) => {
      const out = outside.leave(flow);
      expect(out.verdict).toBe("MASQUERADED");
      expect(readIp4(packetOf(out)).source).toBe("10.4.7.99");
      expect(packetOf(outside.arrive(answer(packetOf(out))))).toEqual(answer(flow));
      return packetOf(out);
    });
    const [port] = portsOf(anew ?? Buffer.alloc(0));
    const reset = tcp({ source: REMOTE, destination: "10.4.7.99", body: { tcp: [80, port] } }, RST);
    expect(readIp4(packetOf(outside.arrive(reset)))).toMatchObject({
      destination: POD.address,
      intact: true,
    });
  });
});

describe("ICMP errors", () => {
  const bodies: [string, Body][] = [
    ["TCP", { tcp: [40000, 443] }],
    ["UDP", { udp: [40000, 53] }],
    ["echo", { echo: 77 }],
    ["GRE", { protocol: 47, data: Buffer.from("some tunnel") }],
  ];
  const error = (about: Uint8Array, from = "10.9.9.9", to = NODE): Buffer =>
    ip4({ source: from, destination: to, body: { error: [3, 4], about } });

  test.each(bodies)("about a pod's packet reach the pod: %s", (_, body) => {
    const sent = ip4(packet({ body }));
    const left = packetOf(outside.leave(sent));
    for (const bytes of [sent.length, 48, 28]) {
      const out = outside.arrive(error(left.subarray(0, bytes)));
      expect(out.verdict).toBe("MASQUERADED");
      expect(packetOf(out)).toEqual(error(sent.subarray(0, bytes), "10.9.9.9", POD.address));
      expect(readIp4(packetOf(out))).toMatchObject({ intact: true, bodyIntact: true });
    }
  });

  test.each(bodies)("by a pod about what it got show the node's address: %s", (_, body) => {
    const sent = ip4(packet({ body }));
    const left = packetOf(outside.leave(sent));
    const got = answer(sent);
    const out = outside.leave(error(got.subarray(0, 60), POD.address, REMOTE));
    expect(out.verdict).toBe("MASQUERADED");
    expect(packetOf(out)).toEqual(error(answer(left).subarray(0, 60), NODE, REMOTE));
  });

  test("by the node itself about a pod's packet do so too", () => {
    const sent = ip4(packet());
    const left = packetOf(outside.leave(sent));
    const out = outside.leave(error(answer(sent), NODE, REMOTE));
    expect(packetOf(out)).toEqual(error(answer(left), NODE, REMOTE));
  });

  test("about the node's own packets are the node's", () => {
    const bytes = error(ip4({ source: NODE, destination: REMOTE, body: { udp: [500, 53] } }));
    expect(packetOf(outside.arrive(bytes))).toEqual(bytes);
    const own = error(ip4({ source: REMOTE, destination: NODE, body: { udp: [500, 53] } }), NODE, REMOTE);
    expect(packetOf(outside.leave(own))).toEqual(own);
  });
});

describe("fragments", () => {
  const first = packet({ moreFragments: true, id: 5, body: { udp: [1000, 53], data: Buffer.alloc(24, 1) } });
  const later = packet({ fragmentOffset: 4, id: 5, body: { protocol: 17, data: Buffer.alloc(16, 2) } });

  test("leave under one address and one id, which differs from another pod's", () => {
    const [a, b] = [first, later].map((each) => readIp4(packetOf(outside.leave(each))));
    expect(a).toMatchObject({ source: NODE, intact: true });
    expect(b).toMatchObject({ source: NODE, intact: true, id: a?.id });
    const other = readIp4(packetOf(outside.leave({ ...first, source: NEIGHBOUR.address })));
    expect(other.id).not.toBe(a?.id);
  });

  test("of an answer reach the pod when they come in order", () => {
    const left = packetOf(outside.leave(packet()));
    const port = portsOf(left)[0];
    const data = Buffer.alloc(24, 1);
    outside.arrive(
      ip4({ source: REMOTE, destination: NODE, id: 9, moreFragments: true, body: { udp: [53, port], data } }),
    );
    const rest: Packet4 = { ...later, source: REMOTE, destination: NODE, id: 9 };
    const out = outside.arrive(ip4(rest));
    expect(packetOf(out)).toEqual(ip4({ ...rest, destination: POD.address }));
  });

  test("that come before the first one wait, and go in again behind it", () => {
    const left = packetOf(outside.leave(packet()));
    const rest = ip4({ ...later, source: REMOTE, destination: NODE, id: 9 });
    for (let i = 0; i < 3; i++) {
      expect(outside.arrive(rest)).toMatchObject({ action: SHOT, verdict: "HELD" });
    }
    const body: Body = { udp: [53, portsOf(left)[0]], data: Buffer.alloc(24, 1) };
    const start = ip4({ source: REMOTE, destination: NODE, id: 9, moreFragments: true, body });
    expect(outside.arrive(start)).toMatchObject({ action: SHOT, verdict: "RELEASED" });
    expect(outside.node.object.map("held4").entries()).toEqual([]);
    expect(outside.arrive(start)).toMatchObject({ action: NEXT, verdict: "MASQUERADED" });
    expect(outside.arrive(rest)).toMatchObject({ action: NEXT, verdict: "MASQUERADED" });
  });

  test("of a packet for the node are left as they are", () => {
    const start = ip4({ ...first, source: REMOTE, destination: NODE });
    expect(packetOf(outside.arrive(start))).toEqual(start);
    const rest = ip4({ ...later, source: REMOTE, destination: NODE });
    const out = outside.arrive(rest);
    expect([out.action, out.verdict]).toEqual([NEXT, "UNRELATED"]);
    expect(packetOf(out)).toEqual(rest);
  });
});

/** Runs a pinned program on frames, a line of hex each, as soon as a file is there; prints the packets afterwards. */
const RUNNER = `
import { existsSync, readFileSync } from "node:fs";
import { openPinnedProgram } from "${repository}/dist/loader/index.js";
const [pin, frames, go] = process.argv.slice(1);
const program = openPinnedProgram(pin);
const inputs = readFileSync(frames, "utf8").trim().split("\\n").map((line) => Buffer.from(line, "hex"));
const ctx = Buffer.alloc(192);
ctx.writeUInt32LE(1, 40);
console.log("ready");
while (!existsSync(go));
const outputs = inputs.map((data) => program.testRun({ data, ctx }).data);
console.log(JSON.stringify(outputs.map((data) => Buffer.from(data).toString("hex"))));
`;

/** What both processors make of the same frames, each of them, when they start at once. */
async function atOnce(frames: readonly Uint8Array[]): Promise<string[][]> {
  const directory = mkdtempSync(join(tmpdir(), "twill-race-"));
  const pin = `/sys/fs/bpf/twill-race-${process.pid}`;
  const runners: Process[] = [];
  try {
    outside.node.object.program("test_to_net").pin(pin);
    const lines = frames.map((bytes) => Buffer.from(bytes).toString("hex"));
    writeFileSync(join(directory, "frames"), lines.join("\n"));
    for (let i = 0; i < 2; i++) {
      const files = [join(directory, "frames"), join(directory, "go")];
      runners.push(new Process(["node", "--input-type=module", "-e", RUNNER, pin, ...files]));
    }
    await Promise.all(runners.map((runner) => runner.line(/^ready$/)));
    writeFileSync(join(directory, "go"), "");
    const said = await Promise.all(runners.map((runner) => runner.line(/^\[.*\]$/, { timeout: 60_000 })));
    return said.map(([line]) => JSON.parse(line) as string[]);
  } finally {
    for (const runner of runners) await runner.stop();
    rmSync(pin, { force: true });
    rmSync(directory, { recursive: true, force: true });
  }
}

describe("two processors", () => {
  const leaving = (bytes: Uint8Array) => frame(OTHER_MAC, LO_MAC, bytes);

  test("that open the same flows at once agree on each of them", async () => {
    outside.close();
    outside = new Outside({ masq_port_min: 60000 }, 8192);
    const flows = Array.from({ length: 4000 }, (_, i) => packet({ body: { udp: [1 + i, 53] } }));
    const [one, two] = await atOnce(flows.map((flow) => leaving(ip4(flow))));
    expect(one).toHaveLength(4000);
    expect(two).toEqual(one);
    expect(outside.connections()).toHaveLength(4000);
  }, 60_000);

  test("that take over the ports of connections that have ended give no port to two flows", async () => {
    outside.close();
    outside = new Outside({ masq_port_min: 61000, masq_port_max: 61511 }, 1024);
    const flow = (port: number) => packet({ body: { tcp: [port, 80] } });
    let used = 0;
    for (let i = 0; outside.leave(tcp(flow(1000 + i), SYN)).verdict === "MASQUERADED"; i++) used++;
    expect(used).toBeGreaterThan(450);
    for (let i = 0; i < used; i++) outside.leave(tcp(flow(1000 + i), RST));
    // Fewer than there are ports, so that each can have one for good.
    const fresh = Array.from({ length: 200 }, (_, i) => flow(30000 + i));
    const [one, two] = await atOnce(fresh.map((each) => leaving(tcp(each, SYN))));
    expect(two).toEqual(one);
    const live = outside.connections().filter(({ state }) => state === "CONNECTION_NEW");
    expect(new Set(live.map(({ podPort }) => podPort)).size).toBe(200);
    expect(live).toHaveLength(200);
    expect(new Set(live.map(({ port }) => port)).size).toBe(200);
    for (const each of fresh) expect(outside.leave(tcp(each, ACK)).verdict).toBe("MASQUERADED");
    expect(outside.connections().filter(({ state }) => state === "CONNECTION_NEW")).toHaveLength(200);
  }, 60_000);
});

describe("a table made anew", () => {
  test("takes the connections of the former one, and finds them by their pods", () => {
    const flows = Array.from({ length: 200 }, (_, i) => packet({ body: { tcp: [2000 + i, 80] } }));
    const before = flows.map((flow) => packetOf(outside.leave(flow)));
    outside.arrive(ip4({ source: REMOTE, destination: POD.address, body: { udp: [5000, 80] } }));
    const rows = outside.node.object.map("connections4").entries();
    const larger = new Outside({}, 8192);
    try {
      for (let at = 0; at < rows.length; at += Limit.RESTORE_STEP) {
        const step = rows.slice(at, at + Limit.RESTORE_STEP).flat();
        const data = Buffer.concat([Buffer.alloc(Limit.RESTORE_START), ...step]);
        larger.node.object.program("restore").testRun({ data, dataOutSize: 0 });
      }
      expect(larger.connections()).toHaveLength(201);
      expect(flows.map((flow) => packetOf(larger.leave(flow)))).toEqual(before);
      const reply = packet({ body: { udp: [80, 5000] } });
      expect(packetOf(larger.leave(reply))).toEqual(ip4(reply));
      expect(larger.connections()).toHaveLength(201);
    } finally {
      larger.close();
    }
  });
});

describe("connections expire", () => {
  const left = (): number => {
    let count = 0;
    for (const batch of outside.node.object.map("connections4").batches()) count += batch.length;
    return count;
  };
  const short = { ...TIMEOUTS, udp_new: 1, udp_established: 1 };

  test("100,000 of them, by the kernel alone, and those that live stay", async () => {
    outside.close();
    outside = new Outside({ timeouts: short, masq_port_min: 1024 }, 131072);
    outside.leave(tcp(packet({ body: { tcp: [1, 80] } }), 2));
    for (let i = 0; i < 100_000; i++) {
      outside.node.push("to_net", ip4(packet({ destination: `11.${i >> 16}.${(i >> 8) & 255}.${i & 255}` })));
    }
    expect(left()).toBe(100_001);
    expect(outside.expire()).toBe(0);
    await until("all but one to expire", () => left() === 1, { timeout: 60_000 });
    expect(outside.connections()).toMatchObject([{ protocol: 6 }]);
    // Starting what runs already is as good.
    expect(outside.expire()).toBe(0);
    // The room is there again, and so is the place to remember how far a search goes.
    const again = portsOf(packetOf(outside.leave(packet())))[0];
    expect(again).toBeGreaterThanOrEqual(1024);
    await until("that one to expire", () => left() === 1);
  }, 120_000);

  test("a census of those that live is taken on the way", async () => {
    outside.close();
    outside = new Outside({ timeouts: { ...TIMEOUTS, tcp_closed: 3600 } });
    const census = codec(maps.census4.value);
    const last = () => {
      const bytes = outside.node.object.map("census4").lookup(Buffer.alloc(4));
      return bytes === undefined ? undefined : census.decode(bytes);
    };
    const none = { opening: 0, established: 0, closing: 0, closed: 0 };
    expect(last()?.at_ns).toBe(0n);
    for (let i = 0; i < 700; i++) outside.leave(tcp(packet({ body: { tcp: [2000 + i, 80] } }), 2));
    for (let i = 0; i < 5; i++) outside.leave(tcp(packet({ body: { tcp: [5000 + i, 80] } }), 4));
    const sent = outside.leave(packet({ body: { udp: [7, 53] } }));
    outside.arrive(answer(packetOf(sent)));
    outside.leave(packet({ body: { udp: [7, 53] } }));
    outside.leave(packet({ body: { echo: 9 } }));
    outside.leave(packet({ body: { protocol: 47, data: Buffer.alloc(8) } }));
    expect(outside.expire()).toBe(0);
    const counted = {
      tcp: { ...none, opening: 700, closed: 5 },
      udp: { ...none, established: 1 },
      icmp: { ...none, opening: 1 },
      other: { ...none, opening: 1 },
    };
    await until("the sweep to have counted all", () => {
      const found = last();
      return found !== undefined && isDeepStrictEqual({ ...found, ...counted }, found);
    });
    // Each flow's candidates are its own: few have to go beyond the first.
    expect(last()?.furthest).toBeGreaterThanOrEqual(1);
    expect(last()?.furthest).toBeLessThan(Limit.CANDIDATES_MAX);
    const { at_ns: at = 0n } = last() ?? {};
    await until("the next round", () => (last()?.at_ns ?? 0n) > at);
    expect(last()).toMatchObject(counted);
  });

  test("one that both sides closed is remembered for longer, unless the table is half full", async () => {
    outside.close();
    const timeouts = { ...TIMEOUTS, tcp_closed: 1, tcp_time_wait: 3600 };
    outside = new Outside({ timeouts }, 64);
    const flow = (i: number) => packet({ body: { tcp: [2000 + i, 80] } });
    const states = () => outside.connections().map(({ state }) => state);
    const [port] = portsOf(packetOf(outside.leave(tcp(flow(0), SYN))));
    outside.leave(tcp(flow(0), FIN | ACK));
    outside.arrive(tcp({ source: REMOTE, destination: NODE, body: { tcp: [80, port] } }, FIN | ACK));
    outside.leave(tcp(flow(1), RST));
    expect(states()).toEqual(["CONNECTION_CLOSED", "CONNECTION_CLOSED"]);
    expect(outside.expire()).toBe(0);
    await until("the one that was reset to go", () => left() === 1);
    expect(outside.connections()).toMatchObject([{ port }]);
    for (let i = 2; i < 35; i++) outside.leave(tcp(flow(i), SYN));
    await until("the other to go for the many", () => left() === 33);
    expect(new Set(states())).toEqual(new Set(["CONNECTION_NEW"]));
  });

  test("those under an address that is lent no more go like those that one side has ended, and no others with them", async () => {
    outside.close();
    outside = new Outside({ timeouts: { ...TIMEOUTS, tcp_new: 3600, tcp_closing: 1 } });
    const open = (i: number) => outside.leave(tcp(packet({ body: { tcp: [2000 + i, 80] } }), SYN));
    const inbound = { source: REMOTE, destination: POD.address, body: { tcp: [80, 5000] } } as const;
    outside.arrive(tcp(inbound, SYN));
    open(0);
    outside.uplink("10.4.7.98", NODE);
    open(1);
    outside.uplink("10.4.7.99", "10.4.7.98");
    open(2);
    expect(left()).toBe(4);
    expect(outside.expire()).toBe(0);
    await until("the one under the first address to go", () => left() === 3);
    const addresses = outside.connections().map(({ address }) => address);
    expect(addresses.sort()).toEqual(["10.4.7.98", "10.4.7.99", POD.address]);
    // An interface without any address for the moment says nothing of those it had.
    outside.node.object.map("uplinks4").delete(Buffer.from([1, 0, 0, 0]));
    const rounds = codec(maps.census4.value);
    const at = () =>
      rounds.decode(outside.node.object.map("census4").lookup(Buffer.alloc(4)) ?? Buffer.alloc(0)).at_ns;
    const before = at();
    await until("three rounds of the sweep", () => at() - before > 3_000_000_000n);
    expect(left()).toBe(3);
  });

  test("when the table is full, those that have ended go at once", async () => {
    outside.close();
    outside = new Outside({ timeouts: { ...TIMEOUTS, tcp_closed: 3600 } }, 64);
    for (let i = 0; i < 64; i++) outside.leave(tcp(packet({ body: { tcp: [2000 + i, 80] } }), 4));
    expect(left()).toBe(64);
    const late = packet({ destination: "11.0.0.1" });
    expect(outside.leave(late).verdict).toBe("DROP_MASQ_FULL");
    expect(outside.expire()).toBe(0);
    await until("room", () => left() === 0);
    expect(outside.leave(late).verdict).toBe("MASQUERADED");
  });
});

const octet = fc.integer({ min: 0, max: 255 });
const remotes = fc.tuple(octet, octet, octet).map(([a, b, c]) => `${11 + (a % 100)}.${b}.${c}.1`);
const port = fc.integer({ min: 1, max: 65535 });
const data = fc.uint8Array({ maxLength: 200 });
const bodies: fc.Arbitrary<Body> = fc.oneof(
  fc.record({ udp: fc.tuple(port, port), data }),
  fc.record({ tcp: fc.tuple(port, port), data }),
  fc.record({ echo: port, data }),
  fc.record({ protocol: fc.constantFrom(4, 47, 50, 51, 89), data }),
  fc.uint8Array({ minLength: 12, maxLength: 60 }).map((sctp) => ({ protocol: 132, data: sctp })),
);
const packets: fc.Arbitrary<Packet4> = fc.record({
  source: octet.map((last) => `172.7.21.${2 + (last % 250)}`),
  destination: remotes,
  body: bodies,
  tos: octet,
  id: fc.integer({ min: 0, max: 65535 }),
  ttl: fc.integer({ min: 1, max: 255 }),
  dontFragment: fc.boolean(),
  options: fc.constantFrom(new Uint8Array(), Uint8Array.of(1, 1, 1, 1), Uint8Array.of(148, 4, 0, 0)),
});

describe("of all packets", () => {
  test("reverse(forward(packet)) = packet, and every checksum holds", () => {
    fc.assert(
      fc.property(packets, (each) => {
        const sent = ip4(each);
        const out = outside.leave(sent);
        // Two pods may not speak to one remote by a protocol without ports; all else has room.
        if (out.verdict === "DROP_MASQ_PORTS") return;
        expect(out.verdict).toBe("MASQUERADED");
        const left = packetOf(out);
        expect(readIp4(left)).toMatchObject({ source: NODE, intact: true });
        if (!("protocol" in each.body)) expect(readIp4(left).bodyIntact).toBe(true);
        expect(packetOf(outside.leave(sent))).toEqual(left);
        expect(packetOf(outside.arrive(answer(left)))).toEqual(answer(sent));
        // An error about it finds back as well, and is right throughout.
        const about = left.subarray(0, left.length - (left.length % 2));
        const error = ip4({ source: each.destination, destination: NODE, body: { error: [11, 0], about } });
        const back = packetOf(outside.arrive(error));
        expect(readIp4(back)).toMatchObject({ destination: each.source, intact: true, bodyIntact: true });
        expect(readIp4(back).body.subarray(8)).toEqual(sent.subarray(0, about.length));
      }),
      { numRuns: 1500 },
    );
  });

  test("an ICMP error that a pod sends shows the node's address in what it is about, and is right", () => {
    fc.assert(
      fc.property(
        packets,
        fc.constantFrom([3, 3], [3, 4], [11, 1], [12, 0]),
        (each, [type = 3, code = 3]) => {
          const sent = ip4(each);
          const out = outside.leave(sent);
          if (out.verdict === "DROP_MASQ_PORTS") return;
          const got = answer(sent);
          const length = Math.min(got.length - (got.length % 2), 92);
          const error = (about: Uint8Array, source: string): Buffer =>
            ip4({ source, destination: each.destination, body: { error: [type, code], about } });
          const left = outside.leave(error(got.subarray(0, length), each.source));
          expect(left.verdict).toBe("MASQUERADED");
          expect(packetOf(left)).toEqual(error(answer(packetOf(out)).subarray(0, length), NODE));
        },
      ),
      {
        numRuns: 500,
        // The answer's checksum is 0.
        examples: [
          [
            { source: "172.7.21.6", destination: "11.0.0.1", body: { echo: 65534, data: new Uint8Array() } },
            [3, 3],
          ],
        ],
      },
    );
  });

  test("the fragments of a datagram are one datagram outside, and those of its answer are the pod's, in any order", () => {
    const datagrams = fc.record({
      source: octet.map((last) => `172.7.21.${2 + (last % 250)}`),
      destination: remotes,
      ports: fc.tuple(port, port),
      data: fc.uint8Array({ minLength: 100, maxLength: 600 }),
      id: fc.integer({ min: 0, max: 65535 }),
      withChecksum: fc.boolean(),
      seed: fc.integer(),
    });
    const cut = (whole: Buffer, size: number): Buffer[] => {
      const pieces: Buffer[] = [];
      const { body, source, destination, id, protocol } = readIp4(whole);
      for (let at = 0; at < body.length; at += size) {
        const moreFragments = at + size < body.length;
        const bytes = { protocol, data: body.subarray(at, at + size) };
        pieces.push(ip4({ source, destination, id, moreFragments, fragmentOffset: at / 8, body: bytes }));
      }
      return pieces;
    };
    const join = (pieces: readonly Buffer[]): Buffer => {
      const [start] = pieces;
      if (start === undefined) throw new Error("no fragments");
      const { source, destination, id, protocol } = readIp4(start);
      for (const piece of pieces)
        expect(readIp4(piece)).toMatchObject({ source, destination, id, intact: true });
      const at = (piece: Buffer) => piece.readUInt16BE(6) & 0x1fff;
      const ordered = [...pieces].sort((a, b) => at(a) - at(b)).map((piece) => readIp4(piece).body);
      return ip4({ source, destination, id, body: { protocol, data: Buffer.concat(ordered) } });
    };
    let number = 0;
    fc.assert(
      fc.property(datagrams, ({ source, destination, ports, data, id, withChecksum, seed }) => {
        const sent = ip4({ source, destination, id, body: { udp: ports, data } });
        if (!withChecksum) sent.writeUInt16BE(0, 26);
        const outcomes = cut(sent, 64).map((piece) => outside.leave(piece));
        expect(outcomes.every(({ verdict }) => verdict === "MASQUERADED")).toBe(true);
        const left = join(outcomes.map(packetOf));
        expect(readIp4(left)).toMatchObject({ source: NODE, destination, bodyIntact: true });
        expect(readIp4(left).body.subarray(8)).toEqual(readIp4(sent).body.subarray(8));

        // An id each, as the notes of one datagram are not for another.
        const back = answer(left);
        back.writeUInt16BE(number++ & 0xffff, 4);
        const wanted = Buffer.from(answer(sent));
        wanted.writeUInt16BE(back.readUInt16BE(4), 4);
        const whole = (bytes: Buffer) => join(cut(bytes, 64));
        const pieces = cut(back, 64);
        const [first] = pieces;
        const shuffled = pieces
          .map((piece, index) => ({ piece, rank: Math.imul(seed ^ index, 0x9e3779b1) }))
          .sort((a, b) => a.rank - b.rank)
          .map(({ piece }) => piece);
        const early = shuffled.slice(0, shuffled.indexOf(first ?? Buffer.alloc(0)));
        for (const piece of early) expect(outside.arrive(piece).verdict).toBe("HELD");
        if (early.length > 0) expect(outside.arrive(first ?? Buffer.alloc(0)).verdict).toBe("RELEASED");
        expect(outside.node.object.map("held4").entries()).toEqual([]);
        // What was released goes in once more, the first one in front.
        const again = [first ?? Buffer.alloc(0), ...early, ...shuffled.slice(early.length + 1)];
        const arrived = again.map((piece) => outside.arrive(piece));
        expect(arrived.every(({ verdict }) => verdict === "MASQUERADED")).toBe(true);
        expect(join(arrived.map(packetOf))).toEqual(whole(wanted));
      }),
      { numRuns: 200 },
    );
  });

  test("the same of aggregates, of which each segment has to come out right", () => {
    const aggregates = fc.record({
      ports: fc.tuple(port, port),
      isTcp: fc.boolean(),
      data: fc.uint8Array({ minLength: 600, maxLength: 3000 }),
      gsoSize: fc.integer({ min: 100, max: 500 }),
    });
    fc.assert(
      fc.property(aggregates, remotes, ({ ports, isTcp, data, gsoSize }, destination) => {
        const body: Body = isTcp ? { tcp: ports, data } : { udp: ports, data };
        const sent = ip4(packet({ destination, body }));
        const out = outside.leave(sent, { gsoSize });
        expect([out.action, out.verdict]).toEqual([NEXT, "MASQUERADED"]);
        const left = packetOf(out);
        expect(readIp4(left)).toMatchObject({ source: NODE, intact: true, bodyIntact: true });
        const back = outside.arrive(answer(left), { gsoSize });
        expect(packetOf(back)).toEqual(answer(sent));
      }),
      { numRuns: 200 },
    );
  });

  test("no two live flows have one name outside, while connections end and give their ports away", () => {
    outside.close();
    outside = new Outside({ masq_port_min: 61000, masq_port_max: 61007 });
    const steps = fc.record({
      source: fc.constantFrom(POD.address, NEIGHBOUR.address),
      port: fc.integer({ min: 2000, max: 2009 }),
      flags: fc.constantFrom(SYN, SYN, ACK, RST),
    });
    const names = new Map<string, number>();
    let refused = 0;
    let takenOver = 0;
    const ended = new Map<number, string>();
    fc.assert(
      fc.property(steps, ({ source, port, flags }) => {
        const flow = `${source} ${port}`;
        const known = names.get(flow);
        // A connection that nobody began begins with a SYN here.
        if (known === undefined && flags !== SYN) return;
        const out = outside.leave(tcp({ source, destination: "11.1.1.1", body: { tcp: [port, 80] } }, flags));
        if (out.verdict === "DROP_MASQ_PORTS") {
          // Only a new flow is refused, and only when all ports live.
          expect(known).toBeUndefined();
          expect(ended.size).toBe(0);
          refused++;
          return;
        }
        const [name] = portsOf(packetOf(out));
        if (known !== undefined) {
          expect(name).toBe(known);
        } else {
          const former = ended.get(name);
          if (former !== undefined) {
            names.delete(former);
            takenOver++;
          }
          expect([...names.values()]).not.toContain(name);
          names.set(flow, name);
        }
        if (flags === RST) ended.set(name, flow);
        else if (flags === SYN) ended.delete(name);
        else expect(outside.connections().filter(({ port }) => port === name)).toHaveLength(1);
      }),
      { numRuns: 3000 },
    );
    expect(refused).toBeGreaterThan(0);
    expect(takenOver).toBeGreaterThan(0);
  });

  test("no two live flows have one name outside", () => {
    const few = fc.record({
      source: octet.map((last) => `172.7.21.${2 + (last % 8)}`),
      destination: fc.constantFrom("11.1.1.1", "11.1.1.2"),
      body: fc.oneof(
        fc.record({ udp: fc.tuple(fc.integer({ min: 60990, max: 61040 }), fc.constantFrom(53, 54)) }),
        fc.record({ tcp: fc.tuple(fc.integer({ min: 60990, max: 61040 }), fc.constantFrom(80)) }),
        fc.record({ echo: fc.integer({ min: 60990, max: 61040 }) }),
      ),
    });
    outside.close();
    outside = new Outside({ masq_port_min: 61000, masq_port_max: 61127 });
    const names = new Map<string, string>();
    const flows = new Map<string, string>();
    fc.assert(
      fc.property(few, (each) => {
        const out = outside.leave(each);
        if (out.verdict === "DROP_MASQ_PORTS") return;
        const { protocol } = readIp4(packetOf(out));
        const name = `${each.destination} ${protocol} ${portsOf(packetOf(out))}`;
        const flow = `${each.source} ${each.destination} ${protocol} ${portsOf(ip4(each))}`;
        expect(names.get(name) ?? flow).toBe(flow);
        expect(flows.get(flow) ?? name).toBe(name);
        names.set(name, flow);
        flows.set(flow, name);
      }),
      { numRuns: 3000 },
    );
    expect(names.size).toBeGreaterThan(300);
    expect(outside.connections()).toHaveLength(names.size);
  });
});
