"""Figures, files, reports and comparisons of evaluations that were made before."""

from __future__ import annotations

import re
from pathlib import Path

import orjson
import pytest

from agl_grpc.evaluation import (
    Answered,
    Evaluation,
    EvaluationError,
    TaskResult,
    compare,
    describe,
    write_report,
)


def make(name: str, rewards: list[list[float | None]], *, failure: str = "infrastructure") -> Evaluation:
    """Each list is a task; None is a rollout that says nothing of the model."""
    tasks = tuple(
        TaskResult(
            number,
            f"task-{number}",
            "easy" if number % 2 else "hard",
            tuple(
                Answered(f"{number}.{at}", reward, answer=None if reward is None else str(reward))
                if reward is not None
                else Answered(f"{number}.{at}", None, failure=failure, message="<b>it | broke</b>")
                for at, reward in enumerate(given)
            ),
        )
        for number, given in enumerate(rewards)
    )
    return Evaluation(name=name, samples=len(rewards[0]), tasks=tasks, ks=(1, 2))


def test_failures_of_others_are_in_no_mean() -> None:
    found = make("m", [[1.0, 0.0], [1.0, None], [None, None]])
    assert found.mean == pytest.approx(0.75)
    assert found.failures == {"infrastructure": 3}
    assert found.figures.pass_at == {1: pytest.approx(0.75), 2: 1.0}
    assert found.figures.left_out == {1: 1, 2: 2}
    assert found.figures.majority == pytest.approx(0.75)
    assert found.figures.voted == 2
    assert found.sources["easy"].mean == 1.0
    assert found.sources["hard"].failures == {"infrastructure": 2}
    assert "3 failed: infrastructure 3" in describe(found)


def test_a_file_holds_everything(tmp_path: Path) -> None:
    found = make("m", [[1.0, 0.0], [1.0, None]])
    found.write(tmp_path / "evaluation.json")
    assert Evaluation.read(tmp_path) == found
    assert orjson.loads((tmp_path / "evaluation.json").read_bytes())["summary"]["mean"] == 0.75


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("[]", "no evaluation of format 1"), ('{"format": 1}', "is not whole: 'tasks'")],
)
def test_other_files_are_refused_in_one_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(EvaluationError, match=message) as raised:
        Evaluation.read(tmp_path)
    assert "\n" not in str(raised.value)
    with pytest.raises(EvaluationError, match="cannot be read: No such file"):
        Evaluation.read(tmp_path / "none.json")


def test_tasks_are_matched_by_content_and_the_verdict_is_a_sentence() -> None:
    first = make("before", [[0.0, 0.0]] * 8 + [[0.0, 1.0]])
    second = make("after", [[1.0, 1.0]] * 8)
    found = compare(first, second)
    assert (found.total.tasks, found.total.better, found.only_in_one) == (8, 8, 1)
    assert found.total.p_value == pytest.approx(2 / 2**8)
    assert found.sentence.startswith("after is 1.000 better than before (mean reward over 8 shared tasks")
    assert "chance hardly explains (1 tasks that only one" in found.sentence
    assert set(found.sources) == {"easy", "hard"}
    assert "may well explain" in compare(make("a", [[0.0]] * 3), make("b", [[1.0]] * 3)).sentence
    assert "b and a are equal" in compare(make("a", [[1.0]]), make("b", [[1.0]])).sentence


def test_reports_hold_figures_pictures_and_no_markup_of_others(tmp_path: Path) -> None:
    evaluations = [make("<i>a</i>", [[0.0, None], [1.0, 0.0]]), make("b", [[1.0, 1.0], [1.0, 0.0]])]
    assert write_report(tmp_path, evaluations, compare(*evaluations)) == []
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    write_report(tmp_path / "again", evaluations, compare(*evaluations))
    assert (tmp_path / "again" / "report.html").read_text() == page
    assert page.count("<svg") == 4
    for whole in (page, text):
        assert "&lt;i&gt;a&lt;/i&gt;" in whole
        assert "<b>" not in whole
        assert "b is 0.500 better than" in whole
    assert not re.search(r"(?:src|href)=\"http", page)
    pictures = re.findall(r"\]\((\w+\.svg)\)", text)
    assert len(pictures) == 4
    assert all((tmp_path / name).is_file() for name in pictures)
    assert r"it \| broke" in text
