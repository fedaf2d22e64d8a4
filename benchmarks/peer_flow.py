"""Runs where agentlightning 0.3.0 is installed: its own client, many lives at once, against a store.

Arguments: the store's address, how many lives at once, seconds. Prints lives a second.
"""

from __future__ import annotations

import asyncio
import sys
import time

from agentlightning.store.client_server import LightningStoreClient
from agentlightning.types import Span

_SPANS = 4
_ATTRIBUTES = {f"attribute.{number}": "x" * 100 for number in range(8)}


async def life(store: LightningStoreClient) -> None:
    """A rollout is started, writes four spans and succeeds."""
    rollout = await store.start_rollout({"question": "12 + 30"}, mode="train")
    key = (rollout.rollout_id, rollout.attempt.attempt_id)
    for number in range(_SPANS):
        await store.add_span(
            Span.from_attributes(
                attributes=_ATTRIBUTES,
                rollout_id=key[0],
                attempt_id=key[1],
                sequence_id=number + 1,
                name="step",
                start_time=time.time(),
                end_time=time.time(),
            )
        )
    await store.update_attempt(*key, status="succeeded")


async def main() -> None:
    """Lives one after the other in each of many loops."""
    address, at_once, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    store = LightningStoreClient(address)
    await life(store)
    begun = time.perf_counter()
    count = 0

    async def live() -> None:
        nonlocal count
        while time.perf_counter() - begun < seconds:
            await life(store)
            count += 1

    await asyncio.gather(*(live() for _ in range(at_once)))
    took = time.perf_counter() - begun
    await store.close()
    print(count / took)


asyncio.run(main())
