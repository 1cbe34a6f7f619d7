import * as fc from "fast-check";
import { describe, expect, test } from "vitest";
import { formatCidr, formatIpv4, networkOf, sizeOf } from "../../src/core/ipv4.ts";
import type { Network } from "../../src/core/model.ts";
import { parseNetwork } from "../../src/core/network.ts";

function good(config: unknown): Network {
  const result = parseNetwork(typeof config === "string" ? config : JSON.stringify(config));
  if ("error" in result) throw new Error(result.error);
  return result.network;
}

function bad(config: unknown): string {
  const result = parseNetwork(typeof config === "string" ? config : JSON.stringify(config));
  return "error" in result ? result.error : `accepted: ${JSON.stringify(result.network)}`;
}

const vxlan = { Backend: { Type: "vxlan" } };

describe("defaults", () => {
  test.each([
    ["10.3.0.0/16", {}, "10.3.0.0/16", 24, "10.3.1.0", "10.3.255.0"],
    ["10.3.7.9/16", {}, "10.3.0.0/16", 24, "10.3.1.0", "10.3.255.0"],
    ["10.0.0.0/22", {}, "10.0.0.0/22", 24, "10.0.1.0", "10.0.3.0"],
    ["10.0.0.0/23", {}, "10.0.0.0/23", 25, "10.0.0.128", "10.0.1.128"],
    ["10.0.0.16/28", {}, "10.0.0.16/28", 30, "10.0.0.20", "10.0.0.28"],
    [
      "10.3.0.0/16",
      { SubnetLen: 28, SubnetMin: "10.3.5.0", SubnetMax: "10.3.8.0" },
      "10.3.0.0/16",
      28,
      "10.3.5.0",
      "10.3.8.0",
    ],
    [
      "10.3.0.0/16",
      { SubnetLen: 0, SubnetMin: "0.0.0.0", SubnetMax: "" },
      "10.3.0.0/16",
      24,
      "10.3.1.0",
      "10.3.255.0",
    ],
    ["10.3.0.0/16", { SubnetMin: "10.3.0.0" }, "10.3.0.0/16", 24, "10.3.0.0", "10.3.255.0"],
    ["255.0.0.0/8", {}, "255.0.0.0/8", 24, "255.0.1.0", "255.255.255.0"],
    ["0.0.0.0/0", {}, "0.0.0.0/0", 24, "0.0.1.0", "255.255.255.0"],
    ["10.0.0.0/29", { SubnetLen: 31 }, null, 0, "SubnetLen must be less than /31: it is 31", ""],
  ])("%s %o", (Network, more, network, length, min, max) => {
    if (network === null) return expect(bad({ Network, ...more, ...vxlan })).toBe(min);
    const read = good({ Network, ...more, ...vxlan });
    expect(formatCidr(read.network)).toBe(network);
    expect(read.subnetLength).toBe(length);
    expect(formatIpv4(read.subnetMin)).toBe(min);
    expect(formatIpv4(read.subnetMax)).toBe(max);
  });

  test("a vxlan backend without options", () => {
    expect(good({ Network: "10.3.0.0/16", ...vxlan }).backend).toEqual({
      type: "vxlan",
      vni: 1,
      port: 8472,
      mtu: undefined,
      directRouting: false,
      learning: false,
      gbp: false,
    });
  });
});

describe("spelling", () => {
  test("keys and the type match without regard to case, unknown keys are ignored", () => {
    const text = `{"network":"172.7.0.0/16","subnetLEN":25,"Comment":[1],
      "backend":{"type":"VxLAN","vni":7,"PORT":4789,"mtu":9000,"Directrouting":true,"learning":true,"gbp":true,"x":1}}`;
    const network = good(text);
    expect(network.subnetLength).toBe(25);
    expect(network.backend).toEqual({
      type: "vxlan",
      vni: 7,
      port: 4789,
      mtu: 9000,
      directRouting: true,
      learning: true,
      gbp: true,
    });
  });

  test("the last spelling of a key wins, null leaves the default", () => {
    const network = good(
      `{"Network":"10.1.0.0/16","network":"10.2.0.0/16","SubnetLen":null,"Backend":{"Type":"HOST-GW"}}`,
    );
    expect(formatCidr(network.network)).toBe("10.2.0.0/16");
    expect(network.backend).toEqual({ type: "host-gw" });
    expect(good({ Network: "10.1.0.0/16", EnableIPv4: null, Backend: { Type: "Alloc" } }).backend.type).toBe(
      "alloc",
    );
  });

  test("__proto__ is a key like any other", () => {
    expect(bad(`{"__proto__":{"Network":"10.1.0.0/16"}}`)).toMatch(/^please define a correct Network/);
  });
});

