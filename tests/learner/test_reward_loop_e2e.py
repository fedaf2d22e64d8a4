"""verl's own reward workers judge submissions as graders do: real verl, real Ray, a scripted reward model."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.environments import REPOSITORY, learner_python
from tests.support.scripted_scores import ScriptedScores

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("rewards")
    with ScriptedScores(lambda text: float(len(text))) as model:
        done = subprocess.run(
            [learner_python(), "-m", "tests.learner.reward_script", str(folder), model.endpoint],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=360,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        yield {**json.loads(done.stdout.splitlines()[-1]), "asked": model.asked, "folder": str(folder)}


def test_a_custom_function_judges_and_its_numbers_are_components(outcomes: dict[str, Any]) -> None:
    # A number beside the score is a component, all else is a note.
    assert outcomes["right"] == {
        "value": 2.0,
        "components": {"acc": 1.0},
        "notes": {"source": "default", "task": "a"},
    }
    assert outcomes["verls_form"]["value"] == 0.0
    assert outcomes["verls_form"]["notes"] == {"source": "maths", "task": "b"}


def test_a_reward_model_is_asked_for_the_whole_conversation(outcomes: dict[str, Any]) -> None:
    # What verl makes of it with the model's chat template: prompt and answer.
    assert outcomes["asked"] == [(f"{outcomes['folder']}/model", "t3t4t5t6")]
    assert outcomes["scored"]["value"] == len("t3t4t5t6")


@pytest.mark.parametrize(
    ("name", "outcome", "words"),
    [
        ("raises", "raised", "LookupError: no such truth"),
        ("nan", "not_finite", "it must be finite"),
        ("no_answer", "no_answer", "no answer with tokens was captured"),
    ],
)
def test_what_is_no_score_is_a_failure_of_the_grader(
    name: str, outcome: str, words: str, outcomes: dict[str, Any]
) -> None:
    assert outcomes[name]["outcome"] == outcome
    assert words in outcomes[name]["said"]


def test_rewards_are_verls_only_where_its_keys_say_so(outcomes: dict[str, Any]) -> None:
    # Workers of ours; then those of verl's trainer, which has none.
    assert outcomes["nothing"] == [None, 0, False]
    assert outcomes["custom"] == outcomes["old_names"] == [1, 0, False]
    assert outcomes["versions"] == 3  # another content of the function's file is another version


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("without_engine", "name it in reward_endpoint"),
        ("without_model", "set reward.reward_model.enable=True"),
        ("missing", "verl's reward workers do not start: "),
    ],
)
def test_mistakes_are_one_line(name: str, words: str, outcomes: dict[str, Any]) -> None:
    assert words in outcomes[name]
    assert "\n" not in outcomes[name]
