"""Adapters: by their rules, and against those of the released agentlightning 0.3.0 over random traces."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agl_grpc import LlmProxyTraceToTriplet, Span, TracerTraceToTriplet, TraceToMessages
from agl_grpc.model.model_call import Choice, ModelCall, logprobs, token_ids
from agl_grpc.sample.adapter import RewardMatchPolicy
from agl_grpc.sample.adapter.tree import build, repair
from agl_grpc.store.http.rest.span_json import read_span
from agl_grpc.store.http.shape import Fields
from tests.doors.traces import trace
from tests.support.environments import REPOSITORY, agentlightning_python

CALL = "openai.chat.completion"


def span(name: str, start: float, end: float, parent: str | None = None, **fields: Any) -> Span:
    """A span."""
    attributes = fields.pop("attributes", {})
    made = Span.from_attributes(
        attributes=attributes, name=name, start_time=start, end_time=end, parent_id=parent, rollout_id="ro"
    )
    return dataclasses.replace(made, **fields)


def reward(value: float, at: float, **fields: Any) -> Span:
    """A span that carries a reward."""
    attributes = {"agentlightning.reward.0.value": value}
    return span("agentlightning.annotation", at, at, attributes=attributes, **fields)


def from_json(values: dict[str, Any]) -> Span:
    """A span as the REST door reads it."""
    return Span.from_span_proto(read_span(Fields(values)), rollout_id="ro-1", attempt_id="at-1")


@pytest.mark.e2e
def test_they_make_of_any_trace_what_the_originals_make() -> None:
    seeds = range(80)
    traces = [trace(seed) for seed in seeds]
    command = [agentlightning_python(), "-W", "ignore", str(REPOSITORY / "tests/doors/peer_adapters.py")]
    answer = subprocess.run(
        command, input=json.dumps(traces), capture_output=True, text=True, timeout=120, check=False
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    theirs = json.loads(answer.stdout.strip().splitlines()[-1])
    variants: dict[str, Any] = {
        "plain": TracerTraceToTriplet(),
        "unrepaired": TracerTraceToTriplet(repair_hierarchy=False),
        "agents": TracerTraceToTriplet(agent_match="^good"),
        "siblings": TracerTraceToTriplet(reward_match=RewardMatchPolicy.FIRST_SIBLING),
        "rewards too": TracerTraceToTriplet(exclude_llm_call_in_reward=False),
        "with tokens": TracerTraceToTriplet(_skip_empty_token_spans=True),
        "proxy": LlmProxyTraceToTriplet(),
    }
    for seed, values, expected in zip(seeds, traces, theirs, strict=True):
        spans = [from_json(one) for one in values]
        for name, adapter in variants.items():
            made = [dataclasses.asdict(triplet) for triplet in adapter(spans)]
            assert made == expected[name], f"seed {seed}, {name}"
        messages = json.loads(json.dumps(TraceToMessages()(spans)))
        assert messages == [_bare(one) for one in expected["messages"]], f"seed {seed}"


def _bare(conversation: dict[str, Any]) -> dict[str, Any]:
    """Without the nulls that the original puts into messages."""
    messages = [
        {name: value for name, value in message.items() if name != "tool_call_id" or value is not None}
        for message in conversation["messages"]
    ]
    return {**conversation, "messages": messages}


def test_rewards_go_to_the_last_free_call_that_had_ended() -> None:
    root = span("root", 0, 100)
    calls = [span(CALL, at, at + 5, root.span_id) for at in (1, 10, 20)]
    rewards = [reward(0.1, 16, parent_id=root.span_id), reward(0.2, 22, parent_id=root.span_id)]
    spans = [root, *calls, *rewards, reward(0.3, 90, parent_id=root.span_id)]
    triplets = TracerTraceToTriplet().adapt(spans)
    assert [triplet.reward for triplet in triplets] == [0.2, 0.1, 0.3]


def test_a_stray_span_is_put_where_it_was_done() -> None:
    root = span("root", 0, 100)
    agent = span("agent", 10, 50, root.span_id, attributes={"agent.name": "planner"})
    stray = span(CALL, 20, 30, root.span_id)
    spans = [root, agent, stray, span("end", 90, 91, root.span_id)]
    tree = build(spans)
    repair(tree)
    assert [node.span.name for node in tree.walk()] == ["root", "agent", CALL, "end"]
    (triplet,) = TracerTraceToTriplet(agent_match="plan").adapt(spans)
    assert triplet.metadata["agent_name"] == "planner"
    assert TracerTraceToTriplet(agent_match="plan", repair_hierarchy=False).adapt(spans) == []


def test_captured_calls_are_the_calls() -> None:
    call = ModelCall(
        model="m",
        prompt_token_ids=token_ids([1, 2]),
        choices=[Choice(token_ids=token_ids([3]), logprobs=logprobs([-0.5]))],
    )
    root = span("root", 0, 100)
    agent_side = span(CALL, 1, 9, root.span_id)
    captured = span("model_call m", 2, 8, root.span_id, model_call=call, scope_name="agl_grpc.interceptor")
    spans = [root, agent_side, dataclasses.replace(captured, sequence_id=2), reward(1.0, 10, sequence_id=3)]
    for adapter in (TracerTraceToTriplet(), LlmProxyTraceToTriplet()):
        (triplet,) = adapter.adapt(spans)
        assert (triplet.prompt["token_ids"], triplet.response["token_ids"]) == ([1, 2], [3])
        assert triplet.reward == 1.0


def test_conversations_with_tools() -> None:
    attributes = {
        "gen_ai.prompt.0.role": "user",
        "gen_ai.prompt.0.content": "1+1?",
        "gen_ai.prompt.1.role": "tool",
        "gen_ai.prompt.1.content": "2",
        "gen_ai.prompt.1.tool_call_id": "c0",
        "gen_ai.completion.0.role": "assistant",
        "gen_ai.completion.0.content": "let me see",
    }
    call = span(CALL, 1, 2, attributes=attributes)
    tool = {"tool.name": "add", "tool.parameters": "{}", "tool.call.id": "c1", "tool.call.type": "function"}
    (conversation,) = TraceToMessages().adapt([call, span("tool", 2, 3, call.span_id, attributes=tool)])
    answer = conversation["messages"][2]
    assert conversation["messages"][1] == {"role": "tool", "content": "2", "tool_call_id": "c0"}
    assert answer["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    ]
    assert conversation["tools"] is None


def test_what_cannot_be_adapted_says_why() -> None:
    assert TracerTraceToTriplet().adapt([]) == []
    one, other = span("a", 0, 1), span("b", 0, 1)
    one.parent_id, other.parent_id = other.span_id, one.span_id
    with pytest.raises(ValueError, match="no span is a root"):
        TracerTraceToTriplet().adapt([one, other])
    with pytest.raises(ValueError, match="has no role"):
        TraceToMessages().adapt([span("x", 0, 1, attributes={"gen_ai.prompt.0.content": "hi"})])
    with pytest.raises(ValueError, match="is no list of messages"):
        TraceToMessages().adapt([span("x", 0, 1, attributes={"gen_ai.prompt.0": "hi"})])


def test_a_trace_may_be_deeper_than_the_interpreters_stack() -> None:
    spans = [span("root", 0, 1e6)]
    for depth in range(1, 5000):
        spans.append(
            span(CALL, depth, 1e6 - depth, spans[-1].span_id, attributes={"gen_ai.response.id": str(depth)})
        )
    assert len(TracerTraceToTriplet().adapt(spans)) == 4999


def test_spans_of_the_sdk_are_taken_too() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("t")
    attributes = {"prompt_token_ids": (1,), "response_token_ids": (2,)}
    with tracer.start_as_current_span("root"), tracer.start_as_current_span(CALL, attributes=attributes):
        pass
    finished: tuple[ReadableSpan, ...] = exporter.get_finished_spans()
    (triplet,) = TracerTraceToTriplet()(finished)
    assert triplet.response["token_ids"] == [2]
