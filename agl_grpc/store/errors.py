"""Errors of the store: one exception type, spoken as google.rpc.Status or as ItemStatus.

Every error carries exactly one `google.rpc.ErrorInfo` whose domain is `agl-grpc` and whose reason is a
name of `ErrorReason` without its prefix. Pure rules raise these too, so this module knows no gRPC server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from agl_grpc.v1 import common_pb2, error_reason_pb2

DOMAIN = "agl-grpc"
"""Domain of every ErrorInfo."""

STATUS_TRAILER = "grpc-status-details-bin"
"""Trailer that holds the serialised google.rpc.Status."""

RETRY_TRAILER = "google.rpc.retryinfo-bin"
"""Trailer in which OpenTelemetry's Python exporters look for RetryInfo."""

_REASON_PREFIX = "ERROR_REASON_"
Reason: TypeAlias = error_reason_pb2.ErrorReason.ValueType


@dataclass(frozen=True)
class FieldViolation:
    """One field of a request that breaks a rule: its path, as in `rollouts[0].priority`, and the rule."""

    field: str
    description: str


@dataclass(eq=False)
class StoreError(Exception):
    """A refusal with a machine-readable reason.

    Attributes:
        code: a google.rpc.Code, for example 3 = INVALID_ARGUMENT.
        reason: the contract's ErrorReason.
        message: one line for people: what is wrong and what to do.
        metadata: whatever is dynamic in the message, by name.
        violations: fields at fault; sent as google.rpc.BadRequest.
        precondition: what state forbids the change; sent as google.rpc.PreconditionFailure.
        retry_after: seconds after which a retry makes sense; sent as google.rpc.RetryInfo.
    """

    code: int
    reason: Reason
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: Sequence[FieldViolation] = ()
    precondition: str = ""
    retry_after: float | None = None

    def __post_init__(self) -> None:
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message

    @property
    def reason_name(self) -> str:
        """The reason as ErrorInfo spells it, for example `INVALID_FIELD`."""
        return error_reason_pb2.ErrorReason.Name(self.reason).removeprefix(_REASON_PREFIX)

    def to_status(self) -> status_pb2.Status:
        """The whole error as google.rpc.Status."""
        details: list[Message] = [
            error_details_pb2.ErrorInfo(reason=self.reason_name, domain=DOMAIN, metadata=dict(self.metadata))
        ]
        if self.violations:
            bad = error_details_pb2.BadRequest()
            for violation in self.violations:
                bad.field_violations.add(field=violation.field, description=violation.description)
            details.append(bad)
        if self.precondition:
            failure = error_details_pb2.PreconditionFailure()
            failure.violations.add(type=self.reason_name, subject=self.precondition, description=self.message)
            details.append(failure)
        retry = self.retry_info()
        if retry is not None:
            details.append(retry)
        status = status_pb2.Status(code=self.code, message=self.message)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return status

    def to_item(self) -> error_reason_pb2.ItemStatus:
        """The error as the outcome of one item of a batched call."""
        item = error_reason_pb2.ItemStatus(code=self.code, message=self.message, reason=self.reason)
        for key, value in self.metadata.items():
            item.metadata.append(common_pb2.Label(key=key, value=value))
        return item

    def retry_info(self) -> error_details_pb2.RetryInfo | None:
        """When to try again; None = trying again makes no sense."""
        if self.retry_after is None:
            return None
        whole = int(self.retry_after)
        delay = duration_pb2.Duration(seconds=whole, nanos=int((self.retry_after - whole) * 1e9))
        return error_details_pb2.RetryInfo(retry_delay=delay)

    def trailers(self) -> tuple[tuple[str, bytes], ...]:
        """Trailing metadata that go with the error."""
        trailers = [(STATUS_TRAILER, self.to_status().SerializeToString())]
        retry = self.retry_info()
        if retry is not None:
            trailers.append((RETRY_TRAILER, retry.SerializeToString()))
        return tuple(trailers)


def invalid_field(path: str, rule: str, **metadata: str) -> StoreError:
    """A field's value is not allowed; `rule` completes the sentence that begins with the field's path."""
    return StoreError(
        code_pb2.INVALID_ARGUMENT,
        error_reason_pb2.ERROR_REASON_INVALID_FIELD,
        f"{path} {rule}" if path else rule,
        {"field": path, **metadata},
        violations=(FieldViolation(path, rule),),
    )


def not_found(entity: str, entity_id: str) -> StoreError:
    """The entity does not exist."""
    return StoreError(
        code_pb2.NOT_FOUND,
        error_reason_pb2.ERROR_REASON_ENTITY_NOT_FOUND,
        f"{entity} {entity_id!r} does not exist; check the id",
        {"entity": entity, "id": entity_id},
    )


def exists(entity: str, entity_id: str) -> StoreError:
    """The id is taken."""
    return StoreError(
        code_pb2.ALREADY_EXISTS,
        error_reason_pb2.ERROR_REASON_ENTITY_EXISTS,
        f"{entity} {entity_id!r} exists already; choose another id or leave it empty",
        {"entity": entity, "id": entity_id},
    )


