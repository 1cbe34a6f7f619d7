/**
 * Doing what may fail. A failure is noted under what it concerns, told once in the log, and listed until a round goes
 * by without it; what was noted is tried again by whoever runs the rounds.
 */
import type { Write } from "../core/host.ts";
import type { World } from "../core/world.ts";

/** Ends a round early; what failed is noted. */
export class RoundFailure extends Error {}

export function reasonOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

export class Attempts {
  readonly #world: Pick<World, "kernel" | "log" | "observer">;
  /** What failed in this round, or in the last while none runs. */
  #failures = new Map<string, string>();
  #former = new Map<string, string>();

  constructor(world: Pick<World, "kernel" | "log" | "observer">) {
    this.#world = world;
  }

  /** What failed and why. */
  get failures(): ReadonlyMap<string, string> {
    return this.#failures;
  }

  /** A round begins: what fails in it is news if it did not fail in the one before. */
  begin(): void {
    this.#former = this.#failures;
    this.#failures = new Map();
  }

  /** Does what the round can go on without; says whether it was done. */
  attempt(what: string, action: () => void): boolean {
    try {
      action();
      return true;
    } catch (error) {
      if (!(error instanceof RoundFailure)) this.note(what, reasonOf(error));
      return false;
    }
  }

  /** Does that without which the round can't go on. Throws RoundFailure. */
  must<Result>(what: string, action: () => Result): Result {
    try {
      return action();
    } catch (error) {
      throw this.failure(what, reasonOf(error));
    }
  }

  /** Does writes without which the round can't go on. Throws RoundFailure. */
  apply(what: string, writes: readonly Write[]): void {
    const results = this.must(what, () => this.#world.kernel.apply(writes));
    const error = results.find((result) => result !== undefined);
    if (error !== undefined) throw this.failure(what, error.message);
  }

  /** Notes a failure; to be thrown. */
  failure(what: string, reason: string): RoundFailure {
    this.note(what, reason);
    return new RoundFailure(reason);
  }

  /** Notes that something failed. */
  note(what: string, reason: string): void {
    if (this.#former.get(what) !== reason && this.#failures.get(what) !== reason) {
      this.#world.log.warn({ what, reason }, "could not be done; trying again");
    }
    this.#failures.set(what, reason);
    this.#world.observer.failed(what);
  }
}
