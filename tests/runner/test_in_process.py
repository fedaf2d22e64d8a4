"""`LitAgentRunner`: the worker's parts in the caller's own process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop

from agl_grpc.agent import LitAgent, emit_reward, prompt_rollout, rollout
from agl_grpc.client import StoreClient
from agl_grpc.model import LLM, EnqueueRolloutRequest, PromptTemplate, RolloutStatus
from agl_grpc.runner import LitAgentRunner


@rollout
async def adding(task: dict[str, int], resources: Any) -> float:
    """Is right or wrong."""
    return float(task["a"] + task["b"] == task["sum"])


@prompt_rollout
def asking(task: str, prompt_template: PromptTemplate) -> None:
    """Judges its own prompt."""
    emit_reward(float(len(prompt_template.format(name=task))))


class Broken(LitAgent[Any]):
    """Never works."""

    def rollout(self, task: Any, resources: Any, rollout: Any) -> None:
        """Raises."""
        raise ValueError(f"no way with {task}")


@rollout
async def starting_a_program(task: str, resources: Any) -> float:
    """Its exit code."""
    program = await asyncio.create_subprocess_exec("sh", "-c", task)
    return float(await program.wait())


@pytest.fixture
def uvloops_policy() -> Iterator[None]:
    """What `uvloop.install()` leaves behind."""
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    yield
    asyncio.set_event_loop_policy(before)


async def test_step_runs_one_rollout(client: StoreClient) -> None:
    async with LitAgentRunner().run_context(agent=adding, store=client) as runner:
        right = await runner.step({"a": 2, "b": 2, "sum": 4})
        wrong = await runner.step({"a": 2, "b": 2, "sum": 5}, mode="train")
    assert (right.status, wrong.status) == (RolloutStatus.SUCCEEDED, RolloutStatus.SUCCEEDED)
    assert right.run_id == client.run_id
    rewards = await client.query_rewards([right.rollout_id, wrong.rollout_id])
    assert sorted((reward.rollout_id, reward.value) for reward in rewards) == sorted(
        [(right.rollout_id, 1.0), (wrong.rollout_id, 0.0)]
    )
    spans = await client.query_spans(right.rollout_id)
    assert len(spans) == 2


async def test_step_with_resources_in_a_thread(client: StoreClient) -> None:
    resources = {
        "greeting": PromptTemplate(template="hello {name}"),
        "llm": LLM(endpoint="http://x", model="m"),
    }
    async with LitAgentRunner().run_context(agent=asking, store=client) as runner:
        done = await runner.step("you", resources=resources)
    assert done.status is RolloutStatus.SUCCEEDED, done.failure
    (reward,) = await client.query_rewards([done.rollout_id])
    assert reward.value == len("hello you")


async def test_step_tells_why_an_agent_failed(client: StoreClient) -> None:
    async with LitAgentRunner().run_context(agent=Broken(), store=client) as runner:
        done = await runner.step("this")
    assert done.status is RolloutStatus.FAILED
    assert done.failure is not None
    assert done.failure.message == "no way with this"


async def test_a_step_that_is_cancelled_leaves_no_rollout_running(client: StoreClient) -> None:
    begun = asyncio.Event()

    @rollout
    async def endless(task: Any, resources: Any) -> None:
        begun.set()
        await asyncio.get_running_loop().create_future()

    async with LitAgentRunner(poll_interval=5.0).run_context(agent=endless, store=client) as runner:
        step = asyncio.create_task(runner.step("for ever"))
        await begun.wait()
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
    (left,) = await client.query_rollouts()
    assert left.status is RolloutStatus.CANCELLED


async def test_a_runner_that_is_not_ready_says_so() -> None:
    with pytest.raises(RuntimeError, match="use run_context"):
        await LitAgentRunner().step({})


@pytest.mark.parametrize("event", [asyncio.Event, threading.Event])
async def test_iter_works_until_its_event_is_set(client: StoreClient, event: Any) -> None:
    stop = event()
    async with LitAgentRunner(concurrency=2).run_context(agent=adding, store=client) as runner:
        work = asyncio.create_task(runner.iter(stop))
        rollouts = await client.enqueue_many_rollouts(
            [EnqueueRolloutRequest(input={"a": 1, "b": i, "sum": 3}) for i in range(6)]
        )
        ids = [rollout.rollout_id for rollout in rollouts]
        done = await client.wait_for_rollouts(rollout_ids=ids, timeout=20)
        stop.set()
        await work
        after = await runner.step({"a": 1, "b": 1, "sum": 2})
    assert [rollout.status for rollout in done] == [RolloutStatus.SUCCEEDED] * 6
    assert sum(reward.value for reward in await client.query_rewards(ids)) == 1.0
    assert after.status is RolloutStatus.SUCCEEDED


async def test_iter_ends_after_max_rollouts(client: StoreClient) -> None:
    await client.enqueue_many_rollouts(
        [EnqueueRolloutRequest(input={"a": 1, "b": 2, "sum": 3}) for _ in range(3)]
    )
    async with LitAgentRunner(max_rollouts=2).run_context(agent=adding, store=client) as runner:
        await runner.iter()
    assert len(await client.query_rollouts(status_in=["succeeded"])) == 2
    assert len(await client.query_rollouts(status_in=["queuing"])) == 1


@pytest.mark.usefixtures("uvloops_policy")
async def test_agents_start_programs_where_uvloop_is_installed(client: StoreClient) -> None:
    made = [await client.enqueue_rollout(f"exit {code}") for code in (0, 3)]
    async with LitAgentRunner(max_rollouts=2).run_context(agent=starting_a_program, store=client) as runner:
        await runner.iter()
    rewards = await client.query_rewards([one.rollout_id for one in made])
    assert sorted(reward.value for reward in rewards) == [0.0, 3.0]
