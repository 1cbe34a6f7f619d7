/** The backend `extension` on two hosts: what its commands set up carries traffic, and what fails is seen and mended. */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { createLab, type Etcd, type Host, type Lab, type Pod, until } from "../lab.ts";
import { startTwilld, type Twilld, twill } from "../twilld.ts";
import { probe, serve, TCP_PORT } from "./cluster.ts";

const PREFIX = "/coreos.com/network";
const ROUTES = {
  Type: "extension",
  SubnetAddCommand: "ip route replace $SUBNET via $PUBLIC_IP",
  SubnetRemoveCommand: "ip route del $SUBNET via $PUBLIC_IP",
};
/** As flannel's own documentation does it: a tunnel whose MAC the peers have to know. */
const TUNNEL = {
  Type: "extension",
  Shell: true,
  PreStartupCommand:
    "ip link show fx >/dev/null 2>&1 || ip link add fx type vxlan id 9 dev eth0 dstport 8479 nolearning; " +
    "ip -o link show fx | grep -o 'ether [0-9a-f:]*' | cut -d' ' -f2",
  PostStartupCommand: `ip address replace \${SUBNET%/*}/32 dev fx && ip link set fx up`,
  SubnetAddCommand:
    `read mac; ip neigh replace \${SUBNET%/*} lladdr $mac dev fx nud permanent && ` +
    `bridge fdb replace $mac dev fx dst $PUBLIC_IP && ip route replace $SUBNET via \${SUBNET%/*} dev fx onlink`,
  SubnetRemoveCommand: `ip route del $SUBNET dev fx; ip neigh del \${SUBNET%/*} dev fx`,
};

let lab: Lab;
let etcd: Etcd;
let hosts: Host[];
let twillds: Twilld[];
let a: Pod;
let b: Pod;
const configure = (backend: object) =>
  etcd.put(`${PREFIX}/config`, JSON.stringify({ Network: "172.7.0.0/16", Backend: backend }));
const hostAt = (index: number): Host => hosts[index] ?? expect.fail();
const twilldAt = (index: number): Twilld => twillds[index] ?? expect.fail();
const restart = async (index: number): Promise<void> => {
  await twilldAt(index).stop();
  twillds[index] = await startTwilld(hostAt(index), { etcd });
};
const routes = (index: number): Promise<string> => hostAt(index).ip("route show 172.7.0.0/16");
/** What a host's route to the other's subnet says, once it is there. */
const routeTo = (index: number, subnet: string): Promise<string> =>
  until(
    `a route to ${subnet}`,
    async () => (await hostAt(index).ip(`route show ${subnet}`)).trim() || undefined,
  );

beforeAll(async () => {
  lab = await createLab();
  etcd = await lab.etcd({ addresses: ["10.4.7.11/24"] });
  await configure(ROUTES);
  hosts = [];
  for (const number of [21, 22]) {
    const host = await lab.host(`h${number - 20}`, { address: `10.4.7.${number}/24` });
    writeFileSync(join(host.directory, "subnet.env"), `FLANNEL_SUBNET=172.7.${number}.1/24\n`);
    await host.bridge("docker0", `172.7.${number}.1/24`, { mtu: 1450 });
    hosts.push(host);
  }
  a = await hostAt(0).pod("a", "172.7.21.2/24", { mtu: 1450 });
  b = await hostAt(1).pod("b", "172.7.22.2/24", { mtu: 1450 });
  await serve(b);
  twillds = await Promise.all(hosts.map((host) => startTwilld(host, { etcd })));
});
afterAll(() => lab?.close());

const carries = async (): Promise<void> => {
  expect((await a.ping(b.address, { count: 3 })).lost).toEqual([]);
  expect(await probe(a, `tcp ${b.address} ${TCP_PORT} 2000000 2000000`)).toEqual({
    intact: true,
    seen: a.address,
    peer: b.address,
  });
};

