import {
  chmodSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  unlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { readBtf } from "../../loader/btf.ts";
import { CompileError, type CompileOptions, compile } from "../../loader/compile.ts";

let dir: string;
const put = (name: string, text: string): string => {
  const path = join(dir, name);
  writeFileSync(path, text);
  return path;
};
/** A clang that notes each compilation in a file before it does its work. */
const counting = (): { readonly clang: string; readonly runs: () => number } => {
  const log = join(dir, "runs");
  const clang = put(
    "counting-clang",
    `#!/bin/sh\ncase "$*" in *" -c "*) echo run >>"${log}" ;; esac\nexec clang "$@"\n`,
  );
  chmodSync(clang, 0o755);
  return { clang, runs: () => (existsSync(log) ? readFileSync(log, "utf8").trim().split("\n").length : 0) };
};
const failure = (options: CompileOptions): CompileError => {
  try {
    compile(options);
  } catch (error) {
    if (error instanceof CompileError) return error;
    throw error;
  }
  throw new Error("it compiled");
};

beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), "libbpf-ts compile #1-"));
  mkdirSync(join(dir, "include"));
  put("include/inner.h", "#define LENGTH 4\n");
  put("include/outer file.h", '#include "inner.h"\nstruct it { unsigned char bytes[LENGTH]; };\n');
  put(
    "program.bpf.c",
    '#include <linux/bpf.h>\n#include "outer file.h"\nconst volatile struct it it = {};\n',
  );
});
afterEach(() => rmSync(dir, { recursive: true, force: true }));

const options = (more: Partial<CompileOptions> = {}): CompileOptions => ({
  source: join(dir, "program.bpf.c"),
  includeDirs: [join(dir, "include")],
  cacheDir: join(dir, "cache"),
  ...more,
});
const length = (path: string): number | undefined => readBtf(readFileSync(path)).struct("it")?.size;

