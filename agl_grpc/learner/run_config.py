"""The learner's own configuration file: what to train, on which store, with which limits, and verl's keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import orjson

from agl_grpc.dataset import CurriculumRules, DatasetError, expression
from agl_grpc.diagnosis import AlarmLimits
from agl_grpc.learner.dotted import setting
from agl_grpc.learner.errors import ConfigError
from agl_grpc.model.rollout import RolloutConfig
from agl_grpc.sample import OverLong, SampleRules, Truncated

S = TypeVar("S")


@dataclass(frozen=True)
class ModelConfig:
    """The trained model: ``path`` is a Hugging Face folder, ``name`` the name under which engines serve
    it.
    """

    path: str
    name: str


@dataclass(frozen=True)
class EngineConfig:
    """Engines that must serve every policy version.

    ``count`` 0 publishes nothing (for recorded rollouts). ``receivers`` are the worker processes of an engine
    that each take the weights (its tensor-parallel size). ``host`` is this machine's address as engines reach
    it; ``backend`` is ``auto``, ``gloo`` or ``nccl``.

    ``hybrid``: verl starts the engines, on the accelerators of its own ranks (``count`` and ``receivers``
    then follow from verl's keys); it needs the hybrid environment. They serve at ``host``, or where
    ``ray_address`` names a cluster, at the addresses of its nodes.
    """

    count: int = 1
    receivers: int = 1
    host: str = "127.0.0.1"
    backend: str = "auto"
    hybrid: bool = False

    def __post_init__(self) -> None:
        if self.hybrid and self.backend == "nccl":
            raise ValueError("backend nccl cannot be had with hybrid: engine and rank share an accelerator")


@dataclass(frozen=True)
class TrainedTokens:
    """Which calls are trained, and how rewards count; see ``agl_grpc.sample.SampleRules``.

    ``agents`` empty = all. ``truncated`` says of answers cut by the length limit: ``mask``, ``train`` or
    ``drop``. ``reward_weights`` name several rewards that count as their weighted sum, in place of
    ``reward_name``. ``over_long`` says of rows above ``max_row_tokens`` (0 = no limit): ``drop`` or ``cut``.
    """

    agents: tuple[str, ...] = ()
    truncated: str = "mask"
    reward_name: str = "primary"
    reward_weights: dict[str, float] = field(default_factory=dict)
    max_row_tokens: int = 0
    over_long: str = "drop"
    discount: float = 1.0

    def __post_init__(self) -> None:
        self.rules("")

    def rules(self, model: str) -> SampleRules:
        """The rules for a model. Raises ValueError for what is none of the above."""
        return SampleRules(
            model=model,
            agents=frozenset(self.agents),
            truncated=Truncated(self.truncated),
            reward_name=self.reward_name,
            reward_weights=tuple(sorted(self.reward_weights.items())),
            max_row_tokens=self.max_row_tokens,
            over_long=OverLong(self.over_long),
            discount=self.discount,
        )


@dataclass(frozen=True)
class CheckLimits:
    """Largest difference between sampled and recomputed logprobs, in nats; bf16 engines need about 0.3 and
    0.02.
    """

    logprob_max: float = 1e-4
    logprob_mean: float = 1e-5


@dataclass(frozen=True)
class Deadlines:
    """Seconds: ``start`` for verl's workers to load the model, ``sample`` without a finished group,
    ``compute`` for one phase of the optimiser (logprobs, values, advantages, an update), ``save`` for a
    checkpoint, ``publish`` for a policy version, ``engines`` until enough are connected, ``store`` while it
    does not answer."""

    start: float = 1800.0
    sample: float = 600.0
    compute: float = 1800.0
    save: float = 1800.0
    publish: float = 120.0
    engines: float = 300.0
    store: float = 120.0


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning instead of reinforcement learning (`agl-grpc learner --sft`).

    Rollouts of the run with at least ``min_reward`` are learned, of each group at most the ``best_of_group``
    best (0 = all), in ``epochs`` passes.
    """

    min_reward: float = 1.0
    best_of_group: int = 0
    epochs: int = 1

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.best_of_group < 0:
            raise ValueError("epochs must be 1 or more, best_of_group 0 or more")


@dataclass(frozen=True)
class BestOf:
    """Rejection sampling: of every group the ``keep`` best rollouts with at least ``min_reward`` are learned,
    with verl's supervised loss; 0 = reinforcement learning. ``actor_rollout_ref.rollout.n`` are sampled.
    """

    keep: int = 0
    min_reward: float = 1.0

    def __post_init__(self) -> None:
        if self.keep < 0:
            raise ValueError(f"keep {self.keep} must be 0 or more")


@dataclass(frozen=True)
class ValidationConfig:
    """Validation during training (``trainer.test_freq``); verl's ``rollout.val_kwargs`` say how it samples.

    ``queue`` is that of its rollouts (empty = the run's own), ``max_tokens`` the longest answer of one call
    (0 = the endpoint's), ``seed`` that of its requests, ``timeout`` the seconds for one pass. ``keep_best``
    saves a checkpoint when the score is the best so far, and never deletes it.
    """

    queue: str = ""
    max_tokens: int = 0
    seed: int = 0
    timeout: float = 1800.0
    keep_best: bool = True


@dataclass(frozen=True)
class RunConfig:
    """One training run. Paths may be relative to the working directory.

    ``train_tasks`` and ``val_tasks`` are JSONL files, one task a line. ``verl`` holds verl's keys as they
    are. ``request_seeds`` gives every model call a seed that is made of ``seed``. ``rollouts_per_task`` is an
    expression over a task that says how many rollouts its group has (empty =
    ``actor_rollout_ref.rollout.n``), ``curriculum`` which tasks are preferred. ``failure_limit`` groups in a
    row that cannot be trained end the run. ``keep_checkpoints`` None keeps all. ``visible_devices`` are the
    GPUs of this machine that the learner may use (``"4,5,6,7"``; empty = all). ``ray_address`` names a Ray
    cluster that runs already, for trainers on several nodes (empty = Ray is started here). ``trajectories``
    best, worst and random rollouts each are written down at every step (0 = none). ``reward_endpoint`` is
    where the reward model of verl's ``reward.reward_model`` is served (``http://HOST:8001``).

    Several models of one run: each has a training run and a learner of its own. ``follows`` names the
    training run whose rollouts this one trains its model on; that one names the others' models in
    ``followers``, and waits for their weights before it asks for the next rollouts. Datasets, seed, batch and
    group size are the leader's.
    """

    model: ModelConfig
    train_tasks: str
    output_dir: str
    run_id: str = "default"
    training_run_id: str = ""
    val_tasks: str = ""
    resume: bool = False
    device: str = "auto"
    visible_devices: str = ""
    ray_address: str = ""
    follows: str = ""
    followers: tuple[str, ...] = ()
    seed: int = 0
    request_seeds: bool = False
    rollouts_per_task: str = ""
    curriculum: CurriculumRules = field(default_factory=CurriculumRules)
    failure_limit: int = 64
    keep_checkpoints: int | None = 3
    engines: EngineConfig = field(default_factory=EngineConfig)
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    samples: TrainedTokens = field(default_factory=TrainedTokens)
    checks: CheckLimits = field(default_factory=CheckLimits)
    deadlines: Deadlines = field(default_factory=Deadlines)
    sft: SftConfig = field(default_factory=SftConfig)
    best_of: BestOf = field(default_factory=BestOf)
    alarms: AlarmLimits = field(default_factory=AlarmLimits)
    trajectories: int = 2
    reward_endpoint: str = ""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    verl: dict[str, Any] = field(default_factory=dict)

    @property
    def algorithm(self) -> str:
        """What the store calls it: ``verl``, or ``best_of_n``."""
        return "best_of_n" if self.best_of.keep else "verl"


def _build(kind: type[S], data: Mapping[str, Any], path: str) -> S:
    hints = get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]  # always a dataclass
    for key in data:
        if key not in fields:
            raise ConfigError(
                f"unknown key {path + key!r} in the learner's configuration; known: {', '.join(fields)}"
            )
    values: dict[str, Any] = {}
    for name, item in fields.items():
        if name not in data:
            if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
                raise ConfigError(f"the learner's configuration lacks {path + name!r}")
            continue
        value = data[name]
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{path + name!r} must be a mapping, not {value!r}")
            value = _build(hint, value, f"{path}{name}.")
        elif isinstance(value, list):
            value = tuple(value)
        elif hint in (str, int, float, bool) and not isinstance(
            value, (int, float) if hint is float else hint
        ):
            raise ConfigError(f"{path + name!r} must be {hint.__name__}, not {value!r}")
        values[name] = value
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigError(f"{path.rstrip('.') or 'the configuration'}: {error}") from error


