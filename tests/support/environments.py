"""The environments beside this one: the engine's (vLLM), the learner's (verl), Agent Lightning's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def engine_python() -> str:
    """Python of the engine environment: AGL_GRPC_ENGINE_PYTHON, else what `make engines` makes."""
    return _python("engine")


def learner_python() -> str:
    """Python of the learner environment: AGL_GRPC_LEARNER_PYTHON, else what `make engines` makes."""
    return _python("learner")


def hybrid_python() -> str:
    """Python with both: AGL_GRPC_HYBRID_PYTHON, else what `make hybrid` makes."""
    return _python("hybrid", "hybrid")


def frameworks_python() -> str:
    """Python with the agent frameworks: AGL_GRPC_FRAMEWORKS_PYTHON, else what `make frameworks` makes."""
    return _python("frameworks", "frameworks")


def agentlightning_python() -> str:
    """Python with Agent Lightning 0.3: AGL_GRPC_AGENTLIGHTNING_PYTHON, else what `make peers` makes."""
    return _python("agentlightning", "peers")


def _python(kind: str, target: str = "engines") -> str:
    variable = f"AGL_GRPC_{kind.upper()}_PYTHON"
    path = os.environ.get(variable) or str(REPOSITORY / f".venv-{kind}" / "bin" / "python")
    assert Path(path).exists(), f"no {kind} environment at {path}: run `make {target}`, or set {variable}"
    return path


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


def learner_environment() -> dict[str, str]:
    """Environment variables for the learner's Python: this checkout first."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "cli")])}


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
