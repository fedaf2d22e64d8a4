"""A real store server on a random port, with stubs and a clock that the test moves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2

from agl_grpc.client.channel import open_channel
from agl_grpc.store.clock import Clock, ManualClock
from agl_grpc.store.door.app import ServeConfig, StoreServer
from agl_grpc.store.errors import STATUS_TRAILER
from agl_grpc.store.verify.check import check
from agl_grpc.v1 import attempt_pb2, rollout_pb2, runner_service_pb2, store_service_pb2
from agl_grpc.v1.runner_service_pb2_grpc import RunnerServiceStub
from agl_grpc.v1.store_service_pb2_grpc import StoreServiceStub
from agl_grpc.v1.trainer_service_pb2_grpc import TrainerServiceStub

SUCCEEDED = attempt_pb2.ATTEMPT_STATUS_SUCCEEDED
FAILED = attempt_pb2.ATTEMPT_STATUS_FAILED
TIMEOUT = attempt_pb2.ATTEMPT_STATUS_TIMEOUT
UNRESPONSIVE = attempt_pb2.ATTEMPT_STATUS_UNRESPONSIVE


def seconds(value: float) -> duration_pb2.Duration:
    """A duration."""
    return duration_pb2.Duration(seconds=int(value), nanos=int((value - int(value)) * 1e9))


class Rig:
    """A running server with its stubs."""

    def __init__(self, server: StoreServer, clock: Clock) -> None:
        self.server = server
        self.clock = clock
        self.channel = open_channel(server.address)
        self.store: Any = StoreServiceStub(self.channel)
        self.runner: Any = RunnerServiceStub(self.channel)
        self.trainer: Any = TrainerServiceStub(self.channel)

    async def close(self) -> None:
        """Stops client and server."""
        await self.channel.close()
        await self.server.stop()

    async def advance(self, by: float) -> None:
        """Moves the clock and lets the timers look."""
        assert isinstance(self.clock, ManualClock)
        self.clock.advance(by)
        await self.server.store.timers.fire()

    async def enqueue(self, *specs: rollout_pb2.RolloutSpec, run_id: str = "", **fields: Any) -> list[Any]:
        """Enqueues specs, or one made of the fields."""
        chosen = specs or (rollout_pb2.RolloutSpec(**fields),)
        request = store_service_pb2.EnqueueRolloutsRequest(run_id=run_id, rollouts=chosen)
        return list((await self.store.EnqueueRollouts(request)).rollouts)

    async def lease(
        self, worker: str = "w1", limit: int = 1, wait: float = 0, session: str = "s1", **work: Any
    ) -> list[Any]:
        """Leases by long poll."""
        request = runner_service_pb2.LeaseRolloutsRequest(
            worker_id=worker,
            session_id=session,
            limit=limit,
            wait=seconds(wait),
            work=runner_service_pb2.WorkRequest(**work),
        )
        return list((await self.runner.LeaseRollouts(request)).rollouts)

    async def complete(
        self, *leased: Any, status: int = SUCCEEDED, request_id: str = "", **fields: Any
    ) -> list[Any]:
        """Completes leased rollouts."""
        request = runner_service_pb2.CompleteAttemptsRequest(request_id=request_id, worker_id="w1")
        for one in leased:
            request.completions.add(
                attempt_id=one.attempt.attempt_id, lease_token=one.lease.lease_token, status=status, **fields
            )
        return list((await self.runner.CompleteAttempts(request)).results)

    async def renew(self, *leased: Any) -> Any:
        """Renews leases."""
        return await self.runner.RenewLeases(
            runner_service_pb2.RenewLeasesRequest(worker_id="w1", leases=[held(one) for one in leased])
        )

    async def rollout(self, rollout_id: str) -> Any:
        """The rollout as it now is, with its newest attempt."""
        request = store_service_pb2.GetRolloutRequest(rollout_id=rollout_id)
        return (await self.store.GetRollout(request)).rollout

    async def status(self, rollout_id: str) -> str:
        """The rollout's state in lower case."""
        return rollout_pb2.RolloutStatus.Name((await self.rollout(rollout_id)).rollout.status)[15:].lower()

    async def attempts(self, rollout_id: str) -> list[Any]:
        """The rollout's attempts, oldest first."""
        request = store_service_pb2.ListAttemptsRequest(rollout_id=rollout_id)
        return list((await self.store.ListAttempts(request)).attempts)

    async def update_attempt(self, attempt: Any, status: int, token: bytes = b"") -> Any:
        """Sets an attempt's status."""
        request = store_service_pb2.UpdateAttemptRequest(lease_token=token)
        request.attempt.rollout_id, request.attempt.attempt_id = attempt.rollout_id, attempt.attempt_id
        request.attempt.status = status
        request.update_mask.paths.append("status")
        return (await self.store.UpdateAttempt(request)).attempt

    async def span(self, attempt: Any, span_id: int, **fields: Any) -> Any:
        """Appends one span to an attempt."""
        request = store_service_pb2.AppendSpansRequest()
        group = request.groups.add(rollout_id=attempt.rollout_id, attempt_id=attempt.attempt_id)
        group.spans.add(span_id=span_id.to_bytes(8, "big"), trace_id=b"t" * 16, name="step", **fields)
        return await self.store.AppendSpans(request)

    async def wait(self, *rollout_ids: str, **fields: Any) -> Any:
        """Waits for rollouts."""
        request = store_service_pb2.WaitRolloutsRequest(rollout_ids=rollout_ids, **fields)
        return await self.store.WaitRollouts(request)

    async def cancel(self, *rollout_ids: str) -> list[str]:
        """Cancels rollouts."""
        request = store_service_pb2.CancelRolloutsRequest(reason="enough")
        request.filter.rollout_id_in.extend(rollout_ids)
        return list((await self.store.CancelRollouts(request)).rollout_ids)


