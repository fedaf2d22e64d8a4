"""Samples as one tensor a column: `.safetensors` (needs `safetensors`) or `.pt` (needs `torch`).

Row i has the tokens from `row_offsets[i]` to `row_offsets[i + 1]`, the first `prompt_lengths[i]` of them are
the prompt; turn j of row i is at `turn_offsets[i] + j`. Texts (ids, names, why rows began) are JSON in the
file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agl_grpc.model import raw
from agl_grpc.sample.types import Sample, SampleError
from agl_grpc.sample.wire import pack, read_columns, unpack

FORM = "agl-grpc samples 1"
# torch has few unsigned types: counts and places are signed in the file.
_COLUMNS = {
    "row_offsets": ("<u4", "<i8"),
    "prompt_lengths": ("<u4", "<i8"),
    "input_ids": ("<i4", "<i4"),
    "loss_mask": ("<i1", "<i1"),
    "logprobs": ("<f4", "<f4"),
    "policy_versions": ("<i4", "<i4"),
    "rewards": ("<f8", "<f8"),
    "temperatures": ("<f8", "<f8"),
    "turn_offsets": ("<u4", "<i8"),
    "turn_span_ids": ("<u1", "<u1"),
    "turn_choices": ("<u4", "<i4"),
    "turn_starts": ("<u4", "<i4"),
    "turn_ends": ("<u4", "<i4"),
    "turn_rewards": ("<f8", "<f8"),
    "turn_returns": ("<f8", "<f8"),
    "reward_values": ("<f8", "<f8"),
}
_TEXTS = ("rollout_ids", "group_ids", "attempt_ids", "row_starts", "reward_names")

Arrays = dict[str, npt.NDArray[Any]]


def write_tensors(path: Path, samples: Iterable[Sample], form: str) -> int:
    """Writes samples as tensors; returns how many rows."""
    rows = list(samples)
    message = pack(rows)
    arrays = {
        name: np.frombuffer(getattr(message, name), packed).astype(kind)
        for name, (packed, kind) in _COLUMNS.items()
    }
    texts = {name: json.dumps(list(getattr(message, name))) for name in _TEXTS}
    if form == "pt":
        import torch

        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        torch.save({"form": FORM, **tensors, **texts}, path)
    else:
        from safetensors.numpy import save_file

        save_file(arrays, path, metadata={"form": FORM, **texts})
    return len(rows)


def read_tensors(path: Path) -> Iterator[Sample]:
    """The samples of a file that `write_tensors` made. Raises SampleError for another file."""
    arrays, texts = _read_torch(path) if path.suffix == ".pt" else _read_safetensors(path)
    if texts.get("form") != FORM or not _COLUMNS.keys() <= arrays.keys():
        raise SampleError(
            f"{path} holds no samples: write it with `agl-grpc batch replay` or `sample export`"
        )
    message = raw.RawSampleColumns(
        **{name: arrays[name].astype(packed).tobytes() for name, (packed, _) in _COLUMNS.items()},
        **{name: json.loads(texts[name]) for name in _TEXTS},
    )
    return unpack(read_columns(message))


def _read_safetensors(path: Path) -> tuple[Arrays, Mapping[str, str]]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  # no mapping


def _read_torch(path: Path) -> tuple[Arrays, Mapping[str, str]]:
    import torch

    found = torch.load(path, weights_only=True)
    texts = {name: value for name, value in found.items() if isinstance(value, str)}
    return {name: value.numpy() for name, value in found.items() if name not in texts}, texts
