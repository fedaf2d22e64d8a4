"""One open span stream: numbered messages in, acknowledgements out, fenced by its producer's epoch (R16)."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from agl_grpc.store import errors, limits
from agl_grpc.store.door.call import Call
from agl_grpc.store.door.info import durability
from agl_grpc.store.door.service import BidiStream
from agl_grpc.store.errors import StoreError
from agl_grpc.store.spans.queue import SpanQueue
from agl_grpc.store.spans.write import Producer, SpanMessage, SpanOutcome
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.store.store import Store
from agl_grpc.v1 import store_service_pb2

KEEP_MARKS_SECONDS = 7 * 24 * 3600
"""How long the store remembers what it has of a producer that went away."""

_DRAIN_SECONDS = 5.0
_MAX_PRODUCER = 256

_Pending = tuple[int, int, "asyncio.Future[SpanOutcome]"]


class SpanStreams:
    """The open streams of this process by producer, so that a newer one ends an older one at once."""

    def __init__(self) -> None:
        self._open: dict[str, SpanStream] = {}

    def enter(self, stream: SpanStream) -> None:
        """Register a stream and fence the producer's older one."""
        older = self._open.get(stream.producer_id)
        self._open[stream.producer_id] = stream
        if older is not None:
            older.fence(stream.epoch)

    def leave(self, stream: SpanStream) -> None:
        """Forget a stream."""
        if self._open.get(stream.producer_id) is stream:
            del self._open[stream.producer_id]


