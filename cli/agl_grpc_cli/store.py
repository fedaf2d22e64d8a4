"""`agl-grpc store`: the store server, and its database."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from agl_grpc_cli import store_files
from agl_grpc_cli.errors import EXIT_USAGE, CliError
from agl_grpc_cli.options import DEFAULT_DATABASE, LogLevelOption, parse_size

app = typer.Typer(
    help="Serve the store over gRPC and HTTP; back up, restore, compact, migrate and verify its database."
)

LEVELS = ("debug", "info", "warning", "error")

HostOption = Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="Port of the gRPC door; 0 = any free one.")]
HttpPortOption = Annotated[
    int | None,
    typer.Option(min=0, max=65535, help="Port of the HTTP door (REST, OTLP); 0 = any. Default: --port + 1."),
]
NoHttpOption = Annotated[bool, typer.Option("--no-http", help="Open no HTTP door.")]
OtlpOption = Annotated[
    bool, typer.Option("--otlp", help="Listen on OpenTelemetry's own ports too: 4317 (gRPC), 4318 (HTTP).")
]
CorsOption = Annotated[
    list[str],
    typer.Option("--cors-origin", metavar="ORIGIN", help="Web pages of this origin may call; * = all."),
]
TlsCertOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Serve with TLS: the certificate and its chain, PEM.")
]
TlsKeyOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key, PEM.")]
TlsClientCaOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Serve only clients with a certificate of these issuers, PEM."),
]
DatabaseOption = Annotated[
    str,
    typer.Option(
        metavar="PATH|URL",
        help="The SQLite file that holds everything, made when missing; or postgresql://user@host/name.",
    ),
]
MemoryOption = Annotated[
    bool, typer.Option("--memory", help="Keep nothing: a throw-away database that is gone at exit.")
]
SizeOption = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="With --memory: evict old spans above so much, as in 800M or 4G."),
]
SafeOption = Annotated[
    str | None, typer.Option(metavar="SIZE", help="With --memory: evict until there is no more than this.")
]
GraceOption = Annotated[
    float, typer.Option(min=0.0, metavar="SECONDS", help="After SIGTERM or Ctrl-C: time for calls under way.")
]

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 4747
DEFAULT_GRACE = 10.0
_LAST_PORT = 65535


@app.callback(invoke_without_command=True)
def store(
    context: typer.Context,
    host: HostOption = DEFAULT_HOST,
    port: PortOption = DEFAULT_PORT,
    http_port: HttpPortOption = None,
    no_http: NoHttpOption = False,
    otlp: OtlpOption = False,
    cors_origin: CorsOption = [],  # noqa: B006  # typer reads it, nobody changes it
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    tls_client_ca: TlsClientCaOption = None,
    database: DatabaseOption = DEFAULT_DATABASE,
    memory: MemoryOption = False,
    evict_above: SizeOption = None,
    evict_to: SafeOption = None,
    grace: GraceOption = DEFAULT_GRACE,
    log_level: LogLevelOption = "info",
) -> None:
    """Serve the store. `agl-grpc store --port N` is short for `agl-grpc store serve --port N`."""
    if context.invoked_subcommand is None:
        _serve(
            _Doors(host, port, http_port, no_http, otlp, cors_origin, (tls_cert, tls_key, tls_client_ca)),
            *(database, memory, (evict_above, evict_to), grace, log_level),
        )
    elif given := _given_options(context):
        raise typer.BadParameter(f"write {given} after `{context.invoked_subcommand}`, not before it")


@app.command()
def serve(
    host: HostOption = DEFAULT_HOST,
    port: PortOption = DEFAULT_PORT,
    http_port: HttpPortOption = None,
    no_http: NoHttpOption = False,
    otlp: OtlpOption = False,
    cors_origin: CorsOption = [],  # noqa: B006  # typer reads it, nobody changes it
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    tls_client_ca: TlsClientCaOption = None,
    database: DatabaseOption = DEFAULT_DATABASE,
    memory: MemoryOption = False,
    evict_above: SizeOption = None,
    evict_to: SafeOption = None,
    grace: GraceOption = DEFAULT_GRACE,
    log_level: LogLevelOption = "info",
) -> None:
    """Serve the store until SIGTERM or Ctrl-C.

    What was acknowledged is on disk, also after kill -9. A port in use, a corrupt database, one that
    cannot be reached or a full disk: one line says why, exit code 1.
    """
    _serve(
        _Doors(host, port, http_port, no_http, otlp, cors_origin, (tls_cert, tls_key, tls_client_ca)),
        *(database, memory, (evict_above, evict_to), grace, log_level),
    )


store_files.add_commands(app)


class _Doors(NamedTuple):
    """What the options say of the ports."""

    host: str
    port: int
    http_port: int | None
    no_http: bool
    otlp: bool
    cors_origins: list[str]
    tls_files: tuple[Path | None, Path | None, Path | None]

    def chosen_http_port(self) -> int | None:
        """The HTTP door's port; None = no such door."""
        if self.no_http:
            if self.http_port is not None:
                raise CliError("--no-http and --http-port exclude each other", exit_code=EXIT_USAGE)
            return None
        if self.http_port is not None:
            return self.http_port
        if self.port == _LAST_PORT:
            raise CliError(f"there is no port after {_LAST_PORT}: choose --http-port", exit_code=EXIT_USAGE)
        return self.port + 1 if self.port else 0


def _serve(
    doors: _Doors,
    database: str,
    memory: bool,
    eviction: tuple[str | None, str | None],
    grace: float,
    log_level: str,
) -> None:
    if log_level.lower() not in LEVELS:
        raise CliError(f"log level {log_level!r} is none of {', '.join(LEVELS)}", exit_code=EXIT_USAGE)
    if any(eviction) and not memory:
        raise CliError("spans are evicted from throw-away stores only: say --memory", exit_code=EXIT_USAGE)
    evict_above, evict_to = (None if size is None else parse_size(size) for size in eviction)
    from agl_grpc.store.door.app import ServeConfig
    from agl_grpc.store.door.server import StartError
    from agl_grpc.store.door.tls import TlsFiles
    from agl_grpc.store.serve import serve as serve_store

    try:
        tls = TlsFiles.of(*doors.tls_files)
    except StartError as error:
        raise CliError(str(error), exit_code=EXIT_USAGE) from error
    config = ServeConfig(
        host=doors.host,
        port=doors.port,
        http_port=doors.chosen_http_port(),
        otlp=doors.otlp,
        cors_origins=tuple(doors.cors_origins),
        tls=tls,
        database=None if memory else database,
        evict_above=evict_above,
        evict_to=evict_to,
        grace=grace,
        log_level=log_level.upper(),
    )
    raise typer.Exit(serve_store(config))


def _given_options(context: typer.Context) -> str:
    given = (parameter.opts[0] for parameter in context.command.params if _is_given(context, parameter.name))
    return ", ".join(given)


def _is_given(context: typer.Context, name: str | None) -> bool:
    source = context.get_parameter_source(name) if name else None
    return source is not None and source.name == "COMMANDLINE"
