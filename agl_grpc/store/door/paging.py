"""Pages of lists: a page token names the last row of the page before, not a number of rows."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import orjson

from agl_grpc.store.errors import invalid_field, page_token_invalid
from agl_grpc.store.storage.engine import Connection
from agl_grpc.v1 import common_pb2

DEFAULT_SIZE = 100
LARGEST_SIZE = 1000
_MAC_BYTES = 16


@dataclass(frozen=True)
class Order:
    """How a list is sorted.

    Attributes:
        expression: SQL that is never NULL.
        key: The integer key's SQL, which breaks ties.
        descending: Largest first.
    """

    expression: str
    key: str
    descending: bool


@dataclass(frozen=True)
class Page:
    """One page of keys.

    Attributes:
        keys: Integer keys in order.
        next_token: Empty = the end.
        total: All matches, if they were counted.
        place_token: The token that goes on after the key at this place.
    """

    keys: list[int]
    next_token: str
    total: int | None
    place_token: Callable[[int], str]

    def token_after(self, count: int) -> str:
        """The token when only so many of the keys are shown."""
        return self.next_token if count == len(self.keys) else self.place_token(count - 1)


@dataclass(frozen=True)
class PageRequest:
    """What a caller asks for; `scope` defines the query when its SQL changes from page to page, as with a
    condition on the time that it is; empty = the SQL does.
    """

    size: int
    token: str
    skip: int
    count: bool
    scope: bytes = b""


def check_size(page_size: int, largest: int = LARGEST_SIZE, default: int = DEFAULT_SIZE) -> int:
    """The page size that is used: 0 = the default, too large = the largest.

    Raises:
        StoreError: INVALID_FIELD when negative.
    """
    if page_size < 0:
        raise invalid_field("page_size", "must not be negative")
    return min(page_size or default, largest)


def order_of(order_by: str, order: int, columns: Mapping[str, str], key: str, default: str) -> Order:
    """The sort order that a caller asks for by a column's public name.

    Raises:
        StoreError: INVALID_FIELD for an unknown name.
    """
    expression = columns.get(order_by or default)
    if expression is None:
        raise invalid_field("order_by", f"must be one of {', '.join(sorted(columns))}")
    return Order(expression, key, order == common_pb2.SORT_ORDER_DESCENDING)


def fetch_page(
    db: Connection,
    source: str,
    where: str,
    values: Sequence[object],
    order: Order,
    request: PageRequest,
) -> Page:
    """Reads one page of keys.

    Args:
        db: A read transaction.
        source: SQL after FROM.
        where: SQL condition.
        values: Its parameters.
        order: The sort order.
        request: Which page.
    """
    if request.skip < 0:
        raise invalid_field("skip", "must not be negative")
    scope = request.scope or orjson.dumps(
        [source, where, [repr(value) for value in values], order.expression]
    )
    scope += b"descending" if order.descending else b"ascending"
    condition, bound = where, list(values)
    if request.token:
        value, key = unseal(db, scope, request.token)
        sign = "<" if order.descending else ">"
        condition = f"({where}) AND ({order.expression}, {order.key}) {sign} (?, ?)"
        bound += [value, key]
    direction = "DESC" if order.descending else "ASC"
    rows = db.execute(
        f"SELECT {order.key}, {order.expression} FROM {source} WHERE {condition} "
        f"ORDER BY {order.expression} {direction}, {order.key} {direction} LIMIT ? OFFSET ?",
        [*bound, request.size + 1, 0 if request.token else request.skip],
    ).fetchall()

    def at(place: int) -> str:
        return seal(db, scope, [rows[place][1], rows[place][0]])

    total = None
    if request.count:
        (total,) = db.execute(f"SELECT count(*) FROM {source} WHERE {where}", values).fetchone()
    token = ""
    if len(rows) > request.size:
        rows = rows[: request.size]
        token = at(-1)
    return Page([row[0] for row in rows], token, total, at)


def seal(db: Connection, scope: bytes, place: Sequence[Any]) -> str:
    """A token that names a place in the answer to a query; only this store can make it.

    Args:
        db: A read transaction.
        scope: What defines the query.
        place: JSON values.
    """
    body = orjson.dumps(place)
    return base64.urlsafe_b64encode(_mac(db, scope, body) + body).decode()


def unseal(db: Connection, scope: bytes, token: str, path: str = "page_token") -> Any:
    """The place that a token names.

    Raises:
        StoreError: PAGE_TOKEN_INVALID for a token of another store or query, or one that was changed.
    """
    try:
        raw = base64.b64decode(token.encode(), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise page_token_invalid(path) from error
    mac, body = raw[:_MAC_BYTES], raw[_MAC_BYTES:]
    if not hmac.compare_digest(mac, _mac(db, scope, body)):
        raise page_token_invalid(path)
    return orjson.loads(body)


def _mac(db: Connection, scope: bytes, body: bytes) -> bytes:
    (store_id,) = db.execute("SELECT value FROM meta WHERE name = 'store_id'").fetchone()
    key = blake2b(f"page\0{store_id}".encode(), digest_size=32).digest()
    return blake2b(len(scope).to_bytes(8, "big") + scope + body, digest_size=_MAC_BYTES, key=key).digest()
