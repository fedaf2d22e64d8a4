"""Configurations and datasets in files."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import yaml

from agl_grpc.runner.load import LoadError, load_object
from agl_grpc.trainer.errors import TrainerError


def read_mapping(path: Path) -> dict[str, Any]:
    """The content of a JSON, TOML or YAML file."""
    try:
        text = path.read_text()
    except OSError as error:
        raise TrainerError(f"{path} cannot be read: {error.strerror}") from error
    try:
        data = _parse(path, text)
    except ValueError as error:
        raise TrainerError(f"{path} is not valid: {error}") from error
    if not isinstance(data, dict):
        raise TrainerError(f"{path} must hold a mapping")
    return data


def _parse(path: Path, text: str) -> Any:
    if path.suffix == ".toml":
        return tomllib.loads(text)
    if path.suffix in (".yaml", ".yml"):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(" ".join(str(error).split())) from error
    return orjson.loads(text)


def read_dataset(name: str, spec: Any) -> Sequence[Any] | None:
    """A dataset: a JSONL file, ``module:name`` of a sequence or of a function that answers one, or a list."""
    if spec is None:
        return None
    if isinstance(spec, str) and spec.endswith(".jsonl"):
        return _read_jsonl(Path(spec))
    found = _load(spec) if isinstance(spec, str) else spec
    found = found() if callable(found) else found
    if isinstance(found, Sequence) and not isinstance(found, str | bytes | Mapping):
        return found
    raise TrainerError(
        f"{name} {spec!r} is a {type(found).__name__}: give a sequence, a function or a .jsonl file"
    )


def _read_jsonl(path: Path) -> list[Any]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise TrainerError(f"{path} cannot be read: {error.strerror}") from error
    tasks = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            tasks.append(orjson.loads(line))
        except orjson.JSONDecodeError as error:
            raise TrainerError(f"{path}, line {number}: not JSON ({error})") from error
    return tasks


def _load(path: str) -> Any:
    try:
        return load_object(path, os.getcwd())
    except LoadError as error:
        raise TrainerError(str(error)) from error
