"""The snapshot of the machine that goes with each heartbeat."""

from __future__ import annotations

import os

import psutil

from agl_grpc.runner.gpu import Gpu, GpuReader

Snapshot = dict[str, int | float | str]


class MachineSnapshot:
    """Reads load and memory of machine, process and GPUs; CPU figures span the time since the last read."""

    def __init__(self) -> None:
        self._process = psutil.Process(os.getpid())
        psutil.cpu_percent(None)
        self._process.cpu_percent(None)
        self._gpus = GpuReader()

    def read(self) -> Snapshot:
        """The figures of now: percentages of 0 to 100 (per core for the process), sizes in bytes."""
        memory = psutil.virtual_memory()
        with self._process.oneshot():
            snapshot: Snapshot = {
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
        return snapshot | _gpu_figures(self._gpus.read())


def _gpu_figures(gpus: list[Gpu]) -> Snapshot:
    figures: Snapshot = {"gpu_count": len(gpus)} if gpus else {}
    for index, gpu in enumerate(gpus):
        figures[f"gpu_{index}_name"] = gpu.name
        figures[f"gpu_{index}_memory_used_bytes"] = gpu.memory_used_bytes
        figures[f"gpu_{index}_memory_total_bytes"] = gpu.memory_total_bytes
        if gpu.busy_percent >= 0:
            figures[f"gpu_{index}_percent"] = gpu.busy_percent
    return figures
