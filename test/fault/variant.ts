/**
 * A later version of Twill, as far as the kernel can tell: the same sources with one more counter, which changes
 * the layout of one map and every program that counts, and with wider rows of another map.
 */
import { cpSync, mkdirSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { compile, generate } from "../../loader/index.ts";
import { exec, repository } from "../lab.ts";

/** Builds it below a directory; returns the path of its twilld. */
export async function buildVariant(directory: string): Promise<string> {
  const root = join(directory, "variant");
  mkdirSync(join(root, "dist/bpf"), { recursive: true });
  const names = ["bin", "bpf", "src", "loader", "bundle.js"];
  for (const name of [...names, "package.json", "tsconfig.json", "tsconfig.build.json"])
    cpSync(join(repository, name), join(root, name), { recursive: true });
  symlinkSync(join(repository, "node_modules"), join(root, "node_modules"));
  const header = join(root, "bpf/abi.h");
  const edit = (text: string, from: RegExp, to: string): string => {
    if (!from.test(text))
      throw new Error(`bpf/abi.h has no ${from} any more: the variant needs another edit`);
    return text.replace(from, to);
  };
  let text = readFileSync(header, "utf8");
  text = edit(
    text,
    /X\(DROP_FAILED, drop_failed\)/,
    "X(DROP_FAILED, drop_failed) X(STACK_LATER, stack_later)",
  );
  text = edit(text, /(struct peer4 \{[^}]*)__u8 pad\[2\];/, "$1__u8 pad[6];");
  text = edit(text, /(struct flow \{)/, "$1 __u64 pad;");
  writeFileSync(header, text);
  const sources = { source: join(root, "bpf/twill.bpf.c"), includeDirs: [join(root, "bpf")], cacheDir: root };
  const object = readFileSync(compile(sources).path);
  writeFileSync(join(root, "dist/bpf/twill.bpf.o"), object);
  writeFileSync(join(root, "src/abi/twill.gen.ts"), generate(object, "the variant"));
  await exec([join(repository, "node_modules/.bin/tsc"), "-p", join(root, "tsconfig.build.json")], {
    timeout: 120_000,
  });
  await exec([process.execPath, "bundle.js"], { cwd: root, timeout: 120_000 });
  return join(root, "bin/twilld");
}
