"""A judge that scores an answer by criteria."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agl_grpc.grader.grade import Grade
from agl_grpc.grader.judge.asking import Judge, as_text, section
from agl_grpc.grader.library.answers import look_up
from agl_grpc.grader.submission import Submission


@dataclass(frozen=True)
class Criterion:
    """One thing that an answer is scored by.

    Attributes:
        name: A short word; the component's name.
        description: What deserves the highest score, for the judge.
        weight: Its share of the value, against the others.
    """

    name: str
    description: str
    weight: float = 1.0


class RubricJudge(Judge):
    """Scores the response by each criterion from 0 to `scale`; the value is the weighted mean, from 0 to 1.

    Each criterion's score, as a share of `scale`, is a component of its own. For the other arguments see
    `Judge`.

    Args:
        criteria: Criteria, or their descriptions by name; without any, the one criterion is whether the
            response does what the task asks.
        scale: The highest score.
    """

    def __init__(
        self,
        model: str,
        criteria: Sequence[Criterion] | Mapping[str, str] | None = None,
        *,
        name: str = "rubric",
        scale: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(model, name=name, **options)
        self.criteria = _criteria(criteria)
        if scale < 1:
            raise ValueError(f"scale of judge {name} is {scale}; it must be at least 1")
        self.scale = scale

    async def grade(self, submission: Submission) -> Grade:
        """The verdict, with the judge's reasons, prompt and reply in its notes."""
        shares, notes = await self.ask(self.prompt(submission), self._read)
        total = math.fsum(one.weight for one in self.criteria)
        value = math.fsum(one.weight * shares[0][one.name] for one in self.criteria) / total
        return Grade(value=value, components=dict(shares[0]), notes={"reasons": shares[1], **notes})

    def prompt(self, submission: Submission) -> str:
        """The question."""
        parts = [section("Task", self.task_text(submission))]
        if self.reference:
            known = as_text(look_up(submission.input, self.reference))
            parts.append(section("An answer known to be good", known))
        parts.append(section("Answer to judge", submission.response or "(no answer was given)"))
        listed = "\n".join(f"- {one.name}: {one.description}" for one in self.criteria)
        form = ", ".join(f'"{one.name}": <0-{self.scale}>' for one in self.criteria)
        parts.append(
            f"Score the answer by each criterion with a whole number from 0 (not at all) to {self.scale} "
            f'(fully):\n{listed}\nReply as {{"reasons": "<one or two sentences>", "scores": {{{form}}}}}'
        )
        return "\n\n".join(parts)

    def form(self) -> dict[str, Any]:
        """A whole number for each criterion."""
        score = {"type": "integer", "minimum": 0, "maximum": self.scale}
        names = [one.name for one in self.criteria]
        return {
            "scores": {
                "type": "object",
                "properties": dict.fromkeys(names, score),
                "required": names,
                "additionalProperties": False,
            }
        }

    def _read(self, reply: Mapping[str, Any]) -> tuple[dict[str, float], str]:
        scores = reply.get("scores")
        if not isinstance(scores, Mapping):
            raise ValueError('"scores" is missing')
        shares = {}
        for one in self.criteria:
            score = scores.get(one.name)
            if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= self.scale:
                raise ValueError(f"the score of {one.name} is {score!r}, not a number from 0 to {self.scale}")
            shares[one.name] = score / self.scale
        return shares, as_text(reply.get("reasons", ""))


def _criteria(given: Sequence[Criterion] | Mapping[str, str] | None) -> tuple[Criterion, ...]:
    if given is None:
        return (Criterion("correct", "the answer does what the task asks, fully and correctly"),)
    if isinstance(given, Mapping):
        given = [Criterion(name, description) for name, description in given.items()]
    names = [one.name for one in given]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"criteria {names} must be at least one, each with a name of its own")
    for one in given:
        if not (math.isfinite(one.weight) and one.weight > 0):
            raise ValueError(f"the weight of criterion {one.name} is {one.weight}; it must be positive")
    return tuple(given)
