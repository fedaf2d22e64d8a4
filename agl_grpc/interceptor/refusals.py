"""Refusals in the shape of the dialect that the client speaks."""

from __future__ import annotations

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


class Refusal(Exception):
    """The answer is an error of ours.

    Args:
        status: HTTP status.
        code: machine-readable reason, for example ``model_not_found``.
        message: one line: what is wrong and what to do.
        retry_after: seconds after which trying again may help; None: it does not, and SDKs are told so.
    """

    def __init__(self, status: int, code: str, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
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
