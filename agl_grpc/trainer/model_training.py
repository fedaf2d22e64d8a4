"""One model's part in a run with verl: its training run in the store, its learner, what that reports."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agl_grpc.algorithm import VERL
from agl_grpc.client import StoreClient
from agl_grpc.learner.checkpoints.best import read_best
from agl_grpc.learner.checkpoints.checkpoint import adapter_folder, hugging_face_folder
from agl_grpc.learner.dotted import setting
from agl_grpc.learner.run_config import ValidationConfig
from agl_grpc.model.enums import PolicyVersionStatus, TrainingRunStatus
from agl_grpc.model.training import StepMetrics, TrainingRun
from agl_grpc.trainer import commands
from agl_grpc.trainer.errors import PartDied, TrainerError
from agl_grpc.trainer.options import ValidationOptions
from agl_grpc.trainer.plan import Plan
from agl_grpc.trainer.processes import Command
from agl_grpc.trainer.progress import Progress
from agl_grpc.trainer.result import ModelResult
from agl_grpc.trainer.run_folder import RunFolder
from agl_grpc.trainer.stack import Stack

# The learner reports its last step before it ends; the watch has this long to bring it.
_LAST_METRICS_SECONDS = 10.0
_TAKE_UP_SECONDS = 0.5
_METRICS_SECONDS = 5.0
# The metric by which the learner names the version that it published after a step.
PUBLISHED = "weights/policy_version"


class ModelTraining:
    """The training of one model.

    Args:
        plan: the run.
        algorithm: the settings of this model's learner.
        name: of the model where the run names several; empty = there is only this one, and the run's folder
            is its own.
    """

    def __init__(self, plan: Plan, algorithm: VERL, name: str = "") -> None:
        self._plan = plan
        self.algorithm = algorithm
        self.name = name
        self.folder = RunFolder(plan.folder.path / "models" / name) if name else plan.folder
        self.part = f"learner-{name}" if name else "learner"
        self.resource = name or plan.engine.resource
        self.record = TrainingRun()
        self.history: dict[int, StepMetrics] = {}
        self._client: StoreClient | None = None
        self._following: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None

    @property
    def client(self) -> StoreClient:
        """The store's client."""
        assert self._client is not None, "take_up comes first"
        return self._client

    @property
    def succeeded(self) -> bool:
        """Whether it is trained to the end."""
        return self.record.status is TrainingRunStatus.SUCCEEDED

    @property
    def temperature(self) -> float:
        """The sampling temperature of training."""
        return float(setting(self.algorithm.config, "actor_rollout_ref.rollout.temperature", 1.0))

    @property
    def last_step(self) -> StepMetrics | None:
        """The last step that was reported; None = none was."""
        return self.history[max(self.history)] if self.history else None

    async def take_up(
        self, client: StoreClient, training_run_id: str, metadata: Mapping[str, Any], *, may_exist: bool
    ) -> bool:
        """Makes the training run, or finds it; whether it was there.

        Args:
            client: of the run.
            training_run_id: its id.
            metadata: kept with one that is made.
            may_exist: the run is resumed, or was asked for in the store.

        Raises:
            TrainerError: it exists and may not.
        """
        self._client = client
        found = await client.get_training_run_by_id(training_run_id)
        if found is not None and not may_exist:
            raise TrainerError(
                f"the store at {client.target} has a training run {training_run_id!r} already: choose "
                "another run name"
            )
        wanted = TrainingRun(
            training_run_id=training_run_id,
            run_id=self._plan.run_id,
            algorithm=self.algorithm.name,
            config=self.algorithm.config,
            metadata={"model": self.algorithm.model_path, **metadata},
        )
        self.record = found or await client.create_training_run(wanted)
        return found is not None

    async def start_weights(self) -> tuple[str, int]:
        """Folder and policy version of the weights that an engine of its own begins with."""
        checkpoint_id = self.record.checkpoint_id
        if not checkpoint_id:
            return self.algorithm.model_path, 0
        folder = hugging_face_folder(self.folder.checkpoints / checkpoint_id)
        if not folder.is_dir():
            raise TrainerError(f"checkpoint {checkpoint_id} is committed, but {folder} does not exist")
        if adapter_folder(folder.parent.parent).is_dir():
            # The learner publishes the adapter, which an engine adds to the model that it was started with.
            return self.algorithm.model_path, 0
        return str(folder), await self._published_version()

    @property
    def adapter_argument(self) -> str:
        """How an engine with several adapters is told of this one: one that nobody trains any more is served
        as it ended, every other begins as the base is.
        """
        if not self.succeeded:
            return self.name
        return f"{self.name}={adapter_folder(self.folder.checkpoints / (self.record.checkpoint_id or ''))}"

    async def _published_version(self) -> int:
        """The policy version under which the checkpoint's weights were published."""
        training = self.record
        step = int((training.checkpoint_id or "").rpartition("_")[2])
        found: int | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_METRICS_SECONDS):
                changes = self.client.watch_training_run(training.training_run_id, from_step=step)
                async with contextlib.aclosing(changes):
                    async for _, steps in changes:
                        for item in steps:
                            if item.step == step and PUBLISHED in item.metrics:
                                found = int(item.metrics[PUBLISHED])
                        if found is not None:
                            return found
        # The trainer died between the commit and its report: nothing has been published since.
        versions = await self.client.query_policy_versions(self.algorithm.model_name)
        committed = [item.policy_version for item in versions if item.status is PolicyVersionStatus.COMMITTED]
        return max(committed, default=0)

    def learner(
        self, store: str, python: str, mark: str, *, follows: str = "", followers: Sequence[str] = ()
    ) -> Callable[[], Command]:
        """Makes the learner's process, which tells the training run's log how far it is.

        Args:
            store: address of the store.
            python: of the learner environment.
            mark: of the run's processes.
            follows: training run whose rollouts it trains on; empty = it asks for them itself.
            followers: models that are trained on its rollouts.
        """
        plan = self._plan
        validation = plan.validation
        config = self.algorithm.write_run(
            self.folder.path,
            run_id=plan.run_id,
            training_run_id=self.record.training_run_id,
            train_dataset=plan.train_dataset,
            val_dataset=None if follows else plan.val_dataset,
            more={**_validation_keys(self.algorithm.config, plan), **(_NOT_BEFORE if follows else {})},
            validation=ValidationConfig(
                queue=plan.validation_queue,
                max_tokens=validation.max_tokens or 0,
                seed=validation.seed,
                timeout=validation.timeout_seconds,
                keep_best=validation.keep_best,
            ),
            follows=follows,
            followers=followers,
        )
        return lambda: commands.learner_part(
            plan.folder, python, config=config, store=store, resume=plan.resume, mark=mark, name=self.part
        )

    def follow(self, progress: Progress) -> None:
        """Begins to show steps and lines of the learner that is about to take the training run up."""
        self._following = asyncio.create_task(self._follow(progress, self.record.trainer_epoch))
        self._reading = asyncio.create_task(self._read_log(progress))

    async def unfollow(self) -> None:
        """Ends what `follow` began."""
        tasks = {task for task in (self._following, self._reading) if task is not None}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _follow(self, progress: Progress, older_epoch: int) -> None:
        total = self._total_steps()
        while True:
            async for run, steps in self.client.watch_training_run(self.record.training_run_id):
                for item in steps:
                    if self.history.get(item.step) == item:
                        continue  # shown before: each watch begins with the first step
                    self.history[item.step] = item
                    progress.step(item.step, total, item.metrics, self.name)
                if run is not None and run.status.is_terminal and run.trainer_epoch > older_epoch:
                    return
            # The end that the watch has shown is the one that is being resumed; the learner is on its way.
            await asyncio.sleep(_TAKE_UP_SECONDS)

    async def _read_log(self, progress: Progress) -> None:
        """Shows lines of the training run's log, alarms for example, that are written from now on."""
        begin = time.time()
        said_by = f"{self.name}: " if self.name else ""
        async for line in self.client.watch_training_log(self.record.training_run_id):
            if line.time is None or line.time >= begin:
                progress.say(f"{said_by}{line.text}")

    async def ended(self, stack: Stack) -> TrainingRun:
        """Waits for the learner's end; the training run as it ended.

        Raises:
            PartDied: the learner ended without saying how to the store.
        """
        await stack.ended(self.part)
        if self._following is not None:
            await asyncio.wait({self._following}, timeout=_LAST_METRICS_SECONDS)
        name = self.record.training_run_id
        found = await self.client.get_training_run_by_id(name)
        if found is None or not found.status.is_terminal:
            state = found.status.value if found else "unknown to the store"
            learner = stack.part(self.part)
            raise PartDied(f"{self.part} ended, but its training run is {state}: {learner.obituary()}")
        self.record = found
        return found

    async def has_unsaved_steps(self) -> bool:
        """Whether steps were reported that are in no committed checkpoint."""
        found = await self.client.get_training_run_by_id(self.record.training_run_id)
        saved = int(((found.checkpoint_id if found else "") or "_0").rpartition("_")[2])
        return self.last_step is not None and self.last_step.step > saved

    @property
    def result(self) -> ModelResult:
        """What came of it."""
        checkpoint = None
        if self.record.checkpoint_id:
            checkpoint = self.folder.checkpoints / self.record.checkpoint_id
        adapter = adapter_folder(checkpoint) if checkpoint else None
        return ModelResult(
            training_run=self.record,
            history=[self.history[step] for step in sorted(self.history)],
            checkpoint=checkpoint,
            model=hugging_face_folder(checkpoint) if checkpoint else None,
            best=read_best(self.folder.checkpoints),
            adapter=adapter if adapter and adapter.is_dir() else None,
        )

    def _total_steps(self) -> int | None:
        config = self.algorithm.config
        steps = setting(config, "trainer.total_training_steps")
        if steps is not None:
            return int(steps)
        batch, epochs = setting(config, "data.train_batch_size"), setting(config, "trainer.total_epochs", 1)
        return len(self._plan.train_dataset) // int(batch) * int(epochs) if batch else None


# A learner that follows takes the leader's scores, of which there is none before the first step.
_NOT_BEFORE = {"trainer.val_before_train": False}


def _validation_keys(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """How and how often the learner validates: those of verl's keys that its configuration leaves open."""
    wanted: ValidationOptions = plan.validation
    kwargs = "actor_rollout_ref.rollout.val_kwargs"
    keys: dict[str, Any] = {
        f"{kwargs}.n": wanted.every_samples,
        f"{kwargs}.temperature": wanted.temperature,
        f"{kwargs}.top_p": wanted.top_p or 1.0,
    }
    if plan.val_dataset and wanted.every:
        keys["trainer.test_freq"] = wanted.every
    return {key: value for key, value in keys.items() if setting(config, key) is None}
