"""RunnerService, the unary half: long poll, renewals, completions, releases, heartbeats."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from agl_grpc.model import raw
from agl_grpc.store import limits
from agl_grpc.store.clock import SECOND
from agl_grpc.store.door.call import Call
from agl_grpc.store.door.fields import check_request
from agl_grpc.store.errors import StoreError, invalid_field
from agl_grpc.store.handlers.common import change, request_key
from agl_grpc.store.handlers.span_writes import read_message, rejections
from agl_grpc.store.rollouts import commands, workers
from agl_grpc.store.rollouts.dispatch import Waiter
from agl_grpc.store.rollouts.encode import duration_of
from agl_grpc.store.rollouts.leases import wanted_duration
from agl_grpc.store.rollouts.write_side import WriteSide
from agl_grpc.store.spans.evict import Evictor
from agl_grpc.store.spans.write import SpanMessage, SpanOutcome, write_messages
from agl_grpc.store.storage import idempotency
from agl_grpc.store.storage.catalog import labels_of
from agl_grpc.store.storage.idempotency import RequestKey
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import runner_service_pb2


def waiter_of(
    side: WriteSide, tx: Tx, worker_id: str, session_id: str, work: runner_service_pb2.WorkRequest
) -> Waiter:
    """A waiter without credits for what a worker asks for; notes what the worker serves.

    Raises:
        StoreError: NOT_FOUND for an unknown run, INVALID_FIELD.
    """
    worker_key = side.catalog.worker(tx, worker_id)
    if worker_key is None:
        raise invalid_field("worker_id", "must not be empty")
    run = side.catalog.run(tx, work.run_id)
    queues = side.catalog.queue_keys(tx, run, work.queues)
    workers.serves(tx, side.catalog, worker_key, work)
    return Waiter(
        run_key=run.run_key,
        queue_keys=queues,
        labels=labels_of(work.labels, "work.labels") or None,
        worker_key=worker_key,
        worker_id=worker_id,
        session_id=session_id,
        duration=wanted_duration(work),
        deliver=lambda _leased: None,
    )


class _Poll:
    """A long poll: one answer, made in the transaction that makes the leases."""

    def __init__(
        self, side: WriteSide, request: runner_service_pb2.LeaseRolloutsRequest, key: RequestKey
    ) -> None:
        self._side = side
        self._request = request
        self._key = key
        self._waiter: Waiter | None = None
        self._begun: Tx | None = None
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def begin(self, tx: Tx, waits: bool) -> None:
        """Leases what is ready, else lines up if it may wait."""
        self._begun = tx
        if tx.careful and self._answer_again(tx):
            return
        request = self._request
        waiter = waiter_of(self._side, tx, request.worker_id, request.session_id, request.work)
        waiter.batch = []
        waiter.once = self._taken
        self._side.dispatcher.add_credits(tx, waiter, max(request.limit, 1))
        self._waiter = waiter
        if self._side.moves.serve(tx, waiter):
            return
        if self._answer_again(tx):
            self.end(tx)
        elif not waits:
            self.end(tx)
            tx.after_commit(lambda: self._resolve(b""))

    def _answer_again(self, tx: Tx) -> bool:
        stored = idempotency.find(tx, self._key)
        if stored is None:
            return False
        tx.after_commit(lambda: self._resolve(stored))
        return True

    def _taken(self, tx: Tx) -> None:
        # The first delivery of a command: whatever else the command delivers goes into the same answer.
        tx.at_end(lambda: self._finish(tx))

    def _finish(self, tx: Tx) -> None:
        assert self._waiter is not None
        self._side.dispatcher.leave(self._waiter)
        answer = runner_service_pb2.LeaseRolloutsResponse(rollouts=self._waiter.batch).SerializeToString()
        if tx is self._begun:
            idempotency.save_new(tx, self._key, answer)
        else:
            # Within another's command, which must not run again for this one's sake.
            idempotency.save(tx, self._key, answer)
        tx.after_commit(lambda: self._resolve(answer))

    def end(self, tx: Tx) -> None:
        """Waits no more."""
        if self._waiter is not None:
            self._side.dispatcher.close(self._waiter)

    def give_back(self, tx: Tx) -> None:
        """The caller is gone: what it cannot learn of by asking again is released at once."""
        self.end(tx)
        if self._waiter is None or self._key.request_id:
            return
        held = [
            runner_service_pb2.HeldLease(attempt_id=one.lease.attempt_id, lease_token=one.lease.lease_token)
            for one in self._waiter.batch or ()
        ]
        self._side.leases.release(tx, held, "its worker went away before the delivery")

    def _resolve(self, answer: bytes) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)


class RunnerHandlers:
    """Serves the unary methods of RunnerService.

    Args:
        side: What they change.
        evictor: Keeps a throw-away store small; None = spans stay.
    """

    def __init__(self, side: WriteSide, evictor: Evictor | None = None) -> None:
        self._side = side
        self._evictor = evictor
        self._store = side.store
        self._cleanups: set[asyncio.Task[None]] = set()

    async def lease_rollouts(self, request: runner_service_pb2.LeaseRolloutsRequest, call: Call) -> bytes:
        """Long poll for work."""
        wanted = min(duration_of(request.wait) / SECOND, limits.LONG_POLL_SECONDS)
        seconds = call.wait_limit(wanted)
        poll = _Poll(self._side, request, request_key(call, request))
        try:
            await self._store.write(lambda tx: poll.begin(tx, seconds > 0 and not call.drain.is_set()))
            return await self._wait(poll, call, seconds)
        except asyncio.CancelledError:
            # Beside this call, which is being cancelled.
            task = asyncio.get_running_loop().create_task(self._clean_up(poll))
            self._cleanups.add(task)
            task.add_done_callback(self._cleanups.discard)
            raise

    async def _clean_up(self, poll: _Poll) -> None:
        with contextlib.suppress(StoreError):
            # A store that stops accepts nothing more: the lease then ends by time.
            await self._store.write(poll.give_back)

    async def _wait(self, poll: _Poll, call: Call, seconds: float) -> bytes:
        if poll.answer.done():
            return poll.answer.result()
        drain = asyncio.ensure_future(call.drain.wait())
        try:
            await asyncio.wait((poll.answer, drain), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            drain.cancel()
        if not poll.answer.done():
            # Once this is carried out, no delivery can come any more.
            await self._store.write(poll.end)
        return poll.answer.result() if poll.answer.done() else b""

    async def renew_leases(self, request: runner_service_pb2.RenewLeasesRequest, call: Call) -> bytes:
        """Renews all leases of a worker."""

        def run(tx: Tx) -> runner_service_pb2.RenewLeasesResponse:
            worker_key = self._worker(tx, request.worker_id)
            if request.acknowledged_command_ids:
                commands.acknowledge(tx, worker_key, request.acknowledged_command_ids)
            renewals = self._side.leases.renew(tx, worker_key, request.leases)
            pending = commands.pending(tx.connection, worker_key)
            return runner_service_pb2.RenewLeasesResponse(renewals=renewals, commands=pending)

        return await change(self._store, call, request, run, 1 + len(request.leases))

    async def complete_attempts(self, request: Any, call: Call) -> bytes:
        """Ends the attempts of a RawCompleteAttemptsRequest with their last spans and results."""
        check_request(request)
        spans = self._last_spans(request.completions, call)

        def run(tx: Tx) -> runner_service_pb2.CompleteAttemptsResponse:
            outcome = _stored(tx, spans) if spans.groups else None
            results = self._side.leases.complete(tx, request.completions)
            for rejected in rejections(outcome) if outcome else ():
                results[rejected.group_index].rejected.append(rejected)
            return runner_service_pb2.CompleteAttemptsResponse(results=results)

        answer = await change(self._store, call, request, run, 4 * len(request.completions) + spans.rows)
        if self._evictor is not None and spans.groups:
            self._evictor.added(spans.size)
        return answer

    def _last_spans(self, completions: Any, call: Call) -> SpanMessage:
        """The spans that come with completions, checked; without groups where there are none."""
        if not any(completion.spans for completion in completions):
            return SpanMessage((), 0, 0)
        if self._evictor is not None:
            self._evictor.admit()
        groups = (
            raw.RawAttemptSpans(rollout_id=one.rollout_id, attempt_id=one.attempt_id, spans=one.spans)
            for one in completions
        )
        message = read_message(groups, call, self._store.clock.now() * 1000, "completions")
        # No span is no sign of life either.
        message.groups = [group for group in message.groups if group.count]
        return message

    async def release_attempts(self, request: runner_service_pb2.ReleaseAttemptsRequest, call: Call) -> bytes:
        """Takes attempts back unfinished."""

        def run(tx: Tx) -> runner_service_pb2.ReleaseAttemptsResponse:
            results = self._side.leases.release(tx, request.leases, request.reason)
            return runner_service_pb2.ReleaseAttemptsResponse(results=results)

        return await change(self._store, call, request, run, 4 * len(request.leases))

    async def heartbeat(self, request: runner_service_pb2.HeartbeatRequest, call: Call) -> bytes:
        """A worker's sign of life."""

        def run(tx: Tx) -> runner_service_pb2.HeartbeatResponse:
            worker_key = self._worker(tx, request.worker_id)
            workers.heartbeat(tx, worker_key, request)
            return runner_service_pb2.HeartbeatResponse(
                worker=workers.load_worker(tx.connection, worker_key, tx.now),
                commands=commands.pending(tx.connection, worker_key),
            )

        return await change(self._store, call, request, run)

    def _worker(self, tx: Tx, worker_id: str) -> int:
        worker_key = self._side.catalog.worker(tx, worker_id)
        if worker_key is None:
            raise invalid_field("worker_id", "must not be empty")
        return worker_key


def _stored(tx: Tx, message: SpanMessage) -> SpanOutcome:
    """What became of spans."""
    (outcome,) = write_messages(tx, [message])
    assert isinstance(outcome, SpanOutcome), "only messages of streams are fenced"
    return outcome
