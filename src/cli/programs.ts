/** `twill programs`: what runs where, and with --measure how often and how long. */
import { readFileSync } from "node:fs";
import { setTimeout } from "node:timers/promises";
import { Command, Option } from "commander";
import { countRuns, findAttachments, readPrograms } from "../edge/dataplane.ts";
import { compare, interfaceNames, requireConfig } from "./common.ts";
import { type Column, duration, table } from "./table.ts";
import { seconds, showing, type ViewOptions } from "./view.ts";

interface ProgramStatus {
  readonly program: string;
  readonly id: number;
  /** Hash of its instructions. */
  readonly tag: string;
  readonly loadedAt: string;
  readonly verifiedInstructions: number;
  readonly attachments: readonly { readonly interface: string; readonly mode: string }[];
  /** Null without --measure; the time is null if nothing ran. */
  readonly measured: {
    readonly seconds: number;
    readonly runs: number;
    readonly nanosecondsPerRun: number | null;
  } | null;
}

interface Options extends ViewOptions {
  readonly measure?: number;
}

interface Document {
  readonly programs: readonly ProgramStatus[];
}

function columns(now: number, isMeasured: boolean): Column<ProgramStatus>[] {
  const measured: Column<ProgramStatus>[] = [
    { head: "RUNS", value: (row) => row.measured?.runs ?? 0 },
    {
      head: "PER SECOND",
      value: (row) => Math.round((row.measured?.runs ?? 0) / (row.measured?.seconds ?? 1)),
    },
    { head: "NS PER RUN", value: (row) => row.measured?.nanosecondsPerRun ?? "-" },
  ];
  return [
    { head: "PROGRAM", value: ({ program }) => program, key: true },
    { head: "ID", value: ({ id }) => id },
    { head: "TAG", value: ({ tag }) => tag },
    { head: "AGE", value: ({ loadedAt }) => duration((now - Date.parse(loadedAt)) / 1000) },
    ...(isMeasured ? measured : []),
    {
      head: "BY",
      value: ({ attachments }) => [...new Set(attachments.map(({ mode }) => mode))].join(",") || "-",
    },
    {
      head: "INTERFACES",
      value: ({ attachments }) => attachments.map((each) => each.interface).join(" ") || "nowhere",
      tone: ({ attachments }) => (attachments.length === 0 ? "notice" : undefined),
    },
  ];
}

/** The clock since boot, with suspend, in which the kernel says when a program was loaded; in nanoseconds. */
function bootNs(): number {
  return Number(readFileSync("/proc/uptime", "utf8").split(" ")[0]) * 1e9;
}

async function gather({ pinPath, measure }: Options): Promise<Document> {
  requireConfig(pinPath);
  const { indexes, nameOf } = interfaceNames();
  const attachments = findAttachments(pinPath, indexes);
  const runs = await (measure === undefined ? undefined : measureRuns(pinPath, measure));
  const bootedAt = Date.now() - bootNs() / 1e6;
  const programs = readPrograms(pinPath).map(
    ({ hook, info }): ProgramStatus => ({
      program: hook,
      id: info.id,
      tag: info.tag,
      loadedAt: new Date(bootedAt + Number(info.loadTimeNs) / 1e6).toISOString(),
      verifiedInstructions: info.verifiedInstructions,
      attachments: attachments
        .filter((row) => row.hook === hook)
        .map(({ ifindex, mode }) => ({ interface: nameOf(ifindex), mode }))
        .sort((a, b) => compare(a.interface, b.interface)),
      measured: runs?.get(info.id) ?? null,
    }),
  );
  return { programs };
}

/** Counts the runs of some seconds, by program. The kernel does that, and pays for it, only meanwhile. */
async function measureRuns(
  pinPath: string,
  pause: number,
): Promise<Map<number, NonNullable<ProgramStatus["measured"]>>> {
  const counting = countRuns();
  try {
    const before = new Map(readPrograms(pinPath).map(({ info }) => [info.id, info]));
    const begin = performance.now();
    await setTimeout(pause * 1000);
    const passed = (performance.now() - begin) / 1000;
    return new Map(
      readPrograms(pinPath).map(({ info }) => {
        const count = Number(info.runCount - (before.get(info.id)?.runCount ?? 0n));
        const time = Number(info.runTimeNs - (before.get(info.id)?.runTimeNs ?? 0n));
        return [
          info.id,
          {
            seconds: Math.round(passed * 1000) / 1000,
            runs: count,
            nanosecondsPerRun: count === 0 ? null : Math.round(time / count),
          },
        ];
      }),
    );
  } finally {
    counting.close();
  }
}

export function command(): Command {
  const made = new Command("programs")
    .description(
      "The programs in force and the interfaces they are on. A backend without a tunnel has nothing for those of the tunnel device to do.",
    )
    .addOption(
      new Option("--measure [seconds]", "count runs, and the time that each takes, for so long")
        .preset("1")
        .argParser(seconds),
    );
  return showing<Options, Document>(made, {
    gather,
    render: ({ programs }, screen, { measure }) =>
      `${table(columns(Date.now(), measure !== undefined), programs, screen)}\n`,
  });
}
