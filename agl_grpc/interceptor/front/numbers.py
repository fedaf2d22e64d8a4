"""Long lists of token ids, read from JSON's text into an array without a Python object for each of them."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import orjson

_Integers = np.ndarray[Any, np.dtype[Any]]
_MOST_DIGITS = 8
_WORTH = 12 * 1024
"""Bytes of text from which on this is quicker than a parser."""

_COMMA, _ZERO = b",0"
_DIGIT_BYTES = 0x0F0F0F0F0F0F0F0F
_KEPT = np.array(
    [0, 0, *(_DIGIT_BYTES >> 8 * left << 8 * left & 2**64 - 1 for left in range(_MOST_DIGITS - 1, -1, -1))],
    np.uint64,
)
"""Of eight characters as one number, the last of them its highest byte: what is an id's where its digits and
the comma after them are so many characters. The low half of each is its digit."""


def read_ids(text: bytes) -> array[int]:
    """A JSON list of token ids. Raises ValueError, TypeError and OverflowError for what is none."""
    if len(text) < _WORTH:
        return array("I", orjson.loads(text))
    padded = b"%b%b" % (b"0" * _MOST_DIGITS, text)
    characters = np.frombuffer(padded, np.uint8)[_MOST_DIGITS:]
    borders = ((characters - _ZERO) > 9).nonzero()[0]  # what is less than a zero is more than a nine
    steps = borders[1:] - borders[:-1]  # an id's digits and what follows them
    framed = text.startswith(b"[") and text.endswith(b"]")
    plain = framed and int(np.count_nonzero(characters == _COMMA)) == len(borders) - 2
    if not plain or int(steps.min()) < 2 or int(steps.max()) > _MOST_DIGITS + 1:
        return array("I", orjson.loads(text))  # spaces, other numbers, or no list of ids
    return array("I", _values(padded, borders[1:], steps).astype(np.uintc).tobytes())


def _values(padded: bytes, ends: _Integers, steps: _Integers) -> _Integers:
    """The numbers that end there: eight characters of each at once, neighbours joined three times."""
    every = np.ndarray((len(padded) - _MOST_DIGITS + 1,), "<u8", padded, strides=(1,))
    found: _Integers = every[ends]  # the padding is as long as what is read
    found &= _KEPT.take(steps)
    pairs = found >> 8
    found *= 10
    found += pairs
    # Each second pair by its weight: of these two products the sum stands in the upper half.
    pairs = found >> 16
    found &= 0x000000FF000000FF
    found *= 100 + (1_000_000 << 32)
    pairs &= 0x000000FF000000FF
    pairs *= 1 + (10_000 << 32)
    found += pairs
    found >>= 32
    return found
