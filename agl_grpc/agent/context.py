"""Where emitters find the trace under way: a context variable, so that many rollouts share a process."""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from typing import Any, Protocol

from agl_grpc.model.span import SpanCoreFields


class OpenSpan(Protocol):
    """A span that is under way."""

    def set_attributes(self, attributes: dict[str, Any]) -> None:
        """Add details."""

    def record_exception(self, error: BaseException) -> None:
        """Note an exception, and that the work failed."""


class Recorder(Protocol):
    """What a tracer offers to emitters for one trace."""

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
    return recorder
