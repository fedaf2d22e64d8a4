"""The interceptor's way into a vLLM without endpoint plugins (before 0.26): its engine client's class.

Each `AsyncLLM` of the process gets an interceptor as soon as it is made on a running event loop, else with
its first request. The attribution middleware has to be given to vLLM as with the endpoint plugin.
"""

from __future__ import annotations

import asyncio
from typing import Any

from agl_grpc.interceptor.inside.runtime import Interceptor
from agl_grpc.interceptor.settings import Settings

_installed = False


def installed() -> bool:
    """Whether engine clients of this process are entered by their class."""
    return _installed


def install(settings: Settings) -> None:
    """Change `AsyncLLM`; a second call changes nothing."""
    global _installed
    if _installed:
        return
    from vllm.v1.engine.async_llm import AsyncLLM

    _installed = True
    made, funnel = AsyncLLM.__init__, AsyncLLM.generate

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return
        Interceptor.start(self, settings)

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The interceptor hides this method behind an attribute of the instance, and calls it from there.
        if "generate" in vars(self):
            return funnel(self, *args, **kwargs)
        Interceptor.start(self, settings)
        return self.generate(*args, **kwargs)

    AsyncLLM.__init__ = __init__
    AsyncLLM.generate = generate
