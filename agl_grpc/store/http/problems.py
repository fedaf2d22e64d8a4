"""What goes wrong over HTTP: a status, and a JSON object that says why and where."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.rpc import code_pb2

from agl_grpc.store.errors import StoreError

Headers = Sequence[tuple[bytes, bytes]]

_STATUSES: Mapping[int, int] = {
    code_pb2.INVALID_ARGUMENT: 400,
    code_pb2.OUT_OF_RANGE: 400,
    code_pb2.UNAUTHENTICATED: 401,
    code_pb2.PERMISSION_DENIED: 403,
    code_pb2.NOT_FOUND: 404,
    code_pb2.ALREADY_EXISTS: 409,
    code_pb2.FAILED_PRECONDITION: 409,
    code_pb2.ABORTED: 409,
    code_pb2.INTERNAL: 500,
    code_pb2.UNIMPLEMENTED: 501,
    # Not 429: clients of Agent Lightning try again after 5xx only, and nothing has been done.
    code_pb2.RESOURCE_EXHAUSTED: 503,
    code_pb2.UNAVAILABLE: 503,
    code_pb2.DEADLINE_EXCEEDED: 504,
}
# Where REST's bodies are the fields that the contract's requests hold one level deeper.
_DEEPER = re.compile(r"^(rollout|attempt|filter|worker|groups\[0\]\.spans\[0\])\.")
_RENAMED: Mapping[str, str] = {
    "order_by": "sort_by",
    "skip": "offset",
    "page_size": "limit",
    "parent_span_id": "parent_id",
    "stats": "heartbeat_stats",
    "start_time_unix_nano": "start_time",
    "end_time_unix_nano": "end_time",
    "explicit_sequence_id": "sequence_id",
}


@dataclass(eq=False)
class HttpProblem(Exception):
    """A refusal that only HTTP knows.

    Attributes:
        status: HTTP status.
        reason: Machine-readable name.
        detail: One line for people: what is wrong and what to do.
        field: Path of the field at fault; empty = none.
        headers: Headers of the answer.
    """

    status: int
    reason: str
    detail: str
    field: str = ""
    headers: Headers = ()

    def __post_init__(self) -> None:
        super().__init__(self.detail)


@dataclass(frozen=True)
class Problem:
    """A refusal as it is answered: status, JSON body, headers."""

    status: int
    body: Mapping[str, Any]
    headers: Headers = field(default=())


def malformed(path: str, rule: str) -> HttpProblem:
    """The JSON has the wrong shape; `rule` completes the sentence that begins with the path."""
    return HttpProblem(422, "INVALID_FIELD", f"{path or 'the body'} {rule}", path)


def invalid(path: str, rule: str) -> HttpProblem:
    """The value is of the right type and not allowed all the same."""
    return HttpProblem(400, "INVALID_FIELD", f"{path} {rule}", path)


def problem_of(error: HttpProblem | StoreError) -> Problem:
    """How an error is answered; it has no traceback in any case."""
    if isinstance(error, HttpProblem):
        return Problem(error.status, _body(error.detail, error.reason, error.field, {}), error.headers)
    metadata = dict(error.metadata)
    path, detail = metadata.pop("field", ""), error.message
    if error.violations:
        path = _public(error.violations[0].field)
        detail = f"{path} {error.violations[0].description}".strip()
    headers: list[tuple[bytes, bytes]] = []
    if error.retry_after is not None:
        headers.append((b"retry-after", str(math.ceil(error.retry_after)).encode()))
    if error.code == code_pb2.UNAUTHENTICATED:
        headers.append((b"www-authenticate", b"Bearer"))
    body = _body(detail, error.reason_name, path, metadata)
    return Problem(_STATUSES.get(error.code, 500), body, headers)


def _public(path: str) -> str:
    path = _DEEPER.sub("", path)
    return _RENAMED.get(path, path)


def _body(detail: str, reason: str, path: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    return {"detail": detail, "reason": reason, "field": path or None, "metadata": dict(metadata)}
