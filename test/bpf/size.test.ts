/**
 * How many instructions the programs have, as the kernel runs them, against what `sizes.json` says: growth is seen, and
 * agreed to by changing that file. `TWILL_WRITE_SIZES=1 test/run test/bpf/size.test.ts` writes it.
 */
import { readFileSync, writeFileSync } from "node:fs";
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

test.each(Object.entries(variants))(
  "the programs of %s have the size that was agreed to",
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

afterAll(() => {
  if (process.env.TWILL_WRITE_SIZES !== undefined)
    writeFileSync(FILE, `${JSON.stringify(found, undefined, 2)}\n`);
});
