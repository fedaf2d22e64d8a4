"""Learns what other servers of the database did: told by notifications, and looking by itself each second."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import psycopg

from agl_grpc.store.storage.engine import Connection, News
from agl_grpc.store.storage.events import EventRow
from agl_grpc.store.storage.postgres import locks
from agl_grpc.store.storage.postgres.connection import BEAT, PostgresConnection, Raw, connect
from agl_grpc.store.storage.postgres.own import END, OwnEntries

_TICK_SECONDS = 0.2
_LOOK_SECONDS = 1.0
_AGAIN_SECONDS = 0.5
_PAGE = 1000
_NEW = (
    "SELECT position, run_key, entity, kind, ref, low, high, time, entity_id FROM events "
    "WHERE position > ? AND position < ? ORDER BY position LIMIT ?"
)
_log = logging.getLogger(__name__)


class Follower:
    """A thread with a connection of its own.

    Args:
        url: The database.
        position: Where the log ended when this server began.
        own: This server's own entries; they are no news.
        on_news: Called in the thread.
        next_due: Reads when a timer may have to act.

    Attributes:
        pid: The connection's backend; 0 = not connected.
    """

    def __init__(
        self,
        url: str,
        position: int,
        own: OwnEntries,
        on_news: Callable[[News], None],
        next_due: Callable[[Connection], int | None],
    ) -> None:
        self.pid = 0
        self._url = url
        self._position = position
        self._own = own
        self._on_news = on_news
        self._next_due = next_due
        self._others: set[int] = set()
        self._counted = 0.0
        self._stop = threading.Event()
        self._tried = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="store-follow", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def wait_present(self) -> int:
        """The backend of the connection; waits until the first one is known to others, or has failed."""
        self._tried.wait()
        return self.pid

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()

    def _serve(self) -> None:
        while not self._stop.is_set():
            try:
                self._follow()
            except psycopg.Error as error:
                self.pid = 0
                self._tried.set()
                _log.warning("other servers cannot be followed now: %s", str(error).partition("\n")[0])
                self._stop.wait(_AGAIN_SECONDS)

    def _follow(self) -> None:
        raw = connect(self._url)
        with raw:
            self.pid = raw.info.backend_pid
            raw.execute(f"LISTEN {locks.CHANNEL}")
            raw.execute(locks.PRESENT)
            raw.execute(f"NOTIFY {locks.CHANNEL}, '{locks.JOINED} {self.pid}'")
            self._tried.set()
            connection = PostgresConnection(raw)
            looked = 0.0
            while not self._stop.is_set():
                told = self._hear(raw)
                events: list[EventRow] = []
                if told or time.monotonic() - looked >= _LOOK_SECONDS:
                    looked = time.monotonic()
                    events = self._new_events(connection)
                due, quiet = self._next_due(connection), self._is_quiet(connection)
                self._on_news(News(events, due, quiet, self._has_left(connection)))
            raw.execute(locks.ABSENT)

    def _hear(self, raw: Raw) -> bool:
        """Waits a moment for notifications; whether any came, also during the statements before."""
        told = [one.payload for one in raw.notifies(timeout=_TICK_SECONDS, stop_after=1)]
        joined = {int(text.split()[1]) for text in told if text.startswith(locks.JOINED)}
        self._others |= joined - {self.pid}
        return bool(told)

    def _is_quiet(self, connection: PostgresConnection) -> bool:
        """Whether it is time that some server says that it lives."""
        row = connection.execute(
            "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint - beat FROM counters"
        ).fetchone()
        return row is not None and row[0] > BEAT

    def _has_left(self, connection: PostgresConnection) -> bool:
        """Whether one of the other servers has gone; one that connects anew looks the same."""
        if time.monotonic() - self._counted < _TICK_SECONDS:
            return False  # notifications come far more often
        self._counted = time.monotonic()
        before = self._others
        self._others = {pid for (pid,) in connection.execute(locks.OTHERS, (self.pid,))}
        return not before <= self._others

    def _new_events(self, connection: PostgresConnection) -> list[EventRow]:
        """Entries after the last ones seen, without this server's own."""
        found: list[EventRow] = []
        while True:
            self._position = self._own.skip(self._position)
            before = self._own.next()
            rows = connection.execute(_NEW, (self._position, before, _PAGE)).fetchall()
            bound = self._own.next_settled()
            rows = [row for row in rows if row[0] < bound]
            found += [EventRow._make(row[1:]) for row in rows]
            if rows:
                self._position = rows[-1][0]
            elif before < END:
                # What stood between was pruned.
                self._position = before - 1
            if len(rows) < _PAGE and bound == END:
                return found
