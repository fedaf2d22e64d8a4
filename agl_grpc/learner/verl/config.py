"""verl's configuration: its own tree, our defaults for engines outside verl, the user's keys on top.

The user writes verl's keys as they are (``{"algorithm": {"adv_estimator": "grpo"}, …}``). A key that verl
does not know is refused by name; a few are held by us because the learner's engines live outside verl.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from agl_grpc.learner.dotted import expand
from agl_grpc.learner.errors import ConfigError
from agl_grpc.learner.verl.keys import TRAINER_MODES, check_keys, check_names

_ENGINE_CPU: dict[str, Any] = {
    "strategy": "fsdp2",
    "use_torch_compile": False,
    "mixed_precision": {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
}
_MODEL_CPU: dict[str, Any] = {
    "use_remove_padding": False,
    "enable_gradient_checkpointing": False,
    "override_config": {"attn_implementation": "sdpa"},
}

_DEFAULTS: dict[str, Any] = {
    "data": {
        "custom_cls": {"path": "pkg://agl_grpc.learner.rollouts.dataset", "name": "TaskDataset"},
        "dataloader_num_workers": 0,
        "train_batch_size": 32,
    },
    "actor_rollout_ref": {
        "actor": {
            "strategy": "fsdp2",
            "use_dynamic_bsz": True,
            "fsdp_config": {"strategy": "fsdp2"},
            "checkpoint": {"save_contents": ["model", "optimizer", "extra", "hf_model"]},
        },
        "rollout": {"n": 4, "val_kwargs": {"n": 1}, "tensor_model_parallel_size": 1},
    },
    "critic": {"strategy": "fsdp2", "fsdp": {"strategy": "fsdp2"}},
    "algorithm": {"adv_estimator": "grpo", "rollout_correction": {"bypass_mode": False}},
    # Rewards come with the rollouts, unless the user names verl's (see ``reward_loop.py``).
    "reward": {"num_workers": 0},
    "trainer": {
        "n_gpus_per_node": 1,
        "nnodes": 1,
        "val_before_train": False,
        "test_freq": -1,
        "save_freq": 20,
        "total_epochs": 1,
        "project_name": "agl-grpc",
        # Metrics go to our own sinks, with our names beside verl's.
        "logger": [],
        "resume_mode": "disable",
        "v1": {"separate_async": {"num_warmup_batches": 0}, "sampler": {"max_off_policy_threshold": 1}},
    },
    "transfer_queue": {"backend": {"SimpleStorage": {"num_data_storage_units": 1}}},
}
_EXTERNAL_ROLLOUT: dict[str, Any] = {"n_gpus_per_node": 1, "tensor_model_parallel_size": 1}
HYBRID_KEY = "agl"
"""Where in verl's ``rollout.custom`` the engines that verl starts are told what they serve, and for whom."""
_DEFAULTS_CPU: dict[str, Any] = {
    "actor_rollout_ref": {
        "model": _MODEL_CPU,
        "actor": {"use_torch_compile": False, "fsdp_config": _ENGINE_CPU},
        "ref": {"fsdp_config": _ENGINE_CPU},
    },
    "critic": {"model": _MODEL_CPU, "fsdp": _ENGINE_CPU},
}


def _held(device: str, hybrid: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that follow from engines outside verl, or started by verl and then used like those; whatever the
    user wrote there is replaced.
    """
    engines = _hybrid_rollout(device, hybrid) if hybrid else _EXTERNAL_ROLLOUT
    return {
        "actor_rollout_ref": {
            "hybrid_engine": False,
            "rollout": {
                "name": "agl_external",
                # Not the number of nodes: verl's separate_async trainer insists on one at least.
                "nnodes": 1,
                **engines,
                "calculate_log_probs": True,
                "checkpoint_engine": {
                    "backend": "agl",
                    "custom_backend_module": "agl_grpc.learner.verl.sender",
                },
            },
        },
        "trainer": {"device": device, "use_v1": True, "v1": {"trainer_mode": "separate_async"}},
    }


def _hybrid_rollout(device: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of engines that verl starts: they load the model from disk, keep their memory, and are told
    ``told``.
    """
    rollout = {"load_format": "auto", "free_cache_engine": False, "enable_sleep_mode": False}
    small = {"dtype": "float32", "enforce_eager": True} if device == "cpu" else {}
    return {**rollout, **small, "custom": {HYBRID_KEY: dict(told)}}


def _chosen(config: DictConfig, user: Mapping[str, Any], *path: str) -> bool:
    node: Any = user
    for part in path:
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True


def _complete(config: DictConfig, user: Mapping[str, Any]) -> None:
    """Fills what depends on other keys: mini-batches, token budgets and the number of updates per
    synchronisation.
    """
    actor = config.actor_rollout_ref.actor
    batch = int(config.data.train_batch_size)
    if not _chosen(config, user, "actor_rollout_ref", "actor", "ppo_mini_batch_size"):
        actor.ppo_mini_batch_size = batch
    mini = int(actor.ppo_mini_batch_size)
    if mini > batch or batch % mini:
        raise ConfigError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size={mini} must divide data.train_batch_size={batch}"
        )
    config.trainer.v1.separate_async.parameter_sync_step = batch // mini
    for section, name in (
        (actor, "ppo_micro_batch_size_per_gpu"),
        (config.critic, "ppo_micro_batch_size_per_gpu"),
    ):
        if section.get(name) is None and not section.use_dynamic_bsz:
            section[name] = 1
    rollout = config.actor_rollout_ref.rollout
    if rollout.log_prob_micro_batch_size_per_gpu is None and not actor.use_dynamic_bsz:
        rollout.log_prob_micro_batch_size_per_gpu = actor.ppo_micro_batch_size_per_gpu
    _complete_correction(config, user)
    if config.critic.model.path == "~/models/deepseek-llm-7b-chat":
        config.critic.model.path = config.actor_rollout_ref.model.path


