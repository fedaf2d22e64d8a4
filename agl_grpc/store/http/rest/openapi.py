"""The OpenAPI document of the REST API."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from agl_grpc import __version__
from agl_grpc.store.http.rest.schemas import SCHEMAS, Schema, listed, nullable, page, ref


class _Route(NamedTuple):
    """One operation: what it does, what it takes, what it answers."""

    method: str
    path: str
    summary: str
    answer: Schema
    body: str = ""
    body_optional: bool = False
    query: str = ""
    status: int = 200


_ROUTES = (
    _Route("get", "/health", "Whether the server serves", ref("Health")),
    _Route("get", "/statistics", "Counts and sizes", ref("Statistics")),
    _Route(
        *("post", "/queues/rollouts/enqueue", "Put rollouts into their queue, all or none"),
        *(listed(ref("Rollout")), "EnqueueRollouts"),
        status=201,
    ),
    _Route(
        *("post", "/queues/rollouts/dequeue", "Take waiting rollouts"),
        *(listed(ref("Rollout")), "DequeueRollouts", True),
    ),
    _Route("post", "/rollouts", "Start a rollout at once", ref("Rollout"), "StartRolloutRequest", status=201),
    _Route("get", "/rollouts", "List rollouts", page("Rollout"), query="QueryRollouts"),
    _Route("post", "/rollouts/search", "List rollouts", page("Rollout"), "QueryRollouts", True),
    _Route("get", "/rollouts/{rollout_id}", "One rollout with its newest attempt", ref("Rollout")),
    _Route("post", "/rollouts/{rollout_id}", "Change a rollout", ref("Rollout"), "UpdateRollout"),
    _Route(
        *("post", "/rollouts/{rollout_id}/attempts", "Start a further attempt", ref("Rollout")),
        *("StartAttempt", True),
        status=201,
    ),
    _Route(
        *("get", "/rollouts/{rollout_id}/attempts", "List attempts", page("Attempt")), query="QueryAttempts"
    ),
    _Route(
        *("post", "/rollouts/{rollout_id}/attempts/search", "List attempts", page("Attempt")),
        *("QueryAttempts", True),
    ),
    _Route("get", "/rollouts/{rollout_id}/attempts/latest", "The newest attempt", nullable(ref("Attempt"))),
    _Route(
        *("post", "/rollouts/{rollout_id}/attempts/{attempt_id}", "Change an attempt (`latest` is an id)"),
        *(ref("Attempt"), "UpdateAttempt"),
    ),
    _Route("get", "/workers", "List workers", page("Worker"), query="QueryWorkers"),
    _Route("post", "/workers/search", "List workers", page("Worker"), "QueryWorkers", True),
    _Route("get", "/workers/{worker_id}", "One worker", nullable(ref("Worker"))),
    _Route("post", "/workers/{worker_id}", "A worker's sign of life", ref("Worker"), "UpdateWorker", True),
    _Route("get", "/resources", "List resources", page("ResourcesUpdate"), query="QueryResources"),
    _Route(
        *("post", "/resources", "Publish a new set of resources", ref("ResourcesUpdate"), "NamedResources"),
        status=201,
    ),
    _Route("get", "/resources/latest", "The last publication", nullable(ref("ResourcesUpdate"))),
    _Route(
        "get", "/resources/{resources_id}", "The newest version of a set", nullable(ref("ResourcesUpdate"))
    ),
    _Route(
        *("post", "/resources/{resources_id}", "Publish the next version of a set"),
        *(ref("ResourcesUpdate"), "NamedResources"),
    ),
    _Route("post", "/spans", "Store a span; null = it was there", nullable(ref("Span")), "Span", status=201),
    _Route("get", "/spans", "List the spans of a rollout", page("Span"), query="QuerySpans"),
    _Route("post", "/spans/search", "List the spans of a rollout", page("Span"), "QuerySpans"),
    _Route("post", "/spans/next", "The next sequence id", ref("Sequence"), "NextSequence"),
    _Route(
        *("post", "/waits/rollouts", "Wait until rollouts are finished", listed(ref("Rollout"))),
        "WaitRollouts",
    ),
)
_REFUSALS = {
    "400": "A value is not allowed",
    "401": "No valid credential",
    "403": "The credential does not allow it",
    "404": "Something named does not exist",
    "409": "Its state forbids it",
    "413": "The body is too large",
    "415": "The body is of a type or an encoding that is not read",
    "422": "The body has the wrong shape",
    "503": "Overloaded, draining, or the disk is full: try again after Retry-After seconds",
}


def document(prefix: str) -> dict[str, Any]:
    """The document for one of the API's prefixes."""
    paths: dict[str, dict[str, Any]] = {}
    for route in _ROUTES:
        paths.setdefault(route.path, {})[route.method] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "agl-grpc store",
            "version": __version__,
            "description": "The store as clients of Agent Lightning 0.3 know it. The gRPC contract is wider.",
        },
        "servers": [{"url": prefix}],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"bearer": []}],
    }


def _operation(route: _Route) -> dict[str, Any]:
    refused = {
        code: {"description": text, "content": _json(ref("Error"))} for code, text in _REFUSALS.items()
    }
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": re.sub(r"\W+", "_", f"{route.method}{route.path}").strip("_"),
        "responses": {
            str(route.status): {"description": route.summary, "content": _json(route.answer)},
            **refused,
        },
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"{(\w+)}", route.path)
    ]
    if route.query:
        parameters += _query(SCHEMAS[route.query])
    if parameters:
        operation["parameters"] = parameters
    if route.body:
        body = nullable(ref(route.body)) if route.body_optional else ref(route.body)
        operation["requestBody"] = {"required": not route.body_optional, "content": _json(body)}
    return operation


def _query(schema: Schema) -> list[dict[str, Any]]:
    required = schema.get("required", ())
    return [
        {"name": name, "in": "query", "required": name in required, "schema": _not_null(of)}
        for name, of in schema["properties"].items()
    ]


def _not_null(schema: Schema) -> Schema:
    """In a query what is not there is null."""
    return dict(schema["anyOf"][0]) if "anyOf" in schema else schema


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
