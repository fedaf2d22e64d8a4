"""An evaluation as a run of its own: store, engine and workers started, every task answered, all stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agl_grpc.evaluation import Evaluation, EvaluationError, Pass, describe, evaluate, write_report
from agl_grpc.model import LLM, ProxyLLM
from agl_grpc.runner.load import LoadError, load_object
from agl_grpc.trainer import commands
from agl_grpc.trainer.errors import TrainerError
from agl_grpc.trainer.evaluated_model import check_tokenizer, decoder, find_model
from agl_grpc.trainer.options import find_python
from agl_grpc.trainer.plan import Plan
from agl_grpc.trainer.progress import Progress
from agl_grpc.trainer.run_folder import dataset_digests, describe_session
from agl_grpc.trainer.session import Session

_LABEL = "evaluation"
_FILE = "evaluation.json"
# What a broken-off evaluation may not change when it goes on: its rollouts would not be alike.
_SETTLED = ("evaluated", "samples", "sampling", "datasets")


@dataclass(frozen=True)
class Evaluated:
    """A model's folder that is served here, or None for an endpoint that exists; and the model's name."""

    model: Path | None
    name: str


class EvaluationSession(Session[Evaluation]):
    """Serves the model and evaluates it.

    Args:
        plan: the run; ``val_dataset`` is what is evaluated on.
        progress: shows what happens.
        evaluated: the model; None = ``plan.llm``.
        wanted: how each task is answered and judged.
        output: where report and ``evaluation.json`` are written; None = into the run's folder.
    """

    def __init__(
        self, plan: Plan, progress: Progress, evaluated: Evaluated, wanted: Pass, output: Path | None
    ) -> None:
        super().__init__(plan, progress)
        self._evaluated = evaluated
        self._wanted = wanted
        self._output = output or plan.folder.path
        self._engine_python = find_python("engine", plan.engine_python) if evaluated.model else ""
        self._manifest: dict[str, Any] = {}

    def _open_folder(self) -> None:
        plan, wanted = self.plan, self._wanted
        old = plan.folder.open(resume=plan.resume)
        settled = {
            "evaluated": str(self._evaluated.model or self._evaluated.name),
            "samples": wanted.samples,
            "sampling": dataclasses.asdict(wanted.sampling),
            "datasets": dataset_digests(None, plan.val_dataset),
        }
        for key in _SETTLED if old else ():
            if old.get(key) != settled[key]:
                raise TrainerError(
                    f"{plan.folder.path} was begun with another {key}: {old.get(key)!r}, "
                    f"now {settled[key]!r}; resume with the same, or choose another name"
                )
        # Rollouts that wait name the endpoint that they were enqueued with: an engine that goes on is there.
        port = int(old.get("engine_port") or plan.engine.port or commands.free_port(plan.engine.host))
        self.plan = dataclasses.replace(plan, engine=dataclasses.replace(plan.engine, port=port))
        session = describe_session(self._engine_python or None, None)
        self._manifest = {
            "run": plan.run_id,
            **settled,
            "engine_port": port,
            "seed": wanted.sampling.seed,
            "sessions": [*old.get("sessions", []), session],
        }
        plan.folder.write_manifest(self._manifest)

    def _model_folder(self) -> Path | None:
        return self._evaluated.model

    async def _work(self) -> Evaluation:
        plan = self.plan
        llm = self._start_model()
        self._start_runners()
        if llm is not None and plan.llm is None:
            self.progress.phase(f"starting the engine with {self._evaluated.name}")
            await self.stack.until(self._engine_ready())
        self.progress.phase(f"evaluating {self._evaluated.name} (mean of {self._wanted.samples})")
        found = await self.stack.until(self._evaluated_by(llm))
        _refuse_no_reward(found)
        found.write(self._output / _FILE)
        for line in write_report(self._output, [found]):
            self.progress.say(line)
        self.progress.say(f"{found.name}: {describe(found)}")
        return found

    def _start_model(self) -> LLM | None:
        """The endpoint for agents; None = they need none, or have their own."""
        model = self._evaluated.model
        if model is None:
            return self.plan.llm
        return self._start_engine(self._engine_python, str(model), self._evaluated.name, 0)

    async def _evaluated_by(self, llm: LLM | None) -> Evaluation:
        plan = self.plan
        about = {"model": str(self._evaluated.model or ""), "run": str(plan.folder.path), **self._manifest}
        about["seeded"] = isinstance(llm, ProxyLLM)
        about.pop("sessions", None)
        wanted = dataclasses.replace(
            self._wanted,
            name=self._evaluated.name,
            label=_LABEL,
            queue=plan.validation_queue,
            about=about,
        )
        endpoints = {} if llm is None else {plan.engine.resource: llm}
        resources_id = await self._publish_sampled(endpoints, wanted.sampling, f"{plan.run_id}-{_LABEL}")
        return await evaluate(
            self.client,
            plan.val_dataset or (),
            wanted,
            resources_id=resources_id,
            on_progress=self.progress.count,
        )


def _refuse_no_reward(found: Evaluation) -> None:
    """When nothing at all was judged, the agent or the dataset is broken, not the model."""
    rollouts = [one for task in found.tasks for one in task.rollouts]
    if all(one.failure for one in rollouts):
        kinds = ", ".join(f"{kind} {count}" for kind, count in found.failures.items())
        raise EvaluationError(
            f"none of {len(rollouts)} rollouts got a reward ({kinds}); the first failed with: "
            f"{rollouts[0].message}"
        )


def evaluated_model(checkpoint: str | Path | None, llm: LLM | None, name: str = "") -> Evaluated:
    """What is evaluated, checked before anything starts.

    Raises:
        TrainerError: there is no model, or it does not fit its tokenizer.
    """
    if checkpoint is None:
        return Evaluated(None, name or (llm.model if llm else "agent"))
    if llm is not None:
        raise TrainerError("give either a checkpoint or an endpoint, not both")
    folder, found = find_model(checkpoint)
    check_tokenizer(folder)
    return Evaluated(folder, name or found)


def with_answers(wanted: Pass, evaluated: Evaluated, find_answer: str) -> Pass:
    """The pass with final answers read: by the model's tokenizer, and as ``module:name`` finds them."""
    decode = decoder(evaluated.model) if evaluated.model else None
    wanted = dataclasses.replace(wanted, answers=True, decode=decode)
    if not find_answer:
        return wanted
    try:
        found = load_object(find_answer)
    except LoadError as error:
        raise TrainerError(f"find_answer: {error}") from error
    if not callable(found):
        raise TrainerError(f"find_answer {find_answer!r} is no function of a text")
    return dataclasses.replace(wanted, find=found)


def check_tasks(tasks: Sequence[Any], fields: Sequence[str]) -> None:
    """Refuses an empty dataset, and names the first task that lacks one of ``fields``.

    Raises:
        TrainerError: see above.
    """
    if not len(tasks):
        raise TrainerError("the dataset is empty: an evaluation needs one task or more")
    for number in range(len(tasks)) if fields else ():
        task = tasks[number]
        missing = [name for name in fields if not isinstance(task, dict) or name not in task]
        if missing:
            raise TrainerError(f"task {number} of the dataset lacks {', '.join(map(repr, missing))}")


def endpoint(url: str, model: str, api_key: str | None = None) -> LLM:
    """A model that somebody serves already; without capture in front of it, its URL stays as it is."""
    if not url.startswith(("http://", "https://")):
        raise TrainerError(f"endpoint {url!r} is no URL, for example http://127.0.0.1:8000/v1")
    if not model:
        raise TrainerError("an endpoint needs the name of the model that it serves (--model)")
    return LLM(endpoint=url, model=model, api_key=api_key)
