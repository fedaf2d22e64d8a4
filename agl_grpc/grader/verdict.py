"""One grader's word on one submission: with retries, and as the rewards that record it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from agl_grpc.grader.base import Grader
from agl_grpc.grader.grade import Grade, GraderFailed
from agl_grpc.grader.submission import Submission
from agl_grpc.model import Failure, FailureKind, Reward

FIRST_WAIT = 0.2
"""Seconds before the second try, doubled for each further one."""

LONGEST_WAIT = 10.0
"""Most seconds between two tries."""

GRADED = "graded"
_FINAL = frozenset({"not_a_grade", "not_finite", "not_importable"})

Try = Callable[[Grader, Submission], Coroutine[Any, Any, Grade]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a grader said: a grade, or why there is none.

    outcome: `graded`, or how the failure is counted. tries: how often it was asked. seconds: how long it took
    in all.
    """

    grader: Grader
    grade: Grade | None
    failure: GraderFailed | None
    tries: int
    seconds: float

    @property
    def outcome(self) -> str:
        """How it is counted."""
        return GRADED if self.failure is None else self.failure.outcome

    def rewards(self, rollout_id: str, attempt_id: str, revision: int) -> list[Reward]:
        """The rewards that record it: the grader's own first, then its components."""
        base: dict[str, Any] = {
            "rollout_id": rollout_id,
            "attempt_id": attempt_id,
            "grader": self.grader.name,
            "grader_version": self.grader.version,
        }
        notes: dict[str, Any] = {"tries": self.tries, "seconds": round(self.seconds, 6)}
        if self.grade is None:
            assert self.failure is not None
            failure = Failure(
                kind=FailureKind.GRADER,
                message=str(self.failure),
                type=self.failure.outcome,
                detail=self.failure.detail,
            )
            return [Reward(**base, name=self.grader.name, revision=revision, failure=failure, metadata=notes)]
        notes |= self.grade.notes
        whole = Reward(
            **base, name=self.grader.name, revision=revision, value=self.grade.value, metadata=notes
        )
        parts = [
            Reward(**base, name=f"{self.grader.name}/{name}", value=value)
            for name, value in self.grade.components.items()
        ]
        # The whole is last: when it is there, its components are.
        return [*parts, whole]


async def ask(grader: Grader, submission: Submission, attempt: Try) -> Verdict:
    """Asks until there is a grade, or the grader's retries are used up."""
    begun = time.perf_counter()
    tries = 0
    while True:
        tries += 1
        try:
            grade = await attempt(grader, submission)
        except GraderFailed as error:
            if error.final or error.outcome in _FINAL or tries > grader.retries:
                return Verdict(grader, None, error, tries, time.perf_counter() - begun)
            await asyncio.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (tries - 1)))
            continue
        return Verdict(grader, grade, None, tries, time.perf_counter() - begun)
