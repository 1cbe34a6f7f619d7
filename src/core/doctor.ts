/**
 * What is wrong with a host: facts in, findings out. Each check is an entry of `CHECKS`; it looks at facts that were
 * gathered beforehand and says of each thing that is wrong what it means and how it is mended. A fact that could not
 * be gathered leaves the checks that need it undone, and no others.
 *
 * A finding that others explain (nobody answers while the uplink is down) says so, and is not hidden: a host may have
 * two faults.
 */
import { kindOf } from "./backends.ts";
import { type Firewall, judgeInput, type PodTraffic, reasonsForStack } from "./firewall.ts";
import type { Address, Link, Route } from "./host.ts";
import {
  type AttachmentRow,
  attachmentKey,
  DIRECTIONS,
  type Hook,
  type InterfaceRow,
  ROUTE_PROTOCOL,
  type SubnetRow,
} from "./image.ts";
import {
  contains,
  formatCidr,
  formatIpv4,
  type Ipv4,
  networkOf,
  overlaps,
  type Prefix,
  parseCidr,
  parseIpv4,
} from "./ipv4.ts";
import { formatLeaseKey } from "./lease.ts";
import type { Lease, Network } from "./model.ts";
import { reservePorts } from "./ports.ts";
import { formatSubnetFile } from "./subnetfile.ts";

/** A problem stops packets or soon will; a warning costs something, or is a trap. */
export type Severity = "problem" | "warning";

/** One thing that is wrong. */
export interface Finding {
  /** Of the check. */
  readonly id: CheckId;
  readonly severity: Severity;
  /** What is so, of what. */
  readonly text: string;
  /** What it leads to. */
  readonly meaning: string;
  /** Commands for a root shell that mend it, in order; none where no command can know what is wanted. */
  readonly commands: readonly string[];
  /** What to do, or what to think of before the commands; may be empty. */
  readonly advice: string;
  /** Findings, by id, that may be the cause of this one. */
  readonly follows: readonly CheckId[];
}

/** Everything the checks came to. */
export interface Report {
  readonly findings: readonly Finding[];
  readonly unchecked: readonly { readonly id: CheckId; readonly reason: string }[];
  readonly sound: readonly { readonly id: CheckId; readonly what: string }[];
}

/** What was found out, or why it could not be. */
export type Fact<T> = { readonly value: T } | { readonly unknown: string };

/** What a daemon noted of itself. Fields may be missing in the note of an older version. */
export interface Noted {
  readonly version: string;
  readonly phase: string;
  readonly ready: boolean;
  readonly network?: Network;
  readonly uplink?: { readonly name: string; readonly address: string; readonly publicIp: string };
  readonly device?: string;
  readonly subnet?: string;
  readonly mtu?: number;
  readonly leaseEndsAt?: string;
  readonly failures: readonly { readonly what: string; readonly reason: string }[];
  readonly fastPath: string;
  readonly subnetFile?: string;
  readonly ipMasq?: boolean;
  readonly resyncSeconds?: number;
  readonly renewMarginMinutes?: number;
  readonly leaseTtlSeconds?: number;
  readonly store: { readonly connected: boolean; readonly error?: string };
}

/** A program of others that packets meet before ours. */
export interface ForeignProgram {
  readonly interface: string;
  readonly direction: "ingress" | "egress";
  readonly name: string;
  readonly by: "tcx" | "filter" | "xdp";
  /** Of a TCX link, or undefined. */
  readonly linkId: number | undefined;
  /** Of a filter, or undefined. */
  readonly priority: number | undefined;
}

export interface PinFacts {
  readonly missing: readonly string[];
  /** Maps whose layout is not that of this version. */
  readonly otherLayout: readonly string[];
}

/** What is in the maps, and what is attached. */
export interface DataplaneFacts {
  readonly attachments: readonly AttachmentRow[];
  readonly foreign: readonly ForeignProgram[];
  readonly tables: readonly { readonly map: string; readonly entries: number; readonly capacity: number }[];
  readonly subnets: readonly SubnetRow[];
  readonly interfaces: readonly InterfaceRow[];
  readonly masqPorts: { readonly first: number; readonly last: number } | undefined;
}

/** The way the kernel takes to an address; undefined where it has none. */
export interface Way {
  readonly address: Ipv4;
  readonly outIndex: number | undefined;
  /** Bytes of the largest packet, as far as the route and the interface tell. */
  readonly mtu: number | undefined;
}

export interface HostFacts {
  readonly links: readonly Link[];
  readonly addresses: readonly Address[];
  readonly routes: readonly Route[];
  /** Towards each peer's public address and the first address of its subnet. */
  readonly ways: readonly Way[];
}

export interface SysctlFacts {
  readonly ipForward: string | undefined;
  /** net.ipv4.conf.all.rp_filter */
  readonly rpFilterAll: string | undefined;
  readonly byInterface: Readonly<
    Record<string, { readonly forwarding: string | undefined; readonly rpFilter: string | undefined }>
  >;
  readonly reservedPorts: string | undefined;
}

export interface FlanneldFacts {
  readonly processes: readonly { readonly pid: number; readonly unit: string | undefined }[];
  /** Chains whose names begin like flanneld's, and nftables' tables. */
  readonly chains: readonly { readonly table: string; readonly name: string; readonly isUsed: boolean }[];
  readonly tables: readonly string[];
}

export interface EndpointFacts {
  readonly endpoint: string;
  /** Milliseconds of a round trip; undefined if there was no usable answer. */
  readonly latencyMs: number | undefined;
  readonly error: string | undefined;
  /** Of its clock against ours. */
  readonly skewMs: number | undefined;
  readonly certificates: readonly Certificate[];
}

export interface Certificate {
  readonly subject: string;
  /** Milliseconds since the epoch. */
  readonly from: number;
  readonly to: number;
}

/** A lease as it is in etcd. */
export interface StoredLease extends Lease {
  /** mod_revision. */
  readonly revision: bigint;
}

export interface EtcdFacts {
  readonly prefix: string;
  readonly endpoints: readonly EndpointFacts[];
}

export interface LeaseFacts {
  readonly leases: readonly StoredLease[];
  /** Seconds that our own lease has left; undefined if it never ends or there is none. */
  readonly ownLeftSeconds: number | undefined;
}

export interface PeerAnswer {
  readonly subnet: Prefix;
  readonly publicIp: Ipv4;
  /** Why there was no answer; undefined if there was one. */
  readonly lost: string | undefined;
}

