// Opening, configuring and loading objects; maps of every kind Twill-like dataplanes use; test runs; pins.
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeAll, describe, expect, it } from "vitest";
import {
  BatchError,
  BPF_EXIST,
  BPF_NOEXIST,
  type BpfObject,
  isBpffs,
  LayoutMismatch,
  LibbpfError,
  mapIds,
  mapInfo,
  mountBpffs,
  openMapById,
  openObject,
  openPinnedMap,
  openPinnedProgram,
  openProgramById,
  possibleCpus,
  programIds,
  programInfo,
  raiseMemlock,
  setLibbpfLog,
  unpin,
  VerifierError,
} from "../../loader/index.ts";
import { bpffs, build, frame, words } from "./lab.ts";

const MAPS = `
struct peer { __u8 address[4]; __u32 vni; };
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 5000);
  __type(key, __u32); __type(value, struct peer); } peers SEC(".maps");
struct prefix { __u32 length; __u8 address[4]; };
struct { __uint(type, BPF_MAP_TYPE_LPM_TRIE); __uint(max_entries, 5000); __uint(map_flags, BPF_F_NO_PREALLOC);
  __type(key, struct prefix); __type(value, __u32); } routes SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_LRU_HASH); __uint(max_entries, 1024);
  __type(key, __u32); __type(value, __u64); } flows SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 8);
  __type(key, __u32); __type(value, __u32); } slots SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 4);
  __type(key, __u32); __type(value, __u32); } runs SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_PERCPU_HASH); __uint(max_entries, 3000);
  __type(key, __u32); __type(value, struct peer); } tallies SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_PROG_ARRAY); __uint(max_entries, 40);
  __type(key, __u32); __type(value, __u32); } tails SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 5000); } events SEC(".maps");
`;

const PROGRAMS = `
const volatile __u32 verdict = 1;
const volatile __u64 wide = 0;
const volatile __u8 small = 0;
const volatile __s16 negative = 0;
const volatile __u8 address[4] = {};
SEC("tc") int classify(struct __sk_buff *skb) {
  __u32 zero = 0, *count = bpf_map_lookup_elem(&runs, &zero);
  if (count) *count += 1;
  skb->mark = small + negative;
  skb->priority = wide >> 32;
  skb->cb[0] = *(volatile __u32 *)address;
  return verdict;
}
SEC("tc") int grow(struct __sk_buff *skb) {
  bpf_skb_change_tail(skb, 2000, 0);
  return TC_ACT_UNSPEC;
}
SEC("xdp") int keep(struct xdp_md *ctx) { return XDP_PASS; }
`;

let path: string;
let pins: string;
let open: BpfObject[] = [];

beforeAll(() => {
  path = build("sample", MAPS + PROGRAMS);
  pins = bpffs();
});

afterEach(() => {
  for (const object of open) object.close();
  open = [];
  setLibbpfLog(undefined);
});

function openSample(source: string | Uint8Array = path): BpfObject {
  const object = openObject(source);
  open.push(object);
  return object;
}

function load(source?: string): BpfObject {
  const object = openSample(source);
  object.load();
  return object;
}

