"""Several models of one training run: what each has of its own, and what has to be one for all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agl_grpc.learner.dotted import expand, merged, setting
from agl_grpc.learner.errors import ConfigError
from agl_grpc.learner.run_config import CheckLimits, EngineConfig, TrainedTokens, settings

LORA_RANK = "actor_rollout_ref.model.lora_rank"
# All models walk through the same rollouts, step by step, and are saved after the same steps.
_SHARED = (
    "data",
    "algorithm.filter_groups",
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.val_kwargs",
    *("trainer.total_training_steps", "trainer.total_epochs", "trainer.save_freq"),
    *("trainer.test_freq", "trainer.val_before_train", "trainer.v1"),
)
# It names a folder, a resource and an adapter.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class ModelSettings:
    """What one of several models has of its own; what is left out is as `VERL` says for all.

    Attributes:
        config: verl's keys of this model, nested or dotted, before those of all: another
            ``actor_rollout_ref.model.path``, another learning rate.
        device: ``auto``, ``cpu`` or ``cuda``, of its learner; empty = as for all.
        visible_devices: GPUs that its learner may use; empty = as for all.
        engines: how many engines serve it, and how they are reached.
        samples: what is trained of an attempt.
        checks: limits between sampled and recomputed logprobs.
    """

    config: dict[str, Any] = field(default_factory=dict)
    device: str = ""
    visible_devices: str = ""
    engines: EngineConfig | Mapping[str, Any] | None = None
    samples: TrainedTokens | Mapping[str, Any] | None = None
    checks: CheckLimits | Mapping[str, Any] | None = None

    def over(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """verl's keys of all models with this model's own before them."""
        return merged(expand(config), expand(self.config))

    def options(self, name: str) -> dict[str, Any]:
        """The other settings of this model that differ from those of all, by the attribute of `VERL`."""
        kinds = {"engines": EngineConfig, "samples": TrainedTokens, "checks": CheckLimits}
        given = {key: getattr(self, key) for key in ("device", "visible_devices", *kinds)}
        return {
            key: settings(f"models.{name}.{key}", value, kinds[key]) if key in kinds else value
            for key, value in given.items()
            if value
        }


def read_models(models: Mapping[str, Any] | None) -> dict[str, ModelSettings]:
    """The settings of each model by its name, the one that leads first; none = there is only one model.

    Raises:
        ConfigError: a name or a setting cannot be used; says which.
    """
    if models is None:
        return {}
    if not isinstance(models, Mapping) or not models:
        raise ConfigError("models must name the trained models, for example {'planner': {}, 'solver': {}}")
    return {name: _read_model(name, own) for name, own in models.items()}


def _read_model(name: Any, own: Any) -> ModelSettings:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"models: {name!r} cannot be a model's name: it must be 1 to 64 letters, digits, dots, dashes or "
            "underscores, with a letter or digit first"
        )
    if own is not None and not isinstance(own, Mapping | ModelSettings):
        raise ConfigError(f"models.{name} must be a mapping of what the model has of its own, not {own!r}")
    made = settings(f"models.{name}", own, ModelSettings)
    if not isinstance(made.config, Mapping):
        raise ConfigError(f"models.{name}.config must be a mapping of verl's keys, not {made.config!r}")
    for key in _SHARED:
        if setting(expand(made.config), key) is not None:
            raise ConfigError(
                f"models.{name}.config sets {key}, which is one for all models of a run: set it in config"
            )
    return made


@dataclass(frozen=True)
class Served:
    """One engine: the model folder that it loads, the name of that model, and adapters of it.

    Without adapters the model itself is trained, under that name.
    """

    path: str
    model_name: str
    adapters: tuple[str, ...] = ()

    @property
    def trained(self) -> tuple[str, ...]:
        """The trained models that it serves."""
        return self.adapters or (self.model_name,)


def engines_of(models: Mapping[str, tuple[str, int]], base_name: str = "") -> list[Served]:
    """Which engines serve several models: adapters of one base share one, every other model has its own.

    Args:
        models: each model's folder and LoRA rank (0 = whole weights) by its name.
        base_name: the name under which a base of adapters is served; empty = its folder's name.

    Raises:
        ConfigError: they cannot be trained beside each other.
    """
    by_path: dict[str, list[str]] = {}
    for name, (path, _) in models.items():
        by_path.setdefault(path, []).append(name)
    found: list[Served] = []
    for path, names in by_path.items():
        adapters = tuple(name for name in names if models[name][1])
        if adapters and len(adapters) < len(names):
            whole = next(name for name in names if name not in adapters)
            raise ConfigError(
                f"models: {adapters[0]!r} is an adapter of {path}, whose weights {whole!r} trains: an "
                f"adapter is made for weights that stay as they are; set {LORA_RANK} for both, or give one "
                "of them a folder of its own"
            )
        if len(adapters) > 1:
            found.append(Served(path, base_name or path.rstrip("/").rpartition("/")[2], adapters))
        else:
            found += [Served(path, name) for name in names]
    _check_names(found, models)
    return found


def _check_names(engines: list[Served], models: Mapping[str, Any]) -> None:
    bases = [engine.model_name for engine in engines if engine.adapters]
    for place, name in enumerate(bases):
        if name in models or name in bases[:place]:
            raise ConfigError(
                f"models: the base of the adapters is served as {name!r}, and so is another model: name it "
                "otherwise by model_name, or rename its folder"
            )
