import * as fc from "fast-check";
import { describe, expect, test } from "vitest";
import { contains, formatCidr, formatIpv4, overlaps, type Prefix, parseIpv4 } from "../../src/core/ipv4.ts";
import { encodeAttributes, parseLeaseKey } from "../../src/core/lease.ts";
import {
  decide,
  isCompatible,
  type LeaseAction,
  type LeaseEvent,
  type LeaseLife,
  type LeaseTerms,
  newLeaseLife,
  type StoredRecord,
  step,
} from "../../src/core/leaselife.ts";
import type { LeaseAttributes, Network } from "../../src/core/model.ts";
import { parseNetwork } from "../../src/core/network.ts";

const ip = (text: string): number => parseIpv4(text) ?? Number.NaN;

function network(text: object): Network {
  const parsed = parseNetwork(JSON.stringify({ Backend: { Type: "host-gw" }, ...text }));
  if ("error" in parsed) throw new Error(parsed.error);
  return parsed.network;
}

function subnet(key: string): Prefix {
  const parsed = parseLeaseKey(key);
  if (parsed === undefined) throw new Error(`not a key: ${key}`);
  return parsed;
}

const NET = network({ Network: "10.3.0.0/16" });
/** Three subnets: 10.9.0.64/26, .128/26, .192/26. */
const SMALL = network({ Network: "10.9.0.0/24" });

const attributes = (publicIp: string): LeaseAttributes => ({
  publicIp: ip(publicIp),
  backendType: "host-gw",
  vtepMac: undefined,
  vni: undefined,
});
const published = (publicIp: string): string => encodeAttributes(attributes(publicIp));
const record = (key: string, publicIp: string, leaseId = "5"): StoredRecord => ({
  key,
  value: publicIp === "" ? "garbage" : published(publicIp),
  revision: 9n,
  leaseId,
});