describe("an object", () => {
  it("lists its programs and maps, from a file or from bytes", () => {
    for (const object of [openSample(), openSample(readFileSync(path))]) {
      expect(object.programs).toEqual(["classify", "grow", "keep"]);
      expect([...object.maps].sort()).toEqual([
        ...["events", "flows", "peers", "routes", "runs", "slots", "tails", "tallies"],
      ]);
    }
    expect(openSample().name).toBe("sample");
  });

  it("refuses bytes that are no object", () => {
    expect(() => openObject(Buffer.from("not an object"))).toThrow(/Cannot open object object: .*ELF/);
    expect(() => openObject("/nonexistent.o")).toThrow(/ENOENT/);
  });

  it("sets constants before the load, each with its own width", () => {
    const object = openSample();
    object.setRodata({
      verdict: 7,
      wide: 0x9_0000_0001n,
      small: 250,
      negative: -6,
      address: words(0x0100a8c0),
    });
    object.load();
    const ctx = Buffer.alloc(192);
    const result = object.program("classify").testRun({ data: frame(), ctx });
    expect(result.retval).toBe(7);
    const after = Buffer.from(result.ctx);
    expect(after.readUInt32LE(8)).toBe(244);
    expect(after.readUInt32LE(32)).toBe(9);
    expect(after.readUInt32LE(48)).toBe(0x0100a8c0);
  });

  it("names a constant that does not exist, and a value that does not fit", () => {
    const object = openSample();
    expect(() => object.setRodata({ verdict: 1, nonsense: 1 })).toThrow(/no constant nonsense.*verdict/);
    expect(() => object.setRodata({ small: 256 })).toThrow(/256 does not fit constant small/);
    expect(() => object.setRodata({ negative: -40000 })).toThrow(/does not fit/);
    expect(() => object.setRodata({ address: words(1, 2) })).toThrow(/address has 4 bytes, not 8/);
  });

  it("says what it does not have, and what comes too early or too late", () => {
    const object = openSample();
    expect(() => object.map("peers")).toThrow(/not loaded yet/);
    expect(() => object.setMaxEntries("nothing", 1)).toThrow(/no map nothing. It has: .*peers, routes/);
    object.setAutoload("grow", false);
    object.load();
    expect(() => object.program("grow")).toThrow(/setAutoload/);
    expect(() => object.setRodata({ verdict: 1 })).toThrow(/loaded already/);
    const map = object.map("peers");
    expect(object.map("peers")).toBe(map);
    object.close();
    object.close();
    expect(() => object.map("peers")).toThrow(/closed/);
    expect(() => map.lookup(words(1))).toThrow(/Map peers is closed/);
  });

  it("tells why the verifier refused a program", () => {
    const bad = build(
      "bad",
      `SEC("tc") int fine(struct __sk_buff *skb) { return 0; }
       SEC("tc") int reckless(struct __sk_buff *skb) { int *p = (int *)(long)skb->data; return *p; }`,
    );
    const object = openSample(bad);
    let error: unknown;
    try {
      object.load();
    } catch (thrown) {
      error = thrown;
    }
    expect(error).toBeInstanceOf(VerifierError);
    const refused = error as VerifierError;
    expect(refused.program).toBe("reckless");
    expect(refused.code).toBe("EACCES");
    expect(refused.message).toMatch(/refused program reckless:/);
    expect(refused.message).toMatch(/invalid access to packet, off=0 size=4/);
    expect(refused.message).not.toMatch(/processed \d+ insns/);
    expect(refused.log).toMatch(/processed \d+ insns/);
    expect(object.log).toContain(refused.log);
    expect(() => object.load()).toThrow(/closed/);
  });

  it("loads on another thread, while others work with libbpf here", async () => {
    const [first, second] = [openSample(), openSample()];
    first.setRodata({ verdict: 7 });
    const loading = [first.loadOnThread(), second.loadOnThread()];
    expect(() => first.map("peers")).toThrow(/being loaded/);
    expect(() => first.load()).toThrow(/being loaded/);
    await expect(first.loadOnThread()).rejects.toThrow(/being loaded/);
    // These print through us, which must not happen from a thread.
    for (let i = 0; i < 5; i++) load().close();
    await Promise.all(loading);
    expect(first.program("classify").testRun({ data: frame() }).retval).toBe(7);
    second.map("peers").update(words(1), words(2, 3));
    // What libbpf says is heard again.
    const object = openSample();
    object.setMaxEntries("peers", 0xffffffff);
    expect(() => object.load()).toThrow(/libbpf: .*peers/);
  });

  it("says that a load on another thread failed, and why only where it is loaded again", async () => {
    const bad = build(
      "bad-thread",
      `SEC("tc") int reckless(struct __sk_buff *skb) { int *p = (int *)(long)skb->data; return *p; }`,
    );
    const object = openSample(bad);
    await expect(object.loadOnThread()).rejects.toThrow(/Cannot load object bad-thread: .*EACCES/);
    expect(() => object.load()).toThrow(/closed/);
    expect(() => load(bad)).toThrow(VerifierError);
  });

  it("may be closed while a thread loads it", async () => {
    const before = openMaps();
    const object = openSample();
    const loading = object.loadOnThread();
    object.close();
    object.close();
    await expect(loading).rejects.toThrow(/closed/);
    expect(() => object.map("peers")).toThrow(/closed/);
    expect(openMaps()).toBe(before);
  });

  it("is loaded here if somebody listens to libbpf", async () => {
    const heard: string[] = [];
    setLibbpfLog((_, message) => heard.push(message));
    try {
      const object = openSample();
      await object.loadOnThread();
      expect(object.program("classify").testRun({ data: frame() }).retval).toBe(1);
    } finally {
      setLibbpfLog(undefined);
    }
    expect(heard.length).toBeGreaterThan(0);
  });

  it("keeps the verifier's account of good programs when asked", () => {
    const object = openSample();
    object.load({ verbose: true });
    expect(object.log).toMatch(/'classify'[\s\S]*processed \d+ insns/);
    expect(load().log).toBe("");
  });

  it("says why a load failed that was not the verifier's", () => {
    const object = openSample();
    object.setMaxEntries("peers", 0xffffffff);
    expect(() => object.load()).toThrow(/Cannot load object sample: .*libbpf: .*peers/);
  });

  it("passes libbpf's messages on when asked", () => {
    const heard: string[] = [];
    setLibbpfLog((level, message) => heard.push(`${level}: ${message}`));
    load();
    expect(heard.some((line) => line.startsWith("debug: ") && line.includes("sample"))).toBe(true);
    expect(heard.every((line) => !line.endsWith("\n"))).toBe(true);
  });
});

