"""Metrics of a batch against plain loops over its tokens, and verdicts and tool errors as they are stored."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from agl_grpc.learner.batch.checks import LogprobRow
from agl_grpc.learner.batch.step_metrics import batch_metrics, distinct_share, sampler_distance, unfinished
from agl_grpc.learner.rollouts.groups import FinishedRollout, Row
from agl_grpc.model.value import to_key_values, to_payload
from agl_grpc.sample import AttemptFacts, AttemptRecord, SampleRules, Verdict, observe
from agl_grpc.v1 import model_call_pb2, reward_pb2, span_pb2

SEED = 11


def _row(tokens: list[int], mask: list[int]) -> Row:
    count = len(tokens)
    return Row(
        np.array([1, 2]),
        np.array(tokens),
        np.array(mask),
        np.zeros(count, np.float32),
        np.zeros(count, np.int64),
    )


def test_distance_is_the_mean_of_k3_over_trained_tokens_of_the_weights_in_force() -> None:
    print("seed", SEED)
    random = np.random.default_rng(SEED)
    rows, fresh, every = [], [], []
    for number in range(5):
        sampled, recomputed = (-random.exponential(1.0, 20).astype(np.float32) for _ in range(2))
        mask, versions = random.integers(0, 2, 20), random.integers(6, 8, 20)
        rows.append(LogprobRow(f"g_{number}_0", sampled, recomputed, mask, versions))
        for q, p, trained, version in zip(sampled, recomputed, mask, versions, strict=True):
            if trained:
                value = math.exp(float(p) - float(q)) - 1.0 - (float(p) - float(q))
                every.append(value)
                fresh += [value] if version == 7 else []
    found = sampler_distance(rows, version=7)
    assert found["kl/sampler_trainer_k3"] == pytest.approx(sum(fresh) / len(fresh), rel=1e-9)
    assert found["kl/sampler_trainer_k3_all"] == pytest.approx(sum(every) / len(every), rel=1e-9)
    assert "kl/sampler_trainer_k3" not in sampler_distance(rows, version=9)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_distinct_share_is_what_counting_finds(size: int) -> None:
    tokens = np.random.default_rng(SEED).integers(0, 4, 50)
    grams = [tuple(tokens[at : at + size].tolist()) for at in range(len(tokens) - size + 1)]
    assert distinct_share(tokens, size) == len(set(grams)) / len(grams)
    assert distinct_share(tokens[: size - 1], size) is None


def test_a_batch_is_summed_up() -> None:
    rollouts = [
        FinishedRollout(
            f"g.n{number}",
            "g",
            1.0,
            (_row([5] * length, [1] * length),),
            facts=AttemptFacts(2, number, 4, number, (Verdict("judge", "form/format", 1.0 - number),)),
        )
        for number, length in enumerate([4, 8])
    ]
    found = batch_metrics(rollouts)
    assert found["response_length/p50"] == 6.0
    assert found["repetition/distinct_1"] == pytest.approx((1 / 4 + 1 / 8) / 2)
    assert found["answers/truncated"] == 1 / 4
    assert found["tools/error_rate"] == 1 / 8
    assert found["answers/format_error_rate"] == 0.5
    assert (found["grader/judge/form/format/mean"], found["grader/judge/form/format/std"]) == (0.5, 0.5)
    assert batch_metrics([]) == {}


def test_updates_that_are_not_finite_are_counted() -> None:
    assert unfinished([0.5, math.nan, math.inf]) == 2
    assert unfinished(math.nan) == 1
    assert unfinished(()) == unfinished(0.3) == 0


def _call(request: Any, finish: str = "stop", model: str = "m") -> span_pb2.StoredSpan:
    call = model_call_pb2.ModelCall(
        model=model,
        choices=[model_call_pb2.Choice(finish_reason=finish)],
        raw_request=to_payload(request, "request"),
    )
    return span_pb2.StoredSpan(span=span_pb2.Span(model_call=call))


def test_tool_errors_of_three_dialects_count_once_a_result() -> None:
    tool = {"role": "tool", "tool_call_id": "a", "content": '{"error": "no such file"}'}
    good = {"role": "tool", "tool_call_id": "b", "content": "errors were found in 0 files"[7:]}
    block = {"type": "tool_result", "tool_use_id": "c", "is_error": True, "content": "boom"}
    output = {"type": "function_call_output", "call_id": "d", "output": "Error: timeout"}
    spans = [
        _call({"messages": [tool]}),
        _call({"messages": [tool, good, {"role": "user", "content": [block]}]}, finish="length"),
        _call({"input": [output]}),
        _call({"messages": [{**tool, "tool_call_id": "z"}]}, model="judge"),
    ]
    rewards = [
        reward_pb2.Reward(value=0.0, name="primary", revision=1),
        reward_pb2.Reward(value=1.0, name="primary", revision=2),
        reward_pb2.Reward(
            value=0.5, name="maths", grader="judge", metadata=to_key_values({"malformed": True}, "metadata")
        ),
        reward_pb2.Reward(value=9.0, name="maths", step=1),
    ]
    facts = observe(AttemptRecord("r", "a", "g", spans, rewards), SampleRules(model="m"))
    assert (facts.answers, facts.truncated) == (3, 1)
    assert (facts.tool_results, facts.tool_errors) == (4, 3)
    assert [(each.grader, each.name, each.value) for each in facts.verdicts] == [
        ("agent", "primary", 1.0),
        ("judge", "maths", 0.5),
    ]
    assert facts.malformed is True
