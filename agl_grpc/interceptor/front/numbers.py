"""Long lists of token ids, read from JSON's text into an array without a Python object for each of them."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import orjson

_Integers = np.ndarray[Any, np.dtype[Any]]
_MOST_DIGITS = 8
_WORTH = 64 * 1024
"""Bytes of text from which on this is quicker than a parser."""

_COMMA, _ZERO, _NINE = b",09"
# Eight characters as one number, the last of them its highest byte: the low half of each is its digit.
_DIGITS = 0x0F0F0F0F0F0F0F0F


def read_ids(text: bytes) -> array[int]:
    """A JSON list of token ids. Raises ValueError, TypeError and OverflowError for what is none."""
    if len(text) < _WORTH:
        return array("I", orjson.loads(text))
    padded = b"%b,%b," % (b"0" * (_MOST_DIGITS - 1), text[1:-1])
    characters = np.frombuffer(padded, np.uint8)
    commas = (characters < _ZERO).nonzero()[0]
    ends = commas[1:]
    steps = ends - commas[:-1]  # an id's digits and its comma
    plain = int(characters.max()) <= _NINE and bool((characters[commas] == _COMMA).all())
    if not plain or int(steps.min()) < 2 or int(steps.max()) > _MOST_DIGITS + 1:
        return array("I", orjson.loads(text))  # spaces, other numbers, or no list of ids
    return array("I", _values(padded, ends, steps).astype(np.uintc).tobytes())


def _values(padded: bytes, ends: _Integers, steps: _Integers) -> _Integers:
    """The numbers that end there: eight characters of each at once, neighbours joined three times."""
    every = np.ndarray((len(padded) - _MOST_DIGITS + 1,), "<u8", padded, strides=(1,))
    found: _Integers = every[ends - _MOST_DIGITS]
    found &= _DIGITS
    before = ((_MOST_DIGITS + 1 - steps) << 3).astype(np.uint64)  # bits of what stands before the number
    found >>= before
    found <<= before
    for bits, tens, kept in (
        (8, 10, 0x00FF00FF00FF00FF),
        (16, 100, 0x0000FFFF0000FFFF),
        (32, 10_000, 0x00000000FFFFFFFF),
    ):
        higher = found >> bits
        found *= tens
        found += higher
        found &= kept
    return found
