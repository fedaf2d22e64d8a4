"""A small process that ends a training run's processes when the trainer itself was killed.

`python -m agl_grpc.trainer.guard MARK`: reads standard input, whose other end the trainer holds. The word
`done` means that all is well; an end without it means that the trainer is gone.
"""

from __future__ import annotations

import os
import subprocess
import sys

from agl_grpc.trainer.sweep import MARK, sweep

_DONE = b"done\n"
_GRACE_SECONDS = 15.0


class Guard:
    """The trainer's side of the guard."""

    def __init__(self, mark: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name != MARK}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "agl_grpc.trainer.guard", mark],
            stdin=subprocess.PIPE,
            start_new_session=True,
            env=environment,
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def dismiss(self) -> None:
        """Everything has been stopped: the guard ends and does nothing."""
        if self._process.poll() is None:
            self._process.communicate(_DONE)
        self._process.wait()


def main(mark: str) -> None:
    """Waits for the trainer's end."""
    if sys.stdin.buffer.read() != _DONE:
        sweep(mark, _GRACE_SECONDS)


if __name__ == "__main__":
    main(sys.argv[1])
