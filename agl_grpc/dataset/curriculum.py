"""Tasks in an order that prefers those which are solved sometimes: neither always nor never."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agl_grpc.dataset.errors import DatasetError

Before = dict[int, tuple[float, float]]


@dataclass(frozen=True)
class CurriculumRules:
    """Which tasks are preferred.

    A task whose solve rate lies from ``low`` to ``high`` (and one that nobody has tried) is taken when its
    turn comes; another one only with the probability ``outside``. A rollout solves its task when its reward
    is at least ``solved_at``. Of a task about the last ``memory`` rollouts count. The rates begin with what
    rollouts of the same tasks in the store say: of the runs that ``runs`` names, ``("*",)`` = of all.
    """

    enabled: bool = False
    low: float = 0.2
    high: float = 0.8
    outside: float = 0.1
    solved_at: float = 1.0
    memory: int = 32
    runs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"low {self.low} and high {self.high} must be solve rates, low not above high")
        if not 0 < self.outside <= 1:
            raise ValueError(f"outside is {self.outside}; it must be above 0 and at most 1")
        if self.memory < 1:
            raise ValueError(f"memory is {self.memory}; it must be 1 or more rollouts")


class Curriculum:
    """An endless order of the places ``0 … size - 1``, by solve rates that change as tasks are tried.

    It walks through the dataset again and again, in a new seeded order each round, and leaves tasks out by
    their rates at that moment. Every choice depends on the seed, its number and the rates alone, so that the
    same observations make the same order, also after `state` and `restore`.
    """

    def __init__(self, size: int, rules: CurriculumRules, seed: int = 0) -> None:
        if size < 1:
            raise DatasetError("a curriculum needs tasks")
        self.rules = rules
        self._seed = seed
        self._size = size
        self._round = self._place = 0
        self._order = self._shuffled()
        # Rollouts seen and solved, by task: fading, so not whole numbers.
        self._seen = np.zeros(size)
        self._solved = np.zeros(size)

    def _shuffled(self) -> np.ndarray[Any, Any]:
        # PCG64 and its shuffle are part of numpy's stream compatibility; the round is part of the seed.
        return np.random.default_rng([self._seed & (2**63 - 1), self._round]).permutation(self._size)

    def rate(self, task: int) -> float | None:
        """Solve rate of a task; None = nobody has tried it."""
        return float(self._solved[task] / self._seen[task]) if self._seen[task] else None

    def take(self) -> int:
        """The next task."""
        while True:
            if self._place == len(self._order):
                self._round, self._place = self._round + 1, 0
                self._order = self._shuffled()
            task, chance = int(self._order[self._place]), self._chance()
            self._place += 1
            rate = self.rate(task)
            if rate is None or self.rules.low <= rate <= self.rules.high or chance < self.rules.outside:
                return task

    def _chance(self) -> float:
        return random.Random(f"{self._seed}/{self._round}/{self._place}").random()

    def look(self, tasks: Iterable[int]) -> Before:
        """What is counted of some tasks, for `put_back`."""
        return {task: (float(self._seen[task]), float(self._solved[task])) for task in tasks}

    def put_back(self, before: Before) -> None:
        """Undoes what was observed since `look`."""
        for task, (seen, solved) in before.items():
            self._seen[task], self._solved[task] = seen, solved

    def observe(self, task: int, rewards: Iterable[float]) -> None:
        """Counts rollouts of a task."""
        values = list(rewards)
        seen = self._seen[task] + len(values)
        solved = self._solved[task] + sum(value >= self.rules.solved_at for value in values)
        fading = min(1.0, self.rules.memory / seen) if seen else 1.0
        self._seen[task], self._solved[task] = seen * fading, solved * fading

    def state(self) -> bytes:
        """Everything that decides what comes next, for a checkpoint."""
        buffer = io.BytesIO()
        place = np.array([self._seed, self._round, self._place, self._size], dtype=np.int64)
        tried = np.flatnonzero(self._seen)
        np.savez(buffer, place=place, tried=tried, seen=self._seen[tried], solved=self._solved[tried])
        return buffer.getvalue()

    def restore(self, state: bytes) -> None:
        """Goes on from a state.

        Raises:
            DatasetError: it is of another dataset size or seed.
        """
        with np.load(io.BytesIO(state), allow_pickle=False) as saved:
            seed, turn, place, size = map(int, saved["place"])
            if (seed, size) != (self._seed, self._size):
                raise DatasetError(
                    f"the curriculum was saved with {size} tasks and seed {seed}, and this run has "
                    f"{self._size} tasks and seed {self._seed}: use the same, or begin a new run"
                )
            self._round, self._place = turn, place
            self._order = self._shuffled()
            self._seen[:] = self._solved[:] = 0
            self._seen[saved["tried"]], self._solved[saved["tried"]] = saved["seen"], saved["solved"]

    def metrics(self) -> dict[str, float]:
        """Share of tasks tried, and of those the shares below, within and above the preferred rates."""
        tried = self._seen > 0
        rates = self._solved[tried] / self._seen[tried]
        found = {"curriculum/tried": float(tried.mean())}
        if len(rates):
            below, above = rates < self.rules.low, rates > self.rules.high
            found["curriculum/too_hard"] = float(below.mean())
            found["curriculum/too_easy"] = float(above.mean())
            found["curriculum/preferred"] = float((~below & ~above).mean())
        return found


def start_from(
    curriculum: Curriculum, keys: Iterable[bytes], rewards: Mapping[bytes, Sequence[float]]
) -> int:
    """Observes the rewards that are known of tasks, by their keys in the dataset's order; how many tasks."""
    known = 0
    for place, key in enumerate(keys):
        if key in rewards:
            curriculum.observe(place, rewards[key])
            known += 1
    return known
