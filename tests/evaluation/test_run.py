"""Evaluation: every task by the run's own workers, scored by what the store keeps."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agl_grpc import StoreClient
from agl_grpc.evaluation import EvaluationError, Pass, Sampling, evaluate, publish_sampling
from agl_grpc.model import LLM, NamedResources, RolloutMode
from agl_grpc.model.rollout import SEED_LABEL
from agl_grpc.runner import LitAgentRunner
from tests.support.store_process import StoreProcess
from tests.trainer import agents


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[StoreClient]:
    with StoreProcess(tmp_path / "agl.db") as store:
        async with StoreClient(store.address) as made:
            yield made


@pytest.fixture
async def worker(client: StoreClient) -> AsyncIterator[None]:
    """A worker of `halver` for the run's own queue."""
    stop = asyncio.Event()
    async with LitAgentRunner(concurrency=8).run_context(agent=agents.halver, store=client) as runner:
        work = asyncio.create_task(runner.iter(stop))
        yield
        stop.set()
        await work


TASKS = [{"number": 2, "data_source": "small"}, {"number": 4}, {"number": -1}]


@pytest.mark.usefixtures("worker")
async def test_an_agents_failure_is_a_wrong_answer_and_told_apart(client: StoreClient) -> None:
    seen: list[tuple[int, int]] = []
    found = await evaluate(
        client,
        TASKS,
        Pass(samples=2, ks=(1, 2), success=2.0, timeout=60),
        on_progress=lambda done, of: seen.append((done, of)),
    )
    assert [task.mean for task in found.tasks] == [1.0, 2.0, 0.0]
    assert found.mean == pytest.approx(1.0)
    assert found.failures == {"agent": 2}
    assert found.tasks[2].rollouts[0].message == "negative numbers cannot be halved"
    assert found.figures.pass_at == {1: pytest.approx(1 / 3), 2: pytest.approx(1 / 3)}
    assert {name: each.tasks for name, each in found.sources.items()} == {"default": 2, "small": 1}
    assert seen[-1] == (6, 6)
    rollouts = await client.query_rollouts()
    assert {rollout.mode for rollout in rollouts} == {RolloutMode.VAL}
    assert len({rollout.group_id for rollout in rollouts}) == 3


@pytest.mark.usefixtures("worker")
async def test_two_passes_do_not_disturb_each_other(client: StoreClient) -> None:
    first, second = await asyncio.gather(
        evaluate(client, [{"number": 2}], Pass(samples=3, timeout=60)),
        evaluate(client, [{"number": 8}], Pass(timeout=60)),
    )
    assert (first.mean, first.figures.rollouts) == (1.0, 3)
    assert (second.mean, second.figures.rollouts) == (4.0, 1)


@pytest.mark.usefixtures("worker")
async def test_a_named_pass_that_comes_again_does_nothing_twice(client: StoreClient) -> None:
    plan = Pass(samples=2, label="named", timeout=60)
    first = await evaluate(client, [{"number": 2}], plan)
    assert (await evaluate(client, [{"number": 2}], plan)).tasks == first.tasks
    assert len(await client.query_rollouts()) == 2


@pytest.mark.usefixtures("worker")
async def test_named_rewards_are_weighed_and_who_lacks_one_has_none(client: StoreClient) -> None:
    found = await evaluate(client, [{"number": 2}], Pass(weights={"primary": 3.0}, timeout=60))
    assert found.mean == 3.0
    found = await evaluate(client, [{"number": 2}], Pass(weights={"style": 1.0}, timeout=60))
    assert found.figures.mean is None
    assert found.failures == {"no_reward": 1}


