"""Policy versions and the engines that serve them."""

from __future__ import annotations

from collections.abc import AsyncIterator

from agl_grpc.client.connection import Connection
from agl_grpc.client.errors import NotFound
from agl_grpc.client.watch import Watched, watch
from agl_grpc.model.policy import Engine, EngineState, PolicyVersion, WeightSource
from agl_grpc.model.times import to_duration
from agl_grpc.v1 import trainer_service_pb2 as pb


class PolicyCalls(Connection):
    """The client's methods for policy versions and engines."""

    async def prepare_policy_version(
        self,
        model: str,
        policy_version: int,
        source: WeightSource,
        *,
        deadline: float | None = None,
        training_run_id: str = "",
        trainer_epoch: int = 0,
        run_id: str | None = None,
    ) -> PolicyVersion:
        """Offer weights to a run's engines; ``deadline`` in seconds from now, ``None`` = 60."""
        request = pb.PreparePolicyVersionRequest(
            run_id=self.run_or_default(run_id),
            model=model,
            policy_version=policy_version,
            source=source.to_proto(),
            deadline=to_duration(deadline),
            training_run_id=training_run_id,
            trainer_epoch=trainer_epoch,
        )
        response = await self.call(self.bound.trainer.PreparePolicyVersion, request)
        return PolicyVersion.from_proto(response.policy_version)

    async def commit_policy_version(
        self, model: str, policy_version: int, weights_digest: str, *, run_id: str | None = None
    ) -> PolicyVersion:
        """Let engines swap the weights in."""
        request = pb.CommitPolicyVersionRequest(
            run_id=self.run_or_default(run_id),
            model=model,
            policy_version=policy_version,
            weights_digest=weights_digest,
        )
        response = await self.call(self.bound.trainer.CommitPolicyVersion, request)
        return PolicyVersion.from_proto(response.policy_version)

    async def abort_policy_version(
        self, model: str, policy_version: int, reason: str = "", *, run_id: str | None = None
    ) -> PolicyVersion:
        """Give a version up; engines drop what they staged."""
        request = pb.AbortPolicyVersionRequest(
            run_id=self.run_or_default(run_id), model=model, policy_version=policy_version, reason=reason
        )
        response = await self.call(self.bound.trainer.AbortPolicyVersion, request)
        return PolicyVersion.from_proto(response.policy_version)

    async def get_policy_version(
        self, model: str, policy_version: int = 0, *, run_id: str | None = None
    ) -> PolicyVersion | None:
        """One version, the newest committed one for 0; ``None`` when there is none."""
        request = pb.GetPolicyVersionRequest(
            run_id=self.run_or_default(run_id), model=model, policy_version=policy_version
        )
        try:
            response = await self.call(self.bound.trainer.GetPolicyVersion, request)
        except NotFound:
            return None
        return (
            PolicyVersion.from_proto(response.policy_version) if response.HasField("policy_version") else None
        )

    async def query_policy_versions(
        self, model: str = "", *, run_id: str | None = None
    ) -> list[PolicyVersion]:
        """Policy versions of a run, newest first."""
        request = pb.ListPolicyVersionsRequest(run_id=self.run_or_default(run_id), model=model)
        return await self.read_all(
            self.bound.trainer.ListPolicyVersions,
            request,
            lambda page: map(PolicyVersion.from_proto, page.policy_versions),
        )

    def watch_policy_versions(
        self,
        model: str = "",
        *,
        engine_id: str = "",
        cursor: int = 0,
        include_existing: bool = False,
        run_id: str | None = None,
    ) -> AsyncIterator[Watched[PolicyVersion]]:
        """Policy versions as they change; an engine that gives its id counts as connected meanwhile."""
        request = pb.WatchPolicyVersionsRequest(
            run_id=self.run_or_default(run_id),
            model=model,
            engine_id=engine_id,
            cursor=cursor,
            include_existing=include_existing,
        )
        return watch(
            self,
            lambda bound: bound.trainer.WatchPolicyVersions,
            request,
            lambda message: map(PolicyVersion.from_proto, message.policy_versions),
        )

    async def report_engine_state(self, engine: Engine, state: EngineState | None = None) -> Engine:
        """Make an engine known, and say how far it is with a version."""
        request = pb.ReportEngineStateRequest(
            engine=engine.to_proto(), state=state.to_proto() if state else None
        )
        response = await self.call(self.bound.trainer.ReportEngineState, request)
        return Engine.from_proto(response.engine)

    async def query_engines(self, model: str = "", *, run_id: str | None = None) -> list[Engine]:
        """Engines of a run."""
        request = pb.ListEnginesRequest(run_id=self.run_or_default(run_id), model=model)
        return await self.read_all(
            self.bound.trainer.ListEngines, request, lambda page: map(Engine.from_proto, page.engines)
        )
