"""Store, engine, and one runner for each example: all start together, and each executes its own queue."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from agl_grpc import ProxyLLM, StoreClient
from agl_grpc.model import Rollout, RolloutConfig, Span
from tests.interceptor.engine import engine
from tests.support.environments import REPOSITORY, frameworks_python, run_in_engine
from tests.support.store_process import StoreProcess
from tests.support.torch_client import TorchClient

RUN = "run-1"
ROLLOUTS = 4
FRAMEWORKS = ("openai", "langgraph", "openai_agents", "autogen", "crewai", "agent_framework")
NODE = "node"
EXAMPLES = (*FRAMEWORKS, NODE)
# The parser is what users switch on for Qwen; the context has to hold CrewAI's prompts.
ENGINE_OPTIONS = (
    "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
    "--max-model-len", "4096", "--max-num-batched-tokens", "4096",
)  # fmt: skip
END_SECONDS = 240.0


@dataclass
class Done:
    """What the fleet did: rollouts and logs by the name of their example, the rest by the rollout's id."""

    model: Path
    rollouts: dict[str, list[Rollout]] = field(default_factory=dict)
    spans: dict[str, list[Span]] = field(default_factory=dict)
    rewards: dict[str, list[float]] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    served: int = 0
    """Calls that the engine itself counts."""


def runner_options(name: str) -> list[str]:
    """The agent as users name it."""
    if name == NODE:
        return ["--command", f"node {shlex.quote(str(REPOSITORY / 'examples/frameworks/node/agent.mjs'))}"]
    return ["--agent", f"examples.frameworks.{name}_agent:agent"]


def start_runner(name: str, store: str, folder: Path) -> subprocess.Popen[bytes]:
    """`agl-grpc runner start` in the frameworks' environment; it leaves when its rollouts are done."""
    command = [frameworks_python(), "-m", "agl_grpc_cli", "runner", "start", "--store", store, "--run", RUN]
    command += ["--queue", name, "--name", name, "--concurrency", str(ROLLOUTS)]
    command += ["--max-rollouts", str(ROLLOUTS), *runner_options(name)]
    # A home of its own: what a framework keeps there is not the user's. No library may call out.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    environment |= {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'cli'}", "HOME": str(folder)}
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment)


async def fill(address: str, url: str) -> dict[str, list[str]]:
    """Publishes the endpoint and enqueues each example's rollouts; their ids."""
    llm = ProxyLLM(endpoint=f"{url}/v1", model="tiny", sampling_parameters={"temperature": 0.2})
    async with StoreClient(address, run_id=RUN) as client:
        await client.create_run(RUN)
        await client.add_resources({"main_llm": llm})
        ids: dict[str, list[str]] = {}
        for name in EXAMPLES:
            ids[name] = []
            for number in range(ROLLOUTS):
                task = {"question": f"Weather in Paris? ({name} {number})", "answer": "sunny"}
                made = await client.enqueue_rollout(
                    task, queue=name, mode="train", config=RolloutConfig(timeout_seconds=200)
                )
                ids[name].append(made.rollout_id)
    return ids


async def collect(address: str, ids: dict[str, list[str]], done: Done) -> None:
    """Waits for all rollouts, until nothing of them is under way any more."""
    async with StoreClient(address, run_id=RUN) as client:
        everything = [rollout_id for group in ids.values() for rollout_id in group]
        await client.wait_for_rollouts(rollout_ids=everything, timeout=END_SECONDS, until="sealed")
        for name, group in ids.items():
            found = await client.query_rollouts(rollout_id_in=group)
            done.rollouts[name] = sorted(found, key=lambda rollout: group.index(rollout.rollout_id))
        for one in everything:
            done.spans[one] = list(await client.query_spans(one))
            done.rewards[one] = [reward.value for reward in await client.query_rewards([one])]


def count_served(url: str) -> int:
    """Calls that the engine has answered, by its own count."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    found = re.findall(r"^vllm:request_success_total\{.*\} ([0-9.e+]+)$", text, re.MULTILINE)
    return round(sum(map(float, found)))


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """All examples, executed at the same time by real workers."""
    folder = tmp_path_factory.mktemp("frameworks")
    model = folder / "model"
    run_in_engine("tests.frameworks.tool_model", str(model))
    with ExitStack() as stack:
        store = stack.enter_context(StoreProcess(folder / "store.db"))
        running = stack.enter_context(engine(model, store.address, folder, *ENGINE_OPTIONS))
        ids = asyncio.run(fill(store.address, running.url))
        runners = {name: start_runner(name, store.address, folder) for name in ids}
        for process in runners.values():
            stack.callback(_end, process)
        result = Done(model)
        try:
            asyncio.run(collect(store.address, ids, result))
        finally:
            result.logs = {name: (folder / f"{name}.log").read_text(errors="replace") for name in ids}
        result.served = count_served(running.url)
        yield result


@pytest.fixture(scope="session")
def torch_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchClient]:
    """Torch and transformers, in the engine environment."""
    with TorchClient(tmp_path_factory.mktemp("torch") / "helper.log") as client:
        yield client


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