async def test_the_endpoint_samples_as_asked_and_the_judge_keeps_its_own(client: StoreClient) -> None:
    own = {"temperature": 1.0, "top_k": 5, "seed": 1}
    resources: NamedResources = {
        "main_llm": LLM(endpoint="http://a", model="m", sampling_parameters=own),
        "judge": LLM(endpoint="http://b", model="j", sampling_parameters={"seed": 2}),
    }
    sampling = Sampling(temperature=0.5, top_p=0.9, max_tokens=7, seed=4)
    for _ in range(2):
        assert await publish_sampling(client, "e", resources, "main_llm", sampling) == "e"
    found = await client.get_resources_by_id("e")
    assert found is not None
    assert found.version == 1
    llm = found.resources["main_llm"]
    assert isinstance(llm, LLM)
    assert llm.sampling_parameters == {"temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "top_k": 5}
    assert found.resources["judge"] == resources["judge"]


@pytest.mark.usefixtures("worker")
async def test_every_rollout_has_a_seed_of_its_own_that_its_task_determines(client: StoreClient) -> None:
    async def seeds(tasks: list[Any], seed: int) -> dict[tuple[float, int], list[str]]:
        plan = Pass(samples=3, sampling=Sampling(seed=seed), label=f"pass-{len(tasks)}-{seed}", timeout=60)
        await evaluate(client, tasks, plan)
        found: dict[tuple[float, int], list[str]] = {}
        seen: Counter[float] = Counter()
        for number, task in enumerate(tasks):
            key = (task["number"], seen[task["number"]])
            seen[task["number"]] += 1
            for sample in range(3):
                rollout = await client.get_rollout_by_id(f"{plan.label}.{number}.{sample}")
                assert rollout is not None
                found.setdefault(key, []).append((rollout.labels or {})[SEED_LABEL])
        return found

    first = await seeds([{"number": 2}, {"number": 4}, {"number": 2}], 1)
    flat = [each for given in first.values() for each in given]
    # One seed in two rollouts would draw both answers with the same random numbers.
    assert len(set(flat)) == 9
    other_order = await seeds([{"number": 4}, {"number": 2}], 1)
    assert other_order == {key: first[key] for key in other_order}
    another = await seeds([{"number": 4}, {"number": 2}], 2)
    assert not {each for given in another.values() for each in given} & set(flat)


async def test_without_workers_it_says_how_far_it_came(client: StoreClient) -> None:
    with pytest.raises(EvaluationError, match=r"0 of 1 rollouts were finished after 0\.2 s"):
        await evaluate(client, [{"number": 2}], Pass(timeout=0.2))


async def test_a_pass_may_leave_out_what_is_not_finished_in_time(client: StoreClient) -> None:
    stop = asyncio.Event()
    async with LitAgentRunner(concurrency=8).run_context(agent=agents.halver, store=client) as runner:
        work = asyncio.create_task(runner.iter(stop))
        await evaluate(client, [{"number": 2}], Pass(label="part", timeout=60))
        stop.set()
        await work
    # Nobody is there for the second task. A machine that is too slow to read the first is given more time.
    for seconds in (1.0, 8.0, 64.0):
        plan = Pass(label="part", timeout=seconds, partial=True)
        try:
            found = await evaluate(client, [{"number": 2}, {"number": 8}], plan)
        except EvaluationError:
            continue
        break
    assert [task.mean for task in found.tasks] == [1.0, None]
    assert (found.mean, found.failures) == (1.0, {"cancelled": 1})
    assert [each.status.value for each in await client.query_rollouts()] == ["succeeded", "cancelled"]
    # Whoever takes it up finds the same.
    again = await evaluate(client, [{"number": 2}, {"number": 8}], Pass(label="part", timeout=60))
    assert again.failures == {"cancelled": 1}


async def test_an_empty_dataset_is_refused(client: StoreClient) -> None:
    with pytest.raises(EvaluationError, match="the dataset is empty"):
        await evaluate(client, [])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "n is 0"),
        ({"samples": 4, "ks": (5,)}, r"pass@5 needs k from 1 to n, and each task has n = 4"),
    ],
)
def test_a_pass_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        Pass(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_sampling_out_of_its_range_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        Sampling(**fields)
