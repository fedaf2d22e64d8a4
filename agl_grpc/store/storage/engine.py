"""What a database engine is to the rest of the store. The SQL is one dialect that all engines understand:
`?` for parameters, ON CONFLICT, RETURNING, CASE instead of scalar max and min, TRUE instead of 1.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from agl_grpc.store.clock import Clock
from agl_grpc.store.storage.counters import Counters
from agl_grpc.store.storage.events import EventRow


class DatabaseError(Exception):
    """The database cannot be used; the message is one line for people."""


class Trouble(enum.Enum):
    """What an exception means for the writer."""

    NONE = "the command's own: it fails alone"
    BUSY = "another program holds the write lock: wait"
    RETRY = "others were in the way: the group runs again"
    FULL = "the disk is full: writes are refused until there is room"
    AWAY = "the database does not answer: calls are refused until it does"
    FATAL = "storage can no longer be trusted: the process ends"


class Cursor(Protocol):
    """Rows of a statement."""

    @property
    def rowcount(self) -> int:
        """Rows that the statement changed."""
        ...

    def fetchone(self) -> Any:
        """The next row; None = no more."""
        ...

    def fetchall(self) -> list[Any]:
        """The rows that are left."""
        ...

    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    """One connection; used by one thread at a time."""

    def execute(self, sql: str, values: Any = ..., /) -> Cursor:
        """Carries a statement out."""
        ...

    def executemany(self, sql: str, rows: Iterable[Any], /) -> object:
        """Carries a statement out for each row of values."""
        ...


class WriteConnection(Connection, Protocol):
    """The writer's connection.

    Attributes:
        counters: The keys given out so far; current from `begin` on.
    """

    counters: Counters

    @property
    def total_changes(self) -> int:
        """Grows whenever a statement changes rows."""
        ...

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        ...

    @property
    def aborted(self) -> bool:
        """Whether a failed statement has made the open transaction useless up to its last savepoint."""
        ...

    @property
    def gap(self) -> bool:
        """Whether no server had the database for so long that leases could not be renewed (R9)."""
        ...

    def begin(self) -> None:
        """Begins the transaction of a group; nobody else writes until it ends."""
        ...

    def load(self, table: str, columns: tuple[str, ...], values: Sequence[Any]) -> None:
        """Inserts many rows, none of which is there, in the quickest way that the engine has.

        Args:
            table: Where they go.
            columns: What a row holds: integers, and bytes in the last column.
            values: The rows' values, one row after the other.
        """
        ...

    @property
    def syncs(self) -> bool:
        """Whether what was committed is on disk only after `sync`; else it is when `commit` returns."""
        ...

    def commit(self) -> None:
        """Writes the counters and ends the transaction; readers see it from here on."""
        ...

    def sync(self) -> None:
        """Returns when everything that was committed before is on disk; called by any thread."""
        ...

    def rollback(self) -> None:
        """Undoes the transaction."""
        ...

    def close(self) -> None:
        """Closes the connection."""
        ...


class ReadConnection(Connection, Protocol):
    """A connection that reads only."""

    def begin_read(self) -> None:
        """Begins a transaction whose statements all see one state of the store."""
        ...

    def rollback(self) -> None:
        """Ends the transaction."""
        ...

    def close(self) -> None:
        """Closes the connection."""
        ...


class News(NamedTuple):
    """What other servers did, as a server learns of it.

    Attributes:
        events: New entries of the event log, without the server's own.
        due: The earliest moment at which a timer may have to act; None = there is none.
        quiet: Nobody wrote for a while: some server should say that it lives.
        left: A server that had the database open has gone, or may have.
    """

    events: Sequence[EventRow]
    due: int | None
    quiet: bool
    left: bool


class Database(Protocol):
    """An open database.

    Attributes:
        store_id: Identity of the database, minted when it was made.
    """

    store_id: str

    @property
    def backend(self) -> str:
        """`sqlite`, `memory` or `postgres`."""
        ...

    def describe(self) -> str:
        """Where it is, for people."""
        ...

    def clock(self) -> Clock:
        """The clock that leases are judged by."""
        ...

    def connect_writer(self, clock: Clock) -> WriteConnection:
        """The one connection that writes; `clock` is the store's, kept in step with the database's."""
        ...

    def connect_reader(self) -> ReadConnection:
        """A connection that cannot write."""
        ...

    def start(self, on_news: Callable[[News], None], next_due: Callable[[Connection], int | None]) -> None:
        """Begins what runs beside the writer.

        Args:
            on_news: Called in a thread of the database's own with what other servers did.
            next_due: Reads when a timer may have to act.
        """
        ...

    def is_shared(self, connection: Connection) -> bool:
        """Whether another server has the database open now."""
        ...

    def trouble(self, error: BaseException) -> Trouble:
        """What an exception of one of its connections means."""
        ...

    def explain(self, error: BaseException) -> str:
        """One line for people about an exception."""
        ...

    def size_bytes(self, connection: Connection) -> int:
        """Bytes that it occupies."""
        ...

    def close(self) -> None:
        """Ends what `start` began and closes every connection."""
        ...
