"""The OpenTelemetry tracer: agents' spans, streamed to the store off the agents' threads."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any

from opentelemetry import trace as otel_api
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace import Span as SdkSpan
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from agl_grpc.agent.context import current_recorder
from agl_grpc.client import SpanAck, SpanStreamer, StoreClient, SyncStoreClient
from agl_grpc.model import semconv
from agl_grpc.tracer.base import Tracer
from agl_grpc.tracer.outbox import Outbox, SpanSink
from agl_grpc.tracer.trace import Trace

logger = logging.getLogger(__name__)

# What the contract allows for one span.
_LIMITS = SpanLimits(max_span_attributes=1024, max_events=1024, max_links=1024)
_REMEMBERED_TRACES = 1024

_last_trace: ContextVar[Trace | None] = ContextVar("agl_grpc_last_trace", default=None)


class OtelTracer(Tracer):
    """Traces attempts with OpenTelemetry's SDK.

    It has a provider of its own. ``install_globally`` also lets libraries that use OpenTelemetry's global
    provider be seen: ours becomes the global one where there is none yet, else we listen to that one. Only
    spans of a trace (`trace_context`) are taken. Without a store (see `init_worker`) they stay in memory.
    One tracer may serve several workers of a process, each with a stream of its own.
    """

    def __init__(
        self,
        streamer: SpanSink | None = None,
        *,
        install_globally: bool = True,
        resource: Mapping[str, Any] | None = None,
    ) -> None:
        self._settings: dict[str, Any] = {"install_globally": install_globally, "resource": resource}
        self._outboxes: dict[int | str, Outbox] = {}
        self._owned: dict[int | str, SpanStreamer] = {}
        # Which of them the workers and agents of this context use.
        self._here: ContextVar[Outbox | None] = ContextVar("agl_grpc_outbox", default=None)
        if streamer is not None:
            self._outboxes[0] = Outbox(streamer)
        self._install_globally = install_globally
        attributes = {semconv.TRACER_NAME: type(self).__name__, **(resource or {})}
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=Resource.create(attributes),
            span_limits=_LIMITS,
            shutdown_on_exit=False,
        )
        self._listener = _Listener(self)
        self._heard: list[TracerProvider] = []
        self.listen_to(self._provider)
        self.otel = self._provider.get_tracer("agl_grpc")
        self._open: dict[int, Trace] = {}
        # Spans that outlive their trace still reach the store, which marks them as late.
        self._closed: OrderedDict[int, _Past] = OrderedDict()
        self._installed = False

    def __reduce__(self) -> tuple[Any, ...]:
        # In another process it is made anew: streams and open traces stay here.
        return functools.partial(type(self), **self._settings), ()

    @property
    def provider(self) -> TracerProvider:
        """The tracer's own provider, for instrumentation that takes one."""
        return self._provider

    def init(self) -> None:
        """Make libraries' spans visible, where that is wanted. A second call changes nothing."""
        self._listener.tracer = self
        if self._install_globally and not self._installed:
            self._installed = True
            self._listen_globally()

    def listen_to(self, provider: TracerProvider) -> None:
        """Take spans of another provider too, where they belong to a trace of ours."""
        if not any(heard is provider for heard in self._heard):
            self._heard.append(provider)
            provider.add_span_processor(self._listener)

    def _listen_globally(self) -> None:
        existing = otel_api.get_tracer_provider()
        if isinstance(existing, otel_api.ProxyTracerProvider):
            otel_api.set_tracer_provider(self._provider)
        elif isinstance(existing, TracerProvider):
            self.listen_to(existing)
        else:
            logger.warning(
                "OpenTelemetry's global provider is a %s, which cannot be listened to; only spans of this "
                "tracer are recorded",
                type(existing).__name__,
            )

    def init_worker(
        self, worker_id: int | str = 0, store: StoreClient | SyncStoreClient | SpanSink | None = None
    ) -> None:
        """Start sending spans to a store, for the worker that calls and the tasks that it starts.

        Give a `StoreClient` on its event loop, a `SyncStoreClient` or a started `SpanStreamer` anywhere.
        """
        self.init()
        match store:
            case None:
                return
            case SyncStoreClient():
                sink: SpanSink = store.io.run(_started(SpanStreamer(store.async_client)))
            case StoreClient():
                sink = SpanStreamer(store).start()
            case _:
                sink = store
        if isinstance(sink, SpanStreamer) and sink is not store:
            self._owned[worker_id] = sink
        outbox = self._outboxes[worker_id] = Outbox(sink)
        self._here.set(outbox)

    async def teardown_worker(self, worker_id: int | str = 0) -> None:
        """Bring that worker's spans on their way; close the stream if `init_worker` opened it.

        On the stream's event loop.
        """
        outbox = self._outboxes.pop(worker_id, None)
        if outbox is None:
            return
        if outbox.idle:
            outbox.close()
        else:
            await asyncio.to_thread(outbox.close)
        streamer = self._owned.pop(worker_id, None)
        if streamer is not None:
            await streamer.close()

    def teardown(self) -> None:
        """Stop listening to spans."""
        self._listener.tracer = None

    def trace_context(
        self,
        name: str | None = None,
        *,
        rollout_id: str | None = None,
        attempt_id: str | None = None,
        store: object = None,
    ) -> Trace:
        """A trace for ``with`` or ``async with``; both ids or neither (then spans stay in memory).

        ``store`` is accepted for older callers and not used: spans go where `init_worker` said.
        """
        if (rollout_id is None) != (attempt_id is None):
            raise ValueError("trace_context needs both rollout_id and attempt_id, or neither")
        outbox = self._outbox() if attempt_id else None
        return Trace(self, name or rollout_id or "trace", rollout_id or "", attempt_id or "", outbox)

    def _outbox(self) -> Outbox | None:
        outboxes = list(self._outboxes.values())
        here = self._here.get()
        return here if here in outboxes else outboxes[-1] if outboxes else None

    def get_last_trace(self) -> list[ReadableSpan]:
        """Spans of the last trace begun in this task or thread, those that have ended."""
        trace = _last_trace.get()
        return [] if trace is None else trace.spans

    def opened(self, trace: Trace) -> None:
        """A trace begins. For `Trace`."""
        self._open[trace.trace_id] = trace
        _last_trace.set(trace)

    def closed(self, trace: Trace) -> None:
        """A trace has ended. For `Trace`."""
        self._open.pop(trace.trace_id, None)
        self._closed[trace.trace_id] = _Past(trace)
        while len(self._closed) > _REMEMBERED_TRACES:
            self._closed.popitem(last=False)

    def ended(self, span: ReadableSpan) -> None:
        """A span has ended: send it if it belongs to a trace. For the listener."""
        if span.context is None:
            return
        trace = self._open.get(span.context.trace_id)
        if trace is None and (past := self._closed.get(span.context.trace_id)) is not None:
            past.add(span)
            return
        if trace is None:
            # A library that began a trace of its own inside an attempt.
            recorder = current_recorder()
            trace = recorder if isinstance(recorder, Trace) and recorder.trace_id in self._open else None
        if trace is not None:
            trace.add(span)


