/** Several networks on one host, each with a daemon of its own: side by side if they are apart, and refused if not. */
import { existsSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { removeRundir } from "../../src/edge/rundir.ts";
import { createLab, type Etcd, type Host, type Lab, type Pod, until } from "../lab.ts";
import { spawnTwilld, type Twilld, twill } from "../twilld.ts";
import { probe, serve, TCP_PORT } from "./cluster.ts";

/** As in flannel's own test of several networks, with names that say which is which. */
const NETWORKS = {
  vxlan: { network: "10.11.0.0/16", backend: { Type: "vxlan" }, port: 2401 },
  hostgw: { network: "10.12.0.0/16", backend: { Type: "host-gw" }, port: 2402 },
  udp: { network: "10.13.0.0/16", backend: { Type: "udp" }, port: 2403 },
  ipip: { network: "10.14.0.0/16", backend: { Type: "ipip" }, port: 2404 },
} as const;
type Name = keyof typeof NETWORKS;
const NAMES = Object.keys(NETWORKS) as Name[];
const NUMBERS = [21, 22] as const;

let lab: Lab;
let etcd: Etcd;
let hosts: Host[];
const twillds = new Map<string, Twilld>();
const pods = new Map<string, Pod>();
const pins: string[] = [];
const hostAt = (index: number): Host => hosts[index] ?? expect.fail();
const podOf = (name: Name, index: number): Pod => pods.get(`${name} ${index}`) ?? expect.fail();
const base = (name: Name): string => NETWORKS[name].network.replace(".0.0/16", "");
/** The address of a host in a network. */
const gateway = (name: Name, index: number): string => `${base(name)}.${NUMBERS[index]}.1`;
const pinOf = (host: Host, name: string): string => `${host.pinPath}/${name}`;

function flagsOf(host: Host, name: string, port: number): string[] {
  return [
    ...etcd.flags,
    `--etcd-prefix=/${name}/network`,
    "--iface=eth0",
    `--subnet-file=${join(host.directory, `${name}.env`)}`,
    "--healthz-ip=127.0.0.1",
    `--healthz-port=${port}`,
    `--pin-path=${pinOf(host, name)}`,
  ];
}

function start(index: number, name: string, port: number, more: readonly string[] = []): Twilld {
  const host = hostAt(index);
  pins.push(pinOf(host, name));
  return spawnTwilld(host, [...flagsOf(host, name, port), ...more]);
}

beforeAll(async () => {
  lab = await createLab();
  etcd = await lab.etcd({ addresses: ["10.4.7.11/24"] });
  hosts = [];
  for (const number of NUMBERS)
    hosts.push(await lab.host(`h${number - 20}`, { address: `10.4.7.${number}/24` }));
  for (const name of NAMES) {
    const { network, backend, port } = NETWORKS[name];
    await etcd.put(`/${name}/network/config`, JSON.stringify({ Network: network, Backend: backend }));
    for (const [index, number] of NUMBERS.entries()) {
      const host = hostAt(index);
      const subnet = `${base(name)}.${number}`;
      writeFileSync(join(host.directory, `${name}.env`), `FLANNEL_SUBNET=${subnet}.1/24\n`);
      const bridge = await host.bridge(`br-${name}`, `${subnet}.1/24`, { mtu: 1450 });
      const pod = await host.pod(name, `${subnet}.2/24`, { bridge, mtu: 1450 });
      pods.set(`${name} ${index}`, pod);
      await serve(pod);
      twillds.set(`${name} ${index}`, start(index, name, port));
    }
  }
  for (const twilld of twillds.values()) {
    await twilld.ready();
    await twilld.statusWhere("its peer", ({ peers, failures }) => peers === 1 && failures.length === 0);
  }
});
afterAll(async () => {
  await lab?.close();
  // The lab knows of its hosts' own pin paths, in which these are.
  for (const pin of pins) removeRundir(pin);
});

describe("side by side", () => {
  test.each(NAMES)("%s: each host and each pod reaches those of the other", async (name) => {
    for (const [from, to] of [
      [0, 1],
      [1, 0],
    ] as const) {
      expect((await hostAt(from).ping(gateway(name, to), { count: 3 })).lost).toEqual([]);
      expect((await podOf(name, from).ping(podOf(name, to).address, { count: 3 })).lost).toEqual([]);
      const command = `tcp ${podOf(name, to).address} ${TCP_PORT} 2000000 2000000`;
      expect(await probe(podOf(name, from), command)).toEqual({
        intact: true,
        seen: podOf(name, from).address,
        peer: podOf(name, to).address,
      });
    }
  });

  test("each by its own way: the two crossed pings of flannel's test fail, from either host", async () => {
    for (const [from, to] of [
      [0, 1],
      [1, 0],
    ] as const) {
      for (const [device, address] of [
        ["flannel.1", gateway("hostgw", to)],
        ["eth0", gateway("vxlan", to)],
      ] as const) {
        const options = { count: 2, arguments: ["-I", device, "-W", "1"] };
        expect([device, (await hostAt(from).ping(address, options)).received]).toEqual([device, 0]);
      }
    }
  });

  test("what one of them ends, or is taken off the host, is no matter to the others", async () => {
    const others = NAMES.filter((name) => name !== "vxlan");
    const pings = await Promise.all(others.map((name) => podOf(name, 0).startPing(podOf(name, 1).address)));
    await twillds.get("vxlan 0")?.stop();
    await twill(hostAt(0), "uninstall", `--pin-path=${pinOf(hostAt(0), "vxlan")}`);
    for (const ping of pings) await ping.replies(20);
    const again = start(0, "vxlan", NETWORKS.vxlan.port);
    await again.ready();
    twillds.set("vxlan 0", again);
    for (const ping of pings) {
      await ping.replies(20);
      expect((await ping.stop()).lost).toEqual([]);
    }
    await until("the network that was away to be back", async () => {
      return (await podOf("vxlan", 0).ping(podOf("vxlan", 1).address, { count: 1 })).received === 1;
    });
  });
});

describe("in each other's way", () => {
  test.each<[string, object, string, RegExp, readonly string[]]>([
    [
      "a network that overlaps",
      { Type: "host-gw" },
      "10.12.128.0/17",
      /Network 10\.12\.128\.0\/17 overlaps 10\.12\.0\.0\/16; give one of them another Network/,
      [],
    ],
    [
      "the same VNI",
      { Type: "vxlan", Port: 9000 },
      "10.20.0.0/16",
      /the device flannel\.1; .* Backend\.VNI/,
      [],
    ],
    ["the same port", { Type: "udp", Port: 8472 }, "10.20.0.0/16", /UDP port 8472; .* Backend\.Port/, []],
    ["a second ipip", { Type: "ipip" }, "10.20.0.0/16", /the device flannel\.ipip; .* Backend\.Type/, []],
    [
      "the same subnet file",
      { Type: "host-gw" },
      "10.20.0.0/16",
      /both write .*udp\.env; give one of them another --subnet-file/,
      ["--subnet-file=udp.env"],
    ],
  ])("%s is refused with both names, and nothing is made", async (_, backend, network, reason, more) => {
    await etcd.put("/late/network/config", JSON.stringify({ Network: network, Backend: backend }));
    const before = await hostAt(0).ip("-br link");
    const late = start(0, "late", 2410, more);
    const { code } = await late.process.exited;
    expect(code).toBe(1);
    const text = late.process.text();
    expect(text).toMatch(
      /\/late\/network cannot be served beside \/(vxlan|hostgw|udp|ipip)\/network \(process \d+, pins below .*\): /,
    );
    expect(text).toMatch(reason);
    expect(await hostAt(0).ip("-br link")).toBe(before);
    expect(await etcd.list("/late/network/subnets/")).toEqual(new Map());
    expect(existsSync(join(hostAt(0).directory, "late.env"))).toBe(false);
  });

  test("the same pin path is refused with both names", async () => {
    const second = start(0, "late", 2410, [`--pin-path=${pinOf(hostAt(0), "udp")}`]);
    expect((await second.process.exited).code).toBe(1);
    expect(second.process.text()).toMatch(
      /twilld runs already on .*\/udp for \/udp\/network \(process \d+\): .* the one for \/late\/network another --pin-path/,
    );
  });

  test("a config that gets in another's way while it runs is not followed, and is listed", async () => {
    const put = (network: string) =>
      etcd.put("/hostgw/network/config", JSON.stringify({ Network: network, Backend: { Type: "host-gw" } }));
    await put("10.11.0.0/16");
    const twilld = twillds.get("hostgw 0") ?? expect.fail();
    const { failures, subnet } = await twilld.statusWhere(
      "the conflict",
      (status) => status.failures.length > 0,
    );
    expect(subnet).toBe("10.12.21.0/24");
    expect(failures[0]?.reason).toMatch(/beside \/vxlan\/network .*overlaps 10\.11\.0\.0\/16/);
    expect((await podOf("hostgw", 0).ping(podOf("hostgw", 1).address, { count: 3 })).lost).toEqual([]);
    await put("10.12.0.0/16");
    await twilld.statusWhere("no failure", (status) => status.failures.length === 0);
  });

  test("what a daemon claimed that was killed is free for another", async () => {
    await etcd.put("/late/network/config", '{"Network": "10.14.0.0/16", "Backend": {"Type": "ipip"}}');
    const former = twillds.get("ipip 0") ?? expect.fail();
    await former.stop("SIGKILL");
    const late = start(0, "late", 2410);
    await late.ready();
    const { network } = await late.statusWhere(
      "its subnet",
      ({ subnet }) => subnet?.startsWith("10.14.") === true,
    );
    expect(network?.backend.type).toBe("ipip");
    await late.stop();
  });
});
