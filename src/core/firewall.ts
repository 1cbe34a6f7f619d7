/**
 * Whether the host's packet filter must see what pods send to each other. The fast lane takes packets past
 * netfilter; rules that only translate are no reason not to (flows that the stack translates stay there one by
 * one), but a rule that may drop, reject, queue or police them is.
 *
 * Rules come in as plain data, of nftables or of the older iptables. What is not understood counts as a reason:
 * a condition that can't be read might hold, a target that is not known might drop. No reason are Docker's and
 * kube-proxy's own chains, which guard published ports and service addresses, and rules that pods' packets can't
 * come to: for other interfaces, for addresses outside the network, or behind one that accepts them all.
 */
import { contains, type Ipv4, overlaps, type Prefix, parseCidr, parseIpv4 } from "./ipv4.ts";

export type FirewallHook =
  | "prerouting"
  | "input"
  | "forward"
  | "output"
  | "postrouting"
  | "ingress"
  | "egress";

/** A condition on an interface's name; a name that ends in `*` stands for all that begin like it. */
export interface NameCondition {
  readonly name: string;
  readonly not: boolean;
}

export interface AddressCondition {
  readonly prefix: Prefix;
  readonly not: boolean;
}

/** A condition on the IP protocol, by number. */
export interface ProtocolCondition {
  readonly protocol: number;
  readonly not: boolean;
}

/** A condition on the destination port of TCP or UDP. */
export interface PortCondition {
  readonly first: number;
  readonly last: number;
  readonly not: boolean;
}

/** What a rule does with a packet. */
export type Effect =
  | { readonly kind: "accept" | "return" | "continue" }
  /** Only the mark changes. */
  | { readonly kind: "mark" }
  | { readonly kind: "jump" | "goto"; readonly chain: string }
  /** All else; `by` names it as people know it: DROP, REJECT, NFQUEUE. */
  | { readonly kind: "stop"; readonly by: string };

export interface Rule {
  readonly input?: NameCondition;
  readonly output?: NameCondition;
  readonly source?: AddressCondition;
  readonly destination?: AddressCondition;
  readonly protocol?: ProtocolCondition;
  readonly port?: PortCondition;
  /** No packet from pod to pod can fulfil the rule's conditions, whatever the interfaces and addresses. */
  readonly never: boolean;
  /** There are no conditions but those above. */
  readonly complete: boolean;
  readonly effect: Effect;
}

export interface Chain {
  /** Table as people write it, with its family: `ip filter`, `inet firewalld`, `ip filter (legacy)`. */
  readonly table: string;
  readonly name: string;
  /** Where packets come in; undefined for a chain that others jump to. */
  readonly hook?: FirewallHook;
  readonly policy?: "accept" | "drop";
  /** Of the hooks ingress and egress: on which interfaces. */
  readonly devices?: readonly string[];
  readonly rules: readonly Rule[];
}

/** What was read of the host's rules, and what of them could not be read. */
export interface Firewall {
  readonly chains: readonly Chain[];
  readonly unreadable: readonly string[];
}

/** What packets of pods can be recognized by. */
export interface PodTraffic {
  /** All pods of the cluster. */
  readonly network: Prefix;
  /** Interfaces by which pods' packets enter and leave this node's stack. */
  readonly interfaces: readonly string[];
  /** Interfaces that carry tunnel packets. */
  readonly underlay: readonly string[];
  /** A policy that Docker has set counts as anybody's: --iptables-forward-rules=false. */
  readonly obeysDocker?: boolean;
}

/** From where to where a packet goes: between pods, or between a pod and the outside of the network. */
type Way = { readonly source: "pods" | "outside"; readonly destination: "pods" | "outside" };
const BETWEEN_PODS: readonly Way[] = [{ source: "pods", destination: "pods" }];
const WITH_OUTSIDE: readonly Way[] = [
  { source: "outside", destination: "pods" },
  { source: "pods", destination: "outside" },
];

