"""vLLM's general plugin, loaded in every process that vLLM starts: says why when capture cannot start."""

from __future__ import annotations

import importlib.util
import logging
import os

from agl_grpc.interceptor.settings import Settings

logger = logging.getLogger("agl_grpc.interceptor")

PLUGIN = "agl_grpc"
"""Our name in both of vLLM's plugin groups."""


def register() -> None:
    """Entry point; safe to call more than once. Capture itself is started by the endpoint plugin."""
    if Settings.from_environment() is None:
        return
    if importlib.util.find_spec("vllm.plugins.endpoint_plugins") is None:
        logger.error("this vLLM has no endpoint plugins: model calls are not captured; use vLLM 0.32")
    elif PLUGIN not in os.environ.get("VLLM_PLUGINS", "").split(","):
        logger.error("VLLM_PLUGINS does not name %s: model calls are not captured", PLUGIN)
