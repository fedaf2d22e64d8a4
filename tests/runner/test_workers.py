"""Workers that are killed, drained, told to cancel, or lose their lease; none of it loses a rollout."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from agl_grpc_cli import workers
from typer.testing import CliRunner

from agl_grpc.client import StoreClient
from agl_grpc.model import AttemptStatus, ProxyLLM, Rollout, RolloutConfig, RolloutStatus
from tests.runner.gateway import Gateway
from tests.runner.runner_process import RunnerProcess
from tests.support.store_process import StoreProcess
from tests.support.waiting import eventually

LONG = 30.0


async def started(runner: RunnerProcess, count: int = 1) -> list[str]:
    """Waits until so many agents have started; their attempts."""

    def enough() -> list[str]:
        notes = runner.notes("started")
        return notes if len(notes) >= count else []

    return await eventually(enough, within=LONG, what=f"{count} agents started")


async def ended(client: StoreClient, *rollouts: Rollout) -> list[Rollout]:
    """Waits until the rollouts have ended."""
    ids = [rollout.rollout_id for rollout in rollouts]
    found = await client.wait_for_rollouts(rollout_ids=ids, timeout=LONG)
    assert len(found) == len(ids)
    return found


def wait_at(gate: str) -> dict[str, Any]:
    """A task that lasts until the gate is open."""
    return {"do": "wait", "gate": gate}


async def test_a_killed_workers_rollout_is_delivered_elsewhere(
    store: StoreProcess, client: StoreClient, run_id: str, folder: Path
) -> None:
    with RunnerProcess(store.address, "AsyncAgent", folder, "--run", run_id, "--workers", "2") as runner:
        rollout = await client.enqueue_rollout(wait_at("gate"))
        (first,) = await started(runner)
        attempt = await client.get_attempt_by_id(first)
        assert attempt is not None
        victim = next(
            w for w in runner.workers() if f"{w.pid})" in _line(runner, f"{attempt.worker_id} started")
        )
        victim.kill()
        second = (await started(runner, 2))[1]
        runner.open_gate("gate")
        (done,) = await ended(client, rollout)
        attempts = await client.query_attempts(rollout.rollout_id)
        assert done.status is RolloutStatus.SUCCEEDED
        assert [attempt.attempt_id for attempt in attempts] == [first, second]
        assert attempts[0].lease_lost
        assert attempts[0].worker_id != attempts[1].worker_id
        assert runner.says("was killed by SIGKILL")
        await eventually(lambda: len(runner.workers()) == 2, within=LONG, what="the worker is restarted")


async def test_a_rollout_that_kills_its_workers_is_given_up(
    store: StoreProcess, client: StoreClient, run_id: str, folder: Path
) -> None:
    with RunnerProcess(store.address, "AsyncAgent", folder, "--run", run_id):
        rollout = await client.enqueue_rollout({"do": "die"}, config=RolloutConfig(max_redeliveries=1))
        (done,) = await ended(client, rollout)
        assert done.status is RolloutStatus.FAILED
        assert done.failure is not None
        assert done.failure.kind == "infrastructure"
        assert done.attempt_count == 2


@pytest.mark.parametrize("agent", ["AsyncAgent", "SyncAgent"])
async def test_cancel_stops_the_agent_at_once(
    store: StoreProcess, client: StoreClient, run_id: str, folder: Path, agent: str
) -> None:
    with RunnerProcess(store.address, agent, folder, "--run", run_id) as runner:
        rollout = await client.enqueue_rollout(wait_at("never"))
        await started(runner)
        assert await client.cancel_rollouts([rollout.rollout_id], reason="no longer wanted") == [
            rollout.rollout_id
        ]
        await eventually(lambda: runner.notes("stopped"), within=5, what="the agent is stopped")
        after = await client.enqueue_rollout({"do": "nothing"})
        assert [done.status for done in await ended(client, rollout, after)] == ["cancelled", "succeeded"]


async def test_a_lost_lease_stops_the_agent_and_nothing_more_is_written(
    store: StoreProcess, client: StoreClient, run_id: str, folder: Path
) -> None:
    with RunnerProcess(store.address, "AsyncAgent", folder, "--run", run_id, "--lease", "1") as runner:
        rollout = await client.enqueue_rollout(wait_at("gate"))
        (first,) = await started(runner)
        assert await client.expire_leases([first]) == [first]
        second = (await started(runner, 2))[1]
        assert runner.notes("stopped") == [first]
        runner.open_gate("gate")
        (done,) = await ended(client, rollout)
        lost, kept = await client.query_attempts(rollout.rollout_id)
        assert done.status is RolloutStatus.SUCCEEDED
        assert (lost.attempt_id, kept.attempt_id) == (first, second)
        assert lost.lease_lost
        assert kept.status is AttemptStatus.SUCCEEDED
        rewards = await client.query_rewards([rollout.rollout_id])
        assert {reward.attempt_id for reward in rewards} == {second}


@pytest.mark.parametrize("agent", ["AsyncAgent", "SyncAgent"])
async def test_the_end_of_a_trace_comes_with_the_completion(
    store: StoreProcess, client: StoreClient, run_id: str, folder: Path, agent: str
) -> None:
    async def together() -> bool:
        rollout = await client.enqueue_rollout({"do": "number"})
        await ended(client, rollout)
        (attempt,) = await client.query_attempts(rollout.rollout_id)
        spans = await client.query_spans(rollout.rollout_id)
        assert {"thinking", "agentlightning.annotation", rollout.rollout_id} <= {span.name for span in spans}
        assert not any(span.late for span in spans)
        return attempt.end_time in {span.received_time for span in spans}

    with RunnerProcess(store.address, agent, folder, "--run", run_id):
        # The first attempts may end before the worker knows that the store takes spans with completions.
        await eventually(together, within=LONG, what="spans stored in the completion's transaction")


@pytest.mark.parametrize("agent", ["AsyncAgent", "SyncAgent"])
async def test_a_blocking_agent_does_not_lose_its_lease(
    store: StoreProcess, client: StoreClient, run_id: str, folder: Path, agent: str
) -> None:
    with RunnerProcess(store.address, agent, folder, "--run", run_id, "--lease", "1"):
        rollout = await client.enqueue_rollout({"do": "block", "seconds": 3})
        (done,) = await ended(client, rollout)
        assert (done.status, done.attempt_count) == (RolloutStatus.SUCCEEDED, 1)


async def test_drain_lets_agents_finish_and_takes_nothing_new(
    store: StoreProcess, client: StoreClient, run_id: str, folder: Path
) -> None:
    with RunnerProcess(store.address, "AsyncAgent", folder, "--run", run_id) as runner:
        held = await client.enqueue_rollout(wait_at("gate"))
        waiting = await client.enqueue_rollout({"do": "nothing"})
        await started(runner)
        runner.terminate()
        await eventually(
            lambda: runner.says("drains (SIGTERM): 1 rollouts in hand"), what="the worker drains"
        )
        runner.open_gate("gate")
        assert runner.wait() == 0
        left = await client.get_rollout_by_id(waiting.rollout_id)
        done = await client.get_rollout_by_id(held.rollout_id)
        assert done is not None
        assert left is not None
        assert done.status is RolloutStatus.SUCCEEDED
        assert left.status is RolloutStatus.QUEUING
        worker = await client.get_worker_by_id("w-0")
        assert worker is not None
        assert worker.idle_reason == "it has left"


@pytest.mark.parametrize("second_signal", [False, True])
async def test_what_does_not_end_in_time_is_handed_back(
    store: StoreProcess, client: StoreClient, run_id: str, folder: Path, second_signal: bool
) -> None:
    grace = "600" if second_signal else "0.2"
    with RunnerProcess(store.address, "AsyncAgent", folder, "--run", run_id, "--drain", grace) as runner:
        rollout = await client.enqueue_rollout(wait_at("never"))
        await started(runner)
        runner.terminate()
        if second_signal:
            await eventually(lambda: runner.says("drains (SIGTERM)"), what="the worker drains")
            runner.terminate()
        assert runner.wait() == 0
        back = await client.get_rollout_by_id(rollout.rollout_id)
        attempt = await client.get_latest_attempt(rollout.rollout_id)
        assert back is not None
        assert attempt is not None
        assert back.status in (RolloutStatus.QUEUING, RolloutStatus.REQUEUING)
        assert attempt.status is AttemptStatus.CANCELLED
        assert not attempt.lease_lost


async def test_agents_that_would_not_stop_are_left_behind(
    store: StoreProcess, client: StoreClient, run_id: str, folder: Path
) -> None:
    with RunnerProcess(store.address, "AsyncAgent", folder, "--run", run_id) as runner:
        rollout = await client.enqueue_rollout({"do": "stubborn"})
        await started(runner)
        await client.cancel_rollouts([rollout.rollout_id])
        after = await client.enqueue_rollout({"do": "nothing"})
        (done,) = await ended(client, after)
        assert done.status is RolloutStatus.SUCCEEDED
        assert runner.says("agents were told to stop and still run")


async def test_a_worker_says_why_it_idles(
    store: StoreProcess, client: StoreClient, run_id: str, folder: Path
) -> None:
    async def reason() -> str:
        worker = await client.get_worker_by_id(f"{run_id}-0")
        return "" if worker is None else worker.idle_reason or ""

    with RunnerProcess(store.address, "AsyncAgent", folder, "--run", run_id, name=run_id) as runner:
        await told_everywhere(store, client, runner, "no work")
        await client.pause_dispatch()
        await told_everywhere(store, client, runner, "paused")
        await client.resume_dispatch()
        await eventually(lambda: _equals(reason, "no work"), within=LONG, what="it goes on")
    # A queue of its own: the worker before, which was killed, may still count as waiting.
    await client.enqueue_rollout({"do": "nothing"}, queue="labelled", labels={"gpu": "yes"})
    options = ("--run", run_id, "--queue", "labelled", "--label", "disk=fast")
    with RunnerProcess(store.address, "AsyncAgent", folder, *options, name=run_id) as runner:
        what = "no work with its labels"
        await eventually(lambda: _equals(reason, what), within=LONG, what=what)
        assert runner.says(f"{run_id}-0 idles: {what}")


async def test_a_worker_that_gets_no_leases_says_so_and_goes_on_when_it_may(
    store: StoreProcess, client: StoreClient, run_id: str, folder: Path
) -> None:
    async with Gateway(store.address, "StreamLeases") as gateway:
        with RunnerProcess(gateway.address, "AsyncAgent", folder, "--run", run_id, name=run_id) as runner:
            await told_everywhere(store, client, runner, "not permitted: this gateway gives you no work")
            rollout = await client.enqueue_rollout({"do": "nothing"})
            gateway.denied.clear()
            (done,) = await ended(client, rollout)
            assert (done.status, done.attempt_count) == (RolloutStatus.SUCCEEDED, 1)


async def test_a_worker_waits_for_resources(
    store: StoreProcess, client: StoreClient, run_id: str, folder: Path
) -> None:
    rollout = await client.enqueue_rollout({"do": "resources"})
    options = ("--run", run_id, "--wait-for-resources")
    with RunnerProcess(store.address, "AsyncAgent", folder, *options, name=run_id) as runner:
        await told_everywhere(store, client, runner, "no resources")
        await client.add_resources({"llm": ProxyLLM(endpoint="http://127.0.0.1:9/v1", model="m")})
        (done,) = await ended(client, rollout)
        assert (done.status, done.attempt_count) == (RolloutStatus.SUCCEEDED, 1)


async def test_an_order_to_drain_is_obeyed_once(
    store: StoreProcess, client: StoreClient, run_id: str, folder: Path
) -> None:
    options = ("--run", run_id, "--lease", "1")
    with RunnerProcess(store.address, "AsyncAgent", folder, *options, name=run_id) as runner:
        rollout = await client.enqueue_rollout(wait_at("gate"))
        await started(runner)
        assert await client.drain_workers([f"{run_id}-0"], reason="maintenance") == [f"{run_id}-0"]
        await eventually(lambda: runner.says("drains (maintenance): 1 rollouts"), within=LONG, what="drain")
        runner.open_gate("gate")
        (done,) = await ended(client, rollout)
        assert done.status is RolloutStatus.SUCCEEDED
        assert runner.wait() == 0
    again = await client.enqueue_rollout({"do": "nothing"})
    with RunnerProcess(store.address, "AsyncAgent", folder, "--run", run_id, name=run_id):
        (done,) = await ended(client, again)
        assert done.status is RolloutStatus.SUCCEEDED


async def test_a_runner_leaves_after_its_share(
    store: StoreProcess, client: StoreClient, run_id: str, folder: Path
) -> None:
    rollouts = [await client.enqueue_rollout({"do": "nothing"}) for _ in range(4)]
    options = ("--run", run_id, "--max-rollouts", "3", "--concurrency", "2")
    with RunnerProcess(store.address, "AsyncAgent", folder, *options) as runner:
        await ended(client, *rollouts[:3])
        assert runner.wait() == 0
    assert [r.status for r in await client.query_rollouts(status_in=["queuing"])] == ["queuing"]


async def test_a_worker_full_of_hung_agents_is_replaced(
    store: StoreProcess, client: StoreClient, run_id: str, folder: Path
) -> None:
    with RunnerProcess(store.address, "SyncAgent", folder, "--run", run_id, "--concurrency", "8") as runner:
        hung = [await client.enqueue_rollout({"do": "block", "seconds": 600}) for _ in range(8)]
        await started(runner, 8)
        await client.cancel_rollouts([rollout.rollout_id for rollout in hung])
        await eventually(lambda: runner.says("w-0 is replaced"), within=LONG, what="the worker is replaced")
        after = await client.enqueue_rollout({"do": "nothing"})
        (done,) = await ended(client, after)
        assert done.status is RolloutStatus.SUCCEEDED


async def test_workers_leave_when_their_supervisor_is_killed(
    store: StoreProcess, client: StoreClient, run_id: str, folder: Path
) -> None:
    with RunnerProcess(store.address, "AsyncAgent", folder, "--run", run_id) as runner:
        rollout = await client.enqueue_rollout(wait_at("gate"))
        await started(runner)
        (worker,) = runner.workers()
        assert runner.process is not None
        runner.process.kill()
        await eventually(lambda: runner.says("the supervisor has gone"), within=LONG, what="it is noticed")
        runner.open_gate("gate")
        (done,) = await ended(client, rollout)
        assert done.status is RolloutStatus.SUCCEEDED
        await eventually(lambda: not worker.is_running(), within=LONG, what="the worker leaves")


async def told_everywhere(
    store: StoreProcess, client: StoreClient, runner: RunnerProcess, reason: str
) -> None:
    """Waits until the heartbeat of a runner's first worker, the command and the log say why it idles."""
    worker_id = f"{runner.name}-0"

    async def heartbeat() -> str:
        worker = await client.get_worker_by_id(worker_id)
        return "" if worker is None else worker.idle_reason or ""

    await eventually(lambda: _equals(heartbeat, reason), within=LONG, what=reason)
    arguments = ["workers", "ls", "--store", store.address, "--contains", worker_id]
    listed = await asyncio.to_thread(CliRunner().invoke, workers.app, arguments[1:])
    (line,) = [line for line in listed.output.splitlines() if worker_id in line]
    assert line.rstrip().endswith(reason), listed.output
    assert runner.says(f"{worker_id} idles: {reason}")


async def _equals(read: Any, expected: str) -> bool:
    return bool(await read() == expected)


def _line(runner: RunnerProcess, text: str) -> str:
    return next(line for line in runner.log.read_text().splitlines() if text in line)