describe("a map", () => {
  it("knows its shape", () => {
    const object = openSample();
    object.setMaxEntries("peers", 77);
    object.load();
    const peers = object.map("peers");
    expect(peers).toMatchObject({ name: "peers", type: "hash", keySize: 4, valueSize: 8, maxEntries: 77 });
    expect(mapInfo({ fd: peers.fd })).toMatchObject({ id: peers.id, name: "peers", maxEntries: 77 });
    expect([...mapIds()]).toContain(peers.id);
    const again = openMapById(peers.id);
    expect(again.id).toBe(peers.id);
    again.close();
    expect(object.map("routes")).toMatchObject({ type: "lpm_trie", flags: 1 });
  });

  it("looks up, updates and deletes single elements", () => {
    const peers = load().map("peers");
    expect(peers.lookup(words(1))).toBeUndefined();
    peers.update(words(1), words(10, 11));
    const before = peers.lookup(words(1));
    peers.update(words(1), words(20, 21), BPF_EXIST);
    expect(before).toEqual(words(10, 11));
    expect(peers.lookup(words(1))).toEqual(words(20, 21));
    expect(() => peers.update(words(1), words(0, 0), BPF_NOEXIST)).toThrow(
      /Cannot update map peers: File exists \(EEXIST\)/,
    );
    expect(() => peers.update(words(2), words(0, 0), BPF_EXIST)).toThrow(/ENOENT/);
    expect(peers.delete(words(1))).toBe(true);
    expect(peers.delete(words(1))).toBe(false);
    expect(() => peers.lookup(words(1, 2))).toThrow(/key of map peers has 4 bytes, not 8/);
    expect(() => peers.update(words(1), words(1))).toThrow(/value of map peers has 8 bytes, not 4/);
  });

  it("says when it is full, and how far a batch came", () => {
    const object = openSample();
    object.setMaxEntries("peers", 3);
    object.load();
    const peers = object.map("peers");
    const rows = [1, 2, 3, 4, 5].map((i) => [words(i), words(i, i)] as const);
    let error: unknown;
    try {
      peers.updateBatch(rows, 2);
    } catch (thrown) {
      error = thrown;
    }
    expect(error).toBeInstanceOf(BatchError);
    expect(error).toBeInstanceOf(LibbpfError);
    expect(error).toMatchObject({ done: 3, code: "E2BIG", operation: "bpf_map_update_batch" });
    expect((error as BatchError).message).toMatch(/stopped after 3 elements.*at most 3 elements/);
    expect(peers.entries()).toHaveLength(3);
  });

  for (const name of ["peers", "routes", "flows"]) {
    it(`reads, writes and deletes ${name} in batches`, () => {
      const map = load().map(name);
      const count = name === "flows" ? 500 : 5000;
      const key = (i: number) => (name === "routes" ? words(32, i) : words(i));
      const value = (i: number) => (name === "routes" ? words(i) : words(i, ~i));
      map.updateBatch(Array.from({ length: count }, (_, i) => [key(i), value(i)]));
      const at = name === "routes" ? 4 : 0;
      const numberOf = (entry: readonly [Uint8Array, Uint8Array]) => Buffer.from(entry[0]).readUInt32LE(at);
      const read = map.entries().sort((a, b) => numberOf(a) - numberOf(b));
      expect(read.map(numberOf)).toEqual(Array.from({ length: count }, (_, i) => i));
      expect(read[count - 1]?.[1]).toEqual(value(count - 1));
      const chunks = [...map.batches(100)];
      expect(chunks.length).toBeGreaterThan(1);
      expect(chunks.flat()).toHaveLength(count);
      // Every third key does not exist.
      const doomed = Array.from({ length: 300 }, (_, i) => key(i % 3 === 0 ? 1_000_000 + i : i));
      expect(map.deleteBatch(doomed, 64)).toBe(200);
      expect(map.entries()).toHaveLength(count - 200);
      expect(map.lookup(key(1))).toBeUndefined();
      expect(map.lookup(key(3))).toEqual(value(3));
    });
  }

  it("matches the longest prefix, and refuses an impossible one", () => {
    const routes = load().map("routes");
    routes.updateBatch([
      [words(8, 10), words(1)],
      [words(16, 10 | (5 << 8)), words(2)],
    ]);
    expect(routes.lookup(words(32, 10 | (5 << 8) | (1 << 16)))).toEqual(words(2));
    expect(routes.lookup(words(32, 10 | (6 << 8)))).toEqual(words(1));
    expect(() => routes.updateBatch([[words(33, 10), words(1)]])).toThrow(/stopped after 0 elements.*EINVAL/);
  });

  it("reads arrays whole, which cannot be deleted from", () => {
    const slots = load().map("slots");
    slots.updateBatch([
      [words(3), words(33)],
      [words(7), words(77)],
    ]);
    expect(slots.entries().map(([, value]) => Buffer.from(value).readUInt32LE())).toEqual([
      0, 0, 0, 33, 0, 0, 0, 77,
    ]);
    expect(slots.lookup(words(8))).toBeUndefined();
    expect(() => slots.delete(words(3))).toThrow(/EINVAL/);
    expect(() => slots.deleteBatch([words(3)])).toThrow(/EINVAL/);
  });

  it("goes one by one where the kernel has no batches", () => {
    const object = load();
    const tails = object.map("tails");
    const { fd, id } = object.program("classify");
    tails.updateBatch(
      [3, 5, 39].map((i) => [words(i), words(fd)]),
      2,
    );
    expect([...tails.batches(2)]).toEqual([
      [
        [words(3), words(id)],
        [words(5), words(id)],
      ],
      [[words(39), words(id)]],
    ]);
    expect(() =>
      tails.updateBatch([
        [words(1), words(fd)],
        [words(40), words(fd)],
      ]),
    ).toThrow(/stopped after 1 elements.*E2BIG/);
    expect(tails.deleteBatch([1, 2, 3].map((i) => words(i)))).toBe(2);
    expect(tails.entries()).toHaveLength(2);
  });

  it("keeps a value for each CPU", () => {
    const object = load();
    const tallies = object.map("tallies");
    const cpus = possibleCpus();
    expect(cpus).toBeGreaterThanOrEqual(1);
    for (let i = 0; i < 2500; i++) {
      tallies.updatePerCpu(
        words(i),
        Array.from({ length: cpus }, (_, cpu) => words(i, cpu)),
      );
    }
    expect(tallies.lookupPerCpu(words(9))).toEqual(Array.from({ length: cpus }, (_, cpu) => words(9, cpu)));
    expect(tallies.lookupPerCpu(words(2500))).toBeUndefined();
    const all = tallies.entriesPerCpu();
    expect(all).toHaveLength(2500);
    for (const [key, values] of all) {
      expect(values).toEqual(
        Array.from({ length: cpus }, (_, cpu) => words(Buffer.from(key).readUInt32LE(), cpu)),
      );
    }
    const blocks = [...tallies.blocksPerCpu(1000)];
    expect(blocks.map(({ count }) => count).reduce((sum, count) => sum + count)).toBe(2500);
    for (const { values, count } of blocks) expect(values).toHaveLength(count * cpus * 8);
    expect(() => tallies.blocks()).toThrow(/keeps a value for each CPU/);
    expect(tallies.deleteBatch(all.map(([key]) => key))).toBe(2500);
    expect(() => tallies.lookup(words(1))).toThrow(/use lookupPerCpu/);
    expect(() => tallies.updatePerCpu(words(1), [])).toThrow(/one value for each/);
    expect(() => object.map("peers").lookupPerCpu(words(1))).toThrow(/not per CPU/);
    // A 4-byte value has a stride of 8: each CPU's value must be read at the right place.
    object.program("classify").testRun({ data: frame(), repeat: 5 });
    const counts = object.map("runs").entriesPerCpu();
    expect(counts).toHaveLength(4);
    const sum = counts[0]?.[1].reduce((total, value) => total + Buffer.from(value).readUInt32LE(), 0);
    expect(sum).toBe(5);
  });
});

