"""How far engines are with the policy versions that a learner publishes: one watch for the whole run."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Collection

from agl_grpc.client import StoreClient
from agl_grpc.learner.errors import LearnerError
from agl_grpc.model.enums import EnginePhase, PolicyVersionStatus
from agl_grpc.model.policy import EngineState, PolicyVersion


class VersionProgress:
    """What engines say of one version. Told by the I/O thread, waited for by the trainer's.

    Args:
        version: the policy version.
        engines: ids of the engines that have to take it.
    """

    def __init__(self, version: int, engines: Collection[str]) -> None:
        self._version = version
        self._engines = engines
        self._states: dict[str, EngineState] = {}
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._on_failed: Callable[[str], None] | None = None

    @property
    def reason(self) -> str:
        """Why it cannot go on; empty = it can."""
        return "" if self._error is None else str(self._error)

    def tell(self, on_failed: Callable[[str], None] | None) -> None:
        """Has the reason told as soon as the version cannot go on, from the I/O thread; None = no more."""
        with self._changed:
            self._on_failed = on_failed
            if self._error is not None and on_failed is not None:
                on_failed(self.reason)

    def note(self, item: PolicyVersion) -> None:
        """Takes in a version as the store has it now."""
        if item.policy_version != self._version:
            return
        if item.status is PolicyVersionStatus.ABORTED:
            self.fail(LearnerError(f"policy version {self._version} was aborted: {item.abort_reason}"))
        for state in item.engine_states:
            if state.engine_id not in self._engines:
                continue
            if state.phase is EnginePhase.FAILED:
                said = f"could not take policy version {self._version}: {state.error}"
                self.fail(LearnerError(f"engine {state.engine_id} {said}"))
            with self._changed:
                self._states[state.engine_id] = state
                self._changed.notify()

    def fail(self, error: BaseException) -> None:
        """The version cannot go on; the first reason counts."""
        with self._changed:
            if self._error is None:
                self._error = error
                if self._on_failed is not None:
                    self._on_failed(self.reason)
            self._changed.notify()

    def wait(self, phase: EnginePhase, deadline: float) -> list[EngineState]:
        """Waits until every engine is in ``phase`` or beyond; their states.

        Args:
            phase: the phase.
            deadline: by the clock of `time.monotonic`.

        Raises:
            LearnerError: an engine failed, or the version was aborted.
            TimeoutError: some are not there in time; it names them.
        """
        with self._changed:
            while missing := [each for each in self._engines if not self._has_reached(each, phase)]:
                if self._error is not None:
                    raise self._error
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise TimeoutError(", ".join(missing))
                self._changed.wait(remaining)
            return list(self._states.values())

    def _has_reached(self, engine: str, phase: EnginePhase) -> bool:
        state = self._states.get(engine)
        if state is None or state.phase is EnginePhase.FAILED:
            return False
        return bool(state.phase.number >= phase.number)


class EngineProgress:
    """Follows the versions of a model, for one publication after the other.

    Args:
        client: of the store; used on the I/O thread.
        model: the served model's name.
    """

    def __init__(self, client: StoreClient, model: str) -> None:
        self._client = client
        self._model = model
        self._current: VersionProgress | None = None
        self._lost: BaseException | None = None

    def begin(self, version: int, engines: Collection[str]) -> VersionProgress:
        """From now on it is this version that counts."""
        progress = self._current = VersionProgress(version, engines)
        if self._lost is not None:
            progress.fail(self._lost)
        return progress

    async def watch(self) -> None:
        """Follows until it is cancelled; what ends it otherwise fails the version that counts."""
        try:
            changes = self._client.watch_policy_versions(self._model, include_existing=True)
            async for change in changes:
                for item in change.items:
                    if self._current is not None:
                        self._current.note(item)
            self._lost = LearnerError(f"the watch of the policy versions of {self._model!r} ended")
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._lost = error
        if self._current is not None and self._lost is not None:
            self._current.fail(self._lost)
