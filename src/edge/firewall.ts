/**
 * The host's packet filter as it is, and word of its changes.
 *
 * nftables, and with it today's iptables, is read over nfnetlink: the chains, then the rules of those that pods'
 * packets can come to; the tens of thousands that kube-proxy keeps in its table nat are never asked for. No
 * program is needed for it, and the kernel announces each change. The older iptables announces nothing and only
 * its own tool can read it: where its tables exist, `iptables-legacy-save` runs at each check.
 *
 * Layouts are those of linux/netfilter/nf_tables.h, nfnetlink.h, xt_conntrack.h and xt_addrtype.h. Attributes are
 * in network order, register contents as they are in packets; what the kernel keeps as numbers is little-endian.
 */
import { execFile } from "node:child_process";
import { readFileSync } from "node:fs";
import { constants } from "node:os";
import { getSystemErrorName } from "node:util";
import { errno, openLibrary, type Watch, watchFd } from "../../loader/ffi.ts";
import {
  type Chain,
  type Effect,
  effectOf,
  type Firewall,
  type FirewallHook,
  isIrrelevant,
  isOnTheWay,
  parseIptablesSave,
  type Rule,
} from "../core/firewall.ts";
import { maskOf } from "../core/ipv4.ts";

export interface FirewallOptions {
  /** Milliseconds between checks of what the kernel does not announce. */
  readonly checkMs: number;
  /** Told of the rules whenever they may have changed, and once before `openFirewall` resolves. */
  onRules(firewall: Firewall): void;
}

/** A watch on the rules of the network namespace it was opened in. */
export interface FirewallWatch {
  close(): void;
}

const AF_NETLINK = 16;
const SOCK_RAW_CLOEXEC = 3 | 0o2000000;
const NETLINK_NETFILTER = 12;
const SOL_SOCKET = 1;
const SO_RCVBUF = 8;
const SO_RCVTIMEO = 20;
const SO_RCVBUFFORCE = 33;
const SOL_NETLINK = 270;
const NETLINK_ADD_MEMBERSHIP = 1;
const MSG_DONTWAIT = 0x40;
const NFNLGRP_NFTABLES = 7;
const NLM_F_REQUEST = 1;
const NLM_F_DUMP = 0x300;
const NLM_F_DUMP_INTR = 0x10;
const NLMSG_ERROR = 2;
const NLMSG_DONE = 3;
const NFNL_SUBSYS_NFTABLES = 10;
const GET = { TABLE: 1, CHAIN: 4, RULE: 7, GENERATION: 16 } as const;

const { EAGAIN, EINTR, EINVAL, EOPNOTSUPP, EPROTONOSUPPORT } = constants.errno;
const RECEIVE_BYTES = 128 * 1024;
/** A burst of changes only has to be noticed; what does not fit is noticed too. */
const EVENT_BUFFER = 1024 * 1024;
const READ_ATTEMPTS = 10;
/** After a reading there is a pause of so many times its own length, so that busy rules do not keep us busy. */
const PAUSE_FACTOR = 8;
const SAVE_TIMEOUT_MS = 10_000;
const SAVE_BYTES = 64 * 1024 * 1024;
const LEGACY_NAMES = "/proc/thread-self/net/ip_tables_names";
const LEGACY_TOOLS = ["iptables-legacy-save", "iptables-save"];

const libc = openLibrary("libc.so.6");
const call = {
  socket: libc.prepare("socket", "int", ["int", "int", "int"]),
  setsockopt: libc.prepare("setsockopt", "int", ["int", "int", "int", "pointer", "uint"]),
  bind: libc.prepare("bind", "int", ["int", "pointer", "uint"]),
  send: libc.prepare("send", "ssize", ["int", "pointer", "size", "int"]),
  recv: libc.prepare("recv", "ssize", ["int", "pointer", "size", "int"]),
  close: libc.prepare("close", "int", ["int"]),
};

/** The kernel refused. */
class Refusal extends Error {
  readonly errno: number;

  constructor(operation: string, number: number) {
    super(`cannot ${operation}: ${getSystemErrorName(-number)}`);
    this.errno = number;
  }
}

const UNSTEADY = "they changed again and again while they were read";

/** The rules changed between two parts of an answer. */
class Interrupted extends Error {}

/**
 * Reads the rules and goes on watching them. What can't be read is in `Firewall.unreadable`, as a sentence for
 * people; the promise rejects only if the kernel refuses the very sockets.
 */
export async function openFirewall(options: FirewallOptions): Promise<FirewallWatch> {
  const watch = new Watcher(options);
  try {
    await watch.start();
  } catch (error) {
    watch.close();
    throw error;
  }
  return watch;
}

