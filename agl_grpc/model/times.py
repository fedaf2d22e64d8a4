"""Times as users see them: seconds since the epoch as floats, durations as float seconds."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

_NANOS = 1_000_000_000


def to_timestamp(seconds: float | None) -> Timestamp | None:
    """Turn seconds since the epoch into a `Timestamp` (microseconds are kept)."""
    if seconds is None:
        return None
    whole, nanos = divmod(round(seconds * 1_000_000) * 1000, _NANOS)
    return Timestamp(seconds=whole, nanos=nanos)


def from_timestamp(message: Timestamp) -> float:
    """Turn a `Timestamp` into seconds since the epoch."""
    return message.seconds + message.nanos / _NANOS


def to_duration(seconds: float | None) -> Duration | None:
    """Turn seconds into a `Duration`."""
    if seconds is None:
        return None
    nanos = round(seconds * _NANOS)
    sign = -1 if nanos < 0 else 1
    whole, rest = divmod(abs(nanos), _NANOS)
    return Duration(seconds=sign * whole, nanos=sign * rest)


def from_duration(message: Duration) -> float:
    """Turn a `Duration` into seconds."""
    return message.seconds + message.nanos / _NANOS


def read_time(message: Message, field: str) -> float | None:
    """Read a `Timestamp` field as seconds since the epoch; ``None`` when it is not set."""
    return from_timestamp(getattr(message, field)) if message.HasField(field) else None


def read_seconds(message: Message, field: str) -> float | None:
    """Read a `Duration` field as seconds; ``None`` when it is not set."""
    return from_duration(getattr(message, field)) if message.HasField(field) else None
