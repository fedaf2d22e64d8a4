"""The server as a process in the background, found again by a file that holds its process id."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

_START_SECONDS = 30.0
_STOP_SECONDS = 10.0
_LOOK_SECONDS = 0.05
_CLOCK_SLACK = 1.0  # seconds by which two readings of a process's start may differ


class DaemonError(Exception):
    """The server could not be started or stopped; the message is one line that says why."""


@dataclass(frozen=True)
class Daemon:
    """A server in the background: its process, when that began (seconds since the epoch), and its port."""

    pid: int
    started: float
    port: int

    def is_alive(self) -> bool:
        """Whether the process is there, and is the one that was started."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < _CLOCK_SLACK
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def pid_file(port: int) -> Path:
    """Where the process id of the server on a port stands."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) if runtime else Path.home() / ".cache"
    return folder / "agl-grpc" / f"agentops-{port}.pid"


def log_file(port: int) -> Path:
    """Where the server in the background writes its log."""
    return pid_file(port).with_suffix(".log")


def command(port: int, host: str, store: str) -> list[str]:
    """The server in the foreground, as a command."""
    run = [sys.executable, "-m", "agl_grpc_cli", "agentops", "--port", str(port), "--host", host]
    return [*run, "--store", store]


def start(port: int, host: str, store: str) -> Daemon:
    """Starts the server detached from this terminal and session; returns when it answers.

    Raises:
        DaemonError: One is running there already, or it did not come up.
    """
    running = find(port)
    if running is not None:
        raise DaemonError(
            f"an AgentOps server runs on port {port} already (process {running.pid}); "
            "stop it with `agl-grpc agentops stop`"
        )
    path = pid_file(port)
    path.parent.mkdir(parents=True, exist_ok=True)
    with log_file(port).open("ab") as log:
        begin = log.tell()
        process = subprocess.Popen(
            command(port, host, store),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )
    daemon = Daemon(process.pid, psutil.Process(process.pid).create_time(), port)
    _wait_until_ready(process, host, port, begin)
    path.write_text(json.dumps(asdict(daemon)))
    return daemon


def _wait_until_ready(process: subprocess.Popen[bytes], host: str, port: int, begin: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not is_ready(host, port, process.pid):
        if process.poll() is not None:
            raise DaemonError(_last_line(port, begin) or f"it ended at once; see {log_file(port)}")
        if time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise DaemonError(f"it did not answer within {_START_SECONDS:g} s; see {log_file(port)}")
        time.sleep(_LOOK_SECONDS)


def _last_line(port: int, begin: int) -> str:
    lines = log_file(port).read_bytes()[begin:].decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else ""


def is_ready(host: str, port: int, pid: int) -> bool:
    """Whether this process, and no other, answers there."""
    address = f"[{host}]" if ":" in host else host
    try:
        with urllib.request.urlopen(f"http://{address}:{port}/health", timeout=2) as answer:
            return bool(json.loads(answer.read())["process"] == pid)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def find(port: int) -> Daemon | None:
    """The server in the background on a port; None = there is none."""
    try:
        daemon = Daemon(**json.loads(pid_file(port).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    if daemon.is_alive():
        return daemon
    pid_file(port).unlink(missing_ok=True)
    return None


def stop(port: int) -> Daemon:
    """Stops the server in the background; returns when it is gone.

    Raises:
        DaemonError: There is none.
    """
    daemon = find(port)
    if daemon is None:
        raise DaemonError(f"no AgentOps server runs in the background on port {port}")
    process = psutil.Process(daemon.pid)
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except psutil.TimeoutExpired:
        process.kill()
        process.wait(_STOP_SECONDS)
    pid_file(port).unlink(missing_ok=True)
    return daemon
