"""Stands where Ray begins a worker process: has one forked that has imported everything already.

Ray runs this file in place of its own ``setup_worker.py``; see ``warm_ray.py``. It imports next to nothing,
and lives as long as the worker.
"""

from __future__ import annotations

import json
import os
import socket
import sys

SOCKET = "AGL_TEST_WARM_SOCKET"


def main() -> None:
    """Asks for the worker with this process's arguments, environment and standard streams."""
    order = {"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(os.environ[SOCKET])
        socket.send_fds(stream, [b"o"], [0, 1, 2])
        stream.sendall(json.dumps(order).encode())
        stream.shutdown(socket.SHUT_WR)
        # Its other end closes when the worker ends.
        stream.recv(1)


if __name__ == "__main__":
    main()
