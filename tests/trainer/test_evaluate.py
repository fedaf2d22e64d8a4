"""`Trainer.evaluate` and `agl-grpc eval`: real store and workers; the model is not needed here."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from agl_grpc import LLM
from agl_grpc.evaluation import Evaluation, EvaluationError
from agl_grpc.trainer import Trainer, TrainerError
from agl_grpc.trainer.evaluated_model import check_tokenizer, find_model
from tests.support.waiting import eventually
from tests.trainer import agents

ROOT = Path(__file__).parents[2]
TASKS = [{"number": 2}, {"number": 4}, {"number": -1}]


def test_it_is_reported_and_goes_on_where_it_was(tmp_path: Path) -> None:
    def trainer(**more: Any) -> Trainer:
        return Trainer(run_name="judged", run_dir=tmp_path, **more)

    found = trainer().evaluate(agents.halver, TASKS, n=2, ks=(1, 2), success=2.0, name="half")
    assert [task.mean for task in found.tasks] == [1.0, 2.0, 0.0]
    assert found.failures == {"agent": 2}
    folder = tmp_path / "judged"
    assert Evaluation.read(folder) == found
    page = (folder / "report.html").read_text()
    assert "negative numbers cannot be halved" in page
    # No engine of ours: nobody puts the seed into requests, and the report does not claim it.
    assert "without request seeds" in page
    again = trainer(resume=True).evaluate(agents.halver, TASKS, n=2, ks=(1, 2), success=2.0, name="half")
    ids = [[one.rollout_id for one in task.rollouts] for task in again.tasks]
    assert ids == [[one.rollout_id for one in task.rollouts] for task in found.tasks]
    with pytest.raises(TrainerError, match="begun with another samples: 2, now 3"):
        trainer(resume=True).evaluate(agents.halver, TASKS, n=3, name="half")
    with pytest.raises(TrainerError, match="holds a run already"):
        trainer().evaluate(agents.halver, TASKS)


def test_graders_of_the_command_line_judge_in_the_agents_place(tmp_path: Path) -> None:
    """The graded agent gives no reward; what fails to be judged is no wrong answer."""
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_bytes(b"".join(orjson.dumps({"answer": "4", "say": say}) + b"\n" for say in ("4", "5", "4")))
    command = [
        sys.executable,
        "-m",
        "agl_grpc_cli",
        "eval",
        "--endpoint",
        "http://127.0.0.1:9/v1",
        str(tasks),
    ]
    command += ["--model", "m", "--agent", "tests.trainer.graded_agent:says", "--json"]
    command += ["--grader", "tests.grader.own_graders:exact", "--run-dir", str(tmp_path), "--run", "graded"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "cli")])
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    (found,) = orjson.loads(done.stdout)["evaluations"]
    assert found["figures"]["mean"] == pytest.approx(2 / 3)
    assert found["figures"]["rollouts"] == 3


@pytest.mark.parametrize(
    ("tasks", "more", "message"),
    [
        ([], {}, "the dataset is empty"),
        ([{"number": 1}, {"n": 1}], {"fields": ["number"]}, "task 1 of the dataset lacks 'number'"),
        (TASKS, {"checkpoint": "no/such/place"}, "no model at no/such/place"),
        (TASKS, {"find_answer": "no.such:finder"}, "find_answer: "),
        ([{"number": -1}], {}, r"none of 1 rollouts got a reward \(agent 1\).*cannot be halved"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    tasks: list[Any], more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainerError, match=message) as raised:
        Trainer(run_dir=tmp_path).evaluate(agents.halver, tasks, **more)
    assert "\n" not in str(raised.value)


def test_k_above_n_and_both_kinds_of_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="pass@2 needs k from 1 to n, and each task has n = 1"):
        Trainer(run_dir=tmp_path).evaluate(agents.halver, TASKS, ks=(2,))
    served = Trainer(run_dir=tmp_path, llm_proxy=LLM(endpoint="http://127.0.0.1:1/v1", model="m"))
    with pytest.raises(TrainerError, match="either a checkpoint or an endpoint"):
        served.evaluate(agents.halver, TASKS, checkpoint=tmp_path)


def _write_model(folder: Path, **config: Any) -> Path:
    """A model folder as far as the tokenizer's check looks: a vocabulary of 8, of which 0 to 7 are tokens."""
    folder.mkdir(exist_ok=True)
    settings = {"vocab_size": 8, "eos_token_id": 7, **config}
    tokens = {chr(97 + number): number for number in range(7)}
    tokenizer = {"model": {"vocab": tokens}, "added_tokens": [{"content": "<end>", "id": 7}]}
    header = orjson.dumps({"model.embed_tokens.weight": {"dtype": "F32", "shape": [8, 0]}})
    (folder / "config.json").write_bytes(orjson.dumps(settings))
    (folder / "tokenizer.json").write_bytes(orjson.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_bytes(orjson.dumps({"eos_token": "<end>"}))
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


def test_a_tokenizer_of_another_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    model = _write_model(tmp_path / "model")
    check_tokenizer(model)
    assert find_model(model) == (model, "model")
    with pytest.raises(TrainerError, match=r"config.json says vocab_size 9, its weights have 8 rows"):
        check_tokenizer(_write_model(tmp_path / "model", vocab_size=9))
    with pytest.raises(TrainerError, match="no token 12, the model's eos_token_id"):
        check_tokenizer(_write_model(tmp_path / "model", eos_token_id=12))
    with pytest.raises(TrainerError, match="end of text '<end>' is token 7, the model's eos_token_id is 3"):
        check_tokenizer(_write_model(tmp_path / "model", eos_token_id=3))
    _write_model(tmp_path / "model")
    bigger = {"model": {"vocab": {"a": 8}}, "added_tokens": []}
    (model / "tokenizer.json").write_bytes(orjson.dumps(bigger))
    with pytest.raises(TrainerError, match="its largest token id is 8, and the model knows 8 tokens"):
        Trainer(run_dir=tmp_path / "runs").evaluate(agents.halver, TASKS, checkpoint=model)
    assert not (tmp_path / "runs").exists()
    (model / "tokenizer.json").unlink()
    with pytest.raises(TrainerError, match="holds no tokenizer"):
        check_tokenizer(model)
    shutil.rmtree(model)
    with pytest.raises(TrainerError, match="there is no such folder"):
        find_model(model)


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "agl_grpc_cli", "eval", *arguments]