describe("a program", () => {
  it("runs on a packet of ours", () => {
    const object = load();
    const result = object.program("classify").testRun({ data: frame(100), repeat: 1000 });
    expect(result.retval).toBe(1);
    expect(result.data).toEqual(new Uint8Array(frame(100)));
    expect(result.ctx).toHaveLength(0);
    expect(result.durationNs).toBeGreaterThan(0);
    expect(object.program("keep").testRun({ data: frame(), dataOutSize: 0 })).toMatchObject({ retval: 2 });
  });

  it("returns the packet as it is afterwards, if there is room", () => {
    const grow = load().program("grow");
    const { retval, data } = grow.testRun({ data: frame(1600) });
    expect(retval).toBe(-1);
    expect(data).toHaveLength(2000);
    expect(() => grow.testRun({ data: frame(1600), dataOutSize: 100 })).toThrow(
      /2000 bytes; set dataOutSize/,
    );
    expect(() => grow.testRun({ data: new Uint8Array(5) })).toThrow(/Cannot test-run program grow: .*EINVAL/);
  });

  it("is found among all programs, with its maps", () => {
    const object = load();
    const classify = object.program("classify");
    expect(classify).toMatchObject({ name: "classify", type: "sched_cls" });
    expect(classify.tag).toMatch(/^[0-9a-f]{16}$/);
    expect([...programIds()]).toContain(classify.id);
    const info = programInfo({ id: classify.id });
    expect(info).toMatchObject({ id: classify.id, name: "classify", tag: classify.tag });
    expect(info.mapIds).toContain(object.map("runs").id);
    expect(info.mapIds).not.toContain(object.map("peers").id);
    expect(info.loadTimeNs).toBeGreaterThan(0n);
    const again = openProgramById(classify.id);
    expect(again.testRun({ data: frame() }).retval).toBe(1);
    again.close();
    expect(() => again.testRun({ data: frame() })).toThrow(/closed/);
    expect(() => programInfo({ id: 0x7fffffff })).toThrow(/open program 2147483647: .*ENOENT/);
  });
});

