"""The life of one worker process, as the supervisor starts it."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from agl_grpc.runner.config import RunnerConfig
from agl_grpc.runner.load import LoadError, load_agent, load_hooks, load_tracer
from agl_grpc.runner.logs import configure_logging

if TYPE_CHECKING:
    from agl_grpc.agent import LitAgent
    from agl_grpc.tracer import Tracer

log = logging.getLogger(__name__)

EXIT_DEFECT = 1
"""Something in the worker broke; its log has the traceback."""

EXIT_FATAL = 3
"""The worker can never run; its report says why."""

TOOK = "it has taken a rollout"
"""A worker's report that it works; all others say why it leaves."""

EXIT_RECYCLE = 4
"""The worker wants a fresh process in its place; its report says why."""


def run_worker_process(config: RunnerConfig, index: int, reports: Connection) -> None:
    """Runs one worker to its end and exits the process: 0 = it has left as it should."""
    # Ctrl-C reaches the whole group of processes; only the supervisor's SIGTERM counts here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked worker begins with its supervisor's handler
    configure_logging(config.log_level)
    from agl_grpc.client import Overloaded, StoreError, StoreUnavailable

    try:
        code = _run(config, index, reports)
    except LoadError as error:
        reports.send(str(error))
        code = EXIT_FATAL
    except (StoreUnavailable, Overloaded):
        log.exception("the store has been away for too long")
        code = EXIT_DEFECT
    except StoreError as error:
        reports.send(f"the store at {config.store} refuses {config.worker_id(index)}: {error}")
        code = EXIT_FATAL
    except Exception:
        log.exception("the worker is broken")
        code = EXIT_DEFECT
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of agents that would not stop must not keep the process; all that matters has been delivered.
    os._exit(code)


def _run(config: RunnerConfig, index: int, reports: Connection) -> int:
    agent, hooks, tracer = load_parts(config)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_work(config, index, agent, hooks, tracer, reports))


def load_parts(config: RunnerConfig) -> tuple[LitAgent[Any] | None, list[Any], Tracer | None]:
    """A worker's agent, hooks and tracer; none of them where its own processes load them.

    Raises:
        LoadError: they cannot be imported.
    """
    if config.isolation == "process":
        return None, [], None
    if config.isolation == "command":
        from agl_grpc.runner.command import CommandAgent

        agent: LitAgent[Any] = CommandAgent(config.command, config.store)
    elif config.isolation == "kubernetes":
        from agl_grpc.runner.kubernetes import KubernetesAgent

        agent = KubernetesAgent(config.job_template, config.namespace, config.store)
    else:
        agent = load_agent(config.agent, config.app_dir)
    hooks = load_hooks(config.hooks, config.app_dir)
    return agent, hooks, load_tracer(config.tracer, config.app_dir)


async def _work(
    config: RunnerConfig,
    index: int,
    agent: LitAgent[Any] | None,
    hooks: list[Any],
    tracer: Tracer | None,
    reports: Connection,
) -> int:
    from agl_grpc.runner.worker import Worker

    worker = Worker(config, config.worker_id(index), agent, hooks, tracer)
    loop = asyncio.get_running_loop()

    def on_terminate() -> None:
        if worker.leaving:
            worker.release_now()
        else:
            worker.drain("SIGTERM")

    def on_orphaned() -> None:
        loop.remove_reader(sentinel)
        worker.drain("the supervisor has gone")

    loop.add_signal_handler(signal.SIGTERM, on_terminate)
    parent = multiprocessing.parent_process()
    sentinel = -1 if parent is None else int(parent.sentinel)
    if parent is not None:
        loop.add_reader(sentinel, on_orphaned)
    worker.on_first_rollout = lambda: reports.send(TOOK)
    await worker.run()
    if worker.worn_out:
        reports.send("agents that would not stop hold its memory")
        return EXIT_RECYCLE
    return 0


def loop_factory() -> Any:
    """Makes the event loops of workers; None = the standard library's."""
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop
