/** How each peer's public address is reached, by the kernel's own route look-up, and by which interfaces they all are. */
import { type Host, isEthernet, type Path } from "../core/host.ts";
import type { Ipv4 } from "../core/ipv4.ts";
import type { World } from "../core/world.ts";
import type { Attempts } from "./attempts.ts";

/** Paths that are looked up at a time, in about a millisecond. */
const LOOK_UPS = 250;

export class Paths {
  readonly #host: Pick<Host, "links">;
  readonly #world: Pick<World, "kernel">;
  readonly #attempts: Attempts;
  readonly #known = new Map<Ipv4, Path | undefined>();
  readonly #ways = new Set<number>();
  #last: Path | undefined;

  constructor(host: Pick<Host, "links">, world: Pick<World, "kernel">, attempts: Attempts) {
    this.#host = host;
    this.#world = world;
    this.#attempts = attempts;
  }

  /** The interfaces by which peers are reached. */
  get ways(): ReadonlySet<number> {
    return this.#ways;
  }

  /** The path to an address that was learnt; undefined if there is none. */
  to(address: Ipv4): Path | undefined {
    return this.#known.get(address);
  }

  /** Asks the kernel for routes. Throws RoundFailure. */
  lookUp(addresses: readonly Ipv4[]): ReturnType<World["kernel"]["routesTo"]> {
    return this.#attempts.must("route look-up", () => this.#world.kernel.routesTo(addresses));
  }

  /** Learns the paths to addresses, as far as they are not known. Returns whether that changed `ways`. Throws RoundFailure. */
  learn(addresses: Iterable<Ipv4>): boolean {
    const unknown = new Set<Ipv4>();
    for (const address of addresses) if (!this.#known.has(address)) unknown.add(address);
    if (unknown.size === 0) return false;
    const before = this.#ways.size;
    for (const [address, path] of this.#find([...unknown])) this.#set(address, path);
    return this.#ways.size > before;
  }

  /**
   * Looks all paths up again, some at a time, and forgets those not to `inForce`. Each step says whether a path is another
   * one now. Until the end, `ways` has those before as well. Throws RoundFailure.
   */
  *renew(inForce: ReadonlySet<Ipv4>): Generator<boolean, void> {
    for (const address of this.#known.keys()) if (!inForce.has(address)) this.#known.delete(address);
    const addresses = [...this.#known.keys()];
    for (let from = 0; from < addresses.length; from += LOOK_UPS) {
      let changed = false;
      for (const [address, path] of this.#find(addresses.slice(from, from + LOOK_UPS))) {
        if (!samePath(path, this.#known.get(address))) changed = true;
        this.#set(address, path);
      }
      yield changed;
    }
    this.#ways.clear();
    for (const path of this.#known.values()) if (path !== undefined) this.#ways.add(path.outIndex);
  }

  #set(address: Ipv4, path: Path | undefined): void {
    this.#known.set(address, path);
    if (path !== undefined) this.#ways.add(path.outIndex);
  }

  *#find(addresses: readonly Ipv4[]): Generator<readonly [Ipv4, Path | undefined]> {
    const routes = this.lookUp(addresses);
    for (const [index, address] of addresses.entries()) yield [address, this.#pathOf(routes[index])];
  }

  #pathOf(route: ReturnType<World["kernel"]["routesTo"]>[number]): Path | undefined {
    const link = route === undefined ? undefined : this.#host.links.get(route.outIndex);
    if (route === undefined || link === undefined) return undefined;
    const { outIndex, gateway, source } = route;
    const mtu = Math.min(route.mtu ?? link.mtu, link.mtu);
    const path = { outIndex, gateway, source, mtu, ethernet: isEthernet(link) };
    // Peers are reached in a few ways, so that thousands need not have a path each.
    if (!samePath(this.#last, path)) this.#last = path;
    return this.#last;
  }
}

function samePath(a: Path | undefined, b: Path | undefined): boolean {
  if (a === undefined || b === undefined) return a === b;
  return (
    a.outIndex === b.outIndex &&
    a.gateway === b.gateway &&
    a.source === b.source &&
    a.mtu === b.mtu &&
    a.ethernet === b.ethernet
  );
}
