/**
 * Reads the kernel's tables again, some rows at a time, so that others have their turn in between however many peers there
 * are. Notifications and our own writes go on meanwhile, and are newer than what is read.
 */
import type { Host, HostEvent, HostRows, HostTable } from "../core/host.ts";
import type { Table } from "../core/table.ts";
import type { World } from "../core/world.ts";

/** What of a table of the kernel is ours, looked at in the same course. */
export interface View<Row> {
  saw(row: Row): void;
  /** Whether all that was believed to be there has been seen. */
  readonly isComplete: boolean;
  /** The whole table was read. */
  end(): void;
}

/** Changes that are told at a time. */
const CHANGES = 250;

/** How `Table` sees a table of the kernel. `differed` is told how many rows were not as they were believed to be. */
export function viewOf<Row, Own>(
  table: Table<Own>,
  ownOf: (row: Row) => Own | undefined,
  keyOf: (row: Own) => string,
  differed: (rows: number) => void,
): View<Row> {
  const reading = table.read();
  return {
    saw: (row) => {
      const own = ownOf(row);
      if (own !== undefined && reading.saw(keyOf(own), own)) differed(1);
    },
    get isComplete() {
      return reading.isComplete;
    },
    end: () => differed(reading.end()),
  };
}

/**
 * Surveys these tables in this order. Each step reads some rows, or gives what the mirror of the kernel is to be told, which
 * is to be told before the next step. Throws what `read` throws. To be ended by `return` if it is given up.
 */
export function* survey(
  host: Host,
  kernel: Pick<World["kernel"], "read">,
  tables: readonly HostTable[],
  view: <Name extends HostTable>(table: Name) => View<HostRows[Name]> | undefined = () => undefined,
): Generator<readonly HostEvent[], void> {
  for (const table of tables) yield* surveyTable(host, kernel, table, view(table));
}

function* surveyTable<Name extends HostTable>(
  host: Host,
  kernel: Pick<World["kernel"], "read">,
  table: Name,
  view: View<HostRows[Name]> | undefined,
): Generator<readonly HostEvent[], void> {
  const mirror = host.survey(table);
  try {
    // What the first reading missed may only have moved while it was under way.
    for (let reading = 0; reading < 2; reading += 1) {
      for (const rows of kernel.read(table)) {
        for (const row of rows) {
          mirror.saw(row);
          view?.saw(row);
        }
        yield [];
      }
      if (mirror.isComplete && (view?.isComplete ?? true)) break;
    }
    let changes: HostEvent[] = [];
    for (const change of mirror.changes()) {
      if (changes.push(change) < CHANGES) continue;
      yield changes;
      changes = [];
    }
    if (changes.length > 0) yield changes;
    view?.end();
  } finally {
    mirror.close();
  }
}
