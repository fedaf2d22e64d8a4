"""Short names for the keys of verl that most runs set."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

_VERL_KEYS = {
    "model": "actor_rollout_ref.model.path",
    "lr": "actor_rollout_ref.actor.optim.lr",
    "estimator": "algorithm.adv_estimator",
    "batch_size": "data.train_batch_size",
    "group_size": "actor_rollout_ref.rollout.n",
    "temperature": "actor_rollout_ref.rollout.temperature",
    "steps": "trainer.total_training_steps",
    "epochs": "trainer.total_epochs",
    "save_every": "trainer.save_freq",
    "clip_ratio": "actor_rollout_ref.actor.clip_ratio",
    "kl_coefficient": "actor_rollout_ref.actor.kl_loss_coef",
    "entropy_coefficient": "actor_rollout_ref.actor.entropy_coeff",
}


@dataclass(frozen=True)
class LearnerKeys:
    """What a run with VERL may say under ``learner``; it goes before ``algorithm.config``.

    Attributes:
        model: folder or name of the model.
        lr: learning rate.
        estimator: advantage estimator, for example ``grpo``.
        batch_size: tasks of a step.
        group_size: rollouts of each task.
        temperature: of sampling.
        steps: training steps.
        epochs: passes over the training dataset.
        save_every: steps between two checkpoints.
        clip_ratio: of the policy loss.
        kl_coefficient: weight of the KL loss.
        entropy_coefficient: weight of the entropy bonus.
    """

    model: str | None = None
    lr: float | None = None
    estimator: str | None = None
    batch_size: int | None = None
    group_size: int | None = None
    temperature: float | None = None
    steps: int | None = None
    epochs: int | None = None
    save_every: int | None = None
    clip_ratio: float | None = None
    kl_coefficient: float | None = None
    entropy_coefficient: float | None = None

    def verl_keys(self) -> dict[str, Any]:
        """The keys that are set, under verl's own dotted names."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {_VERL_KEYS[name]: value for name, value in given.items() if value is not None}
