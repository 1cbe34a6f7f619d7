/**
 * The cluster of the users Twill is made for, from their flags to their pods' packets: hosts 10.4.7.21 and
 * 10.4.7.22, etcd over TLS, each host's subnet named by the subnet.env it had before, and a third host behind a
 * router. One lab lives through the backends one after the other, as such a cluster does; two smaller ones show
 * pods that come and go while twilld runs, and a start-up in which everything else comes too late.
 */
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, test } from "vitest";
import { openLibrary } from "../../loader/ffi.ts";
import { createLab, type Etcd, type Host, type Lab, type Namespace, type Pod, until } from "../lab.ts";
import { spawnTwilld, startTwilld, type Twilld } from "../twilld.ts";

const CONFIG = "/coreos.com/network/config";
const SUBNETS = "/coreos.com/network/subnets/";
const VXLAN = '{"Network": "172.7.0.0/16", "Backend": {"Type": "VxLAN"}}';
const DIRECT = '{"Network": "172.7.0.0/16", "Backend": {"Type": "VxLAN", "Directrouting": true}}';
const HOST_GW = '{"Network": "172.7.0.0/16", "Backend": {"Type": "host-gw"}}';
const ALLOC = '{"Network": "172.7.0.0/16", "Backend": {"Type": "alloc"}}';

/** What a former flanneld left: the subnet is to be kept, the rest is to be written anew. */
function leaveSubnetFile(host: Host, third: number): void {
  const lines = ["FLANNEL_NETWORK=172.7.0.0/16", `FLANNEL_SUBNET=172.7.${third}.1/24`, "FLANNEL_MTU=1472"];
  writeFileSync(join(host.directory, "subnet.env"), `${[...lines, "FLANNEL_IPMASQ=true"].join("\n")}\n`);
}

const subnetFile = (third: number, mtu: number, ipMasq = false): string =>
  `FLANNEL_NETWORK=172.7.0.0/16\nFLANNEL_SUBNET=172.7.${third}.1/24\nFLANNEL_MTU=${mtu}\nFLANNEL_IPMASQ=${ipMasq}\n`;

/** nginx on `to` gets two requests of `from`, and its access log has the pod's own address. */
async function expectHttp(from: Pod, to: Pod): Promise<void> {
  const server = await to.httpServer({ program: "nginx" });
  try {
    expect(await from.httpGet(`http://${to.address}/`)).toBe(`${from.address}\n`);
    expect((await from.httpGet(`http://${to.address}/large`)).length).toBe(4 * 1024 * 1024);
    await server.request(1);
    expect(server.requests).toEqual([
      { source: from.address, path: "/" },
      { source: from.address, path: "/large" },
    ]);
  } finally {
    await server.stop();
  }
}

/** 20 pings and real HTTP each way: nothing lost, no address translated. */
async function expectTraffic(a: Pod, b: Pod): Promise<void> {
  const results = await Promise.all([a.ping(b.address, { count: 20 }), b.ping(a.address, { count: 20 })]);
  for (const result of results) expect(result).toMatchObject({ received: 20, lost: [], duplicates: 0 });
  await expectHttp(a, b);
  await expectHttp(b, a);
}

/** Packets by `hook.verdict` that were counted while something was done; those that were not are left out. */
async function countedDuring(twilld: Twilld, action: () => Promise<void>): Promise<Record<string, number>> {
  const read = () => {
    const hooks = Object.entries({ ...twilld.counters() });
    return hooks.flatMap(([hook, verdicts]) =>
      Object.entries({ ...verdicts }).map(
        ([verdict, { packets }]) => [`${hook}.${verdict}`, Number(packets)] as const,
      ),
    );
  };
  const before = new Map(read());
  await action();
  return Object.fromEntries(
    read()
      .map(([name, packets]) => [name, packets - (before.get(name) ?? 0)] as const)
      .filter(([, packets]) => packets > 0),
  );
}

const sum = (counted: Record<string, number>, pattern: RegExp): number =>
  Object.entries(counted).reduce((total, [name, packets]) => total + (pattern.test(name) ? packets : 0), 0);

const devices = async (host: Namespace): Promise<string[]> =>
  (await host.ipJson<{ ifname: string }>("link show")).map((link) => link.ifname);

const routeTo = async (host: Namespace, subnet: string): Promise<string> =>
  (await host.ip(`route show ${subnet}`)).trim();

