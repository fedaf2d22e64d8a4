"""Model folders in Hugging Face form: their configuration, and the dtype of the weights in them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import orjson

from agl_grpc.learner.errors import ConfigError

# Folder of an adapter in a checkpoint and in an export.
ADAPTER = "lora_adapter"
_PREFIX = "base_model.model."
_BASE_LAYER = ".base_layer."
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


def fold_adapter(model: Path, adapter: Path) -> None:
    """Makes a model that was trained with LoRA one that ``transformers`` loads, with its adapter beside it.

    verl saves such a model under peft's names, base and adapter apart: every tensor of the base would be
    missed. Here the adapter is added to the base, and written to ``adapter`` in peft's form. Other models
    are left as they are.
    """
    described_by = adapter.parent / "lora_train_meta.json"
    if not described_by.is_file():
        return
    from safetensors.torch import load_file, save_file

    from agl_grpc.weights.adapters import adapter_set, merged

    shards = {path: load_file(path) for path in sorted(model.glob("*.safetensors"))}
    names = [name for tensors in shards.values() for name in tensors]
    if not any(name.startswith(_PREFIX) for name in names):
        return
    meta = orjson.loads(described_by.read_bytes())
    lora = {
        name.replace(".default.", "."): tensor
        for tensors in shards.values()
        for name, tensor in tensors.items()
        if ".lora_A." in name or ".lora_B." in name
    }
    base = {
        name.removeprefix(_PREFIX).replace(_BASE_LAYER, "."): (path, tensor)
        for path, tensors in shards.items()
        for name, tensor in tensors.items()
        if ".lora_A." not in name and ".lora_B." not in name
    }
    places = {name: path for name, (path, _) in base.items()}
    whole = dict(
        merged(((name, tensor) for name, (_, tensor) in base.items()), adapter_set(lora.items(), meta))
    )
    for path in shards:
        mine = {name: tensor.contiguous() for name, tensor in whole.items() if places[name] == path}
        save_file(mine, path, metadata={"format": "pt"})
    index = model / "model.safetensors.index.json"
    if index.is_file():
        written = orjson.loads(index.read_bytes())
        written["weight_map"] = {name: path.name for name, path in places.items()}
        index.write_bytes(orjson.dumps(written, option=orjson.OPT_INDENT_2))
    adapter.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in lora.items()}, adapter / "adapter_model.safetensors"
    )
    targets = sorted({name.rsplit(".lora_", 1)[0].rpartition(".")[2] for name in lora})
    described = {"peft_type": "LORA", **meta, "target_modules": targets, "inference_mode": True}
    (adapter / "adapter_config.json").write_bytes(orjson.dumps(described, option=orjson.OPT_INDENT_2))
