"""What made a run is written down, and what differs between two runs is said."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from agl_grpc_cli.main import app
from typer.testing import CliRunner

from agl_grpc import LLM, StoreClient
from agl_grpc.algorithm import APO
from agl_grpc.manifest import ManifestError, RunRecord, compare, git_state
from agl_grpc.manifest.describe import CONTRACT, without_secrets
from agl_grpc.model.rollout import SEED_LABEL
from agl_grpc.trainer import Trainer
from tests.algorithm.words import FIRST, helpful, wordy
from tests.support.scripted_model import ScriptedModel
from tests.support.store_process import StoreProcess
from tests.trainer import agents

TASKS = [{"number": number} for number in (2, 4, 6)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreProcess]:
    with StoreProcess(tmp_path / "store.db") as started:
        yield started


def test_two_runs_are_compared_by_their_folders_and_in_the_store(tmp_path: Path, store: StoreProcess) -> None:
    for name, tasks in (("one", TASKS), ("two", TASKS[:2])):
        trainer = Trainer(
            algorithm=agents.telling,
            strategy="shm",
            store=store.address,
            run_name=name,
            run_dir=tmp_path,
            runner={"concurrency": len(tasks)},
        )
        trainer.fit(agents.halver, tasks)
    manifest = orjson.loads((tmp_path / "one" / "manifest.json").read_bytes())
    session = manifest["sessions"][-1]
    assert session["contract"] == CONTRACT
    assert session["hardware"]["cores"] >= 1
    assert session["started"] <= session["ended"]
    assert session["config"]["algorithm"] == "telling"
    for names in ([str(tmp_path / "one"), str(tmp_path / "two")], ["one-training", "two-training"]):
        done = CliRunner().invoke(app, ["run", "diff", *names, "--store", store.address, "--json"])
        assert done.exit_code == 0, done.output
        found = orjson.loads(done.stdout)
        keys = {(each["section"], each["key"]): (each["a"], each["b"]) for each in found["differences"]}
        assert keys.pop(("datasets", "train.tasks")) == (3, 2)
        digests = keys.pop(("datasets", "train.sha256"))
        assert digests[0] != digests[1]
        keys.pop(("config", "concurrency"), None)
        assert keys == {}
        assert found["metrics"]["reward/mean"] == {"a": 2.0, "b": 1.5}
    table = CliRunner().invoke(app, ["runs", "diff", str(tmp_path / "one"), str(tmp_path / "two")])
    assert "config" in table.stdout
    assert "concurrency" in table.stdout


async def _done(store: StoreProcess, run: str) -> list[tuple[str, str, str, str]]:
    """Id within its run, which says its place, mode, task and seed of every rollout."""
    async with StoreClient(store.address, run_id=run) as client:
        rollouts = await client.query_rollouts()
    return sorted(
        (each.rollout_id.removeprefix(run), str(each.mode), str(each.input), each.labels.get(SEED_LABEL, ""))
        for each in rollouts
    )


def test_two_runs_of_one_seed_do_the_same_and_differ_in_nothing(tmp_path: Path, store: StoreProcess) -> None:
    tasks = [{"question": f"t{number}"} for number in range(6)]
    values = []
    with ScriptedModel(helpful) as critic:
        for name in ("one", "two"):
            apo = APO(
                endpoint=critic.endpoint,
                gradient_model="critic",
                apply_edit_model="editor",
                beam_rounds=2,
                beam_width=1,
                branch_factor=1,
                gradient_batch_size=2,
                val_batch_size=2,
                validation={"temperature": 0.0},
            )
            trainer = Trainer(
                algorithm=apo,
                seed=7,
                strategy="shm",
                store=store.address,
                run_name=name,
                run_dir=tmp_path,
                initial_resources={"prompt": FIRST, "llm": LLM(endpoint="http://127.0.0.1:9/v1", model="m")},
            )
            values.append(trainer.fit(wordy, tasks, val_dataset=tasks[:3]).value)
    first, second = (asyncio.run(_done(store, name)) for name in ("one", "two"))
    assert first == second
    assert values[0] == values[1]
    # Validation is seeded by its task, and has sampling parameters of its own; training is neither.
    assert {mode: bool(seed) for _, mode, _, seed in first} == {"val": True, "train": False}
    done = CliRunner().invoke(app, ["run", "diff", str(tmp_path / "one"), str(tmp_path / "two"), "--json"])
    assert done.exit_code == 0, done.output
    found = orjson.loads(done.stdout)
    assert found["differences"] == []
    assert found["metrics"]["validation/best"] == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("content", "words"), [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "must hold a mapping")]
)
def test_a_folder_without_a_manifest_is_an_error(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ManifestError, match=words):
        RunRecord.read(tmp_path)
    done = CliRunner().invoke(app, ["runs", "diff", str(tmp_path), str(tmp_path)])
    assert done.exit_code == 1


def test_the_folder_of_a_learner_that_was_started_alone_is_a_run(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 8)):
        folder = tmp_path / name
        folder.mkdir()
        session = {"seed": seed, "config": {"trainer": {"nnodes": 1}}, "datasets": {"train": {"sha256": "x"}}}
        for epoch in (2, 10):
            changed = {**session, "seed": seed if epoch == 10 else 0}
            (folder / f"learner-{epoch}.json").write_bytes(orjson.dumps(changed))
        lines = ({"step": step, "time": 1.0, "reward/mean": step / 4} for step in (1, 2))
        (folder / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    done = CliRunner().invoke(app, ["run", "diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"])
    assert done.exit_code == 0, done.output
    found = orjson.loads(done.stdout)
    assert found["differences"] == [{"section": "seed", "key": "", "a": 7, "b": 8}]
    assert found["last_step"] == {"a": 2, "b": 2}
    assert found["metrics"] == {"reward/mean": {"a": 0.5, "b": 0.5}}


def record(**changes: Any) -> RunRecord:
    session = {"seed": 1, "config": {"verl": {"lr": 1e-6}, "n": 2}, "versions": {"learner": {"verl": "1"}}}
    return RunRecord("r", {"datasets": {"train": {"sha256": "a"}}, "sessions": [{}, {**session, **changes}]})


def test_differences_name_section_and_key_and_the_last_session_counts() -> None:
    assert compare(record(started="now"), record(started="then")) == []
    other = record(seed=2, config={"verl": {"lr": 1e-5}}, versions={"learner": {"verl": "2"}}, host="x")
    found = [(each.section, each.key, each.a, each.b) for each in compare(record(), other)]
    assert found == [
        ("seed", "", 1, 2),
        ("config", "verl.lr", 1e-6, 1e-5),
        ("config", "n", 2, None),
        ("versions", "learner.verl", "1", "2"),
        ("other", "host", None, "x"),
    ]


def test_the_state_of_git_tells_two_changes_apart(tmp_path: Path) -> None:
    assert git_state(str(tmp_path)) is None
    file = tmp_path / "a.py"

    def git(*arguments: str) -> None:
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *names, "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    git("init", "-q")
    file.write_text("1\n")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = git_state(str(tmp_path))
    assert clean is not None
    assert (clean["dirty"], clean["diff_sha256"]) == (False, "")
    digests = set()
    for text in ("2\n", "3\n"):
        file.write_text(text)
        state = git_state(str(tmp_path))
        assert state is not None
        assert (state["commit"], state["dirty"], state["changed_files"]) == (clean["commit"], True, 1)
        digests.add(state["diff_sha256"])
    assert len(digests) == 2


def test_credentials_are_left_out() -> None:
    given = {"llm_proxy": {"api_key": "sk-1", "model": "m"}, "list": [{"hub_token": "t", "max_tokens": 5}]}
    assert without_secrets(given) == {
        "llm_proxy": {"api_key": "(left out)", "model": "m"},
        "list": [{"hub_token": "(left out)", "max_tokens": 5}],
    }
