"""The sampler of a training run that follows another: its batches are the other's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agl_grpc.learner.rollouts.groups import place_of
from agl_grpc.learner.verl.sampler import StoreSampler


class FollowingSampler(StoreSampler):
    """Makes its batches of the groups that another training run has claimed for the same step.

    What the other gives up (it had too little for that model, or grew too old) and what it asks for in its
    place, this one gives up and asks for, too; a group that holds nothing for this model is an empty one.

    Args:
        leaders_batch: asks for the other's batch: the step, and which of the step's. It arrives through the
            manager.
        ask_for_prompts: asks for so many more prompts.
    """

    def __init__(
        self,
        *,
        leaders_batch: Callable[[int, int], None],
        ask_for_prompts: Callable[[int], int],
        **kwargs: Any,
    ) -> None:
        # Without a refill: what takes the place of an evicted group is in one of the other's batches.
        super().__init__(replay={}, refill_fn=None, **kwargs)
        self._leaders_batch = leaders_batch
        self._ask_for_prompts = ask_for_prompts
        # The step, and how many of its batches have been asked for.
        self._step, self._asked = 0, 0
        self._is_planned = False

    def _plan(self, step: int, batch_size: int) -> None:
        self._planned, self._is_planned = [], False
        if step != self._step:
            self._step, self._asked = step, 0
        self._leaders_batch(step, self._asked)
        self._asked += 1

    def _has_enough_samples(
        self, global_steps: int, partition_id: str, batch_size: int, sampleable_keys: set[str]
    ) -> bool:
        if partition_id != "val" and not self._is_planned:
            found = self._manager.leaders_groups(global_steps) if self._manager else None
            if found is None:
                return False
            self._take_over(found)
        return super()._has_enough_samples(global_steps, partition_id, batch_size, sampleable_keys)

    def _take_over(self, groups: tuple[str, ...]) -> None:
        self._is_planned = True
        # What was left untrained by an earlier trainer of this run is asked for before anything new.
        while (behind := max(map(place_of, groups), default=-1) + 1 - self._next_place) > 0:
            self._ask_for_prompts(behind)
        # Without those that this run has trained already: it went on from a later checkpoint than the other.
        self._planned = [uid for uid in groups if uid in self._outstanding]
