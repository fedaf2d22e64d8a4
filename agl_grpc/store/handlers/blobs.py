"""PutBlob and GetBlob: content in pieces of 1 MiB, never more than two of them in memory."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from functools import partial

from agl_grpc.store import blobs, limits
from agl_grpc.store.door.call import Call
from agl_grpc.store.door.service import RequestStream
from agl_grpc.store.errors import StoreError, invalid_field, not_found
from agl_grpc.store.storage.command import Lane
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.store.store import Store
from agl_grpc.v1 import store_service_pb2

Requests = RequestStream[store_service_pb2.PutBlobRequest]
_PIECE_ROWS = 100  # a piece costs the disk about as much as so many rows


class BlobHandlers:
    """Serves the methods about blobs."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._cleanups: set[asyncio.Task[None]] = set()

    async def put_blob(self, stream: Requests, _call: Call) -> store_service_pb2.PutBlobResponse:
        """Stores a blob; one that is there already is answered at once."""
        first = await stream.read()
        if first is None or first.WhichOneof("message") != "digest":
            raise invalid_field("digest", "must be sent first")
        blobs.check_digest(first.digest, "digest")
        there = await self._store.write(lambda tx: blobs.touch(tx, first.digest))
        if there is not None:
            return store_service_pb2.PutBlobResponse(digest=first.digest, size=there.size)
        upload = _Upload(self._store, first.digest)
        try:
            while (message := await stream.read()) is not None:
                await upload.add(message)
            size = await upload.finish()
        except BaseException:
            self._discard(upload)
            raise
        return store_service_pb2.PutBlobResponse(digest=first.digest, size=size)

    def _discard(self, upload: _Upload) -> None:
        # The call may be cancelled at any moment: what must happen now happens beside it.
        task = asyncio.get_running_loop().create_task(upload.discard())
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)

    async def get_blob(
        self, request: store_service_pb2.GetBlobRequest, _call: Call
    ) -> AsyncIterator[store_service_pb2.GetBlobResponse]:
        """Reads a blob from an offset on."""
        blobs.check_digest(request.digest, "digest")
        blob = await self._store.read(lambda db: blobs.require(db, request.digest))
        if not 0 <= request.offset <= blob.size:
            raise invalid_field("offset", f"must be between 0 and the blob's size, {blob.size}")
        place, skip = divmod(request.offset, blobs.PIECE_BYTES)
        while place * blobs.PIECE_BYTES < blob.size:
            data = await self._store.read(partial(blobs.piece, blob_key=blob.key, place=place))
            if data is None:
                raise not_found("blob", request.digest)
            if skip < len(data):
                yield store_service_pb2.GetBlobResponse(chunk=data[skip:])
            place, skip = place + 1, 0


class _Upload:
    """A blob on its way in. Nothing is written before a whole piece, or all, is there."""

    def __init__(self, store: Store, digest: str) -> None:
        self._store = store
        self._digest = digest
        self._hash = hashlib.sha256()
        self._size = 0
        self._rest = bytearray()
        self._place = 0
        self._key: int | None = None

    async def add(self, message: store_service_pb2.PutBlobRequest) -> None:
        """Takes the next chunk.

        Raises:
            StoreError: INVALID_FIELD.
        """
        if message.WhichOneof("message") != "chunk":
            raise invalid_field("message", "must be `chunk` after the first")
        if len(message.chunk) > blobs.PIECE_BYTES:
            raise invalid_field("chunk", f"has {len(message.chunk)} bytes; at most {blobs.PIECE_BYTES}")
        self._size += len(message.chunk)
        if self._size > limits.BLOB_BYTES:
            raise invalid_field("chunk", f"makes the blob larger than {limits.BLOB_BYTES} bytes")
        self._hash.update(message.chunk)
        self._rest += message.chunk
        if len(self._rest) >= blobs.PIECE_BYTES:
            await self._store.write(self._write_piece, Lane.SPANS, _PIECE_ROWS)

    def _write_piece(self, tx: Tx) -> None:
        data = bytes(self._rest[: blobs.PIECE_BYTES])
        key = self._key
        if key is None:
            key = self._key = blobs.begin(tx)
            tx.after_rollback(self._forget)
        blobs.add_piece(tx, key, self._place, data)
        tx.after_commit(self._written)

    def _forget(self) -> None:
        self._key = None

    def _written(self) -> None:
        self._place += 1
        del self._rest[: blobs.PIECE_BYTES]

    async def finish(self) -> int:
        """Makes the blob visible; returns its size.

        Raises:
            StoreError: INVALID_FIELD when the content is not what was announced.
        """
        found = f"sha256:{self._hash.hexdigest()}"
        if found != self._digest:
            raise invalid_field("digest", f"is not that of the content, which is {found}")
        await self._store.write(self._finish, Lane.SPANS, _PIECE_ROWS)
        return self._size

    def _finish(self, tx: Tx) -> None:
        if self._rest:
            self._write_piece(tx)
        key = blobs.begin(tx) if self._key is None else self._key
        blobs.finish(tx, key, self._digest, self._size)

    async def discard(self) -> None:
        """Deletes what was written of a blob that did not arrive."""
        key = self._key
        if key is None:
            return
        with contextlib.suppress(StoreError):
            # A store that stops accepts nothing more: half-sent blobs are pruned after a day.
            await self._store.write(lambda tx: blobs.discard(tx, key), Lane.SPANS, _PIECE_ROWS)
