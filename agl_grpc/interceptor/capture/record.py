"""A model call while it is captured, and as a span of the contract when it has ended."""

from __future__ import annotations

import hashlib
import os
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agl_grpc.interceptor.attribution import CallContext
from agl_grpc.interceptor.capture.versions import VersionRun
from agl_grpc.interceptor.capture.wire import field as wire_field
from agl_grpc.interceptor.capture.wire import packed_floats, packed_ids
from agl_grpc.v1 import common_pb2, model_call_pb2, span_pb2

_MOST_EXPERT_BYTES = 2 * 1024 * 1024
"""A span has at most 4 MiB."""


@dataclass
class ChoiceRecord:
    """One sampled answer as far as it has come; ids and logprobs have the same length."""

    index: int
    token_ids: array[int] = field(default_factory=lambda: array("I"))
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    stop_reason: str = ""
    runs: list[VersionRun] = field(default_factory=list)
    routed_experts: bytes = b""


@dataclass(frozen=True)
class EngineIdentity:
    """The engine as it appears in every record of it."""

    engine_id: str
    engine_version: str
    model: str
    processed_logprobs: bool


@dataclass
class CallRecord:
    """One call of the model. Times are nanoseconds; `started` since the epoch, `began` monotonic."""

    context: CallContext
    request_id: str
    model: str
    sampling: model_call_pb2.SamplingParameters
    span_id: bytes = field(default_factory=lambda: os.urandom(8))
    started: int = field(default_factory=time.time_ns)
    began: int = field(default_factory=time.monotonic_ns)
    prompt_ids: Sequence[int] = field(default_factory=list)
    choices: dict[int, ChoiceRecord] = field(default_factory=dict)
    outcome: int = model_call_pb2.MODEL_CALL_OUTCOME_COMPLETE
    reasons: list[str] = field(default_factory=list)
    error: str = ""
    queue_ns: int = 0
    first_token_ns: int = 0
    total_ns: int = 0
    weights_digest: str = ""
    cache_salt: str = ""
    retry_of: bytes = b""
    notes: list[common_pb2.KeyValue] = field(default_factory=list)
    raw_request: common_pb2.Payload | None = None
    raw_response: common_pb2.Payload | None = None

    def untrainable(self, reason: str) -> None:
        """Note why this call must not be trained; the same reason counts once."""
        if reason not in self.reasons:
            self.reasons.append(reason)

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and of all answers."""
        return len(self.prompt_ids) + sum(len(choice.token_ids) for choice in self.choices.values())

    def responses(self) -> dict[int, Sequence[int]]:
        """Response tokens by choice."""
        return {index: choice.token_ids for index, choice in self.choices.items()}

    def end(self) -> None:
        """Stop the clock; a second call changes nothing."""
        self.total_ns = self.total_ns or time.monotonic_ns() - self.began


def failed_record(
    context: CallContext, model: str, status: int, reason: str, raw: common_pb2.Payload | None = None
) -> CallRecord:
    """The record of a call that was answered with an error of this HTTP status before any engine had it."""
    record = CallRecord(context, "", model, model_call_pb2.SamplingParameters())
    record.outcome = model_call_pb2.MODEL_CALL_OUTCOME_ERROR
    record.error = f"{status}: {reason}"[:500]
    record.raw_request = raw
    record.end()
    return record


def trace_id_of(record: CallRecord) -> bytes:
    """The agent's trace where it sent one, else one per attempt, so that an attempt's calls lie together."""
    if record.context.trace_id:
        return record.context.trace_id
    return hashlib.sha256(record.context.attribution.attempt_id.encode()).digest()[:16]


def to_span(record: CallRecord, identity: EngineIdentity) -> span_pb2.Span:
    """The span of an ended call, without its prompt (see `deltas`)."""
    attribution = record.context.attribution
    failed = record.outcome == model_call_pb2.MODEL_CALL_OUTCOME_ERROR
    span = span_pb2.Span(
        trace_id=trace_id_of(record),
        span_id=record.span_id,
        parent_span_id=record.context.parent_span_id,
        name=f"model_call {record.model}",
        kind=span_pb2.SPAN_KIND_SERVER,
        start_time_unix_nano=record.started,
        end_time_unix_nano=record.started + record.total_ns,
        status=span_pb2.SpanStatus(
            code=span_pb2.SPAN_STATUS_CODE_ERROR if failed else span_pb2.SPAN_STATUS_CODE_OK,
            message=record.error,
        ),
        scope_name="agl_grpc.interceptor",
    )
    call = span.model_call
    call.model = record.model
    call.sampling.CopyFrom(record.sampling)
    call.sampling.other.extend(record.notes)
    call.logprob_semantics = (
        model_call_pb2.LOGPROB_SEMANTICS_PROCESSED
        if identity.processed_logprobs
        else model_call_pb2.LOGPROB_SEMANTICS_RAW
    )
    call.outcome = record.outcome  # type: ignore[assignment]  # the field is the enum's integer on the wire
    call.untrainable_reason = "; ".join(record.reasons)
    call.engine_id = identity.engine_id
    call.engine_version = identity.engine_version
    call.weights_digest = record.weights_digest
    call.cache_salt = record.cache_salt
    call.api = record.context.api
    call.request_id = record.request_id
    call.timings.queue_ns = record.queue_ns
    call.timings.first_token_ns = record.first_token_ns
    call.timings.total_ns = record.total_ns
    call.agent_name = attribution.agent_name
    call.mode = attribution.mode
    call.retry_of = record.retry_of
    if record.raw_request is not None:
        call.raw_request.CopyFrom(record.raw_request)
    if record.raw_response is not None:
        call.raw_response.CopyFrom(record.raw_response)
    for index in sorted(record.choices):
        _add_choice(call, record.choices[index])
    return span


def _add_choice(call: model_call_pb2.ModelCall, choice: ChoiceRecord) -> None:
    added = call.choices.add(
        index=choice.index,
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
        routed_experts=choice.routed_experts,
    )
    added.MergeFromString(
        wire_field(added.TOKEN_IDS_FIELD_NUMBER, packed_ids(choice.token_ids))
        + wire_field(added.LOGPROBS_FIELD_NUMBER, packed_floats(choice.logprobs))
    )
    for run in choice.runs:
        added.policy_runs.add(start=run.start, end=run.end, policy_version=run.policy_version)


def note_experts(record: CallRecord, choice: ChoiceRecord, experts: Any) -> None:
    """The experts that an engine of a mixture model routed each token to: an array of tokens (of the prompt,
    then of the answer), layers and experts; None elsewhere. Its shape and type stand beside the sampling.
    """
    if experts is None:
        return
    if experts.nbytes > _MOST_EXPERT_BYTES:
        record.notes.append(key_value("routed_experts", f"not kept: {experts.nbytes} bytes"))
        return
    choice.routed_experts = experts.tobytes()
    shape = "x".join(map(str, experts.shape))
    record.notes.append(key_value(f"routed_experts.{choice.index}", f"{shape} {experts.dtype}"))


def note_media(record: CallRecord, hashes: Mapping[str, Sequence[str]]) -> None:
    """The engine's hashes of what a prompt has besides text, by kind: prompts of the same ids may differ in
    their pictures.
    """
    for kind, found in hashes.items():
        for number, value in enumerate(found):
            record.notes.append(key_value(f"multimodal.{kind}.{number}", value))


def key_value(key: str, value: Any) -> common_pb2.KeyValue:
    """A named value of the contract: booleans, integers, floats as such, everything else as text."""
    if isinstance(value, bool):
        return common_pb2.KeyValue(key=key, value=common_pb2.AnyValue(bool_value=value))
    if isinstance(value, int):
        return common_pb2.KeyValue(key=key, value=common_pb2.AnyValue(int_value=value))
    if isinstance(value, float):
        return common_pb2.KeyValue(key=key, value=common_pb2.AnyValue(double_value=value))
    return common_pb2.KeyValue(key=key, value=common_pb2.AnyValue(string_value=str(value)))
