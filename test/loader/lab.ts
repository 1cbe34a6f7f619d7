// What the loader's tests share: C compiled on the spot, a BPF file system and a network namespace of their own.
// Everything made here is gone when the test file is done, whatever its outcome.
import { execFileSync } from "node:child_process";
import { closeSync, mkdtempSync, openSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll } from "vitest";
import { errno, openLibrary } from "../../loader/ffi.ts";
import { compile, mountBpffs } from "../../loader/index.ts";

/** A directory of this test file's own. */
export const scratch = mkdtempSync(join(tmpdir(), "loader-test-"));
const undo: Array<() => void> = [];

afterAll(() => {
  for (const step of undo.reverse()) step();
  rmSync(scratch, { recursive: true, force: true });
});

/** Compiles a C program, after the usual includes, and returns the object's path. */
export function build(name: string, body: string): string {
  const source = join(scratch, `${name}.c`);
  const head = `#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>
char _license[] SEC("license") = "Dual BSD/GPL";
`;
  writeFileSync(source, head + body);
  return compile({ source, includeDirs: [], cacheDir: join(scratch, "cache") }).path;
}

/** Mounts a BPF file system for this test file. */
export function bpffs(): string {
  const path = join(scratch, "bpf");
  mountBpffs(path);
  undo.push(() => execFileSync("umount", [path]));
  return path;
}

/** Runs a command in the namespace this thread is in, and returns what it printed. */
export function sh(command: string): string {
  return execFileSync("sh", ["-ec", command], { encoding: "utf8" });
}

/** Moves this thread into a fresh network namespace, and back when the test file is done. */
export function enterNamespace(): void {
  const name = `loader-${process.pid}`;
  const home = openSync("/proc/thread-self/ns/net", "r");
  sh(`ip netns add ${name}`);
  undo.push(() => sh(`ip netns del ${name}`));
  const there = openSync(`/run/netns/${name}`, "r");
  setns(there);
  closeSync(there);
  undo.push(() => {
    setns(home);
    closeSync(home);
  });
}

function setns(fd: number): void {
  const call = openLibrary("libc.so.6").prepare("setns", "int", ["int", "int"]);
  const CLONE_NEWNET = 0x40000000;
  if (call(fd, CLONE_NEWNET) !== 0) throw new Error(`setns failed: errno ${errno()}`);
}

/** The bytes of little-endian 32-bit words. */
export function words(...values: number[]): Uint8Array {
  return new Uint8Array(new Uint32Array(values).buffer);
}

/** An Ethernet frame with an empty IPv4 packet in it. */
export function frame(length = 64): Uint8Array {
  const bytes = Buffer.alloc(length);
  bytes.writeUInt16BE(0x0800, 12);
  bytes.writeUInt8(0x45, 14);
  return bytes;
}
