/**
 * Our programs and maps in the kernel: load, pin, fill, attach, and take all of it away again.
 *
 *   <pin path>/<map>                 every map; they and what is in them outlive the daemon
 *   <pin path>/<program>             the programs in force
 *   <pin path>/links/<hook>-<ifindex>   TCX links; with clsact, the filter itself holds the program
 *   <pin path>/qdiscs/<ifindex>      a directory for each clsact qdisc that we made
 *
 * Loading new programs while old ones run is: load beside them on the same maps, fill the maps that are new
 * (their layout has changed), then `activate` replaces program by program, each atomically.
 */
import { existsSync, mkdirSync, readdirSync, renameSync, rmdirSync, statSync, unlinkSync } from "node:fs";
import { release } from "node:os";
import { dirname, join } from "node:path";
import {
  attachClsact,
  attachTcx,
  type BpfMap,
  type BpfObject,
  codec,
  destroyClsact,
  detachClsact,
  enableStats,
  type FilterPlace,
  hasHelper,
  hasMapType,
  hasTcx,
  hasTcxLink,
  isBpffs,
  layoutOfMap,
  mountBpffs,
  openMapById,
  openObject,
  openPinnedLink,
  openPinnedMap,
  openPinnedProgram,
  type ProgramInfo,
  possibleCpus,
  programInfo,
  queryClsact,
  queryTcx,
  queryXdp,
  raiseMemlock,
} from "../../loader/index.ts";
import {
  ConnectionState,
  configLayout,
  countLayout,
  type HookCounts,
  Hook as HookNumber,
  Limit,
  maps,
  Verdict,
} from "../abi/twill.gen.ts";
import {
  type AttachmentRow,
  attachmentKey,
  DIRECTIONS,
  endpointKey,
  type Hook,
  interfaceKey,
  type ProgramConfig,
  peerKey,
  subnetKey,
} from "../core/image.ts";
import type { Ipv4 } from "../core/ipv4.ts";
import { MapSum } from "../core/mapsum.ts";
import { excludedKey, uplinkKey } from "../core/masquerade.ts";
import type { Mac } from "../core/model.ts";
import type { MapRows } from "../core/world.ts";

export type MapName = keyof MapRows;

/** How programs are attached. */
export type AttachMode = "tcx" | "clsact";

/** What could not be done to the programs or maps; the message says what happened and what to do. */
export class DataplaneError extends Error {
  override readonly name = "DataplaneError";
}

// Programs of other software on a clsact hook run before or after ours by priority; the handle tells several
// daemons on one host apart.
const CLSACT_PRIORITY = 0x5477;
const DIRECTORIES = ["links", "qdiscs"];
/** Filled by the programs alone: nobody else could fill it again after its layout has changed. */
const KERNEL_MAP = "flows4";
/** The maps that hold connections. Processors push and pop entries of a queue that has room to spare. */
const CONNECTION_MAPS: readonly (keyof typeof maps)[] = ["connections4", "probes4", "expiring4"];
const QUEUE_SLACK = 1024;
/** Entries of one read of a big table. */
const BATCH = 8192;
const HOOKS = Object.keys(DIRECTIONS) as Hook[];
const MAP_NAMES = Object.keys(maps) as (keyof typeof maps)[];

// Called for each of very many rows: a Buffer for each would take most of the time.
const address = ([a = 0, b = 0, c = 0, d = 0]: Uint8Array): Ipv4 =>
  ((a << 24) | (b << 16) | (c << 8) | d) >>> 0;
const bytesOf = (ip: Ipv4): Uint8Array =>
  Uint8Array.of(ip >>> 24, (ip >>> 16) & 255, (ip >>> 8) & 255, ip & 255);
const mac = (bytes: Uint8Array): Mac =>
  Buffer.from(bytes)
    .toString("hex")
    .replace(/..(?=.)/g, "$&:");
const macBytes = (text: Mac): Uint8Array => Buffer.from(text.replaceAll(":", ""), "hex");

/** Rows of a map that are read at a time, in a millisecond: as rows, and as bytes that are summed up. */
const ROWS = 512;
const ROWS_AS_BYTES = 2048;
/** How often the bytes of a map are read again because rows were written meanwhile, before it is read as rows. */
const READINGS = 8;

/** What a map, by its id, was read to hold, with what was put and removed from here since. */
interface Known {
  readonly id: number;
  readonly sum: MapSum;
}

/** One key of `counters`, which has no other. */
const ONLY = Buffer.alloc(4);

/** Where in `counters` the packets are that came under a name which is no peer's. */
const REFUSALS = (
  [
    [HookNumber.HOOK_FROM_NET, Verdict.VERDICT_DROP_UNKNOWN_PEER],
    [HookNumber.HOOK_FROM_NET, Verdict.VERDICT_DROP_FORGED],
    [HookNumber.HOOK_FROM_OVERLAY, Verdict.VERDICT_DROP_FORGED],
  ] as const
).map(([hook, verdict]) => (hook * Verdict.VERDICT_COUNT + verdict) * countLayout.size);

interface RowCodec<Row> {
  key(row: Row): string;
  encode(row: Row): readonly [Uint8Array, Uint8Array];
  decode(key: Uint8Array, value: Uint8Array): Row;
}

const subnetKeyCodec = codec(maps.subnets4.key);
const subnetValueCodec = codec(maps.subnets4.value);
const peerKeyCodec = codec(maps.peers4.key);
const peerValueCodec = codec(maps.peers4.value);
const endpointKeyCodec = codec(maps.endpoints4.key);
const endpointValueCodec = codec(maps.endpoints4.value);
const interfaceKeyCodec = codec(maps.interfaces.key);
const interfaceValueCodec = codec(maps.interfaces.value);
const uplinkKeyCodec = codec(maps.uplinks4.key);
const uplinkValueCodec = codec(maps.uplinks4.value);
const excludedKeyCodec = codec(maps.excluded4.key);
const excludedValueCodec = codec(maps.excluded4.value);
const connectionKeyCodec = codec(maps.connections4.key);
const connectionCodec = codec(maps.connections4.value);
/** What fields are that a former layout did not have. */
const NEW_CONNECTION = connectionCodec.decode(new Uint8Array(connectionCodec.size));
const flowKeyCodec = codec(maps.flows4.key);
const flowCodec = codec(maps.flows4.value);
const configCodec = codec(configLayout);
const countersCodec = codec(maps.counters.value);
const censusCodec = codec(maps.census4.value);

