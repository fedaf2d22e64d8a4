"""`Trainer.fit` with algorithms of this process: real store, real workers, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest

from agl_grpc.algorithm import VERL, algo, run_rollouts
from agl_grpc.client import StoreClient
from agl_grpc.model import EnqueueRolloutRequest, PromptTemplate, ProxyLLM, RolloutStatus
from agl_grpc.store.in_process import InProcessStore
from agl_grpc.trainer import Trainer, TrainerError
from agl_grpc.trainer.run_folder import dataset_digests
from agl_grpc.trainer.sweep import MARK
from tests.support.waiting import free_port
from tests.trainer import agents

TASKS = [{"number": number} for number in (2, 4, 6)]


@pytest.mark.parametrize("strategy", ["cs", "shm"])
def test_an_algorithm_of_this_process_has_its_rollouts_done(strategy: str, tmp_path: Path) -> None:
    trainer = Trainer(algorithm=agents.summing, strategy=strategy, run_name="sum", run_dir=tmp_path)
    result = trainer.fit(agents.halver, TASKS)
    assert result.value == 6.0
    assert result.rollouts == {RolloutStatus.SUCCEEDED: 3}
    assert result.failed == result.unfinished == 0
    manifest = orjson.loads(result.folder.manifest.read_bytes())
    assert manifest["datasets"]["train"]["tasks"] == 3
    assert manifest["sessions"][0]["versions"]["user"]["python"] == sys.version.split()[0]
    assert result.folder.database.exists()
    assert not _processes_of(tmp_path)


def test_components_may_be_import_paths_and_resources_reach_the_agent(tmp_path: Path) -> None:
    trainer = Trainer(
        algorithm="tests.trainer.agents:summing",
        initial_resources={"prompt": PromptTemplate(template="do {task}")},
        run_name="paths",
        run_dir=tmp_path,
    )
    assert trainer.fit("tests.trainer.agents:prompted", ["this", "that one"]).value == float(7 + 11)


def test_a_broken_algorithm_raises_and_everything_ends(tmp_path: Path) -> None:
    trainer = Trainer(algorithm=agents.failing, run_name="broken", run_dir=tmp_path)
    with pytest.raises(RuntimeError, match="this algorithm is broken"):
        trainer.fit(agents.halver, TASKS)
    assert not _processes_of(tmp_path)


def test_an_agent_that_cannot_be_imported_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    trainer = Trainer(algorithm=agents.summing, run_name="nobody", run_dir=tmp_path)
    with pytest.raises(
        TrainerError, match=r"runner exited with code 1: module .* has no 'nobody'; its log is"
    ):
        trainer.fit("tests.trainer.agents:nobody", TASKS)


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    Trainer(algorithm=agents.summing, run_name="once", run_dir=tmp_path).fit(agents.halver, TASKS)
    with pytest.raises(TrainerError, match="holds a run already"):
        Trainer(algorithm=agents.summing, run_name="once", run_dir=tmp_path).fit(agents.halver, TASKS)
    again = Trainer(algorithm=agents.summing, run_name="once", run_dir=tmp_path, resume=True)
    assert again.fit(agents.halver, TASKS).value == 6.0


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"store": "somewhere"}, "not host:port"),
        ({"run_name": "../up"}, "run's name"),
        ({"n_runners": 0}, "n_runners is 0"),
        ({"resume": True}, "resume needs run_name"),
        ({"algorithm": "no.such:thing"}, "there is no module 'no'"),
        ({"llm_proxy": {"prot": 1}}, "llm_proxy"),
        ({"adapter": 5}, "neither a class nor a factory"),
        ({"adapter": dict}, "adapter must be a Adapter"),
        ({"adapter": "no.such:adapter"}, "there is no module 'no'"),
        ({"store": "127.0.0.1:4747", "port": 4747}, "port is that of a store which is started here"),
        (
            {"n_runners": 2, "strategy": {"type": "cs", "n_runners": 3}},
            "n_runners is 2, but that of strategy is 3",
        ),
        (
            {"isolation": "process", "runner": {"isolation": "thread"}},
            "isolation is process, but that of runner is thread: say it once",
        ),
        ({"algorithm": "bsaeline"}, "did you mean 'baseline'"),
        ({"strategy": "spawn"}, "strategy 'spawn': .*short names: cs, shm"),
        ({"store": 4747}, "store is a int: give host:port or a StoreClient"),
    ],
)
def test_wrong_arguments_are_named_at_once(arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(TrainerError, match=part):
        Trainer(**arguments)


async def test_a_store_of_this_event_loop_is_refused_with_the_way_out() -> None:
    async with await InProcessStore.open() as store, StoreClient(store) as client:
        for given in (store, client):
            with pytest.raises(TrainerError, match=r"in-process store.* leave store out"):
                Trainer(store=given)  # type: ignore[arg-type]  # the first is what a caller may try


def test_a_dataset_that_the_algorithm_does_not_take_is_refused_before_anything_starts(tmp_path: Path) -> None:
    trainer = Trainer(algorithm=agents.summing, strategy="shm", run_name="val", run_dir=tmp_path)
    for run in (trainer.fit, trainer.dev):
        with pytest.raises(
            TrainerError, match="summing takes no val_dataset, but one was given: leave it out"
        ):
            run(agents.halver, TASKS, val_dataset=TASKS)
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_that_raises_is_named_with_its_place(tmp_path: Path) -> None:
    class Broken(list[Any]):
        def __getitem__(self, place: Any) -> Any:
            raise OSError("the disk is gone")

    trainer = Trainer(algorithm=agents.summing, run_name="dataset", run_dir=tmp_path)
    with pytest.raises(TrainerError, match=r"task 0 of 3 cannot be read.*OSError: the disk is gone"):
        trainer.fit(agents.halver, Broken(TASKS))
    assert not _processes_of(tmp_path)


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"train_dataset": []}, "train_dataset is empty: give tasks, or leave it out"),
        ({"train_dataset": TASKS, "val_dataset": []}, "val_dataset is empty"),
        ({"train_dataset": iter(TASKS)}, "train_dataset is a list_iterator: give a path"),
        ({"train_dataset": "tasks.csv"}, "train_dataset 'tasks.csv': no .jsonl"),
        ({"train_dataset": [{"number": {1, 2}}]}, "task 0 is not a JSON value"),
    ],
)
def test_datasets_that_are_none(datasets: dict[str, Any], message: str, tmp_path: Path) -> None:
    trainer = Trainer(algorithm=agents.summing, run_name="dataset", run_dir=tmp_path)
    with pytest.raises(TrainerError, match=message):
        trainer.fit(agents.halver, **datasets)


def test_missing_environments_are_named_with_the_command_that_makes_them(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    trainer = Trainer(
        algorithm={"type": "verl", "config": {"actor_rollout_ref.model.path": str(tmp_path / "model")}},
        learner_python=tmp_path / "nowhere" / "python",
        run_dir=tmp_path,
    )
    with pytest.raises(TrainerError, match="agl-grpc env create learner"):
        trainer.fit(agents.halver, TASKS)


def test_a_learner_that_fails_ends_the_run_with_its_last_words(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *learner*) echo out of luck; exit 3;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    trainer = Trainer(
        algorithm={"type": "verl", "config": {"actor_rollout_ref.model.path": str(tmp_path / "model")}},
        llm_proxy=ProxyLLM(endpoint="http://127.0.0.1:1/v1", model="model"),
        learner_python=python,
        run_name="unlucky",
        run_dir=tmp_path,
    )
    with pytest.raises(TrainerError, match=r"(?s)learner exited with code 3; its log is .*out of luck"):
        trainer.fit(agents.halver, TASKS)
    assert not _processes_of(tmp_path)


def test_dev_runs_the_agent_here(tmp_path: Path) -> None:
    trainer = Trainer(run_dir=tmp_path)
    ended = trainer.dev(agents.halver, TASKS, limit=2)
    assert [rollout.status.value for rollout in ended] == ["succeeded", "succeeded"]
    with pytest.raises(TrainerError, match="negative numbers cannot be halved"):
        trainer.dev(agents.halver, [{"number": -1}])


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"trainer.n_gpus_per_node": 4}, {}, r"verl would start 4 engines.*tensor_model_parallel_size=4"),
        ({"trainer": {"val_before_train": True}}, {}, r"trainer.val_before_train .*leave it out"),
        (
            {"trainer.save_freq": -1},
            {},
            r"without checkpoints nothing is left to validate: set trainer.save_freq",
        ),
        (
            {},
            {"llm_proxy": ProxyLLM(endpoint="http://127.0.0.1:1/v1", model="m")},
            "verl starts the engine; leave",
        ),
        ({}, {"models": {"one": {}, "two": {}}}, "verl starts the engine of one model; train several"),
        (
            {},
            {},
            r"no hybrid environment.*agl-grpc env create hybrid.*learner_python or AGL_GRPC_HYBRID_PYTHON",
        ),
    ],
)
def test_what_does_not_go_with_an_engine_that_verl_starts_is_refused_before_anything_starts(
    config: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    models = options.pop("models", None)
    settings = {**config, "actor_rollout_ref.model.path": "model"}
    algorithm = VERL(settings, models=models, engines={"hybrid": True})
    python, runs = tmp_path / "nowhere" / "python", tmp_path / "runs"
    trainer = Trainer(algorithm=algorithm, learner_python=python, run_dir=runs, **options)
    with pytest.raises(TrainerError, match=message):
        trainer.fit(agents.halver, TASKS, val_dataset=TASKS)
    assert not runs.exists()


def test_what_does_not_go_with_verl_is_refused(tmp_path: Path) -> None:
    algorithm = {"type": "verl", "config": {"actor_rollout_ref.model.path": str(tmp_path)}}
    trainer = Trainer(algorithm=algorithm, run_name="mismatch", run_dir=tmp_path)
    with pytest.raises(TrainerError, match="VERL needs worker processes"):
        Trainer(algorithm=algorithm, strategy="shm", run_dir=tmp_path).fit(agents.halver, TASKS)
    with pytest.raises(TrainerError, match="VERL needs train_dataset"):
        Trainer(algorithm=algorithm, run_dir=tmp_path).fit(agents.halver)
    with pytest.raises(TrainerError, match=r"needs a PromptTemplate, .*published: main_llm \(LLM\)"):
        trainer.fit(agents.prompted, TASKS)


@pytest.mark.parametrize(
    ("options", "agent", "message"),
    [
        (
            {"llm_proxy": {"resource": "judge"}},
            agents.halver,
            "llm_proxy.resource is 'judge', but with several",
        ),
        ({"llm_proxy": {"port": 8123}}, agents.halver, "llm_proxy.port is one, and 2 engines are started"),
        ({}, agents.prompted, r"needs a PromptTemplate, .*published: planner \(LLM\), solver \(LLM\)"),
    ],
)
def test_what_does_not_go_with_several_models_is_refused(
    options: dict[str, Any], agent: Any, message: str, tmp_path: Path
) -> None:
    config = {"actor_rollout_ref.model.path": str(tmp_path)}
    algorithm = VERL(config, models={"planner": {}, "solver": {}})
    with pytest.raises(TrainerError, match=message):
        Trainer(algorithm=algorithm, run_name="several", run_dir=tmp_path, **options).fit(agent, TASKS)


def test_a_run_goes_on_with_the_models_that_it_began_with(tmp_path: Path) -> None:
    folder = tmp_path / "several"
    folder.mkdir()
    begun = {"models": ["planner", "solver"], "datasets": dataset_digests(TASKS, None)}
    (folder / "manifest.json").write_bytes(orjson.dumps(begun))
    algorithm = VERL({"actor_rollout_ref.model.path": str(tmp_path)}, models={"solver": {}, "planner": {}})
    trainer = Trainer(
        algorithm=algorithm,
        run_name="several",
        run_dir=tmp_path,
        resume=True,
        engine_python=sys.executable,
        learner_python=sys.executable,
    )
    with pytest.raises(TrainerError, match=r"was begun with planner, solver .*in the same order"):
        trainer.fit(agents.halver, TASKS)


@algo
async def hasty(store: StoreClient, train_dataset: Any) -> None:
    """Waits for the first rollout alone."""
    requests = [EnqueueRolloutRequest(input=task) for task in train_dataset]
    rollouts = run_rollouts(store, requests)
    await anext(rollouts)
    await rollouts.aclose()
    await store.pause_dispatch()
    await store.enqueue_rollout("never")


def test_what_an_algorithm_did_not_notice_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(algorithm=hasty, strategy="shm", run_name="hasty", run_dir=tmp_path)
    result = trainer.fit(agents.prompted, ["one"])
    assert result.rollouts == {RolloutStatus.FAILED: 1, RolloutStatus.QUEUING: 1}
    assert (result.failed, result.unfinished) == (1, 1)
    said = capsys.readouterr().out
    assert "1 of the run's 2 rollouts failed, for example with: the agent needs a PromptTemplate" in said
    assert "1 rollouts are unfinished: the algorithm ended without them" in said
    assert not _processes_of(tmp_path)


@algo
async def doubled(store: StoreClient, train_dataset: Any, val_dataset: Any) -> int:
    """Has every task done twice."""
    requests = [EnqueueRolloutRequest(input=task) for task in [*train_dataset, *val_dataset] * 2]
    return len([ended async for ended in run_rollouts(store, requests)])


@pytest.mark.parametrize(
    ("algorithm", "done"), [("baseline", 3), (doubled, 6), ("tests.trainer.agents:Unready", 2)]
)
def test_dev_runs_a_quick_algorithm_and_leaves_others_out(
    algorithm: Any, done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(algorithm=algorithm, hooks="tests.trainer.agents:NotingHook")
    ended = trainer.dev(agents.halver, TASKS, val_dataset=TASKS[:1], limit=2)
    assert sorted(rollout.rollout_id for rollout in ended) == sorted(agents.NotingHook.ended[-done:])
    assert [rollout.status.value for rollout in ended] == ["succeeded"] * done
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TrainerError, match="negative numbers cannot be halved"):
        trainer.dev(agents.halver, [{"number": -1}], val_dataset=TASKS)
    with pytest.raises(TrainerError, match="dev needs tasks"):
        trainer.dev(agents.halver)


def test_algorithm_and_workers_may_be_started_apart(tmp_path: Path) -> None:
    port = free_port()
    workers = f"""
from agl_grpc.trainer import Trainer
from tests.trainer import agents
if __name__ == "__main__":
    strategy = {{"type": "cs", "role": "runner", "server_port": {port}}}
    Trainer(strategy=strategy, run_name="apart", run_dir={str(tmp_path / "workers")!r}).fit(agents.halver)
"""
    script = tmp_path / "workers.py"
    script.write_text(workers)
    log = tmp_path / "workers.log"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path])}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(script)], stdout=output, stderr=output, env=environment
        )
    try:
        strategy = {"type": "cs", "role": "algorithm", "server_port": port}
        trainer = Trainer(
            algorithm=agents.summing, strategy=strategy, run_name="apart", run_dir=tmp_path / "algorithm"
        )
        assert trainer.fit(agents.halver, TASKS).value == 6.0, log.read_text()
    finally:
        process.terminate()
        process.wait(60)
    assert not _processes_of(tmp_path)


def _processes_of(folder: Path) -> list[str]:
    """Command lines of processes of a trainer whose files lie in ``folder``."""
    found = []
    for process in psutil.process_iter():
        try:
            if MARK in process.environ() and any(str(folder) in entry.path for entry in process.open_files()):
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
