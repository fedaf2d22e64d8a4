"""Blobs: data above 1 MiB, stored once under the hash of its content."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from agl_grpc.client.channel import call_with_retries
from agl_grpc.client.connection import Connection
from agl_grpc.client.watch import resumed
from agl_grpc.model.rollout import Rollout
from agl_grpc.model.value import OCTETS, BlobReference, from_payload
from agl_grpc.v1 import common_pb2
from agl_grpc.v1 import store_service_pb2 as pb

RolloutT = TypeVar("RolloutT", bound=Rollout)

INLINE_BYTES = 1 << 20
"""Larger payloads travel as blobs."""

_PIECE_BYTES = 1 << 20
_MESSAGE_BYTES = 32 << 20
_WORTH_BYTES = 4 << 10


class BlobCalls(Connection):
    """The client's methods for blobs.

    Inputs above 1 MiB become blobs by themselves when a rollout is made, and values again when it is taken
    or read by its id; lists and watches show them as `BlobReference`.
    """

    async def put_blob(self, data: bytes | Path, *, media_type: str = OCTETS) -> BlobReference:
        """Store bytes or a file; content that is there already is not sent again."""
        digest = await asyncio.to_thread(_digest, data)

        def attempt(_left: float) -> Awaitable[pb.PutBlobResponse]:
            return self.bound.store.PutBlob(_requests(digest, data), metadata=self.metadata)

        response = await call_with_retries(attempt, self.retry, self.target)
        return BlobReference(response.digest, media_type)

    def read_blob(self, digest: str, *, offset: int = 0) -> AsyncIterator[bytes]:
        """A blob's content from an offset on, piece by piece, resumed after disconnects."""
        return self._pieces(pb.GetBlobRequest(digest=digest, offset=offset))

    async def _pieces(self, request: pb.GetBlobRequest) -> AsyncIterator[bytes]:
        def advance(request: Any, message: Any) -> None:
            request.offset += len(message.chunk)

        async for message in resumed(self, lambda bound: bound.store.GetBlob, request, advance):
            yield message.chunk

    async def get_blob(self, digest: str) -> bytes:
        """A blob's whole content; `NotFound` when there is none."""
        return b"".join([piece async for piece in self.read_blob(digest)])

    async def load(self, value: Any) -> Any:
        """The value that a `BlobReference` stands for; every other value as it is."""
        if not isinstance(value, BlobReference):
            return value
        data = await self.get_blob(value.digest)
        return from_payload(common_pb2.Payload(media_type=value.media_type, data=data))

    async def with_input(self, rollout: RolloutT) -> RolloutT:
        """The rollout, its input loaded when that is a blob."""
        rollout.input = await self.load(rollout.input)
        return rollout

    async def spill(self, payloads: Iterable[common_pb2.Payload]) -> None:
        """Turn payloads that are too large, alone or together, into blobs; changes them in place."""
        inline = [payload for payload in payloads if len(payload.data) > _WORTH_BYTES]
        inline.sort(key=lambda payload: len(payload.data), reverse=True)
        total = sum(len(payload.data) for payload in inline)
        for payload in inline:
            size = len(payload.data)
            if size <= INLINE_BYTES and total <= _MESSAGE_BYTES:
                return
            payload.blob_digest = (await self.put_blob(payload.data)).digest
            total -= size


def _digest(data: bytes | Path) -> str:
    found = hashlib.sha256()
    for piece in _split(data):
        found.update(piece)
    return f"sha256:{found.hexdigest()}"


async def _requests(digest: str, data: bytes | Path) -> AsyncIterator[pb.PutBlobRequest]:
    yield pb.PutBlobRequest(digest=digest)
    for piece in _split(data):
        yield pb.PutBlobRequest(chunk=piece)


def _split(data: bytes | Path) -> Iterator[bytes]:
    if isinstance(data, Path):
        with data.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece
        return
    for start in range(0, len(data), _PIECE_BYTES):
        yield data[start : start + _PIECE_BYTES]
