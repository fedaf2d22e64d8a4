"""What a lease stream tells its worker."""

from __future__ import annotations

from dataclasses import dataclass

from agl_grpc.client.errors import StoreError
from agl_grpc.client.leases import LeasedRollout
from agl_grpc.model.worker import WorkerCommand


@dataclass(slots=True, frozen=True)
class Delivered:
    """Work has come; one credit is used."""

    work: LeasedRollout


@dataclass(slots=True, frozen=True)
class LeaseEnded:
    """A lease is no longer the worker's: stop its attempt. ``error`` says why, where the store said so."""

    rollout_id: str
    attempt_id: str
    error: StoreError | None = None


@dataclass(slots=True, frozen=True)
class Commanded:
    """The store wants something done; acknowledge it when it is, or it will come again."""

    command: WorkerCommand


@dataclass(slots=True, frozen=True)
class Idle:
    """Why a worker with credits gets nothing, for example ``no work`` or ``paused``."""

    reason: str


@dataclass(slots=True, frozen=True)
class Connected:
    """The stream is open, for the first time or again after a disconnect."""


@dataclass(slots=True, frozen=True)
class Disconnected:
    """The stream broke and will be opened again; leases that are held stay held."""

    reason: str


LeaseEvent = Delivered | LeaseEnded | Commanded | Idle | Connected | Disconnected
