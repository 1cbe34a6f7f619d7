// The netlink edge against a real kernel, inside network namespaces made here. `ip -json` is the oracle: what
// it shows must be what we list, and what we write must look as if it had written it.
import { execFileSync, spawnSync } from "node:child_process";
import { closeSync, openSync } from "node:fs";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { errno, openLibrary } from "../../loader/ffi.ts";
import type { NetlinkEvent, Write } from "../../src/core/host.ts";
import { isUnanswered } from "../../src/core/host.ts";
import { type Ipv4, type Prefix, parseCidr, parseIpv4 } from "../../src/core/ipv4.ts";
import { type Netlink, NetlinkError, openNetlink } from "../../src/edge/netlink.ts";

const CLONE_NEWNET = 0x40000000;
const setns = openLibrary("libc.so.6").prepare("setns", "int", ["int", "int"]);
const host = `twnl-a-${process.pid}`;
const other = `twnl-b-${process.pid}`;
const home = openSync("/proc/thread-self/ns/net", "r");

function enter(fd: number): void {
  if (setns(fd, CLONE_NEWNET) !== 0) throw new Error(`setns failed with errno ${errno()}`);
}

const command =
  (program: string) =>
  (...args: string[]): string =>
    execFileSync(program, args, {
      encoding: "utf8",
      maxBuffer: 1 << 26,
      stdio: ["ignore", "pipe", "pipe"],
    });
const ip = command("ip");
const tc = command("tc");

// biome-ignore lint/suspicious/noExplicitAny: the shape is iproute2's
function ipJson(...args: string[]): any[] {
  const text = ip("-json", ...args);
  return text.trim() === "" ? [] : JSON.parse(text);
}

function address(text: string): Ipv4 {
  const parsed = parseIpv4(text);
  if (parsed === undefined) throw new Error(`${text} is no address`);
  return parsed;
}

function prefix(text: string): Prefix {
  const parsed = parseCidr(text);
  if (parsed === undefined) throw new Error(`${text} is no prefix`);
  return parsed;
}

function thrown(act: () => unknown): NetlinkError {
  try {
    act();
  } catch (error) {
    if (error instanceof NetlinkError) return error;
    throw error;
  }
  throw new Error("nothing was thrown");
}

let netlink: Netlink;
let uplink: number;

function indexOf(name: string): number {
  const index = netlink.link(name)?.index;
  if (index === undefined) throw new Error(`no interface ${name}`);
  return index;
}

beforeAll(() => {
  ip("netns", "add", host);
  ip("netns", "add", other);
  const fd = openSync(`/run/netns/${host}`, "r");
  enter(fd);
  closeSync(fd);
  ip("link", "set", "lo", "up");
  ip(
    "link",
    "add",
    "up0",
    "address",
    "02:00:00:00:00:01",
    "type",
    "veth",
    "peer",
    "name",
    "up0",
    "netns",
    other,
  );
  ip("addr", "add", "192.0.2.1/24", "dev", "up0");
  ip("addr", "add", "192.0.2.9/24", "dev", "up0", "label", "up0:nine");
  ip("link", "set", "up0", "up");
  ip("-n", other, "link", "set", "up0", "up");
  ip("link", "add", "br0", "type", "bridge");
  ip("link", "add", "pod0", "type", "veth", "peer", "name", "pod1");
  ip("link", "set", "pod0", "master", "br0");
  for (const name of ["br0", "pod0", "pod1"]) ip("link", "set", name, "up");
  netlink = openNetlink();
  uplink = indexOf("up0");
});

afterAll(() => {
  netlink?.close();
  enter(home);
  closeSync(home);
  // One that was never made must not keep the other from being removed.
  for (const name of [host, other]) spawnSync("ip", ["netns", "delete", name]);
});

