"""Trains planner and solver on the same rollouts: two adapters of one base, in one `Trainer.fit`.

`python -m examples.two_agents.train` in the user's environment, once `make engines` has made the others.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from agl_grpc.algorithm import VERL
from agl_grpc.trainer import FitResult, Trainer, TrainerError
from examples.calculator.tasks import training_tasks, validation_tasks
from examples.calculator.train import PROMPTS, QUESTIONS, build_model, configuration
from examples.two_agents.agent import AGENTS, agent

RANK = 16
SAMPLES = 2
SPAN = 5
ENGINE = ("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "64")
ENGINE += ("--max-num-batched-tokens", "1024", "--enforce-eager")


def algorithm(model: Path, steps: int, seed: int, learning_rate: float) -> VERL:
    """GRPO of an adapter for each agent, in the place of the calculator's whole weights."""
    config: dict[str, Any] = {
        **configuration(model, steps, seed, steps),
        "actor_rollout_ref.model.lora_rank": RANK,
        "actor_rollout_ref.model.lora_alpha": 2 * RANK,
        "actor_rollout_ref.model.target_modules": "all-linear",
        "actor_rollout_ref.actor.optim.lr": learning_rate,
        "actor_rollout_ref.actor.optim.lr_warmup_steps": 5,
    }
    return VERL(config, models={name: {} for name in AGENTS}, seed=seed)


def train(
    folder: Path, *, steps: int, seed: int, learning_rate: float, resume: bool = False
) -> tuple[FitResult, dict[str, float]]:
    """Builds the base model if need be, and trains both agents on it; what came of it, and the share of right
    answers to the held-out questions by who of the two is trained.
    """
    held_out = validation_tasks()
    folder.mkdir(parents=True, exist_ok=True)
    questions, model = folder / QUESTIONS, (folder / "model").resolve()
    questions.write_text("".join(json.dumps(task) + "\n" for task in held_out))
    if not (model / "config.json").exists():
        build_model(model, questions, seed)
    tasks = training_tasks(PROMPTS * steps * 2, seed, frozenset(task["question"] for task in held_out))
    trainer = Trainer(
        algorithm=algorithm(model, steps, seed, learning_rate),
        runner={"concurrency": 64},
        llm_proxy={"arguments": [*ENGINE, "--seed", str(seed)]},
        validation={"samples": SAMPLES, "greedy": False, "every": 0},
        run_name=folder.name,
        run_dir=folder.parent,
        resume=resume,
    )
    result = trainer.fit(agent, tasks, val_dataset=held_out)
    neither, both = result.before["sampled"].mean, result.after["sampled"].mean
    return result, {"neither": neither, **alone(result, model, held_out), "both": both}


def alone(result: FitResult, base: Path, held_out: list[Any]) -> dict[str, float]:
    """Share of right answers where one agent uses its trained adapter and the other the base."""
    folder = result.folder.path
    adapters = [word for name in AGENTS for word in ("--adapter", f"{name}={result.models[name].adapter}")]
    judge = Trainer(
        runner={"concurrency": 64},
        llm_proxy={"arguments": [*adapters, *ENGINE]},
        run_name="alone",
        run_dir=folder,
        resume=(folder / "alone" / "manifest.json").exists(),
    )
    tasks = [{**task, "trained": name, "data_source": name} for name in AGENTS for task in held_out]
    found = judge.evaluate(agent, tasks, checkpoint=base, n=SAMPLES, name="base")
    return {name: found.sources[name].mean or 0.0 for name in AGENTS}


def report(result: FitResult, accuracy: dict[str, float]) -> None:
    """What each of the two has learned."""
    for name in AGENTS:
        rewards = [step.metrics["reward/mean"] for step in result.models[name].history]
        first, last = (sum(part) / len(part) for part in (rewards[:SPAN], rewards[-SPAN:]))
        print(f"{name}: reward {first:.3f} in the first {SPAN} steps, {last:.3f} in the last {SPAN}")
    for team, share in accuracy.items():
        print(f"held-out questions, trained: {team:<8} {share:.1%}")
    print(f"curves: {result.folder.path / 'reward.png'}")


def main() -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(description="Train two agents as two adapters of one tiny model.")
    parser.add_argument("--seed", type=int, default=0, help="of model, task order and sampling")
    parser.add_argument("--steps", type=int, default=30, help="training steps of 128 rollouts")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--run", default=time.strftime("two-agents-%Y%m%d-%H%M%S"), help="name of the run")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="where runs lie")
    parser.add_argument("--resume", action="store_true", help="continue --run from its last checkpoints")
    given = parser.parse_args()
    settings = {"steps": given.steps, "seed": given.seed, "learning_rate": given.learning_rate}
    try:
        report(*train(given.run_dir / given.run, resume=given.resume, **settings))
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
