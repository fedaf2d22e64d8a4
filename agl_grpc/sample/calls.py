"""Model calls of an attempt: one `Answer` per sampled choice, its place in the token tree, and whether it may
be trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from agl_grpc.model import raw
from agl_grpc.sample.tree import Node, TokenTree
from agl_grpc.sample.types import DropReason, Float32Array, Int32Array, Int64Array, SampleError, SampleRules
from agl_grpc.v1.model_call_pb2 import (
    LOGPROB_SEMANTICS_PROCESSED,
    LOGPROB_SEMANTICS_RAW,
    MODEL_CALL_OUTCOME_COMPLETE,
    MODEL_CALL_OUTCOME_CUT,
)
from agl_grpc.v1.span_pb2 import StoredSpan

_NO_CHOICE = raw.RawChoice()


class CallSpan(NamedTuple):
    """A span with a model call, as the store has it: its prompt may be a difference to another call.

    Attributes:
        span_id: 8 bytes.
        start: Nanoseconds since the epoch.
        sequence_id: Order of arrival.
        late: It is never trained.
        call: RawModelCall.
        context: It is none of the attempt's calls, only known because others build on its tokens.
    """

    span_id: bytes
    start: int
    sequence_id: int
    late: bool
    call: Any
    context: bool = False


@dataclass(slots=True, eq=False)
class Answer:
    """One sampled choice of a model call.

    place is its number among the attempt's answers. prompt and end are the nodes of the token tree at which
    its prompt and its response end. response, logprobs and versions have one entry a sampled token; a version
    is -1 where no policy run covers the token. cut: ended early by a disconnect, a deadline or an abort.
    excluded is None when the answer may be trained.
    """

    place: int
    span_id: bytes
    index: int
    prompt: Node
    end: Node
    response: Int32Array
    logprobs: Float32Array
    versions: Int64Array
    temperature: float
    truncated: bool
    cut: bool
    excluded: DropReason | None

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return self.prompt.end

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return self.prompt.end + len(self.response)


def read_calls(spans: Iterable[StoredSpan | CallSpan]) -> list[CallSpan]:
    """The model calls among spans, with their token arrays as bytes."""
    calls = []
    for span in spans:
        if isinstance(span, CallSpan):
            calls.append(span)
        elif span.span.HasField("model_call"):
            bare = raw.RawModelCall.FromString(span.span.model_call.SerializeToString())
            start = span.span.start_time_unix_nano
            calls.append(CallSpan(span.span.span_id, start, span.sequence_id, span.late, bare))
    return calls


def read_answers(spans: Iterable[StoredSpan | CallSpan], rules: SampleRules, tree: TokenTree) -> list[Answer]:
    """All answers of an attempt's model calls, put into the tree: by start time (then arrival, then index),
    late ones after all others.

    Raises SampleError for a prompt whose base is missing and for arrays of different length.
    """
    calls = read_calls(spans)
    prompts = _place_prompts(calls, tree)
    calls.sort(key=lambda call: (call.late, call.start, call.sequence_id))
    # A call that is retried is an orphan: its answer reached nobody. Late calls change nothing (see `build`).
    orphans = {call.call.retry_of for call in calls if not (call.late or call.context)}
    answers: list[Answer] = []
    for call in calls:
        if call.context:
            continue
        choices: Sequence[Any] = call.call.choices
        if len(choices) != 1:
            choices = sorted(choices, key=lambda choice: choice.index) or [_NO_CHOICE]
        for choice in choices:
            answers.append(_answer(len(answers), call, prompts[call.span_id], choice, rules, tree))
            if call.span_id in orphans and not call.late:
                answers[-1].excluded = DropReason.ORPHAN
    return answers


def _place_prompts(calls: Sequence[CallSpan], tree: TokenTree) -> dict[bytes, Node]:
    """Where each call's prompt ends, by span id; a prompt goes into the tree after the call it builds on."""
    by_id = {call.span_id: call for call in calls}
    placed: dict[bytes, Node] = {}
    for call in calls:
        waiting = [call]
        while waiting:
            prompt = waiting[-1].call.prompt
            base: bytes = prompt.base_span_id
            if base and base not in placed:
                if base not in by_id or len(waiting) > len(calls):
                    raise SampleError(
                        f"model call {waiting[-1].span_id.hex()} has a delta prompt whose base {base.hex()} "
                        "is not among the attempt's spans; read whole prompts or all spans"
                    )
                waiting.append(by_id[base])
                continue
            start = tree.root if not base else _kept(by_id[base], placed[base], prompt, tree)
            placed[waiting.pop().span_id] = tree.put(start, _ids(prompt.token_ids))
    return placed