def lease_lost(attempt_id: str, status: str) -> StoreError:
    """The lease is over: whoever held it must stop."""
    return StoreError(
        code_pb2.FAILED_PRECONDITION,
        error_reason_pb2.ERROR_REASON_LEASE_LOST,
        f"the lease of attempt {attempt_id!r} is over (attempt is {status}); stop working on it",
        {"attempt_id": attempt_id, "status": status},
        precondition=f"attempts/{attempt_id}",
    )


def illegal_transition(entity: str, entity_id: str, before: str, after: str) -> StoreError:
    """The entity is in a state that forbids the change."""
    return StoreError(
        code_pb2.FAILED_PRECONDITION,
        error_reason_pb2.ERROR_REASON_ILLEGAL_TRANSITION,
        f"{entity} {entity_id!r} is {before} and cannot become {after}",
        {"entity": entity, "id": entity_id, "from": before, "to": after},
        precondition=f"{entity}s/{entity_id}",
    )


def request_id_reused(request_id: str) -> StoreError:
    """The same request_id came with another request."""
    return StoreError(
        code_pb2.INVALID_ARGUMENT,
        error_reason_pb2.ERROR_REASON_REQUEST_ID_REUSED,
        f"request_id {request_id!r} was used for a different request; mint a new one per logical call",
        {"request_id": request_id},
        violations=(FieldViolation("request_id", "was used for a different request"),),
    )


def stream_fenced(producer_id: str, epoch: int) -> StoreError:
    """A newer stream of the same producer is open."""
    return StoreError(
        code_pb2.ABORTED,
        error_reason_pb2.ERROR_REASON_STREAM_FENCED,
        f"a newer stream of producer {producer_id!r} is open (epoch {epoch}); only one may be",
        {"producer_id": producer_id, "epoch": str(epoch)},
    )


def delta_base_unknown(base_span_id: bytes, why: str = "is not stored for this attempt") -> StoreError:
    """The prompt's base is unknown here."""
    return StoreError(
        code_pb2.FAILED_PRECONDITION,
        error_reason_pb2.ERROR_REASON_DELTA_BASE_UNKNOWN,
        f"prompt base {base_span_id.hex()} {why}; send the prompt whole",
        {"base_span_id": base_span_id.hex()},
    )


def tokens_malformed(path: str, span_id: bytes, rule: str) -> StoreError:
    """Token ids, logprobs or policy runs of a model call do not fit together."""
    return StoreError(
        code_pb2.INVALID_ARGUMENT,
        error_reason_pb2.ERROR_REASON_TOKENS_MALFORMED,
        f"{path} {rule} (span {span_id.hex()})",
        {"field": path, "span_id": span_id.hex()},
        violations=(FieldViolation(path, rule),),
    )


def samples_broken(attempt_id: str, why: str) -> StoreError:
    """Stored model calls of an attempt do not fit together, so that no samples can be made of it."""
    return StoreError(
        code_pb2.DATA_LOSS,
        error_reason_pb2.ERROR_REASON_TOKENS_MALFORMED,
        f"attempt {attempt_id!r}: {why}",
        {"attempt_id": attempt_id},
    )


def replay_expired(batch_id: str, attempt_id: str) -> StoreError:
    """Spans that a batch names are gone."""
    return StoreError(
        code_pb2.FAILED_PRECONDITION,
        error_reason_pb2.ERROR_REASON_REPLAY_EXPIRED,
        f"batch {batch_id!r} cannot be replayed: spans of attempt {attempt_id!r} are no longer stored; "
        "the run's replay_retention says how long they are kept",
        {"batch_id": batch_id, "attempt_id": attempt_id},
        precondition=f"batches/{batch_id}",
    )


def storage_full(retry_after: float = 5.0) -> StoreError:
    """The disk is full: writes wait, reads go on."""
    return StoreError(
        code_pb2.UNAVAILABLE,
        error_reason_pb2.ERROR_REASON_STORAGE_FULL,
        "the store's disk is full: nothing can be written until space is freed; reads go on",
        retry_after=retry_after,
    )


def storage_away(retry_after: float = 1.0) -> StoreError:
    """The database server does not answer."""
    return StoreError(
        code_pb2.UNAVAILABLE,
        error_reason_pb2.ERROR_REASON_STORAGE_AWAY,
        "the store's database does not answer; the store connects again by itself",
        retry_after=retry_after,
    )


def storage_busy(retry_after: float = 0.2) -> StoreError:
    """Other servers were in the way again and again."""
    return StoreError(
        code_pb2.UNAVAILABLE,
        error_reason_pb2.ERROR_REASON_STORAGE_AWAY,
        "the store's database gave up on the change too often, other servers were in the way",
        retry_after=retry_after,
    )


def overloaded(limit: str, retry_after: float = 0.5) -> StoreError:
    """Too much at once."""
    return StoreError(
        code_pb2.RESOURCE_EXHAUSTED,
        error_reason_pb2.ERROR_REASON_OVERLOADED,
        f"the store is overloaded ({limit} is at its limit); try again later",
        {"limit": limit},
        retry_after=retry_after,
    )


