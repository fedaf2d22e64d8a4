"""Judges that a real engine plays: a model of random weights, held to the form of a verdict."""

from __future__ import annotations

import pytest

from agl_grpc.grader import Submission
from agl_grpc.grader.judge import Criterion, PairwiseJudge, RubricJudge
from tests.interceptor.engine import Engine
from tests.interceptor.scripted_store import ScriptedStore

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


async def test_verdicts_of_a_real_model(running: Engine, store: ScriptedStore) -> None:
    before = len(store.spans)
    endpoint = f"{running.url}/v1"
    submission = Submission(input={"question": "1 + 1", "answer": "2"}, response="3")
    criteria = [Criterion("right", "the sum is right"), Criterion("short", "nothing else is said")]
    rubric = RubricJudge("tiny", criteria, endpoint=endpoint, structured=True, max_tokens=700)
    pairwise = PairwiseJudge("tiny", endpoint=endpoint, structured=True, max_tokens=700, task="question")
    scored = await rubric.grade(submission)
    compared = await pairwise.grade(submission)
    await rubric.close()
    await pairwise.close()
    assert set(scored.components) == {"right", "short"}
    assert 0.0 <= scored.value <= 1.0
    assert compared.value in (0.0, 0.5, 1.0, 0.25, 0.75)
    assert scored.notes["usage"]["completion_tokens"] > 0
    # A judge's calls belong to no attempt: nothing of them was captured to be trained.
    assert len(store.spans) == before
