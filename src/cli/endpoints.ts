/** `twill endpoints`: the pods of this node, and how packets are handed to them. */
import { Argument, Command } from "commander";
import { contains, formatIpv4, type Prefix } from "../core/ipv4.ts";
import { readRows } from "../edge/dataplane.ts";
import { interfaceNames, requireConfig } from "./common.ts";
import { addresses, countOption } from "./filters.ts";
import { type Column, table } from "./table.ts";
import { showing, type ViewOptions } from "./view.ts";

interface Endpoint {
  readonly address: string;
  readonly interface: string;
  readonly delivery: "peer" | "egress";
  readonly mac: string;
  readonly gatewayMac: string;
  readonly mtu: number;
}

interface Options extends ViewOptions {
  readonly interface?: string;
  readonly count?: true;
}

interface Document {
  readonly count: number;
  readonly endpoints?: readonly Endpoint[];
}

const COLUMNS: readonly Column<Endpoint>[] = [
  { head: "ADDRESS", value: ({ address }) => address, key: true },
  { head: "INTERFACE", value: (endpoint) => endpoint.interface, key: true },
  { head: "DELIVERY", value: ({ delivery }) => delivery },
  { head: "MAC", value: ({ mac }) => mac },
  { head: "GATEWAY MAC", value: ({ gatewayMac }) => gatewayMac },
  { head: "MTU", value: ({ mtu }) => mtu },
];

export function command(): Command {
  const made = new Command("endpoints")
    .description(
      "The pods of this node that packets are handed to past the stack: into their namespace (peer), or out of the host's interface (egress).",
    )
    .addArgument(new Argument("[address]", "a pod's, or a network of them").argParser(addresses))
    .option("--interface <interface>", "only those behind this one")
    .addOption(countOption());
  return showing<Options, Document>(made, {
    gather({ pinPath, interface: only, count }) {
      requireConfig(pinPath);
      const wanted = made.processedArgs[0] as Prefix | undefined;
      const { nameOf } = interfaceNames();
      const endpoints = readRows(pinPath, "endpoints4")
        .filter((row) => wanted === undefined || contains(wanted, row.address))
        .sort((a, b) => a.address - b.address)
        .map(
          (row): Endpoint => ({
            address: formatIpv4(row.address),
            interface: nameOf(row.ifindex),
            delivery: row.delivery === "DELIVERY_PEER" ? "peer" : "egress",
            mac: row.mac,
            gatewayMac: row.gatewayMac,
            mtu: row.mtu,
          }),
        )
        .filter((endpoint) => only === undefined || endpoint.interface === only);
      return count ? { count: endpoints.length } : { count: endpoints.length, endpoints };
    },
    render: ({ count, endpoints }, screen) =>
      `${endpoints === undefined ? count : table(COLUMNS, endpoints, screen)}\n`,
  });
}
