"""Leases: renewed, completed, released, lost (R8, R9, R12). Writer's thread only."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from agl_grpc.store import blobs
from agl_grpc.store.clock import SECOND
from agl_grpc.store.errors import StoreError, invalid_field, lease_lost
from agl_grpc.store.rollouts.encode import duration_of, fit, load_rollouts, set_duration
from agl_grpc.store.rollouts.lifecycle import AttemptEvent
from agl_grpc.store.rollouts.moves import Moves
from agl_grpc.store.rollouts.names import attempt_status
from agl_grpc.store.rollouts.rows import (
    AttemptRow,
    RolloutRow,
    attempt_by_key,
    attempts_where,
    find_pairs,
    next_attempt_due,
)
from agl_grpc.store.storage.bulk import update_rows
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import attempt_pb2, common_pb2, reward_pb2, runner_service_pb2

_RENEW = (
    "UPDATE attempts SET lease_expire_time = v.column1, last_heartbeat_time = v.column2 "
    "FROM (VALUES {rows}) AS v WHERE attempt_key = v.column3"
)
DEFAULT_DURATION = 30 * SECOND

PutRewards = Callable[[Tx, AttemptRow, str, Sequence[reward_pb2.Reward]], object]
"""Writes rewards of an attempt, whose rollout's id is given, within the completion's transaction."""


def wanted_duration(work: runner_service_pb2.WorkRequest) -> int:
    """The lease duration that a worker asks for, in microseconds."""
    return duration_of(work.lease_duration) if work.HasField("lease_duration") else DEFAULT_DURATION


Pair = tuple[AttemptRow, RolloutRow]


def holder(pairs: Mapping[str, Pair], attempt_id: str, token: bytes) -> Pair:
    """The attempt and its rollout, if this token is its live lease's.

    Args:
        pairs: The attempts that exist, by id, as `find_pairs` has read them.
        attempt_id: The attempt.
        token: What its holder shows.

    Raises:
        StoreError: LEASE_LOST for everything else, be the attempt unknown, over or another's.
    """
    found = pairs.get(attempt_id)
    if found is None:
        raise lease_lost(attempt_id, "unknown")
    attempt, _ = found
    if attempt.lease_token is None or not hmac.compare_digest(attempt.lease_token, token):
        raise lease_lost(attempt_id, attempt_status(attempt.status))
    return found


class Leases:
    """Changes to leases.

    Args:
        moves: Ends attempts.
        put_rewards: Writes the rewards that come with a completion.
    """

    def __init__(self, moves: Moves, put_rewards: PutRewards) -> None:
        self._moves = moves
        self._put_rewards = put_rewards

    def renew(
        self, tx: Tx, worker_key: int, leases: Sequence[runner_service_pb2.HeldLease]
    ) -> list[runner_service_pb2.LeaseRenewal]:
        """Renews leases in one statement; a renewal is a sign of life of attempt and worker."""
        answers = []
        renewed = []
        pairs = find_pairs(tx.connection, [held.attempt_id for held in leases])
        for held in leases:
            answer = runner_service_pb2.LeaseRenewal(attempt_id=held.attempt_id)
            try:
                attempt, _ = holder(pairs, held.attempt_id, held.lease_token)
            except StoreError as error:
                answer.error.CopyFrom(error.to_item())
            else:
                duration = attempt.lease_duration or DEFAULT_DURATION
                renewed.append((tx.now + duration, tx.now, attempt.key))
                set_duration(answer.duration, duration)
            answers.append(answer)
        update_rows(tx.execute, _RENEW, renewed)
        tx.execute("UPDATE workers SET last_heartbeat_time = ? WHERE worker_key = ?", (tx.now, worker_key))
        return answers

    def complete(self, tx: Tx, completions: Sequence[Any]) -> list[runner_service_pb2.CompletionResult]:
        """Ends attempts with their rewards, by RawCompletions; a refused one never blocks the others."""
        results = []
        done: dict[int, runner_service_pb2.CompletionResult] = {}
        pairs = find_pairs(tx.connection, [one.attempt_id for one in completions])
        for i, completion in enumerate(completions):
            result = runner_service_pb2.CompletionResult(attempt_id=completion.attempt_id)
            try:
                done[self._complete(tx, pairs, completion, f"completions[{i}]")] = result
            except StoreError as error:
                result.error.CopyFrom(error.to_item())
            results.append(result)
        finished = load_rollouts(tx.connection, done)
        fit(finished.values())
        for key, rollout in finished.items():
            done[key].rollout.CopyFrom(rollout)
        return results

    def _complete(self, tx: Tx, pairs: dict[str, Pair], completion: Any, path: str) -> int:
        attempt, rollout = holder(pairs, completion.attempt_id, completion.lease_token)
        if completion.status == attempt_pb2.ATTEMPT_STATUS_SUCCEEDED:
            event = AttemptEvent.SUCCEED
        elif completion.status == attempt_pb2.ATTEMPT_STATUS_FAILED:
            event = AttemptEvent.FAIL
        else:
            raise invalid_field(f"{path}.status", "must be SUCCEEDED or FAILED")
        if completion.rollout_id not in ("", rollout.rollout_id):
            raise invalid_field(f"{path}.rollout_id", f"is not the attempt's, which is {rollout.rollout_id}")
        if completion.HasField("output"):
            blobs.refer(tx, rollout.key, completion.output, f"{path}.output")
        if completion.rewards:
            self._reward(tx, attempt, rollout.rollout_id, completion.rewards)
        if completion.HasField("output"):
            _keep_output(tx, attempt.key, completion.output)
        failure = completion.failure if completion.HasField("failure") else None
        self._moves.end(tx, attempt, event, failure, rollout=rollout)
        # Named again in the same call, it is over.
        over = attempt._replace(status=int(completion.status), lease_token=None)
        pairs[completion.attempt_id] = over, rollout
        return rollout.key

    def _reward(
        self, tx: Tx, attempt: AttemptRow, rollout_id: str, rewards: Sequence[reward_pb2.Reward]
    ) -> None:
        # One bad reward refuses its whole completion, so the good ones before it must not stay.
        events = len(tx.events)
        tx.execute("SAVEPOINT rewards")
        try:
            self._put_rewards(tx, attempt, rollout_id, rewards)
        except StoreError:
            tx.execute("ROLLBACK TO rewards")
            del tx.events[events:]
            raise
        finally:
            tx.execute("RELEASE rewards")

    def release(
        self, tx: Tx, leases: Sequence[runner_service_pb2.HeldLease], reason: str
    ) -> list[runner_service_pb2.ReleaseResult]:
        """Takes attempts back unfinished; their rollouts are due again at once."""
        results = []
        pairs = find_pairs(tx.connection, [held.attempt_id for held in leases])
        for held in leases:
            result = runner_service_pb2.ReleaseResult(attempt_id=held.attempt_id)
            try:
                attempt, rollout = holder(pairs, held.attempt_id, held.lease_token)
                self.give_back(tx, attempt, reason or "handed back by its worker", rollout)
                pairs[held.attempt_id] = attempt_by_key(tx.connection, attempt.key), rollout
            except StoreError as error:
                result.error.CopyFrom(error.to_item())
            results.append(result)
        return results

    def give_back(self, tx: Tx, attempt: AttemptRow, reason: str, rollout: RolloutRow | None = None) -> None:
        """Releases one leased attempt; its rollout need not be read if the caller has it."""
        failure = attempt_pb2.Failure(message=reason)
        self._moves.end(tx, attempt, AttemptEvent.RELEASE, failure, rollout=rollout)

    def expire(self, tx: Tx, attempts: Iterable[AttemptRow]) -> list[str]:
        """Ends live leases as if they had run out; returns the attempts' ids."""
        ended = []
        for attempt in attempts:
            if attempt.lease_token is None:
                continue
            failure = attempt_pb2.Failure(message="the lease was ended by an operator")
            self._moves.end(tx, attempt, AttemptEvent.LOSE_LEASE, failure, order=failure.message)
            ended.append(attempt.attempt_id)
        return ended

    def reconcile(
        self,
        tx: Tx,
        worker_key: int,
        session_id: str,
        held: Sequence[runner_service_pb2.HeldLease],
    ) -> runner_service_pb2.LeaseStreamOpened:
        """A session's stream opens: leases that it still has live on, its others are released (R12)."""
        opened = runner_service_pb2.LeaseStreamOpened()
        renewals = self.renew(tx, worker_key, held)
        opened.lost_attempt_ids.extend(answer.attempt_id for answer in renewals if answer.HasField("error"))
        named = {lease.attempt_id for lease in held}
        for attempt in attempts_where(
            tx.connection,
            "WHERE worker_key = ? AND lease_token IS NOT NULL AND session_id = ? ORDER BY attempt_key",
            *(worker_key, session_id),
        ):
            if attempt.attempt_id not in named:
                self.give_back(tx, attempt, "its worker's session came back without it")
                opened.released_attempt_ids.append(attempt.attempt_id)
        return opened

    def extend_all(self, tx: Tx) -> int:
        """R9: when a store starts, every live lease gets its full duration anew; returns how many "
        "there are."""
        cursor = tx.execute(
            "UPDATE attempts SET lease_expire_time = ? + lease_duration WHERE lease_token IS NOT NULL",
            (tx.now,),
        )
        tx.arm(next_attempt_due(tx.connection))
        return cursor.rowcount


def _keep_output(tx: Tx, attempt_key: int, output: common_pb2.Payload) -> None:
    """Notes an agent's output in the attempt's metadata: JSON and other text as text."""
    (before,) = tx.execute("SELECT metadata FROM attempts WHERE attempt_key = ?", (attempt_key,)).fetchone()
    notes = common_pb2.KeyValueList.FromString(before or b"")
    note = notes.values.add(key="output")
    if output.blob_digest:
        note.value.string_value = output.blob_digest
    elif output.media_type in ("", "application/json") or output.media_type.startswith("text/"):
        note.value.string_value = output.data.decode(errors="replace")
    else:
        note.value.bytes_value = output.data
    tx.execute(
        "UPDATE attempts SET metadata = ? WHERE attempt_key = ?", (notes.SerializeToString(), attempt_key)
    )
