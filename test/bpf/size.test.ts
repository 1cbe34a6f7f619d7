/**
 * How much stack the programs use, and how many instructions they have, as the kernel runs them (Linux 6.8 on), against
 * what `sizes.json` says: growth is seen, and agreed to by changing that file.
 * `TWILL_WRITE_SIZES=1 test/run test/bpf/size.test.ts` writes it.
 */
import { readFileSync, writeFileSync } from "node:fs";
import { release } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { programInfo } from "../../loader/program.ts";
import type { Config } from "../../src/abi/twill.gen.ts";
import { HOOKS, Node } from "./programs.ts";

/** How much a program may grow unsaid. */
const GROWTH = 1.1;
const FILE = join(import.meta.dirname, "sizes.json");

const variants: Record<string, Partial<Config>> = {
  vxlan: {},
  "vxlan, masquerade": { masquerade: 1 },
  "vxlan, through the tunnel alone": { direct: 0 },
  "host-gw": { tunnel: "TUNNEL_NONE", encapsulate: 0, decapsulate: 0, overlay_ifindex: 0 },
  ipip: { tunnel: "TUNNEL_IPIP" },
  udp: { tunnel: "TUNNEL_UDP" },
};

type Sizes = Record<string, Record<string, number>>;
const agreed = JSON.parse(readFileSync(FILE, "utf8")) as Sizes;
const found: Sizes = {};

/** Kernels before Linux 6.8 keep functions that nobody calls, which the figures are without. */
const [major = 0, minor = 0] = release().split(".").map(Number);
const isOlder = major < 6 || (major === 6 && minor < 8);

test.skipIf(isOlder).each(Object.entries(variants))(
  "the programs of %s have the size that was agreed to (where the kernel drops what nobody calls: Linux 6.8 on)",
  (name, changes) => {
    const node = Node.load(changes, "shipped");
    try {
      const sizes = Object.fromEntries(
        HOOKS.map((hook) => [hook, programInfo(node.object.program(hook)).instructions]),
      );
      found[name] = sizes;
      if (process.env.TWILL_WRITE_SIZES !== undefined) return;
      const grown = HOOKS.filter((hook) => !((sizes[hook] ?? 0) <= (agreed[name]?.[hook] ?? 0) * GROWTH));
      expect(
        grown.map((hook) => `${hook} has ${sizes[hook]} instructions, agreed are ${agreed[name]?.[hook]}`),
        "if it has to be, TWILL_WRITE_SIZES=1 test/run test/bpf/size.test.ts writes sizes.json",
      ).toEqual([]);
    } finally {
      node.close();
    }
  },
);

/** What kernels before Linux 6.8 count for each function: its frame, rounded up to this. */
const FRAME = 32;
const STACK = 512;

/** The deepest stack below a function of a program, and by which functions, named by their first instructions. */
function deepest(code: Buffer, start: number): { bytes: number; path: number[] } {
  const [CALL, PSEUDO_CALL, EXIT, JUMP] = [0x85, 1, 0x95, 0x05];
  const [ADD, LOADS_AND_STORES] = [0x07, new Set([1, 2, 3])];
  let frame = 1;
  let below = { bytes: 0, path: [] as number[] };
  // A function ends where the next one starts, which some call names, or with the program.
  const starts = [0];
  for (let at = 0; at < code.length; at += 8) {
    if (code[at] === CALL && code.readUInt8(at + 1) >> 4 === PSEUDO_CALL)
      starts.push(at / 8 + 1 + code.readInt32LE(at + 4));
  }
  const end = Math.min(code.length / 8, ...starts.filter((other) => other > start));
  expect([EXIT, JUMP]).toContain(code[(end - 1) * 8]);
  for (let index = start; index < end; index++) {
    const at = index * 8;
    const opcode = code.readUInt8(at);
    const registers = code.readUInt8(at + 1);
    const kind = opcode & 7;
    // A load has the frame pointer as its source, a store as its destination.
    const base = kind === 1 ? registers >> 4 : registers & 15;
    if (LOADS_AND_STORES.has(kind) && base === 10) frame = Math.max(frame, -code.readInt16LE(at + 2));
    // An address on the stack: the frame pointer's copy, and then what is added to it.
    const copied = index > start && code[at - 8] === 0xbf && code.readUInt8(at - 7) >> 4 === 10;
    if (opcode === ADD && copied) frame = Math.max(frame, -code.readInt32LE(at + 4));
    if (opcode === CALL && registers >> 4 === PSEUDO_CALL) {
      const called = deepest(code, index + 1 + code.readInt32LE(at + 4));
      if (called.bytes > below.bytes) below = called;
    }
  }
  const bytes = below.bytes + Math.ceil(frame / FRAME) * FRAME;
  return { bytes, path: [start, ...below.path] };
}

test.each(Object.entries(variants))(
  "the programs of %s fit the stack as older kernels count it",
  (_, changes) => {
    const node = Node.load(changes, "shipped");
    try {
      const depths = HOOKS.map((hook) => ({ hook, ...deepest(node.object.instructions(hook), 0) }));
      for (const depth of depths) expect(depth.bytes, JSON.stringify(depth)).toBeLessThanOrEqual(STACK);
      // Each has at least the packet's header there.
      for (const depth of depths) expect(depth.bytes, JSON.stringify(depth)).toBeGreaterThan(FRAME);
    } finally {
      node.close();
    }
  },
);

afterAll(() => {
  if (process.env.TWILL_WRITE_SIZES !== undefined)
    writeFileSync(FILE, `${JSON.stringify(found, undefined, 2)}\n`);
});
