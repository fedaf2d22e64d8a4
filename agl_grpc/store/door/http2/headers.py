"""Header blocks: what a gRPC request says of itself, and how an answer begins and ends."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple
from urllib.parse import quote

import hpack

from agl_grpc.store.door.http2.frames import Code, ConnectionFailed

MAX_HEADER_BYTES = 64 << 10
"""Largest header block, compressed or not."""

Metadata = tuple[tuple[str, str | bytes], ...]

_MOST_KNOWN = 256
_TIMEOUT = re.compile(rb"(\d{1,8})([HMSmun])")
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_OWN = frozenset({b"content-type", b"grpc-accept-encoding", b"grpc-encoding", b"grpc-timeout", b"te"})


class RequestHead(NamedTuple):
    """The headers of a request.

    Attributes:
        path: `/service/method`.
        problem: Status and body-less answer of HTTP for what is no gRPC request; 0 = it is one.
        timeout: Seconds; None = no deadline.
        encoding: How compressed messages are compressed.
        metadata: What the caller adds.
    """

    path: str
    problem: int
    timeout: float | None
    encoding: bytes
    metadata: Metadata


class HeadReader:
    """Reads the requests' header blocks of one connection.

    Clients say nearly the same with every call, in a handful of bytes that stand for entries of a table.
    As long as a block changes nothing in that table, the same bytes mean the same: they are read once.
    """

    def __init__(self) -> None:
        self._decoder = hpack.Decoder(MAX_HEADER_BYTES)
        self._known: dict[bytes, RequestHead] = {}

    def read(self, block: bytes) -> RequestHead:
        """The meaning of a block.

        Raises:
            ConnectionFailed: It cannot be decoded, and so no later one can.
        """
        head = self._known.get(block)
        if head is not None:
            return head
        before = self._table()
        try:
            fields = self._decoder.decode(block, raw=True)
        except hpack.HPACKError as error:
            raise ConnectionFailed(Code.COMPRESSION_ERROR, f"headers: {error}") from error
        head = _head_of(fields)
        if self._table() != before:
            self._known.clear()
        elif len(self._known) < _MOST_KNOWN:
            self._known[block] = head
        return head

    def _table(self) -> tuple[int, int, int]:
        """Differs whenever the decoder's table has changed."""
        table = self._decoder.header_table
        entries = table.dynamic_entries
        return len(entries), id(entries[0]) if entries else 0, table.maxsize


def _head_of(fields: Iterable[tuple[bytes, bytes]]) -> RequestHead:
    path, method, content_type, encoding = b"", b"", b"", b"identity"
    timeout: float | None = None
    metadata: list[tuple[str, str | bytes]] = []
    for name, value in fields:
        if name == b":path":
            path = value
        elif name == b":method":
            method = value
        elif name == b"content-type":
            content_type = value
        elif name == b"grpc-encoding":
            encoding = value
        elif name == b"grpc-timeout":
            match = _TIMEOUT.fullmatch(value)
            if match is None:
                return RequestHead("", 400, None, encoding, ())
            timeout = int(match[1]) * _UNITS[match[2]]
        elif not name.startswith(b":") and name not in _OWN:
            metadata.extend(_metadatum(name, value))
    problem = 0
    if method != b"POST":
        problem = 405
    elif not content_type.startswith(b"application/grpc"):
        problem = 415
    return RequestHead(path.decode("latin-1"), problem, timeout, encoding, tuple(metadata))


def _metadatum(name: bytes, value: bytes) -> Iterable[tuple[str, str | bytes]]:
    text = name.decode("latin-1")
    if not text.endswith("-bin"):
        return [(text, value.decode("latin-1"))]
    # Several values may have been joined by a proxy, and padding is optional.
    try:
        return [(text, base64.b64decode(part + b"=" * (-len(part) % 4))) for part in value.split(b",")]
    except binascii.Error:
        return []


def literal(name: bytes, value: bytes) -> bytes:
    """A header field that enters nobody's table."""
    return b"\0" + _length(name) + name + _length(value) + value


def _length(text: bytes) -> bytes:
    size = len(text)
    if size < 127:
        return bytes((size,))
    found, size = bytearray((127,)), size - 127
    while size >= 128:
        found.append(size & 0x7F | 0x80)
        size >>= 7
    found.append(size)
    return bytes(found)


_STATUS_200 = b"\x88"
RESPONSE = (
    _STATUS_200
    + literal(b"content-type", b"application/grpc")
    + literal(b"grpc-accept-encoding", b"identity,deflate,gzip")
)
"""The headers before an answer's first message."""

OK = literal(b"grpc-status", b"0")
"""The trailers of a call that went well."""


def trailers(code: int, message: str, metadata: Sequence[tuple[str, str | bytes]] = ()) -> bytes:
    """The end of a call: status, text, and what else the server says."""
    found = literal(b"grpc-status", str(code).encode())
    if message:
        # Space to tilde go as they are, all else and % as %XX of UTF-8.
        found += literal(b"grpc-message", quote(message, safe=_PRINTABLE).encode())
    for name, value in metadata:
        raw = base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode()
        found += literal(name.lower().encode(), raw)
    return found


_PRINTABLE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


def http_problem(status: int) -> bytes:
    """The whole answer to what is no gRPC request."""
    return literal(b":status", str(status).encode()) + literal(b"content-type", b"text/plain")
