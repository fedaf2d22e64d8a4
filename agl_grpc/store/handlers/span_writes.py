"""Spans on their way in: AppendSpans, StreamSpans, ReserveSpanSequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf.message import Message

from agl_grpc.store import errors, limits
from agl_grpc.store.door.call import Call
from agl_grpc.store.door.info import durability
from agl_grpc.store.door.service import BidiStream
from agl_grpc.store.errors import StoreError
from agl_grpc.store.handlers.common import change
from agl_grpc.store.rollouts import rows
from agl_grpc.store.spans.check import CheckedGroup, check_group
from agl_grpc.store.spans.evict import Evictor
from agl_grpc.store.spans.queue import SpanQueue
from agl_grpc.store.spans.stream import SpanStream, SpanStreams
from agl_grpc.store.spans.write import SpanMessage, SpanOutcome, last_sequences, raise_sequences
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.store.store import Store
from agl_grpc.v1 import store_service_pb2

_OVERHEAD = 200  # bytes of Python objects for each span


class SpanWriteHandlers:
    """Serves the writing rpcs of spans.

    Args:
        store: Where they go.
        queue_bytes: Most bytes that wait for the disk.
        evictor: Keeps a throw-away store small; None = spans stay.
    """

    def __init__(self, store: Store, queue_bytes: int, evictor: Evictor | None = None) -> None:
        self._store = store
        self._queue = SpanQueue(store, queue_bytes, evictor)
        self._streams = SpanStreams()

    async def append_spans(self, request: Any, call: Call) -> store_service_pb2.AppendSpansResponse:
        """Store a RawAppendSpansRequest; answered when it is on disk."""
        message = read_message(request.groups, call, self._store.clock.now() * 1000)
        outcome = await self._queue.put(message)
        answer = store_service_pb2.AppendSpansResponse(
            stored=outcome.stored,
            duplicates=outcome.duplicates,
            rejected=rejections(outcome),
            durability=durability(self._store),
        )
        if request.return_sequence_ids:
            answer.sequence_ids.extend(outcome.sequence_ids)
        return answer

    async def stream_spans(self, stream: BidiStream[Any], call: Call) -> None:
        """Store RawStreamSpansRequests as they come and acknowledge what is on disk."""

        def read(groups: Iterable[Any]) -> SpanMessage:
            return read_message(groups, call, self._store.clock.now() * 1000)

        await SpanStream(self._store, self._queue, self._streams, stream, call, read).run()

    async def reserve_span_sequences(
        self, request: store_service_pb2.ReserveSpanSequencesRequest, call: Call
    ) -> bytes:
        """Hand out sequence ids; a rollout's counter rises by one for each."""
        for key in request.keys:
            call.caller.require_attempt(key.attempt_id)

        def run(tx: Tx) -> Message:
            names = [(key.rollout_id, key.attempt_id) for key in request.keys]
            keys = [attempt.rollout_key for attempt, _ in rows.attempts_by_name(tx.connection, names)]
            last = last_sequences(tx.connection, keys)
            answer = store_service_pb2.ReserveSpanSequencesResponse()
            for rollout_key in keys:
                last[rollout_key] += 1
                answer.sequence_ids.append(last[rollout_key])
            raise_sequences(tx, last)
            return answer

        return await change(self._store, call, request, run, rows=len(request.keys))


def read_message(groups: Iterable[Any], call: Call, now_ns: int, field: str = "groups") -> SpanMessage:
    """Check raw groups of spans and who sent them.

    Args:
        groups: RawAttemptSpans, or what has the same fields as far as they are set.
        call: Who sent them.
        now_ns: The store's time in nanoseconds.
        field: The request's field that holds the groups.

    Raises:
        StoreError: INVALID_FIELD when there are too many spans.
    """
    checked: list[CheckedGroup] = []
    size = rows_ = 0
    for index, group in enumerate(groups):
        count = len(group.spans)
        rows_ += count
        if rows_ > limits.SPANS_PER_MESSAGE or index >= limits.BATCH_ITEMS:
            rule = f"are more than {limits.BATCH_ITEMS} or hold more than {limits.SPANS_PER_MESSAGE} spans"
            raise errors.invalid_field(field, f"{rule}; send fewer")
        attempt_id, refusal = _target(group.attempt_id, call)
        one = check_group(group, attempt_id, field, index, now_ns)
        if refusal is not None:
            one.refuse(refusal)
        checked.append(one)
        size += group.ByteSize() + _OVERHEAD * count
    return SpanMessage(checked, size, rows_)


def _target(attempt_id: str, call: Call) -> tuple[str, StoreError | None]:
    """The attempt that a group is for, and why its sender may not write there.

    An agent's credential stands for its own attempt, which need not be named, and for no other.
    """
    credential = call.caller.credential
    if credential is None or attempt_id == credential.attempt_id:
        return attempt_id, None
    if not attempt_id:
        return credential.attempt_id, None
    return attempt_id, errors.not_permitted(f"a credential of attempt {attempt_id}")


def rejections(outcome: SpanOutcome) -> Sequence[store_service_pb2.RejectedSpan]:
    """What was not stored of a message, as the contract says it."""
    return [
        store_service_pb2.RejectedSpan(
            group_index=one.group_index, index=one.place, status=one.error.to_item(), span_id=one.span_id
        )
        for one in outcome.rejected
    ]
