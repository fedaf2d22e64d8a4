"""Processor time of other processes, to the nanosecond; `/proc` and psutil count it in ticks of 10 ms."""

from __future__ import annotations

import time

import psutil

_PROCESS, _ALL_THREADS = 3, 2


def seconds(*pids: int) -> float:
    """Processor time that these processes have used, by the kernel's clocks of them. Linux only."""
    return sum(time.clock_gettime((~pid << _PROCESS) | _ALL_THREADS) for pid in pids)


def seconds_of_all(process: psutil.Process) -> float:
    """That of a process and of all that it has started and that live."""
    return seconds(process.pid, *(child.pid for child in process.children(recursive=True)))
