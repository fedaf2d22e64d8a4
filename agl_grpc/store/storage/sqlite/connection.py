"""A connection to an SQLite file."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from agl_grpc.store.storage.counters import SELECT, Counters

_LARGEST = 256


class SqliteConnection(sqlite3.Connection):
    """As `WriteConnection` and `ReadConnection` say. Statements go to SQLite with nothing in between.

    Attributes:
        counters: The keys given out so far. Nobody else writes, so they are read once.
    """

    aborted = False
    gap = False
    counters: Counters

    def load_counters(self) -> None:
        """Reads the counters; before the first transaction."""
        self.counters = Counters(self.execute(SELECT).fetchone())

    def begin(self) -> None:
        """Begins a transaction that writes."""
        self.execute("BEGIN IMMEDIATE")

    def begin_read(self) -> None:
        """Begins a transaction that reads."""
        self.execute("BEGIN")

    def load(self, table: str, columns: tuple[str, ...], values: Sequence[Any]) -> None:
        """Inserts many rows; see `WriteConnection`."""
        width = len(columns)
        start, rows = 0, len(values) // width
        while start < rows:
            # Sizes are powers of two: few different statements, all of them stay prepared.
            size = min(_LARGEST, 1 << ((rows - start).bit_length() - 1))
            self.execute(_insert(table, columns, size), values[start * width : (start + size) * width])
            start += size

    def commit(self) -> None:
        """Writes the counters and commits."""
        self.counters.save(self)
        super().commit()


@lru_cache(maxsize=64)
def _insert(table: str, columns: tuple[str, ...], rows: int) -> str:
    # One statement for many rows: each statement costs one hand-over of the interpreter lock.
    row = f"({','.join('?' * len(columns))})"
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES {','.join([row] * rows)}"