def _complete_correction(config: DictConfig, user: Mapping[str, Any]) -> None:
    """What happens to tokens that other weights have sampled.

    Asynchronous training weighs them (token-level truncated importance sampling, verl's threshold of 2)
    unless the user has chosen. In bypass mode verl's loss of that name does what the section says.
    """
    correction = config.algorithm.rollout_correction
    policy = config.actor_rollout_ref.actor.policy_loss
    if correction.bypass_mode:
        if policy.loss_mode == "vanilla":
            policy.loss_mode = "bypass_mode"
            policy.rollout_correction = OmegaConf.create(OmegaConf.to_container(correction))
        elif correction.rollout_is or correction.rollout_rs or correction.loss_type != "ppo_clip":
            raise ConfigError(
                "algorithm.rollout_correction.bypass_mode=True corrects in a loss of its own: leave "
                f"actor_rollout_ref.actor.policy_loss.loss_mode={policy.loss_mode} out, or rollout_is, "
                "rollout_rs and loss_type"
            )
        return
    asynchronous = config.trainer.v1.sampler.max_off_policy_threshold != 1
    if asynchronous and not _chosen(config, user, "algorithm", "rollout_correction", "rollout_is"):
        correction.rollout_is = "token"


def _check_supported(config: DictConfig, user: Mapping[str, Any], *, hybrid: bool) -> None:
    check_names(config)
    if hybrid and config.actor_rollout_ref.model.lora_rank:
        raise ConfigError(
            "actor_rollout_ref.model.lora_rank cannot be had with engines.hybrid, whose engines serve no "
            "adapter: leave one of the two out"
        )
    mode = user.get("trainer", {}).get("v1", {}).get("trainer_mode", "sync")
    if mode not in TRAINER_MODES:
        raise ConfigError(
            f"trainer.v1.trainer_mode={mode!r} needs verl's own engines; choose one of "
            f"{', '.join(TRAINER_MODES)}"
        )
    if config.distillation.get("enabled", False):
        raise ConfigError(
            "distillation.enabled=True is not supported with engines outside verl; set it to False"
        )
    if config.actor_rollout_ref.actor.checkpoint.async_save:
        raise ConfigError(
            "actor_rollout_ref.actor.checkpoint.async_save=True is not supported: saves are atomic"
        )


def validate(config: DictConfig) -> None:
    """verl's own checks of a composed configuration; imports verl.

    Raises:
        ConfigError: with verl's words, in one line.
    """
    import contextlib
    import io

    from hydra.errors import InstantiationException
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    try:
        # verl says on standard output that all is well.
        with contextlib.redirect_stdout(io.StringIO()):
            validate_config(config, need_reference_policy(config), need_critic(config))
    except (AssertionError, ValueError, NotImplementedError, TypeError, InstantiationException) as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"verl refuses the configuration: {words}") from error


def _verl_config_folder() -> Path:
    """verl's own YAML files, found without importing verl: that takes seconds."""
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "verl is not installed here: run the learner in the learner environment "
            "(`agl-grpc env create learner`)"
        )
    return Path(spec.submodule_search_locations[0]) / "trainer" / "config"


def compose(
    user: Mapping[str, Any],
    *,
    device: str,
    fixed: Mapping[str, Any] | None = None,
    hybrid: Mapping[str, Any] | None = None,
) -> DictConfig:
    """verl's ``ppo_trainer`` configuration, ready for its v1 trainer.

    Args:
        user: verl's keys, nested or dotted.
        device: ``cpu`` or ``cuda``.
        fixed: what the learner itself decides (paths, step counts), nested; replaces the user's values.
        hybrid: what the engines that verl starts are told; None = engines live outside verl.

    Raises:
        ConfigError: an unknown key, or a combination that cannot run with engines outside verl.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(_verl_config_folder()), version_base=None):
        config = hydra_compose("ppo_trainer")
    nested = expand(user)
    check_keys(config, nested)
    layers = [_DEFAULTS, *([_DEFAULTS_CPU] if device == "cpu" else []), nested, fixed or {}]
    layers.append(_held(device, hybrid or {}))
    with open_dict(config):
        for layer in layers:
            config.merge_with(OmegaConf.create(layer))
        _complete(config, nested)
    _check_supported(config, nested, hybrid=bool(hybrid))
    OmegaConf.resolve(config)
    return config
