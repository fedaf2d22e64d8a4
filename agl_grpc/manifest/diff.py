"""What differs between two runs: of their manifests, and of the metrics that they ended with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from agl_grpc.diagnosis.sinks import METRICS_FILE
from agl_grpc.manifest.describe import without_secrets
from agl_grpc.model.training import StepMetrics, TrainingRun

SECTIONS = ("seed", "datasets", "config", "versions", "git", "hardware", "contract", "other")
# Of each session, and different in any two.
_PASSING = ("started", "ended", "command", "captured")


def manifest_key(training_run_id: str) -> str:
    """Where a run's metadata hold the manifest of a training run that a worker took up."""
    return f"manifest/{training_run_id}"


class ManifestError(Exception):
    """A run has no manifest that can be read; one line that says what to do."""


@dataclass(frozen=True)
class RunRecord:
    """A run to be compared: its name, its manifest, and the metrics of its last step."""

    name: str
    manifest: Mapping[str, Any]
    metrics: Mapping[str, float] = field(default_factory=dict)
    step: int = 0

    @staticmethod
    def read(folder: Path) -> RunRecord:
        """A run from its folder, or from that of a learner that was started alone; ManifestError when it is
        neither.
        """
        file = folder / "manifest.json"
        learners = sorted(folder.glob("learner-*.json"), key=_epoch)
        if learners and not file.is_file():
            return _of_learner(folder, learners)
        manifest = _mapping(file)
        last = manifest.get("last_step") or {}
        return RunRecord(folder.name, manifest, last.get("metrics", {}), int(last.get("step", 0)))

    @staticmethod
    def of_store(run: TrainingRun, steps: Sequence[StepMetrics]) -> RunRecord:
        """A run from what the store knows of its training run."""
        notes = dict(run.metadata)
        datasets = notes.pop("datasets", None)
        config = without_secrets(run.config) if run.config else {}
        session = {"algorithm": run.algorithm, "config": config, **notes}
        last = max(steps, key=lambda item: item.step, default=None)
        return RunRecord(
            run.training_run_id,
            {"datasets": datasets, "sessions": [session]},
            last.metrics if last else {},
            last.step if last else 0,
        )


@dataclass(frozen=True)
class Difference:
    """One thing that differs; None = the run does not say it. ``section`` is one of `SECTIONS`."""

    section: str
    key: str
    a: Any
    b: Any


def _mapping(file: Path) -> dict[str, Any]:
    try:
        found = orjson.loads(file.read_bytes())
    except OSError as error:
        raise ManifestError(f"{file} cannot be read: {error.strerror}; name a run's folder") from error
    except orjson.JSONDecodeError as error:
        raise ManifestError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ManifestError(f"{file} must hold a mapping")
    return found


def _epoch(file: Path) -> int:
    number = file.stem.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def _of_learner(folder: Path, files: Sequence[Path]) -> RunRecord:
    """A run that nothing but a learner wrote down: a manifest of each of its epochs, and metrics."""
    sessions = [_mapping(file) for file in files]
    found = [session.pop("datasets", None) for session in sessions]
    last: dict[str, Any] = {}
    metrics = folder / METRICS_FILE
    if metrics.is_file():
        lines = metrics.read_bytes().splitlines()
        last = orjson.loads(lines[-1]) if lines else {}
    last.pop("time", None)
    step = int(last.pop("step", 0))
    return RunRecord(folder.name, {"datasets": found[-1], "sessions": sessions}, last, step)


def compare(a: RunRecord, b: RunRecord) -> list[Difference]:
    """What differs between the last sessions of two runs, section by section."""
    mine, other = _sections(a.manifest), _sections(b.manifest)
    found = []
    for section in SECTIONS:
        left, right = dict(_flat(mine.get(section))), dict(_flat(other.get(section)))
        keys = [*left, *(key for key in right if key not in left)]
        found += [
            Difference(section, key, left.get(key), right.get(key))
            for key in keys
            if left.get(key) != right.get(key)
        ]
    return found


def _sections(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's content by section; of several sessions the last counts."""
    sessions = manifest.get("sessions") or [{}]
    everything = {key: value for key, value in manifest.items() if key in ("datasets", "seed", "config")}
    everything.update({key: value for key, value in sessions[-1].items() if key not in _PASSING})
    found: dict[str, Any] = {key: everything.pop(key) for key in SECTIONS if key in everything}
    found["other"] = {**everything, "sessions": len(sessions)}
    return found


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    elif value is not None:
        yield path, value
