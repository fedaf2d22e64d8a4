"""What a command sees of the transaction it runs in."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from agl_grpc.store.storage.engine import WriteConnection
from agl_grpc.store.storage.events import EventRow


class Redo(Exception):
    """Raised by a command that took for granted what turns out not to hold: it runs again with "
    "`careful` set."""


class Answered(NamedTuple):
    """What is remembered of a request that was carried out (R13).

    Attributes:
        request_hash: Of the request's bytes.
        response: The answer's bytes.
        create_time: When, in microseconds.
        replaces: Whether an answer that was given before may be there; else the request was taken for new.
    """

    request_hash: bytes
    response: bytes
    create_time: int
    replaces: bool


class Tx:
    """One command's view of the group's transaction. Used in the writer's thread only.

    Attributes:
        answered: Answers of the group's commands that are not written yet, by the requests' digests.
        connection: The writing connection; `execute` is its method.
        counters: Gives out keys.
        now: The store's time in microseconds, the same for the whole command.
        careful: Whether the command runs in a savepoint of its own; else it may raise Redo.
    """

    __slots__ = (
        "answered",
        "careful",
        "connection",
        "counters",
        "deferred",
        "due",
        "events",
        "execute",
        "executemany",
        "finals",
        "now",
        "on_commit",
        "on_rollback",
    )

    def __init__(
        self, connection: WriteConnection, now: int, careful: bool, answered: dict[bytes, Answered]
    ) -> None:
        self.answered = answered
        self.careful = careful
        self.connection = connection
        self.execute = connection.execute
        self.executemany = connection.executemany
        self.counters = connection.counters
        self.now = now
        self.events: list[EventRow] = []
        self.on_commit: list[Callable[[], object]] = []
        self.on_rollback: list[Callable[[], object]] = []
        self.finals: list[Callable[[], object]] = []
        self.deferred: dict[tuple[str, int], tuple[str, tuple[object, ...]]] = {}
        self.due: int | None = None

    def insert(self, sql: str, values: tuple[object, ...]) -> int:
        """Inserts one row; the statement ends with RETURNING the row's key, which is the result."""
        ((key,),) = self.execute(sql, values).fetchall()
        return int(key)

    def event(
        self,
        run_key: int,
        entity: int,
        kind: int,
        ref: int,
        *,
        low: int = 0,
        high: int = 0,
        entity_id: str | None = None,
    ) -> None:
        """Adds an entry to the event log, in this transaction; the fields are those of EventRow."""
        self.events.append(EventRow(run_key, entity, kind, ref, low, high, self.now, entity_id))

    def catalog_changed(self) -> None:
        """Says that rows have changed which servers remember: runs, queues, sets of labels, the latest
        resources."""
        self.counters.take("catalog")

    def after_commit(self, callback: Callable[[], object]) -> None:
        """Calls back on the event loop once the change is on disk, before the command's own answer."""
        self.on_commit.append(callback)

    def after_rollback(self, callback: Callable[[], object]) -> None:
        """Calls back in the writer's thread if this command comes to nothing."""
        self.on_rollback.append(callback)

    def at_end(self, callback: Callable[[], object]) -> None:
        """Calls back at the end of the command, still inside its transaction."""
        self.finals.append(callback)

    def defer(self, name: str, key: int, template: str, row: tuple[object, ...]) -> None:
        """Writes later in the same transaction, with one statement for the rows of many commands.

        Args:
            name: What is written; of several writes with one name and key only the last counts.
            key: Of the row that changes.
            template: The statement, for `update_rows`.
            row: Its values.
        """
        self.deferred.pop((name, key), None)
        self.deferred[name, key] = (template, row)

    def arm(self, due: int | None) -> None:
        """Makes sure that timers are looked at no later than this moment (microseconds)."""
        if due is not None and (self.due is None or due < self.due):
            self.due = due
