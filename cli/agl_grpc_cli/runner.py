"""`agl-grpc runner`: workers that execute rollouts with the user's agent."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agl_grpc_cli.errors import EXIT_USAGE, CliError
from agl_grpc_cli.options import DEFAULT_STORE, LogLevelOption, RunOption, StoreOption, parse_labels

if TYPE_CHECKING:
    from agl_grpc.runner.config import RunnerConfig

app = typer.Typer(help="Start workers that execute rollouts with your agent.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Start workers that execute rollouts with your agent."""


@app.command()
def start(
    agent: Annotated[
        str | None,
        typer.Option(metavar="MODULE:NAME", help="A LitAgent, its class, or a decorated function."),
    ] = None,
    isolation: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="thread (default), process, command or kubernetes."),
    ] = None,
    command: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help="The shell command that is the agent (isolation command)."),
    ] = None,
    job_template: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The Job that each rollout becomes (isolation kubernetes)."),
    ] = None,
    namespace: Annotated[
        str | None, typer.Option(metavar="NAME", help="Namespace of the Jobs; default: the cluster's.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Worker processes.")] = 1,
    concurrency: Annotated[
        int, typer.Option(min=1, metavar="N", help="Rollouts that each worker executes at once.")
    ] = 1,
    run: RunOption = "default",
    queue: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Queue to serve, repeatable; default: the run's."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Only rollouts whose labels are all among these."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Worker ids are NAME-0, NAME-1, …; default: host name and process id.")
    ] = None,
    hook: Annotated[
        list[str] | None, typer.Option(metavar="MODULE:NAME", help="Hook around rollouts (repeatable).")
    ] = None,
    tracer: Annotated[
        str | None,
        typer.Option(metavar="MODULE:NAME", help="Tracer's class or factory, e.g. agl_grpc:AgentOpsTracer."),
    ] = None,
    lease: Annotated[
        float,
        typer.Option(min=1.0, max=3600.0, metavar="SECONDS", help="Lease, renewed at a third of it."),
    ] = 30.0,
    drain: Annotated[
        float,
        typer.Option(min=0.0, metavar="SECONDS", help="After SIGTERM or Ctrl-C: time for agents to finish."),
    ] = 30.0,
    max_rollouts: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Leave after N rollouts of each worker.")
    ] = None,
    wait_for_resources: Annotated[
        bool, typer.Option("--wait-for-resources", help="Take nothing before the run has resources.")
    ] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="Place workers as Ray actors over a cluster (agl-grpc[ray]).")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="With --ray: the cluster; default: RAY_ADDRESS."),
    ] = None,
    cpus_per_worker: Annotated[
        float, typer.Option(min=0.0, metavar="N", help="With --ray: processors reserved for each worker.")
    ] = 1.0,
    gpus_per_worker: Annotated[
        float, typer.Option(min=0.0, metavar="N", help="With --ray: GPUs reserved for each worker.")
    ] = 0.0,
    min_workers: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="With --ray: workers that stay when idle; default: --workers."),
    ] = None,
    working_dir: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="With --ray: folder that is copied to every node.")
    ] = None,
    log_level: LogLevelOption = "info",
) -> None:
    """Start workers that take rollouts from a store and execute them with your agent.

    The agent is imported by every worker; modules of the working directory are found. SIGTERM or
    Ctrl-C drains: nothing new is taken, agents may finish, the rest is handed back; a second one
    hands everything back at once.

    \b
    Examples: agl-grpc runner start --agent my_agent:agent --workers 4 --concurrency 16
              agl-grpc runner start --command 'node agent.js' --concurrency 8
              agl-grpc runner start --agent my_agent:agent --ray --workers 64 --cpus-per-worker 2
    """
    from agl_grpc.runner.config import RunnerConfig, default_name
    from agl_grpc.runner.logs import configure_logging

    if not ray and any((address, min_workers is not None, working_dir, gpus_per_worker)):
        message = "--address, --gpus-per-worker, --min-workers and --working-dir go with --ray"
        raise CliError(message, exit_code=EXIT_USAGE)
    try:
        configure_logging(log_level)
    except ValueError as error:
        raise CliError(str(error), exit_code=EXIT_USAGE) from error
    try:
        config = RunnerConfig(
            agent=agent,
            isolation=isolation or ("command" if command else "kubernetes" if job_template else "thread"),
            command=command or "",
            job_template=job_template or "",
            namespace=namespace,
            store=store,
            workers=workers,
            concurrency=concurrency,
            run_id=run,
            queues=tuple(queue or ()),
            labels=parse_labels(label or []),
            name=name or default_name(),
            hooks=tuple(hook or ()),
            tracer=tracer,
            lease_seconds=lease,
            drain_seconds=drain,
            max_rollouts=max_rollouts,
            wait_for_resources=wait_for_resources,
            # What Ray copies lies elsewhere on each node; Ray puts it on the import path itself.
            app_dir=None if working_dir else os.getcwd(),
            log_level=log_level,
        )
    except ValueError as error:
        raise CliError(str(error), exit_code=EXIT_USAGE) from error
    options = {
        "address": address,
        "cpus_per_worker": cpus_per_worker,
        "gpus_per_worker": gpus_per_worker,
        "min_workers": min_workers,
        "working_dir": working_dir,
    }
    _run(config, options if ray else None)


def _run(config: RunnerConfig, placement: dict[str, Any] | None) -> None:
    from agl_grpc.runner.restarts import WorkerStartError

    try:
        if placement is None:
            from agl_grpc.runner.supervisor import Supervisor

            Supervisor(config).run()
        else:
            from agl_grpc.runner.ray_fleet import Placement, RayFleet

            RayFleet(config, Placement(**placement)).run()
    except WorkerStartError as error:
        raise CliError(str(error)) from error
