"""GetServerInfo: versions, limits and capabilities of this server."""

from __future__ import annotations

from agl_grpc import __version__
from agl_grpc.store import limits
from agl_grpc.store.clock import SECOND
from agl_grpc.store.door.call import Call
from agl_grpc.store.store import Store
from agl_grpc.v1 import common_pb2, store_service_pb2

CAPABILITIES = (
    *("span_streams", "prompt_deltas", "policy_versions", "training_runs", "blobs", "otlp_traces"),
    "completion_spans",
)
"""Optional behaviour that is on."""


class InfoHandlers:
    """Serves GetServerInfo of one store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def get_server_info(
        self, _request: store_service_pb2.GetServerInfoRequest, _call: Call
    ) -> store_service_pb2.GetServerInfoResponse:
        """Versions, limits and capabilities."""
        answer = store_service_pb2.GetServerInfoResponse(
            server_version=__version__,
            contract_version="v1",
            backend=self._store.database.backend,
            durability=durability(self._store),
            limits=_limits(),
            capabilities=CAPABILITIES,
            store_id=self._store.database.store_id,
        )
        answer.start_time.FromMicroseconds(self._store.start_time)
        return answer


def durability(store: Store) -> common_pb2.Durability.ValueType:
    """What an acknowledgement of this store means."""
    memory = store.database.backend == "memory"
    return common_pb2.DURABILITY_MEMORY if memory else common_pb2.DURABILITY_DISK


def _limits() -> store_service_pb2.ServerLimits:
    answer = store_service_pb2.ServerLimits(
        max_message_bytes=limits.MESSAGE_BYTES,
        max_page_size=limits.PAGE_SIZE,
        max_span_bytes=limits.SPAN_BYTES,
        max_spans_per_message=limits.SPANS_PER_MESSAGE,
        max_in_flight_bytes=limits.STREAM_BYTES,
        max_payload_bytes=limits.PAYLOAD_BYTES,
        max_blob_bytes=limits.BLOB_BYTES,
    )
    answer.max_long_poll.FromMicroseconds(int(limits.LONG_POLL_SECONDS * SECOND))
    return answer
