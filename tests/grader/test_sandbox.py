"""Programs under limits: what they may do, what stops them, and what commands answer as graders."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

import psutil
import pytest

from agl_grpc.grader import CommandGrader, GraderFailed, Limits, Sandbox, Submission
from agl_grpc.grader.library import UnitTests
from tests.support.waiting import eventually

SMALL = Limits(cpu_seconds=1, memory_bytes=128 << 20, processes=16, output_bytes=10_000, file_bytes=1 << 20)
PYTHON = [sys.executable, "-I", "-c"]

BOMB = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""


async def test_a_program_reads_writes_and_ends() -> None:
    program = "import sys; open('/box/a', 'w').write('x'); print(sys.stdin.read(), open('/box/given').read())"
    ended = await Sandbox().run([*PYTHON, program], seconds=60, stdin=b"hello", files={"given": b"file"})
    assert (ended.outcome, ended.code, ended.stdout) == ("exited", 0, b"hello file\n")


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("while True: pass", "cpu_limit"),
        ("x = []\nwhile True: x.append(b'x' * 1_000_000)", "memory_limit"),
        ("x = bytes(10 ** 11)", "memory_limit"),
        (BOMB, "process_limit"),
        ("while True: print('x' * 1000)", "output_limit"),
        ("with open('/box/x', 'wb') as f:\n while True: f.write(b'x' * 65536)", "file_limit"),
    ],
)
async def test_what_takes_too_much_is_stopped(program: str, outcome: str) -> None:
    # A file over the limit is an error in Python, which leaves SIGXFSZ alone only by its default.
    program = f"import signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n{program}"
    ended = await Sandbox(SMALL).run([*PYTHON, program], seconds=60)
    assert ended.outcome == outcome, ended
    assert len(ended.stdout) <= SMALL.output_bytes


async def test_nothing_outlives_the_time_out() -> None:
    marker = f"sleep-{id(object())}"
    command = ["sh", "-c", f"(exec -a {marker} sleep 1000) & sleep 1000"]
    ended = await Sandbox(SMALL).run(["bash", *command[1:]], seconds=0.5)
    assert ended.outcome == "timeout"
    assert not [one for one in psutil.process_iter(["cmdline"]) if marker in (one.info["cmdline"] or [])]


async def test_a_cancelled_run_leaves_nothing_behind() -> None:
    task = asyncio.create_task(Sandbox().run(["sh", "-c", "exec sleep 1234.5"], seconds=60))
    await eventually(_sleeping, what="the program")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not _sleeping()


def _sleeping() -> bool:
    return any((one.info["cmdline"] or []) == ["sleep", "1234.5"] for one in psutil.process_iter(["cmdline"]))


async def test_there_is_no_network_unless_it_is_asked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        refused = await Sandbox().run([*PYTHON, program], seconds=60)
        allowed = await Sandbox(network=True).run([*PYTHON, program], seconds=60)
    assert (refused.code, allowed.code) == (1, 0)
    assert "Connection refused" in refused.tail


async def test_nothing_of_the_machine_is_seen_or_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "1")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "shown").write_text("shown")
    sandbox = Sandbox(readable=[tmp_path / "shown"], environment={"GIVEN": "2"})
    script = f"cat {tmp_path}/secret; cat {tmp_path}/shown; echo $SECRET$GIVEN; ls /proc | grep -c '^[0-9]'"
    seen = await sandbox.run(["sh", "-c", script], seconds=60)
    assert seen.stdout.splitlines()[0] == b"shown2"
    assert int(seen.stdout.splitlines()[1]) <= 5
    for place in ("/usr/x", "/etc/x", f"{tmp_path}/shown", "/proc/sys/kernel/hostname", "/box/given"):
        ended = await sandbox.run(["sh", "-c", f"echo x > {place}"], seconds=60, files={"given": b""})
        assert ended.code, place
    assert (tmp_path / "shown").read_text() == "shown"


async def test_a_machine_without_the_sandbox_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGL_GRPC_BWRAP", str(tmp_path / "none"))
    with pytest.raises(GraderFailed, match="apt-get install bubblewrap") as caught:
        await CommandGrader("true", name="command").open()
    assert (caught.value.outcome, caught.value.final) == ("sandbox", True)
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: Creating new namespace failed' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("AGL_GRPC_BWRAP", str(broken))
    with pytest.raises(GraderFailed, match="does not work here: bwrap: Creating new namespace failed"):
        await Sandbox().check()
    with pytest.raises(GraderFailed, match="what the sandbox shall read is not there: /none"):
        await Sandbox(readable=["/none"]).check()


LENGTH = "import json, sys; print('said'); print(json.dumps({form}))"


@pytest.mark.parametrize("sandbox", ["bubblewrap", "none"])
async def test_a_command_grades(sandbox: str) -> None:
    form = "{'value': len(json.load(sys.stdin)['response']), 'components': {'a': 1}, 'notes': {'b': 'c'}}"
    grader = CommandGrader([*PYTHON, LENGTH.format(form=form)], name="length", sandbox=sandbox)  # type: ignore[arg-type] # one of both
    await grader.open()
    grade = await grader.grade(Submission(input={"q": 1}, response="four"))
    assert (grade.value, grade.components, grade.notes) == (4.0, {"a": 1.0}, {"b": "c"})


@pytest.mark.parametrize(
    ("program", "outcome", "message"),
    [
        ("import sys; sys.exit('no such thing')", "command", "exited with code 1: no such thing"),
        ("pass", "not_a_grade", "wrote no grade"),
        ("print('well done')", "not_a_grade", "last line is no grade in JSON: 'well done'"),
        ("print('NaN')", "not_finite", "a value that is nan"),
        ("print('null')", "not_a_grade", "of type NoneType"),
        ("print('{\"notes\": {}}')", "not_a_grade", "lacks a value"),
        ("import os; os.abort()", "signalled", "was ended by signal 6"),
        ("import time; time.sleep(1000)", "timeout", "did not end in time"),
    ],
)
async def test_a_command_that_gives_no_grade_has_failed(program: str, outcome: str, message: str) -> None:
    timeout = 1.0 if outcome == "timeout" else 60.0
    grader = CommandGrader([*PYTHON, program], name="command", timeout=timeout)
    with pytest.raises(GraderFailed, match=message) as caught:
        await grader.grade(Submission(response=""))
    assert caught.value.outcome == outcome


ADD = "```python\ndef add(a, b):\n    return a + b\n```"
TESTS = ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'", "assert add(1, 1) == 3, 'two'"]


async def test_unit_tests_decide() -> None:
    good, all_of_them = {"tests": TESTS[:2]}, {"tests": TESTS}
    assert (await UnitTests().grade(Submission(input=good, response=ADD))).value == 1.0
    found = await UnitTests().grade(Submission(input=all_of_them, response=ADD))
    assert (found.value, found.notes) == (0.0, {"reason": "AssertionError: two", "passed": 2, "tests": 3})
    part = await UnitTests(partial=True).grade(Submission(input=all_of_them, response=ADD))
    assert part.value == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("import sys; sys.exit(0)", "the program ended before its tests"),
        ("import os; os._exit(0)", "the program ended before its tests"),
        ("return", "SyntaxError: 'return' outside function"),
        ("while True: pass", "the command did not end in time"),
        ("x = bytes(10 ** 11)", "the command took more memory than it may: MemoryError"),
        ("", "the response holds no program"),
    ],
)
async def test_programs_that_pass_no_test(answer: str, reason: str) -> None:
    grader = UnitTests(seconds=1.0 if "while" in answer else 60.0)
    found = await grader.grade(Submission(input={"tests": TESTS[0]}, response=answer))
    assert (found.value, found.notes["reason"]) == (0.0, reason)


async def test_tests_that_are_none_are_the_graders_failure() -> None:
    for tests in ([], "", [1], {"a": 1}):
        with pytest.raises(GraderFailed, match="is neither a test nor a list of tests"):
            await UnitTests().grade(Submission(input={"tests": tests}, response=ADD))
