"""`agl-grpc proxy serve`: capture in front of engines that somebody else runs."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from agl_grpc.interceptor.front.settings import LOGPROBS_MODES, BadUpstream, ProxySettings, parse_upstream
from agl_grpc.interceptor.settings import UNATTRIBUTED
from agl_grpc_cli.errors import CliError
from agl_grpc_cli.options import (
    DEFAULT_STORE,
    KeepRawOption,
    LogLevelOption,
    MaxCallsOption,
    MaxConcurrencyOption,
    MaxTokensOption,
    RunOption,
    StoreOption,
    parse_size,
)

app = typer.Typer(
    help="Capture model calls in front of engines that somebody else runs.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_UPSTREAM_HELP = "An engine; MODEL= where it serves that model only. May be given several times."


@app.callback()
def proxy() -> None:
    """Capture model calls in front of engines that somebody else runs."""


@app.command()
def serve(
    upstream: Annotated[
        list[str] | None, typer.Option("--upstream", "-u", metavar="[MODEL=]URL", help=_UPSTREAM_HELP)
    ] = None,
    upstreams: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="More engines, one `[MODEL=]URL [drain]` a line; read again on SIGHUP.",
        ),
    ] = None,
    upstream_key_env: Annotated[
        str, typer.Option(metavar="VARIABLE", help="Environment variable with the engines' API key.")
    ] = "AGL_PROXY_UPSTREAM_KEY",
    host: Annotated[str, typer.Option(metavar="HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="Port; 0 = any.")] = 8100,
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Processes that serve; a rollout's calls are all served by one of them.",
        ),
    ] = 1,
    store: StoreOption = DEFAULT_STORE,
    run: RunOption = ProxySettings.run_id,
    unattributed: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="Calls that name no attempt: serve, record (as rollouts of --external-run), refuse.",
        ),
    ] = ProxySettings.unattributed,
    external_run: Annotated[
        str, typer.Option(metavar="ID", help="The run of recorded calls that name no attempt.")
    ] = ProxySettings.external_run,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="T", help="Impose this temperature on training calls."),
    ] = ProxySettings.temperature,
    logprobs_mode: Annotated[
        str,
        typer.Option(
            metavar="MODE",
            help="What the engines' logprobs mean (vLLM's --logprobs-mode): raw, processed or unknown.",
        ),
    ] = ProxySettings.logprobs_mode,
    token_ids: Annotated[
        bool,
        typer.Option(
            "--token-ids/--no-token-ids",
            help="Ask engines for token ids (vLLM's return_token_ids) and logprobs.",
        ),
    ] = ProxySettings.token_ids,
    policy_version: Annotated[
        int, typer.Option(min=0, metavar="N", help="The policy version in force where the store knows none.")
    ] = ProxySettings.policy_version,
    max_calls: MaxCallsOption = ProxySettings.max_calls,
    max_tokens: MaxTokensOption = ProxySettings.max_tokens,
    max_concurrency: MaxConcurrencyOption = ProxySettings.max_concurrency,
    max_in_flight: Annotated[
        int, typer.Option(min=1, metavar="N", help="Most requests at one time; more are answered 503.")
    ] = ProxySettings.max_in_flight,
    max_body: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest request: bytes, or with K, M, G.")
    ] = f"{ProxySettings.max_body >> 20}M",
    keep_raw: KeepRawOption = ProxySettings.keep_raw,
    spool_dir: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Where calls lie until the store has them.")
    ] = None,
    spool_bytes: Annotated[
        int, typer.Option(min=0, metavar="BYTES", help="How much may lie there.")
    ] = ProxySettings.spool_bytes,
    ack_timeout: Annotated[
        float,
        typer.Option(
            min=0.01, metavar="SECONDS", help="How long the store may take before it counts as away."
        ),
    ] = ProxySettings.ack_timeout,
    connect_timeout: Annotated[
        float, typer.Option(min=0.01, metavar="SECONDS", help="For a connection to an engine.")
    ] = ProxySettings.connect_timeout,
    read_timeout: Annotated[
        float, typer.Option(min=0.01, metavar="SECONDS", help="Longest silence of an engine.")
    ] = ProxySettings.read_timeout,
    drain_timeout: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="How long running requests may take at the end.")
    ] = ProxySettings.drain_timeout,
    log_level: LogLevelOption = "info",
) -> None:
    """Serve OpenAI-compatible engines to agents, the exact tokens of their calls captured.

    Agents use the base URL http://HOST:PORT/rollout/ROLLOUT/attempt/ATTEMPT/v1, or http://HOST:PORT/v1 with
    the attempt's credential as API key or with the headers X-Rollout-Id and X-Attempt-Id. Token ids and
    logprobs of chat completions and completions come from engines that know return_token_ids (vLLM); what
    cannot be had is recorded and marked as not trainable. GET /agl/interceptor answers counters.
    """
    if unattributed not in UNATTRIBUTED:
        raise typer.BadParameter("write serve, record or refuse", param_hint="--unattributed")
    if logprobs_mode not in LOGPROBS_MODES:
        raise typer.BadParameter("write raw, processed or unknown", param_hint="--logprobs-mode")
    if not upstream and upstreams is None:
        raise typer.BadParameter("name at least one engine", param_hint="--upstream")
    body_limit = parse_size(max_body)
    from agl_grpc.interceptor.capture.spool import SpoolInUse
    from agl_grpc.interceptor.front.command import run_proxy
    from agl_grpc.interceptor.front.workers import WorkersFailed
    from agl_grpc.runner.logs import LEVELS, configure_logging

    if log_level.lower() not in LEVELS:
        raise typer.BadParameter(f"write {', '.join(LEVELS)}", param_hint="--log-level")

    settings = ProxySettings(
        store=store,
        run_id=run,
        spool_dir="" if spool_dir is None else str(spool_dir),
        spool_bytes=spool_bytes,
        ack_timeout=ack_timeout,
        temperature=temperature,
        logprobs_mode=logprobs_mode,
        token_ids=token_ids,
        policy_version=policy_version,
        unattributed=unattributed,
        external_run=external_run,
        max_calls=max_calls,
        max_tokens=max_tokens,
        max_concurrency=max_concurrency,
        max_in_flight=max_in_flight,
        max_body=body_limit,
        keep_raw=keep_raw,
        upstream_key=os.environ.get(upstream_key_env) or None,
        connect_timeout=connect_timeout,
        read_timeout=read_timeout,
        drain_timeout=drain_timeout,
    )
    try:
        configure_logging(log_level)
        named = [parse_upstream(text) for text in upstream or []]
        run_proxy(
            settings,
            named,
            host,
            port,
            upstreams_file=upstreams,
            workers=workers,
            prepare=partial(configure_logging, log_level),
        )
    except (BadUpstream, SpoolInUse, WorkersFailed) as error:
        raise CliError(str(error)) from error
    except OSError as error:
        place = error.filename or f"{host}:{port}"
        raise CliError(f"cannot serve with {place}: {error.strerror or error}") from error
