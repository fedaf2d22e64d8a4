"""Composes verl configurations in the learner environment; the end-to-end tests run it.

Reads a JSON list of verl keys on its command line, with ``hybrid`` for what engines that verl starts are
told; prints for each what came of it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from agl_grpc.learner.errors import ConfigError
from agl_grpc.learner.verl.config import compose, validate


def outcome(keys: dict[str, Any]) -> dict[str, Any]:
    told = keys.pop("hybrid", None)
    try:
        config = compose(keys, device="cpu", hybrid=told)
        validate(config)
    except ConfigError as error:
        return {"error": str(error)}
    return {
        "error": "",
        "mini": config.actor_rollout_ref.actor.ppo_mini_batch_size,
        "updates": config.trainer.v1.separate_async.parameter_sync_step,
        "mode": config.trainer.v1.trainer_mode,
        "rollout": config.actor_rollout_ref.rollout.name,
        "correction": [
            config.algorithm.rollout_correction.rollout_is,
            config.actor_rollout_ref.actor.policy_loss.loss_mode,
        ],
        "engines": {
            name: config.actor_rollout_ref.rollout.get(name)
            for name in ("load_format", "tensor_model_parallel_size", "max_model_len", "enforce_eager")
        },
        "told": dict((config.actor_rollout_ref.rollout.get("custom") or {}).get("agl") or {}),
        "lr": config.actor_rollout_ref.actor.optim.lr,
        "override": dict(config.actor_rollout_ref.model.override_config),
    }


if __name__ == "__main__":
    print("\n" + json.dumps([outcome(keys) for keys in json.loads(sys.argv[1])]))
