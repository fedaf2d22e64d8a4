"""Training runs of `Trainer.fit` that end early, again and again, and go on: what it must not change.

Real vLLM, real verl, on a CPU with a random model. `hybrid`: verl starts the engine, its learner is killed,
and the run equals the same run left alone. `models`: two whole models, each with an engine and a learner,
are stopped by the one's training run and by the other's in turn, and train the same batches to the end.
"""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from agl_grpc.client import StoreClient
from agl_grpc.learner.lineage import step_of
from agl_grpc.model.enums import PolicyVersionStatus, TrainingRunStatus
from agl_grpc.model.policy import PolicyVersion
from agl_grpc.trainer import FitResult, PartDied
from agl_grpc.trainer.commands import free_port
from tests.e2e import two_models
from tests.e2e.interruptions import kill_learner, meanwhile, stop
from tests.learner import hybrid_run
from tests.support.environments import REPOSITORY, engine_environment, engine_python
from tests.support.store_process import StoreProcess

Row = dict[str, object]
Tell = Callable[[int], None]

_HYBRID_TRAINING = f"{hybrid_run.RUN}-training"
_SAVE_EVERY = 2
# What depends on the tokens that were sampled, on the rewards and on every gradient.
_COMPARED = ("reward/mean", "tokens/trained", "loss/gradient_norm")


def prove_hybrid(count: int, seed: int, tell: Tell) -> Row:
    """The learner is killed ``count`` times, each time a step after a checkpoint that is thus lost work."""
    steps = _SAVE_EVERY * (count + 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make_model(folder / "model")
        alone = _fit_hybrid(folder, "alone", steps, seed, free_port())
        for number in range(count):
            port = free_port()
            at = _SAVE_EVERY * (number + 1) + 1
            killer = kill_learner(f"127.0.0.1:{port}", hybrid_run.RUN, _HYBRID_TRAINING, at)
            with meanwhile(killer):
                try:
                    _fit_hybrid(folder, "killed", steps, seed, port, resume=number > 0)
                except PartDied as died:
                    print(died, flush=True)
                else:
                    raise AssertionError(f"a learner that was killed after step {at} trained to the end")
            tell(number + 1)
        killed = _fit_hybrid(folder, "killed", steps, seed, free_port(), resume=True)
        assert _curve(killed) == _curve(alone), (_curve(killed), _curve(alone))
        digests = [asyncio.run(_digests(result)) for result in (alone, killed)]
        assert digests[0] == digests[1], digests
        assert len(digests[0]) == steps
    return {"steps": steps, "curve": _curve(alone)}


def _fit_hybrid(
    folder: Path, name: str, steps: int, seed: int, port: int, *, resume: bool = False
) -> FitResult:
    runs = folder / name
    model = folder / "model"
    made = hybrid_run.trainer(runs, model, steps, seed, save_every=_SAVE_EVERY, port=port, resume=resume)
    asked = hybrid_run.tasks(steps)
    return made.fit(hybrid_run.agent, asked, val_dataset=asked[:2])


def _curve(result: FitResult) -> list[list[float]]:
    return [[step.metrics[name] for name in _COMPARED] for step in result.history]


async def _digests(result: FitResult) -> dict[int, list[str]]:
    """Of the weights of each step, all that were published."""
    with StoreProcess(result.folder.database) as store:
        async with StoreClient(store.address, run_id=hybrid_run.RUN) as client:
            return _by_step(await client.query_policy_versions(hybrid_run.MODEL))


def _by_step(versions: list[PolicyVersion]) -> dict[int, list[str]]:
    found: dict[int, set[str]] = {}
    for version in versions:
        if version.status is PolicyVersionStatus.COMMITTED:
            found.setdefault(step_of(version), set()).add(version.weights_digest)
    # A resumed learner publishes the weights that it begins with, under a new version.
    return {step: sorted(digests) for step, digests in sorted(found.items()) if step}


def prove_models(count: int, _seed: int, tell: Tell) -> Row:
    """Stopped ``count`` times, by each model's training run in turn."""
    steps = 2 * (count + 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make_model(folder / "base")
        for number in range(count):
            port = free_port()
            model = two_models.MODELS[1 - number % 2]
            stopper = stop(f"127.0.0.1:{port}", two_models.RUN, two_models.TRAINING[model], 2 * number + 1)
            with meanwhile(stopper):
                result = _fit_models(folder, steps, port, resume=number > 0)
            ended = {one.training_run.status for one in result.models.values()}
            assert ended == {TrainingRunStatus.STOPPED}, ended
            tell(number + 1)
        result = _fit_models(folder, steps, free_port(), resume=True)
        ended = {one.training_run.status for one in result.models.values()}
        assert ended == {TrainingRunStatus.SUCCEEDED}, ended
        stored = asyncio.run(two_models.read(result.folder.database))
    batches = {
        model: [[(entry.rollout_id, entry.reward) for entry in batch.entries] for batch in found]
        for model in two_models.MODELS
        if (found := stored.committed(model))
    }
    planner, solver = batches.values()
    assert planner == solver, batches
    assert len(planner) == steps
    trained = [rollout for batch in planner for rollout, _ in batch]
    assert len(set(trained)) == len(trained) == steps * two_models.TASKS * two_models.GROUP
    digests = {model: _by_step(stored.versions[model]) for model in two_models.MODELS}
    for each in digests.values():
        # What a stopped learner had not saved would have been trained again, to the same weights.
        assert list(each) == list(range(1, steps + 1)), digests
        assert all(len(found) == 1 for found in each.values()), digests
    assert not set(map(str, digests["planner"].values())) & set(map(str, digests["solver"].values()))
    return {"steps": steps, "rollouts": len(trained)}


def _fit_models(folder: Path, steps: int, port: int, *, resume: bool) -> FitResult:
    asked = two_models.tasks(steps)
    made = two_models.trainer(folder, port, steps, adapters=False, resume=resume)
    return made.fit(two_models.agent, asked)


def _make_model(folder: Path) -> None:
    command = [engine_python(), "-m", "tests.support.tiny_model", str(folder)]
    subprocess.run(command, env=engine_environment(), cwd=REPOSITORY, check=True, capture_output=True)
