"""One trace: the spans and rewards of one attempt, from its beginning to the moment they are on disk."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import Token
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from opentelemetry import context as otel_context
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import Span as OtelSpan
from opentelemetry.trace import Status, StatusCode, get_current_span, set_span_in_context

from agl_grpc.agent.context import Recorder, reset_recorder, set_recorder
from agl_grpc.client import SpanAck, SpanRejection
from agl_grpc.model import enums, semconv
from agl_grpc.model.failure import Failure, text_of
from agl_grpc.model.reading import read_rewards
from agl_grpc.model.reward import Reward, RewardKey
from agl_grpc.model.span import SpanCoreFields, TraceStatus
from agl_grpc.tracer.outbox import Outbox, encoded

if TYPE_CHECKING:
    from agl_grpc.tracer.otel import OtelTracer

log = logging.getLogger(__name__)

KEPT_SPANS = 10_000
"""The newest spans of a trace that are kept in this process; the store gets all of them."""

_KEPT_REJECTIONS = 1000


class OpenOtelSpan:
    """An open span of OpenTelemetry as emitters know it."""

    def __init__(self, span: OtelSpan) -> None:
        self._span = span

    @property
    def span_id(self) -> str:
        """Its id as 16 hex digits."""
        return f"{self._span.get_span_context().span_id:016x}"

    def recorded(self) -> SpanCoreFields:
        """What it says so far."""
        span = self._span
        if not isinstance(span, ReadableSpan):
            return SpanCoreFields(name="")
        start = None if span.start_time is None else span.start_time / 1e9
        return SpanCoreFields(name=span.name, attributes=dict(span.attributes or {}), start_time=start)

    def set_attributes(self, attributes: dict[str, Any]) -> None:
        """Add details."""
        self._span.set_attributes(attributes)

    def set_status(self, status: TraceStatus) -> None:
        """Say how the work went."""
        code = status.status_code
        if code is enums.StatusCode.ERROR:
            self._span.set_status(Status(StatusCode.ERROR, status.description or None))
        elif code is enums.StatusCode.OK:
            self._span.set_status(Status(StatusCode.OK))

    def record_exception(self, error: BaseException) -> None:
        """Note an exception, and that the work failed."""
        failure = Failure.from_exception(error)
        attributes = {
            semconv.EXCEPTION_TYPE: failure.type,
            semconv.EXCEPTION_MESSAGE: text_of(error),
            semconv.EXCEPTION_STACKTRACE: failure.detail,
        }
        # Not the SDK's own way: it breaks on an exception whose text cannot be had.
        self._span.add_event("exception", attributes)
        self._span.set_status(Status(StatusCode.ERROR, text_of(error)))


class Trace:
    """The trace of one attempt, as context manager: ``async with`` on an event loop, ``with`` on a thread.

    At its end everything recorded is on disk, where the tracer has a store and nobody called `keep_end`. Many
    may be open at once, each in its own task or thread; an agent's own threads belong to it if they carry
    OpenTelemetry's context.
    """

    def __init__(
        self, tracer: OtelTracer, name: str, rollout_id: str, attempt_id: str, outbox: Outbox | None = None
    ) -> None:
        self.name = name
        self.rollout_id = rollout_id
        self.attempt_id = attempt_id
        self.process_id = os.getpid()
        self._tracer = tracer
        self._outbox = outbox
        self._state = threading.Condition()
        self._spans: deque[ReadableSpan] = deque(maxlen=KEPT_SPANS)
        self._rewards: dict[RewardKey, float] = {}
        self._unsettled = 0
        self._rejected: deque[SpanRejection] = deque(maxlen=_KEPT_REJECTIONS)
        self._error: BaseException | None = None
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self.kept: list[bytes] = []
        self._keeps = False
        self._root: OtelSpan | None = None
        self._otel_token: Token[otel_context.Context] | None = None
        self._recorder_token: Token[Recorder | None] | None = None

    @property
    def trace_id(self) -> int:
        """The trace's id, as OpenTelemetry's number; 0 before the trace begins."""
        return 0 if self._root is None else self._root.get_span_context().trace_id

    @property
    def root(self) -> OtelSpan | None:
        """The span that all others are under; None before the trace begins."""
        return self._root

    @property
    def outbox(self) -> Outbox | None:
        """Where its spans go; None = they stay in memory."""
        return self._outbox

    @property
    def tracer(self) -> OtelTracer:
        """The tracer that made it."""
        return self._tracer

    @property
    def spans(self) -> list[ReadableSpan]:
        """Spans that have ended so far, in the order of their ends; of very many the newest 10,000."""
        with self._state:
            return list(self._spans)

    @property
    def judgements(self) -> dict[RewardKey, float]:
        """Rewards so far by what they judge, the last of each."""
        with self._state:
            return dict(self._rewards)

    @property
    def rewards(self) -> list[Reward]:
        """Rewards so far, the last of each name, step and target span."""
        return [
            Reward(rollout_id=self.rollout_id, attempt_id=self.attempt_id, value=value, **key._asdict())
            for key, value in self.judgements.items()
        ]

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(error)
        self.flush_blocking()

    async def __aenter__(self) -> Self:
        self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(error)
        await self.flush()

    def record(self, span: SpanCoreFields) -> None:
        """Add a finished span under the span that is open now."""
        start = None if span.start_time is None else round(span.start_time * 1e9)
        end = None if span.end_time is None else round(span.end_time * 1e9)
        otel_span = self._tracer.otel.start_span(
            span.name, self.context(), attributes=span.attributes, start_time=start
        )
        OpenOtelSpan(otel_span).set_status(span.status)
        otel_span.end(end)

    @contextmanager
    def open_span(
        self, name: str, attributes: dict[str, Any], start_time: float | None = None
    ) -> Iterator[OpenOtelSpan]:
        """Open a span under the span that is open now, until the block ends."""
        start = None if start_time is None else round(start_time * 1e9)
        span = self._tracer.otel.start_span(name, self.context(), attributes=attributes, start_time=start)
        token = otel_context.attach(set_span_in_context(span))
        try:
            yield OpenOtelSpan(span)
        finally:
            # The end of a generator may run in another context, which is not ours to change back.
            if get_current_span() is span:
                otel_context.detach(token)
            span.end()

    def keep_end(self) -> None:
        """Leave the spans that the end of the trace would send in `kept`, for a caller that stores them.

        Those that are under way by then go on; a trace that ends with an exception is sent whole.
        """
        self._keeps = self._outbox is not None

    async def flush(self) -> list[SpanRejection]:
        """Wait until every span that has ended is on disk; answers those that the store refused."""
        self._drain()
        loop = asyncio.get_running_loop()
        with self._state:
            waiter = loop.create_future() if self._unsettled else None
            if waiter is not None:
                self._waiters.append((loop, waiter))
        if waiter is not None:
            await waiter
        return self._told()

    def flush_blocking(self, timeout: float | None = None) -> list[SpanRejection]:
        """As `flush`, on a thread; raises `TimeoutError` after ``timeout`` seconds (``None`` = never)."""
        self._drain()
        with self._state:
            if not self._state.wait_for(lambda: not self._unsettled, timeout):
                raise TimeoutError(f"spans of attempt {self.attempt_id} are not on disk after {timeout} s")
        return self._told()

    def _drain(self) -> None:
        if self._outbox is not None:
            self._outbox.drain()

    def _told(self) -> list[SpanRejection]:
        with self._state:
            if self._error is not None:
                raise self._error
            return list(self._rejected)

    def settled(self, count: int, future: Future[SpanAck]) -> None:
        """So many spans are on disk, or were refused. For the outbox."""
        error = future.exception()
        with self._state:
            if error is None:
                self._rejected.extend(future.result().rejected)
            self._error = self._error or error
        self._settle(count)

    def _settle(self, count: int) -> None:
        with self._state:
            self._unsettled -= count
            if self._unsettled:
                return
            waiters, self._waiters = self._waiters, []
            self._state.notify_all()
        for loop, waiter in waiters:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_resolve, waiter)

    def add(self, span: ReadableSpan) -> None:
        """Keep a span that has ended, and send it to the store. For the tracer."""
        if self.process_id != os.getpid():
            return
        rewards = _rewards_of(span)
        with self._state:
            self._spans.append(span)
            for key, value in rewards.items():
                self._rewards.pop(key, None)
                self._rewards[key] = value
            if self._outbox is not None:
                self._unsettled += 1
        if self._outbox is None:
            return
        if self._root is not None and span.context == self._root.get_span_context():
            if self._keeps:
                self._keep(self._outbox, span)
            else:
                self._outbox.put_last(self, span)
        else:
            self._outbox.put(self, span)

    def _keep(self, outbox: Outbox, root: ReadableSpan) -> None:
        spans = [*outbox.take_back(self), root]
        self.kept = [data for span in spans if (data := encoded(span)) is not None]
        self._settle(len(spans))

    def _begin(self) -> None:
        if self._root is not None:
            raise RuntimeError(f"trace {self.name!r} was begun before; make a new one for each attempt")
        # A context of its own: an attempt is never part of whatever trace is open around it.
        self._root = self._tracer.otel.start_span(self.name, otel_context.Context())
        self._tracer.opened(self)
        self._otel_token = otel_context.attach(set_span_in_context(self._root))
        self._recorder_token = set_recorder(self)

    def _end(self, error: BaseException | None) -> None:
        if self._root is None or self._otel_token is None or self._recorder_token is None:
            raise RuntimeError(f"trace {self.name!r} was not begun")
        reset_recorder(self._recorder_token)
        otel_context.detach(self._otel_token)
        if error is not None:
            self._keeps = False
            OpenOtelSpan(self._root).record_exception(error)
        self._root.end()
        self._tracer.closed(self)

    def context(self) -> otel_context.Context | None:
        """Where a new span goes: the current context (None) if it is this trace's, else under the root."""
        if get_current_span().get_span_context().trace_id == self.trace_id or self._root is None:
            return None
        return set_span_in_context(self._root)


def _rewards_of(span: ReadableSpan) -> dict[RewardKey, float]:
    if not span.attributes:
        return {}
    try:
        rewards = read_rewards(span)
    except (TypeError, ValueError) as error:
        log.warning("span %r carries a reward that is none: %s", span.name, error)
        return {}
    for key, value in rewards.items():
        if not math.isfinite(value):
            log.warning("span %r carries the reward %r, which is %s: left out", span.name, key.name, value)
    return {key: value for key, value in rewards.items() if math.isfinite(value)}


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
