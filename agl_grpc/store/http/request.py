"""One HTTP request: its headers, its body in pieces, its JSON."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import parse_qsl

import orjson

from agl_grpc.store import limits
from agl_grpc.store.http.problems import HttpProblem

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

BODY_BYTES = limits.MESSAGE_BYTES
"""Largest body, before and after decompression."""

_LONG_INTEGER = re.compile(rb"[0-9]{19}")


class Request:
    """A request of one client.

    Attributes:
        method: `GET`, `POST`, …
        path: Decoded.
        names: What the route's placeholders stand for.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.names: Mapping[str, str] = {}
        self._receive = receive
        self._query: bytes = scope["query_string"]
        self._headers: list[tuple[bytes, bytes]] = scope["headers"]

    def header(self, name: bytes) -> str:
        """A header's value; empty when there is none."""
        for key, value in self._headers:
            if key == name:
                return value.decode("latin-1")
        return ""

    @property
    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Who calls, as an Authenticator reads it."""
        value = self.header(b"authorization")
        return (("authorization", value),) if value else ()

    @property
    def media_type(self) -> str:
        """The body's media type in lower case, without parameters; empty = not stated."""
        return self.header(b"content-type").partition(";")[0].strip().lower()

    def query(self) -> list[tuple[str, str]]:
        """The query's names and values, in their order."""
        try:
            return parse_qsl(self._query.decode("ascii"), keep_blank_values=True, errors="strict")
        except ValueError as error:
            raise HttpProblem(400, "QUERY_MALFORMED", "the query is not percent-encoded UTF-8") from error

    async def body(self) -> bytes:
        """The whole body, decompressed.

        Raises:
            HttpProblem: 413 when it is too large, 415 for an unknown encoding, 400 when it is cut short.
            ClientGone: The client left before it had said all.
        """
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > BODY_BYTES:
                raise _too_large()
            parts.append(part)
            more = message.get("more_body", False)
        return _decoded(b"".join(parts), self.header(b"content-encoding").strip().lower())

    async def optional_json(self) -> Any:
        """The body as JSON; an empty object when it is empty or null."""
        value = await self.json()
        return {} if value is None else value

    async def json(self) -> Any:
        """The body as JSON; None when it is empty.

        Raises:
            HttpProblem: 415 when it is said to be something else, 422 when it is no JSON.
        """
        body = await self.body()
        if not body:
            return None
        kind = self.media_type
        if kind != "application/json" and not kind.endswith("+json"):
            raise HttpProblem(
                415,
                "MEDIA_TYPE_UNSUPPORTED",
                f"Content-Type {kind or '(none)'!r} is not JSON; send application/json",
            )
        if _LONG_INTEGER.search(body):
            # Of which orjson would make floats.
            return _lenient(body)
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError:
            return _lenient(body)

    async def gone(self) -> None:
        """Returns when the client has left; only after `body` or `json`."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


class ClientGone(Exception):
    """The client has left: nobody is there to be answered."""


def _lenient(body: bytes) -> Any:
    """Python's own reader takes what Python's own writer makes: NaN and infinities."""
    try:
        value = json.loads(body)
        # Half characters are JSON by the letter; nothing can be done with them.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise HttpProblem(422, "BODY_MALFORMED", f"the body is not JSON in UTF-8: {error}") from None
    return value


def _too_large() -> HttpProblem:
    return HttpProblem(413, "BODY_TOO_LARGE", f"the body has more than {BODY_BYTES} bytes; send less at once")


def _decoded(body: bytes, encoding: str) -> bytes:
    if not body or encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise HttpProblem(
            415,
            "ENCODING_UNSUPPORTED",
            f"Content-Encoding {encoding!r} is unknown; use gzip, deflate or none",
            headers=((b"accept-encoding", b"gzip, deflate"),),
        )
    machine = zlib.decompressobj(zlib.MAX_WBITS if encoding == "deflate" else 31)
    try:
        plain = machine.decompress(body, BODY_BYTES + 1)
    except zlib.error as error:
        raise HttpProblem(400, "BODY_MALFORMED", f"the body is not {encoding}: {error}") from error
    if len(plain) > BODY_BYTES:
        raise _too_large()
    if not machine.eof:
        raise HttpProblem(400, "BODY_MALFORMED", f"the body is {encoding} data that ends too early")
    if machine.unused_data:
        # Also a second gzip member: to leave it out without a word would lose what it holds.
        raise HttpProblem(400, "BODY_MALFORMED", f"the body goes on behind the end of its {encoding} data")
    return plain
