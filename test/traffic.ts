/**
 * Traffic for the lab, and the eyes to see it with: pings that count every packet, captures that miss none, a
 * web server that tells at which address it saw its client.
 *
 * A ping that runs while something is done to the host is judged by sequence numbers, so that the one packet
 * still under way when it is stopped is not taken for a loss. A capture counts as started when tcpdump says so,
 * which it does with the filter in place, and as ended when tcpdump has taken all the kernel kept for it.
 */
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { Namespace } from "./lab.ts";
import { exec, type Process, patience, runDirectory, until } from "./process.ts";

export interface PingOptions {
  /** Seconds between two packets; default 0.01. */
  readonly interval?: number;
  /** Bytes of ICMP payload. */
  readonly size?: number;
  /** Sets the don't-fragment bit. */
  readonly dontFragment?: boolean;
  readonly source?: string;
  /** More arguments for ping(8), such as `-R`. */
  readonly arguments?: readonly string[];
}

export interface PingResult {
  readonly sent: number;
  readonly received: number;
  /** Sequence numbers that no reply came for, beginning with 1. */
  readonly lost: readonly number[];
  readonly duplicates: number;
  /** Everything ping printed, with the errors routers sent. */
  readonly output: string;
}

/** A ping(8) under way. */
export class Ping {
  readonly process: Process;
  readonly #address: string;

  constructor(from: Namespace, address: string, options: PingOptions & { count?: number }) {
    this.#address = address;
    const { interval = 0.01, count, size, dontFragment, source } = options;
    const argv = ["ping", "-n", "-W", "1", "-i", String(interval)];
    if (count !== undefined) argv.push("-c", String(count));
    if (size !== undefined) argv.push("-s", String(size));
    if (dontFragment !== undefined) argv.push("-M", dontFragment ? "do" : "dont");
    if (source !== undefined) argv.push("-I", source);
    // Without a line buffer the replies would come to us in blocks of 4096 bytes.
    this.process = from.spawn(["stdbuf", "-oL", ...argv, ...(options.arguments ?? []), address]);
  }

  /** Waits for the first reply. */
  async firstReply(): Promise<void> {
    await this.process.line(/bytes from .* icmp_seq=\d+/);
  }

  /** Waits for `count` more replies. */
  async replies(count: number): Promise<void> {
    let after = this.process.lines.length;
    for (let seen = 0; seen < count; seen++) {
      await this.process.line(/bytes from .* icmp_seq=\d+/, { after });
      after =
        this.process.lines.findIndex((line, index) => index >= after && /icmp_seq=/.test(line.text)) + 1;
    }
  }

  /** Ends the ping after its last reply and says what was lost. */
  async stop(): Promise<PingResult> {
    this.process.kill("SIGINT");
    return this.#result(true);
  }

  /** Waits for a ping with a count to end by itself. */
  async finished(): Promise<PingResult> {
    return this.#result(false);
  }

  async #result(interrupted: boolean): Promise<PingResult> {
    await this.process.exited;
    const output = this.process.text();
    const summary = /(\d+) packets transmitted, (\d+) received/.exec(output);
    if (summary === null) throw new Error(`ping ${this.#address} gave no summary:\n${output}`);
    const answered = new Set<number>();
    let duplicates = 0;
    for (const match of output.matchAll(/bytes from .* icmp_seq=(\d+) .*?(DUP!)?$/gm)) {
      answered.add(Number(match[1]));
      if (match[2] !== undefined) duplicates++;
    }
    let sent = Number(summary[1]);
    // The signal came between the last packet and its reply.
    if (interrupted && !answered.has(sent)) sent--;
    const lost = Array.from({ length: sent }, (_, index) => index + 1).filter(
      (sequence) => !answered.has(sequence),
    );
    return { sent, received: answered.size, lost, duplicates, output };
  }
}

/** One captured frame. */
export interface Frame {
  /** Seconds since the epoch. */
  readonly time: number;
  /** The frame from its first byte: an Ethernet header, unless the device has none. */
  readonly bytes: Buffer;
}

let captures = 0;

/** A tcpdump under way. */
export class Capture {
  /** The pcap file; complete after `stop`. */
  readonly file: string;
  readonly #process: Process;

  private constructor(file: string, process: Process) {
    this.file = file;
    this.#process = process;
  }

  /**
   * Starts capturing; resolves when the kernel hands over packets. `filter` is a pcap filter, `snapshot` the
   * length of the longest frame: the shorter, the more of them fit in a burst.
   */
  static async start(from: Namespace, device: string, filter: string, snapshot = 68_000): Promise<Capture> {
    const directory = join(runDirectory, from.lab.id, "captures");
    mkdirSync(directory, { recursive: true });
    const file = join(directory, `${from.name}-${device}-${captures++}.pcap`);
    // In immediate mode the kernel keeps a slot of the snapshot length for each frame: no longer than a GSO frame
    // with its tunnel headers, and 64 MiB of them, so that a bulk transfer fits. Debian's tcpdump would change to
    // a user who may not write here, hence -Z root.
    const limits = ["-s", `${snapshot}`, "-B", "65536", "-Z", "root"];
    const argv = ["tcpdump", "-n", "-i", device, "-U", "--immediate-mode", ...limits, "-w", file];
    const process = from.spawn([...argv, ...(filter === "" ? [] : [filter])]);
    await process.line(/listening on/);
    return new Capture(file, process);
  }

