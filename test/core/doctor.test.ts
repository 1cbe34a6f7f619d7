/**
 * What doctor makes of facts: a sound host, and what is changed on it. The faults that can be made in a lab are made
 * in test/e2e/doctor.test.ts; here are those that cannot, and the rules by which findings are told.
 */
import { describe, expect, test } from "vitest";
import { type CheckId, diagnose, type Facts } from "../../src/core/doctor.ts";
import type { Link } from "../../src/core/host.ts";

const NOW = Date.UTC(2026, 0, 1);
const DAY = 86_400_000;
const OWN = 0xac071500;
const PEER = 0xac071600;
const PEER_IP = 0x0a040716;

const link = (index: number, name: string, more: Partial<Link> = {}): Link => ({
  index,
  name,
  kind: undefined,
  mac: "02:00:00:00:00:01",
  mtu: 1500,
  up: true,
  running: true,
  loopback: false,
  noarp: false,
  type: 1,
  masterIndex: undefined,
  slaveKind: undefined,
  linkIndex: undefined,
  linkNetnsId: undefined,
  parentIndex: undefined,
  vxlan: undefined,
  ...more,
});
const address = (index: number, ip: number, prefixLength: number) => ({
  index,
  address: ip,
  prefixLength,
  scope: 0,
  permanent: true,
  deprecated: false,
  secondary: false,
  label: undefined,
});
const lease = (subnet: number, publicIp: number, revision: bigint) => ({
  subnet: { address: subnet, length: 24 },
  publicIp,
  backendType: "vxlan",
  vtepMac: "02:00:00:00:00:09",
  vni: 1,
  revision,
});
const endpoint = (more: object = {}) => ({
  endpoint: "https://10.4.7.11:2379",
  latencyMs: 3,
  error: undefined,
  skewMs: 400,
  certificates: [{ subject: "CN=server", from: NOW - 100 * DAY, to: NOW + 265 * DAY }],
  ...more,
});

const noted = {
  version: "1",
  phase: "forwarding",
  ready: true,
  network: {
    network: { address: 0xac070000, length: 16 },
    subnetLength: 24,
    subnetMin: 0xac070100,
    subnetMax: 0xac07ff00,
    backend: {
      type: "vxlan",
      vni: 1,
      port: 8472,
      mtu: undefined,
      directRouting: false,
      learning: false,
      gbp: false,
    },
  },
  uplink: { name: "eth0", address: "10.4.7.21", publicIp: "10.4.7.21" },
  device: "flannel.1",
  subnet: "172.7.21.0/24",
  mtu: 1450,
  failures: [],
  fastPath: "auto",
  subnetFile: "/run/flannel/subnet.env",
  ipMasq: true,
  resyncSeconds: 10,
  renewMarginMinutes: 60,
  leaseTtlSeconds: 86400,
  store: { connected: true },
} as const;

const dataplane = {
  attachments: [
    { ifindex: 2, hook: "from_net" },
    { ifindex: 3, hook: "to_overlay" },
    { ifindex: 3, hook: "from_overlay" },
    { ifindex: 4, hook: "from_pod" },
  ],
  foreign: [],
  tables: [
    { map: "connections4", entries: 1, capacity: 1000 },
    { map: "subnets4", entries: 1, capacity: 65536 },
  ],
  subnets: [
    {
      subnet: PEER,
      prefixLength: 24,
      publicIp: PEER_IP,
      nextHop: PEER_IP,
      ifindex: 2,
      reach: "REACH_TUNNEL",
      mtu: 1450,
      vtepMac: "02:00:00:00:00:09",
    },
  ],
  interfaces: [{ ifindex: 4, gatewayMac: "02:00:00:00:00:02", bridge: true }],
  masqPorts: { first: 61000, last: 65535 },
} as const;

const host = {
  links: [
    link(2, "eth0"),
    link(3, "flannel.1", { kind: "vxlan", mtu: 1450 }),
    link(4, "docker0", { kind: "bridge", mtu: 1450 }),
  ],
  addresses: [address(2, 0x0a040715, 24), address(3, OWN, 32), address(4, OWN + 1, 24)],
  routes: [],
  ways: [
    { address: PEER_IP, outIndex: 2, mtu: 1500 },
    { address: PEER, outIndex: 3, mtu: 1450 },
  ],
};

