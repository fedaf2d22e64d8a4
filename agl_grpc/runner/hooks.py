"""Hooks around rollouts: the user's code beside the agent's. They never fail a rollout."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

log = logging.getLogger(__name__)


class Hook:
    """Override what you need. An exception in a hook is logged and counted; the rollout goes on.

    Order: `on_rollout_start`, `on_trace_start`, the agent, `on_trace_end`, `on_rollout_end`.
    """

    async def on_rollout_start(self, agent: Any, runner: Any, rollout: Any) -> None:
        """Before anything else of a rollout."""

    async def on_trace_start(self, agent: Any, runner: Any, tracer: Any, rollout: Any) -> None:
        """The trace is open: spans made here belong to the attempt."""

    async def on_trace_end(self, agent: Any, runner: Any, tracer: Any, rollout: Any) -> None:
        """The agent has ended, well or not; the trace is still open."""

    async def on_rollout_end(self, agent: Any, runner: Any, rollout: Any, spans: Any) -> None:
        """The trace is closed; `spans` are those made in this process."""


async def call_hooks(hooks: Sequence[Any], event: str, **arguments: Any) -> int:
    """Calls `event` of every hook, in order; returns how many raised."""
    failed = 0
    for hook in hooks:
        method = getattr(hook, event, None)
        if method is None:
            continue
        try:
            await method(**arguments)
        except Exception:
            failed += 1
            log.exception("hook %s.%s raised; the rollout goes on", type(hook).__name__, event)
    return failed


def call_reported(function: Callable[..., Any], *arguments: Any) -> None:
    """Calls a function of the user's that must not fail a rollout."""
    try:
        function(*arguments)
    except Exception:
        log.exception("%s raised; the rollout goes on", getattr(function, "__qualname__", function))
