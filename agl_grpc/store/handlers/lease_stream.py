"""StreamLeases: work pushed while credits last, and commands (R12)."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial

from agl_grpc.store.door.call import Call
from agl_grpc.store.door.service import BidiStream
from agl_grpc.store.errors import StoreError, invalid_field, stream_fenced
from agl_grpc.store.handlers.runner import waiter_of
from agl_grpc.store.rollouts import commands, workers
from agl_grpc.store.rollouts.dispatch import Waiter
from agl_grpc.store.rollouts.write_side import WriteSide
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import runner_service_pb2, worker_pb2

_MESSAGE_BYTES = 4 << 20

Stream = BidiStream[runner_service_pb2.StreamLeasesRequest]


class LeaseStreamHandlers:
    """Serves StreamLeases."""

    def __init__(self, side: WriteSide) -> None:
        self._side = side
        # By worker and session; touched in the writer's thread only.
        self._sessions: dict[tuple[int, str], LeaseSession] = {}
        self._cleanups: set[asyncio.Task[None]] = set()

    async def stream_leases(self, stream: Stream, call: Call) -> None:
        """One stream of one worker."""
        first = await stream.read()
        if first is None or not first.HasField("open"):
            raise invalid_field("message", "of a lease stream must be `open` first")
        session = LeaseSession(self._side, self._sessions, stream, first.open)
        try:
            await session.run(call)
        finally:
            # The call may be cancelled at any moment: what must happen now happens beside it.
            task = asyncio.get_running_loop().create_task(session.clean_up())
            self._cleanups.add(task)
            task.add_done_callback(self._cleanups.discard)


class LeaseSession:
    """One open stream of one worker's session."""

    def __init__(
        self,
        side: WriteSide,
        sessions: dict[tuple[int, str], LeaseSession],
        stream: Stream,
        opening: runner_service_pb2.LeaseStreamOpen,
    ) -> None:
        self._side = side
        self._store = side.store
        self._sessions = sessions
        self._stream = stream
        self._opening = opening
        self._granted = 0
        self._waiter: Waiter | None = None
        self._wake = asyncio.Event()
        self._deliveries: list[runner_service_pb2.LeasedRollout] = []
        self._orders: list[worker_pb2.WorkerCommand] = []
        self._idle = ""
        self._told_idle = ""
        self._fenced = False
        self._gone = False
        self._late: asyncio.Task[None] | None = None

    async def run(self, call: Call) -> None:
        """Serves the stream until either side ends it."""
        opened = await self._store.write(self._open)
        await self._stream.write(runner_service_pb2.StreamLeasesResponse(opened=opened))
        loop = asyncio.get_running_loop()
        reader = loop.create_task(self._read())
        drain = loop.create_task(call.drain.wait())
        for task in (reader, drain):
            task.add_done_callback(lambda _: self._wake.set())
        try:
            while not reader.done():
                await self._wake.wait()
                self._wake.clear()
                if self._fenced:
                    raise stream_fenced(self._opening.worker_id, 0)
                await self._send()
                if drain.done():
                    await self._send_drain()
                    return
            await reader
            await self._send()
        finally:
            for task in (reader, drain):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, StoreError):
                    await task

    # What the worker says

    async def _read(self) -> None:
        while (message := await self._stream.read()) is not None:
            if message.HasField("credit"):
                await self._grant(message.credit.granted)
            elif message.HasField("ack"):
                ids = list(message.ack.command_ids)
                await self._store.write(partial(self._acknowledge, ids))
            elif message.HasField("drain"):
                await self._store.write(self._void_credits)
            else:
                raise invalid_field("message", "must be `credit`, `ack` or `drain` after the first")

    async def _grant(self, granted: int) -> None:
        if granted < self._granted:
            raise invalid_field("credit.granted", f"must not fall below {self._granted}")
        more, self._granted = granted - self._granted, granted
        if more:
            await self._store.write(lambda tx: self._add_credits(tx, more))

    # In the writer's thread

    def _open(self, tx: Tx) -> runner_service_pb2.LeaseStreamOpened:
        opening = self._opening
        if opening.granted < 0:
            raise invalid_field("open.granted", "must not be negative")
        waiter = waiter_of(self._side, tx, opening.worker_id, opening.session_id, opening.work)
        waiter.deliver = self._delivered
        waiter.notice = self._idles
        key = (waiter.worker_key, opening.session_id)
        older = self._sessions.get(key)
        if older is not None:
            older.fence(tx)
        if self._store.database.backend == "postgres":
            epoch = workers.open_stream(tx, waiter.worker_key, opening.session_id)
            waiter.is_current = partial(self._is_current, epoch)
        opened = self._side.leases.reconcile(tx, waiter.worker_key, opening.session_id, opening.held)
        commands.forget_cancels(tx, waiter.worker_key, opening.session_id)
        pending = commands.pending(tx.connection, waiter.worker_key)
        self._waiter, self._sessions[key] = waiter, self
        tx.after_rollback(lambda: self._restore(key, older))
        tx.after_commit(lambda: self._side.commands.listen(waiter.worker_key, waiter.run_key, self._ordered))
        for command in pending:
            tx.after_commit(partial(self._ordered, command))
        self._granted = opening.granted
        self._add_credits(tx, opening.granted)
        return opened

    def _is_current(self, epoch: int, tx: Tx) -> bool:
        """Whether the session has not come back at another server of the database."""
        waiter = self._waiter
        if waiter is None or workers.is_newest_stream(tx, waiter.worker_key, waiter.session_id, epoch):
            return True
        tx.after_commit(self._fence)
        return False

    def _restore(self, key: tuple[int, str], older: LeaseSession | None) -> None:
        if older is None:
            self._sessions.pop(key, None)
        else:
            self._sessions[key] = older

    def _add_credits(self, tx: Tx, count: int) -> None:
        waiter = self._waiter
        if waiter is None or waiter.closed:
            return
        self._side.dispatcher.add_credits(tx, waiter, count)
        if not self._side.moves.serve(tx, waiter) and waiter.credits > 0 and not waiter.held_back:
            reason = self._side.dispatcher.idle_reason(tx, waiter)
            tx.after_commit(lambda: self._idles(reason))

    def _go_on(self, tx: Tx) -> None:
        """There is room again for what the waiter has credits for."""
        waiter = self._waiter
        if waiter is not None and not waiter.closed:
            self._side.dispatcher.go_on(waiter)
            self._side.moves.serve(tx, waiter)

    def _acknowledge(self, command_ids: list[int], tx: Tx) -> None:
        if self._waiter is not None:
            commands.acknowledge(tx, self._waiter.worker_key, command_ids)

    def _void_credits(self, tx: Tx) -> None:
        if self._waiter is not None:
            self._side.dispatcher.close(self._waiter)

    def fence(self, tx: Tx) -> None:
        """A newer stream of the same session has opened: this one takes nothing more and ends."""
        if self._waiter is not None:
            self._side.dispatcher.close(self._waiter)
        tx.after_commit(self._fence)

    def _give_back(self, tx: Tx) -> None:
        waiter = self._waiter
        if waiter is None:
            return
        self._side.dispatcher.close(waiter)
        key = (waiter.worker_key, waiter.session_id)
        if self._sessions.get(key) is self:
            del self._sessions[key]
        held = [
            runner_service_pb2.HeldLease(attempt_id=one.lease.attempt_id, lease_token=one.lease.lease_token)
            for one in self._deliveries
        ]
        self._side.leases.release(tx, held, "its worker went away before the delivery")

    # On the event loop, after a commit

    def _delivered(self, leased: runner_service_pb2.LeasedRollout) -> None:
        self._deliveries.append(leased)
        self._told_idle = ""
        if self._gone:
            # Too late for the clean-up that is under way.
            self._late = asyncio.get_running_loop().create_task(self.clean_up())
        self._wake.set()

    def _ordered(self, command: worker_pb2.WorkerCommand) -> None:
        self._orders.append(command)
        self._wake.set()

    def _idles(self, reason: str) -> None:
        self._idle = reason
        self._wake.set()

    def _fence(self) -> None:
        self._fenced = True
        self._wake.set()

    # To the worker

    async def _send(self) -> None:
        if self._orders:
            orders, self._orders = self._orders, []
            batch = runner_service_pb2.WorkerCommands(commands=orders)
            await self._stream.write(runner_service_pb2.StreamLeasesResponse(commands=batch))
        while self._deliveries:
            count = self._fitting()
            batch_out = runner_service_pb2.LeasedRollouts(rollouts=self._deliveries[:count])
            await self._stream.write(runner_service_pb2.StreamLeasesResponse(delivery=batch_out))
            # Only now: what could not be written goes back to its queue.
            del self._deliveries[:count]
            if self._waiter is not None and self._waiter.sent(count):
                await self._store.write(self._go_on)
        idle, self._idle = self._idle, ""
        if idle and idle != self._told_idle:
            self._told_idle = idle
            notice = runner_service_pb2.IdleNotice(reason=idle)
            await self._stream.write(runner_service_pb2.StreamLeasesResponse(idle=notice))

    def _fitting(self) -> int:
        size = 0
        for count, leased in enumerate(self._deliveries):
            size += leased.ByteSize()
            if size > _MESSAGE_BYTES and count:
                return count
        return len(self._deliveries)

    async def _send_drain(self) -> None:
        farewell = runner_service_pb2.LeaseStreamDrain(reason="the server is draining; reconnect")
        await self._stream.write(runner_service_pb2.StreamLeasesResponse(drain=farewell))

    async def clean_up(self) -> None:
        """Lines up no more; what was leased and never sent is released at once."""
        self._gone = True
        if self._waiter is None:
            return
        self._side.commands.unlisten(self._waiter.worker_key, self._ordered)
        with contextlib.suppress(StoreError):
            # A store that stops accepts nothing more: the lease then ends with the session or by time.
            await self._store.write(self._give_back)
