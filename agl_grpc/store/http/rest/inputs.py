"""Large inputs: the contract keeps them as blobs (R32), REST takes and shows them as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from agl_grpc.store import limits
from agl_grpc.store.blobs import PIECE_BYTES
from agl_grpc.store.door.methods import Metadata, Methods
from agl_grpc.store.http.problems import HttpProblem
from agl_grpc.store.http.request import BODY_BYTES
from agl_grpc.v1 import common_pb2, rollout_pb2, store_service_pb2

SHOWN_BYTES = BODY_BYTES
"""Most bytes of large inputs in one answer; one request cannot bring more either."""


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

    async def fill(self, rollouts: Sequence[rollout_pb2.Rollout], metadata: Metadata) -> bool:
        """Turns blobs into the data that they stand for, in place.

        Returns:
            Whether all were; False = they have more than `SHOWN_BYTES` together, and the last stay so.
        """
        call = self._methods.call_of("GetRollout", metadata)
        get = self._methods.streaming("GetBlob")
        left = SHOWN_BYTES
        for payload in (one.input for one in rollouts):
            if payload.WhichOneof("content") != "blob_digest":
                continue
            pieces: list[bytes] = []
            async for piece in get(store_service_pb2.GetBlobRequest(digest=payload.blob_digest), call):
                left -= len(piece.chunk)
                if left < 0:
                    return False
                pieces.append(piece.chunk)
            payload.data = b"".join(pieces)
        return True

    async def fill_list(self, rollouts: Sequence[rollout_pb2.Rollout], metadata: Metadata) -> None:
        """As `fill`.

        Raises:
            HttpProblem: 400 when the inputs are too large to be shown together.
        """
        if not await self.fill(rollouts, metadata) and len(rollouts) > 1:
            raise HttpProblem(
                400,
                "ANSWER_TOO_LARGE",
                f"the inputs of these rollouts have more than {SHOWN_BYTES} bytes; ask for fewer at once",
                "limit",
            )


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