test("without a Backend it is udp, as flannel's code has it, and ipip has its own options", () => {
  expect(good({ Network: "10.3.0.0/16" }).backend).toEqual({ type: "udp", port: 8285 });
  const of = (Backend: object): object => good({ Network: "10.3.0.0/16", Backend }).backend;
  expect(of({ Type: "UDP", port: 9000 })).toEqual({ type: "udp", port: 9000 });
  expect(of({ Type: "ipip" })).toEqual({ type: "ipip", directRouting: false });
  expect(of({ Type: "ipip", Directrouting: true })).toEqual({ type: "ipip", directRouting: true });
});

describe("refused, in words and with the value", () => {
  const net = { Network: "10.3.0.0/16", ...vxlan };
  test.each<[unknown, string | RegExp]>([
    ["", /^the network config is not valid JSON: /],
    ["{", /^the network config is not valid JSON: /],
    [`${JSON.stringify(net)} x`, /^the network config is not valid JSON: /],
    ["[]", "the network config must be a JSON object, not []"],
    ["null", "the network config must be a JSON object, not null"],
    [vxlan, "please define a correct Network parameter in the flannel config: there is none"],
    [
      { ...net, Network: "" },
      "please define a correct Network parameter in the flannel config: there is none",
    ],
    [{ ...net, Network: 5 }, "Network must be text, not 5"],
    [{ ...net, Network: "10.3.0.0" }, 'Network: invalid IPv4 CIDR format: "10.3.0.0"'],
    [{ ...net, Network: "fc00::/48" }, 'Network: invalid IPv4 CIDR format: "fc00::/48"'],
    [{ ...net, Network: "10.3.0.0/33" }, 'Network: invalid IPv4 CIDR format: "10.3.0.0/33"'],
    [
      { ...net, Network: "10.3.0.0/29" },
      "network is too small. Minimum useful network prefix is /28: Network is 10.3.0.0/29",
    ],
    [{ ...net, SubnetLen: 31 }, "SubnetLen must be less than /31: it is 31"],
    [
      { ...net, SubnetLen: 17 },
      "network must be able to accommodate at least four subnets: Network is 10.3.0.0/16, SubnetLen 17",
    ],
    [{ ...net, SubnetLen: -1 }, "SubnetLen must be a whole number of 0 or more, not -1"],
    [{ ...net, SubnetLen: 24.5 }, "SubnetLen must be a whole number of 0 or more, not 24.5"],
    [{ ...net, SubnetLen: "24" }, 'SubnetLen must be a whole number of 0 or more, not "24"'],
    [
      { ...net, SubnetMin: "10.4.0.0" },
      "SubnetMin is not in the range of the Network: 10.4.0.0 is not in 10.3.0.0/16",
    ],
    [
      { ...net, SubnetMax: "10.4.0.0" },
      "SubnetMax is not in the range of the Network: 10.4.0.0 is not in 10.3.0.0/16",
    ],
    [{ ...net, SubnetMin: "10.3.1.1" }, "SubnetMin is not on a SubnetLen boundary: 10.3.1.1/24"],
    [{ ...net, SubnetMax: "10.3.1.1" }, "SubnetMax is not on a SubnetLen boundary: 10.3.1.1/24"],
    [{ ...net, SubnetMin: "10.3.256.0" }, 'SubnetMin: invalid IPv4 address: "10.3.256.0"'],
    [
      { ...net, SubnetMin: "10.3.9.0", SubnetMax: "10.3.8.0" },
      "SubnetMin is above SubnetMax, which leaves no subnet: 10.3.9.0, 10.3.8.0",
    ],
    [{ ...net, EnableIPv4: false }, /^none defined stack/],
    [
      { ...net, EnableIPv4: false, EnableIPv6: true },
      /^EnableIPv4 is false, and IPv6 alone is not forwarded yet/,
    ],
    [{ ...net, EnableIPv4: "yes" }, 'EnableIPv4 must be true or false, not "yes"'],
    [
      { ...net, Backend: { Type: "WireGuard" } },
      "backend type wireguard is not there yet, Twill 1.0 will have it; until then set Backend.Type to vxlan, host-gw, ipip, udp, alloc or extension",
    ],
    [
      { ...net, Backend: { Type: "gce" } },
      "backend type gce is one of flannel's that Twill does not forward with; set Backend.Type to vxlan, host-gw, ipip, udp, alloc or extension",
    ],
    [{ ...net, Backend: { Type: "vxlam" } }, /^unknown backend type: vxlam; set Backend.Type to/],
    [{ ...net, Backend: {} }, /^unknown backend type: "";/],
    [{ ...net, Backend: "vxlan" }, 'Backend must be a JSON object, not "vxlan"'],
    [
      { ...net, Backend: { Type: "vxlan", VNI: 2 ** 24 } },
      "Backend.VNI must be 0 to 16777215 (24 bits): it is 16777216",
    ],
    [
      { ...net, Backend: { Type: "vxlan", VNI: "1" } },
      'Backend.VNI must be a whole number of 0 or more, not "1"',
    ],
    [{ ...net, Backend: { Type: "vxlan", Port: 65536 } }, /^Backend.Port must be 1 to 65535.*it is 65536$/],
    [{ ...net, Backend: { Type: "udp", Port: 0 } }, "Backend.Port must be 1 to 65535: it is 0"],
    [{ ...net, Backend: { Type: "udp", Port: 65536 } }, "Backend.Port must be 1 to 65535: it is 65536"],
    [{ ...net, Backend: { Type: "ipip", DirectRouting: 1 } }, /^Backend.DirectRouting must be true or false/],
    [{ ...net, Backend: { Type: "vxlan", MTU: 117 } }, /^Backend.MTU must be 118 to 65535.*it is 117/],
    [
      { ...net, Backend: { Type: "vxlan", DirectRouting: 1 } },
      "Backend.DirectRouting must be true or false, not 1",
    ],
  ])("%j", (config, message) => {
    if (message instanceof RegExp) expect(bad(config)).toMatch(message);
    else expect(bad(config)).toBe(message);
  });
});

