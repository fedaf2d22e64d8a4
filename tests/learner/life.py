"""One trainer from its start to its end, or to the point at which it is killed; for end-to-end scripts."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import transfer_queue as tq
from omegaconf import DictConfig
from ray.util import remove_placement_group
from transfer_queue import KVBatchMeta

from agl_grpc.dataset import CurriculumRules
from agl_grpc.learner.checkpoints import checkpoint
from agl_grpc.learner.checkpoints.checkpoint import Checkpoints, check_fits, resume_keys
from agl_grpc.learner.errors import LearnerError
from agl_grpc.learner.hooks import Hooks
from agl_grpc.learner.progress import with_summary
from agl_grpc.learner.rollouts.curriculum import TaskOrder
from agl_grpc.learner.run_config import BestOf, Deadlines
from agl_grpc.learner.trainer import AglTrainer
from agl_grpc.learner.verl.config import compose
from agl_grpc.learner.verl.local_queue import row_queue
from agl_grpc.learner.verl.manager import RolloutManager
from tests.learner.ledger import Ledger
from tests.learner.local_engine import LocalEngine

GROUP_SIZE = 8
GROUPS = 8


class KillableTrainer(AglTrainer):
    """A trainer whose process is killed, with SIGKILL, at ``kill``: a named point and a step."""

    def __init__(
        self, config: DictConfig, hooks: Hooks, ledger: Ledger, kill: tuple[str, int] = ("", 0)
    ) -> None:
        super().__init__(config, hooks)
        self._ledger, self._kill = ledger, kill
        self.advantages: list[dict[str, list[float]]] = []

    def reached(self, point: str) -> None:
        """Called at every point."""
        if (point, self.global_steps) == self._kill:
            self._ledger.note("killed", point)
            os.kill(os.getpid(), signal.SIGKILL)

    def _await_claim(self) -> None:
        super()._await_claim()
        self.reached("claimed")

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        self.reached("proven")
        result = super()._compute_advantage(batch, metrics)
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["advantages"])
        rows = zip(batch.keys, data["advantages"].unbind(), strict=True)
        self.advantages.append({key: row.tolist() for key, row in rows})
        return result

    def _save_checkpoint(self) -> None:
        super()._save_checkpoint()
        self.reached("saved")

    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        result = super()._update_actor(batch, metrics)
        self.reached("updated")
        return result


class Life:
    """A trainer on a local engine.

    ``options``: ``verl`` keys, ``resume`` (a checkpoint's name), ``stop_after`` a step, ``deadlines``,
    ``curriculum`` (its rules), ``best_of`` (which rollouts are learned), ``rollouts`` (of a task, an
    expression) and ``kill``: the point and step at which its process is killed, with SIGKILL.
    """

    def __init__(
        self,
        folder: Path,
        options: dict[str, Any],
        engine: LocalEngine,
        ledger: Ledger,
        on_step: Callable[[int], None] = lambda _step: None,
    ) -> None:
        self.steps: list[dict[str, float]] = []
        self.errors: list[tuple[int, str]] = []
        self._ledger, self._engine = ledger, engine
        tasks, model = str(folder / "tasks.jsonl"), str(folder / "model")
        checkpoints = folder / options.get("checkpoints", "checkpoints")
        resume = resume_keys(checkpoints, options["resume"]) if options.get("resume") else {}
        fixed = {
            "data": {
                "train_files": tasks,
                "val_files": tasks,
                "seed": 0,
                "agl_rollouts_per_task": options.get("rollouts", ""),
            },
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
        self.config = config = compose(user, device="cpu", fixed=fixed)
        self.ranks = int(config.trainer.n_gpus_per_node) * int(config.trainer.nnodes)
        if resume:
            check_fits(checkpoints / options["resume"], Path(model), self.ranks)
        self._opened = ExitStack()
        queue = self._opened.enter_context(row_queue(config))
        self.manager = RolloutManager(
            engine, group_size=GROUP_SIZE, validation_size=1, vocabulary=64, queue=queue
        )
        engine.deliver, engine.on_claim = self.manager.deliver, self._claimed
        engine.on_published = self._published
        stop_after = options.get("stop_after", 1 << 30)

        def on_metrics(step: int, metrics: dict[str, float]) -> bool:
            self.steps.append({"step": step, **with_summary(metrics)})
            ledger.note("step", self.steps[-1])
            on_step(step)
            return step >= stop_after

        def order(dataset: Any) -> TaskOrder:
            self.manager.keep_rewards = True
            return TaskOrder(CurriculumRules(**options["curriculum"]), len(dataset), 0, self.manager)

        hooks = Hooks(
            engine,
            engine,
            Checkpoints(checkpoints, self._commit, keep=None),
            run_name="test",
            best_of=BestOf(**options.get("best_of", {})),
            queue=queue,
            replay=options.get("replay", {}),
            deadlines=Deadlines(**{"sample": 60, **options.get("deadlines", {})}),
            on_metrics=on_metrics,
            order=order if "curriculum" in options else None,
            on_error=lambda step, name: self.errors.append((step, name)),
        )
        self.trainer = KillableTrainer(config, hooks, ledger, tuple(options.get("kill", ("", 0))))

    def _claimed(self, step: int, groups: list[str]) -> None:
        self._ledger.note("claimed", step, groups)

    def _commit(self, name: str, ids: list[str], step: int) -> None:
        self.trainer.reached("reported")
        self._ledger.note("committed", name, ids, step)
        self.trainer.reached("committed")

    def _published(self, step: int, digest: str) -> None:
        self._ledger.note("published", step, digest)
        self.trainer.reached("published")

    def _sync_tree(self, folder: Path) -> None:
        self.trainer.reached("saving")
        sync_tree(folder)

    def run(self) -> str:
        """Trains; the error that ended it, if any."""
        with patch.object(checkpoint, "sync_tree", self._sync_tree):
            self.trainer.init()
            return self.fit()

    def fit(self) -> str:
        """Trains on; the error that ended it, if any."""
        try:
            self.trainer.fit(self.manager)
        except LearnerError as caught:
            return f"{type(caught).__name__}: {caught}"
        return ""

    def close(self) -> None:
        """Ends verl's workers and the queue of rows: their names are fixed, and the next life needs them."""
        self._opened.close()
        for pool in self.trainer.resource_pool_manager.resource_pool_dict.values():
            for group in pool.pgs or []:
                remove_placement_group(group)


sync_tree = checkpoint.sync_tree
