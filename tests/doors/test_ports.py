"""Which ports a store listens on (R31), and what is said when it cannot."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

COMMAND = [sys.executable, "-m", "agl_grpc_cli", "store", "serve", "--memory"]


def two_free_ports() -> int:
    """A port that is free, and so is the next."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


@contextmanager
def store(*options: str) -> Iterator[str]:
    """A store; the line with which it starts."""
    process = subprocess.Popen([*COMMAND, *options], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        yield process.stderr.readline()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)


def test_http_is_beside_grpc_unless_told_otherwise() -> None:
    port = two_free_ports()
    with store("--port", str(port)) as line:
        assert f"grpc://127.0.0.1:{port} " in line
        assert f"http://127.0.0.1:{port + 1} " in line
        assert httpx.get(f"http://127.0.0.1:{port + 1}/agl/v1/health").json() == {"status": "ok"}
        begun = time.monotonic()
        options = ["--port", "0", "--http-port", str(port + 1)]
        taken = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=30, check=False)
        assert taken.returncode == 1
        (line,) = taken.stderr.strip().splitlines()
        assert f"port {port + 1} on 127.0.0.1 is in use" in line
        assert "--http-port" in line
        assert time.monotonic() - begun < 30


def test_the_ports_may_be_swapped_for_clients_that_expect_http_first() -> None:
    port = two_free_ports()
    with store("--port", str(port + 1), "--http-port", str(port)) as line:
        assert f"grpc://127.0.0.1:{port + 1} " in line
        assert httpx.get(f"http://127.0.0.1:{port}/v1/agl/health").json() == {"status": "ok"}


def test_opentelemetrys_own_ports() -> None:
    # An address of the loopback network of which nobody else uses these ports.
    with store("--host", "127.0.47.1", "--port", "0", "--otlp") as line:
        assert "OTLP also on 127.0.47.1:4317 (gRPC) and :4318 (HTTP)" in line
        answer = httpx.post("http://127.0.47.1:4318/v1/traces", json={})
        assert (answer.status_code, answer.json()) == (200, {})
        with socket.create_connection(("127.0.47.1", 4317), timeout=5):
            pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--no-http", "--http-port", "1"], "exclude each other"),
        (["--port", "65535"], "there is no port after 65535"),
    ],
)
def test_options_that_do_not_fit(options: list[str], words: str) -> None:
    answer = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=30, check=False)
    assert answer.returncode == 2
    assert words in answer.stderr
