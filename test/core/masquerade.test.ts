/** Which interfaces lend pods their address, what former addresses are, and which ports are reserved for it. */
import fc from "fast-check";
import { expect, test } from "vitest";
import type { Address, Link } from "../../src/core/host.ts";
import { type Ipv4, parseIpv4 } from "../../src/core/ipv4.ts";
import {
  excludedOf,
  FORMER_HOLD_MS,
  timeoutsOf,
  type UplinkRow,
  uplinksOf,
  withFormersOnHost,
} from "../../src/core/masquerade.ts";
import { reservePorts } from "../../src/core/ports.ts";

const ip = (text: string): Ipv4 => parseIpv4(text) ?? 0;
const link = (index: number, changes: Partial<Link> = {}): Link =>
  ({ index, name: `eth${index}`, type: 1, loopback: false, ...changes }) as Link;
const owned = (index: number, text: string, changes: Partial<Address> = {}): Address =>
  ({ index, address: ip(text), prefixLength: 24, scope: 0, secondary: false, ...changes }) as Address;
const none = (): boolean => false;
const unknown = (): undefined => undefined;

test("every Ethernet interface with an address of its own is an uplink", () => {
  const rows = uplinksOf(
    {
      links: [
        link(1, { loopback: true, type: 772 }),
        link(2),
        link(3),
        link(4),
        link(5, { type: 65534 }),
        link(6),
      ],
      addresses: [
        owned(1, "127.0.0.1"),
        owned(2, "10.4.7.21"),
        owned(3, "192.168.1.5"),
        owned(3, "192.168.1.6", { secondary: true }),
        owned(4, "172.7.21.1"),
        owned(5, "10.8.0.1"),
        owned(6, "169.254.1.1", { scope: 253 }),
      ],
    },
    (index) => index === 4,
    { index: 2, address: ip("10.4.7.21") },
    undefined,
    unknown,
  );
  expect([...rows.values()]).toEqual([
    { ifindex: 2, address: ip("10.4.7.21"), former: 0 },
    { ifindex: 3, address: ip("192.168.1.5"), former: 0 },
  ]);
});

test("the uplink lends the address that was chosen for it", () => {
  const addresses = [owned(2, "10.4.7.20"), owned(2, "10.4.7.21")];
  const chosen = { index: 2, address: ip("10.4.7.21") };
  const rows = uplinksOf({ links: [link(2)], addresses }, none, chosen, undefined, unknown);
  expect(rows.get("2")).toEqual({ ifindex: 2, address: ip("10.4.7.21"), former: 0 });
});

test("the tunnel device lends its address too, whatever it is", () => {
  const addresses = [owned(2, "10.4.7.21"), owned(7, "172.7.21.0")];
  const chosen = { index: 2, address: ip("10.4.7.21") };
  const overlay = { index: 7, address: ip("172.7.21.0") };
  const links = [link(2), link(7, { type: 65534 })];
  const inside = (index: number): boolean => index === 7;
  expect([...uplinksOf({ links, addresses }, inside, chosen, overlay, unknown).values()]).toEqual([
    { ifindex: 2, address: ip("10.4.7.21"), former: 0 },
    { ifindex: 7, address: ip("172.7.21.0"), former: 0 },
  ]);
});

test("an address that changes becomes the former one, and stays that", () => {
  let row: UplinkRow | undefined;
  const step = (text: string): UplinkRow | undefined => {
    const host = { links: [link(2)], addresses: [owned(2, text)] };
    row = uplinksOf(host, none, { index: 9, address: 0 }, undefined, () => row).get("2");
    return row;
  };
  expect(step("10.0.0.1")).toMatchObject({ former: 0 });
  expect(step("10.0.0.2")).toMatchObject({ address: ip("10.0.0.2"), former: ip("10.0.0.1") });
  expect(step("10.0.0.2")).toMatchObject({ former: ip("10.0.0.1") });
  expect(step("10.0.0.3")).toMatchObject({ former: ip("10.0.0.2") });
});

