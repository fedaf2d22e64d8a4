"""verl's keys are taken as they are; unknown ones and impossible ones are refused by name."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.environments import learner_python

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

MODEL = {"actor_rollout_ref.model.path": "somewhere"}
GIVEN: dict[str, dict[str, Any]] = {
    "defaults": {},
    "users": {
        "data": {"train_batch_size": 32},
        "actor_rollout_ref": {
            "actor": {"ppo_mini_batch_size": 8, "optim": {"lr": 3e-4}},
            "rollout": {"name": "vllm", "n": 4},
            "model": {"override_config": {"sliding_window": 7}},
        },
        "trainer": {"v1": {"trainer_mode": "sync"}},
    },
    "verls_engines": {
        "hybrid": {"store": "here:1", "run_id": "r", "model": "m", "spool": "s"},
        "actor_rollout_ref.rollout.max_model_len": 512,
        "actor_rollout_ref.rollout.load_format": "dummy",
    },
    "verls_engines_adapter": {
        "hybrid": {"store": "here:1", "run_id": "r", "model": "m", "spool": "s"},
        "actor_rollout_ref.model.lora_rank": 8,
    },
    "typing_error": {"actor_rollout_ref": {"rolout": {"n": 4}}},
    "unknown_leaf": {"trainer.save_frequency": 3},
    "two_errors": {"trainer.save_frequenzy": 3, "algorithm.clip_ratio": 0.2},
    "estimator": {"algorithm.adv_estimator": "remax"},
    "by_rows": {"algorithm.adv_estimator": "grpo_vectorized"},
    "misspelt_estimator": {"algorithm.adv_estimator": "groo"},
    "loss": {"actor_rollout_ref.actor.policy_loss.loss_mode": "vanila"},
    "dro": {"actor_rollout_ref.actor.policy_loss.loss_mode": "dro"},
    "asynchronous": {"trainer.v1.sampler.max_off_policy_threshold": 3},
    "bypass": {
        "algorithm.rollout_correction": {"bypass_mode": True, "rollout_is": "token", "loss_type": "reinforce"}
    },
    "bypass_twice": {
        "algorithm.rollout_correction": {"bypass_mode": True, "rollout_is": "token"},
        "actor_rollout_ref.actor.policy_loss.loss_mode": "gspo",
    },
    "mode": {"trainer.v1.trainer_mode": "colocate_async"},
    "minibatch": {"data.train_batch_size": 10, "actor_rollout_ref.actor.ppo_mini_batch_size": 4},
    "verls_own_rule": {"actor_rollout_ref.actor.loss_agg_mode": "nonsense"},
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    repository = Path(__file__).parents[2]
    keys = [{**MODEL, **given} for given in GIVEN.values()]
    # A nested model section would be replaced by the dotted key's: written into it instead.
    keys[1] = {**GIVEN["users"]}
    keys[1]["actor_rollout_ref"]["model"]["path"] = "somewhere"
    done = subprocess.run(
        [learner_python(), "-m", "tests.learner.config_script", json.dumps(keys)],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(GIVEN, json.loads(done.stdout.splitlines()[-1]), strict=True))


def test_users_keys_win_over_defaults_and_the_learner_holds_its_own(outcomes: dict[str, Any]) -> None:
    assert outcomes["defaults"]["error"] == ""
    users = outcomes["users"]
    assert users["error"] == ""
    assert (users["mini"], users["updates"], users["lr"]) == (8, 4, 3e-4)
    assert users["override"] == {"attn_implementation": "sdpa", "sliding_window": 7}
    # Engines are outside verl, whatever the user's keys say of verl's own.
    assert (users["mode"], users["rollout"]) == ("separate_async", "agl_external")


def test_engines_that_verl_starts_load_the_model_and_are_told_whom_they_serve(
    outcomes: dict[str, Any],
) -> None:
    hybrid = outcomes["verls_engines"]
    assert hybrid["error"] == ""
    assert hybrid["told"] == GIVEN["verls_engines"]["hybrid"]
    # The user's keys count, but for weights that nobody would ever load.
    expected = {"load_format": "auto", "tensor_model_parallel_size": 1, "max_model_len": 512}
    assert hybrid["engines"] == {**expected, "enforce_eager": True}
    # It is a trainer like any other: its weights travel through the store's policy versions.
    assert (hybrid["mode"], hybrid["rollout"]) == ("separate_async", "agl_external")
    assert outcomes["defaults"]["told"] == {}


def test_older_tokens_are_corrected_in_asynchronous_training_unless_chosen_otherwise(
    outcomes: dict[str, Any],
) -> None:
    assert outcomes["defaults"]["correction"] == [None, "vanilla"]
    assert outcomes["asynchronous"]["correction"] == ["token", "vanilla"]
    # In bypass mode it is the loss that corrects: it has to be the one that does.
    assert outcomes["bypass"]["correction"] == ["token", "bypass_mode"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "typing_error",
            "no configuration key 'actor_rollout_ref.rolout' (did you mean actor_rollout_ref.rollout?)",
        ),
        ("unknown_leaf", "no configuration key 'trainer.save_frequency' (did you mean trainer.save_freq"),
        ("two_errors", "'trainer.save_frequenzy' (did you mean trainer.save_freq"),
        ("two_errors", "'algorithm.clip_ratio' (did you mean actor_rollout_ref.actor.clip_ratio or"),
        ("estimator", "algorithm.adv_estimator='remax' is not supported"),
        ("estimator", "a greedy answer to each prompt, which nobody samples"),
        ("by_rows", "a rollout of several rows would count several times: use grpo"),
        ("misspelt_estimator", "did you mean rloo or grpo?"),
        ("verls_engines_adapter", "lora_rank cannot be had with engines.hybrid"),
        ("loss", "did you mean vanilla"),
        ("dro", "needs policy_loss.dro_beta above 0"),
        ("bypass_twice", "bypass_mode=True corrects in a loss of its own"),
        ("mode", "trainer.v1.trainer_mode='colocate_async'"),
        ("minibatch", "must divide data.train_batch_size=10"),
        ("verls_own_rule", "verl refuses the configuration"),
    ],
)
def test_mistakes_are_refused_in_one_line(outcomes: dict[str, Any], name: str, words: str) -> None:
    error = outcomes[name]["error"]
    assert words in error
    assert "\n" not in error
