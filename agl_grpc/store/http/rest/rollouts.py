"""REST: rollouts, their queue, waits."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from agl_grpc.model.times import to_duration
from agl_grpc.model.value import JSON, encode_json, to_key_values
from agl_grpc.store import limits
from agl_grpc.store.door.fields import check_request
from agl_grpc.store.door.methods import Methods
from agl_grpc.store.http.problems import invalid, malformed
from agl_grpc.store.http.request import ClientGone, Request
from agl_grpc.store.http.rest import show
from agl_grpc.store.http.rest.inputs import Inputs
from agl_grpc.store.http.rest.lists import envelope, list_fields, logic, nothing, paging
from agl_grpc.store.http.routing import Answer, Handler
from agl_grpc.store.http.shape import Fields
from agl_grpc.v1 import common_pb2, rollout_pb2, store_service_pb2

SORTABLE = ("rollout_id", "start_time", "end_time", "mode", "resources_id", "status")
"""Fields by which rollouts can be sorted."""

_LISTS = ("status_in", "rollout_id_in")
_MOST_DEQUEUED = 1000
_MOST_ATTEMPTS = 1000
_LONGEST_SECONDS = 3.1e11  # about ten thousand years, as the contract says


class RolloutRoutes:
    """Serves the routes about rollouts."""

    def __init__(self, methods: Methods) -> None:
        self._methods = methods
        self._inputs = Inputs(methods)

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        """Handlers by method and path below the API's prefix."""
        return {
            ("POST", "/queues/rollouts/enqueue"): self.enqueue,
            ("POST", "/queues/rollouts/dequeue"): self.dequeue,
            ("POST", "/rollouts"): self.start,
            ("GET", "/rollouts"): self.search,
            ("POST", "/rollouts/search"): self.search,
            ("GET", "/rollouts/{rollout_id}"): self.get,
            ("POST", "/rollouts/{rollout_id}"): self.update,
            ("POST", "/waits/rollouts"): self.wait,
        }

    async def enqueue(self, http: Request) -> Answer:
        """Rollouts into their queue, all or none."""
        fields = Fields(await http.json())
        fields.any("rollouts")
        items = fields.items("rollouts")
        if items is None:
            raise malformed("rollouts", "must be a list")
        specs = [spec_of(Fields(item, f"rollouts[{place}]")) for place, item in enumerate(items)]
        if not specs:
            return Answer(b"[]", 201)
        await self._inputs.spill((spec.input for spec in specs), http.metadata)
        request = store_service_pb2.EnqueueRolloutsRequest(rollouts=specs, request_id=_key(http))
        response = await self._methods(request, http.metadata)
        await self._inputs.fill((one.input for one in response.rollouts), http.metadata)
        return Answer(show.dump([show.rollout(one) for one in response.rollouts]), 201)

    async def dequeue(self, http: Request) -> Answer:
        """Waiting rollouts, taken without leases."""
        fields = Fields(await http.optional_json())
        limit = fields.integer("limit", 1)
        worker_id = fields.text("worker_id") or ""
        request = store_service_pb2.DequeueRolloutsRequest(
            limit=max(0, min(limit, _MOST_DEQUEUED)), worker_id=worker_id
        )
        if limit <= 0:
            check_request(request)
            return Answer(b"[]")
        response = await self._methods(request, http.metadata)
        taken = [one.rollout for one in response.rollouts]
        return self._inputs.answer(taken, _input_of_attempted, show.attempted, http.metadata)

    async def start(self, http: Request) -> Answer:
        """A rollout with its first attempt."""
        fields = Fields(await http.json())
        request = store_service_pb2.StartRolloutRequest(
            rollout=spec_of(fields), worker_id=fields.text("worker_id") or "", request_id=_key(http)
        )
        await self._inputs.spill([request.rollout.input], http.metadata)
        response = await self._methods(request, http.metadata)
        await self._inputs.fill([response.rollout.rollout.input], http.metadata)
        return Answer(show.dump(show.attempted(response.rollout)), 201)

    async def search(self, http: Request) -> Answer:
        """Rollouts by filter, each with its newest attempt."""
        fields = await list_fields(http, _LISTS)
        chosen = paging(fields, SORTABLE)
        statuses = fields.text_items("status_in", show.ROLLOUT_STATUSES)
        ids = fields.text_items("rollout_id_in")
        contains = fields.text("rollout_id_contains")
        combined = logic(fields)
        wanted = rollout_pb2.RolloutFilter(
            status_in=[show.ROLLOUT_STATUSES[name] for name in statuses or ()],
            rollout_id_in=ids or (),
            rollout_id_contains=contains or "",
            logic=combined,
        )
        # An empty list matches nothing; the contract's filter takes it for no condition.
        matchless = [] in (statuses, ids)
        if matchless and (combined == common_pb2.FILTER_LOGIC_AND or not (statuses or ids or contains)):
            check_request(store_service_pb2.ListRolloutsRequest(filter=wanted))
            return nothing(chosen)
        request = store_service_pb2.ListRolloutsRequest(filter=wanted, include_attempts=True)
        return await envelope(
            *(self._methods, http, request, chosen, limits.PAGE_SIZE),
            lambda page: page.rollouts,
            show.attempted,
            lambda found, before, behind: self._inputs.answer(
                found, _input_of_attempted, show.attempted, http.metadata, before, behind
            ),
        )

    async def get(self, http: Request) -> Answer:
        """One rollout with its newest attempt."""
        request = store_service_pb2.GetRolloutRequest(rollout_id=http.names["rollout_id"])
        response = await self._methods(request, http.metadata)
        await self._inputs.fill([response.rollout.rollout.input], http.metadata)
        return Answer(show.dump(show.attempted(response.rollout)))

    async def update(self, http: Request) -> Answer:
        """Changes what the body names; null clears."""
        fields = Fields(await http.json())
        request = store_service_pb2.UpdateRolloutRequest(request_id=_key(http))
        rollout, paths = request.rollout, request.update_mask.paths
        rollout.rollout_id = http.names["rollout_id"]
        for name in ("status", "config"):
            if fields.has(name) and fields.values[name] is None:
                raise invalid(name, "is invalid; it cannot be a null value.")
        if fields.has("input"):
            rollout.input.CopyFrom(payload_of(fields.any("input")))
            await self._inputs.spill([rollout.input], http.metadata)
        if fields.has("mode"):
            rollout.mode = _number(show.MODES, fields.choice("mode", show.MODES))
        if fields.has("resources_id"):
            rollout.resources_id = fields.text("resources_id") or ""
        if fields.has("status"):
            rollout.status = _number(show.ROLLOUT_STATUSES, fields.choice("status", show.ROLLOUT_STATUSES))
        config = fields.fields("config")
        if config is not None:
            rollout.config.CopyFrom(config_of(config))
        if fields.has("metadata"):
            rollout.metadata.extend(notes_of(fields, "metadata"))
        paths.extend(name for name in _UPDATABLE if fields.has(name))
        if not paths:
            return await self._unchanged(http)
        response = await self._methods(request, http.metadata)
        await self._inputs.fill([response.rollout.input], http.metadata)
        return Answer(show.dump(show.rollout(response.rollout)))

    async def _unchanged(self, http: Request) -> Answer:
        request = store_service_pb2.GetRolloutRequest(rollout_id=http.names["rollout_id"])
        response = await self._methods(request, http.metadata)
        await self._inputs.fill([response.rollout.rollout.input], http.metadata)
        return Answer(show.dump(show.rollout(response.rollout.rollout)))

    async def wait(self, http: Request) -> Answer:
        """Long poll until rollouts are finished; unknown ids are ignored."""
        fields = Fields(await http.json())
        fields.any("rollout_ids")
        ids = fields.text_items("rollout_ids")
        if ids is None:
            raise malformed("rollout_ids", "must be a list")
        timeout = fields.number("timeout", -1e308, 1e308)
        waiting = asyncio.ensure_future(self._wait(http, ids, timeout))
        leaving = asyncio.ensure_future(http.gone())
        try:
            await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise ClientGone
            found = waiting.result()
        finally:
            waiting.cancel()
            leaving.cancel()
        ended = [found[one] for one in dict.fromkeys(ids) if one in found]
        return self._inputs.answer(ended, _input_of, show.rollout, http.metadata)

    async def _wait(
        self, http: Request, ids: list[str], seconds: float | None
    ) -> dict[str, rollout_pb2.Rollout]:
        loop = asyncio.get_running_loop()
        end = None if seconds is None else loop.time() + max(0.0, seconds)
        while True:
            left = limits.LONG_POLL_SECONDS if end is None else max(0.0, end - loop.time())
            request = store_service_pb2.WaitRolloutsRequest(rollout_ids=ids)
            request.timeout.CopyFrom(to_duration(min(left, limits.LONG_POLL_SECONDS)) or request.timeout)
            response = await self._methods(request, http.metadata)
            over = end is not None and loop.time() >= end
            if response.complete or over or self._methods.draining.is_set():
                return {one.rollout_id: one for one in response.rollouts}