describe("dumps show what ip shows", () => {
  it("links", () => {
    ip(
      "link",
      "add",
      "vx9",
      "type",
      "vxlan",
      "id",
      "9",
      "dev",
      "up0",
      "local",
      "192.0.2.1",
      "dstport",
      "4789",
    );
    const links = netlink.links();
    const shown = ipJson("-d", "link", "show");
    expect(links.map((link) => link.name).sort()).toEqual(shown.map((row) => row.ifname).sort());
    for (const row of shown) {
      const link = links.find(({ index }) => index === row.ifindex);
      expect(link).toMatchObject({
        name: row.ifname,
        kind: row.linkinfo?.info_kind,
        slaveKind: row.linkinfo?.info_slave_kind,
        mtu: row.mtu,
        up: row.flags.includes("UP"),
        noarp: row.flags.includes("NOARP"),
        loopback: row.flags.includes("LOOPBACK"),
        running: row.flags.includes("LOWER_UP") && row.flags.includes("UP"),
        masterIndex: row.master && indexOf(row.master),
        linkNetnsId: row.link_netnsid,
        linkIndex: row.link_index ?? (row.link && indexOf(row.link)),
      });
      expect(netlink.link(row.ifname)).toEqual(link);
      expect(link?.type === 772).toBe(row.link_type === "loopback");
      if (row.link_type === "ether") expect(link?.mac).toBe(row.address);
    }
    const vxlan = links.find((link) => link.name === "vx9");
    expect(vxlan?.parentIndex).toBe(uplink);
    expect(vxlan?.vxlan).toEqual({
      vni: 9,
      localIp: address("192.0.2.1"),
      group: undefined,
      dstPort: 4789,
      parentIndex: uplink,
      learning: true,
      gbp: false,
      l2miss: false,
      l3miss: false,
      collectMetadata: false,
      ageing: 300,
    });
    expect(links.find((link) => link.name === "pod0")?.parentIndex).toBeUndefined();
    netlink.deleteLink(indexOf("vx9"));
    expect(netlink.link("vx9")).toBeUndefined();
  });

  it("addresses", () => {
    const shown = ipJson("-4", "addr", "show").flatMap((link) =>
      // biome-ignore lint/suspicious/noExplicitAny: the shape is iproute2's
      link.addr_info.map((row: any) => ({
        index: link.ifindex,
        address: address(row.local),
        prefixLength: row.prefixlen,
        scope: { global: 0, link: 253, host: 254 }[row.scope as "global"],
        permanent: row.valid_life_time === 0xffffffff,
        deprecated: row.deprecated ?? false,
        secondary: row.secondary ?? false,
        label: row.label,
      })),
    );
    expect(shown.length).toBe(3);
    expect(netlink.addresses()).toEqual(shown);
  });

  it("routes, of every table and shape", () => {
    ip("route", "add", "10.1.0.0/16", "via", "192.0.2.7", "metric", "50", "mtu", "1400", "src", "192.0.2.9");
    ip("route", "add", "10.2.0.0/16", "nexthop", "via", "192.0.2.7", "nexthop", "via", "192.0.2.8");
    ip("route", "add", "blackhole", "10.3.0.0/16", "table", "1000", "proto", "static");
    ip("route", "add", "10.4.0.0/16", "via", "10.99.0.1", "dev", "up0", "onlink");
    ip("route", "add", "10.5.0.0/16", "via", "inet6", "fe80::1", "dev", "up0");
    const main = netlink.routes({ table: 254 });
    expect(main.length).toBe(ipJson("route", "show", "table", "main").length);
    expect(netlink.routes().length).toBe(ipJson("-4", "route", "show", "table", "all").length);
    const to = (text: string) => main.find((row) => row.destination.address === address(text));
    expect(to("10.1.0.0")).toEqual({
      destination: prefix("10.1.0.0/16"),
      gateway: address("192.0.2.7"),
      viaIpv6: false,
      outIndex: uplink,
      table: 254,
      protocol: 3,
      scope: 0,
      type: 1,
      tos: 0,
      onlink: false,
      linkDown: false,
      metric: 50,
      mtu: 1400,
      source: address("192.0.2.9"),
      nexthops: [],
    });
    expect(to("10.2.0.0")?.nexthops).toEqual([
      { outIndex: uplink, gateway: address("192.0.2.7"), onlink: false },
      { outIndex: uplink, gateway: address("192.0.2.8"), onlink: false },
    ]);
    expect(to("10.3.0.0")).toBeUndefined();
    expect(to("10.4.0.0")).toMatchObject({ onlink: true, gateway: address("10.99.0.1") });
    expect(to("10.5.0.0")).toMatchObject({ gateway: undefined, viaIpv6: true });
    expect(to("192.0.2.0")).toMatchObject({ protocol: 2, scope: 253, source: address("192.0.2.1") });
    expect(netlink.routes({ table: 1000 })).toMatchObject([{ table: 1000, type: 6, protocol: 4 }]);
    expect(netlink.routes({ table: 1001 })).toEqual([]);
    ip("route", "flush", "table", "1000");
    for (const second of [1, 2, 4, 5]) ip("route", "delete", `10.${second}.0.0/16`);
  });

  it("neighbours and FDB entries", () => {
    ip("neigh", "add", "192.0.2.50", "lladdr", "02:00:00:00:00:50", "dev", "up0", "nud", "permanent");
    ip("neigh", "add", "192.0.2.51", "lladdr", "02:00:00:00:00:51", "dev", "up0", "nud", "stale");
    const rows = netlink.neighbours().filter((row) => row.index === uplink);
    expect(rows).toHaveLength(ipJson("-4", "neigh", "show", "dev", "up0").length);
    expect(rows).toContainEqual({
      index: uplink,
      address: address("192.0.2.50"),
      mac: "02:00:00:00:00:50",
      state: 128,
      flags: 0,
      permanent: true,
    });
    expect(rows).toContainEqual(
      expect.objectContaining({ address: address("192.0.2.51"), state: 4, permanent: false }),
    );
    ip("neigh", "flush", "dev", "up0", "nud", "all");

    execFileSync("bridge", ["fdb", "add", "02:00:00:00:00:60", "dev", "pod0", "master", "static"]);
    const shown = JSON.parse(execFileSync("bridge", ["-json", "fdb", "show"], { encoding: "utf8" }));
    const listed = netlink.fdb();
    const key = (row: { mac: string; index: number; vlan?: number | undefined }) =>
      `${row.mac} ${row.index} ${row.vlan ?? ""}`;
    const expected = shown.map((row: { mac: string; ifname: string; vlan?: number }) =>
      key({ mac: row.mac, index: indexOf(row.ifname), vlan: row.vlan }),
    );
    expect(listed.map(key).sort()).toEqual(expected.sort());
    expect(listed).toContainEqual(
      expect.objectContaining({
        index: indexOf("pod0"),
        mac: "02:00:00:00:00:60",
        masterIndex: indexOf("br0"),
        self: false,
      }),
    );
  });
});

