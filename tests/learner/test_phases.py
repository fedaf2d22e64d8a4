"""Phases of a step: deadlines and errors of workers, without verl; Ray stands aside."""

from __future__ import annotations

import sys
import threading
from types import ModuleType
from typing import Any

import pytest

from agl_grpc.learner.errors import DeadlineError, LearnerError, MemoryExhaustedError, WorkerError
from agl_grpc.learner.phases import phase


class RayTaskError(Exception):
    """What Ray raises for an error in a worker."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"ray::WorkerDict()\n  Traceback of many lines\n{cause}")
        self.cause = cause


class RayActorError(Exception):
    """What Ray raises for a worker that died."""


@pytest.fixture(autouse=True)
def ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's names, of which a phase knows a few."""
    module, exceptions = ModuleType("ray"), ModuleType("ray.exceptions")
    exceptions.__dict__.update(
        RayTaskError=RayTaskError, RayActorError=RayActorError, OutOfMemoryError=type("O", (Exception,), {})
    )
    module.__dict__.update(
        exceptions=exceptions, wait=lambda refs, **_: ([each for each in refs if "well" in each], refs[:1])
    )
    monkeypatch.setitem(sys.modules, "ray", module)
    monkeypatch.setitem(sys.modules, "ray.exceptions", exceptions)


class Method:
    """A remote method; what it gives is waited for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def remote(self) -> str:
        return self._name


class Worker:
    def __init__(self, name: str) -> None:
        self.get_cuda_visible_devices = Method(name)


class Group:
    def __init__(self, *workers: Worker) -> None:
        self.workers = workers


class Trainer:
    """What a phase asks of the trainer, and a phase."""

    def __init__(self, work: Any, seconds: float = 60.0) -> None:
        self._work, self._seconds = work, seconds

    def deadline_of(self, key: str) -> float:
        assert key == "compute"
        return self._seconds

    def worker_groups(self) -> dict[str, Any]:
        stuck, well = Worker("stuck"), Worker("well")
        # Colocated roles share their workers: each is named once.
        return {"actor": Group(stuck, well), "critic": Group(stuck, well)}

    @phase("updating the actor", "compute")
    def update(self) -> Any:
        return self._work()


def fails(error: BaseException) -> Any:
    def work() -> None:
        raise error

    return work


def test_a_phase_answers_what_its_method_answers() -> None:
    assert Trainer(lambda: 7).update() == 7


def test_a_phase_that_waits_for_ever_ends_and_names_who_is_silent() -> None:
    waiting = Trainer(threading.Event().wait, seconds=0.05)
    with pytest.raises(DeadlineError) as caught:
        waiting.update()
    assert str(caught.value) == (
        "updating the actor took longer than 0.05 s (deadlines.compute); no answer from actor rank 0"
    )


def test_a_phase_within_a_phase_leaves_the_outer_one_its_deadline() -> None:
    within = Trainer(lambda: 7)

    def work() -> None:
        assert within.update() == 7
        threading.Event().wait()

    with pytest.raises(DeadlineError, match=r"longer than 0\.2 s"):
        Trainer(work, seconds=0.2).update()


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            RayTaskError(RuntimeError("CUDA out of memory. Tried 2 GiB\nmore")),
            MemoryExhaustedError,
            "out of memory while updating the actor: RuntimeError: CUDA out of memory. Tried 2 GiB;",
        ),
        (RayTaskError(MemoryError()), MemoryExhaustedError, "MemoryError"),
        (
            RayTaskError(KeyError("x")),
            WorkerError,
            "a worker of verl failed while updating the actor: KeyError",
        ),
        (RayTaskError(LearnerError("mine")), LearnerError, "mine"),
        (RayActorError("The actor died."), WorkerError, "a worker of verl died while updating the actor"),
    ],
)
def test_errors_of_workers_are_one_line(error: Exception, kind: type[LearnerError], words: str) -> None:
    with pytest.raises(kind) as caught:
        Trainer(fails(error)).update()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_errors_and_interrupts_come_through() -> None:
    with pytest.raises(ZeroDivisionError):
        Trainer(fails(ZeroDivisionError())).update()
    with pytest.raises(KeyboardInterrupt):
        Trainer(fails(KeyboardInterrupt())).update()


def test_in_another_thread_errors_are_translated_too() -> None:
    found: list[BaseException] = []

    def run() -> None:
        try:
            Trainer(fails(RayActorError("gone"))).update()
        except WorkerError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(found) == 1
