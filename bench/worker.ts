/**
 * A process of a benchmark that does one thing at a time: what starts it has a `Worker`, and it calls `serve`. An order
 * is answered when it has been carried out.
 */
import { type ChildProcess, fork } from "node:child_process";
import { once } from "node:events";
import { join } from "node:path";
import { repository } from "../test/process.ts";

export class Worker<Order, Reading> {
  readonly #child: ChildProcess;
  readonly pid: number;

  /** Starts a program of `dist/bench`. `onEnd` is told if it ends before `end` is called. */
  constructor(program: string, execArgv: readonly string[], onEnd: (error: Error) => void) {
    this.#child = fork(join(repository, "dist/bench", program), [], { execArgv: [...execArgv] });
    this.pid = this.#child.pid ?? -1;
    const name = program.replace(".js", "");
    this.#child.once("exit", (code, signal) => onEnd(new Error(`${name} ended with ${code ?? signal}`)));
  }

  /** Gives an order, and waits until it is carried out. Throws what went wrong there. */
  async tell(order: Order | { do: "read" }): Promise<Reading> {
    this.#child.send(order as object);
    const [said] = (await once(this.#child, "message")) as [{ answer: Reading } | { error: string }];
    if ("error" in said) throw new Error(said.error);
    return said.answer;
  }

  end(): void {
    this.#child.removeAllListeners("exit");
    this.#child.kill("SIGKILL");
  }
}

/** Carries out what the process that started this one orders, and ends with that one. */
export function serve<Order, Reading>(obey: (order: Order) => Promise<Reading | undefined>): void {
  process.on("message", (order: Order) => {
    obey(order).then(
      (answer) => process.send?.({ answer: answer ?? {} }),
      (error: unknown) => process.send?.({ error: error instanceof Error ? error.message : String(error) }),
    );
  });
  process.on("disconnect", () => process.exit(1));
}
