"""A training run from one file: agent, datasets, and the arguments of `Trainer`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agl_grpc.algorithm.errors import AlgorithmError
from agl_grpc.learner.errors import LearnerError
from agl_grpc.manifest.describe import without_secrets
from agl_grpc.runner.load import LoadError, load_object
from agl_grpc.trainer.configuration import Configuration, read_configuration
from agl_grpc.trainer.errors import TrainerError
from agl_grpc.trainer.files import read_dataset, read_mapping
from agl_grpc.trainer.overrides import put, read_overrides
from agl_grpc.trainer.result import FitResult


def load_configuration(path: Path | None, arguments: Sequence[str] = ()) -> Configuration:
    """The configuration of a file, changed by ``--key value`` arguments.

    Its keys are ``agent`` (``module:name``), ``train_dataset`` and ``val_dataset`` (a JSONL file, or
    ``module:name`` of a sequence or of a function that answers one), those of `Trainer`, and ``learner`` (see
    `LearnerKeys`). Modules of the working directory are found.

    Raises:
        TrainerError: a key is unknown or missing, or a value is wrong; says which.
    """
    data = read_mapping(path) if path is not None else {}
    for key, value in read_overrides(arguments).items():
        put(data, key, value)
    return check_configuration(data, str(path) if path is not None else "")


def check_configuration(data: dict[str, Any], source: str = "") -> Configuration:
    """As `load_configuration`, from values; ``source`` is named in errors."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return read_configuration(data)
    except (TrainerError, LearnerError, AlgorithmError) as error:
        raise TrainerError(f"{source}: {error}" if source else str(error)) from error


def fit_configuration(
    configuration: Configuration, *, training_run: tuple[str, str] | None = None
) -> FitResult:
    """Trains as a configuration says.

    ``training_run`` names the training run of the store that this is, and who takes it up.

    Raises:
        TrainerError: something does not start, ends too early, or an algorithm cannot go on.
    """
    try:
        agent = load_object(configuration.agent, os.getcwd())
    except LoadError as error:
        raise TrainerError(str(error)) from error
    train = read_dataset("train_dataset", configuration.train_dataset)
    val = read_dataset("val_dataset", configuration.val_dataset)
    trainer = configuration.make_trainer()
    trainer.training_run = training_run
    trainer.configuration = {"file": without_secrets(configuration.resolved)}
    try:
        return trainer.fit(agent, train, val_dataset=val)
    except (AlgorithmError, LearnerError) as error:
        raise TrainerError(str(error)) from error


def fit_from_file(path: Path, arguments: Sequence[str] = ()) -> FitResult:
    """Trains as a file and ``--key value`` arguments say."""
    return fit_configuration(load_configuration(path, arguments))
