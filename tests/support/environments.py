"""The Python of the engine environment, where vLLM and torch are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def engine_python() -> str:
    """AGL_ENGINE_PYTHON, else the environment that `make engines` makes, else this one if it has vLLM."""
    candidates = [
        os.environ.get("AGL_ENGINE_PYTHON", ""),
        str(REPOSITORY / ".venv-engine" / "bin" / "python"),
    ]
    for candidate in candidates:
        if candidate and Path(candidate).exists():
            return candidate
    try:
        import vllm  # noqa: F401 -- only whether it is there
    except ImportError as error:
        raise AssertionError("no engine environment: run `make engines`, or set AGL_ENGINE_PYTHON") from error
    return sys.executable


def engine_environment(**extra: str) -> dict[str, str]:
    """Environment variables for the engine's Python: this checkout first, the hub out of reach."""
    paths = [str(REPOSITORY), str(REPOSITORY / "cli")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **extra,
    }


def run_in_engine(module: str, *arguments: str, stdin: str = "", limit: float = 240.0) -> str:
    """Standard output of a module of the tests, run by the engine's Python."""
    done = subprocess.run(
        [engine_python(), "-m", module, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=limit,
        env=engine_environment(),
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, f"{module} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout
