"""Finds and ends every process of a training run, whoever its parent is by now.

Each process that the trainer starts carries a mark in its environment, and so do all its descendants: Ray's
workers too, which outlive the process that started them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import psutil

MARK = "AGL_GRPC_TRAINING_MARK"
_TERMINATE_SECONDS = 3.0
_PASSES = 5


def marked(mark: str) -> Iterator[psutil.Process]:
    """Running processes that carry the mark; never this one."""
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(MARK) == mark:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue  # It has ended, or belongs to another user and so not to us.


def sweep(mark: str, grace: float = _TERMINATE_SECONDS) -> int:
    """Ends the marked processes: SIGTERM, `grace` seconds, SIGKILL. Answers how many there were."""
    found: set[int] = set()
    for _ in range(_PASSES):
        processes = list(marked(mark))
        if not processes:
            break
        found |= {process.pid for process in processes}
        for process in processes:
            _signal(process, kill=False)
        _, alive = psutil.wait_procs(processes, timeout=grace)
        for process in alive:
            _signal(process, kill=True)
        psutil.wait_procs(alive, timeout=grace)
    return len(found)


def _signal(process: psutil.Process, *, kill: bool) -> None:
    try:
        if kill:
            process.kill()
        else:
            process.terminate()
    except psutil.NoSuchProcess:
        return
