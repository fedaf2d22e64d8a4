"""Runs, groups, and the server itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import grpc

from agl_grpc.client.connection import Connection
from agl_grpc.client.errors import NotFound, Unimplemented
from agl_grpc.model.enums import Durability
from agl_grpc.model.run import Group, Run, RunGrader, graders_to_proto
from agl_grpc.model.times import from_duration, from_timestamp, to_duration
from agl_grpc.model.unset import UNSET, Unset
from agl_grpc.model.value import to_key_values
from agl_grpc.v1 import run_pb2
from agl_grpc.v1 import store_service_pb2 as pb

CONTRACT_VERSION = "v1"
"""The version of the contract that this client speaks."""


class Capabilities(TypedDict):
    """What a store can do, under the names of Agent Lightning."""

    thread_safe: bool
    async_safe: bool
    zero_copy: bool
    otlp_traces: bool


@dataclass(slots=True, frozen=True, kw_only=True)
class ServerInfo:
    """Versions, limits (bytes, counts, seconds) and capabilities of a server."""

    server_version: str
    contract_version: str
    backend: str
    durability: Durability | None
    store_id: str
    start_time: float
    capabilities: tuple[str, ...]
    max_message_bytes: int
    max_page_size: int
    max_span_bytes: int
    max_spans_per_message: int
    max_in_flight_bytes: int
    max_payload_bytes: int
    max_long_poll: float
    max_blob_bytes: int


class RunCalls(Connection):
    """The client's methods for runs and for the server."""

    async def get_server_info(self) -> ServerInfo:
        """Versions, limits and capabilities of the server."""
        info = await self.call(self.bound.store.GetServerInfo, pb.GetServerInfoRequest())
        limits = info.limits
        return ServerInfo(
            server_version=info.server_version,
            contract_version=info.contract_version,
            backend=info.backend,
            durability=Durability.from_proto(info.durability),
            store_id=info.store_id,
            start_time=from_timestamp(info.start_time),
            capabilities=tuple(info.capabilities),
            max_message_bytes=limits.max_message_bytes,
            max_page_size=limits.max_page_size,
            max_span_bytes=limits.max_span_bytes,
            max_spans_per_message=limits.max_spans_per_message,
            max_in_flight_bytes=limits.max_in_flight_bytes,
            max_payload_bytes=limits.max_payload_bytes,
            max_long_poll=from_duration(limits.max_long_poll),
            max_blob_bytes=limits.max_blob_bytes,
        )

    async def require(self, *capabilities: str) -> ServerInfo:
        """Makes sure that the server speaks this contract and has these capabilities.

        Raises `Unimplemented` (METHOD_UNIMPLEMENTED) when it does not; ``metadata`` has its
        ``contract_version`` and, in ``missing``, the capabilities that it lacks, with commas between them.
        """
        info = await self.get_server_info()
        missing = ",".join(name for name in capabilities if name not in info.capabilities)
        if info.contract_version == CONTRACT_VERSION and not missing:
            return info
        lack = f"lacks {missing}"
        if info.contract_version != CONTRACT_VERSION:
            lack = f"speaks contract {info.contract_version or 'unknown'}, not {CONTRACT_VERSION}"
        raise Unimplemented(
            f"the store at {self.target} is of version {info.server_version} and {lack}",
            code=grpc.StatusCode.UNIMPLEMENTED,
            reason="METHOD_UNIMPLEMENTED",
            metadata={"contract_version": info.contract_version, "missing": missing},
        )

    async def capabilities(self) -> Capabilities:
        """What the store can do, as far as callers of Agent Lightning ask."""
        info = await self.get_server_info()
        return Capabilities(
            thread_safe=True, async_safe=True, zero_copy=True, otlp_traces="otlp_traces" in info.capabilities
        )

    async def statistics(self, *, run_id: str = "*") -> dict[str, Any]:
        """Counts and sizes of a run or of all (``*``): totals, ``uptime`` in seconds, sizes in bytes."""
        request = pb.GetStatisticsRequest(run_id=run_id)
        response = await self.call(self.bound.store.GetStatistics, request)
        special = {"uptime", "rollouts_by_status"}
        values = {
            field.name: getattr(response, field.name)
            for field in response.DESCRIPTOR.fields
            if field.name not in special
        }
        by_status = {count.status: count.count for count in response.rollouts_by_status}
        return values | {"uptime": from_duration(response.uptime), "rollouts_by_status": by_status}

    async def create_run(self, run: Run | str) -> Run:
        """Make a run; one that exists already is answered unchanged."""
        wanted = Run(run_id=run) if isinstance(run, str) else run
        response = await self.call(self.bound.store.CreateRun, pb.CreateRunRequest(run=wanted.to_proto()))
        return Run.from_proto(response.run)

    async def get_run_by_id(self, run_id: str) -> Run | None:
        """One run; ``None`` when unknown."""
        try:
            response = await self.call(self.bound.store.GetRun, pb.GetRunRequest(run_id=run_id))
        except NotFound:
            return None
        return Run.from_proto(response.run)

    async def query_runs(self) -> list[Run]:
        """All runs, by id."""
        request = pb.ListRunsRequest(page_size=1000)
        return await self.read_all(
            self.bound.store.ListRuns, request, lambda page: map(Run.from_proto, page.runs)
        )

    async def update_run(
        self,
        run_id: str,
        *,
        metadata: dict[str, Any] | Unset | None = UNSET,
        allow_self_grading: bool | Unset = UNSET,
        retention_seconds: float | Unset | None = UNSET,
        seal_timeout_seconds: float | Unset | None = UNSET,
        replay_retention_seconds: float | Unset | None = UNSET,
        graders: Sequence[RunGrader] | Unset = UNSET,
        grading_timeout_seconds: float | Unset | None = UNSET,
    ) -> Run:
        """Change what is given and nothing else; ``None`` clears."""
        changes: dict[str, Any] = {
            "metadata": UNSET if isinstance(metadata, Unset) else to_key_values(metadata, "metadata"),
            "allow_self_grading": allow_self_grading,
            "graders": UNSET if isinstance(graders, Unset) else graders_to_proto(graders),
        }
        for name, seconds in (
            ("retention", retention_seconds),
            ("seal_timeout", seal_timeout_seconds),
            ("replay_retention", replay_retention_seconds),
            ("grading_timeout", grading_timeout_seconds),
        ):
            changes[name] = UNSET if isinstance(seconds, Unset) else to_duration(seconds)
        given = {name: value for name, value in changes.items() if value is not UNSET}
        request = pb.UpdateRunRequest(run=run_pb2.Run(run_id=run_id, **given))
        request.update_mask.paths.extend(given)
        return Run.from_proto((await self.call(self.bound.store.UpdateRun, request)).run)

    async def pause_dispatch(self, *, queue: str = "", run_id: str | None = None) -> Run:
        """Stop delivery of a run's (or one queue's) rollouts; what is leased goes on."""
        request = pb.PauseDispatchRequest(run_id=self.run_or_default(run_id), queue=queue)
        return Run.from_proto((await self.call(self.bound.store.PauseDispatch, request)).run)

    async def resume_dispatch(self, *, queue: str = "", run_id: str | None = None) -> Run:
        """Take delivery up again."""
        request = pb.ResumeDispatchRequest(run_id=self.run_or_default(run_id), queue=queue)
        return Run.from_proto((await self.call(self.bound.store.ResumeDispatch, request)).run)

    async def get_group(self, group_id: str, *, run_id: str | None = None) -> Group | None:
        """How far a group is; ``None`` when no rollout carries its id."""
        request = pb.GetGroupRequest(run_id=self.run_or_default(run_id), group_id=group_id)
        try:
            return Group.from_proto((await self.call(self.bound.store.GetGroup, request)).group)
        except NotFound:
            return None