const SOUND: Facts = {
  now: NOW,
  version: "1",
  kernel: { value: { missing: [] } },
  btf: { value: true },
  bpffs: { value: { path: "/sys/fs/bpf/twill", mounted: true } },
  noted: { value: noted },
  daemon: { value: { pinPath: "/sys/fs/bpf/twill", pid: 7, stopped: false, writtenAt: NOW - 1000 } },
  devicesBeside: { value: [] },
  pins: { value: { missing: [], otherLayout: [] } },
  dataplane: { value: dataplane },
  host: { value: host },
  sysctls: {
    value: { ipForward: "1", rpFilterAll: "0", byInterface: {}, reservedPorts: "8080,61000-65535" },
  },
  subnetFile: {
    value:
      "FLANNEL_NETWORK=172.7.0.0/16\nFLANNEL_SUBNET=172.7.21.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
  },
  flanneld: { value: { processes: [], chains: [], tables: [] } },
  firewall: { value: { chains: [], unreadable: [] } },
  etcd: { value: { prefix: "/coreos.com/network", endpoints: [endpoint()] } },
  leases: {
    value: { leases: [lease(OWN, 0x0a040715, 5n), lease(PEER, PEER_IP, 6n)], ownLeftSeconds: 80_000 },
  },
  clientCertificates: { value: { path: "", certificates: [] } },
  authorities: { value: { path: "", certificates: [] } },
  peers: { value: [{ subnet: { address: PEER, length: 24 }, publicIp: PEER_IP, lost: undefined }] },
};

const look = (more: Partial<Facts>) => diagnose({ ...SOUND, ...more });
const ids = (more: Partial<Facts>) => look(more).findings.map(({ id }) => id);
const etcd = (...endpoints: object[]) => ({
  etcd: { value: { prefix: "/p", endpoints: endpoints.map((more) => endpoint(more)) } },
});
const note = (more: object) => ({ noted: { value: { ...noted, ...more } } });
const state = (more: object) => ({
  daemon: { value: { pinPath: "/p", pid: 7, stopped: false, writtenAt: NOW, ...more } },
});

test("a sound host: every check is carried out and finds nothing", () => {
  const { findings, unchecked, sound } = look({});
  expect(findings).toEqual([]);
  expect(unchecked).toEqual([]);
  expect(sound.length).toBeGreaterThan(35);
});

describe("one fault", () => {
  const reserved = (reservedPorts: string) => ({
    sysctls: { value: { ipForward: "1", rpFilterAll: "0", byInterface: {}, reservedPorts } },
  });
  test.each<[string, CheckId, Partial<Facts>]>([
    ["an old kernel", "kernel-features", { kernel: { value: { missing: [{ feature: "x", use: "y" }] } } }],
    ["no BTF", "kernel-btf", { btf: { value: false } }],
    ["an old status", "daemon-status", state({ writtenAt: NOW - 61_000 })],
    ["a daemon that waits", "daemon-ready", note({ ready: false, phase: "waiting for etcd" })],
    ["a failure", "daemon-failing", note({ failures: [{ what: "a", reason: "b" }] })],
    ["no connection", "daemon-failing", note({ store: { connected: false } })],
    [
      "maps of another version",
      "daemon-version",
      { pins: { value: { missing: [], otherLayout: ["flows4"] } } },
    ],
    ["a slow etcd", "etcd-latency", etcd({ latencyMs: 1500 })],
    ["a clock half a minute off", "clock", etcd({ skewMs: -30_000 })],
    [
      "a lease that nobody renews",
      "lease",
      { leases: { value: { leases: [lease(OWN, 0x0a040715, 5n)], ownLeftSeconds: 900 } } },
    ],
    [
      "a lease of somebody else",
      "lease",
      { leases: { value: { leases: [lease(OWN, PEER_IP, 5n)], ownLeftSeconds: 90_000 } } },
    ],
    ["no lease", "lease", { leases: { value: { leases: [], ownLeftSeconds: undefined } } }],
    ["some of the ports", "masquerade-ports", reserved("61000-65000")],
    [
      "etcd's certificate of tomorrow",
      "certificate-server",
      etcd({ certificates: [{ subject: "", from: NOW + DAY, to: NOW + 9 * DAY }] }),
    ],
    [
      "a certificate near its end",
      "certificate-client",
      {
        clientCertificates: {
          value: { path: "c", certificates: [{ subject: "", from: NOW - 300 * DAY, to: NOW + 29 * DAY }] },
        },
      },
    ],
  ])("%s", (_, id, more) => {
    expect(ids(more)).toEqual([id]);
  });
});

