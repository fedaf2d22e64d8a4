"""`agl-grpc runs diff`: what differs between two runs."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agl_grpc_cli.connect import with_store
from agl_grpc_cli.errors import CliError
from agl_grpc_cli.options import DEFAULT_STORE, JsonOption, StoreOption
from agl_grpc_cli.output import print_json, print_table

if TYPE_CHECKING:
    from agl_grpc.client import StoreClient
    from agl_grpc.manifest import RunRecord
    from agl_grpc.model import StepMetrics

_WHAT = "A run's folder, or the id of a training run in the store."
_WIDEST = 60


def add_commands(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(diff)


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=_WHAT)],
    b: Annotated[str, typer.Argument(metavar="B", help=_WHAT)],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Say what differs between two runs: seed, data, configuration, versions, git, hardware; and the metrics.

    Of each run the last session counts. The metrics are those of the last step, side by side.
    """
    from agl_grpc.manifest import ManifestError, compare

    try:
        first, second = (_record(name, store) for name in (a, b))
    except ManifestError as error:
        raise CliError(str(error)) from error
    differences = compare(first, second)
    metrics = _metrics(first, second)
    if as_json:
        steps = {"a": first.step, "b": second.step}
        print_json(
            {"differences": [asdict(each) for each in differences], "last_step": steps, "metrics": metrics}
        )
        return
    rows = [(each.section, each.key, _short(each.a), _short(each.b)) for each in differences]
    names = _headings(a, b)
    print_table(("", "KEY", *names), rows, empty="nothing differs but the time")
    if metrics:
        typer.echo()
        shown = [
            (name, _number(values["a"]), _number(values["b"])) for name, values in sorted(metrics.items())
        ]
        print_table((f"STEP {first.step} | {second.step}", *names), shown, empty="")


def _record(name: str, store: str) -> RunRecord:
    from agl_grpc.manifest import RunRecord
    from agl_grpc.manifest.diff import manifest_key

    folder = Path(name)
    if folder.is_dir():
        return RunRecord.read(folder)

    async def read(client: StoreClient) -> RunRecord | None:
        run = await client.get_training_run_by_id(name)
        if run is None:
            return None
        if not run.metadata:  # a worker that took it up has noted its manifest at the run
            owner = await client.get_run_by_id(run.run_id)
            notes = owner.metadata.get(manifest_key(name), {}) if owner is not None else {}
            run = replace(run, metadata=notes)
        steps: list[StepMetrics] = []
        # One that has ended is read to its end; one that goes on, to the step that it has come to.
        ended = run.status.is_terminal
        changes = client.watch_training_run(name, from_step=0 if ended else run.step)
        async with contextlib.aclosing(changes):
            async for _, items in changes:
                steps.extend(items)
                if not ended:
                    break
        return RunRecord.of_store(run, steps)

    found = with_store(store, "default", read)
    if found is None:
        raise CliError(f"{name!r} is neither a run's folder nor a training run in the store at {store}")
    return found


def _metrics(a: RunRecord, b: RunRecord) -> dict[str, dict[str, float | None]]:
    names = sorted({*a.metrics, *b.metrics})
    return {name: {"a": a.metrics.get(name), "b": b.metrics.get(name)} for name in names}


def _headings(a: str, b: str) -> tuple[str, str]:
    return (Path(a).name, Path(b).name) if Path(a).name != Path(b).name else (a, b)


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
