import * as fc from "fast-check";
import { describe, expect, test } from "vitest";
import {
  claim,
  type Desired,
  emptyDesired,
  fold,
  foldInSteps,
  forget,
  LEASES_MAX,
} from "../../src/core/desired.ts";
import { contains, formatIpv4, overlaps, parseCidr, parseIpv4 } from "../../src/core/ipv4.ts";
import { formatLeaseKey, parseLeaseKey } from "../../src/core/lease.ts";
import type { StoreEvent } from "../../src/core/model.ts";

const CONFIG = `{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan"}}`;
const ip = (text: string): number => parseIpv4(text) ?? Number.NaN;
const value = (publicIp: string): string => `{"PublicIP":"${publicIp}","BackendType":"host-gw"}`;

let revision = 0n;
const put = (key: string, text: string): StoreEvent => {
  revision += 1n;
  return { kind: "put", key, value: text, revision, leaseId: "7" };
};
const lease = (key: string, publicIp: string): StoreEvent => put(`subnets/${key}`, value(publicIp));
const gone = (key: string): StoreEvent => {
  revision += 1n;
  return { kind: "delete", key, revision };
};
const reset: StoreEvent = { kind: "reset" };
const synced = (): StoreEvent => ({ kind: "synced", revision });

const foldAll = (desired: Desired, ...events: StoreEvent[]): Desired => events.reduce(fold, desired);
const started = (...events: StoreEvent[]): Desired =>
  foldAll(emptyDesired(), reset, put("config", CONFIG), ...events, synced());
const keys = (desired: Desired): string[] => [...desired.leases.keys()].sort();
const reasons = (desired: Desired): Record<string, string> =>
  Object.fromEntries([...desired.rejections].map(([key, { reason }]) => [key, reason]));

describe("snapshots", () => {
  test("a large one is put in force some leases at a time, and is synced with the last", () => {
    const many = Array.from({ length: 3500 }, (_, n) =>
      lease(`10.${(n >> 8) + 1}.${n & 255}.0-24`, `172.16.${n >> 8}.${n & 255}`),
    );
    const wide = put("config", `{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}`);
    const before = foldAll(emptyDesired(), reset, wide, ...many);
    const seen: (readonly [synced: boolean, leases: number])[] = [];
    const steps = foldInSteps(before, synced());
    let last = before;
    for (let isLast = false; !isLast; ) {
      const { value, done } = steps.next();
      expect(value).not.toBe(last);
      [last, isLast] = [value, done === true];
      seen.push([last.synced, last.leases.size]);
    }
    expect(seen.at(-1)).toEqual([true, 3500]);
    expect(seen.slice(0, -1).every(([isSynced]) => !isSynced)).toBe(true);
    const news = seen.map(([, leases], step) => leases - (seen[step - 1]?.[1] ?? 0));
    expect(Math.max(...news)).toBeLessThanOrEqual(1000);

    // The same again changes nothing, in any step.
    const again = [...foldInSteps(foldAll(last, reset, wide, ...many), synced())];
    expect(again.every((step) => step === last)).toBe(true);
  });

  test("nothing is in force before the first is complete", () => {
    let desired = foldAll(emptyDesired(), reset, put("config", CONFIG), lease("10.3.1.0-24", "10.0.0.1"));
    expect(desired).toMatchObject({ synced: false, network: undefined });
    expect(keys(desired)).toEqual([]);
    desired = fold(desired, synced());
    expect(desired.synced).toBe(true);
    expect(desired.network?.subnetLength).toBe(24);
    expect(keys(desired)).toEqual(["10.3.1.0-24"]);
  });

  test("between reset and synced the old set stays in force, then the new one replaces it", () => {
    let desired = started(lease("10.3.1.0-24", "10.0.0.1"), lease("10.3.2.0-24", "10.0.0.2"));
    const kept = desired.leases.get("10.3.2.0-24");
    const during = foldAll(
      desired,
      reset,
      put("config", CONFIG),
      lease("10.3.2.0-24", "10.0.0.2"),
      gone("x"),
    );
    expect(during).toBe(desired);
    expect(keys(during)).toEqual(["10.3.1.0-24", "10.3.2.0-24"]);
    desired = foldAll(during, lease("10.3.3.0-24", "10.0.0.3"), synced());
    expect(desired).not.toBe(during);
    expect([...desired.missing]).toEqual(["10.3.1.0-24"]);
    desired = forget(desired, new Set());
    expect(keys(desired)).toEqual(["10.3.2.0-24", "10.3.3.0-24"]);
    expect(desired.leases.get("10.3.2.0-24")).toBe(kept);
    expect(forget(desired, new Set())).toBe(desired);
  });

  test("a lease that a snapshot lacks stays in force until it is back, deleted or overlapped", () => {
    let desired = started(lease("10.3.1.0-24", "10.0.0.1"), lease("10.3.2.0-24", "10.0.0.2"));
    const before = [...desired.leases];
    desired = foldAll(desired, reset, synced());
    expect([...desired.leases]).toEqual(before);
    expect([...desired.missing]).toEqual(["10.3.1.0-24", "10.3.2.0-24"]);
    desired = fold(desired, lease("10.3.1.0-24", "10.0.0.1"));
    expect([...desired.missing]).toEqual(["10.3.2.0-24"]);
    desired = fold(desired, lease("10.3.2.0-25", "10.0.0.3"));
    expect(keys(desired)).toEqual(["10.3.1.0-24", "10.3.2.0-25"]);
    desired = fold(desired, gone("subnets/10.3.2.0-25"));
    expect(keys(desired)).toEqual(["10.3.1.0-24", "10.3.2.0-24"]);
    desired = fold(desired, gone("subnets/10.3.2.0-24"));
    expect(keys(desired)).toEqual(["10.3.1.0-24"]);
    expect(desired.missing.size).toBe(0);
  });

  test("a second reset forgets the first one's puts", () => {
    const desired = started(lease("10.3.1.0-24", "10.0.0.1"), reset, put("config", CONFIG));
    expect(keys(desired)).toEqual([]);
  });

  test("the same snapshot again changes nothing but the revision", () => {
    const desired = started(lease("10.3.1.0-24", "10.0.0.1"), put("subnets/junk", "x"));
    const again = foldAll(
      desired,
      reset,
      put("config", CONFIG),
      lease("10.3.1.0-24", "10.0.0.1"),
      put("subnets/junk", "x"),
      synced(),
    );
    expect(again).toBe(desired);
    expect(again.revision).toBe(revision);
  });

  test("a store that starts again at a lower revision is followed", () => {
    const desired = started(lease("10.3.1.0-24", "10.0.0.1"));
    expect(foldAll(desired, reset, { kind: "synced", revision: 2n })).toMatchObject({ revision: 2n });
    expect(keys(forget(desired, new Set()))).toEqual([]);
  });
});

