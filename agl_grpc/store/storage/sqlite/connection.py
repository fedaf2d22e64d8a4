"""A connection to an SQLite file."""

from __future__ import annotations

import sqlite3

from agl_grpc.store.storage.counters import SELECT, Counters


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

    def commit(self) -> None:
        """Writes the counters and commits."""
        self.counters.save(self)
        super().commit()
