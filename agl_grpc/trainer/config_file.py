"""A training run from one file: agent, datasets, and the arguments of `Trainer`."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from agl_grpc.learner.errors import LearnerError
from agl_grpc.runner.load import LoadError, load_object
from agl_grpc.trainer.errors import TrainerError
from agl_grpc.trainer.result import FitResult
from agl_grpc.trainer.trainer import Trainer

_OWN_KEYS = ("agent", "train_dataset", "val_dataset")


def fit_from_file(path: Path, *, run_name: str | None = None, resume: bool = False) -> FitResult:
    """Trains as the file says; ``run_name`` and ``resume`` go before the file's own.

    Its keys are ``agent`` (``module:name``), ``train_dataset`` and ``val_dataset`` (a JSONL file, or
    ``module:name`` of a sequence or of a function that answers one), and those of `Trainer`. Modules of the
    working directory are found.

    Raises:
        TrainerError: a key is unknown, missing, or names nothing.
    """
    data = read_mapping(path)
    given = {name: data.pop(name, None) for name in _OWN_KEYS}
    if not isinstance(given["agent"], str):
        raise TrainerError(f'{path} names no agent: agent = "module:name"')
    if run_name is not None:
        data["run_name"] = run_name
    if resume:
        data["resume"] = True
    agent = _load(given["agent"])
    datasets = {name: _dataset(name, given[name]) for name in ("train_dataset", "val_dataset")}
    try:
        trainer = Trainer(**data)
    except TypeError as error:
        raise TrainerError(
            f"{path}: {str(error).replace('Trainer.__init__() got an', 'there is an')}"
        ) from error
    except LearnerError as error:
        raise TrainerError(f"{path}: {error}") from error
    return trainer.fit(agent, datasets["train_dataset"], val_dataset=datasets["val_dataset"])


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
            import yaml
        except ImportError as error:
            raise TrainerError("YAML needs PyYAML (pip install pyyaml); or write TOML or JSON") from error
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(" ".join(str(error).split())) from error
    return orjson.loads(text)


def _dataset(name: str, spec: Any) -> Sequence[Any] | None:
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
