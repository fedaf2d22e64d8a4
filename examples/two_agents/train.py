"""Trains planner and solver on the same rollouts: two adapters of one base, served by one vLLM.

`python -m examples.two_agents.train` in the user's environment; `make train` makes all environments.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agl_grpc import NamedResources, ProxyLLM, StoreClient
from agl_grpc.algorithm import Algorithm
from agl_grpc.evaluation import Pass, evaluate
from agl_grpc.trainer import FitResult, Trainer, TrainerError, commands
from agl_grpc.trainer.options import EngineOptions, find_python
from agl_grpc.trainer.readiness import engine_serves
from agl_grpc.trainer.run_folder import RunFolder
from agl_grpc.trainer.stack import Stack
from examples.calculator.tasks import training_tasks, validation_tasks
from examples.calculator.train import PROMPTS, QUESTIONS, build_model, configuration
from examples.two_agents.agent import AGENTS, agent

BASE = "base"
RANK = 16
ENGINE_SECONDS = 600.0
SPAN = 5
# Which of the two is trained, of those who answer the held-out questions in the end.
TEAMS = {"neither": (), "planner": ("planner",), "solver": ("solver",), "both": AGENTS}
# What is reported of each step: whose learner says it, and under which name. The solver's rollouts are those
# in which it was asked.
CURVES = {
    "planner/reward": ("planner", "reward/mean"),
    "solver/reward": ("solver", "reward/mean"),
    "solver/rollouts": ("solver", "training/rollouts"),
}


@dataclass(frozen=True)
class Settings:
    """What is trained, and how long: steps of 16 questions with ``rollouts`` answers each."""

    model: Path
    steps: int = 20
    rollouts: int = 8
    seed: int = 0
    learning_rate: float = 5e-3
    samples: int = 2


def adapter_configuration(settings: Settings) -> dict[str, Any]:
    """verl's keys of either learner: GRPO of an adapter in the place of the calculator's whole weights."""
    return {
        **configuration(settings.model, settings.steps, settings.seed, settings.steps),
        "actor_rollout_ref.model.lora_rank": RANK,
        "actor_rollout_ref.model.lora_alpha": 2 * RANK,
        "actor_rollout_ref.model.target_modules": "all-linear",
        "actor_rollout_ref.actor.optim.lr": settings.learning_rate,
        "actor_rollout_ref.actor.optim.lr_warmup_steps": 5,
        "actor_rollout_ref.rollout.n": settings.rollouts,
    }


def learner_configurations(settings: Settings, folder: Path, run_id: str, tasks: Path) -> dict[str, Any]:
    """The configuration of each agent's learner: the planner's asks for rollouts, the solver's follows it."""
    runs = {name: f"{run_id}-{name}" for name in AGENTS}
    leader, follower = AGENTS
    parts: dict[str, dict[str, Any]] = {
        leader: {"followers": [follower]},
        follower: {"follows": runs[leader]},
    }
    return {
        name: {
            "model": {"path": str(settings.model), "name": name},
            "train_tasks": str(tasks),
            "output_dir": str(folder / name),
            "run_id": run_id,
            "training_run_id": runs[name],
            "seed": settings.seed,
            "verl": adapter_configuration(settings),
            **parts[name],
        }
        for name in AGENTS
    }


