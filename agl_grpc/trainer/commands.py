"""The command lines of the parts that the trainer starts."""

from __future__ import annotations

import socket
import sys
import uuid
from pathlib import Path

from agl_grpc.runner.config import RunnerConfig
from agl_grpc.trainer.options import EngineOptions
from agl_grpc.trainer.plan import Plan
from agl_grpc.trainer.processes import Command, Forked, Function, child_environment
from agl_grpc.trainer.run_folder import RunFolder


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def store_part(folder: RunFolder, port: int, mark: str, host: str = "127.0.0.1") -> Command:
    """The store over the run's database."""
    command = [sys.executable, "-m", "agl_grpc_cli", "store", "serve", "--port", str(port), "--no-http"]
    command += ["--host", host, "--database", str(folder.database)]
    return Command("store", command, folder.log("store"), mark, child_environment())


def engine_part(
    folder: RunFolder,
    python: str,
    *,
    model: str,
    model_name: str,
    store: str,
    port: int,
    policy_version: int,
    options: EngineOptions,
    mark: str,
    name: str = "engine",
) -> Command:
    """vLLM with capture, serving ``model`` as ``model_name``; of several, each has a name of its own."""
    command = [python, "-m", "agl_grpc_cli", "vllm", "serve", model, "--store", store, "--run", folder.name]
    # A name of its own at each start: what was promised to an engine of an earlier start is void.
    command += ["--engine-id", f"{folder.name}-{name}-{uuid.uuid4().hex[:8]}"]
    command += ["--policy-version", str(policy_version), "--spool-dir", str(folder.spool(name))]
    command += ["--served-model-name", model_name, "--host", options.host, "--port", str(port)]
    environment = child_environment(python)
    if Path(model).expanduser().is_dir():
        environment.setdefault("HF_HUB_OFFLINE", "1")
    if options.visible_devices:
        environment["CUDA_VISIBLE_DEVICES"] = options.visible_devices
    return Command(name, [*command, *options.arguments], folder.log(name), mark, environment)


def learner_part(
    folder: RunFolder,
    python: str,
    *,
    config: Path,
    store: str,
    resume: bool,
    mark: str,
    name: str = "learner",
) -> Command:
    """verl, fed by the store; where there are several, each has a name of its own."""
    command = [python, "-m", "agl_grpc_cli", "learner", "--config", str(config), "--store", store]
    if resume:
        command.append("--resume")
    return Command(name, command, folder.log(name), mark, child_environment(python))


def runner_part(folder: RunFolder, config: RunnerConfig, mark: str) -> Function:
    """The workers; the agent is handed over as an object, so that it may live in the user's script."""
    return Function("runner", run_workers, (config,), folder.log("runner"), mark)


def forked_runner_part(plan: Plan, mark: str) -> Forked:
    """The workers as copies of this program; it runs once it is told the store's address."""
    return Forked(
        "runner", lambda store: run_workers(plan.runner_config(store)), plan.folder.log("runner"), mark
    )


def run_workers(config: RunnerConfig) -> None:
    """Body of the workers' parent process."""
    from agl_grpc.runner.logs import configure_logging
    from agl_grpc.runner.restarts import WorkerStartError
    from agl_grpc.runner.supervisor import Supervisor

    configure_logging(config.log_level)
    try:
        Supervisor(config).run()
    except WorkerStartError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
