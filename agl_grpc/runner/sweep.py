"""Ends programs that a dead worker has left running."""

from __future__ import annotations

import contextlib
import logging
import os
import signal

import psutil

log = logging.getLogger(__name__)

WORKER = "AGL_GRPC_WORKER_ID"
"""Names the worker in the environment of each program that it starts."""


def end_programs(worker_id: str) -> int:
    """Kills the process groups of all programs that carry the worker's name; answers how many processes."""
    ended = 0
    for process in psutil.process_iter():
        # It has ended, or belongs to another user and so not to us.
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(WORKER) == worker_id:
                os.killpg(os.getpgid(process.pid), signal.SIGKILL)
                ended += 1
    if ended:
        log.warning("%d processes that worker %s had started were killed", ended, worker_id)
    return ended
