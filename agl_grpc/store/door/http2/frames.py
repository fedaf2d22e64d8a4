"""Frames of HTTP/2 (RFC 9113) as bytes."""

from __future__ import annotations

import enum
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER_BYTES = 9
DEFAULT_WINDOW = 65_535
DEFAULT_FRAME_BYTES = 16_384
LARGEST_WINDOW = 2**31 - 1

UNPACK_HEADER = struct.Struct(">HBBBI").unpack_from
"""(length's upper 16 bits, its lower 8 bits, type, flags, stream)."""

_PACK_HEADER = struct.Struct(">HBBBI").pack
_PACK_SETTING = struct.Struct(">HI")
_PACK_PAIR = struct.Struct(">II").pack
_PACK_NUMBER = struct.Struct(">I").pack

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)

END_STREAM = 0x1
ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
HAS_PRIORITY = 0x20


class Code(enum.IntEnum):
    """Why a stream or a connection ends."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    ENHANCE_YOUR_CALM = 0xB


class Setting(enum.IntEnum):
    """What the two sides tell each other."""

    HEADER_TABLE_SIZE = 0x1
    ENABLE_PUSH = 0x2
    MAX_CONCURRENT_STREAMS = 0x3
    INITIAL_WINDOW_SIZE = 0x4
    MAX_FRAME_SIZE = 0x5
    MAX_HEADER_LIST_SIZE = 0x6


class ConnectionFailed(Exception):
    """The peer broke the protocol: the connection ends with this code."""

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """One whole frame."""
    return header(len(payload), kind, flags, stream_id) + payload


def header(length: int, kind: int, flags: int, stream_id: int) -> bytes:
    """The nine bytes before a payload."""
    return _PACK_HEADER(length >> 8, length & 0xFF, kind, flags, stream_id)


def settings(values: dict[Setting, int]) -> bytes:
    """A SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(_PACK_SETTING.pack(key, value) for key, value in values.items()))


def read_settings(payload: bytes) -> list[tuple[int, int]]:
    """Identifiers and values of a SETTINGS frame."""
    if len(payload) % _PACK_SETTING.size:
        raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "SETTINGS of a broken length")
    return list(_PACK_SETTING.iter_unpack(payload))


def window_update(stream_id: int, count: int) -> bytes:
    """A WINDOW_UPDATE frame: the peer may send so many bytes more."""
    return frame(WINDOW_UPDATE, 0, stream_id, _PACK_NUMBER(count))


def reset(stream_id: int, code: Code) -> bytes:
    """A RST_STREAM frame."""
    return frame(RST_STREAM, 0, stream_id, _PACK_NUMBER(code))


def goaway(last_stream_id: int, code: Code, reason: str = "") -> bytes:
    """A GOAWAY frame: streams above this one were not looked at."""
    return frame(GOAWAY, 0, 0, _PACK_PAIR(last_stream_id, code) + reason.encode())


def read_number(payload: bytes) -> int:
    """The one 32-bit number that a frame holds."""
    if len(payload) != 4:
        raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "a frame of 4 bytes has another length")
    return int.from_bytes(payload, "big")


def unpadded(payload: bytes, flags: int) -> bytes:
    """The payload of a DATA or HEADERS frame without padding and priority."""
    if not flags & (PADDED | HAS_PRIORITY):
        return payload
    start, end = 0, len(payload)
    if flags & PADDED:
        if not payload:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "padding without its length")
        start, end = 1, end - payload[0]
    if flags & HAS_PRIORITY:
        start += 5
    if start > end:
        raise ConnectionFailed(Code.PROTOCOL_ERROR, "more padding than payload")
    return payload[start:end]
