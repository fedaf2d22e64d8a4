"""Lists cut out of an answer's bytes: the same as by parsing all of it, whatever its texts say."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
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


@st.composite
def events(draw: st.DrawFn, chat: bool) -> dict[str, Any]:
    prompt = draw(st.none() | IDS)
    said = {"delta": {"content": draw(TEXTS)}} if chat else {"text": draw(TEXTS)}
    choice = {"index": draw(st.integers(0, 2)), **said, "token_ids": draw(st.none() | IDS)}
    event: dict[str, Any] = {"id": draw(TEXTS), "model": "tiny", "choices": [choice]}
    if draw(st.booleans()):
        event["metadata"] = {"prompt_token_ids": draw(IDS), draw(TEXTS): draw(IDS)}
    (event if chat else choice)["prompt_token_ids"] = prompt
    return event


@pytest.mark.parametrize("chat", [True, False])
@given(data=st.data())
def test_events_say_the_same_when_their_prompt_is_read_later(chat: bool, data: st.DataObject) -> None:
    event = data.draw(events(chat))
    api = "chat.completions" if chat else "completions"
    later, now = Collector(api, NOTHING_ASKED), Collector(api, NOTHING_ASKED)
    said = later.take_event(orjson.dumps(event))
    later.read_prompts()
    now.take(event)
    assert said is not None
    assert orjson.loads(said) == event
    assert later.choices == now.choices
    assert later.prompts == now.prompts


@pytest.mark.parametrize("text", [b"[-7]", b'["a"]', b"[1,,2]", b"[[1]]", b"[4294967296]"])
def test_a_prompt_of_an_event_that_holds_no_ids_is_a_problem_of_the_call(text: bytes) -> None:
    collector = Collector("chat.completions", NOTHING_ASKED)
    assert collector.take_event(b'{"choices":[],"prompt_token_ids":%b}' % text) is not None
    collector.read_prompts()
    assert collector.problems == ["the engine sent prompt token ids that are none"]
    assert not collector.prompts[0]
