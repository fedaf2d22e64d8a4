"""What a sandbox stops, each by its name; against the real bwrap."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from agl_grpc.grader import CommandGrader, GraderFailed, Limits, Sandbox, Submission
from agl_grpc.grader.sandbox import BWRAP_VARIABLE

PYTHON = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
TIGHT = Limits(wall_seconds=20, cpu_seconds=1, memory_mib=256, processes=16, output_kib=64, file_mib=2)
BOX = Sandbox(limits=TIGHT)


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("import os\nwhile True: os.fork()", "process_limit"),
        ("x = bytearray(1 << 30)", "memory_limit"),
        ("while True: pass", "cpu_limit"),
        ("import socket; socket.create_connection(('127.0.0.1', 22), 5)", "no_network"),
        ("import socket; socket.create_connection(('192.0.2.1', 80), 5)", "no_network"),
        ("while True: print('x' * 10_000)", "output_limit"),
        ("open('/etc/agl-grpc-was-here', 'w')", "read_only"),
        ("open('big', 'wb').write(bytes(4 << 20))", "file_limit"),
        ("raise SystemExit(3)", "exit_code"),
    ],
)
async def test_what_goes_too_far_is_stopped_by_name(program: str, outcome: str) -> None:
    done = await BOX.run([PYTHON, "-c", program])
    assert done.outcome == outcome, done
    assert len(done.stdout) <= 64 << 10
    assert not _exists("/etc/agl-grpc-was-here")


async def test_what_sleeps_is_stopped_by_the_wall_clock_and_leaves_nothing() -> None:
    box = Sandbox(limits=Limits(wall_seconds=1.0))
    done = await box.run(["sh", "-c", "sleep 987654 & sleep 987654"])
    assert done.outcome == "wall_limit"
    assert _who_says(b"987654") == []


def _exists(path: str) -> bool:
    return Path(path).exists()


def _who_says(word: bytes) -> list[Path]:
    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if word in _read(path)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has just ended
        return b""


async def test_inside_are_its_files_and_nothing_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGL_SECRET", "do not tell")
    program = "import os; print(open('a.txt').read(), sorted(os.listdir('/tmp')), 'AGL_SECRET' in os.environ)"
    done = await BOX.run([PYTHON, "-c", program], files={"a.txt": b"mine"})
    assert done.outcome == "ok", done
    assert done.stdout == b"mine ['work'] False\n"
    with pytest.raises(ValueError, match="plain name"):
        await BOX.run(["true"], files={"../a": b""})


async def test_without_bwrap_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BWRAP_VARIABLE, "/nowhere/bwrap")
    grader = CommandGrader("true")
    with pytest.raises(GraderFailed, match="install bubblewrap"):
        await grader.open()
    with pytest.raises(GraderFailed, match="install bubblewrap"):
        await BOX.run(["true"])
    assert (await Sandbox("none").run(["true"])).outcome == "ok"


async def test_a_command_grades_what_it_reads() -> None:
    program = (
        "import json,sys; s=json.load(sys.stdin);"
        "print(json.dumps({'value': s['response']=='4', 'notes': {'mode': s['mode']}}))"
    )
    grader = CommandGrader([PYTHON, "-c", program], name="check", sandbox=BOX)
    await grader.open()
    grade = await grader.grade(Submission(response="4", mode="train"))
    assert (grade.value, grade.notes) == (1.0, {"mode": "train"})


@pytest.mark.parametrize(
    ("command", "outcome"),
    [("echo four", "not_a_grade"), ("false", "exit_code"), ("echo NaN", "not_a_grade")],
)
async def test_a_command_that_gives_no_grade_fails(command: str, outcome: str) -> None:
    with pytest.raises(GraderFailed) as caught:
        await CommandGrader(command, sandbox=BOX).grade(Submission(response="4"))
    assert caught.value.outcome == outcome


def test_limits_are_positive() -> None:
    with pytest.raises(ValueError, match="processes is 0"):
        Limits(processes=0)
    assert os.environ.get(BWRAP_VARIABLE)
