"""Agents that do what no agent should."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
import threading
from typing import Any

from opentelemetry import trace

from agl_grpc.agent import LitAgent, emit_message, emit_reward, llm_rollout
from agl_grpc.model import LLM
from agl_grpc.runner import Hook

FLOOD = 20_000


class Unheard(BaseException):
    """An exception that `except Exception` does not catch."""


class NeverShown(Exception):
    """An exception whose text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def emit_in_child(answers: Any) -> None:
    """Runs in a forked process."""
    try:
        emit_reward(0.5)
    except RuntimeError as error:
        answers.put(str(error))


def fork_and_ask() -> None:
    """Forks by multiprocessing, and raises what the child was told when it emitted a reward."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=emit_in_child, args=(answers,))
    process.start()
    process.join(20)
    raise ValueError(f"the child died: {process.exitcode}" if answers.empty() else answers.get())


def fork_and_return() -> float:
    """Forks; child and parent both come back from the agent."""
    child = os.fork()
    if child == 0:
        return 0.25
    _, status = os.waitpid(child, 0)
    return 1.0 if status == 0 else 0.0


def misbehave(task: dict[str, Any], resources: Any) -> Any:
    """What sync and async agents do alike."""
    match task["do"]:
        case "fine":
            return 1.0
        case "unheard":
            raise Unheard("not an Exception")
        case "never shown":
            raise NeverShown
        case "recursion":
            return misbehave(task, resources)
        case "infinite reward":
            return {"primary": 1.0, "style": float("inf")}
        case "complex":
            return 1 + 2j
        case "coroutine":
            return asyncio.sleep(0)
        case "nan in a span":
            with trace.get_tracer("user").start_as_current_span("judged") as span:
                span.set_attribute("agentlightning.reward.0.value", float("nan"))
            return None
        case "flood":
            for number in range(FLOOD):
                with trace.get_tracer("user").start_as_current_span("drop", attributes={"n": number}):
                    pass
            return 1.0
        case "large":
            emit_message("x" * (5 << 20))
            return 1.0
        case "fork and ask":
            fork_and_ask()
        case "fork and return":
            return fork_and_return()
        case "missing by name":
            return resources["judge"]
    raise AssertionError(f"no such task: {task}")


async def _exit() -> None:
    sys.exit(7)


class BadAsyncAgent(LitAgent[Any]):
    """Misbehaves on the event loop."""

    async def rollout_async(self, task: dict[str, Any], resources: Any, rollout: Any) -> Any:
        if task["do"] == "exit in a task":
            leaving = asyncio.create_task(_exit())
            await asyncio.wait({leaving})
            return 1.0
        if task["do"] == "stop the loop":
            asyncio.get_running_loop().stop()
            await asyncio.sleep(0)
            return 1.0
        if task["do"] == "cancel itself":
            raise asyncio.CancelledError
        return misbehave(task, resources)


class BadSyncAgent(LitAgent[Any]):
    """Misbehaves in a thread."""

    def rollout(self, task: dict[str, Any], resources: Any, rollout: Any) -> Any:
        if task["do"] == "hang":
            threading.Event().wait()
        if task["do"] == "missing endpoint":
            return needs_llm.rollout(task, resources, rollout)
        return misbehave(task, resources)


@llm_rollout
def needs_llm(task: Any, llm: LLM) -> float:
    """Cannot do without an endpoint."""
    return 1.0


class StrictHook(Hook):
    """Fails the rollouts that it does not like."""

    fail_rollout = True

    async def on_trace_start(self, agent: Any, runner: Any, tracer: Any, rollout: Any) -> None:
        if rollout.input["do"] == "refused at the start":
            raise ValueError("not this one")

    def on_rollout_end(self, agent: Any, runner: Any, rollout: Any, spans: Any) -> Any:
        if (rollout.metadata or {}).get("refused"):
            raise ValueError(f"not with {len(spans)} spans")


class ExitingHook(Hook):
    """Wants to end the process."""

    def on_trace_end(self, agent: Any, runner: Any, tracer: Any, rollout: Any) -> Any:
        sys.exit(3)
