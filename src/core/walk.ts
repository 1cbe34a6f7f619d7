/**
 * Follows one packet through this node, hop by hop: at hooks the real programs run on it, between them the kernel's
 * tables say where it goes. Pure: what runs and what the tables are comes in as `Node`.
 *
 * Of what the stack translates, those connections are foretold that connection tracking knows. What its rules would do to
 * others, and what the packet filter would, is not: hops at the stack are as if there were neither.
 */
import type { FdbEntry, Link, Neighbour } from "./host.ts";
import type { EndpointRow, SubnetRow } from "./image.ts";
import { contains, formatCidr, formatIpv4, type Ipv4 } from "./ipv4.ts";
import type { Mac } from "./model.ts";
import {
  buildFrame,
  buildTunnel,
  ECN_CE,
  type Ends,
  leaveTunnel,
  NO_MAC,
  oneHopLess,
  type Packet,
  PROTOCOLS,
  readdress,
  readFrame,
  readPacket,
  readTunnel,
  type Tunnel,
  translate,
} from "./packet.ts";

/** Facts of the programs in force. */
export interface WalkConfig extends Tunnel {
  readonly vtep4: Ipv4;
  readonly overlay_ifindex: number;
  readonly vni: number;
  readonly ttl: number;
  readonly fast_path: string;
}

/** The node that a packet is followed through. */
export interface Node {
  readonly config: WalkConfig;
  readonly links: ReadonlyMap<number, Link>;
  readonly subnets: readonly SubnetRow[];
  readonly endpoints: ReadonlyMap<Ipv4, EndpointRow>;
  readonly neighbours: readonly Neighbour[];
  readonly fdb: readonly FdbEntry[];
  /** Programs of ours on an interface, by name. */
  hooksOf(ifindex: number, direction: "ingress" | "egress"): readonly string[];
  run(
    hook: string,
    ifindex: number,
    frame: Uint8Array,
  ): { readonly action: "next" | "redirect" | "drop"; readonly verdict: string; readonly frame: Uint8Array };
  routeTo(
    address: Ipv4,
    source: Ipv4,
  ):
    | {
        readonly outIndex: number | undefined;
        readonly gateway: Ipv4 | undefined;
        readonly mtu: number | undefined;
        readonly local: boolean;
      }
    | undefined;
  /** The ends with which a packet leaves the stack, if connection tracking knows that it translates its connection. */
  translationOf(packet: Packet): Ends | undefined;
}

/** One place the packet comes by. */
export interface Hop {
  /** A hook, or `stack`, `nat`, `bridge`, `device`. */
  readonly at: string;
  readonly ifindex: number | undefined;
  /** At hooks. */
  readonly verdict: string | undefined;
  /** What decided. */
  readonly why: string;
  /** The frame as it leaves this place. */
  readonly frame: Uint8Array;
}

/** What becomes of a packet in the end. */
export type End =
  /** Left by an interface of this node for the next hop. */
  | { readonly what: "sent"; readonly ifindex: number; readonly to: Ipv4 }
  /** Reached a pod. */
  | { readonly what: "delivered"; readonly ifindex: number; readonly to: Ipv4 }
  /** Is for a process of this node. */
  | { readonly what: "local" }
  /** A program dropped it. */
  | { readonly what: "dropped" }
  /** A program keeps it until the first fragment comes. */
  | { readonly what: "held" }
  /** The stack tells the sender why it does not go on: `ttl`, `too_big`, `unreachable`. */
  | { readonly what: "answered"; readonly reason: "ttl" | "too_big" | "unreachable" }
  /** The stack cuts it into pieces for the next link. */
  | { readonly what: "fragmented"; readonly ifindex: number; readonly mtu: number }
  /** The stack takes it for what it can't be, and says nothing. */
  | { readonly what: "discarded" };

export interface Walk {
  readonly hops: readonly Hop[];
  readonly end: End;
  /** As it is in the end. */
  readonly frame: Uint8Array;
}

/** More hops than a packet can make here without going round. */
const HOPS_MAX = 16;

/** The peer that holds an address: the row with the longest prefix. */
export function peerOf(subnets: readonly SubnetRow[], address: Ipv4): SubnetRow | undefined {
  let best: SubnetRow | undefined;
  for (const row of subnets) {
    if (!contains({ address: row.subnet, length: row.prefixLength }, address)) continue;
    if (best === undefined || row.prefixLength > best.prefixLength) best = row;
  }
  return best;
}

/** The MAC that an address has on an interface, as far as this node knows. */
export function macOf(node: Pick<Node, "neighbours">, ifindex: number, address: Ipv4): Mac | undefined {
  return node.neighbours.find((row) => row.index === ifindex && row.address === address)?.mac;
}

