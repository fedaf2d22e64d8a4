"""Messages put together from parts that are on the wire already: thousands of tokens are copied, not set
one by one.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

from agl_grpc.model.wire import field as field
from agl_grpc.model.wire import parts as parts

LITTLE = sys.byteorder == "little" and array("I").itemsize == array("f").itemsize == 4
"""Whether an array lies in memory as a packed field lies on the wire."""


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
