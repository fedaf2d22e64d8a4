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
from transformers import Qwen2Config, Qwen2ForCausalLM

from agl_grpc.learner.ray_runtime import local_ray
from agl_grpc.learner.rollouts import FinishedGroup, Row
from tests.learner.life import Ledger, Life
from tests.learner.local_engine import LocalEngine


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


def run(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One training run; ``options`` hold verl's keys and what to spoil."""
    ledger = Ledger()
    engine = LocalEngine(str(folder / "model"), seed=0, repeat=options.get("repeat", False))
    changes: list[str] = options.get("changes", [])

    def on_step(step: int) -> None:
        engine.change = CHANGES[changes[step]] if step < len(changes) else None

    life = Life(folder, options, engine, ledger, on_step)
    mix_ups: dict[str, str] = {}
    try:
        error = life.run()
        done = int(life.steps[-1]["step"])
        for name in options.get("mix_ups", []):
            # One step more with spoiled rollouts; it must not get as far as metrics.
            engine.change = CHANGES[name]
            life.trainer.global_steps, life.trainer.total_training_steps = done, done + 1
            mix_ups[name] = life.fit()
            assert len(life.steps) == done, f"{name} was trained"
            tq.kv_clear(keys=list((tq.kv_list("train") or {}).get("train", {})), partition_id="train")
    finally:
        life.close()
    groups = [[entry.group_id for entry in batch.entries] for batch in engine.batches]
    return {
        "error": error,
        "steps": life.steps,
        "commits": ledger.commits,
        "groups": groups,
        "mix_ups": mix_ups,
    }


def make_tasks(folder: Path) -> None:
    """Model and tasks of all runs on a folder."""
    if not (folder / "model").is_dir():
        make_model(folder / "model")
        (folder / "tasks.jsonl").write_text("".join(f'{{"n": {number}}}\n' for number in range(48)))


def main(folder: Path, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All runs one after the other in one Ray session."""
    make_tasks(folder)
    with local_ray(device="cpu", gpus=1):
        return [run(folder, options) for options in runs]


if __name__ == "__main__":
    outcome = main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    print("\n" + json.dumps(outcome))
