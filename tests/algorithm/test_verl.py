"""The VERL algorithm writes a run that the learner reads, and functions become algorithms."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import Any

import pytest

from agl_grpc.algorithm import VERL, Algorithm, BestOfN, algo
from agl_grpc.algorithm.reporting import SilentReporter
from agl_grpc.client import StoreClient
from agl_grpc.learner.errors import ConfigError
from agl_grpc.learner.run_config import BestOf, EngineConfig, load
from agl_grpc.learner.supervised.selection import Judged, best_of_groups
from agl_grpc.model.rollout import RolloutConfig


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "tiny").mkdir()
    return str(tmp_path / "tiny")


@pytest.mark.parametrize("form", ["nested", "dotted", "mixed"])
def test_a_written_run_is_read_back_whole(tmp_path: Path, model: str, form: str) -> None:
    config: dict[str, Any] = {
        "nested": {"actor_rollout_ref": {"model": {"path": model}}},
        "dotted": {"actor_rollout_ref.model.path": model},
        "mixed": {"actor_rollout_ref": {"model.path": model}},
    }[form]
    verl = VERL(
        config, engines=EngineConfig(count=2), rollouts=RolloutConfig(timeout_seconds=30, max_attempts=2)
    )
    path = verl.write_run(
        tmp_path / "run",
        run_id="r",
        training_run_id="tr",
        train_dataset=[{"question": "1+1"}, "plain text"],
        val_dataset=[3],
    )
    run = load(str(path))
    assert run.model.name == "tiny"
    assert run.engines.count == 2
    assert run.rollouts == RolloutConfig(timeout_seconds=30, max_attempts=2)
    assert run.verl == config
    assert Path(run.train_tasks).read_text().splitlines() == ['{"question":"1+1"}', '"plain text"']
    assert Path(run.val_tasks).read_text() == "3\n"


def test_mistakes_are_named(tmp_path: Path, model: str) -> None:
    with pytest.raises(ConfigError, match=r"set actor_rollout_ref\.model\.path"):
        VERL({"trainer": {}})
    with pytest.raises(ConfigError, match="does not exist"):
        VERL(tmp_path / "none.yaml")
    verl = VERL({"actor_rollout_ref.model.path": model})
    with pytest.raises(ConfigError, match="task 1 cannot be written"):
        verl.write_run(tmp_path, run_id="r", training_run_id="t", train_dataset=[1, object()])


def test_a_function_gets_what_it_asks_for() -> None:
    @algo
    def mine(train_dataset: Any, initial_resources: Any) -> Any:
        return train_dataset, initial_resources

    mine.set_initial_resources({"prompt": 1})
    assert isinstance(mine, Algorithm)
    assert not mine.is_async()
    assert mine.run([1, 2]) == ([1, 2], {"prompt": 1})
    with pytest.raises(TypeError, match="takes no val_dataset"):
        mine.run([1], [2])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_name_is_filled(asynchronous: bool) -> None:
    def plain(
        store: Any,
        train_dataset: Any,
        val_dataset: Any,
        llm_proxy: Any,
        adapter: Any,
        initial_resources: Any,
        reporter: Any,
        own: int = 7,
    ) -> list[Any]:
        return [store, train_dataset, val_dataset, llm_proxy, adapter, initial_resources, reporter, own]

    @functools.wraps(plain)
    async def coroutine(**given: Any) -> list[Any]:
        return plain(**given)

    mine = algo(coroutine if asynchronous else plain)
    store, reporter = StoreClient("127.0.0.1:1"), SilentReporter()
    mine.set_store(store)
    mine.set_llm_proxy("proxy")
    mine.set_adapter("adapter")
    mine.set_initial_resources({"prompt": 1})
    mine.set_reporter(reporter)
    assert mine.is_async() is asynchronous
    made = mine.run([1], [2])
    filled = asyncio.run(made) if asynchronous else made
    assert filled == [store, [1], [2], "proxy", "adapter", {"prompt": 1}, reporter, 7]


def test_a_function_may_not_ask_for_unknown_things() -> None:
    with pytest.raises(TypeError, match="asks for 'moon'"):

        @algo
        def mine(moon: Any) -> None: ...


async def test_an_async_function_is_an_async_algorithm() -> None:
    @algo
    async def mine(train_dataset: Any) -> int:
        return len(train_dataset)

    assert mine.is_async()
    assert await mine.run([1, 2, 3]) == 3


def test_best_of_n_is_a_run_of_the_learner_with_the_best_kept(tmp_path: Path, model: str) -> None:
    config = {"actor_rollout_ref": {"model": {"path": model}, "rollout": {"n": 2}}}
    best = BestOfN(config, n=8, keep=2, min_reward=0.5, epochs=3, seed=4)
    run = load(str(best.write_run(tmp_path / "r", run_id="r", training_run_id="t", train_dataset=[1])))
    assert (run.best_of, run.algorithm, run.seed) == (BestOf(keep=2, min_reward=0.5), "best_of_n", 4)
    assert run.verl["actor_rollout_ref.rollout.n"] == 8
    assert run.verl["actor_rollout_ref.actor.ppo_epochs"] == 3
    run = load(
        str(VERL(config).write_run(tmp_path / "v", run_id="v", training_run_id="t", train_dataset=[1]))
    )
    assert (run.best_of.keep, run.algorithm) == (0, "verl")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"keep": 0}, "keep is 0; it must be 1 or more"),
        ({"n": 2, "keep": 3}, "keep is 3, and a task has only n=2"),
        ({"epochs": 0}, "epochs is 0"),
    ],
)
def test_best_of_n_refuses_numbers_without_meaning(arguments: dict[str, int], words: str, model: str) -> None:
    with pytest.raises(ValueError, match=words):
        BestOfN({"actor_rollout_ref.model.path": model}, **arguments)


def test_the_best_of_every_group_are_chosen_by_hand() -> None:
    rewards = {"a": [0.2, 1.0, 1.0, 0.9], "b": [0.1, 0.4]}
    judged = [
        Judged(f"{group}{number}", group, reward)
        for group, found in rewards.items()
        for number, reward in enumerate(found)
    ]
    assert best_of_groups(judged, 2, 0.3) == ["a1", "a2", "b1"]
    assert best_of_groups(judged, 1, 0.0) == ["a1", "b1"]
    assert best_of_groups(judged, 0, 0.9) == ["a1", "a2", "a3"]
