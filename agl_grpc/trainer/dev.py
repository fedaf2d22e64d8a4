"""Trying an agent out: in this process, on a few tasks, without training."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from agl_grpc.agent import LitAgent
from agl_grpc.algorithm import Algorithm
from agl_grpc.client import StoreClient
from agl_grpc.model import NamedResources, Rollout, RolloutMode
from agl_grpc.runner.lit_agent_runner import LitAgentRunner
from agl_grpc.runner.load import load_hooks
from agl_grpc.trainer import commands
from agl_grpc.trainer.errors import TrainerError
from agl_grpc.trainer.local_session import LocalSession
from agl_grpc.trainer.plan import Plan
from agl_grpc.trainer.processes import Command
from agl_grpc.trainer.progress import Progress
from agl_grpc.trainer.result import FitResult
from agl_grpc.trainer.run_folder import RunFolder
from agl_grpc.trainer.session import run_to_end
from agl_grpc.trainer.stack import Stack
from agl_grpc.trainer.strategy import SharedMemoryExecutionStrategy

_START_SECONDS = 60.0


async def dev_run(
    runner: LitAgentRunner,
    agent: LitAgent[Any],
    tasks: Sequence[Any],
    mode: RolloutMode,
    *,
    resources: NamedResources,
    store: str,
    run_id: str,
    hooks: Sequence[Any] = (),
) -> list[Rollout]:
    """Executes the tasks one after the other; the rollouts as they ended.

    Raises:
        TrainerError: the agent failed; its traceback stands in the rollout's ``failure`` and in the message.
    """
    async with _store(store) as address, StoreClient(address, run_id=run_id) as client:
        await client.create_run(run_id)
        if resources:
            await client.add_resources(resources)
        ended: list[Rollout] = []
        async with runner.run_context(agent=agent, store=client, hooks=load_hooks(hooks)):
            for task in tasks:
                rollout = await runner.step(task, mode=mode)
                _raise_failure(rollout)
                ended.append(rollout)
        return ended


class DevSession(LocalSession):
    """A short run in threads of this process; `rollouts` are then those that the algorithm had done."""

    rollouts: list[Rollout]

    async def _work(self) -> FitResult:
        before = {rollout.rollout_id for rollout in await self.client.query_rollouts()}
        result = await super()._work()
        made = await self.client.query_rollouts()
        self.rollouts = [rollout for rollout in made if rollout.rollout_id not in before]
        return result


def dev_algorithm(
    plan: Plan, algorithm: Algorithm, runner: LitAgentRunner | None, adapter: Any, trainer: Any
) -> list[Rollout]:
    """Runs a quick algorithm with workers in threads, its folder thrown away; the rollouts as they ended.

    Raises:
        TrainerError: the agent failed; its traceback stands in the message.
    """
    with tempfile.TemporaryDirectory(prefix="agl-grpc-dev-") as folder, Progress(plan.run_id) as progress:
        plan = dataclasses.replace(plan, folder=RunFolder(Path(folder) / plan.run_id), start_method="spawn")
        strategy = SharedMemoryExecutionStrategy()
        session = DevSession(plan, progress, algorithm, strategy, runner, adapter, trainer)
        run_to_end(session)
    for rollout in session.rollouts:
        _raise_failure(rollout)
    return session.rollouts


def _raise_failure(rollout: Rollout) -> None:
    if rollout.failure is not None:
        raise TrainerError(
            f"the agent failed on {rollout.input!r}: {rollout.failure.message}\n{rollout.failure.detail}"
        )


@contextlib.asynccontextmanager
async def _store(address: str) -> AsyncIterator[str]:
    """The store given, or a throw-away one for the time of the block."""
    if address:
        yield address
        return
    port = commands.free_port()
    with tempfile.TemporaryDirectory(prefix="agl-grpc-dev-") as folder:
        stack = Stack(lambda _text: None)
        stack.bind()
        try:
            stack.start(lambda: _memory_store(RunFolder(Path(folder)), port, stack.mark))
            async with StoreClient(f"127.0.0.1:{port}") as client:
                await stack.until(client.get_server_info())
            yield f"127.0.0.1:{port}"
        finally:
            stack.close()


def _memory_store(folder: RunFolder, port: int, mark: str) -> Command:
    part = commands.store_part(folder, port, mark)
    part.command = [*part.command[: part.command.index("--database")], "--memory"]
    return part
