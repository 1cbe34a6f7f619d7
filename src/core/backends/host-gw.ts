/** `host-gw`: a plain route by each peer, which must be on a network that we share. */
import { type BackendKind, directRows, NO_TUNNEL, refusesOthers } from "../backend.ts";
import { formatIpv4 } from "../ipv4.ts";

export interface HostGwBackend {
  readonly type: "host-gw";
}

export const hostGw: BackendKind = {
  mtu: (uplinkMtu) => uplinkMtu,
  forwards: true,
  direct: true,
  device: undefined,
  objection({ publicIp, address, link }) {
    if (publicIp === address) return undefined;
    return (
      "your PublicIP differs from interface IP, meaning that probably you're on a NAT, which is not supported by " +
      `host-gw backend: PublicIP is ${formatIpv4(publicIp)}, ${link.name} has ` +
      `${formatIpv4(address)}; remove --public-ip or use vxlan`
    );
  },
  attributes: ({ publicIp }) => ({ publicIp, backendType: "host-gw", vtepMac: undefined, vni: undefined }),
  refuses: refusesOthers("host-gw"),
  rows: directRows,
  programs: NO_TUNNEL,
};
