/**
 * The programs in force, loaded a second time, to run on packets that are made up.
 *
 * The same code (the kernel's tags are compared) with the same constants. Tables that only the control plane writes are
 * those in force themselves; of each table that programs write there is a copy. So nothing that runs here can
 * change what the node does, and nothing has to be undone. Not copied are fragments that wait for their first one: to
 * send them on is something that programs do by themselves, test run or not.
 *
 * A test run obeys neither `bpf_redirect` nor its kin: the verdict, which the programs count, says what they meant.
 */
import { existsSync } from "node:fs";
import { join } from "node:path";
import {
  type BpfMap,
  type BpfObject,
  codec,
  type Entry,
  openMapById,
  openObject,
  openPinnedMap,
  openPinnedProgram,
  type Program,
  programInfo,
} from "../../loader/index.ts";
import { configLayout, Hook, hookCountsLayout, maps, rodataLayout, Verdict } from "../abi/twill.gen.ts";

/** What a program did with a packet. */
export interface Ran {
  /** What it returned: go on with the stack, send it elsewhere, or take it away. */
  readonly action: "next" | "redirect" | "drop";
  /** As `twill status` names it: `encapsulated`. */
  readonly verdict: string;
  /** The frame afterwards. */
  readonly frame: Uint8Array;
}

const TC_ACT_SHOT = 2;
const TC_ACT_REDIRECT = 7;
/** `struct __sk_buff` of linux/bpf.h: its size, and where the interface is in it. */
const SKB_SIZE = 192;
const IFINDEX_AT = 40;
/** Ethernet's header, which the kernel takes off before it looks at the length. */
const LEAST_FRAME = 14;

/** Only the control plane writes these: programs of the rehearsal read them where they are. */
const SHARED: readonly (keyof typeof maps)[] = [
  "subnets4",
  "peers4",
  "endpoints4",
  "interfaces",
  "uplinks4",
  "excluded4",
];
/** The programs write these: here they have a copy. */
const COPIED: readonly (keyof typeof maps)[] = ["flows4", "fragments4", "connections4", "probes4"];
/** Of the size of the one in force, but empty. */
const EMPTY: readonly (keyof typeof maps)[] = ["expiring4", "traffic4"];
/** What stays in a copy from an earlier run makes later ones look further, and is else of no consequence. */
const KEPT = "probes4";

const plain = (name: string): string => name.slice(name.indexOf("_") + 1).toLowerCase();
const HOOKS = Object.keys(Hook)
  .filter((name) => name !== "HOOK_COUNT")
  .map(plain);
const VERDICTS = Object.keys(Verdict)
  .filter((name) => name !== "VERDICT_COUNT")
  .map(plain);
/** Of the object. */
const PROGRAMS = [...HOOKS, "expire", "restore"];
const CELL = 16;
const FIRST = new Uint8Array(4);

export class Rehearsal {
  readonly #pinPath: string;
  readonly #path: string;
  /** Has the maps alone. */
  readonly #object: BpfObject;
  /** One for each program that ran: the verifier is not given those that no packet comes to. */
  readonly #programs = new Map<string, BpfObject>();
  readonly #rows = new Map<string, Entry[]>();
  /** The constants of the programs in force. */
  readonly config: ReturnType<typeof configCodec.decode>;

  readonly #constants: Uint8Array;

  private constructor(pinPath: string, path: string, object: BpfObject, config: Uint8Array) {
    this.#pinPath = pinPath;
    this.#path = path;
    this.#object = object;
    this.#constants = config;
    this.config = configCodec.decode(config);
  }

  /**
   * Prepares what is in force at a pin path; `path` is the compiled object. Throws an Error for people if the maps in
   * force are not of that object, and LibbpfError.
   */
  static open(pinPath: string, path: string): Rehearsal {
    const config = constantsOf(pinPath);
    const object = openObject(path, { name: "rehearsal" });
    try {
      object.setRodata({ config });
      for (const program of PROGRAMS) object.setAutoload(program, false);
      for (const name of SHARED) {
        if (!object.fitsMap(name, join(pinPath, name))) throw otherBuild(pinPath);
        object.reuseMap(name, join(pinPath, name));
      }
      for (const name of [...COPIED, ...EMPTY])
        withPinned(pinPath, name, (map) => object.setMaxEntries(name, map.maxEntries));
      object.load();
      const rehearsal = new Rehearsal(pinPath, path, object, config);
      rehearsal.#copy(pinPath);
      return rehearsal;
    } catch (error) {
      object.close();
      throw error;
    }
  }

