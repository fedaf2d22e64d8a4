"""Prefix merge: answers of one attempt -> trajectories, each the tokens of one conversation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from agl_grpc.sample.calls import Answer
from agl_grpc.sample.types import DropReason, Int32Array, RowStart


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Answers that continue each other: each prompt begins with the sequence of the answer before."""

    answers: tuple[Answer, ...]
    start: RowStart


@dataclass(frozen=True, slots=True)
class Merge:
    """The trajectories of an attempt, and every answer that is in none of them, with the reason."""

    trajectories: list[Trajectory]
    excluded: list[tuple[Answer, DropReason]]


def merge_answers(answers: Sequence[Answer], rewarded_spans: Collection[bytes] = ()) -> Merge:
    """Merge answers (in call order) into trajectories.

    An answer goes on with the longest earlier sequence that its prompt begins with, unless that one is
    continued already, left out, or sampled at another temperature: then a new trajectory begins with
    the whole prompt, so every sampled token is trained at most once. Of siblings (answers to one
    prompt) only those count that a later prompt continues or that own a reward, or all if none does.
    """
    bases = _find_bases(answers)
    excluded = _exclusions(answers, bases, rewarded_spans)
    chains: list[list[int]] = []
    starts: list[RowStart] = []
    chain_of_tip: dict[int, int] = {}
    # A base is always shorter than what continues it; call order alone could come from two clocks.
    by_length = sorted(range(len(answers)), key=lambda i: (len(answers[i].sequence), i))
    for i in by_length:
        if excluded[i] is not None:
            continue
        base = bases[i]
        if base is not None and base in chain_of_tip and answers[base].temperature == answers[i].temperature:
            chain = chain_of_tip.pop(base)
            chains[chain].append(i)
        else:
            chain = len(chains)
            chains.append([i])
            starts.append(_start(answers, i, base, excluded))
        chain_of_tip[i] = chain
    order = sorted(range(len(chains)), key=lambda c: chains[c][0])
    return Merge(
        [Trajectory(tuple(answers[i] for i in chains[c]), starts[c]) for c in order],
        [(answers[i], reason) for i, reason in enumerate(excluded) if reason is not None],
    )


def _find_bases(answers: Sequence[Answer]) -> list[int | None]:
    """For each answer the one whose whole sequence is the longest proper beginning of its prompt.

    Identical sequences: the answers to one prompt (its siblings) share one, so parallel continuations
    of identical siblings spread over them in call order.
    """
    by_length = sorted(range(len(answers)), key=lambda i: -len(answers[i].sequence))
    bases: list[int | None] = []
    taken: set[int] = set()
    for answer in answers:
        found: list[int] = []
        for j in by_length:
            candidate = answers[j]
            if found and len(candidate.sequence) < len(answers[found[0]].sequence):
                break
            if len(candidate.sequence) > candidate.prompt_length and begins_with(
                answer.prompt, candidate.sequence
            ):
                found.append(j)
        # Prefer one that may be trained, then one that nothing continues yet.
        found.sort(key=lambda j: (answers[j].excluded is not None, j in taken, j))
        bases.append(found[0] if found else None)
        taken.update(found[:1])
    return bases


def begins_with(tokens: Int32Array, prefix: Int32Array) -> bool:
    """Whether `tokens` begins with `prefix`."""
    length = len(prefix)
    if length > len(tokens) or (length and tokens[length - 1] != prefix[length - 1]):
        return False
    return bool(np.array_equal(tokens[:length], prefix))


def _exclusions(
    answers: Sequence[Answer], bases: Sequence[int | None], rewarded_spans: Collection[bytes]
) -> list[DropReason | None]:
    excluded = [answer.excluded for answer in answers]
    selected = {base for base in bases if base is not None}
    selected |= {i for i, answer in enumerate(answers) if answer.span_id in rewarded_spans}
    siblings: dict[bytes, list[int]] = defaultdict(list)
    for i, answer in enumerate(answers):
        siblings[answer.prompt.tobytes()].append(i)
    for members in siblings.values():
        if selected.isdisjoint(members):
            continue
        for i in members:
            if i not in selected and excluded[i] is None:
                excluded[i] = DropReason.UNSELECTED_SIBLING
    return excluded


def _start(
    answers: Sequence[Answer], i: int, base: int | None, excluded: Sequence[DropReason | None]
) -> RowStart:
    if base is not None:
        if excluded[base] is not None:
            return RowStart.BASE_UNTRAINABLE
        if answers[base].temperature != answers[i].temperature:
            return RowStart.SAMPLING_CHANGED
        return RowStart.BRANCH
    earlier = [a for a in answers[:i] if len(a.response)]
    own = answers[i].prompt
    if all(np.array_equal(a.prompt, own) for a in earlier):
        return RowStart.FIRST
    if any(len(a.prompt) < len(own) and begins_with(own, a.prompt) for a in earlier):
        return RowStart.RESPONSE_CHANGED
    return RowStart.PROMPT_CHANGED
