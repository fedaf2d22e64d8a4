"""What handlers of several families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from google.protobuf import field_mask_pb2
from google.protobuf.message import Message

from agl_grpc.store.door.call import Call
from agl_grpc.store.errors import invalid_field
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.idempotency import RequestKey
from agl_grpc.store.storage.sql import marks
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.store.store import Store


def request_key(call: Call, request: Message) -> RequestKey:
    """The name of a logical call (R13)."""
    request_id: str = getattr(request, "request_id", "")
    body = request.SerializeToString(deterministic=True) if request_id else b""
    return RequestKey(call.caller.principal, call.method, request_id, body)


async def change(
    store: Store, call: Call, request: Message, run: Callable[[Tx], Message], rows: int = 1
) -> bytes:
    """Carries a change out once for its request id; returns the serialised response."""
    return await store.change(request_key(call, request), lambda tx: run(tx).SerializeToString(), rows)


def require_runs_of(db: Connection, call: Call, rollout_ids: Sequence[str]) -> None:
    """Refuses a caller whose role is in another run than one of these rollouts.

    Raises:
        StoreError: NOT_PERMITTED.
    """
    if call.caller.role is None:
        return
    runs = db.execute(
        "SELECT DISTINCT u.run_id FROM rollouts r JOIN runs u ON u.run_key = r.run_key "
        f"WHERE r.rollout_id IN ({marks(len(rollout_ids))})",
        list(rollout_ids),
    )
    for (run_id,) in runs.fetchall():
        call.caller.require_run(run_id)


def mask_paths(mask: field_mask_pb2.FieldMask) -> list[str]:
    """The fields that an update names.

    Raises:
        StoreError: INVALID_FIELD when it names none.
    """
    if not mask.paths:
        raise invalid_field("update_mask", "must name at least one field")
    return list(mask.paths)
