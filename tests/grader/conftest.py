"""bubblewrap for the tests: the system's, or the one that `make sandbox` has unpacked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

UNPACKED = Path(__file__).parents[2] / ".venv-sandbox" / "usr" / "bin" / "bwrap"


@pytest.fixture(autouse=True)
def bubblewrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names the program where the system has none."""
    if "AGL_GRPC_BWRAP" not in os.environ and shutil.which("bwrap") is None:
        assert UNPACKED.exists(), "bubblewrap is not there: make sandbox"
        monkeypatch.setenv("AGL_GRPC_BWRAP", str(UNPACKED))
