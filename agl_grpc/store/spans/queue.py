"""Span messages on their way to the writer: bounded, in order, many in one transaction (R28)."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from agl_grpc.store import errors
from agl_grpc.store.errors import StoreError
from agl_grpc.store.spans.evict import Evictor
from agl_grpc.store.spans.write import SpanMessage, SpanOutcome, write_messages
from agl_grpc.store.storage.command import Lane
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.store.store import Store
from agl_grpc.v1 import error_reason_pb2

_FLUSH_ROWS = 1000
_FLUSH_BYTES = 8 << 20
_FLUSHES = 2  # that have not begun: while one is written, the next one waits

_Entry = tuple[SpanMessage, "asyncio.Future[SpanOutcome]"]


class SpanQueue:
    """Collects messages while the writer is busy and gives it as many as one transaction should hold.

    Args:
        store: Where they go.
        max_bytes: Most bytes that may wait or be under way.
        evictor: Keeps a throw-away store small; None = spans stay.
    """

    def __init__(self, store: Store, max_bytes: int, evictor: Evictor | None = None) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._evictor = evictor
        self._bytes = 0
        self._waiting: deque[_Entry] = deque()
        self._flushes: set[_Flush] = set()
        self._room: set[asyncio.Event] = set()

    def put(self, message: SpanMessage) -> asyncio.Future[SpanOutcome]:
        """Queue a message; the future is done when it is on disk.

        Raises:
            StoreError: OVERLOADED when too much waits already, or a throw-away store is full.
        """
        if self._evictor is not None:
            self._evictor.admit()
        if self._bytes >= self._max_bytes:
            raise errors.overloaded("span_queue_bytes")
        self._bytes += message.size
        future: asyncio.Future[SpanOutcome] = asyncio.get_running_loop().create_future()
        self._waiting.append((message, future))
        self._pump()
        return future

    async def room(self) -> None:
        """Wait until `put` would take a message: back-pressure for streams."""
        while self._bytes >= self._max_bytes:
            event = asyncio.Event()
            self._room.add(event)
            try:
                await event.wait()
            finally:
                self._room.discard(event)

    def _pump(self) -> None:
        if self._waiting and sum(not flush.taken for flush in self._flushes) < _FLUSHES:
            try:
                self._submit(_Flush(self._waiting), _FLUSH_ROWS // 2)
            except StoreError as error:
                self._refuse(error)

    def _submit(self, flush: _Flush, rows: int) -> None:
        future = self._store.writer.submit(flush.run, Lane.SPANS, rows=rows)
        self._flushes.add(flush)
        future.add_done_callback(lambda done: self._flushed(flush, done))

    def _refuse(self, error: StoreError) -> None:
        """Nothing can be written: whoever waits is told."""
        entries = list(self._waiting)
        self._waiting.clear()
        for entry in entries:
            self._answer(entry, error)

    def _flushed(self, flush: _Flush, done: asyncio.Future[Sequence[SpanOutcome | StoreError]]) -> None:
        self._flushes.discard(flush)
        error = done.exception()
        if error is None:
            for entry, outcome in zip(flush.taken, done.result(), strict=True):
                self._answer(entry, outcome)
            if self._evictor is not None:
                self._evictor.added(sum(message.size for message, _ in flush.taken))
        elif isinstance(error, StoreError) and _is_defect(error) and len(flush.taken) > 1:
            # One message breaks the whole flush: each gets a transaction of its own, so only that one fails.
            for entry in flush.taken:
                self._alone(entry)
        else:
            for entry in flush.taken:
                self._answer(entry, error)
        self._pump()

    def _alone(self, entry: _Entry) -> None:
        try:
            self._submit(_Flush(deque([entry])), entry[0].rows)
        except StoreError as error:
            self._answer(entry, error)

    def _answer(self, entry: _Entry, outcome: SpanOutcome | BaseException) -> None:
        message, future = entry
        self._bytes -= message.size
        if self._bytes < self._max_bytes:
            for event in self._room:
                event.set()
        if future.done():
            return
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


class _Flush:
    """What one command of the writer takes out of the queue, decided when it is first executed."""

    def __init__(self, source: deque[_Entry]) -> None:
        self._source = source
        self.taken: list[_Entry] = []

    def run(self, tx: Tx) -> Sequence[SpanOutcome | StoreError]:
        """Write as many waiting messages as one transaction should hold. Writer's thread.

        A transaction that is undone and runs again holds the same messages, and those that came meanwhile as
        far as there is room.
        """
        rows = sum(message.rows for message, _ in self.taken)
        size = sum(message.size for message, _ in self.taken)
        while self._source and rows < _FLUSH_ROWS and size < _FLUSH_BYTES:
            entry = self._source.popleft()
            self.taken.append(entry)
            rows += entry[0].rows
            size += entry[0].size
        return write_messages(tx, [message for message, _ in self.taken])


def _is_defect(error: StoreError) -> bool:
    return error.reason == error_reason_pb2.ERROR_REASON_INTERNAL
