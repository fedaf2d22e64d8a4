"""Token ids and logprobs cut out of an answer's bytes, so that only the rest has to be parsed.

Of an answer with 4,000 prompt tokens nine tenths are numbers that the client never asked for. A parser makes
objects of all of it, field names and texts of each token included; here the lists are found by their keys.
`"token_ids":` cannot stand inside a JSON text (its quotes would be escaped), so it is a key wherever it
stands; whether it is the key that is meant is checked on the parsed rest. Whatever is laid out otherwise than
expected is left to the parser.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import orjson

from agl_grpc.interceptor.front.numbers import read_ids

_NUMBERS = b'token_ids":['
_OF_ANSWER, _OF_PROMPT = b'"', b'"prompt_'
"""What stands before that: the key of an answer's ids, and of a prompt's."""

_PROMPT = _OF_PROMPT + _NUMBERS
_TABLE = b'"logprobs":{'
_AFTER_TABLE = b',"finish_reason":'
_CHAT_LOGPROB = re.compile(rb'"logprob":([^,]++),[^}]*+')
"""One of each entry, up to whose end nothing is looked at: that is most of a table."""

_TEXT_LOGPROBS = re.compile(rb'"token_logprobs":(\[[-0-9.eE+,]*\])')


class Spliced(NamedTuple):
    """An answer without its lists: as bytes for the client, and parsed.

    `prompts` are by choice, -1 for the one that stands beside the choices; `ids` and `logprobs` are by place
    among the choices.
    """

    data: bytes
    answer: dict[str, Any]
    prompts: dict[int, array[int]]
    ids: dict[int, array[int]]
    logprobs: dict[int, list[float]]


class PromptTexts:
    """The last prompt of each conversation as text and ids: the next one mostly begins with it, and what has
    been read before need not be read again.

    Remembers about `most_bytes` bytes; conversations longest without a call go first.
    """

    def __init__(self, most_bytes: int = 64 * 1024 * 1024) -> None:
        self._most = most_bytes
        self._known: OrderedDict[object, tuple[bytes, array[int]]] = OrderedDict()
        self._bytes = 0

    def ids(self, key: object, text: bytes) -> array[int]:
        """A list of ids, read. Raises ValueError and the like for what is none."""
        before, ids = self._known.pop(key, (b"[]", _NO_IDS))
        self._bytes -= 2 * len(before)
        begin = before[:-1]
        if len(begin) > 1 and text.startswith(begin) and text[len(begin) : len(begin) + 1] in (b",", b"]"):
            rest = text[len(begin) + 1 :]
            ids = ids + read_ids(b"[" + rest) if rest else ids
        else:
            ids = read_ids(text)
        self._known[key] = (text, ids)
        self._bytes += 2 * len(text)
        while self._bytes > self._most and len(self._known) > 1:
            self._bytes -= 2 * len(self._known.popitem(last=False)[1][0])
        return ids


_NO_IDS = array("I")


def splice(data: bytes, chat: bool, prompts: PromptTexts | None = None, key: object = None) -> Spliced | None:
    """Cut an answer; None when it is not laid out as expected. `key` names the conversation in `prompts`."""
    ranges = list(_ranges(data))
    if not ranges:
        return None
    rest = [
        data[end:begin]
        for end, begin in zip([0, *(r[1] for r in ranges)], [*(r[0] for r in ranges), len(data)], strict=True)
    ]
    # In the place of each list its number: what is found where it belongs is that list and no other.
    marked = b"".join(_with_numbers(rest))
    try:
        answer = orjson.loads(marked)
        texts = [data[begin:end] for begin, end in ranges]
        return _assigned(
            b"null".join(rest),
            answer,
            texts,
            chat,
            lambda text: prompts.ids(key, text) if prompts else read_ids(text),
        )
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
        return None


def cut_prompt(event: bytes, instead: bytes) -> tuple[bytes, bytes] | None:
    """An event with something else in the place of its list of prompt ids, and that list; None where it has
    none, or several.
    """
    found = event.find(_PROMPT)
    begin = found + len(_PROMPT) - 1
    end = event.find(b"]", begin) + 1
    if found < 0 or not end or event.find(_PROMPT, end) >= 0:
        return None
    return event[:begin] + instead + event[end:], event[begin:end]


def _with_numbers(parts: list[bytes]) -> Iterator[bytes]:
    for number, part in enumerate(parts):
        if number:
            yield b"%d" % (number - 1)
        yield part


def _ranges(data: bytes) -> Iterator[tuple[int, int]]:
    """Where the lists and tables stand, in their order. Each byte is looked at once."""
    begin = 0
    while (table := data.find(_TABLE, begin)) >= 0:
        yield from _lists(data, begin, table)
        begin = data.find(_AFTER_TABLE, table)
        if begin < 0:
            return
        yield table + len(_TABLE) - 1, begin
    yield from _lists(data, begin, len(data))


def _lists(data: bytes, begin: int, end: int) -> Iterator[tuple[int, int]]:
    while (found := data.find(_NUMBERS, begin, end)) >= 0:
        begin = data.find(b"]", found, end) + 1
        if not begin:
            return
        if data.endswith((_OF_ANSWER, _OF_PROMPT), 0, found):
            yield found + len(_NUMBERS) - 1, begin


def _assigned(
    data: bytes, answer: Any, texts: list[bytes], chat: bool, prompt_ids: Callable[[bytes], array[int]]
) -> Spliced | None:
    """Give each list to its place. Raises ValueError and the like for what is none."""
    found = Spliced(data, answer, {}, {}, {})
    used = []

    def place(holder: dict[str, Any], key: str) -> bytes | None:
        number = holder.get(key)
        if number is None:
            return None
        holder[key] = None
        used.append(number)
        text: bytes = texts[number]
        return text

    if (text := place(answer, "prompt_token_ids")) is not None:
        found.prompts[-1] = prompt_ids(text)
    for index, choice in enumerate(answer["choices"]):
        if (text := place(choice, "prompt_token_ids")) is not None:
            found.prompts[index] = read_ids(text)
        if (text := place(choice, "token_ids")) is not None:
            found.ids[index] = read_ids(text)
        if (text := place(choice, "logprobs")) is not None:
            found.logprobs[index] = _logprobs(text, chat)
        if len(found.ids.get(index, ())) != len(found.logprobs.get(index, ())):
            return None
    return found if sorted(used) == list(range(len(texts))) else None


def _logprobs(table: bytes, chat: bool) -> list[float]:
    if chat:
        text = b"[%b]" % b",".join(_CHAT_LOGPROB.findall(table))
    else:
        match = _TEXT_LOGPROBS.search(table)
        text = match[1] if match else b""
    numbers: list[float] = orjson.loads(text)
    if numbers and not math.isfinite(sum(numbers)):
        raise ValueError("no numbers")
    return numbers
