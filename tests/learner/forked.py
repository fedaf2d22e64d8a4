"""Work in a process that is forked from this one: it begins with everything imported, and may be killed."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TypeVar

T = TypeVar("T")

CONTEXT = multiprocessing.get_context("fork")


class EndedError(Exception):
    """The process ended without an answer; ``code`` is its exit code, after a signal the negative number."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"the forked process ended with {code}; what it said of it stands above")
        self.code = code


def in_fork(work: Callable[[], T]) -> T:
    """What ``work`` answers in a process of its own.

    This process neither joins Ray nor computes: of their threads, a forked one has the locks and nobody to
    release them. Those of numpy's and pyarrow's libraries have an answer to being forked.

    Raises:
        EndedError: ``work`` raised, or its process was killed.
    """
    assert threading.active_count() == 1, f"cannot be forked with {threading.enumerate()}"
    reading, writing = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_answer, args=(work, writing))
    process.start()
    writing.close()
    answer = b""
    # The end of the pipe is that of a process that has not answered.
    with reading, suppress(EOFError):
        answer = reading.recv_bytes()
    process.join()
    if process.exitcode != 0 or not answer:
        raise EndedError(process.exitcode)
    found: T = pickle.loads(answer)
    return found


def _answer(work: Callable[[], object], writing: Connection) -> None:
    # Pickled here: the connection's own way, as torch changes it, leaves tensors in this process's memory.
    writing.send_bytes(pickle.dumps(work()))
    writing.close()