describe("pins", () => {
  it("mount once", () => {
    expect(isBpffs(pins)).toBe(true);
    expect(mountBpffs(pins)).toBe(false);
    expect(isBpffs("/nonexistent")).toBe(false);
    expect(isBpffs("/tmp")).toBe(false);
  });

  it("need no limit on locked memory, on old kernels", () => {
    const unlimited = raiseMemlock();
    const [soft, hard] =
      readFileSync("/proc/self/limits", "utf8")
        .match(/locked memory +(\S+) +(\S+)/)
        ?.slice(1) ?? [];
    expect(soft).toBe(hard);
    expect(unlimited).toBe(hard === "unlimited");
  });

  it("outlive the object, and are reused with their contents", () => {
    const at = join(pins, "deep", "peers");
    const first = load();
    first.map("peers").update(words(1), words(2, 3));
    first.map("peers").pin(at);
    first.program("classify").pin(join(pins, "classify"));
    const { id } = first.map("peers");
    expect(() => first.map("peers").pin(at)).toThrow(/Something is pinned there already/);
    first.close();

    const pinned = openPinnedMap(at);
    expect(pinned).toMatchObject({ id, name: "peers" });
    pinned.close();
    const program = openPinnedProgram(join(pins, "classify"));
    expect(program.testRun({ data: frame() }).retval).toBe(1);
    program.close();

    const second = openSample();
    expect(second.reuseMap("peers", at)).toBe(true);
    expect(second.reuseMap("routes", join(pins, "nothing"))).toBe(false);
    second.load();
    expect(second.map("peers").id).toBe(id);
    expect(second.map("peers").lookup(words(1))).toEqual(words(2, 3));

    expect(unpin(at)).toBe(true);
    expect(unpin(at)).toBe(false);
    expect(unpin(join(pins, "classify"))).toBe(true);
    expect(() => openPinnedMap(at)).toThrow(/Nothing is pinned there/);
    expect(() => first.map("peers")).toThrow(/closed/);
  });

  it("are refused if the layout differs, naming each difference", () => {
    const at = join(pins, "peers");
    const ring = join(pins, "events");
    const first = load();
    first.map("peers").pin(at);
    first.map("events").pin(ring);

    const mismatch = (body: string, map = "peers"): readonly string[] => {
      const object = openSample(build(`other${open.length}`, `${body}\n${PROGRAMS_NONE}`));
      try {
        object.reuseMap(map, at);
      } catch (error) {
        expect(error).toBeInstanceOf(LayoutMismatch);
        return (error as LayoutMismatch).differences;
      }
      return [];
    };
    const PROGRAMS_NONE = `SEC("tc") int nothing(struct __sk_buff *skb) { return 0; }`;
    expect(mismatch(MAPS)).toEqual([]);
    expect(
      mismatch(MAPS.replace("struct peer { __u8 address[4]", "struct peer { __u64 big; __u8 address[4]")),
    ).toEqual(["value size: 8 pinned, 16 wanted"]);
    expect(mismatch(MAPS.replaceAll("5000", "5001"))).toEqual(["max_entries: 5000 pinned, 5001 wanted"]);
    expect(mismatch(MAPS.replace("BPF_MAP_TYPE_HASH", "BPF_MAP_TYPE_LRU_HASH"))).toEqual([
      "type: hash pinned, lru_hash wanted",
    ]);
    expect(
      mismatch(MAPS.replace("{ __u8 address[4]; __u32 vni; }", "{ __u32 vni; __u8 address[4]; }")),
    ).toEqual(["value: address at byte 0 pinned, vni at byte 0 wanted"]);
    expect(mismatch(MAPS, "routes").length).toBeGreaterThan(2);
    // A ring buffer is as big as the kernel made it, which is more than the source asked for.
    expect(openSample().reuseMap("events", ring)).toBe(true);
    for (const pin of [at, ring]) unpin(pin);
  });

  it("belong in a BPF file system", () => {
    const peers = load().map("peers");
    expect(() => peers.pin("/tmp/loader-no-bpffs/peers")).toThrow(/mountBpffs\(\)/);
    expect(existsSync("/tmp/loader-no-bpffs/peers")).toBe(false);
  });
});

