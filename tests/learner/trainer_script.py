"""Runs verl's trainer with a local engine; the end-to-end tests start it in the learner environment.

Prints one JSON object on its last line: rewards, metrics of each step, or the error that ended the run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from ray.util import remove_placement_group
from transformers import Qwen2Config, Qwen2ForCausalLM

from agl_grpc.learner.checkpoint import Checkpoints, resume_keys
from agl_grpc.learner.errors import LearnerError
from agl_grpc.learner.manager import RolloutManager
from agl_grpc.learner.progress import with_summary
from agl_grpc.learner.ray_runtime import local_ray
from agl_grpc.learner.rollouts import FinishedGroup, Row
from agl_grpc.learner.trainer import AglTrainer, Hooks
from agl_grpc.learner.verl_config import compose
from tests.learner.local_engine import LocalEngine

GROUP_SIZE = 8
GROUPS = 8


def make_model(folder: Path) -> None:
    """A random Qwen2 of 30 thousand parameters with a tokenizer of its own."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
        dtype="float32",
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokens = {f"t{number}": number for number in range(64)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="t2"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t1", unk_token="t2")
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)


def shift_ids(group: FinishedGroup) -> FinishedGroup:
    """Every response's ids moved by one place."""

    def row(old: Row) -> Row:
        return replace(old, response_ids=np.roll(old.response_ids, 1))

    return replace(group, rollouts=tuple(replace(r, rows=tuple(map(row, r.rows))) for r in group.rollouts))


def swap_rewards(group: FinishedGroup) -> FinishedGroup:
    """The rewards of the best and the worst rollout exchanged."""
    ordered = sorted(range(len(group.rollouts)), key=lambda number: group.rollouts[number].reward or 0.0)
    low, high = ordered[0], ordered[-1]
    rollouts = list(group.rollouts)
    rollouts[low] = replace(rollouts[low], reward=group.rollouts[high].reward)
    rollouts[high] = replace(rollouts[high], reward=group.rollouts[low].reward)
    return replace(group, rollouts=tuple(rollouts))


def swap_groups(groups: list[FinishedGroup]) -> list[FinishedGroup]:
    """The first rollouts of the first two groups exchanged: each is compared with the wrong ones."""
    first, second, *rest = groups
    return [
        replace(first, rollouts=(second.rollouts[0], *first.rollouts[1:])),
        replace(second, rollouts=(first.rollouts[0], *second.rollouts[1:])),
        *rest,
    ]


def each(
    change: Callable[[FinishedGroup], FinishedGroup],
) -> Callable[[list[FinishedGroup]], list[FinishedGroup]]:
    """A change of every group by itself."""
    return lambda groups: [change(group) for group in groups]


class SplitRows:
    """Every rollout's row cut into ``parts`` rows that train the same tokens."""

    def __init__(self, parts: int) -> None:
        self._parts = parts

    def __call__(self, group: FinishedGroup) -> FinishedGroup:
        rollouts = tuple(replace(each, rows=tuple(self._split(each.rows[0]))) for each in group.rollouts)
        return replace(group, rollouts=rollouts)

    def _split(self, row: Row) -> Iterator[Row]:
        for places in np.array_split(np.arange(len(row.response_ids)), self._parts):
            first, last = places[0], places[-1] + 1
            yield Row(
                np.concatenate([row.prompt_ids, row.response_ids[:first]]),
                row.response_ids[first:last],
                row.response_mask[first:last],
                row.logprobs[first:last],
                row.policy_versions[first:last],
            )


CHANGES: dict[str, Callable[[list[FinishedGroup]], list[FinishedGroup]] | None] = {
    "none": None,
    "shift": each(shift_ids),
    "rewards": each(swap_rewards),
    "groups": swap_groups,
    "split2": each(SplitRows(2)),
    "split5": each(SplitRows(5)),
}


def fitted(trainer: AglTrainer, manager: RolloutManager) -> str:
    """Trains; the error that ended it, if any."""
    try:
        trainer.fit(manager)
    except LearnerError as caught:
        return f"{type(caught).__name__}: {caught}"
    return ""


def run(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One training run; ``options`` hold verl's keys and what to spoil."""
    steps: list[dict[str, float]] = []
    commits: list[Any] = []
    tasks, model = str(folder / "tasks.jsonl"), str(folder / "model")
    checkpoints = folder / "checkpoints"
    resume = resume_keys(checkpoints, options["resume"]) if "resume" in options else {}
    fixed = {
        "data": {"train_files": tasks, "val_files": tasks, "seed": 0},
        "trainer": {"default_local_dir": str(checkpoints), **resume},
    }
    user = {
        "data.train_batch_size": GROUPS,
        "actor_rollout_ref.model.path": model,
        "actor_rollout_ref.rollout.n": GROUP_SIZE,
        "actor_rollout_ref.actor.optim.lr": 5e-3,
        "trainer.total_epochs": 1000,
        "trainer.save_freq": -1,
        "trainer.logger": [],
        **options["verl"],
    }
    config = compose(user, device="cpu", fixed=fixed)
    engine = LocalEngine(model, seed=0, repeat=options.get("repeat", False))
    changes: list[str] = options.get("changes", [])
    manager = RolloutManager(engine, group_size=GROUP_SIZE, validation_size=1)
    engine.deliver = manager.deliver

    def on_metrics(step: int, metrics: dict[str, float]) -> bool:
        steps.append({"step": step, **with_summary(metrics)})
        engine.change = CHANGES[changes[step]] if step < len(changes) else None
        return step >= options.get("stop_after", 1 << 30)

    store = Checkpoints(checkpoints, lambda name, ids, step: commits.append([name, ids, step]), keep=None)
    hooks = Hooks(engine, engine, store, run_name="test", sample_deadline=60, on_metrics=on_metrics)
    mix_ups: dict[str, str] = {}
    tq.init(config.transfer_queue)
    trainer = AglTrainer(config, hooks)
    try:
        trainer.init()
        error = fitted(trainer, manager)
        done = int(steps[-1]["step"])
        for name in options.get("mix_ups", []):
            # One step more with spoiled rollouts; it must not get as far as metrics.
            engine.change = CHANGES[name]
            trainer.global_steps, trainer.total_training_steps = done, done + 1
            mix_ups[name] = fitted(trainer, manager)
            assert len(steps) == done, f"{name} was trained"
            tq.kv_clear(keys=list((tq.kv_list("train") or {}).get("train", {})), partition_id="train")
    finally:
        tq.close()
        # Their names are fixed: the next run needs them again. Their actors end with them.
        for pool in trainer.resource_pool_manager.resource_pool_dict.values():
            for group in pool.pgs or []:
                remove_placement_group(group)
    groups = [[entry.group_id for entry in batch.entries] for batch in engine.batches]
    return {"error": error, "steps": steps, "commits": commits, "groups": groups, "mix_ups": mix_ups}


def main(folder: Path, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All runs one after the other in one Ray session."""
    if not (folder / "model").is_dir():
        make_model(folder / "model")
        (folder / "tasks.jsonl").write_text("".join(f'{{"n": {number}}}\n' for number in range(48)))
    with local_ray(device="cpu", gpus=1):
        return [run(folder, options) for options in runs]


if __name__ == "__main__":
    outcome = main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    print("\n" + json.dumps(outcome))