describe("writes", () => {
  const spec = {
    name: "flannel.1",
    vni: 1,
    port: 8472,
    learning: false,
    gbp: false,
    mac: "0a:1b:2c:3d:4e:5f",
    mtu: 1450,
    localIp: address("192.0.2.1"),
  };
  afterEach(() => {
    for (const link of netlink.links()) if (link.kind === "vxlan") netlink.deleteLink(link.index);
  });

  function describeDevice(name: string) {
    const [row] = ipJson("-d", "link", "show", name);
    const { ifindex: _index, ...rest } = row;
    return rest;
  }

  it("makes the VXLAN device that flanneld makes", () => {
    ip(
      ...["link", "add", "flannel.1", "mtu", "1450", "txqueuelen", "0", "address", spec.mac],
      ...["type", "vxlan", "id", "1", "dev", "up0", "local", "192.0.2.1", "dstport", "8472", "nolearning"],
    );
    const asked = describeDevice("flannel.1");
    ip("link", "delete", "flannel.1");
    const index = netlink.createVxlan({ ...spec, parentIndex: uplink });
    expect(index).toBe(indexOf("flannel.1"));
    expect(describeDevice("flannel.1")).toEqual(asked);
    expect(ip("-d", "link", "show", "flannel.1")).toMatch(
      /vxlan id 1 local 192\.0\.2\.1 dev up0 srcport 0 0 dstport 8472 nolearning .*ageing 300 udpcsum noudp6zerocsumtx noudp6zerocsumrx/,
    );
    expect(netlink.link("flannel.1")).toMatchObject({ kind: "vxlan", mac: spec.mac, mtu: 1450, up: false });
  });

  it("makes one with learning, GBP, a kernel-drawn MAC and the kernel's port", () => {
    netlink.createVxlan({
      ...spec,
      mac: undefined,
      learning: true,
      gbp: true,
      port: 0,
      parentIndex: uplink,
    });
    const link = netlink.link("flannel.1");
    expect(link?.vxlan).toMatchObject({ learning: true, gbp: true, dstPort: 8472 });
    expect(link?.mac).toMatch(/^.[26ae]:/);
    expect(ip("-d", "link", "show", "flannel.1")).toContain(" gbp ");
  });

  it("fills the device: link up, address, neighbour, FDB entry, onlink route, and takes it all back", () => {
    const index = netlink.createVxlan({ ...spec, parentIndex: uplink });
    netlink.setLink(index, { up: true, mtu: 1400, mac: "0a:00:00:00:00:01" });
    expect(netlink.link("flannel.1")).toMatchObject({ up: true, mtu: 1400, mac: "0a:00:00:00:00:01" });
    netlink.setLink(index, { mtu: 1410 });
    expect(netlink.link("flannel.1")).toMatchObject({ up: true, mtu: 1410 });

    netlink.addAddress(index, prefix("10.5.72.0/32"));
    expect(ipJson("-4", "addr", "show", "flannel.1")[0].addr_info).toMatchObject([
      { local: "10.5.72.0", prefixlen: 32, scope: "global", valid_life_time: 0xffffffff },
    ]);
    expect(thrown(() => netlink.addAddress(index, prefix("10.5.72.0/32"))).code).toBe("EEXIST");

    const gateway = address("10.5.73.0");
    const mac = "0a:00:00:00:00:73";
    const dst = address("192.0.2.73");
    const route = { destination: prefix("10.5.73.0/24"), gateway, outIndex: index, onlink: true };
    for (let round = 0; round < 2; round++) {
      netlink.replaceNeighbour({ index, address: gateway, mac, permanent: true });
      netlink.replaceFdb({ index, mac, dst });
      netlink.replaceRoute(route);
    }
    expect(ipJson("neigh", "show", "dev", "flannel.1")).toEqual([
      { dst: "10.5.73.0", lladdr: mac, state: ["PERMANENT"] },
    ]);
    expect(execFileSync("bridge", ["fdb", "show", "dev", "flannel.1"], { encoding: "utf8" }).trim()).toBe(
      `${mac} dst 192.0.2.73 self permanent`,
    );
    expect(ipJson("-details", "route", "show", "10.5.73.0/24")).toMatchObject([
      {
        dst: "10.5.73.0/24",
        gateway: "10.5.73.0",
        dev: "flannel.1",
        flags: ["onlink"],
        protocol: "boot",
        scope: "global",
        type: "unicast",
      },
    ]);
    expect(netlink.routeTo(address("10.5.73.9"))).toMatchObject({
      outIndex: index,
      gateway,
      source: address("10.5.72.0"),
      type: 1,
      local: false,
    });

    // The kernel claims success for a remote the MAC is not behind; what counts is that the entry stays.
    netlink.deleteFdb({ index, mac, dst: address("192.0.2.74") });
    expect(netlink.fdb()).toContainEqual(expect.objectContaining({ index, mac, dst }));
    for (const present of [true, false]) {
      expect(netlink.deleteRoute(route)).toBe(present);
      expect(netlink.deleteFdb({ index, mac, dst })).toBe(present);
      expect(netlink.deleteNeighbour({ index, address: gateway })).toBe(present);
      expect(netlink.deleteAddress(index, prefix("10.5.72.0/32"))).toBe(present);
    }
    expect(netlink.fdb().filter((row) => row.index === index)).toEqual([]);
    expect(netlink.deleteLink(index)).toBe(true);
    expect(netlink.deleteLink(index)).toBe(false);
    expect(netlink.deleteRoute(route)).toBe(false);
    expect(netlink.deleteNeighbour({ index, address: gateway })).toBe(false);
    expect(netlink.deleteFdb({ index, mac, dst })).toBe(false);
    expect(netlink.deleteAddress(index, prefix("10.5.72.0/32"))).toBe(false);
  });

  it("leads routes by nexthops, as flanneld's lead by themselves, and tells of one that goes", async () => {
    const index = netlink.createVxlan({ ...spec, parentIndex: uplink });
    netlink.setLink(index, { up: true });
    netlink.addAddress(index, prefix("10.5.72.0/32"));
    const [destination, gateway, id] = [prefix("10.5.73.0/24"), address("10.5.73.0"), 0x0a054918];
    const plain = { destination, gateway, outIndex: index, onlink: true, mtu: 1300 };
    const [nexthop, route] = [
      { write: "replaceNexthop", id, gateway, outIndex: index, protocol: 84 },
      { write: "replaceRoute", destination, nexthopId: id, protocol: 84, mtu: 1300 },
    ] as const;
    const own = () => netlink.routes().find((row) => row.outIndex === index && row.destination.length === 24);
    // Each takes the place of the other.
    for (const _ of ["first", "second"]) {
      netlink.replaceRoute(plain);
      expect(own()).toMatchObject({ gateway, onlink: true, mtu: 1300, nexthopId: undefined });
      expect(netlink.apply([nexthop, route])).toEqual([undefined, undefined]);
      expect(own()).toMatchObject({ gateway, onlink: true, mtu: 1300, protocol: 84, nexthopId: id });
      expect(netlink.routeTo(address("10.5.73.9"))).toMatchObject({ outIndex: index, gateway });
    }
    expect(netlink.nexthops()).toContainEqual({ id, protocol: 84 });
    // By its number alone, and only while it is by that.
    expect(netlink.deleteRoute(plain)).toBe(false);
    expect(netlink.deleteRoute({ destination, nexthopId: id + 1 })).toBe(false);
    expect(netlink.deleteRoute({ destination, nexthopId: id })).toBe(true);
    netlink.apply([route]);
    const recorder = new Recorder();
    try {
      expect(netlink.deleteNexthop(id)).toBe(true);
      await recorder.event("nexthop", "delete", { id });
      expect(recorder.events.filter(({ kind }) => kind === "route")).toEqual([]);
      expect(own()).toBeUndefined();
    } finally {
      recorder.netlink.close();
    }
    expect(netlink.deleteNexthop(id)).toBe(false);
    expect(netlink.apply([route])[0]).toMatchObject({ code: "EINVAL" });
    expect(netlink.deleteLink(index)).toBe(true);
  });

  it("moves an FDB entry to another remote instead of adding one", () => {
    const index = netlink.createVxlan({ ...spec, parentIndex: uplink });
    const mac = "0a:00:00:00:00:73";
    netlink.replaceFdb({ index, mac, dst: address("192.0.2.73") });
    netlink.replaceFdb({ index, mac, dst: address("192.0.2.74") });
    expect(netlink.fdb().filter((row) => row.index === index)).toMatchObject([
      { mac, dst: address("192.0.2.74"), self: true, permanent: true, masterIndex: undefined },
    ]);
  });

  it("writes every route attribute as ip does", () => {
    ip(
      ...["route", "add", "10.8.0.0/16", "via", "192.0.2.7", "dev", "up0", "proto", "17"],
      ...["src", "192.0.2.9", "mtu", "1300", "metric", "7", "table", "1000"],
    );
    const asked = ipJson("-details", "route", "show", "table", "1000");
    ip("route", "flush", "table", "1000");
    const route = {
      destination: prefix("10.8.3.4/16"),
      gateway: address("192.0.2.7"),
      outIndex: uplink,
      protocol: 17,
      scope: 0,
      source: address("192.0.2.9"),
      mtu: 1300,
      metric: 7,
      table: 1000,
    };
    netlink.replaceRoute(route);
    expect(ipJson("-details", "route", "show", "table", "1000")).toEqual(asked);
    expect(netlink.deleteRoute({ ...route, gateway: address("192.0.2.8") })).toBe(false);
    expect(netlink.deleteRoute({ destination: route.destination, table: 1000 })).toBe(true);
    netlink.replaceRoute({ destination: prefix("10.9.0.0/16"), outIndex: uplink });
    expect(ipJson("-details", "route", "show", "10.9.0.0/16")).toMatchObject([{ scope: "link", dev: "up0" }]);
    expect(netlink.deleteRoute({ destination: prefix("10.9.0.0/16"), outIndex: uplink })).toBe(true);
  });

  it("says what failed, where and why, in the kernel's words", () => {
    const index = netlink.createVxlan({ ...spec, parentIndex: uplink });
    const twin = thrown(() => netlink.createVxlan({ ...spec, name: "flannel.2", parentIndex: uplink }));
    expect(twin.code).toBe("EEXIST");
    expect(twin.detail).toMatch(/VNI/);
    expect(twin.message).toContain("flannel.2");
    expect(twin.message).toContain(twin.detail);

    const route = thrown(() =>
      netlink.replaceRoute({ destination: prefix("10.7.0.0/16"), gateway: address("203.0.113.1") }),
    );
    expect(route).toMatchObject({ errno: 101, code: "ENETUNREACH", detail: "Nexthop has invalid gateway" });
    expect(route.operation).toBe("write route 10.7.0.0/16 via 203.0.113.1");

    const mac = thrown(() => netlink.setLink(index, { mac: "not a mac" }));
    expect(mac).toMatchObject({ code: "EINVAL" });
    expect(mac.message).toContain("not a mac");
    expect(thrown(() => netlink.setLink(99999, { up: true })).code).toBe("ENODEV");
    expect(
      thrown(() => netlink.createVxlan({ ...spec, name: "a-name-too-long-for-linux", parentIndex: 1 })).code,
    ).toBe("ERANGE");
  });
});

