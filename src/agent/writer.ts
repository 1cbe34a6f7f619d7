/**
 * Writes the differences of tables into the kernel. Each row has its own outcome: one that is refused stays
 * different, waits for its own pause and holds up no other; the log tells of it once.
 */
import { nexthopIdOf, type Write } from "../core/host.ts";
import {
  type AttachmentRow,
  type FdbRow,
  type NeighbourRow,
  ROUTE_PROTOCOL,
  type RouteRow,
} from "../core/image.ts";
import type { Difference, Reading, Table } from "../core/table.ts";
import type { MapRows, World } from "../core/world.ts";
import { type Attempts, reasonOf } from "./attempts.ts";
import type { Steps } from "./chore.ts";

/** Rows that are written in one go, which takes some milliseconds; what is removed is not so many as a rule. */
const ROWS_PER_GO = 800;
/** For how long programs are attached or detached in one go: for each, the kernel waits until no processor runs what was there. */
const HOOKS_MS = 5;

/** How rows of a kernel table are written and removed, each by some writes in this order. */
export interface RowWrites<Row> {
  /** In the place of `have`, if there is one. */
  put(row: Row, have: Row | undefined): readonly Write[];
  remove(row: Row): readonly Write[];
}

export class Writer {
  readonly #world: Pick<World, "kernel" | "dataplane" | "log" | "observer" | "clock">;
  readonly #attempts: Attempts;

  constructor(world: Pick<World, "kernel" | "dataplane" | "log" | "observer" | "clock">, attempts: Attempts) {
    this.#world = world;
    this.#attempts = attempts;
  }

  /** Reads a map back, some rows at a time. `differed` is told how many differ now that did not before. */
  *readMap<Name extends keyof MapRows>(
    name: Name,
    table: Table<MapRows[Name]>,
    differed: (rows: number) => void,
  ): Steps {
    const blocks = this.#world.dataplane.read(name);
    let reading: Reading<MapRows[Name]> | undefined;
    for (let block = blocks.next(); ; block = blocks.next()) {
      if (block.done === true) {
        if (block.value) differed((reading ?? table.read()).end());
        return;
      }
      let rows = 0;
      for (const [key, row] of block.value) {
        reading ??= table.read();
        if (reading.saw(key, row)) rows += 1;
      }
      differed(rows);
      yield rows > 0;
    }
  }

  /** Writes wanted rows of a map. Returns false if there are more than go at once. */
  putMap<Name extends keyof MapRows>(name: Name, table: Table<MapRows[Name]>): boolean {
    return this.#writeMap(name, table, "put", wanted, ROWS_PER_GO);
  }

  /** Removes the rows of a map that are not wanted. */
  removeFromMap<Name extends keyof MapRows>(name: Name, table: Table<MapRows[Name]>): void {
    this.#writeMap(name, table, "remove", unwanted, Number.POSITIVE_INFINITY);
  }