def settings(name: str, given: S | Mapping[str, Any] | None, kind: type[S]) -> S:
    """A section of the configuration: as it is, from a mapping of its fields, or its defaults."""
    if given is None:
        return kind()
    return _build(kind, given, f"{name}.") if isinstance(given, Mapping) else given


def refuse_for_several(curriculum: CurriculumRules, verl: Mapping[str, Any]) -> None:
    """Refuses what would have the models of one run walk through different tasks.

    Raises:
        ConfigError: see above.
    """
    if curriculum.enabled:
        raise ConfigError(
            "a curriculum is not possible where several models are trained: leave curriculum out"
        )
    if setting(verl, "algorithm.filter_groups.enable"):
        raise ConfigError(
            "algorithm.filter_groups is not possible where several models are trained: a group may be worth "
            "something to one of them only; leave it out"
        )


def from_mapping(data: Mapping[str, Any]) -> RunConfig:
    """A run's configuration from plain data; ConfigError names the first key that is unknown, missing or
    wrong.
    """
    config = _build(RunConfig, data, "")
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"'device' must be auto, cpu or cuda, not {config.device!r}")
    if config.trajectories < 0:
        raise ConfigError(f"'trajectories' {config.trajectories} must be 0 or more")
    if config.follows or config.followers:
        refuse_for_several(config.curriculum, config.verl)
    try:
        expression(config.rollouts_per_task or "1")
    except DatasetError as error:
        raise ConfigError(f"'rollouts_per_task': {error}") from error
    if not Path(config.model.path).expanduser().is_dir():
        raise ConfigError(f"model folder {config.model.path} does not exist")
    for path in filter(None, (config.train_tasks, config.val_tasks)):
        if not Path(path).expanduser().is_file():
            raise ConfigError(f"task file {path} does not exist")
    return config


def load(path: str) -> RunConfig:
    """Reads a configuration file (JSON, or YAML by its suffix)."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"configuration file {path} does not exist")
    if file.suffix in (".yaml", ".yml"):
        import yaml

        data = yaml.safe_load(file.read_text())
    else:
        try:
            data = orjson.loads(file.read_bytes())
        except orjson.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping")
    return from_mapping(data)
