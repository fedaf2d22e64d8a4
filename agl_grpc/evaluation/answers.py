"""The final answer of a rollout, for the vote of maj@n."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation

from agl_grpc.grader import Submission
from agl_grpc.grader.conversation import Decode
from agl_grpc.model import Span

ANSWER = "answer"
"""The note in which an agent says its final answer: ``emit_annotation({"answer": "42"})``."""

Finder = Callable[[str], str | None]
"""From the text of the last response to the final answer; None = there is none."""

_MARKED = (
    re.compile(r"####\s*(.+)"),
    re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE),
    re.compile(r"(?:final\s+)?answer(?:\s+is)?\s*[:=]\s*(.+)", re.IGNORECASE),
)
_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(?:[eE][-+]?\d{1,3})?%?")
_BOXED = "\\boxed{"


def find_answer(text: str) -> str | None:
    r"""The final answer in a response.

    The last ``\boxed{…}``, else what follows the last ``####``, else the last ``<answer>…</answer>``, else
    what follows the last ``Answer:``; None when nothing is marked: a whole response is no vote.
    """
    if boxed := _boxed(text):
        return boxed
    for pattern in _MARKED:
        if found := pattern.findall(text):
            return str(found[-1]).strip() or None
    return None


def _boxed(text: str) -> str:
    r"""The content of the last ``\boxed{…}``, braces inside it included."""
    start = text.rfind(_BOXED)
    if start < 0:
        return ""
    depth, begin = 1, start + len(_BOXED)
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[begin:place].strip()
    return ""


def normalise(answer: str) -> str:
    """The form in which answers are compared: no case, no outer marks, single spaces, plain numbers.

    ``"1,000.0"``, ``"$1000"`` and ``"1e3"`` are the same answer.
    """
    text = " ".join(answer.split()).strip("$ .*`\"'").casefold()
    if _NUMBER.fullmatch(text):
        try:
            number = Decimal(text.rstrip("%").replace(",", ""))
        except InvalidOperation:
            return text
        plain = f"{number.normalize():f}" if abs(number.adjusted()) < 40 else str(number.normalize())
        return ("0" if number == 0 else plain) + ("%" if text.endswith("%") else "")
    return text


def answer_of(spans: Sequence[Span], decode: Decode | None, find: Finder = find_answer) -> str | None:
    """The normalised final answer of an attempt: what the agent noted as `ANSWER`, else in its last response.

    Args:
        spans: of the attempt, in order.
        decode: token ids to text, for model calls of which only tokens were recorded; None = not read.
        find: from the last response's text to the answer.
    """
    for span in reversed(spans):
        if (noted := span.attributes.get(ANSWER)) is not None:
            return normalise(str(noted)) or None
    found = find(Submission(spans=spans, decode=decode).response) if spans else None
    return normalise(found) or None if found is not None else None
