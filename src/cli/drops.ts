/** `twill drops`: what the programs dropped, where and why. */
import { Command } from "commander";
import type { HookCounts, VerdictCounts } from "../abi/twill.gen.ts";
import { readCounters } from "../edge/dataplane.ts";
import { requireConfig } from "./common.ts";
import { type Column, table } from "./table.ts";
import { showing, type ViewOptions } from "./view.ts";

type Reason = keyof VerdictCounts & `drop_${string}`;

interface Drop {
  readonly program: string;
  readonly reason: Reason;
  readonly packets: number;
  readonly bytes: number;
  /** Since the last look, when watching; else null. */
  readonly packetsPerSecond: number | null;
  readonly meaning: string;
}

interface Options extends ViewOptions {
  readonly all?: true;
}

interface Document {
  readonly packets: number;
  readonly drops: readonly Drop[];
}

/** What each means, and what to look at. */
const MEANINGS: Readonly<Record<Reason, string>> = {
  drop_unknown_peer:
    "tunnel packets from an address that is no peer: a stranger, or a node whose lease is not known here",
  drop_forged: "tunnel packets with an inner source that is not their sender's",
  drop_malformed: "tunnel packets cut short",
  drop_fragment:
    "tunnel packets in pieces, with ipip or udp: the way between nodes has a smaller MTU than they know",
  drop_ttl: "packets whose hop limit ended in the udp tunnel, which counts as a hop at each end",
  drop_unreachable: "for a peer that ipip or udp cannot reach: there is no route to it, or not by Ethernet",
  drop_ecn: "marked as congested outside, not capable of it inside (RFC 6040)",
  drop_pod_tunnel: "pods that speak to the tunnel's port of a node",
  drop_masq_full: "new connections to the outside, and the table is full: --masq-max-connections",
  drop_masq_ports: "new connections to the outside, and no port is left towards the remote: --masq-ports",
  drop_failed: "the kernel refused a change half-way, mostly for want of memory",
};

function columns(isWatching: boolean): Column<Drop>[] {
  const rate: Column<Drop> = { head: "PER SECOND", value: ({ packetsPerSecond }) => packetsPerSecond ?? 0 };
  return [
    { head: "PROGRAM", value: ({ program }) => program, key: true },
    { head: "REASON", value: ({ reason }) => reason, key: true },
    {
      head: "PACKETS",
      value: ({ packets }) => packets,
      tone: ({ packets }) => (packets > 0 ? "bad" : undefined),
    },
    ...(isWatching ? [rate] : []),
    { head: "BYTES", value: ({ bytes }) => bytes },
    { head: "MEANING", value: ({ meaning }) => meaning },
  ];
}

/** When a document was gathered, for the rates of the next one. */
const gathered = new WeakMap<Document, number>();

function gather({ pinPath, all }: Options, before?: Document): Document {
  requireConfig(pinPath);
  const now = performance.now();
  const passed = before === undefined ? undefined : (now - (gathered.get(before) ?? now)) / 1000;
  const counters = readCounters(pinPath);
  const drops = (Object.keys(counters) as (keyof HookCounts)[]).flatMap((program) =>
    (Object.keys(MEANINGS) as Reason[]).map((reason): Drop => {
      const { packets, bytes } = counters[program][reason];
      const last = before?.drops.find((drop) => drop.program === program && drop.reason === reason);
      return {
        program,
        reason,
        packets: Number(packets),
        bytes: Number(bytes),
        packetsPerSecond:
          passed === undefined || passed === 0
            ? null
            : Math.max(0, Math.round(((Number(packets) - (last?.packets ?? 0)) / passed) * 10) / 10),
        meaning: MEANINGS[reason],
      };
    }),
  );
  const document = {
    packets: drops.reduce((sum, { packets }) => sum + packets, 0),
    drops: drops.filter(({ packets }) => all === true || packets > 0),
  };
  gathered.set(document, now);
  return document;
}

export function command(): Command {
  const made = new Command("drops")
    .description(
      "What the programs dropped, by program and reason, since their maps were made. All else that the kernel would have delivered they pass on.",
    )
    .option("--all", "also the reasons for which nothing was dropped");
  return showing<Options, Document>(made, {
    gather: (options, before) => gather(options, before),
    render: ({ drops }, screen) =>
      drops.length === 0
        ? "nothing was dropped\n"
        : `${table(columns(drops.some(({ packetsPerSecond }) => packetsPerSecond !== null)), drops, screen)}\n`,
  });
}
