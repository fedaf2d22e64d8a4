"""Which tasks count, mixtures, and the order by solve rate."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from agl_grpc.dataset import (
    Curriculum,
    CurriculumRules,
    DatasetError,
    expression,
    mix,
    open_dataset,
    select,
    task_key,
)
from tests.dataset.test_reading import write_jsonl

TASKS = [{"question": f"q{number}", "level": number % 4} for number in range(20)]


def even(task: Any) -> bool:
    """Named by an import path."""
    return bool(task["level"] % 2 == 0)


def test_tasks_are_kept_by_expression_or_function() -> None:
    kept = select(TASKS, keep="level > 2 and len(question) < 4")
    assert list(kept) == [task for task in TASKS if task["level"] > 2]  # type: ignore[operator]  # an int
    assert list(select(TASKS, keep=even, limit=3)) == [TASKS[0], TASKS[2], TASKS[4]]
    assert select(["a", "bb"], keep="len(task) > 1")[0] == "bb"


def test_repeated_tasks_are_left_out_by_normalised_content() -> None:
    tasks = [{"q": "Was  ist\n1+1?", "id": 1}, {"id": 2, "q": "was ist 1+1? "}, {"q": "other", "id": 3}]
    assert len(select(tasks, deduplicate=True)) == 3
    assert [task["id"] for task in select(tasks, deduplicate=["q"])] == [1, 3]
    assert task_key({"a": 1, "b": "X"}) == task_key({"b": " x", "a": 1})
    assert task_key({"a": 1}) != task_key({"a": "1"})


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"require": ["answer"]}, "task 0 of file: the field 'answer' is missing; it has question, level"),
        ({"keep": "levle > 1"}, "task 0 of file: 'levle > 1': name 'levle' is not defined; a task has"),
        ({"keep": "level >"}, "'level >' is not an expression"),
        ({"keep": "1 / level"}, "task 0 of file: '1 / level': ZeroDivisionError"),
        ({"keep": "__import__('os')"}, "name '__import__' is not defined"),
        ({"keep": "level > 9"}, "no task of file is left: 20 were looked at"),
        ({"deduplicate": ["id"]}, "task 0 of file: a task has no field 'id'"),
    ],
)
def test_what_cannot_be_judged_is_named(rules: dict[str, Any], words: str) -> None:
    with pytest.raises(DatasetError, match=words.replace("(", r"\(").replace(")", r"\)")):
        select(TASKS, **rules, name="file")


def test_a_mapping_says_it_all_as_in_a_file(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "maths.jsonl", TASKS))
    other = str(write_jsonl(tmp_path / "code.jsonl", [{"question": "c"}] * 10))
    tasks = open_dataset({"path": path, "filter": "level == 1", "limit": 2})
    assert [task["question"] for task in tasks] == ["q1", "q5"]
    spec = {"mix": [{"path": path, "weight": 3}, {"path": other, "source": "py"}], "size": 40}
    mixed = open_dataset(spec)
    assert Counter(task["data_source"] for task in mixed) == {"maths": 30, "py": 10}
    # A dataset that has to give more than it has gives all of it before anything twice.
    counts = Counter(task["question"] for task in mixed if task["data_source"] == "maths")
    assert len(counts) == 20
    assert max(counts.values()) == 2
    assert list(mixed) == list(open_dataset(spec))
    assert list(mixed) != list(open_dataset({**spec, "seed": 1}))
    for wrong, words in (
        ({"path": path, "fliter": "1"}, "unknown key 'fliter'; known: path, filter"),
        ({"filter": "1"}, "names no path"),
        ({"mix": [{"path": path, "weight": 0}]}, "the weight of 'maths' is 0"),
    ):
        with pytest.raises(DatasetError, match=words):
            open_dataset(wrong)


def test_without_a_size_no_task_is_used_twice() -> None:
    mixed = mix([("a", list(range(30)), 1.0), ("b", list(range(100, 110)), 1.0)])
    assert len(mixed) == 20
    assert len(set(mixed)) == 20


def test_number_of_rollouts_is_an_expression() -> None:
    rule = expression("8 if level > 2 else 4")
    assert [rule(task) for task in TASKS[:4]] == [4, 4, 4, 8]


RULES = CurriculumRules(enabled=True, outside=0.1)


def test_a_curriculum_prefers_what_is_solved_sometimes() -> None:
    order = Curriculum(300, RULES, seed=3)
    for task in range(300):
        order.observe(task, ([0.0] * 4, [1.0] * 4, [0.0, 1.0, 0.0, 1.0])[task % 3])
    taken = Counter(order.take() % 3 for _ in range(3000))
    # Of 12 tasks 10 in the middle, and one of each of the others, about.
    assert taken[2] == pytest.approx(2500, abs=120)
    assert taken[0] == pytest.approx(250, abs=80)
    assert order.metrics()["curriculum/preferred"] == pytest.approx(1 / 3)


def test_a_curriculum_goes_on_bit_for_bit_from_its_state() -> None:
    def life(order: Curriculum, steps: int) -> list[int]:
        taken = []
        for _ in range(steps):
            taken.append(order.take())
            order.observe(taken[-1], [float(taken[-1] % 2), 1.0, 0.3])
        return taken

    whole = Curriculum(17, RULES, seed=5)
    first, second = life(whole, 40), life(whole, 60)
    half = Curriculum(17, RULES, seed=5)
    assert life(half, 40) == first
    resumed = Curriculum(17, RULES, seed=5)
    resumed.restore(half.state())
    assert life(resumed, 60) == second
    assert resumed.state() == whole.state()
    assert life(Curriculum(17, RULES, seed=6), 40) != first
    with pytest.raises(DatasetError, match="saved with 17 tasks and seed 5, and this run has 18 tasks"):
        Curriculum(18, RULES, seed=5).restore(half.state())


def test_what_was_observed_of_an_undone_step_is_taken_back() -> None:
    order = Curriculum(5, RULES)
    order.observe(2, [1.0])
    before, state = order.look([2, 3]), order.state()
    order.observe(2, [0.0] * 50)
    order.observe(3, [0.0])
    assert order.rate(2) == pytest.approx(0.0, abs=0.1)
    order.put_back(before)
    assert order.state() == state


def test_old_rollouts_fade() -> None:
    order = Curriculum(1, CurriculumRules(memory=8))
    order.observe(0, [0.0] * 100)
    for _ in range(5):
        order.observe(0, [1.0] * 8)
    assert (order.rate(0) or 0) > 0.9


@pytest.mark.parametrize("wrong", [{"low": 0.9}, {"outside": 0.0}, {"memory": 0}])
def test_rules_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        CurriculumRules(**wrong)
