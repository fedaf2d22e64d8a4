"""What every search for better prompts needs: journal, evaluation, the best so far, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from agl_grpc.algorithm.base import Algorithm
from agl_grpc.algorithm.errors import AlgorithmError
from agl_grpc.algorithm.prompt.candidate import Candidate, first_candidate
from agl_grpc.algorithm.prompt.critic import Critic
from agl_grpc.algorithm.prompt.evaluation import Evaluator
from agl_grpc.algorithm.prompt.journal import Journal, journal_id
from agl_grpc.chat import Usage
from agl_grpc.evaluation import EvaluationError, Sampling
from agl_grpc.model import RolloutConfig

BEST_FILE = "best_prompt"
_SUFFIXES = {"f-string": ".txt", "jinja": ".jinja", "poml": ".poml"}


@dataclass(frozen=True)
class Settings:
    """What every search is told: see `APO` for the meaning of each."""

    rollout_batch_timeout: float
    validation: Sampling | None = None
    rollouts: RolloutConfig | None = None
    best_prompt_file: str | Path | None = None


class PromptSearch:
    """The state of one search; `open` comes first."""

    def __init__(self, algorithm: Algorithm, critic: Critic, settings: Settings) -> None:
        store = algorithm.get_store()
        self._algorithm = algorithm
        self._critic = critic
        self._settings = settings
        self._reporter = algorithm.get_reporter()
        resources = dict(algorithm.get_initial_resources() or {})
        self.first = first_candidate(resources)
        others = {name: value for name, value in resources.items() if name not in self.first.templates}
        if (llm := algorithm.get_llm_proxy()) is not None:
            others.setdefault("main_llm", llm)
        prefix = f"{store.run_id}-{algorithm.name}"
        self.journal = Journal(store, journal_id(store.run_id, algorithm.name))
        self.evaluator = Evaluator(
            store,
            prefix,
            others,
            timeout=settings.rollout_batch_timeout,
            config=settings.rollouts,
            published=self.journal.publish_best,
            validation=settings.validation,
        )

    async def open(self, fixed: Mapping[str, Any]) -> None:
        """Takes up what is there. ``fixed`` are settings that a resumed run has to share.

        Raises:
            AlgorithmError: the run was begun with other settings or prompts.
        """
        entries = await self.journal.open()
        self.journal.resources = self.evaluator.resources_of(self.first)
        settings = {**fixed, "prompts": self.first.to_data()["templates"]}
        begun = (
            await self.journal.put("begin", "begin", settings) if not entries else self.journal.get("begin")
        )
        changed = sorted(key for key, value in settings.items() if begun is None or begun.get(key) != value)
        if changed:
            raise AlgorithmError(
                f"this run was begun with other values of {', '.join(changed)}: use the same, "
                "or another run_name"
            )
        if entries:
            self.say(f"{entries} finished steps found; going on")
        data = self.first.to_data()
        if self.journal.get("candidate.v0") is None:
            await self.journal.put("candidate", "candidate.v0", data)

    async def score(self, candidate: Candidate, tasks: Mapping[int, Any], label: str, kind: str) -> float:
        """Mean reward of a candidate on tasks, from the journal if it is known."""
        return float((await self.scores(candidate, tasks, label, kind))["score"])

    async def scores(
        self, candidate: Candidate, tasks: Mapping[int, Any], label: str, kind: str
    ) -> dict[str, Any]:
        """As `score`, with the reward of each task."""

        async def work() -> Mapping[str, Any]:
            return await self.evaluator.score(candidate, tasks, label)

        known = self.journal.get(f"score.{label}")
        found = await self.journal.once(kind, f"score.{label}", work)
        if known is None:
            self.say(f"{candidate.version} scores {found['score']:.3f} on {found['tasks']} tasks ({kind})")
        return found

    async def keep_best(self, candidate: Candidate) -> None:
        """Writes the best candidate to its files; from now on it is in the run's latest resources."""
        self.journal.resources = self.evaluator.resources_of(candidate)
        for path, text in self._files(candidate).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(path.name + ".new")
            draft.write_text(text)
            draft.replace(path)

    async def note_round(
        self, number: int, beam: Sequence[str], scores: Mapping[str, float], best: str, best_score: float
    ) -> None:
        """Writes a finished round down."""
        data = {
            "round": number,
            "beam": [*beam],
            "scores": dict(scores),
            "best": best,
            "best_score": best_score,
        }
        if self.journal.get(f"round.{number}") is None:
            await self.journal.put("round", f"round.{number}", data)

    async def finish(self, best: Candidate, score: float) -> None:
        """Writes the result down; the run's latest resources are then the best ones."""
        usage = self.usage
        await self.journal.put("end", "end", {"best": best.version, "score": score, "usage": usage.to_data()})
        self.say(f"best: {best.version} with {score:.3f}; the critic took {usage}")
        for path in self._files(best):
            self.say(f"best prompt: {path}")

    @property
    def usage(self) -> Usage:
        """What the critic took in all processes of this run."""
        found = [
            Usage(**record.data["usage"])
            for record in self.journal.records.values()
            if record.kind in ("critique", "candidate") and "usage" in record.data
        ]
        return sum(found, Usage())

    def say(self, text: str) -> None:
        """A line for people."""
        self._reporter.say(text)

    def report(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a round, with the critic's tokens."""
        usage = self.usage
        tokens: dict[str, float] = {
            "critic/calls": usage.calls,
            "critic/prompt_tokens": usage.prompt_tokens,
            "critic/completion_tokens": usage.completion_tokens,
        }
        if usage.cost is not None:
            tokens["critic/cost_usd"] = usage.cost
        self._reporter.step(step, {**metrics, **tokens}, total)

    def _files(self, candidate: Candidate) -> dict[Path, str]:
        """Files of the best prompts: one for each, or the one that was named."""
        named = self._settings.best_prompt_file
        folder = self._reporter.folder
        if named is None and folder is None:
            return {}
        if named is not None and len(candidate.templates) == 1:
            return {Path(named): next(iter(candidate.templates.values())).template}
        base = Path(named) if named is not None else (folder or Path()) / BEST_FILE
        files = {
            base / f"{name}{_SUFFIXES[template.engine]}": template.template
            for name, template in candidate.templates.items()
        }
        data = {key: value for key, value in candidate.to_data().items() if key != "usage"}
        return files | {base / "best.json": orjson.dumps(data, option=orjson.OPT_INDENT_2).decode() + "\n"}


def validation_of(given: Sampling | Mapping[str, Any] | None, seed: int) -> Sampling | None:
    """How candidates are scored, from what a user says of it; its seed is the algorithm's unless named.

    Raises:
        ValueError: a key that is none of `Sampling`'s, or a value that cannot be.
    """
    if given is None or isinstance(given, Sampling):
        return given
    try:
        return Sampling(**{"seed": seed, **given})
    except (TypeError, EvaluationError) as error:
        raise ValueError(f"validation: {error}") from error


def positive(**values: float) -> None:
    """Refuses settings that are not above 0, by their names."""
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
