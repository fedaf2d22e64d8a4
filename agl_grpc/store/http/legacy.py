"""The routes of Agent Lightning 0.1, over today's rollouts.

A task is a rollout that a worker takes without a lease; reporting it writes what was reported as spans and
ends the attempt. A task that is taken and not reported comes back when its rollout's own time-out says so.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from typing import Any

import orjson

from agl_grpc.model import gen_ai, raw, semconv
from agl_grpc.model.value import to_key_values
from agl_grpc.store import errors
from agl_grpc.store.door.methods import Methods
from agl_grpc.store.http.problems import HttpProblem, malformed
from agl_grpc.store.http.request import Request
from agl_grpc.store.http.rest import show
from agl_grpc.store.http.rest.inputs import Inputs
from agl_grpc.store.http.rest.spans import rejection
from agl_grpc.store.http.routing import Answer, Handler
from agl_grpc.store.http.shape import Fields
from agl_grpc.store.rollouts.names import attempt_status
from agl_grpc.store.spans.check import check_group
from agl_grpc.v1 import attempt_pb2, rollout_pb2, span_pb2, store_service_pb2

TRIPLET = "agentlightning.triplet"
"""Name of the spans that hold reported triplets, and of the attribute with the triplet's JSON."""

REPORT = "agentlightning.report"
"""Name of the span that holds what else was reported: logs and metadata, as JSON."""

_WORKER = "legacy"

_OVER = (
    attempt_pb2.ATTEMPT_STATUS_FAILED,
    attempt_pb2.ATTEMPT_STATUS_TIMEOUT,
    attempt_pb2.ATTEMPT_STATUS_CANCELLED,
)


class LegacyRoutes:
    """Serves the legacy routes."""

    def __init__(self, methods: Methods) -> None:
        self._methods = methods
        self._inputs = Inputs(methods)

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        """Handlers by method and path."""
        return {
            ("GET", "/task"): self.task,
            ("GET", "/resources/latest"): self.latest,
            ("GET", "/resources/{resources_id}"): self.resources,
            ("POST", "/rollout"): self.report,
        }

    async def task(self, http: Request) -> Answer:
        """The next task, if there is one."""
        request = store_service_pb2.DequeueRolloutsRequest(limit=1, worker_id=_WORKER)
        response = await self._methods(request, http.metadata)
        if not response.rollouts:
            return Answer(b'{"is_available":false,"task":null}')
        rollout = response.rollouts[0].rollout.rollout
        await self._inputs.fill([rollout.input], http.metadata)
        shown = show.rollout(rollout)
        task = {
            **{name: shown[name] for name in ("rollout_id", "input", "mode", "resources_id", "metadata")},
            "create_time": shown["start_time"],
            "last_claim_time": show.seconds(response.rollouts[0].rollout.attempt.start_time),
            "num_claims": rollout.attempt_count,
        }
        return Answer(show.dump({"is_available": True, "task": task}))

    async def latest(self, http: Request) -> Answer:
        """The last publication; 404 before the first."""
        response = await self._methods(store_service_pb2.GetLatestResourcesRequest(), http.metadata)
        if not response.HasField("resources"):
            raise HttpProblem(404, "ENTITY_NOT_FOUND", "no resources are published; publish them first")
        return Answer(show.dump(show.resources(response.resources)))

    async def resources(self, http: Request) -> Answer:
        """The newest version of a set."""
        request = store_service_pb2.GetResourcesRequest(resources_id=http.names["resources_id"])
        response = await self._methods(request, http.metadata)
        return Answer(show.dump(show.resources(response.resources)))

    async def report(self, http: Request) -> Answer:
        """What came of a task: its spans are stored, then its attempt ends well."""
        fields = Fields(await http.json())
        rollout_id = fields.required_text("rollout_id")
        spans = spans_of(fields)
        attempt = await self._attempt(http, rollout_id)
        # First everything that may be wrong: of a report that is refused nothing is kept.
        if attempt.status in _OVER:
            status = attempt_status(attempt.status)
            raise errors.illegal_transition("attempt", attempt.attempt_id, status, "succeeded")
        group = _group(attempt, spans)
        _check(group, len(fields.items("triplets") or ()))
        if spans:
            await self._append(http, group)
        update = store_service_pb2.UpdateAttemptRequest()
        update.attempt.rollout_id, update.attempt.attempt_id = rollout_id, attempt.attempt_id
        update.attempt.status = attempt_pb2.ATTEMPT_STATUS_SUCCEEDED
        update.update_mask.paths.append("status")
        await self._methods(update, http.metadata)
        message = f"Rollout {rollout_id} received and stored."
        return Answer(show.dump({"status": "ok", "message": message, "data": None}))

    async def _attempt(self, http: Request, rollout_id: str) -> attempt_pb2.Attempt:
        request = store_service_pb2.GetAttemptRequest(rollout_id=rollout_id, attempt_id="latest")
        attempt: attempt_pb2.Attempt = (await self._methods(request, http.metadata)).attempt
        if attempt.attempt_id:
            return attempt
        # Reported without having been taken, as tests and replays do.
        start = store_service_pb2.StartAttemptRequest(rollout_id=rollout_id, worker_id=_WORKER)
        started: rollout_pb2.AttemptedRollout = (await self._methods(start, http.metadata)).rollout
        return started.attempt

    async def _append(self, http: Request, group: raw.RawAttemptSpans) -> None:
        response = await self._methods(raw.RawAppendSpansRequest(groups=[group]), http.metadata)
        if response.rejected:
            raise rejection(response.rejected[0].status)


