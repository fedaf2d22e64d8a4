"""What graders of final answers share: where the right answer stands, and how the given one is found."""

from __future__ import annotations

import abc
import re
from collections.abc import Mapping
from typing import Any

from agl_grpc.grader.base import DEFAULT_RETRIES, DEFAULT_TIMEOUT, Grader
from agl_grpc.grader.grade import Grade, GraderFailed
from agl_grpc.grader.submission import Submission

NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?"
_FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
_SHOWN = 200


class AnswerGrader(Grader):
    """Compares the answer that stands in a response with the task's own.

    A response in which no answer is found is wrong (0.0, with the reason in its notes). A task without a
    usable reference is a failure of the grader.

    Args:
        reference: Where the task holds the right answer: a key, or keys with dots between them. Empty = the
            task itself.
        extract: Where the answer stands in the response: `all`, `last_line`, `boxed` (the last LaTeX
            `\\boxed{…}`), `fence` (the last fenced block), `number` (the last number), or a regular
            expression whose last match counts (its first group, where it has one).
        name: The reward's name.
        version: Changes when the verdicts may; the options here are part of what it stands for.
        timeout: Seconds that one try may take.

    Raises:
        ValueError: `extract` is neither of these words nor a regular expression.
    """

    def __init__(
        self,
        *,
        name: str,
        reference: str = "answer",
        extract: str = "all",
        version: str = "1",
        timeout: float = DEFAULT_TIMEOUT,
        retries: int = DEFAULT_RETRIES,
        isolated: bool | None = None,
    ) -> None:
        super().__init__(name=name, version=version, timeout=timeout, retries=retries, isolated=isolated)
        self.reference = reference
        self.extract = extract
        find_answer("", extract)

    def grade(self, submission: Submission) -> Grade:
        """1.0 for a right answer, 0.0 for a wrong one or none; notes say what was compared."""
        wanted = self.prepare(look_up(submission.input, self.reference))
        given = find_answer(submission.response, self.extract)
        if given is None:
            return wrong("no answer was found in the response")
        return self.compare(given, wanted)

    def prepare(self, wanted: Any) -> Any:
        """The reference in the form that `compare` takes.

        Raises:
            GraderFailed: it cannot be one.
        """
        return wanted

    @abc.abstractmethod
    def compare(self, given: str, wanted: Any) -> Grade:
        """The verdict on an answer."""


def look_up(task: Any, path: str) -> Any:
    """What stands in a task under a key, or under keys with dots between them.

    Raises:
        GraderFailed: nothing does; outcome `no_reference`.
    """
    found = task
    for key in path.split(".") if path else ():
        if not isinstance(found, Mapping) or key not in found:
            keys = ", ".join(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
            raise GraderFailed(
                f"the task has no {path!r} to compare with; there is {keys or 'nothing'} "
                "(set the grader's reference to the right key)",
                outcome="no_reference",
                final=True,
            )
        found = found[key]
    if found is None:
        raise GraderFailed(f"the task's {path!r} is null", outcome="no_reference", final=True)
    return found


def bad_reference(why: str) -> GraderFailed:
    """The failure for a reference that cannot be compared with."""
    return GraderFailed(f"the task's reference {why}", outcome="bad_reference", final=True)


def find_answer(response: str, extract: str) -> str | None:
    """The answer within a response; None = there is none. See `AnswerGrader`.

    Raises:
        ValueError: `extract` is no way to find one.
    """
    text = response.strip()
    if extract == "all":
        return text or None
    if extract == "last_line":
        return text.splitlines()[-1].strip() if text else None
    if extract == "boxed":
        return _boxed(text)
    if extract == "fence":
        blocks = _FENCE.findall(text)
        return blocks[-1].strip() if blocks else None
    if extract == "number":
        numbers = [found for found in re.findall(NUMBER, text) if any(c.isdigit() for c in found)]
        return numbers[-1] if numbers else None
    return _matched(text, extract)


def _boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for place in range(start + len("\\boxed"), len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[start + len("\\boxed{") : place].strip()
    return None


def _matched(text: str, pattern: str) -> str | None:
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(
            f"extract {pattern!r} is neither all, last_line, boxed, fence, number nor a regular expression: "
            f"{error}"
        ) from None
    matches = list(compiled.finditer(text))
    if not matches:
        return None
    last = matches[-1]
    found = last.group(1) if compiled.groups else last.group(0)
    return None if found is None else found.strip()


def right(**notes: Any) -> Grade:
    """A right answer."""
    return Grade(value=1.0, notes=notes)


def wrong(reason: str, **notes: Any) -> Grade:
    """A wrong answer, and why."""
    return Grade(value=0.0, notes={"reason": reason, **notes})


def shown(value: Any) -> str:
    """A value in notes, cut when it is long."""
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