describe("single events", () => {
  test("a renewal changes nothing but the revision", () => {
    const desired = started(lease("10.3.1.0-24", "10.0.0.1"));
    const again = fold(desired, lease("10.3.1.0-24", "10.0.0.1"));
    expect(again).toBe(desired);
    expect(again.revision).toBe(revision);
  });

  test("new, changed and deleted leases", () => {
    let desired = started();
    desired = fold(desired, lease("10.3.1.0-24", "10.0.0.1"));
    const next = fold(desired, lease("10.3.1.0-24", "10.0.0.9"));
    expect(next).not.toBe(desired);
    expect(next.leases.get("10.3.1.0-24")?.publicIp).toBe(ip("10.0.0.9"));
    expect(keys(fold(next, gone("subnets/10.3.1.0-24")))).toEqual([]);
  });

  test("keys elsewhere are none of ours", () => {
    const desired = started();
    for (const key of ["subnets-foo/10.3.1.0-24", "other", "config2", "subnets"]) {
      expect(fold(desired, put(key, "garbage"))).toBe(desired);
    }
    expect(reasons(desired)).toEqual({});
  });
});

describe("bad records", () => {
  test("one is rejected alone, and the last good one of its key stays", () => {
    let desired = started(lease("10.3.1.0-24", "10.0.0.1"), lease("10.3.2.0-24", "10.0.0.2"));
    const before = desired.leases.get("10.3.1.0-24");
    desired = fold(desired, put("subnets/10.3.1.0-24", "garbage"));
    expect(desired.leases.get("10.3.1.0-24")).toBe(before);
    expect(reasons(desired)).toEqual({ "10.3.1.0-24": expect.stringContaining("not valid JSON") });
    expect(fold(desired, put("subnets/10.3.1.0-24", "garbage"))).toBe(desired);
    desired = foldAll(
      desired,
      reset,
      put("config", CONFIG),
      put("subnets/10.3.1.0-24", "garbage"),
      lease("10.3.2.0-24", "10.0.0.2"),
      synced(),
    );
    expect(desired.leases.get("10.3.1.0-24")).toBe(before);
    const mended = fold(desired, lease("10.3.1.0-24", "10.0.0.1"));
    expect(mended).not.toBe(desired);
    expect(reasons(mended)).toEqual({});
    expect(mended.leases.get("10.3.1.0-24")).toBe(before);
  });

  test("a bad record that is deleted is forgotten, with its last good one", () => {
    let desired = started(lease("10.3.1.0-24", "10.0.0.1"), put("subnets/hello", "x"));
    desired = foldAll(
      desired,
      put("subnets/10.3.1.0-24", "{}"),
      gone("subnets/hello"),
      gone("subnets/10.3.1.0-24"),
    );
    expect([keys(desired), reasons(desired)]).toEqual([[], {}]);
  });

  test("a thousand garbage keys harm no lease", () => {
    let desired = started(lease("10.3.1.0-24", "10.0.0.1"));
    for (let i = 0; i < 1000; i++) desired = fold(desired, put(`subnets/junk-${i}`, "junk"));
    expect(keys(desired)).toEqual(["10.3.1.0-24"]);
    expect(desired.rejections.size).toBe(1000);
  });

  test("there is a bound", () => {
    let desired = foldAll(
      emptyDesired(),
      reset,
      put("config", `{"Network":"10.0.0.0/8","SubnetLen":28,"Backend":{"Type":"alloc"}}`),
    );
    const key = (i: number): string => formatLeaseKey({ address: ip("10.0.0.0") + i * 16, length: 28 });
    for (let i = 0; i < LEASES_MAX + 2; i++) desired = fold(desired, lease(key(i), "10.0.0.1"));
    desired = fold(desired, synced());
    expect(desired.leases.size).toBe(LEASES_MAX);
    expect(reasons(desired)).toEqual({
      [key(LEASES_MAX)]: "there are more than 65536 leases",
      [key(LEASES_MAX + 1)]: "there are more than 65536 leases",
    });
    desired = foldAll(desired, gone(`subnets/${key(0)}`), lease(key(LEASES_MAX), "10.0.0.1"));
    expect(desired.leases.has(key(LEASES_MAX))).toBe(true);
    expect(desired.rejections.size).toBe(1);
  });
});

