"""The server as a child process of a program, under the names of Agent Lightning's manager."""

from __future__ import annotations

import atexit
import socket
import subprocess
import time
from typing import Self

from agl_grpc.agentops.daemon import command, is_ready

_START_SECONDS = 30.0
_STOP_SECONDS = 10.0
_LOOK_SECONDS = 0.05


class AgentOpsServerManager:
    """Runs a local AgentOps server for as long as a program wants it.

    ``daemon`` has the server end with this process, even when `stop` is never called. Without a ``port`` a
    free one is taken. ``store`` is the address of the store's gRPC door, to which spans go. A manager may be
    started and stopped again and again, and is a context manager.
    """

    def __init__(
        self, daemon: bool = True, port: int | None = None, *, store: str = "127.0.0.1:4747"
    ) -> None:
        self.daemon = daemon
        self.port = port
        self.store = store
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the server; returns when it answers. Does nothing while it runs.

        Raises `RuntimeError` with one line that says why it did not come up.
        """
        if self.is_alive():
            return
        port = self.port = self.port or _free_port()
        self._process = subprocess.Popen(
            command(port, "127.0.0.1", self.store),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if self.daemon:
            atexit.register(self.stop)
        deadline = time.monotonic() + _START_SECONDS
        while not is_ready("127.0.0.1", port, self._process.pid):
            if self._process.poll() is not None:
                told = self._process.stderr.read() if self._process.stderr else ""
                self.stop()
                raise RuntimeError(_reason(told))
            if time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the AgentOps server did not answer within {_START_SECONDS:g} s")
            time.sleep(_LOOK_SECONDS)

    def is_alive(self) -> bool:
        """Whether the server's process runs."""
        return self._process is not None and self._process.poll() is None

    def get_port(self) -> int | None:
        """The port; None before `start` when none was chosen."""
        return self.port

    def stop(self) -> None:
        """Stop the server; returns when its process is gone. Does nothing when there is none."""
        process, self._process = self._process, None
        atexit.unregister(self.stop)
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stderr is not None:
            process.stderr.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_problem: object) -> None:
        self.stop()


def _reason(told: str) -> str:
    lines = told.strip().splitlines()
    why = lines[-1].removeprefix("error: ") if lines else "it ended at once"
    return f"the AgentOps server did not start: {why}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
