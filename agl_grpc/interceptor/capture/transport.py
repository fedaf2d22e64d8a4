"""How captured spans reach the store: batches of spans by attempt, answered when they are on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from agl_grpc.client import channel as client
from agl_grpc.interceptor.capture.wire import parts
from agl_grpc.v1 import error_reason_pb2, store_service_pb2

_METHOD = "/agl_grpc.v1.StoreService/AppendSpans"
_GROUPS = store_service_pb2.AppendSpansRequest.GROUPS_FIELD_NUMBER

FIRST_BACKOFF = 0.1
"""Seconds before the store is tried again, doubled up to the longest."""

LONGEST_BACKOFF = 2.0
"""Seconds. For `RECONNECT_GRACE` after it was away the store seals nothing: two tries fit in with room."""

_REFUSALS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
    }
)
"""Codes that say that the batch itself is wrong: sending it again cannot help."""


@dataclass(frozen=True)
class Rejection:
    """A span that the store did not take: where it stood in its batch (``index`` -1: a whole group), why."""

    group_index: int
    index: int
    reason: int
    message: str

    @property
    def base_unknown(self) -> bool:
        """Whether the prompt must be sent whole."""
        return self.reason == error_reason_pb2.ERROR_REASON_DELTA_BASE_UNKNOWN


class StoreAway(Exception):
    """The store did not take the batch now: keep it and try again."""


class SpanTransport(Protocol):
    """Delivers batches of AttemptSpans, as they are on the wire, one after the other."""

    async def deliver(self, groups: Sequence[bytes], limit: float) -> list[Rejection]:
        """Return once everything that is not rejected is on the store's disk.

        Raises StoreAway when it is not reachable, too slow for `limit` seconds, overloaded or full.
        """
        ...

    async def close(self) -> None:
        """Let go of the connection."""
        ...


class AppendTransport:
    """AppendSpans calls on a channel: unary, so each batch has its own answer and none is resumed."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._append: Any = channel.unary_unary(
            _METHOD, None, store_service_pb2.AppendSpansResponse.FromString
        )

    async def deliver(self, groups: Sequence[bytes], limit: float) -> list[Rejection]:
        """See SpanTransport. A batch refused as a whole is sent group by group, so only the culprit falls."""
        request = b"".join(part for group in groups for part in parts(_GROUPS, (group,)))
        try:
            response = await self._append(request, timeout=limit)
        except grpc.aio.AioRpcError as error:
            if error.code() not in _REFUSALS:
                raise StoreAway(f"{error.code().name}: {error.details()}") from error
            if len(groups) == 1:
                return [Rejection(0, -1, 0, f"{error.code().name}: {error.details()}")]
            rejections: list[Rejection] = []
            for index, group in enumerate(groups):
                refused = await self.deliver([group], limit)
                rejections += [Rejection(index, r.index, r.reason, r.message) for r in refused]
            return rejections
        return [
            Rejection(r.group_index, r.index, r.status.reason, r.status.message) for r in response.rejected
        ]

    async def close(self) -> None:
        """The channel belongs to its maker: nothing to do."""


def open_channel(target: str) -> grpc.aio.Channel:
    """A channel to the store with the project's keepalive and message size; `grpcs://` = with TLS."""
    options = [
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_receive_message_length", 64 * 1024 * 1024),
        ("grpc.max_send_message_length", 64 * 1024 * 1024),
        ("grpc.min_reconnect_backoff_ms", 5_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]
    return client.open_channel(target, options)