  /** Ends the capture once tcpdump has written every packet the kernel has for it. Throws if one was missed. */
  async stop(): Promise<void> {
    if (!this.#process.running) return;
    // On SIGUSR1 tcpdump prints how many packets it wrote and how many the filter let through.
    const counts = async () => {
      const after = this.#process.lines.length;
      this.#process.kill("SIGUSR1");
      const line = /(\d+) packets? captured, (\d+) packets? received by filter, (\d+) packets? dropped/;
      const [, captured, received, dropped] = await this.#process.line(line, { after });
      if (Number(dropped) > 0)
        throw new Error(`the capture ${this.file} is incomplete: ${dropped} packets dropped`);
      return captured === received;
    };
    await until("tcpdump to write all packets", counts);
    await this.#process.stop("SIGINT");
  }

  /** The frames of a stopped capture. */
  frames(): Frame[] {
    const file = readFileSync(this.file);
    // Classic pcap, little-endian, microseconds: a header of 24 bytes, then 16 bytes before each frame.
    if (file.readUInt32LE(0) !== 0xa1b2c3d4) throw new Error(`${this.file} is no pcap file of this machine`);
    const frames: Frame[] = [];
    for (let at = 24; at + 16 <= file.length; ) {
      const length = file.readUInt32LE(at + 8);
      const time = file.readUInt32LE(at) + file.readUInt32LE(at + 4) / 1e6;
      frames.push({ time, bytes: file.subarray(at + 16, at + 16 + length) });
      at += 16 + length;
    }
    return frames;
  }

  /**
   * Fields of the packets of a stopped capture, as tshark names them (`ip.src`, `vxlan.vni`); a row for each
   * packet that the display filter accepts. A field that occurs twice, as `ip.src` does in a tunnel, comes as
   * `outer,inner`.
   */
  async fields<Name extends string>(names: readonly Name[], filter = ""): Promise<Record<Name, string>[]> {
    const columns = names.flatMap((name) => ["-e", name]);
    const argv = ["-T", "fields", ...columns, ...(filter === "" ? [] : ["-Y", filter])];
    const { stdout } = await exec([...this.#tshark, ...argv], { timeout: 4 * patience });
    const lines = stdout.split("\n").slice(0, -1);
    return lines.map((line) => {
      const values = line.split("\t");
      return Object.fromEntries(names.map((name, index) => [name, values[index] ?? ""])) as Record<
        Name,
        string
      >;
    });
  }

  /** The capture in tshark's words, for messages. */
  async summary(): Promise<string> {
    return (await exec(this.#tshark, { timeout: 4 * patience })).stdout;
  }

  get #tshark(): string[] {
    const checks = ["ip", "udp", "tcp"].flatMap((protocol) => ["-o", `${protocol}.check_checksum:TRUE`]);
    // tshark knows VXLAN at port 4789 only; flannel's default is Linux's older one.
    return ["tshark", "-n", "-r", this.file, "-d", "udp.port==8472,vxlan", ...checks];
  }
}

/** What a web server saw. */
export interface Request {
  /** Address of the client. */
  readonly source: string;
  readonly path: string;
}

/** A web server under way: `/` answers with the client's address and a newline, `/large` with 4 MiB. */
export class HttpServer {
  readonly process: Process;
  readonly port: number;

  private constructor(process: Process, port: number) {
    this.process = process;
    this.port = port;
  }

  static async start(
    inside: Namespace,
    options: { port?: number; program?: "node" | "nginx" },
  ): Promise<HttpServer> {
    const { port = 80, program = "node" } = options;
    if (program === "node") {
      const server = inside.spawn([process.execPath, "--input-type=module", "-e", nodeServer, String(port)]);
      await server.line(/^listening$/);
      return new HttpServer(server, port);
    }
    const directory = join(runDirectory, inside.lab.id, `${inside.name}-nginx`);
    mkdirSync(directory, { recursive: true });
    writeFileSync(join(directory, "large"), Buffer.alloc(large));
    writeFileSync(join(directory, "nginx.conf"), nginxConfig(directory, port));
    // nginx opens /dev/stdout by name, which works for a pipe but not for the socket that Node gives its children.
    const command = `nginx -p ${directory} -e stderr -c ${join(directory, "nginx.conf")} | cat`;
    const server = inside.spawn(["sh", "-c", command]);
    // Said after the sockets were opened.
    await server.line(/using the "epoll" event method/);
    return new HttpServer(server, port);
  }

  /** All requests so far. */
  get requests(): Request[] {
    return this.process.lines.flatMap((line) => {
      const match = /^request (\S+) (\S+)$/.exec(line.text);
      return match === null ? [] : [{ source: match[1] ?? "", path: match[2] ?? "" }];
    });
  }

  /** Waits until request number `index` (from 0) has been seen. */
  async request(index: number): Promise<Request> {
    const wake = (ring: () => void) => this.process.onOutput(ring);
    return until(`request ${index} to reach the server`, () => this.requests[index], { wake });
  }

  async stop(): Promise<void> {
    await this.process.stop();
  }
}

const large = 4 * 1024 * 1024;

const nodeServer = `
import { createServer } from "node:http";
createServer((request, response) => {
  console.log("request " + request.socket.remoteAddress + " " + request.url);
  response.end(request.url === "/large" ? Buffer.alloc(${large}) : request.socket.remoteAddress + "\\n");
}).listen(Number(process.argv[1]), "0.0.0.0", () => console.log("listening"));
`;

function nginxConfig(directory: string, port: number): string {
  return `
daemon off;
master_process off;
pid ${directory}/nginx.pid;
error_log stderr notice;
events {}
http {
  log_format twill "request $remote_addr $request_uri";
  access_log /dev/stdout twill;
  client_body_temp_path ${directory};
  proxy_temp_path ${directory};
  fastcgi_temp_path ${directory};
  uwsgi_temp_path ${directory};
  scgi_temp_path ${directory};
  server {
    listen ${port};
    location = /large { root ${directory}; }
    location / { default_type text/plain; return 200 "$remote_addr\\n"; }
  }
}
`;
}