/** All that is looked at. */
export interface Facts {
  /** Milliseconds since the epoch. */
  readonly now: number;
  /** Of this program. */
  readonly version: string;
  readonly kernel: Fact<{ readonly missing: readonly { readonly feature: string; readonly use: string }[] }>;
  readonly btf: Fact<boolean>;
  readonly bpffs: Fact<{ readonly path: string; readonly mounted: boolean }>;
  readonly noted: Fact<Noted>;
  readonly daemon: Fact<{
    readonly pinPath: string;
    readonly pid: number | undefined;
    readonly stopped: boolean;
    /** When it wrote its status, milliseconds since the epoch; undefined if it never did. */
    readonly writtenAt: number | undefined;
  }>;
  /** Tunnel devices of other daemons that run here. */
  readonly devicesBeside: Fact<readonly string[]>;
  readonly pins: Fact<PinFacts>;
  readonly dataplane: Fact<DataplaneFacts>;
  readonly host: Fact<HostFacts>;
  readonly sysctls: Fact<SysctlFacts>;
  /** Undefined if there is no such file. */
  readonly subnetFile: Fact<string | undefined>;
  readonly flanneld: Fact<FlanneldFacts>;
  readonly firewall: Fact<Firewall>;
  readonly etcd: Fact<EtcdFacts>;
  readonly leases: Fact<LeaseFacts>;
  readonly clientCertificates: Fact<{ readonly path: string; readonly certificates: readonly Certificate[] }>;
  readonly authorities: Fact<{ readonly path: string; readonly certificates: readonly Certificate[] }>;
  readonly peers: Fact<readonly PeerAnswer[]>;
}

/** A check could not be carried out. */
class Unknown extends Error {}

function known<T>(fact: Fact<T>): T {
  if ("unknown" in fact) throw new Unknown(fact.unknown);
  return fact.value;
}

/** Process id of the daemon, for checks of one that runs. */
function running(daemon: Facts["daemon"]): number {
  const { pid } = known(daemon);
  if (pid === undefined) throw new Unknown("twilld does not run");
  return pid;
}

type Trouble = Omit<Finding, "id" | "follows" | "commands" | "advice"> & {
  readonly commands?: readonly string[];
  readonly advice?: string;
};

interface Check {
  /** What is checked, as a line that is true where all is well. */
  readonly what: string;
  readonly look: (facts: Facts) => Iterable<Trouble>;
}

/** Of one check, more than so many are not told one by one. */
const FINDINGS_MAX = 16;
const RESTART = "systemctl restart twilld";
const TABLE_MAIN = 254;
const TABLE_LOCAL = 255;
const RTN_UNICAST = 1;
const ROUTE_TYPES: Readonly<Record<number, string>> = { 6: "blackhole", 7: "unreachable", 8: "prohibit" };
const PROTOCOL_KERNEL = 2;
const PROTOCOL_UDP = 17;
/** A table that is this full will be full soon. */
const FULL = 0.9;
const SLOW_MS = 1000;
const SKEW_WARNING_MS = 10_000;
const SKEW_PROBLEM_MS = 300_000;
const DAY_MS = 86_400_000;
/** A certificate is to be renewed when less is left, or less than this part of its life. */
const EXPIRY_MS = 30 * DAY_MS;
const EXPIRY_PART = 0.2;
const RENEW_MARGIN_MINUTES = 60;
/** A daemon that has not written its status for so many comparisons, and some seconds, does not do its work. */
const STALE_RESYNCS = 3;
const STALE_SECONDS = 30;
const BRIDGES = ["docker0", "cni0", "cbr0"];

