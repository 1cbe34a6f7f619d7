/**
 * etcd, the only store: what every node of the network has published, and our own key in it.
 *
 * The etcd3 package gives us its generated RPC clients and nothing else. Its watcher, leases, retries and
 * circuit breaker are bypassed: they skip events over a reconnect, go blind when the store was wiped, and send
 * a transaction twice. Here one rule replaces them: whatever happens to a watch, it starts again from a list.
 *
 * A watch is opened before the list is read, and events up to the list's revision are dropped. A stream that is
 * older than the list and still open proves that no restart, wipe or restore came between the two, so nothing
 * can be missed or invented. A transaction whose answer was lost is sent again with the same compare and the
 * same lease; the lease id then tells our own write from a rival's.
 */
import { isUtf8 } from "node:buffer";
import { createHash, createPrivateKey, X509Certificate } from "node:crypto";
import { readFileSync } from "node:fs";
import { posix } from "node:path";
import { performance } from "node:perf_hooks";
import { setImmediate as nextTurn } from "node:timers/promises";
import { rootCertificates } from "node:tls";
import grpc, { type Interceptor } from "@grpc/grpc-js";
import { noop } from "cockatiel";
import {
  Etcd3,
  type ICompare,
  type IKeyValue,
  type IOptions,
  type IRequestOp,
  type IWatchRequest,
  type IWatchResponse,
} from "etcd3";
import type { StoreEvent } from "../core/model.ts";

/**
 * What went wrong, for a program: `config` the endpoints or the prefix; `credentials` a certificate, ours or
 * etcd's; `refused` the user, the password or a permission; `unavailable` no usable answer; `compacted` the
 * list took longer than the store keeps history; `uncertain` a write whose outcome is not known; `limit` more
 * data than a network can have; `closed` the store was closed.
 */
export type StoreErrorCode =
  | "config"
  | "credentials"
  | "refused"
  | "unavailable"
  | "compacted"
  | "uncertain"
  | "limit"
  | "closed";

/** A failure of the store, its message fit for a person. */
export class StoreError extends Error {
  override readonly name = "StoreError";
  readonly code: StoreErrorCode;

  constructor(code: StoreErrorCode, message: string, options?: ErrorOptions) {
    super(message, options);
    this.code = code;
  }
}

/** The connection of the watch, as reported once per change. */
export interface StoreState {
  readonly connected: boolean;
  /** Milliseconds since the epoch at which `connected` took its value. */
  readonly since: number;
  readonly endpoint: string;
  /** Why there is no connection; absent when there is one. */
  readonly error?: StoreError;
}

/** The part of a logger that the store uses. */
export interface StoreLog {
  debug(fields: object, message: string): void;
  warn(fields: object, message: string): void;
}

export interface StoreOptions {
  /** URLs of the cluster's members, all http or all https; blanks around them and empty ones are ignored. */
  readonly endpoints: readonly string[];
  /** Prefix of every key, `/coreos.com/network`. */
  readonly prefix: string;
  readonly username?: string | undefined;
  readonly password?: string | undefined;
  /** PEM files; the key and the certificate only together. Without a CA the system's are trusted. */
  readonly keyFile?: string | undefined;
  readonly certFile?: string | undefined;
  readonly caFile?: string | undefined;
  readonly log: StoreLog;
  readonly onState?: (state: StoreState) => void;
  /** Period in milliseconds at which the files are looked at for a change; default 10 000. */
  readonly credentialCheckMs?: number;
}

/** One key of the store. */
export interface StoreRecord {
  /** Relative to the prefix. */
  readonly key: string;
  readonly value: string;
  /** mod_revision. */
  readonly revision: bigint;
  /** etcd lease the key is bound to, decimal; "0" for none. */
  readonly leaseId: string;
}

export type Creation =
  | { readonly created: true; readonly revision: bigint; readonly leaseId: string }
  | { readonly created: false };
export type Renewal =
  | { readonly renewed: true; readonly revision: bigint; readonly leaseId: string }
  | { readonly renewed: false; readonly current?: StoreRecord };
export type Removal =
  | { readonly removed: true }
  | { readonly removed: false; readonly current?: StoreRecord };

/**
 * How long a renewed key lives: a new etcd lease of so many seconds, or for ever. `expectRevision` is the
 * mod_revision at which the caller saw the key to be its own.
 */
export type Term =
  | { readonly expectRevision: bigint; readonly ttlSeconds: number }
  | { readonly expectRevision: bigint; readonly reservation: true };

/** Every key is relative to the prefix. Calls reject with `StoreError` after each endpoint had its chance. */
export interface Store {
  /**
   * Reports `config` and `subnets/*` until `signal` aborts: a snapshot (reset, puts, synced), then each change.
   * Every interruption leads to a new snapshot; no error ends it. A slow consumer slows the stream down.
   */
  watch(signal: AbortSignal): AsyncGenerator<StoreEvent, void, void>;
  /** Writes a key that must not exist yet, bound to a new lease of `ttlSeconds`. */
  create(key: string, value: string, ttlSeconds: number): Promise<Creation>;
  /** Writes a key that must not have changed since `expectRevision`. */
  renew(key: string, value: string, term: Term): Promise<Renewal>;
  /** Deletes a key that must not have changed since `expectRevision`. */
  remove(key: string, expectRevision: bigint): Promise<Removal>;
  get(key: string): Promise<StoreRecord | undefined>;
  /** All keys that start with `prefix`, from one revision, in order. */
  list(prefix: string): Promise<{ readonly revision: bigint; readonly records: readonly StoreRecord[] }>;
  /** Seconds that an etcd lease has left, or undefined if there is no such lease. */
  timeToLive(leaseId: string): Promise<number | undefined>;
  /**
   * The network changed: connections that stand may lead nowhere. The watch and every call under way begin anew
   * at once, rather than when their silence is noticed or the pause between attempts is over.
   */
  reconnect(): void;
  /** Ends the watch and every call under way. */
  close(): void;
}

