"""README.md's agent and its training, as far as they go without an engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_training_that_it_shows_asks_for_the_environments_that_it_names(tmp_path: Path) -> None:
    """Names, signatures and settings hold: what is missing is what README makes beforehand, and is named."""
    agent, training = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    (tmp_path / "my_agent.py").write_text(agent)
    (tmp_path / "train.py").write_text(training)
    (made,) = re.findall(r"^agl-grpc env create learner", README.read_text(), flags=re.MULTILINE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AGL_GRPC")}
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith("agl_grpc.trainer.errors.TrainerError: no learner environment")
    assert f"`{made}`" in said
    assert "During handling" not in done.stderr