const CHECKS = {
  "kernel-features": {
    what: "the kernel has what the programs need",
    look: function* ({ kernel }) {
      for (const { feature, use } of known(kernel).missing) {
        yield {
          severity: "problem",
          text: `the kernel lacks ${feature}`,
          meaning: `it is needed for ${use}`,
          advice: "boot a newer kernel: Linux 5.10 at least, 5.15 for --ip-masq",
        };
      }
    },
  },
  "kernel-btf": {
    what: "the kernel describes its types (BTF)",
    look: function* ({ btf }) {
      if (known(btf)) return;
      yield {
        severity: "problem",
        text: "/sys/kernel/btf/vmlinux is missing",
        meaning: "timers and spin locks in maps, which masquerade needs, cannot be loaded",
        advice: "boot a kernel built with CONFIG_DEBUG_INFO_BTF, as distributions' are",
      };
    },
  },
  bpffs: {
    what: "the BPF file system is mounted",
    look: function* ({ bpffs }) {
      const { path, mounted } = known(bpffs);
      if (mounted) return;
      yield {
        severity: "problem",
        text: `${path} is on no BPF file system`,
        meaning:
          "programs and maps have no pins: they end with the daemon, and a restart begins with empty maps",
        commands: ["mount -t bpf bpf /sys/fs/bpf"],
        advice: "to keep it over a reboot, see to it that systemd's sys-fs-bpf.mount is not masked",
      };
    },
  },
  "daemon-running": {
    what: "twilld runs",
    look: function* ({ daemon }) {
      const { pinPath, pid, writtenAt } = known(daemon);
      if (pid !== undefined) return;
      yield {
        severity: "problem",
        text:
          writtenAt === undefined
            ? `no twilld has run with --pin-path=${pinPath}`
            : `twilld does not run; it ran with --pin-path=${pinPath}`,
        meaning:
          writtenAt === undefined
            ? "this node has no subnet and forwards nothing of the network"
            : "forwarding goes on as it was; peers and pods that come are not known, and the lease is not renewed",
        commands: ["systemctl start twilld"],
        advice: "if it ends again, its log says why: journalctl -u twilld",
      };
    },
  },
  "daemon-status": {
    what: "twilld is at work",
    look: function* ({ daemon, noted, now }) {
      const { stopped, writtenAt } = known(daemon);
      const pid = running(daemon);
      if (stopped) {
        yield {
          severity: "problem",
          text: `twilld (process ${pid}) is stopped by a signal`,
          meaning:
            "forwarding goes on as it was; peers and pods that come are not known, and the lease is not renewed",
          commands: [`kill -CONT ${pid}`],
        };
        return;
      }
      const { resyncSeconds = 10 } = known(noted);
      const age = (now - (writtenAt ?? now)) / 1000;
      if (age <= STALE_RESYNCS * resyncSeconds + STALE_SECONDS) return;
      yield {
        severity: "warning",
        text: `twilld (process ${pid}) wrote its status ${Math.round(age)} s ago, and should each ${resyncSeconds} s`,
        meaning: "it hangs, or cannot write to /run/twill; what `twill` shows of it is old",
        commands: [RESTART],
      };
    },
  },
  "daemon-ready": {
    what: "twilld is ready",
    look: function* ({ daemon, noted }) {
      running(daemon);
      const { ready, phase } = known(noted);
      if (ready) return;
      yield {
        severity: "problem",
        text: `twilld is not ready: ${phase}`,
        meaning: "subnet.env is not written, or not for this subnet, and pods are not forwarded yet",
        advice: "the other findings and `twill status` say what it waits for",
      };
    },
  },
  "daemon-failing": {
    what: "twilld succeeds in what it does",
    look: function* ({ daemon, noted }) {
      running(daemon);
      const { failures, store } = known(noted);
      for (const { what, reason } of failures) {
        yield {
          severity: "problem",
          text: `${what}: ${reason}`,
          meaning: "twilld tries it again and again; until then the kernel is not as the leases say",
          advice: "mend what the reason names; nothing has to be restarted",
        };
      }
      if (store.connected) return;
      yield {
        severity: "problem",
        text: `twilld has no connection to etcd${store.error === undefined ? "" : `: ${store.error}`}`,
        meaning: "forwarding goes on as it was; peers that come are not known, and the lease is not renewed",
        advice: "mend what the reason names; nothing has to be restarted",
      };
    },
  },
  "daemon-version": {
    what: "twilld and its programs are of this version",
    look: function* ({ noted, daemon, version, pins }) {
      const { pid } = known(daemon);
      const { version: running } = known(noted);
      if (pid !== undefined && running !== version) {
        yield {
          severity: "warning",
          text: `twilld ${running} runs, ${version} is installed`,
          meaning: "an upgrade takes effect with the next start",
          commands: [RESTART],
        };
        return;
      }
      const { otherLayout } = known(pins);
      if (otherLayout.length === 0) return;
      yield {
        severity: "warning",
        text: `the maps ${otherLayout.join(", ")} are those of another version`,
        meaning: "the programs that run are not the installed ones, and `twill` may misread their maps",
        commands: [RESTART],
      };
    },
  },
  pins: {
    what: "all maps and programs are pinned",
    look: function* ({ pins, noted, daemon }) {
      if (known(noted).subnet === undefined) return;
      const { missing } = known(pins);
      if (missing.length === 0) return;
      yield {
        severity: "warning",
        text: `not pinned at ${known(daemon).pinPath}: ${listed(missing)}`,
        meaning:
          "what is not pinned ends with the daemon and cannot be looked at; the daemon pins it again by itself",
        commands: [RESTART],
      };
    },
  },
  programs: {
    what: "programs are attached where they belong",
    look: function* ({ dataplane, noted, host }) {
      const { attachments, interfaces } = known(dataplane);
      const { network, uplink, device } = known(noted);
      if (network === undefined || !kindOf(network.backend).forwards) return;
      const links = known(host).links.filter(({ up }) => up);
      const have = new Set(attachments.map(attachmentKey));
      const wanted: [Link | undefined, Hook][] = [
        [links.find(({ name }) => name === uplink?.name), "from_net"],
        [links.find(({ name }) => name === device), "to_overlay"],
        [links.find(({ name }) => name === device), "from_overlay"],
        ...interfaces.map(
          ({ ifindex }) =>
            [links.find(({ index }) => index === ifindex), "from_pod"] as [Link | undefined, Hook],
        ),
      ];
      const missing = wanted.flatMap(([link, hook]) =>
        link !== undefined && !have.has(attachmentKey({ ifindex: link.index, hook }))
          ? [`${hook} (${DIRECTIONS[hook]} of ${link.name})`]
          : [],
      );
      if (missing.length === 0) return;
      yield {
        severity: "warning",
        text: `not attached: ${listed(missing)}`,
        meaning: "these packets go through the stack; the daemon attaches the programs again by itself",
        commands: [RESTART],
      };
    },
  },
  "foreign-programs": {
    what: "no program of others runs before ours",
    look: function* ({ dataplane }) {
      for (const program of known(dataplane).foreign) {
        const { name, by, direction, linkId, priority } = program;
        const device = word(program.interface);
        const kind = { tcx: "TCX program", filter: "tc filter", xdp: "XDP program" }[by];
        const commands =
          by === "filter"
            ? [`tc filter del dev ${device} ${direction} prio ${priority}`]
            : by === "xdp"
              ? [`ip link set dev ${device} xdp off`]
              : linkId === undefined
                ? []
                : [`bpftool link detach id ${linkId}`];
        yield {
          severity: "warning",
          text: `${kind} ${name} runs at ${direction} of ${program.interface} before Twill's`,
          meaning:
            "packets that it drops, redirects or changes do not come to Twill's programs as they were sent",
          commands,
          advice: "if it is meant to be there, leave it: then this is only to be known",
        };
      }
    },
  },
  uplink: {
    what: "the uplink is up and has its address",
    look: function* ({ noted, host }) {
      const { uplink } = known(noted);
      if (uplink === undefined) return;
      const { links, addresses } = known(host);
      const link = links.find(({ name }) => name === uplink.name);
      const meaning = "peers cannot reach this node, nor it them";
      if (link === undefined) {
        yield {
          severity: "problem",
          text: `the uplink ${uplink.name} is gone`,
          meaning,
          advice: "bring the interface back, or give twilld another with --iface",
        };
        return;
      }
      if (!link.up) {
        yield {
          severity: "problem",
          text: `the uplink ${uplink.name} is down`,
          meaning,
          commands: [`ip link set dev ${word(uplink.name)} up`],
          advice:
            "routes by it, the default route too, went away with it: let the network's own service restore them",
        };
        return;
      }
      if (!link.running) {
        yield {
          severity: "problem",
          text: `the uplink ${uplink.name} has no carrier`,
          meaning,
          advice: "look at the cable, the switch's port, or the virtual machine's network",
        };
        return;
      }
      const own = parseIpv4(uplink.address);
      if (addresses.some(({ index, address }) => index === link.index && address === own)) return;
      yield {
        severity: "problem",
        text: `the uplink ${uplink.name} has lost its address ${uplink.address}`,
        meaning,
        advice: `give it the address again (ip address add ${uplink.address}/LENGTH dev ${word(uplink.name)}); one that has changed for good is published by twilld itself`,
      };
    },
  },
  "tunnel-device": {
    what: "the tunnel device is as it should be",
    look: function* ({ noted, host }) {
      const { device, mtu, subnet } = known(noted);
      if (device === undefined || subnet === undefined) return;
      const { links, addresses } = known(host);
      const link = links.find(({ name }) => name === device);
      const address = parseCidr(subnet)?.address;
      const wrong =
        link === undefined
          ? "is missing"
          : !link.up
            ? "is down"
            : mtu !== undefined && link.mtu !== mtu
              ? `has an MTU of ${link.mtu}, and should have ${mtu}`
              : addresses.some((row) => row.index === link.index && row.address === address)
                ? undefined
                : `has lost its address ${subnet.replace(/\/.*/, "/32")}`;
      if (wrong === undefined) return;
      yield {
        severity: "problem",
        text: `the tunnel device ${device} ${wrong}`,
        meaning: "packets between this node and its peers that the stack forwards are lost",
        commands: [RESTART],
      };
    },
  },
  "tunnel-taken": {
    what: "no other device has the tunnel's VNI and port",
    look: function* ({ noted, host }) {
      const { device, network } = known(noted);
      if (device === undefined || network?.backend.type !== "vxlan") return;
      const { vni, port } = network.backend;
      for (const { name, vxlan } of known(host).links) {
        if (vxlan === undefined || name === device || vxlan.dstPort !== port) continue;
        if (vxlan.vni !== vni && !vxlan.collectMetadata) continue;
        yield {
          severity: "problem",
          text: `${name} is a VXLAN device on UDP port ${port}${vxlan.collectMetadata ? ", for all VNIs" : ` with VNI ${vni}`}`,
          meaning: `the kernel allows no second one, so that ${device} cannot be made, or gets none of its packets`,
          commands: [`ip link del dev ${word(name)}`],
          advice:
            "or give the network another Backend.VNI or Backend.Port in its config, on all nodes at once",
        };
      }
    },
  },
  "ip-forward": {
    what: "the kernel forwards packets",
    look: function* ({ sysctls }) {
      const { ipForward } = known(sysctls);
      if (ipForward !== "0") return;
      yield {
        severity: "problem",
        text: "net.ipv4.ip_forward is 0",
        meaning:
          "packets of pods that the stack is to forward are dropped: services, the outside, other backends' peers",
        commands: ["sysctl -w net.ipv4.ip_forward=1"],
        advice: "to keep it over a reboot, write it to a file in /etc/sysctl.d",
      };
    },
  },
  "interface-forwarding": {
    what: "each interface on the way forwards",
    look: function* (facts) {
      const { ipForward, byInterface } = known(facts.sysctls);
      if (ipForward === "0") return;
      for (const name of interfacesOnTheWay(facts)) {
        if (byInterface[name]?.forwarding !== "0") continue;
        yield {
          severity: "problem",
          text: `net.ipv4.conf.${name}.forwarding is 0`,
          meaning: `the stack drops what comes in by ${name} and is not for this node`,
          commands: [`sysctl -w ${sysctlKey(name, "forwarding")}=1`],
        };
      }
    },
  },
  "rp-filter": {
    what: "no reverse path filter drops what peers send",
    look: function* (facts) {
      const { rpFilterAll, byInterface } = known(facts.sysctls);
      const { links, ways } = known(facts.host);
      const { subnets } = known(facts.dataplane);
      const { uplink, device } = known(facts.noted);
      const nameOf = (ifindex: number | undefined): string | undefined =>
        links.find(({ index }) => index === ifindex)?.name;
      const wayTo = (address: Ipv4): string | undefined =>
        nameOf(ways.find((way) => way.address === address)?.outIndex);
      const told = new Set<string>();
      for (const row of subnets) {
        const arrivals: [string | undefined, Ipv4][] = [[uplink?.name, row.publicIp]];
        if (row.reach === "REACH_DIRECT") arrivals.push([nameOf(row.ifindex), firstOf(row)]);
        else arrivals.push([device, firstOf(row)]);
        for (const [arrival, source] of arrivals) {
          const back = wayTo(source);
          if (arrival === undefined || back === undefined || back === arrival) continue;
          const strictness = Math.max(Number(rpFilterAll), Number(byInterface[arrival]?.rpFilter));
          if (strictness !== 1 || told.has(arrival)) continue;
          told.add(arrival);
          yield {
            severity: "problem",
            text: `rp_filter of ${arrival} is strict, and the way back to ${formatIpv4(source)} is by ${back}`,
            meaning: `the kernel drops what comes from there by ${arrival}`,
            commands: [`sysctl -w ${sysctlKey(arrival, "rp_filter")}=2`],
            advice: "2 is loose: the source must be reachable by any interface; or mend the route",
          };
        }
      }
    },
  },
  "mtu-pods": {
    what: "pods send no larger packets than the network carries",
    look: function* (facts) {
      const { mtu } = known(facts.noted);
      const { links } = known(facts.host);
      const { interfaces } = known(facts.dataplane);
      if (mtu === undefined) return;
      const indexes = new Set(interfaces.map(({ ifindex }) => ifindex));
      for (const link of links) {
        if (link.mtu <= mtu || !indexes.has(link.index)) continue;
        // Docker's bridge gets its MTU with its first port.
        if (link.kind === "bridge" && !links.some(({ masterIndex }) => masterIndex === link.index)) continue;
        // A port is made with the MTU of its bridge; the bridge, if it is too large as well, is the one to tell of.
        const master = links.find(({ index }) => index === link.masterIndex);
        if (master !== undefined && master.mtu > mtu && indexes.has(master.index)) continue;
        yield {
          severity: "warning",
          text: `${link.name} has an MTU of ${link.mtu}, and the network carries packets of ${mtu} bytes`,
          meaning:
            "larger packets come back with an ICMP error first; senders that ignore it, or set no such flag, stall or are fragmented",
          commands: [`ip link set dev ${word(link.name)} mtu ${mtu}`],
          advice:
            "pods that run keep theirs: start them anew, after giving Docker or CNI the MTU of subnet.env",
        };
      }
    },
  },
  "mtu-path": {
    what: "the way to each peer takes packets of the network's size",
    look: function* ({ noted, dataplane, host }) {
      const { mtu, network } = known(noted);
      if (mtu === undefined || network === undefined) return;
      const { links, ways } = known(host);
      const tunnel = overheadOf(network);
      for (const row of known(dataplane).subnets) {
        const way = ways.find(({ address }) => address === row.publicIp);
        const needed = mtu + (row.reach === "REACH_DIRECT" ? 0 : tunnel);
        if (way?.mtu === undefined || way.mtu >= needed) continue;
        const name = links.find(({ index }) => index === way.outIndex)?.name;
        yield {
          severity: "warning",
          text: `the way to peer ${peerName(row)} by ${name} takes packets of ${way.mtu} bytes, and those of pods come to ${needed}`,
          meaning:
            "larger ones are fragmented, or come back with an ICMP error: slow, and senders that ignore it stall",
          advice: `raise the MTU of the route or the interface (ip route get ${formatIpv4(row.publicIp)}), or set Backend.MTU to ${way.mtu} in the network config`,
        };
      }
    },
  },
  "route-clash": {
    what: "no route of others lies in the network",
    look: function* (facts) {
      const { network, subnet, device } = known(facts.noted);
      const own = subnet === undefined ? undefined : parseCidr(subnet);
      if (network === undefined || own === undefined) return;
      const { links, routes, addresses } = known(facts.host);
      const { subnets } = known(facts.dataplane);
      const nameOf = (index: number | undefined): string | undefined =>
        links.find((link) => link.index === index)?.name;
      for (const route of routes) {
        const { destination, table, type, protocol } = route;
        if (table === TABLE_LOCAL || (type !== RTN_UNICAST && ROUTE_TYPES[type] === undefined)) continue;
        if (!overlaps(network.network, destination) || destination.length < network.network.length) continue;
        if (own.length <= destination.length && contains(own, destination.address)) continue;
        const name = nameOf(route.outIndex);
        if (protocol === ROUTE_PROTOCOL || (name !== undefined && (name === device || isBridge(name))))
          continue;
        const peer = subnets.find((row) => overlaps(prefixOf(row), destination));
        const isSame = peer?.prefixLength === destination.length && peer.subnet === destination.address;
        // Ours has metric 0, and beats any other of the same length.
        if (isSame && table === TABLE_MAIN && route.metric > 0) continue;
        // flanneld's own for a peer, which twilld takes over.
        if (isSame && table === TABLE_MAIN && route.gateway !== undefined) continue;
        const text = routeText(route, name);
        const connected = addresses.find(
          (row) =>
            row.index === route.outIndex &&
            row.prefixLength === destination.length &&
            networkOf(row.address, row.prefixLength) === destination.address,
        );
        yield {
          severity: peer === undefined ? "warning" : "problem",
          text: `the route ${text} lies in the network ${formatCidr(network.network)}`,
          meaning:
            peer === undefined
              ? "a peer that leases a subnet there will not be reached"
              : `packets for pods of peer ${peerName(peer)} that it covers are led astray`,
          commands:
            protocol === PROTOCOL_KERNEL && connected !== undefined && name !== undefined
              ? [
                  `ip address del ${formatIpv4(connected.address)}/${connected.prefixLength} dev ${word(name)}`,
                ]
              : [`ip route del ${text}`],
          advice: "if whoever made it needs it, one of the two networks must move",
        };
      }
    },
  },
  "flanneld-running": {
    what: "flanneld does not run",
    look: function* ({ flanneld }) {
      for (const { pid, unit } of known(flanneld).processes) {
        yield {
          severity: "problem",
          text: `flanneld runs (process ${pid}${unit === undefined ? "" : `, ${unit}`})`,
          meaning: "two daemons renew one lease and write the same routes; each undoes the other's work",
          commands: [unit === undefined ? `kill ${pid}` : `systemctl disable --now ${word(unit)}`],
        };
      }
    },
  },
  "flanneld-rules": {
    what: "no rules of flanneld are left",
    look: function* ({ flanneld }) {
      const { chains, tables } = known(flanneld);
      for (const { table, name, isUsed } of chains) {
        const chain = FLANNELD_CHAINS[name];
        const [, kind = "", legacy] = /^ip (\w+)( \(legacy\))?$/.exec(table) ?? [];
        if (chain === undefined || kind === "") continue;
        const iptables = `${legacy === undefined ? "iptables-nft" : "iptables-legacy"} -t ${kind}`;
        const jump = `${iptables} -D ${chain.base} -m comment --comment "${chain.comment}" -j ${name}`;
        yield {
          severity: "warning",
          text: `chain ${name} of table ${table} is flanneld's`,
          meaning: isUsed ? chain.meaning : "no rule leads there; it is only in the way",
          commands: [...(isUsed ? [jump] : []), `${iptables} -F ${name}`, `${iptables} -X ${name}`],
        };
      }
      for (const table of tables) {
        if (!/^ip6? flannel-ipv[46]$/.test(table)) continue;
        yield {
          severity: "warning",
          text: `nftables' table ${table} is flanneld's`,
          meaning: "what it masquerades loses its source address once more, and goes through the stack",
          commands: [`nft delete table ${table}`],
        };
      }
    },
  },
  "flanneld-device": {
    what: "no tunnel device is left over",
    look: function* ({ noted, host, devicesBeside }) {
      const { device } = known(noted);
      const beside = known(devicesBeside);
      for (const { name, kind } of known(host).links) {
        if (!/^flannel\.\d+$/.test(name) || kind !== "vxlan" || name === device || beside.includes(name))
          continue;
        yield {
          severity: "warning",
          text: `the tunnel device ${name} belongs to nobody`,
          meaning:
            "flanneld, or another config, has left it; it holds its UDP port and VNI, and what routes lead there is lost",
          commands: [`ip link del dev ${word(name)}`],
          advice: "unless a flanneld with another network is to run here again",
        };
      }
    },
  },
  "stale-routes": {
    what: "each route to a peer has its lease",
    look: function* ({ noted, host, leases, daemon }) {
      const { network, subnet, device } = known(noted);
      if (network === undefined || subnet === undefined) return;
      const { links, routes } = known(host);
      const current = known(leases).leases;
      if (known(daemon).pid !== undefined) return;
      for (const route of routes) {
        const { destination, table, protocol, outIndex } = route;
        const name = links.find(({ index }) => index === outIndex)?.name;
        if (table !== TABLE_MAIN || !contains(network.network, destination.address)) continue;
        if (protocol !== ROUTE_PROTOCOL && (name === undefined || name !== device)) continue;
        if (formatCidr(destination) === subnet) continue;
        const isLeased = ({ subnet: held }: StoredLease): boolean =>
          formatCidr(held) === formatCidr(destination);
        if (current.some(isLeased)) continue;
        yield {
          severity: "warning",
          text: `the route ${routeText(route, name)} is for a subnet that nobody leases`,
          meaning: "its peer went while no daemon ran; packets for it are sent to where nobody is",
          commands: [`ip route del ${routeText(route, name)}`],
        };
      }
    },
  },
  "firewall-pods": {
    what: "no firewall rule concerns what pods send to each other",
    look: function* (facts) {
      const { network, fastPath } = known(facts.noted);
      const firewall = known(facts.firewall);
      if (network === undefined || fastPath === "off") return;
      const reasons = reasonsForStack(firewall, podTraffic(facts, network));
      for (const reason of reasons) {
        yield {
          severity: "warning",
          text: reason,
          meaning:
            fastPath === "always"
              ? "with --fast-path=always the rule is not obeyed between pods"
              : "all packets between pods go through the stack, so that the rule is obeyed: right, but slower",
          advice:
            "a rule that is not meant for pods can be given the interfaces or addresses it is meant for; see nft list ruleset, or iptables -S",
        };
      }
    },
  },
  "firewall-tunnel": {
    what: "the firewall lets tunnel packets in",
    look: function* (facts) {
      const { network, uplink } = known(facts.noted);
      const firewall = known(facts.firewall);
      const { subnets } = known(facts.dataplane);
      const port = network !== undefined && "port" in network.backend ? network.backend.port : undefined;
      const destination = parseIpv4(uplink?.address ?? "");
      if (uplink === undefined || destination === undefined || port === undefined) return;
      for (const { publicIp, reach } of subnets) {
        if (reach === "REACH_DIRECT") continue;
        const packet = { input: uplink.name, source: publicIp, destination, protocol: PROTOCOL_UDP, port };
        const { verdict, by } = judgeInput(firewall, packet);
        const isLost = (): boolean =>
          known(facts.peers).some((peer) => peer.publicIp === publicIp && peer.lost !== undefined);
        if (verdict === "accept" || (verdict === "perhaps" && !isLost())) continue;
        const legacy = by?.includes("(legacy)") ? "iptables-legacy" : "iptables";
        const isIptables = by?.startsWith("chain INPUT of table ip filter") ?? false;
        yield {
          severity: "problem",
          text: `${by} ${verdict === "drop" ? "drops" : "may drop"} UDP port ${port} from peers (${formatIpv4(publicIp)})`,
          meaning: "what peers send by the tunnel is lost",
          commands: isIptables ? [`${legacy} -I INPUT -p udp --dport ${port} -j ACCEPT`] : [],
          advice: isIptables
            ? `put it where your rules are kept, too; only peers need it (-s ${formatIpv4(publicIp)})`
            : `let UDP port ${port} of ${uplink.name} in, in that chain`,
        };
        return;
      }
    },
  },
  "subnet-file": {
    what: "subnet.env says what the lease says",
    look: function* ({ noted, subnetFile }) {
      const { network, subnet, mtu, subnetFile: path, ipMasq = false } = known(noted);
      const prefix = subnet === undefined ? undefined : parseCidr(subnet);
      if (path === undefined || network === undefined || prefix === undefined || mtu === undefined) return;
      const text = known(subnetFile);
      const expected = formatSubnetFile({ network: network.network, subnet: prefix, mtu, ipMasq });
      if (text === expected) return;
      yield {
        severity: "problem",
        text:
          text === undefined
            ? `${path} is missing`
            : `${path} does not say what twilld leased (${subnet}, MTU ${mtu})`,
        meaning:
          "Docker or CNI will give the next pods addresses or an MTU that are not this node's, or none",
        commands: [RESTART],
        advice: "twilld writes it at its start; find out who else writes it",
      };
    },
  },
  "bridge-address": {
    what: "the pods' bridge is in this node's subnet",
    look: function* ({ noted, host }) {
      const { subnet } = known(noted);
      const prefix = subnet === undefined ? undefined : parseCidr(subnet);
      if (prefix === undefined) return;
      const { links, addresses, routes } = known(host);
      const inSubnet = ({ address }: Address): boolean =>
        contains(prefix, address) && address !== prefix.address;
      const bridges = links.filter(({ kind }) => kind === "bridge");
      if (addresses.some((row) => inSubnet(row) && bridges.some(({ index }) => index === row.index))) return;
      // Pods may be reached without a bridge, by a route each.
      const isPods = ({ table, destination }: Route): boolean =>
        table === TABLE_MAIN && destination.length === 32 && contains(prefix, destination.address);
      if (routes.some(isPods)) return;
      for (const { index, name } of bridges) {
        if (!BRIDGES.includes(name)) continue;
        const [row] = addresses.filter((address) => address.index === index);
        const has = row === undefined ? "no address" : `${formatIpv4(row.address)}/${row.prefixLength}`;
        yield {
          severity: "problem",
          text: `${name} has ${has}, and this node's subnet is ${subnet}`,
          meaning: "its pods have addresses that no peer sends here",
          commands: name === "docker0" ? ["systemctl restart docker"] : [`ip link del dev ${word(name)}`],
          advice:
            name === "docker0"
              ? "Docker must be started with --bip and --mtu of subnet.env, as deploy/ shows"
              : "CNI makes it anew with the next pod; the pods on it must be started anew",
        };
      }
    },
  },
  "masquerade-ports": {
    what: "ports of masqueraded connections are kept from the node's own sockets",
    look: function* ({ noted, dataplane, sysctls }) {
      if (known(noted).ipMasq !== true) return;
      const { masqPorts } = known(dataplane);
      if (masqPorts === undefined) return;
      const { reservedPorts } = known(sysctls);
      const wanted = `${masqPorts.first}-${masqPorts.last}`;
      const { reserved, ours } = reservePorts(reservedPorts ?? "", "", wanted);
      if (ours === "") return;
      yield {
        severity: "warning",
        text: `net.ipv4.ip_local_reserved_ports lacks ${ours}`,
        meaning:
          "a socket of the node may get a port of a masqueraded connection; one of the two then loses its packets",
        commands: [`sysctl -w net.ipv4.ip_local_reserved_ports=${reserved}`],
      };
    },
  },
  "table-full": {
    what: "all tables have room",
    look: function* ({ dataplane }) {
      for (const { map, entries, capacity } of known(dataplane).tables) {
        if (capacity <= 1 || entries < FULL * capacity) continue;
        yield {
          severity: "warning",
          text: `${map} holds ${entries} of ${capacity} entries`,
          meaning:
            map === "connections4"
              ? "when it is full, new connections of pods to the outside are refused"
              : "when it is full, what comes then goes through the stack, or is not reached",
          advice:
            map === "connections4"
              ? "start twilld with a larger --masq-max-connections; connections go on. `twill connections` shows who has them"
              : "the network is larger than Twill was built for",
        };
      }
    },
  },
  "etcd-endpoint": {
    what: "each endpoint of etcd answers",
    look: function* ({ etcd }) {
      const { endpoints } = known(etcd);
      const dead = endpoints.filter(({ latencyMs }) => latencyMs === undefined);
      const isAll = dead.length === endpoints.length;
      for (const { endpoint, error } of dead) {
        yield {
          severity: isAll ? "problem" : "warning",
          text: error ?? `etcd at ${endpoint} does not answer`,
          meaning: isAll
            ? "forwarding goes on as it was; peers that come are not known, and the lease is not renewed"
            : "others answer; with each that does not, etcd is nearer to its end",
          advice: `on the etcd host: see that etcd runs and listens; from here: curl ${endpoint}/version`,
        };
      }
    },
  },
  "etcd-latency": {
    what: "etcd answers soon",
    look: function* ({ etcd }) {
      for (const { endpoint, latencyMs } of known(etcd).endpoints) {
        if (latencyMs === undefined || latencyMs < SLOW_MS) continue;
        yield {
          severity: "warning",
          text: `etcd at ${endpoint} takes ${Math.round(latencyMs)} ms to answer`,
          meaning: "new peers are known late, and calls may run out of time",
          advice: "look at etcd's disk and load, and at the way to it",
        };
      }
    },
  },
  clock: {
    what: "the clock agrees with etcd's",
    look: function* ({ etcd }) {
      const skews = known(etcd).endpoints.flatMap(({ endpoint, skewMs }) =>
        skewMs === undefined ? [] : [{ endpoint, skewMs }],
      );
      if (skews.length === 0) throw new Unknown("no endpoint of etcd told its time");
      // Where the members disagree, the one that is nearest speaks for us.
      const [best] = skews.sort((a, b) => Math.abs(a.skewMs) - Math.abs(b.skewMs));
      if (best === undefined || Math.abs(best.skewMs) < SKEW_WARNING_MS) return;
      const seconds = Math.round(Math.abs(best.skewMs) / 1000);
      yield {
        severity: Math.abs(best.skewMs) < SKEW_PROBLEM_MS ? "warning" : "problem",
        text: `this node's clock is ${seconds} s ${best.skewMs > 0 ? "behind" : "ahead of"} that of etcd at ${best.endpoint}`,
        meaning:
          "certificates may count as expired or not yet valid, and logs do not fit together; leases do not depend on it",
        commands: ["timedatectl set-ntp true"],
        advice: "see that a time service runs, here and there: timedatectl status, chronyc tracking",
      };
    },
  },
  "certificate-client": {
    what: "our certificate for etcd is in force",
    look: function* ({ clientCertificates, now }) {
      const { path, certificates } = known(clientCertificates);
      const [own] = certificates;
      if (own === undefined) return;
      yield* expiry(
        own,
        now,
        `the client certificate ${path}`,
        "etcd refuses this node",
        "have it signed anew, and put it in the place of the old one: twilld takes it into use by itself",
      );
    },
  },
  "certificate-ca": {
    what: "etcd's CA certificate is in force",
    look: function* ({ authorities, now }) {
      const { path, certificates } = known(authorities);
      // A bundle may keep an expired one beside its successor.
      const [last] = [...certificates].sort((a, b) => b.to - a.to);
      if (last === undefined) return;
      yield* expiry(
        last,
        now,
        `the CA certificate ${path}`,
        "etcd's certificate cannot be trusted",
        "put the new CA certificate beside the old one in that file, and have the others signed by it",
      );
    },
  },
  "certificate-server": {
    what: "etcd's own certificates are in force",
    look: function* ({ etcd, now }) {
      for (const { endpoint, certificates } of known(etcd).endpoints) {
        const [own] = certificates;
        if (own === undefined) continue;
        yield* expiry(
          own,
          now,
          `the certificate of etcd at ${endpoint}`,
          "no node can talk to that member",
          "renew it on the etcd host",
        );
      }
    },
  },
  lease: {
    what: "the lease is ours and is renewed in time",
    look: function* ({ noted, leases, etcd }) {
      const {
        subnet,
        uplink,
        renewMarginMinutes = RENEW_MARGIN_MINUTES,
        leaseTtlSeconds = 86400,
      } = known(noted);
      const prefix = subnet === undefined ? undefined : parseCidr(subnet);
      if (prefix === undefined || uplink === undefined) return;
      const { leases: all, ownLeftSeconds } = known(leases);
      const key = `${known(etcd).prefix}/subnets/${formatLeaseKey(prefix)}`;
      const own = all.find(({ subnet: held }) => formatCidr(held) === subnet);
      if (own === undefined || formatIpv4(own.publicIp) !== uplink.publicIp) {
        yield {
          severity: "problem",
          text:
            own === undefined
              ? `${key} is missing in etcd`
              : `${key} is held by ${formatIpv4(own.publicIp)}, and this node is ${uplink.publicIp}`,
          meaning: "peers do not send this subnet's packets here; twilld takes the subnet again, or another",
          commands: [RESTART],
        };
        return;
      }
      const due = Math.min(renewMarginMinutes * 60, leaseTtlSeconds / 2);
      if (ownLeftSeconds === undefined || ownLeftSeconds > due / 2) return;
      yield {
        severity: "problem",
        text: `the lease ends in ${Math.round(ownLeftSeconds)} s, and should have been renewed ${Math.round(due - ownLeftSeconds)} s ago`,
        meaning: "when it ends, peers drop this node, and another may get its subnet",
        commands: [RESTART],
      };
    },
  },
  "lease-duplicate": {
    what: "each public address has one lease",
    look: function* ({ leases, etcd, peers }) {
      const byAddress = new Map<Ipv4, StoredLease[]>();
      for (const lease of known(leases).leases) {
        byAddress.set(lease.publicIp, [...(byAddress.get(lease.publicIp) ?? []), lease]);
      }
      const answers = "value" in peers ? peers.value : [];
      const answersNot = ({ subnet }: StoredLease): boolean =>
        answers.some((peer) => formatCidr(peer.subnet) === formatCidr(subnet) && peer.lost !== undefined);
      for (const [publicIp, held] of byAddress) {
        if (held.length < 2) continue;
        // The node holds one of them: that which answers, or was renewed last.
        const byAge = [...held].sort((a, b) => Number(a.revision - b.revision));
        const dead = held.filter(answersNot);
        const stale = dead.length > 0 && dead.length < held.length ? dead : byAge.slice(0, -1);
        yield {
          severity: "problem",
          text: `${formatIpv4(publicIp)} has ${held.length} leases: ${held.map(({ subnet }) => formatCidr(subnet)).join(", ")}`,
          meaning:
            "a node holds one subnet; packets for the other ones are sent to it in vain, and are refused if they come from there",
          commands: stale.map(
            ({ subnet }) => `etcdctl del ${word(`${known(etcd).prefix}/subnets/${formatLeaseKey(subnet)}`)}`,
          ),
          advice: "if two nodes have this address, give one of them another, or another --public-ip",
        };
      }
    },
  },
  peers: {
    what: "each peer answers by the tunnel (at most 1024 are asked)",
    look: function* ({ peers }) {
      for (const { subnet, publicIp, lost } of known(peers)) {
        if (lost === undefined) continue;
        yield {
          severity: "problem",
          text: `peer ${formatCidr(subnet)} at ${formatIpv4(publicIp)} does not answer: ${lost}`,
          meaning: "its pods are probably not reached from here",
          advice: `see whether the node is up (ping ${formatIpv4(publicIp)}), and run twill doctor there`,
        };
      }
    },
  },
} satisfies Readonly<Record<string, Check>>;