/** Docker's chains for its containers, which newer ones close to all but published ports. */
const DOCKER_CHAINS: ReadonlySet<string> = new Set(["DOCKER", "DOCKER-FORWARD", "DOCKER-BRIDGE"]);
const DOCKER_TABLE = "ip docker-bridges";
/** Published ports and services alone; their rules name no pod that another could not reach otherwise. */
const NEUTRAL_CHAINS: ReadonlySet<string> = new Set([
  "DOCKER-CT",
  "DOCKER-INTERNAL",
  "DOCKER-ISOLATION-STAGE-1",
  "DOCKER-ISOLATION-STAGE-2",
  "DOCKER-INGRESS",
  "KUBE-FORWARD",
  "KUBE-FIREWALL",
  "KUBE-PROXY-FIREWALL",
  "KUBE-SERVICES",
  "KUBE-EXTERNAL-SERVICES",
  "KUBE-NODEPORTS",
]);
const NEUTRAL_TABLES: ReadonlySet<string> = new Set(["ip kube-proxy"]);
const REASONS_MAX = 8;
const PROTOCOLS: Readonly<Record<string, number>> = { icmp: 1, tcp: 6, udp: 17 };

/** Whether a chain's rules need not be read: those of a table that only translates, or of another protocol. */
export function isIrrelevant(chain: { readonly table: string; readonly name: string }): boolean {
  const [family = "", name = ""] = chain.table.split(" ");
  if (family === "ip6" || family === "arp") return true;
  // iptables keeps people from filtering in its table nat.
  if (family === "ip" && name === "nat") return true;
  return NEUTRAL_TABLES.has(`${family} ${name}`) || (family === "ip" && NEUTRAL_CHAINS.has(chain.name));
}

/** Whether packets of pods, or the tunnel packets they are in, come by a base chain. */
export function isOnTheWay(chain: Pick<Chain, "table" | "hook">): boolean {
  switch (chain.table.split(" ")[0]) {
    case "ip":
    case "inet":
      return chain.hook !== "input" && chain.hook !== "output";
    case "bridge":
    case "netdev":
      return chain.hook !== "output";
    default:
      return false;
  }
}

/** Why pods' packets must go through the stack, a line each; none if the fast lane may take them. */
export function reasonsForStack(firewall: Firewall, traffic: PodTraffic): readonly string[] {
  return reasonsOf(firewall, traffic, BETWEEN_PODS);
}

/**
 * Why packets between pods and the outside of the network must go through the stack, a line each. Docker's policy
 * is none, as flanneld opens it, but its rules for containers are: the outside is what they are meant for.
 */
export function reasonsForOutside(firewall: Firewall, traffic: PodTraffic): readonly string[] {
  return reasonsOf(firewall, traffic, WITH_OUTSIDE);
}

function reasonsOf(firewall: Firewall, traffic: PodTraffic, ways: readonly Way[]): readonly string[] {
  const chains = new Map(firewall.chains.map((chain) => [`${chain.table}\n${chain.name}`, chain]));
  const reasons = new Set<string>(firewall.unreadable);
  for (const chain of firewall.chains) {
    if (chain.hook === undefined || !isOnTheWay(chain) || isIrrelevant(chain)) continue;
    if (chain.devices !== undefined && !chain.devices.some((name) => carries(traffic, name))) continue;
    for (const way of ways)
      for (const found of new Walk(chain, chains, traffic, way).run()) reasons.add(found);
  }
  const all = [...reasons];
  if (all.length <= REASONS_MAX) return all;
  return [...all.slice(0, REASONS_MAX - 1), `and ${all.length - REASONS_MAX + 1} more of the kind`];
}

function carries(traffic: PodTraffic, name: string): boolean {
  return traffic.interfaces.includes(name) || traffic.underlay.includes(name);
}

