"""Runs the agent on one attempt: hooks, trace, the agent's own code, and what its result means."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from agl_grpc.agent import LitAgent, Purpose, emit_reward
from agl_grpc.agent.context import running_under
from agl_grpc.model import AttemptedRollout, Failure, FailureKind, NamedResources, RolloutMode
from agl_grpc.model.reward import PRIMARY
from agl_grpc.model.value import JSON, RawPayload
from agl_grpc.runner.failures import failure_of
from agl_grpc.runner.hooks import Hook, HookCalls, call_reported
from agl_grpc.runner.outcome import Outcome, read_result
from agl_grpc.runner.program import ProgramAgent
from agl_grpc.runner.threads import AbandonedThreads, run_in_thread
from agl_grpc.tracer.trace import Trace

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
    that did not stop. `keeps_end` says whether whoever takes the outcome also stores the end of its trace.
    """

    def __init__(
        self,
        agent: LitAgent[Any],
        tracer: Any,
        hooks: Sequence[Hook] = (),
        runner: Any = None,
        abandoned: AbandonedThreads | None = None,
        keeps_end: Callable[[], bool] = lambda: False,
    ) -> None:
        self._agent = agent
        self._tracer = tracer
        self._hooks = hooks
        self._runner = runner
        self._abandoned = abandoned or AbandonedThreads()
        # Whoever is called after the trace's end finds its spans in the store.
        self._is_heard = bool(hooks) or type(agent).on_rollout_end is not LitAgent.on_rollout_end
        self._keeps_end = keeps_end
        if runner is not None:
            agent.set_runner(runner)

    async def start(self) -> None:
        """Nothing to do: the agent is there."""

    async def close(self) -> None:
        """Has an agent that is a program let go of what it holds; other agents belong to the caller."""
        if isinstance(self._agent, ProgramAgent):
            await self._agent.close()

    async def execute(self, task: Task) -> Outcome:
        """Runs the agent to its end. What it raises becomes a failure; only cancellation passes."""
        rollout = task.rollout
        if isinstance(rollout.input, RawPayload) and rollout.input.media_type == JSON:
            return Outcome(failure=_undecodable(rollout.input))
        with running_under(self._runner):
            return await self._execute(task)

    async def _execute(self, task: Task) -> Outcome:
        agent, rollout, tracer = self._agent, task.rollout, self._tracer
        hooks = HookCalls(self._hooks, {"agent": agent, "runner": self._runner, "rollout": rollout})
        await hooks.call("on_rollout_start")
        await call_reported(agent.on_rollout_start, rollout.input, self._runner, tracer)
        async with tracer.trace_context(
            rollout_id=rollout.rollout_id, attempt_id=rollout.attempt.attempt_id
        ) as traced:
            await hooks.call("on_trace_start", tracer=tracer)
            outcome = Outcome(failure=hooks.failure) if hooks.failure else await self._run_agent(task)
            await hooks.call("on_trace_end", tracer=tracer)
            if isinstance(traced, Trace) and not self._is_heard and self._keeps_end():
                traced.keep_end()
        if isinstance(traced, Trace):
            outcome.last_spans = traced.kept
        outcome.rewards.update(traced.judgements)
        await call_reported(agent.on_rollout_end, rollout.input, rollout, self._runner, tracer)
        await hooks.call("on_rollout_end", spans=traced.spans)
        outcome.failure = outcome.failure or hooks.failure
        return outcome

    async def _run_agent(self, task: Task) -> Outcome:
        try:
            outcome = read_result(await self._call(task))
        except (asyncio.CancelledError, GeneratorExit):
            raise
        # An agent that calls sys.exit() ends its own attempt, not the worker.
        except BaseException as error:
            outcome = Outcome(failure=failure_of(error))
        if outcome.failure is not None:
            log.warning(
                "attempt %s of %s failed (%s): %s",
                task.rollout.attempt.attempt_id,
                task.rollout.rollout_id,
                outcome.failure.kind,
                outcome.failure.message,
            )
        if outcome.returned:
            # Readers of traces find returned rewards where they find emitted ones.
            names = list(outcome.returned)
            emit_reward(outcome.returned, primary_key=PRIMARY if PRIMARY in names else names[0])
        return outcome

    async def _call(self, task: Task) -> Any:
        purpose: Purpose = "training" if task.rollout.mode is RolloutMode.TRAIN else "validation"
        method, is_async = self._agent.method_of(purpose)
        arguments = (task.rollout.input, task.resources, task.rollout)
        if is_async:
            with _ending_forks():
                return await method(*arguments)

        def call() -> Any:
            with _ending_forks():
                return method(*arguments)

        return await run_in_thread(call, self._abandoned)


def _undecodable(task: RawPayload) -> Failure:
    message = f"the task cannot be decoded: it is said to be JSON and begins with {task.data[:80]!r}"
    return Failure(kind=FailureKind.ENVIRONMENT, type="UNDECODABLE_TASK", message=message)


@contextlib.contextmanager
def _ending_forks() -> Iterator[None]:
    """Ends a child that the agent forked and that comes out of the agent's code: it is no second worker."""
    process, code = os.getpid(), 1
    try:
        yield
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    finally:
        if os.getpid() != process:
            os._exit(code)
