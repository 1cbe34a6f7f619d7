// The example in loader/README.md does what the README says.
import { readFileSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { inspect } from "node:util";
import { afterAll, expect, it, vi } from "vitest";
import { enterNamespace, scratch, sh } from "./lab.ts";

const home = process.cwd();
afterAll(() => process.chdir(home));

it("has an example that works", async () => {
  const readme = readFileSync("loader/README.md", "utf8");
  const block = (language: string) => {
    const code = readme.match(new RegExp(`\`\`\`${language}\\n([\\s\\S]*?)\`\`\``))?.[1];
    if (code === undefined) throw new Error(`loader/README.md has no ${language} example`);
    return code;
  };
  writeFileSync(join(scratch, "count.c"), block("c"));
  writeFileSync(join(scratch, "example.ts"), block("ts").replace("./index.ts", resolve("loader/index.ts")));
  enterNamespace();
  sh("ip link set lo up");
  process.chdir(scratch);
  const printed: string[] = [];
  const log = vi.spyOn(console, "log").mockImplementation((...args) => {
    printed.push(args.map((value) => inspect(value)).join(" "));
  });
  try {
    await import(join(scratch, "example.ts"));
  } finally {
    log.mockRestore();
  }
  const [first, second] = printed;
  expect(readme).toContain(`It prints \`${first}\` and \`${second}\`.`);
});

it("lists every function that the interface exports", async () => {
  const readme = readFileSync(join(home, "loader/README.md"), "utf8");
  const names = Object.entries(await import("../../loader/index.ts"))
    .filter(([name, value]) => typeof value === "function" && !/Error$/.test(name))
    .map(([name]) => name);
  expect(names.filter((name) => !readme.includes(`\`${name}`))).toEqual([]);
});
