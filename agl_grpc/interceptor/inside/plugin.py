"""vLLM's endpoint plugin (0.26 and later): puts the interceptor into the API server process.

vLLM loads it when VLLM_PLUGINS names ``agl_grpc``; without settings in the environment it does nothing.
"""

from __future__ import annotations

from typing import Any

from agl_grpc.interceptor.inside import class_loader
from agl_grpc.interceptor.inside.runtime import Interceptor
from agl_grpc.interceptor.inside.swap import Adapter
from agl_grpc.interceptor.settings import Settings


class InterceptorPlugin:
    """Satisfies vLLM's EndpointPlugin protocol."""

    name = "agl_grpc"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Nothing: the middleware answers what is ours."""

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Start capture on this engine client."""
        settings = Settings.from_environment()
        if settings is None or engine_client is None or class_loader.installed():
            return
        keys = getattr(args, "api_key", None)
        running = Interceptor.start(
            engine_client,
            settings,
            # Port 0: whoever starts this server tells the address when it is known.
            endpoint=f"http://{args.host or '127.0.0.1'}:{args.port}" if args.port else "",
            api_key=keys[0] if keys else None,
            adapters=_adapters(state, settings),
        )
        # vLLM serves nobody before this returns.
        await running.caught_up()


def _adapters(state: Any, settings: Settings) -> list[Adapter]:
    """The adapters that take new weights, as vLLM has loaded them at its start."""
    loaded = state.openai_serving_models.lora_requests if settings.adapters else {}
    return [
        Adapter(name, loaded[name].lora_int_id, loaded[name].lora_path)
        for name in settings.adapters.split(",")
        if name
    ]
