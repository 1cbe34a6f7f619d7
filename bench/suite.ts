/** What a comparison of the benchmark is made of, and what its rows have in common. */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { type Etcd, type Host, type Lab, type Namespace, repository } from "../test/lab.ts";
import { startTwilld, type Twilld } from "../test/twilld.ts";
import type { Workload } from "./workloads.ts";

export const network = "172.7.0.0/16";
export const subnets = ["172.7.21.0/24", "172.7.22.0/24"] as const;

/** Two places with traffic between them. */
export interface Path {
  readonly from: Namespace;
  readonly to: Namespace;
  readonly address: string;
  /** Two other places on the same hosts. */
  readonly beside?: Path;
  /**
   * Looked at before and after the loads: throws if the row is not what its name says, and says what else the
   * reader should know of it.
   */
  check?(): Promise<string | undefined>;
}

export interface Row {
  readonly name: string;
  /** The rows its ratios are taken to. */
  readonly against: readonly string[];
  /** Sets two cabled hosts up. */
  build(lab: Lab, hosts: [Host, Host]): Promise<Path>;
}

/** The limit of the setup. */
export const limit = "host to host, no pods";

/** The nodes themselves, without a pod, a bridge or a program: nothing that forwards can be faster. */
export const hostToHost = (...against: string[]): Row => ({
  name: limit,
  against,
  async build(_, [a, b]) {
    return { from: a, to: b, address: b.address };
  },
});

/** Rows that are measured together, in turns. */
export interface Suite {
  readonly name: string;
  readonly rows: readonly Row[];
  readonly workloads: readonly Workload[];
  /** How the rows of the kernel are set up. */
  readonly kernel: string;
  /** Whether the ends of the cable are like those of a card: see `cable.ts`. Else it is a veth pair, and nothing more. */
  readonly card?: boolean;
  /** What else is to be known of the cable. */
  readonly offloads?: string;
}

/** Starts twilld on these hosts, each with the subnet that is given; the first has the etcd. */
export async function startTwillds(
  lab: Lab,
  hosts: readonly (readonly [Host, string])[],
  backend: object,
  flags: readonly string[] = [],
): Promise<Twilld[]> {
  const [first] = hosts;
  if (first === undefined) throw new Error("no host to start twilld on");
  const etcd = await lab.etcdOn(first[0]);
  await etcd.put("/coreos.com/network/config", JSON.stringify({ Network: network, Backend: backend }));
  const started: Twilld[] = [];
  for (const [host, subnet] of hosts) {
    hadBefore(host, network, subnet);
    started.push(await startTwilld(host, { etcd, flags }));
  }
  return started;
}

/** The previous subnet is asked for again, so that a host's addresses are known. */
export function hadBefore(host: Host, ofNetwork: string, subnet: string): void {
  const before = `FLANNEL_NETWORK=${ofNetwork}\nFLANNEL_SUBNET=${subnet.replace(".0/", ".1/")}\n`;
  writeFileSync(join(host.directory, "subnet.env"), before);
}

/** The first lease of an imaginary node, see `leases.ts`: subnets and addresses below are the hosts' own. */
export const FIRST_LEASE = 256;

/** Has an etcd hold the leases of so many imaginary nodes, of a network OCTET.0.0.0/8. */
export async function fillLeases(host: Host, etcd: Etcd, count: number, octet: number): Promise<void> {
  const [endpoint = ""] = etcd.endpoints;
  const numbers = [FIRST_LEASE, FIRST_LEASE + count, octet].map(String);
  const program = join(repository, "dist/bench/leases.js");
  await host.exec(["node", program, "fill", endpoint, ...numbers], { timeout: 120_000 });
}
