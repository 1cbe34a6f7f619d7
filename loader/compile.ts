/**
 * Compiles one C file to a BPF object with clang, or finds the object in a cache. The name of an object in the cache is
 * the digest of all that could change it: the source, every header it included (system headers too), the
 * arguments, and clang's version. So nothing needs to be invalidated, and removing the cache directory is always safe,
 * also while others compile into it, since objects appear in it whole or not at all.
 *
 *   <cacheDir>/<digest of arguments>.d       clang's dependency list of the last compilation
 *   <cacheDir>/<digest>/<source name>.o      the object, named after its source, because libbpf calls its
 *                                            data maps by the name of the file: `twill.rodata`
 *
 * The list tells which files to read for the digest before clang has run. A header that starts to exist in an earlier
 * include directory than one in the list is not noticed until a listed file changes, and neither is a file that changes
 * while clang reads it.
 */
import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, renameSync, rmSync } from "node:fs";
import { basename, join, resolve } from "node:path";

export interface CompileOptions {
  /** Path of the C file. */
  readonly source: string;
  /** Searched for headers in this order, before the system's. */
  readonly includeDirs: readonly string[];
  /** `{ DEBUG: true, LIMIT: 5 }` is `-DDEBUG -DLIMIT=5`; a false one is left out. */
  readonly defines?: { readonly [name: string]: string | number | boolean };
  /** Appended to the arguments of clang. */
  readonly flags?: readonly string[];
  /** Name or path of clang; `clang` by default. */
  readonly clang?: string;
  /** Made if missing. */
  readonly cacheDir: string;
}

export interface Compiled {
  /** Absolute path of the object in the cache. */
  readonly path: string;
  /** Hexadecimal sha256 over everything the object was made from. */
  readonly digest: string;
}

/** The source does not compile, or clang can't be run. The message is one line; `output` is all that clang said. */
export class CompileError extends Error {
  override readonly name = "CompileError";
  readonly output: string;

  constructor(message: string, output: string) {
    super(message);
    this.output = output;
  }
}

/** Compiles `source` unless the cache has its object. Blocks while clang runs. Throws CompileError. */
export function compile(options: CompileOptions): Compiled {
  const clang = options.clang ?? "clang";
  const source = resolve(options.source);
  const cacheDir = resolve(options.cacheDir);
  const args = [
    ...["-O2", "-g", "-target", "bpf", "-mcpu=v2", "-Wall", "-Werror", "-fno-color-diagnostics"],
    ...options.includeDirs.map((dir) => `-I${resolve(dir)}`),
    ...multiarchDir(clang).map((dir) => `-I${dir}`),
    ...Object.entries(options.defines ?? {}).flatMap(([name, value]) => define(name, value)),
    ...(options.flags ?? []),
    ...["-c", source],
  ];
  const inputs = sha256(JSON.stringify([run(clang, ["--version"]).output, args]));
  const list = join(cacheDir, `${inputs}.d`);
  const object = `${basename(source).replace(/\.c$/, "")}.o`;

  const known = existsSync(list) ? digestOf(inputs, list) : undefined;
  if (known !== undefined) {
    const path = join(cacheDir, known, object);
    if (existsSync(path)) return { path, digest: known };
  }

  mkdirSync(cacheDir, { recursive: true });
  const work = mkdtempSync(join(cacheDir, ".compile-"));
  try {
    const made = { list: join(work, "list.d"), dir: join(work, "made") };
    mkdirSync(made.dir);
    const { status, signal, output } = run(clang, [
      ...args,
      "-MD",
      "-MF",
      made.list,
      "-o",
      join(made.dir, object),
    ]);
    if (status !== 0) throw new CompileError(firstError(output, source, signal), output);
    const digest = digestOf(inputs, made.list);
    if (digest === undefined)
      throw new CompileError(`${source}: a file it includes was removed meanwhile`, output);
    settle(made.dir, join(cacheDir, digest));
    renameSync(made.list, list);
    return { path: join(cacheDir, digest, object), digest };
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
}

/** Moves a directory to its final name; if somebody else made the same meanwhile, theirs is as good. */
function settle(from: string, to: string): void {
  try {
    renameSync(from, to);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code !== "ENOTEMPTY" && code !== "EEXIST") throw error;
  }
}

