"""Answers of one attempt -> trajectories, each the tokens of one conversation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from agl_grpc.sample.breaks import Decode, classify
from agl_grpc.sample.calls import Answer
from agl_grpc.sample.tree import TokenTree
from agl_grpc.sample.types import DropReason, RowStart


@dataclass(slots=True)
class Trajectory:
    """Answers that continue each other: each prompt begins with the sequence of the answer before."""

    answers: list[Answer]
    start: RowStart


@dataclass(slots=True)
class Merge:
    """The trajectories of an attempt, and every answer that is in none of them, with the reason."""

    trajectories: list[Trajectory]
    excluded: list[tuple[Answer, DropReason]]


def merge_answers(
    tree: TokenTree,
    answers: Sequence[Answer],
    rewarded_spans: Collection[bytes] = (),
    decode: Decode | None = None,
) -> Merge:
    """Merge answers (in call order) into trajectories.

    An answer goes on with the longest other sequence that its prompt begins with, unless that one is
    continued already, left out, or sampled at another temperature: then a new trajectory begins with
    the whole prompt, so every sampled token is trained at most once. Of siblings (answers to one
    prompt) only those count that a later prompt continues or that own a reward, or all if none does.
    `decode` turns tokens into text, by which breaks are told apart.
    """
    if len(answers) == 1:
        only = answers[0]
        if only.excluded is not None:
            return Merge([], [(only, only.excluded)])
        return Merge([Trajectory([only], RowStart.FIRST)], [])
    bases = _find_bases(answers)
    excluded = _exclusions(answers, bases, rewarded_spans)
    chains: list[list[int]] = []
    starts: list[RowStart] = []
    chain_of_tip: dict[int, int] = {}
    # A base is always shorter than what continues it; call order alone could come from two clocks.
    by_length = sorted(range(len(answers)), key=lambda i: (answers[i].length, i))
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
            starts.append(_start(tree, answers, i, base, excluded, decode))
        chain_of_tip[i] = chain
    order = sorted(range(len(chains)), key=lambda c: chains[c][0])
    return Merge(
        [Trajectory([answers[i] for i in chains[c]], starts[c]) for c in order],
        [(answers[i], reason) for i, reason in enumerate(excluded) if reason is not None],
    )


def _find_bases(answers: Sequence[Answer]) -> list[int | None]:
    """For each answer the one whose whole sequence is the longest beginning of its prompt.

    Identical sequences: the answers to one prompt (its siblings) share one, so parallel continuations
    of identical siblings spread over them in call order.
    """
    ending: dict[int, list[int]] = defaultdict(list)
    for answer in answers:
        if len(answer.response):
            ending[id(answer.end)].append(answer.place)
    bases: list[int | None] = []
    taken: set[int] = set()
    for answer in answers:
        found = next((ending[id(node)] for node in answer.prompt.upwards() if id(node) in ending), None)
        if found is None:
            bases.append(None)
            continue
        # Prefer one that may be trained, then one that nothing continues yet.
        best = min(found, key=lambda j: (answers[j].excluded is not None, j in taken, j))
        bases.append(best)
        taken.add(best)
    return bases


def _exclusions(
    answers: Sequence[Answer], bases: Sequence[int | None], rewarded_spans: Collection[bytes]
) -> list[DropReason | None]:
    excluded = [answer.excluded for answer in answers]
    selected = {base for base in bases if base is not None}
    selected |= {answer.place for answer in answers if answer.span_id in rewarded_spans}
    siblings: dict[int, list[int]] = defaultdict(list)
    for answer in answers:
        siblings[id(answer.prompt)].append(answer.place)
    for members in siblings.values():
        if selected.isdisjoint(members):
            continue
        for i in members:
            if i not in selected and excluded[i] is None:
                excluded[i] = DropReason.UNSELECTED_SIBLING
    return excluded


def _start(
    tree: TokenTree,
    answers: Sequence[Answer],
    i: int,
    base: int | None,
    excluded: Sequence[DropReason | None],
    decode: Decode | None,
) -> RowStart:
    if base is not None:
        if answers[base].cut:
            return RowStart.CUT
        if excluded[base] is not None:
            return RowStart.BASE_UNTRAINABLE
        if answers[base].temperature != answers[i].temperature:
            return RowStart.SAMPLING_CHANGED
        return RowStart.BRANCH
    earlier = [a for a in answers[:i] if len(a.response)]
    own = answers[i]
    if all(a.prompt is own.prompt for a in earlier):
        return RowStart.FIRST
    return classify(tree, own, earlier, decode)
