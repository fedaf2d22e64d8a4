"""Refusals in the shape of the dialect that the client speaks."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping

import orjson

_OPENAI = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
_ANTHROPIC = {
    **_OPENAI,
    409: "invalid_request_error",
    413: "request_too_large",
    503: "overloaded_error",
}

RETRY_AFTER_SECONDS = 5
"""What a caller is told to wait when we cannot take its call now."""


class Refusal(Exception):
    """The answer is an error of ours.

    Args:
        status: HTTP status.
        code: machine-readable reason, for example ``model_not_found``.
        message: one line: what is wrong and what to do.
        retry_after: seconds after which trying again may help; None: it does not, and SDKs are told so.
        recorded: whether the attempt that the call names gets a record of it. Not where the caller has not
            shown that it may write to that attempt, nor where the store would not take the record.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        retry_after: float | None = None,
        recorded: bool = True,
    ) -> None:
        super().__init__(message)
        self.recorded = recorded
        self.status = status
        self.code = code
        self.message = message
        self.retry_after = retry_after

    def headers(self) -> dict[str, str]:
        """Whether and when to try again: SDKs made by Stainless read ``x-should-retry``."""
        if self.retry_after is None:
            return {"x-should-retry": "false"}
        return {"retry-after": f"{max(1, round(self.retry_after))}"}

    def body(self, api: str) -> bytes:
        """The JSON body in the shape of `api`."""
        return orjson.dumps(self._object(api))

    def event(self, api: str) -> bytes:
        """As an event of a stream that has begun."""
        if api == "messages":
            return b"event: error\ndata: " + self.body(api) + b"\n\n"
        return b"data: " + self.body(api) + b"\n\n"

    def _object(self, api: str) -> Mapping[str, object]:
        kinds = _ANTHROPIC if api == "messages" else _OPENAI
        kind = kinds.get(self.status, "api_error")
        if api == "messages":
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


class Refused:
    """Counts refusals by their codes, and says which of them leave a record.

    An attempt has one record for each code, however often its agent asks again; `attempts` attempts are
    remembered, those longest without a refusal go first.
    """

    def __init__(self, attempts: int = 20_000) -> None:
        self._limit = attempts
        self._recorded: OrderedDict[str, set[str]] = OrderedDict()
        self.counts: Counter[str] = Counter()

    def note(self, refusal: Refusal, attempt_id: str = "") -> bool:
        """Count a refusal of a call of an attempt (empty: of none); whether it is to be recorded."""
        self.counts[refusal.code] += 1
        if not attempt_id or not refusal.recorded:
            return False
        codes = self._recorded.setdefault(attempt_id, set())
        self._recorded.move_to_end(attempt_id)
        if len(self._recorded) > self._limit:
            self._recorded.popitem(last=False)
        if refusal.code in codes:
            return False
        codes.add(refusal.code)
        return True


def reason_of(body: bytes) -> str:
    """What an error says of itself, in whatever shape; the beginning of its text where it has none."""
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        said = None
    error = said.get("error", said) if isinstance(said, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else body[:300].decode(errors="replace")


def in_dialect(status: int, body: bytes, api: str) -> bytes:
    """An error of the engine in the shape of a dialect; as it is where it has that."""
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        said = None
    shaped = isinstance(said, dict) and isinstance(said.get("error"), dict)
    if isinstance(said, dict) and shaped and (api != "messages" or said.get("type") == "error"):
        return body
    return Refusal(status, "engine_error", reason_of(body)).body(api)


def upstream_failed(message: str) -> Refusal:
    """The engine's answer is of no use."""
    return Refusal(502, "upstream_error", message, retry_after=1)


def upstream_away(message: str) -> Refusal:
    """No engine takes the request now."""
    return Refusal(503, "upstream_unavailable", message, retry_after=2)
