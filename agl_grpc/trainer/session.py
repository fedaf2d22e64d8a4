"""What every training run has: its folder, store, workers, resources and progress."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import threading
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from agl_grpc.client import StoreClient, StoreError
from agl_grpc.evaluation import EvaluationError, Pass, Sampling, describe, evaluate, publish_sampling
from agl_grpc.grader import GraderFailed, GraderWorker
from agl_grpc.grader.tokens import TokenDecoder
from agl_grpc.manifest.diff import manifest_key
from agl_grpc.model import LLM, ProxyLLM, RolloutStatus
from agl_grpc.model.training import StepMetrics, TrainingRun
from agl_grpc.trainer import commands
from agl_grpc.trainer.errors import TrainerError
from agl_grpc.trainer.plan import Plan, with_endpoints
from agl_grpc.trainer.processes import Forked
from agl_grpc.trainer.progress import Progress
from agl_grpc.trainer.readiness import engine_serves
from agl_grpc.trainer.result import Scores
from agl_grpc.trainer.run_folder import end_session, summary
from agl_grpc.trainer.stack import Stack
from agl_grpc.trainer.strategy import reachable

T = TypeVar("T")
_STORE_START_SECONDS = 60.0
_GRADER_SECONDS = 365 * 24 * 3600.0


class Session(Generic[T]):
    """One run, from the first process to the last. `run` is a coroutine; `close` ends everything.

    Subclasses say in `_work` what happens once store and folder are there.
    """

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self.plan = plan
        self.progress = progress
        self.stack = Stack(progress.say, grace=plan.stop_seconds)
        self.address = plan.store
        self._client: StoreClient | None = None
        self._forked: Forked | None = None
        self._resources: dict[str, str | None] = {}
        self._engine_ports: dict[str, int] = {}
        self._grading: GraderWorker | None = None
        self._grading_task: asyncio.Task[None] | None = None

    def prepare(self) -> None:
        """Before any event loop and gRPC: forks the workers' parent where workers are to be forked."""
        if self.plan.start_method == "fork" and self.starts_processes:
            self.plan.folder.path.mkdir(parents=True, exist_ok=True)
            self._forked = commands.forked_runner_part(self.plan, self.stack.mark)

    @property
    def starts_processes(self) -> bool:
        """Whether worker processes are started here."""
        return True

    @property
    def client(self) -> StoreClient:
        """The store's client."""
        assert self._client is not None, "the store is connected first"
        return self._client

    async def run(self) -> T:
        """Runs to the end; whatever it raises, `close` has to follow."""
        self.stack.bind()
        with _stopped_by_sigterm():
            try:
                self._open_folder()
                try:
                    await self._connect()
                    return await self._work()
                finally:
                    end_session(self.plan.folder, self._last_step())
            finally:
                await self._stop_graders()
                if self._client is not None:
                    await self._client.close()

    def close(self) -> None:
        """Ends every process of the run."""
        left = self.stack.close()
        if self._forked is not None:
            self._forked.discard()
        if left:
            self.progress.say(f"ended {left} processes that were left over")

    async def _work(self) -> T:
        raise TypeError("Session is a base class")

    async def _rollout_counts(self) -> dict[RolloutStatus, int]:
        """The run's rollouts by state; empty when the store cannot say: the run is over all the same."""
        try:
            counts = (await self.client.statistics(run_id=self.plan.run_id))["rollouts_by_status"]
        except StoreError:
            return {}
        return {status: counts[status] for status in RolloutStatus if counts.get(status)}

    def _last_step(self) -> StepMetrics | None:
        """The last step that was reported; None = there was none."""
        return None

    def _open_folder(self) -> None:
        """Makes the run's folder, or checks the one that is continued, and writes the manifest."""
        raise TypeError("Session is a base class")

    async def _connect(self) -> None:
        plan = self.plan
        if not self.address:
            port = plan.store_port or commands.free_port()
            self.address = f"{reachable(plan.store_host)}:{port}"
            self.progress.phase(f"starting the store on {self.address}")
            self.stack.start(
                lambda: commands.store_part(plan.folder, port, self.stack.mark, plan.store_host), restart=True
            )
        self._client = plan.client(self.address)
        try:
            async with asyncio.timeout(_STORE_START_SECONDS):
                await self.stack.until(self._client.get_server_info())
        except TimeoutError as error:
            raise TrainerError(
                f"the store at {self.address} did not answer within {_STORE_START_SECONDS:g} s"
            ) from error
        self.stack.ready("store")
        await self._client.create_run(plan.run_id)
        await self._start_graders()

    async def _note_manifest(self, training: TrainingRun, manifest: Mapping[str, Any]) -> None:
        """Puts the manifest of a training run that was asked for elsewhere into the store, at its run."""
        if training.metadata or "sessions" not in manifest:
            return
        run = await self.client.get_run_by_id(self.plan.run_id)
        notes = dict(run.metadata) if run is not None else {}
        notes[manifest_key(training.training_run_id)] = summary(manifest)
        await self.client.update_run(self.plan.run_id, metadata=notes)

    def _model_folder(self) -> Path | None:
        """Folder of the model that agents call, whose tokenizer reads what was captured; None = unknown."""
        return None

    async def _start_graders(self) -> None:
        """Has the run wait for its graders, and lets ours work beside everything else."""
        graders = self.plan.graders
        if graders is None:
            return
        await self.client.update_run(self.plan.run_id, graders=graders.of_run())
        credential = await self.client.create_grader_credential(lifetime_seconds=_GRADER_SECONDS)
        client = StoreClient(self.client.target, run_id=self.plan.run_id, credential=credential)
        try:
            self._grading = GraderWorker(client, graders, decode=self._decode())
            await self._grading.open()
        except GraderFailed as error:
            raise TrainerError(str(error)) from error
        task = asyncio.create_task(self._grading.run())
        task.add_done_callback(self._grading_ended)
        self._grading_task = task

    def _decode(self) -> TokenDecoder | None:
        """What reads captured tokens for graders; None where agents' texts have to do, which is said."""
        folder = self._model_folder()
        if folder is None:
            return None
        try:
            return TokenDecoder(folder)
        except (ImportError, ValueError) as error:
            self.progress.say(f"graders see no text of calls of which only tokens are captured: {error}")
            return None

    def _grading_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.stack.fail(TrainerError(f"grading ended: {error}"))

    async def _stop_graders(self) -> None:
        if self._grading_task is not None:
            self._grading_task.cancel()
        if self._grading is not None:
            await self._grading.close()
            await self._grading.client.close()

    def _start_runners(self) -> None:
        if self._forked is not None:
            forked = self._forked.tell(self.address)
            self.stack.start(lambda: forked)
            return
        self.stack.start(
            lambda: commands.runner_part(
                self.plan.folder, self.plan.runner_config(self.address), self.stack.mark
            )
        )

    def _start_engine(
        self,
        python: str,
        model: str,
        model_name: str,
        policy_version: int,
        *,
        arguments: Sequence[str] = (),
        part: str = "engine",
    ) -> LLM:
        """Starts an engine, or takes the one that was given; answers the endpoint for agents.

        ``arguments`` come before those that the plan names; of several engines each is a ``part`` of its own.
        """
        plan = self.plan
        if plan.llm is not None:
            return plan.llm
        port = self._engine_ports[part] = plan.engine.port or commands.free_port(plan.engine.host)
        options = dataclasses.replace(plan.engine, arguments=[*arguments, *plan.engine.arguments])
        self.stack.start(
            lambda: commands.engine_part(
                plan.folder,
                python,
                model=model,
                model_name=model_name,
                store=self.address,
                port=port,
                policy_version=policy_version,
                options=options,
                mark=self.stack.mark,
                name=part,
            )
        )
        return ProxyLLM(
            endpoint=f"http://{plan.engine.host}:{port}/v1",
            model=model_name,
            sampling_parameters=dict(plan.engine.sampling_parameters),
        )

    async def _engine_ready(self) -> None:
        engine = self.plan.engine
        for part, port in self._engine_ports.items():
            await engine_serves(engine.host, port, engine.start_seconds)
            self.stack.ready(part)

    async def _publish(self, endpoints: Mapping[str, LLM], temperatures: Mapping[str, float]) -> None:
        """Publishes what agents work with: for validation, and last, as the latest, for training.

        Both are by the names of resources; the temperatures are training's.
        """
        validation = self.plan.validation
        for name in self._passes():
            # Of this publication alone: what was published for an earlier engine stays that one's own.
            resources_id = f"{self.plan.run_id}-{name}-{uuid.uuid4().hex[:8]}"
            sampling = validation.sampling(greedy=name == "greedy")
            self._resources[name] = await self._publish_sampled(endpoints, sampling, resources_id)
        training = {
            name: dataclasses.replace(
                llm, sampling_parameters={**llm.sampling_parameters, "temperature": temperatures[name]}
            )
            for name, llm in endpoints.items()
        }
        resources = with_endpoints(self.plan.initial_resources, training)
        await self.client.update_resources(f"{self.plan.run_id}-train", resources)

    def _passes(self) -> dict[str, int]:
        """Validation before and after training: answers for each task, by the pass's name."""
        validation = self.plan.validation
        wanted = {"sampled": validation.samples, "greedy": int(validation.greedy)}
        return {name: samples for name, samples in wanted.items() if samples and self.plan.val_dataset}

    async def _publish_sampled(
        self, endpoints: Mapping[str, LLM], sampling: Sampling, resources_id: str
    ) -> str | None:
        """Publishes what agents work with in an evaluation; None where they need nothing."""
        resources = with_endpoints(self.plan.initial_resources, endpoints)
        if not resources:
            return None
        names = endpoints or self.plan.engine.resource
        return await publish_sampling(self.client, resources_id, resources, names, sampling)

    async def _validate(self, when: str) -> Scores:
        """Sampled and greedy scores on the validation dataset."""
        plan = self.plan
        scores: Scores = {}
        for name, samples in self._passes().items():
            self.progress.phase(f"validation {when} training, {name} (mean of {samples})")
            one = Pass(
                name=f"{plan.run_id}, {when} training, {name}",
                samples=samples,
                sampling=plan.validation.sampling(greedy=name == "greedy"),
                queue=plan.validation_queue,
                timeout=plan.validation.timeout_seconds,
            )
            scores[name] = await evaluate(
                self.client,
                plan.val_dataset or (),
                one,
                resources_id=self._resources[name],
                on_progress=self.progress.count,
            )
            self.progress.say(f"validation {when} training, {name}: {describe(scores[name])}")
        return scores


class _stopped_by_sigterm:  # lower case: it reads as a statement where it is used
    """SIGTERM cancels the running task and ends the program with 143 once everything has stopped."""

    def __enter__(self) -> None:
        self._told = False
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._loop.add_signal_handler(signal.SIGTERM, self._on_signal)

    def __exit__(self, *exc_info: object) -> None:
        if self._main:
            self._loop.remove_signal_handler(signal.SIGTERM)
        if self._told:
            raise SystemExit(128 + signal.SIGTERM)

    def _on_signal(self) -> None:
        self._told = True
        assert self._task is not None
        self._task.cancel()


def run_to_end(session: Session[T]) -> T:
    """Runs a session and ends its processes, also after an error or Ctrl-C; a running loop may be there."""
    try:
        session.prepare()
        return run_anywhere(session.run())
    except StoreError as error:
        raise TrainerError(f"the store at {session.address}: {error}") from error
    except EvaluationError as error:
        raise TrainerError(str(error)) from error
    finally:
        session.close()


def run_anywhere(work: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, also where an event loop runs in this thread already: in a notebook."""
    if not _loop_runs():
        return asyncio.run(work)
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(asyncio.run(work))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body, name="agl-grpc-fit")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
