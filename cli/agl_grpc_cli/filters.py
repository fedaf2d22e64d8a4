"""Options by which commands choose rollouts: the same ones for every command."""

from __future__ import annotations

import functools
import inspect
import re
import time
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from agl_grpc_cli.options import RunOption, parse_labels

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
Many = list[str] | None


def parse_span(text: str, option: str) -> float:
    """Turns `30m`, `12h` or `7d` into seconds; raises a usage error that names the option."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if match is None:
        raise typer.BadParameter(f"{option} {text!r}: write a number and a unit, for example 30m, 12h or 7d")
    return float(match[1]) * _UNITS[match[2]]


def parse_age(text: str | None, option: str) -> float | None:
    """Turns `30m`, `12h` or `7d` into the moment so long ago, in seconds since the epoch."""
    return None if text is None else time.time() - parse_span(text, option)


def choose(
    run: RunOption = "default",
    ids: Annotated[Many, typer.Option("--id", metavar="ID", help="Only this rollout, repeatable.")] = None,
    contains: Annotated[str | None, typer.Option(metavar="TEXT", help="Only ids with this part.")] = None,
    status: Annotated[Many, typer.Option(metavar="STATUS", help="Only in this state, repeatable.")] = None,
    group: Annotated[Many, typer.Option(metavar="ID", help="Only of this group, repeatable.")] = None,
    queue: Annotated[Many, typer.Option(metavar="NAME", help="Only of this queue, repeatable.")] = None,
    mode: Annotated[Many, typer.Option(metavar="MODE", help="Only train, val or test, repeatable.")] = None,
    label: Annotated[
        Many, typer.Option(metavar="KEY=VALUE", help="Only with this label, repeatable.")
    ] = None,
    failure: Annotated[
        Many, typer.Option(metavar="KIND", help="Only failed for this kind of reason, repeatable.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Only made longer ago, as in 12h or 7d.")
    ] = None,
    newer_than: Annotated[str | None, typer.Option(metavar="AGE", help="Only made more recently.")] = None,
    ended_before: Annotated[str | None, typer.Option(metavar="AGE", help="Only ended longer ago.")] = None,
    ended_within: Annotated[str | None, typer.Option(metavar="AGE", help="Only ended more recently.")] = None,
) -> Any:
    """The RolloutFilter that the options say; `--run '*'` = of all runs."""
    from agl_grpc.client import rollout_filter

    try:
        return rollout_filter(
            run_id=run,
            rollout_id_in=ids,
            rollout_id_contains=contains,
            status_in=status,
            group_id_in=group,
            queue_in=queue,
            mode_in=mode,
            labels=parse_labels(label or []),
            failure_kind_in=failure,
            create_time_before=parse_age(older_than, "--older-than"),
            create_time_after=parse_age(newer_than, "--newer-than"),
            end_time_before=parse_age(ended_before, "--ended-before"),
            end_time_after=parse_age(ended_within, "--ended-within"),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def takes_filter(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of `choose`; its parameter `chosen` is what they choose."""
    shared, own = inspect.signature(choose).parameters, inspect.signature(command).parameters
    hints = get_type_hints(choose, include_extras=True) | get_type_hints(command, include_extras=True)

    @functools.wraps(command)
    def filled(**given: Any) -> None:
        chosen = choose(**{name: given.pop(name) for name in shared})
        command(chosen=chosen, **given)

    parameters = [parameter for name, parameter in own.items() if name != "chosen"] + list(shared.values())
    filled.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # read by inspect.signature
        [
            parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in parameters
        ]
    )
    filled.__annotations__ = {parameter.name: hints[parameter.name] for parameter in parameters}
    return filled


def narrow(chosen: Any, rollout_ids: list[str], everything: bool) -> Any:
    """The filter of a command that changes things: ids, conditions, or `--all` for all of the run."""
    if rollout_ids:
        chosen.rollout_id_in.extend(rollout_ids)
        chosen.run_id = "*"
    elif not everything and {field.name for field, _ in chosen.ListFields()} <= {"run_id", "logic"}:
        raise typer.BadParameter(
            f"name rollouts, give conditions, or say --all for all of run {chosen.run_id!r}"
        )
    return chosen
