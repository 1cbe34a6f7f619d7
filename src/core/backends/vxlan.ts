/** `vxlan`: RFC 7348 over UDP, with a kernel device that is complete beneath the programs. */
import { type BackendKind, directRows, isOnLink, NO_ROWS, refusesOthers, wayTo } from "../backend.ts";
import type { Link } from "../host.ts";
import type { Ipv4 } from "../ipv4.ts";
import { JsonError, type JsonObject } from "../json.ts";

/** UDP port of a VXLAN device when the config names none: the Linux default, not the IANA one. */
const PORT_DEFAULT = 8472;
const VNI_MAX = 2 ** 24 - 1;
/** Bytes that VXLAN over IPv4 puts around a packet. */
const OVERHEAD = 50;
/** Linux takes IPv4 off a device below 68. */
const MTU_MIN = OVERHEAD + 68;
const MTU_MAX = 65535;

/** VXLAN options of the network config, defaults applied. */
export interface VxlanBackend {
  readonly type: "vxlan";
  /** VXLAN network identifier, 24 bits. */
  readonly vni: number;
  /** UDP destination port. */
  readonly port: number;
  /** Outer MTU in bytes, or undefined for the uplink's. The device gets 50 bytes less. */
  readonly mtu: number | undefined;
  /** Peers on the same link are reached by a plain route instead of the tunnel. */
  readonly directRouting: boolean;
  readonly learning: boolean;
  readonly gbp: boolean;
}

/** Reads the options. Throws JsonError. */
export function readVxlan(options: JsonObject): VxlanBackend {
  const vni = options.integer("VNI") ?? 1;
  if (vni > VNI_MAX) throw new JsonError(`Backend.VNI must be 0 to ${VNI_MAX} (24 bits): it is ${vni}`);
  const port = options.integer("Port") ?? 0;
  if (port > 65535)
    throw new JsonError(`Backend.Port must be 1 to 65535, or 0 for the default: it is ${port}`);
  const mtu = options.integer("MTU") ?? 0;
  if (mtu !== 0 && (mtu < MTU_MIN || mtu > MTU_MAX)) {
    throw new JsonError(
      `Backend.MTU must be ${MTU_MIN} to ${MTU_MAX}, or 0 for that of the interface: it is ${mtu} ` +
        `(the VXLAN device gets 50 bytes less, and IPv4 needs 68)`,
    );
  }
  return {
    type: "vxlan",
    vni,
    port: port === 0 ? PORT_DEFAULT : port,
    mtu: mtu === 0 ? undefined : mtu,
    directRouting: options.boolean("DirectRouting") ?? false,
    learning: options.boolean("Learning") ?? false,
    gbp: options.boolean("GBP") ?? false,
  };
}

export function vxlan(options: VxlanBackend): BackendKind {
  const { vni, port, directRouting, learning, gbp } = options;
  const name = `flannel.${vni}`;
  // Group-policy VXLAN carries the packet's mark in its header, which only the kernel's device can do.
  const own = gbp ? 0 : 1;
  const ofAnother = refusesOthers("vxlan");
  return {
    mtu: (uplinkMtu) => (options.mtu ?? uplinkMtu) - OVERHEAD,
    forwards: true,
    direct: directRouting,
    device: {
      name,
      source: "public",
      asksForNeighbours: true,
      create: (spec) => [{ write: "createVxlan", name, vni, port, learning, gbp, ...spec }],
      fits: (link, parentIndex, localIp) => isOverlay(link, options, parentIndex, localIp),
    },
    attributes: ({ publicIp, mac }) => ({ publicIp, backendType: "vxlan", vtepMac: mac, vni }),
    refuses: (lease) => ofAnother(lease) ?? (lease.vtepMac === undefined ? "it names no VtepMAC" : undefined),
    rows(lease, path, facts) {
      if (directRouting && isOnLink(path)) return directRows(lease, path, facts);
      const { overlay } = facts;
      const { vtepMac } = lease;
      if (overlay === undefined || vtepMac === undefined) return NO_ROWS;
      const way = wayTo(lease, path, facts);
      const { subnet, prefixLength, publicIp } = way;
      const fits = (path?.mtu ?? facts.uplink.mtu) >= facts.mtu + OVERHEAD;
      const { index } = overlay;
      // A peer without a path is left to the kernel's device, which asks again for every packet.
      const encapsulate = path !== undefined && fits && path.ethernet && !gbp;
      return {
        subnet: { ...way, reach: encapsulate ? "REACH_TUNNEL" : "REACH_DEVICE", mtu: facts.mtu, vtepMac },
        peer: { publicIp, subnet, prefixLength },
        route: { destination: subnet, prefixLength, gateway: subnet, outIndex: index, onlink: true },
        neighbour: { index, address: subnet, mac: vtepMac },
        fdb: { index, mac: vtepMac, dst: publicIp },
      };
    },
    programs: { vni, tunnel_port: port, tunnel: "TUNNEL_VXLAN", encapsulate: own, decapsulate: own },
  };
}

/** Whether the device is what flanneld would keep. */
function isOverlay(link: Link, options: VxlanBackend, parentIndex: number, localIp: Ipv4): boolean {
  const { vxlan } = link;
  return (
    vxlan !== undefined &&
    vxlan.vni === options.vni &&
    vxlan.parentIndex === parentIndex &&
    vxlan.localIp === localIp &&
    vxlan.group === undefined &&
    !vxlan.l2miss &&
    !vxlan.collectMetadata &&
    vxlan.dstPort === options.port &&
    vxlan.gbp === options.gbp
  );
}
