"""Packed columns of a batch as torch sees them: one jagged tensor a column, without a copy."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from agl_grpc.sample.wire import Columns


def tensor_dict(columns: Columns) -> TensorDict:
    """The rows of a batch (`StreamBatch`, `ReplayBatch`) as a TensorDict.

    ``input_ids``, ``loss_mask``, ``logprobs`` and ``policy_versions`` are jagged, one entry a token, prompts
    included; ``prompt_lengths``, ``rewards`` and ``temperatures`` have one a row. The tensors share the
    answer's memory: they are not to be written to.
    """
    offsets = torch.from_numpy(columns.row_offsets.astype(np.int64))
    tokens = {
        name: torch.nested.nested_tensor_from_jagged(_shared(getattr(columns, name)), offsets)
        for name in ("input_ids", "loss_mask", "logprobs", "policy_versions")
    }
    rows = {name: _shared(getattr(columns, name)) for name in ("rewards", "temperatures")}
    lengths = torch.from_numpy(columns.prompt_lengths.astype(np.int64))
    return TensorDict({**tokens, **rows, "prompt_lengths": lengths}, batch_size=[columns.rows])


def _shared(array: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        # What a message holds cannot be written to, and torch has no word for that.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(array)
