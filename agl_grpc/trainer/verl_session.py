"""A training run with verl: engine and learner in environments of their own, workers here."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agl_grpc.agent.decorators import FunctionalLitAgent
from agl_grpc.agent.missing import ResourceMissing
from agl_grpc.algorithm import VERL
from agl_grpc.algorithm.several import LORA_RANK
from agl_grpc.client import StoreError
from agl_grpc.evaluation import Evaluation
from agl_grpc.learner.dotted import setting
from agl_grpc.learner.progress import scores
from agl_grpc.model import LLM, RolloutStatus
from agl_grpc.model.enums import TrainingRunStatus
from agl_grpc.model.training import StepMetrics
from agl_grpc.trainer.charts import ChartsMissing, draw_rewards
from agl_grpc.trainer.errors import PartDied, TrainerError
from agl_grpc.trainer.model_training import ModelTraining
from agl_grpc.trainer.options import EngineOptions, find_python
from agl_grpc.trainer.plan import Plan, with_endpoints
from agl_grpc.trainer.progress import Progress
from agl_grpc.trainer.readiness import captured, summed
from agl_grpc.trainer.result import FitResult, Scores
from agl_grpc.trainer.run_folder import dataset_digests, describe_session, summary
from agl_grpc.trainer.session import Session

_LAST_CALLS_SECONDS = 30.0
# What vLLM takes as --max-lora-rank; 16 unless it is told.
_MOST_RANKS = (16, 32, 64, 128, 256, 320, 512)


class VerlSession(Session[FitResult]):
    """Starts store, engines, learners and workers, follows the training, validates before and after.

    Each trained model has a learner. The first model's asks for the rollouts, the others' train on the same
    ones; when one fails, the others save what they have trained and end.
    """

    def __init__(
        self, plan: Plan, progress: Progress, algorithm: VERL, *, start_workers: bool = True
    ) -> None:
        super().__init__(plan, progress)
        self._algorithm = algorithm
        each = algorithm.of_each_model()
        self._models = [
            ModelTraining(plan, one, name if algorithm.models else "") for name, one in each.items()
        ]
        self._served = algorithm.served()
        self._check()
        self._start_workers = start_workers
        self._engine_python, self._learner_python = self._pythons()
        self._manifest: dict[str, Any] = {}
        # What each engine begins with, for people.
        self._versions: list[str] = []

    def _check(self) -> None:
        """Refuses what could not work, before anything is started."""
        plan = self.plan
        if self._algorithm.models and plan.engine.resource != EngineOptions.resource:
            raise TrainerError(
                f"llm_proxy.resource is {plan.engine.resource!r}, but with several models agents find each "
                "under its own name: leave it out"
            )
        if plan.engine.port and len(self._served) > 1:
            raise TrainerError(
                f"llm_proxy.port is one, and {len(self._served)} engines are started: leave it out"
            )
        _check_agent(plan, [model.resource for model in self._models])

    @property
    def starts_processes(self) -> bool:
        return self._start_workers

    def _pythons(self) -> tuple[str, str]:
        """Python of the engine's environment, empty = none is started, and of the learner's."""
        plan = self.plan
        learner = find_python("learner", plan.learner_python)
        return "" if plan.llm else find_python("engine", plan.engine_python), learner

    @property
    def _leader(self) -> ModelTraining:
        return self._models[0]

    def _model_folder(self) -> Path | None:
        return Path(self._leader.algorithm.model_path).expanduser()

    async def _work(self) -> FitResult:
        plan = self.plan
        await self._take_up()
        before = self._recorded("before")
        untrained = not any(model.record.checkpoint_id for model in self._models) and not before
        validates = bool(plan.val_dataset) and plan.validation.before and untrained
        await self.client.resume_dispatch()
        await self._start_parts(validates)
        self.progress.phase("starting engine, learner and workers")
        try:
            await self.stack.until(self._engine_ready())
            for served in self._versions:
                self.progress.say(served)
            if validates:
                before = await self.stack.until(self._validate("before"))
                self._note_scores("before", before)
            # The first step may not change the weights under a validation that is still going on.
            await self.client.resume_dispatch(queue=plan.run_id)
            self.progress.phase("training")
            await self.stack.until(self._trained())
        except PartDied:
            await self._save_others()
            raise
        finally:
            for model in self._models:
                await model.unfollow()
        after = {}
        if plan.val_dataset and plan.validation.after and all(model.succeeded for model in self._models):
            after = await self._validate_trained()
            self._note_scores("after", after)
        counters = await self.stack.until(self._captured())
        counts = await self._rollout_counts()
        return self._result(before, after, counters, counts)

    async def _start_parts(self, validates: bool) -> None:
        """Starts engines, learners and workers; ``validates``: training's rollouts wait for a validation."""
        await self._publish(await self._start_engines(), self._temperatures)
        if validates:
            await self.client.pause_dispatch(queue=self.plan.run_id)
        self._start_learners()
        self._start_or_name_workers()

    def _start_or_name_workers(self) -> None:
        if self._start_workers:
            self._start_runners()
        else:
            self.progress.say(self._workers_command())

    async def _validate_trained(self) -> Scores:
        """Scores of the weights as training ended; the learners have ended."""
        return await self.stack.until(self._validate("after"))

    @property
    def _temperatures(self) -> dict[str, float]:
        """Those of training, by the names under which agents find the models."""
        return {model.resource: model.temperature for model in self._models}

    def _last_step(self) -> StepMetrics | None:
        return self._leader.last_step

    def _open_folder(self) -> None:
        plan, models = self.plan, self._algorithm.models
        datasets = dataset_digests(plan.train_dataset, plan.val_dataset)
        old = plan.folder.open(resume=plan.resume)
        if plan.resume and old.get("datasets") != datasets:
            raise TrainerError(
                f"{plan.folder.path} was trained on other datasets (see manifest.json): use the same ones"
            )
        begun = old.get("models", [])
        if plan.resume and begun != list(models):
            raise TrainerError(
                f"{plan.folder.path} was begun with {', '.join(begun) or 'one model'} (see manifest.json): "
                "train the same models, in the same order"
            )
        session = {
            **describe_session(self._engine_python or None, self._learner_python),
            "seed": self._algorithm.seed,
            "config": self._configuration(),
        }
        self._manifest = {
            "run": plan.run_id,
            "training_run_id": plan.training_run_id or f"{plan.run_id}-training",
            **({"models": list(models)} if models else {}),
            "datasets": datasets,
            "validation": {},
            **old,
            "sessions": [*old.get("sessions", []), session],
        }
        plan.folder.write_manifest(self._manifest)

    def _configuration(self) -> dict[str, Any]:
        plan, algorithm = self.plan, self._algorithm
        models = {name: {"verl": own.config} for name, own in algorithm.models.items()}
        return {
            "model": self._leader.algorithm.model_path,
            "verl": algorithm.config,
            **({"models": models} if models else {}),
            "engine": [*plan.engine.arguments],
            "n_runners": plan.n_runners,
            "concurrency": plan.runner.concurrency,
            "curriculum": asdict(algorithm.curriculum),
            "rollouts_per_task": algorithm.rollouts_per_task,
            **plan.configuration,
        }

    async def _take_up(self) -> None:
        """Makes or finds each model's training run; those that follow have their model's name too."""
        name = str(self._manifest["training_run_id"])
        may_exist = self.plan.resume or name == self.plan.training_run_id
        for model in self._models:
            own = name if model is self._leader else f"{name}-{model.name}"
            found = await model.take_up(self.client, own, summary(self._manifest), may_exist=may_exist)
            if found and model is self._leader:
                await self._note_manifest(model.record, self._manifest)
        if all(model.succeeded for model in self._models):
            raise TrainerError(f"run {self.plan.run_id!r} has finished: there is nothing to resume")

    async def _start_engines(self) -> dict[str, LLM]:
        """Starts what serves the models; each one's endpoint, by the name under which agents find it."""
        models = {model.name or model.algorithm.model_name: model for model in self._models}
        found: dict[str, LLM] = {}
        for engine in self._served:
            path, version = engine.path, 0
            if not engine.adapters:
                path, version = await models[engine.model_name].start_weights()
            llm = self._start_engine(
                self._engine_python,
                path,
                engine.model_name,
                version,
                arguments=self._adapter_arguments([models[name] for name in engine.adapters]),
                part="engine" if len(self._served) == 1 else f"engine-{engine.model_name}",
            )
            adapters = f" and {len(engine.adapters)} adapters of it" if engine.adapters else ""
            self._versions.append(
                f"the engine serves policy version {version} of {engine.model_name}{adapters}"
            )
            for name in engine.trained:
                found[name] = dataclasses.replace(llm, model=name) if models[name].name else llm
        return {model.resource: found[name] for name, model in models.items()}

    def _adapter_arguments(self, adapters: Sequence[ModelTraining]) -> list[str]:
        """The engine's arguments for adapters; the user's own come after them and count."""
        if not adapters:
            return []
        rank = max(int(setting(model.algorithm.config, LORA_RANK)) for model in adapters)
        named = [word for model in adapters for word in ("--adapter", model.adapter_argument)]
        return [*named, "--max-lora-rank", str(next((most for most in _MOST_RANKS if most >= rank), rank))]

    def _start_learners(self) -> None:
        """Starts a learner for each model that is not trained to the end, the one that leads first."""
        running = [model for model in self._models if not model.succeeded]
        followers = [model.name for model in running if model is not self._leader]
        leads = self._leader.record.training_run_id
        for model in running:
            part: dict[str, Any] = {"followers": followers} if model is self._leader else {"follows": leads}
            make = model.learner(self.address, self._learner_python, self.stack.mark, **part)
            self.stack.start(make, may_end=True)
            model.follow(self.progress)

    async def _trained(self) -> None:
        """Waits for the end of every learner; where one was asked to stop, the others are too."""
        running = [model for model in self._models if not model.succeeded]
        ends = [asyncio.create_task(model.ended(self.stack)) for model in running]
        try:
            for end in asyncio.as_completed(ends):
                if (await end).status is TrainingRunStatus.STOPPED:
                    await self._ask_to_stop(self._still_running(), "another model of the run was stopped")
        finally:
            for task in ends:
                task.cancel()
            await asyncio.wait(ends)

    def _still_running(self) -> list[ModelTraining]:
        started = [model for model in self._models if self.stack.has(model.part)]
        return [model for model in started if self.stack.part(model.part).code is None]

    async def _ask_to_stop(self, models: Sequence[ModelTraining], reason: str) -> None:
        for model in models:
            try:
                await self.client.stop_training_run(model.record.training_run_id, reason)
            except StoreError as error:
                # It has ended meanwhile, or the store is away too; the process is ended with the others.
                self.progress.say(f"{model.name} could not be asked to stop: {error}")

    async def _save_others(self) -> None:
        """Has the learners beside one that failed save what they have trained, and end."""
        failed = [model for model in self._models if self.stack.has(model.part)]
        if len(self._models) == 1 or not any(self.stack.part(model.part).code for model in failed):
            return
        try:
            others = [model for model in self._still_running() if await model.has_unsaved_steps()]
        except StoreError as error:
            self.progress.say(f"the other learners cannot be asked to save: {error}")
            return
        if not others:
            return
        self.progress.phase(f"saving what was trained of {', '.join(model.name for model in others)}")
        await self._ask_to_stop(others, "another model's learner failed")
        limits = [model.algorithm.deadlines for model in others]
        ended = [asyncio.create_task(self.stack.ended(model.part)) for model in others]
        _, waiting = await asyncio.wait(ended, timeout=max(limit.compute + limit.save for limit in limits))
        for task in waiting:
            task.cancel()

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
        self, before: Scores, after: Scores, counters: dict[str, Any], counts: Mapping[RolloutStatus, int]
    ) -> FitResult:
        results = {model.name or model.algorithm.model_name: model.result for model in self._models}
        self._draw()
        leader = self._leader.result
        return FitResult(
            folder=self.plan.folder,
            training_run=leader.training_run,
            history=leader.history,
            before=before,
            after=after,
            best=leader.best,
            checkpoint=leader.checkpoint,
            model=leader.model,
            models=results,
            captured=counters,
            restarts=self.stack.restarts,
            rollouts=counts,
        )

    async def _captured(self) -> dict[str, Any]:
        if self.plan.llm is not None:
            return {}
        host, ports = self.plan.engine.host, self._engine_ports.values()
        counters = summed([await captured(host, port, _LAST_CALLS_SECONDS) for port in ports])
        sessions = self._manifest["sessions"]
        sessions[-1]["captured"] = counters
        self.plan.folder.write_manifest(self._manifest)
        return counters

    def _draw(self) -> None:
        recorded: Mapping[str, Any] = self._manifest["validation"]
        points = {
            step: {
                name: float(score["mean"])
                for name, score in recorded[when].items()
                if score["mean"] is not None
            }
            for when, step in (("before", 0), ("after", self._leader.record.step))
            if when in recorded
        }
        histories = {model.name: model.result.history for model in self._models}
        for item in self._leader.history.values():
            if found := scores(item.metrics):
                points.setdefault(item.step, {}).update(
                    {f"{name} (during training)": value for name, value in found.items()}
                )
        picture = self.plan.folder.path / "reward.png"
        try:
            draw_rewards(picture, histories, points, f"{self.plan.run_id}: reward")
        except ChartsMissing as missing:
            self.progress.say(str(missing))


def _check_agent(plan: Plan, names: Sequence[str]) -> None:
    """Refuses an agent that cannot work with what this run publishes: each of its rollouts would fail."""
    if isinstance(plan.agent, FunctionalLitAgent):
        endpoint = plan.llm or LLM(endpoint="", model="")
        try:
            plan.agent.check_resources(with_endpoints(plan.initial_resources, dict.fromkeys(names, endpoint)))
        except ResourceMissing as error:
            raise TrainerError(str(error)) from error
