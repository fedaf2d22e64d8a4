"""Best-of-n: rejection sampling with the weights in force, then verl's supervised loss on what is left.

A step's rollouts are made, proven and committed as in reinforcement learning; then the best of every group
are learned, each token with the same weight, and the others are left out.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.workers.utils.losses import sft_loss

from agl_grpc.learner.hooks import Hooks
from agl_grpc.learner.rollouts.groups import ClaimedBatch
from agl_grpc.learner.supervised.selection import Judged, best_of_groups
from agl_grpc.learner.verl.local_queue import texts

# Log-probabilities of the supervised loss are those of the model itself, however it was sampled.
TEMPERATURE = 1.0


class LearnsBest:
    """What the trainer does otherwise when ``hooks.best_of`` keeps the best of every group."""

    hooks: Hooks
    actor_rollout_wg: Any
    _claimed: ClaimedBatch | None
    _counts: Counter[str]

    @property
    def learns_best(self) -> bool:
        """Whether rollouts are chosen, in place of being weighed by their advantages."""
        return self.hooks.best_of.keep > 0

    def use_supervised_loss(self) -> None:
        """Gives the actor's workers verl's SFT loss in place of its policy loss."""
        self.actor_rollout_wg.set_loss_fn(partial(sft_loss, config=None))

    def choose_best(self, data: Any, batch_keys: list[str], **_options: Any) -> Any:
        """Stands where verl computes advantages: 1 on every token that is learned, 0 on the others."""
        assert self._claimed is not None
        rules = self.hooks.best_of
        judged = [Judged(each.rollout_id, each.group_id, each.reward) for each in self._claimed.entries]
        kept = set(best_of_groups(judged, rules.keep, rules.min_reward))
        (names,) = texts(self.hooks.queue, batch_keys, "train", "rollout_id")
        mask = data.batch["response_mask"].to(torch.float32)
        learned = mask * torch.tensor([[float(name in kept)] for name in names])
        data.batch["advantages"] = data.batch["returns"] = learned
        self._count_best(judged, kept, float(mask.sum() - learned.sum()))
        return data

    def _count_best(self, judged: list[Judged], kept: set[str], left_out: float) -> None:
        groups = {each.group_id for each in judged}
        learned = [each for each in judged if each.rollout_id in kept]
        self._counts.update({"tokens/dropped/not_best": left_out, "tokens/dropped": left_out})
        self._counts.subtract({"tokens/trained": left_out})
        self._counts.update(
            {
                "best_of/groups": len(groups),
                "best_of/groups_learned": len({each.group_id for each in learned}),
                "best_of/rollouts_learned": len(learned),
            }
        )

    def mask_others(self, batch: KVBatchMeta) -> None:
        """Writes the loss mask over whole sequences, as the SFT loss takes it, from the advantages."""
        names = ["prompts", "advantages"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        masks = [
            torch.cat([torch.zeros(len(prompt), dtype=torch.int64), (learned > 0).to(torch.int64)])
            for prompt, learned in zip(data["prompts"].unbind(), data["advantages"].unbind(), strict=True)
        ]
        nested = torch.nested.as_nested_tensor(masks, layout=torch.jagged)
        fields = TensorDict({"loss_mask": nested}, batch_size=len(batch))
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    def rows_of_best(self, batch: KVBatchMeta) -> KVBatchMeta | None:
        """The rows that are learned, filled up with masked ones for all workers; None = no row is."""
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["advantages"])
        learned = np.array([bool((row > 0).any()) for row in data["advantages"].unbind()])
        if not learned.any():
            return None
        workers = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
        missing = -int(learned.sum()) % workers
        fill = np.flatnonzero(~learned)[:missing]
        chosen = sorted([*np.flatnonzero(learned).tolist(), *fill.tolist()])
        return batch.select_keys([batch.keys[place] for place in chosen])
