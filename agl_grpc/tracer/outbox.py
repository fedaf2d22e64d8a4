"""Spans on their way from agents to a stream: gathered, and turned into messages on a thread of its own."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from opentelemetry.sdk.trace import ReadableSpan

from agl_grpc.client import SpanAck, SpanGroup, SpanStreamer
from agl_grpc.model.otel import span_from_readable

_LINGER_SECONDS = 0.005
_BATCH = 256
_MOST_WAITING = 4096
"""Spans that may wait; then the agents that make more of them wait."""

log = logging.getLogger(__name__)

_numbers = itertools.count(1)


class SpanSink(Protocol):
    """Where spans go: a started `SpanStreamer`, or anything that takes groups of spans as it does."""

    def submit(self, groups: SpanGroup) -> Future[SpanAck]:
        """Takes spans from any thread; may block while there is no room."""


class Destination(Protocol):
    """The attempt that spans belong to; it is told what became of them."""

    rollout_id: str
    attempt_id: str

    def settled(self, count: int, future: Future[SpanAck]) -> None:
        """So many of its spans are on disk, or were refused."""


_Item = tuple[Destination, ReadableSpan]


class Outbox:
    """Takes ended spans at once and brings them to a sink in batches, on a thread that starts when needed."""

    def __init__(self, sink: SpanSink) -> None:
        self._sink = sink
        self._waiting: deque[_Item] = deque()
        self._state = threading.Condition()
        # One batch at a time, so that spans keep their order.
        self._sending = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def sink(self) -> SpanSink:
        """Where the spans go."""
        return self._sink

    def put(self, destination: Destination, span: ReadableSpan) -> None:
        """Hand a span over; waits while too many wait already, but never on the sink's own event loop."""
        with self._state:
            if len(self._waiting) >= _MOST_WAITING and not _on_loop_of(self._sink):
                self._state.wait_for(lambda: len(self._waiting) < _MOST_WAITING)
            self._waiting.append((destination, span))
            if self._thread is None and not self._closed:
                self._start()
            elif len(self._waiting) == 1:
                self._state.notify_all()
        if self._closed:
            self.drain()

    def put_last(self, destination: Destination, span: ReadableSpan) -> None:
        """Hand over the span that ends a trace, and send what waits without lingering."""
        with self._state:
            self._waiting.append((destination, span))
        self.drain()

    def drain(self) -> None:
        """Send what waits now, from this thread unless another is at it."""
        while self._waiting:
            if not self._sending.acquire(blocking=False):
                # Whoever is at it sends only what it has taken: the thread sends the rest.
                with self._state:
                    if self._thread is None and not self._closed:
                        self._start()
                    self._state.notify_all()
                return
            try:
                self._send(self._taken())
            finally:
                self._sending.release()

    def take_back(self, destination: Destination) -> list[ReadableSpan]:
        """The destination's spans that nobody has begun to send; they are the caller's again."""
        with self._state:
            mine = [span for owner, span in self._waiting if owner is destination]
            if mine:
                self._waiting = deque(item for item in self._waiting if item[0] is not destination)
                self._state.notify_all()
            return mine

    @property
    def idle(self) -> bool:
        """Whether nothing waits and no thread was needed, so that `close` does not block."""
        return self._thread is None and not self._waiting

    def close(self) -> None:
        """Send what waits and end the thread. Blocks: not for the sink's own event loop, unless `idle`."""
        with self._state:
            self._closed = True
            self._state.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()
        self.drain()

    def _start(self) -> None:
        name = f"agl-grpc-spans-{next(_numbers)}"
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._waiting or self._closed)
                if self._closed and not self._waiting:
                    self._thread = None
                    return
                # A moment for company, unless there is enough of it.
                self._state.wait_for(lambda: self._closed or len(self._waiting) >= _BATCH, _LINGER_SECONDS)
            with self._sending:
                self._send(self._taken())

    def _taken(self) -> list[_Item]:
        with self._state:
            items = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
            self._state.notify_all()
            return items

    def _send(self, items: list[_Item]) -> None:
        groups: dict[int, list[_Item]] = {}
        for item in items:
            groups.setdefault(id(item[0]), []).append(item)
        for group in groups.values():
            destination = group[0][0]
            self._submit(destination, [span for _, span in group])

    def _submit(self, destination: Destination, spans: list[ReadableSpan]) -> None:
        messages = [data for span in spans if (data := encoded(span)) is not None]
        future: Future[SpanAck]
        try:
            group = SpanGroup(
                rollout_id=destination.rollout_id, attempt_id=destination.attempt_id, spans=messages
            )
            future = self._sink.submit(group)
        # Told at the flush: an agent that ends a span is not to blame for a stream that has ended.
        except Exception as error:
            future = Future()
            future.set_exception(error)
        future.add_done_callback(_teller(destination, len(spans)))


def encoded(span: ReadableSpan) -> bytes | None:
    """The span in the contract's form; None, and a line in the log, where it has none."""
    try:
        return span_from_readable(span).SerializeToString()
    except (TypeError, ValueError) as error:  # times before 1970, for example: one span, not its neighbours
        log.warning("span %r cannot be stored: %s", span.name, error)
        return None


def _teller(destination: Destination, count: int) -> Callable[[Future[SpanAck]], None]:
    return lambda future: destination.settled(count, future)


def _on_loop_of(sink: SpanSink) -> bool:
    return isinstance(sink, SpanStreamer) and sink.on_loop
