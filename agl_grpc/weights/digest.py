"""One digest over names, dtypes, shapes and bytes of all tensors in order, independent of how they travel."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from agl_grpc.weights.wire import TensorEntry


def tensor_digest(name: str, dtype: str, shape: Iterable[int], data: memoryview | bytes) -> str:
    """SHA-256 (hexadecimal) of one tensor: its name, dtype and shape, then its bytes in C order."""
    digest = hashlib.sha256(json.dumps([name, dtype, list(shape)]).encode())
    digest.update(data)
    return digest.hexdigest()


def combined_digest(tensor_digests: Iterable[str]) -> str:
    """``sha256:<hex>`` over the tensors' digests in order: the digest of the contract."""
    digest = hashlib.sha256()
    for each in tensor_digests:
        digest.update(bytes.fromhex(each))
    return f"sha256:{digest.hexdigest()}"


def segment_digests(memory: torch.Tensor, entries: Iterable[TensorEntry]) -> list[str]:
    """Digests of the tensors that lie in `memory`, a flat uint8 tensor in host memory."""
    view = memoryview(memory.numpy())
    return [tensor_digest(e.name, e.dtype, e.shape, view[e.offset : e.offset + e.nbytes]) for e in entries]


def digest_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The combined digest of named tensors, as sender and receiver compute it."""
    import torch

    digests = []
    for name, tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digests.append(tensor_digest(name, dtype_name(tensor.dtype), tensor.shape, memoryview(flat.numpy())))
    return combined_digest(digests)


def dtype_name(dtype: torch.dtype) -> str:
    """Torch's name of a dtype without its prefix: ``float32``, ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
