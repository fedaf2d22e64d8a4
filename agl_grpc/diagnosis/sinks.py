"""Where metrics of a run go beside the store: files in its folder, and the trackers that are set up."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import orjson

METRICS_FILE = "metrics.jsonl"
_FAILURES = 3
_MLFLOW_BATCH = 1000
# What its names may not hold, a grader's ``@`` for example.
_MLFLOW_REFUSES = re.compile(r"[^0-9A-Za-z_\-. :/]")
Config = Mapping[str, Any]


class MetricSink(Protocol):
    """Takes numbers of steps."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step's numbers, by name."""

    def close(self) -> None:
        """No more come."""


class JsonLines:
    """A line of JSON for each step in ``metrics.jsonl``."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / METRICS_FILE).open("ab")

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

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=5)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds each number as a scalar."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, where ``wandb`` is installed and WANDB_API_KEY or WANDB_MODE is set."""

    def __init__(self, folder: Path, config: Config) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "agl-grpc"),
            name=folder.name,
            id=folder.name,
            resume="allow",
            dir=str(folder),
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

    def __init__(self, folder: Path, config: Config) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._metric = Metric

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "agl-grpc")
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._run_id = self._client.create_run(experiment_id, run_name=folder.name).info.run_id
        for key, value in config.items():
            self._client.log_param(self._run_id, key, value)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs a step, as one request for each thousand numbers, which is MLflow's limit."""
        now = int(time.time() * 1000)
        numbers = [
            self._metric(_MLFLOW_REFUSES.sub("_", name), value, now, step) for name, value in metrics.items()
        ]
        for start in range(0, len(numbers), _MLFLOW_BATCH):
            self._client.log_batch(self._run_id, metrics=numbers[start : start + _MLFLOW_BATCH])

    def close(self) -> None:
        """Ends the run."""
        self._client.set_terminated(self._run_id)


class MetricSinks:
    """All of them; numbers that are not finite are left out.

    A sink never ends a run: what goes wrong is said in a line, and one that fails three times in a row gets
    no more.

    Args:
        folder: of the run; its name is the run's.
        config: a few words on the run, for the trackers.
        say: told what goes wrong.
    """

    def __init__(self, folder: Path, config: Config, say: Callable[[str], None]) -> None:
        self._say = say
        self._failures: dict[str, int] = {}
        self._sinks: dict[str, MetricSink] = {}
        self._open(METRICS_FILE, lambda: JsonLines(folder))
        self._open("TensorBoard", lambda: TensorBoard(folder))
        if _installed("wandb") and (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE")):
            self._open("Weights & Biases", lambda: WeightsAndBiases(folder, config))
        if _installed("mlflow") and os.environ.get("MLFLOW_TRACKING_URI"):
            self._open("MLflow", lambda: MLflow(folder, config))

    @property
    def names(self) -> list[str]:
        """Those that take numbers."""
        return list(self._sinks)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Gives one step to each."""
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        for name, sink in list(self._sinks.items()):
            with self._told(name, f"step {step}") as outcome:
                sink.write(step, finite)
                outcome.append("written")
            self._failures[name] = 0 if outcome else self._failures.get(name, 0) + 1
            if self._failures[name] >= _FAILURES:
                self._say(f"metrics: {name} gets no more: it failed {_FAILURES} times in a row")
                del self._sinks[name]

    def close(self) -> None:
        """Closes each."""
        for name, sink in self._sinks.items():
            with self._told(name, "the end"):
                sink.close()

    def _open(self, name: str, make: Callable[[], MetricSink]) -> None:
        with self._told(name, "the start"):
            self._sinks[name] = make()

    @contextmanager
    def _told(self, name: str, what: str) -> Iterator[list[str]]:
        """Says what goes wrong inside instead of raising it: a tracker is other people's code and servers."""
        try:
            yield []
        except Exception as error:
            said = " ".join(str(error).split())[:300]
            self._say(f"metrics: {name} did not take {what}: {type(error).__name__}: {said}")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