  /** Writes or removes the differing rows of a map in one batch; how far one that failed came is read back. */
  #writeMap<Name extends keyof MapRows>(
    name: Name,
    table: Table<MapRows[Name]>,
    call: "put" | "remove",
    rowOf: (difference: Difference<MapRows[Name]>) => MapRows[Name] | undefined,
    most: number,
  ): boolean {
    const rows = new Map<string, MapRows[Name]>();
    const before: (MapRows[Name] | undefined)[] = [];
    let isAll = true;
    for (const difference of table.differences()) {
      const row = rowOf(difference);
      if (row === undefined) continue;
      if (rows.size === most) {
        isAll = false;
        break;
      }
      rows.set(difference.key, row);
      before.push(difference.have);
    }
    if (rows.size === 0) return true;
    const { dataplane } = this.#world;
    try {
      if (call === "put") dataplane.put(name, [...rows.values()], before);
      else dataplane.remove(name, [...rows.values()]);
    } catch (error) {
      this.#attempts.attempt("maps", () => {
        for (const _ of this.readMap(name, table, () => undefined));
      });
      this.#refused(table, new Map([...rows.keys()].map((key) => [key, reasonOf(error)])));
      return isAll;
    }
    for (const [key, row] of rows) table.observe(key, call === "put" ? row : undefined);
    return isAll;
  }

  /** Writes wanted rows of a kernel table, those that may be put already. Returns false if there are more than go at once. */
  put<Row>(table: Table<Row>, writes: RowWrites<Row>, mayPut: (row: Row) => boolean = () => true): boolean {
    return this.#write(table, "put", (row, have) => writes.put(row, have), mayPut, ROWS_PER_GO);
  }

  /** Removes the rows of a kernel table that are not wanted. */
  remove<Row>(table: Table<Row>, writes: RowWrites<Row>): void {
    this.#write(
      table,
      "remove",
      (row) => writes.remove(row),
      () => true,
      Number.POSITIVE_INFINITY,
    );
  }

  #write<Row>(
    table: Table<Row>,
    what: "put" | "remove",
    writesOf: (row: Row, have: Row | undefined) => readonly Write[],
    mayPut: (row: Row) => boolean,
    most: number,
  ): boolean {
    const differences: Difference<Row>[] = [];
    const writes: Write[] = [];
    /** Which difference each write is for. */
    const rowOf: number[] = [];
    let isAll = true;
    for (const difference of table.differences()) {
      const { have } = difference;
      const row = (what === "put" ? wanted : unwanted)(difference);
      if (row === undefined || (what === "put" && !mayPut(row))) continue;
      if (differences.length === most) {
        isAll = false;
        break;
      }
      for (const write of writesOf(row, have)) {
        writes.push(write);
        rowOf.push(differences.length);
      }
      differences.push(difference);
    }
    if (writes.length === 0) return true;
    const results = this.#attempts.must(table.name, () => this.#world.kernel.apply(writes));
    // What is at fault comes first: a route by a nexthop that was refused is refused as well.
    const errors = new Map<number, Error>();
    results.forEach((error, index) => {
      const row = rowOf[index];
      if (error !== undefined && row !== undefined && !errors.has(row)) errors.set(row, error);
    });
    const refused = new Map<string, string>();
    differences.forEach(({ key, want }, index) => {
      const error = errors.get(index);
      if (error === undefined) table.observe(key, want);
      else refused.set(key, error.message);
    });
    this.#refused(table, refused);
    return isAll;
  }

  /** Attaches wanted programs; `nameOf` gives an interface its name, for people. Returns false if there are more than go at once. */
  attach(attachments: Table<AttachmentRow>, nameOf: (ifindex: number) => string): boolean {
    return this.#hook(attachments, nameOf, wanted, (row) => {
      this.#world.dataplane.attach(row);
      return row;
    });
  }

  /** Detaches programs that are not wanted; returns as `attach` does. */
  detach(attachments: Table<AttachmentRow>, nameOf: (ifindex: number) => string): boolean {
    return this.#hook(attachments, nameOf, unwanted, (row) => {
      this.#world.dataplane.detach(row);
      return undefined;
    });
  }

  /** Does to some rows what `change` does, which returns what is there then. */
  #hook(
    attachments: Table<AttachmentRow>,
    nameOf: (ifindex: number) => string,
    rowOf: (difference: Difference<AttachmentRow>) => AttachmentRow | undefined,
    change: (row: AttachmentRow) => AttachmentRow | undefined,
  ): boolean {
    const { clock } = this.#world;
    const began = clock.now();
    const refused = new Map<string, string>();
    let isAll = true;
    for (const difference of [...attachments.differences()]) {
      const { key } = difference;
      const row = rowOf(difference);
      if (row === undefined) continue;
      if (clock.now() - began > HOOKS_MS) {
        isAll = false;
        break;
      }
      try {
        attachments.observe(key, change(row));
      } catch (error) {
        refused.set(key, `on ${nameOf(row.ifindex)}: ${reasonOf(error)}`);
      }
    }
    this.#refused(attachments, refused);
    return isAll;
  }

  /** Notes rows that could not be written, by key with the reason; the log tells of each once. */
  #refused<Row>(table: Table<Row>, rows: ReadonlyMap<string, string>): void {
    let news = 0;
    let first = "";
    for (const [key, reason] of rows) {
      this.#world.observer.failed(table.name);
      if (!table.fail(key, reason)) continue;
      news += 1;
      if (news === 1) first = `${key}: ${reason}`;
    }
    if (news > 0) {
      this.#world.log.warn({ table: table.name, rows: news, first }, "could not be written; trying again");
    }
  }
}

/** The row that is to be put. */
function wanted<Row>({ want }: Difference<Row>): Row | undefined {
  return want;
}

/** The row that is to be removed. */
function unwanted<Row>({ want, have }: Difference<Row>): Row | undefined {
  return want === undefined ? have : undefined;
}

/**
 * Of routes with a gateway, the kernel looks through all on one interface for another like it each time one is written, so
 * that twice as many take four times as long. It finds a nexthop object by its number: a route through a tunnel, of which
 * each has a gateway of its own, gets one where the kernel shows what is behind it. flanneld's routes are plain and serve
 * as they are.
 */
export function routeWrites(byNexthops: boolean): RowWrites<RouteRow> {
  const nexthopIdFor = ({ destination, prefixLength, gateway, onlink }: RouteRow): number | undefined =>
    gateway === undefined || !onlink
      ? undefined
      : nexthopIdOf({ address: destination, length: prefixLength });
  return {
    put(row, have) {
      const { gateway, outIndex, onlink, mtu } = row;
      const destination = { address: row.destination, length: row.prefixLength };
      const route = { write: "replaceRoute", destination, mtu, protocol: ROUTE_PROTOCOL } as const;
      const nexthopId = byNexthops ? nexthopIdFor(row) : undefined;
      if (gateway !== undefined && nexthopId !== undefined) {
        const nexthop = { id: nexthopId, gateway, outIndex, protocol: ROUTE_PROTOCOL };
        return [
          { write: "replaceNexthop", ...nexthop },
          { ...route, nexthopId },
        ];
      }
      const former = have && nexthopIdFor(have);
      const plain: Write = { ...route, gateway, outIndex, onlink };
      return former === undefined ? [plain] : [plain, { write: "deleteNexthop", id: former }];
    },
    remove(row) {
      const destination = { address: row.destination, length: row.prefixLength };
      const plain: Write = {
        write: "deleteRoute",
        destination,
        gateway: row.gateway,
        outIndex: row.outIndex,
      };
      const nexthopId = nexthopIdFor(row);
      if (nexthopId === undefined) return [plain];
      // The route first: if the nexthop took it along, the kernel would tell nobody.
      return [
        { write: "deleteRoute", destination, nexthopId },
        plain,
        { write: "deleteNexthop", id: nexthopId },
      ];
    },
  };
}

export const NEIGHBOURS: RowWrites<NeighbourRow> = {
  put(row) {
    return [{ write: "replaceNeighbour", ...row, permanent: true }];
  },
  remove(row) {
    return [{ write: "deleteNeighbour", index: row.index, address: row.address }];
  },
};

export const FDB: RowWrites<FdbRow> = {
  put(row) {
    return [{ write: "replaceFdb", ...row }];
  },
  remove(row) {
    return [{ write: "deleteFdb", ...row }];
  },
};
