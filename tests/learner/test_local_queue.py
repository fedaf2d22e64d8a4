"""The queue of rows in the trainer's memory: it answers as verl's TransferQueue, and feeds verl's workers."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.support.environments import learner_environment, learner_python

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """What the script found out, made once: it starts Ray."""
    command = [learner_python(), "-m", "tests.learner.queue_script"]
    done = subprocess.run(
        command, env=learner_environment(), capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_it_answers_as_the_transfer_queue_does(answers: dict[str, Any]) -> None:
    local = answers["local"]
    assert local == answers["verls"]
    assert local["second"]["advantages"] == ["jagged", [[0.0, 0.0], [1.0, 1.0], [2.0], [9.0, 9.0, 9.0]]]
    assert "values" not in local["second"]
    assert local["texts"][0] == ["g.s0.n3", "g.s0.n2", "g.s0.n1", "g.s0.n0"]
    assert local["left"] == ["g.s0_2_0", "g.s0_3_0"]


def test_workers_get_their_ranks_tensors_and_nothing_else(answers: dict[str, Any]) -> None:
    found = answers["workers"]
    assert [part["responses"][1] for part in found["seen"]] == [[[0, 1, 2], [10]], [[20, 21], [30, 31]]]
    assert {part["at"] for part in found["seen"]} == {0.5}
    names = {"input_ids", "loss_mask", "position_ids", "prompts", "response_mask", "responses"}
    assert set(found["seen"][0]) == {*names, "at"}
    assert found["uneven"] == "3 rows cannot be shared by 4 ranks"


def test_what_workers_compute_is_put_beside_the_rows(answers: dict[str, Any]) -> None:
    found = answers["workers"]
    expected = ["jagged", [[0.25] * length for length in (5, 3, 4, 4)]]
    assert found["same_batch"]
    assert found["log_probs"] == found["waited"] == expected
    assert found["metrics"] == {"loss": 1.0}


def test_columns_of_every_kind_arrive_as_they_were_sent(answers: dict[str, Any]) -> None:
    found = answers["shipped"]
    assert found["came"] == found["sent"] == found["all_rows"]
    assert found["sent"]["gaps"][1] == [[0.0], [2.0], [4.0], [6.0]]
    assert found["padded"] == [4, 2]
    assert found["kwargs"] == {"shuffle": False}
    assert found["types"] == ["torch.bfloat16", 3]
    assert found["turned"] == [[3.0], [1.0, 2.0], [], [0.5]]


def test_rows_that_are_not_there_are_named(answers: dict[str, Any]) -> None:
    assert answers["errors"] == [
        "keys are not in partition 'train': ['g.s9_0_0']",
        "field 'values' is not there for all of 4 rows",
        "a put into the queue needs fields or tags",
        "4 keys were put with 2 rows of fields",
    ]
