"""vLLM's general plugin, loaded in every process that vLLM starts: enters a vLLM without endpoint plugins."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import multiprocessing
import os
import signal
import sys

from agl_grpc.interceptor.settings import FAILURE_FILE, Settings

PLUGIN = "agl_grpc"
"""Our name in both of vLLM's plugin groups."""

_CORE_LOGGER = "vllm.v1.engine.core"


def register() -> None:
    """Entry point; safe to call more than once. Without settings in the environment it does nothing."""
    settings = Settings.from_environment()
    if settings is None:
        return
    parent = multiprocessing.parent_process()
    if parent is not None:
        # An engine core or a worker: it serves nobody, and is of no use without the one that started it.
        if FAILURE_FILE in os.environ:
            end_with(parent.pid)
            logging.getLogger(_CORE_LOGGER).addHandler(_CauseFile(logging.ERROR))
        from agl_grpc.interceptor.inside import core_logprobs, cpu_seeds

        cpu_seeds.install()
        core_logprobs.install()
        return
    if settings.loader == "class" or importlib.util.find_spec("vllm.plugins.endpoint_plugins") is None:
        from agl_grpc.interceptor.inside import class_loader

        class_loader.install(settings)


class _CauseFile(logging.Handler):
    """Writes down what ended an engine core; the server that waits for it learns only that it has ended."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return
        line = next(iter(str(error).strip().splitlines()), "")
        with open(os.environ[FAILURE_FILE], "w") as failure:
            failure.write(f"engine core: {type(error).__name__}: {line}\n")


def end_with(parent: int | None) -> None:
    """Have the kernel kill this process as soon as its parent is gone, however that ended. Linux only."""
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
