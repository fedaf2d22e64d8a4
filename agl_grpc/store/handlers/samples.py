"""StreamBatch, ReplayBatch, ExplainTokens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

from agl_grpc.model import raw
from agl_grpc.sample import Fate
from agl_grpc.sample.explain import Stretch
from agl_grpc.sample.types import DropReason
from agl_grpc.sample.wire import account_to_proto
from agl_grpc.store.door.call import Call
from agl_grpc.store.errors import draining, invalid_field
from agl_grpc.store.rollouts.rows import AttemptRow, attempt_by_name, rollout_by_id
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.store import Store
from agl_grpc.store.training.samples import (
    BatchRow,
    Explained,
    SamplePage,
    batch_to_stream,
    explain,
    find_batch,
    sample_page,
)
from agl_grpc.v1 import batch_pb2
from agl_grpc.v1 import trainer_service_pb2 as pb

_FATES = {
    Fate.TRAINED: batch_pb2.TOKEN_FATE_TRAINED,
    Fate.OBSERVATION: batch_pb2.TOKEN_FATE_OBSERVATION,
    Fate.DROPPED: batch_pb2.TOKEN_FATE_DROPPED,
}


class SampleHandlers:
    """Serves samples of batches.

    Args:
        store: Where they are.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    async def stream_batch(self, request: pb.StreamBatchRequest, call: Call) -> AsyncIterator[bytes]:
        """Samples of a batch that is claimed or committed."""
        if not request.batch_id:
            raise invalid_field("batch_id", "is required")
        batch = await self._store.read(partial(batch_to_stream, batch_id=request.batch_id))
        async for page in self._pages(batch, request.first_entry, call):
            yield page

    async def replay_batch(self, request: pb.ReplayBatchRequest, call: Call) -> AsyncIterator[bytes]:
        """Samples of a batch again."""
        if not request.content_hash:
            raise invalid_field("content_hash", "is required")
        find = partial(find_batch, batch_id="", content_hash=request.content_hash)
        batch = await self._store.read(find)
        async for page in self._pages(batch, request.first_entry, call):
            yield page

    async def _pages(self, batch: BatchRow, first_entry: int, call: Call) -> AsyncIterator[bytes]:
        entry = first_entry
        while not call.drain.is_set():
            data, page = await self._store.read(partial(_page, batch=batch, first_entry=entry))
            yield data
            if page.done:
                return
            entry = page.next_entry
        raise draining()

    async def explain_tokens(self, request: pb.ExplainTokensRequest, _call: Call) -> pb.ExplainTokensResponse:
        """The fate of one choice's tokens."""
        if not request.rollout_id:
            raise invalid_field("rollout_id", "is required")
        if len(request.span_id) != 8:
            raise invalid_field("span_id", "must be the 8-byte id of a model call")

        def read(db: Connection) -> pb.ExplainTokensResponse:
            rollout = rollout_by_id(db, request.rollout_id)
            attempt = attempt_by_name(db, request.rollout_id, request.attempt_id or "latest")
            found = explain(db, attempt, rollout.rollout_id, request.span_id, request.choice)
            return _explanation(attempt, found)

        return await self._store.read(read)


def _page(db: Connection, batch: BatchRow, first_entry: int) -> tuple[bytes, SamplePage]:
    """The next answer, serialised off the event loop."""
    page = sample_page(db, batch, first_entry)
    answer = raw.RawStreamBatchResponse(
        samples=page.columns, account=account_to_proto(page.account), next_entry=page.next_entry
    )
    return answer.SerializeToString(), page


def _explanation(attempt: AttemptRow, found: Explained) -> pb.ExplainTokensResponse:
    answer = pb.ExplainTokensResponse(prompt_length=found.fate.prompt_length, attempt_id=attempt.attempt_id)
    for stretch in found.fate.stretches:
        unused = _unused(attempt, found, stretch)
        answer.explanations.add(
            start=stretch.start,
            end=stretch.end,
            fate=_FATES[Fate.DROPPED if unused else stretch.fate],
            reason=f"{unused}: {unused.sentence}" if unused else stretch.reason,
            batch_ids=found.batch_ids if stretch.fate is not Fate.DROPPED else (),
        )
    return answer


def _unused(attempt: AttemptRow, found: Explained, stretch: Stretch) -> DropReason | None:
    """Why tokens that the rules allow were not used all the same."""
    if found.batch_ids or stretch.fate is Fate.DROPPED:
        return None
    return DropReason.NOT_CLAIMED if attempt.sealed else DropReason.NOT_SEALED
