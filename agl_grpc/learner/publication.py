"""Publication of policy versions: weights to the engines, staged, committed, swapped in, each with a
deadline.

prepare (the store tells the engines where to fetch) → engines stage while the old weights serve → commit with
the digest of what was sent → engines swap. Whatever fails before the commit leaves the old weights serving.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from google.protobuf.duration_pb2 import Duration

from agl_grpc.learner.errors import DeadlineError, LearnerError
from agl_grpc.learner.store_link import StoreLink, new_request_id
from agl_grpc.learner.store_source import TrainingIdentity
from agl_grpc.v1 import policy_pb2
from agl_grpc.v1 import trainer_service_pb2 as trainer_pb2


class Publisher:
    """``WeightPublication`` over the contract.

    Args:
        link: the line to the store.
        identity: training run and epoch.
        model: the served model's name.
        engines: how many engines must serve a version before training goes on.
        receivers_per_engine: worker processes of an engine that each take the weights (tensor-parallel size).
        deadline: seconds for a whole publication.
        engine_deadline: seconds to wait for that many engines to be connected.
        version_offset: published policy version minus optimiser step.
    """

    def __init__(
        self,
        link: StoreLink,
        identity: TrainingIdentity,
        *,
        model: str,
        engines: int,
        receivers_per_engine: int = 1,
        deadline: float = 120.0,
        engine_deadline: float = 300.0,
        version_offset: int = 0,
    ) -> None:
        self._link = link
        self._identity = identity
        self._model = model
        self._engines = engines
        self._receivers = receivers_per_engine
        self._deadline = deadline
        self._engine_deadline = engine_deadline
        self._offset = version_offset
        self._actors: Any = None

    def bind(self, actors: Any) -> None:
        """Names verl's actor worker group, whose ranks send."""
        self._actors = actors

    def update_weights(self, step: int) -> dict[str, float]:
        """Publishes the weights after ``step`` and returns when every engine serves them; seconds and
        bytes.
        """
        if self._engines == 0:
            return {}
        started = time.monotonic()
        version = step + self._offset
        connected = self._link.run(self._connected_engines())
        engines = [engine.engine_id for engine in connected]
        if version == 0 and all(engine.active_policy_version == 0 for engine in connected):
            # Version 0 is the model on disk, which engines and trainer have both loaded.
            return {"weights/policy_version": 0.0}
        transfer = f"{self._identity.training_run_id}/{self._identity.trainer_epoch}/{version}"
        prepared = self._each_rank("prepare")
        self._each_rank(
            "init_process_group",
            transfer_id=transfer,
            receivers=len(engines) * self._receivers,
            timeout=self._deadline,
        )
        source = policy_pb2.WeightSource(
            rendezvous=prepared[0]["endpoint"],
            group_id=transfer,
            world_size=1 + len(engines) * self._receivers,
            engine_ids=engines,
        )
        self._prepare(version, source)
        try:
            report = self._send(step, version, engines)
            self._reach(version, engines, policy_pb2.ENGINE_PHASE_RECEIVED, started)
            self._commit(version, report["digest"])
        except BaseException as error:
            self._abort(version, str(error).splitlines()[0] if str(error) else type(error).__name__)
            raise
        states = self._reach(version, engines, policy_pb2.ENGINE_PHASE_ACTIVE, started)
        return {
            "weights/bytes": float(report["sent_bytes"]),
            "weights/transfer_seconds": float(report["seconds"]),
            "weights/pause_seconds": max((state.pause_ns / 1e9 for state in states), default=0.0),
            "weights/policy_version": float(version),
        }

    async def _connected_engines(self) -> list[policy_pb2.Engine]:
        """The connected engines, once there are enough."""
        deadline = time.monotonic() + self._engine_deadline
        request = trainer_pb2.ListEnginesRequest(
            run_id=self._identity.run_id, model=self._model, page_size=1000
        )
        pause = 0.05
        while True:
            answer = await self._link.call(self._link.trainer.ListEngines, request, what="list engines")
            engines = [engine for engine in answer.engines if engine.connected]
            if len(engines) >= self._engines:
                return sorted(engines, key=lambda engine: engine.engine_id)
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"{len(engines)} of {self._engines} engines serving {self._model!r} are connected after "
                    f"{self._engine_deadline:g} s: start one with `agl-grpc vllm serve`, or check that it "
                    "serves this run and model"
                )
            # Engines appear at start-up only: there is no event to wait for before the first version.
            await asyncio.sleep(pause)
            pause = min(1.0, pause * 1.5)

    def _each_rank(self, method: str, **arguments: Any) -> list[Any]:
        import ray

        size = self._actors.world_size
        repeated = {name: [value] * size for name, value in arguments.items()}
        return list(ray.get(self._actors.execute_checkpoint_engine(method=[method] * size, **repeated)))

    def _prepare(self, version: int, source: policy_pb2.WeightSource) -> None:
        request = trainer_pb2.PreparePolicyVersionRequest(
            request_id=new_request_id(),
            run_id=self._identity.run_id,
            model=self._model,
            policy_version=version,
            source=source,
            deadline=Duration(seconds=int(self._deadline) or 1),
            training_run_id=self._identity.training_run_id,
            trainer_epoch=self._identity.trainer_epoch,
        )
        self._link.ask(
            self._link.trainer.PreparePolicyVersion, request, what=f"prepare policy version {version}"
        )

    def _send(self, step: int, version: int, engines: list[str]) -> dict[str, Any]:
        import ray

        pending = self._actors.update_weights(global_steps=step, mode="agl")
        try:
            return dict(ray.get(pending, timeout=self._deadline + 10)[0])
        except ray.exceptions.GetTimeoutError as error:
            raise DeadlineError(
                f"sending policy version {version} to {', '.join(engines)} took longer than "
                f"{self._deadline:g} s"
            ) from error
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            raise LearnerError(
                f"sending policy version {version}: {cause}; {self._why_failed(version)}"
            ) from error

    def _commit(self, version: int, digest: str) -> None:
        request = trainer_pb2.CommitPolicyVersionRequest(
            request_id=new_request_id(),
            run_id=self._identity.run_id,
            model=self._model,
            policy_version=version,
            weights_digest=digest,
        )
        self._link.ask(
            self._link.trainer.CommitPolicyVersion, request, what=f"commit policy version {version}"
        )

    def _abort(self, version: int, reason: str) -> None:
        request = trainer_pb2.AbortPolicyVersionRequest(
            request_id=new_request_id(),
            run_id=self._identity.run_id,
            model=self._model,
            policy_version=version,
            reason=reason[:1000],
        )
        try:
            self._link.ask(
                self._link.trainer.AbortPolicyVersion, request, what=f"abort policy version {version}"
            )
        except LearnerError as error:
            # The deadline given to the store aborts the version in any case; the first error is the one to
            # report.
            print(f"learner: {error}", flush=True)

    def _why_failed(self, version: int) -> str:
        states = self._link.run(self._states(version))
        reasons = [f"engine {state.engine_id}: {state.error}" for state in states if state.error]
        return "; ".join(reasons) or "no engine said why"

    async def _states(self, version: int) -> list[policy_pb2.EngineState]:
        request = trainer_pb2.GetPolicyVersionRequest(
            run_id=self._identity.run_id, model=self._model, policy_version=version
        )
        answer = await self._link.call(
            self._link.trainer.GetPolicyVersion, request, what="get policy version"
        )
        return list(answer.policy_version.engine_states)

    def _reach(
        self, version: int, engines: list[str], phase: policy_pb2.EnginePhase.ValueType, started: float
    ) -> list[policy_pb2.EngineState]:
        """Waits until every engine is in ``phase`` or beyond; their states."""
        remaining = max(1.0, self._deadline - (time.monotonic() - started))
        reached: dict[str, policy_pb2.EngineState] = {}
        try:
            return self._link.run(
                asyncio.wait_for(self._follow(version, engines, phase, reached), timeout=remaining)
            )
        except TimeoutError as error:
            name = policy_pb2.EnginePhase.Name(phase).removeprefix("ENGINE_PHASE_")
            missing = [engine for engine in engines if engine not in reached]
            raise DeadlineError(
                f"policy version {version} was not {name} within {self._deadline:g} s on: "
                f"{', '.join(missing)}"
            ) from error

    async def _follow(
        self,
        version: int,
        engines: list[str],
        phase: policy_pb2.EnginePhase.ValueType,
        reached: dict[str, policy_pb2.EngineState],
    ) -> list[policy_pb2.EngineState]:
        async for states in self._versions(version):
            for state in states:
                if state.engine_id not in engines:
                    continue
                if state.phase == policy_pb2.ENGINE_PHASE_FAILED:
                    raise LearnerError(
                        f"engine {state.engine_id} could not take policy version {version}: {state.error}"
                    )
                if state.phase >= phase:
                    reached[state.engine_id] = state
            if len(reached) == len(engines):
                return list(reached.values())
        raise LearnerError(f"the watch of policy version {version} ended")

    async def _versions(self, version: int) -> AsyncIterator[list[policy_pb2.EngineState]]:
        """States of the engines, now and at every change, across restarts of the store."""
        while True:
            watch = trainer_pb2.WatchPolicyVersionsRequest(
                run_id=self._identity.run_id, model=self._model, include_existing=True
            )
            try:
                async for answer in self._link.trainer.WatchPolicyVersions(watch):
                    for item in answer.policy_versions:
                        if item.policy_version != version:
                            continue
                        if item.status == policy_pb2.POLICY_VERSION_STATUS_ABORTED:
                            raise LearnerError(f"policy version {version} was aborted: {item.abort_reason}")
                        yield list(item.engine_states)
            except grpc.aio.AioRpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                    raise LearnerError(
                        f"watch policy versions: {error.code().name}: {error.details()}"
                    ) from error
            yield await self._states(version)


def newest_committed(link: StoreLink, run_id: str, model: str) -> int | None:
    """The newest committed policy version of a model, None when there is none."""
    token = ""
    newest: int | None = None
    while True:
        request = trainer_pb2.ListPolicyVersionsRequest(
            run_id=run_id, model=model, page_size=1000, page_token=token
        )
        answer = link.ask(link.trainer.ListPolicyVersions, request, what="list policy versions")
        for item in answer.policy_versions:
            if item.status == policy_pb2.POLICY_VERSION_STATUS_COMMITTED:
                newest = item.policy_version if newest is None else max(newest, item.policy_version)
        token = answer.next_page_token
        if not token:
            return newest
