"""Asking for a step's rollouts before the step begins: agents work while the one before is reported."""

from __future__ import annotations

from typing import Any

import transfer_queue as tq
from tensordict import TensorDict


class AsksAhead:
    """The part of a trainer of verl's that asks for the next step's rollouts once its weights are published.

    verl asks at the beginning of a step, with metrics, reports and clearing up behind it, for which engines
    would wait. Nothing else changes: the same prompts under the same ids, sampled by the same weights.
    """

    agent_loop_manager: Any
    config: Any
    global_steps: int
    steps_per_epoch: int
    total_training_steps: int
    # The last step whose rollouts were asked for before it began.
    _asked_step = 0

    def ask_ahead(self) -> None:
        """Asks for the next step's rollouts, if there is a next step."""
        done = self.global_steps
        if (
            done >= self.total_training_steps
            or done // self.steps_per_epoch >= self.config.trainer.total_epochs
        ):
            return
        self.global_steps = self._asked_step = done + 1
        try:
            self._add_batch_to_generate()  # type: ignore[attr-defined]  # verl's trainer comes after this class
        finally:
            self.global_steps = done

    def prepare_step(self) -> dict[str, Any]:
        """verl's beginning of a step, where its rollouts are asked for."""
        if self._asked_step == self.global_steps:
            # Once: a step that failed and is tried again needs rollouts of its own.
            self._asked_step = 0
            return {}
        found: dict[str, Any] = super().prepare_step()  # type: ignore[misc]  # as above
        return found

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        # The prompts' own fields are for verl's recovery of what was in flight; here the store keeps that.
        tags = [{"is_prompt": True, "status": "pending", "global_steps": self.global_steps}] * len(batch)
        tq.kv_batch_put(keys=list(batch["uid"]), partition_id="train", tags=tags)
        self.agent_loop_manager.generate_sequences(batch)
        return len(batch)