/** Milliseconds for one answer, be it of a call or of the watch's creation. */
const ANSWER_MS = 5_000;
const BACKOFF_MIN_MS = 100;
const BACKOFF_MAX_MS = 5_000;
/** A watch that lived this long counts as a success, and the next failure starts from the shortest pause. */
const STABLE_MS = 1_000;
const CREDENTIAL_CHECK_MS = 10_000;
/** Keys per page of a list; halved when a page does not fit into a message. */
const PAGE_KEYS = 1_000;
const MESSAGE_BYTES = 16 << 20;
/** Some 300 000 leases. Beyond it the prefix is not a network's, and reading on would exhaust the node. */
const LIST_BYTES = 64 << 20;
/** Records that are handed on in one go; then other work of the event loop has its turn. */
const RECORDS_PER_TURN = 200;
/** Messages of the watch that wait for the consumer before we stop reading from the socket. */
const FEED_MESSAGES = 64;
const SYSTEM_CA_FILE = "/etc/ssl/certs/ca-certificates.crt";

const CHANNEL = {
  // etcd refuses pings that come more often than each 5 s.
  "grpc.keepalive_time_ms": 10_000,
  "grpc.keepalive_timeout_ms": 5_000,
  "grpc.max_receive_message_length": MESSAGE_BYTES,
  // The pauses between attempts are ours; the channel's own would only hide that etcd is back.
  "grpc.initial_reconnect_backoff_ms": BACKOFF_MIN_MS,
  "grpc.max_reconnect_backoff_ms": BACKOFF_MIN_MS,
  "grpc.enable_retries": 0,
  "grpc.service_config_disable_resolution": 1,
} as const;

/**
 * Opens the store without connecting yet: `watch` and the calls do that and keep at it.
 * Rejects with a `StoreError` when the endpoints, the prefix or a credential file cannot work.
 */
export async function openStore(options: StoreOptions): Promise<Store> {
  const { endpoints, secure } = parseEndpoints(options);
  return new EtcdStore(options, endpoints, secure, basePath(options.prefix));
}

interface Credentials {
  readonly rootCertificate: Buffer;
  readonly privateKey?: Buffer;
  readonly certChain?: Buffer;
}

