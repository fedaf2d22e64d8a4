"""Makes the tiny model, trains the agent with GRPO through the store, and shows what it learned.

`python -m examples.calculator.train` in the user's environment; `make train` makes all environments first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from agl_grpc.algorithm import VERL, BestOfN
from agl_grpc.trainer import FitResult, Trainer, TrainerError
from agl_grpc.trainer.options import find_python
from examples.calculator.agent import agent
from examples.calculator.tasks import training_tasks, validation_tasks

PROMPTS = 16
ROLLOUTS = 8
EXIT_INTERRUPTED = 130
QUESTIONS = "held_out.jsonl"
# As small an engine as the one that is started otherwise.
HYBRID = {
    "actor_rollout_ref.rollout.max_model_len": 256,
    "actor_rollout_ref.rollout.max_num_seqs": 64,
    "actor_rollout_ref.rollout.max_num_batched_tokens": 1024,
}


def configuration(model: Path, steps: int, seed: int, save_every: int, ahead: int = 0) -> dict[str, Any]:
    """verl's keys: GRPO over 16 prompts with 8 rollouts each; ``ahead`` batches are sampled in advance."""
    return {
        "trainer.v1.separate_async.num_warmup_batches": ahead,
        "trainer.v1.sampler.max_off_policy_threshold": ahead + 1,
        "actor_rollout_ref.model.path": str(model),
        "actor_rollout_ref.actor.optim.lr": 6e-4,
        "actor_rollout_ref.actor.optim.lr_warmup_steps": 10,
        "actor_rollout_ref.actor.ppo_mini_batch_size": PROMPTS,
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 32768,
        "actor_rollout_ref.actor.data_loader_seed": seed,
        "actor_rollout_ref.rollout.n": ROLLOUTS,
        "actor_rollout_ref.rollout.temperature": 1.0,
        "algorithm.adv_estimator": "grpo",
        "data.train_batch_size": PROMPTS,
        "data.seed": seed,
        "trainer.total_training_steps": steps,
        "trainer.total_epochs": 1,
        "trainer.save_freq": save_every,
    }


def main() -> int:
    """Command line; the exit code."""
    arguments = _arguments()
    folder = arguments.run_dir / arguments.run
    try:
        result = train(
            folder,
            seed=arguments.seed,
            steps=arguments.steps,
            save_every=arguments.save_every,
            resume=arguments.resume,
            quick=arguments.quick,
            ahead=arguments.ahead,
            best_of=arguments.best_of,
            hybrid=arguments.hybrid,
        )
        report(result)
        check_checkpoint(result, folder / "model")
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; continue with --run {arguments.run} --resume", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def train(
    folder: Path,
    *,
    seed: int = 0,
    steps: int = 50,
    save_every: int = 20,
    resume: bool = False,
    quick: bool = False,
    ahead: int = 0,
    best_of: int = 0,
    hybrid: bool = False,
) -> FitResult:
    """Builds the model if need be and trains it; ``quick`` validates on 40 questions, once each; ``ahead``
    batches are sampled in advance of the one that is trained; with ``best_of`` above 0 the best rollouts of
    each task, so many, are learned by supervised learning in place of GRPO; with ``hybrid`` verl starts the
    engine.
    """
    held_out = validation_tasks()
    questions = folder / QUESTIONS
    folder.mkdir(parents=True, exist_ok=True)
    questions.write_text("".join(json.dumps(task) + "\n" for task in held_out))
    model = folder / "model"
    if not (model / "config.json").exists():
        build_model(model, questions, seed)
    tasks = training_tasks(PROMPTS * steps * 2, seed, frozenset(task["question"] for task in held_out))
    config = configuration(model, steps, seed, save_every, ahead) | (HYBRID if hybrid else {})
    trainer = Trainer(
        algorithm=_algorithm(config, seed, best_of, hybrid),
        n_runners=1,
        runner={"concurrency": 64},
        llm_proxy={
            "arguments": [
                *("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "64"),
                *("--max-num-batched-tokens", "1024", "--enforce-eager", "--seed", str(seed)),
            ],
        },
        run_name=folder.name,
        run_dir=folder.parent,
        resume=resume,
        validation={"samples": 1 if quick else 4, "greedy": not quick},
    )
    return trainer.fit(agent, tasks, val_dataset=held_out[:40] if quick else held_out)


def _algorithm(config: dict[str, Any], seed: int, best_of: int, hybrid: bool) -> VERL:
    chosen: dict[str, Any] = {"model_name": "calculator", "seed": seed, "engines": {"hybrid": hybrid}}
    return BestOfN(config, keep=best_of, **chosen) if best_of else VERL(config, **chosen)


def build_model(folder: Path, held_out: Path, seed: int) -> None:
    """Makes the warm-started model, in the learner's environment because it needs torch."""
    print(f"making the tiny model in {folder}", flush=True)
    command = [find_python("learner", None), "-m", "examples.calculator.model", str(folder)]
    command += ["--seed", str(seed), "--held-out", str(held_out)]
    _run(command, "making the model")


def check_checkpoint(result: FitResult, start: Path) -> None:
    """Answers questions with both models by plain `transformers`; TrainerError when nothing was learned."""
    if result.model is None:
        raise TrainerError("no checkpoint was saved")
    print(f"loading {result.model} with transformers", flush=True)
    questions = result.folder.path / QUESTIONS
    command = [find_python("learner", None), "-m", "examples.calculator.check", str(questions)]
    _run([*command, str(start), str(result.model)], "the check of the checkpoint")


def _run(command: list[str], what: str) -> str:
    """Runs a program of the example in another environment, its output shown as it comes; the output."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=root) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            print(f"  {line}", end="", flush=True)
    if process.returncode:
        raise TrainerError(f"{what} failed with exit code {process.returncode}; see the lines above")
    return "".join(lines)


def report(result: FitResult) -> None:
    """What was learned, and where everything lies."""
    print()
    for name, after in result.after.items():
        before = result.before.get(name)
        start = f"{before.mean:.1%} before, " if before else ""
        label = f"{name} (mean of {after.samples})" if name == "sampled" else name
        print(f"accuracy, {label}: {start}{after.mean:.1%} after ({len(after.tasks)} questions)")
    folder = result.folder
    for label, path in (
        ("checkpoint", result.model),
        ("database", folder.database),
        ("metrics", folder.tensorboard),
        ("reward curve", folder.path / "reward.png"),
        ("manifest", folder.manifest),
    ):
        print(f"{label + ':':<14}{path}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a tiny model to use a calculator.")
    parser.add_argument("--seed", type=int, default=0, help="of model, task order and sampling")
    parser.add_argument("--steps", type=int, default=50, help="training steps of 128 rollouts")
    parser.add_argument("--run", default=time.strftime("calculator-%Y%m%d-%H%M%S"), help="name of the run")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="where runs lie")
    parser.add_argument("--resume", action="store_true", help="continue --run from its last checkpoint")
    parser.add_argument("--save-every", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--quick", action="store_true", help="validate on fewer questions")
    parser.add_argument("--ahead", type=int, default=0, help="batches sampled in advance (asynchronous)")
    parser.add_argument("--hybrid", action="store_true", help="verl starts the engine (.venv-hybrid)")
    parser.add_argument("--best-of", type=int, default=0, help="learn this many best rollouts of a task")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
