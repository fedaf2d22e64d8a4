"""Graders in processes of their own: one that hangs is killed, and nothing else suffers."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from agl_grpc.grader.base import Grader
from agl_grpc.grader.grade import Grade, GraderFailed, as_grade
from agl_grpc.grader.submission import Submission

_START_SECONDS = 60.0
_EXIT_SECONDS = 5.0


async def graded(grader: Grader, submission: Submission) -> Grade:
    """One try, in this process.

    Raises:
        GraderFailed: whatever went wrong.
    """
    try:
        answer = grader.grade(submission)
        if asyncio.iscoroutine(answer):
            answer = await answer
    except GraderFailed:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        said = f"{type(error).__name__}: {first}" if first else type(error).__name__
        detail = "".join(traceback.format_exception(error))
        raise GraderFailed(f"the grader raised {said}", outcome="raised", detail=detail) from None
    return as_grade(answer)


class GraderProcesses:
    """Processes that grade, at most `size` at once; each serves one submission at a time.

    Args:
        graders: Those that run in them; they are told by their place.
        size: How many.
    """

    def __init__(self, graders: Sequence[Grader | None], size: int) -> None:
        try:
            self._graders = pickle.dumps(list(graders))
        except (ValueError, TypeError, AttributeError, pickle.PicklingError) as error:
            raise GraderFailed(str(error), outcome="not_importable", final=True) from error
        # Forked from a server that has nothing running: quick, and safe beside threads.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["agl_grpc.grader.isolated"])
        self._slots = asyncio.Semaphore(size)
        self._free: list[_Process] = []
        self._all: set[_Process] = set()

    async def grade(self, place: int, submission: Submission, seconds: float) -> Grade:
        """One try of the grader at that place, killed after so many seconds.

        Raises:
            GraderFailed: whatever went wrong; outcome `timeout` or `died` when its process had to go.
        """
        async with self._slots:
            process = self._free.pop() if self._free else await self._new()
            try:
                async with asyncio.timeout(seconds):
                    answer = await process.ask((place, submission))
            except TimeoutError:
                await self._end(process)
                raise GraderFailed(f"the grader took longer than {seconds:g} s", outcome="timeout") from None
            except BaseException:
                await asyncio.shield(self._end(process))
                raise
            if answer is None:
                code = await self._end(process)
                raise GraderFailed(f"the grader's process ended with code {code}", outcome="died")
            self._free.append(process)
        if isinstance(answer, GraderFailed):
            raise answer
        assert isinstance(answer, Grade)
        return answer

    async def close(self) -> None:
        """Kills all processes."""
        await asyncio.gather(*(self._end(process) for process in list(self._all)))

    async def _new(self) -> _Process:
        process = _Process()
        self._all.add(process)
        try:
            async with asyncio.timeout(_START_SECONDS):
                refused = await process.start(self._context, self._graders)
        except BaseException:
            await asyncio.shield(self._end(process))
            raise
        if refused:
            await self._end(process)
            raise GraderFailed(refused, outcome="not_importable", final=True)
        return process

    async def _end(self, process: _Process) -> int | None:
        self._all.discard(process)
        return await process.kill()


class _Process:
    """One process, seen from the worker."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._link: Connection | None = None
        self._answer: asyncio.Future[Any] | None = None

    async def start(self, context: Any, graders: bytes) -> str:
        """Starts it; answers why its graders cannot be loaded, empty = they are."""
        self._link, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(graders, theirs), daemon=True)
        self._answer = asyncio.get_running_loop().create_future()
        await asyncio.to_thread(self._process.start)
        theirs.close()
        asyncio.get_running_loop().add_reader(self._link.fileno(), self._receive)
        refused = await self._answer
        return "the grader's process died while it loaded the graders" if refused is None else str(refused)

    async def ask(self, request: object) -> Any:
        """The answer to a request; None = the process died."""
        assert self._link is not None
        self._answer = asyncio.get_running_loop().create_future()
        try:
            self._link.send(request)
        except OSError:
            return None
        return await self._answer

    async def kill(self) -> int | None:
        """Kills the process and all that it started; answers its exit code."""
        if self._link is not None and not self._link.closed:
            asyncio.get_running_loop().remove_reader(self._link.fileno())
            self._link.close()
        process = self._process
        if process is None or process.pid is None:
            return None
        code = process.exitcode
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()
        await asyncio.to_thread(process.join, _EXIT_SECONDS)
        return process.exitcode if code is None else code

    def _receive(self) -> None:
        assert self._link is not None
        try:
            message = self._link.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._link.fileno())
            message = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(message)


def _serve(graders: bytes, link: Connection) -> None:
    """The process: loads the graders and judges what comes, until the worker closes the pipe."""
    from agl_grpc.runner.parent import signal_when_parent_dies

    os.setsid()  # whatever a grader starts is killed with it
    signal_when_parent_dies(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        loaded: list[Grader] = pickle.loads(graders)
    except Exception as error:
        link.send(f"the graders cannot be loaded: {type(error).__name__}: {error}")
        return
    link.send("")
    with asyncio.Runner() as runner:
        while True:
            try:
                place, submission = link.recv()
            except (EOFError, OSError):
                break
            try:
                answer: Any = runner.run(graded(loaded[place], submission))
            except GraderFailed as error:
                answer = error
            link.send(answer)
    os._exit(0)
