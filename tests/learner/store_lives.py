"""Learners on a real store, killed one after the other at every point of a step; the last one ends by itself.

`python -m tests.learner.store_lives CONFIG STORE LEDGER`: each is `agl-grpc learner` in a process forked from
this one, on one Ray cluster. The last line is the exit codes, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

# As `agl-grpc learner` has it: before anything imports gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from agl_grpc.learner import process
from agl_grpc.learner import trainer as trainer_module
from agl_grpc.learner.checkpoints import checkpoint
from agl_grpc.learner.publication import Publisher
from agl_grpc.learner.run_config import RunConfig, load
from agl_grpc.learner.training_run import TrainingRun
from tests.learner.forked import EndedError, in_fork
from tests.learner.ledger import Ledger
from tests.learner.life import KillableTrainer
from tests.learner.lives_script import KILLS
from tests.learner.warm_ray import warm_cluster


@contextmanager
def _killable(ledger: Ledger, kill: tuple[str, int]) -> Iterator[None]:
    """The learner's trainer becomes one that is killed, and the points outside its steps are told to it."""
    trainers: list[KillableTrainer] = []
    commit, update, sync = TrainingRun.commit, Publisher.update_weights, checkpoint.sync_tree

    def make(*arguments: Any) -> KillableTrainer:
        trainers.append(KillableTrainer(*arguments, ledger, kill))
        return trainers[0]

    def reported(self: TrainingRun, name: str, batches: list[str], step: int) -> None:
        trainers[0].reached("reported")
        commit(self, name, batches, step)
        trainers[0].reached("committed")

    def published(self: Publisher, step: int) -> dict[str, float]:
        metrics = update(self, step)
        trainers[0].reached("published")
        return metrics

    def saving(folder: Path) -> None:
        trainers[0].reached("saving")
        sync(folder)

    with ExitStack() as stack:
        stack.enter_context(patch.object(trainer_module, "AglTrainer", make))
        stack.enter_context(patch.object(TrainingRun, "commit", reported))
        stack.enter_context(patch.object(Publisher, "update_weights", published))
        stack.enter_context(patch.object(checkpoint, "sync_tree", saving))
        yield


def _life(config: RunConfig, store: str, ledger: Ledger, kill: tuple[str, int]) -> None:
    with _killable(ledger, kill):
        process.run(config, store)


def main(path: str, store: str, ledger: Ledger) -> list[int | None]:
    """All lives; their exit codes."""
    codes: list[int | None] = []
    with warm_cluster(nodes=1) as address:
        config = replace(load(path), ray_address=address)
        for kill in (*KILLS, ("", 0)):
            try:
                in_fork(partial(_life, replace(config, resume=bool(codes)), store, ledger, kill))
                codes.append(0)
            except EndedError as end:
                codes.append(end.code)
    return codes


if __name__ == "__main__":
    print("\n" + json.dumps(main(sys.argv[1], sys.argv[2], Ledger(Path(sys.argv[3])))))