def held(leased: Any) -> runner_service_pb2.HeldLease:
    """The lease of a leased rollout as its worker names it."""
    return runner_service_pb2.HeldLease(
        attempt_id=leased.lease.attempt_id, lease_token=leased.lease.lease_token
    )


def error_info(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    """The error's one ErrorInfo."""
    for key, value in error.trailing_metadata() or ():
        if key == STATUS_TRAILER:
            info = error_details_pb2.ErrorInfo()
            status = status_pb2.Status.FromString(value)
            assert [detail.Unpack(info) for detail in status.details].count(True) == 1
            return info
    raise AssertionError(f"no details in {error}")


def reason(error: grpc.aio.AioRpcError) -> str:
    """The reason in the error's one ErrorInfo."""
    return str(error_info(error).reason)


@asynccontextmanager
async def running(path: Path | str | None, clock: Clock | None = None) -> AsyncIterator[Rig]:
    """A server for the length of a `with` block; without a path the database is thrown away.

    Whatever a test does, every invariant of the database holds at its end.
    """
    clock = clock or ManualClock()
    rig = Rig(await StoreServer.start(ServeConfig(port=0, database=path, grace=1.0), clock), clock)
    try:
        yield rig
        if not rig.server.store.hub.closed:
            report = await rig.server.store.read(check)
            assert report.sound, report.broken
    finally:
        await rig.close()


class WorkerStream:
    """A lease stream as a worker speaks it."""

    def __init__(self, rig: Rig) -> None:
        self._call = rig.runner.StreamLeases()

    async def open(self, worker: str = "w1", session: str = "s1", granted: int = 0, **fields: Any) -> Any:
        """Opens the stream; returns the store's first answer."""
        opening = runner_service_pb2.LeaseStreamOpen(
            worker_id=worker, session_id=session, granted=granted, **fields
        )
        await self._call.write(runner_service_pb2.StreamLeasesRequest(open=opening))
        return (await self._call.read()).opened

    async def grant(self, total: int) -> None:
        """Grants credits."""
        credit = runner_service_pb2.CreditGrant(granted=total)
        await self._call.write(runner_service_pb2.StreamLeasesRequest(credit=credit))

    async def acknowledge(self, *command_ids: int) -> None:
        """Acknowledges commands."""
        ack = runner_service_pb2.CommandAck(command_ids=command_ids)
        await self._call.write(runner_service_pb2.StreamLeasesRequest(ack=ack))

    async def drain(self) -> None:
        """Takes nothing new."""
        drain = runner_service_pb2.LeaseStreamDrain()
        await self._call.write(runner_service_pb2.StreamLeasesRequest(drain=drain))

    async def read(self) -> Any:
        """The next message; notices of idleness are left out."""
        while (message := await self._call.read()) is not grpc.aio.EOF:
            if not message.HasField("idle"):
                return message
        return None

    async def read_idle(self) -> str:
        """The next message, which must be a notice of idleness."""
        message = await self._call.read()
        assert message.HasField("idle"), message
        return str(message.idle.reason)

    async def deliveries(self, count: int) -> list[Any]:
        """The next deliveries."""
        got: list[Any] = []
        while len(got) < count:
            message = await self.read()
            got += message.delivery.rollouts
        assert len(got) == count
        return got

    async def done(self) -> None:
        """Says all and waits for the end."""
        await self._call.done_writing()
        assert await self.read() is None

    def cancel(self) -> None:
        """Breaks the stream."""
        self._call.cancel()
