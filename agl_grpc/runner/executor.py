"""Runs the agent on one attempt: hooks, trace, the agent's own code, and what its result means."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from agl_grpc.agent import LitAgent, emit_reward
from agl_grpc.model import AttemptedRollout, NamedResources, RolloutMode
from agl_grpc.model.reward import PRIMARY
from agl_grpc.runner.failures import failure_of
from agl_grpc.runner.hooks import Hook, call_hooks, call_reported
from agl_grpc.runner.outcome import Outcome, read_result
from agl_grpc.runner.threads import AbandonedThreads, run_in_thread

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Task:
    """What an agent is given for one attempt."""

    rollout: AttemptedRollout
    """The rollout with its attempt; its input is the task."""
    resources: NamedResources
    """Resources, bound to the attempt."""


class Execution(Protocol):
    """How a worker has its attempts executed; all of it on the agents' event loop."""

    async def start(self) -> None:
        """Gets ready; raises `LoadError` when the agent cannot be used."""

    async def execute(self, task: Task) -> Outcome:
        """Runs the agent on one attempt to its end; cancelled, it stops the agent."""

    async def close(self) -> None:
        """Ends what it started."""


class Executor:
    """Executes attempts with one agent; any number at once.

    `runner` is what hooks and the agent see as their runner; `abandoned` counts threads of synchronous agents
    that did not stop.
    """

    def __init__(
        self,
        agent: LitAgent[Any],
        tracer: Any,
        hooks: Sequence[Hook] = (),
        runner: Any = None,
        abandoned: AbandonedThreads | None = None,
    ) -> None:
        self._agent = agent
        self._tracer = tracer
        self._hooks = hooks
        self._runner = runner
        self._abandoned = abandoned or AbandonedThreads()
        if runner is not None:
            agent.set_runner(runner)

    async def start(self) -> None:
        """Nothing to do: the agent is there."""

    async def close(self) -> None:
        """Nothing to do: what it runs belongs to its caller."""

    async def execute(self, task: Task) -> Outcome:
        """Runs the agent to its end. What it raises becomes a failure; only cancellation passes."""
        common = {"agent": self._agent, "runner": self._runner, "rollout": task.rollout}
        await call_hooks(self._hooks, "on_rollout_start", **common)
        call_reported(self._agent.on_rollout_start, task.rollout.input, self._runner, self._tracer)
        async with self._tracer.trace_context(
            rollout_id=task.rollout.rollout_id, attempt_id=task.rollout.attempt.attempt_id
        ) as traced:
            await call_hooks(self._hooks, "on_trace_start", tracer=self._tracer, **common)
            outcome = await self._run_agent(task)
            await call_hooks(self._hooks, "on_trace_end", tracer=self._tracer, **common)
        spans = traced.spans
        outcome.read_rewards(spans)
        call_reported(
            self._agent.on_rollout_end, task.rollout.input, task.rollout, self._runner, self._tracer
        )
        await call_hooks(self._hooks, "on_rollout_end", spans=spans, **common)
        return outcome

    async def _run_agent(self, task: Task) -> Outcome:
        try:
            outcome = read_result(await self._call(task))
        # An agent that calls sys.exit() ends its own attempt, not the worker.
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            failure = failure_of(error)
            log.warning(
                "attempt %s of %s failed (%s): %s",
                task.rollout.attempt.attempt_id, task.rollout.rollout_id, failure.kind, failure.message,
            )  # fmt: skip
            return Outcome(failure=failure)
        if outcome.returned:
            # Readers of traces find returned rewards where they find emitted ones.
            names = list(outcome.returned)
            emit_reward(outcome.returned, primary_key=PRIMARY if PRIMARY in names else names[0])
        return outcome

    async def _call(self, task: Task) -> Any:
        name = "training_rollout" if task.rollout.mode is RolloutMode.TRAIN else "validation_rollout"
        arguments = (task.rollout.input, task.resources, task.rollout)
        if self._agent.is_async():
            return await getattr(self._agent, f"{name}_async")(*arguments)
        return await run_in_thread(lambda: getattr(self._agent, name)(*arguments), self._abandoned)
