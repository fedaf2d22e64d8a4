"""Large inputs travel as blobs by themselves; blobs by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agl_grpc.client import Completion, InvalidRequest, NotFound, StoreClient
from agl_grpc.model import BlobReference, EnqueueRolloutRequest

MIB = 1 << 20


async def test_blobs_by_name(client: StoreClient, tmp_path: Path) -> None:
    data = os.urandom(2 * MIB + 5)
    reference = await client.put_blob(data)
    (tmp_path / "file").write_bytes(data)
    assert await client.put_blob(tmp_path / "file") == reference
    assert await client.get_blob(reference.digest) == data
    assert b"".join([piece async for piece in client.read_blob(reference.digest, offset=MIB)]) == data[MIB:]
    assert await client.load(reference) == data
    assert await client.load({"a": 1}) == {"a": 1}
    with pytest.raises(NotFound):
        await client.get_blob(f"sha256:{'0' * 64}")
    with pytest.raises(InvalidRequest):
        await client.get_blob("nonsense")


async def test_a_large_input_reaches_whoever_takes_it(client: StoreClient) -> None:
    large, small = {"text": "x" * (2 * MIB), "n": [1, None]}, {"text": "y"}
    queued = await client.enqueue_many_rollouts(
        [EnqueueRolloutRequest(input=value) for value in (large, small, large)]
    )
    assert [type(rollout.input) for rollout in queued] == [BlobReference, dict, BlobReference]
    assert (await client.statistics())["total_blobs"] == 1
    taken = await client.dequeue_many_rollouts(limit=1)
    leased = await client.lease_rollouts("w", "s", limit=2)
    assert [rollout.input for rollout in taken] == [large]
    assert [work.rollout.input for work in leased] == [small, large]
    found = await client.get_rollout_by_id(queued[2].rollout_id)
    assert found is not None
    assert found.input == large
    started = await client.start_rollout(large)
    assert started.input == large
    assert (await client.start_attempt(started.rollout_id)).input == large
    changed = await client.update_rollout(started.rollout_id, input="z" * (2 * MIB))
    assert isinstance(changed.input, BlobReference)
    (done,) = await client.complete_attempts("w", [Completion(lease=leased[0].lease, output="o" * (2 * MIB))])
    assert not isinstance(done, Exception)
    assert (await client.statistics())["total_blobs"] == 3


async def test_many_middling_inputs_fit_into_one_call(client: StoreClient) -> None:
    inputs = [os.urandom(900_000) for _ in range(80)]
    queued = await client.enqueue_many_rollouts([EnqueueRolloutRequest(input=value) for value in inputs])
    assert {type(rollout.input) for rollout in queued} == {BlobReference, bytes}
    taken = await client.dequeue_many_rollouts(limit=80)
    assert [rollout.input for rollout in taken] == inputs


async def test_lists_of_large_inputs_come_in_smaller_pages(client: StoreClient) -> None:
    data = os.urandom(1 << 20)
    for _ in range(3):
        await client.enqueue_many_rollouts([EnqueueRolloutRequest(input=data) for _ in range(25)])
    found = await client.query_rollouts()
    assert [rollout.input == data for rollout in found] == [True] * 75
