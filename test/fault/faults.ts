/**
 * All faults, and what the tests do with them: one world serves a row of faults, unless one of them spoils it or
 * something went wrong.
 */
import { afterAll, test } from "vitest";
import { drift } from "./drift.ts";
import { life } from "./life.ts";
import { plain } from "./plain.ts";
import { store } from "./store.ts";
import { type Fault, measure, objections, type Row, World } from "./world.ts";

export const FAULTS: readonly Fault[] = [...store, ...drift, ...life, ...plain];

/** Makes a test of each fault; with `timed` it must keep its times. `done` gets each row that was measured. */
export function testFaults(
  faults: readonly Fault[],
  { timed, done = () => undefined }: { timed: boolean; done?: (row: Row) => void },
): void {
  let world: World | undefined;
  let kind = "";

  const close = async () => {
    const former = world;
    world = undefined;
    await former?.close();
  };

  const worldFor = async (fault: Fault): Promise<World> => {
    const wanted = JSON.stringify({ ...fault.world, launcher: fault.world?.launcher?.name });
    if (world !== undefined && kind === wanted) return world;
    await close();
    kind = wanted;
    world = await World.create(fault.world);
    return world;
  };

  afterAll(close);

  test.each(faults.map((fault) => [fault.name, fault] as const))("%s", async (_, fault) => {
    const now = await worldFor(fault);
    try {
      const row = await measure(now, fault);
      done(row);
      const wrong = objections(row, timed);
      if (timed) console.log(fault.name, JSON.stringify({ ...row, fault: undefined }));
      if (wrong.length > 0) throw new Error(wrong.join("; "));
      await fault.after?.(now);
      if (fault.spoils === true) await close();
      else await now.settled();
    } catch (error) {
      const said = now.nodes.map(({ host, twilld }) => `${host.name}:\n${twilld.process.text()}`).join("\n");
      await close();
      throw new Error(`${error instanceof Error ? error.message : error}\n${said}`);
    }
  });
}
