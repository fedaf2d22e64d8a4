"""Graders of plain text: exact match and regular expression."""

from __future__ import annotations

import re
import string
from collections.abc import Collection
from typing import Any

from agl_grpc.grader.base import DEFAULT_TIMEOUT, Grader
from agl_grpc.grader.grade import Grade
from agl_grpc.grader.library.answers import AnswerGrader, bad_reference, look_up, right, shown, wrong
from agl_grpc.grader.submission import Submission

_ARTICLES = re.compile(r"\b(?:a|an|the)\b", re.IGNORECASE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
NORMALISATIONS = ("case", "space", "punctuation", "articles")


class ExactMatch(AnswerGrader):
    """The answer is the reference, or one of them when the task holds a list.

    Args:
        ignore: What makes no difference: any of `case`, `space` (runs of white space count as one),
            `punctuation` and `articles` (a, an, the). All four together are SQuAD's normalisation.
    """

    def __init__(
        self,
        *,
        name: str = "exact_match",
        reference: str = "answer",
        extract: str = "all",
        ignore: Collection[str] = ("case", "space"),
        version: str = "1",
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        super().__init__(name=name, reference=reference, extract=extract, version=version, timeout=timeout)
        if unknown := sorted(set(ignore) - set(NORMALISATIONS)):
            raise ValueError(f"ignore={unknown} is not known; there are {', '.join(NORMALISATIONS)}")
        self.ignore = frozenset(ignore)

    def prepare(self, wanted: Any) -> list[str]:
        """The references, normalised."""
        several = wanted if isinstance(wanted, list | tuple) else [wanted]
        if not several:
            raise bad_reference("is an empty list")
        return [self._plain(str(one)) for one in several]

    def compare(self, given: str, wanted: list[str]) -> Grade:
        """Whether one of them is the answer."""
        if self._plain(given) in wanted:
            return right(answer=shown(given))
        return wrong("another answer was expected", answer=shown(given), expected=shown(wanted[0]))

    def _plain(self, text: str) -> str:
        if "case" in self.ignore:
            text = text.casefold()
        if "punctuation" in self.ignore:
            text = text.translate(_PUNCTUATION)
        if "articles" in self.ignore:
            text = _ARTICLES.sub(" ", text)
        return " ".join(text.split()) if "space" in self.ignore else text.strip()


class RegularExpression(Grader):
    """The response matches a regular expression.

    It runs in a process of its own: an expression that does not come to an end is stopped at the time-out,
    and that is a failure of the grader.

    Args:
        pattern: The expression, as Python's `re` reads it; None = each task holds its own under `reference`.
        reference: Where the task holds it.
        whole: Whether the whole response must match; else some part of it.
    """

    def __init__(
        self,
        pattern: str | None = None,
        *,
        name: str = "regular_expression",
        reference: str = "pattern",
        whole: bool = False,
        version: str = "1",
        timeout: float = 5.0,
    ) -> None:
        super().__init__(name=name, version=version, timeout=timeout, retries=0, isolated=True)
        self.pattern = pattern
        self.reference = reference
        self.whole = whole
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from None

    def grade(self, submission: Submission) -> Grade:
        """1.0 where it matches, else 0.0."""
        pattern = look_up(submission.input, self.reference) if self.pattern is None else self.pattern
        try:
            compiled = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise bad_reference(f"{pattern!r:.80} is no regular expression: {error}") from None
        match = (compiled.fullmatch if self.whole else compiled.search)(submission.response)
        if match is None:
            return wrong("the response does not match", pattern=shown(compiled.pattern))
        return right(matched=shown(match.group(0)))