export class Walker {
  readonly #node: Node;
  readonly #hops: Hop[] = [];

  constructor(node: Node) {
    this.#node = node;
  }

  /** From where a frame comes in by an interface. */
  arrive(ifindex: number, frame: Uint8Array): Walk {
    return this.#ingress(ifindex, frame);
  }

  /** From a process of this node. */
  leave(ip: Uint8Array): Walk {
    return this.#route(undefined, ip, "a process of this node sends it");
  }

  #end(end: End, frame: Uint8Array): Walk {
    return { hops: this.#hops, end, frame };
  }

  #hop(hop: Hop): void {
    this.#hops.push(hop);
    if (this.#hops.length > HOPS_MAX) throw new Error("the packet goes round and round in this node");
  }

  #ingress(ifindex: number, frame: Uint8Array): Walk {
    let now = frame;
    for (const hook of this.#node.hooksOf(ifindex, "ingress")) {
      const ran = this.#run(hook, ifindex, now);
      if (ran.action === "drop") return this.#taken(ran);
      if (ran.action === "redirect") return this.#redirected(ifindex, ran);
      now = ran.frame;
    }
    return this.#passed(ifindex, now);
  }

  #run(hook: string, ifindex: number, frame: Uint8Array): ReturnType<Node["run"]> {
    const before = packetIn(frame);
    const ran = this.#node.run(hook, ifindex, frame);
    const why = this.#why(hook, ran.verdict, ifindex, before, ran.frame);
    this.#hop({ at: hook, ifindex, verdict: ran.verdict, why, frame: ran.frame });
    return ran;
  }

  #taken(ran: ReturnType<Node["run"]>): Walk {
    return this.#end({ what: ran.verdict === "held" ? "held" : "dropped" }, ran.frame);
  }

  /** Where a program sent the packet. A test run does not say, the verdict and the tables do. */
  #redirected(ifindex: number, { verdict, frame }: ReturnType<Node["run"]>): Walk {
    const packet = packetIn(frame);
    if (packet === undefined) return this.#end({ what: "discarded" }, frame);
    const { subnets, endpoints, config } = this.#node;
    switch (verdict) {
      case "encapsulated":
      case "routed": {
        const peer =
          verdict === "routed"
            ? peerOf(subnets, packet.destination)
            : subnets.find(({ publicIp }) => publicIp === packet.destination);
        if (peer === undefined) break;
        return this.#egress(peer.ifindex, this.#towards(peer.ifindex, peer.nextHop, frame), peer.nextHop);
      }
      case "device":
        return this.#egress(config.overlay_ifindex, frame, packet.destination);
      case "opened":
        return this.#ingress(config.overlay_ifindex, frame);
      case "delivered":
      case "decapsulated": {
        const endpoint = endpoints.get(packet.destination);
        if (endpoint?.delivery === "DELIVERY_PEER") {
          const { address: to } = endpoint;
          return this.#end({ what: "delivered", ifindex: endpoint.ifindex, to }, frame);
        }
        if (endpoint !== undefined) return this.#egress(endpoint.ifindex, frame, endpoint.address);
        break;
      }
    }
    const route = this.#node.routeTo(packet.destination, 0);
    const outIndex = route?.outIndex ?? ifindex;
    const nextHop = route?.gateway ?? packet.destination;
    return this.#egress(outIndex, this.#towards(outIndex, nextHop, frame), nextHop);
  }

  /** A frame that the programs left to whatever comes behind them. */
  #passed(ifindex: number, frame: Uint8Array): Walk {
    const { links, endpoints, config } = this.#node;
    const link = links.get(ifindex);
    const ethernet = readFrame(frame);
    if (ethernet === undefined) return this.#end({ what: "discarded" }, frame);
    const bridge = link?.masterIndex === undefined ? undefined : links.get(link.masterIndex);
    if (bridge?.kind === "bridge") {
      if (ethernet.to === bridge.mac) return this.#ingress(bridge.index, frame);
      const behind = [...endpoints.values()].find(({ mac }) => mac === ethernet.to);
      const why = `${bridge.name} hands it from port to port`;
      this.#hop({ at: "bridge", ifindex: bridge.index, verdict: undefined, why, frame });
      if (behind === undefined) return this.#end({ what: "discarded" }, frame);
      return this.#end({ what: "delivered", ifindex: behind.ifindex, to: behind.address }, frame);
    }
    const tunnel = ifindex === config.overlay_ifindex ? undefined : this.#opened(ethernet.ip);
    if (tunnel !== undefined) {
      const outer = readPacket(ethernet.ip);
      const inner = readFrame(tunnel);
      const left = inner && outer && packetIn(tunnel) && leaveTunnel(inner.ip, outer.tos);
      const isLost = packetIn(tunnel) !== undefined && left === undefined;
      const out = inner && left ? buildFrame(inner.to, inner.from, left) : tunnel;
      const why = `the kernel's tunnel device opens it`;
      this.#hop({ at: "device", ifindex: config.overlay_ifindex, verdict: undefined, why, frame: out });
      return isLost ? this.#end({ what: "discarded" }, out) : this.#ingress(config.overlay_ifindex, out);
    }
    return this.#route(ifindex, ethernet.ip);
  }

  #opened(ip: Uint8Array): Uint8Array | undefined {
    const { vtep4, overlay_ifindex: overlay, vni, tunnel, tunnel_port: port } = this.#node.config;
    const packet = readPacket(ip);
    if (tunnel !== "TUNNEL_VXLAN" || overlay === 0 || packet?.destination !== vtep4) return undefined;
    const found = packet.moreFragments ? undefined : readTunnel(ip, port);
    return found?.vni === vni ? found.frame : undefined;
  }

  /** The stack, on a packet that came by an interface, or from a process. */
  #route(from: number | undefined, came: Uint8Array, whose = ""): Walk {
    const { links } = this.#node;
    const ends = this.#translationOf(came);
    // The destination is changed before the route is chosen, the source after it.
    const ip = this.#translated(from, came, ends, "destination");
    const packet = readPacket(ip);
    const frame = buildFrame(NO_MAC, NO_MAC, ip);
    const stack = (why: string, out: Uint8Array): void => {
      const text = whose === "" ? why : `${whose}; ${why}`;
      this.#hop({ at: "stack", ifindex: from, verdict: undefined, why: text, frame: out });
    };
    if (packet === undefined || ip.length < packet.length || packet.length < packet.header) {
      stack("its IP header does not add up", frame);
      return this.#end({ what: "discarded" }, frame);
    }
    const route = this.#node.routeTo(packet.destination, from === undefined ? packet.source : 0);
    if (route?.local === true) {
      stack(`${formatIpv4(packet.destination)} is an address of this node`, frame);
      return this.#end({ what: "local" }, frame);
    }
    const out = route?.outIndex === undefined ? undefined : links.get(route.outIndex);
    if (route === undefined || out === undefined) {
      stack(`there is no route to ${formatIpv4(packet.destination)}`, frame);
      return this.#end({ what: "answered", reason: "unreachable" }, frame);
    }
    if (from !== undefined && packet.ttl <= 1) {
      stack("its hop limit ends here", frame);
      return this.#end({ what: "answered", reason: "ttl" }, frame);
    }
    const sent = from === undefined ? ip : oneHopLess(ip);
    const nextHop = route.gateway ?? packet.destination;
    const mtu = Math.min(route.mtu ?? out.mtu, out.mtu);
    const leaving = this.#towards(out.index, nextHop, buildFrame(NO_MAC, NO_MAC, sent));
    if (packet.length > mtu) {
      stack(`its ${packet.length} bytes are more than the ${mtu} of ${out.name}`, leaving);
      if (packet.dontFragment) return this.#end({ what: "answered", reason: "too_big" }, frame);
      return this.#end({ what: "fragmented", ifindex: out.index, mtu }, leaving);
    }
    const via = route.gateway === undefined ? "" : ` by ${formatIpv4(route.gateway)}`;
    stack(`the route to ${formatIpv4(packet.destination)} leads out of ${out.name}${via}`, leaving);
    const translated = this.#translated(from, sent, ends, "source");
    if (translated === sent) return this.#egress(out.index, leaving, nextHop);
    const left = this.#towards(out.index, nextHop, buildFrame(NO_MAC, NO_MAC, translated));
    return this.#egress(out.index, left, nextHop);
  }

  #translationOf(ip: Uint8Array): Ends | undefined {
    const packet = readPacket(ip);
    // What the stack translates it has put together before; a fragment alone is not what it will see.
    const isWhole = packet !== undefined && !packet.moreFragments && packet.fragmentOffset === 0;
    return isWhole && ip.length >= packet.length ? this.#node.translationOf(packet) : undefined;
  }

  /** The packet with that end as connection tracking has it, and a hop that says so; itself if there is nothing to do. */
  #translated(
    ifindex: number | undefined,
    ip: Uint8Array,
    ends: Ends | undefined,
    which: "source" | "destination",
  ): Uint8Array {
    const packet = readPacket(ip);
    if (ends === undefined || packet === undefined) return ip;
    const port = which === "source" ? "sourcePort" : "destinationPort";
    const now = packet[port] ?? 0;
    if (packet[which] === ends[which] && now === ends[port]) return ip;
    const { source, destination, sourcePort = 0, destinationPort = 0 } = packet;
    const next = {
      source,
      destination,
      sourcePort,
      destinationPort,
      [which]: ends[which],
      [port]: ends[port],
    };
    const translated = translate(ip, next);
    const hasPorts = packet[port] !== undefined && packet.protocol !== PROTOCOLS.icmp;
    const why = `connection tracking knows this connection: its ${which} becomes ${end(ends[which], hasPorts ? ends[port] : undefined)}`;
    const frame = buildFrame(NO_MAC, NO_MAC, translated);
    this.#hop({ at: "nat", ifindex, verdict: undefined, why, frame });
    return translated;
  }

  /** The frame for a neighbour, by what this node knows of it. */
  #towards(ifindex: number, nextHop: Ipv4, frame: Uint8Array): Uint8Array {
    const from = this.#node.links.get(ifindex)?.mac ?? NO_MAC;
    return readdress(frame, macOf(this.#node, ifindex, nextHop) ?? NO_MAC, from);
  }

  #egress(ifindex: number, frame: Uint8Array, nextHop: Ipv4): Walk {
    const { config, links, endpoints } = this.#node;
    let now = frame;
    for (const hook of this.#node.hooksOf(ifindex, "egress")) {
      const ran = this.#run(hook, ifindex, now);
      if (ran.action === "drop") return this.#taken(ran);
      if (ran.action === "redirect") return this.#redirected(ifindex, ran);
      now = ran.frame;
    }
    if (ifindex === config.overlay_ifindex && ifindex !== 0) {
      if (config.tunnel === "TUNNEL_VXLAN") return this.#encapsulated(now);
      const why = "this device has no wire: what the programs do not take here goes nowhere";
      this.#hop({ at: "device", ifindex, verdict: undefined, why, frame: now });
      return this.#end({ what: "discarded" }, now);
    }
    const link = links.get(ifindex);
    const to = packetIn(now)?.destination;
    const endpoint = to === undefined ? undefined : endpoints.get(to);
    const isPods = endpoint?.ifindex === ifindex || (link?.kind === "bridge" && endpoint !== undefined);
    if (isPods) return this.#end({ what: "delivered", ifindex: endpoint.ifindex, to: endpoint.address }, now);
    if (link?.kind === "bridge") {
      const why = `no pod behind ${link.name} is known by ${formatIpv4(nextHop)}; it asks all of them`;
      this.#hop({ at: "bridge", ifindex, verdict: undefined, why, frame: now });
      return this.#end({ what: "answered", reason: "unreachable" }, now);
    }
    return this.#end({ what: "sent", ifindex, to: nextHop }, now);
  }

  /** The kernel's tunnel device puts its headers around the frame. */
  #encapsulated(frame: Uint8Array): Walk {
    const { config, fdb } = this.#node;
    const { overlay_ifindex: overlay } = config;
    const inner = packetIn(frame);
    const to = readFrame(frame)?.to;
    const remote = fdb.find(
      ({ index, mac, dst }) => index === overlay && mac === to && dst !== undefined,
    )?.dst;
    const hop = (why: string, out: Uint8Array): void =>
      this.#hop({ at: "device", ifindex: overlay, verdict: undefined, why, frame: out });
    if (remote === undefined) {
      hop(`the tunnel device knows no peer with the MAC ${to ?? "that it has"}`, frame);
      return this.#end({ what: "discarded" }, frame);
    }
    // RFC 6040: what it will not say is CE. The port the kernel chooses is not known here.
    const ecn = (inner?.tos ?? 0) % 4;
    const outer = buildTunnel(
      {
        source: config.vtep4,
        destination: remote,
        sourcePort: 0,
        port: config.tunnel_port,
        vni: config.vni,
        ttl: config.ttl,
        tos: ecn === ECN_CE ? 2 : ecn,
      },
      frame,
    );
    const out = buildFrame(NO_MAC, NO_MAC, outer);
    hop(`the kernel's tunnel device sends it to ${formatIpv4(remote)}`, out);
    const route = this.#node.routeTo(remote, 0);
    if (route?.outIndex === undefined) return this.#end({ what: "answered", reason: "unreachable" }, out);
    const nextHop = route.gateway ?? remote;
    return this.#egress(route.outIndex, this.#towards(route.outIndex, nextHop, out), nextHop);
  }

  /** The row, or the row that is missing, behind a verdict. */
  #why(
    hook: string,
    verdict: string,
    ifindex: number,
    packet: Packet | undefined,
    after: Uint8Array,
  ): string {
    const { subnets, endpoints, config } = this.#node;
    if (packet === undefined) return "it is no IPv4 packet";
    const source = formatIpv4(packet.source);
    const destination = formatIpv4(packet.destination);
    const peer = peerOf(subnets, packet.destination);
    const row = (each: SubnetRow): string =>
      `subnets4: ${formatCidr({ address: each.subnet, length: each.prefixLength })} is held by ${formatIpv4(each.publicIp)}`;
    const seen = packetIn(after);
    const ends = (each: Packet | undefined): string =>
      each === undefined
        ? "?"
        : `${end(each.source, each.sourcePort)} > ${end(each.destination, each.destinationPort)}`;
    const endpoint = endpoints.get(seen?.destination ?? 0);
    const behind = endpoint && this.#node.links.get(endpoint.ifindex)?.name;
    switch (verdict) {
      case "encapsulated":
        return peer === undefined ? "sent through the tunnel" : `${row(peer)}, through the tunnel`;
      case "routed":
        return peer === undefined ? "sent to its peer" : `${row(peer)}, on a network we share`;
      case "device":
        return peer === undefined
          ? "left to the tunnel device"
          : `${row(peer)}, by the kernel's tunnel device`;
      case "delivered":
      case "decapsulated":
        return behind === undefined
          ? `endpoints4 has no row for ${formatIpv4(seen?.destination ?? 0)} yet: sent by the kernel's route`
          : `endpoints4: ${formatIpv4(seen?.destination ?? 0)} is behind ${behind}`;
      case "masqueraded":
      case "repeated":
        return `connections4: ${ends(packet)} is ${ends(seen)} on the other side`;
      case "opened":
        return "taken out of the tunnel, and left to the stack behind the tunnel's device";
      case "stack_tunnel":
        return "a tunnel packet in order, which the kernel's device opens";
      case "stack_local":
        if (hook === "from_pod" && endpoints.get(packet.source)?.ifindex !== ifindex)
          return `endpoints4: ${source} is not behind this interface, so the stack decides`;
        return endpoints.has(packet.destination)
          ? `${destination} is behind the same interface`
          : `endpoints4 has no row for ${destination}`;
      case "stack_no_peer":
        return `subnets4 has no row that contains ${destination}`;
      case "stack_flow":
        return "the stack translates this flow, or must follow it";
      case "stack_off":
        return `the fast path is ${config.fast_path.slice("FAST_PATH_".length).toLowerCase()}`;
      case "stack_options":
        return "it has IP options";
      case "stack_ttl":
        return `its hop limit is ${packet.ttl}`;
      case "stack_too_big": {
        const mtu = peer?.mtu ?? endpoints.get(packet.destination)?.mtu;
        return `its ${packet.length} bytes are more than the next link takes${mtu === undefined ? "" : `, ${mtu}`}`;
      }
      case "stack_malformed":
        return "its headers do not add up";
      case "held":
        return "the first fragment of this packet has not come";
      case "drop_unknown_peer":
        return `peers4 has no row for ${source}`;
      case "drop_forged":
        return "what is in the tunnel does not come from a subnet of the peer that sent it";
      case "drop_malformed":
        return "a tunnel packet cut short";
      case "drop_fragment":
        return "a tunnel packet in pieces";
      case "drop_ttl":
        return "its hop limit ends in the tunnel, which counts as a hop";
      case "drop_unreachable":
        return peer === undefined
          ? "no Ethernet interface leads to its peer"
          : `no Ethernet interface leads to ${formatIpv4(peer.publicIp)}`;
      case "drop_ecn":
        return "marked congested outside, and not capable of the mark inside (RFC 6040)";
      case "drop_pod_tunnel":
        return `a pod must not speak to the tunnel port of ${destination}`;
      case "drop_masq_full":
        return "connections4 is full";
      case "drop_masq_ports":
        return `no port is left towards ${destination}`;
      case "drop_failed":
        return "the kernel refused a change half-way";
      default:
        return hook.startsWith("from_") && peer === undefined && packet.protocol !== PROTOCOLS.udp
          ? "not the programs' concern"
          : "nothing for this program to do";
    }
  }
}

function packetIn(frame: Uint8Array): Packet | undefined {
  const ethernet = readFrame(frame);
  return ethernet && readPacket(ethernet.ip);
}

function end(address: Ipv4, port: number | undefined): string {
  return port === undefined ? formatIpv4(address) : `${formatIpv4(address)}:${port}`;
}
