"""PutBlob and GetBlob: content under its hash, kept while a rollout needs it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from agl_grpc.store import blobs
from agl_grpc.v1 import common_pb2, rollout_pb2, runner_service_pb2, store_service_pb2
from tests.store.rig import Rig, reason

Request = store_service_pb2.PutBlobRequest
MIB = 1 << 20


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


async def put(rig: Rig, data: bytes, *, digest: str = "", chunk: int = 700_000) -> Any:
    async def requests() -> AsyncIterator[Request]:
        yield Request(digest=digest or digest_of(data))
        for start in range(0, len(data), chunk):
            yield Request(chunk=data[start : start + chunk])

    return await rig.store.PutBlob(requests())


async def get(rig: Rig, digest: str, offset: int = 0) -> list[bytes]:
    call = rig.store.GetBlob(store_service_pb2.GetBlobRequest(digest=digest, offset=offset))
    return [message.chunk async for message in call]


async def count(rig: Rig, table: str) -> int:
    return int(
        await rig.server.store.read(lambda db: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
    )


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB + 17])
async def test_what_was_put_is_got(rig: Rig, size: int) -> None:
    data = os.urandom(size)
    answer = await put(rig, data)
    assert (answer.digest, answer.size) == (digest_of(data), size)
    pieces = await get(rig, answer.digest)
    assert b"".join(pieces) == data
    assert all(len(piece) <= MIB for piece in pieces)
    for offset in {0, size // 2, max(0, size - 1), size}:
        assert b"".join(await get(rig, answer.digest, offset)) == data[offset:]
    assert await count(rig, "blob_pieces") == -(-size // MIB)


async def test_the_same_content_is_stored_once(rig: Rig) -> None:
    data = os.urandom(2 * MIB)
    first, second = await put(rig, data), await put(rig, data, chunk=MIB)
    assert first == second
    assert (await count(rig, "blobs"), await count(rig, "blob_pieces")) == (1, 2)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "digest must be sent first"),
        ([Request(chunk=b"x")], "digest must be sent first"),
        ([Request(digest="sha256:short")], "digest must be"),
        ([Request(digest=digest_of(b"a").upper())], "digest must be"),
        ([Request(digest=digest_of(b"a")), Request(chunk=b"b")], "digest is not that of the content"),
        ([Request(digest=digest_of(b"a"))], "digest is not that of the content"),
        ([Request(digest=digest_of(b"a")), Request()], "must be `chunk`"),
        ([Request(digest=digest_of(b"a")), Request(chunk=bytes(MIB + 1))], "chunk has 1048577 bytes"),
        ([Request(digest=digest_of(b"a")), *[Request(chunk=bytes(MIB))] * 3], "digest is not that of"),
    ],
)
async def test_what_is_no_blob_is_refused_and_leaves_nothing(
    rig: Rig, messages: list[Request], words: str
) -> None:
    async def requests() -> AsyncIterator[Request]:
        for message in messages:
            yield message

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.store.PutBlob(requests())
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert words in str(caught.value.details())
    assert reason(caught.value) == "INVALID_FIELD"
    await rig.server.store.write(lambda tx: None)  # the clean-up was queued before this
    await rig.server.store.write(lambda tx: None)
    assert (await count(rig, "blobs"), await count(rig, "blob_pieces")) == (0, 0)


async def test_reading_what_is_not_there(rig: Rig) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await get(rig, digest_of(b"nothing"))
    assert reason(caught.value) == "ENTITY_NOT_FOUND"
    answer = await put(rig, b"four")
    for offset in (-1, 5):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await get(rig, answer.digest, offset)
        assert reason(caught.value) == "INVALID_FIELD"


async def test_a_rollout_keeps_its_blobs(rig: Rig) -> None:
    day = blobs.KEEP / 1e6
    contents = (b"input" * MIB, b"output", b"nobody's" * MIB)
    wanted, output, unwanted = [(await put(rig, data)).digest for data in contents]
    spec = rollout_pb2.RolloutSpec(rollout_id="ro-1", input=common_pb2.Payload(blob_digest=wanted))
    await rig.enqueue(spec)
    (leased,) = await rig.lease()
    assert leased.rollout.input.blob_digest == wanted
    completion = runner_service_pb2.Completion(output=common_pb2.Payload(blob_digest=output))
    await rig.complete(leased, output=completion.output)
    rig.clock.advance(day + 1)  # type: ignore[attr-defined]  # the rig's clock is a ManualClock
    assert await rig.server.store.maintenance.exhaust(blobs.prune) == 1
    with pytest.raises(grpc.aio.AioRpcError):
        await get(rig, unwanted)
    assert b"".join(await get(rig, wanted)) == b"input" * MIB
    chosen = rollout_pb2.RolloutFilter(rollout_id_in=["ro-1"])
    assert (
        await rig.store.DeleteRollouts(store_service_pb2.DeleteRolloutsRequest(filter=chosen))
    ).deleted == 1
    assert await rig.server.store.maintenance.exhaust(blobs.prune) == 2
    assert (await count(rig, "blobs"), await count(rig, "blob_pieces")) == (0, 0)


async def test_a_blob_that_is_put_again_stays(rig: Rig) -> None:
    answer = await put(rig, b"again")
    rig.clock.advance(blobs.KEEP / 1e6 + 1)  # type: ignore[attr-defined]  # the rig's clock is a ManualClock
    await put(rig, b"again")
    assert await rig.server.store.maintenance.exhaust(blobs.prune) == 0
    assert await get(rig, answer.digest) == [b"again"]


async def test_an_unknown_blob_is_no_input_and_no_output(rig: Rig) -> None:
    missing = common_pb2.Payload(blob_digest=digest_of(b"missing"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.enqueue(rollout_pb2.RolloutSpec(input=missing))
    assert reason(caught.value) == "ENTITY_NOT_FOUND"
    await rig.enqueue(rollout_id="ro-1")
    (leased,) = await rig.lease()
    (refused,) = await rig.complete(leased, output=missing)
    assert refused.error.message.startswith("blob")
    (done,) = await rig.complete(leased)
    assert not done.HasField("error")
