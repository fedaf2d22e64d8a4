"""Agents for the tests: each does what its task says. They speak to the test through files."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from opentelemetry import trace

from agl_grpc.agent import LitAgent, emit_reward
from agl_grpc.model import Span, SpanCoreFields
from agl_grpc.runner import AgentFailure, Hook

FOLDER = "AGL_TEST_FOLDER"


def note(name: str, text: str = "") -> None:
    """Appends a line to a file of the test's folder."""
    with (Path(os.environ[FOLDER]) / name).open("a") as file:
        file.write(text + "\n")


def result_of(task: dict[str, Any], resources: Any, rollout: Any) -> Any:
    """What agents do at once."""
    match task["do"]:
        case "number":
            with trace.get_tracer("test").start_as_current_span("thinking"):
                return task.get("reward", 1.0)
        case "nothing":
            return None
        case "pid":
            note("pids", str(os.getpid()))
            return None
        case "emit":
            emit_reward(0.1)
            emit_reward(0.5, step=3)
            emit_reward(0.75)
            return None
        case "rewards":
            return {"primary": 0.25, "style": 1}
        case "spans":
            return [
                SpanCoreFields(name="made by hand"),
                Span(rollout_id="", attempt_id="", name="whole", start_time_ns=1, end_time_ns=2),
            ]
        case "nan":
            return math.nan
        case "text":
            return "well done"
        case "crash":
            raise ValueError("the agent is broken")
        case "exit":
            raise SystemExit(9)
        case "grader":
            raise AgentFailure("no judge answered", kind="grader")
        case "die":
            os._exit(11)
        case "resources":
            llm = resources["llm"]
            url = llm.get_base_url(rollout.rollout_id, rollout.attempt.attempt_id)
            note(rollout.rollout_id, f"{url} {llm.endpoint} {llm.api_key}")
            return None
    raise AssertionError(f"no such task: {task}")


async def gate_opens(gate: Path) -> None:
    """Returns when the test has made the file."""
    while not os.path.exists(gate):  # noqa: ASYNC110, ASYNC240  # all that test and agent share is a file
        await asyncio.sleep(0.01)


async def call_engine(port: int) -> None:
    """Calls a model engine that is not there."""
    import httpx

    async with httpx.AsyncClient() as engine:
        await engine.post(f"http://127.0.0.1:{port}/v1/chat/completions", json={"model": "m"})


class AsyncAgent(LitAgent[Any]):
    """Does as its task says, on the event loop."""

    async def training_rollout_async(self, task: dict[str, Any], resources: Any, rollout: Any) -> Any:
        note("training", rollout.rollout_id)
        return await self.rollout_async(task, resources, rollout)

    async def rollout_async(self, task: dict[str, Any], resources: Any, rollout: Any) -> Any:
        match task["do"]:
            case "engine":
                return await call_engine(task["port"])
            case "wait":
                note("started", rollout.attempt.attempt_id)
                gate = Path(os.environ[FOLDER]) / task["gate"]
                try:
                    await gate_opens(gate)
                except asyncio.CancelledError:
                    note("stopped", rollout.attempt.attempt_id)
                    raise
                note("ended", rollout.attempt.attempt_id)
                return 1.0
            case "block":
                note("started", rollout.attempt.attempt_id)
                threading.Event().wait(task["seconds"])
                return 1.0
            case "nap":
                await asyncio.sleep(task["seconds"])
                return 1.0
            case "subprocess":
                process = await asyncio.create_subprocess_exec("true")
                return float(await process.wait() == 0)
            case "stubborn":
                note("started", rollout.attempt.attempt_id)
                while True:
                    try:
                        await asyncio.sleep(60)
                    except asyncio.CancelledError:
                        note("ignored", rollout.attempt.attempt_id)
        return result_of(task, resources, rollout)


class SyncAgent(LitAgent[Any]):
    """Does as its task says, in a thread."""

    def training_rollout(self, task: dict[str, Any], resources: Any, rollout: Any) -> Any:
        note("training", rollout.rollout_id)
        return self.rollout(task, resources, rollout)

    def rollout(self, task: dict[str, Any], resources: Any, rollout: Any) -> Any:
        match task["do"]:
            case "engine":
                return asyncio.run(call_engine(task["port"]))
            case "subprocess":
                return float(subprocess.run(["true"], check=False).returncode == 0)
            case "wait":
                note("started", rollout.attempt.attempt_id)
                gate = Path(os.environ[FOLDER]) / task["gate"]
                try:
                    while not gate.exists():
                        time.sleep(0.01)
                except BaseException as error:
                    note("stopped", type(error).__name__)
                    raise
                return 1.0
            case "block":
                note("started", rollout.attempt.attempt_id)
                note("blocked", str(os.getpid()))
                threading.Event().wait(task["seconds"])
                return 1.0
        return result_of(task, resources, rollout)


class NotingHook(Hook):
    """Notes when it is called, and raises at the end of each trace."""

    async def on_rollout_start(self, agent: Any, runner: Any, rollout: Any) -> None:
        note("hooks", f"on_rollout_start {rollout.rollout_id}")

    async def on_trace_start(self, agent: Any, runner: Any, tracer: Any, rollout: Any) -> None:
        note("hooks", f"on_trace_start {rollout.rollout_id}")

    async def on_trace_end(self, agent: Any, runner: Any, tracer: Any, rollout: Any) -> None:
        note("hooks", f"on_trace_end {rollout.rollout_id}")
        raise RuntimeError("a hook that is broken")

    async def on_rollout_end(self, agent: Any, runner: Any, rollout: Any, spans: Any) -> None:
        note("hooks", f"on_rollout_end {rollout.rollout_id} {len(spans)}")


not_an_agent = 5