describe("config", () => {
  test("missing, bad, good, bad, deleted", () => {
    let desired = foldAll(emptyDesired(), reset, synced());
    expect(desired.network).toBeUndefined();
    expect(reasons(desired)).toEqual({ config: "there is no network config" });
    desired = fold(desired, put("config", "{"));
    expect(reasons(desired).config).toMatch(/^the network config is not valid JSON/);
    desired = fold(desired, put("config", CONFIG));
    const good = desired.network;
    expect(good).toBeDefined();
    expect(fold(desired, put("config", CONFIG))).toBe(desired);
    desired = fold(desired, put("config", `{"Network":"10.3.0.0/29"}`));
    expect(desired.network).toBe(good);
    expect(reasons(desired).config).toMatch(/^network is too small.*; the last good one stays in force$/);
    desired = fold(desired, gone("config"));
    expect(desired.network).toBe(good);
    expect(reasons(desired)).toEqual({
      config: "there is no network config; the last good one stays in force",
    });
  });

  test("a backend that this version does not have is final only while nothing is in force", () => {
    const unknown = CONFIG.replace(/"Type":\s*"[^"]*"/, '"Type":"pigeon"');
    expect(unknown).not.toBe(CONFIG);
    let desired = fold(foldAll(emptyDesired(), reset, synced()), put("config", unknown));
    expect(desired.unknownBackend).toMatch(/^unknown backend type: pigeon; set Backend\.Type to/);
    desired = fold(desired, put("config", "{"));
    expect(desired.unknownBackend).toBeUndefined();
    desired = fold(desired, put("config", CONFIG));
    desired = fold(desired, put("config", unknown));
    expect(desired.unknownBackend).toBeUndefined();
    expect(reasons(desired).config).toMatch(/pigeon.*; the last good one stays in force$/);
  });

  test("that is not to be followed stays as it was at first, and a changed one is a warning", () => {
    const vxlan = '{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan"}}';
    const hostGw = '{"Network":"10.3.0.0/16","Backend":{"Type":"host-gw"}}';
    let desired = foldAll(emptyDesired(false), reset, put("config", vxlan), synced());
    expect([desired.network?.backend.type, desired.warnings]).toEqual(["vxlan", []]);
    desired = fold(desired, put("config", hostGw));
    expect(desired.network?.backend.type).toBe("vxlan");
    expect(desired.warnings).toEqual([expect.stringMatching(/takes effect with the next start of twilld$/)]);
    desired = foldAll(desired, reset, put("config", hostGw), synced());
    expect(desired.network?.backend.type).toBe("vxlan");
    desired = fold(desired, put("config", vxlan));
    expect(desired.warnings).toEqual([]);
  });

  test("another network puts leases in and out of force", () => {
    let desired = started(lease("10.3.1.0-24", "10.0.0.1"), lease("10.4.1.0-24", "10.0.0.2"));
    expect(keys(desired)).toEqual(["10.3.1.0-24"]);
    expect(reasons(desired)).toEqual({ "10.4.1.0-24": "10.4.1.0/24 is not in the network 10.3.0.0/16" });
    desired = fold(desired, put("config", CONFIG.replace("10.3.", "10.4.")));
    expect(keys(desired)).toEqual(["10.4.1.0-24"]);
    expect(Object.keys(reasons(desired))).toEqual(["10.3.1.0-24"]);
  });
});

