"""Rows of finished groups in the form in which verl's TransferQueue holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agl_grpc.learner.credit.advantage import row_label
from agl_grpc.learner.rollouts.groups import FinishedRollout, GroupRequest, Row

Fields = dict[str, Any]
Tag = dict[str, Any]


@dataclass(frozen=True)
class QueueRow:
    """One entry of the TransferQueue: key ``{uid}_{rollout number}_{row number}``, tensors, tag."""

    key: str
    fields: Fields
    tag: Tag


def row_key(request: GroupRequest, number: int, row: int) -> str:
    """verl's key form: everything before the first underscore is the group, the middle is the rollout."""
    return f"{request.uid}_{number}_{row}"


def _tensors(row: Row, reward: float) -> Fields:
    # Arrays until the end: of tensors as short as these, torch's own calls cost many times as much.
    prompts, responses = row.prompt_ids, row.response_ids
    inputs = np.concatenate([prompts, responses], dtype=np.int64)
    scores = np.zeros(len(responses), dtype=np.float32)
    scores[-1] = reward
    mask = _tensor(row.response_mask, np.int64)
    return {
        "prompts": _tensor(prompts, np.int64),
        "responses": _tensor(responses, np.int64),
        "response_mask": mask,
        "loss_mask": mask,
        "input_ids": torch.from_numpy(inputs),
        "position_ids": torch.from_numpy(np.arange(len(inputs))),
        "rollout_log_probs": _tensor(row.logprobs, np.float32),
        "policy_versions": _tensor(row.policy_versions, np.int64),
        "rm_scores": torch.from_numpy(scores),
    }


def _tensor(values: NDArray[Any], dtype: type[np.generic]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))


def _versions(row: Row, fallback: int) -> tuple[int, int]:
    sampled = row.policy_versions[np.asarray(row.response_mask, dtype=bool)]
    return (int(sampled.min()), int(sampled.max())) if len(sampled) else (fallback, fallback)


def queue_rows(request: GroupRequest, number: int, rollout: FinishedRollout, source: str) -> list[QueueRow]:
    """Entries of one rollout; every row carries the rollout's reward on its last token."""
    reward = 0.0 if rollout.reward is None else rollout.reward
    # By name, for verl's filter of groups by one of them. Validation has no use for them.
    named = {} if request.validate else {each.name: each.value for each in rollout.facts.verdicts}
    entries = []
    for position, row in enumerate(rollout.rows):
        fields = _tensors(row, reward)
        fields.update(
            # verl groups validation by this field; in training it tells the advantage estimator the rollout.
            uid=request.uid if request.validate else row_label(request.uid, number, position),
            rollout_id=rollout.rollout_id,
            data_source=source,
            num_turns=len(rollout.rows) + 1,
            multi_modal_inputs={},
            extra_fields={"reward_extra_info": named},
            reward_model={"ground_truth": None},
        )
        oldest, newest = _versions(row, request.step - 1)
        prompt_length, response_length = len(row.prompt_ids), len(row.response_ids)
        tag = {
            "status": "success",
            "prompt_len": prompt_length,
            "response_len": response_length,
            "seq_len": prompt_length + response_length,
            "global_steps": request.step,
            "min_global_steps": oldest,
            "max_global_steps": newest,
        }
        entries.append(QueueRow(row_key(request, number, position), fields, tag))
    return entries
