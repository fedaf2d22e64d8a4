"""Why a conversation's next prompt does not begin with what was sampled before."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from agl_grpc.sample.calls import Answer
from agl_grpc.sample.tree import TokenTree, shared_length
from agl_grpc.sample.types import RowStart

Decode = Callable[[Sequence[int]], str]
"""Text of token ids, special tokens included: `tokenizer.decode`."""

_THINKING = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>|<\|channel\|>analysis.*?<\|end\|>", re.DOTALL)
_JSON = json.JSONDecoder()


def classify(tree: TokenTree, answer: Answer, earlier: Sequence[Answer], decode: Decode | None) -> RowStart:
    """The kind of break between an answer that continues none of the earlier ones and those before it.

    Compared with the earlier answer whose prompt its own prompt keeps whole (the longest such prompt counts);
    where there is none, with the one of which most came back. Without `decode` only cut and truncated answers
    are told from other changes.
    """
    above = {id(node) for node in answer.prompt.upwards()}
    kept = [other for other in earlier if other.prompt is not answer.prompt and id(other.prompt) in above]
    if not kept:
        return _prompt_break(tree, answer, earlier, decode)
    longest = max(other.prompt.end for other in kept)
    # Of several answers to that prompt the one of which most tokens came back, then the newest.
    base = max(
        (other for other in kept if other.prompt.end == longest),
        key=lambda other: (shared_length(other.end, answer.prompt), other.place),
    )
    if base.cut:
        return RowStart.CUT
    if base.truncated:
        return RowStart.TRUNCATION
    if decode is None:
        return RowStart.RESPONSE_CHANGED
    returned = tree.tokens(answer.prompt, base.prompt.end)
    return compare_texts(decode(base.response.tolist()), decode(returned.tolist()))


def _prompt_break(
    tree: TokenTree, answer: Answer, earlier: Sequence[Answer], decode: Decode | None
) -> RowStart:
    """The kind of break where no earlier prompt came back whole.

    A template may write the end of a prompt otherwise once an answer follows it (thinking that is switched
    off), and tokens may merge over the border of prompt and answer: the texts of whole sequences tell.
    """
    if decode is None:
        return RowStart.PROMPT_CHANGED
    base = max(earlier, key=lambda other: (shared_length(other.end, answer.prompt), other.place))
    if shared_length(base.end, answer.prompt) == 0:
        return RowStart.PROMPT_CHANGED
    before, returned = decode(tree.tokens(base.end).tolist()), decode(tree.tokens(answer.prompt).tolist())
    found = compare_texts(before, returned)
    return RowStart.PROMPT_CHANGED if found is RowStart.RESPONSE_CHANGED else found


def compare_texts(sampled: str, returned: str) -> RowStart:
    """The kind of break by texts: what was sampled, and the next prompt from the same place on."""
    if returned.startswith(sampled):
        return RowStart.RETOKENISED
    if _canonical(returned).startswith(_canonical(sampled)) and "{" in sampled:
        return RowStart.TOOL_CALL_RESERIALISED
    plain, back = _plain(sampled), _plain(returned)
    if plain and back.startswith(plain):
        return RowStart.TEMPLATE
    return RowStart.RESPONSE_CHANGED


def _plain(text: str) -> str:
    """Text without what templates add, move or strip: thinking and white space."""
    return "".join(_THINKING.sub("", _canonical(text)).split())


def _canonical(text: str) -> str:
    """The text with every JSON object in it written in one way: sorted keys, no spaces."""
    pieces, place = [], 0
    while (brace := text.find("{", place)) >= 0:
        pieces.append(text[place:brace])
        try:
            value, end = _JSON.raw_decode(text, brace)
        except json.JSONDecodeError:
            pieces.append("{")
            place = brace + 1
            continue
        pieces.append(json.dumps(_unwrapped(value), sort_keys=True, separators=(",", ":")))
        place = end
    return "".join([*pieces, text[place:]])


def _unwrapped(value: Any) -> Any:
    """A value whose `arguments` are objects, also where they came as the text of one."""
    if isinstance(value, list):
        return [_unwrapped(item) for item in value]
    if not isinstance(value, dict):
        return value
    result = {key: _unwrapped(item) for key, item in value.items()}
    arguments = result.get("arguments")
    if isinstance(arguments, str):
        try:
            result["arguments"] = json.loads(arguments)
        except json.JSONDecodeError:
            return result
    return result
