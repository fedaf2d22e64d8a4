"""The ready-made graders: right and wrong answers, answers that are none, references that cannot be."""

from __future__ import annotations

import asyncio
import json
import pickle
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agl_grpc.grader import Grade, Grader, GraderFailed, Submission, library
from agl_grpc.grader.library import (
    ExactMatch,
    JsonSchema,
    Maths,
    Numeric,
    RegularExpression,
    SqlMatch,
    find_answer,
)
from agl_grpc.grader.library.numbers import read_number
from agl_grpc.grader.library.sql import is_ordered

PEOPLE = (
    "CREATE TABLE people (name TEXT, age INTEGER);"
    "INSERT INTO people VALUES ('Ada', 36), ('Grace', 85), ('Edsger', 72);"
)


def verdict(grader: Grader, task: Any, response: str) -> Grade:
    answer = grader.grade(Submission(input=task, response=response))
    assert isinstance(answer, Grade)
    return answer


def value(grader: Grader, task: Any, response: str) -> float:
    return verdict(grader, task, response).value


@pytest.mark.parametrize(
    ("extract", "response", "found"),
    [
        ("all", " 4 \n", "4"),
        ("all", " \n", None),
        ("last_line", "I think\nit is 4\n", "it is 4"),
        ("boxed", r"so \boxed{1} or \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        ("boxed", r"so \boxed{1", None),
        ("boxed", "so 1", None),
        ("fence", "first\n```sql\nSELECT 1\n```\nno:\n```\nSELECT 2\n```", "SELECT 2"),
        ("fence", "SELECT 1", None),
        ("number", "from 1,234.5 to -3e2.", "-3e2"),
        ("number", "none at all.", None),
        (r"#### (\S+)", "#### 3\n#### 4 apples", "4"),
        (r"\d", "1 2", "2"),
        (r"\d", "none", None),
    ],
)
def test_where_an_answer_stands(extract: str, response: str, found: str | None) -> None:
    assert find_answer(response, extract) == found


def test_exact_match_with_what_makes_no_difference() -> None:
    assert value(library.exact_match, {"answer": "New York"}, "new  york") == 1.0
    assert value(library.exact_match, {"answer": "New York"}, "New York.") == 0.0
    squad = ExactMatch(ignore=("case", "space", "punctuation", "articles"))
    assert value(squad, {"answer": "The Beatles"}, "beatles!") == 1.0
    assert value(ExactMatch(ignore=()), {"answer": "A"}, "a") == 0.0
    assert value(library.exact_match, {"answer": ["colour", "color"]}, "Color") == 1.0
    nested = ExactMatch(reference="truth.text")
    assert value(nested, {"truth": {"text": 4}}, "4") == 1.0
    assert value(ExactMatch(reference=""), "4", "4") == 1.0
    found = verdict(library.exact_match, {"answer": "4"}, "")
    assert (found.value, found.notes["reason"]) == (0.0, "no answer was found in the response")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42.0),
        ("-1,234.50", -1234.5),
        ("3/4", 0.75),
        ("1/0", None),
        ("12%", 12.0),
        ("$ 5.", 5.0),
        ("\u22127", -7.0),
        ("1e-3", 0.001),
        ("1e999", None),
        ("1,23", None),
        ("four", None),
        ("", None),
        ("-", None),
        ("nan", None),
    ],
)
def test_numbers_as_people_write_them(text: str, number: float | None) -> None:
    assert read_number(text) == number


@given(st.floats(-1e300, 1e300), st.floats(-1e-7, 1e-7))
def test_numbers_are_equal_within_the_tolerance(number: float, share: float) -> None:
    assert value(library.numeric, {"answer": number}, f"it is {number!r}") == 1.0
    assert value(library.numeric, {"answer": number}, repr(number * (1 + share))) == 1.0


def test_a_number_outside_the_tolerance_is_wrong() -> None:
    assert value(library.numeric, {"answer": "1,000"}, "so 1000.01") == 0.0
    assert value(Numeric(absolute=0.1), {"answer": "1,000"}, "so 1000.01") == 1.0
    assert value(library.numeric, {"answer": 4}, "I do not know") == 0.0


@pytest.mark.parametrize(
    ("wanted", "response", "right"),
    [
        (r"\frac{1}{2}", "The answer is $0.5$", True),
        ("x^2+2x+1", "$(x+1)^2$", True),
        ("3", r"first 2, then \boxed{3}", True),
        (r"\{1,2\}", r"$\{2,1\}$", True),
        ("3", "$4$", False),
        ("3", "no idea", False),
    ],
)
def test_mathematics(wanted: str, response: str, right: bool) -> None:
    assert value(library.maths, {"answer": wanted}, response) == float(right)


def test_structured_answers() -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    grader = JsonSchema(schema)
    assert value(grader, {}, '{"a": 1}') == 1.0
    assert value(grader, {}, 'Here:\n```json\n{"a": 1}\n```') == 1.0
    found = verdict(grader, {}, '{"a": "x"}')
    assert (found.value, found.notes["errors"]) == (0.0, ["$.a: 'x' is not of type 'integer'"])
    assert value(grader, {}, "{") == value(grader, {}, "NaN") == value(grader, {}, "[" * 100_000) == 0.0
    assert value(library.json_schema, {"schema": schema}, '{"a": 2}') == 1.0


def test_expressions() -> None:
    assert value(RegularExpression(r"\d+ apples"), {}, "I have 3 apples.") == 1.0
    assert value(RegularExpression(r"\d+ apples", whole=True), {}, "I have 3 apples.") == 0.0
    assert value(library.regular_expression, {"pattern": "^yes"}, "yes") == 1.0


