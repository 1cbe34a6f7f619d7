/**
 * The floors of the house, as ARCHITECTURE.md draws them: who may import whom. And that the generated file is
 * what the object's BTF says today.
 */
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join, relative, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { expect, test } from "vitest";
import { compile } from "../loader/compile.ts";
import { generate } from "../loader/generate.ts";

const root = resolve(dirname(fileURLToPath(import.meta.url)), "..");

interface Import {
  readonly from: string;
  readonly to: string;
}

function imports(folder: string): Import[] {
  const files = readdirSync(join(root, folder), { recursive: true, encoding: "utf8" });
  return files
    .filter((file) => file.endsWith(".ts"))
    .flatMap((file) => {
      const path = join(root, folder, file);
      const text = readFileSync(path, "utf8");
      return [
        ...text.matchAll(/^(?:import|export|\}) ?(?:.* from )?"([^"\n]+)";$|\bimport\("([^"\n]+)"\)/gm),
      ].map(([, named, dynamic]) => {
        const target = named ?? dynamic ?? "";
        return {
          from: relative(root, path),
          to: target.startsWith(".") ? relative(root, join(dirname(path), target)) : target,
        };
      });
    });
}

const all = [...imports("src"), ...imports("loader")];
const of = (pattern: RegExp): Import[] => all.filter(({ from }) => pattern.test(from));
const breaking = (rows: readonly Import[], allowed: RegExp): Import[] =>
  rows.filter(({ to }) => !allowed.test(to));

test("there are imports to judge", () => {
  expect(all.length).toBeGreaterThan(50);
});

test("the core imports nothing but itself", () => {
  expect(breaking(of(/^src\/core\//), /^src\/core\//)).toEqual([]);
});

test("what is generated imports nothing", () => {
  expect(of(/^src\/abi\//)).toEqual([]);
});

test("an edge file sees the core, the loader, and its own world, but no other edge", () => {
  const allowed = /^(src\/core\/|src\/abi\/|loader\/|node:|@|[a-z])/;
  const rows = of(/^src\/edge\//).filter(({ to }) => !/^src\/edge\/netlink(-codec|-request)?\.ts$/.test(to));
  expect(rows.filter(({ to }) => to.startsWith("src/edge/"))).toEqual([]);
  expect(breaking(rows, allowed)).toEqual([]);
});

test("one edge file hides each library", () => {
  for (const library of ["etcd3", "@grpc/grpc-js", "prom-client", "pino"]) {
    const users = new Set(all.filter(({ to }) => to === library).map(({ from }) => from));
    expect([...users], library).toHaveLength(1);
  }
});

test("the agent is given its ports and imports the core alone", () => {
  expect(breaking(of(/^src\/agent(\.ts$|\/)/), /^src\/(core|agent)\//)).toEqual([]);
});

test("the loader knows nothing of Twill, and one file of it calls native code", () => {
  expect(breaking(of(/^loader\//), /^(loader\/|node:|ffi-napi|ref-napi)/)).toEqual([]);
  const callers = new Set(all.filter(({ to }) => /^(ffi|ref)-napi/.test(to)).map(({ from }) => from));
  expect([...callers]).toEqual(["loader/ffi.ts"]);
});

test("src/abi/twill.gen.ts is what the programs' BTF says", () => {
  const cacheDir = mkdtempSync(join(tmpdir(), "twill-floors-"));
  try {
    const { path } = compile({
      source: join(root, "bpf/twill.bpf.c"),
      includeDirs: [join(root, "bpf")],
      cacheDir,
    });
    const command = "node dist/loader/generate.js dist/bpf/twill.bpf.o src/abi/twill.gen.ts";
    const fresh = generate(readFileSync(path), command);
    expect(readFileSync(join(root, "src/abi/twill.gen.ts"), "utf8"), "run make gen").toBe(fresh);
  } finally {
    rmSync(cacheDir, { recursive: true, force: true });
  }
});