/** A chain, whatever its table is for. */
export interface ChainName {
  /** With its family: `ip nat`, `ip nat (legacy)`. */
  readonly table: string;
  readonly name: string;
  /** A base chain of the same table has a rule that leads to it. */
  readonly isUsed: boolean;
}

/** The rules at one time, with those for packets to the node itself, and the names of all there is. */
export interface FirewallReading {
  readonly rules: Firewall;
  /** nftables' tables, with their family: `ip flannel-ipv4`. */
  readonly tables: readonly string[];
  /** Chains whose name begins with the prefix that was asked for. */
  readonly named: readonly ChainName[];
}

/** Reads the rules of the calling thread's network namespace once, and finds the chains of a name's beginning. */
export async function readFirewall(prefix: string): Promise<FirewallReading> {
  const chains: Chain[] = [];
  const unreadable: string[] = [];
  const tables: string[] = [];
  const named: ChainName[] = [];
  const socket = openIfThere();
  try {
    if (socket !== undefined && generationOf(socket) !== undefined) {
      chains.push(...readConsistently(socket, isOnTheWayOrIn)[0]);
      for (const { family, data } of socket.ask(GET.TABLE, NLM_F_DUMP))
        tables.push(`${FAMILIES[family] ?? `family${family}`} ${textOf(attributesOf(data).get(1))}`);
      named.push(...findChains(socket, prefix));
    }
  } catch (error) {
    if (!(error instanceof Refusal || error instanceof Interrupted)) throw error;
    unreadable.push(`the nftables rules could not be read: ${error.message}`);
  } finally {
    socket?.close();
  }
  const legacy = await Promise.all(
    legacyTables().map(async (table) => ({ table, saved: await saveLegacy(table) })),
  );
  for (const { table, saved } of legacy) {
    if ("problem" in saved) {
      unreadable.push(saved.problem);
      continue;
    }
    const all = parseIptablesSave(saved.text, " (legacy)");
    if (!isIrrelevant({ table: `ip ${table}`, name: "" })) chains.push(...all);
    for (const chain of all) {
      if (!chain.name.startsWith(prefix)) continue;
      named.push({ table: chain.table, name: chain.name, isUsed: leadTo(all, chain.name) });
    }
  }
  return { rules: { chains, unreadable: [...new Set(unreadable)] }, tables, named };
}

const isOnTheWayOrIn = (chain: Pick<Chain, "table" | "hook">): boolean =>
  isOnTheWay(chain) || chain.hook === "input";

function leadTo(chains: readonly Pick<Chain, "hook" | "rules">[], name: string): boolean {
  return chains.some(
    ({ hook, rules }) =>
      hook !== undefined &&
      rules.some(({ effect }) => (effect.kind === "jump" || effect.kind === "goto") && effect.chain === name),
  );
}

function findChains(socket: Socket, prefix: string): ChainName[] {
  const all = socket
    .ask(GET.CHAIN, NLM_F_DUMP)
    .map(({ family, data }) => ({ family, chain: decodeChain(family, attributesOf(data)) }));
  return all
    .filter(({ chain }) => chain.name.startsWith(prefix))
    .map(({ chain: { table, name } }) => {
      const bases = all.filter(({ chain }) => chain.table === table && chain.hook !== undefined);
      const rules = bases.map(({ family, chain }) => ({ ...chain, rules: readRules(socket, family, chain) }));
      return { table, name, isUsed: leadTo(rules, name) };
    });
}

/** Undefined on a kernel without nfnetlink, which has no nftables. */
function openIfThere(): Socket | undefined {
  try {
    return new Socket();
  } catch (error) {
    if (error instanceof Refusal && error.errno === EPROTONOSUPPORT) return undefined;
    throw error;
  }
}

class Watcher implements FirewallWatch {
  readonly #options: FirewallOptions;
  readonly #requests: Socket | undefined;
  readonly #events: Socket | undefined;
  #watch: Watch | undefined;
  #timer: NodeJS.Timeout | undefined;
  #interval: NodeJS.Timeout | undefined;
  #nextRead = 0;
  #generation: number | undefined;
  #nftables: Firewall = { chains: [], unreadable: [] };
  #legacy: Firewall = { chains: [], unreadable: [] };
  #legacyText = "";
  #checking = false;
  #closed = false;

  constructor(options: FirewallOptions) {
    this.#options = options;
    this.#requests = openIfThere();
    this.#events = openIfThere();
  }

