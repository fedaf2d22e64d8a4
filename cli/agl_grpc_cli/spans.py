"""`agl-grpc spans`: the story of a rollout."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from agl_grpc_cli.connect import with_store
from agl_grpc_cli.options import DEFAULT_STORE, JsonOption, StoreOption
from agl_grpc_cli.output import print_json, print_table

if TYPE_CHECKING:
    from agl_grpc.client import StoreClient
    from agl_grpc.model import Span

app = typer.Typer(help="List the spans of a rollout.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """List the spans of a rollout."""


@app.command("ls")
def list_spans(
    rollout_id: Annotated[str, typer.Argument(help="The rollout.")],
    store: StoreOption = DEFAULT_STORE,
    attempt: Annotated[
        str | None, typer.Option(metavar="ID", help="Only of this attempt, or `latest`; default: all.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most spans.")] = 1000,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Only of this name.")] = None,
    contains: Annotated[str | None, typer.Option(metavar="TEXT", help="Only names with this part.")] = None,
    trace: Annotated[str | None, typer.Option(metavar="HEX", help="Only of this trace.")] = None,
    calls: Annotated[bool, typer.Option("--calls", help="Only model calls.")] = False,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="With --json: token ids and logprobs too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List spans in the order in which the store took them; conditions combine, all have to hold."""
    _check_trace(trace)

    async def read(client: StoreClient) -> list[Span]:
        found = await client.query_spans(
            rollout_id,
            attempt,
            name=name,
            name_contains=contains,
            trace_id=trace,
            model_calls_only=calls,
            limit=limit,
            omit_tokens=not tokens,
        )
        return list(found)

    spans = with_store(store, "default", read)
    if as_json:
        print_json([asdict(span) for span in spans])
        return
    rows = [
        (
            span.sequence_id,
            span.attempt_id,
            span.span_id,
            span.parent_id or "-",
            f"{(span.end_time_ns - span.start_time_ns) / 1e6:.1f} ms",
            span.name,
            " ".join(mark for mark, on in (("call", span.model_call is not None), ("late", span.late)) if on),
        )
        for span in spans
    ]
    headings = ("SEQ", "ATTEMPT", "SPAN", "PARENT", "TOOK", "NAME", "")
    such = "such " if attempt or name or contains or trace or calls else ""
    print_table(headings, rows, empty=f"rollout {rollout_id!r} has no {such}spans in the store at {store}")


def _check_trace(trace: str | None) -> None:
    from agl_grpc.model.span import id_bytes

    try:
        id_bytes("--trace", trace or "0" * 32, 16)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
