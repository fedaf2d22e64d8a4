"""Publication of policy versions: weights to the engines, each phase with a deadline.

prepare (the store tells the engines where to fetch) → engines stage while the old weights serve → commit with
the digest of what was sent → engines swap. Whatever fails before the commit leaves the old weights serving.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from agl_grpc.client import StoreError
from agl_grpc.learner.engine_progress import EngineProgress, VersionProgress
from agl_grpc.learner.errors import DeadlineError, LearnerError
from agl_grpc.learner.lineage import PolicyLineage, transfer_name
from agl_grpc.learner.partners import Partner
from agl_grpc.learner.stopping import Waits
from agl_grpc.learner.store_link import StoreLink
from agl_grpc.learner.training_run import TrainingIdentity
from agl_grpc.model.enums import EnginePhase, PolicyVersionStatus
from agl_grpc.model.policy import Engine, EngineState, WeightSource


class Publisher:
    """``WeightPublication`` over the contract.

    Args:
        link: the line to the store.
        identity: training run and epoch.
        model: the served model's name.
        engines: how many engines must serve a version before training goes on; 0 publishes nothing.
        receivers_per_engine: worker processes of an engine that each take the weights (tensor-parallel size).
        deadline: seconds for a whole publication.
        engine_deadline: seconds to wait for that many engines to be connected.
        lineage: told which step each published version is.
        partners: models of other training runs; a publication ends when theirs of the same step is committed.
        partner_deadline: seconds to wait for each step of theirs.
        waits: ends the wait for partners when this training run is asked to stop.
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
        lineage: PolicyLineage | None = None,
        partners: Sequence[str] = (),
        partner_deadline: float = 600.0,
        waits: Waits | None = None,
    ) -> None:
        self._waits = waits or Waits(link)
        self._partners = [Partner(link, model, partner_deadline) for model in partners]
        self._link = link
        self._client = link.client
        self._identity = identity
        self._model = model
        self._engines = engines
        self._receivers = receivers_per_engine
        self._deadline = deadline
        self._engine_deadline = engine_deadline
        self._lineage = lineage or PolicyLineage()
        self._actors: Any = None
        self._endpoint = ""
        self._progress = EngineProgress(self._client, model)
        self._watched = False

    def bind(self, actors: Any) -> None:
        """Names verl's actor worker group, whose ranks send."""
        self._actors = actors

    def update_weights(self, step: int) -> dict[str, float]:
        """Publishes the weights after ``step``; returns when every engine serves them, and the partners'
        weights of that step are published, with seconds and bytes as metrics.
        """
        metrics = self._publish(step) if self._engines else {}
        for partner in self._partners if step else ():
            self._waits.until(partner.reach(step))
        return metrics

    def _publish(self, step: int) -> dict[str, float]:
        version = step + self._lineage.offset
        connected = self._link.run(self._connected_engines())
        if version == 0 and all(engine.active_policy_version == 0 for engine in connected):
            # Version 0 is the model on disk, which engines and trainer have both loaded.
            return {"weights/policy_version": 0.0}
        engines = [engine.engine_id for engine in connected]
        deadline = time.monotonic() + self._deadline
        progress = self._progress.begin(version, engines)
        if not self._watched:
            self._watched = True
            self._link.start(self._progress.watch())
        named = self._prepare(step, version, engines)
        try:
            report = self._send(step, version, engines, progress, named)
            self._reach(progress, version, EnginePhase.RECEIVED, deadline)
            self._link.run(self._client.commit_policy_version(self._model, version, report["digest"]))
        except BaseException as error:
            self._abort(version, error)
            raise
        self._lineage.published(step, report["digest"])
        states = self._reach(progress, version, EnginePhase.ACTIVE, deadline)
        return {
            "weights/bytes": float(report["sent_bytes"]),
            "weights/transfer_seconds": float(report["seconds"]),
            "weights/pause_seconds": max(state.pause_ns for state in states) / 1e9,
            "weights/policy_version": float(version),
        }

    async def _connected_engines(self) -> list[Engine]:
        """The connected engines, once there are enough."""
        deadline = time.monotonic() + self._engine_deadline
        pause = 0.05
        while True:
            engines = [item for item in await self._client.query_engines(self._model) if item.connected]
            if len(engines) >= self._engines:
                return sorted(engines, key=lambda engine: engine.engine_id)
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"{len(engines)} of {self._engines} engines serving {self._model!r} are connected after "
                    f"{self._engine_deadline:g} s: start one with `agl-grpc vllm serve`, or check that it "
                    "serves this run and model"
                )
            # Engines are waited for at start-up and after a loss only; the contract has no watch of them.
            await asyncio.sleep(pause)
            pause = min(1.0, pause * 1.5)

    def _each_rank(self, method: str, **arguments: Any) -> Any:
        """Calls the checkpoint engine of every rank; Ray's references to the answers."""
        size = self._actors.world_size
        repeated = {name: [value] * size for name, value in arguments.items()}
        return self._actors.execute_checkpoint_engine(method=[method] * size, **repeated)

    def _prepare(self, step: int, version: int, engines: list[str]) -> Any:
        """Opens the rendezvous and offers the version; engines begin to fetch.

        Answers Ray's references to what ranks say of the transfer's name: they are told it in the meantime.
        """
        import ray

        mine = self._identity
        transfer = transfer_name(mine, step, version)
        receivers = len(engines) * self._receivers
        if not self._endpoint:
            # The rendezvous stays open: it is where the next transfers meet, too.
            self._endpoint = ray.get(self._each_rank("prepare"))[0]["endpoint"]
        named = self._each_rank(
            "init_process_group", transfer_id=transfer, receivers=receivers, timeout=self._deadline
        )
        # The group's name is the transfer's: by it the engines' receivers find the sender.
        source = WeightSource(
            rendezvous=self._endpoint, group_id=transfer, world_size=1 + receivers, engine_ids=engines
        )
        work = self._client.prepare_policy_version(
            self._model,
            version,
            source,
            deadline=self._deadline,
            training_run_id=mine.training_run_id,
            trainer_epoch=mine.trainer_epoch,
        )
        self._link.run(work)
        return named

    def _send(
        self, step: int, version: int, engines: list[str], progress: VersionProgress, named: Any
    ) -> dict[str, Any]:
        import ray

        from agl_grpc.learner.verl.sender import SEND_MODE

        # Given up as soon as an engine cannot take it.
        progress.tell(lambda reason: self._each_rank("cancel", reason=reason))
        try:
            ray.get(named, timeout=self._deadline + 10)
            pending = self._actors.update_weights(global_steps=step, mode=SEND_MODE)
            # The sender itself gives up after the deadline; this one is for a worker that died.
            return dict(ray.get(pending, timeout=self._deadline + 10)[0])
        except ray.exceptions.GetTimeoutError as error:
            raise DeadlineError(
                f"sending policy version {version} to {', '.join(engines)} took longer than "
                f"{self._deadline:g} s"
            ) from error
        except ray.exceptions.RayTaskError as error:
            reason = progress.reason or "no engine said why"
            raise LearnerError(f"sending policy version {version}: {error.cause}; {reason}") from error
        finally:
            progress.tell(None)

    def _abort(self, version: int, error: BaseException) -> None:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:1000]
        try:
            self._link.run(self._client.abort_policy_version(self._model, version, reason))
        except StoreError as second:
            # The store aborts the version at its deadline in any case; the first error is the one to report.
            print(f"learner: could not abort policy version {version}: {second}", flush=True)

    def _reach(
        self, progress: VersionProgress, version: int, phase: EnginePhase, deadline: float
    ) -> list[EngineState]:
        """Waits until every engine is in ``phase`` or beyond; their states."""
        try:
            return progress.wait(phase, max(deadline, time.monotonic() + 1.0))
        except TimeoutError as missing:
            raise DeadlineError(
                f"policy version {version} was not {phase.value} within {self._deadline:g} s on: {missing}"
            ) from missing


def lineage_of(link: StoreLink, model: str, training_run_id: str, step: int) -> PolicyLineage:
    """The lineage of a trainer that begins at ``step``: its versions follow those that are in the store."""
    versions = link.run(link.client.query_policy_versions(model))
    committed = [item.policy_version for item in versions if item.status is PolicyVersionStatus.COMMITTED]
    # Versions only rise in the store, also when a resumed run goes back to an earlier step.
    offset = max(0, max(committed) + 1 - step) if committed else 0
    return PolicyLineage(offset=offset, start=step, older=versions, training_run_id=training_run_id)
