"""What every tracer offers beside its traces: running functions in a trace, spans by hand, LangChain."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from agl_grpc.agent.context import needed_recorder
from agl_grpc.client import StoreClient
from agl_grpc.model.span import SpanCoreFields, TraceStatus

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from agl_grpc.tracer.trace import OpenOtelSpan, Trace

T = TypeVar("T")


class Tracer(ABC):
    """Base of tracers."""

    @abstractmethod
    def init(self) -> None:
        """Get ready in this process. A second call changes nothing."""

    @abstractmethod
    def init_worker(self, worker_id: int | str = 0, store: Any = None) -> None:
        """Start sending spans to a store."""

    @abstractmethod
    async def teardown_worker(self, worker_id: int | str = 0) -> None:
        """Stop what `init_worker` began."""

    @abstractmethod
    def teardown(self) -> None:
        """Stop what `init` began."""

    @abstractmethod
    def trace_context(
        self,
        name: str | None = None,
        *,
        rollout_id: str | None = None,
        attempt_id: str | None = None,
        store: object = None,
    ) -> Trace:
        """A trace for ``with`` or ``async with``; both ids or neither (then spans stay in memory)."""

    @abstractmethod
    def get_last_trace(self) -> list[ReadableSpan]:
        """Spans of the last trace begun in this task or thread, those that have ended."""

    def trace_run(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function in a trace of its own, and answer what it returns."""
        if inspect.iscoroutinefunction(function):
            raise TypeError(f"{function.__qualname__} is async; use trace_run_async")
        with self.trace_context(_name_of(function)):
            return function(*args, **kwargs)

    async def trace_run_async(self, function: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
        """Await a function in a trace of its own, and answer what it returns."""
        async with self.trace_context(_name_of(function)):
            return await function(*args, **kwargs)

    def create_span(
        self,
        name: str,
        attributes: dict[str, Any] | None = None,
        timestamp: float | None = None,
        status: TraceStatus | None = None,
    ) -> SpanCoreFields:
        """Record a span without duration in the trace under way; ``timestamp`` in seconds, default now.

        Raises `RuntimeError` outside any trace.
        """
        span = SpanCoreFields(
            name=name,
            attributes=dict(attributes or {}),
            status=status or TraceStatus(),
            start_time=timestamp,
            end_time=timestamp,
        )
        needed_recorder("create_span").record(span)
        return span

    @contextmanager
    def operation_context(
        self, name: str, attributes: dict[str, Any] | None = None, start_time: float | None = None
    ) -> Iterator[OpenOtelSpan]:
        """A span in the trace under way for as long as the block lasts; an exception marks it as failed.

        Raises `RuntimeError` outside any trace.
        """
        trace: Any = needed_recorder("operation_context")
        with trace.open_span(name, dict(attributes or {}), start_time) as span:
            try:
                yield span
            except BaseException as error:
                span.record_exception(error)
                raise

    def get_langchain_handler(self, tags: Sequence[str] = ()) -> Any:
        """A LangChain callback handler: chains, model calls, tools and retrievers become spans.

        Give it to LangChain or LangGraph as ``config={"callbacks": [handler]}``; ``tags`` are set on each
        span. Raises `RuntimeError` when ``langchain-core`` is not installed.
        """
        from agl_grpc.tracer.langchain import langchain_handler

        return langchain_handler(self, tags)

    @asynccontextmanager
    async def lifespan(self, store: StoreClient | None = None) -> AsyncIterator[None]:
        """Ready for use within the block: `init` and `init_worker` before it, their opposites after it."""
        self.init()
        self.init_worker(0, store)
        try:
            yield
        finally:
            await self.teardown_worker(0)
            self.teardown()


def _name_of(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))
