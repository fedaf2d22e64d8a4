"""Trainers that are killed, spread over nodes, starved and compared with verl alone, on a recorded stream.

Each runs in a process of its own, forked from this one, that joins a Ray cluster of two nodes.
Prints one JSON object on its last line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
import torch

from agl_grpc.learner.rollouts.groups import FinishedGroup, place_of
from agl_grpc.learner.verl.keys import POLICY_LOSSES
from agl_grpc.learner.verl.ray_runtime import local_ray
from tests.learner.forked import EndedError, in_fork
from tests.learner.ledger import Ledger
from tests.learner.life import Life
from tests.learner.local_engine import NAMED, LocalEngine
from tests.learner.trainer_script import SplitRows, make_tasks
from tests.learner.warm_ray import warm_cluster

T = TypeVar("T")

STEPS, SAVE, NODES = 8, 2, 2
FLAT_EVERY = 4
# Where a trainer is killed, and in which step; each next one goes on from what the one before left.
KILLS = (
    ("claimed", 1),
    ("proven", 2),
    ("saving", 2),
    ("saved", 4),
    ("reported", 4),
    ("committed", 4),
    ("updated", 5),
    ("published", 7),
)
# One batch is sampled ahead: what was asked for and not trained is carried over a kill.
AHEAD = {
    "trainer.v1.separate_async.num_warmup_batches": 1,
    "trainer.v1.sampler.max_off_policy_threshold": 2,
}
SAVING = {**AHEAD, "trainer.total_training_steps": STEPS, "trainer.save_freq": SAVE}
PLAIN_DESCENT = {
    **AHEAD,
    "trainer.total_training_steps": 3,
    "actor_rollout_ref.actor.optim.optimizer": "SGD",
    "actor_rollout_ref.actor.optim.lr": 100.0,
    "actor_rollout_ref.actor.optim.weight_decay": 0.0,
    "actor_rollout_ref.actor.grad_clip": 1e9,
}
STEEP = 1e5
"""The rate of one update by plain descent that shows a gradient well: in so large a move the rounding of the
weights is lost."""
CORRECTED = {
    "trainer.total_training_steps": 4,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 4,
    "actor_rollout_ref.actor.use_kl_loss": True,
    "actor_rollout_ref.actor.kl_loss_coef": 0.01,
    "actor_rollout_ref.actor.entropy_coeff": 0.01,
    "actor_rollout_ref.actor.optim.lr": 2e-2,
    "algorithm.filter_groups.enable": True,
    "algorithm.filter_groups.metric": NAMED,
    "algorithm.rollout_correction.rollout_is": "sequence",
    "algorithm.rollout_correction.rollout_is_threshold": 1.5,
    "trainer.v1.separate_async.num_warmup_batches": 2,
    "trainer.v1.sampler.max_off_policy_threshold": 3,
}
LORA = {
    "trainer.total_training_steps": 3,
    "trainer.save_freq": 3,
    "actor_rollout_ref.model.lora_rank": 4,
    "actor_rollout_ref.model.lora_alpha": 8,
    "actor_rollout_ref.model.target_modules": "all-linear",
    "actor_rollout_ref.actor.use_kl_loss": True,
    "actor_rollout_ref.actor.optim.lr": 2e-2,
}
Recorded = Mapping[str, FinishedGroup]


class Script:
    """The runs of this script on one folder and one Ray cluster."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.address = folder, address
        self.model = str(folder / "model")

    def apart(self, work: Callable[[], T]) -> T:
        """What ``work`` answers in a process of its own that has joined the cluster."""

        def joined() -> T:
            with local_ray(device="cpu", gpus=NODES, address=self.address):
                return work()

        return in_fork(joined)

    def engine(self, recorded: Recorded | None = None, **options: Any) -> LocalEngine:
        return LocalEngine(self.model, seed=0, recorded=recorded, **options)

    def once(self, name: str, verl: dict[str, Any], engine: LocalEngine, **options: Any) -> dict[str, Any]:
        """One trainer from start to end, in this process."""
        ledger = Ledger(self.folder / f"{name}.ledger")
        life = Life(self.folder, {"verl": verl, "checkpoints": name, **options}, engine, ledger)
        try:
            error = life.run()
            ranks = _ranks(life)
        finally:
            life.close()
        return {
            "error": error,
            "errors": life.errors,
            "steps": life.steps,
            "advantages": life.trainer.advantages,
            "digests": {step: sorted(found) for step, found in engine.digests.items()},
            "commits": ledger.commits,
            "ranks": ranks,
        }

    def undisturbed(self) -> tuple[dict[str, Any], Recorded]:
        """A trainer that nobody kills, and what was sampled for it."""
        engine = self.engine()
        return self.once("whole", SAVING, engine), engine.record

    def corrected(self) -> dict[str, Any]:
        """Older tokens corrected, groups filtered by a named reward; then by one that nobody gives."""
        engine = self.engine(flat_every=FLAT_EVERY)
        ledger = Ledger(self.folder / "corrected.ledger")
        life = Life(self.folder, {"verl": CORRECTED, "checkpoints": "corrected"}, engine, ledger)
        try:
            error = life.run()
            done = int(life.steps[-1]["step"])
            waiting = {place for place, _ in life.trainer.outstanding_prompts()}
            not_forgotten = {place_of(uid) for uid in life.manager.remembered_groups} - waiting
            life.trainer.replay_buffer.filter_groups_metric = "nobody"
            life.trainer.global_steps, life.trainer.total_training_steps = done, done + 1
            unknown = life.fit()
        finally:
            life.close()
        groups = {entry.group_id for batch in engine.batches for entry in batch.entries}
        return {
            "error": error,
            "unknown": unknown,
            "not_forgotten": sorted(not_forgotten),
            "steps": life.steps,
            "tasks": sorted({int(group.rpartition(".i")[2]) for group in groups}),
        }

    def killed(self, recorded: Recorded) -> dict[str, Any]:
        """Trainers killed one after the other at every point of ``KILLS``; the last one ends by itself."""
        ledger = Ledger(self.folder / "killed.ledger")
        ends: list[int | None] = []
        steps: list[list[dict[str, float]]] = []
        for point, step in (*KILLS, ("", 0)):
            before = len(ledger.facts("step"))
            try:
                self.apart(partial(self._life, recorded, ledger, (point, step)))
                ends.append(0)
            except EndedError as end:
                ends.append(end.code)
            steps.append([metrics for (metrics,) in ledger.facts("step")[before:]])
        digests: dict[int, set[str]] = {}
        for published, digest in ledger.facts("published"):
            digests.setdefault(published, set()).add(digest)
        return {
            "ends": ends,
            "points": [point for (point,) in ledger.facts("killed")],
            "steps": steps,
            "digests": {step: sorted(found) for step, found in digests.items()},
            "committed": [batch for _, ids, _ in ledger.commits for batch in ids],
            "claims": {step: len(batches) for step, batches in ledger.claims.items()},
            "manifests": ledger.facts("claimed"),
        }

    def _life(self, recorded: Recorded, ledger: Ledger, kill: tuple[str, int]) -> None:
        """One of the trainers that are killed."""
        options = {
            "verl": SAVING,
            "checkpoints": "killed",
            "resume": ledger.checkpoint[0],
            "replay": ledger.release(),
            "kill": kill,
        }
        life = Life(self.folder, options, self.engine(recorded), ledger)
        try:
            assert life.run() == ""
        finally:
            life.close()

    def fidelity(self, recorded: Recorded) -> dict[str, Any]:
        """Updates by plain descent, on one node and on two, the first one also by verl alone: differences."""
        engines = {ranks: self.engine(recorded) for ranks in (1, NODES)}
        for engine in engines.values():
            engine.keeps_history = True
        outcomes = {
            ranks: self.once(f"sgd{ranks}", {**PLAIN_DESCENT, "trainer.nnodes": ranks}, engine)
            for ranks, engine in engines.items()
        }
        before = self.engine().weights
        gradients = {ranks: _moved(before, engine.history[1]) for ranks, engine in engines.items()}
        from tests.learner.verl_alone import losses, padded, single_rank, step, step_of_ours, worker

        first = {entry.group_id for entry in engines[1].batches[0].entries}
        groups = [group for uid, group in recorded.items() if uid in first]
        single_rank()
        alone = step(worker(self.model, 100.0), padded(groups), "vanilla")
        keys = [
            f"{group.request.uid}_{number}_0" for group in groups for number in range(len(group.rollouts))
        ]
        split = {
            parts: step_of_ours(worker(self.model, STEEP), [SplitRows(parts)(group) for group in groups])
            for parts in (1, 2, 5)
        }
        split_gradients = {parts: _moved(before, each["weights"]) for parts, each in split.items()}
        steep = step(worker(self.model, STEEP), padded(groups), "vanilla")
        theirs = dict(zip(keys, alone["advantages"].tolist(), strict=True))
        ours = outcomes[1]["advantages"][0]
        return {
            "errors": [outcome["error"] for outcome in outcomes.values()],
            "ranks": [outcome["ranks"] for outcome in outcomes.values()],
            "advantages": max(float(np.abs(np.subtract(ours[key], theirs[key])).max()) for key in keys),
            "rows": [len(ours), len(keys)],
            "losses": [
                outcomes[1]["steps"][0]["actor/pg_loss"],
                outcomes[2]["steps"][0]["actor/pg_loss"],
                float(np.sum(alone["metrics"]["actor/pg_loss"])),
            ],
            "gradient_norms": [
                outcomes[1]["steps"][0]["actor/grad_norm"],
                outcomes[2]["steps"][0]["actor/grad_norm"],
                float(np.sum(alone["metrics"]["grad_norm"])),
            ],
            "gradients": _difference(gradients[1], _moved(before, alone["weights"])),
            "gradients_of_two_ranks": _difference(gradients[1], gradients[2]),
            "split": {
                parts: [
                    each["rows"],
                    each["updates"],
                    _difference(split_gradients[1], split_gradients[parts]),
                ]
                for parts, each in split.items()
            },
            "split_from_verl": _difference(split_gradients[1], _moved(before, steep["weights"])),
            "policy_losses": losses(self.model, groups, POLICY_LOSSES),
            "steps": [outcome["steps"] for outcome in outcomes.values()],
            "last_weights_of_two_ranks": _difference(engines[1].history[3], engines[2].history[3]),
        }

    def bad(self) -> dict[str, Any]:
        """A trainer whose worker runs out of memory in its third update, and hangs in the next."""
        ledger, engine = Ledger(self.folder / "bad.ledger"), self.engine()
        verl = {
            "trainer.total_training_steps": 5,
            "actor_rollout_ref.model.external_lib": "tests.learner.bad_losses",
            "actor_rollout_ref.actor.policy_loss.loss_mode": "bad",
        }
        options = {"verl": verl, "checkpoints": "bad", "deadlines": {"compute": 5}}
        life = Life(self.folder, options, engine, ledger)
        try:
            errors = [life.run(), life.fit()]
        finally:
            life.close()
        return {
            "errors": errors,
            "counted": life.errors,
            "commits": ledger.commits,
            "steps": [step["step"] for step in life.steps],
        }

    def adapter(self) -> dict[str, Any]:
        """A model trained with LoRA, and its checkpoint as transformers and peft load it."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        engine = self.engine()
        outcome = self.once("lora", LORA, engine)
        resumed = self.once(
            "lora",
            {**LORA, "trainer.total_training_steps": 4, "trainer.save_freq": -1},
            self.engine(),
            resume="global_step_3",
        )
        actor = self.folder / "lora" / "global_step_3" / "actor"
        base = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        whole = AutoModelForCausalLM.from_pretrained(actor / "huggingface", dtype=torch.float32)
        wrapped = PeftModel.from_pretrained(base, actor / "lora_adapter")
        ids = torch.arange(2, 12)[None]
        with torch.no_grad():
            logits = {name: model(ids).logits for name, model in (("whole", whole), ("peft", wrapped))}
            served = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
            before = served(ids).logits
            served.load_state_dict(engine.weights)
            found = served(ids).logits
        return {
            **outcome,
            "differences": [float((each - found).abs().max()) for each in logits.values()],
            "resumed": resumed,
            "learned": float((before - found).abs().max()),
        }


def _ranks(life: Life) -> list[tuple[str, str]]:
    """Node and collective backend of every rank of the actor."""

    def place(_worker: Any) -> tuple[str, str]:
        return ray.get_runtime_context().get_node_id(), torch.distributed.get_backend()

    workers = life.trainer.worker_groups()["actor"].workers
    found: list[tuple[str, str]] = ray.get([worker.__ray_call__.remote(place) for worker in workers])
    return found


def _moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: before[name] - tensor for name, tensor in after.items() if name in before}


def _difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The greatest difference of two sets of tensors, each relative to its tensor's largest value."""
    assert set(theirs) <= set(ours)
    return max(
        float((ours[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-30))
        for name, tensor in theirs.items()
    )


def main(folder: Path, only: list[str]) -> dict[str, Any]:
    """All runs, or the undisturbed one and those named, on one Ray cluster of a nominal GPU a node."""
    with warm_cluster(NODES) as address:
        in_fork(partial(make_tasks, folder))
        script = Script(folder, address)
        whole, recorded = script.apart(script.undisturbed)
        runs: dict[str, Callable[[], dict[str, Any]]] = {
            "killed": lambda: script.killed(recorded),
            "fidelity": lambda: script.apart(partial(script.fidelity, recorded)),
            "corrected": lambda: script.apart(script.corrected),
            "bad": lambda: script.apart(script.bad),
            "lora": lambda: script.apart(script.adapter),
        }
        made = {name: run() for name, run in runs.items() if not only or name in only}
        return {"undisturbed": whole, **made}


if __name__ == "__main__":
    print("\n" + json.dumps(main(Path(sys.argv[1]), sys.argv[2:])))
