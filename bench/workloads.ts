/**
 * What is measured between two places: bulk TCP, small UDP packets, as many as go and at a fixed rate, TCP round trips,
 * TCP connections.
 *
 * Each load is bounded in time on both sides, and client and server are pinned to a CPU each, so that the
 * scheduler's choice is not measured. Only what arrived counts.
 */
import { existsSync } from "node:fs";
import { cpus } from "node:os";
import { join } from "node:path";
import type { Namespace } from "../test/lab.ts";
import { repository } from "../test/lab.ts";
import type { Metric } from "./figures.ts";

export interface Workload {
  readonly metrics: readonly Metric[];
  /** Runs the load once from one place to the address of another; a value for each metric, in order. */
  run(
    from: Namespace,
    to: Namespace,
    address: string,
    seconds: number,
    beside?: { readonly from: Namespace; readonly to: Namespace; readonly address: string },
  ): Promise<number[]>;
}

const clientCpu = "0";
const serverCpu = "1";
/** The program of load.c. */
export const load = join(repository, "dist/bench/load");

export const tcpStream: Workload = {
  metrics: [{ key: "tcpStream", title: "TCP stream, Gbit/s", digits: 1, better: "higher" }],
  async run(from, to, address, seconds) {
    const server = to.spawn(["iperf3", "-s", "-1", "--forceflush", "-B", address, "-A", serverCpu]);
    await server.line(/Server listening/);
    // A congestion control that paces by what it measures of the way would measure itself.
    const how = ["-A", clientCpu, "-C", "cubic"];
    const argv = ["iperf3", "-J", "-c", address, "-t", String(seconds), "-O", "1", ...how];
    const { stdout } = await from.exec(argv);
    await server.stop();
    const report = JSON.parse(stdout) as { end: { sum_received: { bits_per_second: number } } };
    return [report.end.sum_received.bits_per_second / 1e9];
  },
};

/** Small packets as fast as one process can send them, and how it is that receives them. */
function udpWorkload(key: string, title: string, mode: "sink" | "poll"): Workload {
  return {
    metrics: [{ key, title, digits: 0, better: "higher" }],
    async run(from, to, address, seconds) {
      const sink = to.spawn([load, "-c", serverCpu, mode, address, "9000", String(seconds)]);
      await sink.line(/ready/);
      const blast = from.spawn([load, "-c", clientCpu, "blast", address, "9000", String(seconds + 2), "64"]);
      const [, rate] = await sink.line(/"packetsPerSecond": ([\d.]+)/);
      await blast.stop();
      await sink.stop();
      return [Number(rate) / 1000];
    },
  };
}

export const udpPackets = udpWorkload("udpPackets", "UDP 64 B, kpps", "sink");

/**
 * To a receiver that never sleeps. To wake one on another processor costs the sender more than all of the way; a slow row
 * pays it for every packet, and the fastest for none, as its receiver has always something to do.
 */
export const udpPolled = udpWorkload("udpPolled", "UDP 64 B, server polls, kpps", "poll");

/** Connections a second that other places open meanwhile, if the processors let them. */
const BESIDE = 5000;

/** The same packets beside connections of others, and how many of those there were. */
export const besideConnections: Workload = {
  metrics: [
    { key: "udpBeside", title: "UDP 64 B beside connections, kpps", digits: 0, better: "higher" },
    { key: "connectionsBeside", title: "those connections/s", digits: 0, better: "higher" },
  ],
  async run(from, to, address, seconds, beside) {
    if (beside === undefined) throw new Error(`there is nobody beside ${address}`);
    const others = talk<{ connectionsPerSecond: number }>(
      "crr",
      beside.from,
      beside.to,
      beside.address,
      seconds + 1,
      `${BESIDE}`,
    );
    const [packets = Number.NaN] = await udpPackets.run(from, to, address, seconds);
    return [packets, (await others).connectionsPerSecond];
  },
};

/** Packets a second of `udpCost`: less than the slowest row can do. */
const PACED = 30_000;

/** The same packets at a fixed rate, which every row carries: what each costs at either end. */
export const udpCost: Workload = {
  metrics: [
    {
      key: "udpSent",
      title: `UDP at ${PACED / 1000} kpps, client's CPU, µs a packet`,
      digits: 2,
      better: "lower",
    },
    {
      key: "udpReceived",
      title: `UDP at ${PACED / 1000} kpps, server's CPU, µs a packet`,
      digits: 2,
      better: "lower",
    },
  ],
  async run(from, to, address, seconds) {
    const sink = to.spawn([load, "-c", serverCpu, "sink", address, "9000", String(seconds)]);
    await sink.line(/ready/);
    const argv = [load, "-c", clientCpu, "blast", address, "9000", String(seconds + 3), "64", String(PACED)];
    const blast = from.spawn(argv);
    await sink.line(/counting/);
    const before = idleTimes();
    const [, rate] = await sink.line(/"packetsPerSecond": ([\d.]+)/);
    const after = idleTimes();
    await blast.stop();
    await sink.stop();
    if (Number(rate) < 0.99 * PACED)
      throw new Error(`${address} got ${rate} of ${PACED} packets a second: the row cannot carry them`);
    return [clientCpu, serverCpu].map((cpu) => {
      const idle = (after.idle[Number(cpu)] ?? 0) - (before.idle[Number(cpu)] ?? 0);
      const elapsed = after.at - before.at;
      return ((elapsed - idle) * 1000) / (PACED * (elapsed / 1000));
    });
  },
};

/** When each processor had nothing to do, in milliseconds in all, and now; the kernel counts in steps of 10. */
function idleTimes(): { readonly at: number; readonly idle: readonly number[] } {
  return { at: performance.now(), idle: cpus().map(({ times }) => times.idle) };
}

export const roundTrips: Workload = {
  metrics: [
    { key: "roundTripP50", title: "TCP round trip p50, µs", digits: 1, better: "lower" },
    { key: "roundTripP99", title: "TCP round trip p99, µs", digits: 1, better: "lower" },
  ],
  async run(from, to, address, seconds) {
    const result = await talk<{ p50: number; p99: number }>("rr", from, to, address, seconds);
    return [result.p50, result.p99];
  },
};

export const connections: Workload = {
  metrics: [{ key: "connections", title: "TCP connections/s", digits: 0, better: "higher" }],
  async run(from, to, address, seconds) {
    const result = await talk<{ connectionsPerSecond: number }>("crr", from, to, address, seconds);
    return [result.connectionsPerSecond];
  },
};

/** Throws, with what to do, if a program that is needed is not there. */
export function checkPrograms(): void {
  if (!existsSync(load)) throw new Error(`${load} is missing: build it with 'make build'`);
}

async function talk<Result>(
  mode: string,
  from: Namespace,
  to: Namespace,
  address: string,
  seconds: number,
  ...more: string[]
): Promise<Result> {
  const server = to.spawn([load, "-c", serverCpu, "serve", address, "9001", String(seconds)]);
  await server.line(/ready/);
  const { stdout } = await from.exec([
    load,
    "-c",
    clientCpu,
    mode,
    address,
    "9001",
    String(seconds),
    ...more,
  ]);
  await server.stop();
  return JSON.parse(stdout) as Result;
}
