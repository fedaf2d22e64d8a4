"""How good prompts are: tasks are done with them by the run's workers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agl_grpc.algorithm.concurrency import together
from agl_grpc.algorithm.errors import AlgorithmError
from agl_grpc.algorithm.prompt.candidate import Candidate
from agl_grpc.algorithm.prompt.traces import describe
from agl_grpc.client import StoreClient
from agl_grpc.client.rollout_batch import cancel_rest, primary_rewards, run_rollouts
from agl_grpc.model import (
    EnqueueRolloutRequest,
    NamedResources,
    Rollout,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
)


@dataclass(frozen=True)
class TaskResult:
    """One task done with a candidate; ``reward`` None = it ended without one."""

    index: int
    rollout: Rollout
    reward: float | None


class Evaluator:
    """Publishes candidates and has tasks done with them.

    Args:
        store: client of the run.
        prefix: begins the ids of resources and rollouts; the same in every process that works on the run.
        resources: what agents have besides the prompts.
        timeout: seconds that the rollouts of one batch may take; what is unfinished then is cancelled and
            left out.
        config: rules of each rollout's life.
        published: called after every publication of a candidate, which is then the run's latest.
    """

    def __init__(
        self,
        store: StoreClient,
        prefix: str,
        resources: NamedResources,
        *,
        timeout: float,
        config: RolloutConfig | None = None,
        published: Callable[[], Awaitable[None]],
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._resources = resources
        self._timeout = timeout
        self._config = config
        self._published = published
        self._publishing = asyncio.Lock()

    def resources_of(self, candidate: Candidate) -> NamedResources:
        """All that agents get with a candidate."""
        return {**self._resources, **candidate.templates}

    async def publish(self, candidate: Candidate) -> str:
        """The id of the candidate's resources, published now unless they are already."""
        resources_id = f"{self._prefix}-{candidate.version}"
        async with self._publishing:
            if await self._store.get_resources_by_id(resources_id) is None:
                await self._store.update_resources(resources_id, self.resources_of(candidate))
                # Its rollouts name it; whoever asks for the latest wants the best, not what is being tried.
                await self._published()
        return resources_id

    async def run(
        self,
        candidate: Candidate,
        tasks: Mapping[int, Any],
        mode: RolloutMode,
        label: str,
    ) -> list[TaskResult]:
        """Has tasks (by their place in the dataset) done; results in their order, unfinished ones left out.

        Raises:
            AlgorithmError: none was finished in time, or no agent could begin its work.
        """
        resources_id = await self.publish(candidate)
        label = f"{self._prefix}.{label}"
        requests = [
            EnqueueRolloutRequest(
                input=task,
                mode=mode,
                resources_id=resources_id,
                config=self._config,
                rollout_id=f"{label}.{index}",
            )
            for index, task in tasks.items()
        ]
        ended: dict[str, Rollout] = {}
        rollouts = run_rollouts(self._store, requests, label=label)
        try:
            async with asyncio.timeout(self._timeout), contextlib.aclosing(rollouts):
                async for rollout in rollouts:
                    # Cancelled by an earlier process whose time was up: unfinished, as it was for that one.
                    if rollout.status is not RolloutStatus.CANCELLED:
                        ended[rollout.rollout_id] = rollout
        except TimeoutError:
            await cancel_rest(self._store, label)
        if not ended:
            raise AlgorithmError(
                f"no rollout of {candidate.version} was finished within {self._timeout:g} s: are there "
                "workers? (rollout_batch_timeout sets the time)"
            )
        rewards = await primary_rewards(self._store, [*ended.values()])
        _refuse_unfit(candidate, [*ended.values()])
        return [
            TaskResult(index, ended[name], rewards.get(name))
            for index in tasks
            if (name := f"{label}.{index}") in ended
        ]

    async def score(self, candidate: Candidate, tasks: Mapping[int, Any], label: str) -> dict[str, Any]:
        """Mean reward in mode ``val``, a missing reward counting as 0, as plain values for the journal."""
        results = await self.run(candidate, tasks, RolloutMode.VAL, label)
        rewards = [result.reward or 0.0 for result in results]
        return {
            "version": candidate.version,
            "score": sum(rewards) / len(rewards),
            "tasks": len(tasks),
            "unfinished": len(tasks) - len(results),
            "without_reward": sum(result.reward is None for result in results),
            "rewards": {str(result.index): result.reward or 0.0 for result in results},
        }

    async def traces(self, results: Sequence[TaskResult]) -> list[str]:
        """Each result as text."""

        async def one(result: TaskResult) -> str:
            spans = await self._store.query_spans(result.rollout.rollout_id, "latest", omit_tokens=True)
            return describe(result.rollout, spans, result.reward)

        return await together(one(result) for result in results)


def _refuse_unfit(candidate: Candidate, ended: Sequence[Rollout]) -> None:
    """A run in which no agent works is a mistake of the set-up, not a bad prompt."""
    if candidate.parent is not None or any(rollout.failure is None for rollout in ended):
        return
    failure = ended[0].failure
    assert failure is not None
    raise AlgorithmError(
        f"every rollout with the first prompts failed, so nothing can be learned: {failure.message}"
    )
