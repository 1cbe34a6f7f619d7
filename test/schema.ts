/** docs/json.md as a schema: which fields a document has, and of which type, read from the tables of that page. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { repository } from "./process.ts";

/** A field as a row of a table has it. */
interface Field {
  readonly type: string;
  /** Of an object, or of each in a list, where the type names its fields. */
  readonly keys: readonly string[];
}

const page = readFileSync(join(repository, "docs/json.md"), "utf8");

/** Backticked words of a cell. */
const words = (cell: string): string[] => [...cell.matchAll(/`([^`]+)`/g)].map(([, word]) => word ?? "");

/** The fields of a command's document by path, `peers[].mtu`. */
function fieldsOf(command: string): Map<string, Field> {
  const [, section] = new RegExp(`\\n## ${command}\\n([\\s\\S]*?)(?=\\n## |$)`).exec(page) ?? [];
  if (section === undefined) throw new Error(`docs/json.md has no section ${command}`);
  const fields = new Map<string, Field>([
    ["schema", { type: "number", keys: [] }],
    ["command", { type: "string", keys: [] }],
  ]);
  for (const line of section.split("\n").filter((each) => each.startsWith("| `"))) {
    const [, first = "", type = ""] = line.split("|").map((cell) => cell.trim());
    const names = words(first);
    const types = type.split(", ");
    for (const [index, name] of names.entries()) {
      // `number, string` of two fields is one for each.
      const own = names.length > 1 && types.length === names.length ? (types[index] ?? "") : type;
      fields.set(name, { type: own, keys: words(own) });
    }
  }
  return fields;
}

/** Headers of a packet, which the page describes in a sentence. */
function headerKeys(): string[] {
  const [, sentence = ""] = /\nHeaders are ([\s\S]*?)\. The/.exec(page) ?? [];
  return words(sentence);
}

/** What of a document is not as docs/json.md says, in words; nothing if it is. */
export function differences(command: string, document: unknown): string[] {
  const fields = fieldsOf(command);
  const odd: string[] = [];
  const expectKeys = (path: string, value: unknown, keys: readonly string[]): void => {
    const has = Object.keys(value as object).sort();
    if (`${has}` !== `${[...keys].sort()}`) odd.push(`${path} has ${has}, not ${[...keys].sort()}`);
  };
  const check = (path: string, value: unknown): void => {
    const field = fields.get(path);
    if (field === undefined) {
      // `end` is documented by what is in it.
      const isParent = [...fields.keys()].some((name) => name.startsWith(`${path}.`));
      if (!isParent) odd.push(`${path} is not documented`);
      else descend(path, value);
      return;
    }
    const { type, keys } = field;
    if (value === null) {
      if (!/\bnull\b/.test(type)) odd.push(`${path} is null, and ${type}`);
    } else if (type.startsWith("list")) {
      if (!Array.isArray(value)) odd.push(`${path} is no list`);
      else for (const each of value) descend(`${path}[]`, each, keys);
    } else if (type.startsWith("headers")) {
      expectKeys(path, value, headerKeys());
    } else if (keys.length > 0) {
      expectKeys(path, value, keys);
    } else {
      const [kind = ""] = type.split(/[ ,]/);
      const isRight =
        kind === "number"
          ? typeof value === "number" && (type.includes("fraction") || Number.isInteger(value))
          : kind === "object"
            ? typeof value === "object" && !Array.isArray(value)
            : typeof value === kind;
      if (!isRight) odd.push(`${path} is ${JSON.stringify(value)}, not ${type}`);
    }
  };
  const descend = (path: string, value: unknown, keys: readonly string[] = []): void => {
    if (keys.length > 0) {
      expectKeys(path, value, keys);
      return;
    }
    if (typeof value !== "object" || value === null) return;
    const documented = [...fields.keys()]
      .filter((name) => name.startsWith(path === "" ? "" : `${path}.`))
      .map((name) => name.slice(path === "" ? 0 : path.length + 1))
      .map((name) => name.split(/[.[]/)[0] ?? "");
    // A list of what another section describes.
    if (documented.length === 0) return;
    const missing = [...new Set(documented)].filter((name) => !(name in value));
    if (missing.length > 0) odd.push(`${path || "the document"} lacks ${missing}`);
    for (const [name, each] of Object.entries(value)) check(path === "" ? name : `${path}.${name}`, each);
  };
  descend("", document);
  return odd;
}
