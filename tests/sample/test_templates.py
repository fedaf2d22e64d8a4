"""Three chat templates, a real tokenizer: rows and breaks through real rendering and re-tokenisation."""

from __future__ import annotations

import pytest

from agl_grpc.sample import RowStart, SampleRules, Truncated
from tests.sample.chat import Chat, decode, encode, letters

QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>'
LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Rome", "days": 3}}'
STYLES = ("chatml", "qwen3", "llama3")


def trained_texts(chat: Chat) -> list[list[str]]:
    """Of each row the text of every stretch of tokens with mask 1."""
    found = []
    for row in chat.samples().rows:
        stretches: list[list[int]] = []
        before = 0
        for token, mask in zip(row.response_ids.tolist(), row.response_mask.tolist(), strict=True):
            if mask and not before:
                stretches.append([])
            if mask:
                stretches[-1].append(token)
            before = mask
        found.append([decode(ids) for ids in stretches])
    return found


def talk(style: str, *answers: str | list[int], thinking: bool = True) -> Chat:
    """A conversation of one question and one answer a turn."""
    chat = Chat(style, thinking=thinking)
    for answer in answers:
        chat.ask("What is the weather like?")
        chat.answer(answer)
    return chat


def test_the_tokenizer_is_one_of_bytes_with_markers_of_one_token() -> None:
    text = 'Let me think: {"city": "Zürich"} 🌧<|im_end|>\n'
    assert decode(encode(text)) == text
    assert len(encode("<|im_end|>")) == 1
    assert letters("weather") != encode("weather")
    assert decode(letters("the weather in Rome")) == "the weather in Rome"


@pytest.mark.parametrize("style", STYLES)
def test_04_turns_merge_and_only_what_was_sampled_is_trained_end_marker_included(style: str) -> None:
    chat = talk(style, "It is sunny in Rome.", "It is cold in Oslo.", "Let me think.")
    out = chat.samples()
    assert out.row_starts == {RowStart.FIRST: 1}
    end = chat.end
    assert trained_texts(chat) == [
        [f"It is sunny in Rome.{end}", f"It is cold in Oslo.{end}", f"Let me think.{end}"]
    ]
    (row,) = out.rows
    # The header before an answer and whatever stands after its end marker are the template's, not sampled.
    whole = decode([*row.prompt_ids.tolist(), *row.response_ids.tolist()])
    assert whole.count("assistant\n") + whole.count("assistant<|end_header_id|>\n\n") == 3
    assert whole == decode(chat.spans[-1].span.model_call.prompt.token_ids) + f"Let me think.{end}"


@pytest.mark.parametrize("style", STYLES)
def test_01_an_answer_in_other_tokens_than_the_tokenizers_is_a_row_of_its_own(style: str) -> None:
    sampled = letters("It is sunny in Rome.")
    chat = Chat(style)
    chat.ask("What is the weather like?")
    chat.answer([*sampled, *encode(chat.end)])
    chat.ask("And in Oslo?")
    chat.answer("It is cold.")
    out = chat.samples()
    assert out.row_starts == {RowStart.FIRST: 1, RowStart.RETOKENISED: 1}
    assert out.rows[0].response_ids.tolist() == [*sampled, *encode(chat.end)]
    # Without the tokenizer it is still two rows of the same tokens; only the name of the break is missing.
    unknown = chat.samples(known=False)
    assert unknown.row_starts == {RowStart.FIRST: 1, RowStart.RESPONSE_CHANGED: 1}
    assert [row.response_ids.tolist() for row in unknown.rows] == [r.response_ids.tolist() for r in out.rows]


@pytest.mark.parametrize(
    ("style", "sampled"), [("chatml", QWEN_CALL), ("qwen3", QWEN_CALL), ("llama3", LLAMA_CALL)]
)
def test_tool_calls_written_as_the_template_writes_them_stay_in_their_row(style: str, sampled: str) -> None:
    chat = Chat(style, tools=True)
    chat.ask("What is the weather like?")
    chat.answer(sampled)
    chat.ask("sunny", role="tool")
    chat.answer("It is sunny in Rome.")
    assert chat.samples().row_starts == {RowStart.FIRST: 1}
    assert trained_texts(chat) == [[sampled + chat.end, f"It is sunny in Rome.{chat.end}"]]


