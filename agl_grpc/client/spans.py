"""Spans: adding, finding, exporting and watching."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from agl_grpc.client.connection import Connection
from agl_grpc.client.errors import NotFound, StoreError, error_from_item
from agl_grpc.client.watch import Watched, resumed, watch
from agl_grpc.model.enums import FilterLogic, SortOrder
from agl_grpc.model.otel import span_from_readable
from agl_grpc.model.page import PaginatedResult
from agl_grpc.model.span import Span, id_bytes
from agl_grpc.v1 import span_pb2
from agl_grpc.v1 import store_service_pb2 as pb

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

_ANNOUNCEMENT = -2
_SPANS_PER_GROUP = 100
_SPANS_PER_CALL = 1000
_BYTES_PER_CALL = 16 * 1024 * 1024


class SpansRejected(StoreError):
    """Some spans were refused; the others are on disk.

    ``rejections`` gives each refused span's place in the call and its own error, ``stored`` the other spans.
    """

    def __init__(self, rejections: Sequence[tuple[int, StoreError]], stored: Sequence[Span]) -> None:
        place, first = rejections[0]
        total = len(rejections) + len(stored)
        super().__init__(
            f"{len(rejections)} of {total} spans were refused, first spans[{place}]: {first}",
            code=first.code,
            reason=first.reason,
            metadata=first.metadata,
        )
        self.rejections = list(rejections)
        self.stored = list(stored)


class SpanCalls(Connection):
    """The client's methods for spans. For many spans over time see `SpanStreamer`."""

    async def add_span(self, span: Span) -> Span | None:
        """Store one span; answers it with its sequence id, or ``None`` when it was stored before."""
        response = await self.append_spans([_group([span])], return_sequence_ids=True)
        if response.rejected:
            raise error_from_item(response.rejected[0].status)
        return None if response.duplicates else replace(span, sequence_id=response.sequence_ids[0])

    async def add_many_spans(self, spans: Sequence[Span]) -> Sequence[Span]:
        """Store spans; answers them with their sequence ids, those that were there before included.

        When some are refused, all others are stored and `SpansRejected` is raised.
        """
        stored: list[Span] = []
        rejections: list[tuple[int, StoreError]] = []
        start = 0
        for part, groups in _calls(spans):
            response = await self.append_spans(groups, return_sequence_ids=True)
            refused = _places(groups, response.rejected)
            rejections.extend((start + place, error) for place, error in refused.items())
            numbered = zip(part, response.sequence_ids, strict=True)
            stored.extend(
                replace(span, sequence_id=number)
                for place, (span, number) in enumerate(numbered)
                if place not in refused
            )
            start += len(part)
        if rejections:
            raise SpansRejected(rejections, stored)
        return stored

    async def add_otel_span(
        self, rollout_id: str, attempt_id: str, readable_span: ReadableSpan, sequence_id: int | None = None
    ) -> Span | None:
        """Store a finished OpenTelemetry span; ``None`` when it was stored before."""
        message = span_from_readable(readable_span)
        span = Span.from_span_proto(
            message, rollout_id=rollout_id, attempt_id=attempt_id, sequence_id=sequence_id or 0
        )
        return await self.add_span(span)

    async def append_spans(
        self, groups: Iterable[span_pb2.AttemptSpans], *, return_sequence_ids: bool = False
    ) -> pb.AppendSpansResponse:
        """Store spans in the contract's own form; what the answer does not reject is on disk."""
        request = pb.AppendSpansRequest(groups=groups, return_sequence_ids=return_sequence_ids)
        return await self.call(self.bound.store.AppendSpans, request)

    async def query_spans(
        self,
        rollout_id: str,
        attempt_id: str | None = None,
        *,
        trace_id: str | None = None,
        trace_id_contains: str | None = None,
        span_id: str | None = None,
        span_id_contains: str | None = None,
        parent_id: str | None = None,
        parent_id_contains: str | None = None,
        name: str | None = None,
        name_contains: str | None = None,
        filter_logic: FilterLogic | str = FilterLogic.AND,
        limit: int = -1,
        offset: int = 0,
        sort_by: str = "sequence_id",
        sort_order: SortOrder | str = SortOrder.ASCENDING,
        model_calls_only: bool = False,
        omit_tokens: bool = False,
    ) -> PaginatedResult[Span]:
        """Spans of a rollout, with whole prompts. ``attempt_id``: an id, ``latest``, or ``None`` for all.

        Ids are in hex; ``limit`` -1 reads all pages. An unknown rollout has no spans.
        """
        request = pb.ListSpansRequest(
            rollout_id=rollout_id,
            attempt_id=attempt_id or "",
            filter=pb.SpanFilter(
                trace_id=id_bytes("trace_id", trace_id, 16) if trace_id else b"",
                trace_id_contains=trace_id_contains or "",
                span_id=id_bytes("span_id", span_id, 8) if span_id else b"",
                span_id_contains=span_id_contains or "",
                parent_span_id=id_bytes("parent_id", parent_id, 8) if parent_id else b"",
                parent_span_id_contains=parent_id_contains or "",
                name=name or "",
                name_contains=name_contains or "",
                logic=FilterLogic.parse(filter_logic).number,
                model_calls_only=model_calls_only,
            ),
            order_by=sort_by,
            order=SortOrder(sort_order).number,
            omit_tokens=omit_tokens,
        )
        try:
            return await self.query(
                self.bound.store.ListSpans,
                request,
                lambda page: map(Span.from_proto, page.spans),
                limit=limit,
                offset=offset,
            )
        except NotFound:
            return PaginatedResult(items=[], limit=limit, offset=offset, total=0)

    async def get_next_span_sequence_id(self, rollout_id: str, attempt_id: str) -> int:
        """Reserve the next sequence id of a rollout's spans."""
        return (await self.get_many_span_sequence_ids([(rollout_id, attempt_id)]))[0]

    async def get_many_span_sequence_ids(
        self, rollout_attempt_ids: Sequence[tuple[str, str]]
    ) -> Sequence[int]:
        """Reserve one sequence id for each (rollout id, attempt id), in the order given."""
        keys = [
            pb.SpanSequenceKey(rollout_id=rollout, attempt_id=attempt)
            for rollout, attempt in rollout_attempt_ids
        ]
        response = await self.call(
            self.bound.store.ReserveSpanSequences, pb.ReserveSpanSequencesRequest(keys=keys)
        )
        return list(response.sequence_ids)

    def export_spans(
        self,
        *,
        rollout_ids: Sequence[str] = (),
        model_calls_only: bool = False,
        sealed_only: bool = False,
        cursor: str = "",
        run_id: str | None = None,
        delta_prompts: bool = False,
    ) -> AsyncIterator[span_pb2.StoredSpan]:
        """All spans of a run or of some rollouts in the contract's own form, resumed after disconnects.

        With ``delta_prompts`` prompts stay differences to earlier calls, as they are stored:
        `agl_grpc.sample` reads them so, and a conversation travels once instead of once a turn.
        """
        request = pb.ExportSpansRequest(
            run_id=self.run_or_default(run_id),
            rollout_ids=rollout_ids,
            model_calls_only=model_calls_only,
            sealed_only=sealed_only,
            cursor=cursor,
            delta_prompts=delta_prompts,
        )
        return self._exported(request)

    async def _exported(self, request: pb.ExportSpansRequest) -> AsyncIterator[span_pb2.StoredSpan]:
        def advance(request: Any, message: Any) -> None:
            request.cursor = message.cursor

        async for page in resumed(self, lambda bound: bound.store.ExportSpans, request, advance):
            for span in page.spans:
                yield span

    def watch_spans(
        self,
        *,
        rollout_ids: Sequence[str] = (),
        cursor: int = 0,
        model_calls_only: bool = False,
        run_id: str | None = None,
    ) -> AsyncIterator[Watched[Span]]:
        """Spans as they arrive, resumed by cursor after every disconnect."""
        request = pb.WatchSpansRequest(
            run_id=self.run_or_default(run_id),
            rollout_ids=rollout_ids,
            cursor=cursor,
            model_calls_only=model_calls_only,
        )
        return watch(
            self,
            lambda bound: bound.store.WatchSpans,
            request,
            lambda message: map(Span.from_proto, message.spans),
        )


