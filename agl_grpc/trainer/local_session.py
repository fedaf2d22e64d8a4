"""A run whose algorithm works in this process: it talks to the store, the workers execute its rollouts."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from typing import Any

from agl_grpc.algorithm import Algorithm
from agl_grpc.client import StoreClient
from agl_grpc.runner.lit_agent_runner import LitAgentRunner
from agl_grpc.trainer.errors import TrainerError
from agl_grpc.trainer.plan import Plan, with_llm
from agl_grpc.trainer.progress import Progress
from agl_grpc.trainer.result import FitResult
from agl_grpc.trainer.run_folder import dataset_digest, describe_run
from agl_grpc.trainer.session import Session
from agl_grpc.trainer.strategy import (
    ClientServerExecutionStrategy,
    ExecutionStrategy,
    SharedMemoryExecutionStrategy,
)

_THREAD_END_SECONDS = 15.0


class LocalSession(Session):
    """Runs an `Algorithm` here, or, without one, only the workers."""

    def __init__(
        self,
        plan: Plan,
        progress: Progress,
        algorithm: Algorithm | None,
        strategy: ExecutionStrategy,
        runner: LitAgentRunner | None,
        adapter: Any = None,
        trainer: Any = None,
    ) -> None:
        super().__init__(plan, progress)
        self._algorithm = algorithm
        self._strategy = strategy
        self._runner = runner
        self._adapter = adapter
        self._trainer = trainer

    async def _work(self) -> FitResult:
        plan = self.plan
        resources = dict(plan.initial_resources)
        if plan.llm is not None:
            resources = with_llm(resources, plan.engine.resource, plan.llm)
        if resources:
            await self.client.update_resources(f"{plan.run_id}-initial", resources)
        async with self._workers():
            if self._algorithm is None or not self._strategy.runs_algorithm:
                self.progress.phase(f"serving the rollouts of {self.address}; Ctrl-C ends")
                await self.stack.until(self._forever())
            value = await self.stack.until(self._run_algorithm(self._algorithm))
        return FitResult(folder=plan.folder, restarts=self.stack.restarts, value=value)

    def _open_folder(self) -> None:
        plan = self.plan
        if not self._strategy.runs_algorithm:
            # The run's folder is the algorithm's; here lie the workers' logs only.
            plan.folder.path.mkdir(parents=True, exist_ok=True)
            return
        old = plan.folder.open(resume=plan.resume)
        datasets = {"train": dataset_digest(plan.train_dataset), "val": dataset_digest(plan.val_dataset)}
        session = describe_run(None, None)
        sessions = [*old.get("sessions", []), session]
        plan.folder.write_manifest({"run": plan.run_id, "datasets": datasets, "sessions": sessions})

    @contextlib.asynccontextmanager
    async def _workers(self) -> AsyncIterator[None]:
        if not self._strategy.runs_workers:
            self.progress.say(f"workers elsewhere: agl-grpc runner start --agent … --store {self.address}")
            yield
        elif isinstance(self._strategy, SharedMemoryExecutionStrategy):
            threads = WorkerThreads(self.plan, self.address, self._runner)
            threads.start()
            try:
                yield
            finally:
                await asyncio.to_thread(threads.stop)
        else:
            assert isinstance(self._strategy, ClientServerExecutionStrategy)
            self._start_runners()
            yield

    async def _forever(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def _run_algorithm(self, algorithm: Algorithm | None) -> Any:
        assert algorithm is not None
        plan = self.plan
        algorithm.set_store(self.client)
        algorithm.set_initial_resources(plan.initial_resources)
        algorithm.set_llm_proxy(plan.llm)
        algorithm.set_adapter(self._adapter)
        algorithm.set_trainer(self._trainer)
        self.progress.phase(f"running {type(algorithm).__name__}")
        if algorithm.is_async():
            return await algorithm.run(plan.train_dataset or None, plan.val_dataset)
        # A plain function blocks, so it gets a thread, and a client of its own: each belongs to one loop.
        algorithm.set_store(StoreClient(self.address, run_id=plan.run_id))
        return await asyncio.to_thread(algorithm.run, plan.train_dataset or None, plan.val_dataset)


class WorkerThreads:
    """Workers in threads of this process, each with an event loop of its own."""

    def __init__(self, plan: Plan, store: str, runner: LitAgentRunner | None) -> None:
        if runner is not None and plan.n_runners > 1:
            raise TrainerError(
                "one runner object cannot serve several threads: give its class, or n_runners=1"
            )
        self._plan = plan
        self._store = store
        self._runner = runner
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._body, args=(index,), name=f"worker-{index}", daemon=True)
            for index in range(plan.n_runners)
        ]

    def start(self) -> None:
        """Starts all workers."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Has all workers drain; TrainerError when one does not end."""
        self._stop.set()
        for thread in self._threads:
            thread.join(_THREAD_END_SECONDS)
        if stuck := [thread.name for thread in self._threads if thread.is_alive()]:
            raise TrainerError(f"{', '.join(stuck)} did not end: an agent blocks")

    def _body(self, index: int) -> None:
        asyncio.run(self._work(index))

    async def _work(self, index: int) -> None:
        plan = self._plan
        runner = self._runner or LitAgentRunner(
            max_rollouts=plan.max_rollouts, concurrency=plan.runner.concurrency
        )
        async with (
            StoreClient(self._store, run_id=plan.run_id) as store,
            runner.run_context(agent=plan.agent, store=store, hooks=plan.hooks, worker_id=index),
        ):
            await runner.iter(self._stop)