def _run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "cli"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        _command(*arguments), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_the_command_compares_two_that_were_made_before(tmp_path: Path) -> None:
    for name, tasks in (("a", TASKS), ("b", TASKS[:2])):
        Trainer(run_name=name, run_dir=tmp_path).evaluate(agents.halver, tasks, name=name)
    done = _run("a", "--compare", "b/evaluation.json", "--output", "both", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a and b are equal" in done.stdout
    assert (tmp_path / "both" / "report.html").is_file()
    told = _run("a", "--compare", "b", "--output", "both", "--json", cwd=tmp_path)
    answer = orjson.loads(told.stdout)
    assert answer["comparison"]["total"]["tasks"] == 2
    assert answer["comparison"]["only_in_one"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models/none"], "give DATASET"),
        (["models/none", "tasks.jsonl"], "give --agent MODULE:NAME"),
        (["x.json"], "x.json cannot be read: No such file"),
        (["tasks.jsonl", "--endpoint", "here", "--agent", "a:b"], "endpoint 'here' is no URL"),
        (["tasks.jsonl", "--endpoint", "http://here", "--agent", "a:b"], "the name of the model"),
        (["models/none", "tasks.jsonl", "--agent", "a:b", "--n", "2", "--k", "3"], "no model at models/none"),
    ],
)
def test_the_command_names_what_is_missing(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text('{"number": 1}\n')
    done = _run(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


async def test_ctrl_c_ends_everything_and_the_same_command_goes_on(tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_bytes(b"".join(orjson.dumps({"wait": n}) + b"\n" for n in (0, 1)))
    (tmp_path / "patient.py").write_text(
        "import pathlib, time\n"
        "from agl_grpc import rollout\n"
        "@rollout\n"
        "def agent(task, resources):\n"
        "    while task['wait'] and not pathlib.Path('go').exists():\n"
        "        time.sleep(0.02)\n"
        "    pathlib.Path(f\"done-{task['wait']}\").open('a').write('x')\n"
        "    return 1.0\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "cli"), str(tmp_path)])
    environment = {**os.environ, "PYTHONPATH": path}
    command = _command("tasks.jsonl", "--endpoint", "http://127.0.0.1:1/v1", "--model", "m")
    command += ["--agent", "patient:agent", "--run", "broken", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": tmp_path, "env": environment}
    first = await asyncio.create_subprocess_exec(*command, **pipes)
    await eventually((tmp_path / "done-0").exists, within=60, what="the first task")
    first.send_signal(signal.SIGINT)
    _, errors = await asyncio.wait_for(first.communicate(), 60)
    assert first.returncode == 130
    assert b"go on with --run broken --resume" in errors
    (tmp_path / "go").touch()
    again = await asyncio.create_subprocess_exec(*command, "--resume", **pipes)
    answer, errors = await asyncio.wait_for(again.communicate(), 60)
    assert again.returncode == 0, errors.decode()
    assert orjson.loads(answer)["evaluations"][0]["mean"] == 1.0
    assert (tmp_path / "done-0").read_text() == "x"