def _group(spans: Sequence[Span]) -> span_pb2.AttemptSpans:
    first = spans[0]
    return span_pb2.AttemptSpans(
        rollout_id=first.rollout_id, attempt_id=first.attempt_id, spans=[span.to_proto() for span in spans]
    )


def _calls(spans: Sequence[Span]) -> Iterator[tuple[list[Span], list[span_pb2.AttemptSpans]]]:
    """Calls of bounded size; groups follow the caller's order, in which sequence ids are given."""
    part: list[Span] = []
    groups: list[span_pb2.AttemptSpans] = []
    size = 0
    for run in _runs(spans):
        for start in range(0, len(run), _SPANS_PER_GROUP):
            piece = run[start : start + _SPANS_PER_GROUP]
            group = _group(piece)
            if part and (size + group.ByteSize() > _BYTES_PER_CALL or len(part) >= _SPANS_PER_CALL):
                yield part, groups
                part, groups, size = [], [], 0
            part, groups, size = [*part, *piece], [*groups, group], size + group.ByteSize()
    if part:
        yield part, groups


def _runs(spans: Sequence[Span]) -> list[list[Span]]:
    runs: list[list[Span]] = []
    for span in spans:
        same = runs and (runs[-1][0].rollout_id, runs[-1][0].attempt_id) == (span.rollout_id, span.attempt_id)
        if same:
            runs[-1].append(span)
        else:
            runs.append([span])
    return runs


def _places(
    groups: Sequence[span_pb2.AttemptSpans], rejected: Iterable[pb.RejectedSpan]
) -> dict[int, StoreError]:
    starts = [0]
    for group in groups:
        starts.append(starts[-1] + len(group.spans))
    places: dict[int, StoreError] = {}
    for rejection in rejected:
        if rejection.index == _ANNOUNCEMENT:
            continue  # about a call that was announced, not about a span
        start, end = starts[rejection.group_index], starts[rejection.group_index + 1]
        refused = range(start, end) if rejection.index < 0 else (start + rejection.index,)
        places.update((place, error_from_item(rejection.status)) for place in refused)
    return places
