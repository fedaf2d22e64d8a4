"""Agents in processes of their own, and programs as agents: what hangs, dies or leaks is ended alone."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from agl_grpc.client import StoreClient
from agl_grpc.model import AttemptStatus, FailureKind, ProxyLLM, Rollout, RolloutConfig, RolloutStatus
from tests.runner.runner_process import RunnerProcess
from tests.support.store_process import StoreProcess
from tests.support.waiting import eventually

LONG = 60.0

Start = Callable[..., RunnerProcess]


@pytest.fixture
def in_processes(store: StoreProcess, run_id: str, folder: Path) -> Start:
    """Starts a runner whose agents have processes of their own."""

    def start(agent: str, *options: str) -> RunnerProcess:
        fixed = ("--run", run_id, "--isolation", "process", "--concurrency", "4")
        return RunnerProcess(store.address, agent, folder, *fixed, *options)

    return start


@pytest.fixture
def command(store: StoreProcess, run_id: str, folder: Path) -> Start:
    """Starts a runner whose agent is a program."""

    def start(text: str, *options: str) -> RunnerProcess:
        return RunnerProcess(store.address, None, folder, "--run", run_id, "--command", text, *options)

    return start


async def done(client: StoreClient, *rollouts: Rollout) -> list[Rollout]:
    """Waits until the rollouts have ended; in the order given."""
    ids = [rollout.rollout_id for rollout in rollouts]
    found = await client.wait_for_rollouts(rollout_ids=ids, timeout=LONG)
    return sorted(found, key=lambda rollout: ids.index(rollout.rollout_id))


async def noted(runner: RunnerProcess, name: str, count: int = 1) -> list[str]:
    """Waits until so many lines are noted."""

    def enough() -> list[str]:
        lines = runner.notes(name)
        return lines if len(lines) >= count else []

    return await eventually(enough, within=LONG, what=f"{count} lines of {name}")


async def output_of(client: StoreClient, rollout: Rollout) -> dict[str, Any]:
    """What the program left."""
    attempt = await client.get_latest_attempt(rollout.rollout_id)
    assert attempt is not None
    assert attempt.metadata is not None
    found: dict[str, Any] = json.loads(attempt.metadata["output"])
    return found


async def test_a_process_is_used_again_until_it_dies_or_is_stopped(
    client: StoreClient, in_processes: Start
) -> None:
    with in_processes("AsyncAgent") as runner:
        for _ in range(3):
            await done(client, await client.enqueue_rollout({"do": "pid"}))
        assert len(set(runner.notes("pids"))) == 1
        other = await client.enqueue_rollout({"do": "wait", "gate": "gate"})
        cancelled = await client.enqueue_rollout({"do": "wait", "gate": "never"})
        await noted(runner, "started", 2)
        (died,) = await done(client, await client.enqueue_rollout({"do": "die"}))
        assert died.failure is not None
        assert died.failure.kind is FailureKind.AGENT
        assert died.failure.message == "the agent's process exited with code 11"
        await client.cancel_rollouts([cancelled.rollout_id])
        # It may clean up before its process is killed.
        await noted(runner, "stopped")
        runner.open_gate("gate")
        (survived,) = await done(client, other)
        assert (survived.status, survived.attempt_count) == (RolloutStatus.SUCCEEDED, 1)


async def test_a_hung_agent_is_killed_and_the_others_go_on(client: StoreClient, in_processes: Start) -> None:
    with in_processes("SyncAgent") as runner:
        other = await client.enqueue_rollout({"do": "wait", "gate": "gate"})
        hung = await client.enqueue_rollout(
            {"do": "block", "seconds": 600}, config=RolloutConfig(timeout_seconds=0.5)
        )
        (pid,) = await noted(runner, "blocked")
        (timed_out,) = await done(client, hung)
        attempt = await client.get_latest_attempt(hung.rollout_id)
        assert timed_out.status is RolloutStatus.FAILED
        assert attempt is not None
        assert attempt.status is AttemptStatus.TIMEOUT
        await eventually(lambda: not psutil.pid_exists(int(pid)), within=10, what="the process is killed")
        after = await client.enqueue_rollout({"do": "nothing"})
        runner.open_gate("gate")
        assert {rollout.status for rollout in await done(client, other, after)} == {RolloutStatus.SUCCEEDED}


async def test_processes_die_with_their_worker(client: StoreClient, in_processes: Start) -> None:
    with in_processes("SyncAgent") as runner:
        await client.enqueue_rollout(
            {"do": "block", "seconds": 600}, config=RolloutConfig(max_redeliveries=0)
        )
        (pid,) = await noted(runner, "blocked")
        runner.workers()[0].kill()
        await eventually(lambda: not psutil.pid_exists(int(pid)), within=10, what="the process has gone too")


def test_an_agent_that_cannot_be_loaded_is_one_line(in_processes: Start) -> None:
    with in_processes("nobody") as runner:
        assert runner.wait(LONG) == 1
        (line,) = [line for line in runner.log.read_text().splitlines() if line.startswith("error:")]
        assert "has no 'nobody'" in line


# Written for no one: it knows nothing of agl-grpc but what its environment tells it.
HARNESS = """
import json, os, sys
task = json.load(sys.stdin)
assert json.load(open(os.environ["AGL_GRPC_TASK_FILE"])) == task
llm = json.load(open(os.environ["AGL_GRPC_RESOURCES_FILE"]))["llm"]
print(os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"], os.environ["OPENAI_MODEL"], llm["model"])
open(os.environ["AGL_GRPC_REWARD_FILE"], "w").write(json.dumps(task["reward"]))
print("ids", os.environ["AGL_GRPC_ROLLOUT_ID"], os.environ["AGL_GRPC_ATTEMPT_ID"])
sys.exit(task.get("exit", 0))
"""


async def test_a_program_is_an_agent(client: StoreClient, command: Start, folder: Path) -> None:
    (folder / "harness.py").write_text(HARNESS)
    await client.add_resources({"llm": ProxyLLM(endpoint="http://127.0.0.1:9/v1", model="m")})
    with command(f"{sys.executable} {folder}/harness.py", "--concurrency", "4"):
        tasks = [{"reward": 0.5}, {"reward": {"primary": 1, "style": 0.25}}, {"reward": 1, "exit": 3}]
        tasks += [{"reward": "good"}, {"reward": [1]}]
        rollouts = await done(client, *[await client.enqueue_rollout(task) for task in tasks])
        statuses = [rollout.status.value for rollout in rollouts]
        assert statuses == ["succeeded", "succeeded", "failed", "failed", "failed"]
        rewards = await client.query_rewards([rollout.rollout_id for rollout in rollouts])
        found = {(rollouts.index(_of(rollouts, r.rollout_id)), r.name): r.value for r in rewards}
        assert found == {(0, "primary"): 0.5, (1, "primary"): 1.0, (1, "style"): 0.25}
        first = await output_of(client, rollouts[0])
        attempt = await client.get_latest_attempt(rollouts[0].rollout_id)
        assert attempt is not None
        url, key, model, same = first["output_tail"].splitlines()[0].split()
        assert url.endswith(f"/rollout/{rollouts[0].rollout_id}/attempt/{attempt.attempt_id}/v1")
        assert key.startswith("agl1.")
        assert (model, same, first["exit_code"]) == ("m", "m", 0)
        failure = rollouts[2].failure
        assert failure is not None
        assert (failure.kind, failure.type) == (FailureKind.AGENT, "exit code 3")
        assert failure.message.startswith("the command exited with code 3: ids ro")
        bad = [rollout.failure.message for rollout in rollouts[3:] if rollout.failure]
        assert [message.split(";")[0] for message in bad] == [
            "the reward file holds a str",
            "the reward file holds a list",
        ]


def _of(rollouts: list[Rollout], rollout_id: str) -> Rollout:
    return next(rollout for rollout in rollouts if rollout.rollout_id == rollout_id)


async def test_a_text_is_passed_as_it_is_and_the_end_of_the_output_is_kept(
    client: StoreClient, command: Start
) -> None:
    with command("yes | head -n 200000; cat; sleep 600 & exit 0"):
        (rollout,) = await done(client, await client.enqueue_rollout("what is 2 + 2?"))
        tail = (await output_of(client, rollout))["output_tail"]
        assert tail.endswith("y\nwhat is 2 + 2?")
        assert len(tail) == 16 * 1024


async def test_a_cancelled_programs_whole_group_is_killed(
    client: StoreClient, command: Start, folder: Path
) -> None:
    # The shell ignores SIGTERM and waits for a child of its own.
    script = f"trap '' TERM; sleep 600 & echo $! >> {folder}/pids; wait; wait"
    with command(script) as runner:
        rollout = await client.enqueue_rollout("task")
        (pid,) = await noted(runner, "pids")
        await client.cancel_rollouts([rollout.rollout_id])
        await eventually(lambda: not psutil.pid_exists(int(pid)), within=10, what="the child is killed")
        timed = await client.enqueue_rollout("task", config=RolloutConfig(timeout_seconds=0.5))
        pids = await noted(runner, "pids", 2)
        (ended,) = await done(client, timed)
        assert ended.status is RolloutStatus.FAILED
        await eventually(lambda: not psutil.pid_exists(int(pids[1])), within=10, what="this one too")


async def test_programs_of_a_killed_worker_are_killed(
    client: StoreClient, command: Start, folder: Path
) -> None:
    with command(f"echo $$ >> {shlex.quote(str(folder))}/pids; sleep 600; true") as runner:
        await client.enqueue_rollout("task", config=RolloutConfig(max_redeliveries=0))
        (pid,) = await noted(runner, "pids")
        runner.workers()[0].kill()
        await eventually(lambda: not psutil.pid_exists(int(pid)), within=LONG, what="the program is killed")
        await eventually(lambda: runner.says("had started were killed"), within=LONG, what="it says so")
