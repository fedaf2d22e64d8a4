"""The wrapper around an engine that does not do as it should: its answer passes, its record says why not to
train on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from agl_grpc.interceptor.attribution import CURRENT, Attribution, CallContext
from agl_grpc.interceptor.capture.record import EngineIdentity
from agl_grpc.interceptor.capture.sink import CapturedCall
from agl_grpc.interceptor.inside.generate import GenerateWrapper
from agl_grpc.interceptor.inside.held import HeldAnswer
from agl_grpc.v1 import model_call_pb2, span_pb2

TOKENS = [5, 6, 7]


class Engine:
    """What the wrapper knows of an engine client; it samples TOKENS, with as many logprobs as it is told."""

    def __init__(self, logprobs: int) -> None:
        self.output_processor: Any = SimpleNamespace(
            request_states={}, add_request=self._add, process_outputs=lambda outputs: None
        )
        tables = [{token: SimpleNamespace(logprob=-1.0)} for token in TOKENS[:logprobs]]
        self._state = SimpleNamespace(
            request_id="internal",
            external_req_id="request",
            request_index=0,
            prompt_token_ids=[1, 2],
            detokenizer=SimpleNamespace(output_token_ids=TOKENS, num_output_tokens=lambda: len(TOKENS)),
            logprobs_processor=SimpleNamespace(logprobs=tables),
        )

    def shutdown(self) -> None: ...

    def _add(self, request: Any) -> None:
        self.output_processor.request_states[request.request_id] = self._state

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str
    ) -> AsyncGenerator[SimpleNamespace, None]:
        self.output_processor.add_request(SimpleNamespace(request_id="internal"))
        choice = SimpleNamespace(index=0, token_ids=TOKENS, finish_reason="stop", stop_reason=None)
        yield SimpleNamespace(outputs=[choice], finished=True, metrics=None)


class Sink:
    """Keeps the calls that it is given."""

    def __init__(self) -> None:
        self.calls: list[span_pb2.Span] = []

    def announce(self, attempt: tuple[str, str], span_id: bytes, started: int) -> None: ...

    def abandon(self, span_id: bytes) -> None: ...

    def submit(self, call: CapturedCall) -> asyncio.Future[None]:
        self.calls.append(span_pb2.AttemptSpans.FromString(call.group(None)).spans[0])
        return call.durable


def wrapped(engine: Engine, sink: Sink) -> GenerateWrapper:
    """The wrapper, in place on an engine."""
    wrapper = GenerateWrapper(
        engine,
        sink,
        EngineIdentity("engine", "vllm", "tiny", True),
        policy_version=3,
        temperature=None,
        refuse=ValueError,
        fail=ValueError,
        resume_timeout=1.0,
    )
    wrapper.install()
    return wrapper


def sampling(logprobs: int | None) -> SimpleNamespace:
    """As vLLM's sampling parameters."""
    return SimpleNamespace(
        temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
        frequency_penalty=0.0, max_tokens=9, seed=None, n=1, logprobs=logprobs, extra_args=None,
    )  # fmt: skip


async def captured(engine: Engine, logprobs: int | None) -> model_call_pb2.ModelCall:
    """The record of a call whose client asks for so many logprobs, whose answer has passed whole."""
    sink = Sink()
    wrapper = wrapped(engine, sink)
    token = CURRENT.set(CallContext(Attribution("ro", "at"), "completions"))
    try:
        outputs = [output async for output in wrapper.generate({}, sampling(logprobs), "request")]
    finally:
        CURRENT.reset(token)
    assert [output.finished for output in outputs] == [True]
    (span,) = sink.calls
    return span.model_call


async def test_an_engine_that_keeps_its_word_is_trained_on() -> None:
    call = await captured(Engine(logprobs=3), logprobs=0)
    (choice,) = call.choices
    assert (list(choice.token_ids), list(choice.logprobs)) == (TOKENS, [-1.0, -1.0, -1.0])
    assert [(run.start, run.end, run.policy_version) for run in choice.policy_runs] == [(0, 3, 3)]
    assert call.untrainable_reason == ""


async def test_ids_and_logprobs_that_disagree_in_length_are_not_kept() -> None:
    call = await captured(Engine(logprobs=2), logprobs=0)
    assert list(call.choices) == []
    assert call.untrainable_reason == "the engine gave no logprobs for choice 0"
    assert list(call.prompt.token_ids) == [1, 2]


async def test_a_capture_that_fails_costs_the_record_and_not_the_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def keep(state: Any) -> None:
        raise AttributeError("this vLLM is another one")

    monkeypatch.setattr("agl_grpc.interceptor.inside.engine_state.keep_sampled_logprobs", keep)
    call = await captured(Engine(logprobs=0), logprobs=None)
    assert call.untrainable_reason.startswith("capture failed: AttributeError")
    assert "this vLLM is another one" in caplog.text


async def test_what_a_beam_search_samples_counts_towards_the_limits_of_its_rollout() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None: ...

    spent: list[int] = []
    answer = HeldAnswer(receive, send, path="/v1/x", tries=0, keep_raw=False, spend=spent.append)
    wrapper = wrapped(Engine(logprobs=0), Sink())
    prompt = {"prompt_token_ids": [1, 2, 3, 4]}
    token = CURRENT.set(CallContext(Attribution("ro", "at", mode="val"), "completions", answer=answer))
    try:
        for step in ("a", "b"):
            for beam in range(2):
                name = f"request-{step}-beam-{beam}"
                async for output in wrapper.generate(prompt, sampling(None), name):
                    assert output.finished
    finally:
        CURRENT.reset(token)
    # The prompt once, and what each beam's calls have sampled.
    assert sorted(spent) == [3, 3, 3, 3, 4]
    answer.close()
