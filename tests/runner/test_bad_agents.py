"""Agents that do what no agent should: real store, real worker, and the worker goes on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from agl_grpc.client import NotFound, StoreClient
from agl_grpc.model import FailureKind, PromptTemplate, RolloutConfig, Span
from agl_grpc.model.value import JSON, RawPayload
from tests.runner.bad_agents import FLOOD
from tests.runner.execution import execute, rewards_of
from tests.runner.runner_process import RunnerProcess
from tests.support.store_process import StoreProcess
from tests.support.waiting import eventually

RUN = "bad-agents"
HOOKS = ("--hook", "tests.runner.bad_agents:StrictHook", "--hook", "tests.runner.bad_agents:ExitingHook")
BOTH = ("BadAsyncAgent", "BadSyncAgent")


@pytest.fixture(scope="module")
def runners(
    store: StoreProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, RunnerProcess]]:
    """A worker for each agent, started once."""
    started = {}
    try:
        for agent in BOTH:
            folder = tmp_path_factory.mktemp(agent)
            options = ("--run", RUN, "--queue", agent, "--concurrency", "4", *HOOKS)
            path = f"tests.runner.bad_agents:{agent}"
            started[agent] = RunnerProcess(store.address, path, folder, *options, name=agent)
            started[agent].start()
        yield started
    finally:
        for runner in started.values():
            runner.__exit__(None, None, None)


@pytest.fixture
async def client(store: StoreProcess) -> AsyncIterator[StoreClient]:
    """A client on the module's run."""
    async with StoreClient(store.address, run_id=RUN) as opened:
        await opened.create_run(RUN)
        yield opened


async def goes_on(client: StoreClient, runner: RunnerProcess) -> bool:
    """Whether the same worker process does the next rollout well."""
    after = await execute(client, runner, {"do": "fine"})
    return after.status == "succeeded" and not runner.says("restart in")


@pytest.mark.parametrize("agent", BOTH)
@pytest.mark.parametrize(
    ("do", "message"),
    [
        ("unheard", "not an Exception"),
        ("never shown", "tests.runner.bad_agents.NeverShown"),
        ("recursion", "maximum recursion depth exceeded"),
        ("infinite reward", "the reward 'style' that the agent returned is inf"),
        ("complex", "the agent returned a complex; it may return None, a number"),
        ("coroutine", "the agent returned a coroutine, which nobody awaited"),
        ("fork and ask", "emit_reward was called in a forked process"),
        ("refused at the start", "the hook StrictHook.on_trace_start: not this one"),
    ],
)
async def test_the_attempt_fails_with_the_reason(
    client: StoreClient, runners: dict[str, RunnerProcess], agent: str, do: str, message: str
) -> None:
    rollout = await execute(client, runners[agent], {"do": do})
    assert rollout.status == "failed"
    assert rollout.failure is not None
    assert rollout.failure.kind is FailureKind.AGENT
    assert message in rollout.failure.message
    assert await goes_on(client, runners[agent])


async def test_an_async_agent_cannot_end_the_loop_of_the_others(
    client: StoreClient, runners: dict[str, RunnerProcess]
) -> None:
    runner = runners["BadAsyncAgent"]
    for do in ("exit in a task", "stop the loop"):
        assert (await execute(client, runner, {"do": do})).status == "succeeded"
    cancelled = await execute(client, runner, {"do": "cancel itself"})
    assert cancelled.failure is not None
    assert cancelled.failure.message == "the agent cancelled its own task"
    assert await goes_on(client, runner)


async def test_an_agent_that_never_returns_times_out(
    client: StoreClient, runners: dict[str, RunnerProcess]
) -> None:
    runner = runners["BadSyncAgent"]
    rollout = await execute(client, runner, {"do": "hang"}, config=RolloutConfig(timeout_seconds=0.3))
    assert rollout.failure is not None
    assert rollout.failure.kind is FailureKind.TRUNCATED
    assert await goes_on(client, runner)


