"""Connections to a PostgreSQL server that understand the store's SQL."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, cast

import psycopg
from psycopg import pq
from psycopg.adapt import PyFormat, Transformer
from psycopg.errors import error_from_result
from psycopg.types.numeric import Int8BinaryDumper

from agl_grpc.store.clock import SECOND, Clock
from agl_grpc.store.errors import invalid_field
from agl_grpc.store.storage.counters import NAMES, Counters
from agl_grpc.store.storage.postgres import locks
from agl_grpc.store.storage.postgres.clock import DatabaseClock
from agl_grpc.store.storage.postgres.own import OwnEntries

Raw = psycopg.Connection[tuple[Any, ...]]

_CONNECT_SECONDS = 5
_STALLED_MS = 5_000
_PREPARED = 500

GAP = 5 * SECOND
"""When no server wrote for so long, leases could not be renewed either: they are extended first (R9)."""

BEAT = SECOND
"""A server that has nothing to write says so often that it lives."""

# PostgreSQL's binary format for COPY: a signature, flags and the length of an extension, both zero; at the
# end a row of -1 fields.
_COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COPY_END = b"\xff\xff"

_NOW = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
_BEGIN = f"BEGIN; {locks.WRITE}; SELECT {_NOW}, beat, {', '.join(NAMES)} FROM counters"


def connect(url: str) -> Raw:
    """A connection on which transactions are begun by hand."""
    raw = psycopg.connect(
        url,
        autocommit=True,
        cursor_factory=psycopg.RawCursor,
        connect_timeout=_CONNECT_SECONDS,
        application_name="agl-grpc store",
        # A network that swallows packets must not hold a server, or its locks, for hours.
        keepalives_idle=5,
        keepalives_interval=2,
        keepalives_count=3,
        tcp_user_timeout=10_000,
    )
    # Statements are prepared here, under names of this module's own.
    raw.prepare_threshold = None
    # One type for all integers: else each size of a number makes another prepared statement.
    raw.adapters.register_dumper(int, Int8BinaryDumper)
    return cast(Raw, raw)


@lru_cache(maxsize=2048)
def translate(sql: str) -> bytes:
    """The store's SQL with PostgreSQL's names for parameters."""
    parts = sql.split("?")
    return "".join(f"{part}${i}" for i, part in enumerate(parts[:-1], 1)).encode() + parts[-1].encode()


class Rows:
    """What a statement came to; see `Cursor`."""

    __slots__ = ("_next", "_rows", "rowcount")

    def __init__(self, rows: list[tuple[Any, ...]], rowcount: int) -> None:
        self.rowcount = rowcount
        self._rows = rows
        self._next = 0

    def fetchone(self) -> tuple[Any, ...] | None:
        """The next row; None = no more."""
        if self._next == len(self._rows):
            return None
        self._next += 1
        return self._rows[self._next - 1]

    def fetchall(self) -> list[tuple[Any, ...]]:
        """The rows that are left."""
        left = self._rows[self._next :] if self._next else self._rows
        self._next = len(self._rows)
        return left

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self.fetchall())


class PostgresConnection:
    """As `Connection` says. A command has some twenty statements, so they go to libpq with little in between:
    prepared, values and rows in binary, without the driver's cursors.
    """

    def __init__(self, raw: Raw) -> None:
        self.raw = raw
        self.total_changes = 0
        self._prepared: dict[tuple[str, tuple[int, ...]], bytes] = {}
        self._transformer = Transformer(raw)

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> Rows:
        """Carries a statement out.

        Raises:
            StoreError: INVALID_FIELD for text that PostgreSQL cannot hold.
        """
        transformer = self._transformer
        try:
            # Any: the stubs of libpq's calls do not say that a value may be NULL.
            sent: Any = transformer.dump_sequence(values, [PyFormat.AUTO] * len(values))
        except psycopg.DataError as error:
            raise _explained(error) from error
        types = transformer.types or ()
        name = self._prepared.get((sql, types)) or self._prepare(sql, types)
        result = self.raw.pgconn.exec_prepared(name, sent, transformer.formats, pq.Format.BINARY)
        if result.status == pq.ExecStatus.TUPLES_OK:
            transformer.set_pgresult(result, format=pq.Format.BINARY)
            rows = transformer.load_rows(0, result.ntuples, tuple)
        elif result.status == pq.ExecStatus.COMMAND_OK:
            rows = []
        else:
            raise self._error(result)
        changed = result.command_tuples or 0
        if changed and not sql.startswith("SELECT"):
            self.total_changes += changed
        return Rows(rows, changed)

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]], /) -> None:
        """Carries a statement out for each row of values."""
        found = list(rows)
        if len(found) == 1:
            self.execute(sql, found[0])
        elif found:
            # The driver sends them all before it waits for the first answer.
            cursor = self.raw.cursor()
            try:
                cursor.executemany(translate(sql), found)
            except psycopg.DataError as error:
                raise _explained(error) from error
            self.total_changes += max(0, cursor.rowcount)

    def _prepare(self, sql: str, types: tuple[int, ...]) -> bytes:
        if len(self._prepared) >= _PREPARED:
            self._check(self.raw.pgconn.exec_(b"DEALLOCATE ALL"))
            self._prepared.clear()
        name = b"s%d" % len(self._prepared)
        self._check(self.raw.pgconn.prepare(name, translate(sql), types))
        self._prepared[sql, types] = name
        return name

    def _check(self, result: pq.abc.PGresult) -> None:
        if result.status != pq.ExecStatus.COMMAND_OK:
            raise self._error(result)

    def _error(self, result: pq.abc.PGresult) -> psycopg.Error:
        if self.raw.pgconn.status != pq.ConnStatus.OK:
            return psycopg.OperationalError(result.get_error_message().strip())
        return error_from_result(result)

    def begin_read(self) -> None:
        """Begins a transaction whose statements all see one state of the store."""
        self.raw.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")

    def rollback(self) -> None:
        """Undoes the transaction."""
        self.raw.execute("ROLLBACK")

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return self.raw.info.transaction_status in (
            pq.TransactionStatus.INTRANS,
            pq.TransactionStatus.INERROR,
        )

    @property
    def aborted(self) -> bool:
        """Whether a failed statement has made the open transaction useless up to its last savepoint."""
        return self.raw.info.transaction_status == pq.TransactionStatus.INERROR

    def close(self) -> None:
        """Closes the connection."""
        self.raw.close()


class PostgresWriter(PostgresConnection):
    """The connection that writes.

    Args:
        raw: The driver's connection.
        clock: The store's; a DatabaseClock is kept in step.
        own: Where the positions of this server's own log entries are noted, first and last of each group.

    Attributes:
        counters: The keys given out so far, by all servers.
        gap: Whether no server had the database for so long that leases could not be renewed.
    """

    syncs = False

    def __init__(self, raw: Raw, clock: Clock, own: OwnEntries) -> None:
        super().__init__(raw)
        self.counters = Counters((0,) * len(NAMES))
        self.gap = False
        self._clock = clock
        self._own = own
        self._time = 0
        self._beat = 0
        self._events = 0
        self._changes = 0
        raw.execute(f"SET idle_in_transaction_session_timeout = {_STALLED_MS}")
        raw.execute(f"SET lock_timeout = {2 * _STALLED_MS}")
        if raw.execute("SHOW synchronous_commit").fetchone() in (("off",), ("local",)):
            # What is acknowledged is on disk, whatever the server's default is.
            raw.execute("SET synchronous_commit = on")

    def load_counters(self) -> None:
        """Reads the counters outside of a group."""
        self.begin()
        self.rollback()

    def begin(self) -> None:
        """Begins a group: waits until no other server writes, then reads what they left."""
        cursor = self.raw.execute(_BEGIN)
        while cursor.nextset():
            pass
        row = cursor.fetchone()
        assert row is not None, "the counters are missing"
        self._time, self._beat = row[:2]
        self.gap = False
        # Leases run by the store's clock: one that a test moves does not know how long servers were away.
        if isinstance(self._clock, DatabaseClock):
            self._clock.keep(self._time)
            self.gap = self._time - self._beat > GAP
        self.counters = Counters(row[2:])
        self._events = self.counters.last("events")
        self._changes = self.total_changes

    def load(self, table: str, columns: tuple[str, ...], values: Sequence[Any]) -> None:
        """Inserts many rows by COPY. Groups are serial, so what the command has not found is not there."""
        if not values:
            return
        width = len(columns)
        cursor = self.raw.cursor()
        command = f"COPY {table} ({', '.join(columns)}) FROM STDIN (FORMAT BINARY)".encode()
        row = struct.Struct("!h" + "iq" * (width - 1) + "i")
        with cursor.copy(command) as copy:
            parts = [_COPY_HEADER]
            for start in range(0, len(values), width):
                data = values[start + width - 1]
                integers = [part for value in values[start : start + width - 1] for part in (8, value)]
                parts += (row.pack(width, *integers, len(data)), data)
            copy.write(b"".join([*parts, _COPY_END]))
        self.total_changes += len(values) // width

    def commit(self) -> None:
        """Writes the counters and the beat, tells the other servers of events, and commits."""
        newest = self.counters.last("events")
        statements = []
        if self.counters.changed() or self._time - self._beat >= BEAT // 2:
            columns = [f"{name} = {self.counters.last(name)}" for name in NAMES]
            statements.append(f"UPDATE counters SET {', '.join(columns)}, beat = {self._time}")
        if newest > self._events:
            statements.append(f"NOTIFY {locks.CHANNEL}")
        with self._own.committing:
            self.raw.execute("; ".join([*statements, "COMMIT"]).encode())
            if newest > self._events:
                self._own.add(self._events + 1, newest)

    def sync(self) -> None:
        """Nothing is left to be done after a commit."""


def _explained(error: psycopg.DataError) -> Exception:
    if "NUL" in str(error):
        return invalid_field("", "a text holds the character NUL, which this store's database cannot keep")
    return error
