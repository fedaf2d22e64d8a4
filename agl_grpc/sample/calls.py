"""Model calls as arrays: one `Answer` per sampled choice, and whether it may be trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from agl_grpc.sample.types import DropReason, Float32Array, Int32Array, Int64Array, SampleError, SampleRules
from agl_grpc.v1.model_call_pb2 import (
    LOGPROB_SEMANTICS_PROCESSED,
    LOGPROB_SEMANTICS_RAW,
    MODEL_CALL_OUTCOME_COMPLETE,
    Choice,
    ModelCall,
)
from agl_grpc.v1.span_pb2 import StoredSpan


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """One sampled choice of a model call with its whole prompt.

    sequence int32[P+R] is the prompt (P = prompt_length) and then the response.
    versions int64[R] is -1 where no policy run covers the token.
    excluded is None when the answer may be trained.
    """

    span_id: bytes
    index: int
    sequence: Int32Array
    prompt_length: int
    logprobs: Float32Array
    versions: Int64Array
    temperature: float
    truncated: bool
    excluded: DropReason | None

    @property
    def prompt(self) -> Int32Array:
        """Prompt tokens."""
        return self.sequence[: self.prompt_length]

    @property
    def response(self) -> Int32Array:
        """Sampled tokens."""
        return self.sequence[self.prompt_length :]


def read_answers(spans: Iterable[StoredSpan], rules: SampleRules) -> list[Answer]:
    """All answers of an attempt's model calls, by start time (then arrival, then index).

    Raises SampleError for prompts that are not whole and for arrays of different length.
    """
    calls = [stored for stored in spans if stored.span.HasField("model_call")]
    calls.sort(key=lambda stored: (stored.span.start_time_unix_nano, stored.sequence_id))
    orphans = {stored.span.model_call.retry_of for stored in calls}
    answers: list[Answer] = []
    for stored in calls:
        call = stored.span.model_call
        if call.prompt.base_span_id:
            raise SampleError(
                f"model call {stored.span.span_id.hex()} has a delta prompt; read whole prompts"
            )
        prompt = _tokens(call.prompt.token_ids)
        choices = sorted(call.choices, key=lambda choice: choice.index) or [Choice()]
        orphan = stored.span.span_id in orphans
        answers.extend(_answer(stored, prompt, choice, rules, orphan) for choice in choices)
    return answers


def _answer(
    stored: StoredSpan, prompt: Int32Array, choice: Choice, rules: SampleRules, orphan: bool
) -> Answer:
    response = _tokens(choice.token_ids)
    logprobs = np.asarray(choice.logprobs, dtype=np.float32)
    if len(logprobs) != len(response):
        raise SampleError(
            f"model call {stored.span.span_id.hex()} choice {choice.index}: {len(response)} token ids "
            f"but {len(logprobs)} logprobs"
        )
    if not np.isfinite(logprobs).all():
        raise SampleError(f"model call {stored.span.span_id.hex()} choice {choice.index}: logprob not finite")
    call = stored.span.model_call
    versions = _versions(choice, len(response))
    return Answer(
        span_id=stored.span.span_id,
        index=choice.index,
        sequence=np.concatenate([prompt, response]),
        prompt_length=len(prompt),
        logprobs=logprobs,
        versions=versions,
        temperature=call.sampling.temperature if call.sampling.HasField("temperature") else 1.0,
        truncated=choice.finish_reason == "length",
        excluded=DropReason.ORPHAN if orphan else _excluded(stored, call, len(response), versions, rules),
    )


def _excluded(
    stored: StoredSpan, call: ModelCall, length: int, versions: Int64Array, rules: SampleRules
) -> DropReason | None:
    checks = (
        (stored.late, DropReason.LATE),
        (bool(rules.model) and call.model != rules.model, DropReason.OTHER_MODEL),
        (call.mode != "train", DropReason.NOT_TRAIN_MODE),
        (bool(rules.agents) and call.agent_name not in rules.agents, DropReason.OTHER_AGENT),
        (bool(call.untrainable_reason), DropReason.UNTRAINABLE),
        (call.outcome != MODEL_CALL_OUTCOME_COMPLETE, DropReason.NOT_COMPLETE),
        (length == 0, DropReason.EMPTY_RESPONSE),
        (not _logprobs_usable(call), DropReason.LOGPROBS_UNKNOWN),
        (bool((versions < 0).any()), DropReason.POLICY_VERSION_UNKNOWN),
    )
    return next((reason for failed, reason in checks if failed), None)


def _logprobs_usable(call: ModelCall) -> bool:
    """Whether the logprobs are of the distribution that was sampled from."""
    if call.logprob_semantics == LOGPROB_SEMANTICS_PROCESSED:
        return True
    # The model's own distribution is the sampled one only at temperature 1.
    at_one = not call.sampling.HasField("temperature") or call.sampling.temperature == 1.0
    return call.logprob_semantics == LOGPROB_SEMANTICS_RAW and at_one


def _versions(choice: Choice, length: int) -> Int64Array:
    versions = np.full(length, -1, dtype=np.int64)
    for run in choice.policy_runs:
        if not 0 <= run.start <= run.end <= length:
            raise SampleError(f"policy run [{run.start}, {run.end}) outside a response of {length} tokens")
        versions[run.start : run.end] = run.policy_version
    return versions


def _tokens(ids: Iterable[int]) -> Int32Array:
    return np.fromiter(ids, dtype=np.int64).astype(np.int32)
