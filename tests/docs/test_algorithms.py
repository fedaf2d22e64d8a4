"""The snippets of docs/algorithms.md run as they stand there, and its commands take the options shown."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import yaml
from agl_grpc_cli.main import app
from typer.testing import CliRunner

from agl_grpc import StoreClient
from agl_grpc.model import ModelCall
from agl_grpc.trainer import Trainer
from agl_grpc.trainer.configuration import read_configuration
from tests.support.store_process import StoreProcess

PAGE = Path(__file__).parents[2] / "docs" / "algorithms.md"


def snippets(language: str) -> list[str]:
    """The page's code in a language, in its order."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """All Python of the page, run as it stands there."""
    module = types.ModuleType("docs_algorithms")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for code in snippets("python"):
        exec(compile(code, str(PAGE), "exec"), module.__dict__)
    return module


def test_the_algorithm_in_thirty_lines_finds_the_best_prompt(tmp_path: Path, page: types.ModuleType) -> None:
    trainer = Trainer(algorithm=page.pick_prompt, strategy="shm", run_name="docs", run_dir=tmp_path)
    result = trainer.fit(page.greet, ["Ada", "Grace"])
    assert result.value == "Hi {name}"
    assert [item.step for item in result.history] == [1, 2, 3]


async def test_a_conversation_is_logged_and_judged_twice(tmp_path: Path, page: types.ModuleType) -> None:
    with StoreProcess(tmp_path / "store.db") as server:
        async with StoreClient(server.address) as store:
            await page.log(store, 17, ModelCall(model="served"))
            for value in (1.0, 0.0):
                await page.judge(store, "ticket-17", value)
            (rollout,) = await store.query_rollouts()
            rewards = await store.query_rewards(["ticket-17"], all_revisions=True)
    assert rollout.sealed
    assert [(reward.revision, reward.value) for reward in rewards] == [(1, 1.0), (2, 0.0)]


def test_the_configuration_is_right() -> None:
    (text,) = snippets("yaml")
    found = read_configuration(yaml.safe_load(text))
    assert found.make_trainer().runner_options.concurrency == 32


def test_the_commands_exist_with_the_options_shown() -> None:
    lines = [line.partition("#")[0].split() for line in "".join(snippets("sh")).splitlines()]
    commands = [line for line in lines if line[:1] == ["agl-grpc"]]
    assert len(commands) >= 10
    for _, group, command, *rest in commands:
        shown = CliRunner().invoke(app, [group, command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert shown.exit_code == 0, (group, command)
        if (group, command) in (("train", "fit"), ("train", "start")):
            continue  # any key of the configuration is an option
        for option in (word for word in rest if word.startswith("-")):
            assert option in shown.output, (group, command, option)
