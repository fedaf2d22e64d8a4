"""The folder of a training run: database, checkpoints, metrics, logs, and a manifest of what made it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from agl_grpc.dataset import DatasetError, dataset_digest
from agl_grpc.manifest.describe import describe_run, now
from agl_grpc.model.training import StepMetrics
from agl_grpc.trainer.errors import TrainerError


@dataclass(frozen=True)
class RunFolder:
    """Where everything of one training run lies."""

    path: Path

    @property
    def name(self) -> str:
        """The run's name, also its id in the store."""
        return self.path.name

    @property
    def database(self) -> Path:
        """The store's SQLite file."""
        return self.path / "agl.db"

    @property
    def checkpoints(self) -> Path:
        """The learner's checkpoints."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Metrics as TensorBoard files."""
        return self.path / "tensorboard"

    @property
    def manifest(self) -> Path:
        """What made the run."""
        return self.path / "manifest.json"

    def spool(self, engine: str) -> Path:
        """Where an engine keeps model calls while the store is away."""
        return self.path / ("spool" if engine == "engine" else f"spool-{engine}")

    def log(self, part: str) -> Path:
        """The log of a part."""
        return self.path / "logs" / f"{part}.log"

    def open(self, *, resume: bool) -> dict[str, Any]:
        """Makes the folder, or reads the manifest of the one that is continued.

        Raises:
            TrainerError: the folder exists and is not to be continued, or the other way round.
        """
        if resume:
            if not self.manifest.is_file():
                raise TrainerError(f"nothing to resume: {self.manifest} does not exist")
            manifest: dict[str, Any] = orjson.loads(self.manifest.read_bytes())
            return manifest
        if self.database.exists() or self.manifest.exists():
            raise TrainerError(
                f"{self.path} holds a run already: continue it with resume, or choose another name"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainerError(f"the run's folder cannot be made: {error}") from error
        return {}

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Writes the manifest, at once or not at all."""
        draft = self.manifest.with_suffix(".new")
        options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
        draft.write_bytes(orjson.dumps(manifest, option=options))
        draft.replace(self.manifest)


def dataset_digests(train: Any, val: Any) -> dict[str, Any]:
    """Number of tasks and digest of both datasets; TrainerError when a task raises or is no JSON value."""
    try:
        return {
            "train": dataset_digest(train, "train_dataset"),
            "val": dataset_digest(val, "val_dataset"),
        }
    except DatasetError as error:
        raise TrainerError(str(error)) from error


def describe_session(engine_python: str | None, learner_python: str | None) -> dict[str, Any]:
    """A session of a run for its manifest; TrainerError when an environment's Python does not run."""
    try:
        return describe_run(engine_python, learner_python)
    except RuntimeError as error:
        raise TrainerError(str(error)) from error


def summary(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the store's training run holds of a manifest: all but the configuration, which it has itself."""
    session = manifest["sessions"][-1]
    kept = ("seed", "contract", "versions", "git", "hardware", "started")
    found = {name: session[name] for name in kept if session.get(name) is not None}
    return {**found, "datasets": {name: each for name, each in manifest["datasets"].items() if each}}


def end_session(folder: RunFolder, step: StepMetrics | None = None) -> None:
    """Notes in the manifest, if there is one, when its last session ended, and the last step's metrics."""
    if not folder.manifest.is_file():
        return
    manifest = orjson.loads(folder.manifest.read_bytes())
    if sessions := manifest.get("sessions"):
        sessions[-1]["ended"] = now()
    if step is not None:
        manifest["last_step"] = {"step": step.step, "metrics": step.metrics}
    folder.write_manifest(manifest)
