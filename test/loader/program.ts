/** Compiles C text for BPF, so that a test can state the program it is about beside what it expects of it. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { compile } from "../../loader/compile.ts";

/** The object of a program; the usual headers are included and nothing is left on disk. */
export function objectOf(program: string): Uint8Array {
  const dir = mkdtempSync(join(tmpdir(), "libbpf-ts-"));
  try {
    const source = join(dir, "program.bpf.c");
    writeFileSync(source, `#include <linux/bpf.h>\n#include <bpf/bpf_helpers.h>\n${program}\n`);
    return readFileSync(compile({ source, includeDirs: [], cacheDir: dir }).path);
  } finally {
    rmSync(dir, { recursive: true, force: true });
  }
}