  async start(): Promise<void> {
    const { checkMs } = this.#options;
    const events = this.#events;
    if (events !== undefined) {
      events.join(NFNLGRP_NFTABLES);
      this.#watch = watchFd(
        events.fd,
        () => {
          events.drain();
          this.#soon();
        },
        { keepAlive: false },
      );
    }
    this.#readNftables();
    await this.#readLegacy();
    this.#tell();
    this.#interval = setInterval(() => void this.#check(), checkMs);
    this.#interval.unref();
  }

  close(): void {
    this.#closed = true;
    clearTimeout(this.#timer);
    clearInterval(this.#interval);
    this.#watch?.close();
    this.#events?.close();
    this.#requests?.close();
  }

  /** Reads at once, or when the pause after the last reading is over. */
  #soon(): void {
    this.#timer ??= setTimeout(
      () => {
        this.#timer = undefined;
        if (this.#readNftables()) this.#tell();
      },
      Math.max(0, this.#nextRead - performance.now()),
    );
  }

  async #check(): Promise<void> {
    if (this.#checking) return;
    this.#checking = true;
    try {
      const isNftablesNew = this.#readNftables();
      const isLegacyNew = await this.#readLegacy();
      if (isNftablesNew || isLegacyNew) this.#tell();
    } finally {
      this.#checking = false;
    }
  }

  #tell(): void {
    if (this.#closed) return;
    const parts = [this.#nftables, this.#legacy];
    this.#options.onRules({
      chains: parts.flatMap(({ chains }) => chains),
      unreadable: parts.flatMap(({ unreadable }) => unreadable),
    });
  }

  /** Whether there is anything new. */
  #readNftables(): boolean {
    const socket = this.#requests;
    if (socket === undefined || this.#closed) return false;
    const started = performance.now();
    try {
      const generation = generationOf(socket);
      if (generation === undefined || generation === this.#generation) return false;
      const [chains, at] = readConsistently(socket, isOnTheWay);
      this.#generation = at;
      this.#nftables = { chains, unreadable: [] };
    } catch (error) {
      if (!(error instanceof Refusal || error instanceof Interrupted)) throw error;
      this.#generation = undefined;
      this.#nftables = { chains: [], unreadable: [`the nftables rules could not be read: ${error.message}`] };
      this.#nextRead = performance.now() + 1000;
      this.#soon();
      return true;
    }
    const now = performance.now();
    this.#nextRead = now + PAUSE_FACTOR * (now - started);
    return true;
  }

  async #readLegacy(): Promise<boolean> {
    const tables = legacyTables().filter((table) => !isIrrelevant({ table: `ip ${table}`, name: "" }));
    const parts = await Promise.all(tables.map((table) => saveLegacy(table)));
    const text = JSON.stringify(parts);
    if (text === this.#legacyText) return false;
    this.#legacyText = text;
    const chains: Chain[] = [];
    const unreadable: string[] = [];
    for (const part of parts) {
      if ("problem" in part) {
        unreadable.push(part.problem);
        continue;
      }
      try {
        chains.push(...parseIptablesSave(part.text, " (legacy)"));
      } catch (error) {
        unreadable.push(`what iptables-legacy-save says is not understood: ${String(error)}`);
      }
    }
    this.#legacy = { chains, unreadable: [...new Set(unreadable)] };
    return true;
  }
}

/** A bound nfnetlink socket. */
class Socket {
  readonly fd: number;
  readonly #buffer = Buffer.allocUnsafeSlow(RECEIVE_BYTES);
  #sequence = 0;

  constructor() {
    this.fd = call.socket(AF_NETLINK, SOCK_RAW_CLOEXEC, NETLINK_NETFILTER);
    if (this.fd < 0) throw new Refusal("open an nfnetlink socket", errno());
    const size = int32(EVENT_BUFFER);
    if (call.setsockopt(this.fd, SOL_SOCKET, SO_RCVBUFFORCE, size, 4) < 0)
      call.setsockopt(this.fd, SOL_SOCKET, SO_RCVBUF, size, 4);
    const timeout = Buffer.alloc(16);
    timeout.writeBigInt64LE(10n);
    call.setsockopt(this.fd, SOL_SOCKET, SO_RCVTIMEO, timeout, 16);
    const address = Buffer.alloc(12);
    address.writeUInt16LE(AF_NETLINK, 0);
    if (call.bind(this.fd, address, 12) < 0) {
      const number = errno();
      this.close();
      throw new Refusal("bind an nfnetlink socket", number);
    }
  }

  join(group: number): void {
    if (call.setsockopt(this.fd, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, int32(group), 4) < 0)
      throw new Refusal("watch the nftables rules", errno());
  }

  /** Takes all that is queued. That some of it was lost changes nothing: it says no more than "look again". */
  drain(): void {
    for (let rounds = 0; rounds < 4096; rounds++) {
      if (call.recv(this.fd, this.#buffer, RECEIVE_BYTES, MSG_DONTWAIT) < 0 && errno() === EAGAIN) return;
    }
  }

  /** Attributes of each object that the kernel answers a request with, and the family it is of. */
  ask(what: number, flags: number, attributes: Buffer = Buffer.alloc(0)): { family: number; data: Buffer }[] {
    const request = Buffer.alloc(20 + attributes.length);
    const sequence = ++this.#sequence;
    request.writeUInt32LE(request.length, 0);
    request.writeUInt16LE((NFNL_SUBSYS_NFTABLES << 8) | what, 4);
    request.writeUInt16LE(NLM_F_REQUEST | flags, 6);
    request.writeUInt32LE(sequence, 8);
    attributes.copy(request, 20);
    // The family is none: of all.
    while (call.send(this.fd, request, request.length, 0) < 0) {
      if (errno() !== EINTR) throw new Refusal("ask for the nftables rules", errno());
    }
    const found: { family: number; data: Buffer }[] = [];
    let interrupted = false;
    for (;;) {
      const length = call.recv(this.fd, this.#buffer, RECEIVE_BYTES, 0);
      if (length < 0 && errno() === EINTR) continue;
      if (length < 0) throw new Refusal("read the nftables rules", errno());
      for (let at = 0; at + 16 <= length; ) {
        const size = this.#buffer.readUInt32LE(at);
        const type = this.#buffer.readUInt16LE(at + 4);
        const isOurs = this.#buffer.readUInt32LE(at + 8) === sequence;
        const next = at + ((Math.max(size, 16) + 3) & ~3);
        if (isOurs) {
          if (this.#buffer.readUInt16LE(at + 6) & NLM_F_DUMP_INTR) interrupted = true;
          if (type === NLMSG_DONE) {
            if (interrupted) throw new Interrupted(UNSTEADY);
            return found;
          }
          if (type === NLMSG_ERROR)
            throw new Refusal("list the nftables rules", -this.#buffer.readInt32LE(at + 16));
          found.push({
            family: this.#buffer.readUInt8(at + 16),
            data: Buffer.from(this.#buffer.subarray(at + 20, at + size)),
          });
          if (flags === 0) return found;
        }
        at = next;
      }
    }
  }

  close(): void {
    call.close(this.fd);
  }
}

function int32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeInt32LE(value);
  return bytes;
}

// --- Attributes

/** Attributes by type; of several of one type the last. */
function attributesOf(data: Buffer): Map<number, Buffer> {
  const found = new Map<number, Buffer>();
  for (const [type, value] of eachAttribute(data)) found.set(type, value);
  return found;
}

function* eachAttribute(data: Buffer): Generator<[type: number, value: Buffer]> {
  for (let at = 0; at + 4 <= data.length; ) {
    const size = data.readUInt16LE(at);
    if (size < 4 || at + size > data.length) return;
    yield [data.readUInt16LE(at + 2) & 0x3fff, data.subarray(at + 4, at + size)];
    at += (size + 3) & ~3;
  }
}

const textOf = (value: Buffer | undefined): string =>
  (value ?? Buffer.alloc(0)).toString("utf8").replace(/\0.*$/s, "");
const numberOf = (value: Buffer | undefined): number | undefined =>
  value !== undefined && value.length >= 4 ? value.readUInt32BE(0) : undefined;

function textAttribute(type: number, text: string): Buffer {
  const size = 4 + Buffer.byteLength(text) + 1;
  const bytes = Buffer.alloc((size + 3) & ~3);
  bytes.writeUInt16LE(size, 0);
  bytes.writeUInt16LE(type, 2);
  bytes.write(text, 4);
  return bytes;
}

// --- Chains

const FAMILIES: Readonly<Record<number, string>> = {
  1: "inet",
  2: "ip",
  3: "arp",
  5: "netdev",
  7: "bridge",
  10: "ip6",
};
const INET_HOOKS: readonly FirewallHook[] = [
  "prerouting",
  "input",
  "forward",
  "output",
  "postrouting",
  "ingress",
];
const NETDEV_HOOKS: readonly FirewallHook[] = ["ingress", "egress"];
const TABLE_DORMANT = 1;
const NFTA_GEN_ID = 1;

/** Number of the rules' current version; undefined if the kernel has no nftables. */
function generationOf(socket: Socket): number | undefined {
  try {
    const [answer] = socket.ask(GET.GENERATION, 0);
    return answer && numberOf(attributesOf(answer.data).get(NFTA_GEN_ID));
  } catch (error) {
    if (error instanceof Refusal && (error.errno === EINVAL || error.errno === EOPNOTSUPP)) return undefined;
    throw error;
  }
}

/** The rules of base chains that `wanted` accepts, and of all that these lead to. */
function readConsistently(
  socket: Socket,
  wanted: (chain: Pick<Chain, "table" | "hook">) => boolean,
): [chains: Chain[], generation: number | undefined] {
  for (let attempt = 1; ; attempt++) {
    try {
      const before = generationOf(socket);
      const chains = readChains(socket, wanted);
      if (generationOf(socket) === before) return [chains, before];
    } catch (error) {
      // A chain that has just gone is a change, too.
      if (!(error instanceof Interrupted || error instanceof Refusal) || attempt === READ_ATTEMPTS)
        throw error;
    }
    if (attempt === READ_ATTEMPTS) throw new Interrupted(UNSTEADY);
  }
}

interface Listed {
  readonly family: number;
  readonly chain: Omit<Chain, "rules">;
}

function readChains(socket: Socket, wanted: (chain: Pick<Chain, "table" | "hook">) => boolean): Chain[] {
  const dormant = new Set<string>();
  for (const { family, data } of socket.ask(GET.TABLE, NLM_F_DUMP)) {
    const table = attributesOf(data);
    if ((numberOf(table.get(2)) ?? 0) & TABLE_DORMANT)
      dormant.add(`${FAMILIES[family]} ${textOf(table.get(1))}`);
  }
  const listed = new Map<string, Listed>();
  const queue: Listed[] = [];
  for (const { family, data } of socket.ask(GET.CHAIN, NLM_F_DUMP)) {
    const chain = decodeChain(family, attributesOf(data));
    if (dormant.has(chain.table) || isIrrelevant(chain)) continue;
    listed.set(`${chain.table}\n${chain.name}`, { family, chain });
    if (chain.hook !== undefined && wanted(chain)) queue.push({ family, chain });
  }
  const read = new Map<string, Chain>();
  for (let next = queue.pop(); next !== undefined; next = queue.pop()) {
    const { family, chain } = next;
    const key = `${chain.table}\n${chain.name}`;
    if (read.has(key)) continue;
    const rules = readRules(socket, family, chain);
    read.set(key, { ...chain, rules });
    for (const { effect } of rules) {
      if (effect.kind !== "jump" && effect.kind !== "goto") continue;
      const target = listed.get(`${chain.table}\n${effect.chain}`);
      if (target !== undefined) queue.push(target);
    }
  }
  return [...read.values()];
}

function decodeChain(family: number, attributes: Map<number, Buffer>): Omit<Chain, "rules"> {
  const familyName = FAMILIES[family] ?? `family${family}`;
  const chain = { table: `${familyName} ${textOf(attributes.get(1))}`, name: textOf(attributes.get(3)) };
  const nested = attributes.get(4);
  if (nested === undefined) return chain;
  const hook = attributesOf(nested);
  const number = numberOf(hook.get(1)) ?? 0;
  const names = [
    hook.get(3),
    ...[...eachAttribute(hook.get(4) ?? Buffer.alloc(0))].map(([, value]) => value),
  ];
  const devices = names.filter((value) => value !== undefined).map(textOf);
  return {
    ...chain,
    hook: (familyName === "netdev" ? NETDEV_HOOKS : INET_HOOKS)[number] ?? "prerouting",
    policy: numberOf(attributes.get(5)) === 0 ? "drop" : "accept",
    ...(devices.length > 0 ? { devices } : {}),
  };
}

// --- Rules

function readRules(socket: Socket, family: number, chain: Omit<Chain, "rules">): Rule[] {
  const table = chain.table.slice(chain.table.indexOf(" ") + 1);
  const filter = Buffer.concat([textAttribute(1, table), textAttribute(2, chain.name)]);
  return socket.ask(GET.RULE, NLM_F_DUMP, filter).flatMap((answer) => {
    const attributes = attributesOf(answer.data);
    // Tables of other families may have the same name.
    if (
      answer.family !== family ||
      textOf(attributes.get(2)) !== chain.name ||
      textOf(attributes.get(1)) !== table
    )
      return [];
    return decodeRule(attributes.get(4) ?? Buffer.alloc(0));
  });
}

const REG_VERDICT = 0;
const META_KEYS: Readonly<Record<number, Load["what"]>> = {
  1: "protocol",
  6: "input",
  7: "output",
  15: "nfproto",
  16: "l4proto",
};
const META_MARK = 3;
const CT_STATE = 0;
const CT_MARK = 3;
const CT_INVALID = 1;
const FIB_ADDRTYPE = 3;
const RTN_LOCAL = 2;
const ETH_P_IP = 0x0800;
const NFPROTO_IPV4 = 2;
const OP_EQ = 0;
const OP_NEQ = 1;
/** Expressions that only choose packets, in a way that is not looked into. */
const CONDITIONS: ReadonlySet<string> = new Set(
  "limit quota connlimit hash numgen socket osf rt tunnel xfrm byteorder dynset inner match lookup".split(
    " ",
  ),
);

/** What a register holds. */
interface Load {
  readonly what:
    | "input"
    | "output"
    | "source"
    | "destination"
    | "protocol"
    | "nfproto"
    | "l4proto"
    | "port"
    | "state"
    | "type"
    | "other";
  /** Of an address: leading bits that are kept; undefined if it is no prefix. */
  readonly length?: number | undefined;
  /** Of the state: bits that are kept. */
  readonly mask?: number;
}

/** A rule of the kernel's as one of ours, or as two if it changes the mark and goes on. */
function decodeRule(expressions: Buffer): Rule[] {
  const rule: { -readonly [K in keyof Rule]: Rule[K] } = {
    never: false,
    complete: true,
    effect: { kind: "continue" },
  };
  const registers = new Map<number, Load>();
  let marks = false;
  const stop = (by: string): void => {
    rule.effect = { kind: "stop", by };
  };
  for (const [, element] of eachAttribute(expressions)) {
    const expression = attributesOf(element);
    const name = textOf(expression.get(1));
    const data = attributesOf(expression.get(2) ?? Buffer.alloc(0));
    const number = (type: number): number | undefined => numberOf(data.get(type));
    const load = (register: number | undefined, what: Load): void => {
      registers.set(registerOf(register ?? 0), what);
    };
    switch (name) {
      case "meta":
        if (number(3) !== undefined) {
          if (number(2) === META_MARK) marks = true;
          break;
        }
        load(number(1), { what: META_KEYS[number(2) ?? -1] ?? "other" });
        break;
      case "payload": {
        if (number(5) !== undefined) {
          stop("a change of the packet");
          break;
        }
        load(number(1), payloadOf(number(2) ?? -1, number(3) ?? -1, number(4) ?? 0));
        break;
      }
      case "ct":
        if (number(4) !== undefined) {
          if (number(2) === CT_MARK) marks = true;
          else stop("a change of the connection's entry");
          break;
        }
        load(number(1), number(2) === CT_STATE ? { what: "state", mask: 0xffffffff } : { what: "other" });
        break;
      case "fib":
        load(number(1), { what: number(2) === FIB_ADDRTYPE ? "type" : "other" });
        break;
      case "bitwise": {
        const before = registers.get(registerOf(number(1) ?? 0)) ?? { what: "other" };
        load(number(2), masked(before, attributesOf(data.get(4) ?? Buffer.alloc(0)).get(1)));
        break;
      }
      case "cmp": {
        const value = attributesOf(data.get(3) ?? Buffer.alloc(0)).get(1) ?? Buffer.alloc(0);
        compare(rule, registers.get(registerOf(number(1) ?? 0)) ?? { what: "other" }, number(2) ?? -1, value);
        break;
      }
      case "range": {
        const [first, last] = [3, 4].map((type) => attributesOf(data.get(type) ?? Buffer.alloc(0)).get(1));
        const load = registers.get(registerOf(number(1) ?? 0));
        const isPort = load?.what === "port" && rule.port === undefined && first?.length === 2;
        const op = number(2);
        if (!isPort || last?.length !== 2 || (op !== OP_EQ && op !== OP_NEQ)) rule.complete = false;
        else rule.port = { first: first.readUInt16BE(0), last: last.readUInt16BE(0), not: op === OP_NEQ };
        break;
      }
      case "exthdr":
        // Written to, it sets the largest segment size; read, it is a condition.
        if (number(7) === undefined) rule.complete = false;
        break;
      case "match":
        matchOf(rule, textOf(data.get(1)), number(2) ?? 0, data.get(3) ?? Buffer.alloc(0));
        break;
      case "target":
        if (effectOf(textOf(data.get(1))).kind === "mark") marks = true;
        else rule.effect = effectOf(textOf(data.get(1)));
        break;
      case "immediate":
        if (number(1) === REG_VERDICT) rule.effect = verdictOf(data.get(2));
        else load(number(1), { what: "other" });
        break;
      case "lookup":
        rule.complete = false;
        if (number(3) === REG_VERDICT) stop("a map of verdicts");
        break;
      case "objref":
        if (number(1) !== 1) rule.complete = false;
        break;
      case "nat":
      case "masq":
      case "redir":
        rule.effect = { kind: "accept" };
        break;
      case "counter":
      case "last":
      case "flow_offload":
        break;
      case "reject":
        stop("REJECT");
        break;
      case "queue":
        stop("NFQUEUE");
        break;
      default:
        if (CONDITIONS.has(name)) rule.complete = false;
        else stop(name);
    }
  }
  if (!marks || rule.effect.kind === "stop") return [rule];
  return [{ ...rule, effect: { kind: "mark" } }, rule];
}

/** Registers of 16 bytes and those of 4 are the same memory. */
function registerOf(register: number): number {
  return register >= 1 && register <= 4 ? 4 + 4 * register : register;
}

/** Of the IPv4 header, addresses and the protocol; the destination port; of the Ethernet header, its protocol. */
function payloadOf(base: number, offset: number, length: number): Load {
  if (base === 0 && offset === 12 && length === 2) return { what: "protocol" };
  if (base === 1 && offset === 9 && length === 1) return { what: "l4proto" };
  if (base === 2 && offset === 2 && length === 2) return { what: "port" };
  if (base !== 1 || length > 4) return { what: "other" };
  if (offset === 12) return { what: "source", length: 8 * length };
  if (offset === 16) return { what: "destination", length: 8 * length };
  return { what: "other" };
}

function masked(load: Load, mask: Buffer | undefined): Load {
  if (mask === undefined || mask.length > 4 || mask.length === 0) return { what: "other" };
  if (load.what === "state" && mask.length === 4) return { what: "state", mask: mask.readUInt32LE(0) };
  if (load.what !== "source" && load.what !== "destination") return { what: "other" };
  const bits = Buffer.concat([mask, Buffer.alloc(4)]).readUInt32BE(0);
  const length = Math.clz32(~bits);
  return maskOf(length) === bits ? { what: load.what, length } : { what: "other" };
}

type OpenRule = { -readonly [K in keyof Rule]: Rule[K] };

/** Adds the condition that a register is, or is not, equal to a value. */
function compare(rule: OpenRule, load: Load, op: number, value: Buffer): void {
  const not = op === OP_NEQ;
  if (op !== OP_EQ && op !== OP_NEQ) {
    rule.complete = false;
    return;
  }
  switch (load.what) {
    case "input":
    case "output": {
      if (rule[load.what] !== undefined) break;
      const end = value.indexOf(0);
      const name = end < 0 ? `${value.toString("utf8")}*` : value.toString("utf8", 0, end);
      rule[load.what] = { name, not };
      return;
    }
    case "source":
    case "destination": {
      if (rule[load.what] !== undefined || load.length === undefined) break;
      const address = Buffer.concat([value, Buffer.alloc(4)]).readUInt32BE(0);
      rule[load.what] = { prefix: { address, length: load.length }, not };
      return;
    }
    case "nfproto":
      if ((value[0] === NFPROTO_IPV4) === not) rule.never = true;
      return;
    case "protocol":
      if (value.length !== 2) break;
      if ((value.readUInt16BE(0) === ETH_P_IP) === not) rule.never = true;
      return;
    case "l4proto":
      if (value.length < 1 || rule.protocol !== undefined) break;
      rule.protocol = { protocol: value.readUInt8(0), not };
      return;
    case "port":
      if (value.length !== 2 || rule.port !== undefined) break;
      rule.port = { first: value.readUInt16BE(0), last: value.readUInt16BE(0), not };
      return;
    case "state": {
      if (value.length !== 4) break;
      const state = value.readUInt32LE(0);
      if ((not && state === 0 && load.mask === CT_INVALID) || (!not && state === CT_INVALID))
        rule.never = true;
      break;
    }
    case "type":
      if (!not && value.length === 4 && value.readUInt32LE(0) === RTN_LOCAL) rule.never = true;
      break;
    case "other":
      break;
  }
  rule.complete = false;
}

/** linux/netfilter/xt_tcpudp.h: source ports, destination ports, then for TCP option and flags; what is inverted. */
const XT_TCPUDP = { udp: { inverted: 8, size: 9 }, tcp: { inverted: 11, size: 12 } } as const;
const XT_DESTINATION_INVERTED = 2;
const XT_CONNTRACK = { flags: 146, inverted: 148, states: 150, size: 152 } as const;
const XT_CONNTRACK_STATE = 1;
const XT_STATE_INVALID = 1;
const XT_ADDRTYPE_LOCAL = 1 << RTN_LOCAL;

/** A match of iptables that nftables has kept as it is. */
function matchOf(rule: OpenRule, name: string, revision: number, info: Buffer): void {
  if (name === "comment") return;
  if ((name === "udp" || name === "tcp") && revision === 0 && portOf(rule, name, info)) return;
  rule.complete = false;
  if (name === "conntrack" && revision === 3 && info.length >= XT_CONNTRACK.size) {
    const isState = (info.readUInt16LE(XT_CONNTRACK.flags) & XT_CONNTRACK_STATE) !== 0;
    const isNot = (info.readUInt16LE(XT_CONNTRACK.inverted) & XT_CONNTRACK_STATE) !== 0;
    if (isState && !isNot && info.readUInt16LE(XT_CONNTRACK.states) === XT_STATE_INVALID) rule.never = true;
  }
  if (name === "addrtype" && revision === 1 && info.length >= 8) {
    const [source, destination, flags] = [info.readUInt16LE(0), info.readUInt16LE(2), info.readUInt32LE(4)];
    if (source === XT_ADDRTYPE_LOCAL && (flags & 1) === 0) rule.never = true;
    if (destination === XT_ADDRTYPE_LOCAL && (flags & 2) === 0) rule.never = true;
  }
}

/** Takes over a condition that is on the destination port alone. */
function portOf(rule: OpenRule, name: "udp" | "tcp", info: Buffer): boolean {
  const { inverted, size } = XT_TCPUDP[name];
  if (info.length < size || rule.port !== undefined) return false;
  const [sourceFirst, sourceLast, first, last] = [0, 2, 4, 6].map((at) => info.readUInt16LE(at));
  const flags = info.readUInt8(inverted);
  if (sourceFirst !== 0 || sourceLast !== 0xffff || (flags & ~XT_DESTINATION_INVERTED) !== 0) return false;
  // TCP's option, mask of flags, and flags.
  if (name === "tcp" && info.readUIntBE(8, 3) !== 0) return false;
  if (first === undefined || last === undefined) return false;
  rule.port = { first, last, not: (flags & XT_DESTINATION_INVERTED) !== 0 };
  return true;
}

function verdictOf(data: Buffer | undefined): Effect {
  const verdict = attributesOf(attributesOf(data ?? Buffer.alloc(0)).get(2) ?? Buffer.alloc(0));
  const code = verdict.get(1)?.readInt32BE(0);
  const chain = textOf(verdict.get(2));
  switch (code) {
    case 1:
      return { kind: "accept" };
    case -1:
    case -2:
      return { kind: "continue" };
    case -3:
      return { kind: "jump", chain };
    case -4:
      return { kind: "goto", chain };
    case -5:
      return { kind: "return" };
    case 0:
      return { kind: "stop", by: "DROP" };
    default:
      return { kind: "stop", by: "NFQUEUE" };
  }
}

// --- The older iptables

/** Its tables of this namespace; only those that somebody has used are there. */
function legacyTables(): string[] {
  try {
    return readFileSync(LEGACY_NAMES, "utf8")
      .split("\n")
      .filter((name) => name !== "");
  } catch (error) {
    if (error instanceof Error && "code" in error && error.code === "ENOENT") return [];
    throw error;
  }
}

type Saved = { readonly text: string } | { readonly problem: string };

/** A table in the words of its own tool. */
async function saveLegacy(table: string): Promise<Saved> {
  for (const tool of LEGACY_TOOLS) {
    const saved = await run(tool, ["-t", table]);
    if (saved === undefined || ("text" in saved && saved.text.includes("(nf_tables)"))) continue;
    if ("problem" in saved)
      return { problem: `the rules of iptables (legacy) could not be read: ${saved.problem}` };
    // The first line tells the time, packets and bytes change all the while.
    return { text: saved.text.replace(/^#.*\n/gm, "").replace(/\[\d+:\d+\]/g, "[0:0]") };
  }
  return {
    problem: `there are rules of iptables (legacy), and no iptables-legacy-save to read them with: install it, or use --fast-path=always if they do not concern pods`,
  };
}

/** Undefined if there is no such program. */
function run(program: string, argv: readonly string[]): Promise<Saved | undefined> {
  return new Promise((resolve) => {
    execFile(
      program,
      argv,
      {
        timeout: SAVE_TIMEOUT_MS,
        maxBuffer: SAVE_BYTES,
        env: { PATH: "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin" },
      },
      (error, stdout, stderr) => {
        if (error === null) resolve({ text: stdout });
        else if (error.code === "ENOENT") resolve(undefined);
        else resolve({ problem: stderr.trim().split("\n")[0] || error.message });
      },
    );
  });
}
