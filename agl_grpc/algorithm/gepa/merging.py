"""The system-aware merge of two candidates (GEPA, appendix): each prompt from the one that improved it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from agl_grpc.algorithm.gepa.pareto import Scores
from agl_grpc.algorithm.prompt.candidate import Candidate
from agl_grpc.model import PromptTemplate

Candidates = Mapping[str, Candidate]


@dataclass(frozen=True)
class Merger:
    """Two candidates, the ancestor that they share, and the prompts that come of them."""

    ancestor: str
    parents: tuple[str, str]
    templates: Mapping[str, PromptTemplate]

    @property
    def key(self) -> str:
        """The same for the same three, in whatever order the parents stand."""
        return "+".join((self.ancestor, *sorted(self.parents)))


def ancestors(candidates: Candidates, version: str) -> list[str]:
    """A version's forebears, the nearest first; of a merged one both parents'."""
    found: list[str] = []
    waiting = _parents(candidates[version])
    while waiting:
        nearest = waiting.pop(0)
        if nearest not in found:
            found.append(nearest)
            waiting += _parents(candidates[nearest])
    return found


def _parents(candidate: Candidate) -> list[str]:
    both = [candidate.parent, candidate.notes.get("other_parent")]
    return [str(parent) for parent in both if parent is not None]


def merged(
    candidates: Candidates, means: Mapping[str, float], ancestor: str, one: str, other: str
) -> dict[str, PromptTemplate] | None:
    """The prompts of two descendants put together; None when nothing new can come of it.

    A prompt that one of them has as the ancestor had it comes from the other one; one that both have changed
    from the better of the two, of equals the first.
    """
    base = candidates[ancestor].templates
    first, second = candidates[one].templates, candidates[other].templates
    better = first if means[one] >= means[other] else second
    chosen = {
        name: second[name]
        if first[name] == base[name]
        else first[name]
        if second[name] == base[name]
        else better[name]
        for name in base
    }
    return chosen if all(chosen != dict(each.templates) for each in candidates.values()) else None


def propose(
    candidates: Candidates, scores: Scores, front: Sequence[str], tried: set[str], choice: random.Random
) -> Merger | None:
    """A merge of two versions of the front that has not been tried; None when there is none.

    Neither of the two descends from the other, and their common ancestor is no better than either.
    """
    means = {version: sum(row) / len(row) for version, row in scores.items()}
    pairs = list(combinations(sorted(front), 2))
    choice.shuffle(pairs)
    for one, other in pairs:
        of_one, of_other = ancestors(candidates, one), ancestors(candidates, other)
        if one in of_other or other in of_one:
            continue
        for ancestor in (version for version in of_one if version in of_other):
            if means[ancestor] > min(means[one], means[other]):
                continue
            templates = merged(candidates, means, ancestor, one, other)
            if templates is None:
                continue
            found = Merger(ancestor, (one, other), templates)
            if found.key not in tried:
                return found
    return None


def subsample(one: Sequence[float], other: Sequence[float], size: int, choice: random.Random) -> list[int]:
    """Places of validation tasks on which a merge is tried: as many that the one does better, that the other
    does better and that both do alike, as there are.
    """
    kinds: list[list[int]] = [[], [], []]
    for place, (a, b) in enumerate(zip(one, other, strict=True)):
        kinds[0 if a > b else 1 if b > a else 2].append(place)
    for kind in kinds:
        choice.shuffle(kind)
    picked: list[int] = []
    while len(picked) < size and any(kinds):
        picked += [kind.pop() for kind in kinds if kind][: size - len(picked)]
    return sorted(picked)