describe("contradictions", () => {
  test.each([
    ["the configured length", ["10.3.0.0-20", "10.3.1.0-24", "10.3.1.16-28"], ["10.3.1.0-24"]],
    ["the smaller block", ["10.3.0.0-18", "10.3.0.0-20", "10.3.16.0-20"], ["10.3.0.0-20", "10.3.16.0-20"]],
    ["the lesser key", ["10.3.1.0-24", "10.3.1.0-24&fd00::-64"], ["10.3.1.0-24"]],
    ["what is outside the network counts for nothing", ["10.0.0.0-8", "10.3.0.0-20"], ["10.3.0.0-20"]],
  ])("%s wins, in any order", (_, records, winners) => {
    for (const order of [records, [...records].reverse()]) {
      let desired = started(...order.map((key, i) => lease(key, `10.0.0.${i + 1}`)));
      expect(keys(desired)).toEqual(winners);
      for (const key of order) if (!winners.includes(key)) expect(reasons(desired)).toHaveProperty([key]);
      for (const key of winners) desired = fold(desired, gone(`subnets/${key}`));
      expect(desired.leases.size + desired.rejections.size).toBe(records.length - winners.length);
    }
  });

  test("who lost comes into force when the winner goes", () => {
    let desired = started(lease("10.3.0.0-20", "10.0.0.1"), lease("10.3.1.0-24", "10.0.0.2"));
    expect(reasons(desired)).toEqual({
      "10.3.0.0-20": "10.3.0.0/20 overlaps 10.3.1.0-24 of the node at 10.0.0.2, which takes precedence",
    });
    desired = fold(desired, gone("subnets/10.3.1.0-24"));
    expect([keys(desired), reasons(desired)]).toEqual([["10.3.0.0-20"], {}]);
  });
});

