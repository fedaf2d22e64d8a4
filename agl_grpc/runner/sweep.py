"""Ends programs that a dead worker has left running."""

from __future__ import annotations

import contextlib
import logging
import os
import signal

import psutil

log = logging.getLogger(__name__)

WORKER_PID = "AGL_GRPC_WORKER_PID"
"""Names the process of the worker in the environment of each program that it starts."""


def end_programs(worker_pid: int) -> int:
    """Kills the process groups of all programs that the worker had started; answers how many there were.

    Programs lead groups of their own. What they start inherits the mark, but a group that is led by anybody
    else is not ours to kill.
    """
    ended = 0
    for process in psutil.process_iter():
        # It has ended, or belongs to another user and so not to us.
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(WORKER_PID) != str(worker_pid):
                continue
            if os.getpgid(process.pid) == process.pid:
                os.killpg(process.pid, signal.SIGKILL)
                ended += 1
    if ended:
        log.warning("%d programs that the worker with pid %d had started were killed", ended, worker_pid)
    return ended