@pytest.mark.parametrize(
    ("query", "right", "reason"),
    [
        ("SELECT name FROM people WHERE age > 40", 1.0, None),
        ("```sql\nSELECT name AS n FROM people WHERE age >= 72 ORDER BY 1\n```", 1.0, None),
        ("SELECT name FROM people", 0.0, "the result is another one"),
        ("SELECT name, age FROM people WHERE age > 40", 0.0, "it has 2 columns instead of 1"),
        ("SELECT nme FROM people", 0.0, "the query fails: no such column: nme"),
        ("DELETE FROM people", 0.0, "the query fails: not authorized"),
        ("ATTACH '/tmp/x' AS x", 0.0, "the query fails: not authorized"),
        ("PRAGMA journal_mode = DELETE", 0.0, "the query fails: not authorized"),
        (
            "SELECT load_extension('x')",
            0.0,
            "the query fails: not authorized to use function: load_extension",
        ),
        ("SELECT 1; SELECT 2", 0.0, "the query fails: You can only execute one statement at a time."),
        ("", 0.0, "the response holds no query"),
    ],
)
def test_queries(query: str, right: float, reason: str | None) -> None:
    task = {"database": PEOPLE, "query": "SELECT name FROM people WHERE age > 40"}
    found = verdict(library.sql_match, task, query)
    assert (found.value, found.notes.get("reason")) == (right, reason)


def test_the_order_of_rows_counts_where_the_reference_says_it() -> None:
    task = {"database": PEOPLE, "query": "SELECT name FROM people ORDER BY age"}
    assert value(library.sql_match, task, "SELECT name FROM people ORDER BY age ASC") == 1.0
    found = verdict(library.sql_match, task, "SELECT name FROM people ORDER BY age DESC")
    assert (found.value, found.notes["reason"]) == (0.0, "the rows are right and their order is not")
    assert is_ordered("SELECT a FROM t ORDER  BY a")
    assert not is_ordered("SELECT 'order by' FROM (SELECT a FROM t ORDER BY (a)) -- order by a")


def test_a_query_without_an_end_is_stopped() -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    task = {"database": PEOPLE, "query": "SELECT 1"}
    assert verdict(SqlMatch(seconds=0.1), task, endless).notes["reason"] == "the query fails: interrupted"
    many = endless.replace("count(*)", "i") + " LIMIT 200000"
    assert verdict(SqlMatch(), task, many).notes["reason"] == "the query fails: it has more than 100,000 rows"


def test_a_database_on_disk_stays_as_it_is(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "people.db")) as connection:
        connection.executescript(PEOPLE)
    before = (tmp_path / "people.db").read_bytes()
    task = {"database": "people.db", "query": "SELECT count(*) FROM people"}
    grader = SqlMatch(folder=str(tmp_path))
    assert value(grader, task, "SELECT 3") == 1.0
    assert value(grader, task, "DROP TABLE people") == 0.0
    assert (tmp_path / "people.db").read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["people.db"]


@pytest.mark.parametrize(
    ("grader", "task", "outcome", "message"),
    [
        (library.exact_match, {"question": 1}, "no_reference", "the task has no 'answer'.*there is question"),
        (library.exact_match, "text", "no_reference", "there is str"),
        (library.exact_match, {"answer": None}, "no_reference", "the task's 'answer' is null"),
        (library.exact_match, {"answer": []}, "bad_reference", "is an empty list"),
        (library.numeric, {"answer": "many"}, "bad_reference", "'many' is no number"),
        (library.numeric, {"answer": float("nan")}, "bad_reference", "nan is no number"),
        (library.maths, {"answer": ""}, "bad_reference", "'' is no expression"),
        (library.regular_expression, {"pattern": "("}, "bad_reference", "is no regular expression"),
        (library.regular_expression, {"pattern": 3}, "bad_reference", "3 is no regular expression"),
        (library.json_schema, {"schema": 3}, "bad_reference", "is a int, not a JSON schema"),
        (library.json_schema, {"schema": {"type": "x"}}, "bad_reference", "is no JSON schema: "),
        (
            library.json_schema,
            {"schema": {"$ref": "http://127.0.0.1:9/x"}},
            "bad_reference",
            "refers to what is not there",
        ),
        (library.sql_match, {"query": "SELECT 1", "database": "none.db"}, "bad_reference", "is not there"),
        (library.sql_match, {"query": "SELEC", "database": PEOPLE}, "bad_reference", "query fails"),
        (library.sql_match, {"query": "1", "database": "CREATE x"}, "bad_reference", "of the database fails"),
    ],
)
def test_a_reference_that_cannot_be_is_the_graders_failure(
    grader: Grader, task: Any, outcome: str, message: str
) -> None:
    with pytest.raises(GraderFailed, match=message) as caught:
        verdict(grader, task, '{"a": "4"}')
    assert (caught.value.outcome, caught.value.final) == (outcome, True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExactMatch(extract="("), "extract '\\('"),
        (lambda: ExactMatch(ignore=("spaces",)), "ignore=\\['spaces'\\] is not known"),
        (lambda: Numeric(relative=-1), "relative tolerance is -1"),
        (lambda: RegularExpression("("), "is no regular expression"),
        (lambda: SqlMatch(seconds=0), "seconds is 0"),
    ],
)
def test_options_that_cannot_be_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_they_look_for_what_they_need_and_travel_to_other_processes() -> None:
    for grader in (Maths(), JsonSchema({"type": "object"}), SqlMatch(), ExactMatch(), Numeric()):
        asyncio.run(grader.open())
        again = pickle.loads(pickle.dumps(grader))
        assert json.dumps(vars(again), default=sorted) == json.dumps(vars(grader), default=sorted)
    with pytest.raises(GraderFailed, match="is no JSON schema"):
        asyncio.run(JsonSchema({"type": "x"}).open())
