/**
 * The messages of etcd v3 that we send and get, and their wire format: Protocol Buffers, proto3. Field numbers are those of
 * etcd's `api/etcdserverpb/rpc.proto`, `api/mvccpb/kv.proto`; what we never send and never read is left out, and skipped
 * where it comes. Integers are bigint, as leases have 63 bits and revisions may.
 */

/** A key with its value. */
export interface KeyValue {
  readonly key: Buffer;
  readonly mod_revision: bigint;
  readonly value: Buffer;
  /** The etcd lease it hangs on; 0 for none. */
  readonly lease: bigint;
}

export interface ResponseHeader {
  readonly cluster_id: bigint;
  readonly revision: bigint;
}

export interface RangeRequest {
  readonly key: Buffer;
  readonly range_end?: Buffer;
  readonly limit?: bigint;
  /** 0 for the latest. */
  readonly revision?: bigint;
  readonly keys_only?: boolean;
}

export interface RangeResponse {
  readonly header: ResponseHeader;
  readonly kvs: readonly KeyValue[];
  readonly more: boolean;
}

/** One of them is set. */
export interface RequestOp {
  readonly request_range?: RangeRequest;
  readonly request_put?: {
    readonly key: Buffer;
    readonly value: Buffer;
    readonly lease?: bigint;
    readonly prev_kv?: boolean;
  };
  readonly request_delete_range?: { readonly key: Buffer };
}

/** What must be so for a transaction's `success` to be done: the value of one of the last two fields is the key's. */
export interface Compare {
  readonly target: (typeof COMPARE_TARGET)[keyof typeof COMPARE_TARGET];
  readonly key: Buffer;
  readonly version?: bigint;
  readonly mod_revision?: bigint;
}

export interface TxnRequest {
  readonly compare: readonly Compare[];
  readonly success: readonly RequestOp[];
  readonly failure: readonly RequestOp[];
}

export interface TxnResponse {
  readonly header: ResponseHeader;
  readonly succeeded: boolean;
  readonly responses: readonly {
    readonly response_range: RangeResponse | undefined;
    readonly response_put: { readonly prev_kv: KeyValue | undefined } | undefined;
  }[];
}

export interface WatchRequest {
  readonly create_request: { readonly key: Buffer; readonly range_end: Buffer; readonly fragment: boolean };
}

export interface WatchResponse {
  readonly header: ResponseHeader;
  readonly canceled: boolean;
  readonly compact_revision: bigint;
  readonly cancel_reason: string;
  readonly events: readonly { readonly type: bigint; readonly kv: KeyValue }[];
}

export const COMPARE_TARGET = { version: 0n, mod: 2n } as const;
export const EVENT_DELETE = 1n;

/** How the fields of a message are written: by name, the number and the kind; in an array if there may be several. */
export interface Schema {
  readonly [name: string]: readonly [number: number, kind: Kind | readonly [Kind]];
}
type Kind = "int" | "bool" | "bytes" | "string" | Schema;

