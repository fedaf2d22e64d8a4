"""Graders as users write them: legal signatures, legal answers, what a submission says."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest

from agl_grpc.grader import Grade, GraderFailed, Graders, Submission, as_grade, grader
from agl_grpc.model import ModelCall, Span
from agl_grpc.model.value import RawPayload


@grader
def length(response: str) -> float:
    return float(len(response))


@grader(name="parts", version="2", timeout=5, retries=0)
async def parts(task: dict[str, Any], response: str, strict: bool = True) -> dict[str, float]:
    return {"right": float(task["answer"] == response), "strict": float(strict)}


@grader
def whole(it: Submission) -> bool:
    return it.response == "4"


def test_a_function_is_given_what_its_parameters_name() -> None:
    submission = Submission(input={"answer": "4"}, response="4")
    assert length.grade(submission) == 1.0
    assert whole.grade(submission) is True
    assert (length.name, length.id, length.isolated) == ("length", "length@1", True)
    assert (parts.id, parts.isolated, parts.timeout) == ("parts@2", False, 5)
    assert length("abc") == 3.0  # still the function that it was


def test_graders_travel_by_their_names() -> None:
    assert pickle.loads(pickle.dumps(length)) is length
    with pytest.raises(ValueError, match="top of a module"):
        pickle.dumps(grader(lambda response: 1.0, name="made_here"))


@pytest.mark.parametrize(
    "wrong", ["def f(): ...", "def f(a, b): ...", "def f(task, other): ...", "def f(task): yield"]
)
def test_other_signatures_are_refused_with_the_legal_ones(wrong: str) -> None:
    names: dict[str, Any] = {}
    exec(wrong, names)
    with pytest.raises(TypeError, match=r"cannot be a grader; allowed: \(submission\), or by name any of"):
        grader(names["f"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "a/b"}, "grader name 'a/b' must be"),
        ({"name": "primary"}, "the reward of the agent itself"),
        ({"version": ""}, "version '' of grader f"),
        ({"timeout": 0}, "timeout of grader f is 0"),
        ({"timeout": math.nan}, "timeout of grader f is nan"),
        ({"retries": -1}, "retries of grader f is -1"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    def f(response: str) -> float:
        return 0.0

    with pytest.raises(ValueError, match=message):
        grader(**arguments)(f)


def test_answers_that_are_grades() -> None:
    assert as_grade(True).value == 1.0
    assert as_grade(np.float32(0.5)).value == 0.5
    assert as_grade({"a": 1, "b": 0}) == Grade(value=0.5, components={"a": 1.0, "b": 0.0})
    assert as_grade({"value": 3, "b": 0}) == Grade(value=3.0, components={"b": 0.0})
    assert as_grade(Grade(value=1, notes={"why": "so"})).notes == {"why": "so"}


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ("0.5", "not_a_grade"),
        (None, "not_a_grade"),
        ([1.0], "not_a_grade"),
        ({}, "not_a_grade"),
        ({"": 1.0}, "not_a_grade"),
        ({"a": "1"}, "not_a_grade"),
        (math.nan, "not_finite"),
        (Grade(value=math.inf), "not_finite"),
        (10**400, "not_a_grade"),
        ({"a": math.nan}, "not_finite"),
    ],
)
def test_answers_that_are_none(answer: Any, outcome: str) -> None:
    with pytest.raises(GraderFailed) as caught:
        as_grade(answer)
    assert caught.value.outcome == outcome
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.outcome) == (str(caught.value), outcome)


def _called(request: Any, response: Any) -> Submission:
    span = Span(
        rollout_id="r",
        attempt_id="a",
        name="call",
        model_call=ModelCall(raw_request=request, raw_response=response),
    )
    return Submission(spans=[span])


_ASKED = [{"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize(
    ("request_", "response"),
    [
        ({"messages": _ASKED}, {"choices": [{"message": {"role": "assistant", "content": "four"}}]}),
        ({"messages": _ASKED}, {"content": [{"type": "text", "text": "fo"}, {"type": "text", "text": "ur"}]}),
        (
            {"input": "2+2?"},
            {"output": [{"type": "message", "content": [{"type": "output_text", "text": "four"}]}]},
        ),
        ({"prompt": "2+2?"}, {"choices": [{"text": "four"}]}),
        (
            {"messages": _ASKED, "stream": True},
            RawPayload(
                "text/event-stream",
                b'data: {"choices":[{"index":0,"delta":{"content":"fo"}}]}\n\n'
                b'data: {"choices":[{"index":0,"delta":{"content":"ur"}}]}\n\ndata: [DONE]\n\n',
            ),
        ),
    ],
)
def test_the_answer_is_read_in_every_dialect(request_: Any, response: Any) -> None:
    submission = _called(request_, response)
    assert submission.response == "four"
    assert submission.messages[0] == _ASKED[0]


def test_tokens_alone_are_read_with_a_decoder_and_else_the_agent_s_own_words() -> None:
    from agl_grpc.model.model_call import Choice, token_ids

    call = ModelCall(prompt_token_ids=token_ids([1]), choices=[Choice(token_ids=token_ids([2, 3]))])
    spans = [
        Span(rollout_id="r", attempt_id="a", name="call", model_call=call),
        Span(rollout_id="r", attempt_id="a", name="m", attributes={"agentlightning.message.body": "said"}),
    ]
    assert Submission(spans=spans, decode=lambda ids: "-".join(map(str, ids))).response == "2-3"
    assert Submission(spans=spans).response == "said"
    assert Submission().response == ""


def test_weights_name_what_counts() -> None:
    both = Graders.of({length: 0.25, parts: 0.0})
    assert both.reward_weights == {"length": 0.25}
    assert Graders.of([length, parts]).reward_weights == {"length": 1.0, "parts": 1.0}
    assert Graders((length, parts), {"parts/right": 2.0}).reward_weights == {
        "length": 1.0,
        "parts/right": 2.0,
    }
    for wrong, message in (((), "no grader"), ((length, length), "two graders are named length")):
        with pytest.raises(ValueError, match=message):
            Graders.of(wrong)
    with pytest.raises(ValueError, match="weight 'other' is of no grader"):
        Graders((length,), {"other": 1.0})
