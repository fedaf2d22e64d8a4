"""Sees one leased rollout through, from delivery to result: runs the agent, stops it when it has to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from agl_grpc.client import Completion, SpanGroup, SpanStreamer, StoreError
from agl_grpc.model import AttemptStatus, BlobReference, Failure, FailureKind, Reward
from agl_grpc.runner.agent_loop import AgentLoop
from agl_grpc.runner.executor import Execution, Task
from agl_grpc.runner.failures import failure_of
from agl_grpc.runner.held import Held
from agl_grpc.runner.outcome import Outcome
from agl_grpc.runner.resources import bind_to_attempt

log = logging.getLogger(__name__)

STOP_SECONDS = 2.0
"""How long an agent may take to end after it was told to stop, before it is left behind."""

CARRIED_SPANS = 10
CARRIED_BYTES = 32 << 10
"""Most spans, and bytes of them, that travel with a completion: a thousand of those fit into one message."""

TIMEOUT_MARGIN_SECONDS = 1.0
"""How long the store's own timer is given to end an attempt as a time-out before the worker reports it."""


class Attendant:
    """Sees attempts through with one agent; any number at once.

    `load` answers the value of an input that lies in the store as a blob. `agent_ended` is called when an
    agent has ended or was stopped: there is room for another. `left_behind` is called for each agent that
    does not stop when told to: it still uses memory and perhaps a processor. `carries` says whether
    completions may bring the attempt's last spans.
    """

    def __init__(
        self,
        executor: Execution,
        loop: AgentLoop,
        streamer: SpanStreamer,
        load: Callable[[Any], Awaitable[Any]],
        agent_ended: Callable[[], None],
        left_behind: Callable[[asyncio.Task[Outcome]], None],
        carries: Callable[[], bool],
    ) -> None:
        self._executor = executor
        self._loop = loop
        self._streamer = streamer
        self._load = load
        self._agent_ended = agent_ended
        self._left_behind = left_behind
        self._carries = carries

    async def attend(self, held: Held) -> Completion | None:
        """Runs the agent, brings its spans to disk; None when nothing more is to be said of the attempt."""
        outcome = await self._load_input(held) or await self._run_agent(held)
        held.ended = True
        self._agent_ended()
        if outcome is not None:
            spans = [span.SerializeToString() for span in outcome.spans] + outcome.last_spans
            carried = spans if self._carries() and _are_few(spans) else []
            if await self._spans_are_stored(held, [] if carried else spans):
                return _completion(held, outcome, carried)
            self._leave_spans(held, carried)
        log.info("attempt %s: nothing more is written: %s", held.attempt_id, held.stop.result().value)
        return None

    async def _load_input(self, held: Held) -> Outcome | None:
        """Brings a large input from the store; answers why the attempt fails when that is not possible."""
        rollout = held.work.rollout
        if not isinstance(rollout.input, BlobReference):
            return None
        loading = asyncio.ensure_future(self._load(rollout.input))
        await _first_of(loading, held.stop)
        if not loading.done():
            loading.cancel()
            return None
        try:
            rollout.input = loading.result()
        except StoreError as error:
            message = f"the input could not be read from the store: {error}"
            kind = FailureKind.INFRASTRUCTURE
            return Outcome(failure=Failure(kind=kind, type=type(error).__name__, message=message))
        return None

    async def _run_agent(self, held: Held) -> Outcome | None:
        if held.stop.done():
            return None
        task = _task(held)
        agent = asyncio.create_task(
            self._loop.run(lambda: self._executor.execute(task)), name=held.attempt_id
        )
        limit = held.work.rollout.config.timeout_seconds
        try:
            await _first_of(agent, held.stop, within=limit)
        finally:
            timed_out = not agent.done() and not held.stop.done()
            if not agent.done():
                await self._stop(agent)
        if held.stop.done():
            if agent.done() and not agent.cancelled() and agent.exception() is None:
                self._leave_spans(held, agent.result().last_spans)
            return None
        if timed_out:
            return await self._timed_out(held)
        return _result(agent)

    async def _stop(self, agent: asyncio.Task[Outcome]) -> None:
        agent.cancel()
        await asyncio.wait({agent}, timeout=STOP_SECONDS)
        if not agent.done():
            self._left_behind(agent)

    async def _timed_out(self, held: Held) -> Outcome | None:
        seconds = held.work.rollout.config.timeout_seconds
        log.warning("attempt %s: stopped, as it took longer than %g s", held.attempt_id, seconds)
        await asyncio.wait({held.stop}, timeout=TIMEOUT_MARGIN_SECONDS)
        message = f"the attempt took longer than its timeout of {seconds:g} s"
        return Outcome(failure=Failure(kind=FailureKind.TRUNCATED, type="timeout", message=message))

    def _leave_spans(self, held: Held, spans: Sequence[bytes]) -> None:
        """Sends spans of an attempt that is over for the worker; nobody waits for them."""
        if spans:
            self._streamer.submit(_group(held, spans))

    async def _spans_are_stored(self, held: Held, spans: Sequence[bytes]) -> bool:
        """Waits until the attempt's spans are on disk; False when it has to stop before."""
        stored = asyncio.ensure_future(self._store_spans(held, spans))
        await _first_of(stored, held.stop)
        if stored.done():
            stored.result()
            return True
        stored.cancel()
        return False

    async def _store_spans(self, held: Held, spans: Sequence[bytes]) -> None:
        if spans:
            await self._streamer.send(_group(held, spans))
        await self._streamer.flush(held.attempt_id)


async def _first_of(*futures: asyncio.Future[Any], within: float | None = None) -> None:
    await asyncio.wait(futures, timeout=within, return_when=asyncio.FIRST_COMPLETED)


def _are_few(spans: Sequence[bytes]) -> bool:
    return len(spans) <= CARRIED_SPANS and sum(map(len, spans)) <= CARRIED_BYTES


def _group(held: Held, spans: Sequence[bytes]) -> SpanGroup:
    return SpanGroup(rollout_id=held.rollout_id, attempt_id=held.attempt_id, spans=spans)


def _task(held: Held) -> Task:
    rollout = held.work.rollout
    resources = held.work.resources.resources if held.work.resources else {}
    return Task(rollout, bind_to_attempt(resources, rollout))


def _result(agent: asyncio.Task[Outcome]) -> Outcome:
    if agent.cancelled():
        message = "the agent cancelled its own task"
        return Outcome(failure=Failure(kind=FailureKind.AGENT, type="CancelledError", message=message))
    error = agent.exception()
    if error is None:
        return agent.result()
    log.error("a defect outside the agent ended its attempt", exc_info=error)
    return Outcome(failure=failure_of(error))


def rewards_of(outcome: Outcome, rollout_id: str, attempt_id: str) -> list[Reward]:
    """The attempt's rewards, as they are stored."""
    return [
        Reward(rollout_id=rollout_id, attempt_id=attempt_id, value=value, **key._asdict())
        for key, value in outcome.rewards.items()
    ]


def _completion(held: Held, outcome: Outcome, spans: Sequence[bytes]) -> Completion:
    return Completion(
        lease=held.work.lease,
        status=AttemptStatus.FAILED if outcome.failure else AttemptStatus.SUCCEEDED,
        failure=outcome.failure,
        rewards=rewards_of(outcome, held.rollout_id, held.attempt_id),
        output=outcome.output,
        spans=spans,
    )
