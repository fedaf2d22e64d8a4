// One HTTP/2 connection to a store, its services, and what every call on it has in common.

import type { DescService } from "@bufbuild/protobuf";
import type { Client, Interceptor, Transport } from "@connectrpc/connect";
import { createClient } from "@connectrpc/connect";
import { createGrpcTransport, Http2SessionManager } from "@connectrpc/connect-node";
import { RunnerService } from "./gen/agl_grpc/v1/runner_service_pb.js";
import { StoreService } from "./gen/agl_grpc/v1/store_service_pb.js";
import { TrainerService } from "./gen/agl_grpc/v1/trainer_service_pb.js";
import { MAX_MESSAGE_BYTES, storeError } from "./errors.js";
import type { RetryPolicy } from "./retry.js";
import { DEFAULT_RETRY, retrying } from "./retry.js";

/** How to reach a store. */
export interface ConnectionOptions {
  /** The run that helpers name when a call names none; default `default`. */
  readonly runId?: string;
  /** Bearer credential. */
  readonly credential?: string;
  /** TLS; `true` = the system's authorities, else PEM texts of an authority and of a client's certificate. */
  readonly tls?: boolean | { readonly ca?: string; readonly cert?: string; readonly key?: string };
  /** How calls are tried again. */
  readonly retry?: Partial<RetryPolicy>;
}

/** The services of one store. Calls are typed, tried again by their retry class, and bounded in time. */
export class Connection {
  readonly target: string;
  readonly runId: string;
  readonly retry: RetryPolicy;
  /** StoreService, complete. */
  readonly store: Client<typeof StoreService>;
  /** RunnerService, complete. */
  readonly runner: Client<typeof RunnerService>;
  /** TrainerService, complete. */
  readonly trainer: Client<typeof TrainerService>;
  readonly #session: Http2SessionManager;

  /** `target` is `host:port`. Connects at the first call. */
  constructor(target: string, options: ConnectionOptions = {}) {
    if (!/^(\[[0-9a-fA-F:]+\]|[^\s:/]+):\d{1,5}$/.test(target)) {
      throw new TypeError(`the store's address is "${target}"; it has to be host:port, for example 127.0.0.1:4747`);
    }
    this.target = target;
    this.runId = options.runId ?? "default";
    this.retry = { ...DEFAULT_RETRY, ...options.retry };
    const baseUrl = `${options.tls ? "https" : "http"}://${target}`;
    const nodeOptions = typeof options.tls === "object" ? options.tls : {};
    this.#session = new Http2SessionManager(baseUrl, { pingIntervalMs: 30_000, pingTimeoutMs: 10_000 }, nodeOptions);
    const transport = createGrpcTransport({
      baseUrl,
      sessionManager: this.#session,
      interceptors: [retrying(this.retry, target), ...authorised(options.credential)],
      defaultTimeoutMs: this.retry.timeoutMs,
      readMaxBytes: MAX_MESSAGE_BYTES,
      writeMaxBytes: MAX_MESSAGE_BYTES,
    });
    this.store = typed(StoreService, transport, target);
    this.runner = typed(RunnerService, transport, target);
    this.trainer = typed(TrainerService, transport, target);
  }

  /** Closes the connection; calls under way fail. */
  close(): void {
    this.#session.abort();
  }
}

type Call = (request: unknown, options?: unknown) => Promise<unknown> | AsyncIterable<unknown>;

/** A client whose calls fail with `StoreError`s, also where the transport itself ends them. */
function typed<S extends DescService>(service: S, transport: Transport, target: string): Client<S> {
  const calls = createClient(service, transport) as Record<string, Call>;
  const wrapped = service.methods.map(({ localName, methodKind }) => {
    const call = calls[localName]!;
    const streams = methodKind === "server_streaming" || methodKind === "bidi_streaming";
    const unary: Call = (request, options) => (call(request, options) as Promise<unknown>).catch((failure: unknown) => {
      throw storeError(failure, target);
    });
    const stream: Call = (request, options) => typedStream(call(request, options) as AsyncIterable<unknown>, target);
    return [localName, streams ? stream : unary];
  });
  return Object.fromEntries(wrapped) as Client<S>;
}

async function* typedStream<T>(messages: AsyncIterable<T>, target: string): AsyncGenerator<T, void> {
  try {
    yield* messages;
  } catch (failure) {
    throw storeError(failure, target);
  }
}

function authorised(credential: string | undefined): Interceptor[] {
  if (!credential) return [];
  return [
    (next) => (request) => {
      request.header.set("authorization", `Bearer ${credential}`);
      return next(request);
    },
  ];
}

/** Options of a call that lasts until it is ended: no deadline. */
export const ENDLESS = { timeoutMs: 0 } as const;
