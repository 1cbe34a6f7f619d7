/**
 * `udp`: flannel's first backend, the IP packet as the payload of a UDP one, there between two programs of user space,
 * here opened and closed in the kernel.
 */
import { type BackendKind, NO_TUNNEL, plainDevice, plainRows } from "../backend.ts";
import { JsonError, type JsonObject } from "../json.ts";

/** Bytes of the outer IPv4 and UDP headers. */
const OVERHEAD = 28;
const PORT_DEFAULT = 8285;

export interface UdpBackend {
  readonly type: "udp";
  /** UDP port, source and destination. */
  readonly port: number;
}

/** Reads the options. Throws JsonError. */
export function readUdp(options: JsonObject): UdpBackend {
  const port = options.integer("Port") ?? PORT_DEFAULT;
  if (port < 1 || port > 65535) throw new JsonError(`Backend.Port must be 1 to 65535: it is ${port}`);
  return { type: "udp", port };
}

export function udp({ port }: UdpBackend): BackendKind {
  return {
    mtu: (uplinkMtu) => uplinkMtu - OVERHEAD,
    forwards: true,
    direct: false,
    // flannel's is the first of its name that is free; two networks of one node differ in their port here.
    device: plainDevice(port === PORT_DEFAULT ? "flannel0" : `flannel0.${port}`),
    // The record names no type.
    attributes: ({ publicIp }) => ({ publicIp, backendType: "", vtepMac: undefined, vni: undefined }),
    refuses: ({ backendType }) =>
      backendType === "" || backendType === "udp" ? undefined : `its backend is ${backendType}, ours is udp`,
    // One route for the whole network leads to the device.
    rows: (lease, path, facts) => ({ ...plainRows(lease, path, facts, OVERHEAD), route: undefined }),
    routes: ({ network, overlay }) =>
      overlay === undefined
        ? []
        : [
            {
              destination: network.network.address,
              prefixLength: network.network.length,
              gateway: undefined,
              outIndex: overlay.index,
              onlink: false,
            },
          ],
    programs: { ...NO_TUNNEL, tunnel_port: port, tunnel: "TUNNEL_UDP", encapsulate: 1, decapsulate: 1 },
  };
}
