"""Sampler over verl's replay buffer: woken by arriving groups, ordered, and bounded by deadlines."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBufferAsync

from agl_grpc.learner.errors import ConfigError, DeadlineError, LearnerError
from agl_grpc.learner.verl.manager import RolloutManager


def _key_order(key: str) -> tuple[str, int, int]:
    uid, number, row = key.rsplit("_", 2)
    return uid, int(number), int(row)


class StoreSampler(ReplayBufferAsync):  # type: ignore[misc]  # verl is untyped
    """verl's asynchronous replay buffer with three changes.

    It waits on the manager instead of sleeping two seconds at a time; groups and rows leave in the order in
    which they were asked for, so that the same rollouts make the same batch; and it gives up, naming what is
    missing, when no group has arrived for ``sample_deadline`` seconds or ``failure_limit`` groups in a row
    could not be used. ``replay`` holds, by step, the groups of batches that an earlier trainer claimed and
    did not commit: they are trained in the same batches again, as far as they can be had.
    """

    def __init__(
        self,
        *,
        sample_deadline: float,
        failure_limit: int,
        replay: Mapping[int, Sequence[list[str]]],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._manager: RolloutManager | None = None
        self._deadline = sample_deadline
        self._failure_limit = failure_limit
        self._failures_in_a_row = 0
        # Groups asked for and neither trained nor dropped, in that order: uid to place and dataset index.
        self._outstanding: dict[str, tuple[int, int]] = {}
        self._replay = {step: deque(batches) for step, batches in replay.items()}
        self._planned: list[str] = []
        # After that of every group that was ever asked for.
        self._next_place = 0
        # What the last training batch took from the outstanding groups.
        self._sampled: dict[str, tuple[int, int]] = {}
        self._last_arrival = time.monotonic()
        # Told of groups that leave, and whether they are trained; the curriculum's.
        self.on_settled: Callable[[dict[str, tuple[int, int]], bool], None] | None = None

    def bind(self, manager: RolloutManager) -> None:
        """Names the manager whose groups are waited for; once, before training."""
        self._manager = manager
        self._last_arrival = time.monotonic()

    def _wait_for_next_poll(self, partition_id: str, last_debug_time: float) -> float:
        if self._manager is None:
            raise LearnerError("the sampler was used before a manager was bound to it")
        # The time between two samples belongs to training, not to this wait.
        started = max(self._last_arrival, last_debug_time)
        if self._manager.wait(timeout=max(0.0, started + self._deadline - time.monotonic())):
            self._last_arrival = time.monotonic()
        else:
            raise DeadlineError(
                f"no group of rollouts finished within {self._deadline:g} s; {self._manager.describe_open()}"
            )
        return last_debug_time

    def sample(
        self, global_steps: int, partition_id: str, batch_size: int
    ) -> tuple[KVBatchMeta, dict[str, Any]]:
        self._last_arrival = time.monotonic()
        if partition_id != "val":
            self._plan(global_steps, batch_size)
        batch, metrics = super().sample(global_steps, partition_id, batch_size)
        self._failures_in_a_row = 0
        return batch, metrics

    def _plan(self, step: int, batch_size: int) -> None:
        """Takes the groups of this batch from what an earlier trainer had claimed for the step."""
        batches = self._replay.get(step)
        planned = batches.popleft() if batches else []
        self._planned = planned if len(planned) == batch_size else []

    def _has_enough_samples(
        self, global_steps: int, partition_id: str, batch_size: int, sampleable_keys: set[str]
    ) -> bool:
        if partition_id != "val" and self._planned:
            if self._outstanding.keys() >= set(self._planned):
                return sampleable_keys >= set(self._planned)
            # One of them was not asked for, or could not be used: the batch cannot be the same.
            self._planned = []
        return bool(super()._has_enough_samples(global_steps, partition_id, batch_size, sampleable_keys))

    def _terminal_eviction_reasons(self, global_steps: int, partition_id: str) -> Any:
        reasons = super()._terminal_eviction_reasons(global_steps, partition_id)
        self._failures_in_a_row += len(reasons[2])
        if self._failures_in_a_row >= self._failure_limit:
            last = self._manager.last_failure if self._manager else ""
            raise LearnerError(
                f"{self._failures_in_a_row} groups in a row could not be trained; the last reason: {last}"
            )
        return reasons

    def _dapo_filtered_keys(self, partition_id: str) -> Any:
        try:
            return super()._dapo_filtered_keys(partition_id)
        except RuntimeError as error:  # what verl raises when a rollout lacks the metric
            raise ConfigError(
                f"algorithm.filter_groups.metric is {self.filter_groups_metric!r}, and not every rollout has "
                f"a reward of that name: name one that each has, or 'reward' ({error})"
            ) from error

    def expect(self, uid: str, place: int, index: int) -> None:
        """Notes that a group was asked for as the ``place``-th, from the dataset's ``index``-th task."""
        self._outstanding[uid] = (place, index)
        self._next_place = max(self._next_place, place + 1)

    def outstanding_prompts(self) -> list[tuple[int, int]]:
        """Place and dataset index of every group asked for and neither trained nor dropped."""
        return list(self._outstanding.values())

    def begin_step(self) -> None:
        """Forgets what the last training batch took: its step is over."""
        self._sampled = {}

    def put_back(self) -> None:
        """Makes the groups of the last training batch outstanding again: they were not trained."""
        self._outstanding = {**self._sampled, **self._outstanding}
        self._sampled = {}

    def _settle(self, uids: Iterable[str], *, trained: bool = False) -> None:
        settled = {uid: self._outstanding.pop(uid) for uid in uids if uid in self._outstanding}
        if settled and self.on_settled is not None:
            self.on_settled(settled, trained)

    def _clear_groups(self, partition_id: str, uids: set[str]) -> None:
        super()._clear_groups(partition_id, uids)
        self._settle(uids)
        if self._manager is not None:
            self._manager.forget_groups(uids)

    def _select_prompt_uids(self, partition_id: str, sampleable_keys: set[str], batch_size: int) -> Any:
        steps = dict(self.prompt_global_steps[partition_id])
        places = self._outstanding
        ordered = sorted(sampleable_keys, key=lambda uid: (steps.get(uid, 0), places.get(uid, (0, 0)), uid))
        chosen = ordered[:batch_size]
        if partition_id != "val" and self._planned:
            chosen, self._planned = self._planned, []
        return chosen, dict(self.partitions[partition_id]), steps

    def _materialize_batch(
        self,
        partition_id: str,
        selected_prompt_uids: list[str],
        partition_snapshot: dict[str, dict[str, Any]],
    ) -> KVBatchMeta:
        tq.kv_clear(partition_id=partition_id, keys=selected_prompt_uids)
        places = {uid: place for place, uid in enumerate(selected_prompt_uids)}
        keys = [key for key in partition_snapshot if key.split("_")[0] in places]
        keys.sort(key=lambda key: (places[key.split("_")[0]], _key_order(key)))
        tags = [partition_snapshot[key] for key in keys]
        if partition_id != "val":
            self._sampled = {uid: self._outstanding[uid] for uid in selected_prompt_uids}
        self._settle(selected_prompt_uids, trained=partition_id != "val")
        return KVBatchMeta(partition_id=partition_id, keys=keys, tags=tags)
