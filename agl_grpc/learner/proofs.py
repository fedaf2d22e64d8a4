"""The claim of every batch, and the proofs made on its rows, between verl's phases."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import transfer_queue as tq
from transfer_queue import KVBatchMeta

from agl_grpc.learner.batch.checks import (
    LogprobRow,
    SealedRow,
    account,
    check_logprobs,
    check_seals,
    row_starts,
    staleness,
)
from agl_grpc.learner.batch.step_metrics import sampler_distance
from agl_grpc.learner.credit.advantage import label_group
from agl_grpc.learner.errors import ConfigError
from agl_grpc.learner.hooks import Hooks
from agl_grpc.learner.rollouts.groups import ClaimedBatch
from agl_grpc.learner.verl.local_queue import texts


def real_keys(batch: KVBatchMeta) -> list[str]:
    """Keys of a batch's rows without those that verl pads with."""
    return [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]


class ProvesBatches:
    """The part of a trainer of verl's that claims a batch, and proves it before the optimiser may use it."""

    hooks: Hooks
    agent_loop_manager: Any
    global_steps: int
    uncommitted: list[ClaimedBatch]
    _claims: ThreadPoolExecutor
    _claiming: Future[ClaimedBatch]
    _claimed: ClaimedBatch | None
    _claimed_in_step: list[ClaimedBatch]
    _counts: Counter[str]

    def _start_claim(self, rollout_ids: list[str]) -> None:
        """Asks for the claim of a batch; the store works on it while workers recompute logprobs."""
        self._claiming = self._claims.submit(self.hooks.source.claim, self.global_steps, rollout_ids)

    def _await_claim(self) -> None:
        """Returns when the batch is claimed: nothing is learned from it before."""
        self._claimed = self._claiming.result()
        self.uncommitted.append(self._claimed)
        self._claimed_in_step.append(self._claimed)

    def _prove_tokens(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> None:
        names = ["rollout_log_probs", "old_log_probs", "response_mask", "policy_versions"]
        keys = real_keys(batch)
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=names)
        columns = [
            np.split(data[name].values().numpy(), data[name].offsets()[1:-1].numpy()) for name in names
        ]
        if not any(mask.any() for mask in columns[2]):
            raise ConfigError(
                f"no token of step {self.global_steps} is trained, all are masked: where answers were cut "
                "off at the length limit, allow longer ones, or set samples.truncated to train"
            )
        rows = [LogprobRow(key, *values) for key, *values in zip(keys, *columns, strict=True)]
        version = self.global_steps - 1
        metrics.update(check_logprobs(rows, version=version, limits=self.hooks.limits))
        metrics.update(sampler_distance(rows, version=version))
        self._counts.update(staleness(rows, version=version))
        trained: Counter[str] = Counter()
        (rollout_ids,) = texts(self.hooks.queue, keys, batch.partition_id, "rollout_id")
        for rollout_id, mask in zip(rollout_ids, columns[2], strict=True):
            trained[rollout_id] += int(mask.sum())
        rollouts = [self.agent_loop_manager.rollout(rollout_id) for rollout_id in trained]
        self._counts.update(account(rollouts, trained))
        self._counts.update(row_starts(rollouts))

    def _prove_seals(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> None:
        assert self._claimed is not None
        keys = real_keys(batch)
        rollout_ids, labels = texts(self.hooks.queue, keys, batch.partition_id, "rollout_id", "uid")
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["rm_scores"])
        scores = [float(row.sum()) for row in data["rm_scores"].unbind()]
        groups_of_rows = [label_group(label) for label in labels]
        rows = [SealedRow(*values) for values in zip(keys, rollout_ids, groups_of_rows, scores, strict=True)]
        metrics.update(check_seals(rows, self._claimed.entries))
        rewards = [entry.reward for entry in self._claimed.entries]
        metrics["reward/mean"], metrics["reward/std"] = float(np.mean(rewards)), float(np.std(rewards))
        groups: dict[str, set[float]] = {}
        for entry in self._claimed.entries:
            groups.setdefault(entry.group_id, set()).add(entry.reward)
        metrics["reward/groups_without_variance"] = float(
            np.mean([len(values) == 1 for values in groups.values()])
        )
