/**
 * Commands of the network config: one line of text becomes a program and its arguments, without a shell. Words are
 * separated by blanks; quotes and the backslash keep them together, and `$NAME` or `${NAME}` is replaced as it would be
 * in a shell, but for one thing: a value stays one argument, whatever is in it.
 */

/** A program to be run to its end. */
export interface Command {
  /** What it is, for people: `SubnetAddCommand`. */
  readonly name: string;
  readonly argv: readonly string[];
  /** Beside the environment of the daemon. */
  readonly environment: Readonly<Record<string, string>>;
  /** Its standard input. */
  readonly input: string;
  /** After so long it is ended, and has failed. */
  readonly timeoutMs: number;
}

/** Why a text is no command. */
export class CommandError extends Error {}

/** What only a shell understands, outside of quotes; within double ones, only the last two. */
const SHELL = /^(?:[;&|<>()`]|\$\()/;
const SHELL_QUOTED = /^(?:`|\$\()/;
const VARIABLE = /^\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})/;

/** The words of a command; `lookUp` gives the value of a variable, empty if there is none. Throws CommandError. */
export function splitWords(text: string, lookUp: (name: string) => string): string[] {
  const words: string[] = [];
  let word: string | undefined;
  let quote: '"' | "'" | undefined;
  let rest = text;
  const take = (length: number, as = rest.slice(0, length)): void => {
    word = (word ?? "") + as;
    rest = rest.slice(length);
  };
  while (rest !== "") {
    const [first = "", second = ""] = rest;
    const variable = quote === "'" ? null : VARIABLE.exec(rest);
    if (first === quote) {
      quote = undefined;
      take(1, "");
    } else if (quote === "'") {
      take(1);
    } else if (variable !== null) {
      take(variable[0].length, lookUp(variable[1] ?? variable[2] ?? ""));
    } else if ((quote === undefined ? SHELL : SHELL_QUOTED).test(rest)) {
      throw new CommandError(`"${first === "$" ? "$(" : first}" is for a shell to understand`);
    } else if (first === "\\" && (quote === undefined ? second !== "" : /["\\$`]/.test(second))) {
      take(2, second);
    } else if (quote !== undefined) {
      take(1);
    } else if (first === '"' || first === "'") {
      quote = first;
      take(1, "");
    } else if (/\s/.test(first)) {
      if (word !== undefined) words.push(word);
      word = undefined;
      rest = rest.slice(1);
    } else {
      take(1);
    }
  }
  if (quote !== undefined) throw new CommandError(`a quote (${quote}) has no end`);
  if (word !== undefined) words.push(word);
  return words;
}
