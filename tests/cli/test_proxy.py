"""`agl-grpc proxy serve` as a process: its start line, its errors, its end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.interceptor.front.fake_engine import fake_engine
from tests.interceptor.front.rig import CHAT, HELLO
from tests.support.waiting import eventually, free_port

COMMAND = [sys.executable, "-m", "agl_grpc_cli", "proxy", "serve"]


def said(*options: str) -> tuple[int, str]:
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stdout + done.stderr


def test_help_names_every_option_and_is_quick() -> None:
    started = time.monotonic()
    code, text = said("--help")
    assert (code, time.monotonic() - started < 5.0) == (0, True)
    for option in (
        "--upstream",
        "--store",
        "--unattributed",
        "--max-tokens",
        "--spool-dir",
        "--logprobs-mode",
    ):
        assert option in text


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "name at least one engine"),
        (("-u", "nowhere"), 1, "write URL or MODEL=URL"),
        (("-u", "http://h:1", "--unattributed", "maybe"), 2, "serve, record or refuse"),
        (("-u", "http://h:1", "--max-body", "much"), 2, "size 'much'"),
        (("--upstreams", "/nowhere/engines"), 1, "/nowhere/engines"),
        (("-u", "http://h:1", "--host", "256.0.0.1"), 1, "256.0.0.1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    options: Sequence[str], code: int, message: str, tmp_path: Path
) -> None:
    found, text = said(*options, "--port", "0", "--spool-dir", str(tmp_path)) if options else said()
    assert found == code, text
    assert message in text
    assert "Traceback" not in text


@asynccontextmanager
async def running(folder: Path, *options: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The process and its URL; it is ended if the test has not done so."""
    command = [
        *COMMAND,
        "--port",
        "0",
        "--store",
        f"127.0.0.1:{free_port()}",
        "--spool-dir",
        str(folder / "spool"),
    ]
    process = await asyncio.create_subprocess_exec(
        *command, *options, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ.copy()
    )
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 30)).decode()
        assert line.startswith("agl-grpc proxy: http://127.0.0.1:"), line
        yield process, line.split(": ", 1)[1].split(",")[0]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_it_serves_reads_its_upstreams_again_and_ends_on_sigterm(tmp_path: Path) -> None:
    listed = tmp_path / "engines"
    async with fake_engine() as first, fake_engine() as second, httpx.AsyncClient(timeout=20) as http:
        listed.write_text(f"{first.url}\n")
        async with running(tmp_path, "--upstreams", str(listed)) as (process, url):
            assert (await http.post(url + CHAT, json=HELLO)).status_code == 200
            listed.write_text(f"{first.url} drain\n{second.url}\n")
            process.send_signal(signal.SIGHUP)

            async def moved() -> bool:
                await http.post(url + CHAT, json=HELLO)
                return bool(second.requests)

            await eventually(moved, what="the second engine serves")
            base = f"{url}/rollout/ro-1/attempt/at-1"
            assert (await http.post(base + CHAT, json=HELLO)).status_code == 200
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 20) == 0
    assert list((tmp_path / "spool").iterdir()), "the record waits for the store"


async def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    async with fake_engine() as engine:
        port = engine.url.rsplit(":", 1)[1]
        code, text = await asyncio.to_thread(
            said, "-u", engine.url, "--port", port, "--spool-dir", str(tmp_path)
        )
    assert code == 1
    assert f"127.0.0.1:{port}" in text
    assert "Traceback" not in text
