/** `twill flows`: the flows that stay on the stack because it translates them. */
import { Command, Option } from "commander";
import { formatIpv4, type Prefix } from "../core/ipv4.ts";
import { readFlows } from "../edge/dataplane.ts";
import { requireConfig } from "./common.ts";
import { addresses, countOption, isIn, portOption, protocolName, protocolOption } from "./filters.ts";
import { type Column, duration, table } from "./table.ts";
import { showing, type ViewOptions } from "./view.ts";

interface Flow {
  readonly protocol: string;
  readonly a: string;
  readonly portA: number | null;
  readonly b: string;
  readonly portB: number | null;
  readonly ageSeconds: number;
}

interface Options extends ViewOptions {
  readonly address?: Prefix;
  readonly protocol?: number;
  readonly port?: number;
  readonly count?: true;
}

interface Document {
  readonly count: number;
  readonly flows?: readonly Flow[];
}

const end = (address: string, port: number | null): string =>
  port === null ? address : `${address}:${port}`;

const COLUMNS: readonly Column<Flow>[] = [
  { head: "PROTO", value: ({ protocol }) => protocol, key: true },
  { head: "A", value: ({ a, portA }) => end(a, portA), key: true },
  { head: "B", value: ({ b, portB }) => end(b, portB), key: true },
  { head: "AGE", value: ({ ageSeconds }) => duration(ageSeconds) },
];

function gather({ pinPath, address, protocol, port, count }: Options): Document {
  requireConfig(pinPath);
  const rows = readFlows(pinPath).filter(
    (row) =>
      (protocol === undefined || row.protocol === protocol) &&
      (port === undefined || row.portA === port || row.portB === port) &&
      isIn(address, row.a, row.b),
  );
  if (count) return { count: rows.length };
  const now = process.hrtime.bigint();
  const flows = rows
    .sort(
      (x, y) => x.a - y.a || x.b - y.b || x.protocol - y.protocol || x.portA - y.portA || x.portB - y.portB,
    )
    .map(
      (row): Flow => ({
        protocol: protocolName(row.protocol),
        a: formatIpv4(row.a),
        portA: row.portA === 0 ? null : row.portA,
        b: formatIpv4(row.b),
        portB: row.portB === 0 ? null : row.portB,
        ageSeconds: Math.max(0, Math.round(Number((now - row.sinceNs) / 1_000_000n)) / 1000),
      }),
    );
  return { count: flows.length, flows };
}

export function command(): Command {
  const made = new Command("flows")
    .description(
      "The flows that the stack translates (services, published ports), which stay on it in both directions. A row without ports stands for the fragments of the flows between its addresses.",
    )
    .addOption(
      new Option("--address <address>", "only with this one, or with this network").argParser(addresses),
    )
    .addOption(protocolOption())
    .addOption(portOption("only with this port, on either side"))
    .addOption(countOption());
  return showing<Options, Document>(made, {
    gather,
    render: ({ count, flows }, screen) => `${flows === undefined ? count : table(COLUMNS, flows, screen)}\n`,
  });
}
