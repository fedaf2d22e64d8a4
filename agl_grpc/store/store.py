"""The store of one server: database, writer, reads, hub and timers, put together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from agl_grpc.store.clock import Clock
from agl_grpc.store.errors import StoreError
from agl_grpc.store.events.hub import Hub
from agl_grpc.store.events.timers import Timers
from agl_grpc.store.storage import maintenance
from agl_grpc.store.storage.command import Lane
from agl_grpc.store.storage.database import open_database
from agl_grpc.store.storage.engine import Connection, Database, News
from agl_grpc.store.storage.events import EventRow
from agl_grpc.store.storage.idempotency import RequestKey, once
from agl_grpc.store.storage.reads import ReadPool
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.store.storage.writer import Writer

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Store:
    """Everything that the handlers need. Made by `Store.open`, on the event loop that serves.

    Attributes:
        database: Where everything is kept.
        clock: The store's time.
        writer: The only thread that writes.
        reads: Threads that read.
        hub: Wakes watchers after commits.
        timers: Fires what is due.
        maintenance: Prunes in the background.
        on_close: Coroutines that end what else runs in the background.
        on_news: Called on the event loop with what other servers have added to the event log.
        start_time: Microseconds since the epoch.
    """

    def __init__(self, database: Database, clock: Clock) -> None:
        self.database = database
        self.clock = clock
        self.start_time = clock.now()
        self.hub = Hub()
        self._shared: dict[Hashable, _SharedRead] = {}
        self.reads = ReadPool(database)
        self.writer = Writer(database, clock, self._committed)
        self.timers = Timers(self.writer, clock)
        self.maintenance = maintenance.Maintenance(self.writer)
        self.on_close: list[Callable[[], Coroutine[object, object, None]]] = []
        self.on_news: list[Callable[[Sequence[EventRow]], None]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(
        cls, where: Path | str | None, *, clock: Clock | None = None, limit_pages: int = 0
    ) -> Store:
        """Opens the database and starts the writer.

        Args:
            where: An SQLite file, or the URL of a PostgreSQL database; None = a private throw-away file.
            clock: The store's time; default the database's.
            limit_pages: Largest size in pages of 8 KiB; 0 = the disk's.

        Raises:
            DatabaseError: The database cannot be used; one line says why.
        """
        database = open_database(where, limit_pages=limit_pages)
        store = cls(database, clock or database.clock())
        store.writer.start()
        loop = asyncio.get_running_loop()
        database.start(partial(_hand_over, loop, store._news), store.timers.next_due)
        store.maintenance.start()
        return store

    async def write(self, run: Callable[[Tx], T], lane: Lane = Lane.LIFECYCLE, rows: int = 1) -> T:
        """Carries a command out; returns when it is on disk. See Writer.submit."""
        return await self.writer.submit(run, lane, rows)

    async def change(self, key: RequestKey, run: Callable[[Tx], bytes], rows: int = 1) -> bytes:
        """Carries a change out once for its request id (R13); returns the serialised response."""
        return await self.writer.submit(lambda tx: once(tx, key, run), Lane.LIFECYCLE, rows)

    async def read(self, read: Callable[[Connection], T]) -> T:
        """Reads one page in one transaction. See ReadPool.run. What was read is on disk."""
        found = await self.reads.run(read)
        await self.writer.settled()
        return found

    async def read_shared(self, name: Hashable, read: Callable[[Connection], T]) -> T:
        """As `read`, made once for all who want it at the same time.

        Args:
            name: What is read; the same name means the same result.
            read: Reads it.
        """
        # A read that began before the newest change was published may not have seen it.
        key = (name, self.hub.generation)
        shared = self._shared.get(key)
        if shared is None:
            reading = asyncio.ensure_future(self.read(read))
            shared = self._shared[key] = _SharedRead(reading)
            reading.add_done_callback(lambda _: self._shared.pop(key, None))
        result: T = await shared.result()
        return result

    def _committed(self, events: Sequence[EventRow], due: int | None) -> None:
        if events:
            self.hub.publish(events)
        self.timers.arm(due)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Does something beside the calls; `close` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, StoreError):
            _log.error("work beside the calls failed", exc_info=error)

    def _news(self, news: News) -> None:
        """What other servers did."""
        if self.hub.closed:
            return
        if news.events:
            self.hub.publish(news.events)
            for tell in self.on_news:
                tell(news.events)
        self.timers.arm(news.due)
        if news.left:
            self.writer.was_away()
        if news.quiet or news.left:
            with contextlib.suppress(StoreError):
                self.writer.submit(_beat).add_done_callback(_look_at)

    async def close(self) -> None:
        """Ends waits, carries out what was accepted, closes the database."""
        self.hub.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.maintenance.close()
        for close in self.on_close:
            await close()
        await self.timers.close()
        await self.writer.stop()
        self.reads.close()
        self.database.close()


class _SharedRead:
    """A read that many wait for, each with a future of its own: one who leaves takes nothing from the others.

    As `asyncio.shield` would do it, with one callback for all in place of several for each.
    """

    def __init__(self, reading: asyncio.Future[Any]) -> None:
        self._waiting: list[asyncio.Future[Any]] = []
        reading.add_done_callback(self._settle)

    def result(self) -> asyncio.Future[Any]:
        """What was read, or why it could not be; only before it is done."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        return future

    def _settle(self, reading: asyncio.Future[Any]) -> None:
        error = None if reading.cancelled() else reading.exception()
        for future in self._waiting:
            if future.done():
                continue
            if reading.cancelled():
                future.cancel()
            elif error is not None:
                future.set_exception(error)
            else:
                future.set_result(reading.result())


def _hand_over(loop: asyncio.AbstractEventLoop, receive: Callable[[News], None], news: News) -> None:
    """From the database's thread to the event loop, which may have been closed under us."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(receive, news)


def _beat(_tx: Tx) -> None:
    """Nothing: the group's commit says that this server lives."""


def _look_at(future: asyncio.Future[None]) -> None:
    if not future.cancelled():
        future.exception()
