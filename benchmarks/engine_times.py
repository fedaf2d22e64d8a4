"""Writes down how long verl's engine computes; verl imports it in its workers as ``external_lib``.

Each line of the file that ``AGL_BENCH_ENGINE_TIMES`` names: seconds since the epoch at the end, and seconds.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

VARIABLE = "AGL_BENCH_ENGINE_TIMES"


def _timed(method: Any, path: Path) -> Any:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            with path.open("a") as file:
                file.write(f"{time.time()} {time.perf_counter() - started}\n")

    return timed


if VARIABLE in os.environ:
    from verl.workers.engine.base import BaseEngine

    for _name in ("train_batch", "infer_batch"):
        setattr(BaseEngine, _name, _timed(getattr(BaseEngine, _name), Path(os.environ[VARIABLE])))