const HEADER: Schema = { cluster_id: [1, "int"], revision: [3, "int"] };
const KEY_VALUE: Schema = {
  key: [1, "bytes"],
  mod_revision: [3, "int"],
  value: [5, "bytes"],
  lease: [6, "int"],
};
export const RANGE_REQUEST: Schema = {
  key: [1, "bytes"],
  range_end: [2, "bytes"],
  limit: [3, "int"],
  revision: [4, "int"],
  keys_only: [8, "bool"],
};
export const RANGE_RESPONSE: Schema = { header: [1, HEADER], kvs: [2, [KEY_VALUE]], more: [3, "bool"] };
const REQUEST_OP: Schema = {
  request_range: [1, RANGE_REQUEST],
  request_put: [2, { key: [1, "bytes"], value: [2, "bytes"], lease: [3, "int"], prev_kv: [4, "bool"] }],
  request_delete_range: [3, { key: [1, "bytes"] }],
};
export const TXN_REQUEST: Schema = {
  compare: [1, [{ target: [2, "int"], key: [3, "bytes"], version: [4, "int"], mod_revision: [6, "int"] }]],
  success: [2, [REQUEST_OP]],
  failure: [3, [REQUEST_OP]],
};
export const TXN_RESPONSE: Schema = {
  header: [1, HEADER],
  succeeded: [2, "bool"],
  responses: [3, [{ response_range: [1, RANGE_RESPONSE], response_put: [2, { prev_kv: [2, KEY_VALUE] }] }]],
};
export const WATCH_REQUEST: Schema = {
  create_request: [1, { key: [1, "bytes"], range_end: [2, "bytes"], fragment: [8, "bool"] }],
};
export const WATCH_RESPONSE: Schema = {
  header: [1, HEADER],
  canceled: [4, "bool"],
  compact_revision: [5, "int"],
  cancel_reason: [6, "string"],
  events: [11, [{ type: [1, "int"], kv: [2, KEY_VALUE] }]],
};
export const LEASE_GRANT_REQUEST: Schema = { TTL: [1, "int"] };
export const LEASE_GRANT_RESPONSE: Schema = { ID: [2, "int"] };
export const LEASE_REQUEST: Schema = { ID: [1, "int"] };
export const LEASE_TIME_TO_LIVE_RESPONSE: Schema = { TTL: [3, "int"] };
export const AUTHENTICATE_REQUEST: Schema = { name: [1, "string"], password: [2, "string"] };
export const AUTHENTICATE_RESPONSE: Schema = { token: [2, "string"] };
export const NOTHING: Schema = {};

const VARINT = 0;
const FIXED64 = 1;
const LENGTH = 2;
const FIXED32 = 5;
/** So many bits a number holds exactly, in groups of seven. */
const EXACT_BITS = 49;

/** The bytes of a message. Fields that are undefined are left out; zeroes are written. */
export function encodeMessage(schema: Schema, message: object): Buffer {
  const parts: Uint8Array[] = [];
  for (const [name, [number, kind]] of Object.entries(schema)) {
    const value = (message as Readonly<Record<string, unknown>>)[name];
    if (value === undefined) continue;
    const one: Kind = Array.isArray(kind) ? kind[0] : kind;
    for (const each of Array.isArray(kind) ? (value as unknown[]) : [value]) {
      const isVarint = one === "int" || one === "bool";
      parts.push(varint(BigInt((number << 3) | (isVarint ? VARINT : LENGTH))));
      if (isVarint) {
        parts.push(varint(BigInt(each as bigint | boolean)));
        continue;
      }
      const bytes =
        one === "bytes"
          ? (each as Buffer)
          : one === "string"
            ? Buffer.from(each as string)
            : encodeMessage(one as Schema, each as object);
      parts.push(varint(BigInt(bytes.length)), bytes);
    }
  }
  return Buffer.concat(parts);
}

/** Negative numbers take all 64 bits. */
function varint(value: bigint): Uint8Array {
  const bytes: number[] = [];
  let rest = BigInt.asUintN(64, value);
  for (; rest > 127n; rest >>= 7n) bytes.push(Number(rest & 127n) | 128);
  bytes.push(Number(rest));
  return Uint8Array.from(bytes);
}

interface Reading {
  readonly name: string;
  readonly kind: Kind;
  readonly isRepeated: boolean;
}

/** By schema: what to do with each field by its number, and the names with what they are where they do not come. */
interface Plan {
  readonly fields: ReadonlyMap<number, Reading>;
  readonly defaults: readonly (readonly [string, unknown])[];
}
const plans = new Map<Schema, Plan>();
const DEFAULTS: Readonly<Record<string, unknown>> = {
  int: 0n,
  bool: false,
  bytes: Buffer.alloc(0),
  string: "",
};