describe("routes", () => {
  test("a route for each peer, by a command without a shell", async () => {
    expect(await routeTo(0, "172.7.22.0/24")).toBe("172.7.22.0/24 via 10.4.7.22 dev eth0");
    expect(await routeTo(1, "172.7.21.0/24")).toBe("172.7.21.0/24 via 10.4.7.21 dev eth0");
    await carries();
    const value = await etcd.ctl("get", "--print-value-only", `${PREFIX}/subnets/172.7.21.0-24`);
    expect(value.trim()).toBe('{"PublicIP":"10.4.7.21","PublicIPv6":null,"BackendType":"extension"}');
    expect(twilldAt(0).subnetEnv).toMatchObject({ FLANNEL_SUBNET: "172.7.21.1/24", FLANNEL_MTU: "1500" });
    await twilldAt(0).statusWhere("its peer", ({ peers }) => peers === 1);
    expect(await twill(hostAt(0), "status", `--pin-path=${hostAt(0).pinPath}`)).toContain(
      "backend extension, timeoutSeconds 30\n",
    );
  });

  test("a daemon that is started anew loses nothing", async () => {
    const ping = await a.startPing(b.address);
    await ping.replies(10);
    await restart(0);
    await routeTo(0, "172.7.22.0/24");
    await ping.replies(20);
    expect((await ping.stop()).lost).toEqual([]);
  });

  test("twill peers and twill status list those that commands have added", async () => {
    const { pinPath } = hostAt(0);
    const { peers } = JSON.parse(await twill(hostAt(0), "peers", "--json", `--pin-path=${pinPath}`)) as {
      peers: object[];
    };
    expect(peers).toMatchObject([
      { subnet: "172.7.22.0/24", publicIp: "10.4.7.22", reach: "commands", interface: null, mtu: null },
    ]);
    expect(await twill(hostAt(0), "status", `--pin-path=${pinPath}`)).toMatch(
      /peers \(1\)\n.*\n172\.7\.22\.0\/24 +10\.4\.7\.22 +commands +- /,
    );
    const named = await twill(hostAt(0), "peers", "172.7.22.9", "--reach=commands", `--pin-path=${pinPath}`);
    expect(named).toContain("10.4.7.22");
  });

  test("a peer that goes while no daemon runs takes its route with it at the next start", async () => {
    const key = `${PREFIX}/subnets/172.7.97.0-24`;
    await etcd.put(key, '{"PublicIP":"10.4.7.97","PublicIPv6":null,"BackendType":"extension"}');
    expect(await routeTo(0, "172.7.97.0/24")).toBe("172.7.97.0/24 via 10.4.7.97 dev eth0");
    await twilldAt(0).stop("SIGKILL");
    await etcd.ctl("del", key);
    twillds[0] = await startTwilld(hostAt(0), { etcd });
    await until("the route to be gone", async () => !(await routes(0)).includes("172.7.97.0"));
    expect(await routeTo(0, "172.7.22.0/24")).toBe("172.7.22.0/24 via 10.4.7.22 dev eth0");
  });

  test("a peer that goes takes its route with it", async () => {
    await etcd.put(
      `${PREFIX}/subnets/172.7.99.0-24`,
      '{"PublicIP":"10.4.7.99","PublicIPv6":null,"BackendType":"extension"}',
    );
    expect(await routeTo(0, "172.7.99.0/24")).toBe("172.7.99.0/24 via 10.4.7.99 dev eth0");
    await etcd.ctl("del", `${PREFIX}/subnets/172.7.99.0-24`);
    await until("the route to be gone", async () => !(await routes(0)).includes("172.7.99.0"));
  });

  test("one that fails is listed by twill status with what it said, and mended when its cause is gone", async () => {
    const key = `${PREFIX}/subnets/172.7.98.0-24`;
    // No network of ours: the kernel takes no such gateway.
    await etcd.put(key, '{"PublicIP":"10.99.0.1","PublicIPv6":null,"BackendType":"extension"}');
    await twilldAt(0).statusWhere("a failure", ({ failures }) =>
      failures.some(({ what }) => what === "SubnetAddCommand for 172.7.98.0/24"),
    );
    const text = await twill(hostAt(0), "status", `--pin-path=${hostAt(0).pinPath}`);
    expect(text).toMatch(
      /failing, tried again\n[\s\S]*SubnetAddCommand for 172\.7\.98\.0\/24 +exit code 2: .*(invalid gateway|unreachable)/,
    );
    await hostAt(0).ip("address add 10.99.0.2/24 dev eth0");
    await twilldAt(0).statusWhere("no failure", ({ failures }) => failures.length === 0);
    expect(await routeTo(0, "172.7.98.0/24")).toBe("172.7.98.0/24 via 10.99.0.1 dev eth0");
    await etcd.ctl("del", key);
    await until("the route to be gone", async () => !(await routes(0)).includes("172.7.98.0"));
    await hostAt(0).ip("address del 10.99.0.2/24 dev eth0");
  });
});

describe("a tunnel", () => {
  beforeAll(async () => {
    await configure(TUNNEL);
    const through = (index: number, subnet: string) =>
      until(`${subnet} to be reached through fx`, async () =>
        (await hostAt(index).ip(`route show ${subnet}`)).includes("dev fx"),
      );
    await through(0, "172.7.22.0/24");
    await through(1, "172.7.21.0/24");
  });

  test("what a node's first command prints reaches its peers' commands, and packets take the tunnel", async () => {
    const mac = await hostAt(1).mac("fx");
    const value = await etcd.ctl("get", "--print-value-only", `${PREFIX}/subnets/172.7.22.0-24`);
    expect(JSON.parse(value)).toEqual({
      PublicIP: "10.4.7.22",
      PublicIPv6: null,
      BackendType: "extension",
      BackendData: mac,
    });
    expect(await hostAt(0).ip("neigh show dev fx")).toMatch(`172.7.22.0 lladdr ${mac} PERMANENT`);
    const before = (await hostAt(0).counters("fx")).txPackets;
    await carries();
    expect((await hostAt(0).counters("fx")).txPackets).toBeGreaterThan(before);
  });

  test("back to vxlan: the former commands take away what they added", async () => {
    await configure({ Type: "vxlan" });
    for (const [index, subnet] of [
      [0, "172.7.22.0/24"],
      [1, "172.7.21.0/24"],
    ] as const) {
      await until(`${subnet} to be reached through flannel.1`, async () =>
        (await hostAt(index).ip(`route show ${subnet}`)).includes("dev flannel.1"),
      );
      // The commands are run one after the other, and nothing waits for them.
      await until(
        `what was added for ${subnet} to be gone`,
        async () => !(await hostAt(index).ip("neigh show dev fx")).includes("PERMANENT"),
      );
    }
    await carries();
  });
});
