"""Command lines of the parts that the trainer starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from agl_grpc.trainer.commands import engine_part
from agl_grpc.trainer.options import EngineOptions
from agl_grpc.trainer.run_folder import RunFolder


@pytest.mark.parametrize(("given", "seen"), [("0,1", "0,1"), ("", "all that there are")])
def test_an_engine_sees_the_gpus_that_it_was_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str, seen: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "all that there are")
    part = engine_part(
        RunFolder(tmp_path / "run"),
        sys.executable,
        model="model",
        model_name="m",
        store="127.0.0.1:1",
        port=8000,
        policy_version=0,
        options=EngineOptions(visible_devices=given, arguments=["--max-model-len", "64"]),
        mark="mark",
    )
    assert part.environment["CUDA_VISIBLE_DEVICES"] == seen
    assert part.command[-2:] == ["--max-model-len", "64"]
