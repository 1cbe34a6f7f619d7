/** Judges the host's packet filter: whether the programs may take pods' packets past it. The log tells of each change. */
import { type Firewall, type PodTraffic, reasonsForOutside, reasonsForStack } from "../core/firewall.ts";
import type { World } from "../core/world.ts";

/** What the host's packet filter means for the programs. */
export interface Judgement {
  readonly needsStack: boolean;
  /** Why pods' packets take the stack. */
  readonly reasons: readonly string[];
  /** What comes from outside the network to pods goes past the stack. */
  readonly letsIn: boolean;
  /** Why it does not, if only that takes the stack. */
  readonly outside: readonly string[];
}

export class Judging {
  readonly #log: World["log"];
  #firewall: Firewall | undefined;
  #judgement: Judgement | undefined;
  /** What the judgement is of. */
  #judged = "";
  #mayPassPlain = false;

  constructor(log: World["log"]) {
    this.#log = log;
  }

  /** The last judgement; undefined before there was one. */
  get judgement(): Judgement | undefined {
    return this.#judgement;
  }

  /** The filter has nothing against what comes from peers without a tunnel, or is sent so. */
  get mayPassPlain(): boolean {
    return this.#mayPassPlain;
  }

  /** The rules, as they are now. */
  learn(firewall: Firewall): void {
    this.#firewall = firewall;
    this.#judged = "";
  }

  /** Judges this traffic, anew only if it or the rules changed. `letIn`: what comes from outside is to be let in. */
  judge(traffic: PodTraffic, letIn: boolean): Judgement {
    const text = JSON.stringify([traffic, letIn]);
    const before = this.#judgement;
    if (before !== undefined && text === this.#judged) return before;
    this.#judged = text;
    const firewall = this.#firewall;
    const reasons =
      firewall === undefined
        ? ["the firewall's rules have not been read yet"]
        : reasonsForStack(firewall, traffic);
    const needsStack = reasons.length > 0;
    const outside =
      firewall === undefined || needsStack || !letIn ? [] : reasonsForOutside(firewall, traffic);
    const judgement = { needsStack, reasons, letsIn: letIn && !needsStack && outside.length === 0, outside };
    const { interfaces, underlay } = traffic;
    const everywhere = { ...traffic, interfaces: [...new Set([...interfaces, ...underlay])] };
    this.#mayPassPlain =
      firewall !== undefined && !needsStack && reasonsForStack(firewall, everywhere).length === 0;
    this.#judgement = judgement;
    this.#tell(before, judgement);
    return judgement;
  }

  #tell(before: Judgement | undefined, { needsStack, reasons, outside }: Judgement): void {
    if (needsStack && reasons.join() !== before?.reasons.join()) {
      this.#log.info({ reasons }, "the firewall must see what pods send: their packets take the stack");
    } else if (!needsStack && before?.needsStack === true) {
      this.#log.info({}, "nothing in the firewall concerns what pods send: their packets skip the stack");
    }
    if (outside.length > 0 && outside.join() !== before?.outside.join()) {
      this.#log.info(
        { reasons: outside },
        "the firewall must see what comes to pods from outside the network: those packets take the stack",
      );
    }
  }
}
