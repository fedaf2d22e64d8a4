"""`VERL(models=…)`: what each model has of its own, which engines serve them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agl_grpc.algorithm import VERL, BestOfN
from agl_grpc.algorithm.several import LORA_RANK, ModelSettings, Served
from agl_grpc.learner.dotted import setting
from agl_grpc.learner.errors import ConfigError
from agl_grpc.learner.run_config import TrainedTokens, load

PATH = "actor_rollout_ref.model.path"
LEARNING_RATE = "actor_rollout_ref.actor.optim.lr"
TWO: dict[str, Any] = {"planner": {}, "solver": {}}


@pytest.fixture
def base(tmp_path: Path) -> str:
    (tmp_path / "base").mkdir()
    return str(tmp_path / "base")


def test_each_model_has_the_keys_of_all_and_its_own_before_them(base: str) -> None:
    config = {"actor_rollout_ref": {"model": {"path": base}, "actor": {"optim": {"lr": 1e-3}}}}
    own = {"config": {LEARNING_RATE: 1e-5}, "visible_devices": "1", "samples": {"truncated": "drop"}}
    verl = VERL(config, models={"planner": {}, "solver": own}, seed=3, trajectories=0)
    planner, solver = verl.of_each_model().values()
    assert [one.model_name for one in (planner, solver)] == ["planner", "solver"]
    assert planner.model_path == solver.model_path == base
    assert [setting(one.config, LEARNING_RATE) for one in (planner, solver)] == [1e-3, 1e-5]
    assert (planner.visible_devices, solver.visible_devices) == ("", "1")
    assert (planner.samples, solver.samples) == (TrainedTokens(), TrainedTokens(truncated="drop"))
    assert (planner.seed, planner.trajectories) == (solver.seed, solver.trajectories) == (3, 0)


def test_what_is_said_later_of_all_reaches_each(base: str) -> None:
    verl = VERL({PATH: base}, models={"planner": ModelSettings(), "solver": None})
    verl.set_seed(11)
    assert [one.seed for one in verl.of_each_model().values()] == [11, 11]


def test_one_model_is_what_it_was(base: str) -> None:
    verl = VERL({PATH: base}, model_name="mine")
    assert verl.of_each_model() == {"mine": verl}
    assert verl.served() == [Served(base, "mine")]


def test_rejection_sampling_trains_several_models_too(base: str) -> None:
    for one in BestOfN({PATH: base}, models=TWO, n=6, keep=2).of_each_model().values():
        assert (one.name, one.best_of.keep) == ("best_of_n", 2)
        assert setting(one.config, "actor_rollout_ref.rollout.n") == 6


def test_adapters_of_a_base_share_an_engine_and_whole_models_have_their_own(base: str) -> None:
    adapters = VERL({PATH: base, LORA_RANK: 8}, models=TWO)
    assert adapters.served() == [Served(base, "base", ("planner", "solver"))]
    assert VERL({PATH: base}, models=TWO).served() == [Served(base, "planner"), Served(base, "solver")]
    third = {"critic": {"config": {PATH: "/elsewhere", LORA_RANK: 0}}}
    assert VERL({PATH: base, LORA_RANK: 8}, models={**TWO, **third}, model_name="shared").served() == [
        Served(base, "shared", ("planner", "solver")),
        Served("/elsewhere", "critic"),
    ]


def test_the_first_leads_and_the_others_follow_it(base: str, tmp_path: Path) -> None:
    parts: dict[str, dict[str, Any]] = {
        "planner": {"followers": ["solver"]},
        "solver": {"follows": "tr-planner"},
    }
    planner, solver = (
        load(
            str(
                one.write_run(
                    tmp_path / name,
                    run_id="r",
                    training_run_id=f"tr-{name}",
                    train_dataset=[1],
                    more={"trainer.test_freq": -1},
                    **parts[name],
                )
            )
        )
        for name, one in VERL({PATH: base}, models=TWO).of_each_model().items()
    )
    assert (planner.followers, planner.follows) == (("solver",), "")
    assert (solver.followers, solver.follows) == ((), "tr-planner")
    assert (planner.model.name, solver.model.name) == ("planner", "solver")
    assert setting(solver.verl, "trainer.test_freq") == -1


@pytest.mark.parametrize(
    ("models", "options", "config", "message"),
    [
        ({}, {}, {}, "models must name the trained models"),
        (["planner"], {}, {}, "models must name the trained models"),
        ({"a/b": {}}, {}, {}, "'a/b' cannot be a model's name"),
        ({"planner": "lr"}, {}, {}, "models.planner must be a mapping"),
        ({"planner": {"config": 5}}, {}, {}, "models.planner.config must be a mapping"),
        ({"planner": {"lr": 5}}, {}, {}, "unknown key 'models.planner.lr'"),
        ({"planner": {"engines": {"size": 2}}}, {}, {}, "unknown key 'models.planner.engines.size'"),
        (
            {"planner": {}, "solver": {"config": {"data": {"train_batch_size": 2}}}},
            {},
            {},
            "models.solver.config sets data, which is one for all models",
        ),
        (
            {"planner": {"config": {"trainer.total_training_steps": 2}}},
            {},
            {},
            "models.planner.config sets trainer.total_training_steps, which is one for all",
        ),
        (
            TWO,
            {"ray_address": "auto"},
            {"transfer_queue.enable": True},
            "transfer_queue.enable: .* has room for one TransferQueue, and the learners of planner, solver",
        ),
        (TWO, {"curriculum": {"enabled": True}}, {}, "a curriculum is not possible"),
        (
            TWO,
            {},
            {"algorithm": {"filter_groups": {"enable": True}}},
            "algorithm.filter_groups is not possible",
        ),
        ({"planner": {}, "base": {}}, {}, {LORA_RANK: 4}, "is served as 'base', and so is another model"),
        (TWO, {"model_name": "solver"}, {LORA_RANK: 4}, "is served as 'solver', and so is another model"),
        (
            {"planner": {}, "solver": {"config": {LORA_RANK: 4}}},
            {},
            {},
            "'solver' is an adapter of .*base, whose weights 'planner' trains",
        ),
        ({"planner": {"config": {PATH: 5}}}, {}, {}, "models.planner: the verl configuration names no model"),
    ],
)
def test_what_cannot_be_trained_together_is_refused_in_a_line(
    base: str, models: Any, options: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        VERL({PATH: base, **config}, models=models, **options)
    assert "\n" not in str(caught.value)
