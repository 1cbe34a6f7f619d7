/** `ipip`: RFC 2003, IPv4 in IPv4, opened and closed by the programs alone; no kernel module is needed. */
import {
  type BackendKind,
  directRows,
  isOnLink,
  NO_TUNNEL,
  plainDevice,
  plainRows,
  refusesOthers,
} from "../backend.ts";
import type { JsonObject } from "../json.ts";

/** Bytes of the outer IPv4 header. */
const OVERHEAD = 20;

export interface IpipBackend {
  readonly type: "ipip";
  /** Peers on the same link are reached by a plain route instead of the tunnel. */
  readonly directRouting: boolean;
}

/** Reads the options. Throws JsonError. */
export function readIpip(options: JsonObject): IpipBackend {
  return { type: "ipip", directRouting: options.boolean("DirectRouting") ?? false };
}

export function ipip({ directRouting }: IpipBackend): BackendKind {
  return {
    mtu: (uplinkMtu) => uplinkMtu - OVERHEAD,
    forwards: true,
    direct: directRouting,
    device: plainDevice("flannel.ipip"),
    attributes: ({ publicIp }) => ({ publicIp, backendType: "ipip", vtepMac: undefined, vni: undefined }),
    refuses: refusesOthers("ipip"),
    rows: (lease, path, facts) =>
      directRouting && isOnLink(path)
        ? directRows(lease, path, facts)
        : plainRows(lease, path, facts, OVERHEAD),
    programs: { ...NO_TUNNEL, tunnel: "TUNNEL_IPIP", encapsulate: 1, decapsulate: 1 },
  };
}
