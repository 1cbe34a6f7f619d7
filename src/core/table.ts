/**
 * A table that is reconciled: what we want in it, what is in it, and, always current, where the two differ.
 *
 * BPF maps, routes, neighbours and FDB entries are all tables here. Wanting a row, seeing a row and applying a
 * difference each cost the same however many rows there are, so that one lease event costs one row. `observe`
 * is called only with what the kernel said: after a successful write, a notification or a read-back.
 *
 * A row may be wanted by several owners (two leases name one address while a node moves from subnet to subnet):
 * it is wanted as the latest of them wants it, and until the last of them lets go; who wants again what it wanted is no
 * later for that. A difference that could not be
 * applied stays one, but is passed over until `retry` or until something about its row changes.
 */

/** One row to write (`want`) or, without `want`, to remove. */
export interface Difference<Row> {
  readonly key: string;
  readonly want: Row | undefined;
  /** What is in the table now, if anything. */
  readonly have: Row | undefined;
}

/** A look at a whole table, some rows at a time; what `observe` is told meanwhile is newer than what is read, and stays. */
export interface Reading<Row> {
  /** The row is in the table. Returns whether it differs now and did not before. */
  saw(key: string, row: Row): boolean;
  /** Whether all rows that were believed to be in the table have been seen. */
  readonly isComplete: boolean;
  /** All was read: what was not seen is not there. Returns how many rows differ by that that did not before. */
  end(): number;
}

export class Table<Row> {
  readonly name: string;
  private readonly wanted = new Map<string, Row>();
  /** Whose row `wanted` has; absent for the owner "". */
  private readonly owners = new Map<string, string>();
  /** Rows of earlier owners of a key, oldest first. */
  private readonly others = new Map<string, Map<string, Row>>();
  /** What is in the table, or that nothing is, where that is not what is wanted: the rest need not be kept twice. */
  private readonly pending = new Map<string, Row | undefined>();
  /** How many rows are in the table. */
  private count = 0;
  /** Why differences could not be applied. */
  private readonly reasons = new Map<string, string>();
  /** Of those, the ones to pass over for now. */
  private readonly held = new Set<string>();
  /** Of the reading under way: rows not seen yet, and rows of which something newer is known. */
  private unseen: Set<string> | undefined;
  private readonly newer = new Set<string>();
  private readonly same: (a: Row, b: Row) => boolean;

  /** `same` says whether two rows of one key are equal; by default, equal field by field. */
  constructor(name: string, same: (a: Row, b: Row) => boolean = sameFields) {
    this.name = name;
    this.same = same;
  }

  /** Rows wanted. */
  get size(): number {
    return this.wanted.size;
  }

  /** Rows that are in the table. */
  get present(): number {
    return this.count;
  }

  /** Rows that differ. */
  get differing(): number {
    return this.pending.size;
  }

  want(key: string, row: Row, owner = ""): void {
    const before = this.wanted.get(key);
    const holder = this.owners.get(key) ?? "";
    const earlier = this.others.get(key)?.get(owner);
    if (earlier !== undefined && this.same(earlier, row)) return;
    if (before !== undefined && holder !== owner) {
      const others = this.others.get(key) ?? new Map<string, Row>();
      others.delete(owner);
      this.others.set(key, others.set(holder, before));
    }
    this.own(key, row, owner);
  }

  unwant(key: string, owner = ""): void {
    const others = this.others.get(key);
    if (others?.delete(owner) !== true) {
      if ((this.owners.get(key) ?? "") !== owner) return;
      const heir = others === undefined ? undefined : [...others].at(-1);
      if (heir === undefined) this.own(key, undefined, "");
      else {
        others?.delete(heir[0]);
        this.own(key, heir[1], heir[0]);
      }
    }
    if (others?.size === 0) this.others.delete(key);
  }

  /** Wants exactly these rows. */
  wantAll(rows: ReadonlyMap<string, Row>): void {
    for (const key of this.wanted.keys()) if (!rows.has(key)) this.unwant(key);
    for (const [key, row] of rows) this.want(key, row);
  }

