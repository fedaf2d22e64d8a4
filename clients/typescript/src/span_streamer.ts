// A producer of spans: one stream, numbered messages, durable acknowledgements, resume after disconnects.

import type { MessageInitShape } from "@bufbuild/protobuf";
import { create, toBinary } from "@bufbuild/protobuf";
import { BinaryWriter, WireType } from "@bufbuild/protobuf/wire";
import { Code } from "@connectrpc/connect";
import { randomUUID } from "node:crypto";
import { setImmediate as turn } from "node:timers/promises";
import type { Connection } from "./connection.js";
import { ENDLESS } from "./connection.js";
import { InvalidRequest, isTransient, itemError, storeError, StoreError, StreamFenced } from "./errors.js";
import { Durability } from "./gen/agl_grpc/v1/common_pb.js";
import type { AttemptSpans } from "./gen/agl_grpc/v1/span_pb.js";
import { AttemptSpansSchema, SpanSchema } from "./gen/agl_grpc/v1/span_pb.js";
import type { SpanStreamAck, SpanStreamOpened, StreamSpansRequest } from "./gen/agl_grpc/v1/store_service_pb.js";
import { SpanStreamMessageSchema, StreamSpansRequestSchema } from "./gen/agl_grpc/v1/store_service_pb.js";
import { AsyncQueue, Signal } from "./queue.js";
import { pause, waitAfter } from "./retry.js";
import { spanMessage } from "./span_message.js";

const MAX_SPANS = 1000;
const MAX_BYTES = 1 << 20;
const MAX_SPAN_BYTES = 4 << 20;
const TRIES_OF_A_REFUSED_STREAM = 5;
const NO_CALLS = { openCalls: [], abandonedCalls: [] };
const GROUPS = SpanStreamMessageSchema.field.groups.number;

export interface SpanStreamerOptions {
  /** Two streamers with one id fence each other; default: a new id. */
  readonly producerId?: string;
  /** Bytes held while the store is away; then callers wait. Default 64 MiB. */
  readonly maxBufferBytes?: number;
}

/** Spans of one attempt, and model calls of it that begin or were given up. */
export type SpanGroup = MessageInitShape<typeof AttemptSpansSchema>;

/** A span that the store did not keep. */
export interface SpanRejection {
  readonly groupIndex: number;
  /** Place in the group; -1 = the whole group, -2 = an announcement. */
  readonly index: number;
  readonly spanId: Uint8Array;
  readonly error: StoreError;
}

/** Everything that is not in `rejected` is stored, as durably as `durability` says. */
export interface SpanAck {
  readonly durability: Durability;
  readonly rejected: readonly SpanRejection[];
}

interface Submission {
  readonly rejected: SpanRejection[];
  readonly resolve: (ack: SpanAck) => void;
  readonly reject: (error: unknown) => void;
  partsLeft: number;
  durability: Durability;
}

interface Part {
  /** The part as an `AttemptSpans` with its length before it: encoded once, however often it is sent. */
  readonly wire: Uint8Array;
  readonly spanCount: number;
  /** The first span's id, to name it by when it is refused here. */
  readonly firstId: Uint8Array;
  readonly groupIndex: number;
  /** Where the part's first span stands in the caller's group. */
  readonly firstSpan: number;
  readonly submission: Submission;
}

interface Sent {
  sequence: bigint;
  readonly parts: readonly Part[];
  readonly size: number;
  rejected: SpanRejection[][];
}

/**
 * Sends spans to the store over one stream and says when they are on disk.
 *
 * What is not acknowledged when the stream breaks is sent again on the next one; the store knows
 * spans by their own ids, so each is kept exactly once. Sending goes on while the store is away.
 */
export class SpanStreamer {
  readonly producerId: string;
  readonly #connection: Connection;
  readonly #limit: number;
  readonly #inbox: Part[] = [];
  readonly #inFlight: Sent[] = [];
  readonly #arrived = new Signal();
  readonly #progress = new Signal();
  readonly #stop = new AbortController();
  #outgoing: AsyncQueue<StreamSpansRequest> | undefined;
  #buffered = 0;
  #inFlightBytes = 0;
  #sequence = 0n;
  #acknowledged = 0;
  #error: unknown;
  #task: Promise<void> | undefined;
  #opened = false;
  #draining = false;

  constructor(connection: Connection, options: SpanStreamerOptions = {}) {
    this.producerId = options.producerId ?? `ts-${randomUUID()}`;
    this.#connection = connection;
    this.#limit = options.maxBufferBytes ?? 64 << 20;
  }

  /** Bytes taken and not yet acknowledged. */
  get bufferedBytes(): number {
    return this.#buffered;
  }

