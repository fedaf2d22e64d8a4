"""What clients asked, what they were answered, and when."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

OK = "ok"
UNKNOWN = "unknown"
"""The client gave up before an answer came: it may have been done or not."""


@dataclass(slots=True)
class Op:
    """One thing that a client wanted of the store, however often it had to ask.

    Attributes:
        client: Who asked.
        kind: `enqueue`, `lease`, `renew`, `complete`, `release`, `spans`.
        rollout: The rollout that it is about.
        attempt: The attempt that it is about.
        asked: When it was first asked.
        answered: When the answer came; None = never.
        outcome: OK, UNKNOWN, or the reason of the refusal.
        detail: The attempt's number for a lease, the wanted status for a completion, span ids for spans.
    """

    client: str
    kind: str
    rollout: str
    attempt: str
    asked: float
    answered: float | None = None
    outcome: str = UNKNOWN
    detail: object = None

    def __str__(self) -> str:
        answered = "never" if self.answered is None else f"{self.answered:.4f}"
        what = f"{self.kind} {self.attempt or self.rollout} {self.detail or ''}"
        return f"{self.asked:.4f} .. {answered} {self.client}: {what} -> {self.outcome}"


@dataclass
class History:
    """All of it, by rollout.

    Attributes:
        wrong: What clients themselves saw that must not be, in words.
        answers: How many answers came.
        repeats: How often something had to be asked again, by reason.
    """

    ops: defaultdict[str, list[Op]] = field(default_factory=lambda: defaultdict(list))
    wrong: list[str] = field(default_factory=list)
    answers: int = 0
    repeats: Counter[str] = field(default_factory=Counter)

    def ask(self, client: str, kind: str, rollout: str, attempt: str = "", detail: object = None) -> Op:
        """Notes that something is asked now."""
        op = Op(client, kind, rollout, attempt, time.monotonic(), detail=detail)
        self.ops[rollout].append(op)
        return op

    def answer(self, op: Op, outcome: str) -> None:
        """Notes the answer."""
        op.answered, op.outcome = time.monotonic(), outcome
        self.answers += 1

    def about(self, rollout: str, attempt: str = "") -> str:
        """The part that concerns a rollout (and one of its attempts), in the order of asking."""
        ops = [op for op in self.ops.get(rollout, ()) if attempt in ("", op.attempt) or op.kind == "lease"]
        return "\n".join(f"  {op}" for op in sorted(ops, key=lambda op: op.asked))
