"""The single writer: a thread that groups waiting commands into transactions.

Durability costs one fsync per group at most, and the next group is carried out meanwhile. Each command has a
savepoint of its own: one that fails is undone alone. Nobody is answered before the group is on disk.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn, TypeVar

from agl_grpc.store.clock import Clock
from agl_grpc.store.errors import (
    StoreError,
    draining,
    internal,
    overloaded,
    storage_away,
    storage_busy,
    storage_full,
)
from agl_grpc.store.storage import failpoints
from agl_grpc.store.storage.bulk import insert_rows, update_rows
from agl_grpc.store.storage.command import Command, Lane, Run
from agl_grpc.store.storage.engine import Database, Trouble
from agl_grpc.store.storage.events import EventRow
from agl_grpc.store.storage.idempotency import write_answers
from agl_grpc.store.storage.syncer import Syncer
from agl_grpc.store.storage.transaction import Answered, Redo, Tx

T = TypeVar("T")

_log = logging.getLogger(__name__)

MIXED_SECONDS = 0.005
MIXED_ROWS = 500
ALONE_SECONDS = 0.020
ALONE_ROWS = 5_000
_MAX_WAITING = 50_000

_BUSY_SECONDS = 0.05
_MOST_RETRIES = 20

_INSERT_EVENT = "INSERT INTO events (position, run_key, entity, kind, ref, low, high, time, entity_id)"


def exit_process(line: str) -> NoReturn:
    """Ends the process at once: after a failed fsync nothing held in memory can be trusted."""
    print(f"agl-grpc store: {line}", file=sys.stderr, flush=True)
    os._exit(1)


class Writer:
    """The only thread of this process that writes.

    Args:
        database: What is written to.
        clock: The store's time.
        on_commit: Called on the event loop after each group with its events and the earliest timer armed.
        on_fatal: Called in the writer's thread when storage can no longer be trusted; must not return.

    Attributes:
        forgets: Called in the writer's thread when another server has changed what servers remember.
        on_gap: Commands that are carried out first when no server had the database for a while.
        on_return: Commands that are carried out first after such a gap, after groups that were refused (the
            database was away, full or busy), and when `was_away` says so.
    """

    def __init__(
        self,
        database: Database,
        clock: Clock,
        on_commit: Callable[[Sequence[EventRow], int | None], None],
        on_fatal: Callable[[str], NoReturn] = exit_process,
    ) -> None:
        self.forgets: list[Callable[[], None]] = []
        self.on_gap: list[Run] = []
        self.on_return: list[Run] = []
        self._database = database
        self._connection = database.connect_writer(clock)
        self._clock = clock
        self._catalog = self._connection.counters.last("catalog")
        self._lost = False
        self._absences = self._noted = 0
        self._retries = 0
        self._on_commit = on_commit
        self._on_fatal = on_fatal
        self._failpoints = failpoints.from_environment()
        self._lanes: tuple[deque[Command], deque[Command]] = (deque(), deque())
        self._wake = threading.Condition(threading.Lock())
        self._idle = False
        self._stopping = False
        self._segment: list[Command] = []
        self._answered: dict[bytes, Answered] = {}
        self._in_savepoint = False
        self._touched = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._commits = self._settled = 0
        self._readers: list[tuple[int, asyncio.Future[None]]] = []
        self._syncer = Syncer(self._sync, self._cannot_sync) if self._connection.syncs else None
        self._thread = threading.Thread(target=self._serve, name="store-writer", daemon=True)

    def start(self) -> None:
        """Starts the thread; answers arrive on the running event loop."""
        self._loop = asyncio.get_running_loop()
        if self._syncer is not None:
            self._syncer.start()
        self._thread.start()

    async def stop(self) -> None:
        """Carries out what waits, then ends the thread. Later commands are refused."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
        if self._syncer is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._syncer.stop)
        self._connection.close()

    async def settled(self) -> None:
        """Returns when all commits that a read may have seen by now are on disk."""
        if self._settled < self._commits:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._readers.append((self._commits, future))
            await future

    def waiting(self) -> tuple[int, int]:
        """Commands that wait, by lane."""
        return len(self._lanes[0]), len(self._lanes[1])

    def submit(self, run: Callable[[Tx], T], lane: Lane = Lane.LIFECYCLE, rows: int = 1) -> asyncio.Future[T]:
        """Queues a command; called on the event loop.

        Args:
            run: Executed in the writer's thread; may raise StoreError, which undoes what it did.
            lane: Lifecycle commands pass before span batches.
            rows: Roughly how many rows it writes.

        Returns:
            A future that is done once the command is on disk (or refused). Cancelling it undoes nothing.

        Raises:
            StoreError: OVERLOADED when too much waits, DRAINING after `stop`.
        """
        if self._stopping:
            raise draining()
        assert self._loop is not None, "start() comes first"
        queue = self._lanes[lane]
        if len(queue) >= _MAX_WAITING:
            raise overloaded("write_queue")
        future: asyncio.Future[T] = self._loop.create_future()
        queue.append(Command(run, future, rows, lane))
        # Read without the lock: the writer looks at the queues again after it has set `_idle`.
        if self._idle:
            with self._wake:
                self._wake.notify()
        return future

    def was_away(self) -> None:
        """Says that clients could not reach this server or another of its database; called by any thread."""
        self._absences += 1

    # In the writer's thread from here on.

    def _serve(self) -> None:
        try:
            self._work()
        except Exception as error:
            _log.exception("the writer failed")
            self._on_fatal(f"the writer failed, stopping at once: {error}")

    def _work(self) -> None:
        lifecycle, spans = self._lanes
        while True:
            if not lifecycle and not spans:
                with self._wake:
                    self._idle = True
                    while not lifecycle and not spans:
                        if self._stopping:
                            return
                        self._wake.wait()
                    self._idle = False
            self._group()

    def _group(self) -> None:
        done: list[Command] = []
        try:
            absences = self._absences
            self._begin()
            self._touched = False
            self._answered.clear()
            self._catch_up(done, away=absences != self._noted)
            self._fill(done)
            self._segment.clear()
            events = [event for command in done if command.error is None for event in command.begun.events]
            if not self._finish(done, events):
                self._carefully(done)
                return
            if self._failpoints is not None:
                self._failpoints.hit("before_commit")
            if self._syncer is not None:
                self._commits += 1  # before any reader can see it
            self._connection.commit()
            if self._failpoints is not None:
                self._failpoints.hit("after_commit")
        except Exception as error:
            self._segment.clear()
            self._fail(done, error, self._database.trouble(error))
            return
        self._in_savepoint = False
        self._noted = absences
        self._retries = 0
        self._catalog = self._connection.counters.last("catalog")
        dues = [command.tx.due for command in done if command.error is None and command.tx and command.tx.due]
        self._settle(done, events, min(dues, default=None))

    def _begin(self) -> None:
        if self._lost:
            self._connection = self._database.connect_writer(self._clock)
            self._lost = False
        while True:
            try:
                self._connection.begin()
            except Exception as error:
                if self._database.trouble(error) is not Trouble.BUSY:
                    raise
                _log.warning("another program holds the database's write lock; waiting for it")
                time.sleep(_BUSY_SECONDS)
            else:
                break
        if self._connection.counters.last("catalog") != self._catalog:
            for forget in self.forgets:
                forget()
            self._catalog = self._connection.counters.last("catalog")

    def _catch_up(self, done: list[Command], *, away: bool) -> None:
        gap = self._connection.gap
        for run in (*(self.on_gap if gap else ()), *(self.on_return if gap or away else ())):
            command = Command(run, None, 1, Lane.LIFECYCLE)
            done.append(command)
            self._careful(command)

    def _finish(self, done: list[Command], events: list[EventRow]) -> bool:
        """Writes what the commands left for the end; False = a request was carried out before."""
        deferred: dict[tuple[str, int], tuple[str, tuple[object, ...]]] = {}
        for command in done:
            if command.error is None:
                for key, write in command.begun.deferred.items():
                    deferred.pop(key, None)
                    deferred[key] = write
        self._write_deferred(deferred)
        if not write_answers(self._connection.execute, self._answered.items()):
            return False
        if events:
            first = self._connection.counters.take("events", len(events))
            rows = [(position, *event) for position, event in enumerate(events, first)]
            insert_rows(self._connection.execute, _INSERT_EVENT, rows)
        return True

    def _write_deferred(self, deferred: dict[tuple[str, int], tuple[str, tuple[object, ...]]]) -> None:
        """One statement for all rows of a kind; where a row is written in two ways, their order holds."""
        batches: dict[str, list[tuple[object, ...]]] = {}
        names: dict[int, str] = {}
        for (name, key), (template, row) in deferred.items():
            if names.setdefault(key, name) != name:
                self._write_batches(batches)
                names = {key: name}
            batches.setdefault(template, []).append(row)
        self._write_batches(batches)

    def _write_batches(self, batches: dict[str, list[tuple[object, ...]]]) -> None:
        for template, rows in batches.items():
            update_rows(self._connection.execute, template, rows)
        batches.clear()

    def _fill(self, done: list[Command]) -> None:
        lifecycle, spans = self._lanes
        mixed = bool(lifecycle and spans)
        seconds, most = (MIXED_SECONDS, MIXED_ROWS) if mixed else (ALONE_SECONDS, ALONE_ROWS)
        end = time.monotonic() + seconds
        rows = 0
        while lifecycle or spans:
            command = lifecycle.popleft() if lifecycle else spans.popleft()
            done.append(command)
            if command.careful:
                self._close_segment()
                self._careful(command)
            else:
                self._hopeful(command)
            rows += command.rows
            if rows >= most or time.monotonic() >= end:
                return
            if not mixed and lifecycle and spans:
                mixed, most, end = True, MIXED_ROWS, min(end, time.monotonic() + MIXED_SECONDS)

    # A savepoint for each command costs two statements each, and hardly any command fails after its first
    # write. So lifecycle commands run in segments without savepoints of their own; when one fails that has
    # written something, the segment is undone and its commands run again, each in its own savepoint.

    def _hopeful(self, command: Command) -> None:
        if self._touched and not self._segment:
            self._connection.execute("SAVEPOINT segment")
            self._in_savepoint = True
        before = self._connection.total_changes
        self._segment.append(command)
        try:
            self._run(command, careful=False)
        except Exception as error:
            if self._database.trouble(error) is not Trouble.NONE:
                raise
            self._failed(command, error, before)

    def _failed(self, command: Command, error: Exception, before: int) -> None:
        unchanged = self._connection.total_changes == before and not self._connection.aborted
        if unchanged and not isinstance(error, Redo):
            self._refuse(command, error)
            self._segment.remove(command)
            if not self._segment:
                self._close_savepoint()
            return
        if self._in_savepoint:
            self._connection.execute("ROLLBACK TO segment")
            self._close_savepoint()
        else:
            self._connection.rollback()
            self._begin()
        again = list(self._segment)
        self._segment.clear()
        for one in reversed(again):
            one.undone()
        for one in again:
            self._careful(one)

    def _careful(self, command: Command) -> None:
        self._touched = True
        self._connection.execute("SAVEPOINT command")
        try:
            self._run(command, careful=True)
        except Exception as error:
            if self._database.trouble(error) is not Trouble.NONE:
                raise
            self._undo(command, error)
        else:
            self._connection.execute("RELEASE command")

    def _run(self, command: Command, careful: bool) -> None:
        tx = command.tx = Tx(self._connection, self._clock.now(), careful, self._answered)
        command.result = command.run(tx)
        for callback in tx.finals:
            callback()

    def _close_segment(self) -> None:
        if self._segment:
            self._touched = True
            self._segment.clear()
            self._close_savepoint()

    def _close_savepoint(self) -> None:
        if self._in_savepoint:
            self._connection.execute("RELEASE segment")
            self._in_savepoint = False

    def _undo(self, command: Command, error: Exception) -> None:
        self._connection.execute("ROLLBACK TO command")
        self._connection.execute("RELEASE command")
        self._refuse(command, error)

    def _refuse(self, command: Command, error: Exception) -> None:
        command.undone()
        if isinstance(error, StoreError):
            command.error = error
        else:
            _log.error("a command failed", exc_info=error)
            command.error = internal()

    def _fail(self, done: list[Command], error: Exception, trouble: Trouble) -> None:
        if trouble is Trouble.NONE:
            raise error
        if trouble is Trouble.FATAL:
            self._on_fatal(f"storage failed, stopping at once: {self._database.explain(error)}")
        self._in_savepoint = False
        if trouble is Trouble.AWAY:
            self._lose(done, error)
            return
        if self._connection.in_transaction:
            self._connection.rollback()
        if trouble is Trouble.RETRY and self._retries < _MOST_RETRIES:
            self._again(done, error)
            return
        _log.warning("%d writes refused: %s", len(done), self._database.explain(error))
        self._refuse_all(done, storage_full() if trouble is Trouble.FULL else storage_busy())

    def _lose(self, done: list[Command], error: Exception) -> None:
        """The connection is gone: whoever waits is told, and the next group connects anew."""
        _log.warning("the database does not answer: %s", self._database.explain(error))
        self._lost = True
        self._connection.close()
        for queue in self._lanes:
            done += [queue.popleft() for _ in range(len(queue))]
        self._refuse_all(done, storage_away())

    def _again(self, done: list[Command], error: Exception) -> None:
        """Another server was in the way: the commands run again."""
        _log.info("a group of %d commands runs again: %s", len(done), self._database.explain(error))
        self._retries += 1
        self._requeue(done)

    def _carefully(self, done: list[Command]) -> None:
        """A request was carried out before: each command looks for its own first, and runs alone."""
        self._in_savepoint = False
        self._connection.rollback()
        for command in done:
            command.careful = True
        self._requeue(done)

    def _requeue(self, done: list[Command]) -> None:
        """The commands wait once more, in their order."""
        for command in reversed(done):
            if command.error is None:
                command.undone()
            command.error = command.tx = command.result = None
            if command.future is not None:
                self._lanes[command.lane].appendleft(command)

    def _refuse_all(self, done: list[Command], refusal: StoreError) -> None:
        self.was_away()
        for command in reversed(done):
            if command.error is None:
                command.undone()
                command.error = refusal
        self._settle(done, [], None)

    def _settle(self, done: list[Command], events: Sequence[EventRow], due: int | None) -> None:
        """Answers when the group is on disk, and all before it: a refusal may come of what they changed."""
        answer = partial(self._answer, done, events, due, self._commits)
        if self._syncer is None:
            answer()
        else:
            self._syncer.settle(answer, at_once=not any(self._lanes))

    def _sync(self) -> None:
        self._connection.sync()

    def _cannot_sync(self, error: Exception) -> NoReturn:
        self._on_fatal(f"storage failed, stopping at once: {self._database.explain(error)}")

    def _answer(self, done: list[Command], events: Sequence[EventRow], due: int | None, commits: int) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._deliver, done, events, due, commits)
        except RuntimeError:
            # The loop was closed under us: nobody is left to be answered.
            _log.warning("%d commands were written after the event loop had ended", len(done))

    def _deliver(
        self, done: list[Command], events: Sequence[EventRow], due: int | None, commits: int
    ) -> None:
        self._settled = commits
        self._on_commit(events, due)
        for command in done:
            if command.error is None:
                for callback in command.begun.on_commit:
                    callback()
        for command in done:
            if command.future is None or command.future.done():
                continue
            if command.error is None:
                command.future.set_result(command.result)
            else:
                command.future.set_exception(command.error)
        if self._readers:
            self._let_read(commits)

    def _let_read(self, commits: int) -> None:
        for number, future in self._readers:
            if number <= commits and not future.done():
                future.set_result(None)
        self._readers = [one for one in self._readers if one[0] > commits]