def _kept(base: CallSpan, base_prompt: Node, prompt: Any, tree: TokenTree) -> Node:
    """Where the tokens end that a prompt keeps of another call's prompt and response."""
    end = base_prompt
    if prompt.base_length > base_prompt.end:
        response = base.call.choices[prompt.base_choice].token_ids
        end = tree.put(base_prompt, _ids(response))
    return tree.beginning(end, prompt.base_length)


def _answer(
    place: int, span: CallSpan, prompt: Node, choice: Any, rules: SampleRules, tree: TokenTree
) -> Answer:
    response = _ids(choice.token_ids)
    logprobs: Float32Array = np.frombuffer(choice.logprobs, "<f4")
    if len(logprobs) != len(response):
        raise SampleError(
            f"model call {span.span_id.hex()} choice {choice.index}: {len(response)} token ids "
            f"but {len(logprobs)} logprobs"
        )
    # The product is cheap, and finite unless one of them is not (or is beyond any logprob).
    if not math.isfinite(logprobs.dot(logprobs)) and not np.isfinite(logprobs).all():
        raise SampleError(f"model call {span.span_id.hex()} choice {choice.index}: logprob not finite")
    call = span.call
    versions = _versions(choice.policy_runs, len(response))
    return Answer(
        place,
        span.span_id,
        choice.index,
        prompt,
        tree.put(prompt, response),
        response,
        logprobs,
        versions,
        call.sampling.temperature if call.sampling.HasField("temperature") else 1.0,
        choice.finish_reason == "length",
        call.outcome == MODEL_CALL_OUTCOME_CUT or choice.finish_reason == "abort",
        _excluded(span, len(response), versions, rules),
    )


def _excluded(span: CallSpan, length: int, versions: Int64Array, rules: SampleRules) -> DropReason | None:
    # One test after the other: a table of all would cost more than the rest of an answer.
    call = span.call
    reason: DropReason | None = None
    if span.late:
        reason = DropReason.LATE
    elif rules.model and call.model != rules.model:
        reason = DropReason.OTHER_MODEL
    elif call.mode != "train":
        reason = DropReason.NOT_TRAIN_MODE
    elif rules.agents and call.agent_name not in rules.agents:
        reason = DropReason.OTHER_AGENT
    elif call.untrainable_reason:
        reason = DropReason.UNTRAINABLE
    elif call.outcome != MODEL_CALL_OUTCOME_COMPLETE:
        reason = DropReason.NOT_COMPLETE
    elif not length:
        reason = DropReason.EMPTY_RESPONSE
    elif not _logprobs_usable(call):
        reason = DropReason.LOGPROBS_UNKNOWN
    elif versions.min() < 0:
        reason = DropReason.POLICY_VERSION_UNKNOWN
    return reason


def _logprobs_usable(call: Any) -> bool:
    """Whether the logprobs are of the distribution that was sampled from."""
    if call.logprob_semantics == LOGPROB_SEMANTICS_PROCESSED:
        return True
    # The model's own distribution is the sampled one only at temperature 1.
    at_one = not call.sampling.HasField("temperature") or call.sampling.temperature == 1.0
    return bool(call.logprob_semantics == LOGPROB_SEMANTICS_RAW and at_one)


def _versions(runs: Sequence[Any], length: int) -> Int64Array:
    if len(runs) == 1 and (runs[0].start, runs[0].end) == (0, length):
        return np.full(length, runs[0].policy_version, dtype=np.int64)
    versions = np.full(length, -1, dtype=np.int64)
    for run in runs:
        if not 0 <= run.start <= run.end <= length:
            raise SampleError(f"policy run [{run.start}, {run.end}) outside a response of {length} tokens")
        versions[run.start : run.end] = run.policy_version
    return versions


def _ids(data: bytes) -> Int32Array:
    return np.frombuffer(data, "<i4")
