/** Connection tracking: the layout of what the kernel sends, and a real connection that the stack translates. */
import { afterEach, expect, test } from "vitest";
import { readDatagram, type Tuple } from "../../src/edge/conntrack.ts";
import { createLab, type Lab, repository } from "../lab.ts";

let lab: Lab | undefined;
afterEach(async () => {
  await lab?.close();
  lab = undefined;
});

const attribute = (type: number, content: Buffer, nested = false): Buffer => {
  const header = Buffer.alloc(4);
  header.writeUInt16LE(4 + content.length, 0);
  header.writeUInt16LE(nested ? type | 0x8000 : type, 2);
  return Buffer.concat([header, content, Buffer.alloc((4 - (content.length % 4)) % 4)]);
};
const number = (value: number, bytes: number): Buffer => {
  const buffer = Buffer.alloc(bytes);
  buffer.writeUIntBE(value, 0, bytes);
  return buffer;
};

function tuple(type: number, { source, destination, sourcePort, destinationPort, protocol }: Tuple): Buffer {
  const ip = Buffer.concat([attribute(1, number(source, 4)), attribute(2, number(destination, 4))]);
  const ports =
    protocol === 1
      ? [attribute(4, number(sourcePort, 2))]
      : [attribute(2, number(sourcePort, 2)), attribute(3, number(destinationPort, 2))];
  const proto = Buffer.concat([attribute(1, number(protocol, 1)), ...ports]);
  return attribute(type, Buffer.concat([attribute(1, ip, true), attribute(2, proto, true)]), true);
}

function message(type: number, content: Buffer): Buffer {
  const header = Buffer.alloc(16);
  header.writeUInt32LE(16 + content.length, 0);
  header.writeUInt16LE(type, 4);
  return Buffer.concat([header, content]);
}

const connection = (original: Tuple, reply: Tuple): Buffer =>
  message(0x0100, Buffer.concat([Buffer.from([2, 0, 0, 0]), tuple(1, original), tuple(2, reply)]));
const of = (
  source: number,
  destination: number,
  sourcePort: number,
  destinationPort: number,
  protocol = 6,
): Tuple => ({ source, destination, sourcePort, destinationPort, protocol });

test("of many connections those are read whose reply is not their mirror", () => {
  const plain = connection(of(1, 2, 1000, 80), of(2, 1, 80, 1000));
  const masqueraded = [of(1, 2, 1000, 80), of(2, 9, 80, 1000)] as const;
  const redirected = [of(1, 5, 1000, 80), of(2, 1, 8080, 1000)] as const;
  const echo = [of(1, 2, 77, 77, 1), of(2, 9, 77, 77, 1)] as const;
  const into: Tuple[] = [];
  const many = [plain, connection(...masqueraded), connection(...redirected), connection(...echo)];
  expect(readDatagram(Buffer.concat(many), into)).toBe(false);
  expect(into).toEqual([...masqueraded, ...redirected, ...echo]);
  expect(readDatagram(message(3, Buffer.alloc(4)), into)).toBe(true);
  const refused = Buffer.alloc(4);
  refused.writeInt32LE(-95);
  expect(() => readDatagram(message(2, refused), into)).toThrow(/errno 95/);
  expect(() => readDatagram(plain.subarray(0, 40), into)).toThrow(/cut short/);
});

test("a connection that the stack masquerades is found, with both of its directions", async () => {
  lab = await createLab();
  const [a, b] = [
    await lab.host("h1", { address: "10.4.7.21/24" }),
    await lab.host("h2", { address: "10.4.7.22/24" }),
  ];
  await a.bridge("docker0", "172.7.21.1/24");
  const pod = await a.pod("p", "172.7.21.2/24");
  await a.exec(["iptables", "-t", "nat", "-A", "POSTROUTING", "-s", "172.7.21.0/24", "-j", "MASQUERADE"]);
  const server = await b.httpServer({ port: 8080 });
  expect(await pod.httpGet("http://10.4.7.22:8080/")).toBe("10.4.7.21\n");
  await server.stop();
  const module = JSON.stringify(`${repository}/dist/src/edge/conntrack.js`);
  const program = `import { translatedTuples } from ${module}; console.log(JSON.stringify(translatedTuples()));`;
  const { stdout } = await a.exec([process.execPath, "--input-type=module", "-e", program]);
  const tuples = (JSON.parse(stdout) as Tuple[]).filter(({ protocol }) => protocol === 6);
  const address = (text: string) => text.split(".").reduce((sum, byte) => sum * 256 + Number(byte), 0);
  expect(tuples).toHaveLength(2);
  expect(tuples[0]).toMatchObject({
    source: address("172.7.21.2"),
    destination: address("10.4.7.22"),
    destinationPort: 8080,
  });
  expect(tuples[1]).toMatchObject({
    source: address("10.4.7.22"),
    destination: address("10.4.7.21"),
    sourcePort: 8080,
  });
});
