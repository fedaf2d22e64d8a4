"""What travels beside the tensors: keys of the rendezvous store, segment headers, plans and reports."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass

DEFAULT_BUCKET_BYTES = 512 * 1024 * 1024
"""Largest single broadcast, in bytes; larger tensors travel in several."""

ALIGNMENT = 64
"""Offset of every tensor in its segment is a multiple of this, so that it can be viewed as any dtype."""


class TransferError(RuntimeError):
    """A transfer failed or was given up; the message is one line and says why."""


class ReceiverState(enum.StrEnum):
    """Life of one transfer on the receiving side."""

    IDLE = "idle"
    RECEIVING = "receiving"
    RECEIVED = "received"
    FAILED = "failed"


@dataclass(frozen=True)
class ReceiverStatus:
    """State of a receiver's current transfer.

    ``digest`` (``sha256:<hex>``) is taken over what was received (only when RECEIVED), ``received_bytes``
    counts tensor payload, ``error`` is one line (only when FAILED).
    """

    transfer_id: str
    state: ReceiverState
    digest: str = ""
    received_bytes: int = 0
    tensors: int = 0
    error: str = ""


@dataclass(frozen=True)
class TransferReport:
    """What a sender sent: digest (``sha256:<hex>``), bytes of payload, tensors, wall time (seconds)."""

    transfer_id: str
    digest: str
    sent_bytes: int
    tensors: int
    seconds: float


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in its segment. ``dtype`` is torch's name without the prefix, e.g. ``bfloat16``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """What the sender decides once all receivers have joined."""

    group: int
    backend: str
    bucket_bytes: int
    ranks: dict[str, int]

    def encode(self) -> bytes:
        """As JSON, for the rendezvous store."""
        return json.dumps(vars(self)).encode()

    @staticmethod
    def decode(data: bytes) -> Plan:
        """Inverse of `encode`."""
        return Plan(**json.loads(data))


@dataclass(frozen=True)
class JoinRequest:
    """A receiver's hello: who it is, which process group it still holds (-1: none), what it can speak."""

    receiver_id: str
    group: int
    backends: tuple[str, ...]

    def encode(self) -> bytes:
        """As JSON, for the rendezvous store."""
        return json.dumps(vars(self)).encode()

    @staticmethod
    def decode(data: bytes) -> JoinRequest:
        """Inverse of `encode`."""
        raw = json.loads(data)
        return JoinRequest(raw["receiver_id"], raw["group"], tuple(raw["backends"]))


@dataclass(frozen=True)
class SegmentHeader:
    """Tensors that travel in one piece of memory of ``nbytes`` bytes."""

    entries: tuple[TensorEntry, ...]
    nbytes: int

    def encode(self) -> bytes:
        """As JSON, for the rendezvous store."""
        rows = [[e.name, e.dtype, list(e.shape), e.offset, e.nbytes] for e in self.entries]
        return json.dumps({"nbytes": self.nbytes, "entries": rows}).encode()

    @staticmethod
    def decode(data: bytes) -> SegmentHeader:
        """Inverse of `encode`."""
        raw = json.loads(data)
        entries = tuple(TensorEntry(n, d, tuple(s), o, b) for n, d, s, o, b in raw["entries"])
        return SegmentHeader(entries, raw["nbytes"])


def join_counter(transfer_id: str) -> str:
    """Key counting the receivers that have joined."""
    return f"{transfer_id}/joined"


def join_key(transfer_id: str, index: int) -> str:
    """Key of the join request with this index (from 1)."""
    return f"{transfer_id}/join/{index}"


def plan_key(transfer_id: str) -> str:
    """Key of the plan."""
    return f"{transfer_id}/plan"


def segment_key(transfer_id: str, index: int) -> str:
    """Key of a segment's header, from 0; the header without entries ends the transfer."""
    return f"{transfer_id}/segment/{index}"


def digests_key(transfer_id: str) -> str:
    """Key of the sender's digests, one per tensor, in order."""
    return f"{transfer_id}/digests"


def done_counter(transfer_id: str) -> str:
    """Key counting the receivers that have taken everything."""
    return f"{transfer_id}/done"


def group_prefix(group: int) -> str:
    """Prefix of the keys by which the members of a process group find each other."""
    return f"group/{group}"
