import { describe, expect, test } from "vitest";
import { hostGw } from "../../src/core/backends/host-gw.ts";
import { kindOf } from "../../src/core/backends.ts";
import { chooseUplink, type HostFacts, type UplinkWish } from "../../src/core/interfaces.ts";
import { formatIpv4, parseIpv4 } from "../../src/core/ipv4.ts";

const ip = (text: string): number => parseIpv4(text) ?? Number.NaN;
const at = (index: number, address: string, more: { permanent?: boolean; deprecated?: boolean } = {}) => ({
  index,
  address: ip(address),
  permanent: more.permanent ?? true,
  deprecated: more.deprecated ?? false,
});

const host: HostFacts = {
  links: [
    { index: 1, name: "lo", mtu: 65536 },
    { index: 2, name: "eth0", mtu: 1500 },
    { index: 3, name: "eth1", mtu: 9000 },
    { index: 4, name: "dark0", mtu: 1500 },
    { index: 5, name: "broken0", mtu: 0 },
    { index: 6, name: "mixed0", mtu: 1400 },
    { index: 7, name: "10g", mtu: 1500 },
  ],
  addresses: [
    at(1, "127.0.0.1"),
    at(2, "10.4.7.21"),
    at(2, "10.4.7.121"),
    at(3, "192.168.5.21"),
    at(5, "10.9.9.9"),
    at(6, "169.254.7.7"),
    at(6, "10.6.0.1", { deprecated: true }),
    at(6, "10.6.0.2", { permanent: false }),
    at(6, "10.6.0.3"),
    at(7, "172.20.0.1"),
  ],
  defaultRoutes: [
    { outIndex: 3, metric: 200 },
    { outIndex: 2, metric: 100 },
  ],
  reach: { outIndex: 3, source: ip("192.168.5.21") },
};

function choose(wish: Partial<UplinkWish> & { public?: string }, facts: Partial<HostFacts> = {}): string {
  const uplink = chooseUplink(
    {
      interfaces: [],
      interfacePatterns: [],
      interfaceCanReach: undefined,
      publicIp: wish.public === undefined ? undefined : ip(wish.public),
      ...wish,
    },
    { ...host, ...facts },
  );
  if ("error" in uplink) return uplink.error;
  const { link, address, mtu, publicIp } = uplink;
  return `${link.name} ${formatIpv4(address)} ${mtu} ${formatIpv4(publicIp)}`;
}

const none = "Failed to find interface to use that matches the interfaces and/or regexes provided";

describe("which interface", () => {
  test.each<[string, Parameters<typeof choose>[0], string]>([
    ["default route of the least metric", {}, "eth0 10.4.7.21 1500 10.4.7.21"],
    ["name", { interfaces: ["eth1"] }, "eth1 192.168.5.21 9000 192.168.5.21"],
    ["address", { interfaces: ["10.4.7.121"] }, "eth0 10.4.7.121 1500 10.4.7.121"],
    ["first that is there", { interfaces: ["eth9", "dark0", "eth1"] }, "eth1 192.168.5.21 9000 192.168.5.21"],
    ["pattern on an address", { interfacePatterns: [/^192\.168\./] }, "eth1 192.168.5.21 9000 192.168.5.21"],
    ["pattern on a second address", { interfacePatterns: [/7\.121/] }, "eth0 10.4.7.121 1500 10.4.7.121"],
    [
      "pattern on a name, not anchored",
      { interfacePatterns: [/th1/] },
      "eth1 192.168.5.21 9000 192.168.5.21",
    ],
    ["an address matches before a name", { interfacePatterns: [/10/] }, "eth0 10.4.7.21 1500 10.4.7.21"],
    [
      "a name without address is passed over",
      { interfacePatterns: [/^(dark0|eth1)$/] },
      "eth1 192.168.5.21 9000 192.168.5.21",
    ],
    [
      "names before patterns",
      { interfaces: ["eth1"], interfacePatterns: [/eth0/] },
      "eth1 192.168.5.21 9000 192.168.5.21",
    ],
    [
      "patterns when names fail",
      { interfaces: ["eth9"], interfacePatterns: [/nothing/, /eth0/] },
      "eth0 10.4.7.21 1500 10.4.7.21",
    ],
    ["reach", { interfaceCanReach: ip("8.8.8.8") }, "eth1 192.168.5.21 9000 192.168.5.21"],
    [
      "reach is last",
      { interfaces: ["eth0"], interfaceCanReach: ip("8.8.8.8") },
      "eth0 10.4.7.21 1500 10.4.7.21",
    ],
    [
      "permanent before leased before link-local",
      { interfaces: ["mixed0"] },
      "mixed0 10.6.0.3 1400 10.6.0.3",
    ],
  ])("%s", (_, wish, expected) => {
    expect(choose(wish)).toBe(expected);
  });

  test("link-local is better than nothing, leased better than link-local", () => {
    const some = (addresses: HostFacts["addresses"]) => choose({ interfaces: ["mixed0"] }, { addresses });
    expect(some([at(6, "169.254.7.7")])).toBe("mixed0 169.254.7.7 1400 169.254.7.7");
    expect(some([at(6, "169.254.7.7"), at(6, "10.6.0.2", { permanent: false })])).toBe(
      "mixed0 10.6.0.2 1400 10.6.0.2",
    );
  });
});

