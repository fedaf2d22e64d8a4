"""All routes of the REST API, under both of its prefixes."""

from __future__ import annotations

from collections.abc import Mapping

import orjson

from agl_grpc.store.door.methods import Methods
from agl_grpc.store.http.request import Request
from agl_grpc.store.http.rest import openapi
from agl_grpc.store.http.rest.attempts import AttemptRoutes
from agl_grpc.store.http.rest.resources import ResourceRoutes
from agl_grpc.store.http.rest.rollouts import RolloutRoutes
from agl_grpc.store.http.rest.spans import SpanRoutes
from agl_grpc.store.http.rest.workers import WorkerRoutes
from agl_grpc.store.http.routing import Answer, Handler

PREFIXES = ("/agl/v1", "/v1/agl")
"""The first is the documented one, the second that of Agent Lightning 0.3's clients."""


def rest_routes(methods: Methods) -> Mapping[tuple[str, str], Handler]:
    """Handlers by method and path."""
    below: dict[tuple[str, str], Handler] = {}
    for group in (RolloutRoutes, AttemptRoutes, SpanRoutes, ResourceRoutes, WorkerRoutes):
        below.update(group(methods).routes())
    routes = {
        (verb, prefix + path): handler for prefix in PREFIXES for (verb, path), handler in below.items()
    }
    for prefix in PREFIXES:
        routes["GET", f"{prefix}/openapi.json"] = _document(prefix)
    return routes


def _document(prefix: str) -> Handler:
    body = orjson.dumps(openapi.document(prefix))

    async def show(_http: Request) -> Answer:
        return Answer(body)

    return show