  /**
   * Sends spans and waits until they are on disk; waits for room in the buffer first. Throws
   * `StreamFenced` when another streamer took the producer id over.
   */
  async send(...groups: readonly SpanGroup[]): Promise<SpanAck> {
    const split = groups.map((group) => splitGroup(create(AttemptSpansSchema, { ...group, spans: (group.spans ?? []).map(spanMessage) })));
    const size = split.flat().reduce((sum, piece) => sum + piece.wire.length, 0);
    while (this.#error === undefined && this.#buffered > 0 && this.#buffered + size > this.#limit) await this.#progress.wait();
    if (this.#error !== undefined) throw this.#error;
    this.#task ??= this.#run();
    return new Promise((resolve, reject) => {
      const submission: Submission = { rejected: [], resolve, reject, partsLeft: 0, durability: Durability.UNSPECIFIED };
      split.forEach((pieces, groupIndex) => {
        for (const piece of pieces) this.#take({ ...piece, groupIndex, submission });
      });
      if (submission.partsLeft === 0) resolve({ durability: submission.durability, rejected: submission.rejected });
      this.#arrived.pulse();
    });
  }

  /** Waits until everything that was handed over is settled; throws what ended the streamer. */
  async flush(): Promise<void> {
    while (this.#error === undefined && this.#inbox.length + this.#inFlight.length > 0) await this.#progress.wait();
    if (this.#error !== undefined) throw this.#error;
  }

  /** Flushes and stops; after `timeoutMs` what is left is given up, with an error. */
  async close({ timeoutMs = 30_000 }: { readonly timeoutMs?: number } = {}): Promise<void> {
    if (!this.#task) return;
    let timer: NodeJS.Timeout | undefined;
    const late = new Promise<never>((_resolve, reject) => {
      const give = (): void => reject(new Error(`${this.#buffered} bytes of spans were not stored within ${timeoutMs} ms and are given up`));
      timer = setTimeout(give, timeoutMs);
    });
    try {
      if (this.#error === undefined) await Promise.race([this.flush(), late]);
    } finally {
      clearTimeout(timer);
      this.#stop.abort();
      this.#outgoing?.end();
      this.#pulse();
      this.#fail(new Error("the SpanStreamer is closed"));
      await this.#task;
    }
  }

  #take(part: Part): void {
    if (part.wire.length > MAX_SPAN_BYTES) {
      part.submission.rejected.push(tooLarge(part));
      return;
    }
    part.submission.partsLeft++;
    this.#buffered += part.wire.length;
    this.#inbox.push(part);
  }

  #pulse(): void {
    this.#arrived.pulse();
    this.#progress.pulse();
  }

  async #run(): Promise<void> {
    const signal = this.#stop.signal;
    for (let tries = 0, refusals = 0; !signal.aborted; ) {
      this.#opened = false;
      const before = this.#acknowledged;
      let wait: number | undefined;
      try {
        await this.#session();
        tries = 0;
      } catch (failure) {
        if (signal.aborted) return;
        const error = storeError(failure, this.#connection.target);
        tries = this.#opened ? 0 : tries + 1;
        refusals = isTransient(error) || this.#acknowledged > before ? 0 : refusals + 1;
        if (error instanceof StreamFenced || refusals >= TRIES_OF_A_REFUSED_STREAM) return this.#fail(error);
        wait = error.retryAfterMs;
      }
      await pause(wait ?? waitAfter(this.#connection.retry, tries), signal);
    }
  }

  async #session(): Promise<void> {
    const outgoing = new AsyncQueue<StreamSpansRequest>();
    this.#outgoing = outgoing;
    this.#draining = false;
    for (const sent of this.#inFlight) sent.sequence = 0n; // not on this stream yet
    const open = { producerId: this.producerId, resume: true };
    outgoing.push(create(StreamSpansRequestSchema, { message: { case: "open", value: open } }));
    const call = this.#connection.store.streamSpans(outgoing, { ...ENDLESS, signal: this.#stop.signal });
    try {
      for await (const { message } of call) {
        if (message.case === "opened") {
          this.#opened = true;
          void this.#write(outgoing, message.value);
        } else if (message.case === "ack") {
          this.#settle(message.value);
        } else if (message.case === "drain") {
          this.#draining = true;
          this.#pulse();
        }
      }
    } finally {
      if (this.#outgoing === outgoing) this.#outgoing = undefined;
      outgoing.end();
      this.#pulse();
    }
  }

  async #write(outgoing: AsyncQueue<StreamSpansRequest>, opened: SpanStreamOpened): Promise<void> {
    // Numbers begin anew: a message is answered for again, so that no rejection is lost with its ack.
    if (opened.lastSequence > this.#sequence) this.#sequence = opened.lastSequence;
    for (const sent of [...this.#inFlight]) {
      sent.rejected = sent.parts.map(() => []);
      this.#put(outgoing, sent);
    }
    const current = (): boolean => this.#outgoing === outgoing && !this.#draining;
    while (current()) {
      if (this.#inbox.length === 0) {
        await this.#arrived.wait();
        await turn(); // what is handed over in the same turn travels together
      } else if (!this.#fits(opened)) {
        await this.#progress.wait();
      } else {
        const parts = this.#nextParts();
        const sent: Sent = { sequence: 0n, parts, size: sizeOf(parts), rejected: parts.map(() => []) };
        this.#inFlight.push(sent);
        this.#inFlightBytes += sent.size;
        this.#put(outgoing, sent);
      }
    }
    outgoing.end();
  }

  #put(outgoing: AsyncQueue<StreamSpansRequest>, sent: Sent): void {
    sent.sequence = ++this.#sequence;
    const value = create(SpanStreamMessageSchema, { sequence: sent.sequence });
    // As fields that need no encoding any more: protobuf writes unknown ones as they are.
    value.$unknown = sent.parts.map(({ wire }) => ({ no: GROUPS, wireType: WireType.LengthDelimited, data: wire }));
    outgoing.push(create(StreamSpansRequestSchema, { message: { case: "spans", value } }));
  }

  #fits({ maxInFlightBytes, maxInFlightMessages }: SpanStreamOpened): boolean {
    if (this.#inFlight.length === 0) return true;
    const next = this.#inbox[0]?.wire.length ?? 0;
    if (maxInFlightBytes > 0n && this.#inFlightBytes + next > Number(maxInFlightBytes)) return false;
    return maxInFlightMessages === 0 || this.#inFlight.length < maxInFlightMessages;
  }

  #nextParts(): Part[] {
    let size = 0;
    let spans = 0;
    let count = 0;
    for (const part of this.#inbox) {
      size += part.wire.length;
      spans += part.spanCount;
      if (count > 0 && (size > MAX_BYTES || spans > MAX_SPANS)) break;
      count++;
    }
    return this.#inbox.splice(0, count);
  }

  #settle(ack: SpanStreamAck): void {
    for (const { sequence, span } of ack.rejected) {
      const sent = this.#inFlight.find((one) => one.sequence === sequence);
      const part = span && sent?.parts[span.groupIndex];
      if (!part || !span?.status) continue;
      const index = span.index < 0 ? span.index : part.firstSpan + span.index;
      const rejection = { groupIndex: part.groupIndex, index, spanId: span.spanId, error: itemError(span.status) };
      sent.rejected[span.groupIndex]?.push(rejection);
    }
    while (this.#inFlight[0] && this.#inFlight[0].sequence > 0n && this.#inFlight[0].sequence <= ack.sequence) {
      const sent = this.#inFlight.shift()!;
      this.#acknowledged++;
      this.#inFlightBytes -= sent.size;
      sent.parts.forEach((part, place) => this.#settlePart(part, sent.rejected[place] ?? [], ack.durability));
    }
    this.#pulse();
  }

  #settlePart(part: Part, rejected: readonly SpanRejection[], durability: Durability): void {
    const { submission } = part;
    this.#buffered -= part.wire.length;
    submission.rejected.push(...rejected);
    // The weakest promise among the parts is the one that holds.
    const weaker = submission.durability === Durability.UNSPECIFIED || durability < submission.durability;
    if (weaker) submission.durability = durability;
    if (--submission.partsLeft === 0) submission.resolve({ durability: submission.durability, rejected: submission.rejected });
  }

  #fail(error: unknown): void {
    this.#error ??= error;
    const parts = [...this.#inFlight.flatMap((sent) => sent.parts), ...this.#inbox];
    this.#inFlight.length = 0;
    this.#inbox.length = 0;
    this.#buffered = 0;
    for (const { submission } of parts) submission.reject(this.#error);
    this.#pulse();
  }
}

type Piece = Omit<Part, "groupIndex" | "submission">;

/** Cuts a group into parts that fit into one message each; announcements go with the first. */
function splitGroup(group: AttemptSpans): Piece[] {
  if (group.spans.length <= MAX_SPANS) {
    const whole = piece(group, 0);
    if (whole.wire.length <= MAX_BYTES) return [whole];
  }
  const sizes = group.spans.map((span) => toBinary(SpanSchema, span).length);
  const pieces: Piece[] = [];
  let from = 0;
  let bytes = 0;
  const cut = (to: number): void => {
    const { rolloutId, attemptId, spans } = group;
    const { openCalls, abandonedCalls } = pieces.length === 0 ? group : NO_CALLS;
    const part = create(AttemptSpansSchema, { rolloutId, attemptId, spans: spans.slice(from, to), openCalls, abandonedCalls });
    pieces.push(piece(part, from));
    [from, bytes] = [to, 0];
  };
  sizes.forEach((size, index) => {
    if (index > from && (bytes + size > MAX_BYTES || index - from >= MAX_SPANS)) cut(index);
    bytes += size;
  });
  if (from < sizes.length || pieces.length === 0) cut(sizes.length);
  return pieces;
}

function piece(group: AttemptSpans, firstSpan: number): Piece {
  const wire = new BinaryWriter().bytes(toBinary(AttemptSpansSchema, group)).finish();
  return { wire, spanCount: group.spans.length, firstId: group.spans[0]?.spanId ?? new Uint8Array(), firstSpan };
}

function sizeOf(parts: readonly Part[]): number {
  return parts.reduce((sum, part) => sum + part.wire.length, 0);
}

function tooLarge({ wire, firstId, groupIndex, firstSpan }: Part): SpanRejection {
  const text = `spans[${firstSpan}] has ${wire.length} bytes; at most ${MAX_SPAN_BYTES} are allowed: leave long values out`;
  const error = new InvalidRequest(text, Code.InvalidArgument, { reason: "INVALID_FIELD" });
  return { groupIndex, index: firstSpan, spanId: firstId, error };
}
