"""Traces of many attempts at once, and what agents emit into them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from opentelemetry import trace as otel_api

from agl_grpc.agent import (
    current_recorder,
    emit_annotation,
    emit_exception,
    emit_message,
    emit_object,
    emit_reward,
    find_final_reward,
    find_message_spans,
    find_object_spans,
    find_reward_spans,
    get_message_value,
    get_object_value,
    get_reward_value,
    get_rewards_from_span,
    operation,
)
from agl_grpc.model import Span, semconv
from agl_grpc.model.otel import span_from_readable
from agl_grpc.model.value import from_key_values
from agl_grpc.tracer import OtelTracer, get_active_tracer


@pytest.fixture
def tracer() -> Iterator[OtelTracer]:
    made = OtelTracer(install_globally=False)
    yield made
    made.teardown()


@operation
def add(left: int, right: int) -> int:
    return left + right


@operation(name="slow", kind="async")
async def add_slowly(left: int, right: int) -> int:
    await asyncio.sleep(0)
    emit_message(f"adding {left}")
    return left + right


async def test_concurrent_attempts_never_mix(tracer: OtelTracer) -> None:
    async def attempt(number: int) -> None:
        async with tracer.trace_context(
            "agent", rollout_id=f"ro-{number}", attempt_id=f"at-{number}"
        ) as trace:
            for _ in range(5):
                await add_slowly(number, 1)
                await asyncio.to_thread(add, number, 2)
            emit_reward(number)
            assert tracer.get_last_trace() == trace.spans
        trace_ids = {span.context.trace_id for span in trace.spans if span.context}
        assert trace_ids == {trace.trace_id}
        inputs = {
            span.attributes["agentlightning.operation.input.left"]
            for span in trace.spans
            if span.attributes and "agentlightning.operation.input.left" in span.attributes
        }
        assert inputs == {number}
        assert len(trace.spans) == 5 * 3 + 2
        assert [(reward.rollout_id, reward.value) for reward in trace.rewards] == [(f"ro-{number}", number)]

    await asyncio.gather(*(attempt(number) for number in range(20)))
    assert current_recorder() is None


def test_threads_have_traces_of_their_own(tracer: OtelTracer) -> None:
    seen: dict[int, list[str]] = {}

    def attempt(number: int) -> None:
        with tracer.trace_context(f"agent {number}") as trace:
            emit_message(str(number))
        seen[number] = [span.name for span in trace.spans]

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {number: [semconv.SPAN_MESSAGE, f"agent {number}"] for number in range(8)}


def test_an_attempt_inside_another_trace_is_no_part_of_it(tracer: OtelTracer) -> None:
    with tracer.trace_context("outer") as outer, tracer.trace_context("inner") as inner:
        emit_message("in the inner one")
    assert [span.name for span in outer.spans] == ["outer"]
    assert [span.name for span in inner.spans] == [semconv.SPAN_MESSAGE, "inner"]
    assert all(span.parent is None for span in outer.spans)


def test_emitters_and_readers_agree(tracer: OtelTracer) -> None:
    with tracer.trace_context() as trace:
        emit_reward(1)
        emit_reward({"style": 0.25, "correct": 1.5}, primary_key="correct", attributes={"judge": "j"})
        emit_reward(0.5, step=3)
        emit_reward(0.75, name="tidy")
        emit_message("hello", attributes={"to": "you"})
        emit_object({"a": [1, {"b": None}]})
        emit_object(b"\x00\x01")
        emit_annotation({"outer": {"inner": [1, 2], "mixed": [1, "x"]}, "none": None})
        emit_exception(ValueError("broken"))
    spans = trace.spans
    assert find_final_reward(spans) == 1.5
    assert [get_reward_value(span) for span in find_reward_spans(spans)] == [1.0, 1.5, 0.5, None]
    assert [get_rewards_from_span(span) for span in find_reward_spans(spans)] == [
        [("primary", 1.0)],
        [("correct", 1.5), ("style", 0.25)],
        [("primary", 0.5)],
        [("tidy", 0.75)],
    ]
    assert {(reward.name, reward.step): reward.value for reward in trace.rewards} == {
        ("primary", None): 1.5,
        ("correct", None): 1.5,
        ("style", None): 0.25,
        ("primary", 3): 0.5,
        ("tidy", None): 0.75,
    }
    assert [get_message_value(span) for span in find_message_spans(spans)] == ["hello"]
    assert [get_object_value(span) for span in find_object_spans(spans)] == [
        {"a": [1, {"b": None}]},
        b"\x00\x01",
    ]
    note = _attributes(spans[7])
    assert note == {"outer.inner": (1, 2), "outer.mixed.0": 1, "outer.mixed.1": "x"}
    failure = _attributes(spans[8])
    assert failure[semconv.EXCEPTION_TYPE] == "ValueError"
    assert failure[semconv.EXCEPTION_MESSAGE] == "broken"


def _attributes(span: Any) -> dict[str, Any]:
    return dict(span.attributes)


def test_emitting_outside_a_trace_is_an_error_unless_told_not_to_record() -> None:
    with pytest.raises(RuntimeError, match="emit_reward was called outside a rollout"):
        emit_reward(1.0)
    with pytest.raises(RuntimeError, match="operation was called outside a rollout"):
        add(1, 2)
    span = emit_reward({"a": 1.0}, primary_key="a", propagate=False)
    assert get_rewards_from_span(span) == [("a", 1.0)]
    with operation(name="quiet", propagate=False) as work:
        work.set_output(1)


@pytest.mark.parametrize(
    ("reward", "key", "error", "text"),
    [
        ({"": 1.0}, "", ValueError, "a reward is named ''; names are texts of 1 to 128 bytes"),
        (float("nan"), None, ValueError, "reward 'primary' is nan; it must be finite"),
        ("much", None, TypeError, "reward 'primary' is a str; pass a number"),
        ({"a": 1.0}, None, ValueError, "primary_key is None; it must name"),
        ({"a": 1.0}, "b", ValueError, "primary_key is 'b'; it must name .* one of: 'a'"),
    ],
)
def test_bad_rewards_are_refused(reward: Any, key: str | None, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        emit_reward(reward, primary_key=key, propagate=False)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"step": -1}, ValueError, "step is -1; steps are counted from 0"),
        ({"step": True}, ValueError, "step is True"),
        ({"target": "12"}, ValueError, "target '12' is no span id: 16 hex digits"),
        ({"target": 5}, TypeError, "target is a int; pass a span, an operation"),
        ({"name": "x" * 129}, ValueError, "names are texts of 1 to 128 bytes"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        emit_reward(1.0, **arguments, propagate=False)
    with pytest.raises(ValueError, match="name goes with a single number"):
        emit_reward({"a": 1.0}, primary_key="a", name="b", propagate=False)


def test_steps_and_spans_are_judged_by_themselves(tracer: OtelTracer) -> None:
    with tracer.trace_context("agent", rollout_id="ro", attempt_id="at") as trace:
        with operation(name="search") as search:
            emit_reward(0.25, target=search)
            span_id = search.span_id
            assert search.span().attributes[semconv.OPERATION_NAME] == "search"
        emit_reward(0.5, step=2, name="tool")
        emit_reward({"right": 1.0, "short": 0.0}, primary_key="right", target=trace.spans[1])
        emit_reward(0.75, target=Span(rollout_id="ro", attempt_id="at", name="s", span_id="00000000000000ff"))
    judged = {(r.name, r.step, r.target_span_id): r.value for r in trace.rewards}
    assert judged == {
        ("primary", None, span_id): 1.0,
        ("right", None, span_id): 1.0,
        ("short", None, span_id): 0.0,
        ("tool", 2, None): 0.5,
        ("primary", None, "00000000000000ff"): 0.75,
    }
    assert find_final_reward(trace.spans) is None
    with pytest.raises(RuntimeError, match="not under way here"):
        _ = search.span_id


def test_generators_are_operations_from_their_first_item_to_their_last(tracer: OtelTracer) -> None:
    @operation
    def count(limit: int) -> Iterator[int]:
        yield from range(limit)
        return None

    @operation
    async def count_async(limit: int) -> AsyncIterator[int]:
        for number in range(limit):
            yield number

    async def read() -> list[int]:
        return [number async for number in count_async(3)]

    with tracer.trace_context() as trace:
        assert list(count(3)) == [0, 1, 2]
        assert asyncio.run(read()) == [0, 1, 2]
        for _ in count(2):
            break
    assert [span.name for span in trace.spans] == [semconv.SPAN_OPERATION] * 3 + ["trace"]
    assert all(span.status.is_unset for span in trace.spans)


class _Silent:
    def __str__(self) -> str:
        raise RuntimeError("no text")

    @operation
    def work(self, other: Any) -> _Silent:
        return self


def test_odd_inputs_and_outputs_never_break_an_operation(tracer: OtelTracer) -> None:
    endless: dict[str, Any] = {}
    endless |= {"left": endless, "right": endless}
    with tracer.trace_context() as trace:
        _Silent().work(endless)
        emit_annotation({"deep": endless})
    noted = _attributes(trace.spans[0])
    assert noted[semconv.OPERATION_OUTPUT] == "<_Silent whose text cannot be had: RuntimeError>"
    assert not any("self" in name for name in noted)


def test_functions_run_in_traces_of_their_own(tracer: OtelTracer) -> None:
    assert tracer.trace_run(add, 1, right=2) == 3
    assert [span.name for span in tracer.get_last_trace()] == [semconv.SPAN_OPERATION, "add"]

    async def run() -> list[str]:
        assert await tracer.trace_run_async(add_slowly, 1, 2) == 3
        return [span.name for span in tracer.get_last_trace()]

    assert asyncio.run(run()) == [semconv.SPAN_MESSAGE, semconv.SPAN_OPERATION, "add_slowly"]
    with pytest.raises(TypeError, match="add_slowly is async; use trace_run_async"):
        tracer.trace_run(add_slowly, 1, 2)


def _lose(tracer: OtelTracer) -> None:
    with tracer.operation_context("work", {"n": 2}) as work:
        work.set_attributes({"m": 3})
        raise KeyError("lost")


def test_spans_by_hand(tracer: OtelTracer) -> None:
    with tracer.trace_context() as trace:
        assert get_active_tracer() is tracer
        tracer.create_span("moment", {"n": 1}, timestamp=5.0)
        with pytest.raises(KeyError):
            _lose(tracer)
    moment, failed, _ = trace.spans
    assert (moment.start_time, moment.end_time, _attributes(moment)) == (5 * 10**9, 5 * 10**9, {"n": 1})
    assert _attributes(failed) == {"n": 2, "m": 3}
    assert not failed.status.is_ok
    assert get_active_tracer() is None
    with pytest.raises(RuntimeError, match="create_span was called outside a rollout"):
        tracer.create_span("nowhere")


def test_rewards_of_the_users_own_spans_count_and_nonsense_in_them_does_not(tracer: OtelTracer) -> None:
    with tracer.trace_context() as trace:
        for value in (0.5, float("nan"), "much"):
            with tracer.otel.start_as_current_span("judged") as span:
                span.set_attribute("agentlightning.reward.0.value", value)
    assert [(reward.name, reward.value) for reward in trace.rewards] == [("primary", 0.5)]


def test_of_very_many_spans_the_newest_are_kept_here(
    tracer: OtelTracer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agl_grpc.tracer.trace.KEPT_SPANS", 10)
    with tracer.trace_context("agent") as trace:
        for number in range(50):
            emit_message(str(number))
    assert [span.name for span in trace.spans[-2:]] == [semconv.SPAN_MESSAGE, "agent"]
    assert len(trace.spans) == 10


def test_operations_record_input_output_and_failure(tracer: OtelTracer) -> None:
    @operation
    def broken(x: int) -> int:
        raise KeyError(x)

    with tracer.trace_context() as trace:
        assert add(1, right=2) == 3
        with pytest.raises(KeyError):
            _fail_inside(broken)
    first, inner, block = trace.spans[:3]
    assert _attributes(first) == {
        semconv.OPERATION_NAME: "add",
        f"{semconv.OPERATION_INPUT}.left": 1,
        f"{semconv.OPERATION_INPUT}.right": 2,
        semconv.OPERATION_OUTPUT: 3,
    }
    assert inner.parent is not None
    assert block.context is not None
    assert inner.parent.span_id == block.context.span_id
    assert not inner.status.is_ok
    assert inner.events[0].name == "exception"
    assert _attributes(block)[f"{semconv.OPERATION_INPUT}.y"] == 2


def _fail_inside(broken: Callable[[int], int]) -> None:
    with operation(name="outer") as outer:
        outer.set_input(1, y=2)
        broken(5)


def test_an_exception_marks_the_root_and_goes_on(tracer: OtelTracer) -> None:
    with pytest.raises(ZeroDivisionError), tracer.trace_context("agent") as trace:
        raise ZeroDivisionError("by zero")
    (root,) = trace.spans
    assert not root.status.is_ok
    assert root.status.description == "by zero"


def test_libraries_on_the_global_provider_are_seen() -> None:
    tracer = OtelTracer()
    tracer.init()
    try:
        with (
            tracer.trace_context("agent") as trace,
            otel_api.get_tracer("library").start_as_current_span("call"),
        ):
            pass
        assert [span.name for span in trace.spans] == ["call", "agent"]
        otel_api.get_tracer("library").start_span("outside").end()
        assert len(trace.spans) == 2
    finally:
        tracer.teardown()


def test_a_span_keeps_everything_in_the_contract(tracer: OtelTracer) -> None:
    link = otel_api.Link(otel_api.SpanContext(1, 2, is_remote=False), {"why": "cause"})
    with tracer.trace_context():
        with tracer.otel.start_as_current_span(
            "work",
            kind=otel_api.SpanKind.CLIENT,
            attributes={"text": "x", "numbers": [1, 2], "yes": True, "half": 0.5},
            links=[link],
        ) as span:
            span.add_event("moment", {"n": 1}, timestamp=5)
            span.set_status(otel_api.Status(otel_api.StatusCode.ERROR, "bad"))
        readable = tracer.get_last_trace()[0]
    message = span_from_readable(readable)
    assert readable.context is not None
    assert message.trace_id == readable.context.trace_id.to_bytes(16, "big")
    assert message.span_id == readable.context.span_id.to_bytes(8, "big")
    assert len(message.parent_span_id) == 8
    assert (message.start_time_unix_nano, message.end_time_unix_nano) == (
        readable.start_time,
        readable.end_time,
    )
    attributes = from_key_values(message.attributes)
    assert attributes == {"text": "x", "numbers": [1, 2], "yes": True, "half": 0.5}
    assert (message.kind, message.status.code, message.status.message) == (3, 2, "bad")
    assert (message.events[0].name, message.events[0].time_unix_nano) == ("moment", 5)
    assert message.links[0].span_id == (2).to_bytes(8, "big")
    assert (message.scope_name, message.flags) == ("agl_grpc", int(readable.context.trace_flags))
    assert from_key_values(message.resource.attributes)[semconv.TRACER_NAME] == "OtelTracer"


def test_half_an_identity_is_refused(tracer: OtelTracer) -> None:
    with pytest.raises(ValueError, match="needs both rollout_id and attempt_id"):
        tracer.trace_context("x", rollout_id="ro-1")


def test_odd_texts_and_numbers_never_break_an_agent(tracer: OtelTracer) -> None:
    with tracer.trace_context() as trace:
        emit_message("half \ud83d", attributes={"huge": 2**80, "list": ["a", "\ud83d"], "fine": 1})
    message = span_from_readable(trace.spans[0])
    attributes = from_key_values(message.attributes)
    assert attributes[semconv.MESSAGE_BODY] == "half \\ud83d"
    assert attributes["huge"] == str(2**80)
    assert attributes["list"] == ["a", "\\ud83d"]
    assert attributes["fine"] == 1