/** The way of pods' packets through one base chain. */
class Walk {
  readonly #base: Chain;
  readonly #chains: ReadonlyMap<string, Chain>;
  readonly #traffic: PodTraffic;
  readonly #way: Way;
  readonly #isBetweenPods: boolean;
  readonly #isDocker: boolean;
  /** What becomes of a packet that enters a chain: `true` if none comes back out of it. */
  readonly #ends = new Map<string, boolean>();
  readonly #reasons: string[] = [];
  /** First steps of the ways that a reason was found on; one is enough. */
  readonly #told = new Set<string>();

  constructor(base: Chain, chains: ReadonlyMap<string, Chain>, traffic: PodTraffic, way: Way) {
    this.#base = base;
    this.#chains = chains;
    this.#traffic = traffic;
    this.#way = way;
    this.#isBetweenPods = way.source === "pods" && way.destination === "pods";
    const forward = chains.get(`${base.table.replace(/^ip \w+/, "ip filter")}\nFORWARD`);
    this.#isDocker = (forward?.rules ?? []).some(
      ({ effect }) => effect.kind === "jump" && /^DOCKER(-|$)/.test(effect.chain),
    );
  }

  run(): readonly string[] {
    const base = this.#base;
    if (this.#isBetweenPods && base.table === DOCKER_TABLE) return [];
    const ends = this.#walk(base, []);
    // Docker sets this policy itself, and lets pass what it knows; the network is not for it to know.
    const isDockers =
      this.#isDocker &&
      this.#traffic.obeysDocker !== true &&
      base.table.startsWith("ip filter") &&
      base.name === "FORWARD";
    if (!ends && base.policy === "drop" && !isDockers) {
      this.#reasons.push(`${this.#name([])} drops what none of its rules accepts`);
    }
    return this.#reasons;
  }

  #name(trail: readonly string[]): string {
    const chain = `chain ${this.#base.name} of table ${this.#base.table}`;
    return trail.length === 0 ? chain : `${chain} leads to ${trail.join(", ")}, which`;
  }

  #note(trail: readonly string[], what: string): void {
    const first = trail[0] ?? "";
    if (this.#told.has(first)) return;
    this.#told.add(first);
    this.#reasons.push(`${this.#name(trail)} ${what}`);
  }

  #walk(chain: Chain, trail: readonly string[]): boolean {
    const known = this.#ends.get(chain.name);
    if (known !== undefined) return known;
    this.#ends.set(chain.name, false);
    const ends = this.#follow(chain, trail);
    this.#ends.set(chain.name, ends);
    return ends;
  }

  #follow(chain: Chain, trail: readonly string[]): boolean {
    for (const rule of chain.rules) {
      if (!this.#mayMatch(rule) || this.#isDockers(rule)) continue;
      const { effect } = rule;
      const all = this.#matchesAll(rule);
      switch (effect.kind) {
        case "accept":
          if (all) return true;
          break;
        case "return":
          if (all) return false;
          break;
        case "continue":
          break;
        case "mark":
          // What routes are chosen by.
          if (this.#base.hook === "prerouting" || this.#base.hook === "ingress")
            this.#note(trail, "may mark packets of pods");
          break;
        case "stop":
          this.#note(trail, `may apply ${effect.by} to packets of pods`);
          if (all) return true;
          break;
        case "jump":
        case "goto": {
          const next = { table: chain.table, name: effect.chain };
          if (isIrrelevant(next)) break;
          if (this.#isBetweenPods && DOCKER_CHAINS.has(next.name)) break;
          const target = this.#chains.get(`${next.table}\n${next.name}`);
          const further = [...trail, next.name];
          if (target === undefined) {
            this.#note(further, "could not be read");
            break;
          }
          const ends = this.#walk(target, further);
          if (all && (ends || effect.kind === "goto")) return ends;
          break;
        }
      }
    }
    return false;
  }

  #mayMatch(rule: Rule): boolean {
    const { interfaces, underlay } = this.#traffic;
    const known = this.#isBetweenPods ? interfaces : [...interfaces, ...underlay];
    const name = (condition: NameCondition | undefined): boolean =>
      condition === undefined || known.some((each) => matches(condition.name, each) !== condition.not);
    return (
      !rule.never &&
      this.#mayBe(this.#way.source, rule.source) &&
      this.#mayBe(this.#way.destination, rule.destination) &&
      name(rule.input) &&
      name(rule.output)
    );
  }

  /** Whether an address of this end of the way may fulfil the condition. */
  #mayBe(end: "pods" | "outside", condition: AddressCondition | undefined): boolean {
    if (condition === undefined) return true;
    const { prefix, not } = condition;
    const { network } = this.#traffic;
    if (end === "pods") return not ? !covers(prefix, network) : overlaps(prefix, network);
    return not ? prefix.length > 0 : !covers(network, prefix);
  }

  #matchesAll(rule: Rule): boolean {
    const isFree =
      rule.input === undefined &&
      rule.output === undefined &&
      rule.protocol === undefined &&
      rule.port === undefined;
    return (
      rule.complete &&
      isFree &&
      this.#isAlways(this.#way.source, rule.source) &&
      this.#isAlways(this.#way.destination, rule.destination)
    );
  }

  /** Whether every address of this end of the way fulfils the condition. */
  #isAlways(end: "pods" | "outside", condition: AddressCondition | undefined): boolean {
    if (condition === undefined) return true;
    const { prefix, not } = condition;
    const { network } = this.#traffic;
    if (end === "pods") return not ? !overlaps(prefix, network) : covers(prefix, network);
    return not ? covers(network, prefix) : prefix.length === 0;
  }

  /**
   * Docker's rule for a container with published ports: no packet that did not come from its bridge may be for
   * it, before it was translated. The network's other nodes are not what it is meant for.
   */
  #isDockers(rule: Rule): boolean {
    const { effect, input, destination } = rule;
    return (
      this.#isDocker &&
      this.#isBetweenPods &&
      this.#base.table.startsWith("ip raw") &&
      effect.kind === "stop" &&
      effect.by === "DROP" &&
      input?.not === true &&
      destination?.not === false &&
      destination.prefix.length === 32
    );
  }
}

