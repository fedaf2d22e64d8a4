"""One `Trainer.fit` trains two adapters of one base in vLLM; one learner is killed, and the run resumed."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest

from agl_grpc.learner.checkpoints.best import BestCheckpoint
from agl_grpc.learner.lineage import step_of
from agl_grpc.learner.validation import SCORE
from agl_grpc.model.enums import PolicyVersionStatus, TrainingRunStatus
from agl_grpc.trainer import FitResult, PartDied
from agl_grpc.trainer.commands import free_port
from tests.e2e.interruptions import kill_learner, meanwhile
from tests.e2e.two_models import GROUP, MODELS, RUN, TASKS, TRAINING, Stored, agent, read, tasks, trainer
from tests.support.environments import engine_environment, engine_python

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

STEPS, KILLED_AT, VALIDATED = 4, 2, 3
SUPPORT = Path(__file__).parents[1] / "support"


@dataclass
class Trained:
    """The run, after the session in which a learner was killed, and after the one that went on."""

    folder: Path
    died: str
    halfway: Stored
    result: FitResult
    stored: Stored


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("runs")
    command = [engine_python(), str(SUPPORT / "tiny_model.py"), str(folder / "base")]
    subprocess.run(command, env=engine_environment(), check=True, capture_output=True, timeout=240)
    asked, port = tasks(STEPS), free_port()
    killer = kill_learner(f"127.0.0.1:{port}", RUN, TRAINING["solver"], KILLED_AT)
    first = trainer(folder, port, STEPS, adapters=True, validated=VALIDATED)
    with meanwhile(killer), pytest.raises(PartDied) as died:
        first.fit(agent, asked, val_dataset=asked[:4])
    database = folder / RUN / "agl.db"
    halfway = asyncio.run(read(database))
    second = trainer(folder, free_port(), STEPS, adapters=True, validated=VALIDATED, resume=True)
    result = second.fit(agent, asked, val_dataset=asked[:4])
    return Trained(folder / RUN, str(died.value), halfway, result, asyncio.run(read(database)))


def test_the_error_names_the_learner_that_died(trained: Trained) -> None:
    assert trained.died.startswith("learner-solver was killed by SIGKILL")


def test_the_other_learner_saves_what_it_trained_and_ends(trained: Trained) -> None:
    planner = trained.halfway.training["planner"]
    assert planner.status is TrainingRunStatus.STOPPED
    last = max(trained.halfway.steps["planner"])
    assert KILLED_AT <= last < STEPS
    assert planner.checkpoint_id == f"global_step_{last}"
    assert (trained.folder / "models" / "planner" / "checkpoints" / planner.checkpoint_id).is_dir()
    assert trained.halfway.training["solver"].checkpoint_id is None


def test_both_are_trained_to_the_end_once_each_on_the_same_rollouts(trained: Trained) -> None:
    stored = trained.stored
    assert {one.status for one in stored.training.values()} == {TrainingRunStatus.SUCCEEDED}
    for model in MODELS:
        assert [batch.step for batch in stored.committed(model)] == list(range(1, STEPS + 1))
    planner, solver = (
        [[(entry.rollout_id, entry.reward) for entry in batch.entries] for batch in stored.committed(model)]
        for model in MODELS
    )
    assert planner == solver
    ids = [rollout_id for batch in planner for rollout_id, _ in batch]
    assert len(set(ids)) == len(ids) == STEPS * TASKS * GROUP
    # Nothing was sampled twice, but what the stop left unfinished.
    assert stored.trained == len(ids)


def test_the_learner_that_was_behind_comes_by_the_same_weights_again(trained: Trained) -> None:
    digests: dict[str, dict[int, set[str]]] = {model: {} for model in MODELS}
    published: dict[int, int] = {}
    for model in MODELS:
        for item in trained.stored.versions[model]:
            if item.status is PolicyVersionStatus.COMMITTED:
                digests[model].setdefault(step_of(item), set()).add(item.weights_digest)
                published[step_of(item)] = published.get(step_of(item), 0) + (model == "solver")
    assert all(len(found) == 1 for each in digests.values() for found in each.values()), digests
    assert [published[step] for step in range(1, KILLED_AT + 1)] == [2] * KILLED_AT
    each = [set().union(*(found for step, found in digests[model].items() if step)) for model in MODELS]
    assert len(each[0]) == len(each[1]) == STEPS
    assert not each[0] & each[1]


def test_each_learns_its_own_calls_and_leaves_none_out(trained: Trained) -> None:
    for model in MODELS:
        for step, item in trained.stored.steps[model].items():
            metrics: Mapping[str, float] = item.metrics
            assert metrics["check/logprob_max_difference"] < 1e-4, (model, step)
            left_out = {
                name: count for name, count in metrics.items() if name.startswith("rollouts/excluded")
            }
            assert not left_out, (model, step)
            assert metrics["training/rollouts"] == TASKS * GROUP, (model, step)


def test_the_result_and_the_folder_tell_of_each_model(trained: Trained) -> None:
    result = trained.result
    assert list(result.models) == list(MODELS)
    for model, one in result.models.items():
        assert one.training_run.training_run_id == TRAINING[model]
        assert [step.step for step in one.history][-1] == STEPS
        assert one.checkpoint == trained.folder / "models" / model / "checkpoints" / f"global_step_{STEPS}"
        assert one.adapter is not None
        assert (one.adapter / "adapter_config.json").is_file()
    assert result.checkpoint == result.models["planner"].checkpoint
    assert set(result.before) == set(result.after) == {"sampled"}
    during = [step for step in result.history if any(name.startswith("val-core/") for name in step.metrics)]
    assert [step.step for step in during] == [VALIDATED, STEPS]
    assert (trained.folder / "reward.png").read_bytes().startswith(b"\x89PNG")
    manifest: dict[str, Any] = orjson.loads((trained.folder / "manifest.json").read_bytes())
    assert manifest["models"] == list(MODELS)


def test_each_keeps_its_checkpoint_of_the_step_whose_weights_were_the_best_together(trained: Trained) -> None:
    scores = {step.step: step.metrics[SCORE] for step in trained.result.history if SCORE in step.metrics}
    assert list(scores) == [VALIDATED, STEPS]
    best = max(scores, key=lambda step: (scores[step], -step))
    for model, one in trained.result.models.items():
        assert one.best == BestCheckpoint(f"global_step_{best}", best, scores[best])
        saved = trained.folder / "models" / model / "checkpoints"
        assert {path.name for path in saved.glob("global_step_*")} >= {
            *(f"global_step_{step}" for step in (best, STEPS))
        }
    assert trained.result.best == trained.result.models["planner"].best
