"""Engines that verl starts itself, on the accelerators of the trainer's ranks, with the interceptor inside.

verl decides where vLLM runs and starts it; from then on it is an engine like any other: our plugin captures
calls, knows policy versions, and takes weights over our own transfer, so that a swap has a digest and answers
under way are held, not cut. Needs the hybrid environment, which holds both vLLM and verl.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import ray
from omegaconf import DictConfig
from verl.workers.rollout.llm_server import LLMServerManager
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

from agl_grpc.interceptor.inside.middleware import AttributionMiddleware
from agl_grpc.interceptor.inside.runtime import Interceptor
from agl_grpc.interceptor.inside.serve import MIDDLEWARE, is_cpu, set_environment
from agl_grpc.interceptor.settings import FAILURE_FILE, Settings
from agl_grpc.learner.errors import LearnerError
from agl_grpc.learner.verl.config import HYBRID_KEY
from agl_grpc.learner.verl.hybrid_worker import HYBRID_EXTENSION


class InterceptedServer(vLLMHttpServer):  # type: ignore[misc]  # verl is untyped
    """verl's vLLM server, a Ray actor, with our plugin, middleware and worker extension."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._told = dict(self.config.custom[HYBRID_KEY])
        if self._told["host"]:
            self._server_address = str(self._told["host"])
        # A name of its own at each start: what was promised to an engine of an earlier start is void.
        engine_id = f"{self._told['run_id']}-verl-{self.replica_rank}-{uuid.uuid4().hex[:8]}"
        settings = Settings(
            store=self._told["store"],
            run_id=self._told["run_id"],
            engine_id=engine_id,
            spool_dir=str(Path(self._told["spool"]) / str(self.replica_rank)),
            keep_weights=False,
        )
        set_environment(os.environ, settings, cpu=is_cpu(), cores=len(os.sched_getaffinity(0)))
        os.environ.setdefault("VLLM_ENFORCE_STRICT_TOOL_CALLING", "0")
        # By it vLLM's processes also know that they end with this one.
        settings.spool_path().mkdir(parents=True, exist_ok=True)
        os.environ[FAILURE_FILE] = str(settings.spool_path() / "failure")

    def _preprocess_engine_kwargs(self, engine_kwargs: dict[str, Any]) -> None:
        super()._preprocess_engine_kwargs(engine_kwargs)
        engine_kwargs["middleware"] = [MIDDLEWARE, *engine_kwargs.get("middleware", [])]
        engine_kwargs["served_model_name"] = self._told["model"]
        engine_kwargs["generation_config"] = "vllm"
        if is_cpu() and self.replica_world_size == 1:
            # The engine core computes by itself. What verl wants one more process for, its own transfer of
            # weights, is not used, and to import vLLM once more takes longer than to load a small model.
            engine_kwargs.setdefault("distributed_executor_backend", "uni")

    def _get_worker_extension_cls(self) -> str:
        return HYBRID_EXTENSION

    async def run_server(self, args: Any) -> None:
        """Starts vLLM, and tells the store its address, which verl chooses last."""
        args.port = 0
        await super().run_server(args)
        running = AttributionMiddleware.interceptor
        if not isinstance(running, Interceptor):
            raise LearnerError(
                "verl's vLLM runs without the interceptor: vLLM did not load its plugin agl_grpc "
                "(is agl-grpc installed in this environment?)"
            )
        await running.serves_at(f"http://{self._server_address}:{self._server_port}")


class InterceptedReplica(vLLMReplica):  # type: ignore[misc]  # verl is untyped
    """verl's replica of such servers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(InterceptedServer)


class VerlEngines(LLMServerManager):  # type: ignore[misc]  # verl is untyped
    """verl's manager of its engines; agents find them through the store, so there is nothing to balance."""

    rollout_replica_class = InterceptedReplica

    async def _init_global_load_balancer(self) -> None:
        self.global_load_balancer = None


def start_engines(config: DictConfig, actors: Any) -> LLMServerManager:
    """Has verl start its engines beside the actor's ranks; returns when they serve.

    Args:
        config: verl's configuration.
        actors: verl's actor worker group, on whose accelerators they run.
    """
    return VerlEngines.create(config=config, worker_group=actors)
