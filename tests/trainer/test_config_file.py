"""`agl-grpc train fit FILE --key value`: the same as the Python API, by names; mistakes name the key."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from agl_grpc.algorithm import APO, VERL, BestOfN
from agl_grpc.learner.dotted import setting
from agl_grpc.model import PromptTemplate, ProxyLLM
from agl_grpc.trainer.config_file import fit_from_file, load_configuration
from agl_grpc.trainer.errors import TrainerError
from agl_grpc.trainer.strategy import ClientServerExecutionStrategy

AGENT = "tests.trainer.agents:halver"


def test_a_file_trains_and_overrides_come_first(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"number": 2}\n\n{"number": 4}\n')
    config = tmp_path / "run.toml"
    config.write_text(
        f"""
agent = "{AGENT}"
algorithm = "tests.trainer.agents:summing"
train_dataset = "{tasks}"
run_name = "from-file"
run_dir = "{tmp_path}"
strategy = "shm"
[runner]
concurrency = 2
"""
    )
    result = fit_from_file(config, ["--run-name", "named"])
    assert result.value == 3.0
    assert result.folder.path == tmp_path / "named"


def _write(tmp_path: Path, data: dict[str, Any]) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"agent": AGENT, **data}))
    return path


def test_components_resources_and_options_get_their_types(tmp_path: Path) -> None:
    (tmp_path / "prompt.jinja").write_text("{{ question }}")
    path = _write(
        tmp_path,
        {
            "algorithm": {"type": "apo", "beam_width": 3, "rollouts": {"timeout_seconds": 5}},
            "strategy": {"type": "cs", "n_runners": 2},
            "llm_proxy": {"endpoint": "http://127.0.0.1:1/v1", "model": "m"},
            "initial_resources": {
                "prompt": {"template": "{question}"},
                "other": {"template_file": str(tmp_path / "prompt.jinja"), "engine": "jinja"},
            },
        },
    )
    found = load_configuration(path, ["--algorithm.beam_width=2", "--algorithm.diversity_temperature", "0"])
    trainer = found.make_trainer()
    assert isinstance(trainer.algorithm, APO)
    assert isinstance(trainer.strategy, ClientServerExecutionStrategy)
    assert trainer.strategy.n_runners == 2
    assert isinstance(trainer.llm, ProxyLLM)
    assert trainer.initial_resources["other"] == PromptTemplate(template="{{ question }}", engine="jinja")
    shown = yaml.safe_load(found.text)
    assert shown["algorithm"]["type"] == "apo"
    assert shown["algorithm"]["beam_width"] == 2
    assert shown["algorithm"]["branch_factor"] == 4
    # What is printed can be read again, and says the same.
    (tmp_path / "again.yaml").write_text(found.text)
    assert load_configuration(tmp_path / "again.yaml").text == found.text


def test_learner_keys_become_keys_of_verl(tmp_path: Path) -> None:
    (tmp_path / "verl.yaml").write_text(f"actor_rollout_ref: {{model: {{path: {tmp_path}}}}}\n")
    path = _write(tmp_path, {"algorithm": {"type": "verl", "config": str(tmp_path / "verl.yaml")}})
    arguments = ["--learner.lr", "1e-6", "--algorithm.seed", "3", "--algorithm.config.trainer.save_freq", "7"]
    algorithm = load_configuration(path, arguments).make_trainer().algorithm
    assert isinstance(algorithm, VERL)
    assert algorithm.seed == 3
    assert algorithm.config["actor_rollout_ref"]["actor"]["optim"]["lr"] == 1e-6
    assert algorithm.config["trainer"] == {"save_freq": 7}


def test_best_of_n_takes_its_own_keys_and_those_of_verl(tmp_path: Path) -> None:
    spec = {"type": "best_of_n", "config": {"actor_rollout_ref.model.path": str(tmp_path)}, "seed": 3}
    path = _write(tmp_path, {"algorithm": spec})
    algorithm = (
        load_configuration(path, ["--learner.lr", "1e-6", "--algorithm.keep=2"]).make_trainer().algorithm
    )
    assert isinstance(algorithm, BestOfN)
    assert (algorithm.best_of.keep, algorithm.seed) == (2, 3)
    assert setting(algorithm.config, "actor_rollout_ref.actor.optim.lr") == 1e-6
    with pytest.raises(TrainerError, match=r"no key 'algorithm.kep': did you mean algorithm.keep"):
        load_configuration(path, ["--algorithm.kep=2"])


def test_several_models_are_keys_too(tmp_path: Path) -> None:
    config = {"actor_rollout_ref.model.path": str(tmp_path)}
    models = {"planner": None, "solver": {"config": {"actor_rollout_ref.actor.optim.lr": "1e-6"}}}
    path = _write(tmp_path, {"algorithm": {"type": "verl", "config": config, "models": models}})
    arguments = ["--algorithm.models.planner.visible_devices", '"0,1"']
    found = load_configuration(path, arguments)
    algorithm = found.make_trainer().algorithm
    assert isinstance(algorithm, VERL)
    planner, solver = algorithm.of_each_model().values()
    assert (planner.model_name, solver.model_name) == ("planner", "solver")
    assert (planner.visible_devices, solver.visible_devices) == ("0,1", "")
    assert setting(solver.config, "actor_rollout_ref.actor.optim.lr") == 1e-6
    (tmp_path / "again.yaml").write_text(found.text)
    assert load_configuration(tmp_path / "again.yaml").text == found.text
    with pytest.raises(TrainerError, match=r"unknown key 'models.solver.lr'"):
        load_configuration(path, ["--algorithm.models.solver.lr", "1"]).make_trainer()


@pytest.mark.parametrize(
    ("content", "arguments", "part"),
    [
        ({"agent": None}, [], "no agent is named"),
        ({"colour": 1}, [], "there is no key 'colour'"),
        ({}, ["--n_runner", "2"], "no key 'n_runner': did you mean n_runners"),
        (
            {"algorithm": {"type": "apo", "bem_width": 1}},
            [],
            r"no key 'algorithm.bem_width': did you mean algorithm.beam_width",
        ),
        ({"runner": {"workers": 1}}, [], r"no key 'runner.workers': known here: .*concurrency"),
        ({}, ["--learner.rl", "1"], r"no key 'learner.rl': did you mean learner.lr"),
        ({"algorithm": "apo"}, ["--learner.lr", "1"], "keys of VERL, but the algorithm is apo"),
        ({"n_runners": "many"}, [], r"n_runners.*many"),
        ({"algorithm": {"type": "apo", "beam_width": "wide"}}, [], r"algorithm.beam_width.*wide"),
        ({"algorithm": {"type": "apo", "beam_width": 0}}, [], "beam_width is 0; it must be above 0"),
        ({"algorithm": "appo"}, [], "did you mean 'apo'"),
        ({"algorithm": {"beam_width": 1}}, [], "algorithm names no type"),
        (
            {"initial_resources": {"p": {"template": "x", "engine": "mako"}}},
            [],
            "initial_resources.p: .*mako",
        ),
        ({}, ["loose"], "'loose': write --key value"),
    ],
)
def test_what_is_wrong_is_named_with_its_key(
    content: dict[str, Any], arguments: list[str], part: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainerError, match=part) as caught:
        load_configuration(_write(tmp_path, content), arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"agent": "no.such:agent"}, "there is no module 'no'"),
        ({"train_dataset": "gone.jsonl"}, "gone.jsonl cannot be read"),
        ({"train_dataset": 5}, "is a int"),
    ],
)
def test_what_a_file_names_has_to_be_there(content: dict[str, object], part: str, tmp_path: Path) -> None:
    config = tmp_path / "run.json"
    config.write_text(json.dumps({"agent": AGENT, **content}))
    with pytest.raises(TrainerError, match=part):
        fit_from_file(config)


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "agl_grpc_cli", "train", "fit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_fails_with_one_line_and_exit_code_1(tmp_path: Path) -> None:
    config = tmp_path / "run.json"
    config.write_text("{")
    done = _command(str(config))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {config} is not valid")
    assert len(done.stderr.splitlines()) == 1


def test_the_command_prints_the_configuration(tmp_path: Path) -> None:
    done = _command(
        "--agent", AGENT, "--algorithm", "baseline", "--algorithm.n_epochs", "2", "--print-config"
    )
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)
    assert shown["agent"] == AGENT
    assert shown["algorithm"] == {
        "type": "baseline",
        "n_epochs": 2,
        "max_queue_length": 4,
        "span_verbosity": "keys",
    }
