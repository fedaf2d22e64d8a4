"""A connection to an SQLite file."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from agl_grpc.store.storage.counters import SELECT, Counters

_LARGEST = 256
# What macOS has instead does more than is needed.
_sync: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)


class SqliteConnection(sqlite3.Connection):
    """As `WriteConnection` and `ReadConnection` say. Statements go to SQLite with nothing in between.

    Attributes:
        counters: The keys given out so far. Nobody else writes, so they are read once.
    """

    aborted = False
    gap = False
    counters: Counters
    _log: int | None = None

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

    def open_log(self, path: Path) -> None:
        """Takes over from SQLite to bring the write-ahead log to the disk; it must be there."""
        # No locks hang on this file: closing a second descriptor gives none away.
        self._log = os.open(path, os.O_RDWR)

    @property
    def syncs(self) -> bool:
        """Whether `sync` does something."""
        return self._log is not None

    def commit(self) -> None:
        """Writes the counters and commits."""
        self.counters.save(self)
        super().commit()

    def sync(self) -> None:
        """Returns when every commit's frames of the log are on disk."""
        if self._log is not None:
            _sync(self._log)

    def close(self) -> None:
        """Closes the connection."""
        super().close()
        if self._log is not None:
            os.close(self._log)
            self._log = None


@lru_cache(maxsize=64)
def _insert(table: str, columns: tuple[str, ...], rows: int) -> str:
    # One statement for many rows: each statement costs one hand-over of the interpreter lock.
    row = f"({','.join('?' * len(columns))})"
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES {','.join([row] * rows)}"
