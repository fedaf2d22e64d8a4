"""What a grader answers, and how each legal form of it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from agl_grpc.model.reward import NAME_BYTES


class GraderFailed(Exception):
    """A grader gave no verdict: recorded with its reason, never as a value.

    Args:
        message: One line for people.
        outcome: What happened, as it is counted (`raised`, `timeout`, `not_a_grade`, …): a short word.
        detail: More, for example a traceback.
        final: A repeat cannot help: there is no retry.
    """

    def __init__(
        self, message: str, *, outcome: str = "failed", detail: str = "", final: bool = False
    ) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.detail = detail
        self.final = final

    def __reduce__(self) -> tuple[Any, ...]:
        # Verdicts come from other processes; BaseException's own form forgets keyword arguments.
        return _failed, (str(self), self.outcome, self.detail, self.final)


def _failed(message: str, outcome: str, detail: str, final: bool) -> GraderFailed:
    return GraderFailed(message, outcome=outcome, detail=detail, final=final)


@dataclass(slots=True, kw_only=True)
class Grade:
    """A verdict.

    value: the grader's number, finite. components: named parts of it, each finite; they become rewards
    `GRADER/COMPONENT` of their own, which count only where the run weighs them. notes: anything JSON can
    say, kept with the reward, for example the judge's reasons.
    """

    value: float
    components: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


GradeValue: TypeAlias = Grade | float | bool | Mapping[str, float]
"""What a grader may answer: a number, True (1) or False (0), a `Grade`, or named components.

The value of named components is their `value` entry when there is one, else their mean.
"""

_FORMS = "a finite number, a bool, a Grade or a mapping of names to finite numbers"


def as_grade(answer: Any) -> Grade:
    """The verdict that an answer stands for.

    Raises:
        GraderFailed: it is none; outcome `not_finite` or `not_a_grade`.
    """
    if isinstance(answer, Grade):
        value = _number(answer.value, "its value")
        return Grade(value=value, components=_components(answer.components), notes=dict(answer.notes))
    if isinstance(answer, Mapping):
        components = _components(answer)
        if not components:
            raise GraderFailed(
                f"the grader returned an empty mapping; it must return {_FORMS}", outcome="not_a_grade"
            )
        whole = components.get("value")
        parts = {name: part for name, part in components.items() if name != "value"}
        mean = math.fsum(parts.values()) / len(parts) if parts else 0.0
        return Grade(value=mean if whole is None else whole, components=parts)
    return Grade(value=_number(answer, "a value"))


def _components(parts: Mapping[Any, Any]) -> dict[str, float]:
    for name in parts:
        if not isinstance(name, str) or not name or len(name.encode(errors="replace")) > NAME_BYTES // 2:
            raise GraderFailed(
                f"the grader returned a component named {name!r:.80}; "
                f"names are texts of 1 to {NAME_BYTES // 2} bytes",
                outcome="not_a_grade",
            )
    return {name: _number(value, f"component {name!r}") for name, value in parts.items()}


def _number(value: Any, what: str) -> float:
    # numpy's and torch's scalars count too; texts that read as numbers do not.
    convert = getattr(type(value), "__float__", None)
    if convert is None or isinstance(value, str | bytes | complex):
        raise GraderFailed(
            f"the grader returned {what} of type {type(value).__name__} ({value!r:.80}); "
            f"it must return {_FORMS}",
            outcome="not_a_grade",
        )
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise GraderFailed(
            f"the grader returned {what} that is no number: {error}", outcome="not_a_grade"
        ) from None
    if not math.isfinite(number):
        raise GraderFailed(
            f"the grader returned {what} that is {number}; it must be finite", outcome="not_finite"
        )
    return number
