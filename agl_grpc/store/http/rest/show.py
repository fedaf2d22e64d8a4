"""Messages of the contract as the JSON objects that Agent Lightning's models read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import orjson
from google.protobuf import timestamp_pb2

from agl_grpc.model.times import from_timestamp, read_seconds
from agl_grpc.model.value import JSON, from_any_value
from agl_grpc.store.http.shape import enum_names
from agl_grpc.v1 import attempt_pb2, common_pb2, resources_pb2, rollout_pb2, store_service_pb2, worker_pb2

ROLLOUT_STATUSES = enum_names(rollout_pb2.RolloutStatus, "ROLLOUT_STATUS_")
ATTEMPT_STATUSES: dict[str, Any] = {
    name: number
    for name, number in enum_names(attempt_pb2.AttemptStatus, "ATTEMPT_STATUS_").items()
    if name != "cancelled"  # which the original does not know of attempts
}
MODES = enum_names(rollout_pb2.RolloutMode, "ROLLOUT_MODE_")
WORKER_STATUSES = {
    "idle": worker_pb2.WORKER_STATUS_IDLE,
    "busy": worker_pb2.WORKER_STATUS_BUSY,
    "unknown": worker_pb2.WORKER_STATUS_UNKNOWN,
}

CANCELLED_REASON = "agl_grpc.cancelled"
"""Where the metadata of an attempt that was cancelled say why: it is shown as failed (R29)."""

_ROLLOUT_STATUS = {number: name for name, number in ROLLOUT_STATUSES.items()}
_ATTEMPT_STATUS = {number: name for name, number in ATTEMPT_STATUSES.items()}
_MODE = {number: name for name, number in MODES.items()}


def dump(value: Any) -> bytes:
    """JSON; what JSON cannot hold (NaN, infinities) becomes null."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return orjson.dumps(value, default=_odd)