class TwoAdapters(Algorithm):
    """Starts one engine with both adapters and a learner for each; answers what each adapter is worth."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings

    @property
    def name(self) -> str:
        """The algorithm's name in the store."""
        return "two_adapters"

    async def run(
        self, train_dataset: Sequence[Any] | None = None, val_dataset: Sequence[Any] | None = None
    ) -> dict[str, float]:
        """Trains both; accuracy on the held-out questions by which of them is trained."""
        store, folder = self.get_store(), RunFolder(self._folder())
        tasks = folder.path / "train.jsonl"
        tasks.write_text("".join(json.dumps(task) + "\n" for task in train_dataset or ()))
        async with _stack(self.get_reporter().say) as stack:
            endpoint = await self._start_engine(stack, folder, store)
            await _publish(store, "train", endpoint, AGENTS)
            wanted = learner_configurations(self._settings, folder.path, store.run_id, tasks)
            await self._learn(stack, folder, store, wanted)
            return {team: await self._accuracy(store, team, endpoint, val_dataset or ()) for team in TEAMS}

    def _folder(self) -> Path:
        folder = self.get_reporter().folder
        assert folder is not None, "the trainer gives a folder"
        return folder.resolve()

    async def _start_engine(self, stack: Stack, folder: RunFolder, store: StoreClient) -> str:
        """Starts vLLM with an adapter for each agent; its base URL, once it serves."""
        arguments = [argument for name in AGENTS for argument in ("--adapter", name)]
        arguments += ["--max-lora-rank", str(RANK), "--dtype", "float32", "--max-model-len", "256"]
        arguments += ["--max-num-seqs", "64", "--max-num-batched-tokens", "1024", "--enforce-eager"]
        port = commands.free_port()
        stack.start(
            lambda: commands.engine_part(
                folder,
                find_python("engine", None),
                model=str(self._settings.model),
                model_name=BASE,
                store=store.target,
                port=port,
                policy_version=0,
                options=EngineOptions(arguments=[*arguments, "--seed", str(self._settings.seed)]),
                mark=stack.mark,
            )
        )
        await stack.until(engine_serves("127.0.0.1", port, ENGINE_SECONDS))
        return f"http://127.0.0.1:{port}/v1"

    async def _learn(
        self, stack: Stack, folder: RunFolder, store: StoreClient, wanted: Mapping[str, Any]
    ) -> None:
        """Runs both learners to their end, and reports the reward of each agent by step."""
        for name, config in wanted.items():
            path = folder.path / f"{name}.json"
            path.write_text(json.dumps(config, indent=2))
            stack.start(_learner(folder, store.target, name, path, stack.mark), may_end=True)
        told: dict[int, dict[str, Mapping[str, float]]] = {}
        following = [
            asyncio.create_task(self._follow(store, name, config["training_run_id"], told))
            for name, config in wanted.items()
        ]
        try:
            for name in wanted:
                await stack.until(stack.ended(f"learner-{name}"))
            await stack.until(asyncio.wait_for(asyncio.gather(*following), 60.0))
        finally:
            for task in following:
                task.cancel()

    async def _follow(
        self,
        store: StoreClient,
        name: str,
        training_run_id: str,
        told: dict[int, dict[str, Mapping[str, float]]],
    ) -> None:
        """Notes what an agent's learner says of each step, and reports the steps that both have made."""
        while await store.get_training_run_by_id(training_run_id) is None:  # noqa: ASYNC110  # its learner makes it
            await asyncio.sleep(0.5)
        async for _, steps in store.watch_training_run(training_run_id):
            for step in steps:
                metrics = told.setdefault(step.step, {})
                metrics[name] = step.metrics
                if len(metrics) == len(AGENTS):
                    found = {curve: metrics[whose][key] for curve, (whose, key) in CURVES.items()}
                    self.get_reporter().step(step.step, found, self._settings.steps)

    async def _accuracy(self, store: StoreClient, team: str, endpoint: str, tasks: Sequence[Any]) -> float:
        """Share of right answers where only this team's agents use their trained adapters."""
        resources_id = await _publish(store, f"trained-{team}", endpoint, TEAMS[team])
        wanted = Pass(name=f"trained: {team}", samples=self._settings.samples)
        found = await evaluate(store, tasks, wanted, resources_id=resources_id)
        self.get_reporter().say(f"held-out questions, trained: {team}: {found.mean:.1%}")
        return found.mean


def _learner(folder: RunFolder, store: str, name: str, config: Path, mark: str) -> Any:
    return lambda: commands.learner_part(
        folder,
        find_python("learner", None),
        config=config,
        store=store,
        resume=False,
        mark=mark,
        name=f"learner-{name}",
    )


async def _publish(store: StoreClient, label: str, endpoint: str, trained: Sequence[str]) -> str:
    """Publishes an endpoint for each agent: its adapter where it is trained, the base otherwise."""
    resources: NamedResources = {
        name: ProxyLLM(
            endpoint=endpoint,
            model=name if name in trained else BASE,
            sampling_parameters={"temperature": 1.0},
        )
        for name in AGENTS
    }
    published = await store.update_resources(f"{store.run_id}-{label}", resources)
    return published.resources_id


@contextlib.asynccontextmanager
async def _stack(say: Any) -> AsyncIterator[Stack]:
    """Processes that are ended with this block."""
    stack = Stack(say)
    stack.bind()
    try:
        yield stack
    finally:
        await asyncio.to_thread(stack.close)


def train(folder: Path, *, steps: int, seed: int, learning_rate: float) -> FitResult:
    """Builds the base model if need be, and trains both agents on it."""
    held_out = validation_tasks()
    folder.mkdir(parents=True, exist_ok=True)
    questions, model = folder / QUESTIONS, (folder / "model").resolve()
    questions.write_text("".join(json.dumps(task) + "\n" for task in held_out))
    if not (model / "config.json").exists():
        build_model(model, questions, seed)
    tasks = training_tasks(PROMPTS * steps * 2, seed, frozenset(task["question"] for task in held_out))
    settings = Settings(model, steps, seed=seed, learning_rate=learning_rate)
    trainer = Trainer(
        algorithm=TwoAdapters(settings),
        runner={"concurrency": 64},
        run_name=folder.name,
        run_dir=folder.parent,
    )
    return trainer.fit(agent, tasks, val_dataset=held_out)


def report(result: FitResult) -> None:
    """What each of the two has learned."""
    for name in AGENTS:
        rewards = [step.metrics[f"{name}/reward"] for step in result.history]
        first, last = (sum(part) / len(part) for part in (rewards[:SPAN], rewards[-SPAN:]))
        print(f"{name}: reward {first:.3f} in the first {SPAN} steps, {last:.3f} in the last {SPAN}")
    assert isinstance(result.value, Mapping)
    for team, accuracy in result.value.items():
        print(f"held-out questions, trained: {team:<8} {accuracy:.1%}")
    print(f"curves: {result.folder.path / 'metrics.png'}")


def main() -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(description="Train two agents as two adapters of one tiny model.")
    parser.add_argument("--seed", type=int, default=0, help="of model, task order and sampling")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="training steps of 128 rollouts")
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--run", default=time.strftime("two-agents-%Y%m%d-%H%M%S"), help="name of the run")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="where runs lie")
    given = parser.parse_args()
    try:
        folder = given.run_dir / given.run
        report(train(folder, steps=given.steps, seed=given.seed, learning_rate=given.learning_rate))
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
