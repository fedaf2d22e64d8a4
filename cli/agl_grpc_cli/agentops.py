"""`agl-grpc agentops`: a local stand-in for the AgentOps service."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from agl_grpc_cli.errors import EXIT_USAGE, CliError
from agl_grpc_cli.options import DEFAULT_STORE, LogLevelOption, StoreOption

app = typer.Typer(help="Serve what the AgentOps SDK calls, offline; its spans go to the store.")

PortOption = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 = any free one.")]
HostOption = Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")]
DaemonOption = Annotated[
    bool, typer.Option("--daemon", help="Go to the background; `stop` and `status` find it by its port.")
]

_PORT = 8002


@app.callback(invoke_without_command=True)
def agentops(
    context: typer.Context,
    port: PortOption = _PORT,
    host: HostOption = "127.0.0.1",
    store: StoreOption = DEFAULT_STORE,
    daemon: DaemonOption = False,
    log_level: LogLevelOption = "info",
) -> None:
    """Serve until Ctrl-C. AGENTOPS_API_ENDPOINT and AGENTOPS_EXPORTER_ENDPOINT point the SDK here."""
    if context.invoked_subcommand is not None:
        return
    if daemon:
        _start(port, host, store)
        return
    from agl_grpc.agentops.server import ServerConfig, serve
    from agl_grpc.store.door.server import StartError
    from agl_grpc.store.logs import setup_logging

    try:
        setup_logging(log_level)
    except ValueError as error:
        raise CliError(f"log level {log_level!r} is unknown", exit_code=EXIT_USAGE) from error
    try:
        asyncio.run(serve(ServerConfig(host, port, store)))
    except StartError as error:
        raise CliError(str(error)) from error


def _start(port: int, host: str, store: str) -> None:
    from agl_grpc.agentops import daemon

    if port == 0:
        raise CliError("--daemon needs a port by which to find it again", exit_code=EXIT_USAGE)
    try:
        started = daemon.start(port, host, store)
    except daemon.DaemonError as error:
        raise CliError(str(error)) from error
    typer.echo(f"AgentOps server at http://{host}:{port}, process {started.pid}, log {daemon.log_file(port)}")


@app.command()
def stop(port: PortOption = _PORT) -> None:
    """Stop the server that runs in the background."""
    from agl_grpc.agentops import daemon

    try:
        stopped = daemon.stop(port)
    except daemon.DaemonError as error:
        raise CliError(str(error)) from error
    typer.echo(f"Stopped the AgentOps server on port {port}, process {stopped.pid}")


@app.command()
def status(port: PortOption = _PORT, host: HostOption = "127.0.0.1") -> None:
    """Say whether a server runs in the background; exit code 1 = none does, or it does not answer."""
    from agl_grpc.agentops import daemon

    running = daemon.find(port)
    if running is None:
        raise CliError(f"no AgentOps server runs in the background on port {port}")
    if not daemon.is_ready(host, port, running.pid):
        raise CliError(f"the AgentOps server on port {port}, process {running.pid}, does not answer")
    typer.echo(f"AgentOps server on port {port} runs as process {running.pid}; log {daemon.log_file(port)}")
