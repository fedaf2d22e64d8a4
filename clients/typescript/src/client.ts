// The client of a store: every rpc by its service, and what is worth doing for the caller on top.

import type { MessageInitShape } from "@bufbuild/protobuf";
import { create } from "@bufbuild/protobuf";
import { createHash } from "node:crypto";
import { Connection, ENDLESS } from "./connection.js";
import { Code, storeError, Unimplemented } from "./errors.js";
import type { Payload } from "./gen/agl_grpc/v1/common_pb.js";
import { PayloadSchema } from "./gen/agl_grpc/v1/common_pb.js";
import type { Rollout } from "./gen/agl_grpc/v1/rollout_pb.js";
import type { RolloutSpecSchema } from "./gen/agl_grpc/v1/rollout_pb.js";
import { RolloutSpecSchema as Spec } from "./gen/agl_grpc/v1/rollout_pb.js";
import type {
  ExportSpansResponse,
  GetServerInfoResponse,
  WatchAttemptsResponse,
  WatchResourcesResponse,
  WatchRolloutsResponse,
  WatchSpansResponse,
} from "./gen/agl_grpc/v1/store_service_pb.js";
import {
  ExportSpansRequestSchema,
  WaitUntil,
  WatchAttemptsRequestSchema,
  WatchResourcesRequestSchema,
  WatchRolloutsRequestSchema,
  WatchSpansRequestSchema,
} from "./gen/agl_grpc/v1/store_service_pb.js";
import type { LeaseStreamOptions } from "./lease_stream.js";
import { LeaseStream } from "./lease_stream.js";
import { isTransient } from "./errors.js";
import { pause, waitAfter } from "./retry.js";
import type { SpanStreamerOptions } from "./span_streamer.js";
import { SpanStreamer } from "./span_streamer.js";
import { fromPayload, toDuration, toPayload } from "./values.js";
import { resumed } from "./watch.js";

const CONTRACT_VERSION = "v1";
const INLINE_BYTES = 1 << 20;
const LONGEST_WAIT_MS = 50_000;

/** How long a watch or an export goes on. */
export interface StreamOptions {
  readonly signal?: AbortSignal;
}

/** A rollout to be made: the task as any JSON value, and the contract's other fields. */
export type Task = Omit<MessageInitShape<typeof RolloutSpecSchema>, "input" | "$typeName"> & { readonly input: unknown };

/**
 * A client of a store.
 *
 * `client.store`, `client.runner` and `client.trainer` are the contract's services with every rpc:
 * calls mint their request id, are tried again while that is safe, end by their deadline
 * (`retry.timeoutMs`, or `timeoutMs` and `signal` of the call), and throw `StoreError`. The methods
 * below add what takes more than one call.
 */
export class StoreClient extends Connection {
  /**
   * Makes sure that the server speaks this contract and has these capabilities, and answers what it is. Else throws
   * `Unimplemented`; `info` has its `contract_version` and, in `missing`, what it lacks, with commas between them.
   */
  async require(...capabilities: readonly string[]): Promise<GetServerInfoResponse> {
    const found = await this.store.getServerInfo({});
    const missing = capabilities.filter((name) => !found.capabilities.includes(name)).join(",");
    const speaks = found.contractVersion === CONTRACT_VERSION;
    if (speaks && !missing) return found;
    const lack = speaks ? `lacks ${missing}` : `speaks contract ${found.contractVersion || "unknown"}, not ${CONTRACT_VERSION}`;
    const info = { contract_version: found.contractVersion, missing };
    const message = `the store at ${this.target} is of version ${found.serverVersion} and ${lack}`;
    throw new Unimplemented(message, Code.Unimplemented, { reason: "METHOD_UNIMPLEMENTED", info });
  }

  /** Puts tasks into a queue, all or none; inputs above 1 MiB become blobs. */
  async enqueue(tasks: readonly Task[], runId = this.runId): Promise<Rollout[]> {
    const rollouts = await Promise.all(
      tasks.map(async ({ input, ...rest }) => create(Spec, { ...rest, input: await this.payload(input) })),
    );
    return (await this.store.enqueueRollouts({ runId, rollouts })).rollouts;
  }

  /**
   * Waits until all rollouts are finished, or `until: SEALED`; answers those that are when the time
   * is over. Unknown ids are ignored.
   */
  async waitForRollouts(
    rolloutIds: readonly string[],
    options: { readonly until?: WaitUntil; readonly timeoutMs?: number; readonly signal?: AbortSignal } = {},
  ): Promise<Rollout[]> {
    const deadline = performance.now() + (options.timeoutMs ?? Infinity); // the clock of the day may jump
    for (;;) {
      const left = Math.max(0, Math.min(LONGEST_WAIT_MS, deadline - performance.now()));
      const answer = await this.store.waitRollouts(
        {
          rolloutIds: [...rolloutIds],
          until: options.until ?? WaitUntil.TERMINAL,
          timeout: toDuration(left),
        },
        options.signal ? { signal: options.signal } : {},
      );
      if (answer.complete || performance.now() >= deadline) return answer.rollouts;
    }
  }

  /** A JSON value as a payload; above 1 MiB it is stored as a blob. */
  async payload(value: unknown): Promise<Payload> {
    const payload = toPayload(value);
    if (payload.content.case !== "data" || payload.content.value.length <= INLINE_BYTES) return payload;
    const blobDigest = await this.putBlob(payload.content.value);
    return create(PayloadSchema, { content: { case: "blobDigest", value: blobDigest } });
  }