def _input_of(rollout: rollout_pb2.Rollout) -> common_pb2.Payload:
    return rollout.input


def _input_of_attempted(attempted: rollout_pb2.AttemptedRollout) -> common_pb2.Payload:
    return attempted.rollout.input


_UPDATABLE = ("input", "mode", "resources_id", "status", "config", "metadata")


def spec_of(fields: Fields) -> rollout_pb2.RolloutSpec:
    """What is said of a rollout to be made."""
    spec = rollout_pb2.RolloutSpec(
        input=payload_of(fields.any("input")),
        mode=_number(show.MODES, fields.choice("mode", show.MODES)),
        resources_id=fields.text("resources_id") or "",
        metadata=notes_of(fields, "metadata"),
    )
    config = fields.fields("config")
    if config is not None:
        spec.config.CopyFrom(config_of(config))
    return spec


def payload_of(value: Any) -> common_pb2.Payload:
    """A task's input."""
    try:
        data = encode_json(value, "input")
    except (TypeError, ValueError) as error:
        raise malformed("input", f"cannot be kept: {error}") from error
    return common_pb2.Payload(media_type=JSON, data=data)


def config_of(fields: Fields) -> rollout_pb2.RolloutConfig:
    """Rules of a rollout's life."""
    config = rollout_pb2.RolloutConfig(max_attempts=fields.integer("max_attempts", 1, 1, _MOST_ATTEMPTS))
    for name, field in (("timeout_seconds", config.timeout), ("unresponsive_seconds", config.unresponsive)):
        duration = to_duration(fields.number(name, 0.0, _LONGEST_SECONDS))
        if duration is not None:
            field.CopyFrom(duration)
    conditions = fields.text_items("retry_condition", show.ATTEMPT_STATUSES) or ()
    config.retry_condition.extend(_number(show.ATTEMPT_STATUSES, name) for name in conditions)
    return config


def notes_of(fields: Fields, name: str) -> list[common_pb2.KeyValue]:
    """An object as notes."""
    try:
        return to_key_values(fields.mapping(name), fields.at(name))
    except (ValueError, TypeError) as error:
        raise malformed(fields.at(name), f"cannot be kept: {error}") from error


def _number(names: Mapping[str, int], name: str | None) -> Any:
    """A word's number in the contract; 0 for null."""
    return 0 if name is None else names[name]


def _key(http: Request) -> str:
    """The caller's own idempotency key, if it sends one (R13)."""
    return http.header(b"idempotency-key")
