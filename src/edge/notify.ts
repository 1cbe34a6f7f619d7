/**
 * systemd's notification protocol (sd_notify(3)): `KEY=value` lines in one datagram to the AF_UNIX socket that
 * the manager names in NOTIFY_SOCKET. Node has no UNIX datagram sockets, so they come from libc.
 *
 * Not being supervised is normal, and a manager that does not listen must never stop the daemon: without
 * NOTIFY_SOCKET nothing happens, and a failed send is told to the caller, not thrown.
 */
import { constants } from "node:os";
import { errno, openLibrary } from "../../loader/ffi.ts";

/** Tells the service manager how we are. Each call returns undefined, or why the message did not get there. */
export interface Notifier {
  /** Whether a manager asked to be notified. */
  readonly supervised: boolean;
  /** Half of WATCHDOG_USEC, the interval at which `watchdog` is due; undefined if no watchdog watches us. */
  readonly watchdogMilliseconds: number | undefined;
  /** Start-up is done. */
  ready(): string | undefined;
  stopping(): string | undefined;
  /** We are alive; due within WATCHDOG_USEC. */
  watchdog(): string | undefined;
  /** One line for `systemctl status`. */
  status(text: string): string | undefined;
}

const AF_UNIX = 1;
const SOCK_DGRAM_CLOEXEC = 2 | 0o2000000;
const MSG_NOSIGNAL = 0x4000;
const MSG_DONTWAIT = 0x40;
/** sizeof(sockaddr_un.sun_path). */
const PATH_BYTES = 108;

/** `sockaddr_un` of a NOTIFY_SOCKET value: a path, or `@name` in the abstract namespace. */
function socketAddress(name: string): Buffer | undefined {
  const path = Buffer.from(name, "utf8");
  if (!/^[/@]./.test(name) || path.includes(0) || path.length >= PATH_BYTES) return undefined;
  // An abstract name starts with a NUL and ends with the address; a path ends with one.
  const abstract = name.startsWith("@");
  if (abstract) path[0] = 0;
  const address = Buffer.alloc(2 + path.length + (abstract ? 0 : 1));
  address.writeUInt16LE(AF_UNIX);
  path.copy(address, 2);
  return address;
}

/** Reads NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID; libc is touched only if there is a socket. */
export function openNotifier(
  environment: Readonly<Record<string, string | undefined>> = process.env,
): Notifier {
  const name = environment.NOTIFY_SOCKET ?? "";
  const send = name === "" ? () => undefined : sender(name);
  return {
    supervised: name !== "",
    watchdogMilliseconds: name === "" ? undefined : watchdogInterval(environment),
    ready: () => send("READY=1"),
    stopping: () => send("STOPPING=1"),
    watchdog: () => send("WATCHDOG=1"),
    // A line break would begin another assignment.
    status: (text) => send(`STATUS=${text.replace(/[\r\n\0]+/g, " ")}`),
  };
}

function watchdogInterval(environment: Readonly<Record<string, string | undefined>>): number | undefined {
  const { WATCHDOG_USEC: limit = "", WATCHDOG_PID: pid } = environment;
  // The variables are inherited: the watchdog may be for the process that started us.
  if (pid !== undefined && pid !== String(process.pid)) return undefined;
  return /^[1-9]\d{0,14}$/.test(limit) ? Number(limit) / 2000 : undefined;
}

function sender(name: string): (state: string) => string | undefined {
  const address = socketAddress(name);
  if (!address) {
    return () => `NOTIFY_SOCKET is "${name}", which is no socket address: it must be a path or @name`;
  }
  const libc = openLibrary("libc.so.6");
  const socket = libc.prepare("socket", "int", ["int", "int", "int"]);
  const close = libc.prepare("close", "int", ["int"]);
  const sendto = libc.prepare("sendto", "ssize", ["int", "pointer", "size", "int", "pointer", "uint"]);
  const failure = (): string => {
    const number = errno();
    const [code = `errno ${number}`] =
      Object.entries(constants.errno).find(([, value]) => value === number) ?? [];
    return `cannot notify the service manager at ${name}: ${code}`;
  };
  return (state) => {
    const message = Buffer.from(state, "utf8");
    // A socket per message: they are rare, and none is held when the manager makes its socket anew.
    const fd = socket(AF_UNIX, SOCK_DGRAM_CLOEXEC, 0);
    if (fd < 0) return failure();
    const sent = sendto(fd, message, message.length, MSG_NOSIGNAL | MSG_DONTWAIT, address, address.length);
    const problem = sent === message.length ? undefined : failure();
    close(fd);
    return problem;
  };
}
