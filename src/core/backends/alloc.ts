/** `alloc`: takes a lease and forwards nothing. */
import { type BackendKind, NO_ROWS, NO_TUNNEL } from "../backend.ts";

export interface AllocBackend {
  readonly type: "alloc";
}

export const alloc: BackendKind = {
  mtu: (uplinkMtu) => uplinkMtu,
  forwards: false,
  direct: false,
  device: undefined,
  // flannel's alloc names no type in its record.
  attributes: ({ publicIp }) => ({ publicIp, backendType: "", vtepMac: undefined, vni: undefined }),
  refuses: () => undefined,
  rows: () => NO_ROWS,
  programs: NO_TUNNEL,
};
