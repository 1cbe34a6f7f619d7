/**
 * TCP connections that stay open and carry data while something is done to the hosts, and UDP echoes.
 *
 * Each connection sends random bytes at a steady pace until it is told to end; both ends hash what they sent and
 * saw. A connection that breaks, or that brings other bytes than were sent, is found by comparing the two.
 */
import type { Namespace, Pod } from "./lab.ts";
import { type Process, until } from "./process.ts";

export interface StreamsResult {
  /** Bytes that arrived, over all connections. */
  readonly bytes: number;
  /** The longest time a receiver waited for data, in milliseconds. */
  readonly longestGap: number;
}

const receiver = `
import { createServer } from "node:net";
import { createHash } from "node:crypto";
let reported = 0, total = 0;
createServer((socket) => {
  const hash = createHash("sha256");
  let bytes = 0, gap = 0, last = performance.now();
  socket.on("data", (data) => {
    const now = performance.now();
    gap = Math.max(gap, now - last);
    last = now;
    hash.update(data);
    bytes += data.length;
    total += data.length;
    if (total - reported >= 1 << 20) console.log("received", (reported = total));
  });
  socket.on("end", () => console.log("arrived", socket.remotePort, bytes, hash.digest("hex"), Math.round(gap)));
  socket.on("error", (error) => console.log("broken", socket.remotePort, error.message));
}).listen(Number(process.argv[1]), "0.0.0.0", () => console.log("listening"));
`;

const sender = `
import { connect } from "node:net";
import { createHash, randomBytes } from "node:crypto";
const [host, port, count] = process.argv.slice(1);
let ending = false, connected = 0;
process.on("SIGUSR2", () => { ending = true; });
for (let i = 0; i < Number(count); i++) {
  const socket = connect(Number(port), host);
  const hash = createHash("sha256");
  let bytes = 0;
  const more = () => {
    if (ending) return socket.end(() => console.log("sent", socket.localPort, bytes, hash.digest("hex")));
    const data = randomBytes(16384);
    hash.update(data);
    bytes += data.length;
    const pace = () => setTimeout(more, 10);
    if (socket.write(data)) pace();
    else socket.once("drain", pace);
  };
  socket.on("connect", () => {
    if (++connected === Number(count)) console.log("connected");
    more();
  });
  socket.on("error", (error) => console.log("broken", socket.localPort, error.message));
}
`;

/** Connections under way from one pod to another. */
export class Streams {
  readonly #sender: Process;
  readonly #receiver: Process;
  readonly #count: number;

  private constructor(sender: Process, receiver: Process, count: number) {
    this.#sender = sender;
    this.#receiver = receiver;
    this.#count = count;
  }

  /**
   * Opens `count` connections; resolves when all are open and a megabyte has arrived. `through` is what they are
   * addressed to, if that is not the receiver itself.
   */
  static async start(
    from: Namespace,
    to: Namespace & { readonly address: string },
    count: number,
    port = 5001,
    through = { address: to.address, port },
  ): Promise<Streams> {
    const node = [process.execPath, "--input-type=module", "-e"];
    const receiving = to.spawn([...node, receiver, String(port)]);
    await receiving.line(/^listening$/);
    const sending = from.spawn([...node, sender, through.address, String(through.port), String(count)]);
    await sending.line(/^connected$/);
    const streams = new Streams(sending, receiving, count);
    await streams.flow(1);
    return streams;
  }

  /** Waits until `megabytes` more have arrived. */
  async flow(megabytes: number): Promise<void> {
    let after = this.#receiver.lines.length;
    for (let seen = 0; seen < megabytes; seen++) {
      await this.#receiver.line(/^received/, { after });
      after =
        this.#receiver.lines.findIndex((line, index) => index >= after && line.text.startsWith("received")) +
        1;
    }
  }

  /** Ends all connections; throws if one broke or if what arrived is not what was sent. */
  async finish(): Promise<StreamsResult> {
    this.#sender.kill("SIGUSR2");
    const count = (process: Process, word: string) =>
      process.lines.filter(({ text }) => text.startsWith(`${word} `) || text.startsWith("broken ")).length;
    const over = () =>
      [count(this.#sender, "sent"), count(this.#receiver, "arrived")].every((n) => n >= this.#count);
    const wake = (ring: () => void) => {
      const undo = [this.#sender.onOutput(ring), this.#receiver.onOutput(ring)];
      return () => {
        for (const step of undo) step();
      };
    };
    try {
      await until("all connections to end", over, { wake });
    } catch (error) {
      throw new Error(`${error}\n${this.#sender.text()}\n${this.#receiver.text()}`);
    }
    const broken = [...this.#sender.lines, ...this.#receiver.lines].filter(({ text }) =>
      text.startsWith("broken "),
    );
    if (broken.length > 0) throw new Error(broken.map(({ text }) => text).join("\n"));
    const read = (process: Process, word: string) =>
      process.lines.flatMap(({ text }) => {
        const [what, port = "", bytes = "", hash = "", gap = "0"] = text.split(" ");
        return what === word ? [{ port, bytes: Number(bytes), hash, gap: Number(gap) }] : [];
      });
    const arrived = read(this.#receiver, "arrived");
    // By what they carried: a masqueraded connection has another port at its other end.
    for (const { port, bytes, hash } of read(this.#sender, "sent")) {
      if (!arrived.some((stream) => stream.bytes === bytes && stream.hash === hash))
        throw new Error(`port ${port}: the ${bytes} bytes that were sent are not what arrived`);
    }
    await this.#sender.stop();
    await this.#receiver.stop();
    return {
      bytes: arrived.reduce((sum, stream) => sum + stream.bytes, 0),
      longestGap: Math.max(...arrived.map((stream) => stream.gap)),
    };
  }
}

const echoServer = `
import { createSocket } from "node:dgram";
const socket = createSocket("udp4");
socket.on("message", (data, { address, port }) => socket.send(data, port, address));
socket.bind(Number(process.argv[1]), () => console.log("listening"));
`;

const echoClient = `
import { createSocket } from "node:dgram";
import { randomBytes } from "node:crypto";
const [host, port, sizes] = process.argv.slice(1);
const socket = createSocket("udp4");
for (const size of sizes.split(",").map(Number)) {
  const sent = randomBytes(size);
  const answer = new Promise((resolve) => socket.once("message", resolve));
  socket.send(sent, Number(port), host);
  const timer = setTimeout(() => { console.log("no answer to", size); process.exit(1); }, 5000);
  if (!sent.equals(await answer)) { console.log("another answer to", size); process.exit(1); }
  clearTimeout(timer);
}
socket.close();
`;

/** Sends a datagram of each size, one after the other from one port, and expects the same bytes back. */
export async function echo(from: Namespace, to: Pod, sizes: readonly number[], port = 5002): Promise<void> {
  const node = [process.execPath, "--input-type=module", "-e"];
  const server = to.spawn([...node, echoServer, String(port)]);
  await server.line(/^listening$/);
  await from.exec([...node, echoClient, to.address, String(port), sizes.join(",")]);
  await server.stop();
}
