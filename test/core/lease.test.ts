import * as fc from "fast-check";
import { describe, expect, test } from "vitest";
import { type Backend, kindOf } from "../../src/core/backends.ts";
import { formatIpv4, networkOf, parseIpv4 } from "../../src/core/ipv4.ts";
import {
  decodeLease,
  encodeAttributes,
  formatLeaseKey,
  LEASE_RECORD_MAX,
  parseLeaseKey,
  sameAttributes,
} from "../../src/core/lease.ts";
import type { Lease, LeaseAttributes } from "../../src/core/model.ts";

const ip = (text: string): number => parseIpv4(text) ?? Number.NaN;
const vxlan: Backend = {
  type: "vxlan",
  vni: 1,
  port: 8472,
  mtu: undefined,
  directRouting: false,
  learning: false,
  gbp: false,
};

describe("keys", () => {
  test.each([
    ["10.5.52.0-24", "10.5.52.0", 24],
    ["10.12.13.0-24&fd00:12:13::-56", "10.12.13.0", 24],
    ["10.12.13.0-24&fd00::-127", "10.12.13.0", 24],
    ["255.255.255.254-31", "255.255.255.254", 31],
    ["10.0.0.0-8", "10.0.0.0", 8],
  ])("%s", (key, address, length) => {
    expect(parseLeaseKey(key)).toEqual({ address: ip(address), length });
  });

  test.each([
    "",
    "10.5.52.0",
    "10.5.52.0/24",
    "10.5.52.0-",
    "10.5.52.0-32",
    "10.5.52.0-0",
    "10.5.52.0-240",
    "10.5.52.1-24",
    "10.5.52-24",
    "10.5.52.256-24",
    "10.05.52.0-24",
    "10.5.52.0-24 ",
    "x10.5.52.0-24",
    "10.5.52.0-24&",
    "10.5.52.0-24&fd00::",
    "10.5.52.0-24&xyz-64",
    "fd00:12:13::-56",
    "10.5.52.0-24/10.5.52.0-24",
    "10x5x52x0-24",
  ])("not a key: %j", (key) => {
    expect(parseLeaseKey(key)).toBeUndefined();
  });

  test("round trip", () => {
    fc.assert(
      fc.property(fc.nat({ max: 0xffffffff }), fc.integer({ min: 1, max: 31 }), (address, length) => {
        const subnet = { address: networkOf(address, length), length };
        expect(parseLeaseKey(formatLeaseKey(subnet))).toEqual(subnet);
      }),
    );
  });
});

describe("what we write is flannel's bytes", () => {
  test.each<[Backend, string]>([
    [
      vxlan,
      `{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}`,
    ],
    [{ type: "host-gw" }, `{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"host-gw"}`],
    [
      { type: "ipip", directRouting: true },
      `{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"ipip"}`,
    ],
    [{ type: "udp", port: 8285 }, `{"PublicIP":"192.168.64.3","PublicIPv6":null}`],
    [{ type: "alloc" }, `{"PublicIP":"192.168.64.3","PublicIPv6":null}`],
    [
      { type: "extension", commands: {}, shell: false, timeoutSeconds: 30 },
      `{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"extension","BackendData":"a \\"b\\"\\nc"}`,
    ],
  ])("%o", (backend, bytes) => {
    const attributes = kindOf(backend).attributes({
      publicIp: ip("192.168.64.3"),
      uplink: ip("10.0.0.3"),
      mac: "c6:d2:32:6f:8f:44",
      data: 'a "b"\nc',
    });
    expect(encodeAttributes(attributes)).toBe(bytes);
    expect(decodeLease("10.5.52.0-24", bytes)).toEqual({
      subnet: { address: ip("10.5.52.0"), length: 24 },
      ...attributes,
    });
  });
});

describe("what we read", () => {
  const read = (value: string): Lease => {
    const lease = decodeLease("10.5.52.0-24", value);
    if ("reason" in lease) throw new Error(lease.reason);
    return lease;
  };

  test("a record of flannel v0.11", () => {
    const lease = read(
      `{"PublicIP":"10.4.7.21","BackendType":"vxlan","BackendData":{"VtepMAC":"C6:D2:32:6F:8F:44"}}`,
    );
    expect(lease.vtepMac).toBe("c6:d2:32:6f:8f:44");
    expect(lease.vni).toBeUndefined();
  });

  test("a dual-stack record, by its IPv4 half", () => {
    const lease = read(
      `{"PublicIP":"10.4.7.21","PublicIPv6":"fd00::1","BackendType":"vxlan","BackendData":{"VNI":3,"VtepMAC":"c6:d2:32:6f:8f:44"},"BackendV6Data":{"VNI":3,"VtepMAC":"c6:d2:32:6f:8f:45"}}`,
    );
    expect(lease).toMatchObject({ publicIp: ip("10.4.7.21"), vni: 3, vtepMac: "c6:d2:32:6f:8f:44" });
  });

  test.each([
    [`{"publicip":"10.4.7.21","BACKENDTYPE":"VxLAN","backenddata":{"vtepmac":"c6-d2-32-6f-8f-44"}}`],
    [
      `{"PublicIP":"10.4.7.21","BackendType":"vxlan","BackendData":{"VtepMAC":"c6d2.326f.8f44","More":1},"Extra":[]}`,
    ],
  ])("%s", (value) => {
    expect(read(value)).toMatchObject({ backendType: "vxlan", vtepMac: "c6:d2:32:6f:8f:44" });
  });

  test("the data of other backends is theirs", () => {
    expect(read(`{"PublicIP":"10.4.7.21","BackendType":"extension","BackendData":"any text"}`)).toMatchObject(
      {
        backendType: "extension",
        vtepMac: undefined,
        data: "any text",
      },
    );
  });
});