def cursor_compacted(oldest_position: int) -> StoreError:
    """The watch's cursor is older than the log."""
    return StoreError(
        code_pb2.OUT_OF_RANGE,
        error_reason_pb2.ERROR_REASON_CURSOR_COMPACTED,
        f"the cursor is older than the event log, which begins at {oldest_position}; list again, then watch",
        {"oldest_position": str(oldest_position)},
    )


def page_token_invalid(path: str = "page_token") -> StoreError:
    """The page token is not one of ours for this query."""
    rule = "is not a token of this query; pass next_page_token of the same query or leave it empty"
    return StoreError(
        code_pb2.INVALID_ARGUMENT,
        error_reason_pb2.ERROR_REASON_PAGE_TOKEN_INVALID,
        f"{path} {rule}",
        {"field": path},
        violations=(FieldViolation(path, rule),),
    )


def not_permitted(needs: str) -> StoreError:
    """The caller's credential does not allow it."""
    return StoreError(
        code_pb2.PERMISSION_DENIED,
        error_reason_pb2.ERROR_REASON_NOT_PERMITTED,
        f"the caller's credential does not allow this; needed: {needs}",
        {"needs": needs},
    )


def unauthenticated(why: str) -> StoreError:
    """No credential, or a broken or expired one."""
    return StoreError(
        code_pb2.UNAUTHENTICATED,
        error_reason_pb2.ERROR_REASON_UNAUTHENTICATED,
        f"{why}; send `authorization: Bearer <credential>`",
    )


def draining(retry_after: float = 1.0) -> StoreError:
    """The server is going away."""
    return StoreError(
        code_pb2.UNAVAILABLE,
        error_reason_pb2.ERROR_REASON_DRAINING,
        "the server is draining; try another or later",
        retry_after=retry_after,
    )


def method_unimplemented(method: str) -> StoreError:
    """A part of the contract that this version does not serve yet."""
    return StoreError(
        code_pb2.UNIMPLEMENTED,
        error_reason_pb2.ERROR_REASON_METHOD_UNIMPLEMENTED,
        f"{method} is part of the contract but not served by this version; see GetServerInfo",
        {"method": method},
    )


def method_unknown(path: str) -> StoreError:
    """No version that this server knows of has the method."""
    return StoreError(
        code_pb2.UNIMPLEMENTED,
        error_reason_pb2.ERROR_REASON_METHOD_UNIMPLEMENTED,
        f"there is no method {path}; see GetServerInfo for what this version serves",
        {"method": path},
    )


def message_too_large(size: int, limit: int) -> StoreError:
    """A message of `size` bytes or more where `limit` bytes are taken."""
    return StoreError(
        code_pb2.RESOURCE_EXHAUSTED,
        error_reason_pb2.ERROR_REASON_MESSAGE_TOO_LARGE,
        f"a message of {size} bytes or more; at most {limit} bytes are taken: send less at once, "
        "and large values as blobs",
        {"limit_bytes": str(limit)},
    )


def trainer_fenced(epoch: int, current: int) -> StoreError:
    """A newer trainer has taken the training run over."""
    return StoreError(
        code_pb2.FAILED_PRECONDITION,
        error_reason_pb2.ERROR_REASON_TRAINER_FENCED,
        f"trainer epoch {epoch} is not the current one ({current}): another trainer has taken over; stop",
        {"epoch": str(epoch), "current": str(current)},
        precondition="trainer_epoch",
    )


def resource_missing(resources_id: str, version: int = 0) -> StoreError:
    """Resources that the rollout names are not published."""
    which = f"{resources_id!r} version {version}" if version else f"{resources_id!r}"
    return StoreError(
        code_pb2.FAILED_PRECONDITION,
        error_reason_pb2.ERROR_REASON_RESOURCE_MISSING,
        f"resources {which} are not published; publish them first",
        {"resources_id": resources_id},
        precondition=f"resources/{resources_id}",
    )


def weights_rejected(engine_id: str, why: str) -> StoreError:
    """An engine did not take the weights."""
    return StoreError(
        code_pb2.FAILED_PRECONDITION,
        error_reason_pb2.ERROR_REASON_WEIGHTS_REJECTED,
        f"engine {engine_id!r} did not take the weights: {why}",
        {"engine_id": engine_id},
        precondition=f"engines/{engine_id}",
    )


def spans_evicted(attempt_id: str) -> StoreError:
    """The attempt's spans are no longer there."""
    return StoreError(
        code_pb2.FAILED_PRECONDITION,
        error_reason_pb2.ERROR_REASON_SPANS_EVICTED,
        f"the spans of attempt {attempt_id!r} were evicted from this throw-away store; "
        "give it more room or a database",
        {"attempt_id": attempt_id},
        precondition=f"attempts/{attempt_id}",
    )


def internal() -> StoreError:
    """A defect of the server; its log has the traceback, the caller gets none."""
    return StoreError(
        code_pb2.INTERNAL,
        error_reason_pb2.ERROR_REASON_INTERNAL,
        "the store hit a defect of its own; its log says what",
    )