function planOf(schema: Schema): Plan {
  let plan = plans.get(schema);
  if (plan === undefined) {
    const fields = new Map<number, Reading>();
    const defaults: [string, unknown][] = [];
    for (const [name, [number, kind]] of Object.entries(schema)) {
      const isRepeated = Array.isArray(kind);
      const one: Kind = isRepeated ? kind[0] : (kind as Kind);
      fields.set(number, { name, kind: one, isRepeated });
      defaults.push([name, isRepeated || typeof one !== "string" ? undefined : DEFAULTS[one]]);
    }
    plan = { fields, defaults };
    plans.set(schema, plan);
  }
  return plan;
}

/**
 * A message of its bytes, which it shares. Fields that do not come are 0, false or empty, and messages undefined; `Message`
 * is what the schema says. Throws a RangeError if the bytes are no such message.
 */
export function decodeMessage<Message>(schema: Schema, bytes: Buffer): Message {
  return new Decoder(bytes).message(schema, bytes.length) as Message;
}

class Decoder {
  readonly #bytes: Buffer;
  #at = 0;

  constructor(bytes: Buffer) {
    this.#bytes = bytes;
  }

  message(schema: Schema, end: number): object {
    const { fields, defaults } = planOf(schema);
    const message: Record<string, unknown> = {};
    for (const [name, value] of defaults) message[name] = value;
    for (const { name, isRepeated } of fields.values()) if (isRepeated) message[name] = [];
    while (this.#at < end) {
      const tag = Number(this.#varint());
      const wire = tag & 7;
      const field = fields.get(tag >>> 3);
      if (field === undefined) {
        this.#skip(wire, end);
        continue;
      }
      const isVarint = field.kind === "int" || field.kind === "bool";
      if (wire !== (isVarint ? VARINT : LENGTH)) throw new RangeError(`${field.name} is of another type`);
      const value = isVarint ? this.#integer(field.kind) : this.#lengthy(field.kind, end);
      if (field.isRepeated) (message[field.name] as unknown[]).push(value);
      else message[field.name] = value;
    }
    if (this.#at !== end) throw new RangeError("a message is longer than it says");
    return message;
  }

  #integer(kind: Kind): bigint | boolean {
    const value = this.#varint();
    if (kind === "bool") return Number(value) !== 0;
    return typeof value === "number" ? BigInt(value) : BigInt.asIntN(64, value);
  }

  #lengthy(kind: Kind, end: number): unknown {
    const length = Number(this.#varint());
    const stop = this.#at + length;
    if (stop > end) throw new RangeError("a field is longer than its message");
    if (typeof kind === "object") return this.message(kind, stop);
    const bytes = this.#bytes.subarray(this.#at, stop);
    this.#at = stop;
    return kind === "string" ? bytes.toString() : bytes;
  }

  /** A number where that is exact: most are short, and there are thousands. */
  #varint(): number | bigint {
    let value = 0;
    for (let bits = 0; bits < EXACT_BITS; bits += 7) {
      const byte = this.#byte();
      value += (byte & 127) * 2 ** bits;
      if (byte < 128) return value;
    }
    let wide = BigInt(value);
    for (let bits = EXACT_BITS; bits < 70; bits += 7) {
      const byte = this.#byte();
      wide |= BigInt(byte & 127) << BigInt(bits);
      if (byte < 128) return wide;
    }
    throw new RangeError("a number is too long");
  }

  #byte(): number {
    const byte = this.#bytes[this.#at];
    if (byte === undefined) throw new RangeError("a message ends too early");
    this.#at += 1;
    return byte;
  }

  #skip(wire: number, end: number): void {
    if (wire === VARINT) this.#varint();
    else if (wire === LENGTH) {
      const length = Number(this.#varint());
      this.#at += length;
    } else if (wire === FIXED64) this.#at += 8;
    else if (wire === FIXED32) this.#at += 4;
    else throw new RangeError(`wire type ${wire} is not known`);
    if (this.#at > end) throw new RangeError("a field is longer than its message");
  }
}