/** The members' addresses as `scheme://host:port`, each once. */
function parseEndpoints(options: StoreOptions): { endpoints: string[]; secure: boolean } {
  const given = options.endpoints.map((text) => text.trim()).filter((text) => text !== "");
  if (given.length === 0) {
    throw new StoreError("config", "no etcd endpoint is given: name at least one with --etcd-endpoints");
  }
  // Without a scheme the certificates tell what is meant, as they do for etcd's own client.
  const usual = options.caFile || options.certFile || options.keyFile ? "https" : "http";
  const parsed = given.map((text) => {
    const match = /^(?:([a-z]+):\/\/)?(\[[0-9a-fA-F:.]+\]|[^:/?#@[\]\s]+)(?::(\d{1,5}))?\/?$/.exec(text);
    const [, scheme = usual, host, port = "2379"] = match ?? [];
    if (host === undefined || (scheme !== "http" && scheme !== "https") || Number(port) > 65_535) {
      throw new StoreError(
        "config",
        `the etcd endpoint "${text}" cannot be read: write it as http://host:port or https://host:port`,
      );
    }
    return { scheme, url: `${scheme}://${host}:${port}` };
  });
  const plain = parsed.find(({ scheme }) => scheme === "http");
  const secure = parsed.find(({ scheme }) => scheme === "https");
  if (plain && secure) {
    throw new StoreError(
      "config",
      `the etcd endpoints mix http (${plain.url}) and https (${secure.url}): give them all one scheme`,
    );
  }
  return { endpoints: [...new Set(parsed.map(({ url }) => url))], secure: secure !== undefined };
}

/** The prefix with one slash at its end, cleaned as flannel does by joining paths. */
function basePath(prefix: string): string {
  if (prefix === "") {
    throw new StoreError("config", "the etcd prefix is empty: name it with --etcd-prefix");
  }
  const clean = posix.normalize(prefix);
  return clean.endsWith("/") ? clean : `${clean}/`;
}

class EtcdStore implements Store {
  readonly #options: StoreOptions;
  readonly #endpoints: readonly string[];
  readonly #secure: boolean;
  readonly #base: string;
  readonly #closing = new AbortController();
  readonly #checking: NodeJS.Timeout | undefined;
  /** Aborted, and replaced, when all connections are to be made anew. */
  #rotation = new AbortController();
  /** Index of the endpoint that the next connection goes to. */
  #turn: number;
  /** The client of the calls; the watch has its own, as a failed call resets the channel of its client. */
  #caller: Promise<Client> | undefined;
  /** Digest of the credential files in use. */
  #digest = "";
  #complaint = "";
  #isChecking = false;
  #state: StoreState | undefined;
  /** What was last wrong with the connection to each endpoint. */
  readonly #causes = new Map<string, string>();
  /** Kinds of failure already reported since the connection was lost. */
  readonly #reported = new Set<StoreErrorCode>();
  /** Leases that we granted and that hold nothing but our key. */
  readonly #granted = new Set<string>();

  constructor(options: StoreOptions, endpoints: readonly string[], secure: boolean, base: string) {
    this.#options = options;
    this.#endpoints = endpoints;
    this.#secure = secure;
    this.#base = base;
    // Nodes that start together spread over the members.
    this.#turn = Math.floor(Math.random() * endpoints.length);
    if (secure) {
      this.#digest = readCredentials(options).digest;
      this.#checking = setInterval(
        () => void this.#checkCredentials(),
        options.credentialCheckMs ?? CREDENTIAL_CHECK_MS,
      );
      this.#checking.unref();
    } else if (options.certFile || options.keyFile || options.caFile) {
      options.log.warn(
        { endpoint: endpoints[0] },
        "the etcd endpoints are http, so the certificates are not used: write https:// to encrypt",
      );
    }
  }

  async *watch(signal: AbortSignal): AsyncGenerator<StoreEvent, void, void> {
    const { signal: stop, release } = either(signal, this.#closing.signal);
    try {
      yield* this.#watch(stop);
    } finally {
      release();
    }
  }

  async *#watch(stop: AbortSignal): AsyncGenerator<StoreEvent, void, void> {
    let failures = 0;
    while (!stop.aborted) {
      const endpoint = this.#endpoint();
      const began = performance.now();
      try {
        yield* this.#follow(endpoint, stop);
      } catch (error) {
        if (stop.aborted) return;
        this.#report({ connected: false, endpoint, error: this.#explain(error, endpoint) });
        this.#leave(endpoint);
        failures = performance.now() - began >= STABLE_MS ? 1 : failures + 1;
        // Each endpoint gets its chance before the first pause.
        if (failures % this.#endpoints.length === 0) {
          const { signal, release } = either(stop, this.#rotation.signal);
          await pause(failures / this.#endpoints.length - 1, signal);
          release();
        }
      }
    }
  }

  async create(key: string, value: string, ttlSeconds: number): Promise<Creation> {
    const leaseId = await this.#grant(ttlSeconds);
    const outcome = await this.#write(
      key,
      { target: "Version", version: "0" },
      { request_put: { key: this.#key(key), value: Buffer.from(value), lease: leaseId } },
      (record) => record?.leaseId === leaseId,
    );
    if (outcome.done) {
      this.#granted.add(leaseId);
      return { created: true, revision: outcome.revision, leaseId };
    }
    await this.#revoke(leaseId);
    return { created: false };
  }

  async renew(key: string, value: string, term: Term): Promise<Renewal> {
    const { expectRevision } = term;
    const leaseId = "ttlSeconds" in term ? await this.#grant(term.ttlSeconds) : "0";
    const outcome = await this.#write(
      key,
      { target: "Mod", mod_revision: String(expectRevision) },
      { request_put: { key: this.#key(key), value: Buffer.from(value), lease: leaseId, prev_kv: true } },
      // A reservation has no lease to tell it by; the same bytes with no lease are as good as our own write.
      (record) =>
        record !== undefined &&
        record.leaseId === leaseId &&
        (leaseId !== "0" || (record.value === value && record.revision > expectRevision)),
    );
    if (!outcome.done) {
      if (leaseId !== "0") await this.#revoke(leaseId);
      return outcome.current ? { renewed: false, current: outcome.current } : { renewed: false };
    }
    if (leaseId !== "0") this.#granted.add(leaseId);
    // The key has moved to the new lease. The old one goes if it is ours; a lease that another made may hold
    // other keys, and ages out by itself.
    const old = outcome.previous?.lease;
    if (old !== undefined && old !== leaseId && this.#granted.delete(old)) await this.#revoke(old);
    return { renewed: true, revision: outcome.revision, leaseId };
  }

  async remove(key: string, expectRevision: bigint): Promise<Removal> {
    const outcome = await this.#write(
      key,
      { target: "Mod", mod_revision: String(expectRevision) },
      { request_delete_range: { key: this.#key(key) } },
      (record) => record === undefined,
    );
    if (outcome.done) return { removed: true };
    return outcome.current ? { removed: false, current: outcome.current } : { removed: false };
  }

  async get(key: string): Promise<StoreRecord | undefined> {
    const { kvs } = await this.#call((client) => client.etcd.kv.range({ key: this.#key(key) }));
    return this.#record(kvs[0]);
  }

  list(prefix: string): Promise<{ readonly revision: bigint; readonly records: readonly StoreRecord[] }> {
    return this.#call((client) => this.#list(client, this.#key(prefix)));
  }

  async timeToLive(leaseId: string): Promise<number | undefined> {
    if (leaseId === "0") return undefined;
    const { TTL } = await this.#call((client) => client.etcd.leaseClient.leaseTimeToLive({ ID: leaseId }));
    const seconds = Number(TTL);
    return seconds < 0 ? undefined : seconds;
  }

  reconnect(): void {
    if (this.#closing.signal.aborted) return;
    this.#dropCaller();
    this.#rotation.abort();
    this.#rotation = new AbortController();
  }

  close(): void {
    if (this.#closing.signal.aborted) return;
    clearInterval(this.#checking);
    this.#closing.abort(new StoreError("closed", "the connection to etcd was closed"));
    this.#dropCaller();
  }

  /** One life of the watch at one endpoint. Returns when stopped or to use new credentials, else throws. */
  async *#follow(endpoint: string, stop: AbortSignal): AsyncGenerator<StoreEvent, void, void> {
    const { signal: end, release } = either(stop, this.#rotation.signal);
    let client: Client | undefined;
    let feed: Feed | undefined;
    try {
      client = await this.#dial(endpoint);
      const stream = await client.etcd.watchClient.watch();
      feed = openFeed(stream, end);
      stream.write({
        create_request: {
          key: Buffer.from(this.#base),
          range_end: rangeEnd(Buffer.from(this.#base)),
          fragment: true,
        },
      } as IWatchRequest);
      const created = await feed.next(ANSWER_MS);
      if (created === undefined) return;
      refuseCancelled(created, endpoint);

      const snapshot = await race(this.#list(client, Buffer.from(this.#base)), end);
      if (snapshot === undefined) return;
      // A list cannot be older than a watch of the same store, so one of the two came from another store.
      if (
        snapshot.revision < BigInt(created.header.revision) ||
        snapshot.cluster !== created.header.cluster_id
      ) {
        throw new StoreError(
          "unavailable",
          `etcd at ${endpoint} was replaced while it was read: reading it again`,
        );
      }
      feed.check();
      this.#report({ connected: true, endpoint });
      let handed = 0;
      const isTurnOver = (): boolean => ++handed % RECORDS_PER_TURN === 0;
      yield { kind: "reset" };
      for (const record of snapshot.records) {
        if (concernsUs(record.key)) yield { kind: "put", ...record };
        if (isTurnOver()) await nextTurn();
      }
      yield { kind: "synced", revision: snapshot.revision };

      let cursor = snapshot.revision;
      for (let message = await feed.next(); message !== undefined; message = await feed.next()) {
        refuseCancelled(message, endpoint);
        for (const { type, kv } of message.events) {
          const revision = BigInt(kv.mod_revision);
          if (revision <= snapshot.revision) continue;
          if (revision < cursor) {
            throw new StoreError(
              "unavailable",
              `etcd at ${endpoint} went back from revision ${cursor} to ${revision}: reading it again`,
            );
          }
          cursor = revision;
          const record = this.#record(kv);
          if (record === undefined || !concernsUs(record.key)) continue;
          if (type === "Delete") yield { kind: "delete", key: record.key, revision };
          else yield { kind: "put", ...record };
          if (isTurnOver()) await nextTurn();
        }
      }
    } finally {
      release();
      feed?.close();
      client?.close();
    }
  }

  /** Reads a whole range in pages, all of the revision of the first. */
  async #list(
    client: Client,
    start: Buffer,
  ): Promise<{ revision: bigint; cluster: string; records: StoreRecord[] }> {
    const end = rangeEnd(start);
    const records: StoreRecord[] = [];
    let key = start;
    let revision = "0";
    let limit = PAGE_KEYS;
    let bytes = 0;
    for (;;) {
      try {
        const page = await client.etcd.kv.range({ key, range_end: end, limit, revision });
        if (revision === "0") revision = page.header.revision;
        for (const kv of page.kvs) {
          bytes += kv.key.length + kv.value.length;
          const record = this.#record(kv);
          if (record) records.push(record);
        }
        if (bytes > LIST_BYTES) {
          throw new StoreError(
            "limit",
            `etcd holds more than ${LIST_BYTES >> 20} MiB under ${start.toString()}, too much for a network: remove what does not belong there`,
          );
        }
        const last = page.kvs.at(-1);
        if (!page.more || last === undefined) {
          return { revision: BigInt(revision), cluster: page.header.cluster_id, records };
        }
        key = Buffer.concat([last.key, Buffer.of(0)]);
      } catch (error) {
        if (limit === 1 || !/larger than max/.test(messageOf(error))) throw error;
        limit = Math.ceil(limit / 2);
      }
    }
  }

  /**
   * Writes one key in a transaction that compares it first. An answer that was lost leads to the same
   * transaction again: if the first one took effect the second one's compare fails, and `isOurs` says so.
   */
  async #write(
    key: string,
    compare: ICompare,
    operation: IRequestOp,
    isOurs: (record: StoreRecord | undefined) => boolean,
  ): Promise<
    { done: true; revision: bigint; previous?: IKeyValue } | { done: false; current?: StoreRecord }
  > {
    const bytes = this.#key(key);
    let sent = 0;
    try {
      const answer = await this.#call((client) => {
        sent += 1;
        return client.etcd.kv.txn({
          compare: [{ result: "Equal", key: bytes, ...compare }],
          success: [operation],
          failure: [{ request_range: { key: bytes } }],
        });
      });
      const response = answer.responses[0];
      const revision = BigInt(answer.header.revision);
      if (answer.succeeded) {
        const previous = response?.response_put?.prev_kv;
        return previous ? { done: true, revision, previous } : { done: true, revision };
      }
      const current = this.#record(response?.response_range?.kvs[0]);
      if (sent > 1 && isOurs(current)) return { done: true, revision: current?.revision ?? revision };
      return current ? { done: false, current } : { done: false };
    } catch (error) {
      if (sent === 0 || !(error instanceof StoreError) || error.code !== "unavailable") throw error;
      throw new StoreError(
        "uncertain",
        `it is not known whether etcd wrote ${this.#base}${key}: ${error.message}`,
        { cause: error },
      );
    }
  }

  async #grant(ttlSeconds: number): Promise<string> {
    const { ID } = await this.#call((client) => client.etcd.leaseClient.leaseGrant({ TTL: ttlSeconds }));
    return ID;
  }

  /** Gives a lease back that holds no key any more. Failing is harmless: it ages out. */
  async #revoke(leaseId: string): Promise<void> {
    try {
      await this.#call((client) => client.etcd.leaseClient.leaseRevoke({ ID: leaseId }));
    } catch (error) {
      this.#options.log.debug(
        { leaseId, error: messageOf(error) },
        "an unused etcd lease is left to age out",
      );
    }
  }

  /**
   * Runs a call that may be repeated: at the current endpoint, then at each other, then once more after a
   * pause. What etcd itself refuses is not repeated.
   */
  async #call<T>(run: (client: Client) => Promise<T>): Promise<T> {
    const stop = this.#closing.signal;
    for (let failures = 0; ; ) {
      stop.throwIfAborted();
      const endpoint = this.#endpoint();
      const { signal, release } = either(stop, this.#rotation.signal);
      try {
        this.#caller ??= this.#dial(endpoint);
        const client = await race(this.#caller, signal);
        const answer = client && (await race(timely(run(client), endpoint), signal));
        if (answer !== undefined) return answer;
        stop.throwIfAborted();
        throw new Error("the connection was made anew while the call was under way");
      } catch (error) {
        stop.throwIfAborted();
        const failure = this.#explain(error, endpoint);
        this.#dropCaller();
        if (failure.code === "refused" && !isStaleToken(error)) throw failure;
        if (failure.code === "limit" || failures >= this.#endpoints.length) throw failure;
        if (!isStaleToken(error)) this.#leave(endpoint);
        failures += 1;
        if (failures % this.#endpoints.length === 0) await pause(0, stop);
      } finally {
        release();
      }
    }
  }

  /** A client of one endpoint, with the credentials as they are in the files now. */
  async #dial(endpoint: string): Promise<Client> {
    if (!this.#secure) return dial(endpoint, this.#options, undefined);
    const { credentials, digest } = readCredentials(this.#options);
    this.#digest = digest;
    return dial(endpoint, this.#options, credentials);
  }

  /** Takes new credentials into use if the files changed, are in order, and etcd accepts them. */
  async #checkCredentials(): Promise<void> {
    if (this.#isChecking) return;
    this.#isChecking = true;
    const endpoint = this.#endpoint();
    try {
      const { credentials, digest } = readCredentials(this.#options);
      if (digest === this.#digest) return;
      const client = await dial(endpoint, this.#options, credentials);
      try {
        await timely(client.etcd.kv.range({ key: this.#key("config"), keys_only: true }), endpoint);
      } finally {
        client.close();
      }
      if (this.#closing.signal.aborted) return;
      this.#digest = digest;
      this.#complaint = "";
      this.reconnect();
      this.#options.log.debug({ endpoint }, "the etcd credentials changed and are in use");
    } catch (error) {
      // The connection that stands keeps its old credentials: half a rotation must not cut it.
      const { message } = this.#explain(error, endpoint);
      if (message === this.#complaint) return;
      this.#complaint = message;
      this.#options.log.warn({ endpoint, error: message }, "the changed etcd credentials are not used");
    } finally {
      this.#isChecking = false;
    }
  }

  #endpoint(): string {
    return this.#endpoints[this.#turn] as string;
  }

  /** Makes the next connection go elsewhere, unless another failure has already seen to it. */
  #leave(endpoint: string): void {
    if (this.#endpoint() !== endpoint) return;
    this.#turn = (this.#turn + 1) % this.#endpoints.length;
    this.#dropCaller();
  }

  #dropCaller(): void {
    this.#caller?.then(
      (client) => client.close(),
      () => undefined,
    );
    this.#caller = undefined;
  }

  #report(now: { connected: boolean; endpoint: string; error?: StoreError }): void {
    const changed = this.#state?.connected !== now.connected;
    if (changed) this.#reported.clear();
    else if (now.error === undefined || this.#reported.has(now.error.code)) return;
    if (now.error) this.#reported.add(now.error.code);
    const since = changed || this.#state === undefined ? Date.now() : this.#state.since;
    this.#state = { since, ...now };
    this.#options.onState?.(this.#state);
  }

  #key(key: string): Buffer {
    return Buffer.from(this.#base + key);
  }

  #record(kv: IKeyValue | undefined): StoreRecord | undefined {
    if (kv === undefined) return undefined;
    const key = text(kv.key);
    if (!key.startsWith(this.#base)) return undefined;
    return {
      key: key.slice(this.#base.length),
      value: text(kv.value),
      revision: BigInt(kv.mod_revision),
      leaseId: kv.lease,
    };
  }

  /** Turns any failure into one that names what it happened to and what to do about it. */
  #explain(error: unknown, endpoint: string): StoreError {
    if (error instanceof StoreError) return error;
    let detail = messageOf(error);
    const is = (pattern: RegExp) => pattern.test(detail);
    const say = (code: StoreErrorCode, message: string) => new StoreError(code, message, { cause: error });
    const { username, caFile, certFile } = this.#options;
    const at = `etcd at ${endpoint}`;
    const ca = caFile ?? "the system's CA certificates";
    if (is(/self.signed certificate|unable to (?:get|verify)|signature failure/i)) {
      return say(
        "credentials",
        `${at} shows a certificate that ${ca} did not sign (${detail}): name the CA that signed it with --etcd-cafile`,
      );
    }
    if (is(/certificate has expired|certificate is not yet valid/i)) {
      return say(
        "credentials",
        `${at} shows a certificate out of its time (${detail}): renew it on the etcd host`,
      );
    }
    if (is(/does not match certificate's altnames/i)) {
      return say(
        "credentials",
        `${at} shows a certificate made for other names (${detail}): name the endpoint as the certificate does`,
      );
    }
    if (is(/alert|certificate required/i)) {
      return say(
        "credentials",
        certFile
          ? `${at} does not accept the client certificate ${certFile} (${detail}): have it signed by the CA that etcd trusts`
          : `${at} asks for a client certificate (${detail}): give one with --etcd-certfile and --etcd-keyfile`,
      );
    }
    if (is(/authentication failed|invalid auth token|user name is empty/)) {
      return say(
        "refused",
        username
          ? `${at} does not accept the user "${username}" with this password (${detail}): check --etcd-username and --etcd-password`
          : `${at} asks for a user (${detail}): give --etcd-username and --etcd-password`,
      );
    }
    if (is(/permission denied/)) {
      return say(
        "refused",
        `${at} does not let ${username ? `the user "${username}"` : "us"} at the keys under ${this.#base}: grant read and write on that prefix`,
      );
    }
    if (is(/required revision has been compacted/)) {
      return say("compacted", `${at} compacted its history while it was read: reading it again`);
    }
    if (is(/deadline exceeded/i)) {
      return say(
        "unavailable",
        `${at} gave no answer within ${ANSWER_MS / 1000} s: check the path to it and its health`,
      );
    }
    if (isAnswer(error)) {
      return say("refused", `${at} refused a request (${detail}): its log may say more`);
    }
    if (is(/no leader/)) {
      return say("unavailable", `${at} has no leader: check that most members of the cluster run`);
    }
    // Clients to one endpoint share its connection, and one that finds it failed already is not told why ("null").
    if (detail === "null") detail = this.#causes.get(endpoint) ?? "no connection";
    else this.#causes.set(endpoint, detail);
    return say("unavailable", `${at} cannot be used (${detail}): check that it runs and listens there`);
  }
}

interface Client {
  readonly etcd: Etcd3;
  close(): void;
}

/** Prepares a client; with a user it also fetches the token, and that is all it sends. */
async function dial(
  endpoint: string,
  options: StoreOptions,
  credentials: Credentials | undefined,
): Promise<Client> {
  let token: string | undefined;
  const interceptor: Interceptor = (call, nextCall) =>
    new grpc.InterceptingCall(nextCall(call), {
      start(metadata, _listener, next) {
        if (token !== undefined) metadata.set("token", token);
        // A member that was cut off from the others ends the watch then, in place of staying silent.
        if (call.method_definition.responseStream) metadata.set("hasleader", "true");
        const listener = new grpc.ListenerBuilder().withOnReceiveStatus((result, forward) => {
          // Reworded, as the package repeats a call for ever when it reads etcd's own words.
          const stale = result.details.includes("invalid auth token");
          forward(stale ? { ...result, code: grpc.status.UNAUTHENTICATED, details: STALE_TOKEN } : result);
        });
        next(metadata, listener.build());
      },
    });
  const settings: IOptions = {
    hosts: endpoint,
    grpcOptions: CHANNEL,
    defaultCallOptions: (context) => ({
      interceptors: [interceptor],
      ...(context.isStream ? {} : { deadline: Date.now() + ANSWER_MS }),
    }),
    faultHandling: { global: noop, host: () => noop },
  };
  const etcd = new Etcd3(credentials ? { ...settings, credentials } : settings);
  const client: Client = { etcd, close: () => etcd.close() };
  const { username, password } = options;
  if (!username) return client;
  try {
    const answer = await timely(
      etcd.auth.authenticate({ name: username, password: password ?? "" }),
      endpoint,
    );
    token = answer.token;
    return client;
  } catch (error) {
    // Users may be known before the cluster asks for them.
    if (/authentication is not enabled/.test(messageOf(error))) return client;
    client.close();
    throw error;
  }
}

const STALE_TOKEN = "the login has expired, invalid auth token no longer";

function isStaleToken(error: unknown): boolean {
  return messageOf(error).includes(STALE_TOKEN);
}

interface Feed {
  /** The next message, or undefined once stopped. With a limit in milliseconds, throws when it is exceeded. */
  next(withinMs?: number): Promise<IWatchResponse | undefined>;
  /** Throws if the stream has failed already. */
  check(): void;
  close(): void;
}

/** The messages of a watch one by one; reading stops while more than `FEED_MESSAGES` wait. */
function openFeed(stream: object, end: AbortSignal): Feed {
  const source = stream as NodeJS.ReadableStream & { cancel(): void };
  const waiting: IWatchResponse[] = [];
  let failure: unknown;
  let wake: () => void = () => undefined;
  const fail = (error: unknown) => {
    failure ??= error;
    wake();
  };
  const ended = () => fail(new Error("etcd ended the watch"));
  const stopped = () => wake();
  source.on("data", (message: IWatchResponse) => {
    waiting.push(message);
    if (waiting.length >= FEED_MESSAGES) source.pause();
    wake();
  });
  source.on("error", fail);
  source.on("end", ended);
  end.addEventListener("abort", stopped);
  return {
    async next(withinMs) {
      const timer =
        withinMs === undefined
          ? undefined
          : setTimeout(() => fail(new Error("deadline exceeded while the watch was opened")), withinMs);
      try {
        for (;;) {
          if (end.aborted) return undefined;
          const message = waiting.shift();
          if (message !== undefined) {
            if (waiting.length === 0) source.resume();
            return message;
          }
          if (failure !== undefined) throw failure;
          await new Promise<void>((resolve) => {
            wake = resolve;
          });
        }
      } finally {
        clearTimeout(timer);
      }
    },
    check() {
      if (failure !== undefined) throw failure;
    },
    close() {
      end.removeEventListener("abort", stopped);
      // The handler of "error" stays, as cancelling is itself reported as one.
      source.cancel();
    },
  };
}

/** etcd says in an ordinary message that a watch is over; the package's own watcher loses the reason. */
function refuseCancelled(message: IWatchResponse, endpoint: string): void {
  if (!message.canceled) return;
  if (message.compact_revision !== "0") {
    throw new StoreError(
      "compacted",
      `etcd at ${endpoint} compacted what the watch had not seen: reading it again`,
    );
  }
  throw new Error(message.cancel_reason || "etcd cancelled the watch without a reason");
}

/** The keys that make a network; another network may lie below the same prefix. */
function concernsUs(key: string): boolean {
  return key === "config" || key.startsWith("subnets/");
}

/** The first key after all that start with `start`. */
function rangeEnd(start: Buffer): Buffer {
  const end = Buffer.from(start);
  for (let i = end.length - 1; i >= 0; i -= 1) {
    const byte = end.readUInt8(i);
    if (byte < 0xff) {
      end.writeUInt8(byte + 1, i);
      return end.subarray(0, i + 1);
    }
  }
  return Buffer.of(0);
}

/** Bytes as text. What is not UTF-8 is read byte by byte, so that garbage stays distinct and gets a name. */
function text(bytes: Buffer): string {
  return bytes.toString(isUtf8(bytes) ? "utf8" : "latin1");
}

/** Whether etcd understood the request and declined it, so that asking again is of no use. */
function isAnswer(error: unknown): boolean {
  return (
    error instanceof Error &&
    /\b\d+ (?:INVALID_ARGUMENT|NOT_FOUND|ALREADY_EXISTS|RESOURCE_EXHAUSTED|FAILED_PRECONDITION|OUT_OF_RANGE|UNIMPLEMENTED): etcdserver/.test(
      error.message,
    )
  );
}

/** The detail of a failure without what differs from attempt to attempt or says nothing to a person. */
function messageOf(error: unknown): string {
  const message = error instanceof Error ? error.message : String(error);
  return message
    .replace(/^(?:\d+ [A-Z_]+: )?(?:No connection established\. Last error: )?(?:Error: )?/, "")
    .replace(/[0-9A-F]+:error:[0-9A-F]+:[^:]*:[^:]*:([^:]*):[^:]*:\d+:.*/s, "$1")
    .replace(/ ?\(?\d{4}-\d\d-\d\dT[\d:.]+Z\)?/g, "")
    .replace(/\. Resolution note: .*$/s, "")
    .trim();
}

/** A signal that aborts with either of two; `release` ends its hold on them (Node 20's `any` keeps it). */
function either(a: AbortSignal, b: AbortSignal): { signal: AbortSignal; release: () => void } {
  const both = new AbortController();
  const abort = () => both.abort();
  a.addEventListener("abort", abort);
  b.addEventListener("abort", abort);
  if (a.aborted || b.aborted) abort();
  return {
    signal: both.signal,
    release() {
      a.removeEventListener("abort", abort);
      b.removeEventListener("abort", abort);
    },
  };
}

/** Resolves as `promise` does, or with undefined as soon as `stop` aborts. */
async function race<T>(promise: Promise<T>, stop: AbortSignal): Promise<T | undefined> {
  let stopped: () => void = () => undefined;
  const end = new Promise<undefined>((resolve) => {
    stopped = () => resolve(undefined);
    stop.addEventListener("abort", stopped);
  });
  if (stop.aborted) stopped();
  try {
    return await Promise.race([promise, end]);
  } finally {
    stop.removeEventListener("abort", stopped);
  }
}

/** Fails a call that outlives its own deadline, whatever the library or a stepped clock makes of that. */
async function timely<T>(call: Promise<T>, endpoint: string): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`deadline exceeded at ${endpoint}`)), ANSWER_MS * 2);
  });
  try {
    return await Promise.race([call, late]);
  } finally {
    clearTimeout(timer);
  }
}

/**
 * Milliseconds to wait after so many rounds of failures at all endpoints: between half and all of 100 ms doubling up to
 * 5 s, as `random` (0 to 1) says, so that the nodes of a cluster do not come back to its etcd in step.
 */
export function backoffMs(round: number, random: number): number {
  const ceiling = Math.min(BACKOFF_MAX_MS, BACKOFF_MIN_MS * 2 ** Math.min(Math.max(0, round), 16));
  return ceiling * (0.5 + random / 2);
}

/** Waits longer with each round of failures. */
async function pause(round: number, stop: AbortSignal): Promise<void> {
  let timer: NodeJS.Timeout | undefined;
  const rest = new Promise<void>((resolve) => {
    timer = setTimeout(resolve, backoffMs(round, Math.random()));
  });
  await race(rest, stop);
  clearTimeout(timer);
}

/** Reads the credential files and proves what can be proved about them without etcd. */
function readCredentials(options: StoreOptions): { credentials: Credentials; digest: string } {
  const { keyFile, certFile, caFile } = options;
  if (Boolean(keyFile) !== Boolean(certFile)) {
    const [given, missing] = keyFile
      ? [`the key ${keyFile}`, "--etcd-certfile"]
      : [`the certificate ${certFile}`, "--etcd-keyfile"];
    throw new StoreError("credentials", `${given} is of no use alone: give ${missing} too`);
  }
  const rootCertificate = caFile ? readPem("CA file", caFile) : systemCertificates();
  if (caFile) checkAuthorities(caFile, rootCertificate);
  const hash = createHash("sha256").update(rootCertificate);
  if (!keyFile || !certFile) return { credentials: { rootCertificate }, digest: hash.digest("hex") };
  const certChain = readPem("certificate", certFile);
  const privateKey = readPem("key", keyFile);
  const certificate = parseCertificate(certFile, certChain);
  checkValidity("client certificate", certFile, certificate);
  let matches: boolean;
  try {
    matches = certificate.checkPrivateKey(createPrivateKey(privateKey));
  } catch (error) {
    throw new StoreError(
      "credentials",
      `the key ${keyFile} cannot be read as a PEM private key without a passphrase (${messageOf(error)}): give such a key`,
      { cause: error },
    );
  }
  if (!matches) {
    throw new StoreError(
      "credentials",
      `the key ${keyFile} does not belong to the certificate ${certFile}: give the two that were made together`,
    );
  }
  const digest = hash.update(certChain).update(privateKey).digest("hex");
  return { credentials: { rootCertificate, certChain, privateKey }, digest };
}

function readPem(what: string, path: string): Buffer {
  try {
    return readFileSync(path);
  } catch (error) {
    throw new StoreError(
      "credentials",
      `the etcd ${what} ${path} cannot be read (${messageOf(error)}): check the path and its permissions`,
      { cause: error },
    );
  }
}

/** Like flannel's own TLS, we trust the system's store when no CA is named. */
function systemCertificates(): Buffer {
  try {
    return readFileSync(SYSTEM_CA_FILE);
  } catch {
    return Buffer.from(rootCertificates.join("\n"));
  }
}

function parseCertificate(path: string, pem: Buffer | string): X509Certificate {
  try {
    return new X509Certificate(pem);
  } catch (error) {
    throw new StoreError(
      "credentials",
      `${path} holds no PEM certificate that can be read (${messageOf(error)}): give one that starts with BEGIN CERTIFICATE`,
      { cause: error },
    );
  }
}

function checkValidity(what: string, path: string, certificate: X509Certificate): void {
  const now = Date.now();
  if (now > Date.parse(certificate.validTo)) {
    throw new StoreError("credentials", `the ${what} ${path} expired on ${certificate.validTo}: renew it`);
  }
  if (now < Date.parse(certificate.validFrom)) {
    throw new StoreError(
      "credentials",
      `the ${what} ${path} is valid only from ${certificate.validFrom}: check this node's clock`,
    );
  }
}

/** A bundle may keep an expired CA beside its successor; it must hold one that is in force. */
function checkAuthorities(path: string, pem: Buffer): void {
  const blocks = pem.toString("latin1").match(/-----BEGIN [^-]*CERTIFICATE-----[^-]+-----END [^-]*-----/g);
  const authorities = (blocks ?? [pem.toString("latin1")]).map((block) => parseCertificate(path, block));
  const now = Date.now();
  const inForce = authorities.some(
    ({ validFrom, validTo }) => Date.parse(validFrom) <= now && now <= Date.parse(validTo),
  );
  const [first] = authorities;
  if (!inForce && first) checkValidity("CA certificate", path, first);
}