export type CheckId = keyof typeof CHECKS;

const WAY_TO_ETCD: readonly CheckId[] = [
  "uplink",
  "clock",
  "certificate-client",
  "certificate-ca",
  "certificate-server",
];

/** What may be the cause of a finding. */
const CAUSES: { readonly [Id in CheckId]?: readonly CheckId[] } = {
  "etcd-endpoint": WAY_TO_ETCD,
  "certificate-client": ["clock"],
  "certificate-ca": ["clock"],
  "certificate-server": ["clock"],
  "daemon-failing": [...WAY_TO_ETCD, "etcd-endpoint", "tunnel-taken", "tunnel-device", "bpffs"],
  "daemon-ready": [...WAY_TO_ETCD, "etcd-endpoint", "tunnel-taken", "bpffs", "daemon-failing"],
  "tunnel-device": ["tunnel-taken", "uplink"],
  pins: ["bpffs"],
  programs: ["bpffs", "pins", "tunnel-taken", "uplink"],
  lease: ["daemon-running", "daemon-status", "etcd-endpoint"],
  peers: [
    "uplink",
    "tunnel-device",
    "tunnel-taken",
    "rp-filter",
    "firewall-tunnel",
    "route-clash",
    "lease",
    "lease-duplicate",
  ],
  "mtu-path": ["uplink"],
};

