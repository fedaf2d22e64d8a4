"""Leased work by unary calls. A worker that waits for work uses `LeaseStream` instead."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from agl_grpc.client.blobs import BlobCalls
from agl_grpc.client.channel import RetryPolicy
from agl_grpc.client.errors import StoreError, error_from_item
from agl_grpc.model.attempt import Lease
from agl_grpc.model.enums import AttemptStatus
from agl_grpc.model.failure import Failure
from agl_grpc.model.resource import ResourcesUpdate
from agl_grpc.model.reward import Reward
from agl_grpc.model.rollout import AttemptedRollout, Rollout, attempted_rollout
from agl_grpc.model.span import Span
from agl_grpc.model.times import from_duration, to_duration
from agl_grpc.model.value import to_labels, to_payload
from agl_grpc.model.worker import WorkerCommand
from agl_grpc.v1 import runner_service_pb2 as pb
from agl_grpc.v1 import span_pb2

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class LeasedRollout:
    """Work with all that is needed to do it; ``resources`` ``None`` = none were published."""

    rollout: AttemptedRollout
    lease: Lease
    resources: ResourcesUpdate | None = None

    @property
    def attempt_id(self) -> str:
        """The attempt made for this delivery."""
        return self.lease.attempt_id

    @classmethod
    def from_proto(cls, message: pb.LeasedRollout) -> Self:
        """Read the contract's form."""
        lease = Lease.from_proto(message.lease)
        return cls(
            rollout=attempted_rollout(message.rollout, message.attempt, lease.attempt_credential),
            lease=lease,
            resources=ResourcesUpdate.from_proto(message.resources)
            if message.HasField("resources")
            else None,
        )


@dataclass(slots=True, kw_only=True)
class Completion:
    """How an attempt ended: ``succeeded`` or ``failed``, with what goes with it.

    ``spans`` are its last ones, stored in the same transaction; a span may be a `Span`, the contract's
    message, or the bytes of one. They need a server with the capability ``completion_spans``: another one
    drops them.
    """

    lease: Lease
    status: AttemptStatus | str = AttemptStatus.SUCCEEDED
    failure: Failure | None = None
    rewards: Sequence[Reward] = ()
    output: Any = None
    spans: Sequence[Span | span_pb2.Span | bytes] = ()

    def to_proto(self) -> pb.Completion:
        """Write the contract's form."""
        return pb.Completion(
            rollout_id=self.lease.rollout_id,
            attempt_id=self.lease.attempt_id,
            lease_token=self.lease.lease_token,
            status=AttemptStatus.parse(self.status).number,
            failure=self.failure.to_proto() if self.failure else None,
            rewards=[reward.to_proto() for reward in self.rewards],
            output=None if self.output is None else to_payload(self.output, "output"),
            spans=[_span(span) for span in self.spans],
        )


@dataclass(slots=True, kw_only=True)
class Renewals:
    """Outcome of a renewal: new durations in seconds by attempt, lost leases, and commands to carry out."""

    durations: dict[str, float] = field(default_factory=dict)
    lost: dict[str, StoreError] = field(default_factory=dict)
    commands: list[WorkerCommand] = field(default_factory=list)


class LeaseCalls(BlobCalls):
    """The client's methods for leased work."""

    async def lease_rollouts(
        self,
        worker_id: str,
        session_id: str,
        *,
        limit: int = 1,
        wait: float = 0.0,
        queues: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
        lease_duration: float = 30.0,
        run_id: str | None = None,
    ) -> list[LeasedRollout]:
        """Take work under leases, waiting up to ``wait`` seconds for the first; possibly none."""
        request = pb.LeaseRolloutsRequest(
            worker_id=worker_id,
            session_id=session_id,
            work=pb.WorkRequest(
                run_id=self.run_or_default(run_id),
                queues=queues,
                labels=to_labels(labels),
                lease_duration=to_duration(lease_duration),
            ),
            limit=limit,
            wait=to_duration(wait),
        )
        response = await self.call(self.bound.runner.LeaseRollouts, request, try_timeout=wait + 15.0)
        taken = [LeasedRollout.from_proto(rollout) for rollout in response.rollouts]
        for work in taken:
            await self.with_input(work.rollout)
        return taken

    async def renew_leases(
        self,
        worker_id: str,
        leases: Sequence[Lease],
        *,
        acknowledged_command_ids: Sequence[int] = (),
        retry: RetryPolicy | None = None,
    ) -> Renewals:
        """Renew all of a worker's leases in one call; lost ones are told apart, never raised."""
        request = pb.RenewLeasesRequest(
            worker_id=worker_id,
            leases=[held_lease(lease) for lease in leases],
            acknowledged_command_ids=acknowledged_command_ids,
        )
        response = await self.call(self.bound.runner.RenewLeases, request, retry=retry)
        renewals = Renewals(commands=read_commands(response.commands))
        for renewal in response.renewals:
            if renewal.HasField("error"):
                renewals.lost[renewal.attempt_id] = error_from_item(renewal.error)
            else:
                renewals.durations[renewal.attempt_id] = from_duration(renewal.duration)
        return renewals

    async def complete_attempts(
        self, worker_id: str, completions: Sequence[Completion]
    ) -> list[Rollout | StoreError]:
        """End attempts; answers for each its rollout as it now is, or why it was refused.

        Spans that the store refuses are logged; they do not keep their attempt from ending.
        """
        request = pb.CompleteAttemptsRequest(
            worker_id=worker_id, completions=[completion.to_proto() for completion in completions]
        )
        await self.spill(completion.output for completion in request.completions)
        response = await self.call(self.bound.runner.CompleteAttempts, request)
        for result in response.results:
            for rejected in result.rejected:
                error = error_from_item(rejected.status)
                text = "the store refused span %s of attempt %s: %s"
                logger.warning(text, rejected.span_id.hex(), result.attempt_id, error)
        return [
            error_from_item(result.error) if result.HasField("error") else Rollout.from_proto(result.rollout)
            for result in response.results
        ]

    async def release_attempts(
        self,
        worker_id: str,
        leases: Sequence[Lease],
        *,
        reason: str = "",
        retry: RetryPolicy | None = None,
    ) -> list[StoreError | None]:
        """Hand attempts back unfinished; answers for each why it was refused, ``None`` = done."""
        request = pb.ReleaseAttemptsRequest(
            worker_id=worker_id, leases=[held_lease(lease) for lease in leases], reason=reason
        )
        response = await self.call(self.bound.runner.ReleaseAttempts, request, retry=retry)
        return [
            error_from_item(result.error) if result.HasField("error") else None for result in response.results
        ]


def _span(span: Span | span_pb2.Span | bytes) -> span_pb2.Span:
    if isinstance(span, bytes):
        return span_pb2.Span.FromString(span)
    return span.to_proto() if isinstance(span, Span) else span


def held_lease(lease: Lease) -> pb.HeldLease:
    """A lease as its holder names it."""
    return pb.HeldLease(attempt_id=lease.attempt_id, lease_token=lease.lease_token)


def read_commands(messages: Sequence[Any]) -> list[WorkerCommand]:
    """Commands of kinds that this version knows."""
    return [command for command in map(WorkerCommand.from_proto, messages) if command is not None]
