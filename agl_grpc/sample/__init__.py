"""Model calls and rewards of sealed attempts -> rows that a learner trains on. numpy only."""

from __future__ import annotations

from agl_grpc.sample.build import build_attempt, prune_groups, total_account, zero_variance_groups
from agl_grpc.sample.digest import batch_digest, sample_digest, token_digest
from agl_grpc.sample.rewards import final_reward
from agl_grpc.sample.types import (
    AttemptRecord,
    AttemptSamples,
    DropReason,
    RowStart,
    Sample,
    SampleError,
    SampleRules,
    TokenAccount,
)

__all__ = [
    "AttemptRecord",
    "AttemptSamples",
    "DropReason",
    "RowStart",
    "Sample",
    "SampleError",
    "SampleRules",
    "TokenAccount",
    "batch_digest",
    "build_attempt",
    "final_reward",
    "prune_groups",
    "sample_digest",
    "token_digest",
    "total_account",
    "zero_variance_groups",
]
