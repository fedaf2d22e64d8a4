"""The last weights of an engine on its local disk, by which it goes on after a restart.

One file a set of weights, named after its digest: a line of JSON that says what follows, then each tensor's
bytes in the order in which they were sent. A file is whole or not there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agl_grpc.weights.digest import combined_digest, dtype_name, tensor_digest
from agl_grpc.weights.wire import TransferError

if TYPE_CHECKING:
    import torch

_SUFFIX = ".weights"
_LONGEST_HEADER = 64 * 1024 * 1024


def kept_path(folder: Path, digest: str) -> Path:
    """Where the weights of this digest are kept, if they are."""
    return folder / f"{digest.rpartition(':')[2]}{_SUFFIX}"


def keep(folder: Path, digest: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write a set of weights. Raises OSError; nothing is left behind then."""
    folder.mkdir(parents=True, exist_ok=True)
    named = list(tensors)
    entries = [[name, dtype_name(tensor.dtype), list(tensor.shape)] for name, tensor in named]
    path = kept_path(folder, digest)
    unfinished = path.with_suffix(".part")
    try:
        with unfinished.open("wb") as file:
            file.write(json.dumps({"digest": digest, "tensors": entries}).encode() + b"\n")
            for _, tensor in named:
                file.write(_bytes(tensor))
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def take_back(folder: Path, digest: str) -> list[tuple[str, torch.Tensor]]:
    """Read a set of weights. Raises TransferError when it is not there or is not what was written."""
    import torch

    path = kept_path(folder, digest)
    try:
        with path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.readline(_LONGEST_HEADER))
            tensors: list[tuple[str, torch.Tensor]] = []
            digests: list[str] = []
            for name, dtype, shape in header["tensors"]:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype))
                data = _bytes(tensor)
                if file.readinto(data) != len(data):
                    raise TransferError(f"kept weights {path} end in the middle of {name}")
                tensors.append((name, tensor))
                digests.append(tensor_digest(name, dtype, shape, data))
    except (OSError, ValueError) as error:
        raise TransferError(f"kept weights {path} cannot be read: {error}") from error
    if combined_digest(digests) != digest:
        raise TransferError(f"kept weights {path} are damaged: their digest is another one")
    return tensors


def forget_others(folder: Path, digest: str) -> None:
    """Remove every set of weights but one (empty digest: all)."""
    wanted = kept_path(folder, digest) if digest else None
    for path in folder.glob(f"*{_SUFFIX}"):
        if path != wanted:
            path.unlink(missing_ok=True)


def forget(folder: Path, digest: str) -> None:
    """Remove one set of weights, if it is there."""
    kept_path(folder, digest).unlink(missing_ok=True)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's own memory."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