@pytest.mark.parametrize("agent", BOTH)
async def test_a_flood_of_spans_arrives_whole(
    client: StoreClient, runners: dict[str, RunnerProcess], agent: str
) -> None:
    runner = runners[agent]
    (process,) = runner.workers()
    before = process.memory_info().rss
    rollout = await execute(client, runner, {"do": "flood"})
    assert rollout.status == "succeeded"
    spans = [
        Span.from_proto(stored) async for stored in client.export_spans(rollout_ids=[rollout.rollout_id])
    ]
    numbers = [span.attributes["n"] for span in spans if span.name == "drop"]
    assert sorted(numbers) == list(range(FLOOD))
    # Half of them are kept for hooks at about 5 KiB each; none of it stays behind forever.
    assert process.memory_info().rss - before < 200 << 20
    assert await goes_on(client, runner)


async def test_a_span_too_large_is_told_and_the_rest_counts(
    client: StoreClient, runners: dict[str, RunnerProcess]
) -> None:
    runner = runners["BadAsyncAgent"]
    rollout = await execute(client, runner, {"do": "large"})
    assert rollout.status == "succeeded"
    assert await rewards_of(client, rollout) == {"primary": 1.0}
    await eventually(lambda: runner.says("the store refused span"), what="the refusal is logged")


@pytest.mark.parametrize("agent", BOTH)
async def test_a_forked_child_that_comes_back_is_no_second_worker(
    client: StoreClient, runners: dict[str, RunnerProcess], agent: str
) -> None:
    rollout = await execute(client, runners[agent], {"do": "fork and return"})
    assert rollout.status == "succeeded", rollout.failure
    assert await rewards_of(client, rollout) == {"primary": 1.0}
    assert await goes_on(client, runners[agent])
    (worker,) = runners[agent].workers()
    assert worker.children() == []


async def test_a_reward_that_is_no_number_in_the_agents_own_span(
    client: StoreClient, runners: dict[str, RunnerProcess]
) -> None:
    rollout = await execute(client, runners["BadAsyncAgent"], {"do": "nan in a span"})
    assert rollout.status == "succeeded"
    assert await rewards_of(client, rollout) == {}


@pytest.mark.parametrize("agent", BOTH)
async def test_a_task_that_cannot_be_decoded(
    client: StoreClient, runners: dict[str, RunnerProcess], agent: str
) -> None:
    rollout = await execute(client, runners[agent], RawPayload(JSON, b'{"do": '))
    assert rollout.failure is not None
    assert rollout.failure.kind is FailureKind.ENVIRONMENT
    assert "the task cannot be decoded: it is said to be JSON" in rollout.failure.message
    # It does not hide its neighbours either.
    assert rollout.rollout_id in {found.rollout_id for found in await client.query_rollouts(limit=100)}
    assert await goes_on(client, runners[agent])


async def test_resources_that_are_missing(client: StoreClient, runners: dict[str, RunnerProcess]) -> None:
    config = RolloutConfig(max_redeliveries=1)
    with pytest.raises(NotFound, match="rs-nowhere"):
        await client.enqueue_rollout(1, resources_id="rs-nowhere")
    await client.add_resources({"prompt": PromptTemplate(template="{x}")})
    cases = (
        (
            "missing endpoint",
            "the agent needs a LLM, and none is published; published: prompt (PromptTemplate)",
        ),
        ("missing by name", "the agent needs a resource named 'judge', and none is published"),
    )
    for do, message in cases:
        rollout = await execute(client, runners["BadSyncAgent"], {"do": do}, config=config)
        assert rollout.failure is not None
        assert (rollout.failure.type, rollout.failure.kind) == (
            "RESOURCE_MISSING",
            FailureKind.INFRASTRUCTURE,
        )
        assert message in rollout.failure.message
        assert rollout.attempt_count == 2


async def test_hooks_fail_a_rollout_only_when_asked_to(
    client: StoreClient, runners: dict[str, RunnerProcess]
) -> None:
    runner = runners["BadSyncAgent"]
    fine = await execute(client, runner, {"do": "fine"})
    refused = await execute(client, runner, {"do": "fine"}, metadata={"refused": True})
    assert fine.status == "succeeded"
    assert refused.failure is not None
    assert refused.failure.message.startswith("the hook StrictHook.on_rollout_end: not with ")
    spans = await client.query_spans(fine.rollout_id)
    (noted,) = [span for span in spans if span.name == "agentlightning.exception"]
    assert noted.attributes["agl_grpc.hook"] == "ExitingHook.on_trace_end"
    assert noted.attributes["exception.type"] == "SystemExit"
