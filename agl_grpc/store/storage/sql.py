"""Pieces of SQL that every engine understands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from agl_grpc.store.storage.engine import Connection

T = TypeVar("T")

LAST_TEXT = f"'{chr(0x10FFFF)}'"
"""Text that sorts after all ids: nulls last."""


def marks(count: int) -> str:
    """Parameters of an IN list; an empty one holds nothing."""
    return ",".join("?" * count) or "NULL"


def by_key(db: Connection, sql: str, keys: Sequence[int], most: int = 256) -> dict[int, Any]:
    """Rows by their integer keys, in the order of the keys; those that do not exist are left out.

    Args:
        db: Where they are.
        sql: A SELECT whose first column is the key; `{keys}` stands for the list of keys.
        keys: The keys.
        most: How many are looked for at once, a power of two.
    """
    found: dict[int, Any] = {}
    for part in padded(keys, most):
        for row in db.execute(sql.format(keys=marks(len(part))), part):
            found[row[0]] = row
    return {key: found[key] for key in keys if key in found}


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
