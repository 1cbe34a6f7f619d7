/**
 * Makes one end of a cable, which is a veth pair, treat packets as a network card does, so that the segments of a
 * stream keep their order. Of what happens to a packet between two namespaces of one kernel, three things do not happen
 * between two machines, and each of them changes the order of segments:
 *
 * - A packet is its sending socket's until it is received. TCP waits for that (TSQ), and what it then sends, it sends from
 *   the receiver's processor, while others are still in the queue of the sender's. A card is done with a packet once it
 *   is sent.
 * - The receiver works on the sender's processor, and what it answers makes the sender send from there. A card's
 *   interrupt is served by a processor of its host: here each host has one of its own (RPS).
 * - The receiver finds a packet whose bytes TCP keeps for sending again. Where a tunnel ends, the kernel queues such
 *   packets apart from the others. A card writes into memory of its own.
 *
 * Rows of all kinds get it alike. It costs the sender a copy of the packet's headers and a pass through a queue.
 *
 *   node dist/bench/cable.js END WAITING NOWHERE      attaches the programs to these interfaces (by index), says "ready",
 *                                                    and holds them until it is ended
 */
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { attachTcx, compile, openObject } from "../loader/index.ts";
import { type Host, repository } from "../test/lab.ts";

/** Makes the end of the cable at `eth0` of this host one of a card, whose interrupts this processor serves. */
export async function likeACard(host: Host, processor: number): Promise<void> {
  await host.ipBatch(["link add waiting type bridge", "link set waiting up", "link add nowhere type bridge"]);
  const links = JSON.parse((await host.exec(["ip", "-j", "link", "show"])).stdout) as {
    ifindex: number;
    ifname: string;
  }[];
  const indexOf = (name: string) => String(links.find(({ ifname }) => ifname === name)?.ifindex);
  const program = join(repository, "dist/bench/cable.js");
  const held = host.spawn(["node", program, indexOf("eth0"), indexOf("waiting"), indexOf("nowhere")]);
  await held.line(/ready/);
  // /sys shows the interfaces of the namespace in which it was mounted.
  const mask = (1 << processor).toString(16);
  const script = `mount -t sysfs sysfs /sys && echo ${mask} >/sys/class/net/eth0/queues/rx-0/rps_cpus`;
  await host.exec(["unshare", "--mount", "sh", "-c", script]);
}

function hold(end: number, waiting: number, nowhere: number): void {
  const { path } = compile({
    source: join(repository, "bench/cable.bpf.c"),
    includeDirs: [],
    cacheDir: join(repository, "dist/cache"),
  });
  const object = openObject(path);
  object.setRodata({ end, waiting, nowhere });
  object.load();
  attachTcx(object.program("leave"), end, "egress");
  attachTcx(object.program("travel"), waiting, "ingress");
  process.stdout.write("ready\n");
  setInterval(() => {
    // The links are this process's, and last as long as it does.
  }, 2 ** 30);
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? "").href) {
  const [end, waiting, nowhere] = process.argv.slice(2).map(Number);
  if (!end || !waiting || !nowhere) throw new Error("usage: cable END WAITING NOWHERE");
  hold(end, waiting, nowhere);
}
