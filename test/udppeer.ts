/**
 * A host whose packets a process carries, as flanneld does with the backend udp: what ours is compared with, on the wire
 * and in the benchmark.
 */
import { existsSync, statSync } from "node:fs";
import { join } from "node:path";
import { exec, type Host, type Process, repository } from "./lab.ts";

const SOURCE = join(repository, "test/udp-peer.c");

export interface UdpPeerOptions {
  /** The host's own subnet, with prefix length: `172.7.22.0/24`. */
  readonly subnet: string;
  readonly network: string;
  /** Subnets of other hosts, with prefix length, and their addresses. */
  readonly peers: Readonly<Record<string, string>>;
  /** Default 8285. */
  readonly port?: number;
  /** Where the program is built. */
  readonly directory: string;
}

/** Makes `flannel0` with its address and the route to the network, as flanneld does, and what carries its packets. */
export async function startUdpPeer(host: Host, options: UdpPeerOptions): Promise<Process> {
  const { subnet, network, peers, port = 8285, directory } = options;
  const program = join(directory, "udp-peer");
  if (!existsSync(program) || statSync(program).mtimeMs < statSync(SOURCE).mtimeMs)
    await exec(["gcc", "-O2", "-Wall", "-Wextra", "-o", program, SOURCE]);
  const [address = ""] = subnet.split("/");
  const others = Object.entries(peers).map(([block, peer]) => `${block}=${peer}`);
  const child = host.spawn([program, "flannel0", host.address, `${port}`, address, ...others]);
  await child.line(/^ready$/);
  await host.ipBatch([
    "link set flannel0 mtu 1472",
    `address add ${address}/32 dev flannel0`,
    "link set flannel0 up",
    `route add ${network} dev flannel0`,
  ]);
  return child;
}
