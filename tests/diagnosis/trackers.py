"""Weights & Biases (offline) and MLflow (a local folder) as they are: `make trackers` runs this beside them.

Metrics go through the sinks and are read back with the trackers' own readers; it fails when one is missing.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

NUMBERS = {"reward/mean": 0.5, "grader/judge@2/kind/mean": 0.25}


def main() -> None:
    """Writes three steps and reads them back."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run-1"
        folder.mkdir()
        os.environ.update(
            WANDB_MODE="offline", WANDB_SILENT="true", MLFLOW_TRACKING_URI=f"file:{name}/mlruns"
        )
        os.environ.pop("WANDB_API_KEY", None)
        from agl_grpc.diagnosis.sinks import MetricSinks

        said: list[str] = []
        sinks = MetricSinks(folder, {"algorithm": "verl", "seed": 3}, said.append)
        assert set(sinks.names) == {"metrics.jsonl", "TensorBoard", "Weights & Biases", "MLflow"}, said
        for step in range(1, 4):
            sinks.write(step, {**NUMBERS, "step/number": float(step)})
        sinks.close()
        assert not said, said
        _check_mlflow()
        _check_wandb(folder)
    print("Weights & Biases and MLflow hold what was written")


def _check_mlflow() -> None:
    from mlflow import MlflowClient

    client = MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'agl-grpc'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run-1", "FINISHED")
    assert run.data.params == {"algorithm": "verl", "seed": "3"}
    history = client.get_metric_history(run.info.run_id, "step/number")
    assert [(each.step, each.value) for each in history] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    # A name that MLflow would refuse is written with what it allows.
    assert run.data.metrics["grader/judge_2/kind/mean"] == NUMBERS["grader/judge@2/kind/mean"]


def _check_wandb(folder: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    steps: list[dict[str, str]] = []
    for data in _records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            keys = (item.key or ".".join(item.nested_key) for item in record.history.item)
            steps.append(dict(zip(keys, (item.value_json for item in record.history.item), strict=True)))
    assert [float(step["step/number"]) for step in steps] == [1.0, 2.0, 3.0], steps
    assert float(steps[0]["grader/judge@2/kind/mean"]) == NUMBERS["grader/judge@2/kind/mean"]


def _records(log: bytes) -> Iterator[bytes]:
    """Records of an offline run's file: LevelDB's log format after a header of seven bytes."""
    block, header, whole_or_last = 32768, 7, (1, 4)
    place, record = header, b""
    while place + header <= len(log):
        left = block - place % block
        if left < header:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", log, place + 4)
        record += log[place + header : place + header + length]
        place += header + length
        if kind in whole_or_last:
            yield record
            record = b""


if __name__ == "__main__":
    main()
