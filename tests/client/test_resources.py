"""Resources and watches against a real server."""

from __future__ import annotations

import asyncio
from typing import Any

from agl_grpc.client import StoreClient
from agl_grpc.model import LLM, EnqueueRolloutRequest, PromptTemplate
from agl_grpc.store.door.app import StoreServer
from tests.client.flaky import FlakyProxy
from tests.support.waiting import eventually


async def test_resources(client: StoreClient) -> None:
    assert await client.get_latest_resources() is None
    first = await client.add_resources({"main": LLM(endpoint="http://x/v1", model="m")})
    second = await client.update_resources("prompts", {"p": PromptTemplate(template="{x}")})
    assert (first.version, second.resources_id, second.version) == (1, "prompts", 1)
    third = await client.update_resources("prompts", {"p": PromptTemplate(template="{y}")})
    assert third.version == 2
    assert await client.get_latest_resources() == third
    assert await client.get_resources_by_id("prompts") == third
    assert await client.get_resources_by_id("prompts", version=1) == second
    assert await client.get_resources_by_id("unknown") is None
    assert {update.resources_id for update in await client.query_resources()} == {
        first.resources_id,
        "prompts",
    }
    assert [u.version for u in await client.query_resources(resources_id="prompts", all_versions=True)] == [
        1,
        2,
    ]
    rollout = await client.enqueue_rollout(1)
    assert (rollout.resources_id, rollout.resources_version) == ("prompts", 2)


async def test_watches_tell_every_change(client: StoreClient) -> None:
    seen: list[tuple[str, str]] = []
    published: list[int] = []
    old = await client.enqueue_rollout("old")

    async def rollouts() -> None:
        async for change in client.watch_rollouts(include_existing=True):
            seen.extend((rollout.rollout_id, str(rollout.status)) for rollout in change.items)

    async def resources() -> None:
        async for change in client.watch_resources(include_latest=True):
            published.extend(update.version for update in change.items)

    await client.update_resources("rs", {})
    watchers = [asyncio.create_task(rollouts()), asyncio.create_task(resources())]
    try:
        await eventually(lambda: (old.rollout_id, "queuing") in seen, what="the existing rollout")
        await eventually(lambda: published == [1], what="the latest publication")
        new = await client.start_rollout("new")
        await client.update_resources("rs", {})
        await client.update_attempt(new.rollout_id, "latest", status="succeeded")
        await eventually(lambda: (new.rollout_id, "succeeded") in seen, what="the new rollout's end")
        await eventually(lambda: published == [1, 2], what="the new publication")
    finally:
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)


class Noting(StoreClient):
    """Says when its first call was answered."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.answered = asyncio.Event()

    async def call(self, *args: Any, **named: Any) -> Any:
        answer = await super().call(*args, **named)
        self.answered.set()
        return answer


async def test_a_watch_from_now_on_has_no_gap_when_its_first_stream_breaks(
    store: StoreServer, client: StoreClient
) -> None:
    seen: list[int] = []
    async with FlakyProxy(store.address) as proxy:
        through = Noting(proxy.address)

        async def watch() -> None:
            async for change in through.watch_resources():
                seen.extend(update.version for update in change.items)

        await client.update_resources("rs", {})
        watching = asyncio.create_task(watch())
        try:
            # It knows where it begins; its stream is open or about to be.
            await asyncio.wait_for(through.answered.wait(), 30)
            proxy.cut(refuse=True)
            await client.update_resources("rs", {})
            proxy.accept()
            what = "the publication while the stream was down"
            await eventually(lambda: seen == [2], within=30.0, what=what)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        await through.close()


async def test_a_watch_that_breaks_amid_what_exists_begins_again(
    store: StoreServer, client: StoreClient
) -> None:
    inputs = [{"n": n, "ballast": "x" * 40_000} for n in range(450)]  # three pages, too large to be under way
    for start in range(0, len(inputs), 50):
        await client.enqueue_many_rollouts(
            [EnqueueRolloutRequest(input=each) for each in inputs[start : start + 50]]
        )
    seen: set[int] = set()
    async with FlakyProxy(store.address) as proxy:
        through = StoreClient(proxy.address)
        async for change in through.watch_rollouts(include_existing=True):
            if not seen:
                proxy.cut()
            seen.update(attempted.input["n"] for attempted in change.items)
            if change.cursor:
                break
        assert proxy.connections > 1
        await through.close()
    assert len(seen) == len(inputs)
