"""Sinks get every step; one that fails is said, dropped after three failures, and harms no other."""

from __future__ import annotations

import math
from pathlib import Path

import orjson

from agl_grpc.diagnosis.sinks import MetricSinks


def test_a_sink_that_fails_is_said_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("where a folder should be")
    said: list[str] = []
    sinks = MetricSinks(tmp_path, {"algorithm": "x"}, said.append)
    sinks.write(1, {"reward/mean": 0.5, "loss/entropy": math.nan})
    sinks.close()
    assert sinks.names == ["metrics.jsonl"]
    assert len(said) == 1
    assert said[0].startswith("metrics: TensorBoard did not take the start: ")
    line = orjson.loads((tmp_path / "metrics.jsonl").read_bytes())
    assert (line["step"], line["reward/mean"]) == (1, 0.5)
    assert "loss/entropy" not in line


def test_three_failures_in_a_row_are_enough(tmp_path: Path) -> None:
    said: list[str] = []
    sinks = MetricSinks(tmp_path, {}, said.append)
    # As if the file were taken away under it.
    sinks._sinks["metrics.jsonl"].close()
    for step in range(1, 6):
        sinks.write(step, {"reward/mean": 0.5})
    sinks.close()
    assert said[-1] == "metrics: metrics.jsonl gets no more: it failed 3 times in a row"
    assert len(said) == 4
    assert list((tmp_path / "tensorboard").glob("events.*"))
