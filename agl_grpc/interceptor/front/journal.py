"""The way of the proxy's records: to local disk before the answer's last byte, from there to the store.

The interceptor inside an engine asks the store first and the disk when that is slow. In front the disk comes
first, being the quicker one: the store only has to know by then that there is a call (it is announced while
the engine computes), so that the attempt is not sealed without it. The record follows in batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from agl_grpc.interceptor.capture.deltas import AttemptKey, PromptDeltas
from agl_grpc.interceptor.capture.sink import CapturedCall, SinkCounters
from agl_grpc.interceptor.capture.spool import Entry, Spool, SpoolFull
from agl_grpc.interceptor.capture.transport import (
    FIRST_BACKOFF,
    LONGEST_BACKOFF,
    Rejection,
    SpanTransport,
    StoreAway,
)
from agl_grpc.v1 import span_pb2

logger = logging.getLogger("agl_grpc.interceptor")

_GATHER_SECONDS = 0.025
"""How long announcements and records wait for company: a request to the store costs far more than what is in
it. A call that has ended before its announcement went waits no longer."""

_CROWD = 100
"""So many records wait for no more."""

_BATCH_ITEMS = 500
_BATCH_BYTES = 2 * 1024 * 1024
_CACHED_BYTES = 64 * 1024 * 1024
_DELIVERY_TIMEOUT = 30.0


@dataclass
class _Open:
    """A call under way; `told` resolves when the store knows of it or is away."""

    attempt: AttemptKey
    call: span_pb2.OpenCall
    told: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Journal:
    """Takes announcements and ended calls, makes each durable on disk, and delivers all of it in order.

    A call is durable when its record is fsynced and its announcement is in the store; a store that has not
    answered within `ack_timeout` seconds is not waited for. Records are delivered at least once, and stored
    once, by their span ids. Use from one event loop.
    """

    def __init__(self, transport: SpanTransport, spool: Spool, ack_timeout: float = 1.0) -> None:
        self._transport = transport
        self._spool = spool
        self._ack_timeout = ack_timeout
        self._deltas = PromptDeltas()
        self._open: dict[bytes, _Open] = {}
        self._announce: deque[bytes] = deque()
        self._abandoned: deque[tuple[AttemptKey, bytes]] = deque()
        self._cached_bytes = 0
        self._undurable: deque[CapturedCall] = deque()
        self._wake = asyncio.Event()
        self._urgent = asyncio.Event()
        self._closing = asyncio.Event()
        self._keeping = 0
        self._kept = asyncio.Event()
        self.away = False
        self.counters = SinkCounters()
        self._pump_task = asyncio.create_task(self._pump())

    def accepting(self) -> bool:
        """Whether a new call can be made durable when it ends."""
        return not self._spool.full

    def announce(self, attempt: AttemptKey, span_id: bytes, started: int) -> None:
        """Tell the store that a call begins; returns at once."""
        call = span_pb2.OpenCall(span_id=span_id, start_time_unix_nano=started)
        opened = self._open[span_id] = _Open(attempt, call)
        if self.away:
            opened.told.set_result(None)
        self._announce.append(span_id)
        self._wake.set()

    def abandon(self, span_id: bytes) -> None:
        """Tell the store that an announced call ended without a span; returns at once."""
        opened = self._open.pop(span_id, None)
        if opened is not None:
            self._abandoned.append((opened.attempt, span_id))
            self._wake.set()

    def submit(self, call: CapturedCall) -> asyncio.Future[None]:
        """Take an ended call; its future resolves when it is durable (or can never be, which is logged)."""
        data = call.group(None)
        cached = self._cached_bytes < _CACHED_BYTES
        self._cached_bytes += len(data) * cached
        self._keeping += 1

        def written(_: Entry | None, error: SpoolFull | None) -> None:
            self._written(call, len(data) * cached, error)

        try:
            self._spool.write(data, call if cached else call.span_id, written)
        except SpoolFull as error:
            written(None, error)
        return call.durable

    async def close(self, grace: float = 5.0) -> None:
        """Deliver for at most `grace` seconds; what remains lies in the spool for the next process."""
        while self._keeping:
            self._kept.clear()
            await self._kept.wait()
        self._closing.set()
        self._urgent.set()
        self._wake.set()
        await asyncio.wait([self._pump_task], timeout=grace)
        self._pump_task.cancel()
        await asyncio.wait([self._pump_task])
        await self._transport.close()
        await self._spool.close()

    def describe(self) -> dict[str, Any]:
        """Counters for people."""
        return {
            "store_away": self.away,
            "open_calls": len(self._open),
            "spool_bytes": self._spool.size,
            "spool_waiting": self._spool.waiting,
            **vars(self.counters),
        }

    def _written(self, call: CapturedCall, cached: int, error: BaseException | None) -> None:
        if error is None:
            self.counters.spooled += 1
        else:
            self._cached_bytes -= cached
            logger.error("model call %s is not durable yet: %s", call.span_id.hex(), error)
            self.counters.undurable += 1
            self._undurable.append(call)
        self._wake.set()
        opened = self._open.get(call.span_id)
        if opened is None or opened.told.done():
            self._settle(call)
            return
        self._urgent.set()
        told = opened.told
        limit = asyncio.get_running_loop().call_later(self._ack_timeout, _resolve, told)

        def settle(_: asyncio.Future[None]) -> None:
            limit.cancel()
            self._settle(call)

        told.add_done_callback(settle)

    def _settle(self, call: CapturedCall) -> None:
        """All that can be waited for has come; whoever waited may be gone."""
        _resolve(call.durable)
        self._keeping -= 1
        self._kept.set()

    async def _pump(self) -> None:
        pause = FIRST_BACKOFF
        while True:
            if not (self._announce or self._abandoned or self._spool.waiting or self._undurable):
                if self._closing.is_set():
                    return
                self._wake.clear()
                await self._wake.wait()
            await self._gather()
            try:
                await self._deliver_next()
            except StoreAway as error:
                self._leave(str(error))
                if self._closing.is_set():
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), pause)
                pause = min(2 * pause, LONGEST_BACKOFF)
                continue
            pause = FIRST_BACKOFF
            if self.away:
                logger.info("store back")
            self.away = False

    async def _gather(self) -> None:
        """Let a batch grow a little where nobody waits for it."""
        if not self._closing.is_set() and self._spool.waiting < _CROWD:
            # Cheaper than a time-out, which would be an exception each time.
            limit = asyncio.get_running_loop().call_later(_GATHER_SECONDS, self._urgent.set)
            await self._urgent.wait()
            limit.cancel()
        self._urgent.clear()

    def _leave(self, reason: str) -> None:
        """The store is away: nobody waits for it, and it is told of all open calls when it is back."""
        if not self.away:
            logger.warning("store away (%s): model calls wait in the local spool", reason)
        self.away = True
        self._announce.clear()
        self._announce.extend(self._open)
        for opened in self._open.values():
            _resolve(opened.told)

    async def _deliver_next(self) -> None:
        """One batch: announcements and abandonments, then records, oldest first."""
        entries = self._spool.peek(_BATCH_ITEMS, _BATCH_BYTES)
        extra = list(self._undurable)
        control, told, abandoned = self._control_groups()
        groups = [*control]
        for entry in entries:
            call = entry.note
            groups.append(
                call.group(self._deltas) if isinstance(call, CapturedCall) else self._spool.read(entry)
            )
        groups += [call.group(None) for call in extra]
        # A store that was away and has a full spool to take may need longer than a call's last byte waits.
        limit = _DELIVERY_TIMEOUT if self.away else max(self._ack_timeout, 0.001)
        try:
            rejections = await self._transport.deliver(groups, limit)
            rejections = await self._again_whole(rejections, entries, len(control))
        except StoreAway:
            self._abandoned.extendleft(reversed(abandoned))
            raise
        for opened in told:
            _resolve(opened.told)
        self._note(rejections, groups)
        refused = {rejection.group_index - len(control) for rejection in rejections}
        self._delivered(entries, refused)
        for index, call in enumerate(extra, len(entries)):
            self._open.pop(call.span_id, None)
            self.counters.delivered += index not in refused
        for _ in extra:
            self._undurable.popleft()

    def _delivered(self, entries: list[Entry], refused: set[int]) -> None:
        self._spool.drop(len(entries))
        for index, entry in enumerate(entries):
            self.counters.delivered += index not in refused
            call: CapturedCall | bytes | None = entry.note
            if not isinstance(call, CapturedCall):
                self._open.pop(call or b"", None)
                continue
            self._open.pop(call.span_id, None)
            self._cached_bytes -= entry.length
            if index not in refused:
                self._deltas.remember(call.attempt, call.span_id, call.prompt, call.responses)

    async def _again_whole(
        self, rejections: list[Rejection], entries: list[Entry], offset: int
    ) -> list[Rejection]:
        """Send prompts whole whose base the store does not know."""
        unknown = [rejection.group_index for rejection in rejections if rejection.base_unknown]
        if not unknown:
            return rejections
        groups = [self._spool.read(entries[index - offset]) for index in unknown]
        for index in unknown:
            self._deltas.forget(entries[index - offset].note.attempt)
        again = await self._transport.deliver(groups, _DELIVERY_TIMEOUT)
        return [r for r in rejections if not r.base_unknown] + [
            Rejection(unknown[r.group_index], r.index, r.reason, r.message) for r in again
        ]

    def _control_groups(
        self,
    ) -> tuple[list[bytes], list[_Open], list[tuple[AttemptKey, bytes]]]:
        """Announcements and abandonments that wait, one group an attempt; and both once more."""
        by_attempt: dict[AttemptKey, span_pb2.AttemptSpans] = {}

        def group(attempt: AttemptKey) -> span_pb2.AttemptSpans:
            if attempt not in by_attempt:
                by_attempt[attempt] = span_pb2.AttemptSpans(rollout_id=attempt[0], attempt_id=attempt[1])
            return by_attempt[attempt]

        told = [self._open[span_id] for span_id in self._announce if span_id in self._open]
        self._announce.clear()
        for opened in told:
            group(opened.attempt).open_calls.append(opened.call)
        abandoned = list(self._abandoned)
        self._abandoned.clear()
        for attempt, span_id in abandoned:
            group(attempt).abandoned_calls.append(span_id)
        return [group.SerializeToString() for group in by_attempt.values()], told, abandoned

    def _note(self, rejections: list[Rejection], groups: list[bytes]) -> None:
        for rejection in rejections:
            group = span_pb2.AttemptSpans.FromString(groups[rejection.group_index])
            self.counters.rejected += bool(group.spans)
            logger.warning(
                "the store refused %s of attempt %s: %s",
                "a model call" if group.spans else "an announcement",
                group.attempt_id,
                rejection.message,
            )


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