/** Digest of the inputs and of each file in clang's dependency list; undefined if one of the files is gone. */
function digestOf(inputs: string, list: string): string | undefined {
  const hash = createHash("sha256").update(inputs);
  for (const path of dependencies(readFileSync(list, "utf8")).sort()) {
    try {
      hash.update(`\n${path} ${sha256(readFileSync(path))}`);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
      throw error;
    }
  }
  return hash.digest("hex");
}

/** Paths of a make rule as clang writes it: `object: source header \` with backslashes before spaces and hashes. */
function dependencies(rule: string): string[] {
  const right = rule.slice(rule.search(/:\s/) + 1).replaceAll("\\\n", " ");
  const words = right.match(/(?:\\[ #]|\S)+/g) ?? [];
  return words.map((word) => word.replace(/\\([ #])/g, "$1").replaceAll("$$", "$"));
}

function define(name: string, value: string | number | boolean): string[] {
  if (value === false) return [];
  return [value === true ? `-D${name}` : `-D${name}=${value}`];
}

/**
 * Debian keeps asm/types.h in a directory by processor, which clang does not search when the target is bpf. Empty
 * where there is no such directory, since there the headers are in /usr/include.
 */
function multiarchDir(clang: string): string[] {
  const asked = run(clang, ["-print-multiarch"]);
  const machine = { x64: "x86_64", arm64: "aarch64" }[process.arch as string] ?? process.arch;
  const name =
    asked.status === 0 && asked.output.trim() !== "" ? asked.output.trim() : `${machine}-linux-gnu`;
  const dir = join("/usr/include", name);
  return existsSync(dir) ? [dir] : [];
}

interface Run {
  readonly status: number | null;
  /** Of the signal that ended clang; null if it ended by itself. */
  readonly signal: string | null;
  /** Both streams. */
  readonly output: string;
}

function run(clang: string, args: readonly string[]): Run {
  const { error, status, signal, stdout, stderr } = spawnSync(clang, args, {
    encoding: "utf8",
    maxBuffer: 64 << 20,
  });
  if (error !== undefined) {
    const missing = (error as NodeJS.ErrnoException).code === "ENOENT";
    const what = missing ? `${clang} is not installed` : `${clang} could not be run (${error.message})`;
    throw new CompileError(`${what}; install it: apt-get install clang libbpf-dev`, "");
  }
  return { status, signal, output: `${stdout}${stderr}` };
}

/** Headers of packages that a machine with clang may still lack. */
const PACKAGES: readonly (readonly [header: RegExp, name: string])[] = [
  [/'bpf\/.*' file not found/, "libbpf-dev"],
  [/'(linux|asm)\/.*' file not found/, "linux-libc-dev"],
];

/** `file:line: message` of the first error; the first line of the output if clang named no place. */
function firstError(output: string, source: string, signal: string | null): string {
  const located = /^(.+?):(\d+):\d+: (?:fatal )?error: (.*)$/m.exec(output);
  if (located !== null) {
    const [, file, line, message = ""] = located;
    const missing = PACKAGES.find(([header]) => header.test(message))?.[1];
    return `${file}:${line}: ${message}${missing === undefined ? "" : `; install it: apt-get install ${missing}`}`;
  }
  if (signal !== null) return `${source}: clang was killed by ${signal}`;
  const unlocated = /^.*\berror: (.*)$/m.exec(output)?.[1] ?? output.trim().split("\n")[0];
  return `${source}: ${unlocated || "clang failed and said nothing"}`;
}

function sha256(bytes: string | Uint8Array): string {
  return createHash("sha256").update(bytes).digest("hex");
}