/** Carries out all checks. */
export function diagnose(facts: Facts): Report {
  const findings: Omit<Finding, "follows">[] = [];
  const unchecked: Report["unchecked"][number][] = [];
  const sound: Report["sound"][number][] = [];
  for (const [name, { what, look }] of Object.entries(CHECKS) as [CheckId, Check][]) {
    const found: Omit<Finding, "follows">[] = [];
    let beyond = 0;
    let reason: string | undefined;
    try {
      for (const trouble of look(facts)) {
        if (found.length < FINDINGS_MAX) found.push({ commands: [], advice: "", ...trouble, id: name });
        else beyond += 1;
      }
    } catch (error) {
      if (!(error instanceof Unknown)) throw error;
      reason = error.message;
    }
    const last = found.at(-1);
    if (beyond > 0 && last !== undefined)
      found[found.length - 1] = { ...last, text: `${last.text} (and ${beyond} more of the kind)` };
    findings.push(...found);
    if (reason !== undefined) unchecked.push({ id: name, reason });
    else if (found.length === 0) sound.push({ id: name, what });
  }
  const ids = new Set(findings.map(({ id }) => id));
  return {
    findings: findings.map((finding) => ({
      ...finding,
      follows: (CAUSES[finding.id] ?? []).filter((cause) => ids.has(cause)),
    })),
    unchecked,
    sound,
  };
}

