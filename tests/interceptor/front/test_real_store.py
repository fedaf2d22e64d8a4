"""Before the real store: attempts that are over, resources, credentials, traffic without attribution."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from agl_grpc.client import StoreClient
from agl_grpc.model import AttemptedRollout, ProxyLLM, RolloutConfig, RolloutMode
from agl_grpc.v1 import run_pb2, store_service_pb2, trainer_service_pb2
from tests.interceptor.front.fake_engine import FakeEngine
from tests.interceptor.front.rig import CHAT, HELLO, Rig, proxy_before
from tests.support.store_process import StoreProcess
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    with StoreProcess(tmp_path_factory.mktemp("store") / "store.db") as started:
        yield started


@pytest.fixture
async def store(server: StoreProcess) -> AsyncIterator[StoreClient]:
    async with StoreClient(server.address, run_id=f"run-{uuid.uuid4().hex[:8]}") as client:
        request = store_service_pb2.CreateRunRequest(run=run_pb2.Run(run_id=client.run_id))
        await client.call(client.bound.store.CreateRun, request)
        yield client


def base_of(rig: Rig, rollout: AttemptedRollout) -> str:
    return rig.base(rollout.rollout_id, rollout.attempt.attempt_id)


async def calls_of(store: StoreClient, rollout_id: str, count: int = 1) -> list[Any]:
    """The model calls of a rollout, once so many are in the store."""

    async def found() -> list[Any] | None:
        spans = await store.query_spans(rollout_id)
        calls = [span.model_call for span in spans if span.model_call is not None]
        return calls if len(calls) >= count else None

    calls = await eventually(found, what=f"{count} calls in the store")
    assert calls is not None
    return calls


async def test_an_attempt_that_is_over_is_a_409_that_sdks_do_not_repeat(
    server: StoreProcess, store: StoreClient, engine: FakeEngine, tmp_path: Path
) -> None:
    async with proxy_before(server.address, tmp_path, engine) as rig:
        rollout = await store.start_rollout(input="task", mode=RolloutMode.TRAIN)
        assert (await rig.chat(base_of(rig, rollout))).status_code == 200
        await calls_of(store, rollout.rollout_id)
        await store.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="succeeded")

        async def refused() -> bool:
            return (await rig.chat(base_of(rig, rollout))).status_code == 409

        await eventually(refused, what="the attempt's end is known")
        before = rig.state()["requests"]
        async with openai.AsyncOpenAI(base_url=base_of(rig, rollout) + "/v1", api_key="x") as client:
            with pytest.raises(openai.ConflictError, match=r"is over \(succeeded\).*stop"):
                await client.chat.completions.create(model="tiny", messages=HELLO["messages"])
        assert rig.state()["requests"] == before + 1
        # Another proxy, which never saw the attempt alive.
        async with proxy_before(server.address, tmp_path / "other", engine) as other:
            assert (await other.chat(base_of(other, rollout))).status_code == 409
            unknown = await other.chat(other.base("ro-no", "at-no"))
            assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "attempt_unknown")
            assert other.state()["refusals"] == {"attempt_ended": 1, "attempt_unknown": 1}

        # One record of each proxy's, however often the agent asked. Calls may have been served before that.
        async def recorded() -> list[str] | None:
            spans = await store.query_spans(rollout.rollout_id)
            failed = [
                one for one in spans if one.model_call is not None and one.model_call.outcome == "error"
            ]
            return [str(one.status.description) for one in failed] if len(failed) >= 2 else None

        refusals = await eventually(recorded, what="both refusals in the store")
        assert refusals is not None
        assert [reason[:5] for reason in refusals] == ["409: ", "409: "]


async def test_a_superseded_attempt_is_refused_and_the_new_one_served(
    server: StoreProcess, store: StoreClient, engine: FakeEngine, tmp_path: Path
) -> None:
    async with proxy_before(server.address, tmp_path, engine) as rig:
        config = RolloutConfig(max_attempts=3, retry_condition=["unresponsive"])
        first = await store.start_rollout(input="task", config=config)
        assert (await rig.chat(base_of(rig, first))).status_code == 200
        await store.update_attempt(first.rollout_id, first.attempt.attempt_id, status="unresponsive")
        second = await store.start_attempt(first.rollout_id)

        async def refused() -> bool:
            return (await rig.chat(base_of(rig, first))).status_code == 409

        await eventually(refused, what="the old attempt is refused")
        assert (await rig.chat(base_of(rig, second))).status_code == 200


async def test_sampling_comes_from_the_resource_by_mode(
    server: StoreProcess, store: StoreClient, engine: FakeEngine, tmp_path: Path
) -> None:
    sampling = {"temperature": 0.8, "val": {"temperature": 0.0, "max_tokens": 5}}
    llm = ProxyLLM(endpoint="http://proxy/v1", model="tiny", sampling_parameters=sampling)
    await store.add_resources({"main_llm": llm})
    async with proxy_before(server.address, tmp_path, engine, logprobs_mode="processed") as rig:
        for mode in (RolloutMode.TRAIN, RolloutMode.VAL):
            rollout = await store.start_rollout(input="task", mode=mode)
            assert (await rig.chat(base_of(rig, rollout), temperature=0.3)).status_code == 200
            (call,) = await calls_of(store, rollout.rollout_id)
            assert call.mode == mode
            assert call.sampling["requested.temperature"] == 0.3
            assert call.logprob_semantics == "processed"
    assert [body["temperature"] for body in engine.requests] == [0.8, 0.0]
    assert [body.get("max_tokens") for body in engine.requests] == [None, 5]


async def test_a_credential_attributes_and_forged_or_foreign_ones_are_refused(
    server: StoreProcess, store: StoreClient, engine: FakeEngine, tmp_path: Path
) -> None:
    async with proxy_before(server.address, tmp_path, engine) as rig:
        rollouts = [await store.start_rollout(input="task") for _ in range(2)]
        good = rollouts[0].attempt_credential
        assert good

        async def status(key: str, base: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            return (await rig.http.post(base + CHAT, json=HELLO, headers=headers)).status_code

        assert await status(good, rig.proxy.url) == 200
        assert await status(good, base_of(rig, rollouts[0])) == 200
        assert await status(good, base_of(rig, rollouts[1])) == 403
        assert await status(good[:-2] + "xx", rig.proxy.url) == 401
        assert rig.state()["refusals"] == {"wrong_attempt": 1, "invalid_api_key": 1}
        await calls_of(store, rollouts[0].rollout_id, 2)
    assert all("authorization" not in headers for headers in engine.headers)


async def test_traffic_without_attribution_becomes_rollouts_of_a_run_of_its_own(
    server: StoreProcess, store: StoreClient, engine: FakeEngine, tmp_path: Path
) -> None:
    run = f"outside-{uuid.uuid4().hex[:6]}"
    settings = {"unattributed": "record", "external_run": run}
    async with proxy_before(server.address, tmp_path, engine, **settings) as rig:
        await asyncio.gather(*(rig.chat(rig.proxy.url) for _ in range(2)))
        for _ in range(2):
            headers = {"x-agl-session": "user-7"}
            await rig.http.post(rig.proxy.url + CHAT, json=HELLO, headers=headers)
        await eventually(lambda: rig.state()["external_recorded"] == 4, what="four calls are recorded")
    assert all(body["messages"] == HELLO["messages"] for body in engine.requests)
    async with StoreClient(server.address, run_id=run) as outside:

        async def sealed() -> Any:
            found = await outside.query_rollouts()
            return found if all(rollout.status == "succeeded" for rollout in found) else None

        rollouts = await eventually(sealed, what="the rollouts have ended")
        counts = sorted(
            [len([s for s in await outside.query_spans(r.rollout_id) if s.model_call]) for r in rollouts]
        )
    assert counts == [1, 1, 2]


async def test_a_policy_version_that_changes_during_a_call_is_ambiguous(
    server: StoreProcess, store: StoreClient, engine: FakeEngine, tmp_path: Path
) -> None:
    async def commit(version: int) -> None:
        trainer = store.bound.trainer
        named = {"run_id": store.run_id, "model": "tiny", "policy_version": version}
        digest = f"sha256:{version:064d}"
        await store.call(
            trainer.PreparePolicyVersion, trainer_service_pb2.PreparePolicyVersionRequest(**named)
        )
        await store.call(
            trainer.CommitPolicyVersion,
            trainer_service_pb2.CommitPolicyVersionRequest(**named, weights_digest=digest),
        )

    await commit(3)
    async with proxy_before(server.address, tmp_path, engine, run_id=store.run_id) as rig:
        rollout = await store.start_rollout(input="task", mode=RolloutMode.TRAIN)

        async def version_three() -> bool:
            await rig.chat(base_of(rig, rollout))
            calls = await calls_of(store, rollout.rollout_id)
            return bool(calls[-1].choices[0].policy_runs[0].policy_version == 3)

        await eventually(version_three, what="the committed version is known")
        before = len(await calls_of(store, rollout.rollout_id))
        engine.gate.clear()
        asked = len(engine.requests)
        call = asyncio.create_task(rig.chat(base_of(rig, rollout)))
        await eventually(lambda: len(engine.requests) > asked, what="the request")
        await commit(4)
        await eventually(lambda: rig.state()["policy_versions"] == {"tiny": 4}, what="version 4 is known")
        engine.gate.set()
        await call
        last = (await calls_of(store, rollout.rollout_id, before + 1))[-1]
    assert last.untrainable_reason == "ambiguous policy version: 3 at the start, 4 at the end"
    assert last.choices[0].policy_runs == []