describe("public IP", () => {
  test.each<[string, Parameters<typeof choose>[0], string]>([
    ["local: its interface", { public: "192.168.5.21" }, "eth1 192.168.5.21 9000 192.168.5.21"],
    ["not local: the default route's", { public: "203.0.113.5" }, "eth0 10.4.7.21 1500 203.0.113.5"],
    ["with a name", { public: "203.0.113.5", interfaces: ["eth1"] }, "eth1 192.168.5.21 9000 203.0.113.5"],
    [
      "second address of the named",
      { public: "10.4.7.121", interfaces: ["eth0"] },
      "eth0 10.4.7.121 1500 10.4.7.121",
    ],
    [
      "beside an address",
      { public: "10.4.7.121", interfaces: ["10.4.7.21"] },
      "eth0 10.4.7.21 1500 10.4.7.121",
    ],
  ])("%s", (_, wish, expected) => {
    expect(choose(wish)).toBe(expected);
  });
});

describe("none", () => {
  test.each<[Parameters<typeof choose>[0], Partial<HostFacts>, string]>([
    [
      { interfaces: ["eth9", "10.1.1.1", "dark0", "lo"] },
      {},
      `${none} (--iface=eth9: there is no interface of that name; --iface=10.1.1.1: no interface has that address; ` +
        "--iface=dark0: dark0 has no usable IPv4 address; --iface=lo: lo has no usable IPv4 address)",
    ],
    [
      { interfacePatterns: [/^wlan/, /^dark/] },
      {},
      `${none} (--iface-regex=^wlan: it matches neither an address nor a name of an interface; ` +
        "--iface-regex=^dark: dark0 has no usable IPv4 address)",
    ],
    [
      { interfaceCanReach: ip("8.8.8.8") },
      { reach: undefined },
      `${none} (--iface-can-reach=8.8.8.8: there is no route to 8.8.8.8)`,
    ],
    [{}, { defaultRoutes: [] }, `${none} (default route: there is none: name the interface with --iface)`],
    [
      { public: "203.0.113.5" },
      { defaultRoutes: [{ outIndex: undefined, metric: 0 }] },
      `${none} (--public-ip=203.0.113.5: no interface has that address; ` +
        "default route: it has several paths or no interface: name the interface with --iface)",
    ],
    [{ interfaces: ["broken0"] }, {}, "interface broken0 has an MTU of 0: set its MTU"],
  ])("%j", (wish, facts, expected) => {
    expect(choose(wish, facts)).toBe(expected);
  });
});

test("host-gw needs the public IP on the interface", () => {
  const link = { index: 2, name: "eth0", mtu: 1500 };
  const uplink = { link, address: ip("10.4.7.21"), mtu: 1500, publicIp: ip("10.4.7.21") };
  const behindNat = { ...uplink, publicIp: ip("203.0.113.5") };
  expect(hostGw.objection?.(uplink)).toBeUndefined();
  expect(kindOf({ type: "alloc" }).objection?.(behindNat)).toBeUndefined();
  expect(hostGw.objection?.(behindNat)).toBe(
    "your PublicIP differs from interface IP, meaning that probably you're on a NAT, which is not supported by " +
      "host-gw backend: PublicIP is 203.0.113.5, eth0 has 10.4.7.21; remove --public-ip or use vxlan",
  );
});
