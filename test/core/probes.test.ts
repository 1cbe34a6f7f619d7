/** Whose turn it is to be probed, and what is made of the answers. */
import { describe, expect, test } from "vitest";
import { type PeerHealth, PeerProbes, PROBES_PER_SECOND, UNREACHABLE_AFTER } from "../../src/core/probes.ts";

const peer = (n: number) => ({
  subnet: { address: 0xac070000 + n * 256, length: 24 },
  publicIp: 0x0a040000 + n,
  target: 0xac070000 + n * 256,
});

function probesOf(count: number, periodMs = 10_000): PeerProbes {
  const probes = new PeerProbes(periodMs);
  for (let n = 0; n < count; n++) probes.want(`${n}`, peer(n));
  return probes;
}

function ask(probes: PeerProbes): PeerHealth {
  const asked = probes.next();
  if (asked === undefined) throw new Error("it is nobody's turn");
  return asked;
}

/** Turns a second, on average. */
const rate = (probes: PeerProbes): number => (1000 * probes.together) / probes.pauseMs(0.5);

const healthOf = (probes: PeerProbes, key: string): PeerHealth | undefined =>
  [...probes.peers()].find((each) => each.key === key);

describe("whose turn it is", () => {
  test("each peer once in a round", () => {
    const probes = probesOf(100);
    const seen = Array.from({ length: 100 }, () => {
      const asked = ask(probes);
      probes.answered(asked, 1, 0);
      return asked.key;
    });
    expect(new Set(seen).size).toBe(100);
    expect(ask(probes).key).toBe(seen[0]);
  });

  test("the rate has an upper limit, whatever the number of peers", () => {
    // On average of the jitter, which is 0.5 to 1.5.
    expect(probesOf(2).pauseMs(0.5)).toBe(5000);
    expect(rate(probesOf(10_000))).toBeCloseTo(PROBES_PER_SECOND);
    expect(rate(probesOf(60_000, 1000))).toBeCloseTo(PROBES_PER_SECOND);
    expect(probesOf(2).pauseMs(0)).toBe(2500);
    expect(probesOf(2).pauseMs(0.999999)).toBeCloseTo(7500, 0);
    expect(probesOf(0).pauseMs(0.5)).toBe(10_000);
    // Nor does it rise without limit when no peer answers.
    const probes = probesOf(10_000);
    for (let n = 0; n < 10_000; n++) probes.lost(ask(probes), "no answer");
    expect(rate(probes)).toBeCloseTo(PROBES_PER_SECOND);
  });

  test("of many peers, some are asked together, so that we wake up a few times a second", () => {
    expect(probesOf(2).together).toBe(1);
    expect(probesOf(100).together).toBe(2);
    for (const count of [60, 130, 400, 10_000]) {
      expect(probesOf(count).pauseMs(0.5)).toBeGreaterThan(100);
      expect(rate(probesOf(count))).toBeCloseTo(Math.min(PROBES_PER_SECOND, count / 10));
    }
  });

  test("a peer that did not answer has every other turn, and only one question at a time is open", () => {
    const probes = probesOf(50);
    const first = ask(probes);
    probes.lost(first, "no answer");
    const keys = Array.from({ length: 20 }, () => {
      const asked = ask(probes);
      if (asked.key === first.key) probes.lost(asked, "no answer");
      else probes.answered(asked, 1, 0);
      return asked.key;
    });
    expect(keys.filter((key) => key === first.key)).toHaveLength(10);
    const one = probesOf(1);
    const open = ask(one);
    expect(one.next()).toBeUndefined();
    one.lost(open, "no answer");
    expect(ask(one)).toBe(open);
  });

  test("peers may come and go at any time", () => {
    const probes = probesOf(3);
    const asked = ask(probes);
    probes.unwant(asked.key);
    expect(probes.answered(asked, 1, 0)).toBe(false);
    expect(probes.lost(asked, "no answer")).toBe(false);
    expect(probes.counts).toEqual({ reachable: 0, unreachable: 0, unknown: 2 });
    probes.want("new", peer(9));
    const keys = new Set<string>();
    for (let n = 0; n < 6; n++) {
      const each = ask(probes);
      probes.answered(each, 1, 0);
      keys.add(each.key);
    }
    expect(keys).toEqual(new Set(["1", "2", "new"]));
    for (const key of keys) probes.unwant(key);
    expect(probes.next()).toBeUndefined();
    expect(probes.counts).toEqual({ reachable: 0, unreachable: 0, unknown: 0 });
  });
});

describe("what is made of the answers", () => {
  test("unreachable after some losses in a row, reachable with one answer, each told once", () => {
    const probes = probesOf(1);
    const told: boolean[] = [];
    for (let n = 0; n < UNREACHABLE_AFTER + 2; n++) told.push(probes.lost(ask(probes), `reason ${n}`));
    expect(told).toEqual([false, false, true, false, false]);
    expect(healthOf(probes, "0")).toMatchObject({ state: "unreachable", losses: 5, reason: "reason 4" });
    expect(probes.counts).toEqual({ reachable: 0, unreachable: 1, unknown: 0 });
    expect(probes.answered(ask(probes), 2, 77)).toBe(true);
    expect(probes.answered(ask(probes), 10, 78)).toBe(false);
    expect(healthOf(probes, "0")).toMatchObject({
      ...{ state: "reachable", losses: 0, reason: undefined, rttMs: 10, smoothedMs: 3, answeredAt: 78 },
    });
    // Single losses change nothing.
    for (let n = 0; n < 20; n++) {
      expect(probes.lost(ask(probes), "no answer")).toBe(false);
      expect(probes.answered(ask(probes), 10, 79)).toBe(false);
    }
    expect(probes.counts).toEqual({ reachable: 1, unreachable: 0, unknown: 0 });
  });

  test("what is known of a peer stays until its address is another", () => {
    const probes = probesOf(1);
    probes.answered(ask(probes), 2, 77);
    probes.want("0", peer(0));
    expect(healthOf(probes, "0")).toMatchObject({ state: "reachable", rttMs: 2 });
    const open = ask(probes);
    probes.want("0", { ...peer(0), publicIp: 0x0a040999 });
    expect(healthOf(probes, "0")).toMatchObject({ state: "unknown", rttMs: undefined });
    // The answer to the former question says nothing of the new peer.
    expect(probes.answered(open, 2, 78)).toBe(false);
    expect(healthOf(probes, "0")).toMatchObject({ state: "unknown", rttMs: undefined });
    expect(probes.counts).toEqual({ reachable: 0, unreachable: 0, unknown: 1 });
  });
});