@pytest.mark.parametrize(
    ("style", "sampled"),
    [
        ("chatml", '<tool_call>\n{"arguments":{"days":3,"city":"Rome"},"name":"weather"}\n</tool_call>'),
        (
            "qwen3",
            '<tool_call>\n{"name": "weather",  "arguments": {"days": 3, "city": "Rome"}}\n</tool_call>',
        ),
        ("llama3", '{"name":"weather","parameters":{"city":"Rome","days":3}}'),
    ],
)
def test_03_tool_calls_that_come_back_otherwise_are_told_and_keep_their_tokens(
    style: str, sampled: str
) -> None:
    chat = Chat(style, tools=True)
    chat.ask("What is the weather like?")
    chat.answer(sampled)
    chat.ask("sunny", role="tool")
    chat.answer("It is sunny in Rome.")
    out = chat.samples()
    assert out.row_starts == {RowStart.FIRST: 1, RowStart.TOOL_CALL_RESERIALISED: 1}
    assert decode(out.rows[0].response_ids.tolist()) == sampled + chat.end


def test_02_thinking_that_the_template_strips_breaks_the_row_at_the_next_question() -> None:
    thought = "<think>\nLet me think about the weather.\n</think>\n\n"
    chat = talk("qwen3", thought + "It is sunny in Rome.", thought + "It is cold in Oslo.", "Let me think.")
    out = chat.samples()
    assert out.row_starts == {RowStart.FIRST: 1, RowStart.TEMPLATE: 2}
    assert trained_texts(chat)[0] == [thought + "It is sunny in Rome." + chat.end]
    # The prompt of the next row is what the engine saw: without the thinking.
    assert "<think>" not in decode(out.rows[1].prompt_ids.tolist())


def test_thinking_between_tool_calls_is_kept_by_the_template_and_stays_in_one_row() -> None:
    thought = "<think>\nLet me call the function.\n</think>\n\n"
    chat = Chat("qwen3", tools=True)
    chat.ask("What is the weather like?")
    chat.answer(thought + QWEN_CALL)
    chat.ask("sunny", role="tool")
    chat.answer(thought + "It is sunny in Rome.")
    assert chat.samples().row_starts == {RowStart.FIRST: 1}
    chat.ask("And in Oslo?")
    chat.answer(thought + "It is cold.")
    assert chat.samples().row_starts == {RowStart.FIRST: 1, RowStart.TEMPLATE: 1}


def test_thinking_that_is_switched_off_leaves_a_mark_in_the_prompt_that_no_history_has() -> None:
    """The template ends the prompt with empty thinking: that prompt never comes back; it is no rewrite."""
    chat = talk("qwen3", "It is sunny in Rome.", "It is cold in Oslo.", thinking=False)
    assert chat.samples().row_starts == {RowStart.FIRST: 1, RowStart.TEMPLATE: 1}
    assert chat.samples(known=False).row_starts == {RowStart.FIRST: 1, RowStart.PROMPT_CHANGED: 1}


def test_space_that_the_template_trims_is_a_break_of_the_template() -> None:
    assert talk("llama3", "It is sunny.  ", "It is cold.").samples().row_starts == {
        RowStart.FIRST: 1,
        RowStart.TEMPLATE: 1,
    }


def test_another_date_in_the_system_message_is_another_prompt() -> None:
    chat = talk("llama3", "It is sunny in Rome.")
    chat.date = "2 May 2025"
    chat.ask("And in Oslo?")
    chat.answer("It is cold.")
    assert chat.samples().row_starts == {RowStart.FIRST: 1, RowStart.PROMPT_CHANGED: 1}


@pytest.mark.parametrize("style", STYLES)
def test_05_the_end_that_a_template_adds_to_a_cut_off_answer_is_never_trained(style: str) -> None:
    chat = Chat(style)
    chat.ask("What is the weather like?")
    chat.answer(encode("It is sunny in"), finish="length")
    chat.ask("Go on.")
    chat.answer("Rome.")
    rules = SampleRules(truncated=Truncated.TRAIN)
    out = chat.samples(rules)
    assert out.row_starts == {RowStart.FIRST: 1}
    (row,) = out.rows
    marker = encode(chat.end)[0]
    ends = row.response_ids == marker
    # Two ends of the template's after the cut answer and the question, one of the policy's.
    assert row.response_mask[ends].tolist() == [0, 0, 1]
    assert chat.samples().rows[0].response_mask.sum() == len(encode("Rome." + chat.end))


def test_a_rewritten_history_and_an_edited_answer_are_what_they_are() -> None:
    chat = talk("chatml", "It is sunny in Rome.")
    chat.messages[-1]["content"] = "It is raining in Oslo."
    chat.ask("Go on.")
    chat.answer("Rome.")
    assert chat.samples().row_starts == {RowStart.FIRST: 1, RowStart.RESPONSE_CHANGED: 1}
    chat.messages[:] = [{"role": "user", "content": "Summary: the weather is cold."}]
    chat.answer("Yes.")
    assert chat.samples().row_starts[RowStart.PROMPT_CHANGED] == 1
