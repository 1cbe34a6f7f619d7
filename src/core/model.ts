/**
 * The vocabulary of Twill: one word per thing, from the etcd key to the metric label.
 *
 * Addresses are unsigned 32-bit numbers in host order (`Ipv4`); MAC addresses are lower-case text with colons;
 * both become bytes only at the rim. Everything here is plain data: nothing of this folder does IO, reads a
 * clock or draws a random number.
 */
import type { Backend } from "./backends.ts";
import type { Ipv4, Prefix } from "./ipv4.ts";

/** A MAC address as lower-case text, `0a:1b:2c:3d:4e:5f`. */
export type Mac = string;

/** The network config under `<prefix>/config`, validated, with every default filled in. */
export interface Network {
  readonly network: Prefix;
  /** Prefix length of each node's subnet. */
  readonly subnetLength: number;
  /** First and last subnet that may be leased, as the address of the subnet. */
  readonly subnetMin: Ipv4;
  readonly subnetMax: Ipv4;
  readonly backend: Backend;
}

/** What a node publishes under its subnet's key: flannel's lease attributes. */
export interface LeaseAttributes {
  /** Address at which peers reach the node. */
  readonly publicIp: Ipv4;
  /** Backend type in lower case; empty when the record names none. */
  readonly backendType: string;
  /** MAC of the node's VXLAN device; undefined for backends that have none. */
  readonly vtepMac: Mac | undefined;
  /** VNI as published, if at all; receivers do not check it. */
  readonly vni: number | undefined;
  /** What the node's own command wrote for its peers; only with `extension`, and then not always. */
  readonly data?: string | undefined;
}

/** One node's claim on a subnet, as read from `<prefix>/subnets/<key>`. */
export interface Lease extends LeaseAttributes {
  readonly subnet: Prefix;
}

/** A record that was refused, and why; the last good record of that key stays in force. */
export interface Rejection {
  readonly key: string;
  readonly reason: string;
}

/**
 * What the store reports. `reset`, puts and `synced` together are a snapshot: start, reconnect, compaction and
 * a wiped store are one path. Keys are relative to the prefix (`config`, `subnets/10.5.1.0-24`).
 */
export type StoreEvent =
  | { readonly kind: "reset" }
  | {
      readonly kind: "put";
      readonly key: string;
      readonly value: string;
      /** mod_revision of the key. */
      readonly revision: bigint;
      /** etcd lease the key is bound to, decimal; "0" for a reservation. */
      readonly leaseId: string;
    }
  | { readonly kind: "delete"; readonly key: string; readonly revision: bigint }
  | { readonly kind: "synced"; readonly revision: bigint };
