"""Prompts: which are asked for, under which ids, and when."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import transfer_queue as tq
from tensordict import TensorDict
from verl.utils import tensordict_utils
from verl.utils.dataset.rl_dataset import collate_fn

from agl_grpc.learner.hooks import Hooks
from agl_grpc.learner.rollouts.curriculum import TaskOrder
from agl_grpc.learner.rollouts.groups import group_uid


class AsksForPrompts:
    """The part of a trainer of verl's that asks for groups of rollouts.

    Ids are deterministic, the store keeps what is in flight, and a step's rollouts are asked for as soon as
    engines serve the weights of the step before: agents sample while that one is being reported.
    """

    hooks: Hooks
    config: Any
    train_dataset: Any
    replay_buffer: Any
    agent_loop_manager: Any
    order: TaskOrder | None
    prompts_fetched: int
    global_steps: int
    total_training_steps: int
    steps_per_epoch: int
    # verl's, which ask for so many prompts, and for a step's.
    _add_prompts_to_generate: Callable[[int], int]
    _add_batch_to_generate: Callable[[], None]
    # Asked for by the trainer of the resumed checkpoint and not trained: place and dataset index.
    _left_over: deque[tuple[int, int]]
    # The step whose rollouts have been asked for before it began.
    _asked_ahead = 0

    def outstanding_prompts(self) -> list[tuple[int, int]]:
        """Place and dataset index of prompts that were fetched and neither trained nor dropped, in order."""
        return [*self.replay_buffer.outstanding_prompts(), *self._left_over]

    def on_train_begin(self) -> None:
        """As the trainer's."""
        # A trainer that is run again after an error asks for what its failed step had.
        self._asked_ahead = 0
        warmup = self.config.trainer.v1.separate_async.num_warmup_batches
        if warmup > 0 and self._left_over:
            # The prefetched prompts of the run that is resumed: asked for again, not besides new ones.
            self._restored_tq_prompt_count = len(self._left_over)
            self._add_prompts_to_generate(len(self._left_over))
        super().on_train_begin()  # type: ignore[misc]  # verl's trainer comes after this class

    def prepare_step(self) -> dict[str, Any]:
        """As the trainer's; asks for nothing that `on_step_end` has asked for."""
        if self._asked_ahead == self.global_steps:
            return {}
        return dict(super().prepare_step())  # type: ignore[misc]  # verl's trainer comes after this class

    def on_step_end(self) -> None:
        """As the trainer's, which publishes the step's weights."""
        super().on_step_end()  # type: ignore[misc]  # verl's trainer comes after this class
        if not self._goes_on_at_once():
            return
        self._asked_ahead = self.global_steps + 1
        self.global_steps += 1
        try:
            self._add_batch_to_generate()
        finally:
            self.global_steps -= 1

    def _goes_on_at_once(self) -> bool:
        """Whether a step follows this one, and no validation that has the engines first.

        Nor may the wait for the run's other models have been given up: their weights may be older.
        """
        if self.hooks.is_stopping():
            return False
        trainer, step = self.config.trainer, self.global_steps
        is_last = step >= self.total_training_steps or step // self.steps_per_epoch >= trainer.total_epochs
        return not is_last and (trainer.test_freq <= 0 or step % trainer.test_freq != 0)

    def _reissue_inflight_prompts(self, partition_id: str = "train") -> int:
        # The store keeps what was in flight, not the TransferQueue.
        return 0

    def _fetch_one_gen_batch(self) -> TensorDict:
        """One prompt under a deterministic group id; first those that the resumed checkpoint left
        untrained, under the ids that they had.
        """
        if self._left_over:
            place, index = self._left_over.popleft()
            batch, places = self._prompt(index), [place]
        elif self.order is not None:
            batch, places = self._prompt(self.order.take()), [self.prompts_fetched]
            self.prompts_fetched += 1
        else:
            batch = super()._fetch_one_gen_batch()  # type: ignore[misc]  # verl's trainer comes after this class
            places = list(range(self.prompts_fetched, self.prompts_fetched + len(batch["index"])))
            self.prompts_fetched += len(places)
        uids = []
        for place, item in zip(places, batch["index"], strict=True):
            index = int(getattr(item, "data", item))
            uids.append(group_uid(self.hooks.run_name, place, index))
            self.replay_buffer.expect(uids[-1], place, index)
        batch["uid"] = tensordict_utils.get_tensordict({"uid": np.array(uids, dtype=object)})["uid"]
        return batch

    def _prompt(self, index: int) -> TensorDict:
        items = collate_fn([self.train_dataset[index]])
        items["uid"] = np.array([""], dtype=object)
        return tensordict_utils.get_tensordict(items)

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        # verl's puts the prompts' own fields as well, to recover what was in flight; the store keeps that.
        tags = [{"is_prompt": True, "status": "pending", "global_steps": self.global_steps}] * len(batch)
        tq.kv_batch_put(keys=list(batch["uid"]), partition_id="train", tags=tags)
        self.agent_loop_manager.generate_sequences(batch)
        return len(batch)
