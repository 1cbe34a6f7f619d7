// sd_notify against real datagram sockets, bound by path and in the abstract namespace.
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, expect, it } from "vitest";
import { openLibrary } from "../../loader/ffi.ts";
import { openNotifier } from "../../src/edge/notify.ts";

const libc = openLibrary("libc.so.6");
const socket = libc.prepare("socket", "int", ["int", "int", "int"]);
const bind = libc.prepare("bind", "int", ["int", "pointer", "uint"]);
const recv = libc.prepare("recv", "ssize", ["int", "pointer", "size", "int"]);
const close = libc.prepare("close", "int", ["int"]);
const AF_UNIX = 1;
const SOCK_DGRAM = 2;
const MSG_DONTWAIT = 0x40;

const cleanups: (() => void)[] = [];
afterEach(() => {
  for (const cleanup of cleanups.splice(0).reverse()) cleanup();
});

/** A bound datagram socket, played by the service manager; sending to it is synchronous, so is reading. */
function manager(path: string): () => string | undefined {
  const fd = socket(AF_UNIX, SOCK_DGRAM, 0);
  cleanups.push(() => close(fd));
  const address = Buffer.from(`\x01\0${path}`, "latin1");
  if (bind(fd, address, address.length) !== 0) throw new Error(`cannot bind ${JSON.stringify(path)}`);
  return () => {
    const bytes = Buffer.alloc(4096);
    const length = recv(fd, bytes, bytes.length, MSG_DONTWAIT);
    return length < 0 ? undefined : bytes.toString("utf8", 0, length);
  };
}

function directory(): string {
  const made = mkdtempSync(join(tmpdir(), "twill-notify-"));
  cleanups.push(() => rmSync(made, { recursive: true }));
  return made;
}

it.each(["a path", "the abstract namespace"])("sends each state to a socket in %s", (where) => {
  const abstract = where !== "a path";
  const name = abstract ? `@twill-notify-${process.pid}` : join(directory(), "notify");
  const received = manager(abstract ? `\0${name.slice(1)}` : `${name}\0`);
  const notifier = openNotifier({ NOTIFY_SOCKET: name });
  expect(notifier.supervised).toBe(true);
  expect(notifier.ready()).toBeUndefined();
  expect(notifier.status("3 peers,\nREADY=1 é")).toBeUndefined();
  expect(notifier.watchdog()).toBeUndefined();
  expect(notifier.stopping()).toBeUndefined();
  expect(received()).toBe("READY=1");
  expect(received()).toBe("STATUS=3 peers, READY=1 é");
  expect(received()).toBe("WATCHDOG=1");
  expect(received()).toBe("STOPPING=1");
  expect(received()).toBeUndefined();
});

it("does nothing without a service manager", () => {
  const notifier = openNotifier({ WATCHDOG_USEC: "30000000" });
  expect(notifier).toMatchObject({ supervised: false, watchdogMilliseconds: undefined });
  expect([notifier.ready(), notifier.stopping(), notifier.watchdog(), notifier.status("x")]).toEqual([
    undefined,
    undefined,
    undefined,
    undefined,
  ]);
});

it("tells, and does not throw, when nobody listens or the address is none", () => {
  const gone = join(directory(), "gone");
  expect(openNotifier({ NOTIFY_SOCKET: gone }).ready()).toBe(
    `cannot notify the service manager at ${gone}: ENOENT`,
  );
  for (const bad of ["relative", "@", "/", `/${"x".repeat(120)}`, "vsock:2:1"]) {
    expect(openNotifier({ NOTIFY_SOCKET: bad }).ready()).toContain("must be a path or @name");
  }
});

it("never blocks on a manager that does not read", () => {
  const name = join(directory(), "full");
  manager(`${name}\0`);
  const notifier = openNotifier({ NOTIFY_SOCKET: name });
  let problem: string | undefined;
  for (let i = 0; i < 100_000 && problem === undefined; i++) problem = notifier.watchdog();
  expect(problem).toContain("EAGAIN");
});

it("is due at half of the watchdog's limit, if that limit is ours", () => {
  const due = (environment: Record<string, string>) =>
    openNotifier({ NOTIFY_SOCKET: "@x", ...environment }).watchdogMilliseconds;
  expect(due({ WATCHDOG_USEC: "30000000" })).toBe(15_000);
  expect(due({ WATCHDOG_USEC: "30000000", WATCHDOG_PID: String(process.pid) })).toBe(15_000);
  expect(due({ WATCHDOG_USEC: "30000000", WATCHDOG_PID: "1" })).toBeUndefined();
  for (const bad of ["", "0", "-5", "soon"]) expect(due({ WATCHDOG_USEC: bad })).toBeUndefined();
});
