"""verl's rollout correction over rollouts instead of rows.

Tokens that older weights have sampled, or an engine of another precision, are weighed by how much likelier
the trainer's weights make them (truncated importance sampling), or left out (rejection). verl computes the
weight of a *sequence* over a row; a rollout may have several.
"""

from __future__ import annotations

from typing import Any

import torch
from verl import DataProto
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch

from agl_grpc.learner.batch.sequences import RolloutSequences

_COLUMNS = ("old_log_probs", "rollout_log_probs", "response_mask")


def correct_over_rollouts(data: DataProto, config: Any) -> tuple[DataProto, dict[str, float]]:
    """Stands where verl has ``compute_rollout_correction_and_add_to_batch``.

    Args:
        data: rows with ``old_log_probs``, ``rollout_log_probs``, ``response_mask``, each (rows, tokens), and
            their labels as ``uid``.
        config: verl's ``algorithm.rollout_correction`` section.

    Returns:
        The rows, with ``rollout_is_weights`` where weights were asked for and without rejected tokens in
        ``response_mask``; verl's metrics, and how many tokens were rejected.
    """
    mask = data.batch["response_mask"]
    sequences = RolloutSequences(data.non_tensor_batch["uid"], mask)
    flat = DataProto.from_dict(tensors={name: sequences.gather(data.batch[name]) for name in _COLUMNS})
    flat, metrics = compute_rollout_correction_and_add_to_batch(flat, config)
    kept = sequences.scatter(flat.batch["response_mask"])
    if "rollout_is_weights" in flat.batch:
        data.batch["rollout_is_weights"] = sequences.scatter(flat.batch["rollout_is_weights"])
    data.batch["response_mask"] = kept.to(mask.dtype)
    return data, {**metrics, "tokens/rejected": float(mask.sum() - torch.count_nonzero(kept))}
