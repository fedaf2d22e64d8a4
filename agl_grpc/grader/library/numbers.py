"""Graders of numbers and of mathematics."""

from __future__ import annotations

import math
import re
import warnings
from fractions import Fraction
from typing import Any

from agl_grpc.grader.base import DEFAULT_TIMEOUT
from agl_grpc.grader.grade import Grade, GraderFailed
from agl_grpc.grader.library.answers import NUMBER, AnswerGrader, bad_reference, right, shown, wrong
from agl_grpc.grader.submission import Submission

_FRACTION = re.compile(r"([-+]?\d+)\s*/\s*(\d+)")
_AROUND = re.compile(r"^[\s$€£=]+|[\s$€£%.]+$")


class Numeric(AnswerGrader):
    """The answer is the reference's number, within a tolerance.

    Read are integers, decimals, thousands separated by commas, exponents, fractions (`3/4`), per cent
    (`12%` is 12) and currency signs before or behind. An answer that is no number is wrong.

    Args:
        absolute: Largest difference that counts as equal.
        relative: The same as a share of the reference's size; the larger of both holds.
    """

    def __init__(
        self,
        *,
        name: str = "numeric",
        reference: str = "answer",
        extract: str = "number",
        absolute: float = 1e-9,
        relative: float = 1e-6,
        version: str = "1",
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        super().__init__(name=name, reference=reference, extract=extract, version=version, timeout=timeout)
        for title, value in (("absolute", absolute), ("relative", relative)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{title} tolerance is {value}; it must be finite and not negative")
        self.absolute = absolute
        self.relative = relative

    def prepare(self, wanted: Any) -> float:
        """The reference's number."""
        number = wanted if isinstance(wanted, int | float) else read_number(str(wanted))
        if number is None or not math.isfinite(number):
            raise bad_reference(f"{wanted!r:.80} is no number")
        return float(number)

    def compare(self, given: str, wanted: float) -> Grade:
        """Whether both are equal, within the tolerance."""
        number = read_number(given)
        if number is None:
            return wrong("the answer is no number", answer=shown(given), expected=wanted)
        if math.isclose(number, wanted, rel_tol=self.relative, abs_tol=self.absolute):
            return right(answer=number)
        return wrong("another number was expected", answer=number, expected=wanted)


def read_number(text: str) -> float | None:
    """The number that a text is; None = it is none."""
    plain = _AROUND.sub("", text.strip()).replace("\u2212", "-")
    if fraction := _FRACTION.fullmatch(plain):
        below = int(fraction[2])
        return float(Fraction(int(fraction[1]), below)) if below else None
    if not any(c.isdigit() for c in plain) or not re.fullmatch(NUMBER, plain):
        return None
    number = float(plain.replace(",", ""))
    return number if math.isfinite(number) else None


class Maths(AnswerGrader):
    """The answer is mathematically the same as the reference: expressions, sets, intervals or matrices.

    Both are read as LaTeX or plain expressions by math-verify (`pip install 'agl-grpc[graders]'`), in a
    process of its own: where it does not come to an end it is stopped at the time-out, and that is a failure
    of the grader.

    Args:
        extract: As for all; by default math-verify finds the answer itself (the last `\\boxed{…}`, formula
            or number).
    """

    def __init__(
        self,
        *,
        name: str = "maths",
        reference: str = "answer",
        extract: str = "all",
        version: str = "1",
        timeout: float = 10.0,
    ) -> None:
        super().__init__(
            name=name,
            reference=reference,
            extract=extract,
            version=version,
            timeout=timeout,
            retries=0,
            isolated=True,
        )

    async def open(self) -> None:
        """Looks for math-verify."""
        _math_verify()

    def grade(self, submission: Submission) -> Grade:
        """As all; math-verify says in warnings that its own time-outs are off, because ours is on."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return super().grade(submission)

    def prepare(self, wanted: Any) -> list[Any]:
        """The reference's expressions."""
        text = str(wanted)
        # A bare formula without dollar signs is one all the same.
        parsed = _parse(text) or _parse(f"${text}$")
        if not parsed:
            raise bad_reference(f"{text!r:.80} is no expression that math-verify can read")
        return parsed

    def compare(self, given: str, wanted: list[Any]) -> Grade:
        """Whether math-verify finds both equal."""
        parsed = _parse(given)
        if not parsed:
            return wrong(
                "no expression was found in the answer", answer=shown(given), expected=shown(wanted[-1])
            )
        _, verify = _math_verify()
        if verify(wanted, parsed, timeout_seconds=None):
            return right(answer=shown(parsed[-1]))
        return wrong("another value was expected", answer=shown(parsed[-1]), expected=shown(wanted[-1]))


def _parse(text: str) -> list[Any]:
    parse, _ = _math_verify()
    return list(parse(text, parsing_timeout=None))


def _math_verify() -> tuple[Any, Any]:
    try:
        from math_verify import parse, verify  # type: ignore[import-untyped] # has no stubs
    except ImportError:
        raise GraderFailed(
            "the grader Maths needs math-verify: pip install 'agl-grpc[graders]'",
            outcome="not_installed",
            final=True,
        ) from None
    return parse, verify