def _group(attempt: attempt_pb2.Attempt, spans: list[span_pb2.Span]) -> raw.RawAttemptSpans:
    """The spans as they are stored; ids follow from what they hold: a repeated report adds none."""
    trace_id = _digest(attempt.attempt_id.encode())[:16]
    for place, span in enumerate(spans):
        span.trace_id = trace_id
        span.span_id = _digest(trace_id, b"%d" % place, span.SerializeToString(deterministic=True))[:8]
    return raw.RawAttemptSpans(
        rollout_id=attempt.rollout_id,
        attempt_id=attempt.attempt_id,
        spans=[span.SerializeToString() for span in spans],
    )


def _digest(*parts: bytes) -> bytes:
    return hashlib.sha256(b"/".join(parts)).digest()


def _check(group: raw.RawAttemptSpans, triplets: int) -> None:
    """Raises when the store would refuse a span, of which the first ones are the triplets."""
    for place, _, error in check_group(group, group.attempt_id, "groups", 0, time.time_ns()).rejected:
        path = f"triplets[{place}]" if place < triplets else ""
        raise malformed(path, f"cannot be kept: {error.message}")


def spans_of(fields: Fields) -> list[span_pb2.Span]:
    """What was reported as spans: triplets with their tokens, the rest of the report, the final reward last.

    The trace of the legacy client is text that its own reader wrote; it is kept with the rest, as it is.
    """
    made: list[span_pb2.Span] = []
    for place, item in enumerate(fields.items("triplets") or ()):
        made.append(_triplet(Fields(item, f"triplets[{place}]")))
    kept = {
        "logs": fields.items("logs"),
        "metadata": fields.mapping("metadata"),
        "trace": fields.items("trace"),
    }
    rest = {name: value for name, value in kept.items() if value}
    if rest:
        made.append(_span(REPORT, {f"{REPORT}.{name}": _json(value, name) for name, value in rest.items()}))
    reward = fields.number("final_reward")
    if reward is not None:
        attributes = {f"{semconv.REWARD}.0.name": "primary", f"{semconv.REWARD}.0.value": reward}
        made.append(_span(semconv.SPAN_ANNOTATION, attributes))
    return made


def _triplet(fields: Fields) -> span_pb2.Span:
    attributes: dict[str, Any] = {TRIPLET: _json(fields.values, fields.path)}
    for side, name in (("prompt", "prompt_token_ids"), ("response", "response_token_ids")):
        value = fields.any(side)
        ids = value.get("token_ids") if isinstance(value, dict) else None
        if isinstance(ids, list) and all(isinstance(one, int) for one in ids):
            attributes[name] = ids
    reward = fields.number("reward")
    if reward is not None:
        # A step's reward, not the rollout's: that one comes last, by itself.
        attributes[f"{semconv.REWARD}.0.name"] = "step"
        attributes[f"{semconv.REWARD}.0.value"] = reward
        attributes[semconv.REWARD_IS_PRIMARY] = False
    return _span(TRIPLET, attributes)


def _span(name: str, attributes: dict[str, Any]) -> span_pb2.Span:
    try:
        entries = to_key_values(attributes, name)
    except (ValueError, TypeError) as error:
        raise malformed(name, f"cannot be kept: {error}") from error
    span = span_pb2.Span(name=name, attributes=entries)
    call = gen_ai.model_call(attributes)
    if call is not None:
        span.model_call.CopyFrom(call)
    return span


def _json(value: Any, path: str) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError as error:
        raise malformed(path, f"cannot be kept: {error}") from error


def legacy_routes(methods: Methods) -> Mapping[tuple[str, str], Handler]:
    """Handlers by method and path."""
    return LegacyRoutes(methods).routes()
