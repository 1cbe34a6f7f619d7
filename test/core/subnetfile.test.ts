import * as fc from "fast-check";
import { expect, test } from "vitest";
import { formatCidr, networkOf, type Prefix, parseCidr } from "../../src/core/ipv4.ts";
import { formatSubnetFile, readSubnetFile } from "../../src/core/subnetfile.ts";

function prefix(text: string): Prefix {
  const parsed = parseCidr(text);
  if (parsed === undefined) throw new Error(`not a prefix: ${text}`);
  return parsed;
}

test("the text is flannel's, byte for byte", () => {
  const text = formatSubnetFile({
    network: prefix("10.42.0.0/16"),
    subnet: prefix("10.42.0.0/24"),
    mtu: 1450,
    ipMasq: true,
  });
  expect(text).toBe(
    "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.0.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
  );
});

test.each<[string, string | undefined, string | undefined]>([
  ["FLANNEL_NETWORK=172.7.0.0/16\nFLANNEL_SUBNET=172.7.21.1/24\n", "172.7.0.0/16", "172.7.21.0/24"],
  ["FLANNEL_SUBNET=172.7.21.1/24", undefined, "172.7.21.0/24"],
  ["FLANNEL_SUBNET=172.7.21.1/24\r\nFLANNEL_NETWORK=172.7.0.0/16\r\n", "172.7.0.0/16", "172.7.21.0/24"],
  [`export FLANNEL_SUBNET="172.7.21.1/24" # ours`, undefined, "172.7.21.0/24"],
  [`FLANNEL_SUBNET='172.7.21.1/24'`, undefined, "172.7.21.0/24"],
  ["FLANNEL_SUBNET = 172.7.21.1/24 # ours", undefined, "172.7.21.0/24"],
  ["FLANNEL_SUBNET: 172.7.21.1/24", undefined, "172.7.21.0/24"],
  ["# FLANNEL_SUBNET=172.7.21.1/24", undefined, undefined],
  ["\0\nnonsense\n===\nFLANNEL_SUBNET=172.7.21.1/24", undefined, "172.7.21.0/24"],
  ["FLANNEL_SUBNET=172.7.21.1/24,nonsense", undefined, "172.7.21.0/24"],
  ["FLANNEL_SUBNET=172.7.21.1/33, 172.7.22.1/24", undefined, "172.7.22.0/24"],
  ["FLANNEL_SUBNET=172.7.21.1/24,172.7.22.1/24", undefined, undefined],
  ["FLANNEL_SUBNET=fd00::1/64\nFLANNEL_NETWORK=", undefined, undefined],
  ["FLANNEL_SUBNET=172.7.21.1/24\nFLANNEL_SUBNET=172.7.22.1/24", undefined, "172.7.22.0/24"],
  ["", undefined, undefined],
])("reads %j", (text, network, subnet) => {
  expect(readSubnetFile(text)).toEqual({
    network: network === undefined ? undefined : prefix(network),
    subnet: subnet === undefined ? undefined : prefix(subnet),
  });
});

test("what was written is read back, and nothing makes the reader throw", () => {
  fc.assert(
    fc.property(
      fc.nat({ max: 0xffffffff }),
      fc.integer({ min: 1, max: 30 }),
      fc.boolean(),
      (a, length, ipMasq) => {
        const subnet = { address: networkOf(a, length), length };
        const text = formatSubnetFile({ network: subnet, subnet, mtu: 1450, ipMasq });
        const read = readSubnetFile(text);
        expect(formatCidr(read.subnet ?? { address: 0, length: 0 })).toBe(formatCidr(subnet));
      },
    ),
  );
  fc.assert(fc.property(fc.string(), (text) => void readSubnetFile(`FLANNEL_SUBNET=${text}`)));
});
