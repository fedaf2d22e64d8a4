"""A process that has imported most of what verl's workers and the TransferQueue's import, and forks them.

`python -m tests.learner.warm_workers SOCKET`: says `ready`, then takes orders (see ``warm_worker.py``) until
its standard input ends. What it forks is as it would be of itself: environment, arguments, folder and streams
are those that Ray gave, and only imports are done, which take most of a worker's first ten seconds.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import sys
import threading
from typing import Any

import numpy as np

# What takes longest of what verl and the TransferQueue import. Not Ray, nor what imports it: it reads its
# environment, the worker's job among it, when it is imported.
_IMPORTS = (
    "datasets",
    "hydra",
    "numpy",
    "peft",
    "tensordict",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torchdata.stateful_dataloader",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2.modeling_qwen2",
    "zmq",
)


def main(path: str) -> None:
    """Serves until the end of standard input."""
    for name in _IMPORTS:
        importlib.import_module(name)
    assert "ray" not in sys.modules
    # pyarrow's allocator has a thread of its own beside these, and an answer to being forked.
    assert threading.active_count() == 1, f"cannot be forked with {threading.enumerate()}"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(path)
        listener.listen(64)
        selector.register(listener, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if sys.stdin in ready:
                return
            _take(listener)


def _take(listener: socket.socket) -> None:
    """Takes one order and forks a worker, which keeps the connection."""
    stream, _ = listener.accept()
    with stream:
        _, streams, _, _ = socket.recv_fds(stream, 1, 3)
        order = json.loads(b"".join(iter(lambda: stream.recv(1 << 16), b"")))
        if os.fork() == 0:
            listener.close()
            _become(order, streams)
        for descriptor in streams:
            os.close(descriptor)


def _become(order: dict[str, Any], streams: list[int]) -> None:
    """This process becomes the worker; it does not come back."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    random.seed()
    np.random.seed()
    code = 1
    try:
        _run(order["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        # Nothing of the process that was forked is to run in this one.
        os._exit(code)


def _run(arguments: list[str]) -> None:
    """What Ray's ``setup_worker.py`` does, but for starting an interpreter."""
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.utils import update_envs
    from ray._private.workers.setup_worker import parser

    known, sys.argv = parser.parse_known_args(arguments)
    update_envs(RuntimeEnvContext.deserialize(known.serialized_runtime_env_context or "{}").env_vars)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1])
