"""Where the tests' bwrap is: on the PATH, or unpacked by `make sandbox`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from agl_grpc.grader.sandbox import BWRAP_VARIABLE

_UNPACKED = Path(__file__).parents[2] / ".venv-sandbox" / "usr" / "bin" / "bwrap"

os.environ.setdefault(BWRAP_VARIABLE, shutil.which("bwrap") or str(_UNPACKED))