describe("route lookup", () => {
  it("answers like ip route get", () => {
    expect(netlink.routeTo(address("192.0.2.77"))).toEqual({
      outIndex: uplink,
      gateway: undefined,
      viaIpv6: false,
      source: address("192.0.2.1"),
      mtu: undefined,
      type: 1,
      local: false,
    });
    expect(netlink.routeTo(address("192.0.2.77"), { source: address("192.0.2.9") })?.source).toBe(
      address("192.0.2.9"),
    );
    expect(netlink.routeTo(address("192.0.2.1"))).toMatchObject({ local: true, type: 2 });
    expect(netlink.routeTo(address("198.51.100.1"))).toBeUndefined();
    // More than fit in one datagram or are answered at once; each answer is its question's.
    const many = Array.from({ length: 5000 }, (_, n) => address(n % 7 === 0 ? "198.51.100.1" : "192.0.2.77"));
    const answered = netlink.routesTo(many);
    expect(answered).toHaveLength(many.length);
    for (const [n, route] of answered.entries())
      expect(route?.outIndex).toBe(n % 7 === 0 ? undefined : uplink);
    expect(netlink.routesTo([])).toEqual([]);
    ip("route", "add", "198.51.100.0/25", "via", "192.0.2.7", "mtu", "1280");
    ip("route", "add", "blackhole", "198.51.100.128/26");
    ip("route", "add", "prohibit", "198.51.100.192/26");
    expect(netlink.routeTo(address("198.51.100.1"))).toMatchObject({
      gateway: address("192.0.2.7"),
      mtu: 1280,
    });
    expect(netlink.routeTo(address("198.51.100.129"))).toBeUndefined();
    expect(netlink.routeTo(address("198.51.100.193"))).toBeUndefined();
    ip("route", "add", "198.51.100.1", "dev", "up0", "table", "1002");
    ip("rule", "add", "fwmark", "7", "lookup", "1002");
    expect(netlink.routeTo(address("198.51.100.1"), { mark: 7 })?.gateway).toBeUndefined();
    expect(netlink.routeTo(address("198.51.100.1"), { outIndex: indexOf("br0") })?.gateway).toBeUndefined();
    ip("rule", "delete", "fwmark", "7");
    ip("route", "flush", "table", "1002");
    for (const net of ["0/25", "128/26", "192/26"]) ip("route", "delete", `198.51.100.${net}`);
    expect(thrown(() => netlink.routeTo(address("192.0.2.7"), { outIndex: 99999 })).code).toBe("ENODEV");
  });
});

