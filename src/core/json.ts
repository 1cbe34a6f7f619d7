/**
 * JSON as flannel reads it. The records in etcd are written by people and by Go programs, and Go's decoder is
 * the contract: key names match without regard to case, the last of several spellings wins, unknown keys are
 * ignored, `null` leaves a default in place, and a number where text is due is an error. `JSON.parse` alone
 * would silently miss `"Directrouting"`. Both the network config and the lease records come through here, so
 * that the two agree on what a key is.
 */

/** Why a text or one of its fields is not what it should be; caught by the parser that reads the record. */
export class JsonError extends Error {}

/** The fields of one JSON object, by lower-case name. Each getter answers undefined for absent and `null`. */
export class JsonObject {
  readonly #fields = new Map<string, unknown>();
  readonly #path: string;

  private constructor(value: object, path: string) {
    for (const [name, field] of Object.entries(value)) {
      if (field !== null) this.#fields.set(name.toLowerCase(), field);
    }
    this.#path = path;
  }

  /** Reads a text that must hold one object and nothing after it; `what` names it in the JsonError it throws. */
  static parse(text: string, what: string): JsonObject {
    let value: unknown;
    try {
      value = JSON.parse(text);
    } catch (error) {
      throw new JsonError(`${what} is not valid JSON: ${(error as Error).message}`);
    }
    if (!isObject(value)) throw new JsonError(`${what} must be a JSON object, not ${describe(value)}`);
    return new JsonObject(value, "");
  }

  text(name: string): string | undefined {
    const value = this.#get(name);
    if (value !== undefined && typeof value !== "string") throw this.#wrong(name, "text", value);
    return value;
  }

  boolean(name: string): boolean | undefined {
    const value = this.#get(name);
    if (value !== undefined && typeof value !== "boolean") throw this.#wrong(name, "true or false", value);
    return value;
  }

  /** A whole number of at least 0; anything else, also 1.5 and "1", throws JsonError. */
  integer(name: string): number | undefined {
    const value = this.#get(name);
    if (value === undefined) return undefined;
    if (typeof value !== "number" || !Number.isSafeInteger(value) || value < 0) {
      throw this.#wrong(name, "a whole number of 0 or more", value);
    }
    return value;
  }

  object(name: string): JsonObject | undefined {
    const value = this.#get(name);
    if (value === undefined) return undefined;
    if (!isObject(value)) throw this.#wrong(name, "a JSON object", value);
    return new JsonObject(value, `${this.#path}${name}.`);
  }

  #get(name: string): unknown {
    return this.#fields.get(name.toLowerCase());
  }

  #wrong(name: string, wanted: string, value: unknown): JsonError {
    return new JsonError(`${this.#path}${name} must be ${wanted}, not ${describe(value)}`);
  }
}

function isObject(value: unknown): value is object {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function describe(value: unknown): string {
  const text = JSON.stringify(value);
  return text.length > 60 ? `${text.slice(0, 60)}...` : text;
}