describe("the cache", () => {
  test("an object is compiled once, and is named after its source", () => {
    const { clang, runs } = counting();
    const first = compile(options({ clang }));
    expect(basename(first.path)).toBe("program.bpf.o");
    expect(first.digest).toMatch(/^[0-9a-f]{64}$/);
    expect(length(first.path)).toBe(4);
    const { mtimeNs } = statSync(first.path, { bigint: true });
    expect(compile(options({ clang }))).toEqual(first);
    expect(statSync(first.path, { bigint: true }).mtimeNs).toBe(mtimeNs);
    expect(runs()).toBe(1);
  });

  test("nothing but lists and objects is left in it", () => {
    const { digest } = compile(options());
    expect(readdirSync(join(dir, "cache")).filter((name) => !name.endsWith(".d"))).toEqual([digest]);
    put("program.bpf.c", "broken");
    failure(options());
    expect(readdirSync(join(dir, "cache")).filter((name) => !name.endsWith(".d"))).toEqual([digest]);
  });

  test("changing an included header misses; changing it back hits", () => {
    const { clang, runs } = counting();
    const first = compile(options({ clang }));
    put("include/inner.h", "#define LENGTH 8\n");
    const second = compile(options({ clang }));
    expect([length(first.path), length(second.path), runs()]).toEqual([4, 8, 2]);
    put("include/inner.h", "#define LENGTH 4\n");
    expect(compile(options({ clang }))).toEqual(first);
    expect(runs()).toBe(2);
  });

  test("writing the same text again hits", () => {
    const { clang, runs } = counting();
    const first = compile(options({ clang }));
    put("include/inner.h", "#define LENGTH 4\n");
    expect(compile(options({ clang }))).toEqual(first);
    expect(runs()).toBe(1);
  });

  test.each<[string, Partial<CompileOptions>]>([
    ["a definition", { defines: { OTHER: 1 } }],
    ["a flag", { flags: ["-DOTHER"] }],
  ])("%s misses", (_, more) => {
    const { clang, runs } = counting();
    const first = compile(options({ clang }));
    expect(compile(options({ clang, ...more })).digest).not.toBe(first.digest);
    expect(runs()).toBe(2);
  });

  test("another version of clang misses", () => {
    const first = compile(options());
    const clang = put("clang-next", '#!/bin/sh\n[ "$1" = --version ] && echo next\nexec clang "$@"\n');
    chmodSync(clang, 0o755);
    expect(compile(options({ clang })).digest).not.toBe(first.digest);
  });

  test("a header that is gone is clang's error, not a hit", () => {
    compile(options());
    unlinkSync(join(dir, "include/inner.h"));
    expect(failure(options()).message).toMatch(/outer file\.h:1: 'inner\.h' file not found$/);
  });

  test("an object that somebody removed is compiled again", () => {
    const first = compile(options());
    rmSync(join(dir, "cache", first.digest), { recursive: true });
    expect(compile(options())).toEqual(first);
    expect(length(first.path)).toBe(4);
  });

  test("whoever finds the same object there already, made by another meanwhile, keeps that one", () => {
    const { clang, runs } = counting();
    const first = compile(options({ clang }));
    const { ino } = statSync(first.path);
    for (const name of readdirSync(join(dir, "cache")))
      if (name.endsWith(".d")) unlinkSync(join(dir, "cache", name));
    expect(compile(options({ clang }))).toEqual(first);
    expect([runs(), statSync(first.path).ino]).toEqual([2, ino]);
  });

  test("directories with spaces and hashes in their names are no obstacle", () => {
    expect(dir).toMatch(/ .*#/);
    const first = compile(options());
    put("include/outer file.h", "struct it { unsigned char bytes[12]; };\n");
    expect(length(compile(options()).path)).toBe(12);
    expect(length(first.path)).toBe(4);
  });
});

describe("definitions", () => {
  test("true defines, false does not, anything else is the value", () => {
    put(
      "program.bpf.c",
      `#ifndef ON
      #error ON
      #endif
      #ifdef OFF
      #error OFF
      #endif
      struct it { unsigned char a[N]; unsigned char b[sizeof(TEXT)]; };
      const volatile struct it it = {};`,
    );
    expect(length(compile(options({ defines: { ON: true, OFF: false, N: 5, TEXT: '"a b"' } })).path)).toBe(9);
  });
});

describe("failure", () => {
  test("the message is the first error with its place, the output is everything", () => {
    put("program.bpf.c", "int one(void) { return 1 }\nint two(void) { return unknown; }\n");
    const error = failure(options());
    expect(error).toBeInstanceOf(CompileError);
    expect(error.message).toBe(`${join(dir, "program.bpf.c")}:1: expected ';' after return statement`);
    expect(error.output).toContain("use of undeclared identifier 'unknown'");
    expect(error.output).toContain("2 errors generated");
  });

  test("a warning is an error", () => {
    put("program.bpf.c", "int one(void) { int unused; return 1; }\n");
    expect(failure(options()).message).toMatch(/program\.bpf\.c:1: unused variable 'unused' \[-Werror/);
  });

  test("what the back end can't do is reported too", () => {
    put(
      "program.bpf.c",
      "int f(int a, int b, int c, int d, int e, int f, int g);\nint h(void) { return f(1,2,3,4,5,6,7); }\n",
    );
    expect(failure(options()).message).toMatch(/program\.bpf\.c(:2)?: .*too many args/);
  });

  test("a source that does not exist", () => {
    const error = failure(options({ source: join(dir, "absent.c") }));
    expect(error.message).toMatch(/absent\.c: no such file or directory/);
  });

  test("a missing header of a package names the package", () => {
    put("program.bpf.c", "#include <bpf/no_such_header.h>\n");
    expect(failure(options()).message).toMatch(
      /:1: 'bpf\/no_such_header\.h' file not found; install it: apt-get install libbpf-dev$/,
    );
  });

  test("a missing clang says what to install", () => {
    const error = failure(options({ clang: join(dir, "no-such-clang") }));
    expect(error.message).toMatch(
      /no-such-clang is not installed; install it: apt-get install clang libbpf-dev$/,
    );
    expect(existsSync(join(dir, "cache"))).toBe(false);
  });

  test("a clang that is killed half-way leaves nothing behind", () => {
    const clang = put(
      "dying-clang",
      '#!/bin/sh\ncase "$*" in *" -c "*) kill -9 $$ ;; esac\nexec clang "$@"\n',
    );
    chmodSync(clang, 0o755);
    expect(failure(options({ clang })).message).toMatch(/program\.bpf\.c: clang was killed by SIGKILL$/);
    expect(readdirSync(join(dir, "cache"))).toEqual([]);
  });
});
