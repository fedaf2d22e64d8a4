"""REST: attempts."""

from __future__ import annotations

from collections.abc import Mapping

from google.rpc import code_pb2

from agl_grpc.model.times import to_timestamp
from agl_grpc.store import limits
from agl_grpc.store.door.methods import Methods
from agl_grpc.store.errors import StoreError
from agl_grpc.store.http.problems import invalid
from agl_grpc.store.http.request import Request
from agl_grpc.store.http.rest import show
from agl_grpc.store.http.rest.inputs import Inputs
from agl_grpc.store.http.rest.lists import envelope, list_fields, nothing, paging
from agl_grpc.store.http.rest.rollouts import notes_of
from agl_grpc.store.http.routing import Answer, Handler
from agl_grpc.store.http.shape import Fields
from agl_grpc.v1 import store_service_pb2

SORTABLE = (
    "sequence_id",
    "rollout_id",
    "attempt_id",
    "start_time",
    "end_time",
    "status",
    "worker_id",
    "last_heartbeat_time",
)
"""Fields by which attempts can be sorted."""

_UPDATABLE = ("status", "worker_id", "last_heartbeat_time", "metadata")
_LAST_SECOND = 253_402_300_799.0


class AttemptRoutes:
    """Serves the routes about attempts."""

    def __init__(self, methods: Methods) -> None:
        self._methods = methods
        self._inputs = Inputs(methods)

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        """Handlers by method and path below the API's prefix."""
        return {
            ("POST", "/rollouts/{rollout_id}/attempts"): self.start,
            ("GET", "/rollouts/{rollout_id}/attempts"): self.search,
            ("POST", "/rollouts/{rollout_id}/attempts/search"): self.search,
            ("GET", "/rollouts/{rollout_id}/attempts/latest"): self.latest,
            ("POST", "/rollouts/{rollout_id}/attempts/{attempt_id}"): self.update,
        }

    async def start(self, http: Request) -> Answer:
        """A further attempt, without a lease."""
        fields = Fields(await http.optional_json())
        request = store_service_pb2.StartAttemptRequest(
            rollout_id=http.names["rollout_id"],
            worker_id=fields.text("worker_id") or "",
            request_id=http.header(b"idempotency-key"),
        )
        response = await self._methods(request, http.metadata)
        await self._inputs.fill([response.rollout.rollout.input], http.metadata)
        return Answer(show.dump(show.attempted(response.rollout)), 201)

    async def search(self, http: Request) -> Answer:
        """A rollout's attempts; none of one that is unknown."""
        chosen = paging(await list_fields(http), SORTABLE, "sequence_id")
        request = store_service_pb2.ListAttemptsRequest(rollout_id=http.names["rollout_id"])
        try:
            return await envelope(
                *(self._methods, http, request, chosen, limits.PAGE_SIZE),
                lambda page: page.attempts,
                show.attempt,
            )
        except StoreError as error:
            if error.code != code_pb2.NOT_FOUND:
                raise
            return nothing(chosen)

    async def latest(self, http: Request) -> Answer:
        """The newest attempt; null when there is none."""
        request = store_service_pb2.GetAttemptRequest(
            rollout_id=http.names["rollout_id"], attempt_id="latest"
        )
        try:
            response = await self._methods(request, http.metadata)
        except StoreError as error:
            if error.code != code_pb2.NOT_FOUND:
                raise
            return Answer(b"null")
        shown = show.attempt(response.attempt) if response.HasField("attempt") else None
        return Answer(show.dump(shown))

    async def update(self, http: Request) -> Answer:
        """Changes what the body names; null is allowed for nothing."""
        fields = Fields(await http.json())
        for name in _UPDATABLE:
            if fields.has(name) and fields.values[name] is None:
                raise invalid(name, "is invalid; it cannot be a null value.")
        request = store_service_pb2.UpdateAttemptRequest(request_id=http.header(b"idempotency-key"))
        attempt = request.attempt
        attempt.rollout_id, attempt.attempt_id = http.names["rollout_id"], http.names["attempt_id"]
        status = fields.choice("status", show.ATTEMPT_STATUSES)
        if status is not None:
            attempt.status = show.ATTEMPT_STATUSES[status]
        attempt.worker_id = fields.text("worker_id") or ""
        heard = to_timestamp(fields.number("last_heartbeat_time", 0.0, _LAST_SECOND))
        if heard is not None:
            attempt.last_heartbeat_time.CopyFrom(heard)
        attempt.metadata.extend(notes_of(fields, "metadata"))
        request.update_mask.paths.extend(name for name in _UPDATABLE if fields.has(name))
        if not request.update_mask.paths:
            return await self._unchanged(http)
        response = await self._methods(request, http.metadata)
        return Answer(show.dump(show.attempt(response.attempt)))

    async def _unchanged(self, http: Request) -> Answer:
        request = store_service_pb2.GetAttemptRequest(
            rollout_id=http.names["rollout_id"], attempt_id=http.names["attempt_id"]
        )
        response = await self._methods(request, http.metadata)
        return Answer(show.dump(show.attempt(response.attempt)))
