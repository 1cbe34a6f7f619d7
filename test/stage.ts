/**
 * The two hosts of test/e2e/cluster.ts with everything on them that `twill` can show: connections to an outside
 * server, a service that the stack translates, forged packets. For the pages in docs/ and the tests of the commands.
 *
 * The outside is 10.4.8.99 behind the router 10.4.7.1. On h1, 10.96.0.10:80 leads to the pod on h2.
 */

import { join } from "node:path";
import { codec } from "../loader/codec.ts";
import { openPinnedMap } from "../loader/map.ts";
import { maps } from "../src/abi/twill.gen.ts";
import { readPeersNote } from "../src/edge/rundir.ts";
import { type Cluster, createCluster, probe, serve, TCP_PORT, UDP_PORT } from "./e2e/cluster.ts";
import { type Host, type Process, until } from "./lab.ts";

export const OUTSIDE = "10.4.8.99";
export const SERVICE = "10.96.0.10";
const STRANGER = "10.4.7.66";

/** Where connections are taken and kept. */
export const HOLD_PORT = 7100;

const KEEP = `
import socket
listening = socket.create_server(("0.0.0.0", ${HOLD_PORT}))
print("ready", flush=True)
kept = []
while True:
    kept.append(listening.accept())
`;
/** Opens one TCP connection to each address and port given, and keeps them. */
const HOLD = `
import signal, socket, sys
held = [socket.create_connection(to.split(":")) for to in sys.argv[1:]]
print("open", flush=True)
signal.pause()
`;
/** A VXLAN header for VNI 1, and an empty Ethernet and IP header behind it. */
const TUNNEL_PACKET = `\\x08\\0\\0\\0\\0\\0\\x01\\0${"\\0".repeat(34)}`;

export class Stage {
  readonly cluster: Cluster;
  readonly #stranger: Host;
  /** Holds connections of pod a: one to the outside, one to the service. */
  readonly holder: Process;

  constructor(cluster: Cluster, stranger: Host, holder: Process) {
    this.cluster = cluster;
    this.#stranger = stranger;
    this.holder = holder;
  }

  /** Three tunnel packets from one who is no peer, and two from a pod: `drop_unknown_peer`, `drop_pod_tunnel`. */
  async forge(): Promise<void> {
    const { h1, h2, a } = this.cluster;
    const send = (to: string, count: number) => [
      "bash",
      "-c",
      `exec 3>/dev/udp/${to}/8472; for i in $(seq ${count}); do printf '${TUNNEL_PACKET}' >&3; done`,
    ];
    await this.#stranger.exec(send(h1.address, 3));
    await a.exec(send(h2.address, 2));
  }

