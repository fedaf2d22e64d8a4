"""A producer of spans: one stream, numbered messages, durable acknowledgements, resume after disconnects."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future as ThreadFuture
from typing import Any, Self

import grpc

from agl_grpc.client.channel import is_transient
from agl_grpc.client.connection import Connection
from agl_grpc.client.errors import StreamFenced, error_from_rpc, retry_after
from agl_grpc.client.span_buffer import (
    Message,
    Part,
    Room,
    SpanAck,
    SpanRejection,
    Submission,
    oversized,
)
from agl_grpc.client.span_wire import (
    MAX_BYTES,
    MAX_SPANS,
    Oversized,
    SpanGroup,
    encode_group,
    encode_message,
    encode_open,
)
from agl_grpc.model.enums import Durability
from agl_grpc.v1 import span_pb2
from agl_grpc.v1 import store_service_pb2 as pb

logger = logging.getLogger(__name__)

_METHOD = "/agl_grpc.v1.StoreService/StreamSpans"
_TRIES_OF_A_REFUSED_STREAM = 5

Groups = SpanGroup | Iterable[SpanGroup]


class SpanStreamer:
    """Sends spans to the store over one stream and says when they are on disk.

    What is not acknowledged when the stream breaks is sent again, with new numbers, on the next one; the
    store knows spans by their own ids, so each is kept exactly once. Sending goes on for ever while the store
    is away; at most ``max_buffer_bytes`` are held meanwhile, then callers wait. ``linger`` (seconds) is how
    long a small message may wait for company while others are on their way. ``on_rejected`` is called, on the
    loop, for every span that the store refuses.

    Two streamers with one ``producer_id`` fence each other; the default is a new id. A streamer belongs to
    the event loop that starts it (`start`); `submit` works from every other thread.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        producer_id: str | None = None,
        max_buffer_bytes: int = 64 * 1024 * 1024,
        linger: float = 0.002,
        on_rejected: Callable[[SpanRejection], None] | None = None,
    ) -> None:
        self.producer_id = producer_id or f"py-{uuid.uuid4().hex[:16]}"
        self._connection = connection
        self._linger = linger
        self._on_rejected = on_rejected
        self._room = Room(max_buffer_bytes)
        self._inbox: deque[Part] = deque()
        self._in_flight: deque[Message] = deque()
        self._in_flight_bytes = 0
        self._next_sequence = 1
        self._unsettled: set[Submission] = set()
        self._error: Exception | None = None
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._opened = False
        self._draining = False
        self._acknowledged = 0
        self._arrived = asyncio.Event()
        self._progress = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self.start()

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def start(self) -> Self:
        """Start sending, on the running loop. A second call changes nothing."""
        if self._task is None:
            self._loop = asyncio.get_running_loop()
            self._task = self._loop.create_task(self._run(), name=f"spans {self.producer_id}")
        return self

    @property
    def buffered_bytes(self) -> int:
        """Bytes taken and not yet acknowledged."""
        return self._room.held

    @property
    def on_loop(self) -> bool:
        """Whether the caller is on the event loop of this streamer, which must not be blocked."""
        return self._loop is not None and _running_loop() is self._loop

    async def send(self, groups: Groups) -> SpanAck:
        """Send spans and wait until they are on disk; waits for room first.

        Raises `StreamFenced` when another streamer took the producer id over. Cancelling takes nothing back.
        """
        return await (await self.post(groups))

    async def post(self, groups: Groups) -> asyncio.Future[SpanAck]:
        """Wait for room, hand spans over, and answer the future of their acknowledgement; on the loop."""
        self.start()
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            raise RuntimeError("this SpanStreamer belongs to another event loop; use submit")
        submission, parts = self._submission(groups, loop.create_future())
        await self._room.enter(submission.size)
        self._take(submission, parts)
        assert isinstance(submission.future, asyncio.Future)
        return submission.future

    def submit(self, groups: Groups) -> ThreadFuture[SpanAck]:
        """Hand spans over from any thread; blocks while the buffer is full, except on the loop's thread."""
        if self._loop is None:
            raise RuntimeError("start the SpanStreamer on its event loop first")
        submission, parts = self._submission(groups, ThreadFuture())
        assert isinstance(submission.future, ThreadFuture)
        if _running_loop() is self._loop:
            self._room.enter_at_once(submission.size)
            self._take(submission, parts)
        else:
            self._room.enter_blocking(submission.size)
            self._loop.call_soon_threadsafe(self._take, submission, parts)
        return submission.future

    async def announce(self, rollout_id: str, attempt_id: str, span_id: bytes, start_time_ns: int) -> SpanAck:
        """Announce a model call that begins: its attempt is not sealed before the call is closed."""
        call = span_pb2.OpenCall(span_id=span_id, start_time_unix_nano=start_time_ns)
        return await self.send(SpanGroup(rollout_id=rollout_id, attempt_id=attempt_id, open_calls=[call]))

    async def abandon(self, rollout_id: str, attempt_id: str, span_id: bytes) -> SpanAck:
        """Say that an announced model call ended without a span."""
        return await self.send(
            SpanGroup(rollout_id=rollout_id, attempt_id=attempt_id, abandoned_calls=[span_id])
        )

    async def flush(self, attempt_id: str | None = None) -> None:
        """Wait until everything that was handed over before, or all of one attempt, is settled.

        Raises what ended the streamer.
        """
        waiting = {one for one in self._unsettled if attempt_id is None or attempt_id in one.attempt_ids}
        while waiting & self._unsettled:
            await self._progress.wait()
        if self._error is not None:
            raise self._error

    async def close(self, *, timeout: float | None = 30.0) -> None:  # noqa: ASYNC109  # bounds the flush alone
        """Flush and stop; after ``timeout`` seconds (``None`` = never) what is left is given up.

        Raises `TimeoutError` when something was given up.
        """
        if self._task is None:
            return
        try:
            async with asyncio.timeout(timeout):
                if self._error is None:
                    await self.flush()
                self._closing = True
                self._pulse(self._arrived)
                await asyncio.shield(self._task)
        finally:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._fail(RuntimeError("the SpanStreamer is closed"))

    def _submission(
        self, groups: Groups, future: asyncio.Future[SpanAck] | ThreadFuture[SpanAck]
    ) -> tuple[Submission, list[Part]]:
        if self._error is not None:
            raise self._error
        every: Sequence[SpanGroup] = [groups] if isinstance(groups, SpanGroup) else list(groups)
        attempt_ids = frozenset(group.attempt_id for group in every)
        submission = Submission(future, attempt_ids, parts_left=0, size=0)
        parts: list[Part] = []
        for place, group in enumerate(every):
            for encoded in encode_group(group):
                if isinstance(encoded, Oversized):
                    submission.rejected.append(oversized(group, place, encoded))
                else:
                    parts.append(Part(encoded, place, submission))
        submission.parts_left = len(parts)
        submission.size = sum(part.encoded.size for part in parts)
        return submission, parts

    def _take(self, submission: Submission, parts: list[Part]) -> None:
        if self._error is not None:
            self._room.leave(submission.size)
            submission.fail(self._error)
        elif not parts:
            submission.future.set_result(SpanAck(durability=None))
        else:
            for rejection in submission.rejected:  # before anything was sent: what is too large
                self._report(rejection)
            self._unsettled.add(submission)
            self._inbox.extend(parts)
            self._pulse(self._arrived)

    @staticmethod
    def _pulse(event: asyncio.Event) -> None:
        event.set()  # wakes whoever waits now
        event.clear()

    async def _run(self) -> None:
        tries = refusals = 0
        while not self._finished:
            self._opened, acknowledged = False, self._acknowledged
            wait: float | None = None
            try:
                await self._session()
            except grpc.aio.AioRpcError as error:
                tries = 0 if self._opened else tries + 1
                failure = error_from_rpc(error, self._connection.target)
                refusals = 0 if is_transient(error) or self._acknowledged > acknowledged else refusals + 1
                if isinstance(failure, StreamFenced) or refusals >= _TRIES_OF_A_REFUSED_STREAM:
                    logger.error("span stream %s ended: %s", self.producer_id, failure)
                    self._fail(failure)
                    return
                logger.info("span stream %s broke, sending again: %s", self.producer_id, failure)
                wait = retry_after(error)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                logger.exception("span stream %s ended by a defect", self.producer_id)
                self._fail(error)
                return
            if not self._finished:
                await asyncio.sleep(self._connection.retry.wait(tries) if wait is None else wait)

    @property
    def _finished(self) -> bool:
        return self._closing and not self._in_flight and not self._inbox

    async def _session(self) -> None:
        """One stream, from its opening to its end."""
        bound = self._connection.bound
        stream: Any = bound.channel.stream_stream(
            _METHOD, request_serializer=None, response_deserializer=pb.StreamSpansResponse.FromString
        )
        call = stream(metadata=self._connection.metadata)
        self._draining = False
        for message in self._in_flight:
            message.sequence = 0  # not on this stream yet
        writer: asyncio.Task[None] | None = None
        try:
            await call.write(encode_open(self.producer_id))
            async for response in _responses(call):
                kind = response.WhichOneof("message")
                if kind == "opened":
                    self._opened = True
                    writer = asyncio.create_task(self._write(call, response.opened))
                elif kind == "ack":
                    self._acknowledge(response.ack)
                elif kind == "drain":
                    logger.info(
                        "span stream %s: the store drains: %s", self.producer_id, response.drain.reason
                    )
                    self._draining = True
                    self._pulse(self._arrived)
                    self._pulse(self._progress)
            if writer is not None and writer.done():
                writer.result()  # a defect of the writer is not lost
        finally:
            if writer is not None:
                writer.cancel()
            call.cancel()

    async def _write(self, call: Any, opened: pb.SpanStreamOpened) -> None:
        try:
            # Numbers begin anew: a message is answered for again, so that no rejection is lost with its ack.
            self._next_sequence = max(self._next_sequence, opened.last_sequence + 1)
            for message in list(self._in_flight):
                message.rejected.clear()
                await self._put(call, message)
            while await self._may_write(opened):
                message = Message.of(self._next_parts())
                self._in_flight.append(message)
                self._in_flight_bytes += len(message.payload)
                await self._put(call, message)
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the reader of the same call reports its status

    async def _may_write(self, opened: pb.SpanStreamOpened) -> bool:
        """Wait until there is something to send and room for it; false when the stream shall end."""
        while not self._inbox:
            if self._draining or (self._closing and not self._in_flight):
                return False
            await self._arrived.wait()
        if self._in_flight and len(self._inbox) < MAX_SPANS:
            await asyncio.sleep(self._linger)
        while not self._draining and not self._fits(opened):
            await self._progress.wait()
        return not self._draining

    async def _put(self, call: Any, message: Message) -> None:
        message.sequence = self._next_sequence
        self._next_sequence += 1
        await call.write(encode_message(message.sequence, message.payload))

    def _fits(self, opened: pb.SpanStreamOpened) -> bool:
        if not self._in_flight:
            return True
        bytes_ok = not opened.max_in_flight_bytes or (
            self._in_flight_bytes + self._inbox[0].encoded.size <= opened.max_in_flight_bytes
        )
        messages = opened.max_in_flight_messages
        return bytes_ok and (not messages or len(self._in_flight) < messages)

    def _next_parts(self) -> list[Part]:
        parts = [self._inbox.popleft()]
        size, spans = parts[0].encoded.size, parts[0].encoded.span_count
        while self._inbox:
            following = self._inbox[0].encoded
            size, spans = size + following.size, spans + following.span_count
            if size > MAX_BYTES or spans > MAX_SPANS:
                break
            parts.append(self._inbox.popleft())
        return parts

    def _acknowledge(self, ack: pb.SpanStreamAck) -> None:
        if ack.rejected:
            by_sequence = {message.sequence: message for message in self._in_flight}
            for rejection in ack.rejected:
                message = by_sequence.get(rejection.sequence)
                if message is not None:
                    message.rejected.append(rejection.span)
        durability = Durability.from_proto(ack.durability)
        while self._in_flight and 0 < self._in_flight[0].sequence <= ack.sequence:
            message = self._in_flight.popleft()
            self._acknowledged += 1
            self._in_flight_bytes -= len(message.payload)
            self._settle(message, durability)
        self._pulse(self._progress)
        if self._closing:
            self._pulse(self._arrived)

    def _settle(self, message: Message, durability: Durability | None) -> None:
        rejections = message.rejections() if message.rejected else {}
        for part in message.parts:
            rejected = rejections.get(id(part), [])
            if part.submission.settle_part(rejected, durability):
                self._unsettled.discard(part.submission)
                self._room.leave(part.submission.size)
            for rejection in rejected:
                self._report(rejection)

    def _report(self, rejection: SpanRejection) -> None:
        logger.warning(
            "the store refused span %s of attempt %s: %s",
            rejection.span_id.hex(),
            rejection.attempt_id,
            rejection.error,
        )
        if self._on_rejected is not None:
            self._on_rejected(rejection)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        for submission in self._unsettled:
            submission.fail(self._error)
            self._room.leave(submission.size)
        self._unsettled.clear()
        self._inbox.clear()
        self._in_flight.clear()
        self._in_flight_bytes = 0
        self._pulse(self._progress)


async def _responses(call: Any) -> AsyncIterator[pb.StreamSpansResponse]:
    while True:
        response = await call.read()
        if response is grpc.aio.EOF:
            return
        yield response


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
