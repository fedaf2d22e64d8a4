// What can go wrong between a client and the store, as typed errors with one-line messages.

import { Code, ConnectError } from "@connectrpc/connect";
import type { ItemStatus } from "./gen/agl_grpc/v1/error_reason_pb.js";
import { ErrorReason } from "./gen/agl_grpc/v1/error_reason_pb.js";
import { ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";

const DOMAIN = "agl-grpc";

/** Largest message that a client sends or takes. */
export const MAX_MESSAGE_BYTES = 64 * 1024 * 1024;

/** A gRPC status. */
export { Code };

/** Details of an error as the contract gives them. */
export interface ErrorContext {
  /** Name from the contract's `ErrorReason` without its prefix; empty when the store gave none. */
  readonly reason: string;
  /** Machine-readable details, for example the path of a field. */
  readonly info: Readonly<Record<string, string>>;
  /** Milliseconds that the store asks to wait before another try. */
  readonly retryAfterMs: number | undefined;
}

/** A call that the store refused, or for which it could not be reached. */
export class StoreError extends Error implements ErrorContext {
  readonly code: Code;
  readonly reason: string;
  readonly info: Readonly<Record<string, string>>;
  readonly retryAfterMs: number | undefined;

  constructor(message: string, code: Code, context?: Partial<ErrorContext>, cause?: unknown) {
    super(message.replace(/\s+/g, " ").trim(), { cause });
    this.name = new.target.name;
    this.code = code;
    this.reason = context?.reason ?? "";
    this.info = context?.info ?? {};
    this.retryAfterMs = context?.retryAfterMs;
  }
}

/** The entity does not exist. */
export class NotFound extends StoreError {}
/** The id is taken. */
export class AlreadyExists extends StoreError {}
/** A field's value is not allowed; `info.field` names it where there is one. */
export class InvalidRequest extends StoreError {}
/** Token ids and logprobs differ in length, or a logprob is not a number. */
export class TokensMalformed extends InvalidRequest {}
/** A message is larger than the store, or this client, takes; `info.limit_bytes` is the limit. */
export class MessageTooLarge extends InvalidRequest {}
/** The lease is over, re-leased or completed: stop. */
export class LeaseLost extends StoreError {}
/** The entity is in a state that forbids the change. */
export class IllegalTransition extends StoreError {}
/** A newer stream of the same producer is open. */
export class StreamFenced extends StoreError {}
/** The prompt's base is unknown to the store: send the prompt whole. */
export class DeltaBaseUnknown extends StoreError {}
/** A newer epoch of the trainer has taken over. */
export class TrainerFenced extends StoreError {}
/** The watch's cursor is older than the log: list again and watch from the list's position. */
export class CursorCompacted extends StoreError {}
/** The attempt's spans were evicted from a throw-away store. */
export class SpansEvicted extends StoreError {}
/** The store cannot be reached, drains, or its disk is full; trying later may help. */
export class StoreUnavailable extends StoreError {}
/** Too much at once; `retryAfterMs` says when to try again. */
export class Overloaded extends StoreError {}
/** The caller's credential is missing or does not allow it. */
export class NotPermitted extends StoreError {}
/** A part of the contract that this store does not serve. */
export class Unimplemented extends StoreError {}

type Kind = typeof StoreError;

const BY_REASON: Readonly<Record<string, Kind>> = {
  ENTITY_NOT_FOUND: NotFound,
  RESOURCE_MISSING: NotFound,
  ENTITY_EXISTS: AlreadyExists,
  INVALID_FIELD: InvalidRequest,
  PAGE_TOKEN_INVALID: InvalidRequest,
  REQUEST_ID_REUSED: InvalidRequest,
  TOKENS_MALFORMED: TokensMalformed,
  MESSAGE_TOO_LARGE: MessageTooLarge,
  LEASE_LOST: LeaseLost,
  ILLEGAL_TRANSITION: IllegalTransition,
  STREAM_FENCED: StreamFenced,
  DELTA_BASE_UNKNOWN: DeltaBaseUnknown,
  TRAINER_FENCED: TrainerFenced,
  CURSOR_COMPACTED: CursorCompacted,
  SPANS_EVICTED: SpansEvicted,
  DRAINING: StoreUnavailable,
  STORAGE_FULL: StoreUnavailable,
  STORAGE_AWAY: StoreUnavailable,
  OVERLOADED: Overloaded,
  NOT_PERMITTED: NotPermitted,
  UNAUTHENTICATED: NotPermitted,
  METHOD_UNIMPLEMENTED: Unimplemented,
};

const BY_CODE: Readonly<Partial<Record<Code, Kind>>> = {
  [Code.NotFound]: NotFound,
  [Code.AlreadyExists]: AlreadyExists,
  [Code.InvalidArgument]: InvalidRequest,
  [Code.OutOfRange]: CursorCompacted,
  [Code.Unavailable]: StoreUnavailable,
  [Code.DeadlineExceeded]: StoreUnavailable,
  [Code.ResourceExhausted]: Overloaded,
  [Code.PermissionDenied]: NotPermitted,
  [Code.Unauthenticated]: NotPermitted,
  [Code.Unimplemented]: Unimplemented,
};

function kindOf(code: Code, reason: string): Kind {
  return BY_REASON[reason] ?? BY_CODE[code] ?? StoreError;
}

/** A failed call as a typed error; `target` is named when the store cannot be reached. */
export function storeError(failure: unknown, target: string): StoreError {
  if (failure instanceof StoreError) return failure;
  const error = ConnectError.from(failure);
  const info = error.findDetails(ErrorInfoSchema).find((detail) => detail.domain === DOMAIN);
  const delay = error.findDetails(RetryInfoSchema)[0]?.retryDelay;
  const retryAfterMs = delay && Number(delay.seconds) * 1000 + delay.nanos / 1e6;
  const { reason, metadata } = info ?? ownLimit(error);
  const kind = kindOf(error.code, reason);
  const away = kind === StoreUnavailable && !info ? `the store at ${target} cannot be reached: ` : "";
  const context = { reason, info: metadata, retryAfterMs };
  return new kind(away + error.rawMessage, error.code, context, error);
}

/** What the transport itself refuses, in the contract's words: a message over this client's own limit. */
function ownLimit(error: ConnectError): { readonly reason: string; readonly metadata: Readonly<Record<string, string>> } {
  const tooLarge = error.code === Code.ResourceExhausted && error.rawMessage.includes("larger than");
  return tooLarge ? { reason: "MESSAGE_TOO_LARGE", metadata: { limit_bytes: String(MAX_MESSAGE_BYTES) } } : { reason: "", metadata: {} };
}

/** The outcome of one item of a batched call as a typed error. */
export function itemError(status: ItemStatus): StoreError {
  const reason = status.reason ? (ErrorReason[status.reason] ?? "") : "";
  const code = status.code as Code;
  const info = Object.fromEntries(status.metadata.map(({ key, value }) => [key, value]));
  return new (kindOf(code, reason))(status.message || reason, code, { reason, info });
}

/**
 * Whether another try may help: the store is away or drains, a stream or connection broke,
 * or the store is overloaded and said when to come back.
 */
export function isTransient(error: StoreError): boolean {
  if (error.code === Code.Unavailable) return true;
  if (error.code === Code.ResourceExhausted) return error.retryAfterMs !== undefined;
  if (error.reason) return false;
  // Without a reason of ours these are the transport's words for a connection that ended in mid-call.
  return error.code === Code.Canceled || error.code === Code.Aborted || isBroken(error);
}

function isBroken(error: StoreError): boolean {
  return error.code === Code.Internal && /http\/2|missing status|premature|ECONN|EPIPE|socket/i.test(error.message);
}