describe("decide", () => {
  const me = "10.0.0.1";
  const ask = (
    records: StoredRecord[],
    previous?: string,
    random = 0,
    net = NET,
    formerIp?: string,
    shunned?: string,
  ): string => {
    const wish = {
      network: net,
      publicIp: ip(me),
      previous: previous === undefined ? undefined : subnet(previous),
      formerIp: formerIp === undefined ? undefined : ip(formerIp),
      shunned: shunned === undefined ? undefined : subnet(shunned),
    };
    const decision = decide(wish, records, random);
    if (decision.kind === "exhausted") return "exhausted";
    if (decision.kind === "create") return `create ${formatCidr(decision.subnet)}`;
    return `${decision.kind} ${decision.record.key}`;
  };

  test.each<[string, string, string]>([
    ["an empty store: the first", ask([]), "create 10.3.1.0/24"],
    ["the last", ask([], undefined, 0.999999), "create 10.3.255.0/24"],
    ["random 1 is not past the end", ask([], undefined, 1), "create 10.3.255.0/24"],
    ["our own record", ask([record("10.3.9.0-24", me)]), "adopt 10.3.9.0-24"],
    ["our own dual-stack record", ask([record("10.3.9.0-24&fd00::-64", me)]), "adopt 10.3.9.0-24&fd00::-64"],
    [
      "our own, the previous one first",
      ask([record("10.3.9.0-24", me), record("10.3.7.0-24", me)], "10.3.7.0-24"),
      "adopt 10.3.7.0-24",
    ],
    [
      "our own before the previous subnet",
      ask([record("10.3.9.0-24", me)], "10.3.7.0-24"),
      "adopt 10.3.9.0-24",
    ],
    ["our own of another length", ask([record("10.3.9.0-25", me)]), "delete 10.3.9.0-25"],
    ["our own out of range", ask([record("10.3.0.0-24", me)]), "delete 10.3.0.0-24"],
    ["our own out of range, but reserved", ask([record("10.4.9.0-24", me, "0")]), "create 10.3.1.0/24"],
    ["one of our own fits", ask([record("10.4.9.0-24", me), record("10.3.9.0-24", me)]), "adopt 10.3.9.0-24"],
    ["the previous subnet", ask([], "10.3.77.0-24"), "create 10.3.77.0/24"],
    [
      "the previous subnet is taken",
      ask([record("10.3.77.0-24", "10.0.0.2")], "10.3.77.0-24"),
      "create 10.3.1.0/24",
    ],
    [
      "a part of it is taken",
      ask([record("10.3.77.128-25", "10.0.0.2")], "10.3.77.0-24"),
      "create 10.3.1.0/24",
    ],
    [
      "a block around it is taken",
      ask([record("10.3.64.0-19", "10.0.0.2")], "10.3.77.0-24"),
      "create 10.3.1.0/24",
    ],
    ["it is taken by garbage", ask([record("10.3.77.0-24", "")], "10.3.77.0-24"), "create 10.3.1.0/24"],
    ["the previous subnet is of another network", ask([], "10.4.77.0-24"), "create 10.3.1.0/24"],
    ["it is of another length", ask([], "10.3.77.0-25"), "create 10.3.1.0/24"],
    ["it is below SubnetMin", ask([], "10.3.0.0-24"), "create 10.3.1.0/24"],
    ["keys that are none don't count", ask([record("10.3.1.0", ""), record("x", "")]), "create 10.3.1.0/24"],
    [
      "a former address, on the previous subnet",
      ask([record("10.3.7.0-24", "10.0.0.9")], "10.3.7.0-24", 0, NET, "10.0.0.9"),
      "adopt 10.3.7.0-24",
    ],
    [
      "a former address elsewhere",
      ask([record("10.3.8.0-24", "10.0.0.9")], "10.3.7.0-24", 0, NET, "10.0.0.9"),
      "create 10.3.7.0/24",
    ],
    ["garbage is nobody's", ask([record("10.3.7.0-24", "")], "10.3.7.0-24", 0, NET), "create 10.3.1.0/24"],
    [
      "the only one left",
      ask([record("10.9.0.64-26", "10.0.0.2"), record("10.9.0.192-26", "10.0.0.3")], undefined, 0.9, SMALL),
      "create 10.9.0.128/26",
    ],
    [
      "none left",
      ask([record("10.9.0.0-25", "10.0.0.2"), record("10.9.0.128-25", "10.0.0.3")], undefined, 0, SMALL),
      "exhausted",
    ],
    [
      "another than the one to be shunned",
      ask([], undefined, 0, NET, undefined, "10.3.1.0-24"),
      "create 10.3.2.0/24",
    ],
    [
      "the one to be shunned, but somebody put it there for us",
      ask([record("10.3.1.0-24", me, "0")], undefined, 0, NET, undefined, "10.3.1.0-24"),
      "adopt 10.3.1.0-24",
    ],
    [
      "the one to be shunned is the last",
      ask([record("10.9.0.128-25", "10.0.0.2")], undefined, 0, SMALL, undefined, "10.9.0.64-26"),
      "create 10.9.0.64/26",
    ],
    ["all of it taken by one", ask([record("10.0.0.0-8", "10.0.0.2")], "10.3.7.0-24"), "exhausted"],
  ])("%s", (_, decision, expected) => {
    expect(decision).toBe(expected);
  });

  const block = fc.tuple(fc.nat({ max: 0xffff }), fc.integer({ min: 12, max: 31 })).map(
    ([low, length]): Prefix => ({
      address: ((ip("10.3.0.0") + low) >>> (32 - length)) * 2 ** (32 - length),
      length,
    }),
  );
  const key = ({ address, length }: Prefix): string => `${formatIpv4(address)}-${length}`;
  const config = fc
    .tuple(fc.integer({ min: 16, max: 24 }), fc.integer({ min: 2, max: 6 }))
    .map(([length, more]) => network({ Network: `10.3.0.0/${length}`, SubnetLen: length + more }));
  const unit = fc.double({ min: 0, max: 1, maxExcluded: true, noNaN: true });

  test("a subnet that is chosen is in range, aligned and free", () => {
    fc.assert(
      fc.property(
        config,
        fc.array(block, { maxLength: 30 }),
        unit,
        fc.option(block),
        (net, taken, random, previous) => {
          const wish = { network: net, publicIp: ip(me), previous: previous ?? undefined };
          const decision = decide(
            wish,
            taken.map((one) => record(key(one), "10.0.0.2")),
            random,
          );
          if (decision.kind !== "create") {
            // Exhausted only if it is true: every subnet is touched.
            expect(decision.kind).toBe("exhausted");
            for (let a = net.subnetMin; a <= net.subnetMax; a += 2 ** (32 - net.subnetLength)) {
              expect(taken.some((one) => overlaps(one, { address: a, length: net.subnetLength }))).toBe(true);
            }
            return;
          }
          expect(isCompatible(net, decision.subnet)).toBe(true);
          expect(contains(net.network, decision.subnet.address)).toBe(true);
          expect(taken.some((one) => overlaps(one, decision.subnet))).toBe(false);
        },
      ),
    );
  });

  test("every free subnet is equally likely", () => {
    const taken = [record("10.3.2.0-23", "10.0.0.2"), record("10.3.200.0-24", "10.0.0.3")];
    const free = 255 - 3;
    const seen = new Set<string>();
    for (let i = 0; i < free; i++) seen.add(ask(taken, undefined, (i + 0.5) / free));
    expect(seen.size).toBe(free);
  });
});

/** An etcd with nodes on it, in which time and order are the test's. */
class World {
  now = 0;
  revision = 1n;
  readonly records = new Map<string, StoredRecord & { ends: number }>();
  readonly nodes: Node[] = [];
  #leases = 100;
  /** Ends of the etcd leases. */
  readonly #ends = new Map<string, number>();

  node(publicIp: string, more: Partial<LeaseTerms> = {}): Node {
    const terms = {
      network: NET,
      attributes: attributes(publicIp),
      previous: undefined,
      marginMs: 3_600_000,
      ...more,
    };
    const node = new Node(this, terms);
    this.nodes.push(node);
    return node;
  }

