/**
 * Writes leases of imaginary nodes into an etcd, and times how long single ones take into the kernel. Runs in the
 * network namespace of a host, as a program of its own: `bench/scale.ts` starts it.
 *
 *   node dist/bench/leases.js fill ENDPOINT FROM TO OCTET    leases number FROM to TO - 1, of OCTET.0.0.0/8
 *   node dist/bench/leases.js time ENDPOINT PINPATH FROM N   N leases, one after the other; prints JSON
 */
import { join } from "node:path";
import { Etcd3 } from "etcd3";
import { openPinnedMap } from "../loader/index.ts";

const PREFIX = "/coreos.com/network/subnets/";
/** Puts under way at a time. */
const PARALLEL = 64;

interface Lease {
  readonly key: string;
  readonly value: string;
  /** Key of the map `subnets4`: four bytes of address, and the prefix length. */
  readonly row: Buffer;
}

/** Lease number `n`, from 256 on: subnet 10.x.y.0/24, or one of another /8, of the node at 192.168.x.y. */
function lease(n: number, first = 10): Lease {
  const [x, y] = [n >> 8, n & 255];
  const octet = (byte: number): string => byte.toString(16).padStart(2, "0");
  const row = Buffer.from([first, x, y, 0, 0, 0, 0, 0]);
  row.writeUInt32LE(24, 4);
  return {
    key: `${PREFIX}${first}.${x}.${y}.0-24`,
    value: JSON.stringify({
      PublicIP: `192.168.${x}.${y}`,
      PublicIPv6: null,
      BackendType: "vxlan",
      BackendData: { VNI: 1, VtepMAC: `02:54:00:00:${octet(x)}:${octet(y)}` },
    }),
    row,
  };
}

async function fill(client: Etcd3, from: number, to: number, first: number): Promise<void> {
  let next = from;
  const worker = async (): Promise<void> => {
    while (next < to) {
      const { key, value } = lease(next++, first);
      await client.put(key).value(value);
    }
  };
  await Promise.all(Array.from({ length: PARALLEL }, worker));
}

/** Milliseconds from the answer to a put (and from sending it) until the row is in the map. */
async function time(client: Etcd3, pinPath: string, from: number, count: number): Promise<void> {
  const map = openPinnedMap(join(pinPath, "subnets4"));
  const [sent, answered]: [number[], number[]] = [[], []];
  for (let n = from; n < from + count; n++) {
    const { key, value, row } = lease(n);
    const begin = performance.now();
    let put = 0;
    const answer = client
      .put(key)
      .value(value)
      .then(() => {
        put = performance.now();
      });
    const deadline = begin + 10_000;
    while (map.lookup(row) === undefined) {
      if (performance.now() > deadline) throw new Error(`${key} did not come into the map within 10 s`);
      // Lets the answer in.
      await new Promise<void>((resolve) => setImmediate(resolve));
    }
    const seen = performance.now();
    await answer;
    sent.push(seen - begin);
    answered.push(Math.max(0, seen - put));
  }
  map.close();
  process.stdout.write(`${JSON.stringify({ sent, answered })}\n`);
}

const [mode, endpoint = "", ...rest] = process.argv.slice(2);
const client = new Etcd3({ hosts: [endpoint] });
try {
  if (mode === "fill") await fill(client, Number(rest[0]), Number(rest[1]), Number(rest[2]));
  else if (mode === "time") await time(client, rest[0] ?? "", Number(rest[1]), Number(rest[2]));
  else throw new Error(`no such mode: ${mode}`);
} finally {
  client.close();
}
