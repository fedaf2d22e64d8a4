"""Writes down when verl's engine computes; verl imports it in its workers as ``external_lib``.

That is all of `train_batch` and `infer_batch`: forward and backward passes, the optimiser's step, and the
passes forward alone that recompute logprobs, those of a reference model and a critic's values.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.work_times import written

VARIABLE = "AGL_BENCH_ENGINE_TIMES"


def _timed(method: Any, path: Path) -> Any:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with written(path):
            return method(*args, **kwargs)

    return timed


if VARIABLE in os.environ:
    from verl.workers.engine.base import BaseEngine

    for _name in ("train_batch", "infer_batch"):
        setattr(BaseEngine, _name, _timed(getattr(BaseEngine, _name), Path(os.environ[VARIABLE])))
