"""What NVIDIA GPUs say of themselves, from the driver's own library: no package is needed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_LIBRARY = "libnvidia-ml.so.1"
_NAME_BYTES = 96


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU: how busy it is (0 to 100) and its memory in bytes. Busy is -1 where it is not told (MIG)."""

    name: str
    busy_percent: int
    memory_used_bytes: int
    memory_total_bytes: int


class GpuReader:
    """Reads the GPUs of this machine; none where there is no driver."""

    def __init__(self) -> None:
        self._library: ctypes.CDLL | None = None
        try:
            library = ctypes.CDLL(_LIBRARY)
        except OSError:
            return
        if library.nvmlInit_v2() == 0:
            self._library = library

    def read(self) -> list[Gpu]:
        """The GPUs in the driver's order; those that do not answer are left out."""
        if self._library is None:
            return []
        count = ctypes.c_uint()
        if self._library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return []
        found = (_read(self._library, index) for index in range(count.value))
        return [gpu for gpu in found if gpu is not None]


def _read(library: ctypes.CDLL, index: int) -> Gpu | None:
    device = ctypes.c_void_p()
    memory = _Memory()
    if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) or library.nvmlDeviceGetMemoryInfo(
        device, ctypes.byref(memory)
    ):
        return None
    name = ctypes.create_string_buffer(_NAME_BYTES)
    library.nvmlDeviceGetName(device, name, _NAME_BYTES)
    busy = _Utilization()
    told = library.nvmlDeviceGetUtilizationRates(device, ctypes.byref(busy)) == 0
    return Gpu(name.value.decode(errors="replace"), busy.gpu if told else -1, memory.used, memory.total)