describe("prepared calls under load", () => {
  it("keep the memory of the process bounded", async () => {
    const object = load();
    const peers = object.map("peers");
    const classify = object.program("classify");
    const packet = frame();
    const round = async (calls: number) => {
      for (let i = 0; i < calls; i++) {
        const key = words(i % 4000);
        peers.update(key, words(i, i));
        peers.lookup(key);
        if (i % 100 === 0) classify.testRun({ data: packet });
        if (i % 1000 === 0) await new Promise((resolve) => setImmediate(resolve));
      }
    };
    await round(10_000);
    const before = process.memoryUsage().rss;
    await round(50_000);
    expect(process.memoryUsage().rss - before).toBeLessThan(64 * 1024 * 1024);
  });
});

describe("a map of another layout", () => {
  it("takes over what the pinned one holds, field by field, and keeps what it has", () => {
    const source = (key: string, value: string) => `
struct key { ${key} };
struct flow { ${value} };
struct { __uint(type, BPF_MAP_TYPE_LRU_HASH); __uint(max_entries, 64);
  __type(key, struct key); __type(value, struct flow); } moved SEC(".maps");
SEC("tc") int look(struct __sk_buff *skb) {
  struct key key = {};
  return bpf_map_lookup_elem(&moved, &key) != 0;
}`;
    const path = join(pins, "moved");
    const before = openObject(
      build("before", source("__u8 a[4]; __be16 port; __u16 zone;", "__u64 since; __u64 gone;")),
    );
    before.load();
    const old = before.map("moved");
    old.update(
      Buffer.from("0a00000101bb0700", "hex"),
      Buffer.from("2a000000000000000900000000000000", "hex"),
    );
    old.update(
      Buffer.from("0a00000200350000", "hex"),
      Buffer.from("07000000000000000000000000000000", "hex"),
    );
    old.pin(path);
    const layout = source("__u16 zone; __be16 port; __u8 a[4];", "__u32 fresh; __u32 also; __u64 since;");
    const after = openObject(build("after", layout));
    expect(after.fitsMap("moved", path)).toBe(false);
    after.load();
    const map = after.map("moved");
    const second = Buffer.from("000000350a000002", "hex");
    map.update(second, Buffer.alloc(16, 1));
    expect(after.migrateMap("moved", path)).toBe(1);
    const first = map.lookup(Buffer.from("070001bb0a000001", "hex"));
    expect(Buffer.from(first ?? []).toString("hex")).toBe("00000000000000002a00000000000000");
    expect(map.lookup(second)).toEqual(new Uint8Array(16).fill(1));
    expect(after.migrateMap("moved", `${path}-missing`)).toBe(0);
    before.close();
    after.close();
    unpin(path);
  });
});

/** How many maps this process has open. Others' come and go beside it. */
function openMaps(): number {
  const ofMap = (fd: string): boolean => {
    try {
      return readFileSync(`/proc/self/fdinfo/${fd}`, "utf8").includes("\nmap_id:");
    } catch {
      // The descriptor of the folder that was read.
      return false;
    }
  };
  return readdirSync("/proc/self/fdinfo").filter(ofMap).length;
}
