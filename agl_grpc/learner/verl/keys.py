"""Which of verl's keys and names can be used with rollouts from the store; the others are refused by name."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig

from agl_grpc.learner.credit.turn_credit import NAME as TURNS
from agl_grpc.learner.errors import ConfigError

# Those that judge a rollout by its outcome; gae works on values and stays verl's own.
OUTCOME_ESTIMATORS = (
    "grpo",
    "rloo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "opo",
    "gpg",
    "grpo_passk",
)
# Advantage estimators whose inputs exist for rollouts from the store.
ESTIMATORS = ("gae", *OUTCOME_ESTIMATORS, TURNS)
_BY_ROWS = "it compares rows, so a rollout of several rows would count several times: use {}"
_NO_GRADIENT_TERMS = "it needs the sums of squared probabilities, which verl's v1 trainer does not fetch"
# verl's other estimators, and why they cannot be used.
REFUSED_ESTIMATORS = {
    "remax": "it needs the reward of a greedy answer to each prompt, which nobody samples: use rloo or grpo",
    "gdpo": "it needs several named rewards for each row, and a batch of the store freezes one: use grpo",
    "rloo_vectorized": _BY_ROWS.format("rloo"),
    "grpo_vectorized": _BY_ROWS.format("grpo"),
    "optimal_token_baseline": _NO_GRADIENT_TERMS,
    "tir_optimal_token_baseline": _NO_GRADIENT_TERMS,
}
# verl's policy losses; "bypass_mode" is chosen by algorithm.rollout_correction.bypass_mode.
POLICY_LOSSES = (
    "vanilla",
    "gspo",
    "sapo",
    "dppo_tv",
    "dppo_kl",
    "gpg",
    "clip_cov",
    "kl_cov",
    "geo_mean",
    "dro",
    "cispo",
)
# Those that average over rows first: only where every rollout is one row is that an average over rollouts.
SEQUENCE_LOSSES = ("gspo", "sapo", "geo_mean")
TRAINER_MODES = ("sync", "separate_async", "agl")


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean …?)`` with the nearest of the known names, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def _target_fields(node: DictConfig) -> set[str]:
    """Names of the fields of the dataclass that verl builds from a node; empty when it builds none."""
    target = node.get("_target_")
    if not isinstance(target, str):
        return set()
    module, _, name = target.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    return {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()


def _unknown_keys(known: DictConfig, given: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in given.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in known:
            # An empty mapping in verl's tree is free-form; a dataclass may have fields that its YAML leaves
            # out.
            if len(known) and key not in _target_fields(known):
                yield full
            continue
        child = known._get_node(key)
        if isinstance(child, DictConfig) and isinstance(value, Mapping) and not child._is_none():
            yield from _unknown_keys(child, value, full)


def _all_keys(node: DictConfig, path: str = "") -> Iterator[str]:
    for key in node:
        full = f"{path}.{key}" if path else str(key)
        yield full
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            yield from _all_keys(child, full)


def _hint(full: str, every: list[str]) -> str:
    """The likeliest meanings of an unknown key: the same name elsewhere, else similar ones nearby."""
    section, _, leaf = full.rpartition(".")
    meant = [key for key in every if key.rpartition(".")[2] == leaf][:3]
    if not meant:
        siblings = [key.rpartition(".")[2] for key in every if key.rpartition(".")[0] == section]
        similar = difflib.get_close_matches(leaf, siblings, n=2, cutoff=0.6)
        meant = [f"{section}.{name}" if section else name for name in similar]
    return f" (did you mean {' or '.join(meant)}?)" if meant else ""


def check_keys(known: DictConfig, given: Mapping[str, Any]) -> None:
    """Raises ConfigError naming the keys that verl does not know, each with the nearest that it does."""
    unknown = list(_unknown_keys(known, given))
    if not unknown:
        return
    every = list(_all_keys(known))
    named = [f"{full!r}{_hint(full, every)}" for full in unknown]
    plural = "s" if len(named) > 1 else ""
    raise ConfigError(f"verl has no configuration key{plural} {', '.join(named)}")


def check_names(config: DictConfig) -> None:
    """Raises ConfigError for an estimator or a policy loss that cannot be used, with the reason."""
    estimator = str(config.algorithm.adv_estimator)
    if estimator not in ESTIMATORS:
        reason = REFUSED_ESTIMATORS.get(estimator)
        because = f": {reason}" if reason else nearest(estimator, ESTIMATORS)
        raise ConfigError(
            f"algorithm.adv_estimator={estimator!r} is not supported with rollouts from the store{because}; "
            f"choose one of {', '.join(ESTIMATORS)}"
        )
    if estimator == TURNS and config.algorithm.use_kl_in_reward:
        raise ConfigError(
            f"algorithm.use_kl_in_reward changes rewards of rows, and {TURNS} judges turns: set it to False, "
            "or use actor_rollout_ref.actor.use_kl_loss"
        )
    policy = config.actor_rollout_ref.actor.policy_loss
    # A module that the user's configuration makes verl import may bring losses of its own.
    own = bool(config.actor_rollout_ref.model.external_lib)
    if policy.loss_mode not in (*POLICY_LOSSES, "bypass_mode") and not own:
        raise ConfigError(
            f"actor_rollout_ref.actor.policy_loss.loss_mode={policy.loss_mode!r} is none of verl's losses"
            f"{nearest(policy.loss_mode, POLICY_LOSSES)}; choose one of {', '.join(POLICY_LOSSES)}"
        )
    if policy.loss_mode == "dro" and not (policy.dro_beta or 0) > 0:
        raise ConfigError(
            "actor_rollout_ref.actor.policy_loss.loss_mode=dro needs policy_loss.dro_beta above 0"
        )


def check_best_of(config: DictConfig) -> None:
    """Raises ConfigError for a key that has no meaning where the best of every group are learned."""
    actor = config.actor_rollout_ref.actor
    wrong = {
        "algorithm.adv_estimator=gae": config.algorithm.adv_estimator == "gae",
        "algorithm.use_kl_in_reward=True": config.algorithm.use_kl_in_reward,
        "actor_rollout_ref.actor.use_kl_loss=True": actor.use_kl_loss,
        f"actor_rollout_ref.actor.entropy_coeff={actor.entropy_coeff}": actor.entropy_coeff != 0,
    }
    for setting, is_wrong in wrong.items():
        if is_wrong:
            raise ConfigError(
                f"{setting} does nothing in verl's supervised loss, with which best_of learns: leave it out"
            )
