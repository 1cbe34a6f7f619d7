/**
 * The tunnel device, `flannel.<VNI>` with vxlan: as flanneld makes it, so that either daemon takes over the other's. Its MAC is
 * what peers know us by and outlives the device.
 */
import { isTunnelDevice, kindOf } from "../core/backends.ts";
import type { Host, Write } from "../core/host.ts";
import type { Uplink } from "../core/interfaces.ts";
import type { Ipv4, Prefix } from "../core/ipv4.ts";
import type { Mac, Network } from "../core/model.ts";
import type { World } from "../core/world.ts";
import type { Attempts } from "./attempts.ts";

/** The device as it is. */
export interface Overlay {
  readonly index: number;
  readonly mac: Mac;
  /** Outer source address. */
  readonly localIp: Ipv4;
}

export class TunnelDevice {
  readonly #host: Host;
  readonly #world: Pick<World, "kernel" | "log" | "random">;
  readonly #attempts: Attempts;
  readonly #reread: (what: string) => void;
  #vtepMac: Mac | undefined;
  /** Indexes of the devices used in this run. */
  readonly #used = new Set<number>();

  /** `reread` has the mirror of the kernel read anew, which learns of our own writes only by and by. */
  constructor(
    host: Host,
    world: Pick<World, "kernel" | "log" | "random">,
    attempts: Attempts,
    reread: (what: string) => void,
  ) {
    this.#host = host;
    this.#world = world;
    this.#attempts = attempts;
    this.#reread = reread;
  }

  /** A link is gone, and its index free for another. */
  forget(index: number): void {
    this.#used.delete(index);
  }

  /**
   * Sees to the device that the config asks for: taken over if it is right, made anew with the same MAC if not. A
   * first one gets the MAC that `publishedMac` finds, under which peers know us already, if there is one. Throws RoundFailure.
   */
  ensure(network: Network, uplink: Uplink, publishedMac: () => Mac | undefined): Overlay | undefined {
    const kind = kindOf(network.backend);
    if (kind.device === undefined) return undefined;
    const { name, source, asksForNeighbours, create, fits } = kind.device;
    const isPublic = source === "public" && this.#isLocal(uplink.publicIp);
    const localIp = isPublic ? uplink.publicIp : uplink.address;
    const parentIndex = uplink.link.index;
    const mtu = kind.mtu(uplink.mtu);
    let link = this.#host.linkNamed(name);
    if (link !== undefined && !fits(link, parentIndex, localIp)) {
      this.#world.log.warn(
        { device: name },
        "device differs from what the network config asks for: making it anew",
      );
      this.#vtepMac ??= link.mac;
      this.#attempts.apply(name, [{ write: "deleteLink", index: link.index }]);
      link = undefined;
    }
    if (link === undefined) {
      this.#vtepMac ??= publishedMac() ?? this.#randomMac();
      this.#make(name, create({ parentIndex, localIp, mtu, mac: this.#vtepMac }));
      this.#reread(name);
      link = this.#host.linkNamed(name);
      if (link === undefined) throw this.#attempts.failure(name, "the device was made but is not there");
      this.#world.log.info({ device: name, mac: link.mac, mtu }, "made the tunnel device");
    }
    this.#used.add(link.index);
    if (link.mac === undefined) throw this.#attempts.failure(name, "the device has no MAC address");
    // Only a device that peers send to by its MAC must keep it, and not all drivers can change it.
    const mac = asksForNeighbours ? (this.#vtepMac ?? link.mac) : link.mac;
    const change = asksForNeighbours ? { mtu, mac, up: true } : { mtu, up: true };
    if (!link.up || link.mtu !== mtu || link.mac !== mac) {
      this.#attempts.must(name, () => this.#world.kernel.keepSysctls(name));
      this.#attempts.apply(name, [{ write: "setLink", index: link.index, ...change }]);
      this.#host.links.set(link.index, { ...link, up: true, mtu, mac });
    }
    if (asksForNeighbours) this.#vtepMac = mac;
    return { index: link.index, mac, localIp };
  }

  /** Does the first of these writes that the kernel can do. */
  #make(name: string, alternatives: readonly Write[]): void {
    let refused: Error | undefined;
    for (const write of alternatives) {
      const [error] = this.#attempts.must(name, () => this.#world.kernel.apply([write]));
      if (error === undefined) return;
      refused ??= error;
    }
    if (refused !== undefined) throw this.#attempts.failure(name, refused.message);
  }

  #isLocal(address: Ipv4): boolean {
    for (const row of this.#host.addresses.values()) if (row.address === address) return true;
    return false;
  }

  #randomMac(): Mac {
    const bytes = Array.from({ length: 6 }, () => Math.floor(this.#world.random() * 256));
    // Locally administered, unicast.
    bytes[0] = ((bytes[0] ?? 0) & 0xfe) | 0x02;
    return bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(":");
  }

  /** Of the addresses that were ever ours, the device has only that of our subnet. */
  ensureAddress(index: number, subnet: Prefix, wasOurs: (address: Ipv4) => boolean): void {
    const writes: Write[] = [];
    let found = false;
    for (const row of this.#host.addresses.of(index)) {
      if (row.address === subnet.address && row.prefixLength === 32) found = true;
      else if (wasOurs(row.address)) {
        const other = { address: row.address, length: row.prefixLength };
        writes.push({ write: "deleteAddress", index, address: other });
      }
    }
    const address = { address: subnet.address, length: 32 };
    if (!found) writes.unshift({ write: "addAddress", index, address });
    if (writes.length === 0) return;
    this.#attempts.apply("device address", writes);
    // The mirror learns of it by a notification, which may come after the next round.
    this.#reread("device address");
  }

  /** A tunnel device with our address that the config does not ask for any more, now that nothing points to it. */
  removeFormer(current: number | undefined, wasOurs: (address: Ipv4) => boolean): void {
    for (const link of [...this.#host.links.values()]) {
      if (link.index === current || !isTunnelDevice(link)) continue;
      const hasOurs = [...this.#host.addresses.of(link.index)].some(
        (row) => row.prefixLength === 32 && wasOurs(row.address),
      );
      if (!hasOurs && !this.#used.has(link.index)) continue;
      this.#world.log.info({ device: link.name }, "removing the tunnel device of a former network config");
      this.#attempts.apply(link.name, [{ write: "deleteLink", index: link.index }]);
    }
  }
}
