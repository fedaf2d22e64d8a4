"""A component may be given as an instance, a class, a factory, an import path or a dict."""

from __future__ import annotations

from typing import Any

import pytest

from agl_grpc.learner.dotted import setting
from agl_grpc.trainer.components import build
from agl_grpc.trainer.errors import TrainerError
from agl_grpc.trainer.options import RunnerOptions, options
from agl_grpc.trainer.strategy import STRATEGIES, ClientServerExecutionStrategy, ExecutionStrategy


class Tool:
    def __init__(self, size: int = 1, colour: str = "grey") -> None:
        self.size, self.colour = size, colour


def big_tool() -> Tool:
    return Tool(9)


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        (Tool(3), 3),
        (Tool, 1),
        (big_tool, 9),
        (f"{__name__}:big_tool", 9),
        (f"{__name__}.Tool", 1),
        ({"type": f"{__name__}:Tool", "size": 4}, 4),
        ({"type": Tool, "size": 5}, 5),
        ("short", 1),
    ],
)
def test_every_form_makes_the_component(spec: Any, size: int) -> None:
    made = build("tool", spec, Tool, registry={"short": Tool})
    assert isinstance(made, Tool)
    assert made.size == size


def test_none_stays_none_and_defaults_reach_only_constructors_that_name_them() -> None:
    assert build("tool", None, Tool) is None
    made = build("tool", {"type": Tool, "size": 2}, Tool, defaults={"colour": "red", "size": 7, "weight": 1})
    assert made is not None
    assert (made.size, made.colour) == (2, "red")


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("no.such.module:Tool", "there is no module 'no'"),
        (f"{__name__}:Hammer", "has no 'Hammer'"),
        ({"size": 1}, "has no 'type'"),
        ({"type": Tool, "length": 1}, "length"),
        (int, "must be a Tool"),
        (5, "neither a class nor a factory"),
    ],
)
def test_what_cannot_be_used_is_named(spec: Any, part: str) -> None:
    with pytest.raises(TrainerError, match=part):
        build("tool", spec, Tool)


def test_strategies_have_short_names_and_check_their_role() -> None:
    made = build("strategy", "cs", ExecutionStrategy, registry=STRATEGIES)
    assert isinstance(made, ClientServerExecutionStrategy)
    only_workers = build("strategy", {"type": "cs", "role": "runner"}, ExecutionStrategy, registry=STRATEGIES)
    assert only_workers is not None
    assert (only_workers.runs_algorithm, only_workers.runs_workers) == (False, True)
    with pytest.raises(TrainerError, match="none of algorithm, runner, both"):
        build("strategy", {"type": "cs", "role": "boss"}, ExecutionStrategy, registry=STRATEGIES)


def test_options_from_a_dict_name_what_is_unknown() -> None:
    assert options("runner", {"concurrency": 3}, RunnerOptions).concurrency == 3
    with pytest.raises(TrainerError, match=r"runner: .*'workers'"):
        options("runner", {"workers": 3}, RunnerOptions)


@pytest.mark.parametrize(
    "config", [{"a": {"b": {"c": 1}}}, {"a.b.c": 1}, {"a.b": {"c": 1}}, {"a": {"b.c": 1}}]
)
def test_settings_are_found_nested_and_dotted(config: dict[str, Any]) -> None:
    assert setting(config, "a.b.c") == 1
    assert setting(config, "a.b.x", 5) == 5
