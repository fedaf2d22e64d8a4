"""Many rows with one statement: each statement costs one hand-over of the interpreter lock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from agl_grpc.store.storage.engine import Cursor

_LARGEST = 64
Execute = Callable[[str, Sequence[object]], Cursor]


def insert_rows(execute: Execute, head: str, rows: Sequence[Sequence[object]]) -> None:
    """Inserts rows of equal width; `head` is the statement up to VALUES."""
    update_rows(execute, head + " VALUES {rows}", rows)


def update_rows(execute: Execute, template: str, rows: Sequence[Sequence[object]]) -> int:
    """Updates rows by the values of rows of equal width; `{rows}` in the template stands for those.

    Returns:
        How many rows have changed.
    """
    # Sizes are powers of two: few different statements, all of them stay prepared.
    start = changed = 0
    while start < len(rows):
        size = min(_LARGEST, 1 << ((len(rows) - start).bit_length() - 1))
        values = [value for row in rows[start : start + size] for value in row]
        changed += execute(_statement(template, size, len(rows[start])), values).rowcount
        start += size
    return changed


@lru_cache(maxsize=256)
def _statement(template: str, count: int, width: int) -> str:
    row = f"({','.join('?' * width)})"
    return template.format(rows=",".join([row] * count))