class SpanStream:
    """Serves one StreamSpans call.

    Args:
        store: Where spans go.
        queue: The way there.
        streams: Other open streams.
        stream: The call's two directions.
        call: Who calls.
        read: Checks the groups of a message.
    """

    def __init__(
        self,
        store: Store,
        queue: SpanQueue,
        streams: SpanStreams,
        stream: BidiStream[Any],
        call: Call,
        read: Callable[[Iterable[Any]], SpanMessage],
    ) -> None:
        self.producer_id = ""
        self.epoch = 0
        self._store = store
        self._queue = queue
        self._streams = streams
        self._stream = stream
        self._call = call
        self._read = read
        self._pending: deque[_Pending] = deque()
        self._bytes = 0
        self._sequence = 0
        self._changed = asyncio.Event()
        self._closed = False
        self._error: StoreError | None = None

    async def run(self) -> None:
        """Serve until the producer has said all, the server drains, or the stream is fenced."""
        await self._open()
        self._streams.enter(self)
        receive = asyncio.create_task(self._receive())
        acknowledge = asyncio.create_task(self._acknowledge())
        tasks = (receive, acknowledge, asyncio.create_task(self._drain()))
        try:
            # The acknowledger ends last: it has answered everything that was received by then.
            await asyncio.wait([receive, acknowledge], return_when=asyncio.FIRST_EXCEPTION)
            for task in (receive, acknowledge):
                if task.done():
                    task.result()
        finally:
            self._streams.leave(self)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def fence(self, epoch: int) -> None:
        """End this stream: a newer one of its producer is open."""
        self._fail(errors.stream_fenced(self.producer_id, epoch))

    async def _open(self) -> None:
        first = await self._stream.read()
        if first is None or first.WhichOneof("message") != "open":
            raise errors.invalid_field("open", "must be the first message of a stream")
        self.producer_id = self._producer(first.open.producer_id)
        resume = first.open.resume
        self.epoch, last = await self._store.write(lambda tx: open_producer(tx, self.producer_id, resume))
        self._sequence = 0
        opened = store_service_pb2.SpanStreamOpened(
            epoch=self.epoch,
            last_sequence=last,
            max_in_flight_bytes=limits.STREAM_BYTES,
            max_in_flight_messages=limits.STREAM_MESSAGES,
        )
        await self._stream.write(store_service_pb2.StreamSpansResponse(opened=opened))

    def _producer(self, producer_id: str) -> str:
        if not 1 <= len(producer_id.encode()) <= _MAX_PRODUCER:
            raise errors.invalid_field("open.producer_id", f"must have 1 to {_MAX_PRODUCER} bytes")
        credential = self._call.caller.credential
        # An agent's producers have a name space of their own: it cannot fence anybody else's stream.
        return f"{credential.attempt_id}/{producer_id}" if credential else producer_id

    async def _receive(self) -> None:
        while self._error is None:
            await self._until(
                lambda: self._bytes < limits.STREAM_BYTES and len(self._pending) < limits.STREAM_MESSAGES
            )
            request = await self._stream.read()
            if request is None:
                break
            if request.WhichOneof("message") != "spans":
                raise errors.invalid_field("open", "must not be sent twice")
            await self._queue.room()
            self._take(request.spans)
        self._closed = True
        self._changed.set()

    def _take(self, spans: Any) -> None:
        sequence = spans.sequence
        if sequence <= self._sequence:
            rule = f"is {sequence}; it must be above {self._sequence}, the number before"
            raise errors.invalid_field("spans.sequence", rule)
        self._sequence = sequence
        message = self._read(spans.groups)
        message.producer = Producer(self.producer_id, self.epoch, sequence)
        future = self._queue.put(message)
        future.add_done_callback(self._settled)
        self._pending.append((sequence, message.size, future))
        self._bytes += message.size

    def _settled(self, future: asyncio.Future[SpanOutcome]) -> None:
        if not future.cancelled():
            future.exception()  # seen here: the stream may be gone before it looks
        if self._pending and self._pending[0][2].done():
            self._changed.set()

    async def _acknowledge(self) -> None:
        while True:
            await self._until(
                lambda: (
                    (bool(self._pending) and self._pending[0][2].done())
                    or (self._closed and not self._pending)
                )
            )
            if not self._pending:
                return
            await self._stream.write(self._ack())

    def _ack(self) -> store_service_pb2.StreamSpansResponse:
        """One acknowledgement for every settled message at the front."""
        ack = store_service_pb2.SpanStreamAck(durability=durability(self._store))
        while self._pending and self._pending[0][2].done():
            sequence, size, future = self._pending[0]
            if future.exception() is not None and ack.sequence:
                break  # what is on disk is acknowledged before the failure ends the stream
            outcome = future.result()
            self._pending.popleft()
            self._bytes -= size
            ack.sequence = sequence
            ack.duplicates += outcome.duplicates
            for one in outcome.rejected:
                rejected = ack.rejected.add(sequence=sequence)
                rejected.span.group_index = one.group_index
                rejected.span.index = one.place
                rejected.span.span_id = one.span_id
                rejected.span.status.CopyFrom(one.error.to_item())
        self._changed.set()
        return store_service_pb2.StreamSpansResponse(ack=ack)

    async def _drain(self) -> None:
        """When the server goes: ask the producer to stop, then take no more after a while."""
        await self._call.drain.wait()
        notice = store_service_pb2.SpanStreamDrain(reason="the server drains; come back to the next one")
        await self._stream.write(store_service_pb2.StreamSpansResponse(drain=notice))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                await self._until(lambda: self._closed)
        if not self._closed:
            self._fail(errors.draining())

    def _fail(self, error: StoreError) -> None:
        self._error = error
        self._changed.set()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()
        if self._error is not None:
            raise self._error


def open_producer(tx: Tx, producer_id: str, resume: bool) -> tuple[int, int]:
    """Mint the next epoch of a producer.

    Args:
        tx: The transaction.
        producer_id: The producer.
        resume: Whether it goes on where an earlier stream ended; else its numbers begin anew.

    Returns:
        The epoch and the highest message that is on disk (0 = none known).
    """
    row = tx.execute(
        "SELECT epoch, last_sequence FROM span_producers WHERE producer_id = ?", (producer_id,)
    ).fetchone()
    epoch, last = (row[0] + 1, row[1] if resume else 0) if row else (1, 0)
    tx.execute(
        "INSERT INTO span_producers (producer_id, epoch, last_sequence, update_time) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (producer_id) DO UPDATE SET epoch = excluded.epoch, "
        "last_sequence = excluded.last_sequence, update_time = excluded.update_time",
        (producer_id, epoch, last, tx.now),
    )
    return epoch, last


def prune_producers(tx: Tx, limit: int) -> int:
    """Forget producers that were silent for 7 days; returns how many."""
    cursor = tx.execute(
        "DELETE FROM span_producers WHERE producer_key IN "
        "(SELECT producer_key FROM span_producers WHERE update_time < ? LIMIT ?)",
        (tx.now - KEEP_MARKS_SECONDS * 1_000_000, limit),
    )
    return cursor.rowcount
