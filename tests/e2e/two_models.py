"""A run that trains two models, and its agent: one call each, worth how varied what they say is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import agl_grpc
from agl_grpc import AttemptedRollout, NamedResources, ProxyLLM
from agl_grpc.algorithm import VERL
from agl_grpc.client import StoreClient
from agl_grpc.model.enums import BatchStatus, RolloutMode
from agl_grpc.model.policy import PolicyVersion
from agl_grpc.model.training import Batch, StepMetrics, TrainingRun
from agl_grpc.trainer import Trainer
from examples.calculator.agent import ask
from tests.support.store_process import StoreProcess

MODELS = ("planner", "solver")
RUN = "several"
TRAINING = {"planner": f"{RUN}-training", "solver": f"{RUN}-training-solver"}
TASKS, GROUP = 4, 4
_ADAPTERS = {
    "actor_rollout_ref.model.lora_rank": 4,
    "actor_rollout_ref.model.lora_alpha": 8,
    "actor_rollout_ref.model.target_modules": "all-linear",
}


def trainer(
    folder: Path, port: int, steps: int, *, adapters: bool, validated: int = 0, resume: bool = False
) -> Trainer:
    """Two adapters of one base, or two whole models, saved after the last step alone.

    Args:
        folder: of all runs; the base is its ``base``.
        port: of the store.
        steps: so many batches of `TASKS` groups.
        adapters: whether adapters are trained, in one engine.
        validated: after so many steps each time; 0 = never.
        resume: whether the run goes on.
    """
    config = {
        "actor_rollout_ref.model.path": str(folder / "base"),
        "actor_rollout_ref.actor.optim.lr": 1e-2 if adapters else 1e-3,
        "actor_rollout_ref.actor.ppo_mini_batch_size": TASKS,
        "actor_rollout_ref.rollout.n": GROUP,
        "data.train_batch_size": TASKS,
        "trainer.total_training_steps": steps,
        "trainer.save_freq": 10 * steps,
    }
    return Trainer(
        algorithm=VERL(
            config | (_ADAPTERS if adapters else {}),
            models={name: {} for name in MODELS},
            seed=5,
            device="cpu",
            # The random model seldom ends an answer by itself.
            samples={"truncated": "train"},
        ),
        llm_proxy={
            "arguments": [
                *("--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "32"),
                *("--max-num-batched-tokens", "512", "--enforce-eager"),
            ]
        },
        validation={"samples": 1, "greedy": False, "every": validated},
        port=port,
        run_name=RUN,
        run_dir=folder,
        resume=resume,
    )


def tasks(steps: int) -> list[dict[str, str]]:
    """As many as the steps take."""
    return [{"question": f"What is {number}?"} for number in range(steps * TASKS)]


@dataclass
class Stored:
    """What the store holds of each model."""

    training: dict[str, TrainingRun] = field(default_factory=dict)
    batches: dict[str, list[Batch]] = field(default_factory=dict)
    versions: dict[str, list[PolicyVersion]] = field(default_factory=dict)
    steps: dict[str, dict[int, StepMetrics]] = field(default_factory=dict)
    trained: int = 0

    def committed(self, model: str) -> list[Batch]:
        """Trained batches, in the order of their steps."""
        found = [batch for batch in self.batches[model] if batch.status is BatchStatus.COMMITTED]
        return sorted(found, key=lambda batch: batch.step)


async def read(database: Path) -> Stored:
    stored = Stored()
    with StoreProcess(database) as store:
        async with StoreClient(store.address, run_id=RUN) as client:
            for model, name in TRAINING.items():
                training = await client.get_training_run_by_id(name)
                assert training is not None
                stored.training[model] = training
                stored.batches[model] = await client.query_batches(name)
                stored.versions[model] = list(await client.query_policy_versions(model))
                found = stored.steps[model] = {}
                if training.status.is_terminal:
                    async for _, steps in client.watch_training_run(name):
                        found.update({step.step: step for step in steps})
            rollouts = await client.query_rollouts()
    stored.trained = sum(
        each.mode is RolloutMode.TRAIN and each.status.value == "succeeded" for each in rollouts
    )
    return stored


@agl_grpc.rollout
async def agent(task: dict[str, Any], resources: NamedResources, rollout: AttemptedRollout) -> float:
    """Asks the planner, then the solver."""
    said = task["question"]
    for name in MODELS:
        llm = resources[name]
        assert isinstance(llm, ProxyLLM)
        assert llm.model == name
        said = await ask(llm.with_attempted_rollout(rollout), [{"role": "user", "content": said}])
    return len(set(said)) / 20
