"""Where emitters find the trace under way: a context variable, so that many rollouts share a process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, Token
from typing import Any, Protocol

from agl_grpc.model.span import SpanCoreFields, TraceStatus


class OpenSpan(Protocol):
    """A span that is under way."""

    @property
    def span_id(self) -> str:
        """Its id as 16 hex digits."""

    def recorded(self) -> SpanCoreFields:
        """What it says so far."""

    def set_attributes(self, attributes: dict[str, Any]) -> None:
        """Add details."""

    def set_status(self, status: TraceStatus) -> None:
        """Say how the work went."""

    def record_exception(self, error: BaseException) -> None:
        """Note an exception, and that the work failed."""


class Recorder(Protocol):
    """What a tracer offers to emitters for one trace."""

    @property
    def process_id(self) -> int:
        """The process that records; a forked child of it cannot."""

    def record(self, span: SpanCoreFields) -> None:
        """Add a finished span under the span that is open now."""

    def open_span(self, name: str, attributes: dict[str, Any]) -> AbstractContextManager[OpenSpan]:
        """Open a span under the span that is open now, until the block ends."""


_recorder: ContextVar[Recorder | None] = ContextVar("agl_grpc_recorder", default=None)


def current_recorder() -> Recorder | None:
    """The recorder of the trace under way here; ``None`` outside any."""
    return _recorder.get()


def set_recorder(recorder: Recorder | None) -> Token[Recorder | None]:
    """Make a recorder current; give the token to `reset_recorder`. For tracers."""
    return _recorder.set(recorder)


def reset_recorder(token: Token[Recorder | None]) -> None:
    """Make the recorder before current again. For tracers."""
    _recorder.reset(token)


def needed_recorder(what: str) -> Recorder:
    """The recorder of the trace under way; `RuntimeError` outside any, naming the caller."""
    recorder = current_recorder()
    if recorder is None:
        raise RuntimeError(
            f"{what} was called outside a rollout, where nothing records it; call it inside an agent, inside "
            "`tracer.trace_context(...)`, or with propagate=False"
        )
    if recorder.process_id != os.getpid():
        raise RuntimeError(
            f"{what} was called in a forked process, from which nothing reaches the store; hand the value "
            "back to the agent's own process and emit it there"
        )
    return recorder


_runner: ContextVar[Any] = ContextVar("agl_grpc_runner", default=None)


def current_runner() -> Any:
    """The runner of the attempt under way here; None outside any."""
    return _runner.get()


@contextmanager
def running_under(runner: Any) -> Iterator[None]:
    """Within the block `current_runner` is this one. For runners."""
    token = _runner.set(runner)
    try:
        yield
    finally:
        _runner.reset(token)
