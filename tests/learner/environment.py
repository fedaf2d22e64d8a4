"""Where the learner environment is."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path


def learner_python() -> str:
    """Python of the learner environment: AGL_LEARNER_PYTHON, else this one if it has verl, else
    `.venv-learner`.
    """
    named = os.environ.get("AGL_LEARNER_PYTHON")
    if named:
        return named
    if importlib.util.find_spec("verl"):
        return sys.executable
    path = Path(__file__).parents[2] / ".venv-learner" / "bin" / "python"
    if not path.exists():
        raise RuntimeError(
            "no learner environment: make one (`agl-grpc env create learner`) or set AGL_LEARNER_PYTHON"
        )
    return str(path)