  put(key: string, value: string, ttlSeconds: number): LeaseEvent {
    this.revision += 1n;
    const leaseId = ttlSeconds === 0 ? "0" : String(++this.#leases);
    const ends = ttlSeconds === 0 ? Number.POSITIVE_INFINITY : this.now + ttlSeconds * 1000;
    this.records.set(key, { key, value, revision: this.revision, leaseId, ends });
    this.#ends.set(leaseId, ends);
    for (const node of this.nodes) {
      node.hear({ kind: "put", key: `subnets/${key}`, value, revision: this.revision, leaseId });
    }
    return { kind: "done", revision: this.revision, leaseId };
  }

  delete(key: string): LeaseEvent {
    this.revision += 1n;
    this.records.delete(key);
    for (const node of this.nodes)
      node.hear({ kind: "delete", key: `subnets/${key}`, revision: this.revision });
    return { kind: "done", revision: this.revision, leaseId: "0" };
  }

  /** Revokes the etcd lease beneath a key, and the key with it. */
  revoke(key: string): void {
    this.#ends.delete(this.records.get(key)?.leaseId ?? "");
    this.delete(key);
  }

  isGone(leaseId: string): boolean {
    return (this.#ends.get(leaseId) ?? 0) <= this.now;
  }

  /** Lets time pass; leases end, waits end, and all comes to rest. */
  pass(ms: number): void {
    const end = this.now + ms;
    for (;;) {
      const ends = [...this.records.values()].map((one) => one.ends);
      const waits = this.nodes.map((node) => node.until);
      const next = Math.min(...ends, ...waits);
      if (next > end) break;
      this.now = Math.max(this.now, next);
      for (const one of [...this.records.values()]) if (one.ends <= this.now) this.delete(one.key);
      for (const node of this.nodes) node.wake();
      this.settle();
    }
    this.now = end;
  }

  settle(): void {
    let isBusy = true;
    while (isBusy) isBusy = this.nodes.some((node) => node.work());
  }

  get keys(): string[] {
    return [...this.records.keys()].sort();
  }
}

class Node {
  life: LeaseLife;
  until = Number.POSITIVE_INFINITY;
  connected = true;
  random = 0;
  readonly reports: string[] = [];
  readonly uses: string[] = [];
  /** Operations carried out, newest last. */
  readonly done: string[] = [];
  readonly #world: World;
  operation: LeaseAction | undefined;

  constructor(world: World, terms: LeaseTerms) {
    this.#world = world;
    this.life = newLeaseLife(terms);
  }

  get subnet(): string {
    return this.life.inUse && this.life.subnet !== undefined ? formatCidr(this.life.subnet) : "none";
  }

  start(): this {
    this.send({ kind: "start" });
    return this;
  }

  send(event: LeaseEvent): void {
    const { life, actions } = step(this.life, event, this.#world.now);
    this.life = life;
    for (const action of actions) {
      if (action.kind === "wait") this.until = action.until;
      else if (action.kind === "report") this.reports.push(`${action.what}: ${action.message}`);
      else if (action.kind === "use") this.uses.push(formatCidr(action.subnet));
      else {
        expect(this.operation, "one operation at a time").toBeUndefined();
        this.operation = action;
      }
    }
  }

  hear(event: LeaseEvent): void {
    if (this.connected) this.send(event);
  }

  wake(): void {
    if (this.until > this.#world.now) return;
    this.until = Number.POSITIVE_INFINITY;
    this.send({ kind: "tick" });
  }

  /** Carries out the operation under way, if there is one. */
  work(): boolean {
    const action = this.operation;
    if (action === undefined) return false;
    this.operation = undefined;
    this.done.push(action.kind);
    this.send(this.connected ? this.#carryOut(action) : { kind: "failed", reason: "etcd is unreachable" });
    return true;
  }

  #carryOut(action: LeaseAction): LeaseEvent {
    const { records } = this.#world;
    switch (action.kind) {
      case "list":
        return {
          kind: "listed",
          records: [...records.values()],
          random: this.random,
          isGone: action.doubted !== undefined && this.#world.isGone(action.doubted),
        };
      case "create":
        if (records.has(action.key)) return { kind: "conflict" };
        return this.#world.put(action.key, action.value, action.ttlSeconds);
      case "renew":
        if (records.get(action.key)?.revision !== action.expect) return { kind: "conflict" };
        return this.#world.put(action.key, action.value, action.ttlSeconds);
      case "delete":
        if (records.get(action.key)?.revision !== action.expect) return { kind: "conflict" };
        return this.#world.delete(action.key);
      default:
        throw new Error(`not an operation: ${action.kind}`);
    }
  }

  /** The watch comes back with a full list, as it does after every cut. */
  reconnect(): void {
    this.connected = true;
    this.send({ kind: "reset" });
    for (const { key, value, revision, leaseId } of this.#world.records.values()) {
      this.send({ kind: "put", key: `subnets/${key}`, value, revision, leaseId });
    }
    this.send({ kind: "synced", revision: this.#world.revision });
    this.#world.settle();
  }
}

const HOUR = 3_600_000;
const kinds = (node: Node): string[] => node.reports.map((report) => report.slice(0, report.indexOf(":")));

function held(previous?: string, publicIp = "10.0.0.1"): { world: World; node: Node } {
  const world = new World();
  const node = world.node(publicIp, previous === undefined ? {} : { previous: subnet(previous) }).start();
  world.settle();
  expect(node.life.phase.kind).toBe("held");
  return { world, node };
}

describe("taking a lease", () => {
  test("a new one, for a day", () => {
    const { world, node } = held();
    expect(node.uses).toEqual(["10.3.1.0/24"]);
    expect(world.records.get("10.3.1.0-24")).toMatchObject({ value: published("10.0.0.1"), ends: 24 * HOUR });
    expect(node.reports).toEqual(["acquired: 10.3.1.0/24 is ours"]);
    expect(node.until).toBe(23 * HOUR);
  });

  test("the one of a former run, still in etcd: rewritten with what we publish now", () => {
    const world = new World();
    world.put("10.3.8.0-24", published("10.0.0.1").replace("host-gw", "vxlan2"), 60);
    const node = world.node("10.0.0.1").start();
    world.settle();
    expect([node.subnet, node.done]).toEqual(["10.3.8.0/24", ["list", "renew"]]);
    expect(world.records.get("10.3.8.0-24")).toMatchObject({ value: published("10.0.0.1"), ends: 24 * HOUR });
  });

  test("a reservation stays one, and is not even written if it says what we publish", () => {
    const world = new World();
    world.put("10.3.8.0-24", published("10.0.0.1"), 0);
    world.put("10.3.9.0-24", `{"PublicIP":"10.0.0.2"}`, 0);
    const [a, b] = [world.node("10.0.0.1").start(), world.node("10.0.0.2").start()];
    world.settle();
    expect([a.subnet, a.done]).toEqual(["10.3.8.0/24", ["list"]]);
    expect([b.subnet, b.done]).toEqual(["10.3.9.0/24", ["list", "renew"]]);
    world.pass(100 * HOUR);
    expect([a.done.length, b.done.length]).toEqual([1, 2]);
    expect([...world.records.values()].map(({ leaseId, value }) => [leaseId, value])).toEqual([
      ["0", published("10.0.0.1")],
      ["0", published("10.0.0.2")],
    ]);
  });

  test("one that the config no longer allows is deleted first", () => {
    const world = new World();
    world.put("10.4.8.0-24", published("10.0.0.1"), 60);
    const node = world.node("10.0.0.1").start();
    world.settle();
    expect(node.done).toEqual(["list", "delete", "list", "create"]);
    expect(world.keys).toEqual(["10.3.1.0-24"]);
  });

  test("ten nodes at once that all draw the same number get ten subnets", () => {
    const world = new World();
    const nodes = Array.from({ length: 10 }, (_, i) => world.node(`10.0.0.${i + 1}`).start());
    // Each list is answered before any write: the worst order.
    for (let round = 0; round < 30; round++) for (const node of nodes) node.work();
    expect(new Set(nodes.map((node) => node.subnet)).size).toBe(10);
    expect(world.keys.length).toBe(10);
    expect(nodes.flatMap(kinds).filter((kind) => kind === "collision").length).toBeGreaterThan(0);
  });

  test("after ten collisions it pauses, then goes on", () => {
    const world = new World();
    const node = world.node("10.0.0.1").start();
    for (let i = 1; i <= 10; i++) {
      node.work();
      world.put(`10.3.${i}.0-24`, published("10.0.0.2"), 0);
      node.work();
    }
    expect(node.life.phase).toEqual({ kind: "waiting", until: 1000 });
    expect(kinds(node)).toEqual([...Array(10).fill("collision"), "failed"]);
    world.pass(1000);
    expect(node.subnet).toBe("10.3.11.0/24");
  });

  test("an exhausted network is looked at again", () => {
    const world = new World();
    for (const key of ["10.9.0.64-26", "10.9.0.128-26", "10.9.0.192-26"])
      world.put(key, published("10.0.0.2"), 0);
    const node = world.node("10.0.0.1", { network: SMALL }).start();
    world.settle();
    expect(node.reports).toEqual([
      "exhausted: out of subnets: none is free of the /26 from 10.9.0.64 to 10.9.0.192 in 10.9.0.0/24; enlarge the network",
    ]);
    world.delete("10.9.0.128-26");
    world.pass(10_000);
    expect(node.subnet).toBe("10.9.0.128/26");
  });

  test("etcd away: once a second, and a write of unknown outcome is found by the list", () => {
    const world = new World();
    const node = world.node("10.0.0.1").start();
    node.connected = false;
    world.settle();
    world.pass(3000);
    expect(node.done).toEqual(["list", "list", "list", "list"]);
    node.connected = true;
    world.now += 1000;
    node.wake();
    node.work();
    expect(node.operation?.kind).toBe("create");
    world.put("10.3.1.0-24", published("10.0.0.1"), 86400);
    node.operation = undefined;
    node.send({ kind: "failed", reason: "deadline exceeded" });
    world.pass(1000);
    expect([node.subnet, world.keys]).toEqual(["10.3.1.0/24", ["10.3.1.0-24"]]);
  });
});

test("a timer that fires a moment early is set again, so that the lease is renewed all the same", () => {
  const { world, node } = held();
  world.now = 23 * HOUR - 0.25;
  node.until = Number.POSITIVE_INFINITY;
  node.send({ kind: "tick" });
  expect([node.operation, node.until]).toEqual([undefined, 23 * HOUR]);
  world.now = 23 * HOUR;
  node.wake();
  world.settle();
  expect([node.done.at(-1), node.until]).toEqual(["renew", 46 * HOUR]);
});

describe("keeping it", () => {
  test("renewed an hour before its end, again and again, and never lost", () => {
    const { world, node } = held();
    world.pass(23 * HOUR - 1);
    expect(node.done).toEqual(["list", "create"]);
    world.pass(1);
    expect(node.done).toEqual(["list", "create", "renew"]);
    expect(world.records.get("10.3.1.0-24")?.ends).toBe(47 * HOUR);
    world.pass(1000 * HOUR);
    expect(new Set(kinds(node))).toEqual(new Set(["acquired", "renewed"]));
    expect(node.uses).toEqual(["10.3.1.0/24"]);
  });

  test("a margin beyond half of the lease counts as half", () => {
    const world = new World();
    const node = world.node("10.0.0.1", { ttlSeconds: 4 }).start();
    world.settle();
    expect(node.until).toBe(2000);
    world.pass(60_000);
    expect(kinds(node)).not.toContain("lost");
  });

  test("a renewal that fails is tried each minute, and at once when the store is back", () => {
    const { world, node } = held();
    world.pass(23 * HOUR - 1);
    node.connected = false;
    world.pass(1);
    expect(node.until).toBe(23 * HOUR + 60_000);
    expect(node.reports.at(-1)).toBe(
      "failed: writing our lease 10.3.1.0-24 failed: etcd is unreachable; trying again, forwarding goes on",
    );
    world.pass(5000);
    node.reconnect();
    expect(world.records.get("10.3.1.0-24")?.ends).toBe(world.now + 24 * HOUR);
    expect(node.uses).toEqual(["10.3.1.0/24"]);
  });

  test("a key deleted while a failed renewal waits is taken again at once", () => {
    const { world, node } = held();
    world.pass(23 * HOUR - 1);
    node.connected = false;
    world.pass(1);
    node.connected = true;
    world.delete("10.3.1.0-24");
    world.settle();
    expect([world.keys, node.life.phase.kind, node.uses]).toEqual([["10.3.1.0-24"], "held", ["10.3.1.0/24"]]);
  });

  test("what we publish changes: rewritten, the same subnet", () => {
    const { world, node } = held();
    node.send({ kind: "attributes", attributes: attributes("10.0.0.99") });
    world.settle();
    expect(world.records.get("10.3.1.0-24")?.value).toBe(published("10.0.0.99"));
    expect([node.subnet, node.done.at(-1)]).toEqual(["10.3.1.0/24", "renew"]);
    node.send({ kind: "attributes", attributes: attributes("10.0.0.99") });
    expect(node.operation).toBeUndefined();
  });

  test("it changes while a write is under way, or while etcd is away", () => {
    const world = new World();
    const node = world.node("10.0.0.1").start();
    node.work();
    node.send({ kind: "attributes", attributes: attributes("10.0.0.98") });
    world.settle();
    expect(world.records.get("10.3.1.0-24")?.value).toBe(published("10.0.0.98"));
    node.connected = false;
    node.send({ kind: "attributes", attributes: attributes("10.0.0.97") });
    world.settle();
    node.reconnect();
    expect(world.records.get("10.3.1.0-24")?.value).toBe(published("10.0.0.97"));
    expect([node.subnet, world.keys]).toEqual(["10.3.1.0/24", ["10.3.1.0-24"]]);
  });

  test("its own writes coming back on the watch mean nothing", () => {
    const { world, node } = held();
    node.reconnect();
    node.reconnect();
    world.pass(HOUR);
    expect(node.done).toEqual(["list", "create"]);
    expect(kinds(node)).toEqual(["acquired"]);
  });
});

describe("losing it", () => {
  test("deleted by hand: taken again, the same", () => {
    const { world, node } = held("10.3.7.0-24");
    world.delete("10.3.7.0-24");
    world.settle();
    expect([node.subnet, world.keys, node.uses]).toEqual(["10.3.7.0/24", ["10.3.7.0-24"], ["10.3.7.0/24"]]);
    expect(kinds(node)).toEqual(["acquired", "lost", "renewed"]);
  });

  test("deleted and taken by another before we look: another one is ours", () => {
    const { world, node } = held("10.3.7.0-24");
    node.connected = false;
    world.delete("10.3.7.0-24");
    world.put("10.3.7.0-24", published("10.0.0.2"), 86400);
    node.reconnect();
    expect([node.subnet, node.uses]).toEqual(["10.3.1.0/24", ["10.3.7.0/24", "10.3.1.0/24"]]);
    expect(node.reports.slice(1)).toEqual([
      "lost: our lease of 10.3.7.0/24 was taken by the node at 10.0.0.2: taking one again",
      "moved: 10.3.1.0/24 is ours, in place of 10.3.7.0/24",
    ]);
    expect(world.records.get("10.3.7.0-24")?.value).toBe(published("10.0.0.2"));
  });

  test("overwritten by another node: not fought over", () => {
    const { world, node } = held("10.3.7.0-24");
    world.put("10.3.7.0-24", published("10.0.0.2"), 86400);
    world.settle();
    expect(node.subnet).toBe("10.3.1.0/24");
    expect(world.records.get("10.3.7.0-24")?.value).toBe(published("10.0.0.2"));
  });

  test("overwritten unseen: the renewal compares and gives way", () => {
    const { world, node } = held("10.3.7.0-24");
    node.connected = false;
    world.put("10.3.7.0-24", published("10.0.0.2"), 86400 * 2);
    node.connected = true;
    world.pass(23 * HOUR);
    expect(node.subnet).toBe("10.3.1.0/24");
    expect(world.records.get("10.3.7.0-24")?.value).toBe(published("10.0.0.2"));
  });

  test("ran out while we were cut off: taken again when we are back", () => {
    const { world, node } = held("10.3.7.0-24");
    node.connected = false;
    world.pass(48 * HOUR);
    expect([world.keys, node.subnet]).toEqual([[], "10.3.7.0/24"]);
    node.reconnect();
    expect([world.keys, node.uses]).toEqual([["10.3.7.0-24"], ["10.3.7.0/24"]]);
  });

  test("the store is wiped and starts at a low revision", () => {
    const { world, node } = held("10.3.7.0-24");
    node.connected = false;
    world.records.clear();
    world.revision = 1n;
    node.reconnect();
    expect([world.keys, node.uses]).toEqual([["10.3.7.0-24"], ["10.3.7.0/24"]]);
  });

  test("the store is restored to a state where our lease is older", () => {
    const { world, node } = held("10.3.7.0-24");
    const old = world.records.get("10.3.7.0-24");
    world.pass(23 * HOUR);
    if (old === undefined) throw new Error("no record");
    node.connected = false;
    world.records.set("10.3.7.0-24", { ...old, ends: world.now + HOUR });
    world.revision = old.revision;
    node.reconnect();
    world.pass(60_000);
    expect(world.records.get("10.3.7.0-24")?.ends).toBe(world.now + 24 * HOUR);
    expect(node.uses).toEqual(["10.3.7.0/24"]);
    expect(kinds(node)).not.toContain("lost");
  });

  test("deleted between our write and its answer", () => {
    const world = new World();
    const node = world.node("10.0.0.1").start();
    node.work();
    const create = node.operation;
    if (create?.kind !== "create") throw new Error("no create under way");
    node.operation = undefined;
    const answer = world.put(create.key, create.value, 86400);
    world.delete(create.key);
    node.send(answer);
    world.settle();
    expect([world.keys, kinds(node)]).toEqual([["10.3.1.0-24"], ["acquired", "lost", "renewed"]]);
  });

  test("gone in a snapshot that overtook our write's answer", () => {
    const world = new World();
    const node = world.node("10.0.0.1").start();
    node.work();
    const create = node.operation;
    if (create?.kind !== "create") throw new Error("no create under way");
    node.operation = undefined;
    node.connected = false;
    const answer = world.put(create.key, create.value, 86400);
    world.delete(create.key);
    node.reconnect();
    node.send(answer);
    world.settle();
    expect(world.keys).toEqual(["10.3.1.0-24"]);
  });

  test("a snapshot from before our write says nothing of it", () => {
    const { world, node } = held();
    node.send({ kind: "reset" });
    node.send({ kind: "synced", revision: world.revision - 1n });
    world.settle();
    expect([kinds(node), world.keys, node.uses.length]).toEqual([
      ["acquired", "renewed"],
      ["10.3.1.0-24"],
      1,
    ]);
  });

  test("events of other keys and old events mean nothing", () => {
    const { world, node } = held();
    node.send({ kind: "delete", key: "subnets/10.3.1.0-24&fd00::-64", revision: 99n });
    node.send({ kind: "delete", key: "subnets/10.3.2.0-24", revision: 99n });
    node.send({ kind: "delete", key: "subnets/10.3.1.0-24", revision: world.revision - 1n });
    node.send({ kind: "put", key: "config", value: "{}", revision: 99n, leaseId: "0" });
    expect(node.operation).toBeUndefined();
    expect(kinds(node)).toEqual(["acquired"]);
  });
});

describe("revoking it by hand", () => {
  test("another subnet is taken, and nobody takes the one before again", () => {
    const { world, node } = held("10.3.1.0-24");
    world.revoke("10.3.1.0-24");
    world.settle();
    expect([world.keys, node.uses]).toEqual([["10.3.2.0-24"], ["10.3.1.0/24", "10.3.2.0/24"]]);
    expect(node.reports.slice(1)).toEqual([
      "revoked: our lease of 10.3.1.0/24 was revoked by hand: taking another subnet if one is free",
      "moved: 10.3.2.0/24 is ours, in place of 10.3.1.0/24",
    ]);
    world.pass(1000 * HOUR);
    expect(node.subnet).toBe("10.3.2.0/24");
  });

  test("again, and the first may be taken once more", () => {
    const { world, node } = held("10.3.1.0-24");
    world.revoke("10.3.1.0-24");
    world.settle();
    world.revoke("10.3.2.0-24");
    world.settle();
    expect([world.keys, node.subnet]).toEqual([["10.3.1.0-24"], "10.3.1.0/24"]);
  });

  test("no other is free: the same again", () => {
    const world = new World();
    const node = world.node("10.0.0.1", { network: SMALL }).start();
    world.put("10.9.0.128-25", "garbage", 0);
    world.settle();
    world.revoke("10.9.0.64-26");
    world.settle();
    expect([node.subnet, world.keys]).toEqual(["10.9.0.64/26", ["10.9.0.128-25", "10.9.0.64-26"]]);
    expect(kinds(node)).toEqual(["acquired", "revoked", "renewed"]);
  });

  test("one was reserved for us before: that one is ours", () => {
    const { world, node } = held("10.3.1.0-24");
    world.put("10.3.44.0-24", published("10.0.0.1"), 0);
    world.revoke("10.3.1.0-24");
    world.settle();
    expect([node.subnet, world.keys]).toEqual(["10.3.44.0/24", ["10.3.44.0-24"]]);
    expect(node.life.expires).toBeUndefined();
  });

  test("after a renewal, and while another write fails", () => {
    const { world, node } = held("10.3.1.0-24");
    world.pass(23 * HOUR);
    node.send({ kind: "attributes", attributes: attributes("10.0.0.9") });
    node.operation = undefined;
    node.send({ kind: "failed", reason: "deadline exceeded" });
    world.revoke("10.3.1.0-24");
    world.settle();
    expect([node.subnet, world.keys]).toEqual(["10.3.2.0/24", ["10.3.2.0-24"]]);
  });

  test("while it is being written again: the write finds it gone", () => {
    const { world, node } = held("10.3.1.0-24");
    node.send({ kind: "attributes", attributes: attributes("10.0.0.9") });
    world.revoke("10.3.1.0-24");
    world.settle();
    expect([node.subnet, kinds(node)]).toEqual([
      "10.3.2.0/24",
      ["acquired", "collision", "revoked", "moved"],
    ]);
  });

  test("the list or the new subnet fails at first: the one before is left all the same", () => {
    const { world, node } = held("10.3.1.0-24");
    world.revoke("10.3.1.0-24");
    node.connected = false;
    world.settle();
    node.connected = true;
    world.pass(10_000);
    expect(node.subnet).toBe("10.3.2.0/24");
    world.revoke("10.3.2.0-24");
    node.work();
    node.connected = false;
    world.settle();
    node.reconnect();
    expect([node.subnet, kinds(node).slice(-3)]).toEqual(["10.3.1.0/24", ["revoked", "failed", "moved"]]);
  });

  test("its renewal is due and has failed: it may as well have run out, and is taken again", () => {
    const { world, node } = held("10.3.1.0-24");
    node.connected = false;
    world.pass(23 * HOUR + 1);
    node.connected = true;
    world.revoke("10.3.1.0-24");
    world.settle();
    expect(node.uses).toEqual(["10.3.1.0/24"]);
  });

  test.each<[string, (world: World, node: Node) => void]>([
    ["a key that alone was deleted", (world) => world.delete("10.3.1.0-24")],
    [
      "revoked out of our sight",
      (world, node) => {
        node.connected = false;
        world.revoke("10.3.1.0-24");
        node.reconnect();
      },
    ],
    [
      "a key deleted in a store that is wiped before we ask",
      (world, node) => {
        world.delete("10.3.1.0-24");
        world.revoke("10.3.1.0-24");
        world.records.clear();
        node.reconnect();
      },
    ],
    [
      "the etcd lease of another hand, which may be as short as it likes",
      (world) => {
        world.put("10.3.1.0-24", published("10.0.0.1"), 30);
        world.revoke("10.3.1.0-24");
      },
    ],
    [
      "a reservation",
      (world) => {
        world.put("10.3.1.0-24", published("10.0.0.1"), 0);
        world.delete("10.3.1.0-24");
      },
    ],
  ])("is not: %s", (_, happen) => {
    const { world, node } = held("10.3.1.0-24");
    happen(world, node);
    world.settle();
    expect([node.subnet, node.uses, world.keys]).toEqual(["10.3.1.0/24", ["10.3.1.0/24"], ["10.3.1.0-24"]]);
    expect(kinds(node)).not.toContain("revoked");
  });
});

describe("our key in other hands, but ours", () => {
  test("made a reservation by hand: it stays one", () => {
    const { world, node } = held();
    world.put("10.3.1.0-24", published("10.0.0.1"), 0);
    world.pass(100 * HOUR);
    expect(node.done).toEqual(["list", "create"]);
    expect(world.records.get("10.3.1.0-24")?.leaseId).toBe("0");
  });

  test("rewritten with something else, or garbage: put right after a minute", () => {
    for (const value of [published("10.0.0.1").replace("host-gw", "ipip"), "garbage"]) {
      const { world, node } = held();
      world.put("10.3.1.0-24", value, 86400);
      world.settle();
      expect([kinds(node).at(-1), node.operation]).toEqual(["contested", undefined]);
      world.pass(60_000);
      expect(world.records.get("10.3.1.0-24")?.value).toBe(published("10.0.0.1"));
      expect(node.uses).toEqual(["10.3.1.0/24"]);
    }
  });

  test("two nodes with one address overwrite each other at most once a minute", () => {
    const world = new World();
    const other = { ...attributes("10.0.0.1"), backendType: "ipip" };
    const [a, b] = [world.node("10.0.0.1").start(), world.node("10.0.0.1", { attributes: other }).start()];
    world.settle();
    world.pass(600_000);
    expect(a.done.length + b.done.length).toBeLessThan(30);
    expect(kinds(a)).toContain("contested");
  });

  test("the same again with another etcd lease: ours, and renewed soon", () => {
    const { world, node } = held();
    world.put("10.3.1.0-24", published("10.0.0.1"), 120);
    world.pass(60_000);
    expect(world.records.get("10.3.1.0-24")?.ends).toBe(60_000 + 24 * HOUR);
    expect(kinds(node)).toEqual(["acquired", "renewed"]);
  });
});

describe("the network changes", () => {
  test("our subnet still fits: nothing is done", () => {
    const { node } = held("10.3.7.0-24");
    node.send({ kind: "network", network: network({ Network: "10.3.0.0/20", SubnetLen: 24 }) });
    expect(node.operation).toBeUndefined();
  });

  test("it does not: the old lease goes, a new one comes", () => {
    const { world, node } = held("10.3.7.0-24");
    node.send({ kind: "network", network: SMALL });
    world.settle();
    expect([world.keys, node.uses]).toEqual([["10.9.0.64-26"], ["10.3.7.0/24", "10.9.0.64/26"]]);
    expect(kinds(node)).toEqual(["acquired", "lost", "lost", "moved"]);
  });

  test("and comes back: the subnet before is taken again, unless another node has it", () => {
    const { world, node } = held("10.3.7.0-24");
    const other = network({ Network: "10.8.0.0/20", SubnetLen: 24 });
    for (const each of [SMALL, other, SMALL, NET]) {
      node.random = 0.5;
      node.send({ kind: "network", network: each });
      world.settle();
    }
    expect(node.uses).toEqual([
      "10.3.7.0/24",
      expect.stringMatching(/^10\.9\./),
      expect.stringMatching(/^10\.8\./),
      node.uses[1],
      "10.3.7.0/24",
    ]);
    node.send({ kind: "network", network: SMALL });
    world.settle();
    world.put("10.3.7.0-24", published("10.0.0.2"), 0);
    node.random = 0;
    node.send({ kind: "network", network: NET });
    world.settle();
    expect([node.subnet, world.keys]).toEqual(["10.3.1.0/24", ["10.3.1.0-24", "10.3.7.0-24"]]);
  });

  test("while a write is under way: what was written is not used", () => {
    const world = new World();
    const node = world.node("10.0.0.1").start();
    node.work();
    node.send({ kind: "network", network: SMALL });
    world.settle();
    expect([world.keys, node.uses]).toEqual([["10.9.0.64-26"], ["10.9.0.64/26"]]);
  });

  test("an exhausted node looks again at once", () => {
    const world = new World();
    world.put("10.9.0.0-24", published("10.0.0.2"), 0);
    const node = world.node("10.0.0.1", { network: SMALL }).start();
    world.settle();
    node.send({ kind: "network", network: NET });
    world.settle();
    expect(node.subnet).toBe("10.3.1.0/24");
  });
});

test("whatever happens, no two nodes write one subnet, and in quiet each has its own in etcd", () => {
  const NODES = 4;
  const which = fc.nat({ max: NODES - 1 });
  const event = fc.oneof(
    { weight: 8, arbitrary: fc.record({ do: fc.constant("work" as const), node: which }) },
    { weight: 2, arbitrary: fc.record({ do: fc.constant("cut" as const), node: which }) },
    { weight: 2, arbitrary: fc.record({ do: fc.constant("reconnect" as const), node: which }) },
    { weight: 2, arbitrary: fc.record({ do: fc.constant("pass" as const), node: which }) },
    { weight: 1, arbitrary: fc.record({ do: fc.constant("delete" as const), node: which }) },
    { weight: 1, arbitrary: fc.record({ do: fc.constant("revoke" as const), node: which }) },
    { weight: 1, arbitrary: fc.record({ do: fc.constant("wipe" as const), node: which }) },
    { weight: 1, arbitrary: fc.record({ do: fc.constant("garbage" as const), node: which }) },
    { weight: 1, arbitrary: fc.record({ do: fc.constant("steal" as const), node: which }) },
  );
  const tiny = network({ Network: "10.9.0.0/24", SubnetLen: 27 });
  fc.assert(
    fc.property(
      fc.array(event, { maxLength: 60 }),
      fc.array(fc.double({ min: 0, max: 0.99, noNaN: true }), { minLength: 4, maxLength: 4 }),
      (events, randoms) => {
        const world = new World();
        const nodes = Array.from({ length: NODES }, (_, i) => {
          const node = world.node(`10.0.0.${i + 1}`, { network: tiny, ttlSeconds: 600 }).start();
          node.random = randoms[i] ?? 0;
          return node;
        });
        for (const { do: what, node: i } of events) {
          const node = nodes[i];
          if (node === undefined) continue;
          const { subnet: mine } = node.life;
          const key = mine === undefined ? undefined : `${formatIpv4(mine.address)}-${mine.length}`;
          if (what === "work") node.work();
          if (what === "cut") node.connected = false;
          if (what === "reconnect") node.reconnect();
          if (what === "pass") world.pass(200_000);
          if (what === "delete" && key !== undefined && world.records.has(key)) world.delete(key);
          if (what === "revoke" && key !== undefined && world.records.has(key)) world.revoke(key);
          if (what === "garbage" && key !== undefined) world.put(key, "garbage", 600);
          if (what === "steal" && key !== undefined) world.put(key, published("10.0.0.77"), 600);
          if (what === "wipe") {
            world.records.clear();
            world.revision = 1n;
            for (const one of nodes) if (one.connected) one.reconnect();
          }
        }
        for (const node of nodes) node.reconnect();
        world.pass(1_500_000);
        const subnets = nodes.map((node) => node.subnet);
        expect(new Set(subnets).size).toBe(NODES);
        for (const [i, node] of nodes.entries()) {
          expect(node.life.phase.kind).toBe("held");
          expect(world.records.get(node.subnet.replace("/", "-"))?.value).toBe(published(`10.0.0.${i + 1}`));
        }
      },
    ),
    { numRuns: 300 },
  );
});
