"""A run whose algorithm works in this process: it talks to the store, the workers execute its rollouts."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from agl_grpc.algorithm import Algorithm
from agl_grpc.client import StoreError
from agl_grpc.client.filters import rollout_filter
from agl_grpc.manifest.describe import without_secrets
from agl_grpc.model import RolloutStatus, TrainingRunStatus
from agl_grpc.model.training import StepMetrics
from agl_grpc.runner.lit_agent_runner import LitAgentRunner
from agl_grpc.runner.load import LoadError, load_agent, load_hooks, load_tracer
from agl_grpc.runner.threads import AbandonedThreads, run_in_thread
from agl_grpc.tracer import Tracer
from agl_grpc.trainer.charts import draw_history
from agl_grpc.trainer.errors import TrainerError
from agl_grpc.trainer.plan import Plan, with_endpoints
from agl_grpc.trainer.progress import Progress
from agl_grpc.trainer.result import FitResult
from agl_grpc.trainer.run_folder import dataset_digests, describe_session, summary
from agl_grpc.trainer.session import Session
from agl_grpc.trainer.strategy import (
    ClientServerExecutionStrategy,
    ExecutionStrategy,
    SharedMemoryExecutionStrategy,
)
from agl_grpc.trainer.training_record import RunStopped, TrainingRecord, result_fields

log = logging.getLogger(__name__)


class LocalSession(Session[FitResult]):
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
        self._manifest: dict[str, Any] = {}
        self._record: TrainingRecord | None = None
        self._strategy = strategy
        self._runner = runner
        self._adapter = adapter
        self._trainer = trainer

    @property
    def starts_processes(self) -> bool:
        return self._strategy.runs_workers and isinstance(self._strategy, ClientServerExecutionStrategy)

    async def _work(self) -> FitResult:
        plan = self.plan
        resources = dict(plan.initial_resources)
        if plan.llm is not None:
            resources = with_endpoints(resources, {plan.engine.resource: plan.llm})
        if resources:
            await self.client.update_resources(f"{plan.run_id}-initial", resources)
        async with self._workers():
            if self._algorithm is None or not self._strategy.runs_algorithm:
                self.progress.phase(f"serving the rollouts of {self.address}; Ctrl-C ends")
                await self.stack.until(self._forever())
            assert self._algorithm is not None, "serving does not end by itself"
            return await self._recorded(self._algorithm)

    async def _recorded(self, algorithm: Algorithm) -> FitResult:
        """Runs the algorithm as a training run of the store, which hears of its end whatever that is."""
        record = self._record = TrainingRecord(
            self.client, self.plan.folder, self.progress, self.stack.fail, self.plan.alarms
        )
        record.metadata = summary(self._manifest)
        await record.begin(algorithm.name, self.plan.training_run_id, self.plan.trainer_id)
        await self._note_manifest(record.training, self._manifest)
        algorithm.set_reporter(record)
        value = None
        try:
            value = await self.stack.until(self._run_algorithm(algorithm))
            counts = await self._rollout_counts()
            with contextlib.suppress(StoreError):  # it has ended well, whatever the store says of it
                await self._tell_of_rollouts(record, counts)
        except RunStopped as stopped:
            self.progress.say(str(stopped))
            counts = await self._rollout_counts()
            await record.end(TrainingRunStatus.STOPPED)
        except BaseException as error:
            asked = isinstance(error, asyncio.CancelledError)
            await record.end(
                TrainingRunStatus.STOPPED if asked else TrainingRunStatus.FAILED, None if asked else error
            )
            raise
        else:
            await record.end(TrainingRunStatus.SUCCEEDED, value=value)
        fields = result_fields(record)
        draw_history(self.plan.folder, fields["history"], self.progress)
        folder, restarts = self.plan.folder, self.stack.restarts
        return FitResult(folder=folder, restarts=restarts, value=value, rollouts=counts, **fields)

    async def _tell_of_rollouts(self, record: TrainingRecord, counts: Mapping[RolloutStatus, int]) -> None:
        """Says what an algorithm may not have noticed: rollouts that failed, or that it did not wait for."""
        failed = counts.get(RolloutStatus.FAILED, 0)
        if failed:
            wanted = rollout_filter(run_id=self.plan.run_id, status_in=(RolloutStatus.FAILED,))
            failure = (await self.client.query_rollouts(filter=wanted, limit=1))[0].failure
            why = f", for example with: {failure.message}" if failure else ""
            record.say(f"{failed} of the run's {sum(counts.values())} rollouts failed{why}")
        left = sum(count for status, count in counts.items() if not status.is_terminal)
        if left:
            record.say(f"{left} rollouts are unfinished: the algorithm ended without them")

    def _open_folder(self) -> None:
        plan = self.plan
        if not self._strategy.runs_algorithm:
            # The run's folder is the algorithm's; here lie the workers' logs only.
            plan.folder.path.mkdir(parents=True, exist_ok=True)
            return
        old = plan.folder.open(resume=plan.resume)
        datasets = dataset_digests(plan.train_dataset, plan.val_dataset)
        config = self._configuration()
        session = {**describe_session(None, None), "seed": config["settings"].get("seed"), "config": config}
        sessions = [*old.get("sessions", []), session]
        self._manifest = {**old, "run": plan.run_id, "datasets": datasets, "sessions": sessions}
        plan.folder.write_manifest(self._manifest)

    def _configuration(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "algorithm": self._algorithm.name if self._algorithm else None,
            "settings": plain_settings(self._algorithm),
            "strategy": type(self._strategy).__name__,
            "model": plan.llm.model if plan.llm else None,
            "n_runners": plan.n_runners,
            "concurrency": plan.runner.concurrency,
            **plan.configuration,
        }

    def _last_step(self) -> StepMetrics | None:
        steps = self._record.history if self._record is not None else {}
        return steps[max(steps)] if steps else None

    @contextlib.asynccontextmanager
    async def _workers(self) -> AsyncIterator[None]:
        if not self._strategy.runs_workers:
            self.progress.say(f"workers elsewhere: agl-grpc runner start --agent … --store {self.address}")
            yield
        elif isinstance(self._strategy, SharedMemoryExecutionStrategy):
            threads = WorkerThreads(
                self.plan,
                self.address,
                self._runner,
                self._trainer,
                self.stack.fail,
                self._strategy.join_timeout,
            )
            threads.start()
            try:
                yield
            finally:
                # No error: what the algorithm came to, or why it ended, is not lost for an agent that hangs.
                if stuck := await asyncio.to_thread(threads.stop):
                    self.progress.say(f"{', '.join(stuck)} did not end and is left behind: an agent blocks")
        else:
            assert isinstance(self._strategy, ClientServerExecutionStrategy)
            self._start_runners()
            yield

    async def _forever(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def _run_algorithm(self, algorithm: Algorithm) -> Any:
        plan = self.plan
        algorithm.set_store(self.client)
        algorithm.set_initial_resources(plan.initial_resources)
        algorithm.set_llm_proxy(plan.llm)
        algorithm.set_adapter(self._adapter)
        algorithm.set_trainer(self._trainer)
        self.progress.phase(f"running {algorithm.name}")
        if algorithm.is_async():
            return await algorithm.run(plan.train_dataset or None, plan.val_dataset)
        # A plain function blocks, so it gets a thread, and a client of its own: each belongs to one loop. The
        # thread does not keep the program: one that would not stop is left behind.
        algorithm.set_store(plan.client(self.address))
        call = functools.partial(algorithm.run, plan.train_dataset or None, plan.val_dataset)
        return await run_in_thread(call, AbandonedThreads())


class WorkerThreads:
    """Workers in threads of this process, each with an event loop of its own.

    ``fail`` is told why a worker ended that should not have; ``join_timeout`` is how many seconds after its
    agents' time a thread may take to deliver what has finished and hand back the rest.
    """

    def __init__(
        self,
        plan: Plan,
        store: str,
        runner: LitAgentRunner | None,
        trainer: Any,
        fail: Callable[[Exception], None],
        join_timeout: float,
    ) -> None:
        if runner is not None and plan.n_runners > 1:
            raise TrainerError(
                "one runner object cannot serve several threads: give its class, or n_runners=1"
            )
        try:
            self._agent = load_agent(plan.agent)
            self._hooks = load_hooks(plan.hooks)
            tracer = load_tracer(plan.tracer)
        except LoadError as error:
            raise TrainerError(str(error)) from error
        if trainer is not None:
            self._agent.set_trainer(trainer)
        self._plan = plan
        self._store = store
        self._fail = fail
        self._join_timeout = join_timeout
        self._stop = threading.Event()
        runners = [runner or self._make_runner(tracer) for _ in range(plan.n_runners)]
        self._threads = [
            threading.Thread(target=self._body, args=(index, runner), name=f"worker-{index}", daemon=True)
            for index, runner in enumerate(runners)
        ]

    def _make_runner(self, tracer: Tracer) -> LitAgentRunner:
        options = self._plan.runner
        return LitAgentRunner(
            tracer,
            self._plan.max_rollouts,
            concurrency=options.concurrency,
            drain_seconds=options.drain_seconds,
            queues=(self._plan.run_id, self._plan.validation_queue),
        )

    def start(self) -> None:
        """Starts all workers."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> list[str]:
        """Has all workers drain; the names of those that do not end, which do not keep the program."""
        self._stop.set()
        deadline = time.monotonic() + self._plan.runner.drain_seconds + self._join_timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return [thread.name for thread in self._threads if thread.is_alive()]

    def _body(self, index: int, runner: LitAgentRunner) -> None:
        try:
            asyncio.run(self._work(index, runner))
        except Exception as error:
            log.exception("worker %d in its thread is broken", index)
            failure = TrainerError(f"worker {index} ended: {error}")
            failure.__cause__ = error
            self._fail(failure)

    async def _work(self, index: int, runner: LitAgentRunner) -> None:
        async with (
            self._plan.client(self._store) as store,
            runner.run_context(agent=self._agent, store=store, hooks=self._hooks, worker_id=index),
        ):
            await runner.iter(self._stop)


def plain_settings(algorithm: Algorithm | None) -> dict[str, Any]:
    """Numbers and texts that an algorithm was made with, by name, for the run's manifest."""
    plain = {name.lstrip("_"): value for name, value in vars(algorithm).items()} if algorithm else {}
    found = {name: value for name, value in plain.items() if isinstance(value, str | int | float)}
    return dict(without_secrets(found))
