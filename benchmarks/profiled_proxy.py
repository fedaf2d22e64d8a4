"""`agl-grpc` with a sampling profiler in it: `… profiled_proxy FILE proxy serve …`.

Each SIGUSR2 writes to FILE, as JSON, the seconds of processor time that each part of the process has used so
far. The thread of the event loop is split by its Python frames, sampled by the processor time that it uses;
what the threads beside it use comes from the kernel.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType

from agl_grpc_cli.main import main

from agl_grpc.interceptor.capture.spool import WRITER

_INTERVAL = 0.001
_LOOP = "event loop, reads of the kernel"
_DISK = "journal on disk"
_STORE = "delivery to the store"
_PARTS = (
    ("front/http/door.py", "HTTP of agents"),
    ("front/http/engines.py", "HTTP of engines"),
    ("front/exchange.py", "HTTP of engines"),
    ("front/splice.py", "JSON, ids, logprobs"),
    ("front/dialects.py", "JSON, ids, logprobs"),
    ("front/streams.py", "JSON, ids, logprobs"),
    ("front/turn.py", "JSON, ids, logprobs"),
    ("capture/spool.py", _DISK),
    ("capture/transport.py", _STORE),
    ("front/journal.py", _STORE),
    ("/grpc/", _STORE),
    ("front/command.py", _LOOP),
    ("agl_grpc/", "records"),
)
"""Of the innermost frame that one of them fits, the file's name says which part is at work."""


class Profiler:
    """Samples the main thread; `parts` are the seconds of all parts up to now."""

    def __init__(self) -> None:
        self._sampled: Counter[str] = Counter()
        self._last = time.thread_time()
        signal.signal(signal.SIGPROF, self._sample)
        signal.setitimer(signal.ITIMER_PROF, _INTERVAL, _INTERVAL)

    def parts(self) -> dict[str, float]:
        """By name, those of other threads among them."""
        found = self._sampled.copy()
        ours = {thread.native_id for thread in threading.enumerate() if thread.name == WRITER}
        for task in Path("/proc/self/task").iterdir():
            if int(task.name) != os.getpid():
                seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
                found[f"{_DISK}, thread" if int(task.name) in ours else "threads of gRPC"] += seconds
        return dict(found)

    def _sample(self, number: int, frame: FrameType | None) -> None:
        # The signal counts the time of all threads: what this one has used since is the sample's weight.
        now = time.thread_time()
        self._sampled[_part(frame)] += now - self._last
        self._last = now


def _part(frame: FrameType | None) -> str:
    while frame is not None:
        for name, part in _PARTS:
            if name in frame.f_code.co_filename:
                return part
        frame = frame.f_back
    return _LOOP


def _run(target: Path, arguments: list[str]) -> None:
    profiler = Profiler()

    def tell(number: int, frame: FrameType | None) -> None:
        unfinished = target.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(profiler.parts()))
        unfinished.rename(target)

    signal.signal(signal.SIGUSR2, tell)
    sys.argv[1:] = arguments
    main()


if __name__ == "__main__":
    _run(Path(sys.argv[1]), sys.argv[2:])
