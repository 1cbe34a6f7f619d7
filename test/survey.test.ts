/** Reading tables again some rows at a time, while they change: what is believed in the end is what there is. */
import fc from "fast-check";
import { expect, test } from "vitest";
import { survey, viewOf } from "../src/agent/survey.ts";
import { Host, type HostRows, type HostTable, type Neighbour, type NetlinkEvent } from "../src/core/host.ts";
import { Table } from "../src/core/table.ts";

const INDEX = 7;
const NAMES = [1, 2, 3, 4, 5, 6];

function neighbour(address: number, version: number): Neighbour {
  const mac = `02:00:00:00:00:0${version}`;
  return { index: INDEX, address, mac, state: 128, flags: 0, permanent: true };
}

const event = (change: "new" | "delete", row: Neighbour): NetlinkEvent => ({
  kind: "neighbour",
  change,
  row,
});

/** A kernel with neighbours alone, and what follows it: the mirror, and the table of what we want there. */
class Follower {
  readonly kernel = new Map<number, Neighbour>();
  readonly host = new Host();
  readonly table = new Table<{ readonly address: number; readonly mac: string | undefined }>("neighbours");
  readonly underWay: NetlinkEvent[] = [];
  /** How many rows the reader passes over, and how often tables were read. */
  readonly passedOver = new Set<number>();
  readings = 0;

  /** Two rows at a time; those that come next are listed already. */
  *read<Name extends HostTable>(name: Name): Generator<readonly HostRows[Name][]> {
    if (name !== "neighbour") return;
    this.readings += 1;
    const keys = [...this.kernel.keys()].filter((key) => !this.passedOver.has(key));
    const list = (): Neighbour[] => keys.splice(0, 2).flatMap((key) => this.kernel.get(key) ?? []);
    let rows = list();
    while (rows.length > 0 || keys.length > 0) {
      const ahead = list();
      yield rows as HostRows[Name][];
      rows = ahead;
    }
  }

  set(address: number, version: number): void {
    const row = neighbour(address, version);
    this.kernel.set(address, row);
    this.underWay.push(event("new", row));
  }

  remove(address: number): void {
    const row = this.kernel.get(address);
    if (row === undefined) return;
    this.kernel.delete(address);
    this.underWay.push(event("delete", row));
  }

  /** As the agent writes: it knows at once what is there, and hears of it later. */
  write(address: number, version: number): void {
    this.set(address, version);
    this.table.observe(`${address}`, { address, mac: this.kernel.get(address)?.mac });
  }

  hear(most = Number.POSITIVE_INFINITY): void {
    for (const each of this.underWay.splice(0, most)) {
      this.host.apply(each);
      if (each.kind !== "neighbour") continue;
      const { change, row } = each;
      this.table.observe(
        `${row.address}`,
        change === "delete" ? undefined : { address: row.address, mac: row.mac },
      );
    }
  }

  *survey(): Generator<void> {
    const view = viewOf(
      this.table,
      ({ mac, address }: Neighbour) => ({ mac, address }),
      ({ address }) => `${address}`,
      () => undefined,
    );
    const views = { neighbour: view } as const;
    const steps = survey(this.host, this, ["neighbour"], (name) => (views as never)[name]);
    for (const changes of steps) {
      for (const each of changes) this.host.apply(each);
      yield;
    }
  }

  /** What the mirror and the table believe to be there. */
  beliefs(): { mirror: unknown[]; table: unknown[] } {
    const mirror = [...this.host.neighbours.of(INDEX)].map(({ address, mac }) => [address, mac]);
    const table = NAMES.flatMap((name) => {
      const row = this.table.actualRow(`${name}`);
      return row === undefined ? [] : [[name, row.mac]];
    });
    return { mirror: mirror.sort(), table: table.sort() };
  }

  truth(): unknown[] {
    return [...this.kernel.values()].map(({ address, mac }) => [address, mac]).sort();
  }
}

const address = fc.constantFrom(...NAMES);
const version = fc.integer({ min: 1, max: 3 });
const step = fc.oneof(
  { weight: 4, arbitrary: fc.record({ does: fc.constant("survey" as const) }) },
  { weight: 1, arbitrary: fc.record({ does: fc.constant("set" as const), address, version }) },
  { weight: 1, arbitrary: fc.record({ does: fc.constant("write" as const), address, version }) },
  { weight: 1, arbitrary: fc.record({ does: fc.constant("remove" as const), address }) },
  {
    weight: 2,
    arbitrary: fc.record({ does: fc.constant("hear" as const), most: fc.integer({ min: 1, max: 3 }) }),
  },
);

test("what changes in the midst of a survey counts, and what it finds does", () => {
  fc.assert(
    fc.property(
      fc.array(fc.tuple(address, version), { maxLength: 6 }),
      fc.array(fc.tuple(address, fc.option(version)), { maxLength: 6 }),
      fc.array(step, { maxLength: 30 }),
      (known, silently, steps) => {
        const follower = new Follower();
        for (const [each, now] of known) follower.set(each, now);
        follower.hear();
        // Of this nobody tells.
        for (const [each, now] of silently) {
          if (now === null) follower.remove(each);
          else follower.set(each, now);
        }
        follower.underWay.length = 0;
        const surveying = follower.survey();
        for (const each of steps) {
          if (each.does === "survey") surveying.next();
          else if (each.does === "set") follower.set(each.address, each.version);
          else if (each.does === "write") follower.write(each.address, each.version);
          else if (each.does === "remove") follower.remove(each.address);
          else follower.hear(each.most);
        }
        for (const _ of surveying);
        follower.hear();
        expect(follower.beliefs()).toEqual({ mirror: follower.truth(), table: follower.truth() });
      },
    ),
    { numRuns: 2000 },
  );
});

test("a row that one reading passes over is not gone", () => {
  const follower = new Follower();
  for (const each of NAMES) follower.set(each, 1);
  follower.hear();
  follower.passedOver.add(3);
  const surveying = follower.survey();
  surveying.next();
  follower.passedOver.clear();
  for (const _ of surveying);
  expect(follower.readings).toBe(2);
  expect(follower.beliefs()).toEqual({ mirror: follower.truth(), table: follower.truth() });
});

test("a table that is as it was is read once", () => {
  const follower = new Follower();
  for (const each of NAMES) follower.set(each, 1);
  follower.hear();
  for (const _ of follower.survey());
  expect(follower.readings).toBe(1);
});

test("rows on an interface that went down meanwhile are not brought back", () => {
  const follower = new Follower();
  // Of them the mirror knows nothing.
  follower.set(1, 1);
  follower.underWay.length = 0;
  const surveying = follower.survey();
  surveying.next();
  follower.kernel.clear();
  const link = { index: INDEX, up: false } as HostRows["link"];
  follower.host.apply({ kind: "link", change: "delete", row: link });
  for (const _ of surveying);
  expect(follower.beliefs().mirror).toEqual([]);
});
