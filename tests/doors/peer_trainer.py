"""Runs in an environment with the released agentlightning 0.3.0: its Trainer and its runner on our store.

Called with the address of the HTTP door. The store is not managed by the strategy: it is ours. Prints one
JSON object at its end.
"""

from __future__ import annotations

import asyncio
import json
import sys

import agentlightning as agl
from agentlightning.store.client_server import LightningStoreClient

TASKS = 6


@agl.rollout
async def agent(task: int, prompt_template: agl.PromptTemplate) -> float:
    """An agent that emits a message, works in an operation and returns its reward."""
    agl.emit_message(f"task {task}")
    with agl.operation(name="think") as operation:
        operation.set_output(prompt_template.format(number=task))
    if task == 3:
        raise ValueError("this task fails")
    return task / 10


@agl.algo
async def algorithm(*, store: agl.LightningStore, train_dataset: list[int], adapter: object) -> None:
    """Publishes resources, enqueues every task, waits, and looks at what came back."""
    resources = await store.add_resources(
        {"prompt_template": agl.PromptTemplate(template="n={number}", engine="f-string")}
    )
    made = [
        await store.enqueue_rollout(task, mode="train", resources_id=resources.resources_id)
        for task in train_dataset
    ]
    ids = [rollout.rollout_id for rollout in made]
    ended: list[agl.Rollout] = []
    while len(ended) < len(ids):
        ended = list(await store.wait_for_rollouts(rollout_ids=ids, timeout=0.1))
        await asyncio.sleep(0.05)
    rewards = {}
    for rollout in ended:
        spans = await store.query_spans(rollout.rollout_id, attempt_id="latest")
        names = [span.name for span in spans]
        assert names.count("agentlightning.message") == 1, names
        assert names.count("agentlightning.operation") == 1, names
        assert [span.sequence_id for span in spans] == sorted({span.sequence_id for span in spans})
        rewards[rollout.input] = agl.find_final_reward(spans)
        assert rollout.status == ("failed" if rollout.input == 3 else "succeeded")
    assert rewards == {task: None if task == 3 else task / 10 for task in train_dataset}
    # Two runners, whose heartbeats take a moment; the test that started us ends a wait in vain.
    while sum(bool(worker.heartbeat_stats) for worker in await store.query_workers()) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.05)  # over HTTP nothing is pushed


async def step(address: str) -> None:
    """The runner by itself, with one task."""
    store = LightningStoreClient(address)
    runner = agl.LitAgentRunner(tracer=agl.OtelTracer())
    with runner.run_context(agent=agent, store=store):
        rollout = await runner.step(
            7, resources={"prompt_template": agl.PromptTemplate(template="{number}", engine="f-string")}
        )
    assert rollout.status == "succeeded"
    spans = await store.query_spans(rollout.rollout_id)
    assert agl.find_final_reward(spans) == 0.7
    await store.close()


def main() -> None:
    """The trainer with two runner processes, then the runner alone."""
    address = sys.argv[1]
    trainer = agl.Trainer(
        algorithm=algorithm,
        store=LightningStoreClient(address),
        strategy=agl.ClientServerExecutionStrategy(role="both", n_runners=2, managed_store=False),
        tracer=agl.OtelTracer(),
        runner={"type": "agentlightning.LitAgentRunner", "poll_interval": 0.2, "heartbeat_interval": 1.0},
        n_runners=2,
    )
    trainer.fit(agent, list(range(TASKS)))
    asyncio.run(step(address))
    print(json.dumps({"trained": TASKS}))


if __name__ == "__main__":
    main()
