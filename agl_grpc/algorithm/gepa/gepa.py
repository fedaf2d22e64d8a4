"""`GEPA`: reflective evolution of prompts with a Pareto front.

After "GEPA: Reflective Prompt Evolution Can Outperform Reinforcement Learning" (Agrawal et al., 2025),
algorithms 1 and 2, and the merge of two candidates from its appendix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agl_grpc.algorithm.base import Algorithm, Dataset
from agl_grpc.algorithm.errors import AlgorithmError
from agl_grpc.algorithm.gepa.instructions import REFLECTION, SYSTEM
from agl_grpc.algorithm.gepa.merging import Merger, propose, subsample
from agl_grpc.algorithm.gepa.pareto import choose, frequencies
from agl_grpc.algorithm.prompt.candidate import Candidate
from agl_grpc.algorithm.prompt.choices import batch, seeded
from agl_grpc.algorithm.prompt.critic import Critic
from agl_grpc.algorithm.prompt.evaluation import TaskResult
from agl_grpc.algorithm.prompt.instructions import prompts_as_text, read_instructions
from agl_grpc.algorithm.prompt.rewriting import rewrite
from agl_grpc.algorithm.prompt.search import PromptSearch, Settings, positive, validation_of
from agl_grpc.evaluation import Sampling
from agl_grpc.model import PromptTemplate, RolloutConfig

if TYPE_CHECKING:
    from openai import AsyncOpenAI


@dataclass(frozen=True)
class _Trial:
    """What an iteration tried: mean rewards by version, rollouts that it took, and the child that joins."""

    scores: Mapping[str, float]
    rollouts: int
    accepted: Candidate | None = None


class GEPA(Algorithm):
    """Improves the prompt templates of ``initial_resources`` by evolution.

    Each iteration takes a parent from the Pareto front over the validation tasks (the more tasks it is
    best on, the likelier), has a few training tasks done with it, and lets a model reflect on the traces
    and rewrite one prompt. A child that does better on the same tasks is scored on the whole validation
    dataset and joins the candidates. Prompts that are best on few tasks stay alive, and so does what
    they know. With several prompts, two candidates of the front whose prompts were improved apart are put
    together after an iteration that brought a new one: each prompt from the one that has changed it since
    their common ancestor. A merged candidate that does as well as both on a few validation tasks joins.

    Everything is written down in the store as it happens: a run that was killed goes on where it was, and
    ``agl-grpc apo history RUN`` shows it. What agents note (`emit_annotation`, `emit_message`) is the
    feedback that the model sees beside the rewards.

    Args:
        async_openai_client: an ``openai.AsyncOpenAI`` for reflection; None = made of ``endpoint`` and
            ``api_key``.
        reflection_model: the model that reflects.
        temperature: its temperature.
        minibatch_size: training tasks for one reflection.
        max_rollouts: rollouts after which no further iteration begins.
        max_iterations: iterations at most; None = only ``max_rollouts`` ends the run.
        perfect_reward: a minibatch with this mean teaches nothing, and is left.
        max_merges: merges that are tried at most; 0 = none.
        merge_tasks: validation tasks on which a merged candidate is tried.
        rollout_batch_timeout: seconds that one batch of rollouts may take; unfinished ones are left out.
        validation: how requests are sampled when candidates are scored; None = as their endpoint says.
        reflection_prompt_files: instructions instead of ours; see
            ``agl_grpc/algorithm/gepa/instructions.py``.
        endpoint: base URL of any OpenAI-compatible endpoint; empty = ``OPENAI_BASE_URL``, else OpenAI's own.
        api_key: empty = ``OPENAI_API_KEY``.
        prices: US dollars for a million prompt and a million answer tokens, by model.
        rollouts: rules of every rollout's life.
        seed: of batches and choices.
        best_prompt_file: where the best prompt goes; None = ``best_prompt`` in the run's folder.
    """

    def __init__(
        self,
        async_openai_client: AsyncOpenAI | None = None,
        *,
        reflection_model: str = "gpt-5-mini",
        temperature: float = 1.0,
        minibatch_size: int = 3,
        max_rollouts: int = 500,
        max_iterations: int | None = None,
        perfect_reward: float = 1.0,
        max_merges: int = 5,
        merge_tasks: int = 5,
        rollout_batch_timeout: float = 3600.0,
        validation: Sampling | Mapping[str, Any] | None = None,
        reflection_prompt_files: list[str] | None = None,
        endpoint: str = "",
        api_key: str = "",
        prices: Mapping[str, tuple[float, float]] | None = None,
        rollouts: RolloutConfig | None = None,
        seed: int = 0,
        best_prompt_file: str | Path | None = None,
    ) -> None:
        super().__init__()
        positive(
            minibatch_size=minibatch_size,
            max_rollouts=max_rollouts,
            rollout_batch_timeout=rollout_batch_timeout,
            merge_tasks=merge_tasks,
        )
        if max_merges < 0:
            raise ValueError(f"max_merges is {max_merges}; it must be 0 or more")
        self._critic = Critic(async_openai_client, endpoint=endpoint, api_key=api_key, prices=prices)
        self._model = reflection_model
        self._temperature = temperature
        self._minibatch_size = minibatch_size
        self._max_rollouts = max_rollouts
        self._max_iterations = max_iterations
        self._perfect = perfect_reward
        self._max_merges = max_merges
        self._merge_tasks = merge_tasks
        self._merged: set[str] = set()
        self._instructions = read_instructions(reflection_prompt_files, (REFLECTION,))
        self._seed = seed
        self._settings = Settings(
            rollout_batch_timeout=rollout_batch_timeout,
            validation=validation_of(validation, seed),
            rollouts=rollouts,
            best_prompt_file=best_prompt_file,
        )
        self._candidates: dict[str, Candidate] = {}
        self._rewards: dict[str, list[float]] = {}

    def get_best_prompts(self) -> dict[str, PromptTemplate]:
        """The prompts with the best mean so far, by resource name; `ValueError` before any was scored."""
        if not self._rewards:
            raise ValueError("no prompt was scored yet")
        return dict(self._candidates[self._best].templates)

    @property
    def pareto_front(self) -> dict[str, int]:
        """Versions of the front, and on how many validation tasks each is best."""
        return frequencies(self._rewards) if self._rewards else {}

    async def run(
        self, train_dataset: Dataset | None = None, val_dataset: Dataset | None = None
    ) -> dict[str, PromptTemplate]:
        """Runs until the budget is spent; answers the best prompts by resource name."""
        if not train_dataset or not val_dataset:
            raise AlgorithmError("GEPA needs train_dataset (to reflect on) and val_dataset (to compare)")
        self._candidates, self._rewards, self._merged = {}, {}, set()
        search = PromptSearch(self, self._critic, self._settings)
        fixed = {
            "seed": self._seed,
            "minibatch_size": self._minibatch_size,
            "max_merges": self._max_merges,
            "merge_tasks": self._merge_tasks,
            "train_tasks": len(train_dataset),
            "val_tasks": len(val_dataset),
        }
        try:
            await search.open(fixed)
            await self._evolve(search, train_dataset, val_dataset)
        finally:
            await self._critic.close()
        return self.get_best_prompts()

    async def _evolve(self, search: PromptSearch, train: Dataset, val: Dataset) -> None:
        await self._join(search, search.first, val)
        search.report(0, self._max_iterations or 0, {"validation/best": self._mean(self._best)})
        spent, number, merge_due = len(val), 0, False
        while spent < self._max_rollouts and number != self._max_iterations:
            number += 1
            merger = self._merger(number) if merge_due else None
            if merger is not None:
                trial = await self._merge(search, merger, val, number)
            else:
                tasks = batch(train, self._minibatch_size, number - 1, self._seed, "train")
                parent = self._candidates[choose(self._rewards, seeded(self._seed, "parent", number))]
                trial = await self._mutate(search, parent, tasks, number)
            spent += trial.rollouts
            if trial.accepted is not None:
                await self._join(search, trial.accepted, val)
                spent += len(val)
            # A merge is tried after a reflection that brought something new.
            merge_due = merger is None and trial.accepted is not None
            await self._note(search, number, trial, spent)
        await search.finish(self._candidates[self._best], self._mean(self._best))

    async def _note(self, search: PromptSearch, number: int, trial: _Trial, spent: int) -> None:
        best = self._mean(self._best)
        await search.note_round(number, [*self.pareto_front], trial.scores, self._best, best)
        search.report(
            number,
            self._max_iterations or 0,
            {
                "reward/mean": max(trial.scores.values()),
                "validation/best": best,
                "pareto/size": len(self.pareto_front),
                "rollouts/spent": spent,
            },
        )

    def _merger(self, number: int) -> Merger | None:
        """Two candidates of the front that are worth being put together; None = none are, or enough were."""
        if len(self._merged) >= self._max_merges:
            return None
        choice = seeded(self._seed, "merge", number)
        return propose(self._candidates, self._rewards, [*self.pareto_front], self._merged, choice)

    async def _merge(self, search: PromptSearch, merger: Merger, val: Dataset, number: int) -> _Trial:
        """Has a few validation tasks done with a merged candidate; it must do as well as both parents."""
        self._merged.add(merger.key)
        one, other = merger.parents
        notes = {"other_parent": other, "ancestor": merger.ancestor}
        child = Candidate(f"v{number}", merger.templates, one, None, notes)
        if search.journal.get(f"candidate.{child.version}") is None:
            await search.journal.put("candidate", f"candidate.{child.version}", child.to_data())
        size = min(self._merge_tasks, len(val))
        places = subsample(
            self._rewards[one], self._rewards[other], size, seeded(self._seed, "tasks", number)
        )
        tasks = {place: val[place] for place in places}
        after, judged = await self._on_merge_tasks(search, child, tasks)
        scores = {
            parent: sum(self._rewards[parent][place] for place in judged) / len(judged)
            for parent in merger.parents
        }
        accepted = child if after >= max(scores.values()) else None
        search.say(
            f"iteration {number}: {one} and {other} merged to {child.version}, {after:.3f} on {size} tasks"
        )
        return _Trial({**scores, child.version: after}, len(tasks), accepted)

    async def _on_merge_tasks(
        self, search: PromptSearch, child: Candidate, tasks: Mapping[int, Any]
    ) -> tuple[float, list[int]]:
        """A merged candidate's mean, and the tasks that it is the mean of: all, where none has a reward."""
        found = await search.scores(child, tasks, f"merge.{child.version}", "merge")
        return float(found["score"]), [int(place) for place in found["rewards"]] or [*tasks]

    async def _mutate(
        self, search: PromptSearch, parent: Candidate, tasks: Mapping[int, Any], number: int
    ) -> _Trial:
        """Has a parent and a child of it do the minibatch; a child that does better is accepted."""
        evaluator, version = search.evaluator, f"v{number}"
        results = await evaluator.run(parent, tasks, f"train.{version}")
        before = _mean_of(results)
        if before >= self._perfect:
            search.say(f"iteration {number}: {parent.version} is perfect on its tasks")
            return _Trial({parent.version: before}, len(tasks))
        name = [*parent.templates][(number - 1) % len(parent.templates)]

        async def reflect() -> Mapping[str, Any]:
            traces = await evaluator.traces(results)
            experiments = "\n\n".join(f"Task {n}\n{text}" for n, text in enumerate(traces, start=1))
            found = await rewrite(
                self._critic,
                model=self._model,
                temperature=self._temperature,
                system=SYSTEM,
                instruction=seeded(self._seed, "reflection", version).choice(self._instructions),
                old=parent.templates[name],
                values={
                    "name": name,
                    "prompts": prompts_as_text(parent.templates),
                    "experiments": experiments,
                },
            )
            notes = {"model": self._model, "usage": found.usage.to_data(), "problem": found.problem}
            if found.problem:
                search.say(f"{version}: {self._model} gave no usable prompt: {found.problem}")
                return {
                    "version": version,
                    "parent": parent.version,
                    "changed": name,
                    "templates": {},
                    **notes,
                }
            return parent.with_text(version, name, found.text, notes).to_data()

        made = await search.journal.once("candidate", f"candidate.{version}", reflect)
        if not made["templates"]:
            return _Trial({parent.version: before}, len(tasks))
        child = Candidate.from_data(made)
        after = _mean_of(await evaluator.run(child, tasks, f"child.{version}"))
        search.say(f"iteration {number}: {parent.version} {before:.3f}, its child {version} {after:.3f}")
        scores = {parent.version: before, version: after}
        return _Trial(scores, 2 * len(tasks), child if after > before else None)

    async def _join(self, search: PromptSearch, candidate: Candidate, val: Dataset) -> None:
        """Scores a candidate on every validation task, and keeps it."""
        tasks = dict(enumerate(val))
        found = await search.scores(candidate, tasks, f"full.{candidate.version}", "full score")
        self._candidates[candidate.version] = candidate
        self._rewards[candidate.version] = [found["rewards"].get(str(index), 0.0) for index in tasks]
        if self._best == candidate.version:
            await search.keep_best(candidate)

    @property
    def _best(self) -> str:
        return max(self._rewards, key=self._mean)

    def _mean(self, version: str) -> float:
        rewards = self._rewards[version]
        return sum(rewards) / len(rewards)


def _mean_of(results: list[TaskResult]) -> float:
    return sum(result.reward or 0.0 for result in results) / len(results)