  /**
   * Runs the program of a hook on a frame that comes by an interface of this namespace. Throws an Error for people if
   * the one in force is not of the same code, and LibbpfError.
   */
  run(hook: string, ifindex: number, frame: Uint8Array): Ran {
    const ctx = Buffer.alloc(SKB_SIZE);
    ctx.writeUInt32LE(ifindex, IFINDEX_AT);
    const data = frame.length < LEAST_FRAME ? Buffer.concat([frame, Buffer.alloc(LEAST_FRAME)]) : frame;
    const counters = this.#object.map("counters");
    const zeros = new Uint8Array(hookCountsLayout.size);
    counters.updatePerCpu(
      FIRST,
      (counters.lookupPerCpu(FIRST) ?? []).map(() => zeros),
    );
    const { retval, data: after } = this.#program(hook).testRun({ data, ctx });
    return {
      action: retval === TC_ACT_REDIRECT ? "redirect" : retval === TC_ACT_SHOT ? "drop" : "next",
      verdict: this.#verdict(hook),
      frame: after,
    };
  }

  /** Puts the copies back to what they were when the rehearsal was opened. */
  reset(): void {
    for (const [name, rows] of this.#rows) {
      if (name === KEPT) continue;
      const map = this.#object.map(name);
      map.deleteBatch(map.entries().map(([key]) => key));
      map.updateBatch(rows);
    }
  }

  close(): void {
    for (const object of this.#programs.values()) object.close();
    this.#object.close();
  }

  #program(hook: string): Program {
    const before = this.#programs.get(hook);
    if (before !== undefined) return before.program(hook);
    const object = openObject(this.#path, { name: "rehearsal" });
    try {
      object.setRodata({ config: this.#constants });
      for (const program of PROGRAMS) object.setAutoload(program, program === hook);
      for (const name of Object.keys(maps)) object.shareMap(name, this.#object.map(name));
      object.load();
      const inForce = existsSync(join(this.#pinPath, hook))
        ? openPinnedProgram(join(this.#pinPath, hook))
        : undefined;
      inForce?.close();
      if (inForce !== undefined && inForce.tag !== object.program(hook).tag) throw otherBuild(this.#pinPath);
    } catch (error) {
      object.close();
      throw error;
    }
    this.#programs.set(hook, object);
    return object.program(hook);
  }

  #copy(pinPath: string): void {
    for (const name of COPIED) {
      const rows = withPinned(pinPath, name, (map) => {
        const found: Entry[] = [];
        // What is zero in an array is zero in the copy already.
        for (const batch of map.batches())
          found.push(...(map.type === "array" ? batch.filter(([, value]) => value.some(Boolean)) : batch));
        return found;
      });
      this.#object.map(name).updateBatch(rows);
      this.#rows.set(name, rows);
    }
  }

  #verdict(hook: string): string {
    const first = HOOKS.indexOf(hook) * VERDICTS.length;
    for (const bytes of this.#object.map("counters").lookupPerCpu(FIRST) ?? []) {
      const cells = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
      for (const [index, verdict] of VERDICTS.entries())
        if (cells.readBigUInt64LE((first + index) * CELL) > 0n) return verdict;
    }
    throw new Error(`program ${hook} has counted no verdict`);
  }
}

const configCodec = codec(configLayout);

/** The bytes of `config` in the programs in force. */
function constantsOf(pinPath: string): Uint8Array {
  const program = openPinnedProgram(join(pinPath, "from_net"));
  try {
    for (const id of programInfo({ fd: program.fd }).mapIds) {
      const map = openMapById(id);
      try {
        const [entry] = map.name.endsWith(".rodata") ? map.entries() : [];
        if (entry === undefined) continue;
        const [{ offset, layout }] = rodataLayout.fields;
        if (entry[1].length < offset + layout.size) throw otherBuild(pinPath);
        return entry[1].slice(offset, offset + layout.size);
      } finally {
        map.close();
      }
    }
    throw otherBuild(pinPath);
  } finally {
    program.close();
  }
}

function otherBuild(pinPath: string): Error {
  return new Error(
    `the programs in force at ${pinPath} are of another build than this command: restart twilld, which replaces them, or use the twill beside it`,
  );
}

function withPinned<T>(pinPath: string, name: string, body: (map: BpfMap) => T): T {
  const map = openPinnedMap(join(pinPath, name));
  try {
    return body(map);
  } finally {
    map.close();
  }
}
