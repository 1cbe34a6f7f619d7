/**
 * The network config: the JSON text under `<prefix>/config`, read as flanneld reads it, with its defaults, its
 * rules and its words, so that an operator finds the same answer in the same place. Added to flannel's words is
 * always the value that broke the rule. What flannel lets through only to fail on later (SubnetMin above
 * SubnetMax, a VNI of 25 bits, a port of 17) is refused here, the options of a backend in its own file. IPv4 is what this version forwards: a dual-stack
 * config is served for its IPv4 half, with a warning.
 */
import { BACKENDS, BACKENDS_LATER, type Backend } from "./backends.ts";
import {
  contains,
  formatCidr,
  formatIpv4,
  type Ipv4,
  networkOf,
  type Prefix,
  parseCidr,
  parseIpv4,
  sizeOf,
} from "./ipv4.ts";
import { JsonError, JsonObject } from "./json.ts";
import type { Network } from "./model.ts";

/** A config that can be used, with what was set aside in it; or the one reason why it can't. */
export type NetworkResult =
  | { readonly network: Network; readonly warnings: readonly string[] }
  | { readonly error: string; readonly unknownBackend?: true };

/** No rule is broken, but this version has no such backend: waiting would not help. */
class UnknownBackend extends JsonError {}

/** Reads the value of `<prefix>/config`. Never throws. */
export function parseNetwork(text: string): NetworkResult {
  try {
    const config = JsonObject.parse(text, "the network config");
    const warnings: string[] = [];
    checkStack(config, warnings);
    const network = readPrefix(config);
    const subnetLength = readSubnetLength(config, network);
    const range = readRange(config, network, subnetLength);
    return { network: { network, subnetLength, ...range, backend: readBackend(config) }, warnings };
  } catch (error) {
    if (error instanceof UnknownBackend) return { error: error.message, unknownBackend: true };
    if (error instanceof JsonError) return { error: error.message };
    throw error;
  }
}

function checkStack(config: JsonObject, warnings: string[]): void {
  const ipv4 = config.boolean("EnableIPv4") ?? true;
  const ipv6 = config.boolean("EnableIPv6") ?? false;
  if (!ipv4 && !ipv6) throw new JsonError("none defined stack: EnableIPv4 and EnableIPv6 are both false");
  if (!ipv4) {
    throw new JsonError("EnableIPv4 is false, and IPv6 alone is not forwarded yet: set EnableIPv4 to true");
  }
  if (ipv6)
    warnings.push("EnableIPv6 is true, but IPv6 is not forwarded yet: only the IPv4 network is served");
}

function readPrefix(config: JsonObject): Prefix {
  const text = config.text("Network");
  if (text === undefined || text === "") {
    throw new JsonError("please define a correct Network parameter in the flannel config: there is none");
  }
  const prefix = parseCidr(text);
  if (prefix === undefined) throw new JsonError(`Network: invalid IPv4 CIDR format: "${text}"`);
  return { address: networkOf(prefix.address, prefix.length), length: prefix.length };
}

function readSubnetLength(config: JsonObject, network: Prefix): number {
  const length = config.integer("SubnetLen") ?? 0;
  if (length > 30) throw new JsonError(`SubnetLen must be less than /31: it is ${length}`);
  if (length > 0) {
    if (length >= network.length + 2) return length;
    throw new JsonError(
      `network must be able to accommodate at least four subnets: ` +
        `Network is ${formatCidr(network)}, SubnetLen ${length}`,
    );
  }
  if (network.length > 28) {
    throw new JsonError(
      `network is too small. Minimum useful network prefix is /28: Network is ${formatCidr(network)}`,
    );
  }
  return network.length <= 22 ? 24 : network.length + 2;
}

function readRange(
  config: JsonObject,
  network: Prefix,
  subnetLength: number,
): { subnetMin: Ipv4; subnetMax: Ipv4 } {
  const step = sizeOf(subnetLength);
  const read = (name: string, fallback: Ipv4): Ipv4 => {
    const text = config.text(name) ?? "";
    const address = text === "" ? 0 : parseIpv4(text);
    if (address === undefined) throw new JsonError(`${name}: invalid IPv4 address: "${text}"`);
    if (address === 0) return fallback;
    if (!contains(network, address)) {
      throw new JsonError(
        `${name} is not in the range of the Network: ${text} is not in ${formatCidr(network)}`,
      );
    }
    return address;
  };
  // The first subnet is left out by default, as flannel does: its address is the network's own.
  const subnetMin = read("SubnetMin", network.address + step);
  const subnetMax = read("SubnetMax", network.address + sizeOf(network.length) - step);
  for (const [name, address] of [
    ["SubnetMin", subnetMin],
    ["SubnetMax", subnetMax],
  ] as const) {
    if (networkOf(address, subnetLength) !== address) {
      throw new JsonError(`${name} is not on a SubnetLen boundary: ${formatIpv4(address)}/${subnetLength}`);
    }
  }
  if (subnetMin > subnetMax) {
    throw new JsonError(
      `SubnetMin is above SubnetMax, which leaves no subnet: ${formatIpv4(subnetMin)}, ${formatIpv4(subnetMax)}`,
    );
  }
  return { subnetMin, subnetMax };
}

function readBackend(config: JsonObject): Backend {
  const options = config.object("Backend");
  // A config without Backend means "udp" to flannel, whatever its documentation says; `{}` means "".
  const name = options === undefined ? "udp" : (options.text("Type") ?? "");
  const type = name.toLowerCase();
  const read = BACKENDS.get(type);
  if (read !== undefined) return read(options ?? JsonObject.parse("{}", "Backend"));
  const known = [...BACKENDS.keys()];
  const choose = `set Backend.Type to ${known.slice(0, -1).join(", ")} or ${known.at(-1)}`;
  if (BACKENDS_LATER.has(type)) {
    const version = BACKENDS_LATER.get(type);
    throw new UnknownBackend(
      version === undefined
        ? `backend type ${type} is one of flannel's that Twill does not forward with; ${choose}`
        : `backend type ${type} is not there yet, Twill ${version} will have it; until then ${choose}`,
    );
  }
  throw new UnknownBackend(`unknown backend type: ${name === "" ? '""' : name}; ${choose}`);
}
