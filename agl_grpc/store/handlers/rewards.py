"""PutRewards and ListRewards."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from google.protobuf.message import Message

from agl_grpc.store import errors
from agl_grpc.store.door.call import Call
from agl_grpc.store.door.paging import Order, PageRequest, check_size, fetch_page
from agl_grpc.store.handlers.common import change, require_runs_of
from agl_grpc.store.rewards import load_rewards, put_all_rewards
from agl_grpc.store.rollouts.names import attempt_status
from agl_grpc.store.rollouts.rows import AttemptRow, attempts_by_name
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.sql import marks
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.store.store import Store
from agl_grpc.v1 import reward_pb2, store_service_pb2

_SOURCE = (
    "rewards w JOIN attempts a ON a.attempt_key = w.attempt_key "
    "JOIN rollouts r ON r.rollout_key = a.rollout_key"
)
_NEWEST = (
    "NOT EXISTS (SELECT 1 FROM rewards n WHERE n.attempt_key = w.attempt_key AND n.name = w.name "
    "AND n.target_ref = w.target_ref AND n.step = w.step AND n.grader = w.grader "
    "AND n.revision > w.revision)"
)


class RewardHandlers:
    """Serves rewards of one store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def put_rewards(self, request: store_service_pb2.PutRewardsRequest, call: Call) -> bytes:
        """Write rewards, all or none."""
        if not request.rewards:
            raise errors.invalid_field("rewards", "must not be empty")

        def run(tx: Tx) -> Message:
            credential = call.caller.credential
            own = credential.attempt_id if credential else ""
            names = [(reward.rollout_id, reward.attempt_id or own) for reward in request.rewards]
            for index, (_, attempt_id) in enumerate(names):
                if not attempt_id:
                    raise errors.invalid_field(f"rewards[{index}].attempt_id", "is required")
            targets = attempts_by_name(tx.connection, names)
            _check_origin(request.rewards, call)
            for attempt, _ in {pair[0].key: pair for pair in targets}.values():
                _authorise(tx, attempt, request.lease_token, call)
            stored = put_all_rewards(tx, targets, request.rewards)
            return store_service_pb2.PutRewardsResponse(rewards=stored)

        return await change(self._store, call, request, run, rows=len(request.rewards))

    async def list_rewards(
        self, request: store_service_pb2.ListRewardsRequest, call: Call
    ) -> store_service_pb2.ListRewardsResponse:
        """Rewards of rollouts in the order in which they were written."""
        count = len(request.rollout_ids)
        if not count:
            raise errors.invalid_field("rollout_ids", "must not be empty")
        size = check_size(request.page_size)
        where = [f"r.rollout_id IN ({marks(count)})"]
        values: list[object] = list(request.rollout_ids)
        if request.attempt_id:
            where.append("a.attempt_id = ?")
            values.append(request.attempt_id)
        if not request.all_revisions:
            where.append(_NEWEST)

        def read(db: Connection) -> store_service_pb2.ListRewardsResponse:
            require_runs_of(db, call, request.rollout_ids)
            order = Order("w.reward_key", "w.reward_key", descending=False)
            wanted = PageRequest(size, request.page_token, 0, count=False)
            page = fetch_page(db, _SOURCE, " AND ".join(where), values, order, wanted)
            rewards = load_rewards(db, page.keys)
            return store_service_pb2.ListRewardsResponse(rewards=rewards, next_page_token=page.next_token)

        return await self._store.read(read)


def _check_origin(rewards: Iterable[reward_pb2.Reward], call: Call) -> None:
    """An agent cannot speak as a grader: it could answer for those that its run waits for."""
    if call.caller.credential is None:
        return
    if any(reward.grader or reward.grader_version or reward.HasField("failure") for reward in rewards):
        raise errors.not_permitted("a grader's credential to write in a grader's name")


def _authorise(tx: Tx, attempt: AttemptRow, lease_token: bytes, call: Call) -> None:
    """A worker shows its lease; an agent may judge itself only where its run allows it."""
    if lease_token:
        if attempt.lease_token is None or not hmac.compare_digest(attempt.lease_token, lease_token):
            raise errors.lease_lost(attempt.attempt_id, attempt_status(attempt.status))
        return
    if call.caller.role is not None:
        (run_id,) = tx.execute("SELECT run_id FROM runs WHERE run_key = ?", (attempt.run_key,)).fetchone()
        call.caller.require_run(run_id)
    if call.caller.credential is None:
        return
    call.caller.require_attempt(attempt.attempt_id)
    (allowed,) = tx.execute(
        "SELECT allow_self_grading FROM runs WHERE run_key = ?", (attempt.run_key,)
    ).fetchone()
    if not allowed:
        raise errors.not_permitted("run allows self-grading")
