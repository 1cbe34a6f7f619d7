// The conformance of loader/ffi.ts: what every backend behind it must do, tried on libc alone.
import { execFileSync, spawnSync } from "node:child_process";
import {
  closeSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readFileSync,
  readSync,
  rmSync,
  symlinkSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import {
  addressOf,
  callback,
  cString,
  errno,
  openLibrary,
  readCString,
  readMemory,
  watchFd,
  writeMemory,
} from "../../loader/ffi.ts";

const ENOENT = 2;
const EBADF = 9;
const libc = openLibrary("libc.so.6");

describe("libraries", () => {
  it("names the library and the symbol that is missing", () => {
    expect(libc.has("getpid")).toBe(true);
    expect(libc.has("no_such_symbol")).toBe(false);
    expect(() => libc.prepare("no_such_symbol", "int", [])).toThrow(
      /libc\.so\.6 has no symbol no_such_symbol/,
    );
    expect(() => openLibrary("libdoesnotexist.so.9")).toThrow(/libdoesnotexist/);
  });

  it("opens the process itself", () => {
    expect(readCString(openLibrary(null).prepare("uv_version_string", "pointer", [])())).toBe(
      process.versions.uv,
    );
  });
});

describe("prepared calls", () => {
  it("passes and returns 32-bit integers with their sign", () => {
    const abs = libc.prepare("abs", "int", ["int"]);
    expect(abs(-7)).toBe(7);
    expect(libc.prepare("getpid", "int", [])()).toBe(process.pid);
    expect(libc.prepare("toupper", "int", ["int"])(-1)).toBe(-1);
    const htonl = libc.prepare("htonl", "uint", ["uint"]);
    expect(htonl(0x010203ff)).toBe(0xff030201);
  });

  it("passes and returns 64-bit integers exactly, from numbers and bigints", () => {
    const signed = libc.prepare("llabs", "i64", ["i64"]);
    expect(signed(-5)).toBe(5n);
    expect(signed(-0x1234_5678_9abc_def1n)).toBe(0x1234_5678_9abc_def1n);
    const parse = libc.prepare("strtoull", "u64", ["string", "pointer", "int"]);
    expect(parse("18446744073709551615", null, 10)).toBe(0xffff_ffff_ffff_ffffn);
    const parseSigned = libc.prepare("strtoll", "ssize", ["string", "pointer", "int"]);
    expect(parseSigned("-9007199254740991", null, 10)).toBe(-9007199254740991);
    expect(parseSigned("-1", null, 10)).toBe(-1);
    expect(() => signed(2 ** 60)).toThrow(/bigint/);
  });

  it("reads and writes memory it passes, also through structs with pointers in them", () => {
    const text = cString("native");
    const compare = libc.prepare("memcmp", "int", ["pointer", "pointer", "size"]);
    expect(compare(text, Buffer.from("native\0"), 7)).toBe(0);
    expect(compare(text, addressOf(text), 7)).toBe(0);
    // writev takes an array of struct iovec { void *base; size_t length }.
    const directory = mkdtempSync(join(tmpdir(), "ffi-"));
    const file = join(directory, "out");
    const fd = openSync(file, "w");
    try {
      const parts = [Buffer.from("scatter "), Buffer.from("gather")];
      const vector = Buffer.alloc(32);
      parts.forEach((part, i) => {
        vector.writeBigUInt64LE(BigInt(addressOf(part)), i * 16);
        vector.writeBigUInt64LE(BigInt(part.length), i * 16 + 8);
      });
      expect(libc.prepare("writev", "ssize", ["int", "pointer", "int"])(fd, vector, 2)).toBe(14);
      expect(readFileSync(file, "utf8")).toBe("scatter gather");
    } finally {
      closeSync(fd);
      rmSync(directory, { recursive: true });
    }
  });

  it("copies to and from native memory", () => {
    const address = libc.prepare("malloc", "pointer", ["size"])(64);
    writeMemory(address, cString("żółw"));
    expect(readCString(address)).toBe("żółw");
    expect([...readMemory(address + 1, 2)]).toEqual([0xbc, 0xc3]);
    libc.prepare("free", "void", ["pointer"])(address);
    expect(readCString(0)).toBeNull();
    expect(addressOf(new Uint8Array(0))).toBe(0);
  });

  it("refuses what C would misread", () => {
    const abs = libc.prepare("abs", "int", ["int"]) as (...args: unknown[]) => number;
    expect(() => abs()).toThrow(/takes 1 arguments, not 0/);
    expect(() => abs("7")).toThrow(/argument 1 must be int, not string/);
    expect(() => cString("a\0b")).toThrow(/NUL/);
  });

  it("reports errno as the call left it, whatever ran since", () => {
    const open = libc.prepare("open", "int", ["string", "int"]);
    const close = libc.prepare("close", "int", ["int"]);
    for (let i = 0; i < 500; i++) {
      expect(open("/nonexistent/file", 0)).toBe(-1);
      Array.from({ length: 100 }, () => new Uint8Array(1000));
      expect(errno()).toBe(ENOENT);
      expect(close(-1)).toBe(-1);
      expect(errno()).toBe(EBADF);
    }
  });
});

describe("calls on a thread", () => {
  it("run beside the event loop, several at a time, each with what it was given", async () => {
    const pipe = libc.prepare("pipe", "int", ["pointer"]);
    const read = libc.prepareOnThread("read", "ssize", ["int", "pointer", "size"]);
    const ends = Buffer.alloc(8);
    expect(pipe(ends)).toBe(0);
    const [from, to] = [ends.readInt32LE(0), ends.readInt32LE(4)];
    const heard = Buffer.alloc(5);
    // It waits until the loop, which goes on, has written.
    const waiting = read(from, heard, heard.length);
    await new Promise((resolve) => setImmediate(resolve));
    writeSync(to, "hello");
    expect(await waiting).toBe(5);
    expect(heard.toString()).toBe("hello");
    for (const end of [from, to]) closeSync(end);
    const strtoul = libc.prepareOnThread("strtoul", "u64", ["string", "pointer", "int"]);
    const texts = Array.from({ length: 20 }, (_, i) => `${2n ** 60n + BigInt(i)}`);
    expect((await Promise.all(texts.map((text) => strtoul(text, null, 10)))).map(String)).toEqual(texts);
  });

  it("keep what they were given until they are done", async () => {
    const gc = (globalThis as { gc?: () => void }).gc;
    const memcpy = libc.prepareOnThread("memcpy", "pointer", ["pointer", "pointer", "size"]);
    const target = Buffer.alloc(1 << 20);
    const copies = Array.from({ length: 8 }, (_, i) => memcpy(target, Buffer.alloc(1 << 20, i + 1), 1 << 20));
    gc?.();
    await Promise.all(copies);
    expect(target.every((byte) => byte >= 1 && byte <= 8)).toBe(true);
  });

  it("refuse what a call here refuses", async () => {
    const abs = libc.prepareOnThread("abs", "int", ["int"]);
    await expect((abs as (...args: unknown[]) => Promise<unknown>)()).rejects.toThrow("takes 1 arguments");
  });
});

describe("callbacks", () => {
  const sort = libc.prepare("qsort", "void", ["pointer", "size", "size", "pointer"]);

  it("lets C call JS", () => {
    const numbers = new Uint32Array([3, 1, 2, 1000, 0]);
    const compare = callback(
      "int",
      ["pointer", "pointer"],
      (a = 0, b = 0) => readMemory(a, 4).readUInt32LE() - readMemory(b, 4).readUInt32LE(),
    );
    sort(new Uint8Array(numbers.buffer), numbers.length, 4, compare);
    expect([...numbers]).toEqual([0, 1, 2, 3, 1000]);
    compare.release();
  });

  it("throws from the call what a callback threw", () => {
    const broken = callback("int", ["pointer", "pointer"], () => {
      throw new Error("no order");
    });
    expect(() => sort(new Uint8Array(16), 4, 4, broken)).toThrow("no order");
    expect(libc.prepare("abs", "int", ["int"])(-1)).toBe(1);
    broken.release();
  });
});

describe("watchFd", () => {
  const socketpair = libc.prepare("socketpair", "int", ["int", "int", "int", "pointer"]);
  let left = -1;
  let right = -1;
  beforeAll(() => {
    const pair = Buffer.alloc(8);
    // AF_UNIX datagram sockets: a kind of descriptor Node itself refuses.
    expect(socketpair(1, 2, 0, pair)).toBe(0);
    left = pair.readInt32LE(0);
    right = pair.readInt32LE(4);
  });
  afterAll(() => {
    closeSync(left);
    closeSync(right);
  });

  it("delivers each datagram, and nothing after close", async () => {
    const seen: string[] = [];
    const buffer = Buffer.alloc(64);
    const three = new Promise<void>((resolve) => {
      const watch = watchFd(left, () => {
        seen.push(buffer.toString("utf8", 0, readSync(left, buffer)));
        if (seen.length === 3) {
          watch.close();
          watch.close();
          resolve();
        }
      });
    });
    for (const word of ["one", "two", "three", "late"]) writeSync(right, word);
    await three;
    await new Promise((resolve) => setImmediate(() => setImmediate(resolve)));
    expect(seen).toEqual(["one", "two", "three"]);
    // The descriptor can be watched again, and what came late is still there.
    await new Promise<void>((resolve) => {
      const watch = watchFd(left, () => {
        seen.push(buffer.toString("utf8", 0, readSync(left, buffer)));
        watch.close();
        resolve();
      });
    });
    expect(seen[3]).toBe("late");
  });

  it("says which descriptor cannot be watched", () => {
    expect(() => watchFd(9999, () => undefined)).toThrow(/descriptor 9999/);
  });
});

describe("a process of its own", () => {
  let directory: string;
  beforeAll(() => {
    directory = mkdtempSync(join(tmpdir(), "ffi-"));
    const options = [
      "--ignoreConfig",
      "--noCheck",
      "--skipLibCheck",
      "--rootDir",
      "loader",
      "--outDir",
      directory,
    ];
    const target = ["--target", "es2023", "--module", "nodenext", "--types", "node"];
    execFileSync("node_modules/.bin/tsc", [...options, ...target, "loader/ffi.ts"]);
    writeFileSync(join(directory, "package.json"), JSON.stringify({ type: "module" }));
    symlinkSync(join(process.cwd(), "node_modules"), join(directory, "node_modules"));
    mkdirSync(join(directory, "run"));
  });
  afterAll(() => rmSync(directory, { recursive: true }));

  const run = (body: string) => {
    const script = join(directory, "run", "main.js");
    const head = `import { openLibrary, watchFd } from "../ffi.js";
      import { readSync, writeSync } from "node:fs";
      const pair = Buffer.alloc(8);
      openLibrary("libc.so.6").prepare("socketpair", "int", ["int", "int", "int", "pointer"])(1, 2, 0, pair);
      const [left, right] = [pair.readInt32LE(0), pair.readInt32LE(4)];
    `;
    writeFileSync(script, head + body);
    const { status, signal, stdout, stderr } = spawnSync(process.execPath, [script], {
      encoding: "utf8",
      timeout: 20_000 * Number(process.env.TWILL_SLOWNESS ?? 1),
    });
    return { status, signal, stdout, stderr };
  };
  const fine = { status: 0, signal: null, stderr: "" };

  it("ends while a watch waits, if the watch is not to keep it alive", () => {
    expect(run(`watchFd(left, () => undefined, { keepAlive: false });`)).toMatchObject(fine);
  });

  it("lives for a watch until that is closed", () => {
    const body = `const watch = watchFd(left, () => {
        console.log(readSync(left, Buffer.alloc(9)));
        watch.close();
      });
      setImmediate(() => writeSync(right, "five5"));`;
    expect(run(body)).toMatchObject({ ...fine, stdout: "5\n" });
  });

  it("can exit with a watch open", () => {
    expect(run(`watchFd(left, () => undefined); process.exit(3);`)).toMatchObject({ ...fine, status: 3 });
  });

  it("ends with what a watch threw", () => {
    const guilty = ["", "process.nextTick", "queueMicrotask"];
    for (const schedule of guilty) {
      const { status, stderr } = run(`watchFd(left, () => {
        readSync(left, Buffer.alloc(9));
        ${schedule}(() => { throw new Error("from the watch"); })${schedule === "" ? "()" : ""};
      });
      writeSync(right, "x");`);
      expect(status).toBe(1);
      expect(stderr).toMatch(/from the watch/);
    }
  });

  it("has prepared calls in worker threads, and watches on the main thread only", () => {
    const body = `import { Worker } from "node:worker_threads";
      new Worker(\`import("\${new URL("../ffi.js", import.meta.url)}").then((ffi) => {
        const open = ffi.openLibrary("libc.so.6").prepare("open", "int", ["string", "int"]);
        console.log(open("/nonexistent", 0), ffi.errno());
        try { ffi.watchFd(0, () => undefined); } catch (error) { console.log(error.message); }
      })\`, { eval: true });`;
    const { stdout, ...rest } = run(body);
    expect(rest).toMatchObject(fine);
    expect(stdout).toMatch(/^-1 2\nwatchFd\(\) works on the main thread only/);
  });

  it("makes 100 000 calls in bounded memory, and mostly in C", () => {
    const body = `const compare = openLibrary("libc.so.6").prepare("memcmp", "int", ["pointer", "pointer", "size"]);
      const [a, b] = [Buffer.alloc(64), Buffer.alloc(64)];
      const calls = (count) => { for (let i = 0; i < count; i++) compare(a, b, 64); };
      calls(20_000);
      const before = process.memoryUsage().rss;
      calls(100_000);
      console.log(process.memoryUsage().rss - before);`;
    const { stdout, ...rest } = run(body);
    expect(rest).toMatchObject(fine);
    expect(Number(stdout)).toBeLessThan(32 * 1024 * 1024);
  });
});