const CODECS: { readonly [Name in MapName]: RowCodec<MapRows[Name]> } = {
  subnets4: {
    key: subnetKey,
    encode: (row) => [
      subnetKeyCodec.encode({ address: bytesOf(row.subnet), prefix_length: row.prefixLength }),
      subnetValueCodec.encode({
        public_ip: bytesOf(row.publicIp),
        next_hop: bytesOf(row.nextHop),
        ifindex: row.ifindex,
        reach: row.reach,
        mtu: row.mtu,
        vtep_mac: macBytes(row.vtepMac),
      }),
    ],
    decode: (keyBytes, valueBytes) => {
      const key = subnetKeyCodec.decode(keyBytes);
      const value = subnetValueCodec.decode(valueBytes);
      return {
        subnet: address(key.address),
        prefixLength: key.prefix_length,
        publicIp: address(value.public_ip),
        nextHop: address(value.next_hop),
        ifindex: value.ifindex,
        reach: value.reach,
        mtu: value.mtu,
        vtepMac: mac(value.vtep_mac),
      };
    },
  },
  peers4: {
    key: peerKey,
    encode: (row) => [
      peerKeyCodec.encode({ address: bytesOf(row.publicIp) }),
      peerValueCodec.encode({ address: bytesOf(row.subnet), prefix_length: row.prefixLength }),
    ],
    decode: (keyBytes, valueBytes) => {
      const value = peerValueCodec.decode(valueBytes);
      return {
        publicIp: address(peerKeyCodec.decode(keyBytes).address),
        subnet: address(value.address),
        prefixLength: value.prefix_length,
      };
    },
  },
  endpoints4: {
    key: endpointKey,
    encode: (row) => [
      endpointKeyCodec.encode({ address: bytesOf(row.address) }),
      endpointValueCodec.encode({
        ifindex: row.ifindex,
        delivery: row.delivery,
        mac: macBytes(row.mac),
        gateway_mac: macBytes(row.gatewayMac),
        mtu: row.mtu,
      }),
    ],
    decode: (keyBytes, valueBytes) => {
      const value = endpointValueCodec.decode(valueBytes);
      return {
        address: address(endpointKeyCodec.decode(keyBytes).address),
        ifindex: value.ifindex,
        delivery: value.delivery,
        mac: mac(value.mac),
        gatewayMac: mac(value.gateway_mac),
        mtu: value.mtu,
      };
    },
  },
  interfaces: {
    key: interfaceKey,
    encode: (row) => [
      interfaceKeyCodec.encode(row.ifindex),
      interfaceValueCodec.encode({ gateway_mac: macBytes(row.gatewayMac), bridge: row.bridge ? 1 : 0 }),
    ],
    decode: (keyBytes, valueBytes) => {
      const value = interfaceValueCodec.decode(valueBytes);
      return {
        ifindex: interfaceKeyCodec.decode(keyBytes),
        gatewayMac: mac(value.gateway_mac),
        bridge: value.bridge !== 0,
      };
    },
  },
  uplinks4: {
    key: uplinkKey,
    encode: (row) => [
      uplinkKeyCodec.encode(row.ifindex),
      uplinkValueCodec.encode({ address: bytesOf(row.address), former: bytesOf(row.former) }),
    ],
    decode: (keyBytes, valueBytes) => {
      const value = uplinkValueCodec.decode(valueBytes);
      return {
        ifindex: uplinkKeyCodec.decode(keyBytes),
        address: address(value.address),
        former: address(value.former),
      };
    },
  },
  excluded4: {
    key: excludedKey,
    encode: (row) => [
      excludedKeyCodec.encode({ prefix_length: row.length, address: bytesOf(row.address) }),
      excludedValueCodec.encode(1),
    ],
    decode: (keyBytes) => {
      const key = excludedKeyCodec.decode(keyBytes);
      return { address: address(key.address), length: key.prefix_length };
    },
  },
};

/** FNV-1a, folded to what a filter's handle may be. */
function handleOf(path: string): number {
  let hash = 0x811c9dc5;
  for (const byte of Buffer.from(path)) hash = Math.imul(hash ^ byte, 0x01000193) >>> 0;
  return 1 + (hash % 0xfffe);
}

/** Maps for connections have the size asked for, and next to none without masquerade, as that for peers' packets. */
function size(object: BpfObject, connections: number, countsPeers: boolean): void {
  object.setMaxEntries("connections4", Math.max(connections, 1));
  object.setMaxEntries("expiring4", connections + QUEUE_SLACK);
  if (!countsPeers) object.setMaxEntries("traffic4", 1);
  if (connections > 0) return;
  object.setMaxEntries("probes4", 1);
  object.setMaxEntries("ways4", 1);
  for (const program of ["expire", "restore"]) object.setAutoload(program, false);
}

/**
 * Loads what `plan` opens and prepares, on another thread. What can't be loaded is loaded once more here, as only that
 * tells the reasons. `isWanted` says whether they are still of interest then.
 */
async function loadPlanned(plan: () => BpfObject, isWanted: () => boolean): Promise<BpfObject> {
  const object = plan();
  try {
    await object.loadOnThread();
    return object;
  } catch (error) {
    object.close();
    if (!isWanted()) throw error;
  }
  const again = plan();
  try {
    again.load();
    return again;
  } catch (error) {
    again.close();
    throw error;
  }
}

/** The programs, prepared to be tried: with constants that switch on what this daemon needs, and no more. */
function openTrial({ object: path, connections }: DataplaneOptions): BpfObject {
  const object = openObject(path, { name: "twill" });
  const nothing = configCodec.decode(new Uint8Array(configCodec.size));
  object.setRodata({ config: configCodec.encode({ ...nothing, masquerade: connections > 0 ? 1 : 0 }) });
  size(object, Math.min(connections, 1), false);
  return object;
}

function refusal(error: unknown, connections: number): DataplaneError {
  // What the verifier says last of a program is why it refused it, but for a line about its own effort.
  const lines = messageOf(error)
    .split("\n")
    .map((line) => line.trim())
    .filter((line) => line !== "" && !line.startsWith("processed "));
  const reason = lines.length > 1 ? `${lines[0]} ${lines.at(-1)}.` : `${lines[0]}`;
  return new DataplaneError(
    `This kernel (Linux ${release()}) cannot run Twill's programs: ${reason} Use Linux 5.10 or newer${connections > 0 ? ", 5.15 or newer for --ip-masq" : ""}, with CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_BPF.`,
  );
}

