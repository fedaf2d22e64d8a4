"""Why an attempt or a rollout failed."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Self

from agl_grpc.model.enums import FailureKind
from agl_grpc.v1 import attempt_pb2

_MESSAGE_BYTES = 4 * 1024
_TYPE_BYTES = 256
_DETAIL_BYTES = 64 * 1024


@dataclass(slots=True, kw_only=True)
class Failure:
    """Who is to blame, one line for people, the exception's type, and its traceback.

    Too long texts are cut to the contract's limits: message 4 KiB, type 256 bytes,
    detail 64 KiB (at the front).
    """

    kind: FailureKind = FailureKind.AGENT
    message: str = ""
    type: str = ""
    detail: str = ""

    def __post_init__(self) -> None:
        self.kind = FailureKind.parse(self.kind)

    @classmethod
    def from_exception(cls, error: BaseException, kind: FailureKind = FailureKind.AGENT) -> Self:
        """Describe an exception with its traceback."""
        name = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
        first_line = (text_of(error).splitlines() or [""])[0]
        return cls(
            kind=kind,
            message=first_line or name,
            type=name,
            detail="".join(traceback.format_exception(error)),
        )

    @classmethod
    def from_proto(cls, message: attempt_pb2.Failure) -> Self:
        """Read the stored form."""
        kind = FailureKind.from_proto(message.kind) or FailureKind.INFRASTRUCTURE
        return cls(kind=kind, message=message.message, type=message.type, detail=message.detail)

    def to_proto(self) -> attempt_pb2.Failure:
        """Write the stored form."""
        return attempt_pb2.Failure(
            kind=self.kind.number,
            message=_head(self.message, _MESSAGE_BYTES),
            type=_head(self.type, _TYPE_BYTES),
            detail=_tail(self.detail, _DETAIL_BYTES),
        )


def text_of(error: BaseException) -> str:
    """What an exception says; empty when that itself raises: a failure must never fail to be told."""
    try:
        return str(error)
    except Exception:
        return ""


# Half characters (lone surrogates) are shown as escapes.
def _head(text: str, limit: int) -> str:
    return text.encode(errors="backslashreplace")[:limit].decode(errors="ignore")


def _tail(text: str, limit: int) -> str:
    return text.encode(errors="backslashreplace")[-limit:].decode(errors="ignore")
