/**
 * Tables as people expect of `ip` and `ss`: a head in capitals, columns by blanks, nothing else.
 *
 * On a terminal a table is as wide as the terminal: the widest columns give way, with an ellipsis where text is
 * missing, but never the key, by which a row is found again. Elsewhere nothing is cut. Colour comes on top of what
 * the words say already.
 *
 * (Table libraries lay out cell by cell, in time that grows with the square of the rows: minutes for what a table of
 * connections holds.)
 */

/** Where text goes. */
export interface Screen {
  /** Columns of the terminal; undefined where nothing needs to fit. */
  readonly width: number | undefined;
  readonly colour: boolean;
}

/** How a word is set off: what is well, what needs a look, what is wrong. */
export type Tone = "good" | "notice" | "bad" | "head";

export interface Column<Row> {
  readonly head: string;
  value(row: Row): string | number;
  /** A row is found by it, so it is never cut. */
  readonly key?: boolean;
  tone?(row: Row): Tone | undefined;
}

const TONES: Readonly<Record<Tone, string>> = { good: "32", notice: "33", bad: "31", head: "1" };
const GAP = "  ";
const ELLIPSIS = "…";

/** The text in a colour, on a screen that has colours. */
export function toned(text: string, tone: Tone | undefined, screen: Screen): string {
  return tone === undefined || !screen.colour ? text : `\x1b[${TONES[tone]}m${text}\x1b[0m`;
}

/** Text from outside (a key in etcd, an interface's name) must neither forge a line nor drive a terminal. */
export function printable(text: string): string {
  // Nearly all of it is plain, and there is a lot.
  if (/^[\x20-\x7e]*$/.test(text)) return text;
  return text.replace(
    /[\p{Cc}\p{Cf}\u2028\u2029]/gu,
    (character) => `\\u${(character.codePointAt(0) ?? 0).toString(16).padStart(4, "0")}`,
  );
}

/** The rows under their heads, without a line break at the end. Numbers stand right. */
export function table<Row>(columns: readonly Column<Row>[], rows: readonly Row[], screen: Screen): string {
  const [first] = rows;
  const isRight = columns.map((column) => first !== undefined && typeof column.value(first) === "number");
  // Made twice, for the widths and for the lines: a million cells that all live at once cost more.
  const cell = (column: Column<Row> | undefined, row: Row): string => {
    const value = column?.value(row) ?? "";
    return typeof value === "number" ? `${value}` : printable(value);
  };
  const widths = columns.map((column) =>
    rows.reduce((width, row) => Math.max(width, cell(column, row).length), column.head.length),
  );
  if (screen.width !== undefined) shrink(widths, columns, screen.width);
  const last = columns.length - 1;
  const line = (textOf: (index: number) => string, toneOf: (index: number) => Tone | undefined): string => {
    let made = "";
    for (let index = 0; index <= last; index += 1) {
      const width = widths[index] ?? 0;
      const text = textOf(index);
      const cut = text.length > width ? text.slice(0, width - 1) + ELLIPSIS : text;
      const pad = cut.length < width ? " ".repeat(width - cut.length) : "";
      const shown = toned(cut, toneOf(index), screen);
      made += (index > 0 ? GAP : "") + (isRight[index] ? pad + shown : index === last ? shown : shown + pad);
    }
    return made.trimEnd();
  };
  const lines = [
    line(
      (index) => columns[index]?.head ?? "",
      () => "head",
    ),
  ];
  for (const row of rows) {
    lines.push(
      line(
        (index) => cell(columns[index], row),
        (index) => columns[index]?.tone?.(row),
      ),
    );
  }
  return lines.join("\n");
}

/** Takes from the widest column that is no key until the line fits, or nothing is left to take. */
function shrink(widths: number[], columns: readonly Column<never>[], width: number): void {
  let excess = widths.reduce((sum, each) => sum + each, (widths.length - 1) * GAP.length) - width;
  while (excess > 0) {
    let widest = -1;
    for (const [index, each] of widths.entries()) {
      if (columns[index]?.key !== true && each > 1 && each > (widths[widest] ?? 0)) widest = index;
    }
    if (widest < 0) return;
    widths[widest] = (widths[widest] ?? 0) - 1;
    excess -= 1;
  }
}

/** Bytes as people say them: 830 B, 1.2 kB, 34 MB; in powers of 1000. */
export function size(bytes: number): string {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let [value, unit] = [bytes, 0];
  // What would be written as 1000 is 1.0 of the next unit.
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 || value >= 9.95 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

/** Seconds as people say them: 7s, 3m12s, 4h05m, 2d03h. */
export function duration(seconds: number): string {
  const whole = Math.max(0, Math.floor(seconds));
  const [days, hours, minutes] = [
    Math.floor(whole / 86400),
    Math.floor(whole / 3600) % 24,
    Math.floor(whole / 60) % 60,
  ];
  const two = (count: number): string => `${count}`.padStart(2, "0");
  if (days > 0) return `${days}d${two(hours)}h`;
  if (hours > 0) return `${hours}h${two(minutes)}m`;
  return minutes > 0 ? `${minutes}m${two(whole % 60)}s` : `${whole}s`;
}
