"""Work of a release's Python client with a server: `python -m tests.contract.released_session ADDRESS`.

It runs with the release's modules and uses only what that release has.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable

from agl_grpc.client import (
    Completion,
    Delivered,
    LeasedRollout,
    LeaseStream,
    NotFound,
    SpanGroup,
    SpanStreamer,
    StoreClient,
)
from agl_grpc.model import EnqueueRolloutRequest, Reward, Span


async def main(address: str) -> None:
    """A rollout is leased, gets a span and a reward, is completed and read back; an unknown id is named."""
    async with StoreClient(address) as client:
        assert (await client.get_server_info()).contract_version == "v1"
        (made,) = await client.enqueue_many_rollouts([EnqueueRolloutRequest(input={"q": "1+1"})])
        async with LeaseStream(client, worker_id="released", credits=1) as stream:
            work = await _delivered(stream)
            assert (work.rollout.rollout_id, work.rollout.input) == (made.rollout_id, {"q": "1+1"})
            place = {"rollout_id": made.rollout_id, "attempt_id": work.attempt_id}
            async with SpanStreamer(client) as spans:
                ack = await spans.send([SpanGroup(**place, spans=[Span(**place, name="thought")])])
                assert not ack.rejected
            await stream.complete(Completion(lease=work.lease, rewards=[Reward(**place, value=0.5)]))
        assert [span.name for span in await client.query_spans(made.rollout_id)] == ["thought"]
        assert [reward.value for reward in await client.query_rewards([made.rollout_id])] == [0.5]
        assert await _reason(client.start_attempt("ro-none")) == "ENTITY_NOT_FOUND"


async def _reason(call: Awaitable[object]) -> str:
    try:
        await call
    except NotFound as error:
        return error.reason
    return "it went through"


async def _delivered(stream: LeaseStream) -> LeasedRollout:
    async for event in stream:
        if isinstance(event, Delivered):
            return event.work
    raise AssertionError("the stream ended")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
