"""A worker's side of leased work: deliveries by credit, renewals, commands, completions."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Self, TypeVar

import grpc

from agl_grpc.client.batcher import CallBatcher
from agl_grpc.client.channel import RetryPolicy, is_transient
from agl_grpc.client.errors import (
    IllegalTransition,
    LeaseLost,
    NotFound,
    StoreError,
    StoreUnavailable,
    error_from_rpc,
    retry_after,
)
from agl_grpc.client.lease_events import (
    Commanded,
    Connected,
    Delivered,
    Disconnected,
    Idle,
    LeaseEnded,
    LeaseEvent,
)
from agl_grpc.client.leases import Completion, LeasedRollout, held_lease, read_commands
from agl_grpc.client.store_client import StoreClient
from agl_grpc.model.attempt import Lease
from agl_grpc.model.rollout import Rollout
from agl_grpc.model.times import to_duration
from agl_grpc.model.value import to_labels
from agl_grpc.model.worker import WorkerCommand
from agl_grpc.v1 import runner_service_pb2 as pb

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TRIES_OF_A_REFUSED_STREAM = 5
_NOT_PERMITTED_SECONDS = 5.0
_REMEMBERED_COMMANDS = 10_000
_LAST_RELEASE_SECONDS = 5.0


class LeaseStream:
    """Takes work for one worker, and keeps it.

    Iterate it for `LeaseEvent`s. Work comes as long as credits last (`grant`); a held lease is renewed at a
    third of its duration, all of a worker's in one call, until `complete` or `release`. A stream that breaks
     is opened again with the leases that are held and the credits that are left. Whether a lease is lost is
    the store's word alone: while the store is away nothing ends. Belongs to the event loop that starts it.

    ``session_id`` is new at each start of a worker: leases of the session that it does not name are released.
    ``lease_duration`` is in seconds, 1 to 3600.
    """

    def __init__(
        self,
        client: StoreClient,
        *,
        worker_id: str,
        session_id: str | None = None,
        queues: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
        lease_duration: float = 30.0,
        credits: int = 0,
        run_id: str | None = None,
    ) -> None:
        self.worker_id = worker_id
        self.session_id = session_id or uuid.uuid4().hex
        self._client = client
        self._work = pb.WorkRequest(
            run_id=client.run_or_default(run_id),
            queues=queues,
            labels=to_labels(labels),
            lease_duration=to_duration(lease_duration),
        )
        self._lease_duration = lease_duration
        self._credits = credits  # granted and not used
        self._granted = 0  # in total on the open stream, as its protocol counts
        self._held: dict[str, Lease] = {}
        self._ending: set[str] = set()
        self._seen_commands: dict[int, bool] = {}  # whether they were acknowledged
        self._acknowledged: list[int] = []
        self._drain_reason: str | None = None
        self._events: asyncio.Queue[LeaseEvent | Exception | None] = asyncio.Queue()
        self._outgoing = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._connected = False
        self._completions = CallBatcher(self._complete_many)

    async def __aenter__(self) -> Self:
        return self.start()

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def start(self) -> Self:
        """Start taking work, on the running loop. A second call changes nothing."""
        if not self._tasks:
            self._tasks = [
                asyncio.create_task(self._guard(self._run()), name=f"leases {self.worker_id}"),
                asyncio.create_task(self._guard(self._renew()), name=f"renewals {self.worker_id}"),
            ]
        return self

    @property
    def held(self) -> dict[str, Lease]:
        """Leases that are held now, by attempt id."""
        return dict(self._held)

    @property
    def credits(self) -> int:
        """Credits that are granted and not used."""
        return self._credits

    @property
    def connected(self) -> bool:
        """Whether the stream is open now."""
        return self._connected

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> LeaseEvent:
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        if event is None:
            raise StopAsyncIteration
        return event

    def grant(self, credits: int = 1) -> None:
        """Allow so many more deliveries."""
        if credits < 0:
            raise ValueError(f"credits is {credits}; a grant cannot be taken back")
        self._credits += credits
        self._granted += credits
        self._outgoing.set()

    def acknowledge(self, *commands: WorkerCommand) -> None:
        """Say that commands were carried out; the store stops repeating them."""
        for command in commands:
            self._seen_commands[command.command_id] = True
            self._acknowledged.append(command.command_id)
        self._outgoing.set()

    def drain(self, reason: str = "") -> None:
        """Take nothing new: credits that are left are void. What is held goes on."""
        self._drain_reason = reason
        self._credits = 0
        self._outgoing.set()

    async def complete(self, completion: Completion) -> Rollout:
        """End a held attempt; completions made at the same time travel in one call.

        Raises `LeaseLost` when the lease is over: the result was not taken. Answers the rollout as it now is.
        """
        attempt_id = completion.lease.attempt_id
        return await self._end([attempt_id], self._completions.submit(completion))

    async def release(self, leases: Iterable[Lease], reason: str = "") -> list[StoreError | None]:
        """Hand attempts back unfinished; answers for each why it was refused, ``None`` = done."""
        given = list(leases)
        if not given:
            return []
        ends = [lease.attempt_id for lease in given]
        return await self._end(ends, self._client.release_attempts(self.worker_id, given, reason=reason))

    async def close(self, *, release: bool = True) -> None:
        """Close the stream, handing back what is still held (unless told not to)."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if release and self._held:
            held, last_try = list(self._held.values()), RetryPolicy(timeout=_LAST_RELEASE_SECONDS)
            try:
                await self._client.release_attempts(
                    self.worker_id, held, reason="the worker left", retry=last_try
                )
            except StoreUnavailable as error:
                logger.warning("worker %s leaves %d leases to run out: %s", self.worker_id, len(held), error)
            self._held.clear()
        self._events.put_nowait(None)

    async def _end(self, attempt_ids: Sequence[str], call: Awaitable[T]) -> T:
        # A renewal that crosses the call finds the lease over: that is no loss.
        self._ending.update(attempt_ids)
        try:
            result = await call
        except (LeaseLost, NotFound, IllegalTransition):
            self._forget(attempt_ids)
            raise
        finally:
            self._ending.difference_update(attempt_ids)
        self._forget(attempt_ids)
        return result

    def _forget(self, attempt_ids: Iterable[str]) -> None:
        for attempt_id in attempt_ids:
            self._held.pop(attempt_id, None)

    async def _complete_many(self, completions: list[Completion]) -> Sequence[Rollout | Exception]:
        return await self._client.complete_attempts(self.worker_id, completions)

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            self._events.put_nowait(error)

    async def _run(self) -> None:
        tries = refusals = 0
        while True:
            reason = "the store ended the stream"
            wait: float | None = None
            try:
                await self._session()
            except grpc.aio.AioRpcError as error:
                failure = error_from_rpc(error, self._client.target)
                if error.code() is grpc.StatusCode.PERMISSION_DENIED:
                    # A grant may come or come back: wait for it, and say so.
                    self._events.put_nowait(Idle(f"not permitted: {failure}"))
                    await asyncio.sleep(_NOT_PERMITTED_SECONDS)
                    continue
                refusals = 0 if is_transient(error) or self._connected else refusals + 1
                if refusals >= _TRIES_OF_A_REFUSED_STREAM:
                    raise failure from None
                reason, wait = str(failure), retry_after(error)
            tries = 0 if self._connected else tries + 1
            if self._connected:
                self._connected = False
                logger.info("lease stream of %s broke, opening it again: %s", self.worker_id, reason)
                self._events.put_nowait(Disconnected(reason))
            await asyncio.sleep(self._client.retry.wait(tries) if wait is None else wait)

    async def _session(self) -> None:
        """One stream, from its opening to its end."""
        self._granted = self._credits
        opening = pb.LeaseStreamOpen(
            worker_id=self.worker_id,
            session_id=self.session_id,
            work=self._work,
            held=[held_lease(lease) for lease in self._held.values()],
            granted=self._granted,
        )
        call: Any = self._client.bound.runner.StreamLeases(metadata=self._client.metadata)
        writer: asyncio.Task[None] | None = None
        try:
            await call.write(pb.StreamLeasesRequest(open=opening))
            writer = asyncio.create_task(self._write(call, opening.granted))
            while (response := await call.read()) is not grpc.aio.EOF:
                self._receive(response)
        finally:
            if writer is not None:
                writer.cancel()
            call.cancel()

    def _receive(self, response: pb.StreamLeasesResponse) -> None:
        match response.WhichOneof("message"):
            case "opened":
                self._connected = True
                self._events.put_nowait(Connected())
                for attempt_id in response.opened.lost_attempt_ids:
                    self._lose(attempt_id, None)
            case "delivery":
                for message in response.delivery.rollouts:
                    self._deliver(LeasedRollout.from_proto(message))
            case "commands":
                self._command(read_commands(response.commands.commands))
            case "idle":
                self._events.put_nowait(Idle(response.idle.reason))
            case "drain":
                logger.info("lease stream of %s: the store drains: %s", self.worker_id, response.drain.reason)

    def _deliver(self, work: LeasedRollout) -> None:
        self._credits = max(0, self._credits - 1)
        self._held[work.attempt_id] = work.lease
        self._events.put_nowait(Delivered(work))

    def _lose(self, attempt_id: str, error: StoreError | None) -> None:
        if attempt_id in self._ending:
            return
        lease = self._held.pop(attempt_id, None)
        if lease is not None:
            self._events.put_nowait(LeaseEnded(lease.rollout_id, attempt_id, error))

    def _command(self, commands: Iterable[WorkerCommand]) -> None:
        for command in commands:
            acknowledged = self._seen_commands.get(command.command_id)
            if acknowledged:  # that answer was lost with a stream
                self.acknowledge(command)
            if acknowledged is not None:
                continue
            self._seen_commands[command.command_id] = False
            if len(self._seen_commands) > _REMEMBERED_COMMANDS:
                del self._seen_commands[next(iter(self._seen_commands))]
            self._events.put_nowait(Commanded(command))

    async def _write(self, call: Any, granted: int) -> None:
        drained = False
        try:
            while True:
                if self._granted > granted:
                    granted = self._granted
                    await call.write(pb.StreamLeasesRequest(credit=pb.CreditGrant(granted=granted)))
                if self._acknowledged:
                    ids, self._acknowledged = self._acknowledged, []
                    await call.write(pb.StreamLeasesRequest(ack=pb.CommandAck(command_ids=ids)))
                if self._drain_reason is not None and not drained:
                    drained = True
                    leaving = pb.LeaseStreamDrain(reason=self._drain_reason)
                    await call.write(pb.StreamLeasesRequest(drain=leaving))
                await self._outgoing.wait()
                self._outgoing.clear()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the reader of the same call reports its status

    async def _renew(self) -> None:
        while True:
            shortest = min((lease.duration for lease in self._held.values()), default=self._lease_duration)
            await asyncio.sleep(min(shortest, self._lease_duration) / 3)
            leases = list(self._held.values())
            if not leases:
                continue
            try:
                renewals = await self._client.renew_leases(
                    self.worker_id, leases, retry=RetryPolicy(timeout=max(5.0, shortest))
                )
            except StoreError as error:
                logger.warning(
                    "worker %s could not renew its leases, trying again: %s", self.worker_id, error
                )
                continue
            for attempt_id, duration in renewals.durations.items():
                if attempt_id in self._held:
                    self._held[attempt_id].duration = duration
            for attempt_id, lost in renewals.lost.items():
                self._lose(attempt_id, lost)
            self._command(renewals.commands)
