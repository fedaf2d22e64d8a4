"""Holds a history against the promises (R4-R9, R13, R14) and against what the store has in the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.chaos.history import OK, UNKNOWN, History, Op

HOLDING = ("renew", "complete", "release")
"""What only the holder of a live lease may do."""

ENDING = ("complete", "release")
OVER = ("succeeded", "failed", "cancelled")


@dataclass
class Final:
    """What the store has in the end.

    Attributes:
        rollouts: State by rollout id, in lower case.
        attempts: For each rollout (attempt id, state), oldest first.
        spans: How often each (attempt id, span id) is stored.
        rewards: How many rewards each attempt has.
    """

    rollouts: Mapping[str, str] = field(default_factory=dict)
    attempts: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    spans: Counter[tuple[str, bytes]] = field(default_factory=Counter)
    rewards: Counter[str] = field(default_factory=Counter)


def check(history: History, final: Final) -> list[str]:
    """What is wrong, each with the part of the history that shows it; empty = nothing."""
    wrong = list(history.wrong)
    for rollout, ops in history.ops.items():
        wrong += check_leases(history, rollout, ops)
        wrong += _check_end(history, rollout, ops, final)
    wrong += _check_spans(history, final)
    unknown = final.rollouts.keys() - history.ops.keys()
    wrong += [f"rollout {rollout} is in the store and nobody asked for it" for rollout in unknown]
    return wrong


def check_leases(history: History, rollout: str, ops: Iterable[Op]) -> list[str]:
    """At most one live lease at a time, and nothing accepted from anybody else."""
    wrong: list[str] = []
    ops = list(ops)
    leases = [op for op in ops if op.kind == "lease" and op.outcome == OK]
    holders = Counter(op.attempt for op in leases)
    wrong += [
        f"attempt {attempt} was delivered {count} times" for attempt, count in holders.items() if count > 1
    ]
    numbers = Counter(op.detail for op in leases)
    wrong += [
        f"rollout {rollout} has two attempts number {number}"
        for number, count in numbers.items()
        if count > 1
    ]
    number = {op.attempt: op.detail for op in leases}
    ended = _ends(ops)
    for op in ops:
        if op.kind not in HOLDING or op.outcome != OK:
            continue
        newer = [
            one for one in leases if _number(one.detail) > _number(number[op.attempt]) and _before(one, op)
        ]
        if newer:
            wrong.append(f"accepted after {newer[0].attempt} was delivered: {op}")
        over = [end for end in ended.get(op.attempt, ()) if end is not op and _before(end, op)]
        if over:
            wrong.append(f"accepted after the attempt's end: {op}")
    return [f"{line}\n{history.about(rollout)}" for line in wrong]


def _before(first: Op, second: Op) -> bool:
    """Whether one was answered before the other was asked."""
    return first.answered is not None and first.answered < second.asked


def _number(detail: object) -> int:
    assert isinstance(detail, int)
    return detail


def _ends(ops: Iterable[Op]) -> dict[str, list[Op]]:
    ended: dict[str, list[Op]] = {}
    for op in ops:
        if op.kind in ENDING and op.outcome == OK:
            ended.setdefault(op.attempt, []).append(op)
    return ended


def _check_end(history: History, rollout: str, ops: Sequence[Op], final: Final) -> list[str]:
    """Finished exactly once, as its workers were told."""
    wrong: list[str] = []
    state = final.rollouts.get(rollout)
    asked = [op for op in ops if op.kind == "enqueue"]
    if state is None:
        if any(op.outcome == OK for op in asked):
            wrong.append(f"rollout {rollout} was acknowledged and is not there")
        return wrong
    if state not in OVER:
        wrong.append(f"rollout {rollout} is {state} in the end")
    attempts = dict(final.attempts.get(rollout, ()))
    won = [op for op in ops if op.kind == "complete" and op.outcome == OK and op.detail == "succeeded"]
    succeeded = [attempt for attempt, status in attempts.items() if status == "succeeded"]
    if len(won) > 1 or len(succeeded) > 1:
        wrong.append(f"rollout {rollout} succeeded more than once: {succeeded}")
    if won and (state != "succeeded" or succeeded != [won[0].attempt]):
        wrong.append(f"rollout {rollout} is {state} by {succeeded}, its worker was told otherwise")
    if succeeded and final.rewards[succeeded[0]] != 1:
        wrong.append(f"attempt {succeeded[0]} came with one reward and has {final.rewards[succeeded[0]]}")
    maybe = {op.attempt for op in ops if op.kind == "complete" and op.outcome in (OK, UNKNOWN)}
    if succeeded and not maybe.issuperset(succeeded):
        wrong.append(f"rollout {rollout} succeeded by {succeeded}, which nobody completed")
    for op in ops:
        if op.kind == "lease" and op.outcome == OK and op.attempt not in attempts:
            wrong.append(f"attempt {op.attempt} was delivered and is not there")
        if op.kind == "lease" and any(_before(end, op) for end in won):
            wrong.append(f"rollout {rollout} was delivered after its end: {op}")
    return [f"{line}\n{history.about(rollout)}" for line in wrong]


def _check_spans(history: History, final: Final) -> list[str]:
    """Every acknowledged span is there once, and nothing that nobody sent."""
    wrong: list[str] = []
    sent: set[tuple[str, bytes]] = set()
    for rollout, ops in history.ops.items():
        for op in ops:
            if op.kind != "spans":
                continue
            assert isinstance(op.detail, tuple)
            names = [(op.attempt, span_id) for span_id in op.detail]
            sent.update(names)
            missing = [span_id.hex() for _, span_id in names if not final.spans[op.attempt, span_id]]
            if op.outcome == OK and missing:
                about = history.about(rollout, op.attempt)
                wrong.append(f"spans {missing} of {op.attempt} were acknowledged and are lost\n{about}")
    wrong += [f"span {name} is stored {count} times" for name, count in final.spans.items() if count > 1]
    wrong += [f"span {name} is stored and nobody sent it" for name in final.spans if name not in sent]
    return wrong
