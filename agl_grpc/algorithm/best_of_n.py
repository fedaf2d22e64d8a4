"""`BestOfN`: rejection sampling. The model answers every task several times and learns its best answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agl_grpc.algorithm.verl import VERL
from agl_grpc.learner.run_config import BestOf


class BestOfN(VERL):
    """Each round: ``n`` rollouts of every task with the weights in force, the best of each task's rollouts
    are learned with verl's supervised loss, and the new weights are published for the next round.

    A round is a step of verl's trainer with ``data.train_batch_size`` tasks; learning rate, steps, saving and
    validation are verl's keys, and resuming, checkpoints and metrics are those of `VERL`.

    Args:
        config: verl's keys, as for `VERL`.
        n: rollouts of every task; None = ``actor_rollout_ref.rollout.n`` of ``config``, else 4.
        keep: how many of a task's rollouts are learned at most, the best first.
        min_reward: a rollout with less is not learned; a round without any leaves the weights as they are.
        epochs: passes over a round's best rollouts, with one optimiser step each; None =
            ``actor_rollout_ref.actor.ppo_epochs`` of ``config``, else 1.
        options: all others of `VERL`.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | str | Path,
        *,
        n: int | None = None,
        keep: int = 1,
        min_reward: float = 1.0,
        epochs: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, **options)
        for name, value in {"n": n, "keep": keep, "epochs": epochs}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        if n is not None and keep > n:
            raise ValueError(f"keep is {keep}, and a task has only n={n} rollouts")
        named = {"actor_rollout_ref.rollout.n": n, "actor_rollout_ref.actor.ppo_epochs": epochs}
        self.config |= {key: value for key, value in named.items() if value is not None}
        self.best_of = BestOf(keep=keep, min_reward=min_reward)

    @property
    def name(self) -> str:
        return "best_of_n"
