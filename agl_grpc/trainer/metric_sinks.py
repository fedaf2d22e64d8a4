"""Where metrics of a run go beside the store: files in its folder, and the trackers that are set up."""

from __future__ import annotations

import importlib.util
import math
import os
import time
from collections.abc import Mapping
from typing import Any, Protocol

import orjson

from agl_grpc.trainer.run_folder import RunFolder

METRICS_FILE = "metrics.jsonl"


class MetricSink(Protocol):
    """Takes numbers of steps."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step's numbers, by name."""

    def close(self) -> None:
        """No more come."""


class JsonLines:
    """A line of JSON for each step in ``metrics.jsonl``."""

    def __init__(self, folder: RunFolder) -> None:
        self._file = (folder.path / METRICS_FILE).open("ab")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a line."""
        line = {"step": step, "time": time.time(), **metrics}
        self._file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Event files in the run folder's ``tensorboard``; read them with ``tensorboard --logdir``."""

    def __init__(self, folder: RunFolder) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder.tensorboard), flush_secs=5)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds each number as a scalar."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, where ``wandb`` is installed and WANDB_API_KEY or WANDB_MODE is set."""

    def __init__(self, folder: RunFolder, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "agl-grpc"),
            name=folder.name,
            id=folder.name,
            resume="allow",
            dir=str(folder.path),
            config=dict(config),
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs a step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class MLflow:
    """A run of MLflow, where ``mlflow`` is installed and MLFLOW_TRACKING_URI is set."""

    def __init__(self, folder: RunFolder, config: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "agl-grpc")
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._run_id = self._client.create_run(experiment_id, run_name=folder.name).info.run_id
        for key, value in config.items():
            self._client.log_param(self._run_id, key, value)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs a step."""
        for name, value in metrics.items():
            self._client.log_metric(self._run_id, name, value, step=step)

    def close(self) -> None:
        """Ends the run."""
        self._client.set_terminated(self._run_id)


class MetricSinks:
    """All of them; numbers that are not finite are left out."""

    def __init__(self, folder: RunFolder, config: Mapping[str, Any]) -> None:
        self._sinks: list[MetricSink] = [JsonLines(folder), TensorBoard(folder)]
        if _installed("wandb") and (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE")):
            self._sinks.append(WeightsAndBiases(folder, config))
        if _installed("mlflow") and os.environ.get("MLFLOW_TRACKING_URI"):
            self._sinks.append(MLflow(folder, config))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Gives one step to each."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for sink in self._sinks:
            sink.write(step, finite)

    def close(self) -> None:
        """Closes each."""
        for sink in self._sinks:
            sink.close()


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
