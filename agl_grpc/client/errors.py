"""What can go wrong between a client and the store, as typed exceptions with one-line messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from agl_grpc.v1 import error_reason_pb2

DOMAIN = "agl-grpc"

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Largest message that a client sends or takes."""

OWN_LIMIT = "larger than"
"""What gRPC itself says, as RESOURCE_EXHAUSTED, of a message over the limit of the process that says it."""

_DETAILS_KEY = "grpc-status-details-bin"


class StoreError(Exception):
    """A call that the store refused or could not be reached for.

    ``code`` is the gRPC status, ``reason`` the machine-readable name from the contract's `ErrorReason` (empty
    when there is none), ``metadata`` its details, ``retry_after`` the seconds that the store asks to wait.
    """

    reasons: ClassVar[tuple[str, ...]] = ()
    codes: ClassVar[tuple[grpc.StatusCode, ...]] = ()

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after


# ValueError too: that is what callers of Agent Lightning's store catch for unknown ids and bad arguments.
class NotFound(StoreError, ValueError):
    """The entity does not exist."""

    reasons: ClassVar[tuple[str, ...]] = ("ENTITY_NOT_FOUND", "RESOURCE_MISSING")
    codes: ClassVar[tuple[grpc.StatusCode, ...]] = (grpc.StatusCode.NOT_FOUND,)


class AlreadyExists(StoreError, ValueError):
    """The id is taken."""

    reasons: ClassVar[tuple[str, ...]] = ("ENTITY_EXISTS",)
    codes: ClassVar[tuple[grpc.StatusCode, ...]] = (grpc.StatusCode.ALREADY_EXISTS,)


class InvalidRequest(StoreError, ValueError):
    """A field's value is not allowed; ``metadata["field"]`` names it where there is one."""

    reasons: ClassVar[tuple[str, ...]] = ("INVALID_FIELD", "PAGE_TOKEN_INVALID", "REQUEST_ID_REUSED")
    codes: ClassVar[tuple[grpc.StatusCode, ...]] = (grpc.StatusCode.INVALID_ARGUMENT,)


class TokensMalformed(InvalidRequest):
    """Token ids and logprobs differ in length, or a logprob is not a number."""

    reasons: ClassVar[tuple[str, ...]] = ("TOKENS_MALFORMED",)
    codes: ClassVar[tuple[grpc.StatusCode, ...]] = ()


class MessageTooLarge(InvalidRequest):
    """A message is larger than the store, or this client, takes; ``metadata["limit_bytes"]`` is the limit."""

    reasons: ClassVar[tuple[str, ...]] = ("MESSAGE_TOO_LARGE",)
    codes: ClassVar[tuple[grpc.StatusCode, ...]] = ()


class LeaseLost(StoreError):
    """The lease is over, re-leased or completed: stop."""

    reasons: ClassVar[tuple[str, ...]] = ("LEASE_LOST",)


class IllegalTransition(StoreError, ValueError):
    """The entity is in a state that forbids the change."""

    reasons: ClassVar[tuple[str, ...]] = ("ILLEGAL_TRANSITION",)


class StreamFenced(StoreError):
    """A newer stream of the same producer is open."""

    reasons: ClassVar[tuple[str, ...]] = ("STREAM_FENCED",)


class DeltaBaseUnknown(StoreError):
    """The prompt's base is unknown to the store: send the prompt whole."""

    reasons: ClassVar[tuple[str, ...]] = ("DELTA_BASE_UNKNOWN",)


class TrainerFenced(StoreError):
    """A newer epoch of the trainer has taken over."""

    reasons: ClassVar[tuple[str, ...]] = ("TRAINER_FENCED",)


class CursorCompacted(StoreError):
    """The watch's cursor is older than the log: read the lists again and watch from their position."""

    reasons: ClassVar[tuple[str, ...]] = ("CURSOR_COMPACTED",)
    codes: ClassVar[tuple[grpc.StatusCode, ...]] = (grpc.StatusCode.OUT_OF_RANGE,)


class StoreUnavailable(StoreError):
    """The store cannot be reached, drains, or its disk is full; retrying later may help."""

    reasons: ClassVar[tuple[str, ...]] = ("DRAINING", "STORAGE_FULL", "STORAGE_AWAY")
    codes: ClassVar[tuple[grpc.StatusCode, ...]] = (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    )