  /** The row is in the table, or with `undefined` it is not. Returns whether it differs now and did not before. */
  observe(key: string, row: Row | undefined): boolean {
    if (this.unseen !== undefined) {
      this.unseen.delete(key);
      this.newer.add(key);
    }
    return this.note(key, row);
  }

  /** Exactly these rows are in the table. Returns how many differ now that did not before. */
  observeAll(rows: ReadonlyMap<string, Row>): number {
    const reading = this.read();
    let drifted = 0;
    for (const [key, row] of rows) if (reading.saw(key, row)) drifted += 1;
    return drifted + reading.end();
  }

  /** Begins to look at the whole table, in place of a look that has not ended. */
  read(): Reading<Row> {
    const unseen = new Set<string>();
    for (const key of this.wanted.keys()) if (!this.pending.has(key)) unseen.add(key);
    for (const [key, have] of this.pending) if (have !== undefined) unseen.add(key);
    this.unseen = unseen;
    this.newer.clear();
    return {
      saw: (key, row) => {
        if (this.unseen !== unseen || this.newer.has(key)) return false;
        unseen.delete(key);
        return this.note(key, row);
      },
      get isComplete() {
        return unseen.size === 0;
      },
      end: () => {
        if (this.unseen !== unseen) return 0;
        this.unseen = undefined;
        this.newer.clear();
        let drifted = 0;
        for (const key of unseen) if (this.note(key, undefined)) drifted += 1;
        return drifted;
      },
    };
  }

  actualRow(key: string): Row | undefined {
    return this.pending.has(key) ? this.pending.get(key) : this.wanted.get(key);
  }

  /** Whether what is in the table under a key is what we want there. */
  isSettled(key: string): boolean {
    return !this.pending.has(key);
  }

  /** Every difference that is to be applied now, in the order in which it arose. */
  *differences(): Generator<Difference<Row>> {
    for (const [key, have] of this.pending) {
      if (!this.held.has(key)) yield { key, want: this.wanted.get(key), have };
    }
  }

  /** A difference could not be applied. Returns whether the reason is news. */
  fail(key: string, reason: string): boolean {
    if (!this.pending.has(key)) return false;
    const isNews = this.reasons.get(key) !== reason;
    this.reasons.set(key, reason);
    this.held.add(key);
    return isNews;
  }

  /** What could not be applied, by key, and why. */
  failures(): ReadonlyMap<string, string> {
    return this.reasons;
  }

  /** Every difference is to be applied again. */
  retry(): void {
    this.held.clear();
  }

  private note(key: string, row: Row | undefined): boolean {
    const before = this.actualRow(key);
    const isNews = row === undefined ? before !== undefined : before === undefined || !this.same(before, row);
    if (!isNews) return false;
    this.count += (row === undefined ? 0 : 1) - (before === undefined ? 0 : 1);
    return this.compare(key, row);
  }

  private own(key: string, row: Row | undefined, owner: string): void {
    if (owner === "") this.owners.delete(key);
    else this.owners.set(key, owner);
    const before = this.wanted.get(key);
    const have = this.actualRow(key);
    if (row === undefined) this.wanted.delete(key);
    else this.wanted.set(key, row);
    const isNews = before === undefined ? row !== undefined : row === undefined || !this.same(before, row);
    if (isNews) this.compare(key, have);
  }

  /** Something about a row changed, of which `have` is in the table. Returns whether it differs now and did not before. */
  private compare(key: string, have: Row | undefined): boolean {
    const want = this.wanted.get(key);
    this.held.delete(key);
    if (want === undefined ? have === undefined : have !== undefined && this.same(want, have)) {
      this.pending.delete(key);
      this.reasons.delete(key);
      return false;
    }
    const isNew = !this.pending.has(key);
    this.pending.set(key, have);
    return isNew;
  }
}

function sameFields<Row>(a: Row, b: Row): boolean {
  if (a === b) return true;
  const left = a as Record<string, unknown>;
  const right = b as Record<string, unknown>;
  for (const field of Object.keys(left)) if (left[field] !== right[field]) return false;
  for (const field of Object.keys(right)) if (!(field in left)) return false;
  return true;
}