/** What flanneld's chains do, and from where rules lead there. */
const FLANNELD_CHAINS: Readonly<
  Record<string, { readonly base: string; readonly comment: string; readonly meaning: string }>
> = {
  "FLANNEL-POSTRTG": {
    base: "POSTROUTING",
    comment: "flanneld masq",
    meaning:
      "what pods send by the stack gets this node's address from it, beside or instead of Twill's masquerade",
  },
  "FLANNEL-FWD": {
    base: "FORWARD",
    comment: "flanneld forward",
    meaning: "it accepts all packets of the network, also those that a rule behind it would drop",
  },
};

/** Interfaces whose packets the stack forwards: the uplink, the tunnel device, what pods are behind. */
function interfacesOnTheWay(facts: Facts): string[] {
  const { uplink, device } = known(facts.noted);
  const { links } = known(facts.host);
  const indexes = new Set(known(facts.dataplane).interfaces.map(({ ifindex }) => ifindex));
  return links
    .filter(
      ({ index, name, masterIndex }) =>
        name === uplink?.name || name === device || (indexes.has(index) && masterIndex === undefined),
    )
    .map(({ name }) => name);
}

/** As the daemon sees pods' traffic when it judges the rules. */
function podTraffic(facts: Facts, network: Network): PodTraffic {
  const { uplink, device } = known(facts.noted);
  const { links } = known(facts.host);
  const { interfaces, subnets } = known(facts.dataplane);
  const nameOf = (ifindex: number): string[] =>
    links.filter((link) => link.index === ifindex).map(({ name }) => name);
  const ways = subnets
    .filter(({ reach }) => reach !== "REACH_DEVICE")
    .flatMap(({ ifindex }) => nameOf(ifindex));
  const underlay = [...new Set([...(uplink === undefined ? [] : [uplink.name]), ...ways])];
  return {
    network: network.network,
    interfaces: [
      ...interfaces.flatMap(({ ifindex }) => nameOf(ifindex)),
      ...(device === undefined ? [] : [device]),
      ...(kindOf(network.backend).direct ? underlay : []),
    ],
    underlay,
  };
}

