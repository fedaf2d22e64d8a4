"""Parts are watched, restarted and ended, with whatever they started, also when the trainer is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from agl_grpc.client import StoreClient
from agl_grpc.trainer import commands
from agl_grpc.trainer.errors import PartDied
from agl_grpc.trainer.processes import Command, Part, child_environment, describe_exit
from agl_grpc.trainer.run_folder import RunFolder
from agl_grpc.trainer.stack import Stack
from agl_grpc.trainer.sweep import marked
from tests.support.waiting import eventually, free_port

# Starts a grandchild in a session of its own, says its id, and waits.
_PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("child", child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def stack(said: list[str]) -> Iterator[Stack]:
    made = Stack(said.append, grace=5.0)
    yield made
    made.close()


def python_part(stack: Stack, folder: Path, code: str, name: str = "learner") -> Callable[[], Part]:
    command = [sys.executable, "-c", code]
    return lambda: Command(name, command, folder / f"{name}.log", stack.mark, child_environment())


async def test_a_part_that_dies_stops_what_waits_and_shows_its_last_lines(
    stack: Stack, tmp_path: Path
) -> None:
    stack.bind()
    stack.start(python_part(stack, tmp_path, "print('the disk is full'); raise SystemExit(3)"))
    with pytest.raises(PartDied, match=r"learner exited with code 3; its log is .*learner\.log") as caught:
        await stack.until(asyncio.sleep(60))
    assert "  | the disk is full" in str(caught.value)


async def test_a_part_that_ends_well_is_waited_for(stack: Stack, tmp_path: Path) -> None:
    stack.bind()
    stack.start(python_part(stack, tmp_path, "print('done')"), may_end=True)
    assert await stack.until(stack.ended("learner")) == 0


async def test_a_bad_end_is_a_death_also_for_whoever_waits_for_the_end(stack: Stack, tmp_path: Path) -> None:
    stack.bind()
    stack.start(python_part(stack, tmp_path, "raise SystemExit(4)"), may_end=True)
    with pytest.raises(PartDied, match="learner exited with code 4"):
        await stack.until(stack.ended("learner"))


async def test_several_learners_end_before_their_engines(stack: Stack, tmp_path: Path) -> None:
    stack.bind()
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); "
    code += "print('there', flush=True); time.sleep(600)"
    parts = [
        stack.start(python_part(stack, tmp_path, code, name=name))
        for name in ("engine-base", "learner-planner", "learner-solver", "store")
    ]
    for part in parts:
        await eventually(part.tail, what=part.name)
    assert stack.has("learner-solver")
    assert not stack.has("learner")
    await asyncio.to_thread(stack.close)
    # Each was asked to end, and did.
    assert [part.code for part in parts] == [0, 0, 0, 0]


async def test_exit_code_0_is_a_death_where_no_end_is_expected(stack: Stack, tmp_path: Path) -> None:
    stack.bind()
    stack.start(python_part(stack, tmp_path, "print('bye')", name="engine"))
    with pytest.raises(PartDied, match="engine exited with code 0"):
        await stack.until(asyncio.sleep(60))


async def test_close_ends_detached_grandchildren_too(stack: Stack, tmp_path: Path) -> None:
    stack.bind()
    part = stack.start(python_part(stack, tmp_path, _PARENT))
    line = await eventually(lambda: part.tail(), what="the grandchild")
    grandchild = int(line.split()[1])
    assert psutil.pid_exists(grandchild)
    assert stack.close() >= 1
    assert not list(marked(stack.mark))
    assert not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE


async def test_a_part_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    said: list[str] = []
    stack = Stack(said.append, grace=0.5)
    stack.bind()
    code = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(600)
"""
    part = stack.start(python_part(stack, tmp_path, code))
    await eventually(lambda: part.tail(), what="the start")
    stack.close()
    assert part.code == -signal.SIGKILL
    assert said == ["learner did not end within 0.5 s and is killed"]


async def test_a_killed_store_comes_back_with_everything(
    stack: Stack, said: list[str], tmp_path: Path
) -> None:
    stack.bind()
    port = free_port()
    folder = RunFolder(tmp_path / "run")
    stack.start(lambda: commands.store_part(folder, port, stack.mark), restart=True)
    async with StoreClient(f"127.0.0.1:{port}") as client:
        await stack.until(client.get_server_info())
        stack.ready("store")
        for _ in range(2):
            rollout = await client.enqueue_rollout({"number": 1})
            first = stack.part("store")
            os.kill(first.pid, signal.SIGKILL)
            await eventually(lambda old=first: stack.part("store") is not old, what="the restart")
            found = await stack.until(client.get_rollout_by_id(rollout.rollout_id))
            assert found is not None
            assert found.input == {"number": 1}
    assert stack.restarts == 2
    assert said == ["store was killed by SIGKILL; starting it again"] * 2


async def test_a_store_that_cannot_start_says_why(stack: Stack, tmp_path: Path) -> None:
    stack.bind()
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.database.write_bytes(
        b"this is no database, and it is long enough to be read as a broken one" * 100
    )
    stack.start(lambda: commands.store_part(folder, free_port(), stack.mark), restart=True)
    with pytest.raises(PartDied, match="store exited with code 1"):
        await stack.until(asyncio.sleep(60))


def test_the_guard_ends_everything_when_the_trainer_is_killed(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from agl_grpc.trainer.processes import Command, child_environment
from agl_grpc.trainer.stack import Stack
stack = Stack(print)
command = [sys.executable, "-c", "import time; time.sleep(600)"]
log = Path({str(tmp_path / "part.log")!r})
stack.start(lambda: Command("learner", command, log, stack.mark, child_environment()))
print(stack.mark, flush=True)
time.sleep(600)
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    mark = trainer.stdout.readline().strip()
    assert [process.name() for process in marked(mark)], "the part runs"
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    wait = eventually(lambda: not list(marked(mark)), within=30, what="the guard's work")
    asyncio.run(wait)


@pytest.mark.parametrize(
    ("code", "text"), [(0, "exited with code 0"), (-9, "was killed by SIGKILL"), (None, "still runs")]
)
def test_exits_are_described(code: int | None, text: str) -> None:
    assert describe_exit(code) == text
