"""Two evaluations over the tasks that they share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from agl_grpc.evaluation.result import Evaluation
from agl_grpc.evaluation.statistics import PairedTest, paired_test


@dataclass(frozen=True)
class Comparison:
    """How the second evaluation differs from the first.

    Attributes:
        first: name of the first.
        second: name of the second.
        total: over all shared tasks.
        sources: over those of each data source that both have.
        only_in_one: tasks that the other does not have, or of which no reward is known there.
    """

    first: str
    second: str
    total: PairedTest
    sources: dict[str, PairedTest]
    only_in_one: int

    @property
    def sentence(self) -> str:
        """What can be said, in words."""
        test = self.total
        if test.difference == 0:
            verdict = f"{self.second} and {self.first} are equal"
        else:
            how = "better" if test.difference > 0 else "worse"
            verdict = f"{self.second} is {abs(test.difference):.3f} {how} than {self.first}"
        sure = f", 95 % interval {test.interval}" if test.interval else ""
        by_chance = (
            "a difference that chance hardly explains"
            if test.significant
            else "a difference that chance may well explain: it says nothing yet"
        )
        if test.difference == 0:
            by_chance = "there is no difference to explain"
        left = (
            f" ({self.only_in_one} tasks that only one of them has are left out)" if self.only_in_one else ""
        )
        return (
            f"{verdict} (mean reward over {test.tasks} shared tasks{sure}, p = {test.p_value:.4f}; better on "
            f"{test.better}, worse on {test.worse}): {by_chance}{left}."
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        plain = dataclasses.asdict(self)
        return {**plain, "significant": self.total.significant, "sentence": self.sentence}


def compare(first: Evaluation, second: Evaluation, seed: int = 0) -> Comparison:
    """Compares two evaluations task by task; tasks are matched by their content.

    Raises:
        EvaluationError: they share no task.
    """
    mine, its = _means(first), _means(second)
    shared = [key for key in mine if key in its]
    total = paired_test([mine[key] for key in shared], [its[key] for key in shared], seed)
    source_of = _sources(first)
    names = sorted({source_of[key] for key in shared})
    sources = {}
    for name in names:
        keys = [key for key in shared if source_of[key] == name]
        sources[name] = paired_test([mine[key] for key in keys], [its[key] for key in keys], seed)
    one = len(mine.keys() ^ its.keys())
    second_name = second.name if first.name != second.name else f"{second.name} (second)"
    return Comparison(first.name, second_name, total, sources if len(sources) > 1 else {}, one)


# A dataset may hold the same task twice: the first meets the first, the second the second.
_Key = tuple[str, int]


def _numbered(evaluation: Evaluation) -> dict[_Key, int]:
    seen: dict[str, int] = {}
    keys: dict[_Key, int] = {}
    for place, task in enumerate(evaluation.tasks):
        nth = seen.get(task.digest, 0)
        seen[task.digest] = nth + 1
        keys[task.digest, nth] = place
    return keys


def _means(evaluation: Evaluation) -> dict[_Key, float]:
    found = {key: evaluation.tasks[place].mean for key, place in _numbered(evaluation).items()}
    return {key: mean for key, mean in found.items() if mean is not None}


def _sources(evaluation: Evaluation) -> dict[_Key, str]:
    return {key: evaluation.tasks[place].source for key, place in _numbered(evaluation).items()}
