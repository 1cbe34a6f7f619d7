/**
 * `node bundle.js`: dist/bundle/twilld.cjs, the daemon and the packages it uses in one file, and beside it what V8 made of
 * it when it ran. Of hundreds of files, finding, reading and compiling takes longer than all else that a start does.
 *
 * Packages with native code stay outside. etcd3 reads its .proto files when it runs, by a path from its own, and finds them
 * beside the bundle. Nothing is shortened, so that stack traces can be read; what V8 keeps is of the Node.js that this runs
 * with, and another one compiles anew.
 */
import { cpSync, mkdirSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { rolldown } from "rolldown";
import { BUNDLE, CODE_CACHE, start } from "./bin/start.js";

const bundle = await rolldown({
  input: "dist/src/twilld.js",
  platform: "node",
  external: /^(ffi-napi|ref-napi)/,
  logLevel: "warn",
});
// Comments are a fifth of the text, and it stays in memory.
const comments = { legal: true, annotation: false, jsdoc: false };
const { output } = await bundle.generate({ format: "cjs", minify: false, comments });
await bundle.close();
// A byte each, in memory as well; texts alone have others.
const ascii = output[0].code.replace(/[^\0-\x7f]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
mkdirSync(dirname(BUNDLE), { recursive: true });
writeFileSync(BUNDLE, ascii);
const etcd3 = createRequire(import.meta.url).resolve("etcd3");
cpSync(join(dirname(etcd3), "../proto"), join(dirname(BUNDLE), "../proto"), { recursive: true });

// V8 tells what it kept of another file by its length alone.
rmSync(CODE_CACHE, { force: true });
// What runs at a start is compiled then, and kept as well. The version that it prints is nothing to a build.
process.argv.splice(2, Number.POSITIVE_INFINITY, "--version");
process.stderr.write = () => true;
const script = start();
process.once("beforeExit", () => writeFileSync(CODE_CACHE, script.createCachedData()));