/** Tunnel packets on the uplink while something is done. */
async function tunnelledDuring(host: Host, action: () => Promise<void>): Promise<number> {
  const capture = await host.capture("eth0", "udp port 8472");
  await action();
  await capture.stop();
  return capture.frames().length;
}

/** Reads a datagram socket that plays the service manager. */
function serviceManager(path: string): { messages(): string[]; close(): void } {
  const libc = openLibrary("libc.so.6");
  const bind = libc.prepare("bind", "int", ["int", "pointer", "uint"]);
  const recv = libc.prepare("recv", "ssize", ["int", "pointer", "size", "int"]);
  const closeSocket = libc.prepare("close", "int", ["int"]);
  const [AF_UNIX, SOCK_DGRAM, MSG_DONTWAIT] = [1, 2, 0x40];
  const fd = libc.prepare("socket", "int", ["int", "int", "int"])(AF_UNIX, SOCK_DGRAM, 0);
  const address = Buffer.from(`\x01\0${path}\0`, "latin1");
  if (bind(fd, address, address.length) !== 0) throw new Error(`cannot bind a datagram socket to ${path}`);
  return {
    messages() {
      const messages: string[] = [];
      for (;;) {
        const bytes = Buffer.alloc(4096);
        const length = recv(fd, bytes, bytes.length, MSG_DONTWAIT);
        if (length < 0) return messages;
        messages.push(bytes.toString("utf8", 0, length));
      }
    },
    close: () => closeSocket(fd),
  };
}

