"""Runs in an environment with the released agentlightning 0.3.0: its legacy client on a store of ours."""

from __future__ import annotations

import asyncio
import json
import sys

from agentlightning import AgentLightningClient, PromptTemplate, RolloutLegacy, Triplet
from agentlightning.store.client_server import LightningStoreClient


async def prepare(address: str) -> None:
    """Publishes resources and enqueues two tasks."""
    store = LightningStoreClient(address)
    await store.add_resources({"p": PromptTemplate(template="hi", engine="f-string")})
    for task in (1, 2):
        await store.enqueue_rollout({"task": task})
    await store.close()


address = sys.argv[1]
asyncio.run(prepare(address))
client = AgentLightningClient(address)
first = client.poll_next_task()
assert first is not None
assert first.input == {"task": 1}
resources = client.get_latest_resources()
assert resources is not None
assert client.get_resources_by_id(first.resources_id or "") == resources
triplet = Triplet(prompt={"token_ids": [1]}, response={"token_ids": [2]}, reward=1.0)
told = client.post_rollout(RolloutLegacy(rollout_id=first.rollout_id, final_reward=1.0, triplets=[triplet]))
assert told is not None
assert told["status"] == "ok"
second = asyncio.run(client.poll_next_task_async())
assert second is not None
assert asyncio.run(client.post_rollout_async(RolloutLegacy(rollout_id=second.rollout_id, final_reward=0.0)))
print(json.dumps({"reported": 2}))
