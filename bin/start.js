import { existsSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname } from "node:path";
import { fileURLToPath } from "node:url";
import { Script } from "node:vm";

/** The daemon in one file, and what V8 has made of it; `bundle.js` makes both. */
export const BUNDLE = fileURLToPath(new URL("../dist/bundle/twilld.cjs", import.meta.url));
export const CODE_CACHE = `${BUNDLE}.cache`;

/** Runs the daemon in this process, as Node would run the file, but without compiling what is compiled already. */
export function start() {
  const parameters = ["exports", "require", "module", "__filename", "__dirname"];
  // In its first line, so that lines are those of the file.
  const source = `(function (${parameters.join(", ")}) {${readFileSync(BUNDLE, "latin1")}\n})`;
  const cachedData = existsSync(CODE_CACHE) ? readFileSync(CODE_CACHE) : undefined;
  const script = new Script(source, { filename: BUNDLE, cachedData });
  const module = { exports: {} };
  const run = script.runInThisContext();
  run.call(module.exports, module.exports, createRequire(BUNDLE), module, BUNDLE, dirname(BUNDLE));
  return script;
}
