/** What came, went or became different between two looks at a table. Pure. */

export type Change = "added" | "changed" | "removed";

/** In the order of `after`, then what is gone. Rows are compared by their JSON. */
export function changesOf<Row>(
  before: ReadonlyMap<string, Row>,
  after: ReadonlyMap<string, Row>,
): { readonly change: Change; readonly row: Row }[] {
  const changes: { change: Change; row: Row }[] = [];
  for (const [key, row] of after) {
    const former = before.get(key);
    if (former === undefined) changes.push({ change: "added", row });
    else if (JSON.stringify(former) !== JSON.stringify(row)) changes.push({ change: "changed", row });
  }
  for (const [key, row] of before) if (!after.has(key)) changes.push({ change: "removed", row });
  return changes;
}
