import fc from "fast-check";
import { expect, test } from "vitest";
import { Table } from "../../src/core/table.ts";

interface Row {
  readonly value: number;
}

type Step =
  | { readonly kind: "want"; readonly key: string; readonly value: number; readonly owner: string }
  | { readonly kind: "unwant"; readonly key: string; readonly owner: string }
  | { readonly kind: "observe"; readonly key: string; readonly value: number | undefined }
  | { readonly kind: "observeAll"; readonly rows: readonly (readonly [string, number])[] }
  | { readonly kind: "fail"; readonly key: string }
  | { readonly kind: "retry" };

const key = fc.constantFrom("a", "b", "c", "d");
const owner = fc.constantFrom("", "one", "two");
const value = fc.integer({ min: 0, max: 2 });
const step: fc.Arbitrary<Step> = fc.oneof(
  fc.record({ kind: fc.constant("want" as const), key, value, owner }),
  fc.record({ kind: fc.constant("unwant" as const), key, owner }),
  fc.record({ kind: fc.constant("observe" as const), key, value: fc.option(value, { nil: undefined }) }),
  fc.record({
    kind: fc.constant("observeAll" as const),
    rows: fc.array(fc.tuple(key, value), { maxLength: 4 }),
  }),
  fc.record({ kind: fc.constant("fail" as const), key }),
  fc.record({ kind: fc.constant("retry" as const) }),
);

/** The same, with everything written down: what each owner wants, oldest first, and what is in the table. */
class Model {
  readonly wants = new Map<string, Map<string, number>>();
  readonly actual = new Map<string, number>();
  readonly held = new Set<string>();

  wanted(name: string): number | undefined {
    return [...(this.wants.get(name)?.values() ?? [])].at(-1);
  }

  differs(name: string): boolean {
    return this.wanted(name) !== this.actual.get(name);
  }

  /** Changes something about one row; whether it differs since. */
  change(name: string, how: () => void): boolean {
    const [differed, before] = [this.differs(name), [this.wanted(name), this.actual.get(name)].join()];
    how();
    if ([this.wanted(name), this.actual.get(name)].join() !== before) this.held.delete(name);
    return this.differs(name) && !differed;
  }

  observe(name: string, now: number | undefined): boolean {
    return this.change(name, () => {
      if (now === undefined) this.actual.delete(name);
      else this.actual.set(name, now);
    });
  }
}

function take(table: Table<Row>, model: Model, each: Step): void {
  switch (each.kind) {
    case "want":
      table.want(each.key, { value: each.value }, each.owner);
      model.change(each.key, () => {
        const wants = model.wants.get(each.key) ?? new Map<string, number>();
        // Who wants the same again is no later for that.
        if (wants.get(each.owner) !== each.value) wants.delete(each.owner);
        model.wants.set(each.key, wants.set(each.owner, each.value));
      });
      return;
    case "unwant":
      table.unwant(each.key, each.owner);
      model.change(each.key, () => model.wants.get(each.key)?.delete(each.owner));
      return;
    case "observe": {
      const row = each.value === undefined ? undefined : { value: each.value };
      expect(table.observe(each.key, row)).toBe(model.observe(each.key, each.value));
      return;
    }
    case "observeAll": {
      const rows = new Map(each.rows);
      const names = new Set([...model.actual.keys(), ...rows.keys()]);
      const drifted = [...names].filter((name) => model.observe(name, rows.get(name))).length;
      expect(table.observeAll(new Map([...rows].map(([name, now]) => [name, { value: now }])))).toBe(drifted);
      return;
    }
    case "fail":
      table.fail(each.key, "refused");
      if (model.differs(each.key)) model.held.add(each.key);
      return;
    case "retry":
      table.retry();
      model.held.clear();
      return;
  }
}

test("a table is always what was wanted and seen, and where the two differ", () => {
  fc.assert(
    fc.property(fc.array(step, { maxLength: 60 }), (steps) => {
      const table = new Table<Row>("rows");
      const model = new Model();
      for (const each of steps) {
        take(table, model, each);
        const names = ["a", "b", "c", "d"];
        const differing = names.filter((name) => model.differs(name));
        expect(table.size).toBe(names.filter((name) => model.wanted(name) !== undefined).length);
        expect(table.present).toBe(model.actual.size);
        expect(table.differing).toBe(differing.length);
        for (const name of names) {
          expect(table.actualRow(name)?.value).toBe(model.actual.get(name));
          expect(table.isSettled(name)).toBe(!model.differs(name));
        }
        const found = [...table.differences()]
          .map(({ key: name, want, have }) => [name, want?.value, have?.value])
          .sort();
        const due = differing.filter((name) => !model.held.has(name));
        expect(found).toEqual(due.map((name) => [name, model.wanted(name), model.actual.get(name)]));
      }
    }),
    { numRuns: 500 },
  );
});