describe("our own", () => {
  const subnet = parseCidr("10.3.1.0/24") ?? { address: 0, length: 0 };
  const own = { subnet, publicIp: ip("10.0.0.1") };

  test("our lease is not a peer, and no fault", () => {
    let desired = started(lease("10.3.1.0-24", "10.0.0.1"), lease("10.3.2.0-24", "10.0.0.2"));
    desired = claim(desired, own);
    expect([keys(desired), reasons(desired)]).toEqual([["10.3.2.0-24"], {}]);
    expect(claim(desired, own)).toBe(desired);
    expect(fold(desired, lease("10.3.1.0-24", "10.0.0.1"))).toBe(desired);
  });

  test("nor is it under a dual-stack key", () => {
    const desired = claim(started(lease("10.3.1.0-24&fd00::-64", "10.0.0.1")), own);
    expect([keys(desired), reasons(desired)]).toEqual([[], {}]);
  });

  test("who else claims it, overlaps it or names our address is refused; giving it up lets them in", () => {
    let desired = claim(started(), own);
    desired = foldAll(
      desired,
      lease("10.3.1.0-24", "10.0.0.7"),
      lease("10.3.0.0-20", "10.0.0.8"),
      lease("10.3.1.128-25", "10.0.0.1"),
      lease("10.3.99.0-24", "10.0.0.1"),
    );
    expect(keys(desired)).toEqual([]);
    expect(reasons(desired)).toEqual({
      "10.3.1.0-24": "our own subnet 10.3.1.0/24 is claimed by the node at 10.0.0.7 as well",
      "10.3.0.0-20": "10.3.0.0/20 overlaps our own subnet 10.3.1.0/24",
      "10.3.1.128-25": "10.3.1.128/25 overlaps our own subnet 10.3.1.0/24",
      "10.3.99.0-24": expect.stringMatching(/^10\.3\.99\.0\/24 names our own address 10\.0\.0\.1/),
    });
    desired = claim(desired, undefined);
    expect(keys(desired)).toEqual(["10.3.1.0-24", "10.3.99.0-24"]);
  });

  test("our lease goes over to another node's hands with an event in between", () => {
    let desired = claim(started(lease("10.3.1.0-24", "10.0.0.1")), own);
    desired = fold(desired, lease("10.3.1.0-24", "10.0.0.7"));
    expect(keys(desired)).toEqual([]);
    desired = claim(desired, { subnet: { address: ip("10.3.2.0"), length: 24 }, publicIp: own.publicIp });
    expect(keys(desired)).toEqual(["10.3.1.0-24"]);
  });
});

test("whatever the history, the outcome is that of the last records alone", () => {
  const key = fc
    .tuple(fc.nat({ max: 15 }), fc.constantFrom(20, 22, 24, 26))
    .map(([i, length]) => formatLeaseKey({ address: ip("10.3.0.0") + i * 2 ** (32 - length), length }));
  const step = fc.oneof(
    {
      weight: 6,
      arbitrary: fc.record({ do: fc.constant("put" as const), key, host: fc.integer({ min: 1, max: 4 }) }),
    },
    { weight: 2, arbitrary: fc.record({ do: fc.constant("delete" as const), key, host: fc.constant(0) }) },
    { weight: 1, arbitrary: fc.record({ do: fc.constant("relist" as const), key, host: fc.constant(0) }) },
    { weight: 1, arbitrary: fc.record({ do: fc.constant("claim" as const), key, host: fc.nat({ max: 4 }) }) },
  );
  fc.assert(
    fc.property(fc.array(step, { maxLength: 40 }), (steps) => {
      const store = new Map<string, string>();
      const all = (): StoreEvent[] => [...store].map(([k, host]) => lease(k, host));
      let desired = started();
      let own: Parameters<typeof claim>[1];
      for (const { do: what, key: k, host } of steps) {
        const before = desired;
        const shot = JSON.stringify([[...desired.leases], [...desired.rejections]]);
        if (what === "put") store.set(k, `10.0.0.${host}`);
        if (what === "delete") store.delete(k);
        if (what === "put") desired = fold(desired, lease(k, `10.0.0.${host}`));
        if (what === "delete") desired = fold(desired, gone(`subnets/${k}`));
        if (what === "relist") desired = foldAll(desired, reset, put("config", CONFIG), ...all(), synced());
        if (what === "claim") {
          const subnet = parseLeaseKey(k);
          own = host === 0 || subnet === undefined ? undefined : { subnet, publicIp: ip(`10.0.0.${host}`) };
          desired = claim(desired, own);
        }
        if (desired === before)
          expect(JSON.stringify([[...desired.leases], [...desired.rejections]])).toBe(shot);
      }
      const fresh = claim(started(...all()), own);
      expect(keys(desired)).toEqual(keys(fresh));
      expect(reasons(desired)).toEqual(reasons(fresh));
      const blocks = [...desired.leases.values()].map(({ subnet }) => subnet);
      blocks.forEach((a, i) => {
        expect(blocks.slice(i + 1).some((b) => overlaps(a, b))).toBe(false);
        expect(own !== undefined && overlaps(a, own.subnet)).toBe(false);
        expect(contains({ address: ip("10.3.0.0"), length: 16 }, a.address), formatIpv4(a.address)).toBe(
          true,
        );
      });
    }),
  );
});
