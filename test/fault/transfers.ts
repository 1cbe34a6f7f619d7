/**
 * Many slow TCP connections whose bytes are known in advance, and how many of them broke.
 *
 * Each connection carries a stretch of one fixed block of bytes, which begins at another place for each, at a
 * pace that many of them can keep on a busy machine. The receiver compares every byte and acknowledges the total
 * at the end. A connection counts as whole only if it was told to end, and both ends agree on what it carried.
 */
import type { Namespace, Pod } from "../lab.ts";
import { type Process, patience, until } from "../process.ts";

const shared = `
import { createHash } from "node:crypto";
const SIZE = 65536;
// The same bytes in both processes.
const block = Buffer.concat(Array.from({ length: SIZE / 32 }, (_, i) => createHash("sha256").update("b" + i).digest()));
const twice = Buffer.concat([block, block]);
const stretch = (index, at, length) => {
  const start = (index * 977 + at) % SIZE;
  return twice.subarray(start, start + length);
};
`;

const receiver = `
import { createServer } from "node:net";
${shared}
const server = createServer({ allowHalfOpen: true }, (socket) => {
  let index, head = Buffer.alloc(0), bytes = 0;
  socket.on("data", (data) => {
    if (index === undefined) {
      head = Buffer.concat([head, data]);
      if (head.length < 4) return;
      index = head.readUInt32BE(0);
      data = head.subarray(4);
    }
    for (let at = 0; at < data.length; at += 16384) {
      const part = data.subarray(at, at + 16384);
      if (!part.equals(stretch(index, bytes, part.length))) {
        console.log("broken", index, "other bytes arrived than were sent");
        socket.destroy();
        return;
      }
      bytes += part.length;
    }
  });
  socket.on("end", () => socket.end("whole " + bytes));
  socket.on("error", (error) => console.log("broken", index, error.message));
}).listen(Number(process.argv[1]), "0.0.0.0", () => console.log("listening"));
`;

const sender = `
import { connect } from "node:net";
${shared}
const [host, port, count] = process.argv.slice(1);
const CHUNK = 2048, PACE = 50;
let ending = false, connected = 0, total = 0, told = 0;
process.on("SIGUSR2", () => { ending = true; });
for (let index = 0; index < Number(count); index++) {
  const socket = connect(Number(port), host);
  let bytes = 0, answer = "", over = false;
  const end = (word, why) => {
    if (over) return;
    over = true;
    console.log(word, index, why);
  };
  const more = () => {
    if (over) return;
    if (ending) return socket.end();
    const data = stretch(index, bytes, CHUNK);
    bytes += CHUNK;
    total += CHUNK;
    if (total - told >= 65536) console.log("carried", (told = total));
    const pace = () => setTimeout(more, PACE);
    if (socket.write(data)) pace();
    else socket.once("drain", pace);
  };
  socket.on("connect", () => {
    if (++connected === Number(count)) console.log("connected");
    const head = Buffer.alloc(4);
    head.writeUInt32BE(index);
    socket.write(head);
    setTimeout(more, (index * PACE) / Number(count));
  });
  socket.on("data", (data) => { answer += data; });
  socket.on("close", () => {
    if (ending && answer === "whole " + bytes) end("whole", bytes);
    else end("broken", "it was closed before its end, or after other bytes: " + answer);
  });
  socket.on("error", (error) => end("broken", error.message));
}
`;

/** Connections under way from a pod to another. */
export class Transfers {
  readonly count: number;
  readonly #sender: Process;
  readonly #receiver: Process;

  private constructor(sender: Process, receiver: Process, count: number) {
    this.#sender = sender;
    this.#receiver = receiver;
    this.count = count;
  }

  /** Opens `count` connections; resolves when all are open and data flows. */
  static async start(from: Namespace, to: Pod, count: number, port = 5005): Promise<Transfers> {
    const node = [process.execPath, "--input-type=module", "-e"];
    const receiving = to.spawn([...node, receiver, String(port)]);
    await receiving.line(/^listening$/);
    const sending = from.spawn([...node, sender, to.address, String(port), String(count)]);
    await sending.line(/^connected$/);
    const transfers = new Transfers(sending, receiving, count);
    await transfers.flow();
    return transfers;
  }

  /** Waits until all the connections together have taken in 128 KiB more. */
  async flow(): Promise<void> {
    const after = this.#sender.lines.length;
    await this.#sender.line(/^carried/, { after });
    await this.#sender.line(/^carried/, { after: this.#sender.lines.length });
  }

  /** Ends all connections and says why some of them broke, one reason for each. What does not end is broken. */
  async finish(timeout: number = patience): Promise<string[]> {
    this.#sender.kill("SIGUSR2");
    const ended = () => this.#sender.lines.filter(({ text }) => /^(whole|broken) /.test(text));
    const wake = (ring: () => void) => this.#sender.onOutput(ring);
    const all = () => ended().length >= this.count;
    const isOver = await until("the connections to end", all, { wake, timeout }).catch(() => false);
    await this.#sender.stop("SIGKILL");
    await this.#receiver.stop("SIGKILL");
    const broken = ended().filter(({ text }) => text.startsWith("broken"));
    const stuck = isOver === true ? 0 : this.count - ended().length;
    return [...broken.map(({ text }) => text), ...Array.from({ length: stuck }, () => "it never ended")];
  }
}
