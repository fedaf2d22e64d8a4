"""Servers that benchmarks start: the store as people run it, and gRPC's own server with nothing behind it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks import processor

ROOT = Path(__file__).parent.parent


@dataclass
class Server:
    """A running server.

    Attributes:
        address: Its `host:port`.
        process: The process.
        starting: Seconds from its start until it served.
    """

    address: str
    process: subprocess.Popen[str]
    starting: float = 0.0

    @property
    def cpu(self) -> float:
        """Seconds of CPU that it has used."""
        return processor.seconds(self.process.pid)

    @property
    def rss(self) -> float:
        """MiB of memory that it has in use, shared libraries included."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        (kibibytes,) = (int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
        return kibibytes / 1024


@contextlib.contextmanager
def store_server(
    database: Path | str, *, module: str = "agl_grpc_cli", extra: tuple[str, ...] = ()
) -> Iterator[Server]:
    """A store on a disk of this machine, or on a PostgreSQL database."""
    port = _free_port()
    command = [sys.executable, "-m", module, "store", "serve", "--port", str(port), "--http-port", "0"]
    command += ["--database", str(database), "--log-level", "warning", *extra]
    begun = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    server = Server(f"127.0.0.1:{port}", process)
    try:
        with grpc.insecure_channel(server.address, options=_IMPATIENT) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            check(health_pb2.HealthCheckRequest(), timeout=60, wait_for_ready=True)
        server.starting = time.perf_counter() - begun
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()


_IMPATIENT = [(f"grpc.{name}_reconnect_backoff_ms", 20) for name in ("initial", "min", "max")]


@contextlib.contextmanager
def traced_server(database: Path) -> Iterator[tuple[Server, Path]]:
    """A store that writes down, at its end, when each group with new rollouts was on disk; and where."""
    trace = database.with_suffix(".commits")
    os.environ["AGL_GRPC_BENCH_TRACE"] = str(trace)
    with store_server(database, module="benchmarks.traced_store") as server:
        yield server, trace


def commits_of(trace: Path) -> list[float]:
    """Moments of the commits of new rollouts, on `time.perf_counter`, one a rollout."""
    found: list[float] = json.loads(trace.read_text())
    return found


@contextlib.contextmanager
def bare_server() -> Iterator[Server]:
    """The peer."""
    command = [sys.executable, "-m", "benchmarks.bare_peer"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        yield Server(f"127.0.0.1:{process.stdout.readline().strip()}", process)
        process.stdin.close()


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder on this checkout's disk that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=ROOT) as name:
        yield Path(name)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
