"""What becomes of an agent's result: real store, real worker processes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from agl_grpc.client import StoreClient
from agl_grpc.model import AttemptStatus, BlobReference, FailureKind, ProxyLLM, RolloutConfig
from tests.runner.execution import execute, rewards_of
from tests.runner.runner_process import RunnerProcess
from tests.support.store_process import StoreProcess
from tests.support.waiting import free_port

RUN = "results"


@pytest.fixture(scope="module", params=["AsyncAgent", "SyncAgent", "SyncAgent-process"])
def runner(
    request: pytest.FixtureRequest, store: StoreProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunnerProcess]:
    """One worker for all tests of the module: an async and a sync agent, and one in processes of its own."""
    queue = request.param
    agent, _, isolation = queue.partition("-")
    folder = tmp_path_factory.mktemp(queue)
    options = (
        "--run",
        RUN,
        "--queue",
        queue,
        "--isolation",
        isolation or "thread",
        "--concurrency",
        "8",
        "--hook",
        "tests.runner.agents:NotingHook",
    )
    with RunnerProcess(store.address, agent, folder, *options, name=queue) as process:
        yield process


@pytest.fixture
async def results(store: StoreProcess) -> AsyncIterator[StoreClient]:
    """A client on the module's run."""
    async with StoreClient(store.address, run_id=RUN) as client:
        await client.create_run(RUN)
        yield client


async def test_a_number_is_the_primary_reward(results: StoreClient, runner: RunnerProcess) -> None:
    rollout = await execute(results, runner, {"do": "number", "reward": 0.0})
    assert rollout.status == "succeeded"
    assert await rewards_of(results, rollout) == {"primary": 0.0}
    names = [span.name for span in await results.query_spans(rollout.rollout_id)]
    assert "thinking" in names
    assert "agentlightning.annotation" in names


async def test_a_large_task_reaches_the_agent(results: StoreClient, runner: RunnerProcess) -> None:
    rollout = await execute(results, runner, {"do": "number", "ballast": "x" * (2 << 20)})
    assert isinstance(rollout.input, BlobReference)
    assert await rewards_of(results, rollout) == {"primary": 1.0}


async def test_named_rewards(results: StoreClient, runner: RunnerProcess) -> None:
    rollout = await execute(results, runner, {"do": "rewards"})
    assert await rewards_of(results, rollout) == {"primary": 0.25, "style": 1.0}


async def test_emitted_rewards_count_without_a_result(results: StoreClient, runner: RunnerProcess) -> None:
    rollout = await execute(results, runner, {"do": "emit"})
    rewards = await results.query_rewards([rollout.rollout_id])
    assert {(reward.name, reward.step, reward.value) for reward in rewards} == {
        ("primary", None, 0.75),
        ("primary", 3, 0.5),
    }


async def test_nothing_is_a_success_without_reward(results: StoreClient, runner: RunnerProcess) -> None:
    rollout = await execute(results, runner, {"do": "nothing"})
    assert rollout.status == "succeeded"
    assert await rewards_of(results, rollout) == {}


async def test_returned_spans_are_stored(results: StoreClient, runner: RunnerProcess) -> None:
    rollout = await execute(results, runner, {"do": "spans"})
    assert rollout.status == "succeeded"
    names = [span.name for span in await results.query_spans(rollout.rollout_id)]
    assert {"made by hand", "whole"} <= set(names)


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        ("crash", FailureKind.AGENT, "the agent is broken"),
        ("exit", FailureKind.AGENT, "sys.exit(9)"),
        ("nan", FailureKind.AGENT, "rewards must be finite"),
        ("text", FailureKind.AGENT, "the agent returned a str; it may return None, a number"),
        ("grader", FailureKind.GRADER, "no judge answered"),
    ],
)
async def test_failures(
    results: StoreClient, runner: RunnerProcess, task: str, kind: FailureKind, message: str
) -> None:
    rollout = await execute(results, runner, {"do": task})
    attempt = await results.get_latest_attempt(rollout.rollout_id)
    assert rollout.status == "failed"
    assert attempt is not None
    assert attempt.status is AttemptStatus.FAILED
    assert attempt.failure is not None
    assert attempt.failure.kind is kind
    assert message in attempt.failure.message
    assert "Traceback" in attempt.failure.detail
    assert await rewards_of(results, rollout) == {}


