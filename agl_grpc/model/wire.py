"""Protobuf's wire format, where putting bytes together beats building messages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache


def varint(value: int) -> bytes:
    """A number that is not negative."""
    if value < 0x80:
        return bytes((value,))
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


@cache
def tag(number: int) -> bytes:
    """What begins a length-delimited field."""
    return varint(number << 3 | 2)


def field(number: int, data: bytes) -> bytes:
    """A length-delimited field: bytes, text, a message or a packed list."""
    return b"".join((tag(number), varint(len(data)), data))


def parts(number: int, content: Sequence[bytes]) -> list[bytes]:
    """As `field`, of content in pieces, which are not put together yet: large ones are copied once."""
    return [tag(number), varint(sum(map(len, content))), *content]
