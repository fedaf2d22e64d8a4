"""`agl-grpc batch`: what was trained, batch by batch, and its samples again."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agl_grpc_cli.connect import with_store
from agl_grpc_cli.errors import CliError
from agl_grpc_cli.options import DEFAULT_STORE, JsonOption, StoreOption
from agl_grpc_cli.output import print_json, print_table

if TYPE_CHECKING:
    from agl_grpc.client import StoreClient
    from agl_grpc.model import Batch
    from agl_grpc.sample import Sample, TokenAccount

app = typer.Typer(help="List, show and replay training batches.", no_args_is_help=True)

BatchArgument = Annotated[str, typer.Argument(metavar="BATCH", help="`ba-…`, or a content hash `sha256:…`.")]


@app.callback()
def group() -> None:
    """List, show and replay training batches."""


@app.command("ls")
def list_batches(
    training_run: Annotated[str, typer.Argument(metavar="TRAINING_RUN", help="The training run.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """List the batches of a training run, in order of their claim."""

    async def read(client: StoreClient) -> list[Batch]:
        return await client.query_batches(training_run)

    batches = with_store(store, "default", read)
    if as_json:
        print_json([asdict(batch) for batch in batches])
        return
    rows = [
        (b.batch_id, b.step, b.status, len(b.entries), b.checkpoint_id or "-", b.content_hash)
        for b in batches
    ]
    headings = ("BATCH", "STEP", "STATUS", "ROLLOUTS", "CHECKPOINT", "CONTENT HASH")
    print_table(headings, rows, empty=f"training run {training_run!r} has no batches")


@app.command()
def show(batch: BatchArgument, store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """Show a batch's manifest: rollouts, groups, rewards and calls as they were when it was made."""

    async def read(client: StoreClient) -> Batch:
        return await _find(client, batch)

    found = with_store(store, "default", read)
    if as_json:
        print_json(asdict(found))
        return
    typer.echo(f"{found.batch_id}  step {found.step}  {found.status}  {found.content_hash}")
    rows = [
        (
            e.rollout_id,
            e.attempt_id,
            e.group_id or "-",
            "-" if e.reward is None else e.reward,
            len(e.span_ids),
        )
        for e in found.entries
    ]
    print_table(("ROLLOUT", "ATTEMPT", "GROUP", "REWARD", "CALLS"), rows, empty="")


@app.command()
def replay(
    batch: BatchArgument,
    store: StoreOption = DEFAULT_STORE,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the samples: .jsonl, .parquet, .safetensors or .pt."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a batch's samples again, bit for bit, and print their digests and token account."""
    from agl_grpc.sample import sample_digest, token_digest
    from agl_grpc_cli.sample_files import write

    async def read(client: StoreClient) -> tuple[str, list[Sample], TokenAccount]:
        found = await _find(client, batch)
        return found.content_hash, *await replayed(client, found.content_hash)

    content_hash, samples, account = with_store(store, "default", read)
    if output is not None:
        write(output, samples)
    if as_json:
        digests = {"rewards": sample_digest(samples), "tokens": token_digest(samples)}
        print_json(
            {"content_hash": content_hash, "rows": len(samples), "digests": digests, **asdict(account)}
        )
        return
    typer.echo(f"{content_hash}  {len(samples)} rows")
    typer.echo(f"digest of rewards and groups  {sample_digest(samples)}")
    typer.echo(f"digest of tokens and masks    {token_digest(samples)}")
    typer.echo(f"captured {account.captured} = trained {account.trained} + observation {account.observation}")
    for reason, count in sorted(account.dropped.items()):
        typer.echo(f"  + {reason} {count}")


async def _find(client: StoreClient, name: str) -> Batch:
    by_hash = name.startswith("sha256:")
    found = await client.get_batch("" if by_hash else name, content_hash=name if by_hash else "")
    if found is None:
        raise CliError(f"the store at {client.target} has no batch {name!r}")
    return found


async def replayed(client: StoreClient, content_hash: str) -> tuple[list[Sample], TokenAccount]:
    """A batch's samples and its token account, whose identity is checked."""
    from agl_grpc.sample import TokenAccount, read_columns, unpack
    from agl_grpc.sample.wire import account_from_proto

    samples: list[Sample] = []
    account = TokenAccount(dropped=Counter())
    async for answer in client.replay_batch(content_hash):
        samples += unpack(read_columns(answer.samples))
        account.add(account_from_proto(answer.account))
    account.check()
    return samples, account
