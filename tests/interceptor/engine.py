"""Starts `agl-grpc vllm serve` on the tiny model, as users do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from agl_grpc.interceptor.settings import Settings
from tests.support.environments import REPOSITORY, engine_environment, engine_python

START_LIMIT = 240.0
SMALL = (
    *("--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "32"),
    *("--max-num-batched-tokens", "512", "--enable-scale-out"),
)
"""vLLM's options that make an engine small."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Engine:
    """A running engine: `url` is its root, `log` its output."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, model: Path, log: Path) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.model = model
        self.log = log

    def base(self, rollout: str, attempt: str = "at-1") -> str:
        """The base URL that an agent of this attempt is given, without `/v1`."""
        return f"{self.url}/rollout/{rollout}/attempt/{attempt}"

    def wait_ready(self) -> None:
        until = time.monotonic() + START_LIMIT
        while time.monotonic() < until:
            assert self.process.poll() is None, f"engine exited {self.process.returncode}:\n{self.tail()}"
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError(f"engine not ready within {START_LIMIT} s:\n{self.tail()}")

    def generated(self) -> float:
        """Tokens sampled since its start."""
        return self.metric("vllm:generation_tokens_total")

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-60:])


def engine_command(model: Path, store: str, folder: Path, *options: str, port: int) -> list[str]:
    """The command by which users start an engine, with what makes it small."""
    return [
        engine_python(), "-m", "agl_grpc_cli", "vllm", "serve", str(model), "--store", store,
        "--run", "run-1", "--engine-id", "engine-1", "--spool-dir", str(folder / "spool"),
        *SMALL, "--port", str(port), *options,
    ]  # fmt: skip


def foreign_command(model: Path, *options: str, port: int) -> list[str]:
    """A server that somebody else puts together; the interceptor's settings come by the environment."""
    return [
        engine_python(), "-m", "tests.interceptor.foreign_server", "--model", str(model), *SMALL,
        "--enforce-eager", "--host", "127.0.0.1", "--port", str(port), *options,
    ]  # fmt: skip


@contextmanager
def engine(
    model: Path, store: str, folder: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[Engine]:
    """An engine that serves `model` as `tiny`, stopped at the end; `environment` adds to its variables."""
    port = free_port()
    command = engine_command(model, store, folder, *options, port=port)
    with started(command, port, model, folder, environment or {}) as running:
        yield running


@contextmanager
def foreign_engine(
    model: Path, settings: Settings, folder: Path, *options: str, environment: Mapping[str, str]
) -> Iterator[Engine]:
    """As `engine`, with a server that somebody else has put together."""
    port = free_port()
    variables = {**settings.environment(), **environment}
    with started(foreign_command(model, *options, port=port), port, model, folder, variables) as running:
        yield running


@contextmanager
def started(
    command: Sequence[str], port: int, model: Path, folder: Path, environment: Mapping[str, str]
) -> Iterator[Engine]:
    """The engine that a command starts, stopped at the end."""
    log = folder / "engine.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=engine_environment(**environment),
            cwd=REPOSITORY,
            start_new_session=True,
        )
    running = Engine(process, port, model, log)
    try:
        running.wait_ready()
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