function covers(block: Prefix, inner: Prefix): boolean {
  return block.length <= inner.length && contains(block, inner.address);
}

function matches(pattern: string, name: string): boolean {
  return pattern.endsWith("*") ? name.startsWith(pattern.slice(0, -1)) : name === pattern;
}

/** A packet that comes in for the node itself. */
export interface InputPacket {
  readonly input: string;
  readonly source: Ipv4;
  readonly destination: Ipv4;
  readonly protocol: number;
  /** Destination port. */
  readonly port: number;
}

/** What the rules do with a packet: certainly one of two, or perhaps `by` that rule, as not all conditions are known. */
export interface InputVerdict {
  readonly verdict: "accept" | "drop" | "perhaps";
  /** The chain that drops it, or may; undefined if none does. */
  readonly by: string | undefined;
}

/** What the chains of the hook `input` do with a packet. All of them must accept it. */
export function judgeInput(firewall: Firewall, packet: InputPacket): InputVerdict {
  const chains = new Map(firewall.chains.map((chain) => [`${chain.table}\n${chain.name}`, chain]));
  let perhaps: string | undefined;
  for (const base of firewall.chains) {
    const family = base.table.split(" ")[0];
    if (base.hook !== "input" || (family !== "ip" && family !== "inet")) continue;
    const { end, may } = walkInput(base, chains, packet, new Set());
    const name = `chain ${base.name} of table ${base.table}`;
    const verdict = end === "through" ? (base.policy ?? "accept") : end;
    if (verdict === "drop" && !may.accept) return { verdict: "drop", by: name };
    if (verdict === "drop" || may.drop) perhaps ??= name;
  }
  return perhaps === undefined ? { verdict: "accept", by: undefined } : { verdict: "perhaps", by: perhaps };
}

