"""`agl-grpc sample`: why a token was trained or not; samples as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agl_grpc_cli.connect import with_store
from agl_grpc_cli.errors import CliError
from agl_grpc_cli.options import DEFAULT_STORE, JsonOption, StoreOption
from agl_grpc_cli.output import print_json, print_table

if TYPE_CHECKING:
    from agl_grpc.client import StoreClient
    from agl_grpc.model import Rollout
    from agl_grpc.sample import AttemptSamples

app = typer.Typer(help="Explain tokens; export samples.", no_args_is_help=True)

_ROLLOUTS_AT_ONCE = 200


@app.callback()
def group() -> None:
    """Explain tokens; export samples."""


@app.command()
def explain(
    rollout_id: Annotated[str, typer.Argument(help="The rollout.")],
    store: StoreOption = DEFAULT_STORE,
    attempt: Annotated[str, typer.Option(metavar="ID", help="The attempt.")] = "latest",
    call: Annotated[str | None, typer.Option(metavar="SPAN", help="Only this model call (span id).")] = None,
    token: Annotated[
        int | None,
        typer.Option(min=0, help="Only this token, counted from 0 at the start of a call's prompt."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say of every token of a rollout's model calls why it was trained, masked or dropped."""

    async def read(client: StoreClient) -> list[dict[str, Any]]:
        spans = await client.query_spans(rollout_id, attempt, omit_tokens=True)
        calls = [span for span in spans if span.model_call and call in (None, span.span_id)]
        if not calls:
            which = f"model call {call!r}" if call else "model calls"
            raise CliError(f"attempt {attempt!r} of rollout {rollout_id!r} has no {which}")
        rows = []
        for span in calls:
            for choice in sorted(item.index for item in span.model_call.choices):  # type: ignore[union-attr] # filtered
                rows += await _stretches(client, rollout_id, span.attempt_id, span.span_id, choice)
        return rows

    rows = with_store(store, "default", read)
    if token is not None:
        rows = [row for row in rows if row["start"] <= token < row["end"]]
    if as_json:
        print_json(rows)
        return
    cells = [
        (row["call"], row["choice"], f"{row['start']}-{row['end'] - 1}", row["fate"], row["reason"])
        for row in rows
    ]
    print_table(("CALL", "CHOICE", "TOKENS", "FATE", "WHY"), cells, empty=f"no call has a token {token}")


async def _stretches(
    client: StoreClient, rollout_id: str, attempt_id: str, span_id: str, choice: int
) -> list[dict[str, Any]]:
    from agl_grpc.v1.batch_pb2 import TokenFate

    answer = await client.explain_tokens(rollout_id, span_id, attempt_id=attempt_id, choice=choice)
    return [
        {
            "call": span_id,
            "choice": choice,
            "start": each.start,
            "end": each.end,
            "fate": TokenFate.Name(each.fate).removeprefix("TOKEN_FATE_").lower(),
            "reason": each.reason,
            "batches": list(each.batch_ids),
        }
        for each in answer.explanations
    ]


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The file to write.")],
    store: StoreOption = DEFAULT_STORE,
    form: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="FORMAT", help="jsonl, parquet, safetensors or pt; default: by the file."
        ),
    ] = None,
    min_reward: Annotated[float | None, typer.Option(help="Only rollouts with at least this reward.")] = None,
    best_of_group: Annotated[
        int, typer.Option(min=0, help="Only so many of each group, those with the highest rewards; 0 = all.")
    ] = 0,
    model: Annotated[str, typer.Option(help="Only calls of this model; default: all.")] = "",
) -> None:
    """Write the samples of a run's succeeded training rollouts to a file."""
    from agl_grpc_cli.sample_files import write

    async def read(client: StoreClient) -> list[AttemptSamples]:
        return await _attempts(client, model)

    attempts = [each for each in with_store(store, run, read) if each.rows]
    if min_reward is not None:
        attempts = [each for each in attempts if each.reward is not None and each.reward >= min_reward]
    if best_of_group:
        attempts = _best(attempts, best_of_group)
    count = write(output, (row for each in attempts for row in each.rows), form)
    typer.echo(f"{output}  {count} rows of {len(attempts)} rollouts")


def _best(attempts: list[AttemptSamples], count: int) -> list[AttemptSamples]:
    groups: dict[str, list[AttemptSamples]] = {}
    for each in attempts:
        groups.setdefault(each.group_id or each.rollout_id, []).append(each)
    kept = [
        each
        for members in groups.values()
        for each in sorted(members, key=lambda each: -(each.reward or 0.0))[:count]
    ]
    chosen = {id(each) for each in kept}
    return [each for each in attempts if id(each) in chosen]


async def _attempts(client: StoreClient, model: str) -> list[AttemptSamples]:
    from agl_grpc.client import rollout_filter
    from agl_grpc.learner.rollouts.attempts import read_attempts
    from agl_grpc.sample import SampleRules

    chosen = rollout_filter(run_id=client.run_id, status_in=["succeeded"], mode_in=["train"])
    rollouts: list[Rollout] = list(await client.query_rollouts(filter=chosen))
    made: list[AttemptSamples] = []
    for start in range(0, len(rollouts), _ROLLOUTS_AT_ONCE):
        part = rollouts[start : start + _ROLLOUTS_AT_ONCE]
        made += await read_attempts(client, part, SampleRules(model=model))
    return made
