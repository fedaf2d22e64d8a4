"""The agent-loop manager: verl hands it prompts, it hands verl rows of rollouts that the store has sealed.

All calls of the queue of rows happen in the trainer's thread: the source delivers into a plain queue, and the
sampler drains it while it waits. Nothing polls.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Collection
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import orjson
import transfer_queue as tq
from tensordict import TensorDict
from verl.utils import tensordict_utils

from agl_grpc.learner.batch.rows import QueueRow, queue_rows
from agl_grpc.learner.errors import FidelityError, LearnerError
from agl_grpc.learner.rollouts.dataset import ROLLOUTS_KEY
from agl_grpc.learner.rollouts.groups import (
    Arrival,
    FinishedGroup,
    FinishedRollout,
    GroupRequest,
    LeadersBatch,
    RolloutSource,
    Row,
)
from agl_grpc.learner.verl.local_queue import LocalQueue, put_rows

logger = logging.getLogger(__name__)

_PLACEHOLDER = Row(
    prompt_ids=np.zeros(1, dtype=np.int64),
    response_ids=np.zeros(1, dtype=np.int64),
    response_mask=np.zeros(1, dtype=np.int64),
    logprobs=np.zeros(1, dtype=np.float32),
    policy_versions=np.full(1, -1, dtype=np.int64),
)


def _texts(batch: TensorDict, key: str) -> list[str]:
    return [str(getattr(value, "data", value)) for value in batch[key]]


class RolloutManager:
    """Turns each dataset row into a group of rollouts and each finished group into rows of the queue.

    A group keeps those of its rollouts that have a reward and tokens. With fewer than two left (one, where
    groups have one) it is published as failed: the sampler drops it and asks for another prompt.

    Args:
        source: where rollouts come from.
        group_size: rollouts of a training group.
        validation_size: rollouts of a validation group.
        temperature: the sampling temperature of training; rows sampled at another one are refused.
        keep_empty: whether a group with too little to train counts, with no rows, instead of being replaced.
        vocabulary: tokens of the model; rows with ids beyond are refused. 0 = not known.
        queue: takes the rows; None = verl's TransferQueue does.
    """

    def __init__(
        self,
        source: RolloutSource,
        *,
        group_size: int,
        validation_size: int,
        temperature: float = 1.0,
        keep_empty: bool = False,
        vocabulary: int = 0,
        queue: LocalQueue | None = None,
    ) -> None:
        self._queue = queue
        self._vocabulary = vocabulary
        self._keep_empty = keep_empty
        self._source = source
        self._sizes = {False: group_size, True: validation_size}
        self._temperature = temperature
        self._arrived: SimpleQueue[Arrival] = SimpleQueue()
        self._leaders: LeadersBatch | None = None
        self._open: dict[str, GroupRequest] = {}
        self._rollouts: dict[str, FinishedRollout] = {}
        self._sources: dict[str, str] = {}
        # By training group, until they are settled; only for a curriculum.
        self.keep_rewards = False
        self._rewards: dict[str, list[float]] = {}
        self._counts: Counter[str] = Counter()
        # Since when no rollout is asked for: the engines have nothing to do.
        self._idle_since: float | None = time.monotonic()
        self._idle_seconds = 0.0
        self.last_failure = ""

    def deliver(self, arrival: Arrival) -> None:
        """Called by the source, from any thread; an exception is raised in the trainer's thread."""
        self._arrived.put(arrival)

    def generate_sequences(self, batch: TensorDict) -> None:
        """verl's entry: starts a group for every prompt of the batch and returns at once."""
        step = int(tensordict_utils.get_non_tensor_data(batch, "global_steps", 0))
        validate = bool(tensordict_utils.get_non_tensor_data(batch, "validate", False))
        tasks, sources, uids = _texts(batch, "task"), _texts(batch, "data_source"), _texts(batch, "uid")
        indices = [int(getattr(value, "data", value)) for value in batch["index"]]
        # The size of a prompt's own group: verl names it for every prompt, in validation too.
        own = list(batch[ROLLOUTS_KEY]) if ROLLOUTS_KEY in batch.keys() and not validate else None  # noqa: SIM118  # a TensorDict
        sizes = [int(getattr(n, "data", n)) for n in own] if own else [self._sizes[validate]] * len(uids)
        requests = []
        for uid, index, task, source, size in zip(uids, indices, tasks, sources, sizes, strict=True):
            if "_" in uid:
                raise LearnerError(f"group id {uid!r} holds an underscore, where verl splits keys")
            request = GroupRequest(uid, index, orjson.loads(task), size, step, validate)
            self._open[uid], self._sources[uid] = request, source
            requests.append(request)
        if requests and self._idle_since is not None:
            self._idle_seconds += time.monotonic() - self._idle_since
            self._idle_since = None
        self._source.submit(requests)

    def wait(self, timeout: float) -> bool:
        """Publishes the groups that have arrived, waiting at most ``timeout`` seconds for a first arrival;
        False = there was none.
        """
        deadline = time.monotonic() + timeout
        groups: list[FinishedGroup] = []
        arrived = False
        while True:
            try:
                remaining = 0.0 if arrived else max(0.0, deadline - time.monotonic())
                item = self._arrived.get(timeout=remaining) if remaining else self._arrived.get_nowait()
            except Empty:
                break
            arrived = True
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, LeadersBatch):
                self._leaders = item
            else:
                groups.append(item)
        finished = [group for group in groups if self._open.pop(group.request.uid, None) is not None]
        if groups and not self._open and self._idle_since is None:
            self._idle_since = time.monotonic()
        for validate in (False, True):
            self._publish([group for group in finished if group.request.validate is validate], validate)
        return arrived

    def leaders_groups(self, step: int) -> tuple[str, ...] | None:
        """What the training run that is followed trains in a step, once; None = that has not arrived."""
        found, self._leaders = self._leaders, None
        return found.groups if found is not None and found.step == step else None

    def describe_open(self) -> str:
        """One line on the groups that have not come back."""
        return self._source.describe(list(self._open))

    @property
    def remembered_groups(self) -> set[str]:
        """Groups of rollouts that were published and not yet forgotten."""
        return {rollout.group_id for rollout in self._rollouts.values()}

    def rollout(self, rollout_id: str) -> FinishedRollout:
        """A rollout that was published and not yet forgotten."""
        return self._rollouts[rollout_id]

    def take_rewards(self, uid: str) -> list[float]:
        """Rewards of a group's rollouts that have one, once; none when they were not kept."""
        return self._rewards.pop(uid, [])

    def forget(self, rollout_ids: list[str]) -> None:
        """Drops what is remembered of rollouts that were trained."""
        for rollout_id in rollout_ids:
            self._rollouts.pop(rollout_id, None)

    def forget_groups(self, uids: Collection[str]) -> None:
        """Drops what is remembered of groups that will not be trained."""
        self.forget([name for name, rollout in self._rollouts.items() if rollout.group_id in uids])

    def drain_counts(self) -> dict[str, float]:
        """Counts since the last call, by metric name, and the seconds in which no rollout was asked for."""
        counts = {name: float(value) for name, value in self._counts.items()}
        self._counts.clear()
        now = time.monotonic()
        if self._idle_since is not None:
            self._idle_seconds += now - self._idle_since
            self._idle_since = now
        counts["idle/engine_seconds"], self._idle_seconds = self._idle_seconds, 0.0
        return counts

    def _usable(self, request: GroupRequest, rollout: FinishedRollout) -> bool:
        if rollout.failure or rollout.reward is None:
            reason = rollout.failure.partition(":")[0] if rollout.failure else "no_reward"
            self._counts[f"rollouts/excluded/{reason}"] += 1
            self.last_failure = f"{rollout.rollout_id}: {rollout.failure or 'no reward was given'}"
            return False
        if not math.isfinite(rollout.reward):
            self._counts["rollouts/excluded/reward_not_finite"] += 1
            self.last_failure = f"{rollout.rollout_id}: its reward is {rollout.reward}"
            return False
        if request.validate:
            return True
        if not rollout.rows:
            self._counts["rollouts/excluded/no_trainable_tokens"] += 1
            self.last_failure = f"{rollout.rollout_id}: no model call with trainable tokens was captured"
            return False
        published = request.step - 1
        for row in rollout.rows:
            oldest = row.oldest_step
            if oldest < published:
                # Its engine did not take the weights that were published before the rollout was asked for.
                self._counts["rollouts/excluded/stale_engine"] += 1
                weights = f"the weights of step {oldest}" if oldest >= 0 else "weights of another trainer"
                self.last_failure = (
                    f"{rollout.rollout_id}: sampled by {weights}, although those of step {published} had "
                    "been published"
                )
                return False
            self._check_ids(rollout, row)
            if row.temperature != self._temperature:
                raise FidelityError(
                    f"rollout {rollout.rollout_id} was sampled at temperature {row.temperature}, the batch "
                    f"trains at "
                    f"{self._temperature}: set actor_rollout_ref.rollout.temperature to the engines' value"
                )
        return True

    def _check_ids(self, rollout: FinishedRollout, row: Row) -> None:
        largest = int(max(row.prompt_ids.max(initial=0), row.response_ids.max(initial=0)))
        if self._vocabulary and largest >= self._vocabulary:
            raise FidelityError(
                f"rollout {rollout.rollout_id} holds token {largest}, and the trained model has "
                f"{self._vocabulary} tokens: its engine serves another model or tokenizer"
            )

    def _publish(self, groups: list[FinishedGroup], validate: bool) -> None:
        """Puts the groups' rows and then their ends into the queue."""
        entries: list[QueueRow] = []
        ends: dict[str, dict[str, Any]] = {}
        for group in groups:
            # The source's request: a group taken over from an earlier trainer has the step it was asked for.
            request = group.request
            rows = self._rows(request, group)
            entries.extend(rows or [])
            status = "finished" if rows is not None else "failure"
            ends[request.uid] = {"is_prompt": True, "status": status, "global_steps": request.step}
        partition = "val" if validate else "train"
        if entries:
            put_rows(self._queue, entries, partition)
        if ends:
            # Last, so that a reader who sees a group as ended sees all its rows.
            tq.kv_batch_put(keys=list(ends), partition_id=partition, tags=list(ends.values()))

    def _rows(self, request: GroupRequest, group: FinishedGroup) -> list[QueueRow] | None:
        """Rows of a group's usable rollouts; None when too few are left to train."""
        source = self._sources.pop(request.uid)
        usable = [(n, rollout) for n, rollout in enumerate(group.rollouts) if self._usable(request, rollout)]
        self._counts["rollouts/finished"] += len(group.rollouts)
        if self.keep_rewards and not request.validate:
            judged = (each for each in group.rollouts if not each.failure and each.reward is not None)
            self._rewards[request.uid] = [each.reward for each in judged if each.reward is not None]
        if len(usable) < min(2, request.size) and not request.validate:
            self._counts["groups/dropped"] += 1
            return [] if self._keep_empty else None
        entries: list[QueueRow] = []
        for number, rollout in usable:
            kept = rollout
            if request.validate and not rollout.rows:
                kept = FinishedRollout(rollout.rollout_id, rollout.group_id, rollout.reward, (_PLACEHOLDER,))
            entries.extend(queue_rows(request, number, kept, source))
            if not request.validate:
                self._rollouts[rollout.rollout_id] = kept
        return entries
