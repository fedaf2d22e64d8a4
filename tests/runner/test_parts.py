"""The parts of the runner that need no store: failures, results, import paths, threads, settings."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from agl_grpc.model import LLM, FailureKind, Span
from agl_grpc.model.reward import RewardKey
from agl_grpc.runner import AgentFailure, LoadError, RunnerConfig, Supervisor, WorkerStartError
from agl_grpc.runner.command import CommandAgent
from agl_grpc.runner.failures import failure_of, kind_of
from agl_grpc.runner.load import load_object
from agl_grpc.runner.outcome import BadResult, read_result
from agl_grpc.runner.threads import AbandonedThreads, AgentStopped, run_in_thread
from tests.support.waiting import eventually, free_port

REQUEST = httpx.Request("POST", "http://127.0.0.1/v1")


def _caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def _handled(error: Exception, context: Exception) -> Exception:
    error.__context__ = context
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (openai.APIConnectionError(request=REQUEST), FailureKind.INFRASTRUCTURE),
        (openai.APITimeoutError(REQUEST), FailureKind.INFRASTRUCTURE),
        (httpx.ConnectError("refused"), FailureKind.INFRASTRUCTURE),
        (ConnectionResetError("reset"), FailureKind.INFRASTRUCTURE),
        (_status_error := openai.InternalServerError, None),
        (ExceptionGroup("both", [ConnectionError(), ConnectionError()]), FailureKind.INFRASTRUCTURE),
        (ExceptionGroup("both", [ConnectionError(), KeyError("k")]), FailureKind.AGENT),
        (_caused(RuntimeError("gave up"), ConnectionError()), FailureKind.INFRASTRUCTURE),
        (_handled(KeyError("a bug while handling it"), ConnectionError()), FailureKind.AGENT),
        (ValueError("wrong"), FailureKind.AGENT),
        (AgentFailure("the sandbox is gone", kind="environment"), FailureKind.ENVIRONMENT),
        (_caused(ValueError("no"), AgentFailure("too long", kind="truncated")), FailureKind.TRUNCATED),
    ],
)
def test_who_is_to_blame(error: Any, kind: FailureKind | None) -> None:
    if kind is None:
        for status, expected in ((503, FailureKind.INFRASTRUCTURE), (500, FailureKind.AGENT)):
            answer = httpx.Response(status, request=REQUEST)
            assert kind_of(error("the engine says no", response=answer, body=None)) is expected
        return
    assert kind_of(error) is kind


def test_a_failure_tells_its_story() -> None:
    try:
        raise ValueError("the last word")
    except ValueError as error:
        failure = failure_of(error)
    assert (failure.message, failure.type) == ("the last word", "ValueError")
    assert "test_a_failure_tells_its_story" in failure.detail


def test_an_agent_cannot_claim_to_be_cancelled() -> None:
    with pytest.raises(ValueError, match="cannot cancel"):
        AgentFailure("no", kind="cancelled")


@pytest.mark.parametrize("number", [1, 0.5, True, np.float32(0.5), np.array(2)])
def test_numbers_are_rewards(number: Any) -> None:
    assert read_result(number).returned == {"primary": float(number)}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (float("inf"), "is inf; rewards must be finite"),
        ({"style": float("nan")}, "the reward 'style' that the agent returned is nan"),
        ({"style": "good"}, "is a str, not a number"),
        ({"": 1.0}, "names are texts of 1 to 128 bytes"),
        ([1.0], "element 0 is a float, not a span"),
        ("text", "the agent returned a str"),
        (object(), "the agent returned a object"),
        ([Span(rollout_id="", attempt_id="", name="n", span_id="zz")], "element 0 is no span: span_id"),
    ],
)
def test_results_that_mean_nothing(result: Any, message: str) -> None:
    with pytest.raises(BadResult, match=message):
        read_result(result)


def test_the_last_reward_of_a_name_counts() -> None:
    from agl_grpc.agent import emit_reward

    outcome = read_result(None)
    outcome.read_rewards(
        [
            emit_reward(0.1, propagate=False),
            emit_reward({"accuracy": 0.9, "style": 0.2}, primary_key="accuracy", propagate=False),
            emit_reward(0.3, step=1, propagate=False),
        ]
    )
    assert outcome.rewards == {
        RewardKey("primary", None): 0.9,
        RewardKey("accuracy", None): 0.9,
        RewardKey("style", None): 0.2,
        RewardKey("primary", 1): 0.3,
    }


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_colon", "is not an import path: write module:name"),
        ("no_such_module:agent", "there is no module 'no_such_module'"),
        ("tests.runner.agents:nobody", "has no 'nobody'"),
        ("broken_agent:agent", r"importing 'broken_agent' failed: NameError.*broken_agent.py, line 2"),
        ("needy_agent:agent", r"importing 'needy_agent' failed: ModuleNotFoundError.*not_installed"),
    ],
)
def test_import_paths(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken_agent.py").write_text("x = 1\nagent = undefined\n")
    (tmp_path / "needy_agent.py").write_text("import not_installed\n")
    with pytest.raises(LoadError, match=message):
        load_object(path, str(tmp_path))


async def test_a_thread_that_loops_is_stopped() -> None:
    entered, stopped = threading.Event(), threading.Event()

    def spin() -> None:
        entered.set()
        try:
            while True:
                pass
        except AgentStopped:
            stopped.set()
            raise

    abandoned = AbandonedThreads()
    task = asyncio.create_task(run_in_thread(spin, abandoned))
    await eventually(entered.is_set, what="the thread runs")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(stopped.is_set, what="the thread is stopped")
    await eventually(lambda: abandoned.count() == 0, what="nothing is left behind")


async def test_a_threads_result_and_exception_come_back() -> None:
    assert await run_in_thread(lambda: 5, AbandonedThreads()) == 5
    with pytest.raises(KeyError):
        await run_in_thread(lambda: {}["missing"], AbandonedThreads())
    with pytest.raises(RuntimeError, match="StopIteration"):
        await run_in_thread(lambda: next(iter(())), AbandonedThreads())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"concurrency": -1}, "concurrency is -1"),
        ({"lease_seconds": 0.5}, "between 1 and 3600"),
        ({"max_rollouts": 0}, "max_rollouts is 0"),
        ({"heartbeat_seconds": 0.0}, "heartbeat_seconds is 0.0"),
    ],
)
def test_settings_are_checked(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunnerConfig(agent="a:b", **setting)


def test_a_plain_llm_stays_as_it_is() -> None:
    from agl_grpc.runner.resources import bind_to_attempt

    llm = LLM(endpoint="http://127.0.0.1:9/v1", model="m")
    assert bind_to_attempt({"llm": llm}, rollout=None) == {"llm": llm}  # type: ignore[arg-type]  # not looked at


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"agent": "a:b", "isolation": "vm"}, "isolation 'vm' is none of thread, process"),
        ({"isolation": "command"}, "isolation command needs a command"),
        ({"agent": "a:b", "isolation": "command", "command": "true"}, "the agent is a command; leave"),
        ({"agent": "a:b", "command": "true"}, "a command goes with isolation command, not with thread"),
        ({"isolation": "process"}, "there is no agent"),
    ],
)
def test_agent_and_isolation_have_to_fit(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunnerConfig(**setting)


@pytest.mark.parametrize(
    ("command", "message"),
    [("no-such-program --fast", "there is no program 'no-such-program'"), ("echo 'x", "cannot be read")],
)
def test_commands_are_checked_at_the_start(command: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        CommandAgent(command, "127.0.0.1:4747")


@pytest.mark.parametrize("command", ["cd /tmp && ./run", "X=1 ./run", "exec node a.js", "(a; b)", "true"])
def test_what_only_the_shell_can_judge_is_left_to_it(command: str) -> None:
    CommandAgent(command, "127.0.0.1:4747")


class _FailsToUnpickle:
    """An agent that ends the process of whoever loads it."""

    def __reduce__(self) -> Any:
        return (os._exit, (7,))


def test_a_worker_that_only_dies_is_given_up() -> None:
    config = RunnerConfig(agent=_FailsToUnpickle(), restart_seconds=0.01, store=f"127.0.0.1:{free_port()}")
    with pytest.raises(WorkerStartError, match=r"died 5 times in a row before it took a rollout; .* code 7"):
        Supervisor(config).run()


def test_the_machine_is_described() -> None:
    from agl_grpc.runner.machine import MachineSnapshot

    snapshot = MachineSnapshot().read()
    assert snapshot["process_memory_bytes"] < snapshot["memory_total_bytes"]  # type: ignore[operator]  # both are numbers
    # Figures of GPUs only where there are some.
    assert ("gpu_count" in snapshot) == bool([name for name in snapshot if name.startswith("gpu_0")])
