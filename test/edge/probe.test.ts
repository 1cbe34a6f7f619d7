/** ICMP echo between two real hosts, and what else may come in its place. */
import { closeSync, openSync } from "node:fs";
import { afterAll, beforeAll, expect, test } from "vitest";
import { openLibrary } from "../../loader/ffi.ts";
import { parseIpv4 } from "../../src/core/ipv4.ts";
import type { Prober } from "../../src/core/world.ts";
import { openProber, ProbeError } from "../../src/edge/probe.ts";
import { createLab, type Host, type Lab, type Process } from "../lab.ts";

const CLONE_NEWNET = 0x40000000;
const setns = openLibrary("libc.so.6").prepare("setns", "int", ["int", "int"]);
const DEADLINE_MS = 5000;
const address = (text: string): number => parseIpv4(text) ?? 0;
const [US, PEER, OTHER] = ["10.4.7.21", "10.4.7.22", "10.4.7.23"].map(address) as [number, number, number];

let lab: Lab;
let h1: Host;
let h2: Host;

/** A socket belongs to the namespace that it was opened in. */
function openThere(source: number): Prober {
  const home = openSync("/proc/thread-self/ns/net", "r");
  const there = openSync(h1.path, "r");
  try {
    setns(there, CLONE_NEWNET);
    return openProber(source);
  } finally {
    setns(home, CLONE_NEWNET);
    closeSync(home);
    closeSync(there);
  }
}

beforeAll(async () => {
  lab = await createLab();
  h1 = await lab.host("h1", { address: "10.4.7.21/24", gateway: undefined });
  h2 = await lab.host("h2", { address: "10.4.7.22/24", gateway: undefined });
  await h2.ip("address add 10.4.7.23/24 dev eth0");
});

afterAll(() => lab?.close());

/** Answers each echo on h2 in the kernel's place: with everything that is wrong, and then, if told, as it should. */
async function impostor(honest: boolean): Promise<Process> {
  await h2.sysctl({ "net.ipv4.icmp_echo_ignore_all": 1 });
  const script = `
import os, socket, struct
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
def checksum(b):
    n = sum(struct.unpack("!%dH" % (len(b) // 2), b + b"\\0" * (len(b) % 2)))
    while n > 0xffff: n = (n & 0xffff) + (n >> 16)
    return ~n & 0xffff
def send(source, kind, code, ident, number, payload):
    o = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    o.bind((source, 0))
    b = struct.pack("!BBHHH", kind, code, 0, ident & 0xffff, number & 0xffff) + payload
    o.sendto(b[:2] + struct.pack("!H", checksum(b + b"\\0" * (len(b) % 2))) + b[4:], ("10.4.7.21", 0))
    o.close()
print("ready", flush=True)
while True:
    p = s.recv(65536)
    i = p[(p[0] & 15) * 4:]
    if i[0] != 8: continue
    ident, number = struct.unpack("!HH", i[4:8])
    c = i[8:]
    us = "10.4.7.22"
    send("10.4.7.23", 0, 0, ident, number, c)
    send(us, 0, 0, ident + 1, number, c)
    send(us, 0, 0, ident, number + 1, c)
    send(us, 0, 0, ident, number, os.urandom(len(c)))
    send(us, 0, 0, ident, number, c[:-1])
    send(us, 0, 0, ident, number, b"")
    send(us, 0, 0, ident, number, c + b"\\0")
    send(us, 0, 0, ident, number, c * 2000)
    send(us, 0, 1, ident, number, c)
    send(us, 3, 1, ident, number, c)
    for _ in range(100): send(us, 0, 0, ident, number - 1, c)
    print("forged", flush=True)
    if ${honest ? "True" : "False"}:
        send(us, 0, 0, ident, number, c)
        send(us, 0, 0, ident, number, c)
`;
  const process = h2.spawn(["/usr/bin/python3", "-c", script]);
  await process.line(/^ready$/);
  return process;
}

test("a peer answers, each question for itself, and one that is not there does not", async () => {
  const prober = openThere(US);
  try {
    const capture = await h1.capture("eth0", "icmp");
    const answers = await Promise.all(
      [PEER, OTHER, PEER, OTHER].map((target) => prober.probe(target, DEADLINE_MS)),
    );
    for (const answer of answers) {
      expect(answer).toEqual({ rttMs: expect.any(Number) });
      if ("rttMs" in answer) expect(answer.rttMs).toBeGreaterThan(0);
    }
    await capture.stop();
    expect(capture.frames()).toHaveLength(8);
    expect(await prober.probe(address("10.4.7.99"), 20)).toEqual({ lost: "no answer within 20 ms" });
    expect(await prober.probe(address("10.9.9.9"), DEADLINE_MS)).toEqual({
      lost: expect.stringMatching(/^cannot be sent: .*unreachable \(ENETUNREACH\)$/),
    });
    const many = await Promise.all(Array.from({ length: 100 }, () => prober.probe(PEER, DEADLINE_MS)));
    expect(many.filter((answer) => "rttMs" in answer)).toHaveLength(100);
  } finally {
    prober.close();
  }
  expect(await prober.probe(PEER, DEADLINE_MS)).toEqual({ lost: "the probe was ended" });
});

test("what came in time counts, though this thread was busy until long after", async () => {
  const prober = openThere(US);
  try {
    const answer = prober.probe(PEER, 20);
    const until = performance.now() + 300;
    while (performance.now() < until);
    const { rttMs } = (await answer) as { rttMs: number };
    // By the kernel's stamp, not by when we came to look.
    expect(rttMs).toBeLessThan(300);
  } finally {
    prober.close();
  }
});

test("nothing but the answer to the question counts as one", async () => {
  const prober = openThere(US);
  let liar = await impostor(false);
  try {
    const answer = prober.probe(PEER, 2000);
    await liar.line(/^forged$/);
    expect(await answer).toEqual({ lost: "no answer within 2000 ms" });
    await liar.stop();
    liar = await impostor(true);
    expect(await prober.probe(PEER, 30_000)).toEqual({ rttMs: expect.any(Number) });
  } finally {
    prober.close();
    await liar.stop();
    await h2.sysctl({ "net.ipv4.icmp_echo_ignore_all": 0 });
  }
});

test("an end answers what is open, and an address of another is refused with a reason", async () => {
  const prober = openThere(US);
  const answer = prober.probe(address("10.4.7.99"), DEADLINE_MS);
  prober.close();
  prober.close();
  expect(await answer).toEqual({ lost: "the probe was ended" });
  expect(() => openThere(PEER)).toThrow(ProbeError);
  expect(() => openThere(PEER)).toThrow(/^cannot send from 10\.4\.7\.22: .*EADDRNOTAVAIL/);
});