function manyRoutes(count: number): Write[] {
  return Array.from({ length: count }, (_, i) => ({
    write: "replaceRoute" as const,
    destination: { address: address("10.64.0.0") + i * 256, length: 24 },
    gateway: address("192.0.2.7"),
    outIndex: uplink,
  }));
}

function asDeletions(writes: readonly Write[]): Write[] {
  return writes.map((write) => ({ ...write, write: "deleteRoute" }) as Write);
}

describe("batches", () => {
  it("carries ten thousand routes in and out", () => {
    const writes = manyRoutes(10_000);
    const start = performance.now();
    expect(netlink.apply(writes).every((error) => error === undefined)).toBe(true);
    const written = performance.now();
    const routes = netlink.routes({ table: 254 });
    const listed = performance.now();
    expect(routes.length).toBe(ipJson("route", "show", "table", "main").length);
    expect(new Set(routes.map((row) => row.destination.address)).size).toBe(routes.length);
    // Generous: a tenth of this is usual on a quiet machine.
    expect(written - start).toBeLessThan(3000);
    expect(listed - written).toBeLessThan(1000);
    expect(netlink.apply(asDeletions(writes)).every((error) => error === undefined)).toBe(true);
    expect(netlink.routes({ table: 254 }).length).toBe(routes.length - 10_000);
  });

  it("reports each failed write on its own and does the rest", () => {
    const writes = manyRoutes(3000);
    const bad = new Set([0, 1, 1500, 2998, 2999]);
    for (const i of bad) {
      const write = writes[i];
      if (write?.write === "replaceRoute") writes[i] = { ...write, gateway: address("203.0.113.1") };
    }
    writes[700] = { write: "replaceNeighbour", index: uplink, address: 1, mac: "bad", permanent: true };
    bad.add(700);
    const results = netlink.apply(writes);
    expect(results.length).toBe(3000);
    for (const [i, error] of results.entries()) expect(error !== undefined, `write ${i}`).toBe(bad.has(i));
    expect(results[1500]).toMatchObject({ code: "ENETUNREACH", detail: "Nexthop has invalid gateway" });
    expect(results[700]?.code).toBe("EINVAL");
    // Deleting what is gone, as the failed ones are, counts as done.
    expect(netlink.apply(asDeletions(manyRoutes(3000))).filter((error) => error)).toEqual([]);
    expect(netlink.apply(asDeletions(manyRoutes(3000))).filter((error) => error)).toEqual([]);
    expect(netlink.apply([])).toEqual([]);
  });

  it("lists a table some rows at a time, with other requests and other listings in between", () => {
    const destinations = Array.from({ length: 5000 }, (_, n) => ({
      address: address("10.128.0.0") + n * 256,
      length: 24,
    }));
    const route = (destination: { address: number; length: number }) => ({
      destination,
      outIndex: uplink,
      gateway: address("192.0.2.7"),
    });
    netlink.apply(destinations.map((each) => ({ write: "replaceRoute", ...route(each) })));
    const listing = netlink.read("route");
    const seen = new Set<number>();
    let steps = 0;
    for (const rows of listing) {
      steps += 1;
      for (const { destination } of rows) seen.add(destination.address);
      expect([...netlink.read("link")].flat()).toEqual(netlink.links());
      // Rows that come and go before and behind what is being listed.
      const [first, last] = [destinations[steps], destinations.at(-1 - steps)];
      if (first === undefined || last === undefined) throw new Error("too many steps");
      netlink.deleteRoute(route(first));
      netlink.replaceRoute(route(first));
      netlink.deleteRoute(route(last));
    }
    expect(steps).toBeGreaterThan(5);
    const kept = destinations.slice(0, -1 - steps);
    expect(kept.filter((each) => !seen.has(each.address))).toEqual([]);
    for (const [name, all] of [
      ["address", netlink.addresses()],
      ["route", netlink.routes()],
      ["neighbour", netlink.neighbours()],
      ["fdb", netlink.fdb()],
    ] as const) {
      expect([...netlink.read(name)].flat()).toEqual(all);
    }
    // Given up in the midst.
    const given = netlink.read("route");
    given.next();
    given.return(undefined);
    expect([...netlink.read("route")].flat()).toHaveLength(netlink.routes().length);
    netlink.apply(destinations.map((each) => ({ write: "deleteRoute", ...route(each) })));
  });

  it("survives a batch in which everything fails", () => {
    const writes = manyRoutes(5000).map((write) => ({ ...write, gateway: address("203.0.113.1") }));
    const results = netlink.apply(writes);
    expect(results.filter((error) => error?.code === "ENETUNREACH").length).toBe(5000);
  });
});

