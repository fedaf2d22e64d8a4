"""Several graders as named, weighted components of one reward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from agl_grpc.grader.base import Grader
from agl_grpc.model import RunGrader


@dataclass(frozen=True, slots=True)
class Graders:
    """Graders by name, and what each counts.

    weights: by reward name (a grader's, or `GRADER/COMPONENT`); a grader without one counts 1.0, one whose
    weight is 0.0 is recorded and does not count (a held-out grader).

    Raises:
        ValueError: no grader, two of one name, a weight of none of them, or one that is not finite.
    """

    graders: tuple[Grader, ...]
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [grader.name for grader in self.graders]
        if not names:
            raise ValueError("there is no grader; name at least one")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two graders are named {', '.join(twice)}; give each a name of its own")
        for name, weight in self.weights.items():
            if name.partition("/")[0] not in names:
                raise ValueError(f"weight {name!r} is of no grader; there are {', '.join(names)}")
            if not math.isfinite(weight):
                raise ValueError(f"weight {name!r} is {weight}; it must be finite")

    @classmethod
    def of(cls, graders: Graders | Grader | Iterable[Grader] | Mapping[Grader, float]) -> Graders:
        """Graders from one, from several, or from several with their weights."""
        if isinstance(graders, Graders):
            return graders
        if isinstance(graders, Grader):
            return cls((graders,))
        weights = {g.name: float(w) for g, w in graders.items()} if isinstance(graders, Mapping) else {}
        return cls(tuple(graders), weights)

    def __iter__(self) -> Iterator[Grader]:
        return iter(self.graders)

    def __len__(self) -> int:
        return len(self.graders)

    def of_run(self) -> list[RunGrader]:
        """As a run names them, so that it waits for them and knows what counts."""
        counts = self.reward_weights
        whole = [RunGrader(g.name, g.version, counts.get(g.name, 0.0)) for g in self.graders]
        versions = {g.name: g.version for g in self.graders}
        parts = [n for n in counts if "/" in n]
        return whole + [RunGrader(n, versions[n.partition("/")[0]], counts[n]) for n in parts]

    @property
    def reward_weights(self) -> dict[str, float]:
        """What counts, by reward name, for `samples.reward_weights`; weights of 0 are left out."""
        by_part = {name.partition("/")[0] for name in self.weights if "/" in name}
        whole = {g.name: 1.0 for g in self.graders if g.name not in by_part}
        return {name: weight for name, weight in {**whole, **self.weights}.items() if weight}
