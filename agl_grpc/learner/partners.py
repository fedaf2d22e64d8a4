"""The other models of a run, each trained by a learner of its own: how far they are."""

from __future__ import annotations

import asyncio

from agl_grpc.learner.errors import DeadlineError, LearnerError
from agl_grpc.learner.lineage import step_of
from agl_grpc.learner.store_link import StoreLink
from agl_grpc.model.enums import EnginePhase, PolicyVersionStatus
from agl_grpc.model.policy import PolicyVersion


class Partner:
    """Another training run's model, whose weights of each step are waited for.

    One watch follows it from step to step, from the first wait on. All but the constructor is for the I/O
    thread.

    Args:
        link: the line to the store.
        model: the served model's name.
        deadline: seconds to wait for each step of its training run.
    """

    def __init__(self, link: StoreLink, model: str, deadline: float) -> None:
        self._link = link
        self._model = model
        self._deadline = deadline
        self._is_watched = False
        self._changed = asyncio.Condition()
        self._lost: BaseException | None = None
        # Engines that were connected at any time: of these, and of no session before.
        self._seen: set[str] = set()
        self._newest: PolicyVersion | None = None
        # The newest version that every engine served, and the step whose weights it is.
        self._served, self._step = -1, 0

    async def reach(self, step: int) -> None:
        """Returns when engines serve its weights after ``step``.

        Raises:
            DeadlineError: it was not published in time.
            StoreError, LearnerError: it cannot be followed any longer.
        """
        if not self._is_watched:
            self._is_watched = True
            self._link.start(self._watch())
        elif self._newest is not None:
            # Its engine may have been connected only after it was heard of.
            await self._note([self._newest])
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._deadline) as limit, self._changed:
                while self._step < step:
                    if self._lost is not None:
                        raise self._lost
                    await self._changed.wait()
                    # One that is behind after a restart comes nearer step by step.
                    limit.reschedule(loop.time() + self._deadline)
        except TimeoutError as error:
            raise DeadlineError(
                f"model {self._model!r}, which is trained on the same rollouts, was not published for step "
                f"{step} within {self._deadline:g} s; its newest is that of step {self._step}"
            ) from error

    async def _watch(self) -> None:
        try:
            changes = self._link.client.watch_policy_versions(self._model, include_existing=True)
            async for change in changes:
                await self._note(change.items)
            self._lost = LearnerError(f"the watch of the policy versions of {self._model!r} ended")
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._lost = error
        async with self._changed:
            self._changed.notify_all()

    async def _note(self, items: list[PolicyVersion]) -> None:
        """Takes in versions as the store has them now."""
        engines = await self._link.client.query_engines(self._model)
        self._seen.update(engine.engine_id for engine in engines if engine.connected)
        before = self._served
        for item in items:
            if self._newest is None or item.policy_version >= self._newest.policy_version:
                self._newest = item
            # The newest version counts, not the highest step: a resumed run goes back.
            if item.policy_version >= self._served and self._serves(item):
                self._served, self._step = item.policy_version, step_of(item)
        if self._served > before:
            async with self._changed:
                self._changed.notify_all()

    def _serves(self, version: PolicyVersion) -> bool:
        """Whether a version was committed, and every engine that can take it has."""
        able = [state for state in version.engine_states if state.phase is not EnginePhase.FAILED]
        phases = [state.phase for state in able if state.engine_id in self._seen]
        committed = version.status is PolicyVersionStatus.COMMITTED
        return committed and bool(phases) and all(phase is EnginePhase.ACTIVE for phase in phases)
