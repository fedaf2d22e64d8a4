"""Model folders in Hugging Face form: their configuration, and the dtype of the weights in them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import orjson

from agl_grpc.learner.errors import ConfigError

# Names of dtypes in safetensors, and torch's.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def model_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``."""
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{folder} holds no config.json: it is no model in Hugging Face form")
    config: dict[str, Any] = orjson.loads(file.read_bytes())
    return config


def stored_dtype(model: Path) -> str:
    """The dtype of most tensors of a model folder's safetensors, by torch's name; empty = none are there."""
    counts: dict[str, int] = {}
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                counts[entry["dtype"]] = counts.get(entry["dtype"], 0) + 1
    return DTYPES.get(max(counts, key=lambda key: counts[key]), "") if counts else ""


def state_dtype(model: Path) -> None:
    """Makes ``config.json`` state the dtype of the weights beside it.

    verl writes bfloat16 whatever they are, and an engine would round them when it loads them.
    """
    dtype = stored_dtype(model)
    file = model / "config.json"
    if not dtype or not file.is_file():
        return
    config = orjson.loads(file.read_bytes())
    if config.get("dtype") != dtype:
        config.pop("torch_dtype", None)
        file.write_bytes(orjson.dumps({**config, "dtype": dtype}, option=orjson.OPT_INDENT_2))
