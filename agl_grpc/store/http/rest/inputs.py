"""Large inputs: the contract keeps them as blobs (R32), REST takes and shows them as they are."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Any, TypeVar

from agl_grpc.store import limits
from agl_grpc.store.blobs import PIECE_BYTES
from agl_grpc.store.door.methods import Metadata, Methods
from agl_grpc.store.http.request import BODY_BYTES
from agl_grpc.store.http.rest import show
from agl_grpc.store.http.routing import Answer
from agl_grpc.v1 import common_pb2, store_service_pb2

SHOWN_BYTES = BODY_BYTES
"""Largest input that is shown; one request cannot bring more either."""

_BLOB = "blob_digest"

T = TypeVar("T")


class Inputs:
    """Puts inputs above 1 MiB into blobs and fetches them again."""

    def __init__(self, methods: Methods) -> None:
        self._methods = methods

    async def spill(self, payloads: Iterable[common_pb2.Payload], metadata: Metadata) -> None:
        """Turns payloads that are too large into blobs; changes them in place."""
        for payload in payloads:
            if len(payload.data) <= limits.PAYLOAD_BYTES:
                continue
            call = self._methods.call_of("PutBlob", metadata)
            put = self._methods.streaming("PutBlob")
            stored = await put(_Pieces(payload.data), call)
            payload.blob_digest = stored.digest

    async def fill(self, payloads: Iterable[common_pb2.Payload], metadata: Metadata) -> None:
        """Turns blobs into the data that they stand for, in place; above `SHOWN_BYTES` they stay so."""
        call = self._methods.call_of("GetRollout", metadata)
        get = self._methods.streaming("GetBlob")
        for payload in payloads:
            if payload.WhichOneof("content") != _BLOB:
                continue
            pieces, size = list[bytes](), 0
            async for piece in get(store_service_pb2.GetBlobRequest(digest=payload.blob_digest), call):
                size += len(piece.chunk)
                if size > SHOWN_BYTES:
                    break
                pieces.append(piece.chunk)
            else:
                payload.data = b"".join(pieces)

    def answer(
        self,
        items: Sequence[T],
        input_of: Callable[[T], common_pb2.Payload],
        shown: Callable[[T], Any],
        metadata: Metadata,
        before: bytes = b"",
        behind: bytes = b"",
    ) -> Answer:
        """A list with inputs of any size. With blobs in it, it is made while it is sent, one item at a time.

        Args:
            items: What the list holds; blobs are put in place.
            input_of: The input of an item.
            shown: An item as JSON.
            metadata: Who asks.
            before: JSON that stands before the list.
            behind: JSON that stands behind it.
        """
        if all(input_of(item).WhichOneof("content") != _BLOB for item in items):
            return Answer(before + show.dump([shown(item) for item in items]) + behind)

        async def pieces() -> AsyncGenerator[bytes, None]:
            yield before + b"["
            for place, item in enumerate(items):
                payload = input_of(item)
                await self.fill([payload], metadata)
                yield (b"," if place else b"") + show.dump(shown(item))
                payload.ClearField("data")
            yield b"]" + behind

        return Answer(pieces())


class _Pieces:
    """What a caller of PutBlob says: the digest, then the content."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._next = -PIECE_BYTES

    async def read(self) -> store_service_pb2.PutBlobRequest | None:
        """The next message; None = that was all."""
        begin, self._next = self._next, self._next + PIECE_BYTES
        if begin < 0:
            digest = hashlib.sha256(self._data).hexdigest()
            return store_service_pb2.PutBlobRequest(digest=f"sha256:{digest}")
        if begin >= len(self._data):
            return None
        return store_service_pb2.PutBlobRequest(chunk=self._data[begin : begin + PIECE_BYTES])
