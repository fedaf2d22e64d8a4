"""Lists as REST pages them: limit, offset, sort; the contract's pages are put together (R30)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from agl_grpc.store.door.methods import Methods
from agl_grpc.store.http.problems import invalid
from agl_grpc.store.http.request import Request
from agl_grpc.store.http.rest import show
from agl_grpc.store.http.routing import Answer
from agl_grpc.store.http.shape import Fields, query_fields
from agl_grpc.v1 import common_pb2

ALL = -1
"""As `limit`: every match."""

Render = Callable[[Sequence[Any], bytes, bytes], Answer]

PAGING = ("limit", "offset", "sort_by", "sort_order")


class Paging(NamedTuple):
    """Which part of a list, in which order."""

    limit: int
    offset: int
    order_by: str
    order: int


async def list_fields(request: Request, lists: Sequence[str] = ()) -> Fields:
    """What a list request asks for: the query of a GET, the JSON body of a POST."""
    if request.method in ("GET", "HEAD"):
        return query_fields(request.query(), lists)
    return Fields(await request.optional_json())


def paging(fields: Fields, sortable: Collection[str], default: str = "") -> Paging:
    """Reads and checks limit, offset, sort_by and sort_order."""
    limit, offset = fields.integer("limit", ALL), fields.integer("offset", 0)
    sort_by = fields.text("sort_by", default) or default
    order = fields.choice("sort_order", ("asc", "desc"), "asc")
    if limit == 0 or limit < ALL:
        raise invalid("limit", "must be greater than 0, or -1 for no limit")
    if offset < 0 or offset >= 2**31:
        raise invalid("offset", "must be greater than or equal to 0, and below 2^31")
    if sort_by and sort_by not in sortable:
        raise invalid("sort_by", f"is {sort_by!r}; it must be one of {', '.join(sortable)}")
    descending = order == "desc"
    order_number = common_pb2.SORT_ORDER_DESCENDING if descending else common_pb2.SORT_ORDER_ASCENDING
    return Paging(limit, offset, sort_by, order_number)


def logic(fields: Fields) -> common_pb2.FilterLogic.ValueType:
    """Reads filter_logic."""
    chosen = fields.choice("filter_logic", ("and", "or"), "and")
    return common_pb2.FILTER_LOGIC_OR if chosen == "or" else common_pb2.FILTER_LOGIC_AND


async def envelope(
    methods: Methods,
    http: Request,
    request: Any,
    chosen: Paging,
    page_size: int,
    items_of: Callable[[Any], Sequence[Any]],
    shown: Callable[[Any], Any],
    render: Render | None = None,
) -> Answer:
    """Reads as many of the contract's pages as are asked for; answers a PaginatedResult.

    Args:
        methods: The store.
        http: The HTTP request.
        request: The contract's list request, its filter filled in.
        chosen: Which part.
        page_size: Largest page of the method.
        items_of: The items of a response.
        shown: An item as JSON.
        render: Makes the answer of items, the JSON before their list, and that behind it; None = at once.
    """
    request.order_by, request.order = chosen.order_by, chosen.order
    request.skip, request.include_total = chosen.offset, True
    items: list[Any] = []
    total = 0
    while True:
        left = page_size if chosen.limit == ALL else chosen.limit - len(items)
        request.page_size = min(left, page_size)
        page = await methods(request, http.metadata)
        if request.include_total:
            total = page.total_size
        items += items_of(page)
        if not page.next_page_token or len(items) == chosen.limit:
            before, behind = _around(chosen, total)
            if render is not None:
                return render(items, before, behind)
            return Answer(before + show.dump([shown(item) for item in items]) + behind)
        request.page_token, request.include_total = page.next_page_token, False


def _around(chosen: Paging, total: int) -> tuple[bytes, bytes]:
    """What stands before and behind the items of a PaginatedResult."""
    part = {"limit": chosen.limit, "offset": chosen.offset, "total": total}
    return b'{"items":', b"," + show.dump(part)[1:]


def nothing(chosen: Paging) -> Answer:
    """A PaginatedResult without items."""
    before, behind = _around(chosen, 0)
    return Answer(before + b"[]" + behind)