def _odd(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else str(value)


def seconds(time: timestamp_pb2.Timestamp) -> float | None:
    """Seconds since the epoch; None = not set."""
    return from_timestamp(time) if time.seconds or time.nanos else None


def notes(values: Iterable[common_pb2.KeyValue]) -> dict[str, Any]:
    """Notes as an object; bytes are shown in hex."""
    return {entry.key: plain(entry.value) for entry in values}


def plain(value: common_pb2.AnyValue) -> Any:
    """A value of free shape."""
    kind = value.WhichOneof("value")
    if kind == "string_value":
        return value.string_value
    if kind == "bytes_value":
        return value.bytes_value.hex()
    if kind == "array_value":
        return [plain(element) for element in value.array_value.values]
    if kind == "kvlist_value":
        return notes(value.kvlist_value.values)
    return from_any_value(value)


def payload(value: common_pb2.Payload) -> Any:
    """A task's input: JSON goes through as it is."""
    if value.WhichOneof("content") == "blob_digest":
        return {"blob_digest": value.blob_digest, "media_type": value.media_type or JSON}
    if (value.media_type or JSON) == JSON:
        return orjson.Fragment(value.data) if value.data else None
    return {"media_type": value.media_type, "data": value.data.hex()}


def config(value: rollout_pb2.RolloutConfig) -> dict[str, Any]:
    """Rules of a rollout's life."""
    return {
        "timeout_seconds": read_seconds(value, "timeout"),
        "unresponsive_seconds": read_seconds(value, "unresponsive"),
        "max_attempts": value.max_attempts or 1,
        "retry_condition": [_ATTEMPT_STATUS.get(status, "failed") for status in value.retry_condition],
    }


def rollout(value: rollout_pb2.Rollout) -> dict[str, Any]:
    """A rollout without attempt."""
    return {
        "rollout_id": value.rollout_id,
        "input": payload(value.input),
        "start_time": from_timestamp(value.create_time),
        "end_time": seconds(value.end_time),
        "mode": _MODE.get(value.mode),
        "resources_id": value.resources_id or None,
        "status": _ROLLOUT_STATUS[value.status],
        "config": config(value.config),
        "metadata": notes(value.metadata),
    }


def attempt(value: attempt_pb2.Attempt) -> dict[str, Any]:
    """An attempt; one that was cancelled is shown as failed, with the reason in its metadata."""
    status, metadata = _ATTEMPT_STATUS.get(value.status), notes(value.metadata)
    if status is None:
        status = "failed"
        metadata[CANCELLED_REASON] = value.failure.message or "its rollout was cancelled"
    return {
        "rollout_id": value.rollout_id,
        "attempt_id": value.attempt_id,
        "sequence_id": value.sequence_id,
        "start_time": from_timestamp(value.start_time),
        "end_time": seconds(value.end_time),
        "status": status,
        "worker_id": value.worker_id or None,
        "last_heartbeat_time": seconds(value.last_heartbeat_time),
        "metadata": metadata or None,
    }


def attempted(value: rollout_pb2.AttemptedRollout) -> dict[str, Any]:
    """A rollout, with its attempt if it has one."""
    shown = rollout(value.rollout)
    if value.HasField("attempt"):
        shown["attempt"] = attempt(value.attempt)
    return shown


def worker(value: worker_pb2.Worker) -> dict[str, Any]:
    """A worker; one that drains is busy or idle, as it has work or not."""
    if value.status == worker_pb2.WORKER_STATUS_DRAINING:
        status = "busy" if value.current_attempt_id or value.lease_count else "idle"
    else:
        status = {number: name for name, number in WORKER_STATUSES.items()}.get(value.status, "unknown")
    return {
        "worker_id": value.worker_id,
        "status": status,
        "heartbeat_stats": notes(value.heartbeat_stats) or None,
        "last_heartbeat_time": seconds(value.last_heartbeat_time),
        "last_dequeue_time": seconds(value.last_dequeue_time),
        "last_busy_time": seconds(value.last_busy_time),
        "last_idle_time": seconds(value.last_idle_time),
        "current_rollout_id": value.current_rollout_id or None,
        "current_attempt_id": value.current_attempt_id or None,
    }


def resources(value: resources_pb2.ResourceSet) -> dict[str, Any]:
    """A publication."""
    return {
        "resources_id": value.resources_id,
        "create_time": from_timestamp(value.create_time),
        "update_time": from_timestamp(value.update_time),
        "version": value.version,
        "resources": {one.name: _resource(one) for one in value.resources},
    }


def _resource(value: resources_pb2.Resource) -> dict[str, Any]:
    kind = value.WhichOneof("kind") or ""
    if kind == "prompt_template":
        template = value.prompt_template
        engine = template.engine or "f-string"
        return {"resource_type": kind, "template": template.template, "engine": engine}
    if kind == "custom":
        return {**notes(value.custom.fields), "resource_type": value.custom.resource_type}
    endpoint: resources_pb2.LLM = getattr(value, kind)
    return {
        "resource_type": kind,
        "endpoint": endpoint.endpoint,
        "model": endpoint.model,
        "api_key": endpoint.api_key or None,
        "sampling_parameters": notes(endpoint.sampling_parameters),
    }


def statistics(value: store_service_pb2.GetStatisticsResponse) -> Mapping[str, Any]:
    """Counts and sizes."""
    shown: dict[str, Any] = {
        "name": value.name,
        "total_rollouts": value.total_rollouts,
        "total_attempts": value.total_attempts,
        "total_spans": value.total_spans,
        "total_resources": value.total_resources,
        "total_workers": value.total_workers,
        "uptime": read_seconds(value, "uptime") or 0.0,
        "total_span_bytes": value.total_span_bytes,
    }
    if value.eviction_threshold_bytes:
        shown["eviction_threshold_bytes"] = value.eviction_threshold_bytes
        shown["safe_threshold_bytes"] = value.safe_threshold_bytes
        shown["memory_capacity_bytes"] = value.memory_capacity_bytes
    return shown
