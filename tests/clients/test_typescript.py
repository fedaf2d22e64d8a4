"""The TypeScript client: built as a user builds it, its own tests, the vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conformance.languages import LANGUAGES, Language, run
from tests.conformance.stored import stored_state
from tests.support.store_process import StoreProcess

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def typescript() -> Language:
    """The client, built."""
    language = LANGUAGES["typescript"]
    language.make()
    return language


def test_its_own_tests_pass(typescript: Language) -> None:
    output = run(("npm", "test"), typescript.folder)
    assert " fail 0\n" in output
    assert " skipped 0\n" in output
    assert " pass 0\n" not in output


def test_it_replays_every_vector_and_leaves_what_python_leaves(typescript: Language, tmp_path: Path) -> None:
    left: dict[str, Any] = {}
    for name in ("python", "typescript"):
        with StoreProcess(tmp_path / f"{name}.db") as store:
            outcomes = LANGUAGES[name].outcomes(store.address)
            assert {vector: outcome for vector, outcome in outcomes.items() if outcome != "ok"} == {}
            left[name] = stored_state(store.address)
    assert left["typescript"] == left["python"]
    assert left["python"]["spans"]["spans"] != []
