/** The backends: those there are, and those that flannel has and this version does not. */
import type { BackendKind } from "./backend.ts";
import { type AllocBackend, alloc } from "./backends/alloc.ts";
import { type ExtensionBackend, extension, readExtension } from "./backends/extension.ts";
import { type HostGwBackend, hostGw } from "./backends/host-gw.ts";
import { type IpipBackend, ipip, readIpip } from "./backends/ipip.ts";
import { readUdp, type UdpBackend, udp } from "./backends/udp.ts";
import { readVxlan, type VxlanBackend, vxlan } from "./backends/vxlan.ts";
import type { Link } from "./host.ts";
import type { JsonObject } from "./json.ts";

/** The options of the network's backend, defaults applied; `type` says of which. */
export type Backend =
  | VxlanBackend
  | HostGwBackend
  | IpipBackend
  | UdpBackend
  | AllocBackend
  | ExtensionBackend;

/** Reads the options of each type. Throws JsonError. */
export const BACKENDS: ReadonlyMap<string, (options: JsonObject) => Backend> = new Map<
  string,
  (options: JsonObject) => Backend
>([
  ["vxlan", readVxlan],
  ["host-gw", () => ({ type: "host-gw" })],
  ["ipip", readIpip],
  ["udp", readUdp],
  ["alloc", () => ({ type: "alloc" })],
  ["extension", readExtension],
]);

/** flannel's other backends, and which version of Twill will have them, if one is to. */
export const BACKENDS_LATER: ReadonlyMap<string, string | undefined> = new Map([
  ["wireguard", "1.0"],
  ["ipsec", "1.0"],
  ["tencent-vpc", undefined],
  ["aws-vpc", undefined],
  ["gce", undefined],
  ["ali-vpc", undefined],
]);

/** How a backend with these options works. */
export function kindOf(backend: Backend): BackendKind {
  switch (backend.type) {
    case "vxlan":
      return vxlan(backend);
    case "host-gw":
      return hostGw;
    case "ipip":
      return ipip(backend);
    case "udp":
      return udp(backend);
    case "alloc":
      return alloc;
    case "extension":
      return extension(backend);
  }
}

/** Whether a link looks like the tunnel device of a backend, with whatever options. */
export function isTunnelDevice({ name, kind }: Link): boolean {
  if (kind === "vxlan") return /^flannel\.\d+$/.test(name);
  return (kind === "ifb" || kind === "dummy") && /^flannel(\.ipip|0(\.\d+)?)$/.test(name);
}
