"""Samples as torch reads them, in the learner environment."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from agl_grpc.sample import token_digest
from tests.learner.files_script import rows
from tests.support.environments import learner_environment, learner_python

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def test_a_torch_file_holds_the_packed_columns_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    command = [learner_python(), "-m", "tests.learner.files_script", str(tmp_path / "samples.pt")]
    done = subprocess.run(
        command, env=learner_environment(), capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == token_digest(rows())
