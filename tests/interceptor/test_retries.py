"""Retries of SDKs are told from samples."""

from __future__ import annotations

from array import array

from agl_grpc.interceptor.capture.deltas import whole
from agl_grpc.interceptor.capture.raw import raw_payload
from agl_grpc.interceptor.capture.retries import Retries, tries_of
from agl_grpc.model.value import RawPayload, from_payload
from agl_grpc.sample.calls import read_answers
from agl_grpc.sample.tree import TokenTree
from agl_grpc.sample.types import DropReason, SampleRules
from agl_grpc.v1 import common_pb2, model_call_pb2, span_pb2

ATTEMPT = ("ro", "at")


def test_eight_equal_requests_are_eight_samples() -> None:
    retries = Retries()
    for number in range(8):
        assert retries.note(ATTEMPT, 1, bytes([number]), 0).span_id == b""


def test_a_client_that_says_so_repeats_its_last_try_once() -> None:
    retries = Retries()
    retries.note(ATTEMPT, 1, b"first", 0)
    assert retries.note(("ro", "other"), 1, b"x", 1).span_id == b""
    assert retries.note(ATTEMPT, 2, b"y", 1).span_id == b""
    assert retries.note(ATTEMPT, 1, b"second", 1).span_id == b"first"
    assert retries.note(ATTEMPT, 1, b"third", 2).span_id == b"second"


def test_of_several_equal_ones_the_lost_one_is_repeated_and_nothing_is_guessed() -> None:
    retries = Retries()
    for number in range(3):
        retries.note(ATTEMPT, 1, bytes([number]), 0)
    found = retries.note(ATTEMPT, 1, b"retry", 1)
    assert (found.span_id, found.candidates) == (b"", 3)
    retries.lost(ATTEMPT, bytes([1]))
    assert retries.note(ATTEMPT, 1, b"again", 1).span_id == bytes([1])
    # A client without such a header, which went away and came back.
    retries.lost(ATTEMPT, bytes([2]))
    assert retries.note(ATTEMPT, 1, b"more", 0).span_id == bytes([2])
    assert retries.note(ATTEMPT, 1, b"new", 0).span_id == b""


def test_what_clients_say() -> None:
    assert tries_of({"x-stainless-retry-count": "2"}) == 2
    assert tries_of({"x-stainless-retry-count": "-1"}) == tries_of({}) == 0


def test_remembers_a_bounded_number_of_attempts() -> None:
    retries = Retries(attempts=2)
    for number in range(3):
        retries.note((str(number), "at"), 1, b"first", 0)
    assert retries.note(("0", "at"), 1, b"retry", 1).span_id == b""
    assert retries.note(("2", "at"), 1, b"retry", 1).span_id == b"first"


def test_an_orphan_is_not_trained() -> None:
    spans = []
    for span_id, retry_of in ((b"orphaned", b""), (b"consumed", b"orphaned")):
        call = model_call_pb2.ModelCall(model="m", mode="train", retry_of=retry_of)
        call.outcome = model_call_pb2.MODEL_CALL_OUTCOME_COMPLETE
        call.logprob_semantics = model_call_pb2.LOGPROB_SEMANTICS_PROCESSED
        choice = call.choices.add(token_ids=[1], logprobs=[-1.0])
        choice.policy_runs.add(start=0, end=1)
        spans.append(span_pb2.StoredSpan(span=span_pb2.Span(span_id=span_id, model_call=call)))
    found = {answer.span_id: answer.excluded for answer in read_answers(spans, SampleRules(), TokenTree())}
    assert found == {b"orphaned": DropReason.ORPHAN, b"consumed": None}


def test_packed_prompts_are_prompts() -> None:
    for tokens in ([], [1], list(range(0, 2**31, 2**18 + 7))):
        assert whole(array("I", tokens)) == model_call_pb2.PromptTokens(token_ids=tokens)


def test_raw_payloads_come_back() -> None:
    assert raw_payload(b"") is None
    for data in (b'{"a":1}', b'{"a":"%s"}' % (b"x" * 10_000)):
        packed = raw_payload(data)
        assert packed is not None
        assert len(packed.data) < 1000
        assert from_payload(packed)["a"] in (1, "x" * 10_000)
    events = raw_payload(b"data: {}\n\n" * 100, "text/event-stream")
    assert events is not None
    assert from_payload(events) == RawPayload("text/event-stream", b"data: {}\n\n" * 100)
    broken = common_pb2.Payload(media_type="application/json+zstd", data=b"not zstd")
    assert from_payload(broken) == RawPayload("application/json+zstd", b"not zstd")
