"""Threads, spawned and forked processes, and roles: each does the work, and each stops cleanly."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from agl_grpc import OtelTracer, StoreClient, Trainer, TrainerError
from agl_grpc.algorithm import algo
from agl_grpc.runner import LitAgentRunner
from agl_grpc.trainer import ClientServerExecutionStrategy
from tests.support.waiting import free_port
from tests.trainer import agents
from tests.trainer.programs import VARIABLES, printed, program
from tests.trainer.strategy_script import made_here


@pytest.mark.parametrize("strategy", ["shm", "fork"])
def test_an_agent_that_no_import_finds(tmp_path: Path, strategy: str) -> None:
    with program(tmp_path, "sum", strategy) as process:
        assert process.wait(90) == 0, printed(tmp_path, "sum", strategy)
    assert printed(tmp_path, "sum", strategy).splitlines()[-1] == "30.0"
    # The forked worker that died was replaced, and its rollout done again.
    assert (tmp_path / "died").exists() == (strategy == "fork")


def test_spawned_workers_cannot_be_given_it_and_the_way_out_is_told(tmp_path: Path) -> None:
    trainer = Trainer(algorithm=agents.summing, run_name="local", run_dir=tmp_path)
    with pytest.raises(TrainerError, match=r"cannot be imported; .*start_method='fork' or strategy='shm'"):
        trainer.fit(made_here(2.0), [{"number": 1}])


def test_one_program_takes_its_role_from_the_environment(tmp_path: Path) -> None:
    port = str(free_port())
    workers = program(tmp_path, "apart", "runner", AGL_CURRENT_ROLE="runner", AGL_SERVER_PORT=port)
    algorithm = program(tmp_path, "apart", "algorithm", AGL_CURRENT_ROLE="algorithm", AGL_SERVER_PORT=port)
    with workers as first, algorithm as second:
        assert second.wait(90) == 0, printed(tmp_path, "apart", "algorithm")
        first.send_signal(signal.SIGTERM)
        assert first.wait(30) == 128 + signal.SIGTERM
    assert printed(tmp_path, "apart", "algorithm").splitlines()[-1] == "5.0"


def test_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    here = ClientServerExecutionStrategy()
    assert (here.role, here.store_port, here.existing_store) == ("both", 0, "")
    monkeypatch.setenv("AGL_CURRENT_ROLE", "runner")
    monkeypatch.setenv("AGL_SERVER_HOST", "store.example")
    assert ClientServerExecutionStrategy().existing_store == "store.example:4747"
    monkeypatch.setenv("AGL_SERVER_PORT", "5000")
    assert ClientServerExecutionStrategy().existing_store == "store.example:5000"
    assert ClientServerExecutionStrategy("algorithm", server_host="0.0.0.0").existing_store == ""
    assert ClientServerExecutionStrategy("algorithm").store_port == 5000
    monkeypatch.setenv("AGL_MANAGED_STORE", "no")
    alone = ClientServerExecutionStrategy("algorithm", server_host="0.0.0.0", server_port=6000)
    assert alone.existing_store == "127.0.0.1:6000"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("AGL_CURRENT_ROLE", "boss", "AGL_CURRENT_ROLE 'boss' is none of algorithm, runner, both"),
        ("AGL_SERVER_PORT", "many", "AGL_SERVER_PORT 'many' is no port: 1 to 65535"),
        ("AGL_MANAGED_STORE", "perhaps", "AGL_MANAGED_STORE 'perhaps' is none of 1, true, yes, on, 0"),
    ],
)
def test_nonsense_in_the_environment_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(TrainerError, match=message):
        Trainer(strategy="cs")


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({"type": "shm", "main_thread": "runner"}, "main_thread='runner' is not supported: an agent in"),
        ({"type": "shm", "main_thread": "both"}, "main_thread 'both' is none of algorithm, runner"),
        ({"type": "shm", "join_timeout": -1.0}, r"join_timeout is -1.0; it must be 0 or more seconds"),
        (
            {"type": "cs", "main_process": "runner"},
            "main_process='runner' is not supported: .*strategy='shm'",
        ),
        ({"type": "cs", "terminate_timeout": float("nan")}, "terminate_timeout is nan; it must be 0 or more"),
        (
            {"type": "cs", "allowed_exit_codes": (0, 999)},
            "allowed_exit_codes holds 999, which is no exit code",
        ),
    ],
)
def test_arguments_of_strategies_that_cannot_be_had(strategy: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainerError, match=message):
        Trainer(strategy=strategy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "shm", "isolation": "process"}, "isolation process needs worker processes"),
        ({"isolation": "vault"}, "isolation 'vault' is none of thread, process, command, kubernetes"),
        ({"isolation": "command"}, "isolation command needs a command"),
        ({"runner": {"command": "true"}}, "the agent is a command; leave the other one out"),
        ({"strategy": {"type": "shm", "managed_store": False}}, "give the trainer's store, as host:port"),
    ],
)
def test_isolation_that_does_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    trainer = Trainer(algorithm=agents.summing, run_name="n", run_dir=tmp_path, **options)
    with pytest.raises(TrainerError, match=message):
        trainer.fit(None if options.get("isolation") == "command" else agents.halver, [{"number": 1}])
    assert not (tmp_path / "n").exists()


def test_every_rollout_in_a_process_of_its_own(tmp_path: Path) -> None:
    trainer = Trainer(
        algorithm=agents.summing, isolation="process", n_runners=1, run_name="n", run_dir=tmp_path
    )
    assert trainer.fit("tests.trainer.agents:own_process", [{"number": n} for n in (1, 2)]).value == 2.0


def test_a_program_is_the_agent(tmp_path: Path) -> None:
    half = "import json, sys; print(json.load(sys.stdin)['number'] / 2)"
    command = f'{sys.executable} -c "{half}" > "$AGL_GRPC_REWARD_FILE"'
    trainer = Trainer(algorithm=agents.summing, runner={"command": command}, run_name="n", run_dir=tmp_path)
    assert trainer.fit(train_dataset=[{"number": 3}, {"number": 5}]).value == 4.0


@algo
async def left_behind(store: StoreClient, train_dataset: Any) -> float:
    """Has a worker exit in the first attempt of one rollout; the reward of the second."""
    rollout = await store.enqueue_rollout(train_dataset[0])
    await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=60)
    first, second = await store.query_attempts(rollout.rollout_id)
    assert first.lease_lost
    assert not second.lease_lost
    (reward,) = await store.query_rewards([rollout.rollout_id])
    return reward.value


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (7, "left: it exited with code 7, which is allowed"),
        # The code by which a worker says that it can never run, used by an agent.
        (3, "exited with code 3 after"),
    ],
)
def test_an_agent_that_exits_ends_its_worker_and_no_other(tmp_path: Path, code: int, message: str) -> None:
    strategy = {"type": "cs", "allowed_exit_codes": (0, 7), "n_runners": 2, "terminate_timeout": 5.0}
    trainer = Trainer(algorithm=left_behind, strategy=strategy, run_name="n", run_dir=tmp_path)
    assert trainer.fit("tests.trainer.agents:Exiting", [{"number": 4, "exit": code}]).value == 2.0
    log = (tmp_path / "n" / "logs" / "runner.log").read_text()
    assert message in log, log
    assert ("restart in" in log) == (code == 3)


@algo
async def resources_of_spans(store: StoreClient) -> set[str]:
    """Who recorded the spans of a rollout."""
    rollout = await store.enqueue_rollout({"number": 2})
    await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=60, until="sealed")
    return {str(span.resource.get("team")) for span in await store.query_spans(rollout.rollout_id)}


@pytest.mark.parametrize("strategy", ["cs", "shm"])
def test_the_tracer_reaches_the_workers(tmp_path: Path, strategy: str) -> None:
    tracer = OtelTracer(resource={"team": "ours"})
    trainer = Trainer(
        algorithm=resources_of_spans, strategy=strategy, tracer=tracer, run_name="t", run_dir=tmp_path
    )
    assert trainer.fit(agents.halver).value == {"ours"}


class BrokenRunner(LitAgentRunner):
    """A runner with a defect."""

    async def iter(self, event: Any = None) -> None:
        """Breaks at once."""
        raise RuntimeError("no way")


def test_a_thread_that_ends_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    trainer = Trainer(
        algorithm=agents.endless,
        strategy="shm",
        runner={"type": BrokenRunner},
        run_name="broken",
        run_dir=tmp_path,
    )
    with pytest.raises(TrainerError, match="worker 0 ended: no way"):
        trainer.fit(agents.halver)


def test_threads_share_a_tracer_and_know_their_trainer(tmp_path: Path) -> None:
    trainer = Trainer(algorithm=agents.summing, strategy="shm", n_runners=3, run_name="n", run_dir=tmp_path)
    tasks = [{"number": number} for number in range(20)]
    assert trainer.fit("tests.trainer.agents:halver", tasks).value == sum(range(20)) / 2
    assert agents.halver.trainer is trainer


async def test_dev_works_where_an_event_loop_runs_already(tmp_path: Path) -> None:
    hooks = ["tests.trainer.agents:NotingHook"]
    trainer = Trainer(run_dir=tmp_path, hooks=hooks)
    ended = trainer.dev("tests.trainer.agents:halver", [{"number": 4}])
    assert [rollout.status.value for rollout in ended] == ["succeeded"]
    assert agents.NotingHook.ended[-1:] == [ended[0].rollout_id]  # a list of the process, of other tests too