describe("what we refuse", () => {
  const vxlanWith = (data: string): string =>
    `{"PublicIP":"10.4.7.21","BackendType":"vxlan","BackendData":${data}}`;
  test.each<[string, RegExp]>([
    ["", /^the value is not valid JSON/],
    ["garbage", /^the value is not valid JSON/],
    ["null", /^the value must be a JSON object, not null/],
    ["{}", /^PublicIP is missing/],
    [`{"PublicIP":null}`, /^PublicIP is missing/],
    [`{"PublicIP":7}`, /^PublicIP must be text, not 7/],
    [`{"PublicIP":"fd00::1"}`, /^PublicIP is not an IPv4 address: "fd00::1"/],
    [`{"PublicIP":"0.0.0.0"}`, /^PublicIP is not an address of a host/],
    [`{"PublicIP":"127.0.0.1"}`, /^PublicIP is not an address of a host/],
    [`{"PublicIP":"224.0.0.1"}`, /^PublicIP is not an address of a host/],
    [`{"PublicIP":"255.255.255.255"}`, /^PublicIP is not an address of a host/],
    [`{"PublicIP":"10.4.7.21","BackendType":"vxlan"}`, /^BackendData is missing/],
    [vxlanWith(`"text"`), /^BackendData must be a JSON object/],
    [`{"PublicIP":"10.4.7.21","BackendType":"extension","BackendData":{}}`, /^BackendData must be text/],
    [vxlanWith("{}"), /^BackendData.VtepMAC is missing/],
    [vxlanWith(`{"VtepMAC":"c6:d2:32:6f:8f"}`), /^BackendData.VtepMAC is not a MAC address/],
    [vxlanWith(`{"VtepMAC":"c6:d2:32:6f:8f:44:55:66"}`), /^BackendData.VtepMAC is not a MAC address/],
    [vxlanWith(`{"VtepMAC":"c6:d2-32:6f:8f:44"}`), /^BackendData.VtepMAC is not a MAC address/],
    [
      vxlanWith(`{"VtepMAC":"01:00:5e:00:00:01"}`),
      /^BackendData.VtepMAC is not the address of a single device/,
    ],
    [
      vxlanWith(`{"VtepMAC":"00:00:00:00:00:00"}`),
      /^BackendData.VtepMAC is not the address of a single device/,
    ],
    [vxlanWith(`{"VNI":"1","VtepMAC":"c6:d2:32:6f:8f:44"}`), /^BackendData.VNI must be a whole number/],
    [vxlanWith(`{"VNI":16777216,"VtepMAC":"c6:d2:32:6f:8f:44"}`), /^BackendData.VNI has more than 24 bits/],
  ])("%s", (value, reason) => {
    const rejection = decodeLease("10.5.52.0-24", value);
    expect("reason" in rejection ? rejection : "accepted").toEqual({
      key: "10.5.52.0-24",
      reason: expect.stringMatching(reason),
    });
  });

  test("a value that is too long", () => {
    expect(decodeLease("10.5.52.0-24", `{"PublicIP":"10.4.7.21"}`.padEnd(LEASE_RECORD_MAX + 1))).toEqual({
      key: "10.5.52.0-24",
      reason: "the value is too long: 4097 characters, at most 4096",
    });
  });

  test("a key that is none", () => {
    expect(decodeLease("hello", `{"PublicIP":"10.4.7.21"}`)).toEqual({
      key: "hello",
      reason: "the key is not a subnet: expected a form like 10.5.52.0-24 without host bits",
    });
  });

  test("no input makes it throw", () => {
    fc.assert(fc.property(fc.string(), fc.oneof(fc.string(), fc.json()), (k, v) => void decodeLease(k, v)));
  });
});

test("attributes survive the round trip, and encoding is stable", () => {
  const host = fc.integer({ min: ip("1.0.0.0"), max: ip("126.255.255.255") });
  const mac = fc
    .uint8Array({ minLength: 6, maxLength: 6 })
    .map((bytes) => [...bytes].map((byte, i) => (i === 0 ? (byte & 0xfe) | 2 : byte)))
    .map((bytes) => bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(":"));
  const attributes = fc.oneof(
    fc.record<LeaseAttributes>({
      publicIp: host,
      backendType: fc.constant("vxlan"),
      vtepMac: mac,
      vni: fc.option(fc.nat({ max: 2 ** 24 - 1 }), { nil: undefined }),
    }),
    fc.record<LeaseAttributes>({
      publicIp: host,
      backendType: fc.constantFrom("", "host-gw", "ipip"),
      vtepMac: fc.constant(undefined),
      vni: fc.constant(undefined),
    }),
  );
  fc.assert(
    fc.property(attributes, (given) => {
      const bytes = encodeAttributes(given);
      const lease = decodeLease("10.5.52.0-24", bytes);
      if ("reason" in lease) throw new Error(`${formatIpv4(given.publicIp)}: ${lease.reason}`);
      expect(sameAttributes(lease, given)).toBe(true);
      expect(encodeAttributes(lease)).toBe(bytes);
    }),
  );
});