/** What becomes for certain of a packet in a chain, and what might have become of it before. */
interface InputWalk {
  readonly end: "accept" | "drop" | "through";
  readonly may: { readonly accept: boolean; readonly drop: boolean };
}

function walkInput(
  chain: Chain,
  chains: ReadonlyMap<string, Chain>,
  packet: InputPacket,
  above: ReadonlySet<string>,
): InputWalk {
  const may = { accept: false, drop: false };
  for (const rule of chain.rules) {
    const match = matchesInput(rule, packet);
    if (match === "no") continue;
    const { effect } = rule;
    const isSure = match === "yes";
    switch (effect.kind) {
      case "continue":
      case "mark":
        break;
      case "return":
        if (isSure) return { end: "through", may };
        break;
      case "accept":
        if (isSure) return { end: "accept", may };
        may.accept = true;
        break;
      case "stop":
        if (isSure && ["DROP", "REJECT"].includes(effect.by)) return { end: "drop", may };
        // What is not known may do either.
        if (!["DROP", "REJECT"].includes(effect.by)) may.accept = true;
        may.drop = true;
        break;
      case "jump":
      case "goto": {
        const target = chains.get(`${chain.table}\n${effect.chain}`);
        if (target === undefined || above.has(effect.chain)) {
          may.accept = may.drop = true;
          break;
        }
        const inner = walkInput(target, chains, packet, new Set([...above, effect.chain]));
        if (inner.may.accept || (!isSure && inner.end === "accept")) may.accept = true;
        if (inner.may.drop || (!isSure && inner.end === "drop")) may.drop = true;
        if (isSure && (inner.end !== "through" || effect.kind === "goto")) return { end: inner.end, may };
        break;
      }
    }
  }
  return { end: "through", may };
}

function matchesInput(rule: Rule, packet: InputPacket): "yes" | "no" | "perhaps" {
  const { input, output, source, destination, protocol, port } = rule;
  const isRefuted =
    (input !== undefined && matches(input.name, packet.input) === input.not) ||
    (output !== undefined && !output.not) ||
    (source !== undefined && contains(source.prefix, packet.source) === source.not) ||
    (destination !== undefined && contains(destination.prefix, packet.destination) === destination.not) ||
    (protocol !== undefined && (protocol.protocol === packet.protocol) === protocol.not) ||
    (port !== undefined && (port.first <= packet.port && packet.port <= port.last) === port.not);
  if (isRefuted) return "no";
  // `never` speaks of packets from pod to pod.
  return rule.complete && !rule.never ? "yes" : "perhaps";
}

/** Targets of xtables by what they do to a packet; all others are `stop`. Also names of nftables' own. */
export function effectOf(target: string): Effect {
  switch (target) {
    case "ACCEPT":
      return { kind: "accept" };
    case "RETURN":
      return { kind: "return" };
    // Translations end the chain; the flows they concern are kept on the stack one by one.
    case "DNAT":
    case "SNAT":
    case "MASQUERADE":
    case "REDIRECT":
    case "NETMAP":
      return { kind: "accept" };
    case "MARK":
    case "CONNMARK":
      return { kind: "mark" };
    case "":
    case "TCPMSS":
    case "CHECKSUM":
      return { kind: "continue" };
    default:
      return { kind: "stop", by: target };
  }
}

const HOOKS: Readonly<Record<string, FirewallHook>> = {
  PREROUTING: "prerouting",
  INPUT: "input",
  FORWARD: "forward",
  OUTPUT: "output",
  POSTROUTING: "postrouting",
};

/**
 * Reads what `iptables-save` prints. `suffix` goes behind the tables' names. Throws if the text is not of that
 * form; words that are not known become conditions that might hold.
 */
