"""Lists cut out of an answer's bytes: the same as by parsing all of it, whatever its texts say."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from agl_grpc.interceptor.front.dialects import NOTHING_ASKED, Collector
from agl_grpc.interceptor.front.splice import PromptTexts, splice

TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [
            '"token_ids":[1]',
            '\\"logprobs":{',
            ',"finish_reason":',
            '"logprob":-1',
            '"prompt_token_ids":[',
            "]}",
        ]
    ),
)
IDS = st.lists(st.integers(0, 200_000), max_size=6)
LOGPROBS = st.floats(-50, 0, allow_nan=False)


@st.composite
def answers(draw: st.DrawFn, chat: bool) -> dict[str, Any]:
    choices = []
    prompt = draw(st.none() | IDS)
    for index in range(draw(st.integers(1, 3))):
        ids, text = draw(IDS), draw(TEXTS)
        numbers = [draw(LOGPROBS) for _ in ids]
        table: dict[str, Any]
        if chat:
            table = {
                "content": [
                    {"token": draw(TEXTS), "logprob": each, "bytes": [1], "top_logprobs": []}
                    for each in numbers
                ]
            }
        else:
            table = {"text_offset": [0], "token_logprobs": numbers, "tokens": [draw(TEXTS) for _ in ids]}
        said = {"message": {"content": text, "tool_calls": []}} if chat else {"text": text}
        kept = draw(st.booleans())
        choices.append(
            {
                "index": index,
                **said,
                "logprobs": table if kept else None,
                "finish_reason": "stop",
                "token_ids": ids if kept or draw(st.booleans()) else None,
                **({} if chat else {"prompt_token_ids": draw(st.none() | IDS)}),
            }
        )
    answer: dict[str, Any] = {"id": draw(TEXTS), "model": "tiny", "choices": choices}
    if draw(st.booleans()):
        answer["metadata"] = {draw(TEXTS): draw(IDS), "token_ids": draw(IDS)}
    return answer | ({"prompt_token_ids": prompt} if chat else {})


def both(answer: dict[str, Any], chat: bool) -> None:
    data = orjson.dumps(answer)
    api = "chat.completions" if chat else "completions"
    quick, slow = Collector(api, NOTHING_ASKED), Collector(api, NOTHING_ASKED)
    stripped = quick.take_whole(data)
    slow.take(answer)
    assert orjson.loads(stripped) == answer
    assert quick.choices == slow.choices
    assert quick.prompts == slow.prompts


@given(answers(chat=True))
def test_chat_is_the_same_as_when_parsed(answer: dict[str, Any]) -> None:
    both(answer, chat=True)


@given(answers(chat=False))
def test_completions_are_the_same_as_when_parsed(answer: dict[str, Any]) -> None:
    both(answer, chat=False)


def test_the_usual_layout_is_cut_and_others_are_left() -> None:
    choice = {
        "index": 0,
        "logprobs": {"content": [{"token": "a", "logprob": -1.5, "bytes": [97], "top_logprobs": []}]},
        "finish_reason": "stop",
        "token_ids": [7],
    }
    answer = {"choices": [choice], "prompt_token_ids": [1, 2]}
    found = splice(orjson.dumps(answer), chat=True)
    assert found is not None
    assert (list(found.ids[0]), found.logprobs[0], list(found.prompts[-1])) == ([7], [-1.5], [1, 2])
    assert splice(orjson.dumps(answer, option=orjson.OPT_INDENT_2), chat=True) is None
    assert splice(orjson.dumps({**answer, "more": {"token_ids": [1]}}), chat=True) is None
    assert splice(b'{"choices": [{"token_ids":[1', chat=True) is None
    other = {**choice, "logprobs": {"content": [{"token": "a", "logprob": -1.5}]}}
    assert splice(orjson.dumps({"choices": [other]}), chat=True) is None


@given(st.lists(IDS, max_size=6), st.integers(0, 60))
def test_prompts_that_go_on_are_read_right(turns: list[list[int]], most: int) -> None:
    texts, prompt = PromptTexts(most), list[int]()
    for number, turn in enumerate(turns):
        prompt = prompt + turn if number % 3 else turn
        assert list(texts.ids("one", orjson.dumps(prompt))) == prompt
        assert list(texts.ids("other", orjson.dumps(turn))) == turn
