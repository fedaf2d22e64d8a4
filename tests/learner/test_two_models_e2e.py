"""One run trains two models, each with a learner of its own, on the same rollouts."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import orjson
import pytest

from agl_grpc.client import StoreClient
from agl_grpc.learner.training_run import STEP_LABEL
from agl_grpc.model.enums import BatchStatus, TrainingRunStatus
from tests.learner.runs import Learner, configure, served
from tests.learner.warm_ray import cluster_process
from tests.support.store_process import StoreProcess

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.mark.parametrize("ahead", [0, 1])
async def test_one_run_trains_two_models_each_on_the_calls_that_it_answered(
    store: StoreProcess, folder: Path, ahead: int
) -> None:
    """Planner and solver answer one call each of every rollout; both learn from its reward, in the same
    batches, sampled in their step or ``ahead`` of it.

    Their learners share a Ray cluster. Rollouts of one task have no reward: the leader replaces the group,
    and so does the other. At last the one that follows is asked to stop, and then the leader, which waits for
    it.
    """
    steps, batch = 10, 4 * 8
    tasks = (folder / "tasks.jsonl").read_text().replace('{"n": 25}', '{"n": 25, "unjudged": true}')
    (folder / "tasks.jsonl").write_text(tasks)
    config = orjson.loads(configure(folder, 3 * steps).read_bytes())
    config["verl"]["trainer.save_freq"] = steps
    config["verl"]["trainer.v1.separate_async.num_warmup_batches"] = ahead
    config["verl"]["trainer.v1.sampler.max_off_policy_threshold"] = 1 + ahead

    def stop_the_other(line: str) -> None:
        if line.startswith(f"learner: step {steps}/"):
            asyncio.run(_stop(store, "tr_solver"))

    learners = []
    with served(store, folder, "planner", "solver"), cluster_process(nodes=2) as address:
        config["ray_address"] = address
        for name, more, on_line in (
            ("planner", {"followers": ["solver"]}, print),
            ("solver", {"follows": "tr_planner"}, stop_the_other),
        ):
            own = {"model": {**config["model"], "name": name}, "training_run_id": f"tr_{name}", **more}
            path = folder / f"{name}.json"
            path.write_bytes(orjson.dumps({**config, **own, "output_dir": str(folder / name)}))
            learners.append(Learner(path, store.address, on_line=on_line))
        codes = [learners[1].finish()]
        await _stop(store, "tr_planner")
        codes.append(learners[0].finish())
    said = [line for learner in learners for line in learner.lines]
    assert codes == [0, 0], "\n".join(line for learner in learners for line in learner.lines[-20:])
    assert not [line for line in said if "not writable" in line]
    async with StoreClient(store.address) as client:
        records = {name: await client.get_training_run_by_id(f"tr_{name}") for name in ("planner", "solver")}
        batches = {name: await client.query_batches(f"tr_{name}") for name in records}
        versions = {name: await client.query_policy_versions(name) for name in records}
        metrics: dict[int, Mapping[str, float]] = {}
        async for _, found in client.watch_training_run("tr_solver"):
            metrics |= {each.step: each.metrics for each in found}
        rollouts = await client.query_rollouts()
    for name, record in records.items():
        assert record is not None
        assert record.status is TrainingRunStatus.STOPPED
        assert record.checkpoint_id == f"global_step_{len(batches[name])}"
        assert {each.status for each in batches[name]} == {BatchStatus.COMMITTED}
        assert steps <= len(batches[name]) < 2 * steps
        digests = {item.weights_digest for item in versions[name]}
        assert len(digests) == len(versions[name]) >= steps
    assert not {v.weights_digest for v in versions["planner"]} & {
        v.weights_digest for v in versions["solver"]
    }
    # The same rollouts, in the same batches, with the same rewards; each was made once.
    (replaced,) = [step for step, each in metrics.items() if "groups/dropped" in each]
    assert replaced < steps / 2
    for mine, theirs in zip(*(found[:steps] for found in batches.values()), strict=True):
        assert len(mine.entries) == batch
        assert [(e.rollout_id, e.reward) for e in mine.entries] == [
            (e.rollout_id, e.reward) for e in theirs.entries
        ]
        # Its own call of each rollout, sampled by its own weights of the step before, or of one before that:
        # not the group in place of the useless one, which was asked for in the step that trains it.
        each, age = metrics[mine.step], min(ahead, mine.step - 1)
        fresh = batch if not age else 8 if mine.step == replaced else 0
        assert each["tokens/trained"] == batch * 4
        assert each.get("staleness/tokens/0", 0) == each["check/logprob_tokens_compared"] == fresh * 4
        assert each.get("staleness/tokens/1", 0) == (batch - fresh) * 4
        assert each.get("check/logprob_max_difference", 0) < 1e-5
        # The useless group itself is too old a step later.
        assert each.get("training/off_policy/evicted_samples", 0) == (mine.step == replaced + 1)
    asked = [int(each.labels[STEP_LABEL]) for each in rollouts]
    assert sum(step <= steps for step in asked) == (steps + ahead) * batch + 8
    assert metrics[steps]["reward/mean"] > metrics[1]["reward/mean"]


async def _stop(store: StoreProcess, training_run_id: str) -> None:
    async with StoreClient(store.address) as client:
        await client.stop_training_run(training_run_id)