/** Makes the pin path usable: mounts bpffs where the path says one should be, and makes the directory. */
function preparePinPath(pinPath: string): void {
  let existing = pinPath;
  while (!existsSync(existing)) existing = dirname(existing);
  if (!isBpffs(existing)) {
    const standard = "/sys/fs/bpf";
    if (existing !== standard) {
      throw new DataplaneError(
        `Cannot pin maps at ${pinPath}: ${existing} is not on a BPF file system. Give a --pin-path below ${standard}, or mount one there: mount -t bpf bpf ${standard}`,
      );
    }
    try {
      mountBpffs(standard);
    } catch (error) {
      throw new DataplaneError(
        `Cannot mount the BPF file system at ${standard}: ${messageOf(error)} Mount it from outside: mount -t bpf bpf ${standard}`,
      );
    }
  }
  for (const directory of DIRECTORIES) {
    mkdirSync(join(pinPath, directory), { recursive: true, mode: 0o700 });
  }
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** One direction of a connection, as packets carry it. ICMP has its identifier in both ports. */
export interface Tuple {
  readonly source: Ipv4;
  readonly destination: Ipv4;
  readonly sourcePort: number;
  readonly destinationPort: number;
  readonly protocol: number;
}

export interface DataplaneOptions {
  readonly pinPath: string;
  readonly attach: "auto" | AttachMode;
  /** The compiled programs. */
  readonly object: string;
  /** How many masqueraded connections there may be at a time; 0 without masquerade. */
  readonly connections: number;
  /** What the stack translates already when the programs come to this host for the first time. */
  readonly translated?: () => readonly Tuple[];
}

/** The counters, summed over processors, by hook and verdict. */
export type Counters = HookCounts;

export class Dataplane {
  readonly mode: AttachMode;
  readonly pinPath: string;
  readonly #options: DataplaneOptions;
  readonly #handle: number;
  readonly #connections: number;
  readonly #translated: () => readonly Tuple[];
  #subnet = { address: 0, mask: 0 };
  #countsPeers = false;
  #loaded: BpfObject | undefined;
  #fresh: string[] = [];
  /** The table of connections in force, where the programs loaded last have one of their own. */
  #former: BpfMap | undefined;
  /** The programs loaded last are those that run. */
  #active = false;
  #closed = false;
  /** The TCX links by what they attach, as they were seen last. */
  readonly #linkIds = new Map<string, number>();
  /** What each map is known to hold: summing up thousands of rows takes far less than decoding them. */
  readonly #known = new Map<MapName, Known>();
  /** What is being read. */
  readonly #reading = new Map<MapName, Known>();
  /** Maps that were written since a reading of their bytes began. */
  readonly #written = new Set<MapName>();
  /** The pins, by path, that are known to lead to what ought to be there: an inode is never another pin's. */
  readonly #pins = new Map<string, string>();
  #counters: BpfMap | undefined;

  /** Why the kernel could not be asked for TCX. */
  readonly #problem: unknown;

  private constructor(mode: AttachMode, problem: unknown, options: DataplaneOptions) {
    this.mode = mode;
    this.#problem = problem;
    this.pinPath = options.pinPath;
    this.#options = options;
    this.#connections = options.connections;
    this.#translated = options.translated ?? (() => []);
    this.#handle = handleOf(options.pinPath);
  }

  /** Chooses how to attach; `prepare` does the rest. Throws DataplaneError. */
  static open(options: DataplaneOptions): Dataplane {
    raiseMemlock();
    let isTcx = false;
    let problem: unknown;
    try {
      isTcx = options.attach !== "clsact" && hasTcx();
    } catch (error) {
      problem = error;
    }
    if (options.attach === "tcx" && !isTcx && problem === undefined) {
      throw new DataplaneError(
        "This kernel has no TCX (Linux 6.6 on). Use --attach=auto or --attach=clsact.",
      );
    }
    const mode = options.attach === "auto" ? (isTcx ? "tcx" : "clsact") : options.attach;
    return new Dataplane(mode, problem, options);
  }

  /**
   * Prepares the pin path. Before that it loads the programs once, in vain, unless this kernel has taken them before: one
   * that lacks something they need says so before a subnet is leased and anything is made. What depends on the node's own
   * constants comes when they are known. Rejects with a DataplaneError, or why the kernel could not be asked for TCX.
   */
  async prepare(isTried: boolean): Promise<void> {
    if (!isTried) await this.#try();
    // If it is no matter of what our programs need, which would say more.
    if (this.#problem !== undefined) throw this.#problem;
    if (!this.#closed) preparePinPath(this.pinPath);
  }

  async #try(): Promise<void> {
    try {
      const object = await loadPlanned(
        () => openTrial(this.#options),
        () => !this.#closed,
      );
      object.close();
    } catch (error) {
      throw refusal(error, this.#connections);
    }
  }

  /**
   * Loads programs with these constants beside those that run, on the maps that are pinned. A map of another
   * layout is made anew; `activate` puts it in the old one's place. Until it is done, which takes the verifier a while,
   * all else is as before; nothing may be loaded or activated meanwhile. Rejects with VerifierError and LibbpfError.
   */
  async load(config: ProgramConfig): Promise<void> {
    const countsPeers = config.count_peers !== 0;
    // Those of connections belong together: with one of them, all are made anew.
    let keeps = false;
    let fresh: string[] = [];
    const plan = (): BpfObject => {
      const object = openObject(this.#options.object, { name: "twill" });
      object.setRodata({
        config: configCodec.encode({
          ...config,
          vtep_mac: macBytes(config.vtep_mac),
          subnet_lengths: [...config.subnet_lengths, 0, 0, 0, 0].slice(0, 4),
        }),
      });
      size(object, this.#connections, countsPeers);
      const fits = (name: string): boolean => object.fitsMap(name, join(this.pinPath, name));
      keeps = CONNECTION_MAPS.every(fits);
      const kept = MAP_NAMES.filter((name) => (CONNECTION_MAPS.includes(name) ? keeps : fits(name)));
      for (const name of kept) object.reuseMap(name, join(this.pinPath, name));
      fresh = MAP_NAMES.filter((name) => !kept.includes(name));
      return object;
    };
    const object = await loadPlanned(plan, () => !this.#closed);
    if (this.#closed) {
      object.close();
      return;
    }
    this.#former?.close();
    this.#former = undefined;
    const former = join(this.pinPath, "connections4");
    if (!keeps && this.#connections > 0 && existsSync(former)) {
      this.#former = openPinnedMap(former);
      this.#restore(object, this.#former);
    }
    this.#loaded?.close();
    this.#loaded = object;
    this.#countsPeers = countsPeers;
    this.#counters = undefined;
    this.#pins.clear();
    this.#fresh = fresh;
    this.#active = false;
    this.#subnet = { address: config.subnet4, mask: config.subnet4_mask };
  }

  /**
   * Pins what `load` made and puts the new programs in the place of the old, each atomically. `ifindexes` are the
   * interfaces there are.
   */
  activate(ifindexes: Iterable<number>): void {
    const object = this.#object_();
    const former = this.#fresh.includes(KERNEL_MAP) ? this.#setAside(KERNEL_MAP) : undefined;
    try {
      if (former !== undefined) object.migrateMap(KERNEL_MAP, former);
      else if (this.#fresh.includes(KERNEL_MAP)) this.#noteTranslated(object);
      for (const name of this.#fresh) this.#pin(name, (path) => object.map(name).pin(path));
      for (const hook of HOOKS) this.#pin(hook, (path) => object.program(hook).pin(path));
      if (this.#connections > 0) this.#expire(object);
      this.#replace(object, ifindexes);
      // What the old programs noted until they were replaced.
      if (former !== undefined) object.migrateMap(KERNEL_MAP, former);
    } finally {
      if (former !== undefined) unlinkSync(former);
    }
    this.#fresh = [];
    // What began while the former programs still ran.
    if (this.#former !== undefined) this.#restore(object, this.#former);
    this.#former?.close();
    this.#former = undefined;
    this.#active = true;
  }

  /** Keeps on the stack what it translates already, of our pods: no program saw these flows begin. */
  #noteTranslated(object: BpfObject): void {
    const { address: subnet, mask } = this.#subnet;
    const isOurs = (ip: Ipv4): boolean => (ip & mask) >>> 0 === subnet;
    const value = flowCodec.encode({ since_ns: process.hrtime.bigint() });
    const rows = new Map<string, readonly [Uint8Array, Uint8Array]>();
    for (const tuple of this.#translated()) {
      if (!isOurs(tuple.source) && !isOurs(tuple.destination)) continue;
      // The second row stands for the flow's fragments.
      for (const key of [flowKey(tuple), flowKey({ ...tuple, sourcePort: 0, destinationPort: 0 })])
        rows.set(Buffer.from(key).toString("hex"), [key, value]);
    }
    object.map(KERNEL_MAP).updateBatch(rows.values());
  }

  /** Keeps a pinned map within reach under another name; undefined if there is none. */
  #setAside(name: string): string | undefined {
    const path = join(this.pinPath, name);
    if (!existsSync(path)) return undefined;
    const aside = join(this.pinPath, `${name}_old`);
    if (existsSync(aside)) unlinkSync(aside);
    const map = openPinnedMap(path);
    try {
      map.pin(aside);
    } finally {
      map.close();
    }
    return aside;
  }

  /** Pins anew what ought to be pinned and is not, or is another's. Returns how many pins there were to make. */
  keepPins(): number {
    if (!this.#active) return 0;
    preparePinPath(this.pinPath);
    const object = this.#object_();
    let made = 0;
    for (const name of MAP_NAMES) {
      const path = join(this.pinPath, name);
      const inode = inodeOf(path);
      if (inode !== undefined && this.#pins.get(path) === inode) continue;
      if (inode !== undefined && pinnedMapId(path) === object.map(name).id) {
        this.#pins.set(path, inode);
        continue;
      }
      this.#pin(name, (temporary) => object.map(name).pin(temporary));
      made += 1;
    }
    for (const hook of HOOKS) {
      if (existsSync(join(this.pinPath, hook))) continue;
      this.#pin(hook, (temporary) => object.program(hook).pin(temporary));
      made += 1;
    }
    return made;
  }

  #replace(object: BpfObject, ifindexes: Iterable<number>): void {
    if (this.mode === "clsact") {
      for (const row of [...this.#filters(ifindexes)]) this.attach(row);
      return;
    }
    for (const [, row, link] of this.#links()) {
      try {
        // A link whose interface is gone holds nothing that could be replaced.
        if (link.info().ifindex === row.ifindex) link.update(object.program(row.hook));
      } finally {
        link.close();
      }
    }
  }

  /**
   * Takes the connections of a former table into that of `object`, but for those it has. Their layout may be another
   * program's: fields go by name.
   */
  #restore(object: BpfObject, former: BpfMap): void {
    const layout = layoutOfMap(former, "connections4");
    if (layout?.key === undefined || layout.value === undefined) return;
    const keys = codec(layout.key);
    const values = codec(layout.value);
    const step = Limit.RESTORE_STEP;
    let packet: Uint8Array[] = [];
    const send = (): void => {
      if (packet.length === 0) return;
      const data = Buffer.concat([Buffer.alloc(Limit.RESTORE_START), ...packet]);
      object.program("restore").testRun({ data, dataOutSize: 0 });
      packet = [];
    };
    for (const [key, value] of former.entries()) {
      const row = { ...NEW_CONNECTION, ...(values.decode(value) as object) };
      packet.push(connectionKeyCodec.encode(keys.decode(key) as never), connectionCodec.encode(row as never));
      if (packet.length === 2 * step) send();
    }
    send();
  }

  /** Begins the sweep of connections, or hands it on to the programs at hand. The kernel then keeps it going. */
  #expire(object: BpfObject): void {
    const { retval } = object.program("expire").testRun({ data: new Uint8Array(64) });
    if (retval !== 0) {
      throw new DataplaneError(
        "The kernel could not start the timer by which connections expire. Masquerade needs Linux 5.15 or later.",
      );
    }
  }

  /**
   * The rows of a map with their keys, some at a time. Returns false, without all of them, if they are as they were read
   * last, with what was put and removed from here since.
   */
  *read<Name extends MapName>(name: Name): Generator<readonly (readonly [string, MapRows[Name]])[], boolean> {
    const map = this.#map(name);
    if (this.#known.get(name)?.id === map.id && (yield* this.#isAsKnown(name, map))) return false;
    this.#known.delete(name);
    const reading: Known = { id: map.id, sum: new MapSum() };
    this.#reading.set(name, reading);
    const rowCodec = CODECS[name];
    for (const { keys, values, count } of map.blocks(ROWS)) {
      reading.sum.addAll(keys, values, map.keySize, map.valueSize);
      const rows: (readonly [string, MapRows[Name]])[] = [];
      for (let i = 0; i < count; i++) {
        const row = rowCodec.decode(
          keys.subarray(i * map.keySize, (i + 1) * map.keySize),
          values.subarray(i * map.valueSize, (i + 1) * map.valueSize),
        );
        rows.push([rowCodec.key(row), row]);
      }
      yield rows;
    }
    // Written to meanwhile, or read by another as well, it is not what was read.
    if (this.#reading.get(name) === reading) this.#known.set(name, reading);
    this.#reading.delete(name);
    return true;
  }

  /** Whether a map holds what is known of it. What is written from here while it is read may have been read or not. */
  *#isAsKnown(name: MapName, map: BpfMap): Generator<readonly never[], boolean> {
    for (let attempt = 0; attempt < READINGS; attempt++) {
      const known = this.#known.get(name);
      if (known === undefined) return false;
      this.#written.delete(name);
      const sum = new MapSum();
      for (const { keys, values, count } of map.blocks(ROWS_AS_BYTES)) {
        sum.addAll(keys, values, map.keySize, map.valueSize);
        // Of a small table that is all.
        if (count === ROWS_AS_BYTES) yield [];
      }
      if (sum.equals(known.sum)) return true;
      if (!this.#written.has(name)) return false;
    }
    return false;
  }

  /**
   * Writes rows, all or none of them known to be there: a failure throws LibbpfError and the caller reads back. `before` is
   * what each takes the place of, as far as the caller knows.
   */
  put<Name extends MapName>(
    name: Name,
    rows: readonly MapRows[Name][],
    before: readonly (MapRows[Name] | undefined)[],
  ): void {
    const rowCodec = CODECS[name];
    const entries = rows.map((row) => rowCodec.encode(row));
    const known = this.#beginWrite(name);
    this.#map(name).updateBatch(entries);
    if (known === undefined) return;
    for (const row of before) if (row !== undefined) known.sum.remove(...rowCodec.encode(row));
    for (const [key, value] of entries) known.sum.add(key, value);
    this.#known.set(name, known);
  }

  /** Until what is known of a map is put back, nothing is. */
  #beginWrite(name: MapName): Known | undefined {
    const known = this.#known.get(name);
    this.#known.delete(name);
    this.#reading.delete(name);
    this.#written.add(name);
    return known;
  }

  /** Removes rows, which are as the caller believes them to be; one that is gone already is fine. */
  remove<Name extends MapName>(name: Name, rows: readonly MapRows[Name][]): void {
    const rowCodec = CODECS[name];
    const entries = rows.map((row) => rowCodec.encode(row));
    const keys = entries.map(([key]) => key);
    const known = this.#beginWrite(name);
    this.#map(name).deleteBatch(keys);
    if (known !== undefined) {
      for (const [key, value] of entries) known.sum.remove(key, value);
      this.#known.set(name, known);
    }
    if (name !== "peers4" || !this.#countsPeers) return;
    // Of a peer that is gone nothing is told any more. One by one, as most may never have been spoken to.
    const traffic = this.#map("traffic4");
    for (const key of keys) traffic.delete(key);
  }

  /** Where our programs are attached. `ifindexes` are the interfaces there are. */
  attachments(ifindexes: Iterable<number>): Map<string, AttachmentRow> {
    const rows = new Map<string, AttachmentRow>();
    if (this.mode === "tcx") {
      for (const [path, row] of linkPins(this.pinPath)) {
        const key = attachmentKey(row);
        const inode = inodeOf(path);
        const isKnown = inode !== undefined && this.#pins.get(path) === inode;
        if (!(isKnown && this.#isThere(row)) && !this.#lookAtLink(path, row, inode)) continue;
        rows.set(key, row);
      }
      return rows;
    }
    for (const row of this.#filters(ifindexes)) rows.set(attachmentKey(row), row);
    return rows;
  }

  /** Whether a program that was attached still is. One with clsact counts as such: the kernel tells when it is deleted. */
  isAttached(row: AttachmentRow): boolean {
    if (this.mode === "clsact") return true;
    const id = this.#linkIds.get(attachmentKey(row));
    return id !== undefined && hasTcxLink(row.ifindex, DIRECTIONS[row.hook], id);
  }

  /** The same, also of an interface that is gone. */
  #isThere(row: AttachmentRow): boolean {
    try {
      return this.isAttached(row);
    } catch {
      return false;
    }
  }

  /** Whether a pinned link holds a program; learns which link it is. One that outlived its interface leads nowhere, and goes. */
  #lookAtLink(path: string, row: AttachmentRow, inode: string | undefined): boolean {
    const link = openPinnedLink(path);
    try {
      if (link.info().ifindex !== row.ifindex) {
        unlinkSync(path);
        return false;
      }
      this.#linkIds.set(attachmentKey(row), link.id);
      if (inode !== undefined) this.#pins.set(path, inode);
      return true;
    } finally {
      link.close();
    }
  }

  /** Attaches, or replaces what is attached. Throws LibbpfError. */
  attach(row: AttachmentRow): void {
    const program = this.#object_().program(row.hook);
    const direction = DIRECTIONS[row.hook];
    if (this.mode === "clsact") {
      const place = { priority: CLSACT_PRIORITY, handle: this.#handle };
      const { createdQdisc } = attachClsact(program, row.ifindex, direction, place);
      const mark = join(this.pinPath, "qdiscs", `${row.ifindex}`);
      if (createdQdisc && !existsSync(mark)) mkdirSync(mark);
      return;
    }
    const path = join(this.pinPath, "links", attachmentKey(row));
    if (existsSync(path)) {
      const former = openPinnedLink(path);
      try {
        if (former.info().ifindex === row.ifindex) {
          former.update(program);
          this.#linkIds.set(attachmentKey(row), former.id);
          return;
        }
      } finally {
        former.close();
      }
      unlinkSync(path);
    }
    const link = attachTcx(program, row.ifindex, direction);
    try {
      link.pin(path);
      this.#linkIds.set(attachmentKey(row), link.id);
    } finally {
      link.close();
    }
  }

  /** Detaches; what is gone already is fine. */
  detach(row: AttachmentRow): void {
    if (this.mode === "clsact") {
      detachClsact(row.ifindex, DIRECTIONS[row.hook], { priority: CLSACT_PRIORITY, handle: this.#handle });
      return;
    }
    this.#unlink(row);
  }

  /** Takes our programs off the hooks in the mode that is not in use, after a change of --attach. */
  detachOtherMode(ifindexes: Iterable<number>): void {
    if (this.mode === "clsact") {
      for (const [, row, link] of this.#links()) {
        link.close();
        this.#unlink(row);
      }
      return;
    }
    for (const row of this.#filters(ifindexes)) {
      detachClsact(row.ifindex, DIRECTIONS[row.hook], { priority: CLSACT_PRIORITY, handle: this.#handle });
    }
  }

  counters(): Counters {
    return readCounters(this.pinPath);
  }

  /** How many tunnel packets the programs have dropped as no peer's, since the map of counters was made. */
  refused(): number {
    if (this.#loaded === undefined) return 0;
    this.#counters ??= this.#map("counters");
    let sum = 0;
    for (const value of this.#counters.lookupPerCpu(ONLY) ?? [])
      for (const at of REFUSALS) sum += u64(value, at);
    return sum;
  }

  /**
   * Lets go of the programs and maps, of those being loaded when they are; attached and pinned they go on. A pin path
   * without pins is removed.
   */
  close(): void {
    this.#closed = true;
    this.#loaded?.close();
    this.#loaded = undefined;
    if (!existsSync(this.pinPath)) return;
    if (readdirSync(this.pinPath).some((name) => !DIRECTORIES.includes(name))) return;
    const places = DIRECTORIES.map((name) => join(this.pinPath, name));
    if (places.some((place) => readdirSync(place).length > 0)) return;
    for (const place of [...places, this.pinPath]) rmdirSync(place);
  }

  #object_(): BpfObject {
    if (this.#loaded === undefined) throw new DataplaneError("No programs are loaded yet.");
    return this.#loaded;
  }

  #map(name: string): BpfMap {
    return this.#object_().map(name);
  }

  /** Pins under a name of its own first: a pin is never missing, and never half replaced. */
  #pin(name: string, pin: (path: string) => void): void {
    const path = join(this.pinPath, name);
    const temporary = join(this.pinPath, `${name}_new`);
    if (existsSync(temporary)) unlinkSync(temporary);
    pin(temporary);
    renameSync(temporary, path);
  }

  *#links(): Generator<readonly [string, AttachmentRow, ReturnType<typeof openPinnedLink>]> {
    yield* pinnedLinks(this.pinPath);
  }

  #unlink(row: AttachmentRow): void {
    this.#linkIds.delete(attachmentKey(row));
    const path = join(this.pinPath, "links", attachmentKey(row));
    if (!existsSync(path)) return;
    const link = openPinnedLink(path);
    try {
      link.detach();
    } finally {
      link.close();
    }
    unlinkSync(path);
  }

  *#filters(ifindexes: Iterable<number>): Generator<AttachmentRow> {
    yield* ourFilters(ifindexes, this.#handle);
  }
}

/** As `flow_key` of bpf/flow.h makes it: the lower address first, so that both directions are one flow. */
function flowKey({ source, destination, sourcePort, destinationPort, protocol }: Tuple): Uint8Array {
  const swap = source > destination || (source === destination && sourcePort > destinationPort);
  return flowKeyCodec.encode({
    a: bytesOf(swap ? destination : source),
    b: bytesOf(swap ? source : destination),
    port_a: swap ? destinationPort : sourcePort,
    port_b: swap ? sourcePort : destinationPort,
    protocol,
  });
}

function pinnedMapId(path: string): number {
  const map = openPinnedMap(path);
  try {
    return map.id;
  } finally {
    map.close();
  }
}

/** Names a pin: no other one has this inode. Undefined if there is none. */
function inodeOf(path: string): string | undefined {
  const stat = statSync(path, { throwIfNoEntry: false });
  return stat && `${stat.dev} ${stat.ino}`;
}

function* pinnedLinks(
  pinPath: string,
): Generator<readonly [string, AttachmentRow, ReturnType<typeof openPinnedLink>]> {
  for (const [path, row] of linkPins(pinPath)) yield [path, row, openPinnedLink(path)];
}

/** Where links are pinned, and of what. */
function* linkPins(pinPath: string): Generator<readonly [string, AttachmentRow]> {
  const directory = join(pinPath, "links");
  if (!existsSync(directory)) return;
  for (const name of readdirSync(directory)) {
    const match = /^([a-z_]+)-(\d+)$/.exec(name);
    const hook = HOOKS.find((known) => known === match?.[1]);
    if (match === null || hook === undefined) continue;
    yield [join(directory, name), { hook, ifindex: Number(match[2]) }];
  }
}

function* ourFilters(ifindexes: Iterable<number>, handle: number): Generator<AttachmentRow> {
  for (const ifindex of ifindexes) {
    for (const direction of ["ingress", "egress"] as const) {
      for (const filter of queryClsact(ifindex, direction)) {
        if (filter.priority !== CLSACT_PRIORITY || filter.handle !== handle) continue;
        const hook = HOOKS.find((known) => filter.name.startsWith(`${known}:`) || filter.name === known);
        if (hook !== undefined) yield { ifindex, hook };
      }
    }
  }
}

/** A program where it is attached. */
export interface Attachment extends AttachmentRow {
  readonly mode: AttachMode;
}

/** What is attached from a pin path, in either mode, and on which interfaces. */
export function findAttachments(pinPath: string, ifindexes: Iterable<number>): Attachment[] {
  const found: Attachment[] = [];
  for (const [, row, link] of pinnedLinks(pinPath)) {
    if (link.info().ifindex === row.ifindex) found.push({ ...row, mode: "tcx" });
    link.close();
  }
  for (const row of ourFilters(ifindexes, handleOf(pinPath))) found.push({ ...row, mode: "clsact" });
  return found;
}

/**
 * Takes everything of ours out of the kernel that belongs to a pin path: programs off their hooks, the qdiscs we
 * made unless somebody else uses them by now, and every pin. Returns what was removed, in words.
 */
export function removeDataplane(pinPath: string, ifindexes: readonly number[]): string[] {
  const removed: string[] = [];
  for (const [path, row, link] of pinnedLinks(pinPath)) {
    if (link.info().ifindex === row.ifindex) {
      link.detach();
      removed.push(`program ${row.hook} on interface ${row.ifindex}`);
    }
    link.close();
    unlinkSync(path);
  }
  const place = { priority: CLSACT_PRIORITY, handle: handleOf(pinPath) };
  for (const row of ourFilters(ifindexes, place.handle)) {
    detachClsact(row.ifindex, DIRECTIONS[row.hook], place);
    removed.push(`program ${row.hook} on interface ${row.ifindex}`);
  }
  if (!existsSync(pinPath)) return removed;
  const qdiscs = join(pinPath, "qdiscs");
  for (const name of existsSync(qdiscs) ? readdirSync(qdiscs) : []) {
    const ifindex = Number(name);
    if (!ifindexes.includes(ifindex)) continue;
    const left = [...queryClsact(ifindex, "ingress"), ...queryClsact(ifindex, "egress")];
    if (left.length > 0) leaveQdisc(pinPath, ifindex, left);
    else if (destroyClsact(ifindex)) removed.push(`clsact qdisc of interface ${ifindex}`);
  }
  removePins(pinPath, removed);
  return removed;
}

/** Another Twill beside us that uses a qdisc we made removes it with the last filter. */
function leaveQdisc(pinPath: string, ifindex: number, filters: readonly FilterPlace[]): void {
  const beside = dirname(pinPath);
  for (const name of readdirSync(beside)) {
    const other = join(beside, name);
    const handle = handleOf(other);
    if (!filters.some((filter) => filter.priority === CLSACT_PRIORITY && filter.handle === handle)) continue;
    const mark = join(other, "qdiscs", `${ifindex}`);
    if (existsSync(dirname(mark)) && !existsSync(mark)) mkdirSync(mark);
    return;
  }
}

function removePins(directory: string, removed: string[]): void {
  for (const entry of readdirSync(directory, { withFileTypes: true })) {
    const path = join(directory, entry.name);
    if (entry.isDirectory()) {
      removePins(path, removed);
    } else {
      unlinkSync(path);
      removed.push(`pin ${path}`);
    }
  }
  rmdirSync(directory);
}

/** The facts that the programs in force were loaded with, from the kernel; undefined if there are none. */
export function readConfig(pinPath: string): ReturnType<typeof configCodec.decode> | undefined {
  const path = join(pinPath, HOOKS[0] ?? "");
  if (!existsSync(path)) return undefined;
  const program = openPinnedProgram(path);
  try {
    for (const id of programInfo({ fd: program.fd }).mapIds) {
      const map = openMapById(id);
      try {
        const [entry] = map.name.endsWith(".rodata") ? map.entries() : [];
        if (entry !== undefined) return configCodec.decode(entry[1]);
      } finally {
        map.close();
      }
    }
    return undefined;
  } finally {
    program.close();
  }
}

/** What ought to be pinned at a path and is not, and which maps there are not as this version makes them. */
export function checkPins(pinPath: string): { missing: string[]; otherLayout: string[] } {
  const missing = [...MAP_NAMES, ...HOOKS].filter((name) => !existsSync(join(pinPath, name)));
  const otherLayout = MAP_NAMES.filter((name) => !missing.includes(name)).filter((name) => {
    const layout: {
      readonly name: string;
      readonly key?: { readonly size: number };
      readonly value?: { readonly size: number };
    } = maps[name];
    const map = openPinnedMap(join(pinPath, name));
    try {
      return map.keySize !== (layout.key?.size ?? 0) || map.valueSize !== (layout.value?.size ?? 0);
    } finally {
      map.close();
    }
  });
  return { missing, otherLayout };
}

/** A program that is not ours, and that packets meet before ours. */
export interface ForeignProgram {
  readonly ifindex: number;
  readonly direction: "ingress" | "egress";
  readonly name: string;
  readonly by: "tcx" | "filter" | "xdp";
  /** Of a TCX link; undefined for one attached without, and for others. */
  readonly linkId: number | undefined;
  /** Of a filter; undefined for others. */
  readonly priority: number | undefined;
}

/** Programs of others before ours, at the hooks where `attachments` are. Another Twill's are none of these. */
export function findForeign(
  attachments: readonly (AttachmentRow & { readonly mode: AttachMode })[],
): ForeignProgram[] {
  const found: ForeignProgram[] = [];
  const isOurs = (name: string): boolean => HOOKS.some((hook) => hook === name);
  for (const { ifindex, hook, mode } of attachments) {
    const direction = DIRECTIONS[hook];
    const add = (by: ForeignProgram["by"], name: string, more: Partial<ForeignProgram> = {}): void => {
      found.push({ ifindex, direction, name, by, linkId: undefined, priority: undefined, ...more });
    };
    if (hasTcx()) {
      const chain = queryTcx(ifindex, direction).map((program) => ({
        ...program,
        name: programInfo({ id: program.programId }).name,
      }));
      const end = mode === "tcx" ? chain.findIndex(({ name }) => name === hook) : chain.length;
      for (const { name, linkId, programId } of chain.slice(0, Math.max(end, 0))) {
        if (!isOurs(name)) add("tcx", name || `#${programId}`, { linkId: linkId === 0 ? undefined : linkId });
      }
    }
    if (mode === "clsact") {
      for (const { priority, name, kind } of queryClsact(ifindex, direction)) {
        if (priority < CLSACT_PRIORITY) add("filter", name || kind, { priority });
      }
    }
    if (hook !== "from_net") continue;
    const xdp = queryXdp(ifindex);
    if (xdp !== undefined) add("xdp", programInfo({ id: xdp.programId }).name || `#${xdp.programId}`);
  }
  return found;
}

const HELPERS: readonly (readonly [name: string, number: number, use: string])[] = [
  ["bpf_redirect_neigh", 152, "sending packets to peers"],
  ["bpf_redirect_peer", 155, "handing packets to pods"],
  ["bpf_skb_adjust_room", 50, "the tunnel's headers"],
  ["bpf_csum_level", 135, "taking packets out of the tunnel"],
  ["bpf_sk_lookup_udp", 85, "telling the node's own flows from pods'"],
  ["bpf_fib_lookup", 69, "--ip-masq"],
  ["bpf_spin_lock", 93, "--ip-masq"],
  ["bpf_timer_init", 169, "--ip-masq"],
];
/** Of <linux/bpf.h>, enum bpf_map_type. */
const MAP_TYPES: readonly (readonly [name: string, number: number, use: string])[] = [
  ["maps of type percpu_array", 6, "counters"],
  ["maps of type percpu_hash", 5, "--metrics-peers"],
  ["maps of type lru_hash", 9, "flows that the stack translates"],
  ["maps of type lpm_trie", 11, "--masq-exclude"],
  ["maps of type queue", 22, "--ip-masq"],
];

/** Which of the kernel's features that the programs use are missing, asked of the kernel one by one. */
export function missingFeatures(): { feature: string; use: string }[] {
  return [
    ...HELPERS.filter(([, number]) => !hasHelper(number)),
    ...MAP_TYPES.filter(([, number]) => !hasMapType(number)),
  ].map(([feature, , use]) => ({ feature, use }));
}

/** Whether a path, or the part of it that exists, lies in a BPF file system; and that part. */
export function findBpffs(pinPath: string): { path: string; mounted: boolean } {
  let path = pinPath;
  while (!existsSync(path)) path = dirname(path);
  return { path, mounted: isBpffs(path) };
}

/** Packets between this node and a peer, and bytes of their frames without the tunnel, since they are counted. */
export interface PeerTraffic {
  readonly sent: { readonly packets: number; readonly bytes: number };
  readonly received: { readonly packets: number; readonly bytes: number };
}

/** Of a peer that nothing went to or came from yet. */
export const NO_TRAFFIC: PeerTraffic = {
  sent: { packets: 0, bytes: 0 },
  received: { packets: 0, bytes: 0 },
};

/** What went to each peer and came from it, by its public address, summed over processors; empty if nobody counts. */
export function readTraffic(pinPath: string): Map<Ipv4, PeerTraffic> {
  const traffic = new Map<Ipv4, PeerTraffic>();
  const map = openKnownMap(pinPath, "traffic4");
  const { sent, received } = TRAFFIC;
  try {
    for (const { keys, values, count } of map.blocksPerCpu(BATCH)) {
      const window = values.length / count;
      for (let index = 0; index < count; index += 1) {
        const sum = (field: number): number => {
          let total = 0;
          for (let at = index * window; at < (index + 1) * window; at += map.valueSize)
            total += u64(values, at + field);
          return total;
        };
        traffic.set(addressAt(keys, index * map.keySize), {
          sent: { packets: sum(sent + COUNT.packets), bytes: sum(sent + COUNT.bytes) },
          received: { packets: sum(received + COUNT.packets), bytes: sum(received + COUNT.bytes) },
        });
      }
    }
  } finally {
    map.close();
  }
  return traffic;
}

/** The rows of a pinned map, whether or not a daemon runs. */
export function readRows<Name extends MapName>(pinPath: string, name: Name): MapRows[Name][] {
  const map = openKnownMap(pinPath, name);
  try {
    return map.entries().map(([key, value]) => CODECS[name].decode(key, value));
  } finally {
    map.close();
  }
}

/** What the sweep of connections has counted in its last round: some seconds old at most. */
export interface Census {
  /** Connections, by protocol and state. */
  readonly connections: Readonly<Record<CensusProtocol, Readonly<Record<CensusState, number>>>>;
  /** Candidate ports that a connection had to try at most, of `candidates`, when none is left. */
  readonly furthest: number;
  readonly candidates: number;
  /** Room for connections. */
  readonly capacity: number;
}

export type CensusProtocol = "tcp" | "udp" | "icmp" | "other";
export type CensusState = "opening" | "established" | "closing" | "closed";

/** How many connections there are, without a walk through them; undefined before the first round of the sweep. */
export function readCensus(pinPath: string): Census | undefined {
  const map = openKnownMap(pinPath, "census4");
  const table = openPinnedMap(join(pinPath, "connections4"));
  try {
    const bytes = map.lookup(Buffer.alloc(4));
    const row = bytes === undefined ? undefined : censusCodec.decode(bytes);
    if (row === undefined || row.at_ns === 0n) return undefined;
    const { tcp, udp, icmp, other, furthest } = row;
    const capacity = table.maxEntries;
    return { connections: { tcp, udp, icmp, other }, furthest, candidates: Limit.CANDIDATES_MAX, capacity };
  } finally {
    map.close();
    table.close();
  }
}

/** Counts the entries of a pinned map some at a time: each step costs little. */
export function* countEntries(pinPath: string, name: keyof typeof maps): Generator<number> {
  const map = openPinnedMap(join(pinPath, name));
  try {
    let entries = 0;
    for (const batch of map.batches()) {
      entries += batch.length;
      yield entries;
    }
  } finally {
    map.close();
  }
}

/** Entries in use of a pinned map, and room. */
export function mapUse(pinPath: string, name: keyof typeof maps): { entries: number; capacity: number } {
  const map = openPinnedMap(join(pinPath, name));
  try {
    let entries = 0;
    if (!map.perCpu) for (const { count } of map.blocks(BATCH)) entries += count;
    return { entries, capacity: map.maxEntries };
  } finally {
    map.close();
  }
}

/** Entries that a pinned map can hold. */
export function mapCapacity(pinPath: string, name: keyof typeof maps): number {
  const map = openPinnedMap(join(pinPath, name));
  try {
    return map.maxEntries;
  } finally {
    map.close();
  }
}

/** A masqueraded connection. Ports are 0 where the protocol has none; an ICMP echo has its identifier as both. */
export interface ConnectionRow {
  readonly protocol: number;
  readonly state: ConnectionState;
  readonly pod: Ipv4;
  readonly podPort: number;
  /** Ours, as the outside sees it; the pod's own for a flow that the outside opened. */
  readonly address: Ipv4;
  readonly port: number;
  readonly remote: Ipv4;
  readonly remotePort: number;
  /** The uplink. */
  readonly ifindex: number;
  readonly replied: boolean;
  /** The stack sees all packets of it. */
  readonly onStack: boolean;
  /** Nanoseconds since boot, without suspend: when a packet of it came last, within a second; and the first. */
  readonly seenNs: number;
  readonly sinceNs: number;
}

/** A flow that stays on the stack; `a` is the lower address. Without ports it stands for the fragments of others. */
export interface FlowRow {
  readonly a: Ipv4;
  readonly portA: number;
  readonly b: Ipv4;
  readonly portB: number;
  readonly protocol: number;
  /** Nanoseconds since boot, without suspend. */
  readonly sinceNs: bigint;
}

/** Opens a map that this version of Twill can read. Throws DataplaneError if its layout is another one's. */
function openKnownMap(pinPath: string, name: Exclude<keyof typeof maps, "events">): BpfMap {
  const map = openPinnedMap(join(pinPath, name));
  if (map.valueSize === maps[name].value.size) return map;
  map.close();
  throw new DataplaneError(
    `The map ${name} at ${pinPath} is of another version of Twill: use the twill that came with the twilld that runs here.`,
  );
}

/** Where the fields of a struct are, in bytes, for those who read a quarter of a million of them at once. */
function offsetsOf<Name extends string>(layout: {
  readonly fields: readonly { readonly name: Name; readonly offset: number }[];
}): Readonly<Record<Name, number>> {
  return Object.fromEntries(layout.fields.map(({ name, offset }) => [name, offset])) as Record<Name, number>;
}

const CONNECTION_KEY = offsetsOf(maps.connections4.key);
const CONNECTION = offsetsOf(maps.connections4.value);
const TRAFFIC = offsetsOf(maps.traffic4.value);
const COUNT = offsetsOf(countLayout);
const CONNECTION_STATES = Object.keys(ConnectionState) as ConnectionState[];

const be16 = (bytes: Uint8Array, at: number): number => ((bytes[at] ?? 0) << 8) | (bytes[at + 1] ?? 0);
const addressAt = (bytes: Uint8Array, at: number): Ipv4 =>
  ((be16(bytes, at) << 16) | be16(bytes, at + 2)) >>> 0;
const u32 = (bytes: Uint8Array, at: number): number =>
  ((bytes[at] ?? 0) |
    ((bytes[at + 1] ?? 0) << 8) |
    ((bytes[at + 2] ?? 0) << 16) |
    ((bytes[at + 3] ?? 0) << 24)) >>>
  0;
/** Exact up to 104 days in nanoseconds, and then to the next even number. */
const u64 = (bytes: Uint8Array, at: number): number => u32(bytes, at) + u32(bytes, at + 4) * 2 ** 32;

/** The connections of a pinned map, one after the other: there may be a quarter of a million. */
export function* readConnections(pinPath: string): Generator<ConnectionRow> {
  const map = openKnownMap(pinPath, "connections4");
  try {
    for (const { keys, values, count } of map.blocks(BATCH)) {
      for (let index = 0; index < count; index += 1) {
        const key = index * map.keySize;
        const value = index * map.valueSize;
        yield {
          protocol: keys[key + CONNECTION_KEY.protocol] ?? 0,
          state: CONNECTION_STATES[u32(values, value + CONNECTION.state)] ?? "CONNECTION_GONE",
          pod: addressAt(values, value + CONNECTION.pod),
          podPort: be16(values, value + CONNECTION.pod_port),
          address: addressAt(keys, key + CONNECTION_KEY.address),
          port: be16(keys, key + CONNECTION_KEY.port),
          remote: addressAt(keys, key + CONNECTION_KEY.remote),
          remotePort: be16(keys, key + CONNECTION_KEY.remote_port),
          ifindex: u32(values, value + CONNECTION.ifindex),
          replied: values[value + CONNECTION.replied] !== 0,
          onStack: values[value + CONNECTION.on_stack] !== 0,
          seenNs: u64(values, value + CONNECTION.seen_ns),
          sinceNs: u64(values, value + CONNECTION.since_ns),
        };
      }
    }
  } finally {
    map.close();
  }
}

/** The flows of a pinned map. */
export function readFlows(pinPath: string): FlowRow[] {
  const map = openKnownMap(pinPath, "flows4");
  try {
    return map.entries().map(([keyBytes, valueBytes]) => {
      const key = flowKeyCodec.decode(keyBytes);
      return {
        a: address(key.a),
        portA: key.port_a,
        b: address(key.b),
        portB: key.port_b,
        protocol: key.protocol,
        sinceNs: flowCodec.decode(valueBytes).since_ns,
      };
    });
  } finally {
    map.close();
  }
}

/** The programs in force, as the kernel knows them; those that are not pinned are left out. */
export function readPrograms(pinPath: string): { readonly hook: Hook; readonly info: ProgramInfo }[] {
  return HOOKS.filter((hook) => existsSync(join(pinPath, hook))).map((hook) => {
    const program = openPinnedProgram(join(pinPath, hook));
    try {
      return { hook, info: programInfo({ fd: program.fd }) };
    } finally {
      program.close();
    }
  });
}

/** Has the kernel count runs and run time of all programs until `close()`. */
export function countRuns(): { close(): void } {
  return enableStats();
}

/** The counters of the maps pinned at a path, summed over processors. */
export function readCounters(pinPath: string): Counters {
  const map = openKnownMap(pinPath, "counters");
  try {
    const perCpu = map.lookupPerCpu(Buffer.alloc(4)) ?? [];
    const sum = Buffer.alloc(map.valueSize);
    for (const value of perCpu.slice(0, possibleCpus())) {
      const view = Buffer.from(value);
      for (let at = 0; at < sum.length; at += 8) {
        sum.writeBigUInt64LE(BigInt.asUintN(64, sum.readBigUInt64LE(at) + view.readBigUInt64LE(at)), at);
      }
    }
    return countersCodec.decode(sum) as Counters;
  } finally {
    map.close();
  }
}