describe("hosts 10.4.7.21 and 10.4.7.22, and 10.4.8.23 behind a router", () => {
  let lab: Lab;
  let etcd: Etcd;
  let h1: Host;
  let h2: Host;
  let h3: Host;
  let a: Pod;
  let b: Pod;
  let c: Pod;
  let t1: Twilld;
  let t2: Twilld;
  let t3: Twilld;

  /** The flags of the users, in their order, and the pin path that hosts of one machine need. */
  const start = (host: Host): Twilld =>
    spawnTwilld(host, [
      `--public-ip=${host.address}`,
      ...etcd.flags,
      "--iface=eth0",
      "--subnet-file=./subnet.env",
      "--healthz-port=2401",
      `--pin-path=${host.pinPath}`,
    ]);
  const running = async (...twillds: Twilld[]) => {
    await Promise.all(twillds.map((twilld) => twilld.ready()));
    for (const twilld of twillds) {
      await twilld.statusWhere("all peers are known", ({ peers }) => peers === twillds.length - 1);
    }
  };

  beforeAll(async () => {
    lab = await createLab({ rpFilter: 1 });
    await lab.router("r", ["10.4.7.1/24", "10.4.8.1/24"]);
    etcd = await lab.etcd({ addresses: ["10.4.7.11/24", "10.4.7.12/24", "10.4.7.13/24"], tls: true });
    h1 = await lab.host("h1", { address: "10.4.7.21/24" });
    h2 = await lab.host("h2", { address: "10.4.7.22/24" });
    h3 = await lab.host("h3", { address: "10.4.8.23/24" });
    const furnish = async (host: Host, third: number) => {
      leaveSubnetFile(host, third);
      await host.bridge("docker0", `172.7.${third}.1/24`);
      return host.pod("a", `172.7.${third}.2/24`, { mtu: 1450 });
    };
    [a, b, c] = await Promise.all([furnish(h1, 21), furnish(h2, 22), furnish(h3, 23)]);
    await etcd.put(CONFIG, VXLAN);
    [t1, t2, t3] = [start(h1), start(h2), start(h3)];
    await running(t1, t2, t3);
  });

  afterAll(() => lab?.close());

  test("leases, device and subnet.env are flannel's, byte for byte", async () => {
    const macs = await Promise.all([h1, h2, h3].map((host) => host.mac("flannel.1")));
    const lease = (host: Host, mac: string | undefined) =>
      `{"PublicIP":"${host.address}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"${mac}"}}`;
    expect(await etcd.list(SUBNETS)).toEqual(
      new Map([
        [`${SUBNETS}172.7.21.0-24`, lease(h1, macs[0])],
        [`${SUBNETS}172.7.22.0-24`, lease(h2, macs[1])],
        [`${SUBNETS}172.7.23.0-24`, lease(h3, macs[2])],
      ]),
    );
    expect(readFileSync(join(h1.directory, "subnet.env"), "utf8")).toBe(subnetFile(21, 1450));
    expect(readFileSync(join(h2.directory, "subnet.env"), "utf8")).toBe(subnetFile(22, 1450));
    const [link] = await h1.ipJson<{ mtu: number; operstate: string; linkinfo: { info_data: object } }>(
      "link show dev flannel.1",
    );
    expect(link).toMatchObject({
      mtu: 1450,
      linkinfo: { info_data: { id: 1, link: "eth0", local: "10.4.7.21", port: 8472, learning: false } },
    });
    const [device] = await h1.ipJson<{ addr_info: { local: string; prefixlen: number }[] }>(
      "address show dev flannel.1",
    );
    expect(device?.addr_info).toMatchObject([{ local: "172.7.21.0", prefixlen: 32 }]);
    expect(await routeTo(h1, "172.7.22.0/24")).toMatch(
      /^172\.7\.22\.0\/24 nhid \d+ via 172\.7\.22\.0 dev flannel\.1 .*onlink$/,
    );
  });

  test("vxlan: ping and HTTP both ways, with the pods' own addresses, in the fast lane", async () => {
    const before = await h1.counters("flannel.1");
    const counted = await countedDuring(t1, () => expectTraffic(a, b));
    expect(sum(counted, /^from_pod\.encapsulated$/)).toBeGreaterThanOrEqual(40);
    // The stack may see the first packets, as it is the one to find out where a pod is.
    expect(sum(counted, /^from_pod\.stack_/)).toBeLessThanOrEqual(2);
    expect(sum(counted, /^from_net\.decapsulated$/)).toBeGreaterThanOrEqual(36);
    expect(sum(counted, /^from_overlay\.delivered$/)).toBeGreaterThan(20);
    expect(sum(counted, /^from_overlay\.stack_/)).toBeLessThanOrEqual(2);
    expect(sum(counted, /\.drop_/)).toBe(0);
    // None of it left by the kernel's tunnel device.
    expect((await h1.counters("flannel.1")).txPackets - before.txPackets).toBeLessThanOrEqual(2);
    await expectTraffic(a, c);
    await expectTraffic(b, c);
  });

  test("point-to-point pods: each with each, and with pods behind a bridge", async () => {
    const calico = await h1.pointToPointPod("c", "172.7.21.5", { style: "calico", mtu: 1450 });
    const ptp = await h2.pointToPointPod("p", "172.7.22.6", {
      style: "ptp",
      gateway: "172.7.22.1",
      mtu: 1450,
    });
    await expectTraffic(calico, b);
    await expectTraffic(a, ptp);
    const counted = await countedDuring(t2, () => expectTraffic(calico, ptp));
    expect(sum(counted, /^from_pod\.encapsulated$/)).toBeGreaterThanOrEqual(40);
    expect(sum(counted, /^from_net\.decapsulated$/)).toBeGreaterThanOrEqual(36);
    await calico.remove();
    await ptp.remove();
    await t1.statusWhere("the pod is forgotten", ({ endpoints }) => endpoints === 1);
    await t2.statusWhere("the pod is forgotten", ({ endpoints }) => endpoints === 1);
  });

  test("SIGTERM, SIGINT and SIGQUIT end it with 0, and it starts again, while not one packet is lost", async () => {
    const pings = [await a.startPing(b.address), await c.startPing(a.address)];
    const leases = await etcd.list(SUBNETS);
    for (const signal of ["SIGTERM", "SIGINT", "SIGQUIT"] as const) {
      expect(await t1.stop(signal)).toEqual({ code: 0, signal: null });
      await Promise.all(pings.map((ping) => ping.replies(10)));
      t1 = start(h1);
      await t1.ready();
    }
    for (const ping of pings) expect(await ping.stop()).toMatchObject({ lost: [], duplicates: 0 });
    expect(await etcd.list(SUBNETS)).toEqual(leases);
  });

  test("a second signal ends it at once, and forwarding stays all the same", async () => {
    const ping = await a.startPing(b.address);
    // Both signals wait for it when it goes on.
    t1.process.kill("SIGSTOP");
    t1.process.kill("SIGTERM");
    t1.process.kill("SIGINT");
    t1.process.kill("SIGCONT");
    expect(await t1.process.exited).toEqual({ code: 1, signal: null });
    await ping.replies(10);
    // Its entry among the running daemons is still there, and must not keep its successor out.
    t1 = start(h1);
    await t1.ready();
    expect(await ping.stop()).toMatchObject({ lost: [] });
  });

  test("Directrouting put while it runs: direct in one network, VXLAN through the router, nothing lost", async () => {
    // One host sends directly first, while the other's route still leads into the tunnel: by itself, the kernel would drop
    // what comes then, as filtering is strict here.
    const pings = [await a.startPing(b.address), await a.startPing(c.address)];
    await etcd.put(CONFIG, DIRECT);
    for (const twilld of [t1, t2, t3]) {
      await twilld.statusWhere(
        "direct routing is on",
        ({ network, failures }) => network?.backend.directRouting === true && failures.length === 0,
      );
    }
    await Promise.all(pings.map((ping) => ping.replies(10)));
    for (const ping of pings) expect(await ping.stop()).toMatchObject({ lost: [] });

    let counted: Record<string, number> = {};
    const tunnelled = await tunnelledDuring(h2, async () => {
      counted = await countedDuring(t2, () => expectTraffic(a, b));
    });
    expect(tunnelled).toBe(0);
    expect(sum(counted, /^from_pod\.routed$/)).toBeGreaterThanOrEqual(40);
    expect(sum(counted, /^from_net\.delivered$/)).toBeGreaterThanOrEqual(40);
    expect(sum(counted, /encapsulated|\.drop_/)).toBe(0);
    expect(await routeTo(h1, "172.7.22.0/24")).toMatch(/^172\.7\.22\.0\/24 via 10\.4\.7\.22 dev eth0/);

    expect(await tunnelledDuring(h3, () => expectTraffic(a, c))).toBeGreaterThan(80);
    expect(await routeTo(h1, "172.7.23.0/24")).toMatch(
      /^172\.7\.23\.0\/24 nhid \d+ via 172\.7\.23\.0 dev flannel\.1/,
    );
    expect(readFileSync(join(h1.directory, "subnet.env"), "utf8")).toBe(subnetFile(21, 1450));
  });

  test("host-gw after a restart: no flannel.1, routes via the peer, nothing in a tunnel", async () => {
    for (const twilld of [t1, t2, t3]) expect(await twilld.stop()).toEqual({ code: 0, signal: null });
    await etcd.put(CONFIG, HOST_GW);
    [t1, t2] = [start(h1), start(h2)];
    await running(t1, t2);
    const { ignored } = await t1.statusWhere(
      "the vxlan lease is named",
      // The other node's lease is of the former backend until that one has been restarted.
      (status) => status.ignored.length === 1,
    );
    expect(ignored).toMatchObject([{ key: "172.7.23.0-24", reason: expect.stringContaining("vxlan") }]);

    for (const [host, twilld] of [
      [h1, t1],
      [h2, t2],
    ] as const) {
      expect(await devices(host)).not.toContain("flannel.1");
      expect(twilld.status?.device).toBeUndefined();
    }
    const leases = await etcd.list(SUBNETS);
    expect(leases.get(`${SUBNETS}172.7.21.0-24`)).toBe(
      '{"PublicIP":"10.4.7.21","PublicIPv6":null,"BackendType":"host-gw"}',
    );
    expect(readFileSync(join(h1.directory, "subnet.env"), "utf8")).toBe(subnetFile(21, 1500));
    expect(await routeTo(h1, "172.7.22.0/24")).toMatch(/^172\.7\.22\.0\/24 via 10\.4\.7\.22 dev eth0/);
    expect(await routeTo(h1, "172.7.23.0/24")).toBe("");

    let counted: Record<string, number> = {};
    const tunnelled = await tunnelledDuring(h2, async () => {
      counted = await countedDuring(t1, () => expectTraffic(a, b));
    });
    expect(tunnelled).toBe(0);
    expect(sum(counted, /^from_pod\.routed$/)).toBeGreaterThanOrEqual(40);
    expect(sum(counted, /^from_net\.delivered$/)).toBeGreaterThanOrEqual(40);
    expect(sum(counted, /\.drop_/)).toBe(0);
  });
});

