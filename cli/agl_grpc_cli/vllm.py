"""`agl-grpc vllm serve`: vLLM's own server with capture and weight swaps switched on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from agl_grpc.interceptor.settings import (
    ON_SWAP,
    RUNNING_ON_SWAP,
    UNATTRIBUTED,
    Settings,
    default_engine_id,
)
from agl_grpc_cli.errors import CliError
from agl_grpc_cli.options import (
    DEFAULT_STORE,
    KeepRawOption,
    MaxCallsOption,
    MaxConcurrencyOption,
    MaxTokensOption,
    RunOption,
    StoreOption,
    parse_size,
)

app = typer.Typer(
    help="Serve a model with vLLM, its exact tokens captured.", no_args_is_help=True, rich_markup_mode=None
)

_PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.callback()
def vllm() -> None:
    """Serve a model with vLLM, its exact tokens captured."""


@app.command(context_settings=_PASS_THROUGH)
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, or its name on the hub.")] = "",
    store: StoreOption = DEFAULT_STORE,
    run: RunOption = Settings.run_id,
    engine_id: Annotated[
        str,
        typer.Option(metavar="ID", help="This engine's name in the run; default: host name and process id."),
    ] = "",
    policy_version: Annotated[
        int, typer.Option(min=0, metavar="N", help="The policy version of the weights on disk.")
    ] = Settings.policy_version,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, metavar="T", help="Impose this temperature on training calls; default: the agent's."
        ),
    ] = Settings.temperature,
    endpoint: Annotated[
        str, typer.Option(metavar="URL", help="Base URL by which others reach this engine.")
    ] = "",
    spool_dir: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Where calls wait while the store is away.")
    ] = None,
    spool_bytes: Annotated[
        int, typer.Option(min=0, metavar="BYTES", help="How much may wait there.")
    ] = Settings.spool_bytes,
    ack_timeout: Annotated[
        float,
        typer.Option(min=0.0, metavar="SECONDS", help="How long an answer's last byte waits for the store."),
    ] = Settings.ack_timeout,
    resume_timeout: Annotated[
        float,
        typer.Option(
            min=0.0, metavar="SECONDS", help="How long answers wait for an engine that aborted them itself."
        ),
    ] = Settings.resume_timeout,
    keep_weights: Annotated[
        bool,
        typer.Option(
            "--keep-weights/--no-keep-weights",
            help="Keep the newest weights beside the spool, so that a restarted engine goes on with them.",
        ),
    ] = Settings.keep_weights,
    unattributed: Annotated[
        str,
        typer.Option(
            metavar="serve|record|refuse",
            help="Calls that name no attempt: record makes them rollouts of --external-run.",
        ),
    ] = Settings.unattributed,
    external_run: Annotated[
        str, typer.Option(metavar="RUN", help="The run of recorded calls that name no attempt.")
    ] = Settings.external_run,
    keep_raw: KeepRawOption = Settings.keep_raw,
    on_swap: Annotated[
        str,
        typer.Option(
            metavar="wait|refuse",
            help="New calls while weights are loaded: they wait, or get 429 with Retry-After.",
        ),
    ] = Settings.on_swap,
    running_on_swap: Annotated[
        str,
        typer.Option(
            metavar="keep|finish|cut",
            help="Running calls of attempts when new weights come: keep lets them go on under these; finish "
            "waits for their end; cut ends those that still run after --swap-timeout.",
        ),
    ] = Settings.running_on_swap,
    swap_timeout: Annotated[
        float,
        typer.Option(
            min=0.0, metavar="SECONDS", help="For running calls to end; with finish the swap fails after it."
        ),
    ] = Settings.swap_timeout,
    max_calls: MaxCallsOption = Settings.max_calls,
    max_tokens: MaxTokensOption = Settings.max_tokens,
    max_concurrency: MaxConcurrencyOption = Settings.max_concurrency,
    max_body: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest request of an attempt: bytes, or with K, M, G.")
    ] = f"{Settings.max_body >> 20}M",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=FOLDER]",
            help="Serve an adapter (LoRA) of MODEL under NAME, which is trained instead of MODEL; without "
            "FOLDER it begins as MODEL is. Give it several times.",
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Keep vLLM's defaults for generation config and logprobs mode.")
    ] = False,
    show_help: Annotated[
        bool, typer.Option("--help", "-h", help="Show this and vLLM's own options.")
    ] = False,
) -> None:
    """Serve MODEL with vLLM's own API server; every option that is not listed here is vLLM's and passed on.

    Agents use the base URL http://HOST:PORT/rollout/ROLLOUT/attempt/ATTEMPT/v1. In the absence of --raw,
    calls sample from the model's own distribution (--generation-config vllm --logprobs-mode
    processed_logprobs).
    """
    from agl_grpc.interceptor.inside.serve import ServeError, run_vllm
    from agl_grpc.interceptor.inside.serve import serve as serve_vllm

    if show_help:
        _help(context, run_vllm)
    if not model:
        raise typer.BadParameter("name the model to serve", param_hint="MODEL")
    if unattributed not in UNATTRIBUTED:
        raise typer.BadParameter("write serve, record or refuse", param_hint="--unattributed")
    if on_swap not in ON_SWAP:
        raise typer.BadParameter("write wait or refuse", param_hint="--on-swap")
    if running_on_swap not in RUNNING_ON_SWAP:
        raise typer.BadParameter("write keep, finish or cut", param_hint="--running-on-swap")
    settings = Settings(
        store=store,
        run_id=run,
        engine_id=engine_id or default_engine_id(),
        policy_version=policy_version,
        spool_dir="" if spool_dir is None else str(spool_dir),
        spool_bytes=spool_bytes,
        ack_timeout=ack_timeout,
        temperature=temperature,
        endpoint=endpoint,
        resume_timeout=resume_timeout,
        keep_weights=keep_weights,
        unattributed=unattributed,
        external_run=external_run,
        keep_raw=keep_raw,
        on_swap=on_swap,
        running_on_swap=running_on_swap,
        swap_timeout=swap_timeout,
        max_calls=max_calls,
        max_tokens=max_tokens,
        max_concurrency=max_concurrency,
        max_body=parse_size(max_body),
        loader=os.environ.get("AGL_INTERCEPTOR_LOADER", "auto"),
    )
    try:
        code = serve_vllm(model, settings, context.args, train=not raw, adapters=_by_name(adapter or ()))
    except ServeError as error:
        raise CliError(str(error)) from error
    raise typer.Exit(code)


def _by_name(adapters: Iterable[str]) -> dict[str, str]:
    """Folder of each adapter by its name; empty where none is given."""
    found: dict[str, str] = {}
    for each in adapters:
        name, _, folder = each.partition("=")
        if not name or name in found:
            raise typer.BadParameter(
                f"write each name once, as NAME or NAME=FOLDER, not {each!r}", param_hint="--adapter"
            )
        found[name] = folder
    return found


def _help(context: typer.Context, run_vllm: object) -> None:
    import importlib.util

    typer.echo(context.get_help())
    if importlib.util.find_spec("vllm") is None or not callable(run_vllm):
        typer.echo("\nvLLM is not installed here, so its own options cannot be shown.")
        raise typer.Exit
    typer.echo("\nvLLM's own options:\n")
    raise typer.Exit(run_vllm(["--help"]))
