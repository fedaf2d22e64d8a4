"""Final answers in responses, and when two of them are the same."""

from __future__ import annotations

import numpy as np
import pytest

from agl_grpc.evaluation import find_answer, normalise
from agl_grpc.evaluation.answers import answer_of
from agl_grpc.model import ModelCall, Span
from agl_grpc.model.model_call import Choice


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1} or rather \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("4 + 4 = 8\n#### 8\n", "8"),
        ("<answer>\nyes\n</answer>", "yes"),
        ("Let me see. Answer: -12", "-12"),
        ("The final answer is: 7.", "7."),
        ("I do not know", None),
        (r"\boxed{never closed", None),
    ],
)
def test_the_marked_answer_is_found(text: str, answer: str | None) -> None:
    assert find_answer(text) == answer


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1,000.0", "$1000$", True),
        ("1e3", "1000", True),
        ("-0", "0", True),
        ("Yes.", " yes", True),
        ("50%", "50", False),
        ("7", "8", False),
    ],
)
def test_equal_answers_have_one_form(one: str, other: str, same: bool) -> None:
    assert (normalise(one) == normalise(other)) is same


def _span(attributes: dict[str, object], tokens: list[int] | None = None) -> Span:
    call = ModelCall(choices=[Choice(token_ids=np.array(tokens, dtype=np.int32))]) if tokens else None
    return Span(
        rollout_id="r", attempt_id="a", sequence_id=1, name="x", attributes=attributes, model_call=call
    )


def test_a_noted_answer_goes_before_the_text_and_tokens_are_decoded() -> None:
    def decode(ids: object) -> str:
        return "Answer: 5"

    call = _span({}, [1, 2])
    assert answer_of([call], decode) == "5"
    assert answer_of([call], None) is None
    assert answer_of([call, _span({"answer": "6.0"})], decode) == "6"
    assert answer_of([], decode) is None
    assert answer_of([call], decode, lambda text: text[:6]) == "answer"