describe("pods that come and go long after the start", () => {
  let lab: Lab;
  let h1: Host;
  let h2: Host;
  let t1: Twilld;
  let t2: Twilld;
  let a: Pod;
  let b: Pod;

  const gatewayOf = (twilld: Twilld): string => twilld.subnetEnv.FLANNEL_SUBNET ?? "";
  const addressOf = (twilld: Twilld, last: number): string => gatewayOf(twilld).replace(/\.1\//, `.${last}/`);
  const known = (twilld: Twilld, count: number) =>
    twilld.statusWhere(`${count} pods are known`, ({ endpoints }) => endpoints === count);
  /** After a first exchange, which the stack carries, the fast lane takes everything both ways. */
  const expectFastLane = async () => {
    // A host that has asked for a pod in vain asks again a second later.
    const ping = await a.startPing(b.address);
    await ping.replies(1);
    await ping.stop();
    await Promise.all([known(t1, 1), known(t2, 1)]);
    const counted = await countedDuring(t1, () => expectTraffic(a, b));
    expect(sum(counted, /^from_pod\.encapsulated$/)).toBeGreaterThanOrEqual(40);
    expect(sum(counted, /^from_net\.decapsulated$/)).toBeGreaterThanOrEqual(40);
    expect(sum(counted, /^from_overlay\.delivered$/)).toBeGreaterThan(20);
    expect(sum(counted, /\.drop_/)).toBe(0);
  };

  beforeAll(async () => {
    lab = await createLab();
    const etcd = await lab.etcd({ addresses: ["10.4.7.11/24"] });
    h1 = await lab.host("h1", { address: "10.4.7.21/24" });
    h2 = await lab.host("h2", { address: "10.4.7.22/24" });
    await etcd.put(CONFIG, VXLAN);
    [t1, t2] = await Promise.all([startTwilld(h1, { etcd }), startTwilld(h2, { etcd })]);
    await t1.statusWhere("the peer is known", ({ peers }) => peers === 1);
    await t2.statusWhere("the peer is known", ({ peers }) => peers === 1);
  });

  afterAll(() => lab?.close());

  test("the bridge is made by somebody who reads subnet.env after us", async () => {
    expect(t1.status).toMatchObject({ endpoints: 0 });
    for (const [host, twilld] of [
      [h1, t1],
      [h2, t2],
    ] as const)
      await host.bridge("docker0", gatewayOf(twilld));
    a = await h1.pod("a", addressOf(t1, 2), { mtu: Number(t1.subnetEnv.FLANNEL_MTU) });
    b = await h2.pod("a", addressOf(t2, 2), { mtu: Number(t2.subnetEnv.FLANNEL_MTU) });
    await expectFastLane();
  });

  test("a pod goes, and one with its address comes back on another port", async () => {
    await b.remove();
    await known(t2, 0);
    expect((await a.ping(b.address, { count: 1 })).received).toBe(0);
    b = await h2.pod("b", addressOf(t2, 2), { mtu: 1450 });
    await expectFastLane();
  });

  test("a pod is replaced so fast that nobody saw it go", async () => {
    const ping = await b.startPing(a.address, { interval: 0.02 });
    const former = a;
    await Promise.all([
      former.remove(),
      h1.pod("z", addressOf(t1, 2), { mtu: 1450 }).then((pod) => (a = pod)),
    ]);
    await ping.replies(10);
    await ping.stop();
    await expectFastLane();
  });

  test("the bridge is deleted and made anew, with the pods that were behind it", async () => {
    await h1.ip("link delete docker0");
    await known(t1, 0);
    await h1.bridge("docker0", gatewayOf(t1));
    await h1.ip(`link set ${a.port} master docker0`);
    await h1.inUse("docker0");
    await expectFastLane();
  });
});

describe("start-up", () => {
  let lab: Lab;
  let manager: ReturnType<typeof serviceManager> | undefined;

  afterEach(async () => {
    manager?.close();
    manager = undefined;
    await lab?.close();
  });

  test("etcd comes after it, then the config: it waits, tells health, readiness and the service manager", async () => {
    lab = await createLab();
    const etcd = await lab.etcd({ addresses: ["10.4.7.11/24"], tls: true });
    await etcd.stopMember(0);
    const host = await lab.host("h1", { address: "10.4.7.21/24" });
    manager = serviceManager(join(host.directory, "notify"));
    const twilld = await startTwilld(host, {
      etcd,
      timeout: 0,
      env: { NOTIFY_SOCKET: join(host.directory, "notify") },
    });
    const expectWaiting = async () => {
      await host.httpStatus(`${twilld.url}/healthz`, 200);
      await host.httpStatus(`${twilld.url}/readyz`, 503);
      expect(await twilld.metrics()).toMatch(/^twill_ready 0$/m);
      expect(manager?.messages()).toEqual([]);
      expect(await devices(host)).toEqual(["lo", "eth0"]);
      expect(existsSync(twilld.subnetFile)).toBe(false);
    };

    await twilld.says(/WARN .*no connection to etcd.*10\.4\.7\.11:2379/i);
    await twilld.statusWhere(
      "etcd is away",
      ({ phase, store }) => phase === "waiting for etcd" && !store.connected && store.error !== undefined,
    );
    await expectWaiting();
    await etcd.startMember(0);
    await twilld.says(
      /waiting for a network config at \/coreos\.com\/network\/config: there is no network config/,
    );
    await twilld.statusWhere(
      "there is no config",
      ({ phase, store }) => phase === "waiting for the network config" && store.connected,
    );
    await expectWaiting();
    await etcd.put(CONFIG, VXLAN);
    await twilld.ready();
    expect(manager.messages()).toEqual(["READY=1"]);
    expect(await twilld.metrics()).toMatch(/^twill_ready 1$/m);
    await host.httpStatus(`${twilld.url}/healthz`, 200);
    // Once for each change, however often it tried.
    const said = (pattern: RegExp) => twilld.process.lines.filter(({ text }) => pattern.test(text)).length;
    expect(said(/no connection to etcd/i)).toBe(1);
    expect(said(/waiting for a network config/)).toBe(1);

    // Losing etcd later is no reason to be less ready.
    await etcd.stopMember(0);
    await twilld.statusWhere("etcd is away again", ({ store }) => !store.connected);
    await host.httpStatus(`${twilld.url}/readyz`, 200);
    expect(await twilld.stop()).toEqual({ code: 0, signal: null });
    expect(manager.messages()).toEqual(["STOPPING=1"]);
  });

  test("alloc, told by the environment: a lease and subnet.env, and nothing in the kernel", async () => {
    lab = await createLab();
    const etcd = await lab.etcd({ addresses: ["10.4.7.11/24"] });
    const host = await lab.host("h1", { address: "10.4.7.21/24" });
    await host.bridge("docker0", "172.7.21.1/24");
    await host.pod("a", "172.7.21.2/24");
    leaveSubnetFile(host, 21);
    await etcd.put("/alloc/network/config", ALLOC);
    const state = async () => [await host.ip("link show"), await host.ip("address"), await host.ip("route")];
    const before = await state();
    const env = {
      FLANNELD_ETCD_ENDPOINTS: `http://10.4.7.11:2378,${etcd.endpoints[0]}`,
      FLANNELD_ETCD_PREFIX: "/alloc/network",
      FLANNELD_IFACE: "eth0",
      FLANNELD_PUBLIC_IP: "10.4.7.21",
      FLANNELD_SUBNET_FILE: join(host.directory, "subnet.env"),
      FLANNELD_HEALTHZ_PORT: "2401",
      FLANNELD_PIN_PATH: host.pinPath,
      FLANNELD_IP_MASQ: "true",
      FLANNELD_RESYNC: "",
    };
    // The command line beats the environment, in either of Go's forms.
    const twilld = spawnTwilld(host, ["-ip-masq=false", "--kube-subnet-mgr=false", "-v", "1"], { env });
    await twilld.ready();
    expect(await etcd.list("/alloc/network/subnets/")).toEqual(
      new Map([["/alloc/network/subnets/172.7.21.0-24", '{"PublicIP":"10.4.7.21","PublicIPv6":null}']]),
    );
    expect(readFileSync(twilld.subnetFile, "utf8")).toBe(subnetFile(21, 1500));
    expect(await state()).toEqual(before);
    expect(readdirSync(join(host.pinPath, "links"))).toEqual([]);
    const { stdout } = await host.exec(["bpftool", "-j", "net", "show"]);
    expect(JSON.parse(stdout)).toMatchObject([{ tc: [], xdp: [] }]);
    expect(await twilld.stop()).toEqual({ code: 0, signal: null });

    const again = spawnTwilld(host, [], { env });
    await again.ready();
    await until(
      "subnet.env to say so",
      () => readFileSync(again.subnetFile, "utf8") === subnetFile(21, 1500, true),
    );
  });
});