class SpansEvicted(StoreError):
    """The attempt's spans were evicted from a throw-away store that had grown too large."""

    reasons: ClassVar[tuple[str, ...]] = ("SPANS_EVICTED",)


class Overloaded(StoreError):
    """Too much at once; ``retry_after`` says when to try again."""

    reasons: ClassVar[tuple[str, ...]] = ("OVERLOADED",)
    codes: ClassVar[tuple[grpc.StatusCode, ...]] = (grpc.StatusCode.RESOURCE_EXHAUSTED,)


class NotPermitted(StoreError):
    """The caller's credential is missing or does not allow it."""

    reasons: ClassVar[tuple[str, ...]] = ("NOT_PERMITTED", "UNAUTHENTICATED")
    codes: ClassVar[tuple[grpc.StatusCode, ...]] = (
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
    )


class Unimplemented(StoreError):
    """A part of the contract that this store does not serve yet."""

    reasons: ClassVar[tuple[str, ...]] = ("METHOD_UNIMPLEMENTED",)
    codes: ClassVar[tuple[grpc.StatusCode, ...]] = (grpc.StatusCode.UNIMPLEMENTED,)


_TYPES: tuple[type[StoreError], ...] = (
    NotFound,
    AlreadyExists,
    TokensMalformed,
    MessageTooLarge,
    InvalidRequest,
    LeaseLost,
    IllegalTransition,
    StreamFenced,
    DeltaBaseUnknown,
    TrainerFenced,
    CursorCompacted,
    SpansEvicted,
    StoreUnavailable,
    Overloaded,
    NotPermitted,
    Unimplemented,
)
_BY_REASON = {reason: kind for kind in _TYPES for reason in kind.reasons}
_BY_CODE = {code: kind for kind in _TYPES for code in kind.codes}
_CODES = {code.value[0]: code for code in grpc.StatusCode}


def error_type(code: grpc.StatusCode, reason: str) -> type[StoreError]:
    """The exception for a reason, or for a code without a known reason."""
    return _BY_REASON.get(reason) or _BY_CODE.get(code, StoreError)


def error_from_rpc(error: grpc.aio.AioRpcError, target: str) -> StoreError:
    """Turn a failed call into a typed exception; ``target`` is named when the store cannot be reached."""
    info, retry_after = _details(error)
    code = error.code()
    if (
        not info.reason
        and code is grpc.StatusCode.RESOURCE_EXHAUSTED
        and OWN_LIMIT in (error.details() or "")
    ):
        info.reason = "MESSAGE_TOO_LARGE"
        info.metadata["limit_bytes"] = str(MAX_MESSAGE_BYTES)
    kind = error_type(code, info.reason)
    message = error.details() or code.name.lower().replace("_", " ")
    if kind is StoreUnavailable and not info.reason:
        message = f"the store at {target} cannot be reached: {message}"
    return kind(message, code=code, reason=info.reason, metadata=dict(info.metadata), retry_after=retry_after)


def error_from_item(status: error_reason_pb2.ItemStatus) -> StoreError:
    """Turn the outcome of one item of a batched call into a typed exception."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    reason = error_reason_pb2.ErrorReason.Name(status.reason) if status.reason else ""
    reason = reason.removeprefix("ERROR_REASON_")
    metadata = {label.key: label.value for label in status.metadata}
    return error_type(code, reason)(status.message or reason, code=code, reason=reason, metadata=metadata)


def retry_after(error: grpc.aio.AioRpcError) -> float | None:
    """Seconds that the store asks to wait before another try; ``None`` when it does not."""
    return _details(error)[1]


def _details(error: grpc.aio.AioRpcError) -> tuple[error_details_pb2.ErrorInfo, float | None]:
    info, wait = error_details_pb2.ErrorInfo(), None
    for key, value in error.trailing_metadata() or ():
        if key != _DETAILS_KEY or not isinstance(value, bytes):
            continue
        try:
            status = status_pb2.Status.FromString(value)
        except DecodeError:  # a proxy's own trailer: the code and its text still stand
            continue
        for detail in status.details:
            retry = error_details_pb2.RetryInfo()
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                detail.Unpack(info)
            elif detail.Unpack(retry):
                wait = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return info, wait
