"""The checkpoint with the best validation score: noted, kept, and found again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from agl_grpc.evaluation import Answered, Evaluation, TaskResult
from agl_grpc.learner.checkpoints.best import BestCheckpoint, read_best
from agl_grpc.learner.checkpoints.checkpoint import Checkpoints, LearnerState, checkpoint_id, write_checkpoint
from agl_grpc.learner.checkpoints.export import describe
from agl_grpc.learner.errors import ConfigError
from agl_grpc.learner.validation import metrics_of


class _Trainer:
    uncommitted: Sequence[Any] = ()

    def __init__(self) -> None:
        self.uncommitted = []


def _save(checkpoints: Checkpoints, folder: Path, step: int) -> None:
    """As the trainer does: a checkpoint is written, then committed."""

    def fill(place: Path) -> LearnerState:
        (place / "actor" / "huggingface").mkdir(parents=True)
        return LearnerState(step, step)

    write_checkpoint(folder, checkpoint_id(step), fill)
    checkpoints._unnamed = (checkpoint_id(step), [], step)
    checkpoints.commit(_Trainer())  # type: ignore[arg-type]  # what commit uses of it


def test_the_best_outlives_newer_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, lambda *_: None, keep=1)
    for step, score in ((1, 0.2), (2, 0.6), (3, 0.6), (4, 0.1)):
        assert checkpoints.note_score(step, score) is (step < 3)
        _save(checkpoints, tmp_path, step)
    assert sorted(path.name for path in tmp_path.glob("global_step_*")) == ["global_step_2", "global_step_4"]
    assert read_best(tmp_path) == BestCheckpoint("global_step_2", 2, 0.6)
    assert [describe(tmp_path / checkpoint_id(step))["best_score"] for step in (2, 4)] == [0.6, None]


def test_a_resumed_run_knows_the_best_of_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, lambda *_: None, keep=1)
    assert checkpoints.note_score(1, 0.5)
    _save(checkpoints, tmp_path, 1)
    resumed = Checkpoints(tmp_path, lambda *_: None, keep=1)
    assert not resumed.note_score(2, 0.4)
    _save(resumed, tmp_path, 2)
    assert (tmp_path / "global_step_1").is_dir()
    assert resumed.note_score(3, 0.7)
    _save(resumed, tmp_path, 3)
    assert [path.name for path in tmp_path.glob("global_step_*")] == ["global_step_3"]


def test_a_score_without_a_checkpoint_is_not_written_down(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, lambda *_: None, keep=1)
    assert checkpoints.note_score(1, 0.5)
    _save(checkpoints, tmp_path, 2)
    assert read_best(tmp_path) is None


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "best.json").write_text("{")
    with pytest.raises(ConfigError, match="does not name a best checkpoint"):
        read_best(tmp_path)


def test_metrics_have_verls_names_and_count_failures_apart() -> None:
    rollouts = (Answered("a", 1.0), Answered("b", None, failure="infrastructure"))
    found = Evaluation(name="v", samples=2, tasks=(TaskResult(0, "d", "maths", rollouts),))
    metrics = metrics_of(found)
    assert metrics["val-core/maths/reward/mean@2"] == 1.0
    assert metrics["val-aux/failures/infrastructure"] == 1.0
    assert metrics["val-aux/rollouts"] == 2.0
