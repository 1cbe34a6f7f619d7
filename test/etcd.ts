/**
 * An etcd of the lab's own: one member or several, in plain HTTP or with TLS and client certificates, on a host
 * of its own so that all the others reach it over the network.
 *
 * Members can be stopped, frozen and started again one by one, to see what the agent makes of it.
 */
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { Host } from "./lab.ts";
import { exec, type Process } from "./process.ts";

export interface EtcdOptions {
  /** One member for each, with prefix length, all in one network: `10.4.7.11/24`. */
  readonly addresses: readonly string[];
  /** Serve HTTPS, and ask clients for a certificate. */
  readonly tls?: boolean;
}

export interface Certificates {
  readonly ca: string;
  readonly cert: string;
  readonly key: string;
}

interface Member {
  readonly name: string;
  readonly argv: readonly string[];
  process: Process | undefined;
}

/** A running etcd cluster. Make it with `lab.etcd`. */
export class Etcd {
  readonly host: Host;
  /** Client URLs, one for each member. */
  readonly endpoints: readonly string[];
  /** The client's files; undefined without TLS. */
  readonly certificates: Certificates | undefined;
  readonly #members: readonly Member[];

  private constructor(
    host: Host,
    endpoints: readonly string[],
    certificates: Certificates | undefined,
    members: readonly Member[],
  ) {
    this.host = host;
    this.endpoints = endpoints;
    this.certificates = certificates;
    this.#members = members;
  }

  /** Starts all members on a host that has their addresses; resolves when each serves clients. */
  static async start(host: Host, options: EtcdOptions): Promise<Etcd> {
    const addresses = options.addresses.map((address) => address.replace(/\/.*/, ""));
    const tls =
      options.tls === true ? await makeCertificates(join(host.directory, "tls"), addresses) : undefined;
    const scheme = tls === undefined ? "http" : "https";
    const cluster = addresses.map((address, index) => `member${index}=http://${address}:2380`).join(",");
    const members = addresses.map((address, index): Member => {
      const name = `member${index}`;
      const client = `${scheme}://${address}:2379`;
      const argv = ["etcd", "--logger=zap", "--log-level=info", `--name=${name}`];
      argv.push(
        `--data-dir=${join(host.directory, name)}`,
        "--unsafe-no-fsync",
        `--initial-cluster=${cluster}`,
      );
      argv.push(`--listen-client-urls=${client}`, `--advertise-client-urls=${client}`);
      argv.push(
        `--listen-peer-urls=http://${address}:2380`,
        `--initial-advertise-peer-urls=http://${address}:2380`,
      );
      if (tls !== undefined) {
        argv.push(`--cert-file=${tls.server.cert}`, `--key-file=${tls.server.key}`);
        argv.push(`--trusted-ca-file=${tls.server.ca}`, "--client-cert-auth");
      }
      return { name, argv, process: undefined };
    });
    const endpoints = addresses.map((address) => `${scheme}://${address}:2379`);
    const etcd = new Etcd(host, endpoints, tls?.client, members);
    await Promise.all(members.map((_, index) => etcd.startMember(index)));
    return etcd;
  }

  /** The flags that point twilld (or flanneld) at this etcd. */
  get flags(): string[] {
    const flags = [`--etcd-endpoints=${this.endpoints.join(",")}`];
    if (this.certificates !== undefined) {
      const { ca, cert, key } = this.certificates;
      flags.push(`--etcd-keyfile=${key}`, `--etcd-certfile=${cert}`, `--etcd-cafile=${ca}`);
    }
    return flags;
  }

  /** Runs etcdctl (API 3) on the etcd host; returns what it printed. */
  async ctl(...argv: string[]): Promise<string> {
    const { certificates } = this;
    const tls =
      certificates === undefined
        ? []
        : [`--cacert=${certificates.ca}`, `--cert=${certificates.cert}`, `--key=${certificates.key}`];
    const command = [
      "etcdctl",
      "--command-timeout=15s",
      `--endpoints=${this.endpoints.join(",")}`,
      ...tls,
      ...argv,
    ];
    return (await this.host.exec(command, { env: { ETCDCTL_API: "3" } })).stdout;
  }

  /**
   * Writes a key. While members elect a leader, one that was killed among them, etcd gives a write up half-way and
   * says that it does not know what became of it; etcdctl leaves it at that. The same value again does no harm.
   */
  async put(key: string, value: string): Promise<void> {
    for (let attempt = 1; ; attempt++) {
      try {
        await this.ctl("put", key, value);
        return;
      } catch (error) {
        if (attempt === 5 || !/etcdserver: (request timed out|leader changed|no leader)/.test(`${error}`))
          throw error;
      }
    }
  }

  /** All keys under a prefix with their values, in the order of the keys. */
  async list(prefix: string): Promise<Map<string, string>> {
    const answer = JSON.parse(await this.ctl("get", prefix, "--prefix", "-w", "json")) as {
      kvs?: { key: string; value?: string }[];
    };
    const text = (base64: string | undefined) => Buffer.from(base64 ?? "", "base64").toString("utf8");
    return new Map((answer.kvs ?? []).map((kv) => [text(kv.key), text(kv.value)]));
  }

  /** The process of a member, to freeze it (SIGSTOP) or to kill it. */
  member(index: number): Process {
    const child = this.#members[index]?.process;
    if (child === undefined) throw new Error(`etcd has no running member ${index}`);
    return child;
  }

  /** Starts a member, with the data it had before; resolves when it serves clients. */
  async startMember(index: number): Promise<void> {
    const member = this.#members[index];
    if (member === undefined) throw new Error(`etcd has no member ${index}`);
    member.process = this.host.spawn(member.argv);
    await member.process.line(/ready to serve client requests|serving client traffic/);
  }

  async stopMember(index: number): Promise<void> {
    await this.member(index).stop("SIGKILL");
  }
}

/** A CA, a certificate for the servers' addresses and one for clients, as files. */
async function makeCertificates(
  directory: string,
  addresses: readonly string[],
): Promise<{ server: Certificates; client: Certificates }> {
  mkdirSync(directory, { recursive: true });
  const ca = join(directory, "ca.pem");
  const newKey = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"];
  const caKey = join(directory, "ca-key.pem");
  await exec(["openssl", "req", "-x509", ...newKey, "-subj", "/CN=lab ca", "-keyout", caKey, "-out", ca]);
  const sign = async (name: string, extensions: string): Promise<Certificates> => {
    const key = join(directory, `${name}-key.pem`);
    const request = join(directory, `${name}.csr`);
    const cert = join(directory, `${name}.pem`);
    const extensionFile = join(directory, `${name}.ext`);
    writeFileSync(extensionFile, extensions);
    await exec(["openssl", "req", ...newKey, "-subj", `/CN=${name}`, "-keyout", key, "-out", request]);
    const signing = ["openssl", "x509", "-req", "-days", "2", "-CA", ca, "-CAkey", caKey, "-CAcreateserial"];
    await exec([...signing, "-in", request, "-out", cert, "-extfile", extensionFile]);
    return { ca, cert, key };
  };
  const names = addresses.map((address) => `IP:${address}`).join(",");
  const server = await sign("server", `subjectAltName=${names}\nextendedKeyUsage=serverAuth,clientAuth\n`);
  const client = await sign("client", "extendedKeyUsage=clientAuth\n");
  return { server, client };
}
