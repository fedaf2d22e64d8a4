"""Messages put together from parts that are on the wire already: thousands of tokens are copied, not set
one by one.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

LITTLE = sys.byteorder == "little" and array("I").itemsize == array("f").itemsize == 4
"""Whether an array lies in memory as a packed field lies on the wire."""


def field(number: int, data: bytes) -> bytes:
    """A length-delimited field: bytes, text, a message or a packed list."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def packed_ids(values: Sequence[int]) -> bytes:
    """Token ids as packed 32-bit integers."""
    return _packed(as_ids(values))


def packed_floats(values: Sequence[float]) -> bytes:
    """Numbers as packed 32-bit floats."""
    return _packed(array("f", values))


def as_ids(values: Sequence[int]) -> array[int]:
    """Token ids as an array; not a copy where they are one."""
    return values if isinstance(values, array) else array("I", values)


def _packed(values: array[int] | array[float]) -> bytes:
    if not LITTLE:
        values = values[:]
        values.byteswap()
    return values.tobytes()


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
