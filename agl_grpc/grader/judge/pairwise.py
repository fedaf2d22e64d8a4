"""A judge that compares two answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agl_grpc.grader.grade import Grade
from agl_grpc.grader.judge.asking import Judge, as_text, both, section
from agl_grpc.grader.library.answers import look_up
from agl_grpc.grader.submission import Submission

_SHARES = {"A": 1.0, "B": 0.0, "tie": 0.5}


class PairwiseJudge(Judge):
    """Compares the response with the task's own answer: 1 where it is better, 0 where worse, 0.5 for a tie.

    Each pair is judged in both orders, and the value is the mean: judges prefer the answer in a certain place
    (Zheng et al., 2023, arXiv:2306.05685), and where that decides, the two verdicts cancel out. For the other
    arguments see `Judge`.

    Args:
        question: What makes an answer the better one, for the judge.
        reference: Where the task holds the answer to compare with; needed by `grade`.
    """

    def __init__(
        self,
        model: str,
        *,
        name: str = "pairwise",
        question: str = "Which answer does better what the task asks?",
        reference: str = "answer",
        **options: Any,
    ) -> None:
        super().__init__(model, name=name, reference=reference, **options)
        self.question = question

    async def grade(self, submission: Submission) -> Grade:
        """The response against the task's own answer."""
        other = as_text(look_up(submission.input, self.reference))
        value, notes = await self._compare(submission, submission.response, other)
        return Grade(value=value, notes=notes)

    def form(self) -> dict[str, Any]:
        """The winner."""
        return {"winner": {"enum": list(_SHARES)}}

    async def _compare(self, submission: Submission, ours: str, theirs: str) -> tuple[float, dict[str, Any]]:
        """How much the first is better, from 0 to 1, by both orders."""
        task = self.task_text(submission)
        (first, one), (second, other) = await both(
            self.ask(self.prompt(task, ours, theirs), _read), self.ask(self.prompt(task, theirs, ours), _read)
        )
        value = (_SHARES[first[0]] + 1.0 - _SHARES[second[0]]) / 2
        verdicts = {"first": {"winner": first[0], "reasons": first[1], **one}}
        verdicts["second"] = {"winner": second[0], "reasons": second[1], **other}
        return value, verdicts

    def prompt(self, task: str, a: str, b: str) -> str:
        """The question, with the answers in this order."""
        none = "(no answer was given)"
        return "\n\n".join(
            [
                section("Task", task),
                section("Answer A", a or none),
                section("Answer B", b or none),
                f'{self.question}\nReply as {{"reasons": "<one sentence>", "winner": "A", "B" or "tie"}}',
            ]
        )


def _read(reply: Mapping[str, Any]) -> tuple[str, str]:
    said = str(reply.get("winner", "")).strip()
    winner = said.upper() if said.upper() in ("A", "B") else said.lower()
    if winner not in _SHARES:
        raise ValueError(f'"winner" is {said!r:.40}, not "A", "B" or "tie"')
    return winner, as_text(reply.get("reasons", ""))
