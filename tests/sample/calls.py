"""Stored model-call spans for the tests."""

from __future__ import annotations

from collections.abc import Sequence

from agl_grpc.sample import AttemptRecord
from agl_grpc.v1.model_call_pb2 import (
    LOGPROB_SEMANTICS_PROCESSED,
    MODEL_CALL_OUTCOME_COMPLETE,
    Choice,
    ModelCall,
    PolicyRun,
    PromptTokens,
    SamplingParameters,
)
from agl_grpc.v1.reward_pb2 import Reward
from agl_grpc.v1.span_pb2 import Span, StoredSpan


def choice(ids: Sequence[int], index: int = 0, finish: str = "stop", version: int = 3) -> Choice:
    """One answer; its logprobs are -0.01 per token id, so that each can be recognised."""
    return Choice(
        index=index,
        token_ids=ids,
        logprobs=[-0.01 * i for i in ids],
        finish_reason=finish,
        policy_runs=[PolicyRun(start=0, end=len(ids), policy_version=version)] if ids else [],
    )


def call(
    prompt: Sequence[int], *answers: Sequence[int] | Choice, at: int = 1, **changes: object
) -> StoredSpan:
    """A complete trainable call at time `at` (also its span id); `changes` are fields of ModelCall."""
    choices = [a if isinstance(a, Choice) else choice(a, i) for i, a in enumerate(answers)]
    model_call = ModelCall(
        model="tiny",
        prompt=PromptTokens(token_ids=prompt),
        choices=choices,
        sampling=SamplingParameters(temperature=1.0),
        logprob_semantics=LOGPROB_SEMANTICS_PROCESSED,
        outcome=MODEL_CALL_OUTCOME_COMPLETE,
        mode="train",
    )
    model_call.MergeFrom(ModelCall(**changes))  # type: ignore[arg-type]  # keywords of a message's fields
    span = Span(span_id=at.to_bytes(8), name="model call", start_time_unix_nano=at, model_call=model_call)
    return StoredSpan(rollout_id="ro", attempt_id="at", sequence_id=at, span=span)


def record(
    *spans: StoredSpan, reward: float | None = 1.0, group: str = "g", rollout: str = "ro"
) -> AttemptRecord:
    """A sealed attempt with these spans."""
    rewards = [] if reward is None else [Reward(value=reward, revision=1)]
    return AttemptRecord(rollout, f"{rollout}-at", group, spans, rewards)
