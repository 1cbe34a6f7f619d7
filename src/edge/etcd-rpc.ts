/**
 * The calls of etcd v3 that we make, over gRPC: one connection to one member, without retries, which are the store's.
 * Failures are gRPC's own, as `1 NAME: what etcd said`.
 */
import grpc, { type ChannelOptions, type ClientDuplexStream, type Client as GrpcClient } from "@grpc/grpc-js";
import {
  AUTHENTICATE_REQUEST,
  AUTHENTICATE_RESPONSE,
  decodeMessage,
  encodeMessage,
  LEASE_GRANT_REQUEST,
  LEASE_GRANT_RESPONSE,
  LEASE_REQUEST,
  LEASE_TIME_TO_LIVE_RESPONSE,
  NOTHING,
  RANGE_REQUEST,
  RANGE_RESPONSE,
  type RangeRequest,
  type RangeResponse,
  type Schema,
  TXN_REQUEST,
  TXN_RESPONSE,
  type TxnRequest,
  type TxnResponse,
  WATCH_REQUEST,
  WATCH_RESPONSE,
  type WatchRequest,
  type WatchResponse,
} from "./etcd-codec.ts";

/** PEM; the key and the certificate only together. */
export interface Credentials {
  readonly rootCertificate: Buffer;
  readonly privateKey?: Buffer;
  readonly certChain?: Buffer;
}

/** Requests go in by `write`, answers come out as a stream of objects; `cancel` ends it, which is reported as an error. */
export type WatchStream = ClientDuplexStream<WatchRequest, WatchResponse>;

const PACKAGE = "etcdserverpb";

export class EtcdRpc {
  readonly #client: GrpcClient;
  readonly #deadlineMs: number;
  /** Sent with each call from when it is set, where etcd asks for a user. */
  token: string | undefined;

  /** `address` is `host:port`; without credentials it is spoken to in the clear. Connects with the first call. */
  constructor(
    address: string,
    credentials: Credentials | undefined,
    channel: ChannelOptions,
    deadlineMs: number,
  ) {
    const { rootCertificate = null, privateKey = null, certChain = null } = credentials ?? {};
    this.#client = new grpc.Client(
      address,
      credentials === undefined
        ? grpc.credentials.createInsecure()
        : grpc.credentials.createSsl(rootCertificate, privateKey, certChain),
      channel,
    );
    this.#deadlineMs = deadlineMs;
  }

  range(request: RangeRequest): Promise<RangeResponse> {
    return this.#call("KV/Range", RANGE_REQUEST, RANGE_RESPONSE, request);
  }

  txn(request: TxnRequest): Promise<TxnResponse> {
    return this.#call("KV/Txn", TXN_REQUEST, TXN_RESPONSE, request);
  }

  /** Seconds; the answer is the lease's id. */
  async leaseGrant(ttlSeconds: number): Promise<bigint> {
    const request = { TTL: BigInt(ttlSeconds) };
    const { ID } = await this.#call<{ ID: bigint }>(
      "Lease/LeaseGrant",
      LEASE_GRANT_REQUEST,
      LEASE_GRANT_RESPONSE,
      request,
    );
    return ID;
  }

  leaseRevoke(id: bigint): Promise<object> {
    return this.#call("Lease/LeaseRevoke", LEASE_REQUEST, NOTHING, { ID: id });
  }

  /** Seconds that a lease has left; negative if there is no such lease. */
  async leaseTimeToLive(id: bigint): Promise<number> {
    const request = { ID: id };
    const { TTL } = await this.#call<{ TTL: bigint }>(
      "Lease/LeaseTimeToLive",
      LEASE_REQUEST,
      LEASE_TIME_TO_LIVE_RESPONSE,
      request,
    );
    return Number(TTL);
  }

  /** The token of a user. */
  async authenticate(name: string, password: string): Promise<string> {
    const { token } = await this.#call<{ token: string }>(
      "Auth/Authenticate",
      AUTHENTICATE_REQUEST,
      AUTHENTICATE_RESPONSE,
      { name, password },
    );
    return token;
  }

  watch(): WatchStream {
    const metadata = this.#metadata();
    // A member that was cut off from the others ends the watch then, in place of staying silent.
    metadata.set("hasleader", "true");
    return this.#client.makeBidiStreamRequest<WatchRequest, WatchResponse>(
      `/${PACKAGE}.Watch/Watch`,
      (request) => encodeMessage(WATCH_REQUEST, request),
      (bytes) => decodeMessage(WATCH_RESPONSE, bytes),
      metadata,
    );
  }

  close(): void {
    this.#client.close();
  }

  #metadata() {
    const metadata = new grpc.Metadata();
    if (this.token !== undefined) metadata.set("token", this.token);
    return metadata;
  }

  #call<Answer>(method: string, asked: Schema, answered: Schema, request: object): Promise<Answer> {
    return new Promise((resolve, reject) => {
      this.#client.makeUnaryRequest<object, Answer>(
        `/${PACKAGE}.${method}`,
        (message) => encodeMessage(asked, message),
        (bytes) => decodeMessage(answered, bytes),
        request,
        this.#metadata(),
        { deadline: Date.now() + this.#deadlineMs },
        (error, answer) => {
          if (error === null) resolve(answer as Answer);
          else reject(error);
        },
      );
    });
  }
}
