"""A learner that follows another waits for its scores, by which both keep the checkpoint of the same step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from agl_grpc.learner.errors import ConfigError, DeadlineError
from agl_grpc.learner.stopping import Waits
from agl_grpc.learner.store_link import StoreLink
from agl_grpc.learner.training_run import TrainingRun
from agl_grpc.learner.validation import SCORE, FollowedValidation
from agl_grpc.model.enums import TrainingRunStatus
from tests.support.store_process import StoreProcess

LEADER = "leader"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with StoreProcess(tmp_path_factory.mktemp("store") / "store.db") as store:
        yield store.address


class Following:
    """One that follows a training run; its wait goes on in a thread of its own."""

    def __init__(self, link: StoreLink, leader: str, deadline: float = 60.0) -> None:
        self.waits = Waits(link)
        self.noted: list[tuple[int, float]] = []
        self._validation = FollowedValidation(link, leader, self._note, waits=self.waits, deadline=deadline)
        self._answers: list[tuple[dict[str, float], bool]] = []

    def _note(self, step: int, score: float) -> bool:
        self.noted.append((step, score))
        return score > 0.4

    def run(self, step: int) -> tuple[dict[str, float], bool]:
        return self._validation.run(step, iter(()))

    def begin(self, step: int) -> threading.Thread:
        thread = threading.Thread(target=lambda: self._answers.append(self.run(step)))
        thread.start()
        return thread

    def end(self, thread: threading.Thread) -> tuple[dict[str, float], bool]:
        thread.join(60.0)
        return self._answers.pop()


@pytest.fixture
def link(address: str) -> Iterator[StoreLink]:
    with closing(StoreLink(address, "default")) as opened:
        yield opened


def test_a_score_is_waited_for_also_while_the_leader_is_away(link: StoreLink) -> None:
    leader = TrainingRun.acquire(link, LEADER)
    leader.report(2, {SCORE: 0.25})
    leader.finish(TrainingRunStatus.STOPPED)
    following = Following(link, LEADER)
    assert following.run(2) == ({SCORE: 0.25}, False)
    waiting = following.begin(4)
    leader = TrainingRun.acquire(link, LEADER)
    leader.report(3, {SCORE: 0.75})
    assert waiting.is_alive()
    leader.report(4, {"reward/mean": 0.0, SCORE: 0.5})
    assert following.end(waiting) == ({SCORE: 0.5}, True)
    assert following.noted == [(2, 0.25), (4, 0.5)]
    # Nobody could be judged: nothing is kept for it.
    leader.report(6, {"reward/mean": 0.0})
    assert following.run(6) == ({}, False)
    assert len(following.noted) == 2


def test_a_stop_ends_the_wait_and_every_later_one(link: StoreLink) -> None:
    TrainingRun.acquire(link, "silent")
    following = Following(link, "silent")
    waiting = following.begin(1)
    following.waits.release()
    assert following.end(waiting) == ({}, False)
    assert following.run(2) == ({}, False)


def test_a_leader_that_does_not_report_is_named_and_before_training_nobody_is_asked(link: StoreLink) -> None:
    TrainingRun.acquire(link, "mute")
    with pytest.raises(DeadlineError, match=r"training run mute, .* did not report step 7 .* within 0.2 s"):
        Following(link, "mute", 0.2).run(7)
    with pytest.raises(ConfigError, match=r"set trainer.val_before_train in the run that leads"):
        Following(link, "mute").run(0)
