"""One trace: the spans and rewards of one attempt, from its beginning to the moment they are on disk."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
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
from agl_grpc.model import enums
from agl_grpc.model.reading import get_reward_step, get_rewards_from_span
from agl_grpc.model.reward import PRIMARY, Reward
from agl_grpc.model.span import SpanCoreFields

if TYPE_CHECKING:
    from agl_grpc.tracer.otel import OtelTracer


class OpenOtelSpan:
    """An open span of OpenTelemetry as emitters know it."""

    def __init__(self, span: OtelSpan) -> None:
        self._span = span

    def set_attributes(self, attributes: dict[str, Any]) -> None:
        """Add details."""
        self._span.set_attributes(attributes)

    def record_exception(self, error: BaseException) -> None:
        """Note an exception, and that the work failed."""
        self._span.record_exception(error)
        self._span.set_status(Status(StatusCode.ERROR, str(error)))


class Trace:
    """The trace of one attempt, as context manager: ``async with`` on an event loop, ``with`` on a thread.

    At its end everything recorded is on disk (where the tracer has a store). Many may be open at once, each
    in its own task or thread; an agent's own threads belong to it if they carry OpenTelemetry's context.
    """

    def __init__(self, tracer: OtelTracer, name: str, rollout_id: str, attempt_id: str) -> None:
        self.name = name
        self.rollout_id = rollout_id
        self.attempt_id = attempt_id
        self._tracer = tracer
        self._lock = threading.Lock()
        self._spans: list[ReadableSpan] = []
        self._rewards: list[Reward] = []
        self._sent: list[Future[SpanAck]] = []
        self._root: OtelSpan | None = None
        self._otel_token: Token[otel_context.Context] | None = None
        self._recorder_token: Token[Recorder | None] | None = None

    @property
    def trace_id(self) -> int:
        """The trace's id, as OpenTelemetry's number; 0 before the trace begins."""
        return 0 if self._root is None else self._root.get_span_context().trace_id

    @property
    def spans(self) -> list[ReadableSpan]:
        """Spans that have ended so far, in the order of their ends."""
        with self._lock:
            return list(self._spans)

    @property
    def rewards(self) -> list[Reward]:
        """Rewards emitted so far, in order; of one name and step the last one counts."""
        with self._lock:
            return list(self._rewards)

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
            span.name, self._context(), attributes=span.attributes, start_time=start
        )
        code = span.status.status_code
        if code is enums.StatusCode.ERROR:
            otel_span.set_status(Status(StatusCode.ERROR, span.status.description or None))
        elif code is enums.StatusCode.OK:
            otel_span.set_status(Status(StatusCode.OK))
        self._note_rewards(span)
        otel_span.end(end)

    @contextmanager
    def open_span(self, name: str, attributes: dict[str, Any]) -> Iterator[OpenOtelSpan]:
        """Open a span under the span that is open now, until the block ends."""
        span = self._tracer.otel.start_span(name, self._context(), attributes=attributes)
        token = otel_context.attach(set_span_in_context(span))
        try:
            yield OpenOtelSpan(span)
        finally:
            otel_context.detach(token)
            span.end()

    async def flush(self) -> list[SpanRejection]:
        """Wait until every span that has ended is on disk; answers those that the store refused."""
        acks = await asyncio.gather(*map(asyncio.wrap_future, self._taken()))
        return [rejection for ack in acks for rejection in ack.rejected]

    def flush_blocking(self, timeout: float | None = None) -> list[SpanRejection]:
        """As `flush`, on a thread; raises `TimeoutError` after ``timeout`` seconds (``None`` = never)."""
        sent = self._taken()
        if wait(sent, timeout).not_done:
            raise TimeoutError(f"spans of attempt {self.attempt_id} are not on disk after {timeout} s")
        return [rejection for future in sent for rejection in future.result().rejected]

    def _taken(self) -> list[Future[SpanAck]]:
        with self._lock:
            return list(self._sent)

    def add(self, span: ReadableSpan, sent: Future[SpanAck] | None) -> None:
        """Keep a span that has ended, and the promise that it will be on disk. For the tracer."""
        with self._lock:
            self._spans.append(span)
            if sent is not None:
                self._sent.append(sent)

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
            OpenOtelSpan(self._root).record_exception(error)
        self._root.end()
        self._tracer.closed(self)

    def _context(self) -> otel_context.Context | None:
        """The current context where a span of this trace is open, else that of the root."""
        if get_current_span().get_span_context().trace_id == self.trace_id or self._root is None:
            return None
        return set_span_in_context(self._root)

    def _note_rewards(self, span: SpanCoreFields) -> None:
        step = get_reward_step(span)
        rewards = [
            Reward(
                rollout_id=self.rollout_id,
                attempt_id=self.attempt_id,
                name=name if place else PRIMARY,  # the first is the one that counts, whatever its key
                value=value,
                step=step,
            )
            for place, (name, value) in enumerate(get_rewards_from_span(span))
        ]
        with self._lock:
            self._rewards.extend(rewards)
