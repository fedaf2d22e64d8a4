"""Checkpoints in the form that ``transformers`` and every engine load."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from agl_grpc.learner.checkpoints.best import read_best
from agl_grpc.learner.checkpoints.checkpoint import (
    CHECKPOINT_PREFIX,
    LearnerState,
    adapter_folder,
    hugging_face_folder,
)
from agl_grpc.learner.checkpoints.integrity import verify
from agl_grpc.learner.checkpoints.model_folder import ADAPTER, DTYPES, state_dtype, stored_dtype
from agl_grpc.learner.errors import ConfigError, LearnerError


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints at ``folder``, oldest first: itself, or those of a run's folder.

    Raises:
        ConfigError: there is none.
    """
    if (folder / "actor").is_dir():
        return [folder]
    for place in (folder, folder / "checkpoints"):
        found = [path for path in place.glob(f"{CHECKPOINT_PREFIX}*") if (path / "actor").is_dir()]
        if found:
            return sorted(found, key=lambda path: int(path.name.removeprefix(CHECKPOINT_PREFIX)))
    if several := sorted(path.parent for path in folder.glob("models/*/checkpoints")):
        raise ConfigError(f"{folder} is a run of several models: name one, {' or '.join(map(str, several))}")
    raise ConfigError(f"{folder} holds no checkpoint of the learner ({CHECKPOINT_PREFIX}N)")


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint at ``folder``, or the newest of a run's folder."""
    return find_checkpoints(folder)[-1]


def describe(checkpoint: Path) -> dict[str, Any]:
    """Name, step, batches and bytes of a checkpoint, and its validation score where it is the run's best."""
    state = LearnerState.read(checkpoint)
    best = read_best(checkpoint.parent)
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    return {
        "checkpoint": checkpoint.name,
        "step": state.step,
        "batches": state.batch_ids,
        "bytes": size,
        "best_score": best.score if best and best.checkpoint == checkpoint.name else None,
    }


def export(checkpoint: Path, target: Path, *, dtype: str = "") -> dict[str, Any]:
    """Writes a checkpoint's model to ``target``; what was written.

    A checkpoint that was saved without ``hf_model`` has its shards merged by verl (learner environment). Of a
    model trained with LoRA the adapter is written beside, as ``lora_adapter``.

    Args:
        checkpoint: one checkpoint's folder.
        target: a new or empty folder.
        dtype: ``float32``, ``bfloat16`` or ``float16`` (learner environment); empty = as it was trained.

    Raises:
        ConfigError: no checkpoint, a damaged one, or a target that is not empty.
        LearnerError: verl could not merge the shards.
    """
    state = LearnerState.read(checkpoint)
    verify(checkpoint)
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty: name a new folder")
    if dtype and dtype not in DTYPES.values():
        raise ConfigError(f"dtype {dtype!r} is none of {', '.join(DTYPES.values())}")
    unfinished = target.with_name(f".unfinished-{target.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        source = hugging_face_folder(checkpoint)
        if stored_dtype(source):
            shutil.copytree(source, unfinished)
        else:
            _merge(checkpoint / "actor", unfinished)
        adapter = adapter_folder(checkpoint)
        if adapter.is_dir():
            shutil.copytree(adapter, unfinished / ADAPTER)
        if dtype:
            _cast(unfinished, dtype)
        state_dtype(unfinished)
        if target.exists():
            target.rmdir()
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return {
        "checkpoint": checkpoint.name,
        "step": state.step,
        "target": str(target),
        "dtype": stored_dtype(target),
        "bytes": sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
        "adapter": (target / ADAPTER).is_dir(),
    }


def _merge(actor: Path, target: Path) -> None:
    """verl's merge of the ranks' shards."""
    command = [
        sys.executable,
        "-m",
        "agl_grpc.learner.checkpoints.merge_shards",
        "merge",
        "--backend",
        "fsdp",
    ]
    command += ["--local_dir", str(actor), "--target_dir", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LearnerError(
            f"verl could not merge the shards in {actor}: {last}; run this in the learner environment "
            "(`agl-grpc env create learner`)"
        )


def _cast(model: Path, dtype: str) -> None:
    """Rewrites a model's weights in another dtype."""
    import torch
    from safetensors.torch import load_file, save_file

    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        cast = {
            name: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
        save_file(cast, path, metadata={"format": "pt"})
