"""A real store server in a process of its own, to be stopped, killed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import grpc
from grpc_health.v1 import health_pb2

from tests.support.waiting import free_port

RECONNECT = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
)
"""Channel options of a client whose server comes and goes."""


class StoreProcess:
    """`agl-grpc store serve` on a random port of the loopback interface.

    Use it as a context manager; ``kill`` and ``start`` may be called again and again on one database, which
    is a file or the URL of a PostgreSQL database (then ``log`` says where the server's lines go).
    """

    def __init__(self, database: Path | str, *options: str, log: Path | None = None) -> None:
        self.database = database
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.options = options
        self.log = log or Path(database).with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, within: float = 20.0) -> None:
        """Starts the server and returns when its health service says SERVING."""
        command = [sys.executable, "-m", "agl_grpc_cli", "store", "serve", "--port", str(self.port)]
        if "--http-port" not in self.options:
            command.append("--no-http")
        command += ["--database", str(self.database), *self.options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ.copy())
        wait_until_serving(self.address, self.log, within)

    def kill(self) -> None:
        """kill -9: nothing is flushed, nobody is told."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self, within: float = 15.0) -> int:
        """SIGTERM, as an operator would; returns the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within)

    def __enter__(self) -> StoreProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()


def wait_until_serving(address: str, log: Path, within: float) -> None:
    """Returns when the server's health service says SERVING; fails with the log after so many seconds."""
    with grpc.insecure_channel(address, options=RECONNECT) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            answer = check(health_pb2.HealthCheckRequest(), timeout=within, wait_for_ready=True)
        except grpc.RpcError as error:
            raise AssertionError(f"the store did not start:\n{log.read_text()}") from error
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
