/**
 * What every command that shows something has in common: `--pin-path`, `--json`, `--watch`, and where its words go.
 *
 * A view gathers a document, which is what `--json` prints, and renders it for people. The document's schema is
 * docs/json.md; it carries `schema`, which grows when a field changes its meaning or goes, not when one comes.
 */
import { type Command, InvalidArgumentError, Option } from "commander";
import { pinPathOption, requirePrivilege } from "./common.ts";
import { type Screen, toned } from "./table.ts";

export type { Screen } from "./table.ts";

/** Version of all documents. */
export const SCHEMA = 1;
const WATCH_SECONDS = 2;

export interface ViewOptions {
  readonly pinPath: string;
}

export interface View<Options extends ViewOptions, Document extends object> {
  /** What there is to see now. Throws Refusal. `before` is what was seen last, when watching. */
  gather(options: Options, before?: Document): Document | Promise<Document>;
  /** For people; ends with a line break. */
  render(document: Document, screen: Screen, options: Options): string;
  /** For scripts; 0 unless it says so. */
  exitCode?(document: Document): number;
}

/** Gives a command the options and the action of a view. */
export function showing<Options extends ViewOptions, Document extends object>(
  command: Command,
  view: View<Options, Document>,
): Command {
  return command
    .addOption(pinPathOption())
    .option("--json", "as JSON (docs/json.md has the schema)")
    .addOption(
      new Option("-w, --watch [seconds]", "again and again, until Ctrl-C")
        .preset(`${WATCH_SECONDS}`)
        .argParser(seconds),
    )
    .action(async () => {
      type All = Options & { readonly json?: boolean; readonly watch?: number };
      const options = command.opts<All>();
      requirePrivilege();
      if (options.watch !== undefined) return watch(options, options.watch);
      const document = await view.gather(options);
      process.stdout.write(
        options.json === true
          ? pretty(envelope(command, document))
          : view.render(document, screenOf(process.stdout), options),
      );
      process.exitCode = view.exitCode?.(document) ?? 0;
    });

  async function watch(options: Options & { readonly json?: boolean }, pause: number): Promise<never> {
    const terminal = process.stdout.isTTY && options.json !== true ? openTerminal() : undefined;
    const end = (): void => {
      terminal?.close();
      process.exit(0);
    };
    process.on("SIGINT", end);
    process.on("SIGTERM", end);
    // On a terminal that changes its size, anew at once.
    let wake = (): void => undefined;
    process.on("SIGWINCH", () => wake());
    try {
      let before: Document | undefined;
      for (;;) {
        const document = await view.gather(options, before);
        if (options.json === true) {
          process.stdout.write(`${JSON.stringify(envelope(command, document))}\n`);
        } else {
          const screen = screenOf(process.stdout);
          const text = view.render(document, screen, options);
          const title = `twill ${command.name()}, every ${pause} s, ${new Date().toTimeString().slice(0, 8)}`;
          if (terminal !== undefined) terminal.draw(toned(title, "head", screen), text);
          else process.stdout.write(before === undefined ? text : `\n${text}`);
        }
        before = document;
        await new Promise<void>((resolve) => {
          const timer = setTimeout(resolve, pause * 1000);
          wake = () => {
            clearTimeout(timer);
            resolve();
          };
        });
      }
    } finally {
      terminal?.close();
    }
  }
}

function envelope(command: Command, document: object): object {
  return { schema: SCHEMA, command: command.name(), ...document };
}

/** JSON with a line for each field and each element of a list: to be read, searched by line, and quick to make. */
function pretty(document: object): string {
  const fields = Object.entries(document)
    .filter(([, value]) => value !== undefined)
    .map(([name, value]) => {
      const isList = Array.isArray(value) && value.length > 0;
      const text = isList
        ? `[\n${value.map((element) => `    ${JSON.stringify(element)}`).join(",\n")}\n  ]`
        : JSON.stringify(value, null, 2).replaceAll("\n", "\n  ");
      return `  ${JSON.stringify(name)}: ${text}`;
    });
  return `{\n${fields.join(",\n")}\n}\n`;
}

/** What a stream can show. NO_COLOR: https://no-color.org */
export function screenOf(stream: NodeJS.WriteStream): Screen {
  if (!stream.isTTY) return { width: undefined, colour: false };
  const { NO_COLOR = "", TERM = "" } = process.env;
  return { width: stream.columns, colour: NO_COLOR === "" && TERM !== "dumb" };
}

/** The alternate screen, as `top` uses it: what was on the terminal comes back at the end. */
function openTerminal(): { draw(title: string, text: string): void; close(): void } {
  process.stdout.write("\x1b[?1049h\x1b[?25l");
  return {
    draw(title, text) {
      const lines = [title, "", ...text.trimEnd().split("\n")];
      const { rows } = process.stdout;
      // Below what fits, a line says how much is missing.
      const shown =
        lines.length <= rows
          ? lines
          : [...lines.slice(0, rows - 1), `(${lines.length - rows + 1} more lines)`];
      process.stdout.write(`\x1b[H${shown.join("\x1b[K\r\n")}\x1b[K\x1b[J`);
    },
    close() {
      process.stdout.write("\x1b[?25h\x1b[?1049l");
    },
  };
}

/** Parses a time for an option. The message is for the command line. */
export function seconds(text: string): number {
  const value = Number(text);
  if (!/^\d+(\.\d+)?$/.test(text) || value < 0.1 || value > 86400) {
    throw new InvalidArgumentError("It is a number of seconds from 0.1 to 86400.");
  }
  return value;
}
