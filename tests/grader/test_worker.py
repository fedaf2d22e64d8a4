"""Grader workers against a real store: what is recorded, cached, shared, taken up, and graded anew."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agl_grpc_cli.errors import CliError
from agl_grpc_cli.grade import app
from agl_grpc_cli.grader import app as start_app
from typer.testing import CliRunner

from agl_grpc.client import NotPermitted, StoreClient
from agl_grpc.grader import Grader, Graders, GraderWorker
from agl_grpc.model import FailureKind, Reward, RunGrader, Span, TrainingRun
from agl_grpc.store.door.app import ServeConfig, StoreServer
from agl_grpc.v1 import batch_pb2
from tests.grader import own_graders as own
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]


@pytest.fixture
async def client() -> AsyncIterator[StoreClient]:
    server = await StoreServer.start(ServeConfig(port=0, http_port=None, database=None, grace=1.0))
    try:
        async with StoreClient(server.address, run_id="g") as client:
            await client.create_run("g")
            yield client
    finally:
        await server.stop()


async def rollouts(client: StoreClient, *answers: str) -> list[str]:
    """Succeeded rollouts whose agents said these answers; the right one is 4."""
    ids = []
    for answer in answers:
        rollout = await client.start_rollout(input={"answer": "4"})
        place = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
        await client.add_span(Span(**place, name="m", attributes={"agentlightning.message.body": answer}))
        await client.update_attempt(place["rollout_id"], place["attempt_id"], "succeeded")
        ids.append(rollout.rollout_id)
    return ids


@contextlib.asynccontextmanager
async def working(client: StoreClient, *graders: Grader, **options: object) -> AsyncIterator[GraderWorker]:
    credential = await client.create_grader_credential()
    async with StoreClient(client.target, run_id="g", credential=credential) as own_client:
        worker = GraderWorker(own_client, Graders.of(graders), processes=1, **options)  # type: ignore[arg-type]  # options
        await worker.open()
        task = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await worker.close()


async def judged(client: StoreClient, ids: list[str], count: int) -> list[Reward]:
    """The newest rewards once there are so many."""

    async def there() -> bool:
        return len(await client.query_rewards(ids)) >= count

    await eventually(there, within=60)
    return await client.query_rewards(ids)


async def test_what_is_there_and_what_comes_is_graded_and_waited_for(client: StoreClient) -> None:
    await client.update_run("g", graders=[RunGrader("exact", "1"), RunGrader("parts", weight=0.0)])
    before = await rollouts(client, "4")
    async with working(client, own.exact, own.parts) as worker:
        after = await rollouts(client, "5")
        sealed = await client.wait_for_rollouts(rollout_ids=before + after, until="sealed", timeout=60)
        assert len(sealed) == 2
        assert worker.counts.total("graded") == 4
    found = {(r.rollout_id, r.name): r for r in await client.query_rewards(before + after)}
    assert [found[one, "exact"].value for one in before + after] == [1.0, 0.0]
    assert found[after[0], "parts/length"].value == 1.0
    assert (found[after[0], "parts"].metadata or {})["why"] == "short"
    assert {r.grader for r in found.values()} == {"exact", "parts"}
    run = await client.get_run_by_id("g")
    assert run is not None
    assert run.reward_weights == {"exact": 1.0}


async def test_a_verdict_is_not_asked_for_twice(client: StoreClient) -> None:
    ids = await rollouts(client, "4")
    async with working(client, own.exact):
        await judged(client, ids, 1)
    async with working(client, own.exact) as worker:
        await eventually(lambda: worker.counts.total("cached") == 1, within=60)
    assert [r.revision for r in await client.query_rewards(ids, all_revisions=True)] == [1]


@pytest.mark.parametrize(
    ("grader", "outcome", "says", "tries"),
    [
        (own.raises, "raised", "no judgement today", 2),
        (own.hangs, "timeout", "longer than 0.5 s", 1),
        (own.dies, "died", "ended with code 7", 1),
        (own.text, "not_a_grade", "type str ('very good')", 1),
        (own.nan, "not_finite", "it must be finite", 1),
    ],
)
async def test_no_verdict_is_a_failure_of_the_grader_and_never_a_zero(
    client: StoreClient, grader: Grader, outcome: str, says: str, tries: int
) -> None:
    ids = await rollouts(client, "4")
    async with working(client, grader, own.exact) as worker:
        found = {reward.name: reward for reward in await judged(client, ids, 2)}
        assert worker.counts.outcomes[grader.name] == {outcome: 1}
    failed = found[grader.name]
    assert failed.value is None
    assert failed.failure is not None
    assert (failed.failure.kind, failed.failure.type) == (FailureKind.GRADER, outcome)
    assert says in failed.failure.message
    assert (failed.metadata or {})["tries"] == tries
    assert found["exact"].value == 1.0  # its neighbours go on


async def test_two_workers_share_the_work_and_take_over_what_is_left(
    client: StoreClient,
) -> None:
    ids = await rollouts(client, *["4"] * 12)
    async with (
        working(client, own.exact, part=(0, 2)) as first,
        working(client, own.exact, part=(1, 2)) as second,
    ):
        await judged(client, ids, 12)
        assert first.counts.total("graded") + second.counts.total("graded") == 12
        assert first.counts.total("graded") < 12
    more = await rollouts(client, *["4"] * 6)
    async with working(client, own.exact, part=(0, 2), patience=0.1):
        await judged(client, more, 6)
    every = await client.query_rewards(ids + more, all_revisions=True)
    assert [reward.revision for reward in every] == [1] * 18


async def test_its_credential_lets_a_worker_do_nothing_else(client: StoreClient) -> None:
    credential = await client.create_grader_credential()
    async with StoreClient(client.target, run_id="g", credential=credential) as own_client:
        with pytest.raises(NotPermitted):
            await own_client.enqueue_rollout(input={})
        with pytest.raises(NotPermitted):
            await own_client.create_grader_credential()


async def _cli(*arguments: str) -> tuple[int, str]:
    result = await asyncio.to_thread(CliRunner().invoke, app, list(arguments))
    return result.exit_code, result.stdout


async def test_a_run_is_graded_anew_and_old_batches_stay(client: StoreClient) -> None:
    ids = await rollouts(client, "4", "5")
    path = "tests.grader.own_graders:"
    code, told = await _cli("g", "--grader", f"{path}exact", "--store", client.target, "--json")
    assert (code, json.loads(told)["outcomes"]) == (0, {"exact": {"graded": 2}})
    rules = batch_pb2.SampleRules(reward_name="exact")
    made = await client.create_training_run(TrainingRun(training_run_id="tr", run_id="g", algorithm="verl"))
    held = await client.acquire_training_run(made.training_run_id, "t")
    old = await client.claim_batch("tr", held.trainer_epoch, 0, ids, rules=rules)
    assert [entry.reward for entry in old.entries] == [1.0, 0.0]
    for _ in range(2):  # a second time there is nothing left to do
        code, told = await _cli("g", "--grader", f"{path}generous", "--store", client.target, "--json")
        assert code == 0
    assert json.loads(told)["outcomes"] == {"exact": {"cached": 2}}
    again = await client.get_batch(old.batch_id)
    assert again is not None
    assert (again.content_hash, [entry.reward for entry in again.entries]) == (old.content_hash, [1.0, 0.0])
    await client.release_batches("tr", held.trainer_epoch, [old.batch_id])
    new = await client.claim_batch("tr", held.trainer_epoch, 1, ids, rules=rules)
    assert [(entry.reward, entry.reward_revision) for entry in new.entries] == [(1.0, 2), (1.0, 2)]
    code, told = await _cli("g", "--grader", f"{path}nan", "--store", client.target)
    assert (code, told) == (1, "2 rollouts\nnan: 2 not_finite\n")


async def _start(client: StoreClient, *options: str) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "agl_grpc_cli", "grader", "start", "tests.grader.own_graders:slow"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "cli")])}
    return await asyncio.create_subprocess_exec(
        *command, "--store", client.target, "--run", "g", *options, cwd=ROOT, env=environment
    )


async def test_a_killed_worker_loses_no_verdict_and_its_successor_doubles_none(client: StoreClient) -> None:
    """`agl-grpc grader start`, killed in the middle of its work, started again, and asked to end."""
    ids = await rollouts(client, *["4"] * 40)
    first = await _start(client, "--processes", "1", "--await")
    try:
        await judged(client, ids, 3)
        first.kill()
        await first.wait()
        before = await client.query_rewards(ids)
        assert len(before) < 40
        run = await client.get_run_by_id("g")
        assert run is not None
        assert [(each.name, each.version) for each in run.graders] == [("slow", "1")]
        second = await _start(client, "--processes", "2")
        try:
            await judged(client, ids, 40)
            late = await rollouts(client, "5")
            (sealed,) = await client.wait_for_rollouts(rollout_ids=late, until="sealed", timeout=60)
            assert sealed.rollout_id == late[0]
            second.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(second.wait(), 30) == 0
        finally:
            if second.returncode is None:
                second.kill()
                await second.wait()
    finally:
        if first.returncode is None:
            first.kill()
            await first.wait()
    every = await client.query_rewards([*ids, *late], all_revisions=True)
    assert sorted(each.rollout_id for each in every) == sorted([*ids, *late])
    assert {each.revision for each in every} == {1}
    kept = {each.rollout_id: each.metadata for each in every}
    assert all(kept[each.rollout_id] == each.metadata for each in before)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tests.grader.own_graders:nobody"], "nobody"),
        (["tests.grader.own_graders:exact", "--part", "3/2"], "--part '3/2': write I/N"),
        (
            ["tests.grader.own_graders:exact", "tests.grader.own_graders:generous"],
            "two graders are named exact",
        ),
        (["tests.grader.own_graders:exact", "--tokenizer", "no/such"], "tokenizer 'no/such' cannot be used"),
    ],
)
def test_a_wrong_command_is_one_line(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(start_app, ["start", *arguments])
    assert isinstance(result.exception, CliError)
    assert said in str(result.exception)
    assert "\n" not in str(result.exception)
