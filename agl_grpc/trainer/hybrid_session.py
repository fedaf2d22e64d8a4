"""A training run in which verl starts the engine: it comes with the learner, and ends with it."""

from __future__ import annotations

import asyncio
from typing import Any

from agl_grpc.algorithm import VERL
from agl_grpc.learner.dotted import setting
from agl_grpc.model import ProxyLLM
from agl_grpc.model.policy import Engine
from agl_grpc.trainer.errors import TrainerError
from agl_grpc.trainer.options import find_python
from agl_grpc.trainer.plan import Plan
from agl_grpc.trainer.progress import Progress
from agl_grpc.trainer.result import Scores
from agl_grpc.trainer.verl_session import VerlSession

_PAUSE = 0.25


class HybridSession(VerlSession):
    """As `VerlSession`, without an engine of its own until training has ended: then one serves the last
    checkpoint, for the validation after it.

    Agents wait until the learner's engine has told the store where it serves.
    """

    def __init__(
        self, plan: Plan, progress: Progress, algorithm: VERL, *, start_workers: bool = True
    ) -> None:
        _check(plan, algorithm)
        super().__init__(plan, progress, algorithm, start_workers=start_workers)
        # Engines that were there before: of an earlier session's learner, say, whose end the store waits for.
        self._earlier: set[str] = set()

    def _pythons(self) -> tuple[str, str]:
        both = find_python("hybrid", self.plan.learner_python)
        return both, both

    async def _start_parts(self, validates: bool) -> None:
        # In any case: no rollout may begin before it can be told the engine's address.
        await self.client.pause_dispatch(queue=self.plan.run_id)
        known = await self.client.query_engines(self._algorithm.model_name)
        self._earlier = {engine.engine_id for engine in known}
        self._start_learners()
        self._start_or_name_workers()

    async def _engine_ready(self) -> None:
        """Waits until verl's engine serves, and tells agents where."""
        within = self.plan.engine.start_seconds
        try:
            async with asyncio.timeout(within):
                while not (found := await self._serving()):  # noqa: ASYNC110  # engines cannot be watched
                    await asyncio.sleep(_PAUSE)
        except TimeoutError as error:
            raise TrainerError(
                f"verl's engine did not serve within {within:g} s; see {self.plan.folder.log('learner')}"
            ) from error
        self.progress.say(
            f"the engine that verl started, {found[0].engine_id}, serves at {found[0].endpoint}"
        )
        llm = ProxyLLM(
            endpoint=f"{found[0].endpoint}/v1",
            model=self._algorithm.model_name,
            sampling_parameters=dict(self.plan.engine.sampling_parameters),
        )
        await self._publish({self._leader.resource: llm}, self._temperatures)

    async def _serving(self) -> list[Engine]:
        """Engines of this session's learner that serve."""
        return [
            engine
            for engine in await self.client.query_engines(self._algorithm.model_name)
            if engine.connected and engine.endpoint and engine.engine_id not in self._earlier
        ]

    async def _validate_trained(self) -> Scores:
        self.progress.phase("starting an engine with the last checkpoint")
        await self._publish(await self._start_engines(), self._temperatures)
        await self.stack.until(super()._engine_ready())
        return await super()._validate_trained()

    async def _captured(self) -> dict[str, Any]:
        # The engine that was trained with has ended; the other one has answered for the validation alone.
        return {}


def _check(plan: Plan, algorithm: VERL) -> None:
    """Refuses what cannot go with an engine that verl starts."""
    config = algorithm.config
    rollout = "actor_rollout_ref.rollout."
    ranks = int(setting(config, "trainer.n_gpus_per_node", 1)) * int(setting(config, "trainer.nnodes", 1))
    each = int(setting(config, f"{rollout}tensor_model_parallel_size", 1))
    each *= int(setting(config, f"{rollout}pipeline_model_parallel_size", 1))
    if algorithm.models:
        raise TrainerError(
            "engines.hybrid: verl starts the engine of one model; train several with engines of their own"
        )
    if plan.llm is not None:
        raise TrainerError("engines.hybrid: verl starts the engine; leave the endpoint in llm_proxy out")
    if ranks > each:
        raise TrainerError(
            f"engines.hybrid: verl would start {ranks // each} engines, and Trainer.fit gives agents the "
            f"address of one: set {rollout}tensor_model_parallel_size={ranks}, or start `agl-grpc "
            "learner` yourself"
        )
    if bool(setting(config, "trainer.val_before_train", False)):
        raise TrainerError(
            "engines.hybrid: trainer.val_before_train would validate before agents know the engine; "
            "leave it out, validation={'before': True} does it"
        )
    if plan.val_dataset and plan.validation.after and int(setting(config, "trainer.save_freq", 1)) <= 0:
        raise TrainerError(
            "engines.hybrid: the engine ends with the learner, and without checkpoints nothing is left to "
            "validate: set trainer.save_freq, or validation={'after': False}"
        )
