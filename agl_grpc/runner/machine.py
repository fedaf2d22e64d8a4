"""The snapshot of the machine that goes with each heartbeat."""

from __future__ import annotations

import os

import psutil

Snapshot = dict[str, int | float | str]


class MachineSnapshot:
    """Reads load and memory of machine and process; CPU figures span the time since the last read."""

    def __init__(self) -> None:
        self._process = psutil.Process(os.getpid())
        psutil.cpu_percent(None)
        self._process.cpu_percent(None)

    def read(self) -> Snapshot:
        """The figures of now: percentages of 0 to 100 (per core for the process), sizes in bytes."""
        memory = psutil.virtual_memory()
        with self._process.oneshot():
            return {
                "pid": self._process.pid,
                "cpu_percent": psutil.cpu_percent(None),
                "cpu_count": psutil.cpu_count() or 1,
                "load_1m": os.getloadavg()[0],
                "memory_percent": memory.percent,
                "memory_total_bytes": memory.total,
                "memory_available_bytes": memory.available,
                "disk_percent": psutil.disk_usage("/").percent,
                "process_cpu_percent": self._process.cpu_percent(None),
                "process_memory_bytes": self._process.memory_info().rss,
                "process_threads": self._process.num_threads(),
            }
