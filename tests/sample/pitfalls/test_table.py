"""The page of pitfalls names tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
PAGE = REPOSITORY / "docs" / "pitfalls.md"


def functions(file: Path) -> set[str]:
    """Names of a module's functions."""
    nodes = ast.walk(ast.parse(file.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_pitfall_has_tests_and_every_test_named_is_there() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    assert [int(row[0]) for row in rows] == list(range(1, 33))
    for number, _, tests in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
        assert named, f"pitfall {number} names no test"
        for file, name in named:
            assert name in functions(REPOSITORY / file), f"pitfall {number}: {file} has no {name}"