class _Past:
    """A trace that is over: what its late spans need, and no more, so that its own spans can be forgotten."""

    def __init__(self, trace: Trace) -> None:
        self.rollout_id = trace.rollout_id
        self.attempt_id = trace.attempt_id
        self._process_id = trace.process_id
        self._outbox = trace.outbox
        self._trace = weakref.ref(trace)

    def add(self, span: ReadableSpan) -> None:
        trace = self._trace()
        if trace is not None:
            trace.add(span)
        elif self._outbox is not None and self._process_id == os.getpid():
            self._outbox.put(self, span)

    def settled(self, count: int, future: Future[SpanAck]) -> None:
        """Nobody waits for late spans any more; what the store refuses is logged by the stream."""
        if (error := future.exception()) is not None:
            logger.warning("%d late spans of attempt %s are lost: %s", count, self.attempt_id, error)


def get_active_tracer() -> OtelTracer | None:
    """The tracer of the trace under way in this task or thread; None outside any."""
    recorder = current_recorder()
    return recorder.tracer if isinstance(recorder, Trace) else None


class _Listener(SpanProcessor):
    def __init__(self, tracer: OtelTracer) -> None:
        self.tracer: OtelTracer | None = tracer

    def on_start(self, span: SdkSpan, parent_context: Context | None = None) -> None:
        """Nothing to do: a span is sent when it has ended."""

    def on_end(self, span: ReadableSpan) -> None:
        if self.tracer is not None:
            self.tracer.ended(span)


async def _started(streamer: SpanStreamer) -> SpanStreamer:
    return streamer.start()
