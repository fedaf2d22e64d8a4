"""One branch of the search: a version is tried, criticised and rewritten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agl_grpc.algorithm.apo.instructions import SYSTEM
from agl_grpc.algorithm.prompt.candidate import Candidate
from agl_grpc.algorithm.prompt.choices import seeded
from agl_grpc.algorithm.prompt.critic import Critic
from agl_grpc.algorithm.prompt.instructions import fill, prompts_as_text
from agl_grpc.algorithm.prompt.rewriting import rewrite
from agl_grpc.algorithm.prompt.search import PromptSearch
from agl_grpc.model import PromptTemplate


class Branches:
    """Makes new versions; each step of a branch is written down before the next one."""

    def __init__(
        self,
        search: PromptSearch,
        critic: Critic,
        *,
        gradient_model: str,
        apply_edit_model: str,
        temperature: float,
        critiques: Sequence[PromptTemplate],
        edits: Sequence[PromptTemplate],
        seed: int,
    ) -> None:
        self._search = search
        self._critic = critic
        self._gradient_model = gradient_model
        self._apply_edit_model = apply_edit_model
        self._temperature = temperature
        self._critiques = critiques
        self._edits = edits
        self._seed = seed

    async def grow(self, parent: Candidate, place: int, tasks: Mapping[int, Any]) -> Candidate | None:
        """The version of one branch; None when critic or editor gave nothing that can be used.

        Args:
            parent: what is improved.
            place: of the branch among all of the run, from 0.
            tasks: training tasks, by their place in the dataset.
        """
        version = f"v{place + 1}"
        name = [*parent.templates][place % len(parent.templates)]
        journal = self._search.journal

        async def criticise() -> Mapping[str, Any]:
            return await self._criticise(parent, version, name, tasks)

        critique = await journal.once("critique", f"critique.{version}", criticise)
        if not critique["text"]:
            return None

        async def edit() -> Mapping[str, Any]:
            return await self._edit(parent, version, name, critique["text"])

        made = await journal.once("candidate", f"candidate.{version}", edit)
        return Candidate.from_data(made) if made["templates"] else None

    async def _criticise(
        self, parent: Candidate, version: str, name: str, tasks: Mapping[int, Any]
    ) -> Mapping[str, Any]:
        evaluator = self._search.evaluator
        results = await evaluator.run(parent, tasks, f"train.{version}")
        traces = await evaluator.traces(results)
        experiments = "\n\n".join(f"Experiment {n}\n{text}" for n, text in enumerate(traces, start=1))
        instruction = seeded(self._seed, "critique", version).choice(self._critiques)
        prompt = fill(
            instruction,
            name=name,
            prompt=parent.templates[name].template,
            prompts=prompts_as_text(parent.templates),
            experiments=experiments,
        )
        answer = await self._critic.ask(self._gradient_model, SYSTEM, prompt, self._temperature)
        if not answer.text:
            self._search.say(f"{version}: {self._gradient_model} gave no critique of {parent.version}")
        return {
            "version": version,
            "parent": parent.version,
            "changed": name,
            "text": answer.text,
            "rollouts": [result.rollout.rollout_id for result in results],
            "model": self._gradient_model,
            "usage": answer.usage.to_data(),
        }

    async def _edit(self, parent: Candidate, version: str, name: str, critique: str) -> Mapping[str, Any]:
        old = parent.templates[name]
        instruction = seeded(self._seed, "edit", version).choice(self._edits)
        found = await rewrite(
            self._critic,
            model=self._apply_edit_model,
            temperature=self._temperature,
            system=SYSTEM,
            instruction=instruction,
            old=old,
            values={"name": name, "prompts": prompts_as_text(parent.templates), "critique": critique},
        )
        problem = found.problem
        notes = {"model": self._apply_edit_model, "usage": found.usage.to_data(), "problem": problem}
        if problem:
            self._search.say(f"{version}: {self._apply_edit_model} gave no usable prompt: {problem}")
            return {"version": version, "parent": parent.version, "changed": name, "templates": {}, **notes}
        return parent.with_text(version, name, found.text, notes).to_data()
