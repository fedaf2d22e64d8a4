"""Batches: claim, list, commit, release."""

from __future__ import annotations

from agl_grpc.store.door.call import Call
from agl_grpc.store.door.paging import Order, PageRequest, check_size, fetch_page
from agl_grpc.store.errors import invalid_field
from agl_grpc.store.handlers.common import change
from agl_grpc.store.rollouts.write_side import WriteSide
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.store.training import batches
from agl_grpc.store.training.batches import load_batch
from agl_grpc.store.training.runs import held_training, load_training, training_by_id
from agl_grpc.store.training.samples import find_batch
from agl_grpc.v1 import trainer_service_pb2 as pb

_DEFAULT_PAGE = 20
"""Manifests are long: a page of batches is short."""


class BatchHandlers:
    """Serves batches."""

    def __init__(self, side: WriteSide) -> None:
        self._store = side.store

    async def claim_batch(self, request: pb.ClaimBatchRequest, call: Call) -> bytes:
        """Sealed rollouts, frozen; nothing is claimed when some are not sealed."""

        rules = request.rules if request.HasField("rules") else None

        def run(tx: Tx) -> pb.ClaimBatchResponse:
            training = held_training(tx, request.training_run_id, request.trainer_epoch)
            claim = batches.claim(tx, training, request.step, request.rollout_ids, rules)
            if claim.key is None:
                return pb.ClaimBatchResponse(unsealed_rollout_ids=claim.unsealed)
            return pb.ClaimBatchResponse(batch=load_batch(tx.connection, claim.key))

        return await change(self._store, call, request, run, len(request.rollout_ids))

    async def get_batch(self, request: pb.GetBatchRequest, _call: Call) -> pb.GetBatchResponse:
        """One batch."""
        if not (request.batch_id or request.content_hash):
            raise invalid_field("batch_id", "or content_hash is required")

        def read(db: Connection) -> pb.GetBatchResponse:
            key = find_batch(db, request.batch_id, request.content_hash).key
            return pb.GetBatchResponse(batch=load_batch(db, key))

        return await self._store.read(read)

    async def list_batches(self, request: pb.ListBatchesRequest, _call: Call) -> pb.ListBatchesResponse:
        """Batches of a training run in order of their claim."""
        size = check_size(request.page_size, default=_DEFAULT_PAGE)

        def read(db: Connection) -> pb.ListBatchesResponse:
            where = "b.training_key = ?"
            values = [training_by_id(db, request.training_run_id).key]
            if request.status_in:
                where += f" AND b.status IN ({','.join(str(int(status)) for status in request.status_in)})"
            if request.from_step:
                where += " AND b.step >= ?"
                values.append(request.from_step)
            order = Order("b.batch_key", "b.batch_key", descending=False)
            wanted = PageRequest(size, request.page_token, 0, count=False)
            page = fetch_page(db, "batches b", where, values, order, wanted)
            found = [load_batch(db, key) for key in page.keys]
            return pb.ListBatchesResponse(batches=found, next_page_token=page.next_token)

        return await self._store.read(read)

    async def commit_batches(self, request: pb.CommitBatchesRequest, call: Call) -> bytes:
        """Trained, and part of a checkpoint that was saved."""

        def run(tx: Tx) -> pb.CommitBatchesResponse:
            training = held_training(tx, request.training_run_id, request.trainer_epoch)
            batches.commit(
                tx,
                training,
                request.batch_ids,
                request.checkpoint_id,
                request.step,
                request.checkpoint_digest,
            )
            return pb.CommitBatchesResponse(training_run=load_training(tx.connection, training.key))

        return await change(self._store, call, request, run, len(request.batch_ids))

    async def release_batches(self, request: pb.ReleaseBatchesRequest, call: Call) -> bytes:
        """Given back."""

        def run(tx: Tx) -> pb.ReleaseBatchesResponse:
            training = held_training(tx, request.training_run_id, request.trainer_epoch)
            batches.release(tx, training, request.batch_ids)
            return pb.ReleaseBatchesResponse()

        return await change(self._store, call, request, run, len(request.batch_ids))
