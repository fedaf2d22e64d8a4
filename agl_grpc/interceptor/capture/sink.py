"""The way of a captured call to disk: the store first, the local spool when the store is slow or away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agl_grpc.interceptor.capture.deltas import AttemptKey, PromptDeltas, packed_whole
from agl_grpc.interceptor.capture.spool import Spool, SpoolFull
from agl_grpc.interceptor.capture.transport import (
    FIRST_BACKOFF,
    LONGEST_BACKOFF,
    Rejection,
    SpanTransport,
    StoreAway,
)
from agl_grpc.interceptor.capture.wire import as_ids, parts
from agl_grpc.v1 import model_call_pb2, span_pb2

logger = logging.getLogger("agl_grpc.interceptor")

_ANNOUNCE_SECONDS = 0.1
"""How long announcements alone wait for company: a request to the store costs far more than what is in it.
Where several calls are under way, one of them ends by then and takes them with it.
"""

_PASSES = 3
"""So often the event loop goes round while ended calls wait for each other: those of one step of the engine
end in one pass. No client waits for a clock.
"""

_BATCH_ITEMS = 1000
_BATCH_BYTES = 8 * 1024 * 1024
_PROMPT = model_call_pb2.ModelCall.PROMPT_FIELD_NUMBER
_MODEL_CALL = span_pb2.Span.MODEL_CALL_FIELD_NUMBER
_SPANS = span_pb2.AttemptSpans.SPANS_FIELD_NUMBER

_REDELIVERY_TIMEOUT = 30.0


class CapturedCall:
    """An ended call: its span without the prompt, the prompt beside it, and each choice's response.

    `durable` resolves when it is on disk.
    """

    def __init__(
        self,
        attempt: AttemptKey,
        span: span_pb2.Span,
        prompt: Sequence[int],
        responses: Mapping[int, Sequence[int]],
    ) -> None:
        self.attempt = attempt
        self.span_id = span.span_id
        self.started = span.start_time_unix_nano
        self.prompt = as_ids(prompt)
        self.responses = responses
        self.durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._call = span.model_call.SerializeToString()
        span.ClearField("model_call")
        self._span = span.SerializeToString()

    @property
    def size(self) -> int:
        """About how many bytes it has."""
        return len(self._call) + 4 * len(self.prompt)

    def group(self, deltas: PromptDeltas | None) -> bytes:
        """As AttemptSpans of one span; with `deltas` the prompt may be a difference."""
        if deltas is None:
            prompt = packed_whole(self.prompt)
        else:
            prompt = deltas.encode(self.attempt, self.prompt).SerializeToString()
        call = (self._call, *parts(_PROMPT, (prompt,)))
        span = (self._span, *parts(_MODEL_CALL, call))
        group = span_pb2.AttemptSpans(rollout_id=self.attempt[0], attempt_id=self.attempt[1])
        return b"".join((group.SerializeToString(), *parts(_SPANS, span)))


@dataclass
class SinkCounters:
    """What became of the captured calls since the start."""

    delivered: int = 0
    spooled: int = 0
    respooled: int = 0
    rejected: int = 0
    undurable: int = 0


class CaptureSink:
    """Takes announcements and ended calls, makes each call durable, and says so.

    One batch is on its way at a time. While the store does not answer within `ack_timeout` seconds, calls go
    to the spool at once and a background task tries the store again with growing pauses (0.1 s to 2 s),
    announces the calls that are still open, delivers the spool in order and only then goes back to direct
    delivery.
    """

    def __init__(self, transport: SpanTransport, spool: Spool, ack_timeout: float = 1.0) -> None:
        self._transport = transport
        self._spool = spool
        self._ack_timeout = ack_timeout
        self._deltas = PromptDeltas()
        self._open: dict[bytes, tuple[AttemptKey, span_pb2.OpenCall]] = {}
        self._announce: deque[bytes] = deque()
        self._abandoned: deque[tuple[AttemptKey, bytes]] = deque()
        self._ended: deque[CapturedCall] = deque()
        self._wake = asyncio.Event()
        self._urgent = asyncio.Event()
        self._away = spool.waiting > 0
        self._closing = False
        self._flushed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pump_task = asyncio.create_task(self._pump())
        self.counters = SinkCounters()

    @property
    def away(self) -> bool:
        """Whether the store is not answering and calls go to the spool."""
        return self._away

    def accepting(self) -> bool:
        """Whether a new call can be made durable when it ends."""
        return not self._spool.full

    def announce(self, attempt: AttemptKey, span_id: bytes, started: int) -> None:
        """Tell the store that a call begins; returns at once."""
        self._open[span_id] = (attempt, span_pb2.OpenCall(span_id=span_id, start_time_unix_nano=started))
        self._announce.append(span_id)
        self._wake.set()

    def abandon(self, span_id: bytes) -> None:
        """Tell the store that an announced call ended without a span; returns at once."""
        known = self._open.pop(span_id, None)
        if known is not None:
            self._abandoned.append((known[0], span_id))
            self._hurry()

    def submit(self, call: CapturedCall) -> asyncio.Future[None]:
        """Take an ended call; its future resolves when it is durable (or can never be, which is logged)."""
        if self._away:
            self._start(self._to_spool([call]))
        else:
            self._ended.append(call)
            self._hurry()
        return call.durable

    async def close(self, grace: float = 5.0) -> None:
        """Deliver or spool everything that was submitted, within `grace` seconds, then stop."""
        self._closing = True
        self._hurry()
        await asyncio.wait([self._pump_task], timeout=grace)
        self._pump_task.cancel()
        await asyncio.wait([self._pump_task])
        await self._to_spool(list(self._ended))
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._transport.close()
        await self._spool.close()

    def _hurry(self) -> None:
        self._wake.set()
        self._urgent.set()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pump(self) -> None:
        while True:
            if self._away and (self._closing or not await self._come_back()):
                return
            if not (self._announce or self._abandoned or self._ended):
                if self._closing:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            await self._linger()
            await self._deliver_next()

    async def _linger(self) -> None:
        """Let a batch grow a little."""
        if self._closing:
            return
        if not self._ended and not self._abandoned:
            self._urgent.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ANNOUNCE_SECONDS):
                    await self._urgent.wait()
        for _ in range(_PASSES):
            await asyncio.sleep(0)

    async def _deliver_next(self) -> None:
        """One batch from the queues to the store; calls that the store does not take go to the spool."""
        calls = self._take_calls()
        ended = {call.span_id for call in calls}
        groups, abandoned = self._control_groups(ended)
        offset = len(groups)
        groups += [call.group(self._deltas) for call in calls]
        try:
            rejections = await self._transport.deliver(groups, self._ack_timeout)
            resend = [calls[r.group_index - offset] for r in rejections if r.base_unknown]
            if resend:
                for call in resend:
                    self._deltas.forget(call.attempt)
                again = await self._transport.deliver([c.group(None) for c in resend], self._ack_timeout)
                rejections = [r for r in rejections if not r.base_unknown] + [
                    Rejection(offset + calls.index(resend[r.group_index]), r.index, r.reason, r.message)
                    for r in again
                ]
        except StoreAway as error:
            self._abandoned.extendleft(reversed(abandoned))
            self._leave(str(error))
            # What ended during the delivery waits for the store no more than what ends from now on.
            calls += self._ended
            self._ended.clear()
            await self._to_spool(calls)
            return
        except asyncio.CancelledError:
            self._ended.extendleft(reversed(calls))
            raise
        refused = self._note_rejections(rejections, calls, offset)
        for index, call in enumerate(calls):
            if index not in refused:
                self.counters.delivered += 1
                self._deltas.remember(call.attempt, call.span_id, call.prompt, call.responses)
            self._settle(call)

    def _take_calls(self) -> list[CapturedCall]:
        calls: list[CapturedCall] = []
        size = 0
        while self._ended and len(calls) < _BATCH_ITEMS and size < _BATCH_BYTES:
            call = self._ended.popleft()
            size += call.size
            calls.append(call)
        return calls

    def _control_groups(
        self, ended: Collection[bytes] = ()
    ) -> tuple[list[bytes], list[tuple[AttemptKey, bytes]]]:
        """Announcements and abandonments that wait, one group an attempt; and the abandonments once more.

        Calls of the same batch that have `ended` need no announcement.
        """
        by_attempt: dict[AttemptKey, span_pb2.AttemptSpans] = {}

        def group(attempt: AttemptKey) -> span_pb2.AttemptSpans:
            if attempt not in by_attempt:
                by_attempt[attempt] = span_pb2.AttemptSpans(rollout_id=attempt[0], attempt_id=attempt[1])
            return by_attempt[attempt]

        while self._announce:
            span_id = self._announce.popleft()
            known = self._open.get(span_id)
            if known is not None and span_id not in ended:
                group(known[0]).open_calls.append(known[1])
        abandoned = list(self._abandoned)
        self._abandoned.clear()
        for attempt, span_id in abandoned:
            group(attempt).abandoned_calls.append(span_id)
        return [group.SerializeToString() for group in by_attempt.values()], abandoned

    def _note_rejections(
        self, rejections: list[Rejection], calls: list[CapturedCall], offset: int
    ) -> set[int]:
        refused = set()
        for rejection in rejections:
            index = rejection.group_index - offset
            if index < 0:
                logger.warning("the store refused an announcement: %s", rejection.message)
                continue
            refused.add(index)
            self.counters.rejected += 1
            logger.warning(
                "the store refused model call %s of attempt %s: %s",
                calls[index].span_id.hex(),
                calls[index].attempt[1],
                rejection.message,
            )
        return refused

    def _settle(self, call: CapturedCall) -> None:
        self._open.pop(call.span_id, None)
        if not call.durable.done():
            call.durable.set_result(None)

    def _leave(self, reason: str) -> None:
        if not self._away:
            logger.warning("store away (%s): model calls go to the local spool", reason)
        self._away = True

    async def _to_spool(self, calls: Sequence[CapturedCall]) -> None:
        """Make calls durable on local disk; one that cannot be is kept in memory and delivered later."""

        async def one(call: CapturedCall) -> None:
            try:
                await self._spool.append(call.group(None))
                self.counters.spooled += 1
            except SpoolFull as error:
                logger.error("model call %s is not durable yet: %s", call.span_id.hex(), error)
                self.counters.undurable += not call.durable.done()
                self._ended.append(call)
            self._settle(call)

        await asyncio.gather(*(one(call) for call in calls))

    async def _come_back(self) -> bool:
        """Wait for the store and empty the spool into it; False when the sink closes meanwhile."""
        pause = FIRST_BACKOFF
        while not self._closing:
            try:
                await self._redeliver()
            except StoreAway:
                self._wake.clear()
                try:
                    await asyncio.wait_for(self._closing_wake(), pause)
                except TimeoutError:
                    pause = min(2 * pause, LONGEST_BACKOFF)
                continue
            if not self._tasks and not self._spool.waiting:
                self._away = False
                logger.info("store back: the spool is delivered")
                return True
            await asyncio.sleep(0.01)
        return False

    async def _closing_wake(self) -> None:
        while not self._closing:
            self._wake.clear()
            await self._wake.wait()

    async def _redeliver(self) -> None:
        """Announce what is open, then deliver the spool, oldest first."""
        self._announce.clear()
        self._announce.extend(self._open)
        groups, abandoned = self._control_groups()
        try:
            if groups:
                await self._transport.deliver(groups, _REDELIVERY_TIMEOUT)
        except StoreAway:
            self._abandoned.extendleft(reversed(abandoned))
            raise
        while entries := self._spool.peek(_BATCH_ITEMS, _BATCH_BYTES):
            batch = [self._spool.read(entry) for entry in entries]
            rejections = await self._transport.deliver(batch, _REDELIVERY_TIMEOUT)
            for rejection in rejections:
                group = span_pb2.AttemptSpans.FromString(batch[rejection.group_index])
                self.counters.rejected += 1
                logger.warning(
                    "the store refused a spooled model call of attempt %s: %s",
                    group.attempt_id,
                    rejection.message,
                )
            self._spool.drop(len(entries))
            self.counters.respooled += len(entries)