async def test_a_failed_attempt_is_retried(results: StoreClient, runner: RunnerProcess) -> None:
    config = RolloutConfig(max_attempts=2, retry_condition=["failed"], retry_backoff_seconds=0.05)
    rollout = await execute(results, runner, {"do": "crash"}, config=config)
    attempts = await results.query_attempts(rollout.rollout_id)
    assert [attempt.status for attempt in attempts] == [AttemptStatus.FAILED] * 2


async def test_an_engine_that_is_down_is_the_infrastructures_failure(
    results: StoreClient, runner: RunnerProcess
) -> None:
    config = RolloutConfig(max_redeliveries=0)
    rollout = await execute(results, runner, {"do": "engine", "port": free_port()}, config=config)
    assert rollout.failure is not None
    assert rollout.failure.kind is FailureKind.INFRASTRUCTURE
    assert rollout.failure.type.endswith("ConnectError")


async def test_a_timeout_stops_the_agent(results: StoreClient, runner: RunnerProcess) -> None:
    config = RolloutConfig(timeout_seconds=0.3)
    rollout = await execute(results, runner, {"do": "wait", "gate": "never"}, config=config)
    attempt = await results.get_latest_attempt(rollout.rollout_id)
    assert rollout.status == "failed"
    assert attempt is not None
    assert attempt.status is AttemptStatus.TIMEOUT


async def test_a_proxy_llm_names_the_attempt(results: StoreClient, runner: RunnerProcess) -> None:
    await results.add_resources({"llm": ProxyLLM(endpoint="http://127.0.0.1:9/v1", model="m")})
    rollout = await execute(results, runner, {"do": "resources"})
    attempt = await results.get_latest_attempt(rollout.rollout_id)
    assert attempt is not None
    (line,) = runner.notes(rollout.rollout_id)
    url, endpoint, key = line.split()
    assert url == endpoint
    assert url == f"http://127.0.0.1:9/rollout/{rollout.rollout_id}/attempt/{attempt.attempt_id}/v1"
    # The key is the attempt's own: with it spans of this attempt may be written.
    async with StoreClient(results.target, credential=key) as agent:
        from agl_grpc.model import Span

        span = Span.from_attributes(
            attributes={}, rollout_id=rollout.rollout_id, attempt_id=attempt.attempt_id, name="by the agent"
        )
        assert await agent.add_span(span) is not None


async def test_hooks_are_called_and_never_fail_a_rollout(results: StoreClient, runner: RunnerProcess) -> None:
    rollout = await execute(results, runner, {"do": "number"})
    assert rollout.status == "succeeded"
    lines = [line for line in runner.notes("hooks") if rollout.rollout_id in line]
    events = [line.split()[0] for line in lines]
    assert events == ["on_rollout_start", "on_trace_start", "on_trace_end", "on_rollout_end"]
    assert int(lines[-1].split()[2]) >= 2
    assert runner.says("NotingHook.on_trace_end raised; the rollout goes on")


async def test_training_rollouts_use_the_training_method(results: StoreClient, runner: RunnerProcess) -> None:
    trained = await execute(results, runner, {"do": "nothing"}, mode="train")
    validated = await execute(results, runner, {"do": "nothing"}, mode="val")
    assert trained.rollout_id in runner.notes("training")
    assert validated.rollout_id not in runner.notes("training")


async def test_an_agent_may_start_processes(results: StoreClient, runner: RunnerProcess) -> None:
    rollout = await execute(results, runner, {"do": "subprocess"})
    assert rollout.status == "succeeded", rollout.failure
    assert await rewards_of(results, rollout) == {"primary": 1.0}