  /** The value of a payload, read from its blob if need be; `undefined` when there is none. */
  async load(payload: Payload | undefined): Promise<unknown> {
    if (payload?.content.case !== "blobDigest") return fromPayload(payload);
    const value = await this.getBlob(payload.content.value);
    return fromPayload(create(PayloadSchema, { mediaType: payload.mediaType, content: { case: "data", value } }));
  }

  /** Stores bytes under the hash of their content; answers `sha256:…`. */
  async putBlob(data: Uint8Array): Promise<string> {
    const digest = `sha256:${createHash("sha256").update(data).digest("hex")}`;
    for (let tries = 0, deadline = performance.now() + this.retry.timeoutMs; ; tries++) {
      try {
        return (await this.store.putBlob(blobPieces(digest, data))).digest;
      } catch (failure) {
        const error = storeError(failure, this.target);
        const wait = error.retryAfterMs ?? waitAfter(this.retry, tries);
        if (!isTransient(error) || performance.now() + wait > deadline) throw error;
        await pause(wait);
      }
    }
  }

  /** A blob's content. */
  async getBlob(digest: string): Promise<Uint8Array> {
    const chunks: Uint8Array[] = [];
    let offset = 0n;
    const pieces = resumed(
      (signal) => this.store.getBlob({ digest, offset }, { ...ENDLESS, signal }),
      ({ chunk }) => {
        offset += BigInt(chunk.length);
      },
      this,
      false,
    );
    for await (const { chunk } of pieces) chunks.push(chunk);
    return Buffer.concat(chunks);
  }

  /** Rollouts as they change, for ever; resumes after disconnects without a gap or a repeat. */
  async *watchRollouts(
    init: MessageInitShape<typeof WatchRolloutsRequestSchema> = {},
    options: StreamOptions = {},
  ): AsyncGenerator<WatchRolloutsResponse, void> {
    const request = create(WatchRolloutsRequestSchema, init);
    if (!request.includeExisting) request.cursor ||= await this.#position();
    yield* this.#watch((signal) => this.store.watchRollouts(request, { ...ENDLESS, signal }), request, options);
  }

  /** Attempts as they change, for ever. */
  async *watchAttempts(
    init: MessageInitShape<typeof WatchAttemptsRequestSchema> = {},
    options: StreamOptions = {},
  ): AsyncGenerator<WatchAttemptsResponse, void> {
    const request = create(WatchAttemptsRequestSchema, { runId: this.runId, ...init });
    request.cursor ||= await this.#position();
    yield* this.#watch((signal) => this.store.watchAttempts(request, { ...ENDLESS, signal }), request, options);
  }

  /** Spans as they arrive, for ever. */
  async *watchSpans(
    init: MessageInitShape<typeof WatchSpansRequestSchema> = {},
    options: StreamOptions = {},
  ): AsyncGenerator<WatchSpansResponse, void> {
    const request = create(WatchSpansRequestSchema, { runId: this.runId, ...init });
    request.cursor ||= await this.#position();
    yield* this.#watch((signal) => this.store.watchSpans(request, { ...ENDLESS, signal }), request, options);
  }

  /** Publications of resources as they are made, for ever. */
  async *watchResources(
    init: MessageInitShape<typeof WatchResourcesRequestSchema> = {},
    options: StreamOptions = {},
  ): AsyncGenerator<WatchResourcesResponse, void> {
    const request = create(WatchResourcesRequestSchema, { runId: this.runId, ...init });
    if (!request.includeLatest) request.cursor ||= await this.#position();
    yield* this.#watch((signal) => this.store.watchResources(request, { ...ENDLESS, signal }), request, options);
  }

  /** Spans of many rollouts, once through; resumes after disconnects. */
  async *exportSpans(
    init: MessageInitShape<typeof ExportSpansRequestSchema> = {},
    options: StreamOptions = {},
  ): AsyncGenerator<ExportSpansResponse, void> {
    const request = create(ExportSpansRequestSchema, { runId: this.runId, ...init });
    const open = (signal: AbortSignal) => this.store.exportSpans(request, { ...ENDLESS, signal });
    const advance = (message: ExportSpansResponse): void => {
      request.cursor = message.cursor;
    };
    yield* resumed(open, advance, { target: this.target, retry: this.retry, signal: options.signal }, false);
  }

  /** Work pushed to one worker as long as credits last. */
  leases(options: LeaseStreamOptions): LeaseStream {
    return new LeaseStream(this, options);
  }

  /** A producer of spans: durable acknowledgements, resumed after disconnects. */
  spans(options: SpanStreamerOptions = {}): SpanStreamer {
    return new SpanStreamer(this, options);
  }

  async #position(): Promise<bigint> {
    // "From now on" is fixed here: a stream that breaks before its first message leaves no gap.
    return (await this.store.getLatestResources({ runId: this.runId })).position;
  }

  #watch<T extends { cursor: bigint }>(
    open: (signal: AbortSignal) => AsyncIterable<T>,
    request: { cursor: bigint; includeExisting?: boolean; includeLatest?: boolean },
    options: StreamOptions,
  ): AsyncGenerator<T, void> {
    const advance = ({ cursor }: T): void => {
      if (cursor === 0n) return; // what was there already: after a break all of it comes again
      request.cursor = cursor;
      if (request.includeExisting) request.includeExisting = false;
      if (request.includeLatest) request.includeLatest = false;
    };
    return resumed(open, advance, { target: this.target, retry: this.retry, signal: options.signal }, true);
  }
}

async function* blobPieces(digest: string, data: Uint8Array) {
  yield { message: { case: "digest" as const, value: digest } };
  for (let start = 0; start < data.length; start += INLINE_BYTES) {
    yield { message: { case: "chunk" as const, value: data.subarray(start, start + INLINE_BYTES) } };
  }
}
