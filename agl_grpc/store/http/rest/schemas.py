"""JSON schemas of what REST takes and answers (OpenAPI 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agl_grpc.store.http.rest import show

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
INTEGER: Schema = {"type": "integer"}
OBJECT: Schema = {"type": "object", "additionalProperties": True}
ANYTHING: Schema = {}
ID: Schema = {"type": "string", "maxLength": 128}
WORKER_ID: Schema = {"type": "string", "maxLength": 256}
PART: Schema = {"type": "string", "maxLength": 4096}
TRACE_ID: Schema = {"type": "string", "pattern": "^[0-9a-fA-F]{32}$"}
SPAN_ID: Schema = {"type": "string", "pattern": "^[0-9a-fA-F]{16}$"}


def ref(name: str) -> Schema:
    """A schema by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def words(values: Sequence[str]) -> Schema:
    """One of some words."""
    return {"type": "string", "enum": list(values)}


def nullable(schema: Schema) -> Schema:
    """The schema, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def listed(schema: Schema) -> Schema:
    """A list."""
    return {"type": "array", "items": schema}


def fields(required: Sequence[str], **properties: Schema) -> Schema:
    """An object."""
    schema: Schema = {"type": "object", "properties": properties}
    if required:
        schema["required"] = list(required)
    return schema


def page(name: str) -> Schema:
    """A PaginatedResult."""
    properties = {"items": listed(ref(name)), "limit": INTEGER, "offset": INTEGER, "total": INTEGER}
    return fields(tuple(properties), **properties)


_ROLLOUT_STATUS = words(list(show.ROLLOUT_STATUSES))
_ATTEMPT_STATUS = words(list(show.ATTEMPT_STATUSES))
_WORKER_STATUS = words(list(show.WORKER_STATUSES))
_MODE = words(list(show.MODES))
_POSITIVE: Schema = {"type": "number", "minimum": 0, "maximum": 3e11}

_SPEC = {
    "input": ANYTHING,
    "mode": nullable(_MODE),
    "resources_id": nullable(ID),
    "config": nullable(ref("RolloutConfig")),
    "metadata": nullable(OBJECT),
}
_PAGING = {
    "limit": {"type": "integer", "minimum": -1, "default": -1, "description": "-1 = all; 0 is refused."},
    "offset": {"type": "integer", "minimum": 0, "default": 0, "maximum": 2**31 - 1},
    "sort_by": nullable(TEXT),
    "sort_order": {**nullable(words(["asc", "desc"])), "default": "asc"},
}
_LOGIC = {"filter_logic": {**nullable(words(["and", "or"])), "default": "and"}}

SCHEMAS: dict[str, Schema] = {
    "Error": fields(
        ("detail", "reason", "field", "metadata"),
        detail={"type": "string", "description": "One line: what is wrong and what to do."},
        reason={"type": "string", "description": "Machine-readable, as in the gRPC contract."},
        field={**nullable(TEXT), "description": "The field at fault; null = none."},
        metadata={"type": "object", "additionalProperties": TEXT},
    ),
    "RolloutConfig": fields(
        (),
        timeout_seconds=nullable(_POSITIVE),
        unresponsive_seconds=nullable(_POSITIVE),
        max_attempts={"type": "integer", "minimum": 1, "maximum": 1000, "default": 1},
        retry_condition=nullable(listed(_ATTEMPT_STATUS)),
    ),
    "EnqueueRolloutRequest": fields(("input",), **_SPEC),
    "StartRolloutRequest": fields(("input",), **_SPEC, worker_id=nullable(WORKER_ID)),
    "EnqueueRollouts": fields(("rollouts",), rollouts=listed(ref("EnqueueRolloutRequest"))),
    "DequeueRollouts": fields((), limit={"type": "integer", "default": 1}, worker_id=nullable(WORKER_ID)),
    "StartAttempt": fields((), worker_id=nullable(WORKER_ID)),
    "UpdateRollout": fields(
        (),
        **{**_SPEC, "config": ref("RolloutConfig")},
        status=_ROLLOUT_STATUS,
    ),
    "UpdateAttempt": fields(
        (),
        status=_ATTEMPT_STATUS,
        worker_id=WORKER_ID,
        last_heartbeat_time={"type": "number", "minimum": 0},
        metadata=OBJECT,
    ),
    "UpdateWorker": fields((), heartbeat_stats=OBJECT),
    "NextSequence": fields(("rollout_id", "attempt_id"), rollout_id=ID, attempt_id=ID),
    "Sequence": fields(("sequence_id",), sequence_id=INTEGER),
    "WaitRollouts": fields(
        ("rollout_ids",),
        rollout_ids=listed(ID),
        timeout={**nullable(NUMBER), "description": "Seconds; null = until all are finished."},
    ),
    "Health": fields(("status",), status=TEXT),
    "Statistics": OBJECT,
    "QueryAttempts": fields((), **_PAGING),
    "QueryRollouts": fields(
        (),
        status_in=nullable(listed(_ROLLOUT_STATUS)),
        rollout_id_in=nullable(listed(ID)),
        rollout_id_contains=nullable(PART),
        **_LOGIC,
        **_PAGING,
    ),
    "QueryWorkers": fields(
        (),
        status_in=nullable(listed(_WORKER_STATUS)),
        worker_id_contains=nullable(PART),
        **_LOGIC,
        **_PAGING,
    ),
    "QueryResources": fields((), resources_id=nullable(ID), resources_id_contains=nullable(PART), **_PAGING),
    "QuerySpans": fields(
        ("rollout_id",),
        rollout_id=ID,
        attempt_id={**nullable(ID), "description": "An id, `latest`, or null = all."},
        trace_id=nullable(TEXT),
        trace_id_contains=nullable(PART),
        span_id=nullable(TEXT),
        span_id_contains=nullable(PART),
        parent_id=nullable(TEXT),
        parent_id_contains=nullable(PART),
        name=nullable({"type": "string", "maxLength": 1024}),
        name_contains=nullable(PART),
        **_LOGIC,
        **_PAGING,
    ),
    "Attempt": fields(
        ("rollout_id", "attempt_id", "sequence_id", "start_time", "status"),
        rollout_id=TEXT,
        attempt_id=TEXT,
        sequence_id=INTEGER,
        start_time=NUMBER,
        end_time=nullable(NUMBER),
        status=_ATTEMPT_STATUS,
        worker_id=nullable(TEXT),
        last_heartbeat_time=nullable(NUMBER),
        metadata=nullable(OBJECT),
    ),
    "Rollout": fields(
        ("rollout_id", "input", "start_time", "status", "config"),
        rollout_id=TEXT,
        input=ANYTHING,
        start_time=NUMBER,
        end_time=nullable(NUMBER),
        mode=nullable(_MODE),
        resources_id=nullable(TEXT),
        status=_ROLLOUT_STATUS,
        config=ref("RolloutConfig"),
        metadata=nullable(OBJECT),
        attempt=ref("Attempt"),
    ),
    "Worker": fields(
        ("worker_id", "status"),
        worker_id=TEXT,
        status=_WORKER_STATUS,
        heartbeat_stats=nullable(OBJECT),
        last_heartbeat_time=nullable(NUMBER),
        last_dequeue_time=nullable(NUMBER),
        last_busy_time=nullable(NUMBER),
        last_idle_time=nullable(NUMBER),
        current_rollout_id=nullable(TEXT),
        current_attempt_id=nullable(TEXT),
    ),
    "Resource": {
        "type": "object",
        "required": ["resource_type"],
        "properties": {"resource_type": TEXT},
        "additionalProperties": True,
        "description": "`llm`, `proxy_llm` (endpoint, model, api_key, sampling_parameters), "
        "`prompt_template` (template, engine), or a type of the user's own.",
    },
    "NamedResources": {"type": "object", "additionalProperties": ref("Resource")},
    "ResourcesUpdate": fields(
        ("resources_id", "create_time", "update_time", "version", "resources"),
        resources_id=TEXT,
        create_time=NUMBER,
        update_time=NUMBER,
        version=INTEGER,
        resources=ref("NamedResources"),
    ),
    "SpanContext": {
        **fields(
            ("trace_id", "span_id"),
            trace_id=TRACE_ID,
            span_id=SPAN_ID,
            is_remote={"type": "boolean"},
            trace_state=OBJECT,
        ),
        "additionalProperties": True,
    },
    "TraceStatus": fields(
        ("status_code",), status_code=words(["UNSET", "OK", "ERROR"]), description=nullable(TEXT)
    ),
    "Event": fields(("name",), name=TEXT, attributes=OBJECT, timestamp=nullable(NUMBER)),
    "Link": fields(("context",), context=ref("SpanContext"), attributes=nullable(OBJECT)),
    "OtelResource": fields((), attributes=OBJECT, schema_url=TEXT),
    "Span": fields(
        ("rollout_id", "attempt_id", "trace_id", "span_id", "name"),
        rollout_id=ID,
        attempt_id=ID,
        sequence_id={"type": "integer", "minimum": 0, "maximum": 2**62, "description": "0 = the store's."},
        trace_id=TRACE_ID,
        span_id=SPAN_ID,
        parent_id=nullable(SPAN_ID),
        name={"type": "string", "minLength": 1, "maxLength": 256},
        status=ref("TraceStatus"),
        attributes=OBJECT,
        events=listed(ref("Event")),
        links=listed(ref("Link")),
        start_time=nullable(NUMBER),
        end_time=nullable(NUMBER),
        context=nullable(ref("SpanContext")),
        parent=nullable(ref("SpanContext")),
        resource=ref("OtelResource"),
    ),
}