/** Collects events and lets a test wait for one. */
class Recorder {
  readonly events: NetlinkEvent[] = [];
  overruns = 0;
  private wake: (() => void) | undefined;
  readonly netlink = openNetlink({
    onEvent: (event) => {
      this.events.push(event);
      this.wake?.();
    },
    onOverrun: () => {
      this.overruns++;
      this.wake?.();
    },
  });

  async until(what: string, done: () => boolean): Promise<void> {
    while (!done()) {
      await new Promise<void>((resolve, reject) => {
        const limit = setTimeout(
          () => reject(new Error(`${what} did not happen; saw ${JSON.stringify(this.events)}`)),
          10_000,
        );
        this.wake = () => {
          clearTimeout(limit);
          resolve();
        };
      });
    }
  }

  async event(kind: NetlinkEvent["kind"], change: "new" | "delete", row: object): Promise<void> {
    const wanted = expect.objectContaining({ kind, change, row: expect.objectContaining(row) });
    await this.until(`${change} ${kind} ${JSON.stringify(row)}`, () =>
      this.events.some((event) => wanted.asymmetricMatch(event)),
    );
  }
}

describe("events", () => {
  let recorder: Recorder;
  afterEach(() => recorder.netlink.close());

  it("reports every kind of change, also those made by others", async () => {
    recorder = new Recorder();
    ip(
      "link",
      "add",
      "vx7",
      "type",
      "vxlan",
      "id",
      "7",
      "dev",
      "up0",
      "local",
      "192.0.2.1",
      "dstport",
      "4790",
    );
    const index = indexOf("vx7");
    await recorder.event("link", "new", { index, name: "vx7", kind: "vxlan", up: false });
    netlink.setLink(index, { up: true });
    await recorder.event("link", "new", { index, up: true });
    netlink.addAddress(index, prefix("10.7.0.0/32"));
    await recorder.event("address", "new", { index, address: address("10.7.0.0"), prefixLength: 32 });
    ip("route", "add", "10.7.1.0/24", "via", "10.7.1.0", "dev", "vx7", "onlink");
    await recorder.event("route", "new", {
      destination: prefix("10.7.1.0/24"),
      outIndex: index,
      onlink: true,
    });
    const neighbour = { index, address: address("10.7.1.0"), mac: "0a:00:00:00:00:07" };
    netlink.replaceNeighbour({ ...neighbour, permanent: true });
    await recorder.event("neighbour", "new", { ...neighbour, permanent: true });
    const entry = { index, mac: "0a:00:00:00:00:07", dst: address("192.0.2.7") };
    netlink.replaceFdb(entry);
    await recorder.event("fdb", "new", { ...entry, self: true });

    netlink.deleteFdb(entry);
    await recorder.event("fdb", "delete", entry);
    netlink.deleteNeighbour(neighbour);
    await recorder.event("neighbour", "delete", { index, address: neighbour.address });
    ip("route", "delete", "10.7.1.0/24");
    await recorder.event("route", "delete", { destination: prefix("10.7.1.0/24") });
    netlink.deleteAddress(index, prefix("10.7.0.0/32"));
    await recorder.event("address", "delete", { index, address: address("10.7.0.0") });
    netlink.deleteLink(index);
    await recorder.event("link", "delete", { index, name: "vx7" });
    expect(recorder.overruns).toBe(0);
  });

  it("has a neighbour that did not answer asked again at once", () => {
    ip("link", "add", "ask0", "type", "veth", "peer", "name", "ask1");
    ip("link", "set", "ask1", "up");
    ip("address", "add", "10.8.0.1/24", "dev", "ask0");
    ip("link", "set", "ask0", "up");
    const index = indexOf("ask0");
    const silent = { index, address: address("10.8.0.9") };
    const state = () => netlink.neighbours().find((row) => row.address === silent.address)?.state;
    for (const before of ["failed", "incomplete"]) {
      ip("neighbour", "replace", "10.8.0.9", "dev", "ask0", "nud", before);
      const dropped = netlink.apply([{ write: "dropResolution", ...silent }]);
      expect(dropped).toEqual([undefined]);
      expect(state() ?? 0).toBe(0);
      expect(netlink.apply([{ write: "resolveNeighbour", ...silent }])).toEqual([undefined]);
      expect(isUnanswered(state() ?? 0)).toBe(true);
    }
    netlink.deleteLink(index);
  });

  it("tells of the filters and the qdisc at clsact hooks, and of no others", async () => {
    recorder = new Recorder();
    ip("link", "add", "tc0", "type", "veth", "peer", "name", "tc1");
    const index = indexOf("tc0");
    const all = ["protocol", "ip", "u32", "match", "u32", "0", "0"];
    tc("qdisc", "add", "dev", "tc0", "root", "handle", "1:", "htb");
    tc("filter", "add", "dev", "tc0", "parent", "1:", ...all);
    tc("qdisc", "add", "dev", "tc0", "clsact");
    await recorder.event("filter", "new", { index });
    tc("filter", "add", "dev", "tc0", "ingress", ...all);
    tc("filter", "del", "dev", "tc0", "ingress");
    tc("qdisc", "del", "dev", "tc0", "clsact");
    const changes = () => recorder.events.filter(({ kind }) => kind === "filter");
    await recorder.until(
      "both to be gone",
      () => changes().filter(({ change }) => change === "delete").length >= 2,
    );
    const before = changes().length;
    tc("filter", "del", "dev", "tc0", "parent", "1:");
    tc("qdisc", "del", "dev", "tc0", "root");
    ip("link", "delete", "tc0");
    await recorder.event("link", "delete", { index });
    expect(changes()).toHaveLength(before);
  });

  it("does not take a port that leaves its bridge for an interface that is gone", async () => {
    recorder = new Recorder();
    const index = indexOf("pod0");
    ip("link", "set", "pod0", "nomaster");
    await recorder.event("link", "new", { index, masterIndex: undefined });
    ip("link", "add", "mark0", "type", "bridge");
    await recorder.event("link", "new", { name: "mark0" });
    expect(recorder.events.filter((event) => event.kind === "link" && event.change === "delete")).toEqual([]);
    ip("link", "set", "pod0", "master", "br0");
    ip("link", "delete", "mark0");
  });

  it("delivers ten thousand changes made in one go", async () => {
    recorder = new Recorder();
    const writes = manyRoutes(10_000);
    recorder.netlink.apply(writes);
    await recorder.until(
      "all routes",
      () => recorder.events.filter((event) => event.kind === "route").length >= 10_000,
    );
    recorder.netlink.apply(asDeletions(writes));
    await recorder.until("all deletions", () => recorder.events.length >= 20_000);
    expect(recorder.overruns).toBe(0);
  });

  it("says so when changes were lost, and goes on with newer ones only", async () => {
    recorder = new Recorder();
    const writes = manyRoutes(20_000);
    // More than any receive buffer holds, with the event loop kept from reading.
    for (let round = 0; round < 3 && recorder.overruns === 0; round++) {
      netlink.apply(writes);
      netlink.apply(asDeletions(writes));
    }
    await recorder.until("an overrun", () => recorder.overruns > 0);
    expect(recorder.events).toEqual([]);
    ip("link", "add", "mark1", "type", "bridge");
    await recorder.event("link", "new", { name: "mark1" });
    expect(recorder.overruns).toBe(1);
    netlink.deleteLink(indexOf("mark1"));
  });

  it("is silent after close", async () => {
    recorder = new Recorder();
    const second = new Recorder();
    recorder.netlink.close();
    recorder.netlink.close();
    ip("link", "add", "mark2", "type", "bridge");
    await second.event("link", "new", { name: "mark2" });
    expect(recorder.events).toEqual([]);
    netlink.deleteLink(indexOf("mark2"));
    second.netlink.close();
  });
});
