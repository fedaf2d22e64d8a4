"""Lower-case names of states, for people and for statistics."""

from __future__ import annotations

from agl_grpc.v1 import attempt_pb2, rollout_pb2


def rollout_status(status: int) -> str:
    """For example `queuing`."""
    return rollout_pb2.RolloutStatus.Name(rollout_pb2.RolloutStatus.ValueType(status))[15:].lower()


def attempt_status(status: int) -> str:
    """For example `preparing`."""
    return attempt_pb2.AttemptStatus.Name(attempt_pb2.AttemptStatus.ValueType(status))[15:].lower()
