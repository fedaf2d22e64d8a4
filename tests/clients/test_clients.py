"""Each language's client: built as a user builds it, its own tests, the vectors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.languages import GO, LANGUAGES, run
from tests.conformance.stored import stored_state
from tests.support.store_process import StoreProcess

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

OTHERS = [name for name in LANGUAGES if name != "python"]


@pytest.fixture(scope="module", params=OTHERS)
def language(request: pytest.FixtureRequest) -> str:
    """A language other than Python, its client built."""
    name: str = request.param
    LANGUAGES[name].make()
    return name


def test_its_own_tests_pass(language: str) -> None:
    folder = LANGUAGES[language].folder
    if language == "go":
        run((GO, "vet", "./..."), folder)
        output = run((GO, "test", "-v", "-count=1", "-timeout", "300s", "."), folder)
        assert len(re.findall("^--- PASS", output, re.M)) >= 15
        assert "--- SKIP" not in output
    else:
        output = run(("npm", "test"), folder)
        assert re.search(r" pass [1-9]\d+\n", output)
        assert " fail 0\n" in output
        assert " skipped 0\n" in output


def test_it_replays_every_vector_and_leaves_what_python_leaves(language: str, tmp_path: Path) -> None:
    left: dict[str, Any] = {}
    for name in ("python", language):
        with StoreProcess(tmp_path / f"{name}.db") as store:
            outcomes = LANGUAGES[name].outcomes(store.address)
            assert {vector: outcome for vector, outcome in outcomes.items() if outcome != "ok"} == {}
            left[name] = stored_state(store.address)
    assert left[language] == left["python"]
    assert left["python"]["spans"]["spans"] != []
