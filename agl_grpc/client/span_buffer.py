"""What a span streamer holds until it is on disk: submissions, numbered messages, and a bound on both."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future as ThreadFuture
from dataclasses import dataclass, field

import grpc

from agl_grpc.client.errors import InvalidRequest, StoreError, error_from_item
from agl_grpc.client.span_wire import MAX_SPAN_BYTES, EncodedGroup, Oversized, SpanGroup, encode_groups
from agl_grpc.model.enums import Durability
from agl_grpc.v1 import store_service_pb2 as pb


@dataclass(slots=True, frozen=True, kw_only=True)
class SpanRejection:
    """A span that the store did not keep, and why.

    ``group_index`` and ``index`` say where it stood in what was sent; ``index`` -1 means the whole group.
    """

    rollout_id: str
    attempt_id: str
    group_index: int
    index: int
    span_id: bytes
    error: StoreError


@dataclass(slots=True, frozen=True, kw_only=True)
class SpanAck:
    """What was sent is on disk (see ``durability``), but for what is listed as rejected."""

    durability: Durability | None
    rejected: tuple[SpanRejection, ...] = ()


@dataclass(slots=True, eq=False)
class Submission:
    """What one caller sent, until all of it is settled."""

    future: asyncio.Future[SpanAck] | ThreadFuture[SpanAck]
    attempt_ids: frozenset[str]
    parts_left: int
    size: int
    rejected: list[SpanRejection] = field(default_factory=list)

    def settle_part(self, rejected: Iterable[SpanRejection], durability: Durability | None) -> bool:
        """Settle one part; true when that was the last one."""
        self.rejected.extend(rejected)
        self.parts_left -= 1
        if self.parts_left:
            return False
        if not self.future.done():
            self.future.set_result(SpanAck(durability=durability, rejected=tuple(self.rejected)))
        return True

    def fail(self, error: Exception) -> None:
        """Tell the caller that it will never be settled."""
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(slots=True, frozen=True)
class Part:
    """An encoded part of a submission's group."""

    encoded: EncodedGroup
    group_index: int
    submission: Submission


@dataclass(slots=True)
class Message:
    """A message on its way: groups, each merged from parts, and what was rejected of it so far."""

    groups: list[list[Part]]
    payload: bytes
    sequence: int = 0
    rejected: list[pb.RejectedSpan] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Message:
        """Join parts; neighbours of one attempt that hold only spans become one group."""
        groups: list[list[Part]] = []
        for part in parts:
            last = groups[-1][-1].encoded if groups else None
            joins = last and last.mergeable and part.encoded.mergeable and last.key == part.encoded.key
            if joins:
                groups[-1].append(part)
            else:
                groups.append([part])
        return cls(groups, encode_groups([[part.encoded for part in group] for group in groups]))

    def rejections(self) -> dict[int, list[SpanRejection]]:
        """What was rejected, by the identity of the part that it came in."""
        found: dict[int, list[SpanRejection]] = {}
        for rejected in self.rejected:
            for part, index in _located(self.groups[rejected.group_index], rejected.index):
                rollout_id, attempt_id = part.encoded.key
                found.setdefault(id(part), []).append(
                    SpanRejection(
                        rollout_id=rollout_id,
                        attempt_id=attempt_id,
                        group_index=part.group_index,
                        index=index,
                        span_id=rejected.span_id,
                        error=error_from_item(rejected.status),
                    )
                )
        return found

    @property
    def parts(self) -> list[Part]:
        """All parts, in order."""
        return [part for group in self.groups for part in group]


def oversized(group: SpanGroup, group_index: int, span: Oversized) -> SpanRejection:
    """The rejection of a span that is too large to be sent at all."""
    limit = f"at most {MAX_SPAN_BYTES} are allowed: leave long values out"
    text = f"spans[{span.index}] has {span.size} bytes; {limit}"
    return SpanRejection(
        rollout_id=group.rollout_id,
        attempt_id=group.attempt_id,
        group_index=group_index,
        index=span.index,
        span_id=span.span_id,
        error=InvalidRequest(text, code=grpc.StatusCode.INVALID_ARGUMENT, reason="INVALID_FIELD"),
    )


def _located(group: Sequence[Part], index: int) -> list[tuple[Part, int]]:
    if index < 0:  # the whole group, or a call that was announced in it
        return [(part, index) for part in group]
    for part in group:
        if index < part.encoded.span_count:
            return [(part, part.encoded.first_span + index)]
        index -= part.encoded.span_count
    return []


class Room:
    """A bound on the bytes held, for callers on the loop and on other threads alike.

    What is larger than the bound is let in when nothing else is held.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._condition = threading.Condition()
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def held(self) -> int:
        """Bytes held now."""
        return self._held

    async def enter(self, size: int) -> None:
        """Wait for room, on the loop."""
        while not self._try(size):
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn

    def enter_blocking(self, size: int) -> None:
        """Wait for room, on another thread."""
        with self._condition:
            self._condition.wait_for(lambda: self._held == 0 or self._held + size <= self._limit)
            self._held += size

    def enter_at_once(self, size: int) -> None:
        """Go in without waiting, past the bound: for callers that must not block the loop."""
        with self._condition:
            self._held += size

    def leave(self, size: int) -> None:
        """Give room back; called on the loop."""
        with self._condition:
            self._held -= size
            self._condition.notify_all()
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)

    def _try(self, size: int) -> bool:
        with self._condition:
            if self._held and self._held + size > self._limit:
                return False
            self._held += size
            return True
