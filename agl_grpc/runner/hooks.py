"""Hooks around rollouts: the user's code beside the agent's. They fail a rollout only when asked to."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

from agl_grpc.agent import current_recorder, emit_exception
from agl_grpc.model.failure import Failure
from agl_grpc.runner.failures import failure_of

log = logging.getLogger(__name__)

HOOK = "agl_grpc.hook"
"""Attribute of the span that reports a failing hook: which one it was."""

# A hook that calls sys.exit() must not end the worker.
_RAISED = (Exception, SystemExit, KeyboardInterrupt)


class Hook:
    """Override what you need, as ``async def`` or ``def``.

    Order: `on_rollout_start`, `on_trace_start`, the agent, `on_trace_end`, `on_rollout_end`. An exception in
    a hook is logged and noted as a span; the rollout goes on. With ``fail_rollout = True`` it fails the
    attempt instead: the agent is not run, or its result does not count.
    """

    fail_rollout: bool = False

    async def on_rollout_start(self, agent: Any, runner: Any, rollout: Any) -> None:
        """Before anything else of a rollout."""

    async def on_trace_start(self, agent: Any, runner: Any, tracer: Any, rollout: Any) -> None:
        """The trace is open: spans made here belong to the attempt."""

    async def on_trace_end(self, agent: Any, runner: Any, tracer: Any, rollout: Any) -> None:
        """The agent has ended, well or not; the trace is still open."""

    async def on_rollout_end(self, agent: Any, runner: Any, rollout: Any, spans: Any) -> None:
        """The trace is closed; ``spans`` are those made in this process, of very many the newest 10,000."""


class HookCalls:
    """The hooks of one attempt; ``common`` is what each of them is given."""

    def __init__(self, hooks: Sequence[Any], common: dict[str, Any]) -> None:
        self._hooks = hooks
        self._common = common
        self.failure: Failure | None = None
        """Of the first hook that fails its rollout."""

    async def call(self, event: str, **arguments: Any) -> None:
        """Calls ``event`` of every hook, in order."""
        for hook in self._hooks:
            method = getattr(hook, event, None)
            if method is None:
                continue
            name = f"{type(hook).__name__}.{event}"
            error = await _raised_by(method, **self._common, **arguments)
            if error is None:
                continue
            fails = bool(getattr(hook, "fail_rollout", False))
            _report(name, error, "the attempt fails" if fails else "the rollout goes on")
            if fails and self.failure is None:
                self.failure = failure_of(error)
                self.failure.message = f"the hook {name}: {self.failure.message}"


async def call_reported(function: Callable[..., Any], *arguments: Any) -> None:
    """Calls a function of the user's that must not fail a rollout."""
    error = await _raised_by(function, *arguments)
    if error is not None:
        _report(getattr(function, "__qualname__", str(function)), error, "the rollout goes on")


async def _raised_by(function: Callable[..., Any], *arguments: Any, **named: Any) -> BaseException | None:
    try:
        result = function(*arguments, **named)
        if inspect.isawaitable(result):
            await result
    except _RAISED as error:
        return error
    return None


def _report(name: str, error: BaseException, consequence: str) -> None:
    log.error("the hook %s raised; %s", name, consequence, exc_info=error)
    if current_recorder() is not None:
        emit_exception(error, {HOOK: name})
