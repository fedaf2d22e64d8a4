"""Configurations and datasets in files."""

from __future__ import annotations

import itertools
import os
import tomllib
from pathlib import Path
from typing import Any

import orjson
import yaml

from agl_grpc.dataset import DatasetError, open_dataset, tasks_in_order
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


def read_dataset(name: str, spec: Any) -> Any:
    """A dataset as `agl_grpc.dataset.open_dataset` reads it; None = none."""
    if spec is None:
        return None
    try:
        return open_dataset(spec, load=_load, name=name)
    except DatasetError as error:
        raise TrainerError(str(error)) from error


def tasks_of(name: str, given: Any) -> Any:
    """A dataset that is given to train on or to validate with; None = none.

    Raises:
        TrainerError: it is none, it is empty, or it does not say how long it is.
    """
    tasks = read_dataset(name, given)
    if tasks is None:
        return None
    try:
        number = len(tasks)
    except Exception as error:  # the dataset is the user's code
        raise TrainerError(f"{name} does not say its length: {type(error).__name__}: {error}") from error
    if number == 0:
        raise TrainerError(f"{name} is empty: give tasks, or leave it out")
    return tasks


def first_tasks(name: str, given: Any, limit: int) -> list[Any] | None:
    """At most ``limit`` tasks, as `tasks_of` reads them; a task that raises is a TrainerError too."""
    tasks = tasks_of(name, given)
    try:
        return None if tasks is None else list(itertools.islice(tasks_in_order(tasks, name), limit))
    except DatasetError as error:
        raise TrainerError(str(error)) from error


def _load(path: str) -> Any:
    try:
        return load_object(path, os.getcwd())
    except LoadError as error:
        raise TrainerError(str(error)) from error
