"""How good prompts are: tasks are done with them by the run's workers.

Scores are evaluations like any other (`agl_grpc.evaluation`): mode ``val``, seeds of their own, and failures
that are not the prompt's in no mean.
"""

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
from agl_grpc.evaluation import EvaluationError, Pass, Sampling, evaluate, with_sampling
from agl_grpc.model import (
    LLM,
    EnqueueRolloutRequest,
    FailureKind,
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
        validation: how requests are sampled when a candidate is scored; None = as the endpoint says.
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
        validation: Sampling | None = None,
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._resources = resources
        self._timeout = timeout
        self._config = config
        self._published = published
        self._validation = validation
        self._publishing = asyncio.Lock()

    def resources_of(self, candidate: Candidate) -> NamedResources:
        """All that agents get with a candidate."""
        return {**self._resources, **candidate.templates}

    async def publish(self, candidate: Candidate, sampling: Sampling | None = None) -> str:
        """The id of the candidate's resources, published now unless they are already.

        With ``sampling`` the first endpoint of theirs samples so, under an id of its own.
        """
        resources_id = f"{self._prefix}-{candidate.version}"
        resources = self.resources_of(candidate)
        if sampling is not None:
            resources_id += "-validation"
            endpoint = next((name for name, value in resources.items() if isinstance(value, LLM)), "")
            resources = with_sampling(resources, endpoint, sampling)
        async with self._publishing:
            if await self._store.get_resources_by_id(resources_id) is None:
                await self._store.update_resources(resources_id, resources)
                # Its rollouts name it; whoever asks for the latest wants the best, not what is being tried.
                await self._published()
        return resources_id

    async def run(
        self,
        candidate: Candidate,
        tasks: Mapping[int, Any],
        label: str,
    ) -> list[TaskResult]:
        """Has training tasks (by their place in the dataset) done, to learn from what happens.

        Results are in their order, unfinished ones left out.

        Raises:
            AlgorithmError: none was finished in time, or no agent could begin its work.
        """
        resources_id = await self.publish(candidate)
        label = f"{self._prefix}.{label}"
        requests = [
            EnqueueRolloutRequest(
                input=task,
                mode=RolloutMode.TRAIN,
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
        _refuse_unfit(candidate, [one.failure.message if one.failure else None for one in ended.values()])
        return [
            TaskResult(index, ended[name], rewards.get(name))
            for index in tasks
            if (name := f"{label}.{index}") in ended
        ]

    async def score(self, candidate: Candidate, tasks: Mapping[int, Any], label: str) -> dict[str, Any]:
        """The mean of an evaluation in mode ``val``, as plain values for the journal.

        What the agent itself fails counts as 0; what was not finished in time, failed for other reasons or
        was judged by nobody is in no mean, and counted.

        Raises:
            AlgorithmError: none was finished in time, or no agent could begin its work.
        """
        plan = Pass(
            name=candidate.version,
            sampling=self._validation or Sampling(),
            label=f"{self._prefix}.{label}",
            config=self._config,
            timeout=self._timeout,
            partial=True,
        )
        resources_id = await self.publish(candidate, self._validation)
        try:
            found = await evaluate(self._store, [*tasks.values()], plan, resources_id=resources_id)
        except EvaluationError as error:
            raise AlgorithmError(
                f"{candidate.version} cannot be scored: {error} (rollout_batch_timeout sets the time)"
            ) from error
        rollouts = [one for task in found.tasks for one in task.rollouts]
        _refuse_unfit(candidate, [one.failure and one.message for one in rollouts])
        rewards = {index: task.mean for index, task in zip(tasks, found.tasks, strict=True)}
        unfinished = sum(one.failure == FailureKind.CANCELLED.value for one in rollouts)
        known = {str(index): reward for index, reward in rewards.items() if reward is not None}
        return {
            "version": candidate.version,
            "score": sum(known.values()) / len(known) if known else 0.0,
            "tasks": len(tasks),
            "unfinished": unfinished,
            "without_reward": len(tasks) - len(known) - unfinished,
            "rewards": known,
        }

    async def traces(self, results: Sequence[TaskResult]) -> list[str]:
        """Each result as text."""

        async def one(result: TaskResult) -> str:
            spans = await self._store.query_spans(result.rollout.rollout_id, "latest", omit_tokens=True)
            return describe(result.rollout, spans, result.reward)

        return await together(one(result) for result in results)


def _refuse_unfit(candidate: Candidate, failures: Sequence[str | None]) -> None:
    """A run in which no agent works is a mistake of the set-up, not a bad prompt."""
    if candidate.parent is None and all(failures):
        raise AlgorithmError(
            f"every rollout with the first prompts failed, so nothing can be learned: {failures[0]}"
        )
