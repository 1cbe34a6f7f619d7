// Sysctls inside a network namespace of our own, capabilities, and files that must never be seen half written.
import { execFileSync, spawnSync } from "node:child_process";
import {
  chmodSync,
  closeSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { openLibrary } from "../../loader/ffi.ts";
import {
  defaultTtl,
  localPortRange,
  readCapabilities,
  readSysctl,
  touchFile,
  writeFileAtomically,
  writeSysctl,
} from "../../src/edge/host.ts";

const CLONE_NEWNET = 0x40000000;
const setns = openLibrary("libc.so.6").prepare("setns", "int", ["int", "int"]);
const namespace = `twhost-${process.pid}`;
const home = openSync("/proc/thread-self/ns/net", "r");
const directory = mkdtempSync(join(tmpdir(), "twill-host-"));

beforeAll(() => {
  execFileSync("ip", ["netns", "add", namespace]);
  const fd = openSync(`/run/netns/${namespace}`, "r");
  const entered = setns(fd, CLONE_NEWNET);
  closeSync(fd);
  if (entered !== 0) throw new Error(`cannot enter ${namespace}`);
  execFileSync("ip", ["link", "add", "dot.5", "type", "bridge"]);
});

afterAll(() => {
  setns(home, CLONE_NEWNET);
  closeSync(home);
  spawnSync("ip", ["netns", "delete", namespace]);
  rmSync(directory, { recursive: true });
});

describe("sysctls", () => {
  it("are read and written, for interfaces with dots too, and tell the old value", () => {
    const name = ["ipv4", "conf", "dot.5", "rp_filter"];
    writeSysctl(name, "0");
    expect(writeSysctl(name, "2")).toBe("0");
    expect(readSysctl(name)).toBe("2");
    expect(readFileSync("/proc/sys/net/ipv4/conf/dot.5/rp_filter", "utf8")).toBe("2\n");
    expect(writeSysctl(name, "2")).toBe("2");
  });

  it("that do not exist read as undefined and refuse a write with the path and the reason", () => {
    expect(readSysctl(["ipv4", "conf", "nosuch0", "rp_filter"])).toBeUndefined();
    expect(() => writeSysctl(["ipv4", "conf", "nosuch0", "rp_filter"], "1")).toThrow(
      /cannot set \/proc\/sys\/net\/ipv4\/conf\/nosuch0\/rp_filter to "1": ENOENT/,
    );
    expect(() => writeSysctl(["ipv4", "conf", "dot.5", "rp_filter"], "many")).toThrow(/EINVAL/);
  });

  it("cannot be named outside of /proc/sys/net", () => {
    for (const part of ["..", ".", "", "a/b", "/etc", "a b", "a\0"]) {
      expect(() => readSysctl(["ipv4", part, "x"]), JSON.stringify(part)).toThrow(RangeError);
      expect(() => writeSysctl(["ipv4", part, "x"], "1"), JSON.stringify(part)).toThrow(RangeError);
    }
    expect(() => readSysctl([])).toThrow(RangeError);
  });

  it("give the port range and the TTL", () => {
    writeSysctl(["ipv4", "ip_local_port_range"], "30000 40000");
    expect(localPortRange()).toEqual({ first: 30000, last: 40000 });
    writeSysctl(["ipv4", "ip_default_ttl"], "61");
    expect(defaultTtl()).toBe(61);
  });
});

describe("capabilities", () => {
  const status = (bits: bigint) => `Name:\tx\nCapPrm:\t0\nCapEff:\t${bits.toString(16).padStart(16, "0")}\n`;
  const [NET_ADMIN, SYS_ADMIN, PERFMON, BPF] = [1n << 12n, 1n << 21n, 1n << 38n, 1n << 39n];

  it("are told apart, and what is missing is named", () => {
    expect(readCapabilities(status(NET_ADMIN | SYS_ADMIN))).toEqual({
      netAdmin: true,
      sysAdmin: true,
      problem: undefined,
    });
    // Enough to load programs, not to find them again.
    expect(readCapabilities(status(NET_ADMIN | BPF | PERFMON)).problem).toContain("lacks CAP_SYS_ADMIN:");
    const none = readCapabilities(status(0n)).problem;
    expect(none).toContain("lacks CAP_NET_ADMIN and CAP_SYS_ADMIN");
    expect(none).not.toContain("\n");
    expect(readCapabilities(status(SYS_ADMIN)).problem).toContain("lacks CAP_NET_ADMIN:");
    expect(readCapabilities("nonsense")).toMatchObject({ netAdmin: false, sysAdmin: false });
  });

  it("of this privileged process are seen", () => {
    expect(readCapabilities()).toMatchObject({ netAdmin: true, sysAdmin: true, problem: undefined });
  });
});

describe("files put in place", () => {
  it("have mode 0644 in directories of 0755 under any umask, and leave no draft", () => {
    const path = join(directory, "run", "flannel", "subnet.env");
    const mask = process.umask(0o077);
    try {
      writeFileAtomically(path, "FLANNEL_MTU=1450\n");
      writeFileAtomically(path, "FLANNEL_MTU=1400\n");
    } finally {
      process.umask(mask);
    }
    expect(readFileSync(path, "utf8")).toBe("FLANNEL_MTU=1400\n");
    expect(statSync(path).mode & 0o7777).toBe(0o644);
    for (const made of ["run", "run/flannel"]) {
      expect(statSync(join(directory, made)).mode & 0o7777).toBe(0o755);
    }
    expect(readdirSync(join(directory, "run/flannel"))).toEqual(["subnet.env"]);
  });

  it("can be given a new age without their content, if they are there", () => {
    const path = join(directory, "aged");
    expect(touchFile(path)).toBe(false);
    writeFileAtomically(path, "x");
    utimesSync(path, new Date(0), new Date(0));
    expect(touchFile(path)).toBe(true);
    expect(statSync(path).mtimeMs).toBeGreaterThan(Date.now() - 60_000);
    expect(readFileSync(path, "utf8")).toBe("x");
  });

  it("leave directories that were there as they were", () => {
    const kept = join(directory, "kept");
    mkdirSync(kept);
    chmodSync(kept, 0o700);
    writeFileAtomically(join(kept, "a", "file"), "x");
    expect(statSync(kept).mode & 0o7777).toBe(0o700);
    expect(statSync(join(kept, "a")).mode & 0o7777).toBe(0o755);
  });

  it("replace the name, so that a reader with the old file open keeps it whole", () => {
    const path = join(directory, "whole");
    writeFileAtomically(path, "old content");
    const fd = openSync(path, "r");
    writeFileAtomically(path, "new");
    expect(readFileSync(fd, "utf8")).toBe("old content");
    closeSync(fd);
    expect(readFileSync(path, "utf8")).toBe("new");
  });

  it("are not left behind in parts when they cannot be put in place", () => {
    const path = join(directory, "taken");
    mkdirSync(join(path, "by-a-directory"), { recursive: true });
    expect(() => writeFileAtomically(path, "x")).toThrow(/cannot write .*taken: /);
    expect(readdirSync(directory).filter((name) => name.endsWith(".tmp"))).toEqual([]);
    const file = join(directory, "file");
    writeFileSync(file, "");
    expect(() => writeFileAtomically(join(file, "below"), "x")).toThrow(/cannot write .*below: /);
    expect(existsSync(join(path, "by-a-directory"))).toBe(true);
  });
});
