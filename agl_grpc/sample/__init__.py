"""Model calls and rewards of sealed attempts -> rows that a learner trains on. numpy only."""

from __future__ import annotations

from agl_grpc.sample.breaks import Decode
from agl_grpc.sample.build import build_attempt, prune_groups, total_account, zero_variance_groups
from agl_grpc.sample.calls import CallSpan
from agl_grpc.sample.digest import batch_digest, sample_digest, token_digest
from agl_grpc.sample.explain import AnswerFate, Fate, Stretch, explain_attempt
from agl_grpc.sample.facts import AttemptFacts, Verdict, observe
from agl_grpc.sample.rewards import Judgement, final_reward, judge
from agl_grpc.sample.types import (
    AttemptRecord,
    AttemptSamples,
    DropReason,
    OverLong,
    RowStart,
    Sample,
    SampleError,
    SampleRules,
    TokenAccount,
    Truncated,
    Turn,
)
from agl_grpc.sample.wire import Columns, pack, read_columns, unpack

__all__ = [
    "AnswerFate",
    "AttemptFacts",
    "AttemptRecord",
    "AttemptSamples",
    "CallSpan",
    "Columns",
    "Decode",
    "DropReason",
    "Fate",
    "Judgement",
    "OverLong",
    "RowStart",
    "Sample",
    "SampleError",
    "SampleRules",
    "Stretch",
    "TokenAccount",
    "Truncated",
    "Turn",
    "Verdict",
    "batch_digest",
    "build_attempt",
    "explain_attempt",
    "final_reward",
    "judge",
    "observe",
    "pack",
    "prune_groups",
    "read_columns",
    "sample_digest",
    "token_digest",
    "total_account",
    "unpack",
    "zero_variance_groups",
]