test("a dual-stack config is served for its IPv4 half, with a warning", () => {
  const result = parseNetwork(
    `{"Network":"10.3.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"Type":"vxlan"}}`,
  );
  expect("error" in result ? result.error : result.warnings).toEqual([
    "EnableIPv6 is true, but IPv6 is not forwarded yet: only the IPv4 network is served",
  ]);
});

test("what is accepted has an aligned, non-empty range inside the network", () => {
  const address = fc.nat({ max: 0xffffffff }).map(formatIpv4);
  fc.assert(
    fc.property(
      fc.record({
        Network: fc.tuple(address, fc.nat({ max: 32 })).map(([a, l]) => `${a}/${l}`),
        SubnetLen: fc.nat({ max: 32 }),
        SubnetMin: fc.option(address, { nil: undefined }),
        SubnetMax: fc.option(address, { nil: undefined }),
      }),
      (config) => {
        const result = parseNetwork(JSON.stringify({ ...config, ...vxlan }));
        if ("error" in result) return;
        const { network, subnetLength, subnetMin, subnetMax } = result.network;
        expect(subnetMin).toBeLessThanOrEqual(subnetMax);
        expect(subnetMin).toBeGreaterThanOrEqual(network.address);
        expect(subnetMax + sizeOf(subnetLength)).toBeLessThanOrEqual(
          network.address + sizeOf(network.length),
        );
        expect(networkOf(subnetMin, subnetLength)).toBe(subnetMin);
        expect(networkOf(subnetMax, subnetLength)).toBe(subnetMax);
      },
    ),
  );
});

test("no text makes it throw", () => {
  fc.assert(fc.property(fc.oneof(fc.string(), fc.json()), (text) => void parseNetwork(text)));
});