/** Bytes that the tunnel puts around a packet. */
function overheadOf({ backend }: Network): number {
  const { mtu: _, ...unlimited } = { mtu: undefined, ...backend };
  const large = 60_000;
  return large - kindOf({ ...unlimited, mtu: undefined } as Network["backend"]).mtu(large);
}

function* expiry(
  { from, to }: Certificate,
  now: number,
  what: string,
  meaning: string,
  advice: string,
): Generator<Trouble> {
  const left = to - now;
  if (now < from) {
    yield {
      severity: "problem",
      text: `${what} is valid only from ${new Date(from).toISOString()}`,
      meaning,
      advice: `check this node's clock; else ${advice}`,
    };
  } else if (left <= 0) {
    yield { severity: "problem", text: `${what} expired on ${new Date(to).toISOString()}`, meaning, advice };
  } else if (left < Math.min(EXPIRY_MS, EXPIRY_PART * (to - from))) {
    const hours = left / 3_600_000;
    const span = hours < 48 ? `${Math.floor(hours)} hours` : `${Math.floor(hours / 24)} days`;
    yield {
      severity: "warning",
      text: `${what} expires in ${span}, on ${new Date(to).toISOString()}`,
      meaning: `then ${meaning}`,
      advice,
    };
  }
}

function isBridge(name: string): boolean {
  return BRIDGES.includes(name);
}