test("a former address counts while its interface has it, and a moment longer", () => {
  const [now, former] = [ip("10.0.0.2"), ip("10.0.0.1")];
  const row = { ifindex: 2, address: now, former };
  const lost = new Map<string, number>();
  const formerAt = (time: number, addresses: Address[], rows = [row]): Ipv4 | undefined =>
    withFormersOnHost(new Map(rows.map((each) => ["2", each])), addresses, lost, time).get("2")?.former;
  const both = [owned(2, "10.0.0.2"), owned(2, "10.0.0.1", { prefixLength: 32 })];
  const one = [owned(2, "10.0.0.2"), owned(3, "10.0.0.1")];
  expect(formerAt(0, both)).toBe(former);
  expect(formerAt(1, one)).toBe(former);
  expect([...lost.values()]).toEqual([1 + FORMER_HOLD_MS]);
  expect(formerAt(FORMER_HOLD_MS, one)).toBe(former);
  // Put back in time: it may be lost once more.
  expect(formerAt(FORMER_HOLD_MS, both)).toBe(former);
  expect(lost.size).toBe(0);
  expect(formerAt(5000, one)).toBe(former);
  expect(formerAt(5000 + FORMER_HOLD_MS, one)).toBe(0);
  // For as long as it is away, however often it is asked for; and it is remembered.
  expect(formerAt(90_000, one)).toBe(0);
  expect(formerAt(90_001, both)).toBe(former);
  expect(formerAt(90_002, one, [{ ...row, former: 0 }])).toBe(0);
  expect(lost.size).toBe(0);
});

test("excluded networks are rows without host bits, each once", () => {
  const rows = excludedOf([
    { address: ip("192.168.7.9"), length: 16 },
    { address: ip("192.168.0.0"), length: 16 },
  ]);
  expect([...rows.values()]).toEqual([{ address: ip("192.168.0.0"), length: 16 }]);
});

test("timeouts are the kernel's where it tracks connections", () => {
  expect(timeoutsOf(() => undefined)).toMatchObject({ tcp_established: 432000, udp_new: 30, tcp_closed: 10 });
  expect(timeoutsOf(() => undefined)).toMatchObject({ tcp_time_wait: 120 });
  const own = timeoutsOf((name) => (name === "nf_conntrack_udp_timeout" ? "7" : undefined));
  expect(own).toMatchObject({ udp_new: 7, icmp: 30 });
  expect(timeoutsOf(() => "nonsense")).toMatchObject({ udp_new: 30 });
});

test("ports are reserved beside those of others, and given back exactly", () => {
  expect(reservePorts("", "", "61000-65535")).toEqual({ reserved: "61000-65535", ours: "61000-65535" });
  const both = reservePorts("8080,61010-61020", "", "61000-61030");
  expect(both).toEqual({ reserved: "8080,61000-61030", ours: "61000-61009,61021-61030" });
  expect(reservePorts(both.reserved, both.ours, "").reserved).toBe("8080,61010-61020");
  expect(reservePorts(both.reserved, both.ours, "62000-62001")).toEqual({
    reserved: "8080,61010-61020,62000-62001",
    ours: "62000-62001",
  });
});

test("whatever is reserved, what others had stays theirs", () => {
  const port = fc.integer({ min: 1, max: 400 });
  const set = fc
    .array(port, { maxLength: 30 })
    .map((ports) => reservePorts("", "", ports.join(",")).reserved);
  fc.assert(
    fc.property(set, set, set, (others, first, second) => {
      const one = reservePorts(others, "", first);
      const two = reservePorts(one.reserved, one.ours, second);
      expect(two).toEqual(reservePorts(others, "", second));
      expect(reservePorts(two.reserved, two.ours, "").reserved).toBe(others);
    }),
  );
});

test("text that the kernel would not write is refused", () => {
  expect(() => reservePorts("80-", "", "")).toThrow(RangeError);
});
