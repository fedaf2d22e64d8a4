"""The store server, which notes when each new rollout was on disk: for latencies that count from there."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agl_grpc_cli.main import main

from agl_grpc.store.rollouts.attempts import CREATED, ROLLOUT
from agl_grpc.store.storage.events import EventRow
from agl_grpc.store.storage.writer import Writer

_commits: list[float] = []
_answer = Writer._answer


def _note(self: Writer, done: Any, events: Sequence[EventRow], *rest: Any) -> None:
    # Called first thing when the commit is on disk.
    now = time.perf_counter()
    _commits.extend(now for event in events if event.entity == ROLLOUT and event.kind == CREATED)
    _answer(self, done, events, *rest)


if __name__ == "__main__":
    Writer._answer = _note  # type: ignore[method-assign]  # this process is for measuring
    try:
        sys.exit(main())
    finally:
        Path(os.environ["AGL_GRPC_BENCH_TRACE"]).write_text(json.dumps(_commits))