  /**
   * Writes so many peers more into the maps and the kernel's tables of h1, and so many connections of pod a. Its
   * twilld must be dead: it would take them away.
   */
  async crowd(peers: number, connections: number): Promise<void> {
    const { h1 } = this.cluster;
    const [, device] = /^(\d+): flannel\.1/m.exec(await h1.ip("-o link show dev flannel.1")) ?? [];
    const [, uplink] = /^(\d+): eth0/m.exec(await h1.ip("-o link show dev eth0")) ?? [];
    if (device === undefined || uplink === undefined) throw new Error("h1 has no tunnel device");
    const rows = Array.from({ length: peers }, (_, index) => {
      const [high, low] = [index >> 8, index & 255];
      // Beside 172.7.21.0/24 and 172.7.22.0/24: a /30 each, from 172.7.64.0 on.
      const at = 0xac074000 + index * 4;
      const subnet = [at >>> 24, (at >>> 16) & 255, (at >>> 8) & 255, at & 255];
      return { subnet, address: [10, 5, high, low], mac: [0x02, 0x0a, 0x05, 0, high, low] };
    });
    const hex = (bytes: readonly number[]) =>
      bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(":");
    write(h1, "subnets4", (put) => {
      for (const { subnet, address, mac } of rows) {
        put(
          { address: Uint8Array.from(subnet), prefix_length: 30 },
          {
            public_ip: Uint8Array.from(address),
            next_hop: Uint8Array.of(10, 4, 7, 1),
            ifindex: Number(uplink),
            reach: "REACH_TUNNEL",
            mtu: 1450,
            vtep_mac: Uint8Array.from(mac),
          },
        );
      }
    });
    const lines = (line: (row: (typeof rows)[number]) => string) => `${rows.map(line).join("\n")}\n`;
    await h1.exec(["ip", "-batch", "-"], {
      input:
        lines(({ subnet }) => {
          const at = subnet.join(".");
          return `route add ${at}/30 via ${at} dev flannel.1 onlink proto 84`;
        }) +
        lines(
          ({ subnet, mac }) => `neigh add ${subnet.join(".")} lladdr ${hex(mac)} dev flannel.1 nud permanent`,
        ),
    });
    await h1.exec(["bridge", "-batch", "-"], {
      input: lines(
        ({ address, mac }) => `fdb add ${hex(mac)} dev flannel.1 dst ${address.join(".")} self permanent`,
      ),
    });
    const now = process.hrtime.bigint();
    write(h1, "connections4", (put) => {
      for (let index = 0; index < connections; index += 1) {
        put(
          {
            address: Uint8Array.of(10, 4, 7, 21),
            remote: Uint8Array.of(10, 9, index >> 14, (index >> 6) & 255),
            port: 61000 + (index & 63),
            remote_port: 443,
            protocol: 6,
          },
          {
            state: "CONNECTION_ESTABLISHED",
            pod: Uint8Array.of(172, 7, 21, 2),
            pod_port: 1024 + (index % 60000),
            replied: 1,
            pod_fin: 0,
            remote_fin: 0,
            on_stack: 0,
            ifindex: Number(uplink),
            bucket: 0xffffffff,
            end_sequence: 0,
            end_time: 0,
            seen_ns: now,
            since_ns: now,
          },
        );
      }
    });
  }

  close(): Promise<void> {
    return this.cluster.close();
  }
}

/** Writes rows into a pinned map. */
function write<Name extends "subnets4" | "connections4">(
  host: Host,
  name: Name,
  fill: (put: (key: object, value: object) => void) => void,
): void {
  const keys = codec(maps[name].key);
  const values = codec(maps[name].value);
  const entries: [Uint8Array, Uint8Array][] = [];
  fill((key, value) => entries.push([keys.encode(key as never), values.encode(value as never)]));
  const map = openPinnedMap(join(host.pinPath, name));
  try {
    map.updateBatch(entries, 8192);
  } finally {
    map.close();
  }
}

/** Sets it up and lets traffic of every kind pass once. */
export async function createStage(): Promise<Stage> {
  const cluster = await createCluster({ flags: ["--ip-masq", "--peer-probes=10"] });
  try {
    const { lab, h1, a, b } = cluster;
    await lab.router("router", ["10.4.7.1/24", "10.4.8.1/24"]);
    const server = await lab.host("server", { address: `${OUTSIDE}/24` });
    const stranger = await lab.host("stranger", { address: `${STRANGER}/24` });
    await serve(server);
    for (const place of [server, b]) {
      await place.spawn(["/usr/bin/python3", "-c", KEEP]).line(/^ready$/);
    }
    const rule = `-A PREROUTING -d ${SERVICE} -p tcp --dport 80 -j DNAT --to-destination ${b.address}:${HOLD_PORT}`;
    await h1.exec(["iptables-restore", "--noflush"], { input: `*nat\n${rule}\nCOMMIT\n` });
    const holder = a.spawn(["/usr/bin/python3", "-c", HOLD, `${OUTSIDE}:${HOLD_PORT}`, `${SERVICE}:80`]);
    await holder.line(/^open$/);
    await probe(a, `udp ${OUTSIDE} ${UDP_PORT} 100 --count 3`);
    await probe(a, `tcp ${b.address} ${TCP_PORT} 100000 100000`);
    // It goes on, as its connection is forgotten half a minute after the last.
    await a.startPing(OUTSIDE, { interval: 1 });
    await a.ping(b.address, { count: 5 });
    const stage = new Stage(cluster, stranger, holder);
    await stage.forge();
    // Probes are said of a peer every five seconds.
    await until("h2 to answer h1's probes", () =>
      readPeersNote(h1.pinPath)?.peers.some(({ state }) => state === "reachable"),
    );
    return stage;
  } catch (error) {
    await cluster.close();
    throw error;
  }
}
