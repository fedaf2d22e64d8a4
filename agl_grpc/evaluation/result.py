"""What an evaluation found: every reward of every rollout, and the figures made of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import orjson

from agl_grpc.dataset import task_key
from agl_grpc.evaluation.errors import EvaluationError
from agl_grpc.evaluation.sampling import Sampling
from agl_grpc.evaluation.statistics import Interval, bootstrap, majority, pass_at_k

FORMAT = 1
ALL = "all"
"""The name under which the figures of all data sources together are shown."""


def task_digest(task: Any) -> str:
    """Names a task by its content, so that evaluations of other datasets find the tasks that they share."""
    return task_key(task).hex()


@dataclass(frozen=True)
class Answered:
    """One rollout.

    Attributes:
        rollout_id: its id in the store.
        reward: what it was given; 0 when the agent itself failed; None = not known, and in no mean.
        answer: its normalised final answer; None = none was found.
        failure: who is to blame that there is no reward (``agent``, ``infrastructure``, ``grader``,
            ``cancelled``, …; ``no_reward`` = it ended well and nobody judged it); empty = there is one.
        message: one line on the failure.
    """

    rollout_id: str
    reward: float | None
    answer: str | None = None
    failure: str = ""
    message: str = ""


@dataclass(frozen=True)
class TaskResult:
    """One task: its place in the dataset from 0, the digest of its content, its data source, its rollouts."""

    index: int
    digest: str
    source: str
    rollouts: tuple[Answered, ...]

    @cached_property
    def rewards(self) -> list[float]:
        """The rewards that are known."""
        return [one.reward for one in self.rollouts if one.reward is not None]

    @property
    def mean(self) -> float | None:
        """Mean reward; None when no reward is known."""
        return sum(self.rewards) / len(self.rewards) if self.rewards else None

    def right(self, success: float) -> int:
        """How many rewards reach ``success``."""
        return sum(reward >= success for reward in self.rewards)

    @property
    def majority(self) -> float | None:
        """The reward of the answer given most often; None when no answer was found."""
        known = [one for one in self.rollouts if one.reward is not None]
        return majority([one.answer for one in known], [one.reward or 0.0 for one in known])


@dataclass(frozen=True)
class Figures:
    """The figures of some tasks: of one data source, or of all.

    ``mean`` is mean@n: the mean over tasks of their mean rewards. ``pass_at`` maps k to pass@k; a task with
    fewer than k known rewards is left out of it, and ``left_out`` says how many were. ``majority`` is maj@n
    over the tasks with an answer, ``voted`` of them. Figures without any task are None.
    """

    tasks: int
    rollouts: int
    mean: float | None
    interval: Interval | None
    pass_at: dict[int, float | None]
    left_out: dict[int, int]
    majority: float | None
    voted: int
    failures: dict[str, int]

    @classmethod
    def of(
        cls, tasks: Sequence[TaskResult], ks: Sequence[int], success: float, seed: int, *, samples: int
    ) -> Self:
        """The figures of ``tasks``, each with ``samples`` rollouts; EvaluationError for a k above that."""
        for k in ks:
            pass_at_k(samples, 0, k)
        means = [task.mean for task in tasks if task.mean is not None]
        votes = [task.majority for task in tasks if task.majority is not None]
        enough = {k: [task for task in tasks if len(task.rewards) >= k] for k in ks}
        return cls(
            tasks=len(tasks),
            rollouts=sum(len(task.rollouts) for task in tasks),
            mean=_mean(means),
            interval=bootstrap(means, seed),
            pass_at={
                k: _mean([pass_at_k(len(task.rewards), task.right(success), k) for task in enough[k]])
                for k in ks
            },
            left_out={k: len(tasks) - len(enough[k]) for k in ks},
            majority=_mean(votes),
            voted=len(votes),
            failures=dict(Counter(one.failure for task in tasks for one in task.rollouts if one.failure)),
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values; the k of pass@k as text, because JSON's keys are."""
        plain = dataclasses.asdict(self)
        for name in ("pass_at", "left_out"):
            plain[name] = {str(k): value for k, value in plain[name].items()}
        return plain


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Evaluation:
    """Every task of a dataset answered ``samples`` times by one model.

    Attributes:
        name: what was evaluated, for people.
        samples: rollouts for each task, n.
        tasks: the tasks in the dataset's order.
        sampling: how answers were sampled.
        success: the reward from which an answer is right, for pass@k.
        ks: the k of pass@k.
        seconds: how long it took.
        about: what else is kept: model, dataset, agent, versions.
    """

    name: str
    samples: int
    tasks: tuple[TaskResult, ...] = field(repr=False)
    sampling: Sampling = field(default_factory=Sampling)
    success: float = 1.0
    ks: tuple[int, ...] = (1,)
    seconds: float = 0.0
    about: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def figures(self) -> Figures:
        """The figures of all tasks."""
        return self._figures(self.tasks)

    @cached_property
    def sources(self) -> dict[str, Figures]:
        """The figures of each data source, by name."""
        names = sorted({task.source for task in self.tasks})
        return {name: self._figures([t for t in self.tasks if t.source == name]) for name in names}

    @property
    def mean(self) -> float:
        """mean@n; NaN when no reward is known."""
        return float("nan") if self.figures.mean is None else self.figures.mean

    @property
    def failures(self) -> dict[str, int]:
        """Rollouts without a reward of their own, by who is to blame."""
        return self.figures.failures

    def _figures(self, tasks: Sequence[TaskResult]) -> Figures:
        return Figures.of(tasks, self.ks, self.success, self.sampling.seed, samples=self.samples)

    def summary(self) -> dict[str, Any]:
        """The figures as plain values, without the single rollouts."""
        return {
            "name": self.name,
            "samples": self.samples,
            "mean": self.figures.mean,
            "seconds": self.seconds,
            "figures": self.figures.to_dict(),
            "sources": {name: found.to_dict() for name, found in self.sources.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values: the content of ``evaluation.json``."""
        whole = dataclasses.asdict(self)
        return {"format": FORMAT, **whole, "summary": self.summary()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; EvaluationError for what is none."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise EvaluationError(f"this is no evaluation of format {FORMAT}: make it with `agl-grpc eval`")
        try:
            tasks = tuple(
                TaskResult(**{**task, "rollouts": tuple(Answered(**one) for one in task["rollouts"])})
                for task in data["tasks"]
            )
            kept = {name: data[name] for name in ("name", "samples", "success", "seconds", "about")}
            return cls(**kept, tasks=tasks, sampling=Sampling(**data["sampling"]), ks=tuple(data["ks"]))
        except (KeyError, TypeError) as error:
            raise EvaluationError(f"this evaluation is not whole: {error}") from error

    def write(self, path: Path) -> None:
        """Writes ``evaluation.json``, at once or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.new")
        draft.write_bytes(orjson.dumps(self.to_dict(), option=orjson.OPT_INDENT_2))
        draft.replace(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads an ``evaluation.json``, or the one in a folder.

        Raises:
            EvaluationError: there is none, or it is something else.
        """
        file = path / "evaluation.json" if path.is_dir() else path
        try:
            return cls.from_dict(orjson.loads(file.read_bytes()))
        except OSError as error:
            raise EvaluationError(f"{file} cannot be read: {error.strerror}") from error
        except orjson.JSONDecodeError as error:
            raise EvaluationError(f"{file} is not JSON: {error}") from error
        except EvaluationError as error:
            raise EvaluationError(f"{file}: {error}") from error


def describe(evaluation: Evaluation) -> str:
    """One line, for example ``0.203 (95 % 0.15 to 0.26; 200 tasks, 800 rollouts, 4.1 s; agent 2)``."""
    found = evaluation.figures
    mean = "no reward known" if found.mean is None else f"{found.mean:.3f}"
    sure = f"95 % {found.interval}; " if found.interval else ""
    text = f"{mean} ({sure}{found.tasks} tasks, {found.rollouts} rollouts, {evaluation.seconds:.1f} s"
    kinds = ", ".join(f"{kind} {count}" for kind, count in found.failures.items())
    return f"{text}; {sum(found.failures.values())} failed: {kinds})" if kinds else f"{text})"
