import { expect, test } from "vitest";
import { type Claim, claimOf, conflictOf } from "../../src/core/claim.ts";
import { parseNetwork } from "../../src/core/network.ts";

const MASQ = { first: 61000, last: 65535 };

function claim(network: string, backend: object, more: Partial<Claim> = {}): Claim {
  const parsed = parseNetwork(JSON.stringify({ Network: network, Backend: backend }));
  if ("error" in parsed) throw new Error(parsed.error);
  const { prefix = "/coreos.com/network", subnetFile = `/run/${network}`, masqPorts } = more;
  return claimOf(parsed.network, { prefix, subnetFile, masqPorts });
}

const vxlan = (more: object = {}) => ({ Type: "vxlan", ...more });
const udp = (more: object = {}) => ({ Type: "udp", ...more });

test.each<[string, Claim, Claim]>([
  ["two VNIs on one port", claim("10.1.0.0/16", vxlan()), claim("10.2.0.0/16", vxlan({ VNI: 2 }))],
  ["two of udp", claim("10.1.0.0/16", udp()), claim("10.2.0.0/16", udp({ Port: 8286 }))],
  [
    "two without a tunnel",
    claim("10.1.0.0/16", { Type: "host-gw" }),
    claim("10.2.0.0/16", { Type: "host-gw" }),
  ],
  ["of each type one", claim("10.1.0.0/16", { Type: "ipip" }), claim("10.2.0.0/16", udp())],
  [
    "ports for masquerade that are apart",
    claim("10.1.0.0/16", vxlan(), { masqPorts: { first: 61000, last: 62000 } }),
    claim("10.2.0.0/16", udp(), { masqPorts: { first: 62001, last: 65535 } }),
  ],
  [
    "only one that masquerades",
    claim("10.1.0.0/16", vxlan(), { masqPorts: MASQ }),
    claim("10.2.0.0/16", udp()),
  ],
])("side by side: %s", (_, a, b) => {
  expect([conflictOf(a, b), conflictOf(b, a)]).toEqual([undefined, undefined]);
});

test.each<[Claim, Claim, string]>([
  [
    claim("10.1.0.0/16", vxlan()),
    claim("10.1.128.0/17", { Type: "host-gw" }),
    "Network 10.1.0.0/16 overlaps 10.1.128.0/17; give one of them another Network",
  ],
  [
    claim("10.1.0.0/16", vxlan()),
    claim("10.2.0.0/16", vxlan({ Port: 9000 })),
    "both have the device flannel.1; give one of them another Backend.VNI",
  ],
  [
    claim("10.1.0.0/16", udp()),
    claim("10.2.0.0/16", udp()),
    "both have the device flannel0; give one of them another Backend.Port",
  ],
  [
    claim("10.1.0.0/16", { Type: "ipip" }),
    claim("10.2.0.0/16", { Type: "ipip", DirectRouting: true }),
    "both have the device flannel.ipip; a host has one network of this type: choose another Backend.Type for one of them",
  ],
  [
    claim("10.1.0.0/16", udp({ Port: 8472 })),
    claim("10.2.0.0/16", vxlan()),
    "both have UDP port 8472; give one of them another Backend.Port",
  ],
  [
    claim("10.1.0.0/16", vxlan({ GBP: true })),
    claim("10.2.0.0/16", vxlan({ VNI: 2 })),
    "both have UDP port 8472, and only one has GBP; give one of them another Backend.Port",
  ],
  [
    claim("10.1.0.0/16", vxlan(), { subnetFile: "/run/s" }),
    claim("10.2.0.0/16", udp(), { subnetFile: "/run/s" }),
    "both write /run/s; give one of them another --subnet-file",
  ],
  [
    claim("10.1.0.0/16", vxlan(), { masqPorts: { first: 61000, last: 62000 } }),
    claim("10.2.0.0/16", udp(), { masqPorts: { first: 62000, last: 63000 } }),
    "both masquerade with ports of 61000-62000; give them --masq-ports that do not overlap",
  ],
])("%#: in each other's way", (a, b, reason) => {
  expect(conflictOf(a, b)).toBe(reason);
  expect(conflictOf(b, a)).toBeDefined();
});