export function parseIptablesSave(text: string, suffix = ""): Chain[] {
  const chains: Chain[] = [];
  let open = new Map<string, Chain & { rules: Rule[] }>();
  let table = "";
  for (const line of text.split("\n")) {
    if (line === "" || line.startsWith("#")) continue;
    const [first = "", ...rest] = wordsOf(line);
    if (first.startsWith("*")) {
      table = `ip ${first.slice(1)}${suffix}`;
      open = new Map();
    } else if (first === "COMMIT") {
      chains.push(...open.values());
    } else if (first.startsWith(":")) {
      const name = first.slice(1);
      const hook = HOOKS[name];
      const base = rest[0] === "-" || hook === undefined ? {} : { hook, policy: policyOf(rest[0] ?? "") };
      open.set(name, { table, name, ...base, rules: [] });
    } else {
      const at = first.startsWith("[") ? rest : [first, ...rest];
      const chain = at[0] === "-A" ? open.get(at[1] ?? "") : undefined;
      if (chain === undefined) throw new Error(`"${line}" is no line of iptables-save`);
      chain.rules.push(parseRule(at.slice(2), (name) => open.has(name)));
    }
  }
  return chains;
}

function policyOf(word: string): "accept" | "drop" {
  return word === "ACCEPT" ? "accept" : "drop";
}

/** Words of a line; quoted ones are one, with backslashes before quotes. */
function wordsOf(line: string): string[] {
  const words = line.match(/"(?:\\.|[^"\\])*"|\S+/g) ?? [];
  return words.map((word) => (word.startsWith('"') ? word.slice(1, -1).replace(/\\(.)/g, "$1") : word));
}

function parseRule(words: readonly string[], isChain: (name: string) => boolean): Rule {
  const rule: { -readonly [K in keyof Rule]: Rule[K] } = {
    never: false,
    complete: true,
    effect: { kind: "continue" },
  };
  let not = false;
  for (let i = 0; i < words.length; i++) {
    const word = words[i] ?? "";
    const value = words[i + 1] ?? "";
    if (word === "!") {
      not = true;
      continue;
    }
    const negated = not;
    not = false;
    switch (word) {
      case "-s":
      case "-d": {
        const prefix = parseCidr(value) ?? hostOf(parseIpv4(value));
        if (prefix === undefined) rule.complete = false;
        else rule[word === "-s" ? "source" : "destination"] = { prefix, not: negated };
        i++;
        break;
      }
      case "-i":
      case "-o":
        rule[word === "-i" ? "input" : "output"] = { name: value.replace(/\+$/, "*"), not: negated };
        i++;
        break;
      case "-m":
        // These three only make room for conditions that are read below.
        if (!["comment", "tcp", "udp"].includes(value)) rule.complete = false;
        i++;
        break;
      case "-p": {
        const protocol = PROTOCOLS[value] ?? (/^\d+$/.test(value) ? Number(value) : undefined);
        if (protocol === undefined) rule.complete = false;
        else rule.protocol = { protocol, not: negated };
        i++;
        break;
      }
      case "--dport": {
        const [first, last = first] = value.split(":").map(Number);
        if (first === undefined || last === undefined || Number.isNaN(first + last)) rule.complete = false;
        else rule.port = { first, last, not: negated };
        i++;
        break;
      }
      case "--comment":
        i++;
        break;
      case "--ctstate":
        rule.complete = false;
        if (!negated && value === "INVALID") rule.never = true;
        i++;
        break;
      case "--src-type":
      case "--dst-type":
        rule.complete = false;
        if (!negated && value === "LOCAL") rule.never = true;
        i++;
        break;
      case "-j":
      case "-g":
        rule.effect = isChain(value)
          ? { kind: word === "-g" ? "goto" : "jump", chain: value }
          : effectOf(value);
        // The rest are the target's own words.
        return rule;
      default:
        rule.complete = false;
    }
  }
  return rule;
}

function hostOf(address: Ipv4 | undefined): Prefix | undefined {
  return address === undefined ? undefined : { address, length: 32 };
}