describe("no fault", () => {
  test.each<[string, Partial<Facts>]>([
    [
      "a lease without end",
      { leases: { value: { leases: [lease(OWN, 0x0a040715, 5n)], ownLeftSeconds: undefined } } },
    ],
    [
      "a certificate of two days, half of it over",
      {
        clientCertificates: {
          value: { path: "c", certificates: [{ subject: "", from: NOW - DAY, to: NOW + DAY }] },
        },
      },
    ],
    [
      "an expired CA beside its successor",
      {
        authorities: {
          value: {
            path: "c",
            certificates: [
              { subject: "", from: 0, to: NOW - DAY },
              { subject: "", from: 0, to: NOW + 900 * DAY },
            ],
          },
        },
      },
    ],
    ["one clock of several that is off", etcd({ skewMs: 500_000 }, {})],
    [
      "a tunnel device of another daemon",
      {
        devicesBeside: { value: ["flannel.2"] },
        host: { value: { ...host, links: [...host.links, link(9, "flannel.2", { kind: "vxlan" })] } },
      },
    ],
    [
      "Docker's bridge without a port, as large as Docker makes it",
      {
        host: {
          value: {
            ...host,
            links: host.links.map((one) => (one.name === "docker0" ? { ...one, mtu: 1500 } : one)),
          },
        },
      },
    ],
  ])("%s", (_, more) => {
    expect(ids(more)).toEqual([]);
  });
});

test("what could not be found out leaves the checks that need it undone, and no others", () => {
  const { findings, unchecked, sound } = look({ etcd: { unknown: "no answer" }, btf: { value: false } });
  expect(findings.map(({ id }) => id)).toEqual(["kernel-btf"]);
  expect(unchecked.map(({ id, reason }) => `${id}: ${reason}`)).toEqual(
    ["etcd-endpoint", "etcd-latency", "clock", "certificate-server", "lease"].map((id) => `${id}: no answer`),
  );
  expect(sound.length).toBeGreaterThan(30);
});

test("a dead daemon is one finding, and not asked for more", () => {
  const report = look(state({ pid: undefined }));
  expect(report.findings.map(({ id }) => id)).toEqual(["daemon-running"]);
  expect(report.unchecked.map(({ id }) => id)).toContain("daemon-ready");
});

test("what another finding explains says so, and is still told", () => {
  const down = host.links.map((one) => (one.name === "eth0" ? { ...one, up: false } : one));
  const { findings } = look({
    host: { value: { ...host, links: down } },
    peers: { value: [{ subnet: { address: PEER, length: 24 }, publicIp: PEER_IP, lost: "no answer" }] },
    ...etcd({ latencyMs: undefined, error: "no route" }),
  });
  expect(findings.map(({ id, follows }) => [id, follows])).toEqual([
    ["uplink", []],
    ["etcd-endpoint", ["uplink"]],
    ["peers", ["uplink"]],
  ]);
});

test("of two leases of one address, the one that does not answer is to go, or else the older", () => {
  const leases = [lease(OWN, 0x0a040715, 5n), lease(PEER, PEER_IP, 6n), lease(PEER + 256, PEER_IP, 9n)];
  const both = { leases: { value: { leases, ownLeftSeconds: 80_000 } } };
  const commands = (more: Partial<Facts>) =>
    look({ ...both, ...more }).findings.find(({ id }) => id === "lease-duplicate")?.commands;
  expect(commands({})).toEqual(["etcdctl del /coreos.com/network/subnets/172.7.22.0-24"]);
  const peers = [
    { subnet: { address: PEER, length: 24 }, publicIp: PEER_IP, lost: undefined },
    { subnet: { address: PEER + 256, length: 24 }, publicIp: PEER_IP, lost: "no answer" },
  ];
  expect(commands({ peers: { value: peers } })).toEqual([
    "etcdctl del /coreos.com/network/subnets/172.7.23.0-24",
  ]);
});

test("many of a kind are told up to a number, and outside text stays one word of a command", () => {
  const peers = Array.from({ length: 40 }, (_, at) => ({
    subnet: { address: PEER + 256 * at, length: 24 },
    publicIp: PEER_IP,
    lost: "no answer",
  }));
  const { findings } = look({ peers: { value: peers } });
  expect(findings).toHaveLength(16);
  expect(findings.at(-1)?.text).toContain("(and 24 more of the kind)");

  const name = "flannel.7;reboot";
  const stray = link(9, "a'b; reboot", {
    kind: "vxlan",
    vxlan: {
      vni: 1,
      dstPort: 8472,
      localIp: undefined,
      group: undefined,
      parentIndex: undefined,
      learning: false,
      gbp: false,
      l2miss: false,
      l3miss: false,
      collectMetadata: false,
      ageing: 0,
    },
  });
  const [found] = look({
    host: { value: { ...host, links: [...host.links, stray, link(10, name)] } },
  }).findings;
  expect(found?.commands).toEqual(["ip link del dev 'a'\\''b; reboot'"]);
});
