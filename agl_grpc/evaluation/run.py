"""Has every task of a dataset answered by a run's workers, in mode ``val``, and reads what that was worth."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agl_grpc.client import StoreClient
from agl_grpc.client.rollout_batch import Judgements, WatchEnded, cancel_rest, judgements, run_rollouts
from agl_grpc.evaluation.answers import Finder, answer_of, find_answer
from agl_grpc.evaluation.errors import EvaluationError
from agl_grpc.evaluation.result import Answered, Evaluation, TaskResult, task_digest
from agl_grpc.evaluation.sampling import Sampling, with_sampling
from agl_grpc.grader.conversation import Decode
from agl_grpc.model import (
    EnqueueRolloutRequest,
    FailureKind,
    NamedResources,
    Rollout,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
)
from agl_grpc.model.rollout import SEED_LABEL

# Before the training rollouts that may wait in the same workers' queues.
_PRIORITY = 10
_READ_AT_ONCE = 16
NO_REWARD = "no_reward"
# An agent that raises has answered wrongly; nobody else's failure says anything of the model.
_COUNTED_AS_WRONG = (FailureKind.AGENT, FailureKind.TRUNCATED)


@dataclass(frozen=True)
class Pass:
    """One pass over a dataset.

    Attributes:
        name: what is evaluated, for people.
        samples: rollouts for each task.
        sampling: how they are sampled.
        success: the reward from which an answer is right.
        ks: the k of pass@k.
        weights: weights of named rewards, whose weighted sum is the reward; empty = as the run's graders say,
            else the primary reward.
        answers: whether to look for final answers, for maj@n; it costs a reading of each rollout's spans.
        find: from a response's text to the final answer.
        decode: token ids to text; None = only recorded text is read.
        label: begins the rollouts' ids. With a label of its own an evaluation that was broken off goes on
            where it was; None = a new one.
        queue: of the rollouts; None = the run's own. The workers must serve it.
        config: rules of each rollout's life.
        timeout: seconds for the whole pass.
        partial: whether what is unfinished then is cancelled and left out, in place of an error.
        about: what is kept with the result.
    """

    name: str = "evaluation"
    samples: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    success: float = 1.0
    ks: tuple[int, ...] = (1,)
    weights: Mapping[str, float] = field(default_factory=dict)
    answers: bool = False
    find: Finder = find_answer
    decode: Decode | None = None
    label: str | None = None
    queue: str | None = None
    config: RolloutConfig | None = None
    timeout: float = 1800.0
    partial: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise EvaluationError(f"n is {self.samples}; each task needs 1 or more answers")
        for k in self.ks:
            if not 1 <= k <= self.samples:
                raise EvaluationError(
                    f"pass@{k} needs k from 1 to n, and each task has n = {self.samples} answers"
                )


async def publish_sampling(
    store: StoreClient,
    resources_id: str,
    resources: NamedResources,
    endpoints: str | Collection[str],
    sampling: Sampling,
) -> str:
    """Publishes what agents work with in an evaluation, with these endpoints sampling so; answers the id.

    An id that exists already is kept as it is: a broken-off evaluation goes on with the same resources.
    """
    if await store.get_resources_by_id(resources_id) is None:
        await store.update_resources(resources_id, with_sampling(resources, endpoints, sampling))
    return resources_id


async def evaluate(
    store: StoreClient,
    tasks: Sequence[Any],
    plan: Pass | None = None,
    *,
    resources_id: str | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Evaluation:
    """Has each task answered and judged.

    Args:
        store: client of the run.
        tasks: the dataset; each item is a rollout's input. A task's ``data_source`` names its source.
        plan: how.
        resources_id: what agents work with (see `publish_sampling`); None = the run's latest.
        on_progress: told how many rollouts are finished, of how many.

    Raises:
        EvaluationError: the dataset is empty, the pass was not finished in time, or no rollout got as far as
            an answer.
    """
    plan = plan or Pass()
    if not len(tasks):
        raise EvaluationError("the dataset is empty: an evaluation needs one task or more")
    began = time.monotonic()
    label = plan.label or f"validation-{uuid.uuid4().hex[:12]}"
    digests = [task_digest(task) for task in tasks]
    requests = [*_requests(tasks, digests, plan, label, resources_id)]
    ended = await _finished(store, label, requests, plan, on_progress)
    judged = await judgements(store, [*ended.values()], plan.weights)
    answers = await _answers(store, [*judged.rewards], plan) if plan.answers else {}
    results = tuple(
        TaskResult(
            index=number,
            digest=digests[number],
            source=_source(task),
            rollouts=tuple(
                _answered(ended[name], judged, answers) if name in ended else _unfinished(name)
                for name in (f"{label}.{number}.{sample}" for sample in range(plan.samples))
            ),
        )
        for number, task in enumerate(tasks)
    )
    _refuse_nothing_done(results)
    return Evaluation(
        name=plan.name,
        samples=plan.samples,
        tasks=results,
        sampling=plan.sampling,
        success=plan.success,
        ks=plan.ks,
        seconds=time.monotonic() - began,
        about=plan.about,
    )


def _requests(
    tasks: Sequence[Any], digests: Sequence[str], plan: Pass, label: str, resources_id: str | None
) -> Iterator[EnqueueRolloutRequest]:
    seen: Counter[str] = Counter()
    for number, task in enumerate(tasks):
        occurrence = seen[digests[number]]
        seen[digests[number]] += 1
        for sample in range(plan.samples):
            yield EnqueueRolloutRequest(
                input=task,
                mode=RolloutMode.VAL,
                resources_id=resources_id,
                config=plan.config,
                rollout_id=f"{label}.{number}.{sample}",
                group_id=f"{label}.{number}",
                queue=plan.queue,
                priority=_PRIORITY,
                labels={SEED_LABEL: str(plan.sampling.seed_of(digests[number], occurrence, sample))},
            )


def _source(task: Any) -> str:
    return str(task.get("data_source", "default")) if isinstance(task, Mapping) else "default"


async def _finished(
    store: StoreClient,
    label: str,
    requests: Sequence[EnqueueRolloutRequest],
    plan: Pass,
    on_progress: Callable[[int, int], None],
) -> dict[str, Rollout]:
    ended: dict[str, Rollout] = {}
    rollouts = run_rollouts(store, requests, label=label)
    try:
        async with asyncio.timeout(plan.timeout), contextlib.aclosing(rollouts):
            async for rollout in rollouts:
                ended[rollout.rollout_id] = rollout
                on_progress(len(ended), len(requests))
    except TimeoutError as error:
        if not ended or not plan.partial:
            raise EvaluationError(
                f"{len(ended)} of {len(requests)} rollouts were finished after {plan.timeout:g} s; "
                "are there workers, and does the engine answer?"
            ) from error
        await cancel_rest(store, label)
    except WatchEnded as error:
        raise EvaluationError(str(error)) from error
    return ended


def _unfinished(name: str) -> Answered:
    return Answered(name, None, failure=FailureKind.CANCELLED.value, message="it was not finished in time")


def _answered(rollout: Rollout, judged: Judgements, answers: Mapping[str, str | None]) -> Answered:
    name = rollout.rollout_id
    if name in judged.rewards:
        return Answered(name, judged.rewards[name], answers.get(name))
    failure = rollout.failure or judged.failures.get(name)
    if rollout.status is RolloutStatus.CANCELLED:
        return _unfinished(name)
    if failure is None or failure.kind is None:
        return Answered(name, None, failure=NO_REWARD, message="it ended without a reward")
    wrong = failure.kind in _COUNTED_AS_WRONG
    return Answered(name, 0.0 if wrong else None, failure=failure.kind.value, message=failure.message)


async def _answers(store: StoreClient, rollout_ids: Sequence[str], plan: Pass) -> dict[str, str | None]:
    """The final answers, read a few rollouts at a time."""
    slots = asyncio.Semaphore(_READ_AT_ONCE)

    async def one(rollout_id: str) -> tuple[str, str | None]:
        async with slots:
            spans = await store.query_spans(rollout_id, "latest", omit_tokens=plan.decode is None)
        return rollout_id, answer_of(spans.items, plan.decode, plan.find)

    return dict(await asyncio.gather(*map(one, rollout_ids)))


def _refuse_nothing_done(results: Sequence[TaskResult]) -> None:
    """A model whose every rollout failed for reasons that are not its own has not been evaluated."""
    rollouts = [one for task in results for one in task.rollouts]
    if all(one.failure == FailureKind.INFRASTRUCTURE.value for one in rollouts):
        raise EvaluationError(f"no rollout got as far as an answer: {rollouts[0].message}")
