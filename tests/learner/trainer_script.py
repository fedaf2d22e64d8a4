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

from agl_grpc.learner.rollouts.groups import FinishedGroup, FinishedRollout, Row
from agl_grpc.learner.run_config import BestOf
from agl_grpc.learner.verl.ray_runtime import local_ray
from tests.learner.ledger import Ledger
from tests.learner.life import Life
from tests.learner.local_engine import LocalEngine
from tests.learner.warm_ray import warm_cluster


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


def foreign_ids(group: FinishedGroup) -> FinishedGroup:
    """A token that the model does not have, in the prompt of one row."""
    first, *rest = group.rollouts
    (row,) = first.rows
    wrong = replace(row, prompt_ids=np.append(row.prompt_ids, 64))
    return replace(group, rollouts=(replace(first, rows=(wrong,)), *rest))


def masked(group: FinishedGroup) -> FinishedGroup:
    """Every answer was cut off, and what was cut off is not trained."""

    def row(old: Row) -> Row:
        return replace(old, response_mask=np.zeros_like(old.response_mask))

    return replace(group, rollouts=tuple(replace(r, rows=tuple(map(row, r.rows))) for r in group.rollouts))


def spoil_first(
    change: Callable[[int, FinishedRollout], FinishedRollout],
) -> Callable[[list[FinishedGroup]], list[FinishedGroup]]:
    """A change of the first group's rollouts, by number; groups that are asked for anew come whole."""

    def spoil(groups: list[FinishedGroup]) -> list[FinishedGroup]:
        first, *rest = groups
        if not rest:
            return groups
        rollouts = tuple(change(number, rollout) for number, rollout in enumerate(first.rollouts))
        return [replace(first, rollouts=rollouts), *rest]

    return spoil


def one_broke(number: int, rollout: FinishedRollout) -> FinishedRollout:
    """The machine of the group's first rollout failed, after a reward of 0."""
    return replace(rollout, reward=0.0, failure="infrastructure: it is gone") if number == 0 else rollout


def one_is_left(number: int, rollout: FinishedRollout) -> FinishedRollout:
    """All but one rollout of the group failed."""
    return replace(rollout, failure="infrastructure: it is gone") if number else rollout


def unusable(number: int, rollout: FinishedRollout) -> FinishedRollout:
    """No reward, one that is no number, nothing sampled."""
    changes: list[dict[str, Any]] = [{"reward": None}, {"reward": float("nan")}, {"rows": ()}]
    return replace(rollout, **changes[number]) if number < len(changes) else rollout


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
    "one_broke": spoil_first(one_broke),
    "one_is_left": spoil_first(one_is_left),
    "unusable": spoil_first(unusable),
    "foreign": each(foreign_ids),
    "masked": each(masked),
    "split2": each(SplitRows(2)),
    "split5": each(SplitRows(5)),
}


def run(folder: Path, options: dict[str, Any], ledger: Ledger) -> dict[str, Any]:
    """One training run; ``options`` hold verl's keys and what to spoil."""
    engine = LocalEngine(str(folder / "model"), seed=0, repeat=options.get("repeat", False))
    engine.changes = [CHANGES[name] for name in options.get("changes", [])]

    def on_step(step: int) -> None:
        at, rules = options.get("later", (0, {}))
        if step == at and rules:
            life.trainer.hooks.best_of = BestOf(**rules)

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
    saved = sorted((folder / options.get("checkpoints", "checkpoints")).glob("*/actor/optim_*.pt"))
    groups = [[entry.group_id for entry in batch.entries] for batch in engine.batches]
    return {
        "error": error,
        "steps": life.steps,
        "commits": ledger.commits,
        "groups": groups,
        "digests": {step: sorted(found) for step, found in engine.digests.items()},
        "mix_ups": mix_ups,
        "optimiser_steps": _optimiser_steps(saved[-1]) if options.get("checkpoints") else [],
        # Of one group of the first batch.
        "advantages": _of_one_group(life.trainer.advantages[0]) if life.trainer.advantages else {},
    }


def _optimiser_steps(file: Path) -> list[int]:
    """How many steps the optimiser has made, by its own count."""
    state = torch.load(file, weights_only=False)["state"]
    return sorted({int(each["step"]) for each in state.values()})


def _of_one_group(advantages: dict[str, list[float]]) -> dict[str, list[float]]:
    first = next(iter(advantages)).split("_")[0]
    return {key: row for key, row in advantages.items() if key.split("_")[0] == first}


def make_tasks(folder: Path) -> None:
    """Model and tasks of all runs on a folder."""
    if not (folder / "model").is_dir():
        make_model(folder / "model")
        (folder / "tasks.jsonl").write_text("".join(f'{{"n": {number}}}\n' for number in range(48)))


def main(folder: Path, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All runs one after the other on one Ray cluster."""
    make_tasks(folder)
    with warm_cluster(nodes=1) as address, local_ray(device="cpu", gpus=1, address=address):
        return [
            run(folder, options, Ledger(folder / f"run-{number}.ledger"))
            for number, options in enumerate(runs)
        ]


if __name__ == "__main__":
    outcome = main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    print("\n" + json.dumps(outcome))
