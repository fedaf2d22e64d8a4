"""What carries token ids in chat completions and completions: asked for, collected, and taken out again."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from agl_grpc.interceptor.capture.record import ChoiceRecord
from agl_grpc.interceptor.front.numbers import read_ids
from agl_grpc.interceptor.front.splice import PromptTexts, Spliced, cut_prompt, splice
from agl_grpc.interceptor.refusals import Refusal

CAPTURED = frozenset({"chat.completions", "completions"})
"""Dialects whose answers can carry token ids."""


MOST_PROMPTS = 1000

_UNREAD = b"-1"
"""Stands in the place of a list of prompt ids that has been cut out: no engine sends that."""


class Asked(NamedTuple):
    """What the client itself asked for."""

    stream: bool
    token_ids: bool
    logprobs: bool
    n: int
    prompts: int


NOTHING_ASKED = Asked(stream=False, token_ids=False, logprobs=False, n=1, prompts=1)


def asked_by(api: str, body: Mapping[str, Any]) -> Asked:
    """Read a request as it came. Raises Refusal for more prompts than are recorded."""
    n = body.get("n")
    prompt = body.get("prompt") if api == "completions" else None
    several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)
    if several and isinstance(prompt, list) and len(prompt) > MOST_PROMPTS:
        raise Refusal(400, "too_many_prompts", f"at most {MOST_PROMPTS} prompts in one request")
    return Asked(
        stream=body.get("stream") is True,
        token_ids=body.get("return_token_ids") is True,
        logprobs=asks_logprobs(api, body.get("logprobs")),
        n=n if isinstance(n, int) and n > 0 else 1,
        prompts=len(prompt) if several and isinstance(prompt, list) else 1,
    )


def asks_logprobs(api: str, value: Any) -> bool:
    """Whether this value of ``logprobs`` asks for some: a switch in chat, a number in completions."""
    return bool(value) if api == "chat.completions" else value is not None and value is not False


def ask_for_ids(api: str, body: dict[str, Any], asked: Asked) -> str:
    """Have the engine send token ids and logprobs; why it cannot, empty when it can."""
    if body.get("echo"):
        # The engine would count the prompt among the answer's tokens, and leave its text out.
        return "echo mixes prompt and answer"
    body["return_token_ids"] = True
    if not asked.logprobs:
        body["logprobs"] = True if api == "chat.completions" else 0
    return ""


class Collector:
    """Collects ids and logprobs of an answer, whole or event by event; strips what was not asked for."""

    def __init__(
        self, api: str, asked: Asked, texts: PromptTexts | None = None, conversation: object = None
    ) -> None:
        self._texts = texts
        self._conversation = conversation
        self._chat = api == "chat.completions"
        self._asked = asked
        self.choices: dict[int, ChoiceRecord] = {}
        self.prompts: dict[int, array[int]] = {}
        self._unread: dict[int, bytes] = {}
        self.problems: list[str] = []
        self.answer_id = ""
        self.model = ""
        self.total_tokens = 0
        self.error = ""

    def take(self, answer: dict[str, Any]) -> tuple[bool, bool]:
        """Take in an answer or an event and strip it in place: whether it was changed, and whether it is
        there only because of what we asked for.
        """
        self.answer_id = self.answer_id or _text(answer.get("id"))
        self.model = self.model or _text(answer.get("model"))
        if (error := answer.get("error")) is not None:
            self.error = _text(error.get("message") if isinstance(error, dict) else error) or "engine error"
        usage = answer.get("usage")
        if isinstance(usage, dict) and isinstance(usage.get("total_tokens"), int):
            self.total_tokens = usage["total_tokens"]
        changed = False
        if answer.get("prompt_token_ids") is not None:
            self._prompt(0, answer["prompt_token_ids"])
            if not self._asked.token_ids:
                answer["prompt_token_ids"] = None
                changed = True
        choices = answer.get("choices")
        ours = bool(choices) and not changed and usage is None
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                changed |= self._choice(choice)
                ours &= self._says_nothing(choice)
        return changed, changed and ours

    def take_event(self, payload: bytes) -> bytes | None:
        """Take in an event's JSON; what the client gets of it, None where it is there for us alone.

        A list of prompt ids that the client has not asked for is kept unread until `read_prompts`: the first
        byte does not wait for it. Raises ValueError for what is no JSON object.
        """
        cut = None if self._asked.token_ids else cut_prompt(payload, _UNREAD)
        answer = None if cut is None else self._keep_prompt(*cut)
        kept = answer is not None
        if answer is None:
            answer = orjson.loads(payload)
        if not isinstance(answer, dict):
            raise ValueError("no object")
        changed, ours = self.take(answer)
        if ours and not kept:
            return None
        return orjson.dumps(answer) if changed or kept else payload

    def _keep_prompt(self, rest: bytes, text: bytes) -> dict[str, Any] | None:
        """The answer whose prompt has been cut out, its place empty; None when that was another list."""
        try:
            answer = orjson.loads(rest)
        except orjson.JSONDecodeError:
            return None
        choices = answer.get("choices") if isinstance(answer, dict) else None
        for holder in (answer, *(choices if isinstance(choices, list) else ())):
            if isinstance(holder, dict) and holder.get("prompt_token_ids") == int(_UNREAD):
                holder["prompt_token_ids"] = None
                self._unread[-1 if holder is answer else _index(holder) // self._asked.n] = text
                return answer if isinstance(answer, dict) else None
        return None

    def read_prompts(self) -> None:
        """Read what has been kept unread."""
        while self._unread:
            number, text = self._unread.popitem()
            try:
                own = self._texts if number < 0 else None
                ids = read_ids(text) if own is None else own.ids(self._conversation, text)
            except (ValueError, TypeError, OverflowError):
                ids = self._ids(None, "prompt token ids")
            self.prompts[max(number, 0)] = ids

    def take_whole(self, data: bytes) -> bytes:
        """Take in an answer that came as a whole; its bytes without what was not asked for.

        Raises ValueError for what is no answer of the dialect.
        """
        asked = self._asked.token_ids or self._asked.logprobs
        spliced = None if asked else splice(data, self._chat, self._texts, self._conversation)
        if spliced is not None:
            self._take_spliced(spliced)
            return spliced.data
        answer = orjson.loads(data)
        if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
            raise ValueError("an answer without choices")
        changed, _ = self.take(answer)
        return orjson.dumps(answer) if changed else data

    def _take_spliced(self, spliced: Spliced) -> None:
        self.take(spliced.answer)
        if -1 in spliced.prompts:
            self.prompts[0] = spliced.prompts[-1]
        for place, choice in enumerate(spliced.answer["choices"]):
            record = self.choices[_index(choice)]
            record.token_ids = spliced.ids.get(place, record.token_ids)
            record.logprobs = spliced.logprobs.get(place, record.logprobs)
            if place in spliced.prompts:
                self.prompts[record.index // self._asked.n] = spliced.prompts[place]

    def finished(self) -> bool:
        """Whether each choice has come to its end."""
        expected = self._asked.n * self._asked.prompts
        ended = [choice for choice in self.choices.values() if choice.finish_reason]
        return len(ended) >= min(expected, max(1, len(self.choices)))

    def _choice(self, choice: dict[str, Any]) -> bool:
        number = _index(choice)
        record = self.choices.setdefault(number, ChoiceRecord(number))
        changed = False
        if choice.get("prompt_token_ids") is not None:
            self._prompt(record.index // self._asked.n, choice["prompt_token_ids"])
            if not self._asked.token_ids:
                choice["prompt_token_ids"] = None
                changed = True
        ids = choice.get("token_ids")
        if ids is not None:
            record.token_ids += self._ids(ids, "token ids")
            if not self._asked.token_ids:
                choice["token_ids"] = None
                changed = True
        table = choice.get("logprobs")
        if table is not None:
            record.logprobs += self._logprobs(table)
            if not self._asked.logprobs:
                choice["logprobs"] = None
                changed = True
        if choice.get("finish_reason") is not None:
            record.finish_reason = _text(choice["finish_reason"])
        if choice.get("stop_reason") is not None:
            record.stop_reason = str(choice["stop_reason"])
        return changed

    def _prompt(self, number: int, ids: Any) -> None:
        self.prompts[number] = self._ids(ids, "prompt token ids")

    def _ids(self, values: Any, what: str) -> array[int]:
        try:
            return array("I", values)
        except (TypeError, OverflowError):
            self._problem(f"{what} that are none")
            return array("I")

    def _logprobs(self, table: Any) -> list[float]:
        try:
            if self._chat:
                values = [entry["logprob"] for entry in table["content"] or ()]
            else:
                values = list(table["token_logprobs"] or ())
            if values and not math.isfinite(sum(values)):
                raise ValueError
        except (TypeError, KeyError, ValueError, OverflowError):
            return self._problem("logprobs that are no numbers")
        return values

    def _problem(self, what: str) -> list[Any]:
        if what not in self.problems:
            self.problems.append(f"the engine sent {what}")
        return []

    def _says_nothing(self, choice: dict[str, Any]) -> bool:
        """An event that a parser which holds text back would not have let the engine send."""
        delta = choice.get("delta")
        return (
            self._chat
            and not self._asked.token_ids
            and not self._asked.logprobs
            and isinstance(delta, dict)
            and not any(value is not None for value in delta.values())
            and choice.get("finish_reason") is None
        )


def _index(choice: dict[str, Any]) -> int:
    index = choice.get("index")
    return index if isinstance(index, int) else 0


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
