/**
 * Work that would hold up the event loop if it were done in one go: some at a time, and between two steps rounds and
 * whatever else happens have their turn. A chore that fails begins anew when it is asked for again.
 */
import type { World } from "../core/world.ts";
import { reasonOf } from "./attempts.ts";

/** The steps of a chore, each of about a millisecond; whether it came upon something that a round should look at. */
export type Steps = Generator<boolean, void>;

export class Chore {
  /** What it is, in a list of failures. */
  readonly what: string;
  readonly #clock: World["clock"];
  readonly #begin: () => Steps;
  readonly #wake: () => void;
  readonly #done: (ms: number) => void;
  #steps: Steps | undefined;
  /** It is to begin, or to be done once more. */
  #isDue = false;
  #problem: string | undefined;
  #ms = 0;
  #cancel: (() => void) | undefined;

  /** `wake` asks for a round. `done` is told how long it took, when all of it has been done. */
  constructor(
    what: string,
    clock: World["clock"],
    wake: () => void,
    begin: () => Steps,
    done: (ms: number) => void,
  ) {
    this.what = what;
    this.#clock = clock;
    this.#wake = wake;
    this.#begin = begin;
    this.#done = done;
  }

  /** Why it failed, until all of it has been done again. */
  get problem(): string | undefined {
    return this.#problem;
  }

  /** Is done soon, from its beginning; if it is under way, once more after that. */
  ask(): void {
    this.#isDue = true;
    this.#wait();
  }

  /** Is done soon, from its beginning, even if it is under way. */
  restart(): void {
    this.stop();
    this.ask();
  }

  stop(): void {
    this.#cancel?.();
    this.#cancel = undefined;
    this.#steps?.return();
    this.#steps = undefined;
    this.#isDue = false;
  }

  #wait(): void {
    this.#cancel ??= this.#clock.after(0, () => this.#turn());
  }

  #turn(): void {
    this.#cancel = undefined;
    const began = this.#clock.now();
    if (this.#steps === undefined) {
      this.#isDue = false;
      this.#ms = 0;
      this.#steps = this.#begin();
    }
    let isAll = false;
    let isNews = true;
    try {
      const step = this.#steps.next();
      isAll = step.done === true;
      isNews = isAll || step.value === true;
      if (isAll) this.#problem = undefined;
    } catch (error) {
      this.#problem = reasonOf(error);
      this.#steps = undefined;
    }
    this.#ms += this.#clock.now() - began;
    if (isAll) this.#steps = undefined;
    if (this.#steps !== undefined || (isAll && this.#isDue)) this.#wait();
    if (isAll) this.#done(this.#ms);
    if (isNews) this.#wake();
  }
}
