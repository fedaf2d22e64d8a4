"""`APO`: textual gradients with beam search.

After "Automatic Prompt Optimization with 'Gradient Descent' and Beam Search" (Pryzant et al., 2023): a critic
reads what an agent did with a prompt and says in words what is wrong with it (the gradient), an editor
rewrites the prompt accordingly, and the best of all versions are kept as the beam of the next round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agl_grpc.algorithm.apo.beam import best, parents
from agl_grpc.algorithm.apo.branches import Branches
from agl_grpc.algorithm.apo.instructions import CRITIQUES, EDITS
from agl_grpc.algorithm.base import Algorithm, Dataset
from agl_grpc.algorithm.concurrency import together
from agl_grpc.algorithm.errors import AlgorithmError
from agl_grpc.algorithm.prompt.candidate import Candidate
from agl_grpc.algorithm.prompt.choices import batch, seeded
from agl_grpc.algorithm.prompt.critic import Critic
from agl_grpc.algorithm.prompt.instructions import read_instructions
from agl_grpc.algorithm.prompt.search import PromptSearch, Settings, positive, validation_of
from agl_grpc.evaluation import Sampling
from agl_grpc.model import PromptTemplate, RolloutConfig

if TYPE_CHECKING:
    from openai import AsyncOpenAI


class APO(Algorithm):
    """Improves the prompt templates of ``initial_resources`` without training any weights.

    Each round branches from the versions of the beam: a batch of training tasks is done with a version, the
    critic judges, the editor rewrites one prompt (with several, they take turns). Old and new versions are
    then scored on one batch of validation tasks, the best ``beam_width`` stay, and their leader is scored on
    the whole validation dataset; the best leader is the result. Branches and versions are worked on at once.

    Everything is written down in the store as it happens, so that a run that was killed goes on where it was
    (``Trainer(resume=True)``), and ``agl-grpc apo history RUN`` shows it.

    Args:
        async_openai_client: an ``openai.AsyncOpenAI`` for critic and editor; None = made of ``endpoint`` and
            ``api_key``.
        gradient_model: the critic's model.
        apply_edit_model: the editor's model.
        diversity_temperature: temperature of both.
        gradient_batch_size: training tasks for one critique.
        val_batch_size: validation tasks by which versions are compared within a round.
        beam_width: versions that stay after a round.
        branch_factor: new versions of each parent in a round.
        beam_rounds: rounds.
        rollout_batch_timeout: seconds that one batch of rollouts may take; unfinished ones are cancelled
            and left out of the mean.
        validation: how requests are sampled when versions are scored; None = as their endpoint says.
        run_initial_validation: whether the first prompts are scored on the whole validation dataset too.
        gradient_prompt_files: instructions for the critic instead of ours; one is chosen at random for each
            critique. See ``agl_grpc/algorithm/apo/instructions.py`` for their places.
        apply_edit_prompt_files: instructions for the editor instead of ours.
        endpoint: base URL of any OpenAI-compatible endpoint; empty = ``OPENAI_BASE_URL``, else OpenAI's own.
        api_key: empty = ``OPENAI_API_KEY``.
        prices: US dollars for a million prompt and a million answer tokens, by model: then cost is shown too.
        rollouts: rules of every rollout's life.
        seed: of batches and choices.
        best_prompt_file: where the best prompt goes; None = ``best_prompt`` in the run's folder.
    """

    def __init__(
        self,
        async_openai_client: AsyncOpenAI | None = None,
        *,
        gradient_model: str = "gpt-5-mini",
        apply_edit_model: str = "gpt-4.1-mini",
        diversity_temperature: float = 1.0,
        gradient_batch_size: int = 4,
        val_batch_size: int = 16,
        beam_width: int = 4,
        branch_factor: int = 4,
        beam_rounds: int = 3,
        rollout_batch_timeout: float = 3600.0,
        validation: Sampling | Mapping[str, Any] | None = None,
        run_initial_validation: bool = True,
        gradient_prompt_files: Sequence[str | Path] | None = None,
        apply_edit_prompt_files: Sequence[str | Path] | None = None,
        endpoint: str = "",
        api_key: str = "",
        prices: Mapping[str, tuple[float, float]] | None = None,
        rollouts: RolloutConfig | None = None,
        seed: int = 0,
        best_prompt_file: str | Path | None = None,
    ) -> None:
        super().__init__()
        positive(
            gradient_batch_size=gradient_batch_size,
            val_batch_size=val_batch_size,
            beam_width=beam_width,
            branch_factor=branch_factor,
            beam_rounds=beam_rounds,
            rollout_batch_timeout=rollout_batch_timeout,
        )
        self._critic = Critic(async_openai_client, endpoint=endpoint, api_key=api_key, prices=prices)
        self._gradient_model = gradient_model
        self._apply_edit_model = apply_edit_model
        self._temperature = diversity_temperature
        self._gradient_batch_size = gradient_batch_size
        self._val_batch_size = val_batch_size
        self._beam_width = beam_width
        self._branch_factor = branch_factor
        self._beam_rounds = beam_rounds
        self._run_initial_validation = run_initial_validation
        self._critiques = read_instructions(gradient_prompt_files, CRITIQUES)
        self._edits = read_instructions(apply_edit_prompt_files, EDITS)
        self._seed = seed
        self._settings = Settings(
            rollout_batch_timeout=rollout_batch_timeout,
            validation=validation_of(validation, seed),
            rollouts=rollouts,
            best_prompt_file=best_prompt_file,
        )
        self._best: Candidate | None = None

    def get_best_prompt(self) -> PromptTemplate:
        """The best prompt so far; with several prompts see `get_best_prompts`."""
        prompts = self.get_best_prompts()
        if len(prompts) != 1:
            raise ValueError(f"there are several prompts ({', '.join(prompts)}): use get_best_prompts")
        return next(iter(prompts.values()))

    def get_best_prompts(self) -> dict[str, PromptTemplate]:
        """The best prompts so far, by resource name; `ValueError` before the first was scored."""
        if self._best is None:
            raise ValueError("no prompt was scored yet")
        return dict(self._best.templates)

    async def run(
        self, train_dataset: Dataset | None = None, val_dataset: Dataset | None = None
    ) -> dict[str, PromptTemplate]:
        """Runs all rounds; answers the best prompts by resource name."""
        if not train_dataset or not val_dataset:
            raise AlgorithmError("APO needs train_dataset (to criticise) and val_dataset (to compare)")
        search = PromptSearch(self, self._critic, self._settings)
        try:
            await search.open(self._fixed(train_dataset, val_dataset))
            await self._search(search, train_dataset, val_dataset)
        finally:
            await self._critic.close()
        return self.get_best_prompts()

    def _fixed(self, train: Dataset, val: Dataset) -> dict[str, Any]:
        """What a resumed run must not change: else its choices would be others than those written down."""
        return {
            "seed": self._seed,
            "beam_width": self._beam_width,
            "branch_factor": self._branch_factor,
            "gradient_batch_size": self._gradient_batch_size,
            "val_batch_size": self._val_batch_size,
            "train_tasks": len(train),
            "val_tasks": len(val),
        }

    async def _search(self, search: PromptSearch, train: Dataset, val: Dataset) -> None:
        first = search.first
        everything = dict(enumerate(val))
        branches = Branches(
            search,
            self._critic,
            gradient_model=self._gradient_model,
            apply_edit_model=self._apply_edit_model,
            temperature=self._temperature,
            critiques=self._critiques,
            edits=self._edits,
            seed=self._seed,
        )
        best_score = float("-inf")
        if self._run_initial_validation:
            best_score = await search.score(first, everything, "full.v0", "full score")
        self._best = first
        await search.keep_best(first)
        search.report(0, self._beam_rounds, {"validation/best": best_score} if best_score > -1e300 else {})
        beam, known = [first.version], {first.version: first}
        for number in range(self._beam_rounds):
            chosen = parents(beam, self._beam_width, seeded(self._seed, "parents", number))
            made = await together(
                (
                    branches.grow(known[parent], place, self._train_batch(train, place))
                    for place, parent in self._places(number, chosen)
                )
            )
            new = {candidate.version: candidate for candidate in made if candidate is not None}
            if not new:
                search.say(f"round {number + 1}: the critic gave no prompt that can be used")
            known |= new
            tasks = batch(val, self._val_batch_size, number, self._seed, "val")
            scores = await self._compare(search, [known[version] for version in (*beam, *new)], tasks, number)
            beam = best(scores, self._beam_width)
            leader = known[beam[0]]
            full = await search.score(leader, everything, f"full.{leader.version}", "full score")
            if full > best_score:
                self._best, best_score = leader, full
                await search.keep_best(leader)
            beam_mean = sum(scores[version] for version in beam) / len(beam)
            await search.note_round(number + 1, beam, scores, self._best.version, best_score)
            search.report(
                number + 1,
                self._beam_rounds,
                {"reward/mean": beam_mean, "validation/leader": full, "validation/best": best_score},
            )
        if len(known) == 1:
            raise AlgorithmError(
                f"the critic ({self._gradient_model}, {self._apply_edit_model}) gave no prompt that "
                "can be used in any round; `agl-grpc apo history` shows what it said"
            )
        await search.finish(self._best, best_score)

    def _places(self, number: int, chosen: Sequence[str]) -> list[tuple[int, str]]:
        """Every branch of a round: its place among all branches of the run, and its parent."""
        branches = [parent for parent in chosen for _ in range(self._branch_factor)]
        start = number * self._beam_width * self._branch_factor
        return [(start + place, parent) for place, parent in enumerate(branches)]

    def _train_batch(self, train: Dataset, place: int) -> dict[int, Any]:
        return batch(train, self._gradient_batch_size, place, self._seed, "train")

    async def _compare(
        self, search: PromptSearch, candidates: Sequence[Candidate], tasks: dict[int, Any], number: int
    ) -> dict[str, float]:
        scores = await together(
            search.score(candidate, tasks, f"r{number + 1}.{candidate.version}", "score")
            for candidate in candidates
        )
        return {candidate.version: score for candidate, score in zip(candidates, scores, strict=True)}
