/**
 * What the agent needs of the world, as types: the kernel, the programs and their maps, the store, time. The edge
 * files are the real ones, the simulator's are in memory.
 */
import type { Command } from "./command.ts";
import type { HostRows, HostTable, Path, Write } from "./host.ts";
import type { AttachmentRow, EndpointRow, InterfaceRow, PeerRow, ProgramConfig, SubnetRow } from "./image.ts";
import type { Ipv4 } from "./ipv4.ts";
import type { LeaseReport } from "./leaselife.ts";
import type { ExcludedRow, UplinkRow } from "./masquerade.ts";
import type { Network } from "./model.ts";

/** The maps that are filled from tables, and what a row of each is. */
export interface MapRows {
  readonly subnets4: SubnetRow;
  readonly peers4: PeerRow;
  readonly endpoints4: EndpointRow;
  readonly interfaces: InterfaceRow;
  readonly uplinks4: UplinkRow;
  readonly excluded4: ExcludedRow;
}

/** What came of one probe: the round trip in milliseconds, or why there was no answer. */
export type Answer = { readonly rttMs: number } | { readonly lost: string };

/** Asks from one address of this host whether others answer. */
export interface Prober {
  /** Never rejects, and resolves within the deadline or a little later. */
  probe(target: Ipv4, deadlineMs: number): Promise<Answer>;
  close(): void;
}

/** How a command ended. Texts are cut where they are too long. */
export interface Ended {
  readonly stdout: string;
  readonly stderr: string;
  /** Why it counts as failed, in words; undefined if it did not. */
  readonly problem: string | undefined;
}

/** Runs programs of the network config. */
export interface Runner {
  /** The daemon's environment, which they inherit. */
  readonly environment: Readonly<Record<string, string>>;
  /** `ended` never rejects. `stop` ends it, and what it started, at once. */
  run(command: Command): { readonly ended: Promise<Ended>; stop(): void };
}

/**
 * What is kept of the peers for which commands were run, by the key of their lease, until it is removed: the next daemon
 * must be able to take away what they set up. It is gone with the next start of the host, as is what they set up.
 */
export interface Keepsake {
  all(): ReadonlyMap<string, string>;
  put(key: string, text: string): void;
  remove(key: string): void;
}

/** What the world must offer. */
export interface World {
  readonly kernel: {
    /**
     * All rows of a table, some at a time, which take about a millisecond; each as it was when the ones before it were
     * taken, or later.
     */
    read<Name extends HostTable>(table: Name): Generator<readonly HostRows[Name][]>;
    /** The route to each address; undefined if there is none, or if it is one of our own addresses. */
    routesTo(
      addresses: readonly Ipv4[],
    ): readonly ((Omit<Path, "mtu" | "ethernet"> & { readonly mtu: number | undefined }) | undefined)[];
    /** Does all writes in order; result i is the error of write i. */
    apply(writes: readonly Write[]): readonly (Error | undefined)[];
    /**
     * Has the kernel ask at once for those neighbours on an interface that did not answer, which it would else do when
     * its timers are due, a second apart.
     */
    resolveNeighbours(index: number): void;
    /**
     * Sets the sysctls that are ours, those of the tunnel device among them if there is one: the kernel must not
     * configure it by itself. Returns how many were otherwise.
     */
    keepSysctls(device: string | undefined): number;
    /** Whether a route by a nexthop object is listed with the gateway and the interface of that one. */
    showsNexthops(): boolean;
  };
  readonly dataplane: {
    /**
     * Loads programs beside those that run; once that is done, the maps are theirs. Rejects if it can't be done. One at a
     * time, and nothing is activated meanwhile.
     */
    load(config: ProgramConfig): Promise<void>;
    activate(ifindexes: Iterable<number>): void;
    /**
     * All rows of a map, some at a time with their keys, as they are at that moment. Returns false, without all of them, if
     * they are as this said last, with what was put and removed since.
     */
    read<Name extends keyof MapRows>(
      name: Name,
    ): Generator<readonly (readonly [string, MapRows[Name]])[], boolean>;
    /** `before` is what each takes the place of, as far as is known. */
    put<Name extends keyof MapRows>(
      name: Name,
      rows: readonly MapRows[Name][],
      before: readonly (MapRows[Name] | undefined)[],
    ): void;
    remove<Name extends keyof MapRows>(name: Name, rows: readonly MapRows[Name][]): void;
    attachments(ifindexes: Iterable<number>): Map<string, AttachmentRow>;
    /** Whether a program that was attached still is; true where the kernel would have told. */
    isAttached(row: AttachmentRow): boolean;
    attach(row: AttachmentRow): void;
    detach(row: AttachmentRow): void;
    detachOtherMode(ifindexes: Iterable<number>): void;
    /** Pins again what was unpinned; returns how much that was. */
    keepPins(): number;
  };
  readonly store: {
    list(prefix: string): Promise<{
      readonly records: readonly {
        readonly key: string;
        readonly value: string;
        readonly revision: bigint;
        readonly leaseId: string;
      }[];
    }>;
    create(key: string, value: string, ttlSeconds: number): Promise<Written<"created">>;
    renew(
      key: string,
      value: string,
      term: { expectRevision: bigint } & ({ ttlSeconds: number } | { reservation: true }),
    ): Promise<Written<"renewed">>;
    remove(key: string, expectRevision: bigint): Promise<{ readonly removed: boolean }>;
    /** Seconds that an etcd lease has left, or undefined if there is no such lease. */
    timeToLive(leaseId: string): Promise<number | undefined>;
    /** Makes connections anew, as the way out of this host has changed. */
    reconnect(): void;
  };
  readonly clock: {
    /** Milliseconds of a clock that does not jump. */
    now(): number;
    /** Milliseconds since the host started, those that it slept among them; in steps of some 10. */
    uptime(): number;
    /** Calls back after so many milliseconds; returns what cancels it. */
    after(ms: number, callback: () => void): () => void;
  };
  /** Uniform in [0, 1). */
  random(): number;
  writeSubnetFile(text: string): void;
  readonly log: Record<"debug" | "info" | "warn" | "error", (fields: object, message: string) => void>;
  readonly observer: {
    reconciled(result: "success" | "failure", seconds: number): void;
    repaired(table: string, rows: number): void;
    failed(table: string): void;
    /** Something became of the own lease. */
    lease(what: LeaseReport): void;
    /** The status may have changed. */
    changed(): void;
    /** Forwarding is set up and subnet.env is written. Called once. */
    ready(): void;
    /** A peer was probed; undefined if it did not answer. */
    probed?(seconds: number | undefined): void;
  };
  /** Throws if the host does not let us ask, or does not have the address. Absent if peers are not to be probed. */
  openProber?(source: Ipv4): Prober;
  /**
   * Claims what no two daemons of this host can share for this network, in place of what was claimed before. Returns
   * why that can't be, and who stands in the way.
   */
  claim(network: Network): string | undefined;
  /** For backends that consist of commands. */
  readonly runner: Runner;
  readonly added: Keepsake;
}

type Written<Name extends string> =
  | ({ readonly [K in Name]: true } & { readonly revision: bigint; readonly leaseId: string })
  | { readonly [K in Name]: false };
