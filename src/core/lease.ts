/**
 * The record a node publishes: key `10.5.52.0-24` under `<prefix>/subnets/`, value the JSON of flannel's lease
 * attributes. What we write is flannel's own bytes (field order and the ever-present `"PublicIPv6":null`
 * included), because other tools compare them. What we read is wider: records of flannel v0.11, which have
 * neither VNI nor PublicIPv6, any spelling of key names, and the dual-stack key `...-24&fd00::-64`, of which the
 * IPv4 half is used. A record that would mislead the dataplane (no address to send to, a group MAC) becomes a
 * Rejection with the reason in words; it never throws and never harms another record.
 */
import { formatIpv4, type Ipv4, networkOf, type Prefix, parseIpv4 } from "./ipv4.ts";
import { JsonError, JsonObject } from "./json.ts";
import type { Lease, LeaseAttributes, Mac, Rejection } from "./model.ts";

/** Longest value that is looked at, in UTF-16 units; flannel's longest is a tenth of it. */
export const LEASE_RECORD_MAX = 4096;

const KEY = /^(\d+\.\d+\.\d+\.\d+)-(\d{1,2})(?:&[a-f\d:]{2,39}-\d{1,3})?$/;

/**
 * Reads the last part of a lease key, `10.5.52.0-24`. Undefined if it is not one: also if the prefix is longer
 * than /31 or has host bits set, which no flannel writes.
 */
export function parseLeaseKey(key: string): Prefix | undefined {
  const match = KEY.exec(key);
  if (match === null) return undefined;
  const address = parseIpv4(match[1] ?? "");
  const length = Number(match[2]);
  if (address === undefined || length < 1 || length > 31) return undefined;
  return networkOf(address, length) === address ? { address, length } : undefined;
}

/** The last part of the key of a subnet: `10.5.52.0-24`. */
export function formatLeaseKey(subnet: Prefix): string {
  return `${formatIpv4(subnet.address)}-${subnet.length}`;
}

/** The attributes as flannel's JSON, byte for byte. */
export function encodeAttributes(attributes: LeaseAttributes): string {
  const { publicIp, backendType, vtepMac, vni, data } = attributes;
  // JSON.stringify keeps this order and leaves out what is undefined, like Go's omitempty.
  return JSON.stringify({
    PublicIP: formatIpv4(publicIp),
    PublicIPv6: null,
    BackendType: backendType === "" ? undefined : backendType,
    BackendData: vtepMac === undefined ? data : { VNI: vni, VtepMAC: vtepMac },
  });
}

/** Whether two nodes' attributes say the same. */
export function sameAttributes(a: LeaseAttributes, b: LeaseAttributes): boolean {
  return (
    a.publicIp === b.publicIp &&
    a.backendType === b.backendType &&
    a.vtepMac === b.vtepMac &&
    a.vni === b.vni &&
    a.data === b.data
  );
}

/** Reads one record; `key` is its last part. Never throws. Tell the two apart with `"reason" in`. */
export function decodeLease(key: string, value: string): Lease | Rejection {
  const subnet = parseLeaseKey(key);
  if (subnet === undefined) {
    return { key, reason: "the key is not a subnet: expected a form like 10.5.52.0-24 without host bits" };
  }
  if (value.length > LEASE_RECORD_MAX) {
    return { key, reason: `the value is too long: ${value.length} characters, at most ${LEASE_RECORD_MAX}` };
  }
  try {
    return { subnet, ...readAttributes(JsonObject.parse(value, "the value")) };
  } catch (error) {
    if (error instanceof JsonError) return { key, reason: error.message };
    throw error;
  }
}

/** What is kept of a peer for which commands were run: its lease, and the text of the backend that has them. */
export function encodeAdded(lease: LeaseAttributes, commands: string): string {
  return JSON.stringify({ Lease: encodeAttributes(lease), Commands: commands });
}

/** Reads that again; `key` is that of the lease. Never throws. */
export function decodeAdded(
  key: string,
  text: string,
): { readonly lease: Lease; readonly commands: string } | Rejection {
  try {
    const kept = JsonObject.parse(text, "the record");
    const lease = decodeLease(key, kept.text("Lease") ?? "");
    return "reason" in lease ? lease : { lease, commands: kept.text("Commands") ?? "" };
  } catch (error) {
    if (error instanceof JsonError) return { key, reason: error.message };
    throw error;
  }
}

function readAttributes(record: JsonObject): LeaseAttributes {
  const publicIp = readPublicIp(record.text("PublicIP"));
  const backendType = (record.text("BackendType") ?? "").toLowerCase();
  const plain = { publicIp, backendType, vtepMac: undefined, vni: undefined };
  if (backendType === "extension") {
    const text = record.text("BackendData");
    return text === undefined ? plain : { ...plain, data: text };
  }
  if (backendType !== "vxlan") return plain;
  const data = record.object("BackendData");
  if (data === undefined) throw new JsonError("BackendData is missing, which for vxlan holds the VtepMAC");
  const vni = data.integer("VNI");
  if (vni !== undefined && vni >= 2 ** 24)
    throw new JsonError(`BackendData.VNI has more than 24 bits: ${vni}`);
  return { publicIp, backendType, vtepMac: readMac(data.text("VtepMAC")), vni };
}

function readPublicIp(text: string | undefined): Ipv4 {
  if (text === undefined) throw new JsonError("PublicIP is missing");
  const address = parseIpv4(text);
  if (address === undefined) throw new JsonError(`PublicIP is not an IPv4 address: "${text.slice(0, 60)}"`);
  const first = address >>> 24;
  if (first === 0 || first === 127 || first >= 224) {
    throw new JsonError(`PublicIP is not an address of a host on a network: ${text}`);
  }
  return address;
}

/** Go's ParseMAC takes `0a:1b:..`, `0a-1b-..` and `0a1b.2c3d.4e5f`; ours is always the first. */
function readMac(text: string | undefined): Mac {
  if (text === undefined) throw new JsonError("BackendData.VtepMAC is missing");
  const forms =
    /^(?:[\da-f]{2}(?::[\da-f]{2}){5}|[\da-f]{2}(?:-[\da-f]{2}){5}|[\da-f]{4}(?:\.[\da-f]{4}){2})$/i;
  if (!forms.test(text)) {
    throw new JsonError(`BackendData.VtepMAC is not a MAC address of 6 bytes: "${text.slice(0, 60)}"`);
  }
  const digits = text.replace(/[:.-]/g, "").toLowerCase();
  const bytes = digits.match(/../g) ?? [];
  if ((Number.parseInt(bytes[0] ?? "", 16) & 1) === 1 || digits === "000000000000") {
    throw new JsonError(`BackendData.VtepMAC is not the address of a single device: ${text}`);
  }
  return bytes.join(":");
}
