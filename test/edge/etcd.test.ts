/**
 * The store against a real etcd, with every fault that its client library would turn into a lost event.
 *
 * `Member` is one etcd process on loopback with a data directory of its own; it dies with this process. Its
 * JSON gateway and etcdctl write what other nodes would write. `Follower` runs a watch, folds its events the
 * way the agent does, and resolves when a condition holds: nothing here waits for a time to pass.
 */
import { type ChildProcess, execFileSync, spawn } from "node:child_process";
import { once } from "node:events";
import {
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { connect, createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import type { StoreEvent } from "../../src/core/model.ts";
import {
  backoffMs,
  openStore,
  type Store,
  type StoreError,
  type StoreOptions,
  type StoreState,
} from "../../src/edge/etcd.ts";

const PREFIX = "/coreos.com/network";
const HOST = "127.0.0.1";

const root = mkdtempSync(join(tmpdir(), "twill-etcd-"));
const cleanups: (() => void | Promise<void>)[] = [];

async function clean(): Promise<void> {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
}

afterEach(clean);
afterAll(async () => {
  await clean();
  rmSync(root, { recursive: true, force: true });
});

// From just below the range that the kernel takes ports of connections from: one that is free when it is asked for must
// still be free when etcd starts, and again when it comes back, while other tests connect.
let lastPort = Number(readFileSync("/proc/sys/net/ipv4/ip_local_port_range", "utf8").split(/\s/)[0]);

async function freePort(): Promise<number> {
  while (lastPort > 1024) {
    const port = --lastPort;
    const server = createServer();
    const bound = new Promise<boolean>((resolve) => {
      server.once("listening", () => resolve(true)).once("error", () => resolve(false));
    });
    server.listen(port, HOST);
    if (!(await bound)) continue;
    server.close();
    await once(server, "close");
    return port;
  }
  throw new Error("no free port below the range of connections");
}

/** One etcd process; stopped and started again on the same port and data directory. */
class Member {
  readonly port: number;
  readonly #peerPort: number;
  readonly #tls: readonly string[];
  #cluster: readonly Member[] = [this];
  dir: string;
  #process: ChildProcess | undefined;

  private constructor(port: number, peerPort: number, tls: readonly string[]) {
    this.port = port;
    this.#peerPort = peerPort;
    this.#tls = tls;
    this.dir = mkdtempSync(join(root, "data-"));
    cleanups.push(() => this.kill());
  }

  static async prepare(tls: readonly string[] = []): Promise<Member> {
    return new Member(await freePort(), await freePort(), tls);
  }

  static async start(tls: readonly string[] = []): Promise<Member> {
    const member = await Member.prepare(tls);
    await member.start();
    return member;
  }

  /** Three members of one cluster, with elections quick enough for a test. */
  static async cluster(): Promise<[Member, Member, Member]> {
    const members: [Member, Member, Member] = [
      await Member.prepare(),
      await Member.prepare(),
      await Member.prepare(),
    ];
    for (const member of members) member.#cluster = members;
    await Promise.all(members.map((member) => member.start()));
    return members;
  }

  get #peer(): string {
    return `http://${HOST}:${this.#peerPort}`;
  }

  get url(): string {
    return `${this.#tls.length > 0 ? "https" : "http"}://${HOST}:${this.port}`;
  }

  async start(): Promise<void> {
    const name = (member: Member) => `m${member.port}`;
    const cluster = this.#cluster.map((member) => `${name(member)}=${member.#peer}`).join(",");
    const child = spawn(
      "setpriv",
      [
        ...["--pdeathsig", "KILL", "--", "/usr/bin/etcd", "--logger", "zap", "--data-dir", this.dir],
        ...["--listen-client-urls", this.url, "--advertise-client-urls", this.url],
        ...["--listen-peer-urls", this.#peer, "--initial-advertise-peer-urls", this.#peer],
        ...["--name", name(this), "--initial-cluster", cluster, ...this.#tls],
      ],
      { stdio: ["ignore", "ignore", "pipe"] },
    );
    this.#process = child;
    const log: string[] = [];
    for await (const line of createInterface({ input: child.stderr })) {
      log.push(line);
      if (line.includes("serving client traffic")) {
        child.stderr.resume();
        return;
      }
    }
    throw new Error(`etcd did not start:\n${log.slice(-5).join("\n")}`);
  }

  async kill(): Promise<void> {
    const child = this.#process;
    this.#process = undefined;
    if (!child || child.exitCode !== null || child.signalCode !== null) return;
    const exit = once(child, "exit");
    child.kill("SIGKILL");
    await exit;
  }

  /** Stops it from running without closing anything, as a hung host would; `kill` still ends it. */
  freeze(): void {
    this.#process?.kill("SIGSTOP");
  }

  /** Forgets everything: the next start finds an empty directory. */
  wipe(): void {
    this.dir = mkdtempSync(join(root, "data-"));
  }

  /** Makes a new data directory from a snapshot, as an operator does after a loss. */
  restore(file: string): void {
    this.wipe();
    rmSync(this.dir, { recursive: true });
    const name = `m${this.port}`;
    this.ctl(
      ...["snapshot", "restore", file, "--data-dir", this.dir, "--name", name],
      ...["--initial-cluster", `${name}=${this.#peer}`, "--initial-advertise-peer-urls", this.#peer],
    );
  }

  ctl(...args: string[]): string {
    const env = { ...process.env, ETCDCTL_API: "3" };
    return execFileSync("etcdctl", ["--endpoints", this.url, ...args], {
      env,
      encoding: "utf8",
      stdio: "pipe",
    });
  }

  /** Writes over the JSON gateway, which is quick enough for thousands of keys. */
  async put(key: string, value: string, lease?: string): Promise<bigint> {
    return this.#post("kv/put", { key: base64(key), value: base64(value), ...(lease ? { lease } : {}) });
  }

  /** Writes until it succeeds: etcd drops what it was given while it had no leader. */
  async putDuringElection(key: string, value: string): Promise<void> {
    for (;;) {
      try {
        await this.put(key, value);
        return;
      } catch (error) {
        if (!/request timed out|leader changed|no leader/.test(String(error))) throw error;
      }
    }
  }

  async delete(key: string): Promise<bigint> {
    return this.#post("kv/deleterange", { key: base64(key) });
  }

  async compact(revision: bigint): Promise<void> {
    await this.#post("kv/compaction", { revision: String(revision), physical: true });
  }

  async #post(path: string, body: object): Promise<bigint> {
    const response = await fetch(`${this.url}/v3/${path}`, { method: "POST", body: JSON.stringify(body) });
    const answer = (await response.json()) as { header?: { revision?: string } };
    if (!response.ok) throw new Error(`${path}: ${JSON.stringify(answer)}`);
    return BigInt(answer.header?.revision ?? 0);
  }
}

/** A key relative to the prefix, or any other if it starts with a slash. */
function base64(text: string): string {
  const isKey = text === "config" || text.startsWith("subnets/");
  return Buffer.from(isKey ? `${PREFIX}/${text}` : text, "latin1").toString("base64");
}

/**
 * A wire to etcd that can be cut at the worst moment: after a request with `marker` in it went through, and
 * before any answer comes back. `cut` breaks what is open; `end` also refuses what comes later.
 */
class Wire {
  readonly #server: Server;
  readonly #pairs = new Set<[Socket, Socket]>();
  /** Pairs that nothing passes any more. */
  readonly #deserted = new Set<[Socket, Socket]>();
  #marker: string | undefined;
  #holding = false;
  #stall: { marker: string; times: number; reached: () => void } | undefined;
  #stalled: (() => void)[] | undefined;
  #passed: () => void = () => undefined;

  private constructor(target: number) {
    this.#server = createServer((near) => {
      const far = connect(target, HOST);
      const pair: [Socket, Socket] = [near, far];
      this.#pairs.add(pair);
      near.on("data", (bytes) => {
        if (this.#deserted.has(pair)) return;
        if (this.#marker !== undefined && bytes.includes(this.#marker)) {
          this.#marker = undefined;
          this.#holding = true;
          this.#passed();
        }
        if (this.#stall && bytes.includes(this.#stall.marker)) {
          this.#stall.times -= 1;
          if (this.#stall.times === 0) {
            this.#stalled = [];
            this.#stall.reached();
            this.#stall = undefined;
          }
        }
        if (this.#stalled) this.#stalled.push(() => far.write(bytes));
        else far.write(bytes);
      });
      far.on("data", (bytes) => this.#holding || this.#deserted.has(pair) || near.write(bytes));
      for (const socket of pair) {
        socket.on("error", () => socket.destroy());
        socket.on("close", () => {
          this.#pairs.delete(pair);
          near.destroy();
          far.destroy();
        });
      }
    });
  }

  static async to(member: Member): Promise<Wire> {
    const wire = new Wire(member.port);
    wire.#server.listen(0, HOST);
    await once(wire.#server, "listening");
    cleanups.push(() => wire.end());
    return wire;
  }

  get url(): string {
    const address = this.#server.address();
    return `http://${HOST}:${typeof address === "object" && address ? address.port : 0}`;
  }

  /** How many connections are open. */
  get connections(): number {
    return this.#pairs.size;
  }

  /** Resolves when bytes with this text went to etcd; from then on no answer comes back until `cut`. */
  hold(marker: string): Promise<void> {
    this.#marker = marker;
    return new Promise((resolve) => {
      this.#passed = resolve;
    });
  }

  /** Resolves when a request with this text came for the n-th time; it waits, with all after it, for `release`. */
  stall(marker: string, times: number): Promise<void> {
    return new Promise((reached) => {
      this.#stall = { marker, times, reached };
    });
  }

  release(): void {
    const waiting = this.#stalled ?? [];
    this.#stalled = undefined;
    for (const send of waiting) send();
  }

  /** What is open goes on to look open, and leads nowhere; what comes later gets through. */
  desert(): void {
    for (const pair of this.#pairs) this.#deserted.add(pair);
  }

  cut(): void {
    for (const pair of this.#pairs) for (const socket of pair) socket.destroy();
    this.#holding = false;
  }

  end(): void {
    this.#server.close();
    this.cut();
  }
}

interface Opened {
  store: Store;
  states: StoreState[];
  warnings: string[];
  notes: string[];
  /** Resolves when the condition on the above holds. */
  until(condition: () => boolean): Promise<void>;
}

async function open(endpoints: readonly string[], more: Partial<StoreOptions> = {}): Promise<Opened> {
  const states: StoreState[] = [];
  const warnings: string[] = [];
  const notes: string[] = [];
  const waiters = new Set<() => void>();
  const told = () => {
    for (const waiter of waiters) waiter();
  };
  const note = (list: string[]) => (fields: object, message: string) => {
    list.push(`${message} ${JSON.stringify(fields)}`);
    told();
  };
  const store = await openStore({
    endpoints,
    prefix: PREFIX,
    log: { debug: note(notes), warn: note(warnings) },
    onState: (state) => {
      states.push(state);
      told();
    },
    ...more,
  });
  cleanups.push(() => store.close());
  const until = (condition: () => boolean) =>
    new Promise<void>((resolve) => {
      const waiter = () => {
        if (!condition()) return;
        waiters.delete(waiter);
        resolve();
      };
      waiters.add(waiter);
      waiter();
    });
  return { store, states, warnings, notes, until };
}

/** Folds a watch as the agent does: a snapshot replaces everything, at once, when it is complete. */
class Follower {
  readonly events: StoreEvent[] = [];
  /** What the store holds as far as the events say. */
  keys = new Map<string, string>();
  snapshots = 0;
  #coming: Map<string, string> | undefined;
  readonly #stop = new AbortController();
  readonly #done: Promise<void>;
  readonly #waiters = new Set<() => void>();

  constructor(store: Store) {
    this.#done = this.#run(store);
    cleanups.push(() => this.stop());
  }

  async #run(store: Store): Promise<void> {
    for await (const event of store.watch(this.#stop.signal)) {
      this.events.push(event);
      switch (event.kind) {
        case "reset":
          this.#coming = new Map();
          break;
        case "synced":
          if (this.#coming === undefined) throw new Error("synced without reset");
          this.keys = this.#coming;
          this.#coming = undefined;
          this.snapshots += 1;
          break;
        case "put":
          (this.#coming ?? this.keys).set(event.key, event.value);
          break;
        case "delete":
          // Deleting what is not there would be an invented event.
          if (!this.keys.delete(event.key)) throw new Error(`deleted ${event.key}, which nobody put`);
          break;
      }
      for (const waiter of this.#waiters) waiter();
    }
  }

  until(condition: (self: Follower) => boolean): Promise<void> {
    const seen = new Promise<void>((resolve) => {
      const waiter = () => {
        if (!condition(this)) return;
        this.#waiters.delete(waiter);
        resolve();
      };
      this.#waiters.add(waiter);
      waiter();
    });
    return Promise.race([
      seen,
      this.#done.then(() => {
        throw new Error("the watch ended");
      }),
    ]);
  }

  async stop(): Promise<void> {
    this.#stop.abort();
    await this.#done;
  }
}

const synced = (count: number) => (follower: Follower) => follower.snapshots >= count;

/** The error that a promise rejects with; resolving is a failure. */
async function failure(promise: Promise<unknown>): Promise<StoreError> {
  return promise.then(
    (value) => {
      throw new Error(`did not fail: ${JSON.stringify(value)}`);
    },
    (error: StoreError) => error,
  );
}

describe("the pause between attempts", () => {
  it.each([
    [0, 50, 100],
    [1, 100, 200],
    [4, 800, 1600],
    [6, 2500, 5000],
    [1000, 2500, 5000],
  ])("after round %i of failures is %i to %i ms long", (round, shortest, longest) => {
    expect(backoffMs(round, 0)).toBe(shortest);
    expect(backoffMs(round, 1)).toBe(longest);
  });

  it("is another one on each node, between the two", () => {
    const pauses = Array.from({ length: 1000 }, () => backoffMs(6, Math.random()));
    expect(new Set(pauses).size).toBeGreaterThan(990);
    expect(Math.min(...pauses)).toBeGreaterThanOrEqual(2500);
    expect(Math.max(...pauses)).toBeLessThan(5000);
    // Spread over the whole of it: nodes that lost etcd at once come back over seconds.
    expect(Math.max(...pauses) - Math.min(...pauses)).toBeGreaterThan(2000);
  });
});

describe("endpoints and prefix", () => {
  const log = { debug: () => undefined, warn: () => undefined };
  const attempt = (endpoints: string[], prefix = PREFIX) => failure(openStore({ endpoints, prefix, log }));

  it("names what cannot be read", async () => {
    expect((await attempt(["", " "])).message).toMatch(/no etcd endpoint is given/);
    expect((await attempt(["http://a:1", "https://b:2"])).message).toMatch(/mix http .* and https/);
    expect((await attempt(["unix:///run/etcd"])).message).toMatch(/"unix:\/\/\/run\/etcd" cannot be read/);
    expect((await attempt(["http://a:99999"])).code).toBe("config");
    expect((await attempt(["http://a:1/v2"])).code).toBe("config");
    expect((await attempt(["http://a:1"], "")).message).toMatch(/prefix is empty/);
  });

  it("trims, skips empty ones and tolerates a slash at either end", async () => {
    const etcd = await Member.start();
    await etcd.put("config", "{}");
    const { store } = await open([" ", ` ${etcd.url}/ `, etcd.url, ""], { prefix: `${PREFIX}//` });
    expect(await store.get("config")).toMatchObject({ key: "config", value: "{}" });
  });
});

describe("watch", () => {
  it("lists, then follows, and leaves other keys alone", async () => {
    const etcd = await Member.start();
    await etcd.put("config", '{"Network":"10.5.0.0/16"}');
    await etcd.put("subnets/10.5.1.0-24", "one");
    await etcd.put(`${PREFIX}/blue/config`, "another network");
    await etcd.put(`${PREFIX}/subnets-old`, "no slash");
    await etcd.put(`${PREFIX}2/config`, "longer prefix");
    const { store, states } = await open([etcd.url]);
    const follower = new Follower(store);
    await follower.until(synced(1));
    expect(follower.events).toEqual([
      { kind: "reset" },
      { kind: "put", key: "config", value: '{"Network":"10.5.0.0/16"}', revision: 2n, leaseId: "0" },
      { kind: "put", key: "subnets/10.5.1.0-24", value: "one", revision: 3n, leaseId: "0" },
      { kind: "synced", revision: 6n },
    ]);
    await etcd.put("subnets/10.5.2.0-24", "two");
    await etcd.put(`${PREFIX}/blue/subnets/10.6.2.0-24`, "another network");
    await etcd.delete("subnets/10.5.1.0-24");
    await follower.until(({ events }) => events.length === 6);
    expect(follower.events.slice(4)).toEqual([
      { kind: "put", key: "subnets/10.5.2.0-24", value: "two", revision: 7n, leaseId: "0" },
      { kind: "delete", key: "subnets/10.5.1.0-24", revision: 9n },
    ]);
    expect(states).toEqual([{ connected: true, endpoint: etcd.url, since: expect.any(Number) }]);
  });

  it("gives garbage a name: bytes that are no text", async () => {
    const etcd = await Member.start();
    await etcd.put("subnets/\xff\xfe", "\xff");
    const { store } = await open([etcd.url]);
    const follower = new Follower(store);
    await follower.until(synced(1));
    await etcd.delete("subnets/\xff\xfe");
    await follower.until(({ keys }) => keys.size === 0);
    expect(follower.events.map((event) => "key" in event && event.key)).toContain("subnets/\xff\xfe");
  });

  it("sees what changed while it was disconnected", async () => {
    const etcd = await Member.start();
    await etcd.put("subnets/a", "1");
    await etcd.put("subnets/b", "1");
    const { store, states, until } = await open([etcd.url]);
    const follower = new Follower(store);
    await follower.until(synced(1));
    await etcd.kill();
    await until(() => states.at(-1)?.connected === false);
    // The changes happen on a second port, so that the watch cannot see them as they happen.
    const aside = await Member.prepare();
    aside.dir = etcd.dir;
    await aside.start();
    await aside.put("subnets/a", "2");
    await aside.delete("subnets/b");
    await aside.put("subnets/c", "1");
    await aside.kill();
    await etcd.start();
    await follower.until(synced(2));
    expect([...follower.keys]).toEqual([
      ["subnets/a", "2"],
      ["subnets/c", "1"],
    ]);
    await etcd.put("subnets/d", "1");
    await follower.until(({ keys }) => keys.has("subnets/d"));
    expect(states.map(({ connected }) => connected)).toEqual([true, false, true]);
    expect(states[1]?.error?.message).toContain(etcd.url);
  });

  it("takes a new list when the history was compacted while it was disconnected", async () => {
    const etcd = await Member.start();
    await etcd.put("subnets/a", "1");
    const { store, states, until } = await open([etcd.url]);
    const follower = new Follower(store);
    await follower.until(synced(1));
    await etcd.kill();
    await until(() => states.at(-1)?.connected === false);
    const aside = await Member.prepare();
    aside.dir = etcd.dir;
    await aside.start();
    for (let i = 0; i < 10; i += 1) await aside.put("subnets/b", String(i));
    await aside.compact(await aside.delete("subnets/a"));
    await aside.kill();
    await etcd.start();
    await follower.until(synced(2));
    expect([...follower.keys]).toEqual([["subnets/b", "9"]]);
  });

  it("notices a wiped etcd that was filled past the old revision, and one that was not", async () => {
    const etcd = await Member.start();
    for (let i = 0; i < 5; i += 1) await etcd.put("subnets/a", String(i));
    const { store } = await open([etcd.url]);
    const follower = new Follower(store);
    await follower.until(synced(1));

    await etcd.kill();
    etcd.wipe();
    await etcd.start();
    await follower.until(({ snapshots, keys }) => snapshots >= 2 && keys.size === 0);
    // Revision 2, far below the 6 that was seen before: the fault that leaves others blind.
    await etcd.put("subnets/b", "new");
    await follower.until(({ keys }) => keys.get("subnets/b") === "new");

    await etcd.kill();
    etcd.wipe();
    const aside = await Member.prepare();
    aside.dir = etcd.dir;
    await aside.start();
    for (let i = 0; i < 20; i += 1) await aside.put("subnets/c", String(i));
    await aside.kill();
    await etcd.start();
    await follower.until(({ keys }) => keys.get("subnets/c") === "19");
    expect([...follower.keys.keys()]).toEqual(["subnets/c"]);
  });

  it("follows a snapshot restored at a lower revision", async () => {
    const etcd = await Member.start();
    await etcd.put("subnets/a", "old");
    const file = join(root, "snapshot.db");
    etcd.ctl("snapshot", "save", file);
    for (let i = 0; i < 5; i += 1) await etcd.put("subnets/a", `new ${i}`);
    const { store } = await open([etcd.url]);
    const follower = new Follower(store);
    await follower.until(synced(1));
    expect(follower.keys.get("subnets/a")).toBe("new 4");
    await etcd.kill();
    etcd.restore(file);
    await etcd.start();
    await follower.until(({ keys }) => keys.get("subnets/a") === "old");
    await etcd.put("subnets/b", "1");
    await follower.until(({ keys }) => keys.has("subnets/b"));
  });

  it("waits for an etcd that starts late, and says so once", async () => {
    const etcd = await Member.prepare();
    const { store, states, until } = await open([etcd.url]);
    const follower = new Follower(store);
    await until(() => states.length === 1);
    // Some rounds of vain calls, in which the watch fails more than once as well.
    for (let i = 0; i < 3; i += 1) {
      const error = await failure(store.get("config"));
      expect(error.code).toBe("unavailable");
      expect(error.message).toMatch(/cannot be used .*(ECONNREFUSED|no connection).*: check that it runs/);
    }
    await etcd.start();
    await follower.until(synced(1));
    expect(states.map(({ connected }) => connected)).toEqual([false, true]);
    expect(states[0]?.error?.message).toMatch(/ECONNREFUSED/);
  });

  it("says why also where another client has found out", async () => {
    const etcd = await Member.prepare();
    for (let i = 0; i < 5; i += 1) {
      const { store } = await open([etcd.url]);
      for (let j = 0; j < 3; j += 1) {
        const { message } = await failure(store.get("config"));
        expect(message).toMatch(
          /cannot be used \((connect ECONNREFUSED .*|no connection)\): check that it runs/,
        );
      }
    }
  });

  it("begins anew at once when told that the way has changed, sooner than silence would be noticed", {
    timeout: 4_500,
  }, async () => {
    const etcd = await Member.start();
    const wire = await Wire.to(etcd);
    const { store, states } = await open([wire.url]);
    const follower = new Follower(store);
    await follower.until(synced(1));
    await etcd.put("config", "1");
    expect((await store.get("config"))?.value).toBe("1");
    wire.desert();
    const call = store.get("config");
    await etcd.put("config", "2");
    store.reconnect();
    await follower.until(({ keys }) => keys.get("config") === "2");
    expect((await call)?.value).toBe("2");
    expect(states.map(({ connected }) => connected)).toEqual([true]);
  });

  it("ends when it is told to, connected or not, and leaves nothing open", async () => {
    const etcd = await Member.start();
    const sockets = () => readdirSync("/proc/self/fd").length;
    const { store } = await open([etcd.url]);
    await store.get("config");
    const before = sockets();
    for (let i = 0; i < 20; i += 1) {
      const follower = new Follower(store);
      await follower.until(synced(1));
      await follower.stop();
    }
    expect(sockets()).toBeLessThanOrEqual(before + 2);
    const last = new Follower(store);
    await last.until(synced(1));
    await etcd.kill();
    await last.stop();
    store.close();
    expect((await failure(store.get("config"))).code).toBe("closed");
    for await (const event of store.watch(new AbortController().signal)) throw new Error(event.kind);
  });

  it("loses and invents nothing while etcd is killed under a stream of writes", async () => {
    const etcd = await Member.start();
    const { store } = await open([etcd.url]);
    const follower = new Follower(store);
    await follower.until(synced(1));
    const truth = new Map<string, string>();
    for (let round = 0; round < 3; round += 1) {
      for (let i = 0; i < 100; i += 1) {
        const key = `subnets/${(i * 7 + round) % 40}`;
        if (i % 5 === 4 && truth.delete(key)) await etcd.delete(key);
        else {
          await etcd.put(key, `${round}.${i}`);
          truth.set(key, `${round}.${i}`);
        }
        if (i === 50) {
          await etcd.kill();
          await etcd.start();
        }
      }
      await etcd.put("config", String(round));
      truth.set("config", String(round));
      await follower.until(({ keys }) => keys.get("config") === String(round));
      expect(new Map([...follower.keys].sort())).toEqual(new Map([...truth].sort()));
    }
  });

  it("lists 2000 keys, and values too large for one message", async () => {
    const etcd = await Member.start();
    const numbers = Array.from({ length: 2_000 }, (_, i) => i);
    for (let i = 0; i < numbers.length; i += 50) {
      await Promise.all(
        numbers.slice(i, i + 50).map((n) => etcd.put(`subnets/10.${n >> 8}.${n & 255}.0-24`, `${n}`)),
      );
    }
    const { store } = await open([etcd.url]);
    const follower = new Follower(store);
    await follower.until(synced(1));
    expect(follower.keys.size).toBe(2_000);
    expect(follower.snapshots).toBe(1);
    const { records, revision } = await store.list("subnets/");
    expect(records).toHaveLength(2_000);
    expect(revision).toBe(2_001n);
    expect(records.map(({ key }) => key)).toEqual(records.map(({ key }) => key).sort());

    const large = "x".repeat(1_400_000);
    for (let i = 0; i < 14; i += 1) await etcd.put(`subnets/large-${i}`, large);
    const again = await store.list("subnets/large");
    expect(again.records).toHaveLength(14);
  });

  it("reports a change once that falls between the watch and the list", async () => {
    const etcd = await Member.start();
    await etcd.put("subnets/a", "1");
    const wire = await Wire.to(etcd);
    const { store } = await open([wire.url]);
    // The prefix goes over the wire with the request for the watch, then with the one for the list.
    const listing = wire.stall(`${PREFIX}/`, 2);
    const follower = new Follower(store);
    await listing;
    await etcd.delete("subnets/a");
    await etcd.put("subnets/b", "1");
    wire.release();
    await follower.until(synced(1));
    await etcd.put("subnets/b", "2");
    await follower.until(({ keys }) => keys.get("subnets/b") === "2");
    expect(follower.events).toEqual([
      { kind: "reset" },
      { kind: "put", key: "subnets/b", value: "1", revision: 4n, leaseId: "0" },
      { kind: "synced", revision: 4n },
      { kind: "put", key: "subnets/b", value: "2", revision: 5n, leaseId: "0" },
    ]);
  });

  it("takes a new list when etcd cancels it, as it was too slow and the rest was compacted", async () => {
    const etcd = await Member.start();
    const { store, states } = await open([etcd.url]);
    const events = store.watch(new AbortController().signal);
    cleanups.push(async () => {
      await events.return();
    });
    expect((await events.next()).value).toEqual({ kind: "reset" });
    expect((await events.next()).value).toMatchObject({ kind: "synced" });
    // Far more than all buffers on the way hold.
    const filler = "x".repeat(1_000);
    for (let i = 0; i < 2_000; i += 1) await etcd.put("subnets/a", `${i} ${filler}`);
    await etcd.compact(await etcd.put("subnets/b", "last"));
    let next = 0;
    for (;;) {
      const { value: event } = await events.next();
      if (event?.kind === "reset") break;
      expect(event).toMatchObject({ kind: "put", key: "subnets/a", value: `${next} ${filler}` });
      next += 1;
    }
    expect(next).toBeLessThan(2_000);
    expect((await events.next()).value).toMatchObject({ key: "subnets/a", value: `1999 ${filler}` });
    expect((await events.next()).value).toMatchObject({ key: "subnets/b", value: "last" });
    expect((await events.next()).value).toMatchObject({ kind: "synced" });
    expect(states.find(({ connected }) => !connected)?.error?.code).toBe("compacted");
  });

  it("reads on only as fast as the events are taken", async () => {
    const etcd = await Member.start();
    const { store } = await open([etcd.url]);
    const events = store.watch(new AbortController().signal);
    cleanups.push(async () => {
      await events.return();
    });
    expect((await events.next()).value).toEqual({ kind: "reset" });
    expect((await events.next()).value).toMatchObject({ kind: "synced" });
    for (let i = 0; i < 500; i += 1) await etcd.put("subnets/a", String(i));
    const seen: string[] = [];
    while (seen.length < 500) {
      const { value } = await events.next();
      if (value?.kind === "put") seen.push(value.value);
    }
    expect(seen).toEqual(Array.from({ length: 500 }, (_, i) => String(i)));
  });
});

describe("own key", () => {
  it("is created by one of ten rivals", async () => {
    const etcd = await Member.start();
    const rivals = await Promise.all(Array.from({ length: 10 }, () => open([etcd.url])));
    const outcomes = await Promise.all(
      rivals.map(({ store }, i) => store.create("subnets/10.5.1.0-24", `node ${i}`, 3_600)),
    );
    const won = outcomes.flatMap((outcome, i) => (outcome.created ? [{ ...outcome, i }] : []));
    expect(won).toHaveLength(1);
    const [winner] = won;
    const record = await rivals[0]?.store.get("subnets/10.5.1.0-24");
    expect(record).toEqual({
      key: "subnets/10.5.1.0-24",
      value: `node ${winner?.i}`,
      revision: winner?.revision,
      leaseId: winner?.leaseId,
    });
    // The losers gave their leases back.
    expect(etcd.ctl("lease", "list")).toMatch(/found 1 leases/);
    const left = await rivals[0]?.store.timeToLive(winner?.leaseId ?? "");
    expect(left).toBeGreaterThan(3_500);
    expect(left).toBeLessThanOrEqual(3_600);
  });

  it("is renewed only as long as it is ours", async () => {
    const etcd = await Member.start();
    const { store } = await open([etcd.url]);
    const created = await store.create("subnets/a", "one", 600);
    if (!created.created) throw new Error("not created");
    const renewed = await store.renew("subnets/a", "two", {
      expectRevision: created.revision,
      ttlSeconds: 900,
    });
    if (!renewed.renewed) throw new Error("not renewed");
    expect(renewed.revision).toBeGreaterThan(created.revision);
    expect(renewed.leaseId).not.toBe(created.leaseId);
    expect(await store.get("subnets/a")).toMatchObject({ value: "two", leaseId: renewed.leaseId });
    expect(await store.timeToLive(created.leaseId)).toBeUndefined();
    expect(await store.timeToLive(renewed.leaseId)).toBeGreaterThan(600);

    const theirs = await etcd.put("subnets/a", "theirs");
    const lost = await store.renew("subnets/a", "three", {
      expectRevision: renewed.revision,
      ttlSeconds: 900,
    });
    expect(lost).toEqual({
      renewed: false,
      current: { key: "subnets/a", value: "theirs", revision: theirs, leaseId: "0" },
    });
    expect(await store.remove("subnets/a", renewed.revision)).toMatchObject({ removed: false });
    expect(await store.remove("subnets/a", theirs)).toEqual({ removed: true });
    expect(await store.renew("subnets/a", "four", { expectRevision: theirs, ttlSeconds: 900 })).toEqual({
      renewed: false,
    });
    expect(await store.remove("subnets/a", theirs)).toEqual({ removed: false });
    expect(await store.get("subnets/a")).toBeUndefined();
  });

  it("leaves the lease of a stranger alone, as it may hold more", async () => {
    const etcd = await Member.start();
    const { store } = await open([etcd.url]);
    const hex = /lease ([0-9a-f]+) granted/.exec(etcd.ctl("lease", "grant", "600"))?.[1] ?? "";
    etcd.ctl("put", `--lease=${hex}`, `${PREFIX}/subnets/a`, "flannel's");
    etcd.ctl("put", `--lease=${hex}`, "/other", "kept");
    const record = await store.get("subnets/a");
    if (!record) throw new Error("missing");
    expect(record.leaseId).toBe(BigInt(`0x${hex}`).toString());
    const term = { expectRevision: record.revision, ttlSeconds: 600 };
    expect(await store.renew("subnets/a", "ours", term)).toMatchObject({ renewed: true });
    expect(etcd.ctl("get", "/other")).toMatch(/kept/);
  });

  it("stays a reservation", async () => {
    const etcd = await Member.start();
    const { store } = await open([etcd.url]);
    const expectRevision = await etcd.put("subnets/a", "reserved");
    const renewed = await store.renew("subnets/a", "taken", { expectRevision, reservation: true });
    expect(renewed).toMatchObject({ renewed: true, leaseId: "0" });
    expect(await store.get("subnets/a")).toMatchObject({ value: "taken", leaseId: "0" });
    expect(await store.timeToLive("0")).toBeUndefined();
    expect(etcd.ctl("lease", "list")).toMatch(/found 0 leases/);
    expect(await store.renew("subnets/a", "late", { expectRevision, reservation: true })).toMatchObject({
      renewed: false,
      current: { value: "taken" },
    });
  });

  it("vanishes from the watch when its lease is revoked", async () => {
    const etcd = await Member.start();
    const { store } = await open([etcd.url]);
    const follower = new Follower(store);
    await follower.until(synced(1));
    const created = await store.create("subnets/a", "one", 600);
    if (!created.created) throw new Error("not created");
    await follower.until(({ keys }) => keys.has("subnets/a"));
    expect(follower.events.at(-1)).toMatchObject({ leaseId: created.leaseId, revision: created.revision });
    etcd.ctl("lease", "revoke", BigInt(created.leaseId).toString(16));
    await follower.until(({ keys }) => !keys.has("subnets/a"));
    expect(await store.timeToLive(created.leaseId)).toBeUndefined();
  });
});

describe("a lost answer", () => {
  it("does not make a created key look lost, nor a renewed or removed one", async () => {
    const etcd = await Member.start();
    const wire = await Wire.to(etcd);
    const { store } = await open([wire.url]);
    const direct = new Follower((await open([etcd.url])).store);
    await direct.until(synced(1));
    /** Runs a write whose first answer never arrives although etcd carried it out. */
    const interrupted = async <T>(
      marker: string,
      write: () => Promise<T>,
      done: (f: Follower) => boolean,
    ) => {
      const held = wire.hold(marker);
      const outcome = write();
      await held;
      await direct.until(done);
      wire.cut();
      return outcome;
    };
    const has = (value: string) => (follower: Follower) => follower.keys.get("subnets/a") === value;

    const created = await interrupted(
      "first-value",
      () => store.create("subnets/a", "first-value", 600),
      has("first-value"),
    );
    expect(created).toEqual({
      created: true,
      revision: (await store.get("subnets/a"))?.revision,
      leaseId: (await store.get("subnets/a"))?.leaseId,
    });
    if (!created.created) throw new Error("not created");
    const renewed = await interrupted(
      "second-value",
      () => store.renew("subnets/a", "second-value", { expectRevision: created.revision, ttlSeconds: 600 }),
      has("second-value"),
    );
    expect(renewed).toMatchObject({ renewed: true });
    if (!renewed.renewed) throw new Error("not renewed");
    const reserved = await interrupted(
      "third-value",
      () => store.renew("subnets/a", "third-value", { expectRevision: renewed.revision, reservation: true }),
      has("third-value"),
    );
    expect(reserved).toMatchObject({ renewed: true, leaseId: "0" });
    if (!reserved.renewed) throw new Error("not renewed");
    const removed = await interrupted(
      "subnets/a",
      () => store.remove("subnets/a", reserved.revision),
      ({ keys }) => !keys.has("subnets/a"),
    );
    expect(removed).toEqual({ removed: true });
    // Each key was written once: no transaction took effect twice.
    expect(direct.events.filter(({ kind }) => kind === "put")).toHaveLength(3);
  });

  it("is told apart from a rival who was quicker", async () => {
    const etcd = await Member.start();
    const wire = await Wire.to(etcd);
    const { store } = await open([wire.url]);
    await etcd.put("subnets/a", "rival");
    const held = wire.hold("mine");
    const outcome = store.create("subnets/a", "mine", 600);
    await held;
    wire.cut();
    expect(await outcome).toEqual({ created: false });
    expect(await store.get("subnets/a")).toMatchObject({ value: "rival" });
  });

  it("is called uncertain when etcd stays away", async () => {
    const etcd = await Member.start();
    const wire = await Wire.to(etcd);
    const { store } = await open([wire.url]);
    const held = wire.hold("mine");
    const outcome = failure(store.create("subnets/a", "mine", 600));
    await held;
    wire.end();
    const error = await outcome;
    expect(error.code).toBe("uncertain");
    expect(error.message).toMatch(
      /not known whether etcd wrote \/coreos.com\/network\/subnets\/a: etcd at .* cannot be used/,
    );
  });

  it("ends a call to an etcd that hangs, and the watch as well", { timeout: 90_000 }, async () => {
    const etcd = await Member.start();
    const { store, states, until } = await open([etcd.url]);
    const follower = new Follower(store);
    await follower.until(synced(1));
    etcd.freeze();
    const error = await failure(store.get("config"));
    expect(error.message).toMatch(/gave no answer within 5 s/);
    await until(() => states.at(-1)?.connected === false);
    await etcd.kill();
    await etcd.start();
    await follower.until(synced(2));
  });
});

describe("a cluster of three", () => {
  it("leaves a member that has lost the others, and goes on when there is a leader", {
    timeout: 90_000,
  }, async () => {
    const [a, b, c] = await Member.cluster();
    await a.put("subnets/a", "1");
    const { store, states, until } = await open([a.url]);
    const follower = new Follower(store);
    await follower.until(synced(1));
    await Promise.all([b.kill(), c.kill()]);
    await until(() => states.at(-1)?.connected === false);
    expect(states.at(-1)?.error?.code).toBe("unavailable");
    await Promise.all([b.start(), c.start()]);
    await c.putDuringElection("subnets/b", "1");
    await follower.until(({ keys }) => keys.has("subnets/b"));
  });

  it("moves on to another member when its own dies", async () => {
    const members = await Member.cluster();
    const [a] = members;
    const { store, states } = await open(members.map(({ url }) => url));
    const follower = new Follower(store);
    await follower.until(synced(1));
    const own = members.find(({ url }) => url === states[0]?.endpoint) ?? a;
    const other = members.find((member) => member !== own) ?? a;
    await own.kill();
    await other.putDuringElection("subnets/a", "1");
    await follower.until(({ keys }) => keys.has("subnets/a"));
    expect(states.at(-1)).toMatchObject({ connected: true });
    expect(states.at(-1)?.endpoint).not.toBe(own.url);
  });
});

describe("several endpoints", () => {
  it("uses the living one, whichever it tries first", async () => {
    const etcd = await Member.start();
    const dead = [await freePort(), await freePort()].map((port) => `http://${HOST}:${port}`);
    for (let i = 0; i < 6; i += 1) {
      const { store, states } = await open([...dead, etcd.url]);
      const follower = new Follower(store);
      const created = await store.create(`subnets/${i}`, "x", 600);
      expect(created.created).toBe(true);
      await follower.until(({ keys }) => keys.has(`subnets/${i}`));
      expect(states.at(-1)).toMatchObject({ connected: true, endpoint: etcd.url });
    }
  });
});

describe("connections", () => {
  it("are shared by the stores of a process", async () => {
    const etcd = await Member.start();
    const wire = await Wire.to(etcd);
    for (let i = 0; i < 2; i += 1) {
      const { store } = await open([wire.url]);
      await new Follower(store).until(synced(1));
      await store.get("config");
      await store.timeToLive("1");
      expect(wire.connections).toBe(1);
    }
  });
});

describe("user and password", () => {
  it("logs in, again after a restart, and never tells the password", async () => {
    const etcd = await Member.start();
    etcd.ctl("user", "add", "root:rootpass");
    etcd.ctl("user", "grant-role", "root", "root");
    etcd.ctl("user", "add", "node:s3cret");
    etcd.ctl("role", "add", "node");
    etcd.ctl("role", "grant-permission", "node", "--prefix=true", "readwrite", `${PREFIX}/`);
    etcd.ctl("user", "grant-role", "node", "node");
    etcd.ctl("auth", "enable");
    const root = ["--user", "root:rootpass"];
    etcd.ctl(...root, "put", `${PREFIX}/config`, "{}");

    const { store, states } = await open([etcd.url], { username: "node", password: "s3cret" });
    const follower = new Follower(store);
    await follower.until(synced(1));
    expect(await store.create("subnets/a", "x", 600)).toMatchObject({ created: true });
    // etcd forgets the tokens it gave out; both the watch and the calls have to log in again.
    await etcd.kill();
    await etcd.start();
    await follower.until(synced(2));
    expect(await store.create("subnets/b", "x", 600)).toMatchObject({ created: true });
    await follower.until(({ keys }) => keys.has("subnets/b"));

    const wrong = await open([etcd.url], { username: "node", password: "wr0ng" });
    const refused = await failure(wrong.store.get("config"));
    expect(refused.code).toBe("refused");
    expect(refused.message).toMatch(/does not accept the user "node" with this password/);
    const none = await open([etcd.url]);
    expect((await failure(none.store.get("config"))).message).toMatch(/asks for a user/);
    const elsewhere = await open([etcd.url], { username: "node", password: "s3cret", prefix: "/else" });
    const denied = await failure(elsewhere.store.list(""));
    expect(denied.message).toMatch(/does not let the user "node" at the keys under \/else\//);
    const deaf = new Follower(elsewhere.store);
    await elsewhere.until(() => elsewhere.states.length === 1);
    expect(elsewhere.states[0]).toMatchObject({ connected: false, error: { code: "refused" } });
    await deaf.stop();

    const said = JSON.stringify([states, wrong.states, wrong.warnings, wrong.notes, refused, denied]);
    expect(said + refused.stack + String(refused.cause)).not.toMatch(/s3cret|wr0ng/);
  });

  it("does without a login that the cluster does not ask for", async () => {
    const etcd = await Member.start();
    await etcd.put("config", "{}");
    const { store } = await open([etcd.url], { username: "node", password: "x" });
    expect(await store.get("config")).toMatchObject({ value: "{}" });
  });
});

describe("TLS", () => {
  const pki = join(root, "pki");
  const at = (name: string) => join(pki, name);
  const openssl = (...args: string[]) => execFileSync("openssl", args, { cwd: pki, stdio: "pipe" });

  function authority(name: string): void {
    openssl(
      ...["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30"],
      ...["-subj", `/CN=${name}`, "-keyout", `${name}.key`, "-out", `${name}.pem`],
    );
  }

  /** A key and a certificate signed by `by`; `-days` may be negative, which makes it expired. */
  function certificate(name: string, by: string, days = 30, names = "IP:127.0.0.1"): void {
    openssl(
      ...["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", `/CN=${name}`],
      ...["-keyout", `${name}.key`, "-out", `${name}.csr`],
    );
    writeFileSync(at(`${name}.ext`), `subjectAltName=${names}\nextendedKeyUsage=serverAuth,clientAuth\n`);
    openssl(
      ...["x509", "-req", "-in", `${name}.csr`, "-CA", `${by}.pem`, "-CAkey", `${by}.key`, "-CAcreateserial"],
      ...["-days", String(days), "-extfile", `${name}.ext`, "-out", `${name}.pem`],
    );
  }

  beforeAll(() => {
    mkdirSync(pki, { recursive: true });
    authority("ca");
    authority("other-ca");
    certificate("server", "ca");
    certificate("misnamed", "ca", 30, "IP:127.0.0.9");
    certificate("node", "ca");
    certificate("node2", "ca");
    certificate("expired", "ca", -1);
    certificate("stranger", "other-ca");
  });

  const server = (name = "server") => ["--cert-file", at(`${name}.pem`), "--key-file", at(`${name}.key`)];
  const mutual = () => [...server(), "--client-cert-auth", "--trusted-ca-file", at("ca.pem")];
  const files = (name: string, ca = "ca") => ({
    certFile: at(`${name}.pem`),
    keyFile: at(`${name}.key`),
    caFile: at(`${ca}.pem`),
  });

  it("works with a client certificate", async () => {
    const etcd = await Member.start(mutual());
    const { store, states } = await open([etcd.url], files("node"));
    const follower = new Follower(store);
    expect(await store.create("subnets/a", "x", 600)).toMatchObject({ created: true });
    await follower.until(({ keys }) => keys.has("subnets/a"));
    expect(states.at(-1)).toMatchObject({ connected: true });
  });

  it("works with a CA alone, and takes an endpoint without a scheme for https then", async () => {
    const etcd = await Member.start(server());
    const { store } = await open([`${HOST}:${etcd.port}`], { caFile: at("ca.pem") });
    expect(await store.create("subnets/a", "x", 600)).toMatchObject({ created: true });
  });

  it("does not use certificates with http, and says so", async () => {
    const etcd = await Member.start();
    const { store, warnings } = await open([etcd.url], files("no-such"));
    expect(await store.get("config")).toBeUndefined();
    expect(warnings.join()).toMatch(/endpoints are http, so the certificates are not used/);
  });

  it("names the file and the reason before it connects", async () => {
    const say = async (more: Partial<StoreOptions>) => {
      const error = await failure(open([`https://${HOST}:1`], more));
      expect(error.code).toBe("credentials");
      return error.message;
    };
    expect(await say(files("expired"))).toMatch(/expired\.pem expired on .*: renew it/);
    expect(await say({ ...files("node"), keyFile: at("node2.key") })).toMatch(
      /node2\.key does not belong to the certificate .*node\.pem/,
    );
    expect(await say({ ...files("node"), keyFile: at("none.key") })).toMatch(
      /key .*none\.key cannot be read .*ENOENT/,
    );
    expect(await say({ ...files("node"), certFile: pki })).toMatch(
      /certificate .*pki cannot be read .*EISDIR/,
    );
    expect(await say({ ...files("node"), caFile: at("node.key") })).toMatch(
      /node\.key holds no PEM certificate/,
    );
    expect(await say({ ...files("node"), keyFile: at("node.pem") })).toMatch(
      /node\.pem cannot be read as a PEM/,
    );
    expect(await say({ certFile: at("node.pem") })).toMatch(
      /node\.pem is of no use alone: give --etcd-keyfile/,
    );
    expect(await say({ keyFile: at("node.key") })).toMatch(
      /node\.key is of no use alone: give --etcd-certfile/,
    );
    expect(await say({ caFile: at("expired.pem") })).toMatch(/CA certificate .*expired\.pem expired/);
  });

  it("names the file and the reason when etcd's certificate or ours is not accepted", async () => {
    const strict = await Member.start(mutual());
    const say = async (etcd: Member, more: Partial<StoreOptions>) => {
      const { store, states, until } = await open([etcd.url], more);
      const follower = new Follower(store);
      await until(() => states.length === 1);
      await follower.stop();
      const error = await failure(store.get("config"));
      expect(error.code).toBe("credentials");
      expect(states[0]?.error?.code).toBe("credentials");
      return error.message;
    };
    expect(await say(strict, files("node", "other-ca"))).toMatch(
      /other-ca\.pem did not sign .*--etcd-cafile/,
    );
    expect(await say(strict, {})).toMatch(/the system's CA certificates did not sign/);
    expect(await say(strict, files("stranger"))).toMatch(
      /does not accept the client certificate .*stranger\.pem/,
    );
    expect(await say(strict, { caFile: at("ca.pem") })).toMatch(
      /asks for a client certificate .*--etcd-certfile/,
    );
    const misnamed = await Member.start(server("misnamed"));
    expect(await say(misnamed, { caFile: at("ca.pem") })).toMatch(/certificate made for other names/);
    const expired = await Member.start(server("expired"));
    expect(await say(expired, { caFile: at("ca.pem") })).toMatch(/certificate out of its time/);
  });

  it("takes rotated files into use, keeps the old while they are half written, and stays connected", async () => {
    const etcd = await Member.start(mutual());
    const live = (kind: string) => at(`live.${kind}`);
    const install = (kind: string, from: string) => {
      writeFileSync(`${live(kind)}.new`, readFileSync(at(from)));
      renameSync(`${live(kind)}.new`, live(kind));
    };
    const tls = ["--cacert", at("ca.pem"), "--cert", at("node.pem"), "--key", at("node.key")];
    const put = (key: string) => etcd.ctl(...tls, "put", `${PREFIX}/${key}`, "1");
    install("pem", "node.pem");
    install("key", "node.key");
    const { store, states, warnings, notes, until } = await open([etcd.url], {
      certFile: live("pem"),
      keyFile: live("key"),
      caFile: at("ca.pem"),
      credentialCheckMs: 20,
    });
    const follower = new Follower(store);
    await follower.until(synced(1));

    install("pem", "node2.pem");
    await until(() => warnings.length === 1);
    expect(warnings[0]).toMatch(/changed etcd credentials are not used .*does not belong to the certificate/);
    put("subnets/a");
    await follower.until(({ keys }) => keys.has("subnets/a"));
    expect(follower.snapshots).toBe(1);

    install("key", "node2.key");
    await until(() => notes.some((note) => note.includes("credentials changed and are in use")));
    await follower.until(synced(2));
    put("subnets/b");
    await follower.until(({ keys }) => keys.has("subnets/b"));
    expect(await store.create("subnets/c", "x", 600)).toMatchObject({ created: true });

    // A certificate that etcd refuses does not replace one that works.
    install("pem", "stranger.pem");
    install("key", "stranger.key");
    await until(() => warnings.some((warning) => warning.includes("does not accept the client certificate")));
    expect(await store.get("subnets/c")).toMatchObject({ value: "x" });
    expect(states.map(({ connected }) => connected)).toEqual([true]);
  });
});
