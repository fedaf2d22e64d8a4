"""Pieces of SQL that every engine understands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

LAST_TEXT = f"'{chr(0x10FFFF)}'"
"""Text that sorts after all ids: nulls last."""


def marks(count: int) -> str:
    """Parameters of an IN list; an empty one holds nothing."""
    return ",".join("?" * count) or "NULL"


def padded(values: Sequence[T], most: int) -> Iterator[list[T]]:
    """Values in parts for IN lists; sizes are powers of two, so that few statements stay prepared.

    Args:
        values: What is looked for; the last value of a part may be repeated.
        most: Largest part, a power of two.
    """
    for start in range(0, len(values), most):
        part = list(values[start : start + most])
        size = 1 << (len(part) - 1).bit_length()
        yield part + part[-1:] * (size - len(part))
