"""`VERL`: reinforcement learning of model weights with verl, by a learner in an environment of its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from agl_grpc.algorithm.base import Algorithm
from agl_grpc.algorithm.several import LORA_RANK, ModelSettings, Served, engines_of, read_models
from agl_grpc.dataset import CurriculumRules
from agl_grpc.diagnosis import AlarmLimits
from agl_grpc.learner.dotted import setting
from agl_grpc.learner.errors import ConfigError
from agl_grpc.learner.run_config import (
    BestOf,
    CheckLimits,
    Deadlines,
    EngineConfig,
    RunConfig,
    TrainedTokens,
    ValidationConfig,
    refuse_for_several,
    settings,
)
from agl_grpc.model.rollout import RolloutConfig

# verl's key by which a learner's rows are in its TransferQueue, not in the learner's memory.
_QUEUE = "transfer_queue.enable"


class VERL(Algorithm):
    """Settings of a training run with verl. `Trainer.fit` writes them down and starts the learner with them.

    Args:
        config: verl's keys as they are, nested or dotted, or the path of a YAML or JSON file with them.
            ``actor_rollout_ref.model.path`` names the model. Unknown keys are refused by the learner, by
            name.
        models: several models that one run trains, each on the calls that it answered: by the name under
            which agents find and call it, what it has of its own (`ModelSettings`, or a mapping of its
            fields; ``{}`` = nothing). The first leads: its learner asks for the rollouts, the others' follow.
            None = one model.
        model_name: the name under which engines serve the model, or the base of several adapters; default:
            the folder's name.
        device: ``auto``, ``cpu`` or ``cuda``, of the learner.
        visible_devices: GPUs that the learner may use, such as ``"4,5,6,7"``; empty = all.
        ray_address: a Ray cluster that runs already, for a learner on several nodes; empty = none.
        seed: of data order, initialisation and sampling: every model call gets a seed made of it. None = 0,
            and engines sample as they like (on GPUs, vLLM is a little slower with seeds).
        rollouts_per_task: an expression over a task that says how many rollouts its group has, for example
            ``8 if level > 3 else 4``; empty = ``actor_rollout_ref.rollout.n``.
        curriculum: which tasks are preferred, by how often they are solved.
        engines: how many engines, and how they are reached.
        rollouts: rules of every rollout's life.
        samples: what is trained of an attempt.
        checks: limits between sampled and recomputed logprobs.
        deadlines: of the learner's phases.
        alarms: limits of the alarms, and which of them end the run.
        trajectories: best, worst and random rollouts each, written down at every step; 0 = none.
        reward_endpoint: where the reward model of verl's ``reward.reward_model`` is served, such as
            ``http://HOST:8001``.
        keep_checkpoints: how many finished checkpoints stay; None = all.

    ``engines``, ``rollouts``, ``samples``, ``checks``, ``alarms`` and ``deadlines`` may also be given as
    mappings of their fields, as a configuration file has them.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | str | Path,
        *,
        models: Mapping[str, Any] | None = None,
        model_name: str = "",
        device: str = "auto",
        visible_devices: str = "",
        ray_address: str = "",
        seed: int | None = None,
        rollouts_per_task: str = "",
        curriculum: CurriculumRules | Mapping[str, Any] | None = None,
        engines: EngineConfig | Mapping[str, Any] | None = None,
        rollouts: RolloutConfig | Mapping[str, Any] | None = None,
        samples: TrainedTokens | Mapping[str, Any] | None = None,
        checks: CheckLimits | Mapping[str, Any] | None = None,
        deadlines: Deadlines | Mapping[str, Any] | None = None,
        alarms: AlarmLimits | Mapping[str, Any] | None = None,
        trajectories: int = 2,
        reward_endpoint: str = "",
        keep_checkpoints: int | None = 3,
    ) -> None:
        super().__init__()
        self.config = _read(config)
        self.models = read_models(models)
        self.model_path = "" if self.models else _model_path(self.config)
        self.model_name = model_name or Path(self.model_path).name
        self.device = device
        self.visible_devices = visible_devices
        self.ray_address = ray_address
        self.seed = seed or 0
        self.request_seeds = seed is not None
        self.rollouts_per_task = rollouts_per_task
        self.curriculum = settings("curriculum", curriculum, CurriculumRules)
        self.engines = settings("engines", engines, EngineConfig)
        self.rollouts = settings("rollouts", rollouts, RolloutConfig)
        self.samples = settings("samples", samples, TrainedTokens)
        self.checks = settings("checks", checks, CheckLimits)
        self.alarms = settings("alarms", alarms, AlarmLimits)
        self.trajectories = trajectories
        self.reward_endpoint = reward_endpoint
        self.deadlines = settings("deadlines", deadlines, Deadlines)
        self.keep_checkpoints = keep_checkpoints
        self.best_of = BestOf()
        if self.models:
            self._check_several()

    def _check_several(self) -> None:
        if len(self.models) > 1:
            refuse_for_several(self.curriculum, self.config)
        queues = [name for name, one in self.of_each_model().items() if setting(one.config, _QUEUE)]
        if self.ray_address and len(queues) > 1:
            raise ConfigError(
                f"{_QUEUE}: the Ray cluster in ray_address has room for one TransferQueue, and the learners "
                f"of {', '.join(queues)} would each have one: leave one of the two out"
            )
        self.served()

    def served(self) -> list[Served]:
        """The engines that serve what is trained: adapters of one base share one."""
        if not self.models:
            return [Served(self.model_path, self.model_name)]
        each = self.of_each_model()
        about = {name: (one.model_path, int(setting(one.config, LORA_RANK, 0))) for name, one in each.items()}
        return engines_of(about, self.model_name)

    def of_each_model(self) -> dict[str, VERL]:
        """The settings of each trained model's learner by the model's name, the one that leads first."""
        if not self.models:
            return {self.model_name: self}
        return {name: self._of_model(name, own) for name, own in self.models.items()}

    def _of_model(self, name: str, own: ModelSettings) -> VERL:
        one = copy.copy(self)
        vars(one).update(own.options(name))
        one.models, one.model_name = {}, name
        one.config = own.over(self.config)
        try:
            one.model_path = _model_path(one.config)
        except ConfigError as error:
            raise ConfigError(f"models.{name}: {error}") from error
        return one

    def set_seed(self, seed: int) -> None:
        """Seeds data order, initialisation and every model call."""
        self.seed, self.request_seeds = seed, True

    def write_run(
        self,
        folder: Path,
        *,
        run_id: str,
        training_run_id: str,
        train_dataset: Sequence[Any],
        val_dataset: Sequence[Any] | None = None,
        more: Mapping[str, Any] | None = None,
        validation: ValidationConfig | None = None,
        follows: str = "",
        followers: Sequence[str] = (),
    ) -> Path:
        """Writes tasks and configuration for ``agl-grpc learner --config``; answers the configuration's path.

        ``folder`` also becomes the learner's output folder (checkpoints, TensorBoard files). Items of the
        datasets must be JSON values: they reach agents as rollout inputs. ``more`` are dotted keys of verl
        that this run has besides ``config``; ``validation`` says how the learner validates; ``follows`` and
        ``followers`` are those of `RunConfig`, for one of several models.
        """
        folder.mkdir(parents=True, exist_ok=True)
        train = _write_tasks(folder / "train.jsonl", train_dataset)
        val = _write_tasks(folder / "val.jsonl", val_dataset) if val_dataset else ""
        run = {
            "model": {"path": self.model_path, "name": self.model_name},
            "train_tasks": train,
            "val_tasks": val,
            "output_dir": str(folder),
            "run_id": run_id,
            "training_run_id": training_run_id,
            "device": self.device,
            "visible_devices": self.visible_devices,
            "ray_address": self.ray_address,
            "follows": follows,
            "followers": list(followers),
            "seed": self.seed,
            "request_seeds": self.request_seeds,
            "rollouts_per_task": self.rollouts_per_task,
            "curriculum": asdict(self.curriculum),
            "keep_checkpoints": self.keep_checkpoints,
            "engines": asdict(self.engines),
            "rollouts": asdict(self.rollouts),
            "samples": asdict(self.samples),
            "best_of": asdict(self.best_of),
            "checks": asdict(self.checks),
            "deadlines": asdict(self.deadlines),
            "alarms": asdict(self.alarms),
            "trajectories": self.trajectories,
            "reward_endpoint": self.reward_endpoint,
            "validation": asdict(validation or ValidationConfig()),
            "verl": {**self.config, **(more or {})},
        }
        assert set(run) <= set(RunConfig.__dataclass_fields__)
        path = folder / "run.json"
        path.write_bytes(orjson.dumps(run, option=orjson.OPT_INDENT_2))
        return path

    def run(
        self, train_dataset: Sequence[Any] | None = None, val_dataset: Sequence[Any] | None = None
    ) -> Any:
        """Weights are trained in the learner's process: `Trainer.fit` starts it, not this object."""
        raise TypeError("VERL is run by Trainer.fit, which starts engine and learner in their environments")


def _read(config: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config).expanduser()
    if not path.is_file():
        raise ConfigError(f"verl configuration {path} does not exist")
    if path.suffix in (".yaml", ".yml"):
        import yaml

        data = yaml.safe_load(path.read_text())
    else:
        data = orjson.loads(path.read_bytes())
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of verl's keys")
    return data


def _model_path(config: Mapping[str, Any]) -> str:
    path = setting(config, "actor_rollout_ref.model.path")
    if not isinstance(path, str):
        raise ConfigError("the verl configuration names no model: set actor_rollout_ref.model.path")
    return path


def _write_tasks(path: Path, tasks: Sequence[Any]) -> str:
    with path.open("wb") as file:
        for number, task in enumerate(tasks):
            try:
                file.write(orjson.dumps(task, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))
            except TypeError as error:
                raise ConfigError(f"task {number} cannot be written as JSON: {error}") from error
    return str(path)
