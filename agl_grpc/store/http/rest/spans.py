"""REST: spans."""

from __future__ import annotations

from collections.abc import Mapping

from google.rpc import code_pb2

from agl_grpc.model import raw
from agl_grpc.store import limits
from agl_grpc.store.door.fields import check_request
from agl_grpc.store.door.methods import Methods
from agl_grpc.store.errors import FieldViolation, StoreError
from agl_grpc.store.http.request import Request
from agl_grpc.store.http.rest import show
from agl_grpc.store.http.rest.lists import envelope, list_fields, logic, nothing, paging
from agl_grpc.store.http.rest.span_json import read_span, show_span
from agl_grpc.store.http.routing import Answer, Handler
from agl_grpc.store.http.shape import Fields
from agl_grpc.v1 import error_reason_pb2, store_service_pb2

SORTABLE = (
    "sequence_id",
    "rollout_id",
    "attempt_id",
    "trace_id",
    "span_id",
    "parent_id",
    "name",
    "start_time",
    "end_time",
)
"""Fields by which spans can be sorted."""

_IDS = {"trace_id": ("trace_id", 16), "span_id": ("span_id", 8), "parent_id": ("parent_span_id", 8)}


class SpanRoutes:
    """Serves the routes about spans."""

    def __init__(self, methods: Methods) -> None:
        self._methods = methods

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        """Handlers by method and path below the API's prefix."""
        return {
            ("POST", "/spans"): self.add,
            ("GET", "/spans"): self.search,
            ("POST", "/spans/search"): self.search,
            ("POST", "/spans/next"): self.next,
        }

    async def add(self, http: Request) -> Answer:
        """Stores a span; null when it was there before."""
        fields = Fields(await http.json())
        rollout_id, attempt_id = fields.required_text("rollout_id"), fields.required_text("attempt_id")
        span = read_span(fields)
        request = raw.RawAppendSpansRequest(return_sequence_ids=True)
        request.groups.add(rollout_id=rollout_id, attempt_id=attempt_id, spans=[span.SerializeToString()])
        response = await self._methods(request, http.metadata)
        if response.rejected:
            raise rejection(response.rejected[0].status)
        if not response.stored:
            return Answer(b"null", 201)
        shown = show_span(span, rollout_id, attempt_id, response.sequence_ids[0])
        return Answer(show.dump(shown), 201)

    async def search(self, http: Request) -> Answer:
        """Spans of a rollout; none of one that is unknown."""
        fields = await list_fields(http)
        chosen = paging(fields, SORTABLE, "sequence_id")
        request = store_service_pb2.ListSpansRequest(
            rollout_id=fields.required_text("rollout_id"),
            attempt_id=fields.text("attempt_id") or "",
        )
        conditions, impossible = _filter(fields, request.filter)
        request.filter.logic = logic(fields)
        either = fields.text("filter_logic") == "or"
        if impossible and (not either or impossible == conditions):
            check_request(request)
            return nothing(chosen)
        try:
            return await envelope(
                *(self._methods, http, request, chosen, limits.SPAN_PAGE_SIZE),
                lambda page: page.spans,
                lambda one: show_span(one.span, one.rollout_id, one.attempt_id, one.sequence_id),
            )
        except StoreError as error:
            if error.code != code_pb2.NOT_FOUND:
                raise
            return nothing(chosen)

    async def next(self, http: Request) -> Answer:
        """The next sequence id of an attempt's rollout."""
        fields = Fields(await http.json())
        request = store_service_pb2.ReserveSpanSequencesRequest()
        request.keys.add(
            rollout_id=fields.required_text("rollout_id"), attempt_id=fields.required_text("attempt_id")
        )
        response = await self._methods(request, http.metadata)
        return Answer(show.dump({"sequence_id": response.sequence_ids[0]}))


def _filter(fields: Fields, wanted: store_service_pb2.SpanFilter) -> tuple[int, int]:
    """Fills a filter in; returns how many conditions there are, and how many that nothing can meet."""
    conditions = impossible = 0
    for name, (field, length) in _IDS.items():
        exact, part = fields.text(name), fields.text(f"{name}_contains")
        if exact:
            conditions += 1
            try:
                data = bytes.fromhex(exact)
            except ValueError:
                data = b""
            if len(data) == length:
                setattr(wanted, field, data)
            else:
                impossible += 1
        if part:
            conditions += 1
            setattr(wanted, f"{field}_contains", part)
    for name in ("name", "name_contains"):
        text = fields.text(name)
        if text:
            conditions += 1
            setattr(wanted, name, text)
    return conditions, impossible


def rejection(status: error_reason_pb2.ItemStatus) -> StoreError:
    """Why a single span was refused, as an error of the whole request."""
    metadata = {label.key: label.value for label in status.metadata}
    path = metadata.get("field", "")
    rule = status.message.removeprefix(path).strip()
    violations = (FieldViolation(path, rule),) if path else ()
    return StoreError(status.code, status.reason, status.message, metadata, violations)
