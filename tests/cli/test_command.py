"""`agl-grpc` as its users meet it: help, errors, reads."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agl_grpc_cli.main import main
from agl_grpc_cli.registry import COMMANDS

from agl_grpc.client import SyncStoreClient
from agl_grpc.model import Choice, ModelCall, PolicyRun, Span
from agl_grpc.model.model_call import logprobs, token_ids
from tests.support.store_process import StoreProcess
from tests.support.waiting import free_port

# Nobody listens there.
# Stands for an address where nobody listens: parameters have to be the same in every test process.
NOBODY = "NOBODY"


def run(*arguments: str, within: float = 60.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "agl_grpc_cli", *arguments],
        capture_output=True,
        text=True,
        timeout=within,
        env=os.environ | environment,
        check=False,
    )


CALL = ModelCall(
    model="tiny",
    prompt_token_ids=token_ids([1, 2, 3]),
    choices=[
        Choice(
            token_ids=token_ids([7, 8]),
            logprobs=logprobs([-0.5, -0.25]),
            policy_runs=[PolicyRun(0, 2, 3)],
            routed_experts=b"\x01\x02",
        )
    ],
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    """A store with one rollout that has failed and one that waits."""
    with StoreProcess(tmp_path_factory.mktemp("cli") / "store.db") as process:
        yield process


@pytest.fixture(scope="module")
def rollouts(store: StoreProcess) -> tuple[str, str]:
    """Ids of the two rollouts."""
    with SyncStoreClient(store.address) as client:
        started = client.start_rollout({"question": "2 + 2"}, rollout_id="started", worker_id="somebody")
        attempt_id = started.attempt.attempt_id
        span = Span.from_attributes(attributes={}, rollout_id="started", attempt_id=attempt_id, name="s1")
        span.model_call = CALL
        client.add_span(span)
        client.update_attempt("started", attempt_id, "failed")
        waiting = client.enqueue_rollout("task", rollout_id="waiting")
    return started.rollout_id, waiting.rollout_id


def test_help_is_quick_and_names_every_command() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = run("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert answer.returncode == 0
    assert answer.stderr == ""
    for name, entry in COMMANDS.items():
        assert f"  {name} " in answer.stdout
        assert entry.help in " ".join(answer.stdout.split())
    # Processor time, which a busy machine does not stretch as it does the clock's.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help(name: str) -> None:
    answer = run(name, "--help")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("Usage:")


def test_version() -> None:
    assert run("--version").stdout.startswith("agl-grpc ")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no-such-command"], 2, "No such command"),
        (["store", "--port", "1", "serve"], 2, "write --port after `serve`"),
        (["store", "serve", "--log-level", "loud"], 2, "log level 'loud' is none of"),
        (["store", "serve", "--host", "no.such.host.invalid"], 1, "no.such.host.invalid"),
        (["runner", "start", "--agent", "nonsense", "--store", NOBODY], 1, "is not an import path"),
        (["runner", "start", "--agent", "no_such:agent", "--store", NOBODY], 1, "no module 'no_such'"),
        (["runner", "start", "--agent", "json:dumps", "--store", NOBODY], 1, "must be a LitAgent"),
        (["runner", "start", "--agent", "a:b", "--label", "x"], 2, "write KEY=VALUE"),
        (["rollouts", "ls", "--store", NOBODY], 1, "the store at NOBODY cannot be reached"),
        (["rollouts", "ls", "--status", "happy"], 2, "'happy' is not a RolloutStatus"),
        (["rollouts", "ls", "--older-than", "soon"], 2, "--older-than 'soon': write a number and a unit"),
        (["rollouts", "cancel"], 2, "name rollouts, give conditions, or say --all"),
        (["rollouts", "delete", "--run", "*"], 2, "name rollouts, give conditions, or say --all"),
        (["spans", "ls", "r", "--trace", "xyz"], 2, "--trace is 'xyz'; it must be 32 hex digits"),
        (["leases", "expire"], 2, "name attempts, or a worker"),
        (["runs", "update", "default"], 2, "say what to change"),
        (["blobs", "put", "/no/such/file"], 2, "does not exist"),
        (["store", "serve", "--evict-above", "1G"], 2, "throw-away stores only"),
        (["store", "serve", "--memory", "--evict-above", "much"], 2, "size 'much'"),
        (["store", "serve", "--memory", "--evict-above", "1K", "--evict-to", "2K"], 1, "cannot be evicted"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    if arguments[0] == "store":
        arguments = [*arguments, "--database", str(tmp_path / "store.db")]
    address = f"127.0.0.1:{free_port()}"
    answer = run(*(argument.replace(NOBODY, address) for argument in arguments))
    assert answer.returncode == code
    assert message.replace(NOBODY, address) in " ".join(answer.stderr.split())
    assert "Traceback" not in answer.stderr


def test_a_port_in_use(store: StoreProcess, tmp_path: Path) -> None:
    answer = run("store", "--port", str(store.port), "--database", str(tmp_path / "other.db"))
    assert answer.returncode == 1
    assert str(store.port) in answer.stderr
    assert "in use" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_database_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"this is not a database" * 1000)
    answer = run("store", "serve", "--port", "0", "--database", str(tmp_path / "store.db"))
    assert answer.returncode == 1
    assert "store.db" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_rollouts_are_listed(store: StoreProcess, rollouts: tuple[str, str]) -> None:
    table = run("rollouts", "ls", "--store", store.address)
    assert [line.split()[:2] for line in table.stdout.splitlines()[1:]] == [
        ["waiting", "queuing"],
        ["started", "failed"],
    ]
    found = json.loads(
        run("rollouts", "ls", "--json", "--status", "failed", AGL_GRPC_STORE=store.address).stdout
    )
    assert [rollout["rollout_id"] for rollout in found] == ["started"]


def test_one_rollout_is_shown(store: StoreProcess, rollouts: tuple[str, str]) -> None:
    text = run("rollouts", "get", "started", "--store", store.address)
    assert "somebody" in text.stdout
    assert "'question': '2 + 2'" in text.stdout
    found = json.loads(run("rollouts", "get", "started", "--json", "--store", store.address).stdout)
    assert found["rollout"]["input"] == {"question": "2 + 2"}
    missing = run("rollouts", "get", "nobody", "--store", store.address)
    assert missing.returncode == 1
    assert "there is no rollout 'nobody'" in missing.stderr


def test_spans_and_workers_are_listed(store: StoreProcess, rollouts: tuple[str, str]) -> None:
    spans: list[dict[str, Any]] = json.loads(
        run("spans", "ls", "started", "--json", "--store", store.address).stdout
    )
    assert [span["name"] for span in spans] == ["s1"]
    assert " s1" in run("spans", "ls", "started", "--store", store.address).stdout
    assert spans[0]["model_call"]["prompt_token_ids"] == []
    with_tokens = inside(store, "spans", "ls", "started", "--json", "--tokens").stdout
    call = json.loads(with_tokens)[0]["model_call"]
    assert call["prompt_token_ids"] == [1, 2, 3]
    (choice,) = call["choices"]
    assert (choice["token_ids"], choice["logprobs"]) == ([7, 8], [-0.5, -0.25])
    assert choice["policy_runs"] == [{"start": 0, "end": 2, "policy_version": 3}]
    assert choice["routed_experts"] == "AQI="
    for chosen, count in (
        (["--name", "s1"], 1),
        (["--contains", "s"], 1),
        (["--name", "s"], 0),
        (["--trace", spans[0]["trace_id"]], 1),
        (["--trace", "00" * 16], 0),
        (["--calls"], 1),
    ):
        listed = json.loads(inside(store, "spans", "ls", "started", "--json", *chosen).stdout)
        assert len(listed) == count, chosen
    assert "has no such spans" in inside(store, "spans", "ls", "started", "--name", "s").stderr
    workers = json.loads(run("workers", "ls", "--json", "--store", store.address).stdout)
    assert [worker["worker_id"] for worker in workers] == ["somebody"]


def test_rollouts_are_cancelled(store: StoreProcess, rollouts: tuple[str, str]) -> None:
    with SyncStoreClient(store.address) as client:
        client.enqueue_rollout("task", rollout_id="unwanted")
    answer = run("rollouts", "cancel", "unwanted", "started", "--store", store.address)
    assert [line.split()[1] for line in answer.stdout.splitlines()] == ["cancelled", "not"]


def inside(store: StoreProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in this process: a new one each time takes as long as all that the command does."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["agl-grpc", *arguments, "--store", store.address])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as ended:
            main()
    return subprocess.CompletedProcess(arguments, ended.value.code or 0, out.getvalue(), err.getvalue())  # type: ignore[arg-type] # main exits with a number


def answer_of(store: StoreProcess, *arguments: str) -> Any:
    """What a command says with --json."""
    answer = inside(store, *arguments, "--json")
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def test_rollouts_by_filter(store: StoreProcess, rollouts: tuple[str, str]) -> None:
    with SyncStoreClient(store.address) as client:
        for number in range(3):
            client.enqueue_rollout(
                number, rollout_id=f"f{number}", group_id="many", labels={"n": str(number)}
            )
    names = [one["rollout_id"] for one in answer_of(store, "rollouts", "ls", "--group", "many")]
    assert names == ["f2", "f1", "f0"]
    listing = ("rollouts", "ls", "--group", "many", "--label", "n=1", "--newer-than", "1h")
    assert [one["rollout_id"] for one in answer_of(store, *listing)] == ["f1"]
    assert answer_of(store, "rollouts", "ls", "--group", "many", "--older-than", "1h") == []
    assert answer_of(store, "rollouts", "cancel", "--group", "many") == ["f0", "f1", "f2"]
    (again,) = answer_of(store, "rollouts", "retry", "f1")
    assert again["retry_of"] == "f1"
    counted = answer_of(store, "rollouts", "delete", "--group", "many", "--dry-run")
    assert counted == {"deleted": 3, "kept": 1, "dry_run": True}
    text = inside(store, "rollouts", "delete", "--group", "many").stdout
    assert text == "3 deleted, 1 kept\n"
    assert answer_of(store, "rollouts", "cancel", again["rollout_id"]) == [again["rollout_id"]]


def test_leases_and_workers(store: StoreProcess) -> None:
    with SyncStoreClient(store.address) as client:
        client.enqueue_rollout(1, queue="leases")
        (work,) = client.lease_rollouts("holder", "s", queues=["leases"])
        (lease,) = answer_of(store, "leases", "ls", "--worker", "holder")
        assert (lease["attempt_id"], lease["rollout_id"]) == (work.attempt_id, work.rollout.rollout_id)
        assert "lease_token" not in lease
        assert work.attempt_id in inside(store, "leases", "ls").stdout
        assert answer_of(store, "leases", "expire", "--worker", "holder") == [work.attempt_id]
        assert answer_of(store, "leases", "ls") == []
        assert answer_of(store, "workers", "drain", "holder", "--reason", "enough") == ["holder"]
        kinds = [command.kind for command in client.renew_leases("holder", []).commands]
        assert kinds == ["cancel", "drain"]
    missing = inside(store, "workers", "drain", "nobody")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "worker 'nobody' does not exist" in missing.stderr


def test_runs(store: StoreProcess) -> None:
    assert answer_of(store, "runs", "create", "r1")["run_id"] == "r1"
    changed = answer_of(store, "runs", "update", "r1", "--retention", "7d", "--replay-retention", "12h")
    assert (changed["retention_seconds"], changed["replay_retention_seconds"]) == (604800.0, 43200.0)
    assert answer_of(store, "runs", "update", "r1", "--retention", "none")["retention_seconds"] is None
    assert answer_of(store, "runs", "pause", "r1", "--queue", "q")["paused_queues"] == ["q"]
    assert inside(store, "runs", "pause", "r1").stdout.startswith("r1  paused")
    assert answer_of(store, "runs", "resume", "r1")["paused"] is False
    assert "r1" in inside(store, "runs", "ls").stdout
    assert answer_of(store, "runs", "get", "r1")["statistics"]["total_rollouts"] == 0
    assert "there is no run 'r9'" in inside(store, "runs", "get", "r9").stderr


def test_blobs(store: StoreProcess, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "in").write_bytes(data)
    digest = inside(store, "blobs", "put", str(tmp_path / "in")).stdout.strip()
    got = inside(store, "blobs", "get", digest, "-o", str(tmp_path / "out"))
    assert got.returncode == 0, got.stderr
    assert (tmp_path / "out").read_bytes() == data
    missing = inside(store, "blobs", "get", f"sha256:{'0' * 64}", "-o", str(tmp_path / "no"))
    assert missing.returncode == 1
    assert "does not exist" in missing.stderr


def test_a_reader_that_leaves_is_no_error(store: StoreProcess, rollouts: tuple[str, str]) -> None:
    command = f"{sys.executable} -m agl_grpc_cli rollouts ls --store {store.address} | true"
    answer = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 0
    assert "Traceback" not in answer.stderr
