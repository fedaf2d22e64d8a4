"""CPU platform for verl, loaded by verl itself through the entry point group ``verl.plugins``.

verl ships platforms for NVIDIA, AMD and Ascend only. verl asks the registered platforms in order of
registration whether they are available, so this one, registered last, is chosen only where there is no
accelerator: on a GPU machine the module changes nothing.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry, get_platform

_NO_OPERATIONS = ("empty_cache", "reset_peak_memory_stats", "ipc_collect", "manual_seed", "manual_seed_all")
_ZEROES = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


def _zero(*_args: Any, **_kwargs: Any) -> int:
    return 0


def _memory_info(*_args: Any, **_kwargs: Any) -> tuple[int, int]:
    """Free and total memory of the machine in bytes, as ``torch.cuda.mem_get_info`` answers for a GPU."""
    import psutil

    memory = psutil.virtual_memory()
    return int(memory.available), int(memory.total)


def _device_module() -> types.ModuleType:
    """``torch.cpu`` with the memory and random-state calls that verl expects of a device module."""
    module = types.ModuleType("agl_cpu_device")
    for name in dir(torch.cpu):
        if not name.startswith("__"):
            setattr(module, name, getattr(torch.cpu, name))
    for name in _ZEROES:
        setattr(module, name, _zero)
    for name in _NO_OPERATIONS:
        setattr(module, name, _nothing)
    calls = {
        "mem_get_info": _memory_info,
        "get_device_name": lambda *_args: "cpu",
        "get_rng_state": lambda *_args: torch.get_rng_state(),
        "set_rng_state": lambda state, *_args: torch.set_rng_state(state),
    }
    for name, call in calls.items():
        setattr(module, name, call)
    return module


_DEVICE_MODULE = _device_module()


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):  # type: ignore[misc]  # verl is untyped
    """verl's platform interface on a machine without an accelerator (torch CPU build, gloo)."""

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> types.ModuleType:
        return _DEVICE_MODULE

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return not torch.accelerator.is_available()

    def current_device(self) -> str:
        # verl passes this on to torch, where an index would mean a GPU.
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        return None

    def synchronize(self, device_index: int | None = None) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        return None

    def profiler_stop(self) -> None:
        return None

    def ray_resource_name(self) -> str:
        # verl's resource pools count GPUs and NPUs only; the learner starts Ray with that many nominal GPUs.
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        return {"num_gpus": num_gpus}

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def _init_process_group(timeout_second: int | None = None, backend: str | None = None) -> None:
    """Replaces verl's function of the same task, which on CPU asks for ``cpu:gloo,cpu:gloo`` (refused by
    torch).
    """
    if torch.distributed.is_initialized():
        return
    torch.distributed.init_process_group(
        "gloo",
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        timeout=None if timeout_second is None else timedelta(seconds=timeout_second),
        init_method=os.environ.get("DIST_INIT_METHOD"),
    )


def _load_value_model(local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool) -> Any:
    """Replaces verl's critic loader, which hard-codes flash attention (GPU only)."""
    from transformers import AutoModelForTokenClassification

    return AutoModelForTokenClassification.from_pretrained(
        local_path,
        torch_dtype=torch_dtype,
        config=model_config,
        attn_implementation="sdpa",
        trust_remote_code=trust_remote_code,
    )


def _save_shards(save: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wraps verl's copy of the weights to the CPU, which on CPU is no copy: training would change it too."""

    def saved(model: Any) -> Any:
        shards, layout = save(model)
        return {name: (tensor.clone(), spec) for name, (tensor, spec) in shards.items()}, layout

    return saved


def _unpinned(policy: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps FSDP2's offload policy, by which verl keeps the reference model: pinned memory needs a GPU."""

    def made(pin_memory: bool = True) -> Any:
        return policy(pin_memory=False)

    return made


def _adapt() -> None:
    """Make verl's engines run on the CPU platform. Called only when that platform was chosen."""
    import verl.utils.distributed
    import verl.utils.fsdp_utils
    import verl.utils.model

    verl.utils.fsdp_utils.fsdp2_sharded_save_to_cpu = _save_shards(
        verl.utils.fsdp_utils.fsdp2_sharded_save_to_cpu
    )
    verl.utils.fsdp_utils.CPUOffloadPolicy = _unpinned(verl.utils.fsdp_utils.CPUOffloadPolicy)
    verl.utils.distributed.initialize_global_process_group_ray = _init_process_group
    verl.utils.model.load_valuehead_model = _load_value_model
    # The FSDP engines are registered for "cuda" and "npu"; this variable is verl's own override of that
    # lookup.
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")


if get_platform().device_name == "cpu":
    _adapt()