const prefixOf = (row: SubnetRow): Prefix => ({ address: row.subnet, length: row.prefixLength });
const peerName = (row: SubnetRow): string => formatCidr(prefixOf(row));
/** The first address of a peer's subnet, which is that of its tunnel device. */
const firstOf = (row: SubnetRow): Ipv4 => row.subnet;

/** A route as `ip route del` takes it. */
function routeText(route: Route, device: string | undefined): string {
  const { destination, gateway, type, table, metric } = route;
  const words = [
    ...(ROUTE_TYPES[type] === undefined ? [] : [ROUTE_TYPES[type]]),
    formatCidr(destination),
    ...(gateway === undefined ? [] : ["via", formatIpv4(gateway)]),
    ...(device === undefined || ROUTE_TYPES[type] !== undefined ? [] : ["dev", word(device)]),
    ...(table === TABLE_MAIN ? [] : ["table", `${table}`]),
    ...(metric === 0 ? [] : ["metric", `${metric}`]),
  ];
  return words.join(" ");
}

/** A sysctl of an interface as sysctl(8) takes it: with slashes where the name has a dot. */
function sysctlKey(name: string, setting: string): string {
  const parts = ["net", "ipv4", "conf", name, setting];
  return word(parts.join(name.includes(".") ? "/" : "."));
}

function listed(names: readonly string[]): string {
  if (names.length <= FINDINGS_MAX) return names.join(", ");
  return `${names.slice(0, FINDINGS_MAX).join(", ")} and ${names.length - FINDINGS_MAX} more`;
}

/** Outside text as one word of a shell's command line. */
function word(text: string): string {
  return /^[\w.:/@%+=,-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}
