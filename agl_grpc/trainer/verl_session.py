"""A training run with verl: engine and learner in environments of their own, workers here."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agl_grpc.agent.decorators import FunctionalLitAgent
from agl_grpc.agent.missing import ResourceMissing
from agl_grpc.algorithm import VERL
from agl_grpc.evaluation import Evaluation
from agl_grpc.learner.checkpoints.best import read_best
from agl_grpc.learner.checkpoints.checkpoint import adapter_folder, hugging_face_folder
from agl_grpc.learner.progress import scores
from agl_grpc.learner.run_config import ValidationConfig
from agl_grpc.model import LLM, RolloutStatus
from agl_grpc.model.enums import PolicyVersionStatus, TrainingRunStatus
from agl_grpc.model.training import StepMetrics, TrainingRun
from agl_grpc.trainer import commands
from agl_grpc.trainer.charts import ChartsMissing, draw_rewards
from agl_grpc.trainer.errors import PartDied, TrainerError
from agl_grpc.trainer.options import find_python
from agl_grpc.trainer.plan import Plan, with_llm
from agl_grpc.trainer.progress import Progress
from agl_grpc.trainer.readiness import captured
from agl_grpc.trainer.result import FitResult, Scores
from agl_grpc.trainer.run_folder import dataset_digests, describe_session, summary
from agl_grpc.trainer.session import Session
from agl_grpc.trainer.settings import setting

# The learner reports its last step before it ends; the watch has this long to bring it.
_LAST_METRICS_SECONDS = 10.0
_TAKE_UP_SECONDS = 0.5
_LAST_CALLS_SECONDS = 30.0
_METRICS_SECONDS = 5.0
# The metric by which the learner names the version that it published after a step.
PUBLISHED = "weights/policy_version"


class VerlSession(Session[FitResult]):
    """Starts store, engine, learner and workers, follows the training run, validates before and after."""

    def __init__(
        self, plan: Plan, progress: Progress, algorithm: VERL, *, start_workers: bool = True
    ) -> None:
        super().__init__(plan, progress)
        _check_agent(plan)
        self._start_workers = start_workers
        self._algorithm = algorithm
        self._engine_python, self._learner_python = self._pythons()
        # That the engine begins with.
        self._version = 0
        self._history: dict[int, StepMetrics] = {}
        self._manifest: dict[str, Any] = {}

    @property
    def starts_processes(self) -> bool:
        return self._start_workers

    def _pythons(self) -> tuple[str, str]:
        """Python of the engine's environment, empty = none is started, and of the learner's."""
        plan = self.plan
        engine = "" if plan.llm else find_python("engine", plan.engine_python)
        return engine, find_python("learner", plan.learner_python)

    def _model_folder(self) -> Path | None:
        return Path(self._algorithm.model_path).expanduser()

    async def _work(self) -> FitResult:
        plan = self.plan
        training = await self._training_run()
        before = self._recorded("before")
        untrained = not training.checkpoint_id and not before
        validates = bool(plan.val_dataset) and plan.validation.before and untrained
        await self.client.resume_dispatch()
        await self._start_parts(training, validates)
        self.progress.phase("starting engine, learner and workers")
        following = asyncio.create_task(self._follow(training.training_run_id, training.trainer_epoch))
        reading = asyncio.create_task(self._read_log(training.training_run_id))
        try:
            await self.stack.until(self._engine_ready())
            if validates:
                before = await self.stack.until(self._validate("before"))
                self._note_scores("before", before)
            # The first step may not change the weights under a validation that is still going on.
            await self.client.resume_dispatch(queue=plan.run_id)
            self.progress.phase("training")
            training = await self._trained(training.training_run_id, following)
        finally:
            for task in (following, reading):
                task.cancel()
            await asyncio.wait({following, reading})
        after = {}
        if plan.val_dataset and plan.validation.after and training.status is TrainingRunStatus.SUCCEEDED:
            after = await self._validate_trained(training)
            self._note_scores("after", after)
        counters = await self.stack.until(self._captured())
        counts = await self._rollout_counts()
        return self._result(training, before, after, counters, counts)

    async def _start_parts(self, training: TrainingRun, validates: bool) -> None:
        """Starts engine, learner and workers; ``validates``: training's rollouts wait for a validation."""
        llm = await self._start_trained_engine(training)
        await self._publish(llm, self._temperature)
        if validates:
            await self.client.pause_dispatch(queue=self.plan.run_id)
        self._start_learner(training)
        self._start_or_name_workers()

    async def _start_trained_engine(self, training: TrainingRun) -> LLM:
        """Starts an engine with the weights that are trained so far; the endpoint for agents."""
        model, self._version = await self._start_weights(training)
        return self._start_engine(self._engine_python, model, self._algorithm.model_name, self._version)

    async def _engine_ready(self) -> None:
        await super()._engine_ready()
        self.progress.say(f"the engine serves policy version {self._version}")

    def _start_or_name_workers(self) -> None:
        if self._start_workers:
            self._start_runners()
        else:
            self.progress.say(self._workers_command())

    async def _validate_trained(self, training: TrainingRun) -> Scores:
        """Scores of the weights as training ended; the learner has ended."""
        return await self.stack.until(self._validate("after"))

    def _last_step(self) -> StepMetrics | None:
        return self._history[max(self._history)] if self._history else None

    @property
    def _validates_by_itself(self) -> bool:
        return setting(self._algorithm.config, "trainer.test_freq") is not None

    @property
    def _temperature(self) -> float:
        return float(setting(self._algorithm.config, "actor_rollout_ref.rollout.temperature", 1.0))

    def _open_folder(self) -> None:
        plan, algorithm = self.plan, self._algorithm
        datasets = dataset_digests(plan.train_dataset, plan.val_dataset)
        old = plan.folder.open(resume=plan.resume)
        if plan.resume and old.get("datasets") != datasets:
            raise TrainerError(
                f"{plan.folder.path} was trained on other datasets (see manifest.json): use the same ones"
            )
        session = {
            **describe_session(self._engine_python or None, self._learner_python),
            "seed": algorithm.seed,
            "config": {
                "model": algorithm.model_path,
                "verl": algorithm.config,
                "engine": [*plan.engine.arguments],
                "n_runners": plan.n_runners,
                "concurrency": plan.runner.concurrency,
                "curriculum": asdict(algorithm.curriculum),
                "rollouts_per_task": algorithm.rollouts_per_task,
                **plan.configuration,
            },
        }
        self._manifest = {
            "run": plan.run_id,
            "training_run_id": plan.training_run_id or f"{plan.run_id}-training",
            "datasets": datasets,
            "validation": {},
            **old,
            "sessions": [*old.get("sessions", []), session],
        }
        plan.folder.write_manifest(self._manifest)

    async def _training_run(self) -> TrainingRun:
        """The training run, made or found."""
        name = str(self._manifest["training_run_id"])
        found = await self.client.get_training_run_by_id(name)
        if found is not None and not self.plan.resume and name != self.plan.training_run_id:
            raise TrainerError(
                f"the store at {self.address} has a training run {name!r} already: choose another run name"
            )
        if found is not None and found.status is TrainingRunStatus.SUCCEEDED:
            raise TrainerError(f"run {self.plan.run_id!r} has finished: there is nothing to resume")
        if found is not None:
            await self._note_manifest(found, self._manifest)
            return found
        wanted = TrainingRun(
            training_run_id=name,
            run_id=self.plan.run_id,
            algorithm=self._algorithm.name,
            config=self._algorithm.config,
            metadata={"model": self._algorithm.model_path, **summary(self._manifest)},
        )
        return await self.client.create_training_run(wanted)

    async def _start_weights(self, training: TrainingRun) -> tuple[str, int]:
        """Folder and policy version of the weights that the engine begins with."""
        if not training.checkpoint_id:
            return self._algorithm.model_path, 0
        folder = hugging_face_folder(self.plan.folder.checkpoints / training.checkpoint_id)
        if not folder.is_dir():
            raise TrainerError(
                f"checkpoint {training.checkpoint_id} is committed, but {folder} does not exist"
            )
        if adapter_folder(folder.parent.parent).is_dir():
            # The learner publishes the adapter, which an engine adds to the model that it was started with.
            return self._algorithm.model_path, 0
        return str(folder), await self._published_version(training)

    async def _published_version(self, training: TrainingRun) -> int:
        """The policy version under which the checkpoint's weights were published."""
        step = int((training.checkpoint_id or "").rpartition("_")[2])
        found: int | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_METRICS_SECONDS):
                changes = self.client.watch_training_run(training.training_run_id, from_step=step)
                async with contextlib.aclosing(changes):  # type: ignore[type-var]  # it is a generator
                    async for _, steps in changes:
                        for item in steps:
                            if item.step == step and PUBLISHED in item.metrics:
                                found = int(item.metrics[PUBLISHED])
                        if found is not None:
                            return found
        # The trainer died between the commit and its report: nothing has been published since.
        versions = await self.client.query_policy_versions(self._algorithm.model_name)
        committed = [item.policy_version for item in versions if item.status is PolicyVersionStatus.COMMITTED]
        return max(committed, default=0)

    def _start_learner(self, training: TrainingRun) -> None:
        """Starts the learner, which tells the training run's log how far it is."""
        plan = self.plan
        more: dict[str, Any] = {}
        if plan.val_dataset and plan.validation.every and not self._validates_by_itself:
            more["trainer.test_freq"] = plan.validation.every
        more |= self._validation_sampling()
        config = self._algorithm.write_run(
            plan.folder.path,
            run_id=plan.run_id,
            training_run_id=training.training_run_id,
            train_dataset=plan.train_dataset,
            val_dataset=plan.val_dataset,
            more=more,
            validation=ValidationConfig(
                queue=plan.validation_queue,
                max_tokens=plan.validation.max_tokens or 0,
                seed=plan.validation.seed,
                timeout=plan.validation.timeout_seconds,
                keep_best=plan.validation.keep_best,
            ),
        )
        self.stack.start(
            lambda: commands.learner_part(
                plan.folder,
                self._learner_python,
                config=config,
                store=self.address,
                resume=plan.resume,
                mark=self.stack.mark,
            ),
            may_end=True,
        )

    def _validation_sampling(self) -> dict[str, Any]:
        """How the learner samples in validation: those of verl's keys that its configuration leaves open."""
        wanted = self.plan.validation
        keys = {"n": wanted.every_samples, "temperature": wanted.temperature, "top_p": wanted.top_p or 1.0}
        named = {f"actor_rollout_ref.rollout.val_kwargs.{key}": value for key, value in keys.items()}
        return {key: value for key, value in named.items() if setting(self._algorithm.config, key) is None}

    async def _follow(self, training_run_id: str, older_epoch: int) -> None:
        """Shows each step as the learner reports it."""
        total = self._total_steps()
        while True:
            async for run, steps in self.client.watch_training_run(training_run_id):
                for item in steps:
                    if self._history.get(item.step) == item:
                        continue  # shown before: each watch begins with the first step
                    self._history[item.step] = item
                    self.progress.step(item.step, total, item.metrics)
                if run is not None and run.status.is_terminal and run.trainer_epoch > older_epoch:
                    return
            # The end that the watch has shown is the one that is being resumed; the learner is on its way.
            await asyncio.sleep(_TAKE_UP_SECONDS)

    async def _read_log(self, training_run_id: str) -> None:
        """Shows lines of the training run's log, alarms for example, that are written from now on."""
        begin = time.time()
        async for line in self.client.watch_training_log(training_run_id):
            if line.time is None or line.time >= begin:
                self.progress.say(line.text)

    def _total_steps(self) -> int | None:
        config = self._algorithm.config
        steps = setting(config, "trainer.total_training_steps")
        if steps is not None:
            return int(steps)
        batch, epochs = setting(config, "data.train_batch_size"), setting(config, "trainer.total_epochs", 1)
        return len(self.plan.train_dataset) // int(batch) * int(epochs) if batch else None

    async def _trained(self, training_run_id: str, following: asyncio.Task[None]) -> TrainingRun:
        """Waits for the learner's end; the training run as it ended."""
        code = await self.stack.until(self.stack.ended("learner"))
        if code != 0:
            # Where its end and its code are noticed at once, the stack has not said so.
            raise PartDied(self.stack.part("learner").obituary())
        await asyncio.wait({following}, timeout=_LAST_METRICS_SECONDS)
        training = await self.client.get_training_run_by_id(training_run_id)
        if training is None or not training.status.is_terminal:
            state = training.status.value if training else "unknown to the store"
            learner = self.stack.part("learner")
            raise PartDied(f"the learner ended, but its training run is {state}: {learner.obituary()}")
        return training

    def _recorded(self, when: str) -> Scores:
        """Scores that an earlier session of this run wrote down."""
        recorded: Mapping[str, Any] = self._manifest["validation"].get(when, {})
        return {name: Evaluation.read(self._validation_file(when, name)) for name in recorded}

    def _validation_file(self, when: str, name: str) -> Path:
        return self.plan.folder.path / "validation" / f"{when}-{name}.json"

    def _workers_command(self) -> str:
        queues = f"--queue {self.plan.run_id} --queue {self.plan.validation_queue}"
        return (
            f"start workers: agl-grpc runner start --agent MODULE:NAME --store {self.address} "
            f"--run {self.plan.run_id} {queues}"
        )

    def _note_scores(self, when: str, scores: Scores) -> None:
        if scores:
            for name, score in scores.items():
                score.write(self._validation_file(when, name))
            self._manifest["validation"][when] = {name: score.summary() for name, score in scores.items()}
            self.plan.folder.write_manifest(self._manifest)

    def _result(
        self,
        training: TrainingRun,
        before: Scores,
        after: Scores,
        counters: dict[str, Any],
        counts: Mapping[RolloutStatus, int],
    ) -> FitResult:
        folder = self.plan.folder
        checkpoint: Path | None = None
        if training.checkpoint_id:
            checkpoint = folder.checkpoints / training.checkpoint_id
        history = [self._history[step] for step in sorted(self._history)]
        self._draw(history, training.step)
        return FitResult(
            folder=folder,
            training_run=training,
            history=history,
            before=before,
            after=after,
            best=read_best(folder.checkpoints),
            checkpoint=checkpoint,
            model=hugging_face_folder(checkpoint) if checkpoint else None,
            captured=counters,
            restarts=self.stack.restarts,
            rollouts=counts,
        )

    async def _captured(self) -> dict[str, Any]:
        if self.plan.llm is not None:
            return {}
        counters = await captured(self.plan.engine.host, self._engine_port, _LAST_CALLS_SECONDS)
        sessions = self._manifest["sessions"]
        sessions[-1]["captured"] = counters
        self.plan.folder.write_manifest(self._manifest)
        return counters

    def _draw(self, history: list[StepMetrics], last: int) -> None:
        recorded: Mapping[str, Any] = self._manifest["validation"]
        points = {
            step: {
                name: float(score["mean"])
                for name, score in recorded[when].items()
                if score["mean"] is not None
            }
            for when, step in (("before", 0), ("after", last))
            if when in recorded
        }
        for item in history:
            if found := scores(item.metrics):
                points.setdefault(item.step, {}).update(
                    {f"{name} (during training)": value for name, value in found.items()}
                )
        picture = self.plan.folder.path / "reward.png"
        try:
            draw_rewards(picture, history, points, f"{self.plan.run_id}: reward")
        except ChartsMissing as missing:
            self.progress.say(str(missing))


def _check_agent(plan: Plan) -> None:
    """Refuses an agent that cannot work with what this run publishes: each of its rollouts would fail."""
    if isinstance(plan.agent, FunctionalLitAgent):
        endpoint = plan.llm or LLM(endpoint="", model="")
        try:
            plan.agent.check_resources(with_llm(plan.initial_resources, plan.engine.resource, endpoint))
        except ResourceMissing as error:
            raise TrainerError(str(error)) from error
